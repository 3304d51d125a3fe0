"""A CUDA device that is not there: tensors that say `cuda:0`, hold real values on the CPU, and obey
the device's rules. Tensors of two devices do not meet, and what makes the host wait is counted.

    with PretendCuda() as device:
        model.to("cuda")       # any code that is given the device "cuda"
    device.waits               # Counter of (what, file:line of the project)

Every operation is the CPU's own, so results equal the CPU's to the bit. It says it is an sm_70,
for which no Triton kernel is laid out: the paths of plain torch run.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda", 0)
MEMORY = 80 << 30  # bytes
aten = torch.ops.aten
COPIES = (aten.copy_.default,)  # between devices
INDEXED = (  # whose indices may be the host's: they are copied, and the host waits
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
)
WAITS = (  # whose result, or the size of it, the host must know
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
)


class Cuda(Tensor):
    """A tensor of the device; `values` are its own, on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Cuda:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="cpu",  # for autograd, which has no CUDA here
        )
        made.values = values
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Cuda({self.values})"

    # methods, as no mode is there where a backward runs a checkpointed layer again
    def tolist(self) -> Any:
        _current().note("tolist")
        return self.values.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a cuda:0 tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def untyped_storage(self) -> Any:  # by which safetensors finds weights that are one
        return self.values.untyped_storage()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        found = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        ours = [t for t in found if isinstance(t, Cuda)]
        host = [t for t in found if not isinstance(t, Cuda) and t.ndim]  # scalars may meet any
        device = _current()
        if host and func in INDEXED and isinstance(args[0], Cuda):
            device.note("an index of the host")
        elif host and func not in COPIES and func.namespace != "c10d":
            raise RuntimeError(
                f"Expected all tensors to be on the same device, {func} has cuda:0 "
                f"{[list(t.shape) for t in ours]} and cpu {[list(t.shape) for t in host]}"
            )
        if host and func in COPIES:
            device.note("copy_")
        masks = func in INDEXED and any(
            t.dtype == torch.bool for t in tree_leaves(args[1]) if isinstance(t, Cuda)
        )
        if func in WAITS or masks:
            device.note(str(func))
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_values, args), **tree_map(_values, kwargs))
        same = {id(t.values): t for t in ours}  # what works in place returns its argument

        def wrapped(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            return same[id(t)] if id(t) in same else Cuda(t)

        return tree_map(wrapped, out)


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return Cuda(t.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient.values.clone()


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Any) -> Tensor:
        return t.values.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Cuda(gradient.clone())


class PretendCuda(TorchFunctionMode):
    """Within, the device is there.

    Attributes:
        waits: (what, file:line) -> how often the host waited there for the device or a copy.
    """

    current: PretendCuda | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()

    def note(self, what: str) -> None:
        """Count a wait at the innermost line of the project that led to it."""
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if any(path.is_relative_to(ROOT / part) for part in ("btok", "kernels", "train")):
                self.waits[what, f"{path.relative_to(ROOT)}:{frame.lineno}"] += 1
                return

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if name in ("to", "cuda", "cpu") and isinstance(first, Tensor):
            return self._moved(name, func, args, kwargs)
        if name == "as_tensor" and isinstance(first, Cuda) and not kwargs:
            return first
        if name == "__getitem__" and isinstance(first, Cuda) and torch.is_inference_mode_enabled():
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(at is None or at == slice(None) for at in where):
                return Cuda(first.values[where])  # a view, which such a tensor refuses to make
        device = kwargs.get("device")
        if device is not None and name != "__get__" and torch.device(device).type == "cuda":
            kwargs["device"] = torch.device("cpu")
            out = func(*args, **kwargs)
            if isinstance(out, Cuda):
                return out
            if name in ("tensor", "as_tensor"):  # from a list, which is not pinned
                self.note(f"torch.{name}")
            return Cuda(out.detach()).requires_grad_(out.requires_grad)
        return func(*args, **kwargs)

    def _moved(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor:
        tensor, *rest = args
        if name in ("cuda", "cpu"):
            target, dtype, waits = torch.device(name), None, True
        elif rest and isinstance(rest[0], Tensor):
            target, dtype, waits = rest[0].device, rest[0].dtype, True
        else:
            options = {key: value for key, value in kwargs.items() if key != "copy"}
            target, dtype, free, _ = torch._C._nn._parse_to(*rest, **options)  # type: ignore[attr-defined]
            waits = not (free and tensor.is_pinned())
        up = target is not None and target.type == "cuda"
        if target is None or up == isinstance(tensor, Cuda):  # it is there already
            return tensor if dtype is None else tensor.to(dtype)
        if waits or not up:
            self.note("to the device" if up else "to the host")
        if dtype is not None and not up:
            tensor = tensor.to(dtype)
        out = (_Up if up else _Down).apply(tensor)
        return out.to(dtype) if dtype is not None and up else out

    def __enter__(self) -> PretendCuda:
        self.before, PretendCuda.current = PretendCuda.current, self
        self.stack = ExitStack()
        autocast, to, is_on = torch.autocast, nn.Module.to, torch.is_autocast_enabled

        class Autocast(autocast):  # type: ignore[misc, valid-type]
            def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
                super().__init__("cpu", *args, **kwargs)

        def module_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            target = torch._C._nn._parse_to(*args, **kwargs)[0]  # type: ignore[attr-defined]
            if target is None or target.type != "cuda":
                return to(module, *args, **kwargs)
            return move(module)

        replaced: dict[str, Any] = {
            "torch.autocast": Autocast,
            "torch.is_autocast_enabled": lambda *device_type: is_on(*("cpu",) * len(device_type)),
            "torch.nn.Module.to": module_to,
            "torch.Tensor.pin_memory": _pinned,
            "torch.Tensor.is_pinned": lambda t, *_: getattr(t, "pinned", False),
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.is_initialized": lambda: True,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.set_device": lambda device: None,
            "torch.cuda.get_device_properties": lambda device=None: SimpleNamespace(
                total_memory=MEMORY
            ),
            "torch.cuda.get_device_name": lambda device=None: "pretend",
            "torch.cuda.get_device_capability": lambda device=None: (7, 0),
            "torch.cuda.get_rng_state": lambda device=None: torch.get_rng_state(),
            "torch.cuda.set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        }
        for target, value in replaced.items():
            self.stack.enter_context(mock.patch(target, value))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()
        PretendCuda.current = self.before


def move(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the device, tied ones still tied."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None or isinstance(tensor, Cuda):
                    continue
                if id(tensor) not in moved:
                    there: Any = Cuda(tensor.detach().clone())
                    if isinstance(tensor, nn.Parameter):
                        there = nn.Parameter(there, tensor.requires_grad)
                    moved[id(tensor)] = there
                held[name] = moved[id(tensor)]
    return module


def _pinned(t: Any) -> Any:
    copied = t.clone()
    copied.pinned = True
    return copied


def _values(t: Any) -> Any:
    return t.values if isinstance(t, Cuda) else t


def _current() -> PretendCuda:
    assert PretendCuda.current is not None, "a tensor of the pretend device is used outside of it"
    return PretendCuda.current
