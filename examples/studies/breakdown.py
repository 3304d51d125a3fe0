"""Where the time of a training step and of encoding goes, by part.

    python examples/studies/breakdown.py [--out runs/profile]

The models and inputs are those of bench_training_step.py and bench_encoding.py. It prints a table
of milliseconds, forward and backward, and writes a trace of each into OUT, for Perfetto or
chrome://tracing. On a GPU a part's time is that of its kernels. A backward operation belongs to the
part of the forward operation that it is the derivative of. Encoding prepares its inputs in a thread
of its own, beside the rest: that is timed by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function

import btok.model
import btok.objective
import train.microbatches
import train.parallel
from bench import bench_encoding, bench_training_step
from bench.harness import DEVICE, wall_seconds
from btok.encoder import BTokEncoder
from btok.families import family_of
from btok.inputs import as_side

LABEL = "part: "  # opens the names of the ranges that count
STEPS = 3
FUNCTIONS = [
    (btok.model, "label_losses", "logits and their loss"),
    (btok.objective, "contrastive_loss", "contrastive loss"),
    (train.parallel.Backward, "finish", "mean of the gradients"),
    (train.microbatches, "pack", "packing"),
    (btok.model, "pack", "packing"),
]
Found = dict[str, list[float]]  # milliseconds by part: forward, backward


def labelled(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The function `call`, wrapped so that its operations belong to a part."""
    return record_function(LABEL + part)(call)


def label_modules(backbone: Any) -> None:
    """Have a model's operations belong to the parts of it that they are in."""
    family = family_of(backbone.config)
    parts = [(family.tower(backbone), "vision tower")]
    for layer in family.decoder(backbone).layers:
        parts += [(layer, "layers, the rest"), (layer.self_attn, "attention"), (layer.mlp, "MLP")]
    for module, part in parts:
        module.forward = labelled(part, module.forward)


def spent_in(event: Any) -> float:
    """Milliseconds of an operation, without those within it."""
    clock = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    return getattr(event, clock) / 1e3


def place(event: Any) -> tuple[str | None, int | None]:
    """The innermost part that an operation is in; in a backward, its node's sequence number."""
    part = None
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return part, event.sequence_nr
        if part is None and event.name.startswith(LABEL):
            part = event.name.removeprefix(LABEL)
        event = event.cpu_parent
    return part, None


def breakdown(events: Any) -> Found:
    """The milliseconds that a profile's events spent, by part: [forward, backward]."""
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    placed = [(event, *place(event)) for event in events]
    # a forward operation has the number of its derivative's node
    part_of = {event.sequence_nr: part for event, part, node in placed if part and node is None}
    part_of.pop(-1, None)  # which those without a derivative have
    found: Found = {}
    for event, part, node in placed:
        if part is None and node is not None:  # what a checkpoint makes again has its own range
            part = part_of.get(node)
        found.setdefault(part or "other", [0.0, 0.0])[node is not None] += spent_in(event)
    return found


def measure(call: Callable[[], Any], trace: Path) -> Found:
    """The milliseconds of a call by part, the mean of a few calls after a first."""
    call = labelled("other", call)
    call()
    with profile() as profiler:
        for _ in range(STEPS):
            call()
    profiler.export_chrome_trace(str(trace))
    found = breakdown(profiler.events())
    return {part: [spent / STEPS for spent in both] for part, both in found.items()}


def table(name: str, found: Found) -> str:
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

    step, _, _ = bench_training_step.prepared()
    optimizer = torch.optim.AdamW(step.trained, lr=0.0)
    four, _ = bench_encoding.prepared("1x64")
    encoder = BTokEncoder(four.btok, four.processor)
    inputs = bench_encoding.user_inputs(*bench_encoding.CORPUS)
    for owner, name, part in [*FUNCTIONS, (optimizer, "step", "optimizer")]:
        setattr(owner, name, labelled(part, getattr(owner, name)))
    label_modules(step.btok.backbone)
    label_modules(encoder.model.backbone)

    trained = measure(lambda: (step.ours(), optimizer.step()), out / "training-step.json")
    print(table("training step", trained), flush=True)
    encoded = measure(lambda: encoder.encode(inputs, show_progress=False), out / "encoding.json")
    seconds = wall_seconds(lambda: [encoder.processor(as_side(value)) for value in inputs])
    encoded["preparing inputs (threads)"] = [1e3 * seconds, 0.0]
    print(table("encoding", encoded))


if __name__ == "__main__":
    main()
