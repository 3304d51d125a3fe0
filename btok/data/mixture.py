"""Mixtures: a file that lists data sets, and the 25 public ones that the paper trains on.

What the public ones hold, and what becomes of a row:

- TIGER-Lab/MMEB-train, 20 configurations, split `original`: `qry`, `qry_image_path` -> `pos_text`,
  `pos_image_path`; with `negatives = 1` also `neg_text`, `neg_image_path`. Texts contain their
  instruction, and `<|image_1|>` for the picture, which is taken out.
- vidore/colpali_train_set, split `train`: `image`, `query` and `options` -> `answer`, or the option
  whose letter it is.
- openbmb/VisRAG-Ret-Train-In-domain-data, split `train`: `query` -> `image`, with instructions by
  `source`.
- ShareGPTVideo/train_video_and_instruction (LLaVA-Hound), JSONL: `video`, the name of a folder of
  frames, and the first of `conversations` -> the second; or the second -> `video`.

Weights, rows taken, generated sides and instructions are the paper's: 28.8, 19.2, 23.1 and 28.8 %
of the samples. Columns are as the authors' and VLM2Vec's loaders read them and as the authors'
documents print rows; the hub's own data was not at hand, and where a local copy has its files
(`open_public`) is partly a guess. Ours are: pictures before text, eight frames by linspace, one
line break after every text, and that equal positives are no negatives of each other.
"""

from __future__ import annotations

import ast
import tomllib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from btok.data.records import Pair, Side
from btok.data.sources import (
    Row,
    Schema,
    Source,
    below,
    characters,
    load_dataset,
    open_source,
    part,
    picture,
)

TEXTS = "path public folder name root ntp_side query_instruction positive_instruction"
KINDS = "a file .jsonl, .parquet or .toml (a mixture), or a folder of the paper's data sets"
SETTINGS: dict[str, Any] = dict.fromkeys(TEXTS.split(), str)
SETTINGS |= {"weight": int | float, "rows": int, "negatives": int}


def load_mixture(path: str | Path) -> list[Source]:
    """Open the data sets of a mixture.

    Args:
        path: a TOML file with a table `[[dataset]]` for each; or a `.jsonl` or `.parquet` file; or
            a folder, for the paper's mixture as `open_public` finds it there. A table has `path`,
            a file for `open_source`, or `public`, a name of `PUBLIC`, and the `folder` for it;
            then what shall not be as it is by default or in the paper: `name`, `root`, `weight`,
            `ntp_side`, `query_instruction`, `positive_instruction`, `rows`, `negatives`. Paths
            start from the TOML file's folder.

    Raises:
        ValueError: no TOML, a setting that is unknown, missing or of another type, two data sets
            of one name, what `open_source` refuses.
        OSError, ImportError: as `open_source`.
    """
    path = Path(path)
    if path.is_dir():
        try:
            return [open_public(name, path) for name in PUBLIC]
        except OSError as error:
            raise OSError(
                f"data is {path}, a folder, which is for the paper's public data sets; {error}"
            ) from error
    if not path.exists() and path.suffix != ".parquet":  # which may be a pattern
        raise FileNotFoundError(f"data is {path}, which does not exist; expected {KINDS}")
    if path.suffix != ".toml":
        return [open_source(path)]
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if given.keys() != {"dataset"} or not isinstance(given["dataset"], list):
        raise ValueError(f"{path} has {', '.join(given) or 'nothing'}, expected [[dataset]] tables")
    made: dict[str, Source] = {}
    for number, table in enumerate(given["dataset"], 1):
        where = f"{path}, data set {number}"
        for key, value in table.items():
            if key not in SETTINGS:
                raise ValueError(f"{where}: {key} is unknown, expected {', '.join(SETTINGS)}")
            if not isinstance(value, SETTINGS[key]) or isinstance(value, bool):
                kind = getattr(SETTINGS[key], "__name__", SETTINGS[key])
                raise ValueError(f"{where}: {key} is {value!r}, expected {kind}")
        if ("path" in table) == ("public" in table):
            raise ValueError(f"{where} has {', '.join(table)}, expected one of path and public")
        if "folder" in table and "path" in table:
            raise ValueError(f"{where}: folder goes with public, not with path")
        table |= {key: path.parent / table[key] for key in ("path", "root") if key in table}
        if "public" in table:
            source = open_public(folder=path.parent / table.pop("folder", ""), **table)
        else:
            own = table.pop("path")
            if not own.exists() and own.suffix != ".parquet":
                raise FileNotFoundError(f"{where}: path is {own}, which does not exist")
            source = open_source(own, **table)
        if source.name in made:
            raise ValueError(f"{where}: name is {source.name!r}, as that of another")
        made[source.name] = source
    return list(made.values())


def open_public(public: str, folder: str | Path, **settings: Any) -> Source:
    """Open one of `PUBLIC`, from a local copy or the hub.

    Args:
        public: its name.
        folder: where copies of the repositories are, each in a folder of its own name: parquet as
            `<configuration>/original*.parquet` (MMEB-train) or `data/train*.parquet`, MMEB-train's
            pictures as its rows name them, JSONL as in `PUBLIC` and frames in `train_300k/<video>`.
            Parquet of a repository that is not there comes from the hub.
        settings: in place of the paper's, as `open_source` takes them.

    Raises:
        ValueError: an unknown name; what `open_source` refuses.
        OSError, ImportError: as `open_source`; the hub cannot be reached.
    """
    if public not in PUBLIC:
        raise ValueError(f"public is {public!r}, expected one of {', '.join(PUBLIC)}")
    found = PUBLIC[public]
    split = "original" if found.schema is MMEB else "train"
    root = Path(folder) / found.repository.rpartition("/")[2]
    data: Any = root / (found.part or "data") / f"{split}*.parquet"
    if found.part.endswith(".jsonl"):
        root, data = root / "train_300k", root / found.part
    elif not root.is_dir():
        data = load_dataset(found.repository, found.part or None, split=split)
    options = {"name": public, "root": root, "negatives": 0, **found.settings, **settings}
    return open_source(data, schema=found.schema, **options)


def _line(text: str) -> str:
    text = text.replace("<|image_1|>", "").replace("<video>", "").strip()
    return text and f"{text}\n"


def _mmeb(row: Row, root: Path) -> Pair:
    def side(text: str, image: str) -> Side:
        path = part(row, image, str)
        return Side(_line(part(row, text, str)), [below(root, path)] if path else [])

    query, positive = side("qry", "qry_image_path"), side("pos_text", "pos_image_path")
    negative = side("neg_text", "neg_image_path")
    hard = [negative] if negative.text or negative.images else []
    return Pair(query, positive, hard, positive_id=row["pos_image_path"] or positive.text)


def _colpali(row: Row, root: Path) -> Pair:
    query, answer, options = (part(row, key, str) for key in ("query", "answer", "options"))
    try:
        listed = ast.literal_eval(options)
    except (ValueError, SyntaxError):
        listed = None
    if isinstance(listed, list) and listed:
        query = f"{query} Options: {options}"
        if answer in list("ABCDE"[: len(listed)]):
            option = str(listed["ABCDE".index(answer)])
            answer = option.removeprefix(f"{answer}. ").removeprefix(f"{answer}) ")
    page = [picture(row["image"], root)]
    return Pair(Side(_line(query), page), Side(_line(answer)), positive_id=answer)


def _visrag(row: Row, root: Path) -> Pair:
    query, page = VISRAG.get(part(row, "source", str), ("", ""))
    query += part(row, "query", str)
    return Pair(Side(_line(query)), Side(_line(page), [picture(row["image"], root)]))


def _hound(row: Row, root: Path, *, retrieval: bool) -> Pair:
    try:
        prompt, answer = (
            _line(characters(turn["value"] or "")) for turn in row["conversations"][:2]
        )
        video = below(root, row["video"])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        expected = "expected conversations with two values, and a video's name"
        raise ValueError(f"{expected}: {error}") from error
    if retrieval:
        return Pair(Side(answer), Side(video=video), positive_id=row["video"])
    return Pair(Side(prompt, video=video), Side(answer), positive_id=answer)


MMEB = Schema("mmeb", ("qry", "qry_image_path", "pos_text", "pos_image_path"), _mmeb)
COLPALI = Schema("colpali", ("query", "image", "answer", "options"), _colpali)
VISRAG_IN = Schema("visrag", ("query", "image", "source"), _visrag)
HOUND = Schema("hound", ("conversations", "video"), partial(_hound, retrieval=False))
HOUND_RETRIEVAL = Schema("hound_retrieval", HOUND.columns, partial(_hound, retrieval=True))
SCHEMAS = {each.name: each for each in (MMEB, COLPALI, VISRAG_IN, HOUND, HOUND_RETRIEVAL)}


class Public(NamedTuple):
    """One of the paper's data sets: its repository on the hub, the configuration or file there, ""
    for the only one, what rows mean, and the paper's settings, as `open_source` takes them.
    """

    repository: str
    part: str
    schema: Schema
    settings: dict[str, Any]


def _paper() -> tuple[dict[str, Public], dict[str, tuple[str, str]]]:
    given = tomllib.loads(Path(__file__).with_name("mixture.toml").read_text(encoding="utf-8"))
    public = {}
    for group in given["group"]:
        for name, own in group.pop("datasets").items():
            settings = group | own
            public[name] = Public(
                repository=settings.pop("repository"),
                part=settings.pop("part", "").format(name=name),
                schema=SCHEMAS[settings.pop("schema")],
                settings=settings,
            )
    return public, {table["source"]: (table["query"], table["page"]) for table in given["visrag"]}


# by name; and by VisRAG's source: the instruction before a query, the text beside its page
PUBLIC, VISRAG = _paper()
