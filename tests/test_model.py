"""The single packed pass against an independent two-pass computation, and what follows from it."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BTOKS,
    FAMILIES,
    IMAGE,
    MROPE,
    PREFIX,
    SUFFIX,
    TINY,
    VIDEO,
    VISION,
    gradients,
    text,
    tiny_backbone,
    tiny_tokenizer,
    vision,
    worst_gradient,
)

from btok import families
from btok.config import BTokConfig
from btok.model import BTokModel
from btok.packing import pack
from btok.processing import Processor

SAMPLES = [
    (vision([(1, 4, 6)], 1), text(5, 2)),  # image -> text
    (text(7, 3), vision([(1, 4, 4)], 4)),  # text -> image and text
    (vision([(5, 4, 4)], 5, video=True), text(3, 6)),  # a video with more slots than width
    (text(6, 7), None),
    (vision([(1, 4, 4), (1, 6, 4)], 8), vision([(3, 4, 4)], 9, video=True)),  # two images -> video
    (vision([(2, 6, 4)], 10, video=True), None),
    (text(1, 11), text(1, 12)),
]
TEXTS = [(text(5 + i, i), text(9 - 2 * i, 30 + i) if i != 2 else None) for i in range(5)]


def samples_of(family: str) -> list:
    """The same, as a processor of the family gives them."""
    if family not in VISION:
        return TEXTS
    side = TINY[family].side
    return [tuple(None if s is None else side(s) for s in pair) for pair in SAMPLES]


def positions_by_hand(family: str, side: dict, ids: list[int]) -> torch.Tensor:
    """Straight from the rule, a token at a time."""
    if family not in MROPE:
        return torch.arange(len(ids)).expand(3, -1)
    images = [(grid, 1) for grid in side.get("image_grid_thw", torch.empty(0, 3)).tolist()]
    videos = [(grid, 1) for grid in side.get("video_grid_thw", torch.empty(0, 3)).tolist()]
    if family == "qwen2_5_vl":
        seconds = side.get("second_per_grid_ts", torch.empty(0)).tolist()
        videos = [(grid, 2 * second) for (grid, _), second in zip(videos, seconds, strict=True)]
    if family == "qwen3_vl":
        videos = [((1, h, w), 1) for (t, h, w), _ in videos for _ in range(t)]
    out, at, row = [], 0, 0
    while row < len(ids):
        if ids[row] in (IMAGE, VIDEO):
            (t, h, w), step = (images if ids[row] == IMAGE else videos).pop(0)
            cells = list(itertools.product(range(t), range(h // 2), range(w // 2)))
            out += [(at + int(a * step), at + b, at + c) for a, b, c in cells]
            at = max(max(place) for place in out) + 1
            row += len(cells)
        else:
            out.append((at, at, at))
            at, row = at + 1, row + 1
    return torch.tensor(out).T


def stock_forward(backbone, family, ids, side, shift=0, cache=None, flat=False):
    """The stock model over one sequence; (output, its own positions without the shift)."""
    positions = torch.arange(len(ids)).expand(3, -1)
    if not flat:
        positions = positions_by_hand(family, side, ids)
    inputs = {
        name: value.to(backbone.dtype) if value.is_floating_point() else value
        for name, value in TINY[family].stock(side).items()
    }
    output = backbone.model(
        input_ids=torch.tensor([ids]),
        position_ids=(positions[:, None] if family in MROPE else positions[:1]) + shift,
        past_key_values=cache,
        use_cache=True,
        **inputs,
    )
    return output, positions


def two_pass(backbone, samples, num_btoks, rule, condense, pooling="btok", flat=False):
    """Encode [x ; B] with the stock forward, keep the bottleneck keys and values, then run T."""
    from transformers import DynamicCache

    family = backbone.config.model_type
    embeddings, losses, sums, counts = [], [], 0.0, 0
    for source, target in samples:
        ids = [*source["input_ids"], *BTOKS[:num_btoks]]
        first, positions = stock_forward(backbone, family, ids, source, flat=flat)
        hidden = first.last_hidden_state[0]
        rows = {"btok": hidden[-num_btoks:], "last": hidden[-1:], "mean": hidden}[pooling]
        embeddings.append(F.normalize(rows.mean(0), dim=0))
        if target is None:
            continue
        keep = max(num_btoks, 1) if condense else len(ids)
        cache = DynamicCache()
        for index, layer in enumerate(first.past_key_values.layers):
            cache.update(layer.keys[:, :, -keep:], layer.values[:, :, -keep:], index)
        target_ids = [*PREFIX, *target["input_ids"], *SUFFIX]
        shift = len(ids) if rule == "reference" else int(positions.max()) + 1
        second, _ = stock_forward(backbone, family, target_ids, target, shift, cache, flat)
        labels = torch.tensor(target_ids)
        labels[: len(PREFIX)] = -100
        labels[(labels == IMAGE) | (labels == VIDEO)] = -100
        logits = backbone.lm_head(second.last_hidden_state[0])
        loss = F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
        number = int((labels[1:] != -100).sum())
        losses.append(loss / number)
        sums, counts = sums + loss, counts + number
    return torch.stack(embeddings), torch.stack(losses).mean(), sums / counts


def packed(model, samples, **options):
    batch = pack(
        samples,
        btok_token_ids=model.btok_token_ids,
        prefix_ids=PREFIX,
        suffix_ids=SUFFIX,
        backbone_config=model.backbone.config,
        target_positions=model.settings.target_positions,
        **options,
    )
    return batch, model(batch)


CASES = [
    # K, target positions, condensed, pooling, NTP reduction
    (4, "reference", True, "btok", "sample_mean"),
    (4, "continue", True, "btok", "token_mean"),
    (1, "reference", True, "btok", "token_mean"),
    (8, "continue", True, "last", "sample_mean"),
    (0, "reference", True, "last", "sample_mean"),
    (0, "continue", True, "mean", "token_mean"),
    (4, "reference", False, "btok", "sample_mean"),
    (0, "continue", False, "last", "sample_mean"),
]
ALL_CASES = itertools.product(
    (0, 1, 4, 8),
    ("reference", "continue"),
    (True, False),
    ("btok", "last", "mean"),
    ("sample_mean", "token_mean"),
)
LONG_CASES = [case for case in ALL_CASES if (case[0] or case[3] != "btok") and case not in CASES]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in LONG_CASES)], ids=str
)
def test_one_packed_pass_equals_two_passes(family, case):
    compare_with_two_passes(family, *case)


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("rule", ["reference", "continue"])
def test_text_positions_for_vision_equal_two_passes(family, rule):
    compare_with_two_passes(family, 4, rule, True, "btok", "sample_mean", vision_positions="text")


@pytest.mark.parametrize(("family", "option"), [("qwen3", "mrope"), ("qwen2_vl", "text")])
def test_one_axis_is_counted_from_each_sequences_start(family, option):
    """Rotations are relative: the comparison does not see a sequence moved as a whole."""
    model = BTokModel.from_backbone(
        tiny_backbone(family=family), btok_token_ids=BTOKS[:2], vision_positions=option
    )
    seen = []
    inner = model.backbone.model
    getattr(inner, "language_model", inner).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    source = vision([(1, 4, 4)], 1) if option == "text" else text(10, 1)
    packed(model, [(source, text(2, 0)), (text(3, 2), None)])
    assert seen == [[[*range(17), *range(5)]]]


def compare_with_two_passes(
    family, num_btoks, rule, condense, pooling, reduction, vision_positions="mrope"
):
    backbone, samples = tiny_backbone(family=family), samples_of(family)
    stock = copy.deepcopy(backbone)
    stock.set_attn_implementation("sdpa")
    model = BTokModel.from_backbone(
        backbone,
        btok_token_ids=BTOKS[:num_btoks],
        pooling=pooling,
        target_positions=rule,
        vision_positions=vision_positions,
        ntp_reduction=reduction,
    )
    _, output = packed(model, samples, condense=condense)
    flat = vision_positions == "text"
    z, by_sample, by_token = two_pass(stock, samples, num_btoks, rule, condense, pooling, flat)
    ntp = by_sample if reduction == "sample_mean" else by_token

    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    ((output.embeddings * direction).sum() + output.ntp_loss).backward()
    ((z * direction).sum() + ntp).backward()

    assert (output.embeddings - z).abs().max() < 1e-5
    assert abs(output.ntp_loss.item() - ntp.item()) < 1e-5
    error, name = worst_gradient(gradients(backbone), gradients(stock))
    assert error < 1e-4, f"{name}: {error:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_does_not_depend_on_its_batch(family):
    model = BTokModel.from_backbone(tiny_backbone(family=family), btok_token_ids=BTOKS[:4])
    rng = random.Random(0)
    samples = (samples_of(family) * 2)[:10]
    samples += [(text(rng.randrange(1, 40), 100 + i), None) for i in range(11)]
    samples += [
        (text(rng.randrange(1, 20), 200 + i), text(rng.randrange(1, 20), i)) for i in range(10)
    ]
    assert len(samples) == 31
    with torch.no_grad():
        alone = torch.cat([packed(model, [sample])[1].embeddings for sample in samples])
        without_target = torch.cat([packed(model, [(s, None)])[1].embeddings for s, _ in samples])
        assert (alone - without_target).abs().max() < 1e-6
        for seed in range(3):
            order = random.Random(seed).sample(range(len(samples)), len(samples))
            together = packed(model, [samples[i] for i in order])[1].embeddings
            assert (together - alone[order]).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_its_batch_moves_an_embedding_within_its_own_rounding(family):
    """A component lies within 2e-2 of the same weights' in fp32, whatever the batch, and so within
    the same of itself in another batch: kernels for other shapes may round otherwise."""
    samples = (samples_of(family) * 2)[:10] + [(text(1 + i, 100 + i), None) for i in range(21)]
    sources = [source for source, _ in samples]
    for seed in range(3):
        backbone = tiny_backbone(seed, torch.bfloat16, family=family)
        wide = BTokModel.from_backbone(copy.deepcopy(backbone).float(), btok_token_ids=BTOKS[:4])
        model = BTokModel.from_backbone(backbone, btok_token_ids=BTOKS[:4])
        alone = torch.cat([model(model.pack([source])).embeddings for source in sources])
        exact = wide(wide.pack(sources)).embeddings
        order = random.Random(seed).sample(range(len(sources)), len(sources))
        together = model(model.pack([sources[i] for i in order])).embeddings
        assert 1e-4 < (alone - exact).abs().max() < 2e-2
        assert (together - exact[order]).abs().max() < 2e-2
        assert (together - alone[order]).abs().max() < 2e-2


def test_the_source_reaches_the_target_only_through_the_bottleneck_tokens():
    model = BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:4])
    batch, _ = packed(model, SAMPLES[:1])
    start, first, border, _ = batch.layout.bounds[0].tolist()
    seen = {}

    def cut_bottleneck(module, arguments, output):
        """No layer may hand anything on through the bottleneck rows."""
        return torch.cat(
            [output[:, :first], output[:, first:border].detach(), output[:, border:]], 1
        )

    for cut in (False, True):
        hooks = []
        if cut:
            layers = model.backbone.model.language_model.layers
            hooks = [layer.register_forward_hook(cut_bottleneck) for layer in layers]
        embedding = model.backbone.get_input_embeddings()

        def keep(module, arguments, output):
            output.retain_grad()
            seen["embeds"] = output

        hooks.append(embedding.register_forward_hook(keep))
        model(batch).ntp_loss.backward()
        for hook in hooks:
            hook.remove()
        text_rows = [row for row in range(start, first) if batch.input_ids[row] != IMAGE]
        gradient = seen["embeds"].grad[text_rows].abs().max()
        assert (gradient == 0) == cut


def test_a_batch_without_targets_has_no_generative_loss():
    model = BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:4])
    _, output = packed(model, [(text(3, 0), None)])
    assert output.ntp_loss is None
    assert output.embeddings.shape == (1, 64)
    assert torch.allclose(output.embeddings.norm(dim=1), torch.ones(1))


def test_a_batch_packed_without_bottleneck_tokens_has_a_loss_and_no_embeddings():
    backbone = tiny_backbone(dtype=torch.bfloat16)
    model = BTokModel.from_backbone(backbone, btok_token_ids=BTOKS[:4])
    whole = packed(model, SAMPLES)[1]
    config, ends = backbone.config, {"prefix_ids": PREFIX, "suffix_ids": SUFFIX}
    output = model(pack(SAMPLES, btok_token_ids=(), backbone_config=config, **ends))
    assert output.embeddings.shape == (0, 64) and output.rows is None
    assert output.embeddings.dtype == whole.embeddings.dtype == torch.float32
    assert output.ntp_loss.isfinite() and output.ntp_loss != whole.ntp_loss


def test_every_architecture_is_compared():
    assert set(families.FAMILIES) == set(FAMILIES)


def test_settings_that_do_not_go_together_are_refused():
    backbone = tiny_backbone()
    with pytest.raises(ValueError, match="with K = 0 use pooling='last' or 'mean'"):
        BTokModel.from_backbone(backbone, btok_token_ids=())
    with pytest.raises(ValueError, match="pooling is 'max'"):
        BTokModel.from_backbone(backbone, btok_token_ids=(1,), pooling="max")
    with pytest.raises(ValueError, match="target_positions is 'other'"):
        BTokModel.from_backbone(backbone, btok_token_ids=(1,), target_positions="other")

    with pytest.raises(ValueError, match="vision_positions is '2d'"):
        BTokModel.from_backbone(backbone, btok_token_ids=(1,), vision_positions="2d")


def test_gemma_3_is_refused_with_the_reason(tmp_path):
    from transformers import Gemma3Config, Gemma3TextConfig

    kinds = {"gemma3": Gemma3Config, "gemma3_text": Gemma3TextConfig}
    for name, config in kinds.items():
        config().save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"'{name}' .*window of keys.*expected one of"):
            BTokModel.from_pretrained(tmp_path / name)
    windows = Gemma3TextConfig().layer_types
    assert windows.count("sliding_attention") > len(windows) / 2


def test_sliding_windows_are_refused():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=120,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    )
    with pytest.raises(ValueError, match="use_sliding_window=False"):
        BTokModel.from_backbone(Qwen2ForCausalLM(config), btok_token_ids=(1,))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_each_family_comes_back_bit_for_bit(family, tmp_path):
    model = BTokModel.from_backbone(
        tiny_backbone(family=family),
        btok_token_ids=BTOKS[:3],
        target_positions="continue",
        vision_positions="text",
        ntp_reduction="token_mean",
    )
    model.save_pretrained(tmp_path)
    again = BTokModel.from_pretrained(tmp_path)
    assert type(again.backbone) is type(model.backbone)
    assert again.settings == model.settings
    assert model.settings == BTokConfig(BTOKS[:3], "btok", "continue", "text", "token_mean")
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    with torch.no_grad():
        (_, one), (_, other) = (packed(m, samples_of(family)) for m in (model, again))
    assert torch.equal(one.embeddings, other.embeddings)
    assert torch.equal(one.ntp_loss, other.ntp_loss)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_itself_loads_a_checkpoint(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    model = BTokModel.from_backbone(tiny_backbone(family=family), btok_token_ids=BTOKS[:3])
    model.save_pretrained(tmp_path)
    assert "condensed" not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path).model_type == family
    auto = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
    stock = auto.from_pretrained(tmp_path)
    saved, loaded = model.backbone.state_dict(), stock.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    sample = text(9, 1)
    ids = torch.tensor([[*sample["input_ids"], *BTOKS[:3]]])
    rows = stock(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -3:]
    expected = F.normalize(rows.mean(0), dim=0)
    assert (model(model.pack([sample])).embeddings[0] - expected).abs().max() < 1e-6


def test_a_checkpoint_older_than_vision_positions_has_mrope(tmp_path):
    BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:3]).save_pretrained(tmp_path)
    file = tmp_path / "btok_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("vision_positions") == "mrope"
    file.write_text(json.dumps(settings))
    assert BTokModel.from_pretrained(tmp_path).settings.vision_positions == "mrope"
    assert BTokModel.from_pretrained(tmp_path, vision_positions="mrope").btok_token_ids == BTOKS[:3]
    with pytest.raises(ValueError, match="vision_positions is 'text', but"):
        BTokModel.from_pretrained(tmp_path, vision_positions="text")


def test_another_architecture_is_refused(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    bert = BertForMaskedLM(config)
    with pytest.raises(ValueError, match="backbone is 'bert', expected one of"):
        BTokModel.from_backbone(bert, btok_token_ids=(1,))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is 'bert', expected one of"):
        BTokModel.from_pretrained(tmp_path / "bert")
    # weights of one architecture under the settings of another
    model = BTokModel.from_backbone(tiny_backbone(family="qwen3"), btok_token_ids=BTOKS[:3])
    model.save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    file.write_text(file.read_text().replace('"qwen3"', '"llama"'))
    with pytest.raises(ValueError, match=r"architecture is 'llama', but .* saved with 'qwen3'"):
        BTokModel.from_pretrained(tmp_path / "ours")


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_pickled_weights_are_refused_and_not_opened(tmp_path):
    backbone, folder = tiny_backbone(family="qwen3"), tmp_path / "pickled"
    backbone.config.save_pretrained(folder)
    torch.save(
        {**backbone.state_dict(), "trap": _Trap(tmp_path / "ran")}, folder / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"no safetensors weights.*pickled ones can run code"):
        BTokModel.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["custom", "qwen3"])
def test_code_that_comes_with_a_checkpoint_is_never_run(kind, tmp_path):
    folder = tmp_path / "remote"
    tiny_backbone(family="qwen3").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "trap.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
        "from transformers import Qwen3Config as Config, Qwen3ForCausalLM as Model\n"
        "from transformers import PreTrainedTokenizerFast as Tokenizer\n"
    )
    for name, keys in (
        ("config.json", {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "trap.Tokenizer"]}),
    ):
        content = json.loads((folder / name).read_text()) | {"auto_map": keys}
        if "model_type" in content:
            content["model_type"] = kind
        (folder / name).write_text(json.dumps(content))
    if kind == "custom":
        with pytest.raises(ValueError, match="is 'custom', expected one of"):
            BTokModel.from_pretrained(folder)
    else:
        assert BTokModel.from_pretrained(folder).backbone.config.model_type == "qwen3"
        Processor.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_a_padding_mask_is_refused():
    model = BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:1])
    with pytest.raises(ValueError, match="run the backbone through BTokModel"):
        model.backbone(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.tensor([[1, 0]]))
