"""The benchmarks' harness: turns, ratios, memory, files; and that no wrong result is timed."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_layout import allowed_by_loops

from bench import bench_condensed_attention as attention
from bench import bench_contrastive_loss as contrastive
from bench import bench_late_interaction as late
from bench import harness, peers
from btok.kernels import CondensedLayout, condensed_attention

ROOT = Path(__file__).resolve().parent.parent


class Benchmark:
    """In the place of pytest-benchmark's fixture, which times once under xdist."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def held(ours, theirs, **options):
    """What a contest writes down, and its line."""
    lines = []
    settings = {"benchmark_min_rounds": 5, "benchmark_max_time": 0.01}
    benchmark = Benchmark()
    contest = harness.Contest(benchmark, SimpleNamespace(getoption=settings.get), lines)
    options = {"dtype": torch.float32, "flops": 1e6, "bytes": 1e3} | options
    contest("a bench", "a case", "a peer", ours, theirs, **options)
    return benchmark.extra_info, *lines


class Recorder:
    """In the place of a contest: what it was given, and that both calls run."""

    def __call__(self, bench, case, peer, ours, theirs, **facts):
        self.names, self.facts = (bench, case, peer), facts
        self.results = [ours(), theirs()]


def never(*names, **facts):
    """In its place where nothing may be timed."""
    raise RuntimeError(f"{names} was timed")


@pytest.mark.parametrize(
    ("count", "ranks"), [(1, (1, 1)), (6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (100, (40, 61))]
)
def test_the_medians_interval_is_the_sign_tests(count, ranks):
    """Ranks as tables of the sign test have them (at 5 %, two-sided: 1 of 10, 5 of 20)."""
    sample = random.Random(0).sample(range(1, count + 1), count)
    assert harness.median_interval(sample) == ranks


def test_the_ratio_is_ours_over_the_peers():
    found, line = held(lambda: time.sleep(0.01), lambda: time.sleep(0.03), predicted=1 / 3, rows=7)
    low, high = found["quartiles"]
    assert 0.1 < found["ratio"] < 0.6
    assert low <= found["ratio"] <= high
    assert found["interval"][0] <= found["ratio"] <= found["interval"][1]
    assert 0.01 <= found["seconds"][1] < found["peer_seconds"][1]
    assert found["share_of_flops"] > 0 and found["share_of_bytes"] > 0
    best = harness.roof(torch.float32)
    assert best.flops > 1e8 and best.bytes > 1e8
    shares = found["share_of_flops"] * best.flops
    assert shares == pytest.approx(1e6 / found["seconds"][1])
    facts = ("bench", "case", "peer", "pairs", "dtype", "predicted", "rows")
    assert [found[f] for f in facts] == ["a bench", "a case", "a peer", 5, "float32", 1 / 3, 7]
    assert all(text in line for text in ("a bench", "a case", "a peer", f"{found['ratio']:.3f}"))


def test_both_take_turns_and_begin_every_other_pair():
    calls = []
    held(lambda: calls.append("o"), lambda: calls.append("p"), predicted=None)
    calls = calls[2:]  # those whose memory was measured
    pairs = ["".join(calls[at : at + 2]) for at in range(0, len(calls), 2)]
    assert pairs[0] == "op"  # the warm-up
    assert len(pairs) >= 6
    assert pairs[1:] == (["po", "op"] * len(pairs))[: len(pairs) - 1]


def test_a_duel_takes_turns_and_times_the_other_over_today(monkeypatch):
    clock, calls = [0.0], []

    def call(name, seconds):
        calls.append(name)
        clock[0] += seconds

    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(harness, "peak", lambda run: 3 << 20)
    found = harness.duel(lambda: call("today", 0.1), lambda: call("other", 0.2))
    assert found["ratio"] == pytest.approx(2) and found["pairs"] == 7
    assert found["interval"] == pytest.approx((2, 2))
    assert found["ms"] == pytest.approx([100, 200])
    assert found["mib"] == [3, 3]
    assert harness.duel(lambda: call("today", 1e-3), lambda: call("other", 1e-3))["pairs"] == 101


@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is read from /proc")
def test_memory_is_the_peak_of_a_call_with_its_results():
    def take(mega):
        return torch.ones(mega << 20, dtype=torch.uint8, device=harness.DEVICE)

    def two_then_one():
        take(96)
        return take(64)

    found, _ = held(lambda: take(64), two_then_one)
    assert abs(found["memory"] / 2**20 - 64) < 6.4
    assert abs(found["peer_memory"] / 2**20 - 96) < 9.6
    assert harness.peak(lambda: None) < 1 << 20


BENCH = """
import pytest, torch
@pytest.mark.parametrize("n", [1, 2, 3])
def test_some(contest, n):
    if n == 2:
        raise ValueError("wrong result: not timed")
    if n == 3:
        import os; os._exit(1)
    contest("a bench", "a case", "a peer", lambda: sum(range(10**5)), lambda: None,
            dtype=torch.float32, flops=1, bytes=2, rows=3)
"""


def test_what_is_kept_of_a_run_that_is_cut_off(tmp_path):
    """Machine, roofs, contests, but no host; nothing is timed again, nor what fails."""
    (tmp_path / "test_some.py").write_text(BENCH)
    same = "import bench.conftest\nbench.conftest.digest_of_code = lambda *more: 'same'\n"
    (tmp_path / "conftest.py").write_text(same)  # whatever is edited meanwhile
    env = {name: value for name, value in os.environ.items() if "PYTEST" not in name}  # xdist's
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "--benchmark-only"]
    command += ["--keep", "found.json", "--benchmark-max-time=0.01", "test_some.py"]
    found = []
    for status in (1, 1, 0):
        run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert run.returncode == status, run.stdout + run.stderr
        assert f"of which {3 * bool(found)} contests are gone on with" in run.stdout
        found.append(json.loads((tmp_path / "found.json").read_text()))
    assert platform.node() not in (tmp_path / "found.json").read_text()
    content = found[-1]
    assert set(content["machine"]) == {"device", "cpu", "cores", "threads"}
    assert content["versions"]["torch"] == torch.__version__
    assert content["roofs"]["float32"]["flops"] > 1e8
    (case,) = content["cases"]
    assert (case["bench"], case["rows"], case["bytes"]) == ("a bench", 3, 2)
    assert case["ratio"] > 1
    assert found[0]["cases"] == [case]
    errors = {error["id"][-2]: error["error"] for error in content["errors"]}
    assert errors == {"2": "ValueError: wrong result: not timed", "3": "did not end"}


@pytest.fixture
def layout(monkeypatch):
    tiny = CondensedLayout.from_lengths([9, 0, 30], [5, 3, 0], 2)
    monkeypatch.setitem(attention.LAYOUTS, "tiny", tiny)
    monkeypatch.setattr(attention, "prepared", attention.prepared.__wrapped__)
    return tiny


@pytest.mark.parametrize("direction", attention.DIRECTIONS)
@pytest.mark.parametrize("peer", ["dense mask", "per segment"])
def test_attention_is_given_to_the_contest(layout, peer, direction):
    contest = Recorder()
    attention.bench_condensed_attention(contest, "tiny", peer, direction)
    assert contest.names == ("condensed attention", f"tiny, {direction}", peer)
    ours, theirs = contest.results
    assert len(ours) == len(theirs) == (1 if direction == "forward" else 4)
    products, rows = (2, 2) if direction == "forward" else (7, 4)  # products, tensors as large as q
    facts, dim = contest.facts, attention.DIM
    pairs = sum(int(row) - int(first) + 1 for row, first in enumerate(layout.row_first))
    assert facts["flops"] == products * 2 * dim * attention.HEADS * pairs
    elements = rows * layout.num_rows * dim * (attention.HEADS + attention.KEY_HEADS)
    assert facts["bytes"] == elements * attention.DTYPE.itemsize
    assert (facts["rows"], facts["sequences"]) == (layout.num_rows, 3)


@pytest.mark.parametrize("what", ["output", "gradient"])
@pytest.mark.parametrize("whose", ["ours", "the peer's"])
def test_wrong_attention_is_not_timed(layout, monkeypatch, whose, what):
    right = peers.condensed_attention

    def wrong(q, k, v, layout, impl):
        out = right(q, k, v, layout, impl=impl)
        if impl == "reference":
            return out
        change = out if what == "output" else out - out.detach()
        return out + 2 * attention.TOLERANCE * change

    direction = "forward + backward" if what == "gradient" else "forward"
    name, peer = attention.OURS, "dense mask"
    if whose == "ours":
        monkeypatch.setattr(peers, "condensed_attention", wrong)
    else:
        name = peer
        made = lambda layout: lambda q, k, v: wrong(q, k, v, layout, "sdpa")  # noqa: E731
        monkeypatch.setitem(attention.PEERS, peer, made)
    with pytest.raises(AssertionError, match=f"wrong result of {name}, .*: not timed"):
        attention.bench_condensed_attention(never, "tiny", peer, direction)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it may run there")
def test_a_peer_that_cannot_run_is_skipped(layout):
    with pytest.raises(pytest.skip.Exception, match="xformers cannot run: RuntimeError"):
        attention.bench_condensed_attention(never, "tiny", "xformers", "forward")


def test_truth_and_kept_pairs_agree_with_the_mask(layout):
    q, k, v, grad = peers.attention_inputs(layout, 4, 2, 8, torch.float32)
    out = condensed_attention(q, k, v, layout, impl="reference")
    expected = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    for got, wanted in zip(peers.truth(layout, q, k, v, grad), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)
    assert peers.kept_pairs(layout) == int(allowed_by_loops(layout).sum())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_given_the_right_rows(layout, monkeypatch):
    """Not compiled, which takes CUDA."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v = (x.detach() for x in peers.attention_inputs(layout, 4, 2, 16, torch.float32)[:3])
    expected = condensed_attention(q, k, v, layout, impl="reference")
    assert torch.allclose(peers.flex(layout)(q, k, v), expected, atol=1e-5)


@pytest.mark.parametrize("peer", ["eager", "chunked torch", "linear_cross_entropy"])
def test_the_peers_of_the_loss_run_and_are_right(peer):
    if peer not in contrastive.PEERS:
        pytest.skip("this torch has none")
    for direction in contrastive.DIRECTIONS:
        contest = Recorder()
        contrastive.bench_contrastive_loss(contest, peer, 70, direction)
        assert contest.names == ("contrastive loss", f"70 rows, {direction}", peer)


@pytest.mark.parametrize("direction", contrastive.DIRECTIONS)
@pytest.mark.parametrize("whose", ["ours", "the peer's"])
def test_a_wrong_contrastive_loss_is_not_timed(monkeypatch, whose, direction):
    right, eager = contrastive.contrastive_loss, contrastive.eager
    factor = 1 + 2 * contrastive.TOLERANCE

    def wrong(query, key, **options):
        return right(factor * query, key, **options)

    name = contrastive.OURS if whose == "ours" else "eager"
    if whose == "ours":
        monkeypatch.setattr(contrastive, "contrastive_loss", wrong)
    else:
        monkeypatch.setitem(contrastive.PEERS, name, lambda query, *x: eager(factor * query, *x))
    with pytest.raises(AssertionError, match=f"wrong result of {name}, .*: not timed"):
        contrastive.bench_contrastive_loss(never, "eager", 70, direction)


@pytest.mark.parametrize("direction", late.DIRECTIONS)
@pytest.mark.parametrize("whose", ["ours", "peer"])
def test_a_wrong_late_interaction_is_not_timed(monkeypatch, whose, direction):
    right = getattr(late, whose)
    late.truth(20, direction == "both directions")  # made by the peer, and kept
    wrong = lambda query, *x: right((1 + 2 * contrastive.TOLERANCE) * query, *x)  # noqa: E731
    monkeypatch.setattr(late, whose, wrong)
    name = late.OURS if whose == "ours" else late.PEER
    with pytest.raises(AssertionError, match=f"wrong result of {name}, .*: not timed"):
        late.bench_late_interaction(never, 20, direction)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_peer_of_late_interaction_is_the_reference(rows):
    query, key = late.inputs(20)
    for bidirectional in (False, True):
        options = {"temperature": late.TAU, "bidirectional": bidirectional, "impl": "reference"}
        want = late.contrastive_loss(query, key, **options)
        got = peers.chunked_late_interaction(query, key, late.TAU, bidirectional, rows)
        assert abs(got - want) < contrastive.TOLERANCE
