"""MMEB-V2 (arXiv 2507.04590): records of its 78 data sets become retrieval tasks.

records -> `expand`: the benchmark's strings, media, names, labels -> `build`: a RetrievalTask

What tells one set from another is a row of `mmeb_v2.toml`; how a record becomes a query is one of
seven functions, after what the candidates are: answers, images, labels, videos, options, clips or
pages. The strings are those of the benchmark's own code (github.com/TIGER-AI-Lab/VLM2Vec) to the
letter ("origin"), or as bottleneck tokens are trained with them ("canonical"): pictures within
their brackets and on a line of their own, the text without outer spaces and with one line break.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from btok.data.records import Metric, RetrievalTask, Side
from btok.evaluation import records as on_disk
from btok.evaluation.records import Pictures, Row
from btok.files import one_line

Prompts = Literal["origin", "canonical"]
TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PLACES: dict[str, str] = TABLE["places"]
IN_RECORDS: str = TABLE["in_records"]
FRAMES = 8  # of a video


@dataclass(frozen=True)
class DataSet:
    """A row of `mmeb_v2.toml`, which says what its columns mean."""

    name: str
    modality: str
    meta_task: str
    family: str
    metric: Metric
    source: str
    configs: Sequence[str]
    split: str
    revision: str
    records: str
    media: str
    queries: int
    gb: float
    own_line: bool = False
    query_image: bool = False
    newlines: int = 1
    video: str = ""
    text: str = ""
    options: str = ""
    hashed_names: bool = False
    query: str = ""
    query_with_image: str = ""
    query_with_video: str = ""
    candidate: str = ""
    labels: Sequence[str] = ()
    first: int | None = None
    archive: str = ""


@cache
def data_sets() -> dict[str, DataSet]:
    """The 78 data sets by name, in the order of the published tables."""
    found = {}
    for group in TABLE["groups"]:
        for name, own in group["sets"].items():
            row = TABLE["modalities"][group["modality"]] | group | own | {"name": name}
            del row["sets"]
            words = row | {"repository": row["source"].rpartition("/")[2]}
            row["configs"] = [config.format_map(words) for config in row["configs"]]
            row |= {column: row[column].format_map(words) for column in ("records", "media")}
            found[name] = DataSet(**row)
    return found


def data_set(name: str) -> DataSet:
    """A data set by its name; a ValueError that names the nearest ones for an unknown name."""
    if name not in data_sets():
        near = " or ".join(difflib.get_close_matches(name, data_sets(), 3, 0.3))
        raise ValueError(f"mmeb-v2: no data set {name!r}, expected {near or 'one of the table'}")
    return data_sets()[name]


def expand(
    name: str,
    records: Iterable[Mapping[str, Any]],
    data_dir: str | Path,
    *,
    corpus: Iterable[Mapping[str, Any]] | None = None,
    qrels: Iterable[Mapping[str, Any]] | None = None,
    prompts: Prompts = "origin",
) -> list[dict[str, Any]]:
    """The queries of a data set's records, a mapping each, as the benchmark's own code makes them.

    Args:
        name: of the data set.
        records: its rows as on the hub; a document set's queries.
        data_dir: the folder of its media, laid out as the benchmark's.
        corpus: a document set's pages; its own picture stands for a page without a file.
        qrels: a document set's relevant pages.
        prompts: "origin" for the benchmark's own strings, "canonical" for those that bottleneck
            tokens are trained with.

    Returns:
        `query_text`; `query_media`, paths or None; `cand_texts`; `cand_media`, a list of paths per
        candidate or None; `cand_names`, by which equal candidates are one; `label_name`, a name or
        a list of names; for documents `rel_scores`, one per label.

    Raises:
        ValueError: no such data set or prompts; a record without a field, or with a wrong one.
        FileNotFoundError: a picture or frames of a video are missing.
    """
    spec = data_set(name)
    queries = _queries(spec, records, Media(data_dir, spec, corpus, qrels), prompts)
    for query in queries:
        shown = _candidates(query)
        query["query_text"] = _as_asked(query["query_text"], query["query_media"], prompts)
        query["cand_texts"] = [_as_asked(text, media, prompts) for _, text, media in shown]
    return queries


def _queries(
    spec: DataSet, records: Iterable[Any], media: Media, prompts: Prompts
) -> list[dict[str, Any]]:
    """The queries that `expand` returns, all in the benchmark's own strings."""
    if prompts not in get_args(Prompts):
        raise ValueError(f"mmeb-v2: prompts is {prompts!r}, expected one of {get_args(Prompts)}")
    if spec.family == "pages" and media.relevant is None:
        raise ValueError(f"mmeb-v2: qrels is None, expected those of {spec.name}")
    queries = []
    for number, record in enumerate(records):
        row = Row(spec.name, number, record)
        try:
            query = FAMILIES[spec.family](spec, row, media)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            if str(error).startswith(f"{row.name}, row "):
                raise
            raise row.wrong(f"its fields do not fit ({one_line(error)})") from error
        texts, names = query["cand_texts"], query["cand_names"]
        if len(texts) != len(names):
            raise row.wrong(f"{len(texts)} texts for {len(names)} candidates")
        queries.append(query)
    if not queries:
        raise ValueError(f"mmeb-v2: {spec.name} has no records, expected at least 1")
    return queries


def _candidates(query: Mapping[str, Any]) -> Iterator[tuple[Any, str, Sequence[Any] | None]]:
    """Yield the name, text and media of each candidate of a query from `expand`."""
    names = query["cand_names"]
    return zip(names, query["cand_texts"], query["cand_media"] or [None] * len(names), strict=True)


def build(
    name: str,
    records: Iterable[Mapping[str, Any]],
    data_dir: str | Path,
    *,
    corpus: Iterable[Mapping[str, Any]] | None = None,
    qrels: Iterable[Mapping[str, Any]] | None = None,
    prompts: Prompts = "canonical",
) -> RetrievalTask:
    """A data set as a retrieval task, whose pool has each name once, in order of appearance.

    Args and Raises as for `expand`. With `prompts="origin"` the sides have the text that follows
    their picture's place, and are for a processor whose `bare` is set.
    """
    spec = data_set(name)
    media = Media(data_dir, spec, corpus, qrels)
    queries = _queries(spec, records, media, prompts)
    if spec.family == "pages":
        asked = dict.fromkeys(key for query in queries for key in query["cand_names"])
        if lacking := [key for key in asked if key not in media.pages]:
            had = f"{len(lacking)} relevant pages are not in the corpus, as {lacking[0]!r}"
            raise ValueError(
                f"{name}: {had}; of {len(media.pages)} pages the first is "
                f"{next(iter(media.pages), None)!r}"
            )
    places: dict[Any, int] = {}
    candidates: list[Side] = []

    def add(key: Any, text: str, shown: Sequence[Any] | None = None) -> int:
        if places.setdefault(key, len(places)) == len(candidates):
            if key in media.pages and shown and not os.path.isfile(shown[0]):
                shown = [on_disk.stored(media.pages[key])]
            candidates.append(_side(text, shown, prompts))
        return places[key]

    pools = [[add(*candidate) for candidate in _candidates(query)] for query in queries]
    for i, key in enumerate(media.pages):
        path = media.page(Row(f"{name} (corpus)", i, {}), key)
        add(key, _prompt(spec.candidate, kind="image"), [path])
    for label in spec.labels:
        add(label, label)
    qrels_of, published = [], []
    for query in queries:
        labels = query["label_name"]
        labels = labels if isinstance(labels, list) else [labels]
        scores = query.get("rel_scores", [1] * len(labels))
        right = dict(zip(labels, scores, strict=True))
        wrong = _as_published(labels, scores)
        qrels_of.append({places[key]: float(x) for key, x in right.items() if key in places})
        published.append({places[key]: x for key, x in wrong.items() if key in places})
    everything = spec.family in ("videos", "pages") or bool(spec.labels)
    return RetrievalTask(
        name=name,
        meta_task=spec.meta_task,
        modality=spec.modality,
        metric=spec.metric,
        queries=[_side(query["query_text"], query["query_media"], prompts) for query in queries],
        candidates=candidates,
        qrels=qrels_of,
        pools=None if everything else pools,
        published_qrels=published,
    )


def _as_asked(text: str, media: Sequence[Any] | None, prompts: Prompts) -> str:
    """One of the benchmark's strings as it is, or as bottleneck tokens are trained with it."""
    if prompts == "origin":
        return text
    kind, body = _parted(text, prompts)
    return PLACES[kind].join(TABLE["brackets"]) + "\n" + body if kind and media else body


def _side(text: str, media: Sequence[Any] | None, prompts: Prompts) -> Side:
    """One of the benchmark's strings and its media; the place of a picture is left out."""
    kind, body = _parted(text, prompts)
    if media is None:
        return Side(body)
    return Side(body, video=media) if kind == "video" else Side(body, images=media)


def _parted(text: str, prompts: Prompts) -> tuple[str | None, str]:
    """The kind of medium whose placeholder a string starts with (None without one), and the rest of
    the string.
    """
    kind = next((kind for kind, place in PLACES.items() if text.startswith(place)), None)
    body = text.removeprefix(PLACES[kind]) if kind else text
    if prompts == "canonical":
        body = body.replace("\r\n", "\n").replace("\r", "\n").strip()
        body += "\n" if body else ""
    return kind, body


def _as_published(labels: Sequence[Any], scores: Sequence[float]) -> dict[Any, list[float]]:
    """The relevance that the benchmark's code looks up: it reorders labels, not their scores.

    The order is that of a Python set, which for texts changes from process to process: then, where
    it matters, each of all scores.
    """
    if len(set(scores)) > 1 and any(isinstance(label, str) for label in labels):
        return {label: list(scores) for label in labels}
    return {label: [score] for label, score in zip(set(labels), scores, strict=False)}


class Media(Pictures):
    """A data set's pictures and frames; `pages` are, by id, what a corpus's own records show,
    `relevant` those of each query with their relevance.
    """

    def __init__(
        self, data_dir: str | Path, spec: DataSet, corpus: Any = None, qrels: Any = None
    ) -> None:
        super().__init__(os.path.join(data_dir, spec.media))
        self.hashed = spec.hashed_names
        rows = (Row(f"{spec.name} (corpus)", i, record) for i, record in enumerate(corpus or ()))
        self.pages = {row.key("corpus-id"): row.record.get("image") for row in rows}
        self.relevant = None if qrels is None else on_disk.relevant(spec.name, qrels)

    def name_of(self, key: Any) -> str:
        """The name of a document's page, below the folder."""
        if not self.hashed:
            return f"{key}.png"
        stem, ending = os.path.splitext(str(key))
        digest = hashlib.md5(str(key).encode(), usedforsecurity=False).hexdigest()[:8]
        return f"{stem[:50]}_{digest}{ending}"

    def page(self, row: Row, key: Any) -> str:
        """The path of a page that is there, or whose record in the corpus stands for it."""
        name, shown = self.name_of(key), self.pages.get(key) is not None
        return os.path.join(self.root, name) if shown else self.image(row, name)


def _prompt(instruction: str, text: str = "", kind: str | None = None) -> str:
    """VLM2Vec's order: the picture's place, the instruction, the text."""
    return (f"{PLACES[kind]} " if kind else "") + instruction + (f" {text}" if text else "")


def _query(
    text: str, media: Sequence[str] | None, names: Sequence[Any], label: Any, **more: Any
) -> dict[str, Any]:
    query = {"query_text": text, "query_media": media, "cand_texts": list(names)}
    query |= {"cand_media": None, "cand_names": list(names), "label_name": label}
    return query | more


def _tidy(text: str, newlines: int = 1) -> str:
    """The text as the benchmark's first version wrote it: no space before a line break, one break
    at the end.
    """
    return text.replace(" \n", "\n") + "\n" * newlines


def _picture_and_words(spec: DataSet, row: Row, media: Media) -> tuple[str, list[str]]:
    """The text and the picture of a query that has both."""
    instruction = row.text("qry_inst").replace(IN_RECORDS, "")
    if spec.own_line:
        instruction = "\n" + instruction.strip()
    text = _tidy(_prompt(instruction, row.text("qry_text"), "image"))
    return text, [media.image(row, row.text("qry_img_path"))]


def _answers(spec: DataSet, row: Row, media: Media) -> dict[str, Any]:
    """A picture and words find a text of the record's list, whose first is right."""
    answers = row.texts("tgt_text")
    return _query(*_picture_and_words(spec, row, media), answers, answers[0])


def _images(spec: DataSet, row: Row, media: Media) -> dict[str, Any]:
    """Words, maybe with a picture, find a picture of the record's list, whose first is right."""
    paths, captions = row.texts("tgt_img_path"), row.texts("tgt_text")
    if spec.query_image:
        text, shown = _picture_and_words(spec, row, media)
        if len(captions) != len(paths):
            raise row.wrong(f"tgt_text has {len(captions)} texts, expected {len(paths)}")
        # of one picture, several parts may be candidates
        both = zip(paths, captions, strict=True)
        names = [path + ":" + caption.strip('"') for path, caption in both]
    else:
        instruction = row.text("qry_inst").replace(IN_RECORDS, PLACES["image"])
        text = f"{instruction} {row.text('qry_text')}" + "\n" * spec.newlines
        names, shown = paths, None
    instruction = row.text("tgt_inst").replace(IN_RECORDS, "")
    if captions[0].strip():
        texts = [_tidy(_prompt(f"{instruction} {each}", kind="image")) for each in captions]
    else:
        end = 0 if spec.query_image else 1
        texts = [_tidy(_prompt(instruction, kind="image"), end)] * len(paths)
    pictures = [[media.image(row, path)] for path in paths]
    return _query(text, shown, names, names[0], cand_texts=texts, cand_media=pictures)


def _labels(spec: DataSet, row: Row, media: Media) -> dict[str, Any]:
    """A video finds what it shows, among the set's labels or the record's own."""
    label = row.text("pos_text")
    names = [label] if spec.labels else row.texts("neg_text")
    frames = media.frames(row, str(row[spec.video]), most=FRAMES, least=2)
    return _query(_prompt(spec.query, kind="video"), frames, names, label)


def _videos(spec: DataSet, row: Row, media: Media) -> dict[str, Any]:
    """Words find the video they are of, among all."""
    name = os.path.basename(row.text(spec.video))
    name = os.path.splitext(name)[0] if spec.video == "video" else name
    words = row[spec.text]
    words = words if isinstance(words, str) else row.texts(spec.text)[0]
    frames = media.frames(row, name, most=FRAMES, least=FRAMES)
    texts = [_prompt(spec.candidate, kind="video")]
    return _query(
        _prompt(spec.query, words), None, [name], name, cand_texts=texts, cand_media=[frames]
    )


def _options(spec: DataSet, row: Row, media: Media) -> dict[str, Any]:
    """A video and a question find one of a few answers, which the question lists."""
    question, video, answer = row.text("question"), str(row[spec.video]), row["answer"]
    match spec.options:
        case "yes or no":
            names, video = ["yes", "no"], f"v_{video}"
            question += "? (A) yes; (B) no."
            place = names.index(answer) if answer in names else -1
        case "lettered":
            names, place = [row.text(f"a{i}") for i in range(5)], answer
            question, _ = _lettered(question, names)
        case "letters in names":
            options, video = row.texts("candidates"), f"{row['subset']}/{video}"
            question, names = _lettered(question, options)
            place = max((i for i, option in enumerate(options) if option == answer), default=-1)
        case "lines":
            names, place = row.texts("options"), list("ABCD").index(answer)
            question += "\n" + "\n".join(names)
        case "spaced":
            names, place = row.texts("option"), int(answer)
            question += " ".join(names)
    if 0 <= place < len(names):
        label = names[place]
    elif spec.options == "letters in names":  # as there: a label that is no candidate
        label = f"(@) {answer}"
    else:
        raise row.wrong(f"answer is {answer!r}, expected one of {', '.join(names)}")
    frames = media.frames(row, video, most=FRAMES, least=2)
    text, texts = _prompt(spec.query, question, "video"), names
    if spec.options in ("lines", "spaced"):  # the letter is in the name alone
        texts = [name[name.find(". ") :].strip(". ") for name in names]
    return _query(text, frames, names, label, cand_texts=texts)


def _lettered(question: str, options: Sequence[str]) -> tuple[str, list[str]]:
    """A question with its options listed, and these as they are listed."""
    listed = [f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options)]
    return "\n".join([question, "Options:", *listed]).rstrip(), listed


def _clips(spec: DataSet, row: Row, media: Media) -> dict[str, Any]:
    """Words and a video or a picture find a clip: of the video, or of a list of clips."""
    words, most = row.text("query"), FRAMES if not spec.query_with_image else None
    if not spec.query_with_image:
        video = os.path.splitext(os.path.basename(row.text("video_path")))[0]
        folders = [os.path.join(video, clip) for clip in media.folders(video) if clip != "query"]
        right = [folder for folder in folders if os.path.basename(folder).startswith("positive")]
        if not right or len(right) == len(folders):
            where = os.path.join(media.root, video)
            had = f"no clip named positive* and others in {where}"
            raise row.wrong(had, FileNotFoundError)
        text = _prompt(spec.query, words, "video")
        shown = media.frames(row, video, "query", most=FRAMES)
    else:
        given, shown, text = row.text("input_frames"), None, _prompt(spec.query, words)
        if given.endswith(".mp4"):
            text = _prompt(spec.query_with_video, words, "video")
            shown = media.frames(row, _clip(given))
        elif given.endswith(".jpg"):
            text = _prompt(spec.query_with_image, words, "image")
            shown = [media.image(row, f"query_{given}")]
        clips = {
            field: [Row(row.name, row.number, clip).text("output_path") for clip in row[field]]
            for field in ("positive_frames", "negative_frames")
        }
        folders = [_clip(path) for paths in clips.values() for path in paths]
        right = folders[: len(clips["positive_frames"])]
    names = [os.path.join(media.root, folder) for folder in folders]
    labels = [os.path.join(media.root, folder) for folder in right]
    label = labels if spec.query_with_image else labels[-1]
    texts = [_prompt(spec.candidate, kind="video")] * len(names)
    frames = [media.frames(row, folder, most=most) for folder in folders]
    return _query(text, shown, names, label, cand_texts=texts, cand_media=frames)


def _clip(path: str) -> str:
    return os.path.join("video_frames", path.replace("/", "_").split(".mp4")[0])


def _pages(spec: DataSet, row: Row, media: Media) -> dict[str, Any]:
    """Words find a page of a document; some may be more relevant than others."""
    key, relevant = row.key("query-id"), media.relevant or {}
    if key not in relevant:
        raise row.wrong(f"query-id is {key!r}, expected one with a relevant page in the qrels")
    names, scores = list(relevant[key]), list(relevant[key].values())
    pages = [[media.page(row, name)] for name in names]
    texts = [_prompt(spec.candidate, kind="image")] * len(names)
    text = _prompt(spec.query, row.text("query"))
    return _query(text, None, names, names, cand_texts=texts, cand_media=pages, rel_scores=scores)


FAMILIES: dict[str, Callable[[DataSet, Row, Media], dict[str, Any]]] = {
    "answers": _answers,
    "images": _images,
    "labels": _labels,
    "videos": _videos,
    "options": _options,
    "clips": _clips,
    "pages": _pages,
}


def load(
    name: str, data_dir: str | Path, half: bool = False
) -> tuple[dict[str, Any], str, list[Path]]:
    """A data set's records below `data_dir`; a page without a file gets one from its record.

    Returns:
        The `records`, and for documents `corpus` and `qrels`, as `build` takes them; the commit on
        the hub that they are of, or "local"; the files that were read.

    Raises:
        FileNotFoundError: a part of them is missing, or, unless `half`, of the media.
        ValueError, ImportError: no such data set; a file that cannot be read (extra `data`).
    """
    spec = data_set(name)
    folder = Path(data_dir, spec.records)
    try:
        files = {part: on_disk.find(folder, part, spec.split) for part in spec.configs}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} has {error}; --fetch gets them") from error
    if not half and _unfinished(spec, data_dir).exists():
        had = f"its media are half unpacked, says {_unfinished(spec, data_dir)}"
        raise FileNotFoundError(f"{name}: {had}; --fetch goes on")
    commit, every = on_disk.revision(folder, spec.configs), list(chain(*files.values()))
    if spec.family == "pages":
        media = Media(data_dir, spec)
        corpus = on_disk.corpus(name, files["corpus"], Path(media.root), media.name_of)
        queries, qrels = (list(chain(*map(on_disk.read, files[x]))) for x in ("queries", "qrels"))
        return {"records": queries, "corpus": corpus, "qrels": qrels}, commit, every
    named = {part: {"subset": part} if len(files) > 1 else {} for part in files}
    records = [
        {**x, **named[part]} for part in files for at in files[part] for x in on_disk.read(at)
    ]
    return {"records": records[: spec.first]}, commit, every


def fetch(name: str, data_dir: str | Path) -> None:
    """Get a data set's records and media from the hub, but for the media that are there.

    ValueError for no such data set, and records that the hub does not have; OSError for no hub.
    """
    spec = data_set(name)
    folder = Path(data_dir, spec.records)
    on_disk.fetch(spec.source, spec.revision, spec.configs, spec.split, folder)
    arguments, _, _ = load(name, data_dir, half=True)  # pages come with the records
    if spec.family == "pages":
        return
    shown = {row.get("qry_img_path") for row in arguments["records"]}
    shown.update(chain(*(row.get("tgt_img_path") or () for row in arguments["records"])))
    start = spec.media[len(spec.archive) + 1 :] + "/"
    wanted = shown.__contains__ if spec.modality == "image" else lambda at: at.startswith(start)
    into, archive = Path(data_dir, spec.archive), TABLE["archives"][spec.archive]
    on_disk.unpack(into=into, wanted=wanted, marker=_unfinished(spec, data_dir), **archive)


def _unfinished(spec: DataSet, data_dir: str | Path) -> Path:
    """The path of the marker that is there while a data set's media are unpacked."""
    return Path(data_dir, spec.archive, f".{spec.name}.unfinished")
