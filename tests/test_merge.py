"""`python -m btok merge`: what a mean of checkpoints is, to the bit, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from btok import BTokEncoder
from btok.adapters import Lora
from btok.files import write_json
from btok.model import BTokModel
from btok.processing import Processor
from btok.tools import merge as merge_module
from btok.tools.cli import main
from btok.tools.merge import mean, merge

TEXTS = ["a red seven", "the quick brown fox " * 4, "x"]
LORA = Lora(rank=4, alpha=6, dropout=0, dora=False)


def whole(folder, seed, family="qwen2_vl", dtype=torch.float32, **more):
    model, processor = tiny_module(family, dtype=dtype, seed=seed, **more)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def adapted(base, folder, seed, lora=LORA):
    """Adapters that change what the base model embeds."""
    model = BTokModel.from_pretrained(base, lora=lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    Processor.from_pretrained(base).save_pretrained(folder)
    return folder


def embedded(folder):
    return BTokEncoder.from_pretrained(folder).encode(TEXTS, show_progress=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    place = tmp_path_factory.mktemp("two")
    return whole(place / "a", 0), whole(place / "b", 1)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_weight_1_gives_the_same_bits(two, tmp_path, weights):
    own = [shutil.copytree(folder, tmp_path / folder.name) for folder in two]
    state = [load_file(folder / "model.safetensors") for folder in own]
    (name,) = [name for name in state[0] if name.endswith("layers.0.input_layernorm.weight")]
    state[0][name][:2] = torch.tensor([-0.0, 1e-42])
    state[1][name][2] = -0.0
    for folder, tensors in zip(own, state, strict=True):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    merge(own, weights, tmp_path / "out")
    chosen = own[weights.index(1.0)]
    got, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "out", chosen))
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(got[key].view(torch.int32), tensor.view(torch.int32)), key
    assert (embedded(tmp_path / "out") == embedded(chosen)).all()
    assert not (tmp_path / "out.draft").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_a_mean_is_that_of_each_tensor(family, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "ELEMENTS", 500)  # a few rows at a time
    folders = [whole(tmp_path / str(seed), seed, family, dtype) for seed in range(3)]
    weights = (0.5, 0.75, -0.25)
    merge(folders, weights, tmp_path / "out")
    states = [load_file(folder / "model.safetensors") for folder in folders]
    got = load_file(tmp_path / "out/model.safetensors")
    assert got.keys() == states[0].keys()
    for name, tensor in got.items():
        hand = sum(w * state[name].float() for w, state in zip(weights, states, strict=True))
        assert tensor.dtype == dtype and torch.equal(tensor, hand.to(dtype)), name
    model = BTokModel.from_pretrained(tmp_path / "out")
    assert model.backbone.dtype == dtype
    (report,) = json.loads((tmp_path / "out/merged.json").read_text()).values()
    assert [each["weight"] for each in report] == [*weights]
    digests = [BTokEncoder.from_pretrained(folder).digest for folder in folders]
    assert [each["model"] for each in report] == digests
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    # every other file is there, and says the same
    for path in folders[0].rglob("*"):
        if path.is_file() and not path.name.startswith("model."):
            there = tmp_path / "out" / path.relative_to(folders[0])
            assert there.read_bytes() == path.read_bytes()


def test_half_and_half_by_the_command(two, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    command = ["merge", *map(str, two), "--weights", "0.5", "0.5", "--output", str(out)]
    assert main(command) == 0
    assert "weighted mean of 2 checkpoints" in capsys.readouterr().out
    states = [load_file(folder / "model.safetensors") for folder in (*two, out)]
    for name in states[0]:
        assert torch.equal(states[2][name], (states[0][name] + states[1][name]) / 2)
    assert main(command) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err


def test_weights_in_several_files(two, tmp_path):
    """As a sharded run writes them, moments beside them."""
    parted = shutil.copytree(two[1], tmp_path / "parted")
    state = load_file(parted / "model.safetensors")
    names = sorted(state)
    for number in range(2):
        part = {name: state[name] for name in names[number::2]}
        name = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(part, parted / name, {"format": "pt"})
    (parted / "model.safetensors").unlink()
    for name in ("trainer.json", "btok_calibration.json"):  # of these weights, and this run, alone
        write_json(parted / name, {})
    save_file({"x": torch.ones(1)}, parted / "optimizer.safetensors")
    write_json(parted / "model.safetensors.index.json", {"weight_map": {}})
    merge([two[0], parted], (0.5, 0.5), tmp_path / "out")
    merge(two, (0.5, 0.5), tmp_path / "plain")
    merged = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain")]
    assert merged[0] == merged[1]
    merge([parted, two[0]], (0.5, 0.5), tmp_path / "turned")
    names = {path.name for path in two[0].iterdir()} | {"merged.json"}
    assert {path.name for path in (tmp_path / "turned").iterdir()} == names
    assert (embedded(tmp_path / "turned") == embedded(tmp_path / "plain")).all()


def test_lora_adapters_add_the_mean_of_their_updates(two, tmp_path):
    pytest.importorskip("peft", reason="peft (the extra `peft`) is not installed")
    base, weights = two[0], (0.25, 0.35, 0.4)
    folders = [adapted(base, tmp_path / f"lora{seed}", seed) for seed in range(3)]
    merge(folders, weights, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in folders[0].iterdir()
    } | {"merged.json"}

    def dense(folder):
        """The backbone's weights with the adapters in them."""
        from btok import adapters

        model = BTokModel.from_pretrained(folder)
        if folder != base:
            adapters.merge(model.backbone)
        return {name: w.double() for name, w in model.backbone.state_dict().items()}

    plain, got = dense(base), dense(tmp_path / "out")
    each = [dense(folder) for folder in folders]
    moved = 0.0
    for name, weight in plain.items():
        hand = weight + sum(w * (own[name] - weight) for w, own in zip(weights, each, strict=True))
        assert (got[name] - hand).abs().max() < 1e-6, name
        moved = max(moved, float((got[name] - weight).abs().max()))
    assert moved > 1e-2
    by_hand = BTokModel.from_pretrained(base)
    mixed = {
        name: sum(w * own[name] for w, own in zip(weights, each, strict=True)).float()
        for name in plain
    }
    by_hand.backbone.load_state_dict(mixed)
    hand = BTokEncoder(by_hand, Processor.from_pretrained(base)).encode(TEXTS, show_progress=False)
    assert abs(embedded(tmp_path / "out") - hand).max() < 1e-5
    assert abs(embedded(tmp_path / "out") - embedded(base)).max() > 1e-2
    # the mean of the factors is something else
    states = [load_file(f / "adapter_model.safetensors") for f in (*folders, tmp_path / "out")]
    ranks = {name: [state[name].shape for state in states] for name in states[0]}
    assert any(shapes[3][0] == 3 * shapes[0][0] for shapes in ranks.values())
    merge(folders[:2], (1, 0), tmp_path / "first")
    first = load_file(tmp_path / "first/adapter_model.safetensors")
    assert all(torch.equal(first[name], states[0][name]) for name in states[0])


def changed(folder, out, name, **values):
    """A copy in which a JSON file says something else."""
    shutil.copytree(folder, out)
    write_json(out / name, {**json.loads((out / name).read_text()), **values})
    return out


def refused(capsys, tmp_path, folders, weights=(0.5, 0.5)):
    command = ["merge", *map(str, folders), "--output", str(tmp_path / "out"), "--weights"]
    assert main([*command, *map(str, weights)]) == 2
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.draft").exists()
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5, 0.6), "merge: weights is 0.5 + 0.6 = 1.1, expected 1 in sum"),
        ((0.5, 0.50001), "expected 1 in sum"),
        (("nan", 0.5), "merge: weights has nan, expected finite numbers"),
        (("inf", "-inf"), "merge: weights has inf, expected finite numbers"),
        ((1e308, 1e308), "= inf, expected 1 in sum"),
        ((1.0,), "merge: weights has 1 for 2 checkpoints, expected as many"),
        ((0.3, 0.3, 0.4), "merge: weights has 3 for 2 checkpoints"),
    ],
)
def test_weights_that_are_none(two, tmp_path, capsys, weights, message):
    assert message in refused(capsys, tmp_path, two, weights)


def test_checkpoints_that_differ(two, tmp_path, capsys):
    a, b = two
    (tmp_path / "empty").mkdir()
    other = whole(tmp_path / "llama", 0, "llama")
    wide = whole(tmp_path / "wide", 0, intermediate_size=104)
    half = whole(tmp_path / "half", 0, dtype=torch.bfloat16)
    last = changed(b, tmp_path / "last", "btok_config.json", pooling="last")
    words = changed(b, tmp_path / "words", "tokenizer_config.json", padding_side="middle")
    pixels = changed(b, tmp_path / "pixels", "preprocessor_config.json", max_pixels=4000)
    chat = Path(shutil.copytree(b, tmp_path / "chat"))
    (chat / "chat_template.jinja").write_text("another")
    lacking = Path(shutil.copytree(b, tmp_path / "lacking"))
    (lacking / "tokenizer.json").unlink()
    bare = Path(shutil.copytree(b, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    shaped, fewer = (Path(shutil.copytree(b, tmp_path / name)) for name in ("shaped", "fewer"))
    state = load_file(b / "model.safetensors")
    (norm,) = [name for name in state if name.endswith("model.norm.weight")]
    save_file({**state, norm: state[norm][:9].clone()}, shaped / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != norm}, fewer / "model.safetensors")
    for folder, message in (
        (tmp_path / "empty", "has no config.json, so it is no checkpoint"),
        (other, "btok_config.json of"),
        (wide, "config.json of"),
        (half, "config.json of"),
        (last, "has pooling 'last', of"),
        (words, "tokenizer_config.json of"),
        (pixels, "preprocessor_config.json of"),
        (chat, "chat_template.jinja of"),
        (lacking, "lacking has no tokenizer.json, expected the same files"),
        (bare, "holds no weights as"),
        (shaped, f"merge: {norm} of {shaped} is F32 [9], of {a} F32 [64], expected the same"),
        (fewer, f"{norm} of {fewer} is not there, of {a} F32 [64]"),
    ):
        assert message in refused(capsys, tmp_path, [a, folder]), folder
    assert "checkpoints has 1, expected at least 2" in refused(capsys, tmp_path, [a], (1,))
    (tmp_path / "out").write_text("a file")
    (tmp_path / "new.draft").write_text("a file")
    for name, there in (("out", "out"), ("new", "new.draft")):
        with pytest.raises(ValueError, match=f"{there}, which is a file; expected a folder"):
            merge(two, (0.5, 0.5), tmp_path / name)


def test_weights_below_0_and_outputs_that_are_no_place(two, tmp_path, capsys, monkeypatch):
    a, b = two
    command = ["merge", str(a), str(b), "--weights", "2", "-1", "--output"]
    assert main([*command, str(tmp_path / "out")]) == 0
    states = [load_file(folder / "model.safetensors") for folder in (a, b, tmp_path / "out")]
    for name, tensor in states[2].items():
        assert torch.equal(tensor, 2 * states[0][name] - states[1][name])
    capsys.readouterr()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output, message in (
        (".", "merge: output is ., the folder this runs in; name a new folder"),
        (b / "sub" / "deep", f"sub/deep, which is in the checkpoint {b}; name a new folder"),
    ):
        assert main([*command, str(output)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (b / "sub").exists() and not [*tmp_path.glob("here/*")]


def test_adapters_that_do_not_add_up(two, tmp_path, capsys):
    pytest.importorskip("peft", reason="peft (the extra `peft`) is not installed")
    a, b = two
    plain = adapted(a, tmp_path / "plain", 0)
    dora = adapted(a, tmp_path / "dora", 1, Lora(rank=4, alpha=6, dropout=0, dora=True))
    more = adapted(a, tmp_path / "more", 1, Lora(rank=8, alpha=6, dropout=0, dora=False))
    alpha = adapted(a, tmp_path / "alpha", 1, Lora(rank=4, alpha=7, dropout=0, dora=False))
    elsewhere = adapted(b, tmp_path / "elsewhere", 1)
    for folder, message in (
        (a, f"{plain} has adapters and the other checkpoint none; `python -m btok export {plain}"),
        (
            dora,
            f"the adapters of {dora} have use_dora True, which do not add up; `python -m btok e",
        ),
        (more, f"adapter_config.json of {more} has r 8, of {plain} 4, expected the same"),
        (alpha, "has lora_alpha 7, of"),
        (elsewhere, "expected one base model; `python -m btok export`"),
    ):
        line = refused(capsys, tmp_path, [plain, folder])
        assert message in line or message.split("; ")[0] in line, folder
    assert "which do not add up" in refused(capsys, tmp_path, [dora, dora])


def test_a_draft_is_replaced_and_a_folder_of_that_name_is_not(two, tmp_path):
    draft = tmp_path / "out.draft"
    draft.mkdir()
    (draft / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"output's draft .*out\.draft holds files of others; del"):
        merge(two, (0.5, 0.5), tmp_path / "out")
    assert (draft / "mine.txt").read_text() == "kept"
    (draft / "merged.json").write_text("{}")  # as a call leaves that was killed
    merge(two, (0.5, 0.5), tmp_path / "out")
    assert not draft.exists() and not (tmp_path / "out/mine.txt").exists()


def test_numbers_that_are_no_weights():
    whole_numbers = torch.arange(3)
    assert mean((0.5, 0.5), [whole_numbers, whole_numbers]) is whole_numbers
    with pytest.raises(ValueError, match=r"torch.int64 and differs"):
        mean((0.5, 0.5), [whole_numbers, whole_numbers + 1])
    huge = torch.tensor([3e4], dtype=torch.float16)
    assert mean((0.5, 0.5), [huge, huge]).item() == huge.item()  # not added in float16
    double = torch.tensor([1 + 1e-12], dtype=torch.float64)
    assert mean((0.5, 0.5), [double, double]).item() == double.item()


def test_scalars_and_empty_tensors_of_a_file(two, tmp_path):
    folders = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in two]
    more = {
        "one": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "odd": torch.ones(3, dtype=torch.bool),
    }
    for folder in folders:
        state = load_file(folder / "model.safetensors") | more
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    merge(folders, (0.5, 0.5), tmp_path / "out")
    got = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in more.items())
