"""bench/gpu.py without a GPU: stages, resuming, cut-offs; what the peers are given and count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_layout import allowed_by_loops

from bench import bench_encoding, bench_inference, gpu, peers
from btok.kernels import CondensedLayout, condensed_attention
from btok_kernels import launch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def layout():
    return CondensedLayout.from_lengths([9, 0, 30, 4], [5, 3, 0, 1], 2)


def inputs(layout, dim=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(layout.num_rows, heads, dim, generator=generator) for heads in (4, 2, 2, 4)]


def test_a_dry_run_writes_every_stage(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, ROOT / "bench/gpu.py", "--dry", "--budget", "120"]
    result = subprocess.run(
        [*command, "--out", tmp_path, "--only", "roofs", "short pairs"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "short pairs: status 0" in result.stdout, result.stdout + result.stderr
    content = json.loads((tmp_path / "short-pairs.json").read_text())
    assert content["machine"]["device"] == "cpu"
    assert content["machine"]["torch"] == str(torch.__version__)
    rows = {row["case"]: row for row in content["rows"]}
    assert list(rows) == list(peers.PEERS)
    for name in ("sdpa", "dense mask", "per segment"):
        assert "error" not in rows[name]
        assert rows[name]["forward_ms"] > 0
        assert rows[name]["forward_share"] > 0
    assert "cannot run" in rows["triton"]["error"]


def test_a_stage_goes_on_where_it_stopped(tmp_path):
    calls = []

    def figures():
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("not installed")
        return {"forward_ms": float(len(calls))}

    first = gpu.Report(tmp_path, "a stage", dry=True, again=False)
    first.measure("x", figures)
    first.measure("y", figures)
    resumed = gpu.Report(tmp_path, "a stage", dry=True, again=False)
    for case in ("x", "y", "z"):
        resumed.measure(case, figures)
    file = tmp_path / "a-stage.json"
    content = json.loads(file.read_text())
    assert [row["case"] for row in content["rows"]] == ["x", "y", "z"]
    assert [row.get("forward_ms") for row in content["rows"]] == [1.0, None, 3.0]
    assert content["rows"][1]["error"] == "ValueError: not installed"
    assert list(tmp_path.iterdir()) == [file]
    again = gpu.Report(tmp_path, "a stage", dry=True, again=True)
    again.measure("x", figures)
    assert again.row("x")["forward_ms"] == 4.0
    content["machine"]["commit"] = "another"
    file.write_text(json.dumps(content))
    assert gpu.Report(tmp_path, "a stage", dry=True, again=False).row("x") is None


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
    gpu.STAGES[stage].run(gpu.Report(tmp_path, stage, dry=True, again=False))
    results = {argument for arguments in calls for argument in arguments if "json" in argument}
    assert all(f"bench/bench_{stage}.py" in arguments for arguments in calls)
    assert len(results) == len(calls)
    peers = dict.fromkeys(peer.split()[0] for *_, peer in selected)
    assert list(peers) == [call[-1] for call in calls]


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

    monkeypatch.setattr(gpu, "machine", lambda dry: {})
    monkeypatch.setattr(gpu.subprocess, "run", run)
    report = gpu.Report(tmp_path, "training step", dry=True, again=False)
    gpu.STAGES["training step"].run(report)
    assert (ROOT / next(a for a in calls[0] if a.endswith(".py"))).exists()
    assert [row["case"] for row in report.content["rows"]] == ["all", "64 pairs, a", "64 pairs, b"]
    assert report.row("all")["status"] == 0
    row = report.row("64 pairs, b")
    assert (row["ratio"], row["ms"], row["peer_ms"], row["mib"]) == (1.25, 2.0, 20.0, 1.0)
    gpu.STAGES["training step"].run(gpu.Report(tmp_path, "training step", dry=True, again=False))
    assert len(calls) == 1
    assert "64 pairs, a" in gpu.summary(tmp_path, {})
    again = gpu.Report(tmp_path, "training step", dry=True, again=True)
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
def test_the_cuda_peers_are_given_the_right_rows(layout, monkeypatch):
    """With their kernels replaced by plain torch."""
    from torch.nn.attention import varlen

    def plain(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
        assert (window_size, enable_gqa) == ((-1, 0), True)
        outputs = []
        for n in range(len(cu_q) - 1):
            rows, keys = slice(*cu_q[n : n + 2]), slice(*cu_k[n : n + 2])
            count = (rows.stop - rows.start, keys.stop - keys.start)
            assert (count[0] <= max_q, count[1] <= max_k) == (True, True)
            scores = torch.einsum("ihd,jhd->hij", q[rows], k[keys].repeat_interleave(2, 1))
            sees = torch.ones(count, dtype=torch.bool).tril(count[1] - count[0])
            weights = (scores * q.shape[2] ** -0.5).masked_fill(~sees, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hij,jhd->ihd", weights, v[keys].repeat_interleave(2, 1)))
        return torch.cat(outputs)

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v, _ = inputs(layout, dim=16)
    expected = condensed_attention(q, k, v, layout, impl="reference")
    for make in (peers.two_calls, peers.flex):
        assert torch.allclose(make(layout)(q, k, v), expected, atol=1e-5), make.__name__


def test_executed_operations_count_the_blocks_with_a_kept_pair():
    layout = CondensedLayout.from_lengths([200], [0], 0)
    dim, groups, key_heads = 32, 6, 2
    config = launch.attention_config("forward", dim, torch.float32, 0)
    rows = torch.arange(200).repeat_interleave(groups)[:, None]  # packed rows
    sees = torch.arange(200)[None] <= rows
    height, width = config.block_m, config.block_n
    padded = torch.zeros(-(-len(sees) // height) * height, 208, dtype=torch.bool)
    padded[: len(sees), :200] = sees
    visited = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width)).any(3).any(1).sum()
    forward, backward = peers.executed(layout, 12, key_heads, dim, torch.float32)
    product = 2 * dim * int(visited) * height * width * key_heads
    assert forward == 2 * product
    # dQ visits the same blocks; dK and dV begin each block of keys at its own first row
    assert backward >= 7 * 2 * dim * peers.kept_pairs(layout) * 12
    assert backward < 1.3 * 7 * product
