"""The single packed pass against an independent two-pass computation, and what follows from it."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BTOKS,
    IMAGE,
    PREFIX,
    SUFFIX,
    VIDEO,
    gradients,
    text,
    tiny_backbone,
    vision,
    worst_gradient,
)

from btok.model import BTokModel
from btok.packing import pack

SAMPLES = [
    (vision([(1, 4, 6)], 1), text(5, 2)),  # image -> text
    (text(7, 3), vision([(1, 4, 4)], 4)),  # text -> image and text
    (vision([(5, 4, 4)], 5, video=True), text(3, 6)),  # a video with more slots than width
    (text(6, 7), None),
    (vision([(1, 4, 4), (1, 6, 4)], 8), vision([(3, 4, 4)], 9, video=True)),  # two images -> video
    (vision([(2, 6, 4)], 10, video=True), None),
    (text(1, 11), text(1, 12)),
]


def positions_by_hand(ids: list[int], grids: list[tuple[int, int, int]]) -> torch.Tensor:
    """Straight from the rule, a token at a time."""
    out, grids, at, row = [], list(grids), 0, 0
    while row < len(ids):
        if ids[row] in (IMAGE, VIDEO):
            t, h, w = grids.pop(0)
            cells = list(itertools.product(range(t), range(h // 2), range(w // 2)))
            out += [(at + a, at + b, at + c) for a, b, c in cells]
            at += max(t, h // 2, w // 2)
            row += len(cells)
        else:
            out.append((at, at, at))
            at, row = at + 1, row + 1
    return torch.tensor(out).T


def side_inputs(side, dtype):
    """(positions, vision arguments of the stock forward)"""
    grids, arguments = [], {}
    for pixels, grid in (
        ("pixel_values", "image_grid_thw"),
        ("pixel_values_videos", "video_grid_thw"),
    ):
        if grid in side:
            arguments |= {pixels: side[pixels].to(dtype), grid: side[grid]}
            grids += side[grid].tolist()
    return grids, arguments


def two_pass(backbone, samples, num_btoks, rule, condense, pooling="btok"):
    """Encode [x ; B] with the stock forward, keep the bottleneck keys and values, then run T."""
    from transformers import DynamicCache

    dtype = backbone.dtype
    embeddings, losses, sums, counts = [], [], 0.0, 0
    for source, target in samples:
        ids = [*source["input_ids"], *BTOKS[:num_btoks]]
        grids, arguments = side_inputs(source, dtype)
        positions = positions_by_hand(ids, grids)
        first = backbone.model(
            input_ids=torch.tensor([ids]),
            position_ids=positions[:, None],
            use_cache=True,
            **arguments,
        )
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
        grids, arguments = side_inputs(target, dtype)
        shift = len(ids) if rule == "reference" else int(positions.max()) + 1
        second = backbone.model(
            input_ids=torch.tensor([target_ids]),
            position_ids=positions_by_hand(target_ids, grids)[:, None] + shift,
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )
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
        target_positions=model.target_positions,
        **options,
    )
    return batch, model(batch)


CASES = [
    # K, target positions, condensed, pooling
    (4, "reference", True, "btok"),
    (4, "continue", True, "btok"),
    (1, "reference", True, "btok"),
    (8, "continue", True, "last"),
    (0, "reference", True, "last"),
    (0, "continue", True, "mean"),
    (4, "reference", False, "btok"),
    (0, "continue", False, "last"),
]


@pytest.mark.parametrize(("num_btoks", "rule", "condense", "pooling"), CASES)
@pytest.mark.parametrize("reduction", ["sample_mean", "token_mean"])
def test_one_packed_pass_equals_two_passes(num_btoks, rule, condense, pooling, reduction):
    backbone = tiny_backbone()
    stock = copy.deepcopy(backbone)
    stock.set_attn_implementation("sdpa")
    model = BTokModel.from_backbone(
        backbone,
        btok_token_ids=BTOKS[:num_btoks],
        pooling=pooling,
        target_positions=rule,
        ntp_reduction=reduction,
    )
    _, output = packed(model, SAMPLES, condense=condense)
    z, by_sample, by_token = two_pass(stock, SAMPLES, num_btoks, rule, condense, pooling)
    ntp = by_sample if reduction == "sample_mean" else by_token

    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    ((output.embeddings * direction).sum() + output.ntp_loss).backward()
    ((z * direction).sum() + ntp).backward()

    assert (output.embeddings - z).abs().max() < 1e-5
    assert abs(output.ntp_loss.item() - ntp.item()) < 1e-5
    error, name = worst_gradient(gradients(backbone), gradients(stock))
    assert error < 1e-4, f"{name}: {error:.2e}"


def test_an_embedding_does_not_depend_on_its_batch():
    model = BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:4])
    rng = random.Random(0)
    samples = [SAMPLES[i % len(SAMPLES)] for i in range(10)]
    samples += [(text(rng.randrange(1, 40), 100 + i), None) for i in range(11)]
    samples += [
        (text(rng.randrange(1, 20), 200 + i), text(rng.randrange(1, 20), i)) for i in range(10)
    ]
    assert len(samples) == 31
    with torch.no_grad():
        alone = torch.cat([packed(model, [sample])[1].embeddings for sample in samples])
        without_target = torch.cat([packed(model, [(s, None)])[1].embeddings for s, _ in samples])
        assert (alone - without_target).abs().max() < 1e-6
        for seed in range(5):
            order = random.Random(seed).sample(range(len(samples)), len(samples))
            together = packed(model, [samples[i] for i in order])[1].embeddings
            assert (together - alone[order]).abs().max() < 1e-6


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


def test_settings_that_do_not_go_together_are_refused():
    backbone = tiny_backbone()
    with pytest.raises(ValueError, match="with K = 0 use pooling='last' or 'mean'"):
        BTokModel.from_backbone(backbone, btok_token_ids=())
    with pytest.raises(ValueError, match="pooling is 'max'"):
        BTokModel.from_backbone(backbone, btok_token_ids=(1,), pooling="max")
    with pytest.raises(ValueError, match="target_positions is 'other'"):
        BTokModel.from_backbone(backbone, btok_token_ids=(1,), target_positions="other")


def test_a_padding_mask_is_refused():
    model = BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:1])
    with pytest.raises(ValueError, match="run the backbone through BTokModel"):
        model.backbone(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.tensor([[1, 0]]))
