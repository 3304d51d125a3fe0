"""Fine-tune a checkpoint on your own pairs with LoRA; score held-out pairs before and after.

    python examples/finetune_lora.py train.jsonl held-out.jsonl [CHECKPOINT] [OUTPUT]

A line is a pair: {"query": "a red six", "positive": {"images": ["six.png"]}}; either side may be a
text, pictures, a video or a mix, and paths start from the file's folder (docs/train.md). To hold
out the last 200 lines of pairs.jsonl: `head -n -200` makes one file, `tail -n 200` the other.

CHECKPOINT is by default what `make demo` trained, and may be any that this library saved; OUTPUT is
runs/finetuned. Needs the extra `peft`, and a checkout, in which the trainer is.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where train/ lies

from btok import BTokEncoder, Pair
from btok.data.sources import open_source
from train.checkpoint import newest_valid
from train.main import main as train

SETTINGS: dict[str, object] = {  # of train/main.py, which explains them all with --help
    **{"lora-rank": 16, "dora": "false", "muon-rate": 0},  # adapters and K rows train, by AdamW
    "learning-rate": 1e-3,  # 5e-5 for a backbone of 2 B
    **{"negatives": "batch", "group-size": 16, "groups-per-batch": 2, "steps": 200},
    **{"caption-steps": 0, "reading-steps": 0, "eval-queries": 0},  # the pocket benchmark's own
}


def hit_at_1(checkpoint: str, pairs: Sequence[Pair]) -> float:
    """Percent of the queries whose own positive, or one of its id, is the nearest of all."""
    encoder = BTokEncoder.from_pretrained(checkpoint)
    encoder.model.to("cuda" if torch.cuda.is_available() else "cpu")
    queries = encoder.encode([pair.query for pair in pairs])  # [N, D], unit norm
    positives = encoder.encode([pair.positive for pair in pairs])
    nearest = [pairs[j].positive_id for j in (queries @ positives.T).argmax(1)]
    right = [pair.positive_id == found for pair, found in zip(pairs, nearest, strict=True)]
    return 100 * sum(right) / len(right)


def main(
    data: str,
    held_out: str,
    checkpoint: str = "runs/demo/checkpoint-1000",
    output: str = "runs/finetuned",
    **more: object,
) -> None:
    """Train and score; `more` are the trainer's flags: `steps=50` for `--steps 50`."""
    source = open_source(Path(held_out))
    pairs = [source[i] for i in range(len(source))]
    print(f"hit@1 of {len(pairs)} held-out pairs before: {hit_at_1(checkpoint, pairs):.1f} %")

    settings = {**SETTINGS, **{name.replace("_", "-"): value for name, value in more.items()}}
    settings |= {"model": checkpoint, "data": data, "output": output}
    if code := train([word for name, x in settings.items() for word in (f"--{name}", str(x))]):
        sys.exit(code)  # it has said what was wrong

    trained = str(newest_valid(Path(output)))
    print(f"hit@1 after: {hit_at_1(trained, pairs):.1f} %; the model is in {trained}")


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 5:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:  # a mistake, and not ours
        sys.exit(f"error: {error}")
