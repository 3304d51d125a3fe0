"""Mixture files, and the public data sets on small local files of their schema."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from btok.data import mixture
from btok.data.mixture import PUBLIC, load_mixture, open_public

PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


@pytest.fixture
def png(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "page.png")
    return (tmp_path / "page.png").read_bytes()


def pairs_file(folder, name="mine.jsonl", count=3):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(count)]
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / name


def mixture_file(folder, text):
    (folder / "mix.toml").write_text(text)
    return folder / "mix.toml"


def test_a_file_lists_data_sets_with_their_settings(tmp_path):
    (tmp_path / "below").mkdir()
    pairs_file(tmp_path)
    pairs_file(tmp_path / "below", "other.jsonl")
    path = mixture_file(
        tmp_path,
        """
        [[dataset]]
        path = "mine.jsonl"
        weight = 3
        ntp_side = "query"
        query_instruction = "Find:"

        [[dataset]]
        path = "below/other.jsonl"
        name = "another"
        root = "pictures"
        rows = 2
        negatives = 0
        """,
    )
    one, two = load_mixture(path)
    assert (one.name, one.weight, one.ntp_side, one[0].query.text) == (
        "mine",
        3,
        "query",
        "Find: q0",
    )
    assert (two.name, two.weight, len(two), two.root) == ("another", 1, 2, tmp_path / "pictures")
    assert [source.name for source in load_mixture(tmp_path / "mine.jsonl")] == ["mine"]


MINE = '[[dataset]]\npath = "mine.jsonl"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINE + "weigth = 3", "data set 1: weigth is unknown, expected path, public"),
        (MINE + 'weight = "3"', "weight is '3', expected int | float"),
        (MINE + "name = 3", "name is 3, expected str"),
        (MINE + "rows = true", "rows is True, expected int"),
        (MINE + 'folder = "copies"', "data set 1: folder goes with public, not with path"),
        (MINE + MINE, "data set 2: name is 'mine', as that of another"),
        (MINE + 'public = "WebQA"', "expected one of path and public"),
        ('[[dataset]]\npublic = "WebQB"', "public is 'WebQB', expected one of ImageNet_1K, "),
        ("[[dataset]\n", "line 1, column"),
        ("seed = 1\n" + MINE, "has seed, dataset, expected"),
        ("", "has nothing, expected"),
    ],
)
def test_a_wrong_mixture_file_is_refused(tmp_path, text, message):
    pairs_file(tmp_path)
    with pytest.raises(ValueError) as refused:
        load_mixture(mixture_file(tmp_path, text))
    assert message in str(refused.value)


def test_shares_and_sides_are_the_papers():
    weights, sides = Counter(), Counter()
    for repository, _, _, settings in PUBLIC.values():
        weights[repository.partition("/")[0]] += settings["weight"] / 52
        sides[settings.get("ntp_side", "positive")] += settings["weight"] / 52
    percent = [round(100 * weights[name], 1) for name in ("TIGER-Lab", "vidore", "openbmb")]
    assert percent == [28.8, 19.2, 23.1] and len(PUBLIC) == 25
    assert {side: round(100 * share) for side, share in sides.items()} == {
        **{"positive": 57, "query": 40},
        **{"both": 1, "none": 2},
    }


def mmeb_row(**columns):
    keys = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
    return dict.fromkeys(keys, "") | columns


QUESTION = "Represent the given image with the following question: Who?"


def test_mmeb_train(tmp_path, datasets):
    folder = tmp_path / "MMEB-train"
    asked = mmeb_row(
        qry=f"<|image_1|>\n{QUESTION}\n",
        qry_image_path="images/OK-VQA/Train/1.jpg",
        pos_text="pony tail",
        neg_text="husky",
    )
    question = mmeb_row(
        qry="<|image_1|>\nFind a Wikipedia image that answers this question: Which?\n",
        pos_text="<|image_1|>\nRepresent the given Wikipedia image with related text: Obverse.\n",
        pos_image_path="images/WebQA/Train/2.jpg",
    )
    for name, row in (("OK-VQA", asked), ("WebQA", question)):
        (folder / name).mkdir(parents=True)
        data = datasets.Dataset.from_list([row] * 3)
        data.to_parquet(folder / name / "original-00000-of-00001.parquet")
        data.select([0]).to_parquet(folder / name / "diverse_instruction-00000-of-00001.parquet")
    source = open_public("OK-VQA", tmp_path)
    pair = source[2]
    assert len(source) == 3 and (source.weight, pair.ntp_side) == (0.5, "positive")
    assert pair.query.text == f"{QUESTION}\n" and pair.positive.text == "pony tail\n"
    assert pair.query.images == [folder / "images/OK-VQA/Train/1.jpg"]
    assert not pair.negatives and pair.positive_id == source[0].positive_id
    (negative,) = open_public("OK-VQA", tmp_path, negatives=1)[0].negatives
    assert negative.text == "husky\n" and not negative.images
    pair = open_public("WebQA", tmp_path)[0]
    assert pair.ntp_side == "both" and not pair.query.images
    assert pair.query.text == "Find a Wikipedia image that answers this question: Which?\n"
    assert pair.positive.images == [folder / "images/WebQA/Train/2.jpg"]
    assert pair.positive_id == "images/WebQA/Train/2.jpg"
    with pytest.raises(ValueError, match=r"data set WebQA: rows have \[0\] negatives"):
        open_public("WebQA", tmp_path, negatives=1)
    path = mixture_file(
        tmp_path,
        '[[dataset]]\npublic = "WebQA"\nroot = "pictures"\nweight = 9\n'
        '[[dataset]]\npublic = "OK-VQA"\nname = "qa"\nrows = 2',
    )
    webqa, qa = load_mixture(path)
    assert (webqa.weight, webqa.ntp_side, qa.name, len(qa)) == (9, "both", "qa", 2)
    assert webqa[0].positive.images == [tmp_path / "pictures/images/WebQA/Train/2.jpg"]


def test_colpali(tmp_path, datasets, png):
    options = "['A. It falls.', 'B. It rises.', '-']"
    extra = dict.fromkeys(
        ("image_filename", "source", "page", "model", "prompt", "answer_type"), "x"
    )
    rows = [
        {"query": "Which?", "answer": "B", "options": options},
        {"query": "How long?", "answer": "['five hours']", "options": None},
        {"query": "Which?", "answer": "E", "options": options},
    ]
    features = datasets.Features(
        dict.fromkeys([*rows[0], *extra], datasets.Value("string")) | {"image": datasets.Image()}
    )
    stored = {"bytes": png, "path": "1.jpg"}
    data = datasets.Dataset.from_list([row | extra | {"image": stored} for row in rows], features)
    (tmp_path / "colpali_train_set/data").mkdir(parents=True)
    data.to_parquet(tmp_path / "colpali_train_set/data/train-00000-of-00001.parquet")
    source = open_public("colpali_train_set", tmp_path)
    assert [(source[i].query.text, source[i].positive.text) for i in range(3)] == [
        (f"Which? Options: {options}\n", "It rises.\n"),
        ("How long?\n", "['five hours']\n"),
        (f"Which? Options: {options}\n", "E\n"),
    ]
    assert source[0].query.images == [png] and not source[0].positive.images


def test_visrag_from_the_hub(tmp_path, datasets, png, monkeypatch):
    rows = [
        {"query": "which?", "source": name, "image": {"bytes": png}} for name in ("PlotQA", "?")
    ]
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(mixture, "load_dataset", load)
    source = open_public("visrag-indomain", tmp_path)
    assert asked == [(("openbmb/VisRAG-Ret-Train-In-domain-data", None), {"split": "train"})]
    plot, unknown = source[0], source[1]
    assert plot.query.text.startswith("This query relates to retrieving a relevant plot or chart")
    assert plot.query.text.endswith("insights related to the query: which?\n")
    assert plot.positive.text.endswith("such as bar charts or line graphs.\n")
    assert plot.positive.images == [png] and plot.ntp_side == "query"
    assert (unknown.query.text, unknown.positive.text) == ("which?\n", "")
    assert plot.positive_id != unknown.positive_id
    assert len(mixture.VISRAG) == 10
    rows = [{"query": "q", "img": "a.png"}]
    with pytest.raises(ValueError, match="no image, source, its columns are query, img"):
        open_public("visrag-indomain", tmp_path)


@pytest.mark.parametrize(
    ("name", "part", "row", "message"),
    [
        ("WebQA", "WebQA/original-0", mmeb_row(pos_text=3), "pos_text is 3, expected a str"),
        ("colpali_train_set", "data/train-0", {"options": 4}, "options is 4, expected a str"),
        ("visrag-indomain", "data/train-0", {"query": 5}, "query is 5, expected a str"),
        ("visrag-indomain", "data/train-0", {"source": 6}, "source is 6, expected a str"),
    ],
)
def test_a_public_row_of_other_types_is_told(tmp_path, datasets, png, name, part, row, message):
    path = tmp_path / PUBLIC[name][0].rpartition("/")[2] / f"{part}.parquet"
    path.parent.mkdir(parents=True)
    columns = dict.fromkeys(PUBLIC[name][2].columns) | {"image": {"bytes": png, "path": None}}
    datasets.Dataset.from_list([columns | row] * 2).to_parquet(path)
    with pytest.raises(ValueError, match=f"data set {name}, row 0: {message}"):
        open_public(name, tmp_path)


def test_llava_hound(tmp_path, monkeypatch):
    copy = tmp_path / "train_video_and_instruction"
    lines = copy / "video_instruction/train/sft"
    lines.mkdir(parents=True)
    (copy / "train_300k/v_1").mkdir(parents=True)
    for number in (1, 2, 10):
        Image.fromarray(PIXELS).save(copy / f"train_300k/v_1/c01_{number}.jpeg")

    def row(prompt, answer):
        said = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
        return json.dumps({"id": "1", "video": "v_1", "conversations": said})

    (lines / "video_caption_300k.jsonl").write_text(row("<video>\nDescribe.", "A game.") + "\n")
    qa = lines / "video_240k_caption_15k.jsonl"
    qa.write_text(row("What?\n<video>", "A newsroom.") + "\n")
    caption, retrieval, asked = (
        open_public(name, tmp_path)[0]
        for name in ("video_caption_300k", "video_caption_300k-video", "video_qa_240k")
    )
    frames = [copy / f"train_300k/v_1/c01_{number}.jpeg" for number in (1, 2, 10)]
    assert caption.query.text == "Describe.\n" and caption.query.video == frames
    assert caption.positive.text == "A game.\n" and caption.ntp_side == "positive"
    found = "Find a video that contains the following visual content: A game.\n"
    assert retrieval.query.text == found and not retrieval.query.video
    assert retrieval.positive.text == "Understand the content of the provided video:\n"
    assert retrieval.positive.video == frames and retrieval.ntp_side == "query"
    told = "Answer a question based on the content of a video.\nWhat?\n"
    assert asked.query.text == told and asked.positive.text == "A newsroom.\n"
    names = ("video_qa_240k", "video_caption_300k")
    monkeypatch.setattr(mixture, "PUBLIC", {name: PUBLIC[name] for name in names})
    assert tuple(source.name for source in load_mixture(tmp_path)) == names
    qa.write_text('{"video": "v_1", "conversations": [{"value": "What?"}]}\n')
    with pytest.raises(ValueError, match=r"15k\.jsonl:1: expected conversations with two values"):
        open_public("video_qa_240k", tmp_path)
