"""Which implementation of an op runs, and how its Triton kernels are launched.

"auto" says once what it took; an explicit implementation that cannot run raises.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layout import CondensedLayout

logger = logging.getLogger("btok_kernels")
_announced: set[tuple[str, str]] = set()
C = TypeVar("C")  # a configuration
Reasons = dict[str, Callable[[], str | None]]  # by implementation, why it cannot run here
INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("triton", "xformers")}


def first_to_run(reasons: Reasons, order: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The name that "auto" takes of `order`, as `choose` describes both, and why none of those
    before it.
    """
    passed_over = {}
    for name in order:
        reason = reasons[name]()
        if reason is None:
            break
        passed_over[name] = reason
    return name, passed_over


def choose(op: str, impl: str, reasons: Reasons, order: tuple[str, ...]) -> str:
    """Resolve `impl` for the op named `op`.

    Args:
        op: the public function's name, for messages.
        impl: what the caller asked for, "auto" included.
        reasons: the implementations there are; each says why it cannot run here, or None where it
            can, when it is its turn.
        order: what "auto" tries; the last always runs.

    Raises:
        RuntimeError: an implementation that cannot run here.
        ValueError: an unknown implementation.
    """
    if impl == "auto":
        name, reason_by_name = first_to_run(reasons, order)
        passed_over = "".join(f", not '{n}': {why}" for n, why in reason_by_name.items())
        # once for a kind of reason, whatever the sizes and strides that it names
        said = op, re.sub(r"\d+", "", name + passed_over)
        if not torch.compiler.is_compiling() and said not in _announced:
            _announced.add(said)
            level = logging.WARNING if passed_over else logging.INFO
            logger.log(level, "%s: impl 'auto' takes '%s'%s", op, name, passed_over)
        return name
    if impl not in reasons:
        raise ValueError(f"{op}: impl is {impl!r}, expected one of {('auto', *reasons)}")
    if reason := reasons[impl]():
        raise RuntimeError(f"{op}: impl={impl!r} cannot run: {reason}")
    return impl


def always() -> None:
    """None: there is no reason why an implementation cannot run."""


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, under its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run on tensors of this device and dtype; None where they can."""
    if not INSTALLED["triton"]:
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"the tensors are on {device}; it needs CUDA, or TRITON_INTERPRET=1 on the CPU"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel for {dtype}"
    if device.type == "cuda" and torch.version.hip is not None:
        return "torch is built for ROCm; the launches are laid out for NVIDIA's devices alone"
    if device.type == "cuda" and architecture(device) not in FAMILY:
        arch = architecture(device)
        if arch < 80:
            return f"sm_{arch} is too old, it needs sm_80"
        return f"no launches are laid out for sm_{arch}, only for sm_{', '.join(map(str, FAMILY))}"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrong; use float16 or float32"
    return None


def no_hopper(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels of `condensed_attention_hopper` cannot run on tensors that those of
    `condensed_attention_triton` can run on; None where they can."""
    if reason := no_gluon():
        return reason
    if architecture(q.device) != 90:
        return f"the device is sm_{architecture(q.device)}, it needs sm_90"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}, it takes float16 and bfloat16"
    if q.shape[2] not in HOPPER_DIMS:
        return f"q has head dim {q.shape[2]}, its kernels take {HOPPER_DIMS}"
    if q.shape[0] >= 1 << 30:
        return f"q has {q.shape[0]} rows, it takes fewer than 2^30; pack fewer"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not has_address(tensor):
            return f"{name} has no address, as in torch.func's transforms; its copies need one"
        if not takes_tma(tensor):
            return (
                f"{name} has strides {list(tensor.stride())}; its copies take positive multiples "
                "of 8 from an address that is a multiple of 16 bytes"
            )
    return None


# what `bench/bench_hopper.py` found on a device; none is shipped until one has been measured
HOPPER_RESULTS = Path(__file__).with_name("hopper.json")


class HopperResults(NamedTuple):
    """The results of a contest on a device: from how many rows, and by head dim from which mean
    length of sequences on, the kernels of `condensed_attention_hopper` were the faster ones.
    """

    device: str
    triton: str
    from_rows: int
    from_length: dict[str, int | None]


@functools.cache
def _hopper_results() -> HopperResults | None:
    """The `HopperResults` that the results file holds; None where there is no file, or a damaged
    one, which is told.
    """
    if not HOPPER_RESULTS.exists():
        return None
    try:
        found = json.loads(HOPPER_RESULTS.read_text())
        results = HopperResults(*(found[name] for name in HopperResults._fields))
        lengths = [results.from_rows, *results.from_length.values()]
        if not all(length is None or type(length) is int for length in lengths):
            raise ValueError("lengths that are no whole numbers")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        logger.warning("%s is passed over, it has no results (%s)", HOPPER_RESULTS, why)
        return None
    return results


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def hopper_wins(q: Tensor, layout: CondensedLayout | None) -> bool:
    """Whether "auto" asks for the kernels of `condensed_attention_hopper`: a device's results say
    that they are the faster ones for q [T, Hq, D] and as long sequences.

    Where the results are of another kind of device, an older triton, or D has no such kernels,
    "auto" asks too, and says why it cannot have them. Under torch.compile, which would read the
    file at every trace, it never does.
    """
    if torch.compiler.is_compiling() or q.device.type != "cuda":
        return False
    results = _hopper_results()
    if results is None:
        return False
    dim = q.shape[2]
    if no_gluon() or architecture(q.device) != 90 or dim not in HOPPER_DIMS:
        return True
    if (results.triton, results.device) != (triton_version(), _device_name(q.device)):
        return False
    least = results.from_length.get(str(dim))
    if least is None or layout is None or q.shape[0] < results.from_rows:
        return False
    return layout.mean_length >= least


def has_address(tensor: Tensor) -> bool:
    """Whether a tensor lies somewhere: those of torch.func's transforms do not, nor fake ones."""
    if torch.compiler.is_compiling():
        return True  # when the op runs it does
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def takes_tma(tensor: Tensor) -> bool:
    """Whether boxes of a half-precision tensor [T, H, D] can be copied by TMA."""
    if any(step % 8 or step <= 0 for step in tensor.stride()[:2]):
        return False
    # torch.compile has tensors without addresses; storage and its views begin at such ones, mostly
    return torch.compiler.is_compiling() or tensor.data_ptr() % 16 == 0


@functools.cache
def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build under another name
        import triton

        return triton.__version__


@functools.cache
def no_gluon() -> str | None:
    """Why this triton cannot compile what `condensed_attention_hopper` is written in."""
    if not INSTALLED["triton"]:
        return "triton is not installed"
    version = triton_version()
    older = tuple(map(int, version.split(".")[:2])) < (3, 9)
    return f"triton is {version}, it needs 3.9" if older else None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)  # which takes a good part of a launch


def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA device as in sm_90; 0 under the interpreter."""
    if device.type != "cuda":
        return 0
    # torch.compile warns of what is cached, as it looks through it
    tell = torch.cuda.get_device_capability if torch.compiler.is_compiling() else _capability
    major, minor = tell(device)
    return 10 * major + minor


def on(device: torch.device) -> AbstractContextManager:
    """A context in which Triton launches go to `device`, as Triton takes the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


class Config(NamedTuple):
    """The launch of a kernel: its tile, warps and pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Whose launches an architecture takes: those of 80 and 120 multiply a warp at a time, and 120's fit
# the 99 KiB of shared memory that a block of sm_86, 89 and 120 may have.
FAMILY = {80: 80, 86: 120, 87: 80, 89: 120, 90: 90, 100: 100, 103: 100, 120: 120, 121: 120}

# By kernel and family, then up to which head dim. A warp has 16 rows of its own of a tile (keys, of
# dkdv; of 256 columns these fill the registers, so there warps share rows), or two would make the
# same products; three stages, as two copy nothing ahead; of what is left, what spills at most 64
# bytes and models fastest. fp32 is multiplied without tensor cores, on
# all architectures alike.
_ATTENTION: dict[tuple[str, int], dict[int, Config]] = {
    ("forward", 80): {
        64: Config(64, 64, 4, 3),
        128: Config(64, 32, 4, 3),
        256: Config(32, 64, 4, 3),
    },
    ("dkdv", 80): {256: Config(32, 64, 4, 3)},
    ("dq", 80): {64: Config(64, 64, 4, 3), 128: Config(64, 32, 4, 3), 256: Config(32, 32, 4, 3)},
    ("forward", 90): {
        64: Config(128, 64, 4, 3),
        128: Config(128, 64, 8, 3),
        256: Config(128, 32, 8, 3),
    },
    ("dkdv", 90): {
        64: Config(64, 64, 4, 3),
        128: Config(64, 128, 8, 3),
        256: Config(32, 128, 8, 3),
    },
    ("dq", 90): {64: Config(64, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 16, 8, 3)},
    ("forward", 100): {128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 3)},
    ("dkdv", 100): {128: Config(64, 128, 8, 3), 256: Config(32, 64, 4, 3)},
    ("dq", 100): {128: Config(128, 64, 8, 3), 256: Config(128, 16, 8, 3)},
    ("forward", 120): {
        64: Config(64, 64, 4, 3),
        128: Config(64, 32, 4, 3),
        256: Config(32, 32, 4, 3),
    },
    ("dkdv", 120): {128: Config(32, 64, 4, 3), 256: Config(32, 32, 4, 3)},
    ("dq", 120): {128: Config(64, 32, 4, 3), 256: Config(32, 32, 4, 3)},
}
_ATTENTION_FP32: dict[str, dict[int, Config]] = {
    "forward": {64: Config(32, 16, 4, 1), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    "dkdv": {64: Config(32, 32, 4, 1), 128: Config(16, 16, 4, 1), 256: Config(16, 16, 8, 1)},
    "dq": {64: Config(32, 16, 4, 1), 128: Config(16, 16, 4, 1), 256: Config(16, 16, 8, 1)},
}


class HopperConfig(NamedTuple):
    """The launch of a kernel of `condensed_attention_hopper`: its tile, the places for copies that
    go ahead, whether its consumers multiply in turns, and the registers of their threads.
    """

    block_m: int
    block_n: int
    stages: int
    ping_pong: bool
    registers: int


HOPPER_DIMS = (64, 80, 96, 128)
HOPPER = {  # by kernel, for all of these head dims
    "forward": HopperConfig(128, 128, 2, True, 240),
    "dq": HopperConfig(128, 64, 2, False, 240),
    "dkdv": HopperConfig(64, 128, 2, False, 240),
}
_ATTENTION_INTERPRETED = Config(32, 16, 1, 1)  # small, so that short tests have many blocks


@functools.cache
def attention_config(kernel: str, head_dim: int, dtype: torch.dtype, arch: int) -> Config:
    """The launch of "forward", "dkdv" or "dq" on an architecture as in sm_90; 0 is none."""
    if arch == 0:
        return _ATTENTION_INTERPRETED
    half = dtype != torch.float32
    table = _ATTENTION[kernel, FAMILY[arch]] if half else _ATTENTION_FP32[kernel]
    return next(config for dim, config in table.items() if head_dim <= dim)


def attention(kernel: str, q: Tensor, run: Callable[[Config], object]) -> None:
    """Launch a kernel of the attention over q [T, Hq, D] with its `fastest` configuration."""
    config = attention_config(kernel, q.shape[2], q.dtype, architecture(q.device))
    with on(q.device):
        run(fastest("attention", (kernel,), q, config, lambda: _attention_candidates(q.dtype), run))


def _attention_candidates(dtype: torch.dtype) -> list[Config]:
    blocks = (16, 32, 64) if dtype == torch.float32 else (32, 64, 128)
    return list(itertools.starmap(Config, itertools.product(blocks, blocks, (4, 8), (1, 2, 3))))


def hopper(kernel: str, q: Tensor, run: Callable[[HopperConfig], object]) -> None:
    """Launch a kernel of `condensed_attention_hopper` over q [T, Hq, D] with its `fastest`
    configuration.
    """

    def others() -> list[HopperConfig]:
        return hopper_candidates(kernel, q.shape[2])

    with on(q.device):
        run(fastest("hopper attention", (kernel,), q, HOPPER[kernel], others, run))


def hopper_candidates(kernel: str, head_dim: int) -> list[HopperConfig]:
    """Configurations beside the table's: blocks of half the size, two to four places for copies,
    turns or none.

    Two consumers have 128 rows or keys, and their registers are all that there are; of blocks of
    double the size these spill.
    """
    config = HOPPER[kernel]
    copied = "block_m" if kernel == "dkdv" else "block_n"
    size = getattr(config, copied)
    turns = (True, False) if kernel == "forward" else (False,)
    candidates = [
        config._replace(**{copied: block, "stages": stages, "ping_pong": ping_pong})
        for block, stages, ping_pong in itertools.product((size // 2, size), (2, 3, 4), turns)
    ]
    return [x for x in candidates if hopper_shared(kernel, head_dim, x) <= 227 << 10]


def hopper_shared(kernel: str, head_dim: int, config: HopperConfig) -> int:
    """Bytes of shared memory that a block of a kernel for Hopper takes, at most 256 too many."""
    row = 2 * (64 if head_dim == 64 else 128)
    copied = config.block_m if kernel == "dkdv" else config.block_n
    own = 128 if kernel == "forward" else 2 * 128
    statistics = 8 * copied * config.stages if kernel == "dkdv" else 0
    # what is left: results on their way to memory, and barriers
    return row * (own + 2 * copied * config.stages) + statistics + (16 << 10) + 256


# what `search` found, by op, kind, architecture, width and dtype
found: dict[tuple[Any, ...], Any] = {}


def autotuned(rows: Tensor) -> bool:
    """Whether the first call of each kind searches: with BTOK_AUTOTUNE=1, on a device, if there are
    any rows."""
    on_device = os.environ.get("BTOK_AUTOTUNE") == "1" and architecture(rows.device) > 0
    return on_device and len(rows) > 0


def fastest(
    op: str, kind: tuple[Any, ...], rows: Tensor, default: C,
    candidates: Callable[[], Iterable[C]], run: Callable[[C], object],
) -> C:  # fmt: skip
    """The configuration with which `run` is fastest; the default where nothing is searched.

    Where it is (`autotuned`), the first call for an op, its kind and an architecture, width and
    dtype of rows [N, ..., D] calls `search`, and what that finds is kept in `found`. While a CUDA
    graph is captured nothing is searched, as the trials would go into the graph.
    """
    if not autotuned(rows):
        return default
    key = (*kind, architecture(rows.device), rows.shape[-1], rows.dtype)
    if (op, *key) not in found and not _capturing():
        found[op, *key] = search(f"{op} {key}", default, candidates(), run)
    return found.get((op, *key), default)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def search(title: str, default: C, candidates: Iterable[C], run: Callable[[C], object]) -> C:
    """The configuration with which `run` is fastest on this device; prints the ten fastest.

    Args:
        title: what is launched, for the printed table.
        default: the configuration that would be taken without a search; it is timed first.
        candidates: what else to time. One that raises (it needs too much shared memory, or the
            compiler gave up) is left out, and the default may be such a one.
        run: launches with a configuration; its results must not depend on it, but for rounding.

    Raises:
        RuntimeError: no configuration runs; the last one's error is its cause.
    """
    from triton.testing import do_bench

    times: list[tuple[float, C]] = []
    failed: Exception | None = None
    for config in [default, *(other for other in candidates if other != default)]:
        try:
            time = do_bench(functools.partial(run, config), return_mode="median")
            times.append((time, config))
        except Exception as error:
            logger.debug("%s: %s: %s", title, config, error)
            failed = error
    if not times:
        raise RuntimeError(f"{title}: no configuration runs on this device") from failed
    times.sort(key=lambda timed: timed[0])
    print(f"{title}: milliseconds of the ten fastest of {len(times)}, and of the default")
    for place, (time, config) in enumerate(times):
        if place < 10 or config == default:
            print(f"  {time:9.4f}  {config}", flush=True)
    if default not in [config for _, config in times]:
        print(f"     failed  {default}", flush=True)
    return times[0][1]


# contrastive_loss. The figures below are arithmetic, not yet measured on a GPU.
CONTRASTIVE_WORKSPACE = 1 << 30  # bytes of a chunk of logits
CONTRASTIVE_PANEL = 4096  # rows, and columns, whose d logits the recompute kernels hold at once


def contrastive_chunk(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Rows whose logits contrastive_loss holds at once; 0 where it recomputes them by tiles.

    A chunk holds fp32 logits and, for half inputs, d logits. It is worth a matrix product from
    1,024 rows on: with less, reading and writing d candidates takes longer than multiplying.
    """
    row_bytes = columns * (4 if dtype == torch.float32 else 4 + dtype.itemsize)
    chunk = CONTRASTIVE_WORKSPACE // row_bytes
    return chunk if chunk >= min(rows, 1024) else 0


def _blocks(warps: int, stages: int, **blocks: int) -> dict[str, int]:
    sizes = {f"BLOCK_{name}": size for name, size in blocks.items()}
    return sizes | {"num_warps": warps, "num_stages": stages}


# By kernel and bytes of an element: tiles whose loops copy two steps ahead, let no two warps make
# the same products, spill nothing and fit the 99 KiB of shared memory that sm_86, 89 and 120 have.
# Sums to d_candidates share BLOCK_M, the width of a tile of candidates.
_CONTRASTIVE: dict[tuple[str, int], dict[str, int]] = {
    ("rows", 2): _blocks(4, 1, N=2, M=512),
    ("rows", 4): _blocks(4, 1, N=2, M=512),
    ("columns", 2): _blocks(8, 1, N=64, M=128),
    ("columns", 4): _blocks(8, 1, N=64, M=128),
    ("sums", 2): _blocks(8, 3, N=128, M=128, D=64),
    ("sums", 4): _blocks(8, 3, N=64, M=64, D=32),
    ("d_logits", 2): _blocks(8, 3, N=64, M=128, D=64),
    ("d_logits", 4): _blocks(8, 3, N=64, M=64, D=32),
    ("d_query", 2): _blocks(8, 3, N=128, M=128, K=64, D=128),
    ("d_query", 4): _blocks(8, 3, N=64, M=64, K=32, D=64),
    ("d_candidates", 2): _blocks(8, 3, M=128, K=64, D=128),
    ("d_candidates", 4): _blocks(8, 3, M=64, K=32, D=64),
    # of late interaction, whose forward holds a maximum and its token beside the scores
    ("maxima", 2): _blocks(8, 3, N=128, M=64, D=64),
    ("maxima", 4): _blocks(8, 3, N=64, M=64, D=32),
    ("d_query_tokens", 2): _blocks(8, 3, N=128, K=32, D=128),
    ("d_query_tokens", 4): _blocks(8, 3, N=64, K=32, D=64),
    ("d_key_tokens", 2): _blocks(8, 3, M=64, K=64, D=128),
    ("d_key_tokens", 4): _blocks(8, 3, M=64, K=32, D=64),
}
# sm_100 and 103 read a tile of scores back from tensor memory, which takes more registers
_CONTRASTIVE_100 = _CONTRASTIVE | {("sums", 2): _blocks(8, 3, N=64, M=128, D=64)}
_CONTRASTIVE_INTERPRETED = {  # small, so that short tests have many tiles
    "rows": _blocks(1, 1, N=4, M=16),
    "columns": _blocks(1, 1, N=8, M=16),
    "sums": _blocks(1, 1, N=16, M=16, D=16),
    "d_logits": _blocks(1, 1, N=16, M=16, D=16),
    "d_query": _blocks(1, 1, N=16, M=16, K=8, D=16),
    "d_candidates": _blocks(1, 1, M=16, K=8, D=16),
    "maxima": _blocks(1, 1, N=16, M=16, D=16),
    "d_query_tokens": _blocks(1, 1, N=16, K=8, D=16),
    "d_key_tokens": _blocks(1, 1, M=16, K=8, D=16),
}


def contrastive_config(kernel: str, dtype: torch.dtype, arch: int) -> dict[str, int]:
    """Tile, warps and stages of a kernel of contrastive_loss on an architecture as in sm_90."""
    if arch == 0:
        return _CONTRASTIVE_INTERPRETED[kernel]
    table = _CONTRASTIVE_100 if arch // 10 == 10 else _CONTRASTIVE
    return table[kernel, dtype.itemsize]


def contrastive(
    kernel: str,
    query: Tensor,
    options: tuple[bool, ...],
    trial: Callable[[dict[str, int]], object],
) -> dict[str, int]:
    """The `fastest` tile, warps and stages of a kernel of contrastive_loss over query [N, D]; what
    its options compile in takes other registers."""
    config = contrastive_config(kernel, query.dtype, architecture(query.device))
    others = functools.partial(_contrastive_candidates, kernel, config)
    return fastest("contrastive_loss", (kernel, *options), query, config, others, trial)


def _contrastive_candidates(kernel: str, config: dict[str, int]) -> list[dict[str, int]]:
    """Configurations beside one: blocks of half and double the size, 4 and 8 warps, a stage more.

    BLOCK_M stays where kernels share it: the table of candidates' tiles that all of them read is
    made before the first runs.
    """
    shared = kernel not in ("rows", "columns")
    choices = {
        name: [size] if shared and name == "BLOCK_M" else [size // 2, size, 2 * size]
        for name, size in config.items()
        if name.startswith("BLOCK_")
    }
    stages = config["num_stages"]
    choices["num_warps"] = [4, 8]
    choices["num_stages"] = [stages, stages + 1] if shared else [stages]
    found = [
        dict(zip(choices, sizes, strict=True)) for sizes in itertools.product(*choices.values())
    ]
    # a step of d query must not straddle two tiles
    return [x for x in found if kernel != "d_query" or x["BLOCK_M"] % x["BLOCK_K"] == 0]
