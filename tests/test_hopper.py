"""When the kernels for Hopper are taken, and why not; what they compute is in tests/compiled."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import bench_hopper as contest
from bench.harness import Contest
from btok_kernels import condensed_attention as op
from btok_kernels import launch
from btok_kernels.layout import TILE, CondensedLayout

LAYOUT = CondensedLayout.from_lengths([40], [8], 4)


def tensors(dtype=torch.bfloat16, dim=64):
    shapes = [(LAYOUT.num_rows, heads, dim) for heads in (4, 2, 2)]
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


@pytest.fixture(autouse=True)
def there(monkeypatch):
    """A device for which everything is there."""
    monkeypatch.setattr(op, "no_triton", lambda device, dtype: None)
    monkeypatch.setattr(launch, "no_gluon", lambda: None)
    monkeypatch.setattr(launch, "architecture", lambda device: 90)


def refused(message, q, k, v):
    with pytest.raises(RuntimeError, match="impl='hopper' cannot run: ") as error:
        op.condensed_attention(q, k, v, LAYOUT, impl="hopper")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_it_cannot_run_on(monkeypatch):
    assert launch.no_hopper(*tensors()) is None
    refused("q is torch.float32, it takes", *tensors(torch.float32))
    refused("q has head dim 32, its kernels take (64, 80, 96, 128)", *tensors(dim=32))
    q, k, v = tensors()
    odd = torch.zeros(LAYOUT.num_rows, 2, 68, dtype=q.dtype)[:, :, :64]
    refused("k has strides [136, 68, 1]; its copies take positive multiples of 8", q, odd, v)
    refused("v has strides [128, 0, 1]", q, k, v[:, :1].expand(-1, 2, -1))
    storage = torch.zeros(LAYOUT.num_rows * 2 * 64 + 1, dtype=q.dtype)
    refused("k has strides [128, 64, 1]", q, storage[1:].view(k.shape), v)
    monkeypatch.setattr(launch, "architecture", lambda device: 100)
    refused("the device is sm_100, it needs sm_90", q, k, v)
    monkeypatch.setattr(launch, "no_gluon", lambda: "triton is 3.6.0, it needs 3.9")
    refused("triton is 3.6.0, it needs 3.9", q, k, v)


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.6.0", "triton is 3.6.0, it needs 3.9"), ("3.9.0", None), ("3.10.1+git", None)],
)
def test_an_older_triton(monkeypatch, version, reason):
    monkeypatch.undo()
    monkeypatch.setattr(launch, "triton_version", lambda: version)
    monkeypatch.setitem(launch.INSTALLED, "triton", True)
    launch.no_gluon.cache_clear()
    try:
        assert launch.no_gluon() == reason
    finally:
        launch.no_gluon.cache_clear()


def test_launches_fit_a_multiprocessor():
    for kernel, config in launch.HOPPER.items():
        assert TILE % config.block_n == 0
        own = config.block_n if kernel == "dkdv" else config.block_m
        assert own == 128, "two consumers of 64 rows"
        # all registers of a multiprocessor; the producer keeps the least that there are
        assert 128 * (2 * config.registers + 24) <= 65536 and config.registers % 8 == 0


class OnDevice:
    """A tensor as the choice of an implementation sees it."""

    device = torch.device("cuda", 0)

    def __init__(self, rows, dim):
        self.shape = (rows, 4, dim)


@pytest.fixture
def results_file(monkeypatch, tmp_path):
    """Writes what a device has found, or a text."""
    monkeypatch.setattr(launch, "_device_name", lambda device: "a device")
    monkeypatch.setattr(launch, "triton_version", lambda: "3.9.0")
    monkeypatch.setattr(launch, "HOPPER_RESULTS", tmp_path / "hopper.json")
    found = {"device": "a device", "triton": "3.9.0", "from_rows": 3000}
    found["from_length"] = {"128": 1000, "64": None}

    def write(**others):
        text = others.get("text", json.dumps(found | others))
        launch.HOPPER_RESULTS.write_text(text)
        launch._hopper_results.cache_clear()

    launch._hopper_results.cache_clear()
    yield write
    launch._hopper_results.cache_clear()


def wins(sequences, length, dim=128, rows=None):
    layout = CondensedLayout.from_lengths([length - 8] * sequences, [4] * sequences, 4)
    return launch.hopper_wins(OnDevice(rows or sequences * length, dim), layout)


def test_auto_takes_it_where_a_results_file_says_so(results_file):
    assert not wins(4, 1000)  # there is none
    results_file()
    assert wins(4, 1000) and wins(3, 1000)
    assert not wins(5, 999)
    assert not wins(2, 1400)  # of fewer rows than were timed
    assert not wins(100, 20, rows=30000)  # rows of no sequence make none longer
    assert not wins(4, 1000, dim=64) and not wins(4, 1000, dim=96)  # lost, not timed
    assert not launch.hopper_wins(OnDevice(4000, 128), None)
    for others in ({"device": "another one"}, {"triton": "3.9.1"}):
        results_file(**others)
        assert not wins(4, 1000)


@pytest.mark.parametrize(
    "damaged",
    [
        {"text": ""},
        {"text": '{"device": "a device", "tri'},
        {"text": "[1]"},
        {"text": '{"device": "a device"}'},
        {"from_length": {"128": "1000"}},
        {"from_length": 7},
        {"from_rows": None, "from_length": {"128": 1.5}},
    ],
)
def test_a_damaged_results_file_is_passed_over_and_told_once(results_file, caplog, damaged):
    results_file(**damaged)
    assert not wins(4, 1000) and not wins(4, 1000)
    (message,) = caplog.messages
    assert "hopper.json is passed over, it has no results (" in message and "\n" not in message


def test_what_auto_asks_for_and_cannot_have_is_told_once_a_kind(results_file, monkeypatch, caplog):
    """An older triton, another architecture, head dims without kernels, strides."""
    results_file(from_rows=0, from_length={"128": 0, "64": 0})
    asks = launch.hopper_wins
    there = lambda q, layout: asks(OnDevice(len(q), q.shape[2]), layout)  # noqa: E731
    monkeypatch.setattr(op, "hopper_wins", there)
    monkeypatch.setattr(launch, "_announced", set())

    def told():
        found = [message.partition("not 'hopper': ")[2] for message in caplog.messages]
        caplog.clear()
        return found

    for dim in (32, 16, 32):
        op.condensed_attention(*tensors(dim=dim), LAYOUT)
    assert told() == ["q has head dim 32, its kernels take (64, 80, 96, 128)"]
    for rows in (56, 60, 64):  # strides that name the number of rows
        layout = CondensedLayout.from_lengths([40], [8], 4, num_rows=rows)
        q, k = (torch.zeros(rows, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))
        v = torch.zeros(2, rows, 68, dtype=torch.bfloat16)[..., :64].transpose(0, 1)
        op.condensed_attention(q, k, v, layout)
    (message,) = told()
    assert message.startswith("v has strides [68, ")
    with monkeypatch.context() as patch:
        patch.setattr(launch, "architecture", lambda device: 100)
        op.condensed_attention(*tensors(), LAYOUT)
        assert told() == ["the device is sm_100, it needs sm_90"]
    monkeypatch.setattr(launch, "no_gluon", lambda: "triton is 3.6.0, it needs 3.9")
    for _ in range(2):
        op.condensed_attention(*tensors(), LAYOUT)
    assert told() == ["triton is 3.6.0, it needs 3.9"]


def test_no_results_are_shipped_yet():
    """Nothing is the default that no device has timed."""
    assert not launch.HOPPER_RESULTS.exists()


@pytest.fixture
def tuned(monkeypatch):
    """BTOK_AUTOTUNE=1: titles of what was searched, where the last candidate wins, and what ran."""
    kernels = pytest.importorskip("btok_kernels.condensed_attention_triton")
    seen = SimpleNamespace(titles=[], ran=[], kernels=kernels)

    def search(title, default, candidates, run):
        seen.titles.append(title)
        run(candidates[-1])
        return candidates[-1]

    def forward(q, k, v, tiles, scale, hopper=False):
        seen.ran.append(("forward", hopper))
        return torch.zeros_like(q), q.new_zeros(0)

    def backward(d_out, q, k, v, out, lse, tiles, scale, hopper=False):
        seen.ran.append(("backward", hopper))
        return q, k, v

    monkeypatch.setattr(kernels, "_forward", forward)
    monkeypatch.setattr(kernels, "_backward", backward)
    monkeypatch.setattr(launch, "search", search)
    monkeypatch.setattr(launch, "found", {})
    monkeypatch.setenv("BTOK_AUTOTUNE", "1")
    return seen


def test_a_search_of_auto_takes_the_faster(tuned):
    q, k, v = tensors()
    for _ in range(2):
        op.condensed_attention(q, k, v, LAYOUT)
    assert tuned.titles == ["impl of attention ('forward', 90, 64, torch.bfloat16)"], "once"
    assert tuned.ran == [("forward", True)] * 3
    tuned.ran.clear()
    op.condensed_attention(q.requires_grad_(), k, v, LAYOUT)
    (title,) = tuned.titles[1:]
    assert title == "impl of attention ('forward and backward', 90, 64, torch.bfloat16)"
    assert tuned.ran == [("forward", True), ("backward", True), ("forward", True)]
    with torch.no_grad():
        op.condensed_attention(q, k, v, LAYOUT)
    assert len(tuned.titles) == 2
    launch.found.update(dict.fromkeys(launch.found, "triton"))
    op.condensed_attention(q, k, v, LAYOUT)
    assert tuned.ran[-1] == ("forward", False)


def test_what_is_asked_for_or_alone_is_not_timed_beside_another(tuned, monkeypatch):
    q, k, v = tensors()
    op.condensed_attention(q, k, v, LAYOUT, impl="triton")
    with monkeypatch.context() as patch:
        patch.setattr(launch, "architecture", lambda device: 80)
        op.condensed_attention(q, k, v, LAYOUT)
    with monkeypatch.context() as patch:
        patch.delenv("BTOK_AUTOTUNE")
        op.condensed_attention(q, k, v, LAYOUT)
    assert not tuned.titles


class Onlooker(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_nothing_is_searched_where_a_compiler_or_a_mode_looks_on(tuned):
    with Onlooker():
        op.condensed_attention(*tensors(), LAYOUT)
    compiled = torch.compile(op.condensed_attention, backend="eager", fullgraph=True)
    compiled(*tensors(), LAYOUT)
    assert not tuned.titles


def test_a_contest_decides_from_which_length_on():
    def cases(won, dim=128, direction=None, **others):
        """`won`: lengths at which these kernels take less than the plain ones, surely."""
        return [
            {"dim": dim, "length": n, "direction": each, "peer": "triton", "impl": "hopper"}
            | {"interval": [0.7, 0.8] if n in won else [0.9, 0.99]}
            | others
            for n in contest.LENGTHS
            for each in contest.DIRECTIONS
            if direction in (None, each)
        ]

    def least(*found):
        return contest.decided([case for each in found for case in each])

    long = contest.LENGTHS[2:]
    assert least(cases(long)) == {"128": long[0], "64": None}
    assert least(cases(long), cases(contest.LENGTHS, dim=64))["64"] == contest.LENGTHS[0]
    assert least(cases(long[:-1]))["128"] is None  # lost where it is longest
    assert least(cases(long, direction="forward"))["128"] is None  # the other was not timed
    assert least(cases(long, peer="flex"))["128"] is None


@pytest.fixture
def tiny(monkeypatch):
    """Short sequences, and another implementation under the name."""
    monkeypatch.setattr(contest, "ROWS", 64)
    monkeypatch.setattr(op, "no_triton", lambda device, dtype: "not here")
    monkeypatch.setitem(contest.PEERS, "hopper", contest.PEERS["sdpa"])
    monkeypatch.setitem(contest.PEERS, "triton", contest.PEERS["sdpa"])


@pytest.mark.parametrize("direction", contest.DIRECTIONS)
@pytest.mark.parametrize("rival", ["triton", "without turns"])
def test_the_contest_is_held(tiny, rival, direction):
    held = []

    def hold(*names, dtype, **facts):
        held.append((names[:3], [call() for call in names[3:]], facts))

    contest.bench_hopper(hold, 64, 32, rival, direction)
    ((names, (ours, theirs), facts),) = held
    assert names == ("condensed attention", f"hopper, D 64, length 32, {direction}", rival)
    assert len(ours) == len(theirs) == (1 if direction == "forward" else 4)
    case = {"impl": "hopper", "peer": rival, "interval": [0.5, 0.6], **facts}
    assert {"dim": 64, "length": 32, "direction": direction}.items() <= case.items()


def test_wrong_attention_is_not_timed(tiny, monkeypatch):
    def wrong(layout):
        attend = contest.PEERS["sdpa"](layout)
        return lambda q, k, v: 1.1 * attend(q, k, v)

    monkeypatch.setitem(contest.PEERS, "hopper", wrong)
    judge = Contest(None, SimpleNamespace(getoption=lambda name: 1))  # nothing that could time
    with pytest.raises(AssertionError, match="wrong result of ours"):
        contest.bench_hopper(judge, 64, 32, "triton", "forward")


def test_the_contest_is_skipped_where_the_kernels_cannot_run(tiny, monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: 80)
    with pytest.raises(pytest.skip.Exception, match="the device is sm_80, it needs sm_90"):
        contest.bench_hopper(None, 64, 32, "triton", "forward")


def test_a_results_file_says_what_it_is_of(tmp_path, capsys):
    found = {"machine": {"device": "a device"}, "versions": {"triton": "3.9.0"}, "cases": []}
    (tmp_path / "results.json").write_text(json.dumps(found | {"commit": "abc"}))
    contest.main(tmp_path / "results.json", tmp_path / "hopper.json")
    decision = json.loads((tmp_path / "hopper.json").read_text())
    assert decision["device"] == "a device" and decision["triton"] == "3.9.0"
    assert decision["about"]["commit"] == "abc"
    assert capsys.readouterr().out.count("the default should be the plain kernels") == 2


def test_sequences_of_one_length():
    for length in contest.LENGTHS:
        layout = contest.layout_of(length)
        assert {end - start for start, *_, end in layout.sequences()} == {length}
        assert layout.num_rows == contest.ROWS
