"""An ImageNet network, a decoder that never saw a picture, and the Qwen2-VL that both make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from btok import adapters
from btok.model import BTokModel
from btok.processing import Processor
from btok.tokens import add_to_embeddings, add_to_tokenizer

SPECIAL = [f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")]
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # of the network's training
PATCH, MERGE, FRAMES = 16, 2, 2
NUM_BTOKS = 4
# of the stages of EfficientNet-B0: widening, kernel, stride, channels, blocks
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class Lite0(nn.Sequential):
    """EfficientNet-Lite0 up to its last map: [n, 3, H, W] -> [n, 1280, H / 32, W / 32].

    B0 of arXiv 1905.11946 without squeeze-and-excitation and with ReLU6. It stays in evaluation
    mode: its batch norms keep the statistics of their own training.
    """

    channels = 1280

    def __init__(self) -> None:
        layers: list[nn.Module] = [_convolution(3, 32, kernel=3, stride=2)]
        channels = 32
        for widen, kernel, stride, out, blocks in STAGES:
            for first in [True] + [False] * (blocks - 1):
                layers.append(_Block(channels, out, widen, kernel, stride if first else 1))
                channels = out
        super().__init__(*layers, _convolution(channels, self.channels))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Lite0:
        return super().train(False)

    @classmethod
    def from_pickle(cls, path: Path) -> Lite0:
        """A network with the weights of the package, whose names differ and whose order is the
        same.
        """
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network = cls()
        own = network.state_dict()
        values = [value for name, value in weights.items() if not name.startswith("_fc.")]
        network.load_state_dict(dict(zip(own, values, strict=True)))
        return network


class _Block(nn.Module):
    """Widen, convolve each channel by itself, project; the input is added where it fits."""

    def __init__(self, channels: int, out: int, widen: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = channels * widen
        self.body = nn.Sequential(
            *([_convolution(channels, wide)] if widen > 1 else []),
            _convolution(wide, wide, kernel, stride, groups=wide),
            _convolution(wide, out)[:-1],
        )
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x if self.adds else self.body(x)


def _convolution(
    channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution, its batch norm and ReLU6."""
    # as TensorFlow pads, where it was trained: an odd row and column more at the far sides
    near = (kernel - stride) // 2
    padded = nn.ZeroPad2d((near, kernel - stride - near) * 2)
    inner = nn.Conv2d(channels, out, kernel, stride, groups=groups, bias=False)
    norm = nn.BatchNorm2d(out, eps=1e-3)
    return nn.Sequential(padded if kernel > 1 else nn.Identity(), inner, norm, nn.ReLU6())


class Tower(PreTrainedModel):
    """A network and a fresh projector, which stand in the place of a Qwen2-VL's vision tower.

    Args:
        config: a Qwen2-VL's `vision_config`, whose `hidden_size` is the width of its decoder.
        network: pictures [n, 3, H, W] -> a map [n, `channels`, H / 32, W / 32].
        spread: standard deviation of its token embeddings, which the projector's outputs begin at.
    """

    spatial_merge_size = MERGE
    # it has no attention: any is right that the model around it is set to
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config: Any, network: Any, spread: float) -> None:
        super().__init__(config)
        self.network = network
        last = nn.LayerNorm(config.hidden_size)
        nn.init.constant_(last.weight, spread)
        self.projector = nn.Sequential(
            nn.LayerNorm(network.channels),
            nn.Linear(network.channels, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
            last,
        )

    def forward(self, pixels: Tensor, grid: Tensor, **_: Any) -> SimpleNamespace:
        """Patches of pictures as a processor packs them -> a feature of each merged token.

        Args:
            pixels: [patches, 3 * 2 * 16 * 16], merged tokens one after the other.
            grid: int64 [n, 3], time, height and width in patches; each slot is a picture.
        """
        sizes = grid.tolist()
        parts = pixels.split([t * h * w for t, h, w in sizes])
        shown = [unfolded(part, *size) for part, size in zip(parts, sizes, strict=True)]
        alike = len({picture.shape[1:] for picture in shown}) == 1
        with torch.no_grad():
            maps = [self.network(each) for each in ([torch.cat(shown)] if alike else shown)]
        rows = torch.cat([each.permute(0, 2, 3, 1).flatten(0, 2) for each in maps])
        return SimpleNamespace(pooler_output=self.projector(rows))


def unfolded(patches: Tensor, slots: int, height: int, width: int) -> Tensor:
    """The pictures that packed patches are of, the first of each slot's two frames.

    Args:
        patches: [slots * height * width, 3 * 2 * 16 * 16]; height and width in patches.

    Returns:
        [slots, 3, 16 * height, 16 * width].
    """
    merged = (slots, height // MERGE, width // MERGE, MERGE, MERGE)
    frames = patches.view(*merged, 3, FRAMES, PATCH, PATCH)[:, :, :, :, :, :, 0]
    return frames.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(slots, 3, height * PATCH, width * PATCH)


def shell(decoder: Any, network: Any, ids: Mapping[str, Any]) -> Any:
    """A Qwen2-VL whose language model is a Llama's and whose tower is a `Tower`.

    Its projections of queries, keys and values have biases, which are zero here: the states of a
    text are those of the Llama, bit for bit.

    Args:
        decoder: a LlamaForCausalLM in float32 with tied embeddings.
        ids: the vision tokens' ids by the name of their setting.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    had = decoder.config
    sections = [n * had.head_dim // 16 for n in (2, 3, 3)]
    rope = {**had.rope_parameters, "mrope_section": sections}
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"]
    names += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings", "hidden_act"]
    names += ["bos_token_id", "eos_token_id", "pad_token_id"]
    language = {name: getattr(had, name) for name in names}
    vision: dict[str, Any] = {"patch_size": PATCH, "spatial_merge_size": MERGE}
    # the tower's own layers, of which `depth` makes none, are made and thrown away
    vision |= {"temporal_patch_size": FRAMES, "hidden_size": had.hidden_size, "depth": 0}
    config = Qwen2VLConfig(
        text_config={**language, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=True,
        **ids,
    )
    backbone = Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    spread = float(decoder.get_input_embeddings().weight.detach().std())
    backbone.model.visual = Tower(config.vision_config, network, spread)
    missing, unexpected = backbone.model.language_model.load_state_dict(
        decoder.model.state_dict(), strict=False
    )
    assert not unexpected and all(name.endswith("_proj.bias") for name in missing)
    for name in missing:
        nn.init.zeros_(backbone.model.language_model.get_parameter(name))
    backbone.tie_weights()
    return backbone


def assemble(
    decoder: Any, tokenizer: Any, network: Any, seed: int, **pixels: int
) -> tuple[BTokModel, Processor]:
    """Decoder and network as a model with bottleneck tokens, and its processor.

    What trains is the projector, adapters in the decoder, and the K rows.

    Args:
        decoder, tokenizer: of a Llama; the tokenizer is changed in place.
        pixels: settings of the processor; bounds, say.
    """
    torch.manual_seed(seed)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokens = add_to_tokenizer(tokenizer, NUM_BTOKS)
    found = tokenizer.convert_tokens_to_ids(SPECIAL)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    backbone = shell(decoder, network, dict(zip(names, found, strict=True)))
    add_to_embeddings(backbone, [*found, *tokens], seed=seed)
    lora = adapters.Lora(rank=16, alpha=32, dropout=0.0, dora=False)
    adapters.attach(backbone, lora, tokens, decoder.config.name_or_path)
    backbone.model.visual.projector.requires_grad_(True)  # all but adapters were frozen
    model = BTokModel.from_backbone(backbone, btok_token_ids=tokens)
    processor = Processor(
        tokenizer,
        model_type="qwen2_vl",
        patch_size=PATCH,
        merge_size=MERGE,
        image_mean=MEAN,
        image_std=STD,
        **pixels,
    )
    return model, processor
