"""Where the time of a training step and of encoding goes, by part.

    python bench/breakdown.py [--out runs/profile]

The models and inputs are those of bench_training_step.py and bench_encoding.py. It prints a table
of milliseconds, forward and backward, and writes it to OUT/breakdown.json, with a trace of each for
Perfetto or chrome://tracing beside it. On a GPU a part's time is that of its kernels. A backward
operation belongs to the part of the forward operation that it is the derivative of; reading and
preparing inputs has threads of its own, whose time is beside the rest, not within it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import btok.model
import btok.objective
import train.microbatches
import train.parallel
from bench import bench_encoding, bench_training_step
from bench.harness import DEVICE, synchronize
from btok.families import family_of
from btok.processing import Processor

LABEL = "part: "  # opens the names of the ranges that count
STEPS = 3


def labelled(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose operations belong to a part."""

    @wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with record_function(LABEL + name):
            return call(*args, **kwargs)

    return wrapper


@contextmanager
def parts_of(backbone: Any) -> Iterator[None]:
    """Within, a model's operations carry the names of the parts of it that they are in."""
    family = family_of(backbone.config)
    layers, tower = family.decoder(backbone).layers, family.tower(backbone)
    modules = [(layer, "layers, the rest") for layer in layers]
    modules += [(layer.self_attn, "attention") for layer in layers]
    modules += [(layer.mlp, "MLP") for layer in layers]
    modules += [] if tower is None else [(tower, "vision tower")]
    functions = [
        (btok.model, "label_losses", "logits and their loss"),
        (btok.objective, "contrastive_loss", "contrastive loss"),
        (train.parallel.Backward, "finish", "mean of the gradients"),
        (train.microbatches, "pack", "packing"),
        (btok.model, "pack", "packing"),
    ]
    with ExitStack() as stack:
        for module, name in modules:
            stack.enter_context(
                mock.patch.object(module, "forward", labelled(name, module.forward))
            )
        for where, function, name in functions:
            call = labelled(name, getattr(where, function))
            stack.enter_context(mock.patch.object(where, function, call))
        yield


def milliseconds(event: Any) -> float:
    """An operation's own, those within it aside."""
    clock = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    return getattr(event, clock) / 1e3


def breakdown(
    events: Any, spent_in: Callable[[Any], float] = milliseconds
) -> dict[str, list[float]]:
    """What a profile's events spent, by part: [forward, backward]."""
    part_of: dict[int, str] = {}  # the sequence number of a forward operation -> its part
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    late = []
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        part, node, at = None, None, event
        while at is not None and node is None:
            if part is None and at.name.startswith(LABEL):
                part = at.name.removeprefix(LABEL)
            elif at.name.startswith("autograd::engine::evaluate_function"):
                node = at.sequence_nr
            at = at.cpu_parent
        spent = spent_in(event)
        if node is not None:
            late.append((node, part, spent))
            continue
        if part is not None and event.sequence_nr >= 0:
            part_of[event.sequence_nr] = part
        found[part or "other"][0] += spent
    for node, part, spent in late:
        # what a checkpoint makes again within the backward has its own range
        found[part or part_of.get(node, "other")][1] += spent
    return dict(found)


def measure(call: Callable[[], Any], trace: Path) -> dict[str, list[float]]:
    """Of one call, after a first; the mean of a few."""
    call()
    synchronize()
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if DEVICE == "cuda" else []
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            with record_function(LABEL + "other"):
                call()
                synchronize()
    profiler.export_chrome_trace(str(trace))
    found = breakdown(profiler.events())
    return {part: [spent / STEPS for spent in both] for part, both in found.items()}


def training_step(trace: Path) -> dict[str, list[float]]:
    """Of `train_step` and AdamW."""
    contestants = bench_training_step.Contestants(
        bench_training_step.SHAPE, DEVICE, bench_training_step.DTYPE
    )
    optimizer = torch.optim.AdamW(contestants.trained, lr=0.0)
    update = labelled("optimizer", optimizer.step)

    def step() -> None:
        contestants.ours()
        update()

    with parts_of(contestants.btok.backbone):
        return measure(step, trace)


def encoding(trace: Path) -> dict[str, list[float]]:
    """Of BTokEncoder.encode."""
    encoders, inputs, _ = bench_encoding.prepared()
    spent = [0.0]
    process = Processor.__call__

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = process(*args, **kwargs)
        spent[0] += time.perf_counter() - begin
        return result

    with mock.patch.object(Processor, "__call__", timed), parts_of(encoders.btok.model.backbone):
        found = measure(lambda: encoders.ours(inputs), trace)
    return found | {"preparing inputs (threads)": [1e3 * spent[0] / (STEPS + 1), 0.0]}


def table(name: str, found: dict[str, list[float]]) -> str:
    """A line per part, the longest first."""
    total = sum(map(sum, found.values()))
    lines = [f"{name:28}{'forward':>10}{'backward':>10}{'share':>8}"]
    for part, (forth, back) in sorted(found.items(), key=lambda item: -sum(item[1])):
        lines.append(f"  {part:26}{forth:10.1f}{back:10.1f}{(forth + back) / total:8.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/profile"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, run in {"training step": training_step, "encoding": encoding}.items():
        results[name] = run(out / f"{name.replace(' ', '-')}.json")
        print(table(name, results[name]), flush=True)
    (out / "breakdown.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
