"""Readers fed with damaged files: no crash, no hang, no unbounded memory, no wrong exit code.

    python tests/fuzz.py --seconds 3600 --seed 0 --keep FOLDER [--targets file index ...]

Real files (`fuzz_seeds.py`) are mutated, by the byte and by what they mean; a case that reaches a
line of btok none before has reached, or is refused in new words, is mutated further. Cases run in a
process of their own, so that a library's crash or hang is a finding as well: its files, and where
it was, lie in FOLDER/findings.

A reader may give a result, or raise one of `REFUSED` with a line of words; a TypeError on purpose
alone. More than 10 s of
processor time or 1 GiB more memory for a case is a finding as anything else is.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import fuzz_seeds
from fuzz_targets import TARGETS, Kit

Case = dict[str, bytes]  # the files of a folder
REFUSED = (ValueError, TypeError, OSError, ImportError)
SECONDS = 30  # of processor time for a case: 10 and what noticing lines takes, of HTML twice that
STUCK = 90  # seconds of any time, as in a deadlock
MEMORY, ADDRESSES = 1 << 20, 12 << 30  # KiB that a case may add; bytes of addresses there are
LARGEST = 1 << 20  # bytes of a file that is mutated further
KEPT = 3  # cases of a finding whose files are kept
WORDS = 300  # different refusals of a target after which new ones are no reason to keep a case
# what is known and not ours to mend, by its target and title
KNOWN: dict[str, str] = {}
BTOK = str(Path(__file__).resolve().parent.parent / "btok")
NUMBERS = (0, 1, -1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63)
WEIRD = (*NUMBERS, 10**400, 0.5, float("nan"), float("inf"), 1e308, True, None, "", " \n", "\0")
WEIRD += ("x" * 9999, "\ud800", "\ufdd0\x1b", "<|image_pad|>", "<|btok_0|>", "<row_1_col_1>", "..")
WEIRD += ("a.png", "/dev/null", b"", b"x", [], {}, [[]], [None], {"text": 3}, {"path": "a.png"})
TOKEN = re.compile(rb'-?\d+(?:\.\d+)?|"[^"\n]*"|<[^<>\n]*>|\w+')
DEEP = b"[" * 100_000


def altered(value: Any, rng: random.Random) -> Any:
    """A value of JSON with a part replaced, removed or put elsewhere."""
    inner = isinstance(value, dict | list) and len(value) and rng.random() < 0.9
    if not inner:
        return rng.choice(WEIRD)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, kind = rng.choice(keys), rng.random()
    copy: Any = value.copy()
    if kind < 0.1:
        del copy[key]
    elif kind < 0.15:
        copy = {**copy, rng.choice(keys): value} if isinstance(value, dict) else copy * 3
    else:
        copy[key] = altered(value[key], rng)
    return copy


def by_meaning(name: str, data: bytes, rng: random.Random) -> bytes | None:
    """A file with what it says changed; None for one whose kind says nothing here."""
    kind = name.rpartition(".")[2]
    if kind in ("json", "jsonl") and rng.random() < 0.7:
        lines = data.split(b"\n") if kind == "jsonl" else [data]
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(altered(json.loads(lines[at]), rng), default=str).encode()
        return b"\n".join(lines)
    if kind in ("json", "jsonl", "html", "csv", "txt"):
        tokens = list(TOKEN.finditer(data)) or [re.compile(b"").match(data)]
        start, end = rng.choice(tokens).span()  # type: ignore[union-attr]
        said = rng.choice([DEEP, DEEP.replace(b"[", b"<b>"), '"\\ud800"', *map(str, WEIRD), *WEIRD])
        encoded = said if isinstance(said, bytes) else str(said).encode("utf-8", "surrogatepass")
        return data[:start] + encoded + data[end:]
    if kind in ("docx", "npz"):
        old, new = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
        victim = rng.choice(old.namelist())
        with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as packed:
            for each in old.namelist():
                content = old.read(each)
                if each == victim:
                    content = changed(each.replace(".xml", ".html"), content, rng)
                if each != victim or rng.random() < 0.9:
                    packed.writestr(each, content)
        return new.getvalue()
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(io.BytesIO(data), use_threads=False).to_pylist()
        table = pyarrow.Table.from_pylist(altered(rows, rng))
        pyarrow.parquet.write_table(table, out := io.BytesIO())
        return out.getvalue()
    return None


def changed(name: str, data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """A file after one or a few changes."""
    if rng.random() < 0.6:
        try:
            if (said := by_meaning(name, data, rng)) is not None:
                return said
        except Exception:  # it had been damaged before
            pass
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        new, at = bytearray(data), rng.randrange(len(data) + 1)
        length = min(1 << rng.randrange(12), len(data) - at)
        kind = rng.randrange(8)
        if kind <= 1 and at < len(new):
            new[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            form = rng.choice("<>") + rng.choice("HIQ")
            number = rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(form))
            new[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 3:
            del new[at : at + length]
        elif kind == 4:
            new[at:at] = new[at : at + length] * rng.choice((1, 1, 2, 50))
        elif kind == 5:
            new[at:at] = rng.randbytes(length)
        elif kind == 6 and other:
            start = rng.randrange(len(other))
            new[at : at + length] = other[start : start + length]
        elif kind == 7 and rng.random() < 0.3:
            del new[at:]
        data = bytes(new)
    return with_sums(data) if rng.random() < 0.7 else data


def with_sums(data: bytes) -> bytes:
    """The checksums of a PNG's chunks made right again, so that what they hold is looked at."""
    if not data.startswith(b"\x89PNG"):
        return data
    new, at = bytearray(data), 8
    while at + 12 <= len(new):
        end = at + 8 + int.from_bytes(new[at : at + 4], "big")
        new[end : end + 4] = zlib.crc32(new[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(new)


def mutated(case: Case, others: list[Case], rng: random.Random) -> Case:
    """A case with a file changed, or two; a folder's may be gone."""
    new = dict(case)
    names = [name for name in case if not name.startswith("good")]
    for name in rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2)))):
        other = rng.choice(list(rng.choice(others).values()))
        new[name] = changed(name, case[name], rng, other)
        if len(names) > 2 and rng.random() < 0.05:
            del new[name]
    return new


class Lines:
    """Notices lines of btok that were not reached before."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self.new = False

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        return self.line if frame.f_code.co_filename.startswith(BTOK) else None

    def line(self, frame: Any, event: str, _: Any) -> Any:
        at = (frame.f_code.co_filename, frame.f_lineno)
        if at not in self.seen:
            self.seen.add(at)
            self.new = True
        return self.line


def run(target: str, folder: Path, kit: Kit) -> tuple[str, str]:
    """A case's outcome in few words, without numbers and names, and what a finding is, or ""."""
    try:
        return TARGETS[target](folder, kit) or "read", ""
    except Exception as error:
        words = str(error)
        kind = type(error).__name__
        outcome = f"{kind}: {re.sub(r'[^ ]*[^ a-z,:;()][^ ]*', '*', words[:300])}"
        frames = traceback.extract_tb(error.__traceback__)
        meant = not isinstance(error, TypeError) or "raise" in (frames[-1].line or "")
        if isinstance(error, REFUSED) and meant and words.strip() and "\n" not in words:
            return outcome, ""
        where = [frame for frame in frames if frame.filename.startswith(BTOK)]
        place = f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else "the target"
        return outcome, f"{kind} in {place}: {words[:200]}\n\n{traceback.format_exc()}"


def written(case: Case, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in case.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def loaded(folder: Path) -> Case:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def work(keep: Path, names: list[str], seed: int, first: int, pipe: Any) -> None:
    """Run cases for ever, from a number on, and tell of each."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries say there what they think
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    trace = open(keep / "trace.txt", "w")  # noqa: SIM115
    faulthandler.enable(trace)
    faulthandler.register(signal.SIGPROF, trace, chain=True)
    kit = Kit(keep)
    originals = {name: [loaded(f) for f in (keep / "seeds" / name).iterdir()] for name in names}
    corpus = {
        name: of_name + [loaded(f) for f in sorted((keep / "corpus" / name).glob("*"))]
        for name, of_name in originals.items()
    }
    lines, words = Lines(), {name: set[str]() for name in names}
    for number in range(first, sys.maxsize):
        rng = random.Random(f"{seed}/{number}")
        name = rng.choices(names, [TARGETS[name].weight for name in names])[0]
        every = corpus[name] if rng.random() < 0.5 else originals[name]
        case = mutated(rng.choice(every), every, rng)
        written(case, keep / "case")
        pipe.send(("starts", name, number))
        before, begun, lines.new = resource.getrusage(resource.RUSAGE_SELF), time.time(), False
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        sys.settrace(lines)
        outcome, finding = run(name, keep / "case", kit)
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss
        new = outcome not in words[name] and len(words[name]) < WORDS
        words[name].add(outcome)
        if grown > MEMORY:
            finding = finding or f"memory grew by {grown >> 10} MiB\n\n{outcome}"
        elif (lines.new or new) and not finding and max(map(len, case.values())) < LARGEST:
            corpus[name].append(case)
            written(case, keep / "corpus" / name / f"{number:07}")
        if finding:
            written(case, keep / "findings" / f"{name}-{number:07}")
        pipe.send(("ends", time.time() - begun, outcome, finding))
        if grown > MEMORY:  # what grows then is seen again
            return


def fuzz(keep: Path, seconds: float, seed: int, names: list[str]) -> int:
    """Run cases for so long, print what was found, and return how many findings are not known."""
    if keep.exists() and any(keep.iterdir()):  # of another run, which may be at work
        sys.exit(f"--keep is {keep}, which is not empty, expected a new folder")
    (keep / "findings").mkdir(parents=True)
    fork = multiprocessing.get_context("fork")
    maker = fork.Process(target=fuzz_seeds.make, args=(keep / "seeds", keep / "checkpoint"))
    maker.start()  # libraries that have run threads do not outlive a fork
    maker.join()
    assert maker.exitcode == 0
    cases, spent, told = Counter[str](), Counter[str](), time.time()
    outcomes: dict[str, set[str]] = {name: set() for name in names}
    findings: dict[str, Counter[str]] = {name: Counter() for name in names}
    end, number = time.time() + seconds, 0

    def found(name: str, what: str) -> None:
        title = what.partition("\n")[0]
        title_key = re.sub(r"\d+ MiB", "", title.partition(": ")[0])
        findings[name][title_key] += 1
        kept = keep / "findings" / f"{name}-{number:07}"
        if (count := findings[name][title_key]) > KEPT:
            shutil.rmtree(kept, ignore_errors=True)
        else:
            if not kept.exists():  # its process did not come to it
                shutil.copytree(keep / "case", kept)
            kept.with_suffix(".txt").write_text(what, errors="backslashreplace")
            print(f"{kept}: {title} ({count})".encode("ascii", "backslashreplace").decode())

    while time.time() < end:
        pipe, theirs = fork.Pipe(duplex=False)
        worker = fork.Process(target=work, args=(keep, names, seed, number, theirs), daemon=True)
        worker.start()
        theirs.close()
        name = ""
        while time.time() < end:
            try:
                if not pipe.poll(STUCK):
                    worker.kill()
                    found(name, f"stuck for {STUCK} s")
                    break
                message = pipe.recv()
            except EOFError:
                worker.join()
                if worker.exitcode:
                    how = signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else "exit"
                    trace = (keep / "trace.txt").read_text(errors="replace")
                    at = re.search(rf"{BTOK}/(\S+)\", line (\d+)", trace)
                    place = f"{at[1]}:{at[2]}" if at else "?"
                    hung = " (took too long)" if how == "SIGPROF" else ""
                    found(name, f"{how}{hung} in {place}\n\n{trace}")
                break
            if message[0] == "starts":
                _, name, number = message
                continue
            _, took, outcome, finding = message
            cases[name] += 1
            spent[name] += took  # type: ignore[assignment]
            outcomes[name].add(outcome)
            if finding:
                found(name, finding)
            if time.time() - told > 60:
                told = time.time()
                print(
                    f"{sum(cases.values())} cases, {end - told:.0f} s to go, findings: "
                    f"{sum(map(len, findings.values()))}",
                    flush=True,
                )
        number += 1
        worker.kill()
        worker.join()
    print(f"{'target':<12}{'cases':>8}{'per second':>12}{'outcomes':>10}{'findings':>10}")
    for name in names:
        rate = cases[name] / max(spent[name], 1e-9)
        row = f"{cases[name]:>8}{rate:>12.1f}{len(outcomes[name]):>10}{len(findings[name]):>10}"
        print(f"{name:<12}{row}")
    for name in names:
        for title, count in findings[name].most_common():
            why = KNOWN.get(f"{name}: {title}")
            print(f"  {name}: {title}, {count} times{f' ({why})' if why else ''}")
    return len({f"{name}: {title}" for name in names for title in findings[name]} - KNOWN.keys())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    asked = parser.parse_args()
    sys.exit(fuzz(asked.keep.resolve(), asked.seconds, asked.seed, asked.targets) > 0)
