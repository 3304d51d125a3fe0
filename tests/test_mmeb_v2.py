"""MMEB-V2: strings of every family, the miniature of all data sets end to end, bad input."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import nested_checkpoint, tiny_checkpoint
from mmeb_miniature import Miniature
from PIL import Image

from btok import BTokEncoder
from btok.adapters import Lora
from btok.evaluation import mmeb_v2, runner
from btok.model import BTokModel
from btok.processing import Processor
from btok.tools import cli, evaluate

ROOT = Path(__file__).resolve().parent.parent
ONE_OF_EACH = "OK-VQA,VisDial,RefCOCO-Matching,Breakfast,MSVD,EgoSchema,MomentSeeker,"
ONE_OF_EACH += "ViDoRe_arxivqa,VisRAG_ChartQA"
VIDEO, IMAGE = "<|video_pad|> ", "<|image_pad|>"
ASKED = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question: "
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The miniature; tests that change it copy it."""
    miniature = Miniature(tmp_path_factory.mktemp("mmeb"))
    for name in mmeb_v2.data_sets():
        miniature.make(name)
    return miniature.root


@pytest.fixture
def media(tmp_path):
    """Pictures and frames for records by hand."""

    def make(*paths, frames=0):
        for path in paths:
            files = [f"{path}/{i}.png" for i in range(frames)] if frames else [path]
            for file in files:
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8)).save(tmp_path / file)
        return tmp_path

    return make


def run(*arguments):
    return cli.main(["eval", *map(str, arguments)])


def test_the_table_has_all_data_sets():
    """36 of images, 18 of videos, 24 of documents, in the benchmark's nine meta-tasks."""
    table = mmeb_v2.data_sets().values()
    counts = {"image": 36, "video": 18, "visdoc": 24}
    assert {m: sum(x.modality == m for x in table) for m in counts} == counts
    groups = "I-CLS 10 I-QA 10 I-RET 12 I-VG 4 V-CLS 5 V-QA 5 V-RET 5 M-RET 3 VDRv1 10 VDRv2 4 VR 6"
    words = f"{groups} OOD 4".split(" ")
    of = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    assert {g: sum(x.meta_task == g for x in table) for g in of} == of and sum(of.values()) == 78
    for spec in table:
        assert spec.metric == ("ndcg@5" if spec.modality == "visdoc" else "hit@1")
        assert spec.gb > 0 and spec.queries > 0 and spec.family in mmeb_v2.FAMILIES
    assert [len(mmeb_v2.data_set(n).labels) for n in ("K700", "UCF101", "HMDB51")] == [700, 101, 51]
    for name, configs, records, media in (
        ("CIRR", ["CIRR"], "image-tasks", "image-tasks"),
        ("K700", [""], "video-tasks/Kinetics-700", "video-tasks/frames/video_cls/K700"),
        ("SmthSmthV2", [""], "video-tasks/SmthSmthV2", "video-tasks/frames/video_cls/SSv2"),
        (
            "VisRAG_PlotQA",
            ["queries", "qrels", "corpus"],
            "visdoc-tasks/VisRAG-Ret-Test-PlotQA",
            "visdoc-tasks/VisRAG_PlotQA",
        ),
    ):
        spec = mmeb_v2.data_set(name)
        assert (spec.configs, spec.records, spec.media) == (configs, records, media)


def picture_query(inst, text):
    return {"qry_inst": inst, "qry_text": text, "qry_img_path": "a.jpg"}


TARGET = {"tgt_inst": f"{mmeb_v2.IN_RECORDS}\nShow it.", "tgt_img_path": ["a.jpg", "b.jpg"]}
STRINGS = [  # data set, record, its query, its candidates, their names, the label
    (
        "VOC2007",
        picture_query("<|image_1|> Name \n it", "") | {"tgt_text": ["cat", "dog"]},
        f"{IMAGE}  Name\n it\n",
        ["cat", "dog"],
        ["cat", "dog"],
        "cat",
    ),
    (
        "GQA",
        picture_query("<|image_1|> Answer: \n", "Who \nis it?") | {"tgt_text": ["a", "b"]},
        f"{IMAGE}\nAnswer: Who\nis it?\n",
        ["a", "b"],
        ["a", "b"],
        "a",
    ),
    (
        "VisDial",
        {"qry_inst": "Find:", "qry_text": "Q: what?"} | TARGET | {"tgt_text": ["", ""]},
        "Find: Q: what?\n\n",
        [f"{IMAGE}\nShow it.\n"] * 2,
        ["a.jpg", "b.jpg"],
        "a.jpg",
    ),
    (
        "WebQA",
        {"qry_inst": "<|image_1|>\nFind:", "qry_text": "x"} | TARGET | {"tgt_text": ["c", "d "]},
        f"{IMAGE}\nFind: x\n",
        [f"{IMAGE}\nShow it. c\n", f"{IMAGE}\nShow it. d \n"],
        ["a.jpg", "b.jpg"],
        "a.jpg",
    ),
    (
        "NIGHTS",
        picture_query("<|image_1|>\nFind:", "") | TARGET | {"tgt_text": ["", ""]},
        f"{IMAGE}\nFind:\n",
        [f"{IMAGE}\nShow it."] * 2,
        ["a.jpg:", "b.jpg:"],
        "a.jpg:",
    ),
    (
        "RefCOCO-Matching",
        picture_query("<|image_1|>\nFind:", "left") | TARGET | {"tgt_text": ['"man"', "boy"]},
        f"{IMAGE}\nFind: left\n",
        [f'{IMAGE}\nShow it. "man"\n', f"{IMAGE}\nShow it. boy\n"],
        ["a.jpg:man", "b.jpg:boy"],
        "a.jpg:man",
    ),
    (
        "Breakfast",
        {"video_id": "v", "pos_text": "tea"},
        f"{VIDEO}Recognize the breakfast type that the person is cooking in the video. ",
        ["tea"],
        ["tea"],
        "tea",
    ),
    (
        "SmthSmthV2",
        {"video_id": "v", "pos_text": "b", "neg_text": ["a", "b"]},
        f"{VIDEO}What actions or object interactions are being performed by the person in the "
        "video?",
        ["a", "b"],
        ["a", "b"],
        "b",
    ),
    (
        "VATEX",
        {"videoID": "v", "enCap": ["A cat.", "unused"]},
        "Select a video that fits the description provided: A cat.",
        [f"{VIDEO}Understand the content of the provided video."],
        ["v"],
        "v",
    ),
    (
        "MVBench",
        {"subset": "s", "video": "v", "question": "Why?", "candidates": ["a", "b"], "answer": "b"},
        f"{VIDEO}{ASKED} Why?\nOptions:\n(A) a\n(B) b",
        ["(A) a", "(B) b"],
        ["(A) a", "(B) b"],
        "(B) b",
    ),
    (
        "NExTQA",
        {"video": "v", "question": "Why?", "answer": 3} | {f"a{i}": f"x{i}" for i in range(5)},
        f"{VIDEO}{ASKED} Why?\nOptions:\n(A) x0\n(B) x1\n(C) x2\n(D) x3\n(E) x4",
        ["x0", "x1", "x2", "x3", "x4"],
        ["x0", "x1", "x2", "x3", "x4"],
        "x3",
    ),
    (
        "Video-MME",
        {"videoID": "v", "question": "Why?", "options": ["A. 1.5 m.", "B. b"], "answer": "B"},
        f"{VIDEO}{ASKED} Why?\nA. 1.5 m.\nB. b",
        ["1.5 m", "b"],
        ["A. 1.5 m.", "B. b"],
        "B. b",
    ),
    (
        "EgoSchema",
        {"video_idx": "v", "question": "Why?", "option": ["A. a.", "B. b"], "answer": "0"},
        f"{VIDEO}{ASKED} Why?A. a. B. b",
        ["a", "b"],
        ["A. a.", "B. b"],
        "A. a.",
    ),
    (
        "ActivityNetQA",
        {"video_name": "v", "question": "is it", "answer": "no"},
        f"{VIDEO}{ASKED} is it? (A) yes; (B) no.",
        ["yes", "no"],
        ["yes", "no"],
        "no",
    ),
]


@pytest.mark.parametrize(("name", "record", "text", "candidates", "names", "label"), STRINGS)
def test_strings_are_the_benchmarks_own(media, name, record, text, candidates, names, label):
    spec = mmeb_v2.data_set(name)
    root = media(f"{spec.media}/a.jpg", f"{spec.media}/b.jpg")
    media(*(f"{spec.media}/{folder}" for folder in ("v", "v_v", "s/v")), frames=9)
    (query,) = mmeb_v2.expand(name, [record], root)
    assert query["query_text"] == text
    assert query["cand_texts"] == candidates
    assert query["cand_names"] == names
    assert query["label_name"] == label
    shown = query["query_media"] or query["cand_media"][0]
    if spec.modality == "image":
        assert shown == [f"{root}/{spec.media}/a.jpg"]
    else:  # 8 of 9 frames, the last one left out but one
        assert [Path(path).stem for path in shown] == list("01234568")
    (plain,) = mmeb_v2.expand(name, [record], root, prompts="canonical")
    for origin, trained in zip(
        [text, *candidates], [plain["query_text"], *plain["cand_texts"]], strict=True
    ):
        bare = origin.replace(IMAGE, "").replace(VIDEO, "").strip()
        kind = "video" if origin.startswith(VIDEO) else "image" if IMAGE in origin else None
        pictured = kind and not (name == "WebQA" and origin == text)  # that has no picture
        wrapped = f"<|vision_start|><|{kind}_pad|><|vision_end|>\n" if pictured else ""
        assert trained == f"{wrapped}{bare}\n"


@pytest.mark.parametrize(
    ("name", "part", "change", "why"),
    [
        ("NExTQA", "records", {"answer": "3"}, "NExTQA, row 0: its fields do not fit ("),
        ("EgoSchema", "records", {"answer": "zz"}, "EgoSchema, row 0: its fields do not fit ("),
        (
            "EgoSchema",
            "records",
            {"answer": "7"},
            "EgoSchema, row 0: answer is '7', expected one of",
        ),
        ("Video-MME", "records", {"answer": ""}, "Video-MME, row 0: its fields do not fit ("),
        (
            "ActivityNetQA",
            "records",
            {"answer": "dog"},
            "row 0: answer is 'dog', expected one of yes",
        ),
        (
            "MomentSeeker",
            "records",
            {"positive_frames": 5},
            "MomentSeeker, row 0: its fields do no",
        ),
        ("CIRR", "records", {"tgt_text": [""]}, "CIRR, row 0: tgt_text has 1 texts, expected 4"),
        ("MSVD", "records", {"caption": []}, "MSVD, row 0: caption is [], expected a list of text"),
        (
            "ViDoRe_docvqa",
            "records",
            {"query-id": 9},
            "row 0: query-id is 9, expected one with a re",
        ),
        (
            "ViDoRe_docvqa",
            "records",
            {"query-id": [1]},
            "row 0: query-id is [1], expected a whole",
        ),
        ("ViDoRe_docvqa", "qrels", {"score": "1"}, "(qrels), row 0: score is '1', expected a numb"),
        ("ViDoRe_docvqa", "corpus", {"corpus-id": [1]}, "(corpus), row 0: corpus-id is [1], expec"),
    ],
)
def test_a_record_that_does_not_fit_names_set_and_row(tmp_path, name, part, change, why):
    miniature = Miniature(tmp_path)
    made = miniature.make(name)
    made[part] = [made[part][0] | change, *made[part][1:]]
    with pytest.raises(ValueError) as raised:
        mmeb_v2.build(name, data_dir=tmp_path, **made)
    assert why in str(raised.value)


def test_clips_come_from_folders_in_order(media):
    spec = mmeb_v2.data_set("QVHighlight")
    below = f"{spec.media}/v_1"
    media(f"{below}/query", frames=10)
    root = media(*(f"{below}/{clip}" for clip in ("b", "positive_1", "a", "positive_0")), frames=2)
    record = {"query": "A cat.", "video_path": "x/v_1.mp4"}
    (query,) = mmeb_v2.expand("QVHighlight", [record], root)
    folder = f"{root}/{below}"
    names = ["a", "b", "positive_0", "positive_1"]
    assert query["cand_names"] == [f"{folder}/{name}" for name in names]
    assert query["label_name"] == f"{folder}/positive_1"
    assert len(query["query_media"]) == 8 and [len(x) for x in query["cand_media"]] == [2] * 4


def test_documents_are_graded_and_their_pages_named(media):
    """An equal name counts once, with the higher score; a score of 0 is none."""
    pages = [{"corpus-id": i, "image": None} for i in (40, 3, 17)]
    root = media(*(f"visdoc-tasks/ViDoRe_docvqa/{row['corpus-id']}.png" for row in pages))
    scores = [(7, 40, 1), (7, 3, 2), (7, 17, 0), (7, 40, 3)]
    qrels = [dict(zip(("query-id", "corpus-id", "score"), row, strict=True)) for row in scores]
    records = [{"query-id": 7, "query": "Who?"}]
    (query,) = mmeb_v2.expand("ViDoRe_docvqa", records, root, corpus=pages, qrels=qrels)
    assert query["query_text"] == "Find a document image that matches the given query: Who?"
    assert (query["label_name"], query["rel_scores"]) == ([40, 3], [3, 2])
    task = mmeb_v2.build("ViDoRe_docvqa", records, root, corpus=pages, qrels=qrels)
    assert [Path(side.images[0]).stem for side in task.candidates] == ["40", "3", "17"]
    assert task.qrels == [{0: 3.0, 1: 2.0}] and task.pools is None
    order = list({40, 3})  # labels are reordered there, and their scores are not
    assert order == [40, 3] or task.published_qrels == [{0: [2], 1: [3]}]
    assert mmeb_v2._as_published(["a", "b"], [1, 3]) == {"a": [1, 3], "b": [1, 3]}
    wrong = [qrels[0] | {"corpus-id": "40"}]
    with pytest.raises(ValueError, match="1 relevant pages are not in the corpus, as '40'; of 3 "):
        mmeb_v2.build("ViDoRe_docvqa", records, root, corpus=[*pages], qrels=wrong)


def test_a_page_is_shown_from_its_record_where_it_has_no_file(tmp_path):
    page = Image.new("RGB", (20, 30))
    corpus = [{"corpus-id": "p.png", "image": page}]
    packed = [{"corpus-id": "p.png", "image": {"bytes": b"png", "path": None}}]
    qrels = [{"query-id": 0, "corpus-id": "p.png", "score": 1}]
    records = [{"query-id": 0, "query": "Who?"}]
    task = mmeb_v2.build("VisRAG_PlotQA", records, tmp_path, corpus=corpus, qrels=qrels)
    assert task.candidates[0].images == [page]
    task = mmeb_v2.build("VisRAG_PlotQA", records, tmp_path, corpus=packed, qrels=qrels)
    assert task.candidates[0].images == [b"png"]
    for none in (None, []):
        with pytest.raises((ValueError, FileNotFoundError), match=r"not in the corpus|no picture"):
            mmeb_v2.build("VisRAG_PlotQA", records, tmp_path, corpus=none, qrels=qrels)


def test_origin_is_tokenised_without_brackets(checkpoint, data):
    processor = Processor.from_pretrained(checkpoint)
    rows, _, _ = mmeb_v2.load("OK-VQA", data)
    task = mmeb_v2.build("OK-VQA", data_dir=data, prompts="origin", **rows)
    (query, *_) = mmeb_v2.expand("OK-VQA", rows["records"], data)
    wrapped = processor(task.queries[0])["input_ids"].tolist()
    processor.bare = True
    ids = processor(task.queries[0])["input_ids"].tolist()
    pad = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    text = processor.tokenizer.encode(query["query_text"], add_special_tokens=False)
    assert [i for n, i in enumerate(ids) if i != pad or ids[n - 1] != pad] == text
    assert ids.count(pad) == wrapped.count(pad) > 1 and len(wrapped) == len(ids) + 3
    qwen3 = Processor(processor.tokenizer, model_type="qwen3_vl")
    qwen3.bare = True
    with pytest.raises(ValueError, match="bare is True, a qwen3_vl shows more than its patches"):
        qwen3(task.queries[0])


def test_scores_are_kept_and_taken_again_only_of_the_same(checkpoint, data, tmp_path, capfd):
    folder, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, folder)
    line = (checkpoint, "mmeb-v2", "--data", folder, "--tasks", ONE_OF_EACH, "--output", output)
    assert run(*line) == 0
    said = capfd.readouterr()
    names = ONE_OF_EACH.split(",")
    assert "[9/9] VisRAG_ChartQA" in said.err and "kept" not in said.err
    first = (output / "metrics.json").read_bytes()
    metrics = json.loads(first)
    assert set(metrics["tasks"]) == {*names} and metrics["overall"] is None
    assert len(metrics["missing"]) == 69 and set(metrics["meta_tasks"].values()) == {None}
    assert "no mean: 69 sets are missing, as ImageNet-1K" in said.out
    last = said.out.splitlines()[-1]
    words = shlex.split(last.partition("python -m btok ")[2].partition(" makes")[0])
    assert words == ["report", str(output)] and cli.main(words) == 0  # as the last line says
    page = (output / "report.html").read_text()
    assert all(name in page for name in names)
    capfd.readouterr()
    row = metrics["tasks"]["ViDoRe_arxivqa"]
    encoder = BTokEncoder.from_pretrained(checkpoint)
    files = evaluate.files_digest(encoder)
    assert row["settings"] == encoder.settings | {"files": files}
    assert row["model"] == encoder.digest
    assert row["prompts"] == "canonical" and row["data"]["revision"] == "local"
    assert 0 <= row["ci95"][0] <= row["score"] <= row["ci95"][1] <= 100
    assert row["origin"] == pytest.approx(100 * row["published"]["ndcg_linear@5"])

    assert run(*line) == 0
    assert capfd.readouterr().err.count("kept") == 9
    assert (output / "metrics.json").read_bytes() == first

    picture = folder / "visdoc-tasks/ViDoRe_arxivqa/40.png"
    os.utime(picture, (1, 1))  # another time, the same content
    Image.new("RGB", (20, 28)).save(folder / "image-tasks/OK-VQA/q1.jpg")
    assert run(*line) == 0
    said = capfd.readouterr().err
    assert said.count("kept") == 8 and "OK-VQA: " in said
    now = json.loads((output / "metrics.json").read_text())["tasks"]
    changed = [n for n in names if now[n] != metrics["tasks"][n]]
    assert changed == ["OK-VQA"] and now["OK-VQA"]["data"] != metrics["tasks"]["OK-VQA"]["data"]

    kept = json.loads((output / "sets/MSVD.json").read_text())
    (output / "sets/MSVD.json.99999999.tmp").write_text("{")  # of a process that was killed
    (output / f"sets/MSVD.json.{os.getppid()}.tmp").write_text("{")  # of one that still runs
    for damaged in (
        "{}",
        "[" * 100_000,
        json.dumps(kept | {"row": {}}),
        json.dumps(kept | {"made_of": None}),
        json.dumps(kept | {"row": kept["row"] | {"score": 99.0}}),
        json.dumps(kept | {"queries": []}),
    ):  # is made again
        (output / "sets/MSVD.json").write_text(damaged)
        assert run(*line) == 0 and capfd.readouterr().err.count("kept") == 8
        assert json.loads((output / "sets/MSVD.json").read_text()) == kept
    (output / f"sets/MSVD.json.{os.getppid()}.tmp").unlink()

    before = (output / "metrics.json").read_bytes()  # of what is asked now, and of the rest
    assert run(*line[:5], "MSVD", *line[6:]) == 0
    assert (output / "metrics.json").read_bytes() == before
    said = capfd.readouterr().out
    assert "\nMSVD " in said and "\nOK-VQA " not in said and "3 of 670" in said
    assert not list(output.rglob("*.tmp"))

    assert run(*line, "--prompts", "origin") == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {output} holds scores of prompts canonical, this is origin;")
    same = tmp_path / "same"
    shutil.copytree(checkpoint, same)
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 9999}))
    assert run(same, *line[1:]) == 2
    assert f"{output} holds scores of files " in capfd.readouterr().err
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    assert run(other, *line[1:]) == 2
    assert f"{output} holds scores of model " in capfd.readouterr().err


def test_what_adapters_are_on_counts_too(checkpoint, tmp_path):
    pytest.importorskip("peft", reason="the extra `peft` is not installed")
    base, own = tmp_path / "base", tmp_path / "own"
    shutil.copytree(checkpoint, base)
    model = BTokModel.from_pretrained(base, lora=Lora())
    model.save_pretrained(own)
    Processor.from_pretrained(base).save_pretrained(own)
    encoder = BTokEncoder.from_pretrained(own)
    digests = {evaluate.files_digest(encoder)}
    for path, key in ((base / "config.json", "x"), (own / "adapter_config.json", "use_rslora")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: True}))
        digests.add(evaluate.files_digest(encoder))
    assert len(digests) == 3


def test_what_is_missing_is_told_in_a_line_and_nothing_is_lost(checkpoint, data, tmp_path, capfd):
    folder, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, folder)
    line = [checkpoint, "mmeb-v2", "--data", folder, "--tasks", "OK-VQA,MSVD", "--output", output]
    shutil.rmtree(folder / "video-tasks/frames/video_ret/MSVD/v1")
    assert run(*line) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: MSVD, row 1: ") and "MSVD/v1 has 0 frames, expected at" in said
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["tasks"]) == ["OK-VQA"]
    shards = [folder / f"video-tasks/MSVD/test-0000{i}-of-00002.jsonl" for i in range(2)]
    (folder / "video-tasks/MSVD/test.jsonl").rename(shards[0])
    assert run(*line) == 2
    said = capfd.readouterr().err
    assert f"MSVD (not just files 0 to 1 of records, as {shards[0]})" in said
    shards[0].rename(folder / "video-tasks/MSVD/test.jsonl")
    (folder / "image-tasks/.OK-VQA.unfinished").touch()
    assert run(*line) == 2
    said = capfd.readouterr().err
    marker = folder / "image-tasks/.OK-VQA.unfinished"
    assert said == f"error: OK-VQA: its media are half unpacked, says {marker}; --fetch goes on\n"
    (folder / "image-tasks/.OK-VQA.unfinished").unlink()
    (folder / "image-tasks/OK-VQA/q2.jpg").unlink()
    assert run(*line) == 2
    said = capfd.readouterr().err
    assert said == f"error: OK-VQA, row 2: no picture {folder}/image-tasks/OK-VQA/q2.jpg\n"
    (folder / "video-tasks/MSVD/test.jsonl").unlink()
    assert run(*line) == 2
    said = capfd.readouterr().err
    assert f"error: 1 of 2 data sets are not in {folder}: MSVD (no records, expected " in said
    records = folder / "image-tasks/OK-VQA/test.jsonl"
    rows = [json.loads(row) for row in records.read_text().splitlines()]
    line[5] = "OK-VQA"
    for change, why in (
        ({"qry_text": None}, "row 1: no field 'qry_text', it has qry_inst, qry_text, qry_img_path"),
        ({"tgt_text": "x"}, "row 1: tgt_text is 'x', expected a list of texts"),
        ({"tgt_text": []}, "row 1: tgt_text is [], expected a list of texts"),
        ({"qry_inst": 3}, "row 1: qry_inst is 3, expected a text"),
    ):
        changed = [rows[0], rows[1] | change]
        records.write_text("".join(json.dumps(row) + "\n" for row in changed))
        assert run(*line) == 2
        assert f"error: OK-VQA, {why}" in capfd.readouterr().err
    records.write_text("{")
    assert run(*line) == 2
    assert f"error: {records} cannot be read (" in capfd.readouterr().err


OPTIONS = (
    ({}, []),
    ({"num_btoks": 2, "dims": 16}, ["--num-btoks", 2, "--dims", 16]),
    ({"num_btoks": 2, "multi_vector": True}, ["--num-btoks", 2, "--multi-vector"]),
    ({"num_btoks": "auto", "dtype": "int8"}, ["--num-btoks", "auto", "--int8"]),
)


def test_scores_of_other_vectors_are_others(data, tmp_path, capfd):
    checkpoint = nested_checkpoint(tmp_path / "nested")
    line = [checkpoint, "mmeb-v2", "--data", data, "--tasks", "MSVD,OK-VQA", "--output"]
    assert run(*line, tmp_path / "none", "--int8") == 2
    assert "dtype='int8' needs a calibration" in capfd.readouterr().err
    encoder = BTokEncoder.from_pretrained(checkpoint)
    encoder.calibrate(["a seven", "a red seven on the left"] * 40).save(checkpoint)
    made = BTokEncoder.from_pretrained(checkpoint)
    for number, (options, arguments) in enumerate(OPTIONS):
        assert run(*line, tmp_path / f"{number}", *arguments) == 0
        metrics = json.loads((tmp_path / f"{number}/metrics.json").read_text())
        settings = made.using(**options).settings
        for name in ("MSVD", "OK-VQA"):
            row = metrics["tasks"][name]
            assert row["settings"] == settings | {"files": evaluate.files_digest(made)}
            rows, _, _ = mmeb_v2.load(name, data)
            task = mmeb_v2.build(name, data_dir=data, **rows)
            vectors = made.using(**options)
            found = runner.score_task(
                runner.Embedder(lambda sides, by=vectors: by.encode(sides, show_progress=False)),
                task,
            )
            assert found.row["score"] == row["score"]
    capfd.readouterr()
    for number in range(len(OPTIONS)):
        for other in range(len(OPTIONS)):
            status = run(*line, tmp_path / f"{number}", *OPTIONS[other][1])
            assert status == (0 if number == other else 2)
            assert ("holds scores of " in capfd.readouterr().err) == (number != other)
    assert run(*line, tmp_path / "0", "--num-btoks", 3) == 2
    assert "num_btoks is 3, but" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--tasks", "MSCOCO_t2"], "tasks has 'MSCOCO_t2', expected MSCOCO_t2i or MSCOCO_i2t or"),
        (["--tasks", "ICLS"], "tasks has 'ICLS', expected I-CLS or V-CLS"),
        (["--submission", "gone/x.json"], "submission is gone/x.json, in a folder that is not"),
        (["--submission", "TMP/a.png"], "a.png, which is a folder; expected a file"),
        (["--picture", "gone/x.png"], "picture is gone/x.png, in a folder that is not there"),
        (["--picture", "TMP/a.png"], "a.png, which is a folder; expected a file"),
        (["--tasks", ","], "tasks is ',', expected names of data sets"),
        (["--submission", "x.json", "--tasks", "I-VG"], "submission needs all data sets, tasks la"),
        (["--compare", "gone.json"], "compare is gone.json, which does not exist; expected a file"),
        (["--picture", "x.txt"], "picture is x.txt, expected a name ending in .png, .pdf"),
        (["--data", "gone"], "data is gone, which does not exist; expected MMEB-V2's folder"),
        (["--data", "."], "78 of 78 data sets are not in .: ImageNet-1K (no records, expected"),
        (["--prompts", "other"], "prompts"),
        (["--num-btoks", "auto", "--multi-vector"], "num_btoks is 'auto' with multi_vector, which"),
    ],
)
def test_a_mistake_in_the_command_is_a_line(checkpoint, tmp_path, arguments, why, capfd):
    (tmp_path / "a.png").mkdir()
    arguments = [word.replace("TMP", str(tmp_path)) for word in arguments]
    assert run(checkpoint, "mmeb-v2", *arguments) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and why in said and said.count("\n") == 1


def test_another_benchmark_is_refused(checkpoint, capfd):
    assert run(checkpoint, "mteb") == 2
    assert capfd.readouterr().err == "error: benchmark is 'mteb', expected mmeb-v2\n"


def test_what_data_sets_need_is_listed_without_a_hub(checkpoint, capfd):
    assert run(checkpoint, "mmeb-v2", "--list", "--tasks", "V-RET,ViDoRe_docvqa") == 0
    *lines, last = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("DiDeMo", "MSR-VTT", "MSVD", "VATEX", "YouCook2", "ViDoRe_docvqa")
    ]
    assert all(" about " in line and " GB " in line for line in lines)
    assert last.startswith("6 data sets, ") and "modelled: the hub does not answer" in last


def test_a_chosen_group_is_its_data_sets():
    assert len(evaluate.chosen("all")) == 78
    assert evaluate.chosen("MSVD, I-VG,MSVD") == [
        *("MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing", "MSVD")
    ]
    assert len(evaluate.chosen("visdoc,V-QA")) == 29
    assert evaluate.chosen("msvd,v-ret") == evaluate.chosen("V-RET")


def test_two_runs_are_compared_query_by_query(checkpoint, data, tmp_path, capfd):
    lines = {}
    for name, prompts in (("a", "canonical"), ("b", "origin")):
        lines[name] = [checkpoint, "mmeb-v2", "--data", data, "--tasks", "OK-VQA,M-RET"]
        lines[name] += ["--prompts", prompts, "--output", tmp_path / name]
        assert run(*lines[name]) == 0
    capfd.readouterr()
    assert run(*lines["b"], "--compare", tmp_path / "a/metrics.json") == 0
    out = capfd.readouterr().out
    values = [json.loads((tmp_path / x / "sets/MomentSeeker.json").read_text()) for x in "ba"]
    each = np.subtract(*(kept["queries"] for kept in values))
    half = 196 * ((3 * each.var() + 1) / 4) ** 0.5 / 3**0.5
    gap = 100 * each.mean()
    said = f"{gap:+.1f} [{max(gap - half, -100):+.1f}, {min(gap + half, 100):+.1f}]"
    (line,) = [x for x in out.split("against")[1].splitlines() if x.startswith("MomentSeeker")]
    assert line.endswith(said)
    assert "M-RET" in out.split("against")[1]


def command(checkpoint, data, output, processes=1):
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    line = ["btok", "eval", checkpoint, "mmeb-v2", "--data", data, "--output", output]
    return [*start, *map(str, line)]


@pytest.mark.full
def test_all_78_under_two_ranks_and_killed(checkpoint, data, tmp_path):
    """One process, two, and one killed at random five times end at the same bytes."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    subprocess.run(command(checkpoint, data, tmp_path / "one"), check=True, env=env)
    expected = (tmp_path / "one/metrics.json").read_bytes()
    metrics = json.loads(expected)
    assert len(metrics["tasks"]) == 78 and metrics["missing"] == []
    origins = [row["origin"] != row["score"] for row in metrics["tasks"].values()]
    assert 0 < sum(origins) < 24  # of graded documents alone
    subprocess.run(command(checkpoint, data, tmp_path / "two", 2), check=True, env=env)
    assert (tmp_path / "two/metrics.json").read_bytes() == expected
    chance = random.Random(0)
    for sets in sorted(chance.sample(range(3, 75), 5)):  # of which a score is there
        process = subprocess.Popen(command(checkpoint, data, tmp_path / "killed"), env=env)
        while len(list((tmp_path / "killed/sets").glob("*.json"))) < sets:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command(checkpoint, data, tmp_path / "killed"), check=True, env=env)
    assert (tmp_path / "killed/metrics.json").read_bytes() == expected
    left = [path for path in (tmp_path / "killed").rglob("*") if path.suffix != ".json"]
    assert [path.name for path in left if path.is_file()] == []
