"""bench/gpu.py without a GPU: stages, resuming, cut-offs; what the peers are given and count."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_layout import allowed_by_loops

from bench import bench_encoding, bench_inference, gpu, harness, peers, questions
from btok.kernels import CondensedLayout, condensed_attention
from btok_kernels import launch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def layout():
    return CondensedLayout.from_lengths([9, 0, 30, 4], [5, 3, 0, 1], 2)


def inputs(layout, dim=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(layout.num_rows, heads, dim, generator=generator) for heads in (4, 2, 2, 4)]


def dry(out, *options):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        [sys.executable, ROOT / "bench/gpu.py", "--dry", "--out", out, *options],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


FAST = ("gated MLPs", "gather", "loss tiles")  # of which each takes a second or two to import


@pytest.mark.skipif(not launch.INSTALLED["triton"], reason="triton is not installed")
@pytest.mark.parametrize(
    "stages", [FAST, pytest.param(gpu.DRY, marks=pytest.mark.full)], ids=["fast", "all"]
)
def test_a_dry_run_asks_its_questions_and_goes_on_where_it_was_killed(tmp_path, stages):
    printed = dry(tmp_path, "--budget", "540", "--only", *stages)
    files = {stage: tmp_path / f"{stage.replace(' ', '-')}.json" for stage in stages}
    for stage in stages:
        assert f"{stage}: status 0" in printed, printed
    found = {stage: path for stage, path in files.items() if path.exists()}
    assert set(stages) - set(found) <= {"Triton"}  # there is no other
    content = {stage: json.loads(path.read_text()) for stage, path in found.items()}
    for stage, each in content.items():
        assert each["machine"]["device"] == "cpu"
        assert each["machine"]["torch"] == str(torch.__version__)
        assert each["rows"]
        assert not [row for row in each["rows"] if "error" in row], stage
    answers = (tmp_path / "answers.md").read_text()
    assert printed.endswith(answers + "\n")
    asked = {line.split(" | ")[0].lstrip("| ") for line in answers.splitlines() if "|" in line}
    expected = {questions.GATHER, questions.MLPS, "tile of sums", "tile of columns"}
    if stages == gpu.DRY:
        expected |= {f"tile of {kernel}, D 16" for kernel in questions.KERNELS}
        expected |= {questions.WAYS, "CONTRASTIVE_WORKSPACE", "CONTRASTIVE_PANEL"}
    assert asked >= expected

    stage, path = "gated MLPs", files["gated MLPs"]
    path.write_text(json.dumps(content[stage] | {"rows": []}))
    dry(tmp_path, "--only", stage, "gather")
    assert json.loads(files["gather"].read_text()) == content["gather"]  # dates, too
    (row,) = json.loads(path.read_text())["rows"]
    assert row["case"] == content[stage]["rows"][0]["case"]
    assert row["date"] != content[stage]["rows"][0]["date"]


def test_a_stage_goes_on_where_it_stopped(tmp_path):
    calls = []

    def figures():
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("not installed")
        return {"forward_ms": float(len(calls))}

    first = gpu.Report(tmp_path, "a stage")
    first.measure("x", figures)
    first.measure("y", figures)
    resumed = gpu.Report(tmp_path, "a stage")
    for case in ("x", "y", "z"):
        resumed.measure(case, figures)
    file = tmp_path / "a-stage.json"
    content = json.loads(file.read_text())
    assert [row["case"] for row in content["rows"]] == ["x", "y", "z"]
    assert [row.get("forward_ms") for row in content["rows"]] == [1.0, None, 3.0]
    assert content["rows"][1]["error"] == "ValueError: not installed"
    assert list(tmp_path.iterdir()) == [file]
    again = gpu.Report(tmp_path, "a stage", again=True)
    again.measure("x", figures)
    assert again.row("x")["forward_ms"] == 4.0
    content["machine"]["commit"] = "another"
    file.write_text(json.dumps(content))
    assert gpu.Report(tmp_path, "a stage").row("x") is None


def test_a_stage_that_hangs_is_ended_with_all_it_started(tmp_path):
    pid_file = tmp_path / "pid"
    hang = (
        "import pathlib, subprocess, time; child = subprocess.Popen(['sleep', '60']); "
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    assert gpu.run_within(3, [sys.executable, "-c", hang]) == "killed after 3 s"
    state = Path(f"/proc/{pid_file.read_text()}/stat")

    def alive():
        try:
            return state.read_text().split()[2] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    deadline = time.monotonic() + 20  # the signal was sent; the kernel delivers it when it does
    while alive():
        assert time.monotonic() < deadline, "a process the stage had started lives on"
        time.sleep(0.1)
    assert gpu.run_within(20, [sys.executable, "-c", "raise SystemExit(3)"]) == "status 3"


@pytest.mark.parametrize(
    ("stage", "selected"),
    [
        ("inference", bench_inference.CASES),
        ("encoding", [(peer,) for peer in bench_encoding.PEERS]),
    ],
)
def test_such_a_benchmark_is_run_a_peer_at_a_time(tmp_path, monkeypatch, stage, selected):
    calls = []
    monkeypatch.setattr(gpu, "command", lambda report, case, *arguments: calls.append(arguments))
    gpu.STAGES[stage].run(gpu.Report(tmp_path, stage))
    results = {argument for arguments in calls for argument in arguments if "json" in argument}
    assert all(f"bench/bench_{stage}.py" in arguments for arguments in calls)
    assert len(results) == len(calls)
    peers = dict.fromkeys(peer.split()[0] for *_, peer in selected)
    assert list(peers) == [call[-1] for call in calls]


def test_each_mix_is_a_run_of_its_own(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(gpu, "command", lambda report, case, *arguments: calls.append(arguments))
    gpu.STAGES["attention"].run(gpu.Report(tmp_path, "attention"))
    selected = [set(call[-1].split(" and ")) for call in calls]
    assert [words for words in selected if any(" " in word for word in words)] == []
    for mix, words in zip(peers.mixes(64), selected, strict=True):
        assert [m for m in peers.mixes(64) if all(word in m for word in words)] == [mix]


def contest_of(case, peer, ratio):
    """A case of a results file."""
    return {
        "case": case,
        "peer": peer,
        "pairs": 5,
        "dtype": "bfloat16",
        "ratio": ratio,
        "quartiles": [ratio, ratio],
        "predicted": None,
        "seconds": [0.001, 0.002, 0.003],
        "peer_seconds": [0.01, 0.02, 0.03],
        "memory": 1 << 20,
        "peer_memory": 1 << 22,
        "share_of_flops": 0.5,
        "share_of_bytes": 0.1,
    }


def test_a_row_per_contest_that_a_benchmark_has_timed(tmp_path, monkeypatch):
    calls = []

    def run(arguments, **_):
        result = Path(next(a for a in arguments if "json" in a).partition("=")[2])
        assert not result.exists()
        calls.append(arguments)
        if len(calls) == 1:  # the second run is cut off
            cases = [contest_of("64 pairs", peer, r) for peer, r in (("a", 0.5), ("b", 1.25))]
            result.write_text(json.dumps({"format_version": 1, "cases": cases}))
        return subprocess.CompletedProcess(arguments, len(calls) - 1)

    monkeypatch.setattr(gpu, "machine", dict)
    monkeypatch.setattr(gpu.subprocess, "run", run)
    report = gpu.Report(tmp_path, "training step")
    gpu.STAGES["training step"].run(report)
    assert (ROOT / next(a for a in calls[0] if a.endswith(".py"))).exists()
    assert [row["case"] for row in report.content["rows"]] == ["all", "64 pairs, a", "64 pairs, b"]
    assert report.row("all")["status"] == 0
    row = report.row("64 pairs, b")
    assert (row["ratio"], row["ms"], row["peer_ms"], row["mib"]) == (1.25, 2.0, 20.0, 1.0)
    gpu.STAGES["training step"].run(gpu.Report(tmp_path, "training step"))
    assert len(calls) == 1
    assert "64 pairs, a" in gpu.summary(tmp_path, {})
    again = gpu.Report(tmp_path, "training step", again=True)
    gpu.STAGES["training step"].run(again)
    assert [row["case"] for row in again.content["rows"]] == ["all"]
    assert again.row("all")["status"] == 1


def test_truth_and_kept_pairs_agree_with_the_mask(layout):
    q, k, v, grad = inputs(layout)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out = condensed_attention(q, k, v, layout, impl="reference")
    expected = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    for got, wanted in zip(peers.truth(layout, q, k, v, grad), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)
    assert peers.kept_pairs(layout) == int(allowed_by_loops(layout).sum())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_given_the_right_rows(layout, monkeypatch):
    """Not compiled, which takes CUDA."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v, _ = inputs(layout, dim=16)
    expected = condensed_attention(q, k, v, layout, impl="reference")
    assert torch.allclose(peers.flex(layout)(q, k, v), expected, atol=1e-5)


def contest_row(ratio, *, on="a", today="x", alternative="y", question="tile", **facts):
    interval = [ratio - 0.01, ratio + 0.01]
    row = {"question": question, "on": on, "today": today, "alternative": alternative}
    return row | {"ratio": ratio, "interval": interval, "mib": [64, 64]} | facts


WRONG = "keep; the choice is wrong for"


@pytest.mark.parametrize(
    ("ratios", "facts", "expected"),
    [
        ([1.0, 1.01], {}, "keep"),
        ([1.5, 1.02], {}, "keep"),
        ([0.9, 1.0], {}, "replace"),
        ([0.965, 1.0], {}, "keep"),  # the interval ends at 0.975
        ([0.5, 1.1], {}, "keep"),
        ([0.99, 1.0], {"mib": [64, 32]}, "replace"),
        ([0.99, 1.0], {"mib": [2, 1]}, "keep"),
        ([1.5, 1.0], {"question": questions.WAYS}, "delete the recompute way"),
        ([0.5, 1.0], {"question": questions.WAYS}, "delete the way by rows"),
        ([1.0, 1.0], {"question": questions.WAYS}, "keep"),
        (
            [0.5, 1.5],
            {"question": questions.WAYS, "chosen": "x"},
            "keep; the choice is wrong for 0",
        ),
        (
            [0.5, 1.5],
            {"question": questions.WAYS, "chosen": "y"},
            "keep; the choice is wrong for 1",
        ),
        ([1.0, 1.1], {"question": questions.MLPS}, "keep"),
        ([1.0, 0.9], {"question": questions.MLPS}, "delete GatedMLP"),
    ],
)
def test_the_interval_decides(ratios, facts, expected):
    rows = [contest_row(ratio, on=str(i), **facts) for i, ratio in enumerate(ratios)]
    assert questions.verdict(rows) == expected
    assert questions.answers(rows)[-1][-1] == expected


def test_the_answer_of_a_table_is_the_best_alternative_that_ran_everywhere():
    rows = [contest_row(0.9, on=on, alternative="good") for on in "ab"]
    rows += [
        contest_row(r, on=on, alternative="mixed") for on, r in zip("ab", (0.5, 1.2), strict=True)
    ]
    rows += [contest_row(0.4, on="a", alternative="fails on b")]
    rows += [{"case": "fails on b", "error": "OutOfResources: shared memory"}]
    (line,) = questions.answers(rows)
    ratio, cases, decided = line[3:]
    assert line[2] == "good"
    assert (ratio, cases, decided) == ("0.900 (0.890 - 0.910)", "2 cases, best of 3", "replace")
    rows = [row for row in rows if row.get("alternative") != "good"]
    assert questions.answers(rows)[0][2::3] == ("mixed", "keep")


def test_a_wrong_alternative_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "duel", pytest.fail)
    report = gpu.Report(tmp_path, "a stage")

    def prepare():
        raise ValueError("wrong dq, off by 1.0e+00: not timed")

    questions.ask(report, "tile of dq", "short pairs", "x", "y", prepare)
    (row,) = report.content["rows"]
    assert row["error"] == "ValueError: wrong dq, off by 1.0e+00: not timed"
    assert questions.answers(report.content["rows"]) == []


def test_a_duel_takes_turns_and_times_the_other_over_today(monkeypatch):
    clock, calls = [0.0], []

    def call(name, seconds):
        calls.append(name)
        clock[0] += seconds

    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(harness, "peak", lambda run: 3 << 20)
    found = harness.duel(lambda: call("today", 0.1), lambda: call("other", 0.2), pairs=8)
    assert found["ratio"] == pytest.approx(2)
    assert found["interval"] == pytest.approx((2, 2))
    assert found["ms"] == pytest.approx([100, 200])
    assert found["mib"] == [3, 3]
    assert calls == ["other", "today", "today", "other"] * 4
    calls.clear()
    assert harness.duel(lambda: call("today", 0.1), lambda: call("other", 0.2))["pairs"] == 7
    assert harness.duel(lambda: call("today", 1e-3), lambda: call("other", 1e-3))["pairs"] == 101


def test_neighbours_differ_in_one_number(monkeypatch):
    monkeypatch.setattr(questions, "MOST_NEIGHBOURS", 99)  # of which a CPU tries one
    config = {"BLOCK_N": 64, "BLOCK_M": 128, "num_warps": 8, "num_stages": 1}
    changes = [
        {name: n for name, n in other.items() if n != config[name]}
        for other in questions.neighbours(config, ("BLOCK_M",))
    ]
    expected = [{"BLOCK_N": 32}, {"BLOCK_N": 128}, {"num_warps": 4}, {"num_stages": 2}]
    assert changes == expected
    assert questions.named(config) == "n 64, m 128, warps 8, stages 1"


def test_a_kernel_is_launched_as_asked_and_once_more():
    q, seen = torch.zeros(4, 2, 64), []
    other = launch.Config(16, 16, 4, 2)
    usual = launch.attention_config("dq", 64, q.dtype, 0)
    with questions.attention_launches({"forward": other}) as runs:
        launch.attention("forward", q, seen.append)
        launch.attention("dq", q, seen.append)
    assert seen == [other, usual]
    runs["dq"](other)
    assert seen[-1] == other
    query = q[:, 0]
    with questions.loss_launches({"sums": {"BLOCK_M": 32}}) as trials:
        assert launch.contrastive("sums", query, (), seen.append) == {"BLOCK_M": 32}
        usual = launch.contrastive_config("rows", query.dtype, 0)
        assert launch.contrastive("rows", query, (), seen.append) == usual
    assert set(trials) == {"sums", "rows"}


def test_nothing_is_timed_where_a_device_test_fails(tmp_path, monkeypatch):
    ran = []

    def run(seconds, arguments):
        stage = arguments[arguments.index("--inside") + 1]
        ran.append(stage)
        if stage == "tests":
            rows = [{"case": "device tests", "status": status}]
            (tmp_path / "tests.json").write_text(json.dumps({"rows": rows}))
        return "status 0"

    monkeypatch.setattr(gpu, "run_within", run)
    args = argparse.Namespace(out=tmp_path, budget=600, only=None, again=False, dry=False)
    status = 1
    said = gpu.run_stages(args)
    assert ran == ["tests"]
    assert all("a device test fails" in said[stage] for stage in gpu.QUESTIONS)
    args.only = ["ways"]
    gpu.run_stages(args)
    assert ran == ["tests", "ways"]
    args.only, status = None, 0
    ran.clear()
    gpu.run_stages(args)
    assert ran == list(gpu.STAGES)
    assert ran[:3] == ["tests", "roofs", next(iter(gpu.QUESTIONS))]


def test_failed_device_tests_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu, "command", lambda report, *_: report.measure("t", lambda: {"status": 1})
    )
    for _ in range(2):
        report = gpu.Report(tmp_path, "tests")
        gpu.STAGES["tests"].run(report)
        assert [row["status"] for row in report.content["rows"]] == [1]
        dates = report.content["rows"][0].pop("date")
        time.sleep(1)
    assert json.loads((tmp_path / "tests.json").read_text())["rows"][0]["date"] == dates
