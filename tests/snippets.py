"""Every snippet of README.md and docs/*.md: what there is, and how tests/test_docs.py makes sure of
it. `python tests/snippets.py` tells the numbers, and what is parsed only and why.

A page is read from top to bottom in one folder and one Python namespace. Commands run in this
process, on tiny models and files that have the names that the pages give them. What cannot run here
is parsed by its own parser, to the settings it would run with, so that a wrong flag fails.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# output of commands; and what the site makes of docstrings, as its build tests
DATA = ("text", "{eval-rst}")

# Commands that are parsed only, by how they begin or by a flag, and why.
PARSED = {
    "make": "installs, or takes minutes; CI runs test, lint, aot and docs",
    "pip": "installs",
    "source": "of the shell",
    "vllm": "needs vLLM; `make serve-test` serves by it",
    "curl": "needs a server; `make serve-test` runs it",
    "pytest": "is run by CI, or takes minutes; its files and options are looked up",
    "python -m btok check-server": "needs a server; tests/test_check_server.py has one",
    "python -m btok serve": "serves until it is stopped; tests/test_web.py asks it",
    "python examples/smollm2/study.py": "fetches weights; tests/test_smollm2.py runs it without",
    "python examples/studies/efficiency.py": "measures for minutes; tests/test_studies.py runs it",
    "python tests/snippets.py": "a test runs it",
    "python tests/odd_files.py": "takes minutes; tests/test_odd_files.py does the same",
}
PARSED_FLAGS = {
    "--fetch": "needs the hub; tests/test_mmeb_v2.py has one",
    "--engine ray": "starts a cluster; tests/test_ray.py runs it",
    "--shard": "needs several processes; tests/test_shards.py runs it",
}
COMPILED = {  # Python, by a line of it
    "from openai import OpenAI": "needs a server; `make serve-test` runs it",
    "from btok.tools.mteb import MTEBEncoder": "mteb is no part of dev; tests/test_mteb.py runs it",
}


class Block(NamedTuple):
    """A fenced block.

    Args:
        page: its file; line: of its first line of text, from 1.
        kind: the info string; text: without the fences.
    """

    page: Path
    line: int
    kind: str
    text: str


class Snippet(NamedTuple):
    """What is run or parsed at once: a block, or a command of one.

    Args:
        where: "docs/train.md:4".
        kind: the block's, or "output" of the Python right before; text: all of it, or the command.
        why: why it is parsed only; "" where it runs.
    """

    where: str
    kind: str
    text: str
    why: str = ""


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page; a ValueError for a fence that is not closed."""
    opened: Block | None = None
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened = Block(page, number + 1, line[3:].strip(), "")
        elif opened is not None and line == "```":
            yield opened
            opened = None
        elif opened is not None:
            opened = opened._replace(text=f"{opened.text}{line}\n")
    if opened is not None:
        raise ValueError(f"{page}:{opened.line}: a block is not closed")


def snippets(page: Path) -> Iterator[Snippet]:
    """What a page has, in order.

    Raises:
        ValueError: a block of no known kind.
    """
    end = 0  # of the Python before
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.kind == "text" and block.line == end + 2:
            yield Snippet(where, "output", block.text)
        end = block.line + block.text.count("\n") if block.kind == "python" else 0
        if block.kind == "bash":
            for at, command in commands(block.text):
                where = f"{page.relative_to(ROOT)}:{block.line + at}"
                yield Snippet(where, "bash", command, why_parsed(command))
        elif block.kind == "python":
            why = [why for line, why in COMPILED.items() if line in block.text]
            yield Snippet(where, "python", block.text, *why)
        elif block.kind in ("json", "toml"):
            yield Snippet(where, block.kind, block.text)
        elif block.kind not in DATA:
            raise ValueError(f"{where}: {block.kind!r} is no kind of block that is made sure of")


def commands(text: str) -> Iterator[tuple[int, str]]:
    """The commands of a shell block, each with the line it begins at, from 0."""
    begun, whole = 0, ""
    for number, line in enumerate(text.splitlines()):
        begun, whole = (begun, whole) if whole else (number, "")
        if line.endswith("\\"):
            whole += line[:-1]
        elif (whole := whole + line).strip():
            yield begun, whole
            whole = ""


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables before a command, and its words; its comment is gone."""
    words = shlex.split(command, comments=True)
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return variables, words


def why_parsed(command: str) -> str:
    """Why a command does not run in the test; "" where it does."""
    said = " ".join(words_of(command)[1])
    found = [why for start, why in PARSED.items() if f"{said} ".startswith(f"{start} ")]
    found += [why for flag, why in PARSED_FLAGS.items() if f" {flag}" in said]
    return found[0] if found else ""


def counted() -> str:
    """The table that the command prints."""
    lines = [f"{'':32}{'found':>6}{'run':>6}{'parsed only':>13}"]
    sums = [0, 0]
    for page in PAGES:
        found = list(snippets(page))
        run = sum(not snippet.why for snippet in found)
        sums = [sums[0] + len(found), sums[1] + run]
        name = str(page.relative_to(ROOT))
        lines.append(f"{name:32}{len(found):6}{run:6}{len(found) - run:13}")
    lines += [f"{'all':32}{sums[0]:6}{sums[1]:6}{sums[0] - sums[1]:13}", "", "Parsed only:"]
    for page in PAGES:
        for where, _, text, why in snippets(page):
            if why:
                lines.append(f"{where}: {why}\n    {text.strip().splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(counted())
