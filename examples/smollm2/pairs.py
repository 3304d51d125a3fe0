"""Two sets of real text pairs to train on, a third to be surprised by, and lexical floors.

wordnet  a gloss -> the words it defines   Debian's wordnet-base      (WordNet 3.0 licence)
debian   a package's summary -> its text   apt's English descriptions (each package's own licence)
stamps   a caption in one of eight languages -> the English one   tuxpaint-stamps-default (GPL-2)

They are made on the machine from files that `fetch.py` brings, the same bytes from the same files,
and never committed. A pair's split follows from a digest of its text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from btok.files import sha256, write_json, write_text
from examples.smollm2 import fetch

HELD_OUT = 1000  # pairs each to test and to validate on
LANGUAGES = ("de", "es", "fr", "it", "nl", "pl", "pt", "sv")
SPLITS = ("train", "validation", "test")


class Pair(NamedTuple):
    """A query, what answers it, and what no two splits may share."""

    query: str
    answer: str
    owns: frozenset[str]


class TextSet(NamedTuple):
    """A set on the disk: a folder with a JSONL file a split, and what is known of it.

    Args:
        facts: sizes, mean numbers of words, sha256 of the files, and the lexical floor: recall@1 in
            percent of TF-IDF on the test pairs.
    """

    name: str
    folder: Path
    facts: Mapping[str, Any]

    def pairs(self, split: str) -> list[tuple[str, str]]:
        """The (query, answer) pairs of the split "train", "validation" or "test"."""
        lines = (self.folder / f"{split}.jsonl").read_text("utf-8").splitlines()
        return [(row["query"], row["positive"]) for row in map(json.loads, lines)]


def wordnet(cache: Path) -> list[Pair]:
    """A gloss of 4 to 16 words -> the synset's words, unless one is a name or shares its first four
    letters with a word of the gloss; a word of a held-out answer is in no training answer.
    """
    files = dict(fetch.deb(cache, "wordnet-base"))
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in files[f"./usr/share/wordnet/data.{part}"].decode().splitlines():
            head, _, gloss = line.partition(" | ")
            fields = head.split(" ")
            if not gloss or not fields[0]:  # the licence, at the file's head
                continue
            count = int(fields[3], 16)
            words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in fields[4:][::2][:count]]
            # behind it stand examples, which use the words
            query = re.split(r'; *"', gloss.strip())[0].rstrip(";: ")
            said = re.findall("[a-z]+", query.lower())
            starts = {word[:4] for word in said}
            parts = re.findall("[a-z]+", " ".join(words).lower())
            named = any(re.search("[A-Z0-9]", word) for word in words)
            if 4 <= len(said) <= 16 and not named and not any(w[:4] in starts for w in parts):
                found.append(Pair(query, ", ".join(words), frozenset(words)))
    return found


def debian(cache: Path) -> list[Pair]:
    """A package's one-line summary -> its description of 12 to 30 words; one a source package."""
    packages, descriptions = fetch.apt_lists(cache)
    sources, seen, found = {}, set(), []
    for entry in packages.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Source): (\S+)", entry, re.MULTILINE))
        if "Package" in fields:
            sources[fields["Package"]] = fields.get("Source", fields["Package"])
    for entry in descriptions.split("\n\n"):
        name = re.search(r"^Package: (\S+)", entry, re.MULTILINE)
        summary, _, text = entry.partition("Description-en: ")[2].partition("\n")
        lines = (line.strip() for line in text.splitlines())
        answer = " ".join(line for line in lines if line not in ("", "."))
        source = sources.get(name[1], name[1]) if name else ""
        if source and source not in seen and 12 <= len(answer.split()) <= 30:
            seen.add(source)
            found.append(Pair(summary.strip(), answer, frozenset([source])))
    return found


def stamps(cache: Path) -> list[Pair]:
    """A stamp's caption in one of `LANGUAGES`, that its text decides -> the English caption."""
    found = []
    for name, content in fetch.deb(cache, "tuxpaint-stamps-default"):
        if name.endswith(".txt"):
            english, *others = content.decode("utf-8", "replace").splitlines() or [""]
            said = dict(re.findall(r"^(\w+)\.utf8=(.+)$", "\n".join(others), re.MULTILINE))
            choice = LANGUAGES[int(_digest(english)[:8], 16) % len(LANGUAGES)]
            if (query := said.get(choice, "").strip()) and query != english.strip():
                found.append(Pair(query, english.strip(), frozenset([english])))
    return found


SETS: dict[str, Callable[[Path], list[Pair]]] = {
    "wordnet": wordnet,
    "debian": debian,
    "stamps": stamps,
}


def load(cache: Path, name: str) -> TextSet:
    """A set by its name in `SETS`; built where it is not there.

    Raises:
        ValueError: what it is made of cannot be had, or its files have changed since.
    """
    folder = cache / "pairs" / name
    facts_file = folder / "facts.json"
    if not facts_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(facts_file, _build(folder, SETS[name](cache), trains=name != "stamps"))
    facts = json.loads(facts_file.read_text("utf-8"))
    for split, digest in facts["sha256"].items():
        if sha256(folder / f"{split}.jsonl") != digest:
            raise ValueError(
                f"{folder / split}.jsonl has changed since it was made; remove {folder}"
            )
    return TextSet(name, folder, facts)


def _build(folder: Path, found: list[Pair], trains: bool) -> dict[str, Any]:
    split = _split(found) if trains else {"test": _different(_in_order(found))[: HELD_OUT // 2]}
    facts: dict[str, Any] = {"pairs": {}, "words": {}, "sha256": {}}
    for name, pairs in split.items():
        rows = [{"query": p.query, "positive": p.answer} for p in pairs]
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        write_text(folder / f"{name}.jsonl", text)
        facts["pairs"][name] = len(pairs)
        facts["sha256"][name] = sha256(folder / f"{name}.jsonl")
    sides = {"query": [p.query for p in split["test"]], "answer": [p.answer for p in split["test"]]}
    for side, texts in sides.items():
        facts["words"][side] = round(sum(len(text.split()) for text in texts) / len(texts), 1)
    facts["floor"] = lexical_floor(sides["query"], sides["answer"])
    return facts


def _split(found: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Test and validation pairs, no two alike in a text, and those for training that share nothing
    with them: no text, and nothing that they own.
    """
    ordered = _in_order(found)
    held = _different(ordered)[: 2 * HELD_OUT]
    taken = {what for p in held for what in (p.query, p.answer, *p.owns)}
    rest = [p for p in ordered if taken.isdisjoint({p.query, p.answer, *p.owns})]
    return {
        "train": _different(rest),
        "validation": held[HELD_OUT:],
        "test": held[:HELD_OUT],
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _in_order(found: Iterable[Pair]) -> list[Pair]:
    return sorted(found, key=lambda p: _digest(f"{p.query}\n{p.answer}"))


def _different(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs without those of which the query or the answer came before."""
    seen: set[str] = set()
    kept = []
    for p in pairs:
        mine = {f"query {p.query}", f"answer {p.answer}"}
        if seen.isdisjoint(mine):
            seen |= mine
            kept.append(p)
    return kept


def lexical_floor(queries: Sequence[str], answers: Sequence[str]) -> float:
    """Recall@1 in percent of TF-IDF, see `lexical_ranks`."""
    return round(100 * float((lexical_ranks(queries, answers) == 1).mean()), 1)


def lexical_ranks(queries: Sequence[str], answers: Sequence[str]) -> Any:
    """The rank of answer i among all answers for query i, from 1, by the cosine of TF-IDF over
    words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    weigh = TfidfVectorizer(sublinear_tf=True).fit([*queries, *answers])
    scores = (weigh.transform(queries) @ weigh.transform(answers).T).toarray()
    right = scores.diagonal()[:, None]
    # what ties with the right answer counts as before it: no words in common are no answer
    return (scores >= right).sum(1)
