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
from bench import harness, peers
from btok.kernels import CondensedLayout, condensed_attention

ROOT = Path(__file__).resolve().parent.parent
TINY = CondensedLayout.from_lengths([9, 0, 30], [5, 3, 0], 2)


class Benchmark:
    """In the place of pytest-benchmark's fixture, which times once under xdist."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def contest_of(benchmark):
    """A contest; of None one that nothing wrong gets past."""
    settings = {"benchmark_min_rounds": 5, "benchmark_max_time": 0.01}
    return harness.Contest(benchmark, SimpleNamespace(getoption=settings.get))


def held(ours, theirs, **options):
    """What a contest writes down."""
    benchmark = Benchmark()
    options = {"dtype": torch.float32, "flops": 1e6, "bytes": 1e3} | options
    contest_of(benchmark)("a bench", "a case", "a peer", ours, theirs, **options)
    return benchmark.extra_info


@pytest.mark.parametrize(
    ("count", "ranks"), [(1, (1, 1)), (6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (100, (40, 61))]
)
def test_the_medians_interval_is_the_sign_tests(count, ranks):
    """Ranks as tables of the sign test have them (at 5 %, two-sided: 1 of 10, 5 of 20)."""
    sample = random.Random(0).sample(range(1, count + 1), count)
    assert harness.median_interval(sample) == ranks


def test_the_ratio_is_ours_over_the_peers():
    found = held(lambda: time.sleep(0.01), lambda: time.sleep(0.03), predicted=1 / 3, rows=7)
    low, high = found["quartiles"]
    assert 0.1 < found["ratio"] < 0.6
    assert low <= found["ratio"] <= high
    assert found["interval"][0] <= found["ratio"] <= found["interval"][1]
    assert 0.01 <= found["seconds"][1] < found["peer_seconds"][1]
    best = harness.roof(torch.float32)
    assert best.flops > 1e8 and best.bytes > 1e8
    assert found["share_of_flops"] * best.flops == pytest.approx(1e6 / found["seconds"][1])
    assert found["share_of_bytes"] * best.bytes == pytest.approx(1e3 / found["seconds"][1])
    facts = ("bench", "case", "peer", "pairs", "dtype", "predicted", "rows")
    assert [found[f] for f in facts] == ["a bench", "a case", "a peer", 5, "float32", 1 / 3, 7]


def test_both_take_turns_and_begin_every_other_pair():
    calls = []
    held(lambda: calls.append("o"), lambda: calls.append("p"))
    calls = calls[2:]  # those whose memory was measured
    pairs = ["".join(calls[at : at + 2]) for at in range(0, len(calls), 2)]
    assert pairs[0] == "op"  # the warm-up
    assert len(pairs) >= 6
    assert pairs[1:] == (["po", "op"] * len(pairs))[: len(pairs) - 1]


@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is read from /proc")
def test_memory_is_the_peak_of_a_call_with_its_results():
    def take(mega):
        return torch.ones(mega << 20, dtype=torch.uint8, device=harness.DEVICE)

    def two_then_one():
        take(96)
        return take(64)

    found = held(lambda: take(64), two_then_one)
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

def test_stopped(contest):
    raise KeyboardInterrupt
"""


def hold_contests(folder, *arguments):
    """`BENCH` in a process, the file of `--keep` and what was printed."""
    (folder / "test_some.py").write_text(BENCH)
    same = "import bench.conftest\nbench.conftest.digest_of_code = lambda *more: 'same'\n"
    (folder / "conftest.py").write_text(same)  # whatever is edited meanwhile
    env = {name: value for name, value in os.environ.items() if "PYTEST" not in name}  # xdist's
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "--benchmark-only"]
    command += ["--benchmark-max-time=0.01", "test_some.py", "--keep", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("path", [".", "gone/found.json", "test_some.py/found.json"])
def test_a_file_that_nothing_can_be_kept_in_is_refused_in_a_line(tmp_path, path):
    run = hold_contests(tmp_path, path)
    assert run.returncode == 4 and f"ERROR: --keep is {path}, " in run.stderr


def test_a_contest_that_is_stopped_is_held_as_often_as_it_is_asked_for(tmp_path):
    for _ in range(3):
        run = hold_contests(tmp_path, "found.json", "-k", "stopped")
        assert run.returncode == 2 and "of which 0 contests" in run.stdout
        assert "KeyboardInterrupt" in run.stdout
    assert json.loads((tmp_path / "found.json").read_text())["errors"] == []


def test_what_is_kept_of_a_run_that_is_cut_off(tmp_path):
    """Machine, roofs, contests, but no host; nothing is timed again, nor what fails."""
    found = []
    for status in (1, 1, 0):
        run = hold_contests(tmp_path, "found.json", "-k", "not stopped")
        assert run.returncode == status, run.stdout + run.stderr
        assert f"of which {3 * bool(found)} contests are gone on with" in run.stdout
        found.append(json.loads((tmp_path / "found.json").read_text()))
    head, row = run.stdout.partition("= contests =")[2].splitlines()[1:3]
    assert head.split()[:3] == ["bench", "case", "peer"]
    assert row.startswith("a bench  a case  a peer")
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


@pytest.mark.parametrize("direction", attention.DIRECTIONS)
@pytest.mark.parametrize("peer", ["dense mask", "per segment"])
def test_attention_is_given_to_the_contest(monkeypatch, peer, direction):
    monkeypatch.setitem(attention.LAYOUTS, "tiny", TINY)
    benchmark = Benchmark()
    attention.bench_condensed_attention(contest_of(benchmark), "tiny", peer, direction)
    found = benchmark.extra_info
    names = ["condensed attention", f"tiny, {direction}", peer]
    assert [found[name] for name in ("bench", "case", "peer")] == names
    products, rows = (2, 2) if direction == "forward" else (7, 4)  # products, tensors as large as q
    pairs, dim = int(allowed_by_loops(TINY).sum()), attention.DIM
    assert found["flops"] == products * 2 * dim * attention.HEADS * pairs
    elements = rows * TINY.num_rows * dim * (attention.HEADS + attention.KEY_HEADS)
    assert found["bytes"] == elements * attention.DTYPE.itemsize
    assert (found["rows"], found["sequences"]) == (TINY.num_rows, 3)
    assert found["predicted"] == (pairs / TINY.num_rows**2 if peer == "dense mask" else None)


@pytest.mark.parametrize("what", ["output", "gradient"])
@pytest.mark.parametrize("whose", ["ours", "the peer's"])
def test_wrong_attention_is_not_timed(monkeypatch, whose, what):
    right, name = peers.ours(TINY, "sdpa"), attention.OURS if whose == "ours" else "dense mask"

    def wrong(q, k, v):
        out = right(q, k, v)
        return out + 2 * attention.TOLERANCE * (out if what == "output" else out - out.detach())

    direction = "forward + backward" if what == "gradient" else "forward"
    monkeypatch.setitem(attention.LAYOUTS, "tiny", TINY)
    monkeypatch.setitem(attention.PEERS, name, lambda layout: wrong)
    who = "ours" if whose == "ours" else "dense mask"
    with pytest.raises(AssertionError, match=f"wrong result of {who}, .*: not timed"):
        attention.bench_condensed_attention(contest_of(None), "tiny", "dense mask", direction)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it may run there")
def test_a_peer_that_cannot_run_is_skipped():
    with pytest.raises(pytest.skip.Exception, match="xformers cannot run: RuntimeError"):
        attention.hold(contest_of(None), "tiny", ("sdpa", "xformers"), TINY, "forward")


@pytest.mark.parametrize("results", [[], [torch.ones(1)], [torch.full((2,), torch.nan)]])
def test_no_result_or_one_of_another_shape_is_none(results):
    with pytest.raises(AssertionError, match=r"result of some.*: not timed"):
        harness.check("some", results, [torch.ones(2)], 1.0)


def test_truth_and_kept_pairs_agree_with_the_mask():
    q, k, v, grad = peers.attention_inputs(TINY, 4, 2, 8, torch.float32)
    out = condensed_attention(q, k, v, TINY, impl="reference")
    expected = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    for got, wanted in zip(peers.truth(TINY, q, k, v, grad), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)
    assert peers.kept_pairs(TINY) == int(allowed_by_loops(TINY).sum())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_given_the_right_rows(monkeypatch):
    """Not compiled, which takes CUDA."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v = (x.detach() for x in peers.attention_inputs(TINY, 4, 2, 16, torch.float32)[:3])
    expected = condensed_attention(q, k, v, TINY, impl="reference")
    assert torch.allclose(peers.flex(TINY)(q, k, v), expected, atol=1e-5)


@pytest.mark.parametrize("direction", contrastive.DIRECTIONS)
@pytest.mark.parametrize("peer", ["eager", "chunked torch", "linear_cross_entropy", "late"])
@pytest.mark.parametrize("wrong", [None, "ours", "peer"])
def test_a_loss_is_timed_where_it_is_right_alone(monkeypatch, peer, direction, wrong):
    if peer not in (*contrastive.PEERS, "late"):
        pytest.skip("this torch has none")
    shape = (20, 3, 16) if peer == "late" else (70, 16)
    theirs = contrastive.late_torch if peer == "late" else contrastive.PEERS[peer]
    contrastive.truth(shape, direction == "both directions")  # of what is not made wrong
    ours, more = contrastive.ours(), 1 + 2 * contrastive.TOLERANCE
    made = {"ours": ours, "peer": theirs}
    if wrong:
        right = made[wrong]
        made[wrong] = lambda query, *others: right(more * query, *others)
    monkeypatch.setattr(contrastive, "ours", lambda: made["ours"])
    benchmark = Benchmark()
    options = "a bench", "a peer", made["peer"], shape, direction
    if wrong is None:
        contrastive.hold(contest_of(benchmark), *options)
        rows, *tokens, dim = shape
        found, products = benchmark.extra_info, 6 * (rows * (tokens or [1])[0]) ** 2
        assert found["case"].startswith(f"{rows} rows") and found["flops"] == products * dim
        return
    name = "ours" if wrong == "ours" else "a peer"
    with pytest.raises(AssertionError, match=f"wrong result of {name}, .*: not timed"):
        contrastive.hold(contest_of(None), *options)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_peer_of_late_interaction_is_the_reference(rows):
    query, key = contrastive.inputs(20, 3, 16)
    for bidirectional in (False, True):
        options = {"temperature": 0.02, "bidirectional": bidirectional, "impl": "reference"}
        want = contrastive.contrastive_loss(query, key, **options)
        got = peers.chunked_late_interaction(query, key, 0.02, bidirectional, rows)
        assert abs(got - want) < contrastive.TOLERANCE
