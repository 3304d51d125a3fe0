"""The public door to the kernels: `from btok.kernels import condensed_attention`."""

from btok_kernels.condensed_attention import condensed_attention
from btok_kernels.contrastive_loss import contrastive_loss, contrastive_loss_and_grad
from btok_kernels.late_interaction import maxsim
from btok_kernels.layout import CondensedLayout

__all__ = ["CondensedLayout", "condensed_attention"]
__all__ += ["contrastive_loss", "contrastive_loss_and_grad", "maxsim"]
