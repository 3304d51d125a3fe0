"""What `python -m btok mine` makes of one data set: what it depends on, whether it is there, and
how it is written.

Until an output is there, `OUTPUT.parts` holds what was made. `OUTPUT.json`, its report, tells what
it was made of, and counts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from btok.data.sources import Source
from btok.encoder import BTokEncoder
from btok.files import rename, sha256, write_json
from btok.tools.evaluate import files_digest
from btok.tools.neighbours import Blocks
from btok.tools.related import ABSENT, Related, at_line, lines_of
from btok.tools.rows import difference

if TYPE_CHECKING:
    from btok.tools.mine import Mine

VERSION = 1  # of how negatives are chosen
MADE_OF = "manifest.json"  # in the parts, what these are vectors of
REPORT = "report.json"  # in the parts, until the output is in its place


class Job(NamedTuple):
    """One data set of a command, and its output."""

    command: Mine
    source: Source
    output: Path

    @property
    def parts(self) -> Path:
        """The path of the folder for what is made until the output is there."""
        return Path(f"{self.output}.parts")

    @property
    def report(self) -> Path:
        """The path of the JSON file that tells how the output was made."""
        return Path(f"{self.output}.json")

    def short(self, count: int, row: int) -> ValueError:
        """The error for `count` rows with too few candidates, of which `row` is the first."""
        low, high = self.command.ranks
        return ValueError(
            f"{at_line(self.source, row)}: {count} of {len(self.source)} rows, this first, have "
            f"fewer than {self.command.count} candidates left in the ranks {low} to {high}; "
            "--short drop leaves them out, --short fill takes farther ranks"
        )


def manifest(job: Job, encoder: BTokEncoder) -> dict[str, Any]:
    """The settings that an output depends on: `vectors`, and the `choice` among them."""

    def settings(*names: str) -> dict[str, Any]:
        return {name: getattr(job.command, name) for name in names}

    vectors = {"version": VERSION, "model": encoder.digest, "data": job.source.digest}
    vectors |= {**encoder.settings, "files": files_digest(encoder)}
    vectors |= settings("query_instruction", "positive_instruction", "batch_tokens")
    choice = {"ranks": list(job.command.ranks)}
    choice |= settings("count", "margin", "relative", "draw", "seed", "short")
    return {"vectors": vectors, "choice": choice, **settings("scores")}


def begin(job: Job, made_of: Mapping[str, Any]) -> bool:
    """Whether the output is there already; else its parts are begun or gone on with.

    Raises:
        ValueError: there is one of other settings, or something else.
    """
    output, kept, ready = job.output, job.parts / MADE_OF, job.parts / REPORT
    ours = kept.exists()
    # killed after the output was in its place and before its report was
    if ours and output.is_file() and ready.exists() and _made(ready)["digest"] == sha256(output):
        rename(ready, job.report)
    if output.exists():
        if not job.report.exists():
            raise _foreign(output)
        had = _made(job.report, output)
        refuse_others(output, had["made_of"], made_of, "give another --output, or delete it")
        if had["digest"] != sha256(output):
            raise ValueError(f"{output} was changed since it was made; name another --output")
        if ours:
            forget(job.parts)
        return True
    if not ours and any(not path.match(f"{MADE_OF}*") for path in job.parts.glob("*")):
        raise _foreign(job.parts)
    if job.report.exists():  # of an output that was deleted
        _made(job.report)
    vectors = {"vectors": made_of["vectors"]}
    if ours:
        had = _json(kept)
        if not _is_manifest(had):
            raise _foreign(kept)
        refuse_others(job.parts, had, vectors, f"delete {job.parts}, or give another --output")
    job.parts.mkdir(parents=True, exist_ok=True)
    write_json(kept, vectors)
    return False


def forget(parts: Path) -> None:
    """Delete the parts; last what tells that they are ours, as a kill may come between."""
    for path in parts.glob("*"):
        if path.name != MADE_OF and path.is_file():
            path.unlink()
    shutil.rmtree(parts, ignore_errors=True)


def _foreign(path: Path) -> ValueError:
    return ValueError(
        f"output is {path}, which is there and was not made by mine; name another --output"
    )


def _made(path: Path, output: Path | None = None) -> dict[str, Any]:
    """A report of ours; a ValueError, which names the output if one is given, for another file."""
    had = _json(path)
    own = isinstance(had, dict) and isinstance(had.get("digest"), str)
    if not own or not _is_manifest(had.get("made_of")):
        raise _foreign(output or path)
    return had


def _is_manifest(had: Any) -> bool:
    return (
        isinstance(had, dict)
        and isinstance(had.get("vectors"), dict)
        and isinstance(had.get("choice", {}), dict)
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # the latter for thousands of brackets
        return None


def refuse_others(
    place: Path, had: Mapping[str, Any], asked: Mapping[str, Any], remedy: str
) -> None:
    """A ValueError that names the first setting in which two manifests differ."""
    old, new = (
        {**of["vectors"], **of.get("choice", {}), "scores": of.get("scores")} for of in (had, asked)
    )
    if why := difference(old, new):
        raise ValueError(f"{place} is of {why}; {remedy}")


def write(job: Job, related: Related, chosen: Blocks, made_of: Mapping[str, Any]) -> str:
    """Write the rows with their negatives, and what became of them; the parts go.

    Returns:
        What to say.
    """
    source, output, count = job.source, job.output, job.command.count
    short = unreadable = filled = 0
    first: int | None = None
    for block in range(chosen.number):
        rows = chosen.rows(block)
        found = chosen.read(rows.start, rows.stop)
        readable = ~np.isnan(found["scores"][:, 0])
        lacking = readable & (found["chosen"] == ABSENT).any(1)
        if first is None and lacking.any():
            first = rows.start + int(lacking.argmax())
        short, unreadable = short + int(lacking.sum()), unreadable + int((~readable).sum())
        filled += int((found["far"][~lacking] > 0).sum())
    if first is not None and job.command.short == "refuse":
        raise job.short(short, first)
    if not (kept := len(source) - short - unreadable):
        raise ValueError(
            f"{lines_of(source).path}: no row has {count} negatives within margins and ranks; give "
            "a smaller margin or other ranks"
        )
    draft, sums = job.parts / "output.jsonl", np.zeros(2)
    with open(draft, "w", encoding="utf-8", newline="\n") as file:
        for line, scores in lines(job, related, chosen):
            file.write(line)
            sums += scores[0], scores[1:].mean()
        file.flush()
        os.fsync(file.fileno())
    positive, negatives = (round(float(total) / kept, 6) for total in sums)
    report = {
        "rows": len(source),
        "queries": len(related.queries),
        "candidates": len(related.candidates),
        "written": kept,
        "dropped": short,
        "filled": filled,
        "unreadable": unreadable,
        "mean_score": {"positive": positive, "negatives": negatives},
        "digest": sha256(draft),
        "made_of": made_of,
    }
    write_json(job.parts / REPORT, report)
    if output.exists():  # there was none when this began
        raise _foreign(output)
    rename(draft, output)
    rename(job.parts / REPORT, job.report)
    forget(job.parts)
    return (
        f"{output}: {kept} rows of {len(source)} with {count} negatives; {short} had too few, "
        f"{filled} have some of farther ranks, {unreadable} cannot be read; mean score "
        f"{positive:.3f} of positives, {negatives:.3f} of negatives"
    )


def lines(job: Job, related: Related, chosen: Blocks) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """The rows that have all negatives, as lines, and their scores."""
    source, target = job.source, job.output.parent.resolve()
    old = None if source.root.resolve() == target else source.root.resolve()

    @lru_cache(maxsize=1024)
    def positive(candidate: int) -> Any:
        side = source.rows[int(related.candidates[candidate])]["positive"]
        return side if old is None else moved(side, old, target)

    for block in tqdm(range(chosen.number), desc="writing", unit_scale=chosen.size, disable=None):
        rows = chosen.rows(block)
        for number, found in zip(rows, chosen.read(rows.start, rows.stop), strict=True):
            if (found["chosen"] == ABSENT).any():
                continue
            row = dict(source.rows[number])
            row.pop("scores", None)  # of other negatives
            if old is not None:
                row |= {side: moved(row[side], old, target) for side in ("query", "positive")}
            row["negatives"] = [positive(int(candidate)) for candidate in found["chosen"]]
            if job.command.scores:
                row["scores"] = [round(float(score), 6) for score in found["scores"]]
            yield as_line(row), found["scores"].astype(np.float64)


def as_line(row: Mapping[str, Any]) -> str:
    """A row's JSON; escaped only where it cannot be written otherwise."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, in a column that nobody reads
        text = json.dumps(row)
    return f"{text}\n"


def moved(side: Any, old: Path, new: Path) -> Any:
    """A row's side as it is written, its paths below a folder as another one sees them."""
    if not isinstance(side, dict):
        return side
    between = os.path.relpath(old, new)

    def path(value: Any) -> Any:
        if isinstance(value, dict):
            return value | {"path": path(value.get("path"))}
        if not isinstance(value, str) or not value or os.path.isabs(value):
            return value
        return f"{between}/{value}"

    named = {
        name: [*map(path, value)] if isinstance(value, list) else path(value)
        for name, value in side.items()
        if name in ("images", "video")
    }
    return {**side, **named}
