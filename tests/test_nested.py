"""Budgets of bottleneck tokens, numbers of components, rows as vectors, restored texts and a
teacher's scores: against plain loops, against passes with fewer tokens, in every way of a step."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BTOKS,
    FAMILIES,
    MROPE,
    PREFIX,
    SUFFIX,
    gloo,
    gradients,
    spawn,
    text,
    tiny_backbone,
    tiny_module,
    worst_gradient,
)
from pretend_cuda import Cuda, PretendCuda
from test_model import samples_of, stock_forward, two_pass
from test_step import PAIRS, model_with
from transformers import DynamicCache

from btok.config import BTokConfig
from btok.data.records import Side
from btok.data.samples import pair_samples, to_restore
from btok.model import BTokModel
from btok.objective import Objective
from btok.packing import pack
from train.main import main
from train.microbatches import Packing
from train.pocket.source import train_set
from train.recipes import Recipe
from train.sampler import TrainSet
from train.step import train_step

SCORED = [dataclasses.replace(pair, scores=(2.0 + i, 0.5 * i)) for i, pair in enumerate(PAIRS)]
EVERYTHING = {
    "budgets": (1, 2),
    "dims": (16, 40),
    "multi_vector": 0.4,
    "reconstruction_weight": 0.3,
    "distillation_weight": 0.2,
    "hardness": 3.0,
    "margin": 0.3,
}
RECIPE = Recipe(
    caption_steps=0,
    negatives="batch",
    ntp_weight=0.7,
    group_size=3,
    groups_per_batch=4,
    temperature=0.1,
    reuse_vision=False,
)


def packed(samples, model, number, **options):
    return pack(
        samples,
        btok_token_ids=BTOKS[:number],
        prefix_ids=PREFIX,
        suffix_ids=SUFFIX,
        backbone_config=model.backbone.config,
        **options,
    )


@pytest.mark.parametrize("rule", ["reference", "continue"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_is_a_pass_with_so_many_tokens(family, rule):
    """Rows and generative loss of one pass with all K, beside passes with the first k alone: ours,
    and the stock model's two with a cache."""
    backbone = tiny_backbone(family=family)
    stock = copy.deepcopy(backbone)
    stock.set_attn_implementation("sdpa")
    model = BTokModel.from_backbone(backbone, btok_token_ids=BTOKS[:4]).eval()
    samples = samples_of(family)
    rng = random.Random(0)
    budgets = [rng.choice([1, 2, 3, 4]) for _ in samples]
    for condense in (True, False):
        options = {"target_positions": rule, "condense": condense}
        whole = packed(samples, model, 4, budgets=budgets, **options)
        assert whole.layout.bounds.shape[1] == 5
        with torch.no_grad():
            output = model(whole)
            losses = []
            for i, (sample, k) in enumerate(zip(samples, budgets, strict=True)):
                alone = model(packed([sample], model, k, **options))
                assert (output.rows[i, :k] - alone.rows[0]).abs().max() < 1e-5
                pooled = F.normalize(output.rows[i, :k].mean(0), dim=0)
                assert (pooled - alone.embeddings[0]).abs().max() < 1e-5
                if sample[1] is not None:
                    embedding, loss, _ = two_pass(stock, [sample], k, rule, condense)
                    assert (pooled - embedding[0]).abs().max() < 1e-5
                    assert abs(loss - alone.ntp_loss) < 1e-5
                losses += [] if alone.ntp_loss is None else [alone.ntp_loss]
        assert output.ntp_loss.item() == pytest.approx(sum(losses).item() / len(losses), abs=1e-5)
    assert family not in MROPE or (whole.position_ids[0] != whole.position_ids[1]).any()


def test_a_target_trains_the_tokens_of_its_budget_alone():
    model = BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:4])
    embeds = []

    def keep(module, arguments, out):
        out.retain_grad()
        embeds.append(out)

    model.backbone.model.get_input_embeddings().register_forward_hook(keep)
    for k in (1, 3, 4):
        batch = packed([(text(7, 1), text(5, 2))], model, 4, budgets=[k])
        model(batch).ntp_loss.backward()
        of_rows = embeds.pop().grad[batch.btok_rows[0]].abs().amax(1)
        assert (of_rows[:k] > 0).all() and (of_rows[k:] == 0).all()


def loops(objective, rows, ids):
    """The contrastive loss of [2 n, K, D] by plain loops, without hardness, margin and teacher."""
    n, number, dim = len(ids), *rows.shape[1:]
    total, count = 0.0, 0
    for k in objective.budgets or [number]:
        for d in [*objective.dims, dim]:
            cut = rows[:, :k, :d]
            for late, share in ((0, 1 - objective.multi_vector), (1, objective.multi_vector)):
                losses = []
                for i in range(n):
                    logits = []
                    for j in range(n):
                        a, b = cut[i], cut[n + j]
                        if late:
                            cosines = [[F.cosine_similarity(x, y, dim=0) for y in b] for x in a]
                            s = sum(max(row) for row in cosines) / k
                        else:
                            s = F.cosine_similarity(a.mean(0), b.mean(0), dim=0)
                        if i == j or ids[i] != ids[j]:
                            logits.append(s / objective.temperature)
                        positive = s / objective.temperature if i == j else None
                        if positive is not None:
                            own = positive
                    losses.append(torch.stack(logits).logsumexp(0) - own)
                total += share * sum(losses) / n
            count += 1
    return total / count


@pytest.mark.parametrize(
    "settings",
    [
        {"budgets": (1, 3)},
        {"multi_vector": 1.0},
        {"budgets": (2, 3), "dims": (4, 6), "multi_vector": 0.3},
    ],
    ids=str,
)
def test_the_views_by_plain_loops(settings):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(10, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([1, 2, 2, 3, 4])
    objective = Objective(temperature=0.2, **settings)
    assert objective.takes_rows
    loss = objective.contrastive(rows, ids)
    expected = loops(objective, rows, ids)
    assert abs(loss - expected) < 1e-10
    gradients = [torch.autograd.grad(x, rows)[0] for x in (loss, expected)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-10


def test_components_alone_need_no_rows():
    z = F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=1)
    ids, objective = torch.tensor([1, 2, 3]), Objective(temperature=0.2, dims=(2, 4))
    plain = Objective(temperature=0.2)
    parts = [plain.contrastive(F.normalize(z[:, :d], dim=1), ids) for d in (2, 4, 8)]
    assert not objective.takes_rows
    assert abs(objective.contrastive(z, ids) - sum(parts) / 3) < 1e-12


@pytest.mark.parametrize("late", [False, True])
def test_a_teacher_by_plain_loops(late):
    generator = torch.Generator().manual_seed(2)
    shape = (12, 3, 8) if late else (12, 8)
    vectors = F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
    scores = torch.tensor([[3.0, 1.0, -1.0], [0.5, 2.0, 0.0], [9.0, 8.0, 1.0]])
    ids = torch.tensor([1, 2, 3])

    def similar(a, b):
        return (a @ b.T).amax(1).mean() if late else a @ b

    for kind in ("kl", "margin_mse"):
        expected = 0.0
        for i in range(3):
            ours = torch.stack([similar(vectors[i], vectors[3 * c + i]) for c in (1, 2, 3)]) / 0.3
            teacher = scores[i].double() / 2.0
            if kind == "kl":
                p = teacher.softmax(0)
                expected += sum(p[c] * (p[c].log() - ours.softmax(0)[c].log()) for c in range(3))
            else:
                gaps = [(ours[0] - ours[c]) - (teacher[0] - teacher[c]) for c in (1, 2)]
                expected += sum(gap**2 for gap in gaps) / 2
        options = {"temperature": 0.3, "multi_vector": 1.0 if late else 0.0}
        alone = Objective(**options).contrastive(vectors, ids)
        objective = Objective(
            **options, distillation=kind, distillation_weight=0.7, teacher_temperature=2.0
        )
        followed = objective.contrastive(vectors, ids, scores=scores)
        assert abs(followed - alone - 0.7 * expected / 3) < 1e-10, kind


def test_what_is_restored():
    """Hidden tokens are not shown, they alone are labels, and each loss is a mean over its own."""
    model = BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:4]).eval()
    ids = text(6, 3)["input_ids"]
    draws = np.array([5, 1, 9, 3, 8, 7], np.uint64) << np.uint64(60)
    target = to_restore({"input_ids": ids}, 0.45, draws)
    assert target["masked"].tolist() == [True, True, False, True, False, True]
    assert to_restore({"input_ids": ids}, 1e-9, draws)["masked"].tolist() == [0, 1, 0, 0, 0, 0]
    samples = [(text(4, 1), target), (text(5, 2), text(3, 4)), (text(3, 5), None)]
    batch = packed(samples, model, 4, mask_token_id=99)
    _, _, border, end = batch.layout.bounds[0].tolist()
    shown = [99 if hidden else i for i, hidden in zip(ids, target["masked"], strict=True)]
    assert batch.input_ids[border:end].tolist() == [*PREFIX, *shown, *SUFFIX]
    assert batch.labels[:4].tolist() == [i for i, x in zip(ids, target["masked"], strict=True) if x]
    first = border + len(PREFIX)
    rows = [first + i - 1 for i, hidden in enumerate(target["masked"]) if hidden]
    assert batch.label_rows[:4].tolist() == rows
    assert (batch.num_targets, batch.num_restored, batch.num_restored_labels) == (1, 1, 4)
    assert batch.restored.tolist() == [True] * 4 + [False] * 4
    for reduction in ("sample_mean", "token_mean"):
        model.settings = dataclasses.replace(model.settings, ntp_reduction=reduction)
        output = model(batch)
        logits = model.backbone.lm_head(model.hidden_states(batch)[batch.label_rows])
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        assert output.reconstruction_loss.item() == pytest.approx(losses[:4].mean().item())
        assert output.ntp_loss.item() == pytest.approx(losses[4:].mean().item())
        assert model.reconstruction_count(batch) == (1 if reduction == "sample_mean" else 4)
        assert model.ntp_count(batch) == (1 if reduction == "sample_mean" else 4)
    with pytest.raises(ValueError, match="mask_token_id is None, and sample 0 is to restore"):
        packed(samples, model, 4)


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_restoring_is_the_stock_models_two_passes(family):
    """[x ; B] with a cache, then the copy with its hidden tokens on the keys of B alone."""
    backbone = tiny_backbone(family=family)
    stock = copy.deepcopy(backbone)
    stock.set_attn_implementation("sdpa")
    model = BTokModel.from_backbone(backbone, btok_token_ids=BTOKS[:4]).eval()
    source, copied = text(9, 1), text(9, 1)["input_ids"]
    draws = np.random.default_rng(0).integers(0, 2**64, 9, np.uint64)
    target = to_restore({"input_ids": copied}, 0.5, draws)
    with torch.no_grad():
        loss = model(packed([(source, target)], model, 4, mask_token_id=99)).reconstruction_loss
        first, _ = stock_forward(stock, family, [*source["input_ids"], *BTOKS[:4]], source)
        cache = DynamicCache()
        for index, layer in enumerate(first.past_key_values.layers):
            cache.update(layer.keys[:, :, -4:], layer.values[:, :, -4:], index)
        shown = np.where(target["masked"], 99, copied).tolist()
        ids = [*PREFIX, *shown, *SUFFIX]
        second, _ = stock_forward(stock, family, ids, {}, 13, cache)
        logits = stock.lm_head(second.last_hidden_state[0])
    places = len(PREFIX) + np.flatnonzero(target["masked"]) - 1
    wanted = torch.tensor(copied)[torch.from_numpy(target["masked"])]
    assert abs(F.cross_entropy(logits[places], wanted) - loss) < 1e-5


def step(pairs=SCORED, *, train_all=False, device="cpu", first=0, dropout=0.0, **settings):
    """Gradients and losses of a step with everything; budgets and hidden tokens are those of each
    pair's number, `first` for the first one."""
    model, processor = model_with(train_all=train_all, dropout=dropout)
    recipe = dataclasses.replace(RECIPE, **EVERYTHING | settings)
    samples = pair_samples(pairs, processor)
    budgets = []
    for i, (source, target) in enumerate(samples):
        kind, number = divmod(i, len(pairs))
        rng = np.random.default_rng([kind, first + number])
        budgets.append(int(rng.choice(recipe.budgets)) if recipe.budgets else 4)
        side = (pairs[number].query, pairs[number].positive)[kind] if kind < 2 else Side()
        if target is None and side.text and recipe.reconstruction_weight:
            written = processor(Side(side.text))
            draws = rng.integers(0, 2**64, len(written["input_ids"]), np.uint64)
            samples[i] = source, to_restore(written, 0.5, draws)
    model.to(device)
    torch.manual_seed(7)
    microbatches = Packing.of(model, processor, recipe).microbatches(samples, None, budgets)
    losses = train_step(model, recipe, pairs, microbatches, 0).losses
    found = gradients(model)
    if device == "cuda":
        found = {name: g.values if isinstance(g, Cuda) else g for name, g in found.items()}
    return found, [float(loss) for loss in losses]


def compare(got, want, name):
    error, tensor = worst_gradient(got[0], want[0])
    assert error < 1e-5, f"{name}, {tensor}: {error:.1e}"
    assert got[1] == pytest.approx(want[1], rel=1e-6), name


@pytest.mark.parametrize("train_all", [False, True])
def test_every_way_of_a_step_gives_the_same_gradients(train_all):
    want = step(train_all=train_all)
    assert all(loss > 0.1 for loss in want[1])
    for chunk, gradcache in itertools.product((None, 120, 1), (False, True)):
        options = {"chunk_tokens": chunk, "gradcache": gradcache, "reuse_vision": gradcache}
        compare(step(train_all=train_all, **options), want, options)


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_each_setting_matters(name):
    without = {"budgets": (), "dims": (), "margin": None}.get(name, 0.0)
    error, _ = worst_gradient(step(**{name: without})[0], step()[0])
    assert error > 1e-4


def test_dropout_is_drawn_alike_in_both_passes():
    want = step(dropout=0.05, chunk_tokens=120)
    compare(step(dropout=0.05, chunk_tokens=120, gradcache=True), want, "dropout")


RANKS = {
    "one pass": {},
    "gradcache": {"chunk_tokens": 120, "gradcache": True, "reuse_vision": True},
}


CUTS = {2: (0, 7, 12), 4: (0, 3, 5, 9, 12)}  # ranks hold unequal parts of the batch


def on_a_rank(rank, world, folder):
    torch.set_num_threads(1)
    first, last = CUTS[world][rank : rank + 2]
    mine = SCORED[first:last]
    with gloo(folder, rank, world):
        results = {name: step(mine, first=first, **options) for name, options in RANKS.items()}
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_gradients_of_one_process(tmp_path, world, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spawn(on_a_rank, (world, str(tmp_path)), nprocs=world)
    want = step()
    for rank in range(world):
        for name, got in torch.load(tmp_path / f"{rank}.pt").items():
            compare(got, want, (rank, name))


@pytest.mark.parametrize("gradcache", [False, True])
def test_a_step_on_a_pretended_gpu(gradcache):
    options = {"gradcache": gradcache, "chunk_tokens": 120}
    want = step(**options)
    with PretendCuda():
        found = step(device="cuda", **options)
    assert found[1] == want[1]
    for name, gradient in want[0].items():
        assert torch.equal(found[0][name], gradient), name


def test_a_warm_up_has_the_generative_losses_alone():
    options = {"contrastive_from": 1}
    want = step(**options)
    assert want[1][1] == 0
    assert want[1][0] == pytest.approx(0.7 * want[1][2] + 0.3 * want[1][3], rel=1e-6)
    for more in ({"chunk_tokens": 120}, {"chunk_tokens": 1, "gradcache": True}):
        compare(step(**options, **more), want, more)


def test_draws_do_not_depend_on_the_ranks():
    _, processor = tiny_module()
    recipe = Recipe(
        caption_steps=0, num_btoks=4, budgets=(1, 2), reconstruction_weight=1.0, ntp_side="none"
    )

    def drawn(step, rank=0, world=1):
        made = train_set(recipe, processor, rank, world)[step]
        hidden = [None if t is None else t["masked"].tolist() for _, t in made.samples]
        return dict(zip(made.places, zip(made.budgets, hidden, strict=True), strict=True))

    alone, size = drawn(5), recipe.group_size
    for rank in range(2):
        part = drawn(5, rank, 2)
        half = len(part) // 2
        for place, found in part.items():
            kind, among = divmod(place, half)
            group, own = divmod(among, size)
            assert found == alone[kind * 2 * half + (2 * group + rank) * size + own]
    assert {budget for budget, _ in alone.values()} == {1, 2, 4}
    assert sum(hidden is not None for _, hidden in alone.values()) > len(alone) // 2


def test_draws_are_others_in_each_step():
    """Of the same pairs, in the same places."""
    _, processor = tiny_module()
    recipe = Recipe(
        caption_steps=0, num_btoks=4, budgets=(1, 2), reconstruction_weight=1.0, ntp_side="none"
    )
    steps = train_set(recipe, processor)
    same = TrainSet(recipe, processor, steps.sources, groups=lambda step: steps.groups(7))
    first, second = same[5], same[6]
    for (one, _), (other, _) in zip(first.samples, second.samples, strict=True):
        assert list(one["input_ids"]) == list(other["input_ids"])
    hidden = [[t["masked"].tolist() for _, t in made.samples if t] for made in (first, second)]
    assert first.budgets != second.budgets and hidden[0] != hidden[1]
    assert len(hidden[0]) > 10 and same[5].budgets == first.budgets


def test_targets_see_the_budgets_that_were_drawn():
    model, processor = tiny_module()
    recipe = Recipe(caption_steps=0, num_btoks=4, budgets=(1, 2), chunk_tokens=300)
    made = train_set(recipe, processor)[3]
    drawn = dict(zip(made.places, made.budgets, strict=True))
    seen = {}
    for m in Packing.of(model, processor, recipe)(made).microbatches:
        for place, (_, first, last, border, _) in zip(
            m.places, m.batch.layout.sequences(), strict=True
        ):
            assert first == border - 4
            seen[place] = last - first
    assert seen == drawn and set(seen.values()) == {1, 2, 4}
    plain = dataclasses.replace(recipe, budgets=())
    made = train_set(plain, processor)[3]
    for m in Packing.of(model, processor, plain)(made).microbatches:
        assert m.batch.layout.bounds.shape[1] == 4


def test_a_run_keeps_what_it_was_trained_for(tmp_path):
    words = "--caption-steps 1 --steps 2 --eval-queries 0 --group-size 4 --groups-per-batch 2"
    words += " --budgets 1 2 --dims 16 --multi-vector 0.5 --reconstruction-weight 0.2 --output"
    assert main(["pocket", *words.split(), str(tmp_path)]) == 0
    model = BTokModel.from_pretrained(tmp_path / "checkpoint-3")
    kept = model.settings
    assert (kept.budgets, kept.dims, kept.multi_vector) == ((1, 2, 4), (16,), True)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(row["reconstruction"] > 0 for row in log[1:])
    small = BTokModel.from_pretrained(tmp_path / "checkpoint-3", num_btoks=2)
    assert small.settings.btok_token_ids == kept.btok_token_ids[:2]
    assert small.settings.budgets == (1, 2)
    source = text(9, 0)
    with torch.no_grad():
        rows = [m.eval()(m.pack([source])).rows for m in (model, small)]
    assert (rows[0][:, :2] - rows[1]).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"num_btoks is 3, but .* it was trained for 1, 2, 4"):
        BTokModel.from_pretrained(tmp_path / "checkpoint-3", num_btoks=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": (1, 8)}, r"budgets is \(1, 8\), expected numbers up to num_btoks, 4"),
        ({"budgets": (2, 1)}, r"budgets is \(2, 1\), expected rising numbers above 0"),
        ({"dims": (0, 4)}, r"dims is \(0, 4\), expected rising numbers above 0"),
        ({"budgets": (1,), "pooling": "last"}, "pooling is 'last', expected 'btok' with budgets"),
        ({"multi_vector": 0.5, "num_btoks": 0}, "pooling is 'last', expected 'btok' with .* multi"),
        ({"multi_vector": 1.5}, "multi_vector is 1.5, expected from 0 to 1"),
        ({"mask_rate": 0.0}, "mask_rate is 0.0, expected above 0"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight is -1.0, expected at least 0"),
        (
            {"contrastive_from": 3, "ntp_weight": 0.0},
            "is 3, and step 2 has nothing else",
        ),
        ({"contrastive_from": 3, "ntp_steps": 2}, "is 3, and step 2 has nothing else"),
        ({"hardness": float("inf")}, "hardness is inf, expected a finite number"),
        (
            {"reconstruction_weight": float("inf")},
            "n_weight is inf, expected a finite",
        ),
        ({"margin": float("nan")}, "margin is nan, expected a finite number"),
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0.0, expected above 0"),
    ],
    ids=str,
)
def test_recipes_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


def test_dims_are_below_the_models():
    with pytest.raises(ValueError, match=r"dims is \(16, 64\), expected .* below the model's 64"):
        BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:4], dims=(16, 64))


def test_a_run_whose_model_has_fewer_components_is_refused(tmp_path, capsys):
    words = "--caption-steps 1 --steps 1 --eval-queries 0 --dims 16 128 --output"
    assert main(["pocket", *words.split(), str(tmp_path / "run")]) == 2
    assert "dims is (16, 128), expected numbers below the model's 128" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_config_says_what_it_was_trained_for(tmp_path):
    config = BTokConfig(BTOKS[:4], budgets=[1, 2, 4], dims=[8], multi_vector=True)
    assert config.with_btoks(2) == BTokConfig(
        BTOKS[:2], budgets=(1, 2), dims=(8,), multi_vector=True
    )
    for wrong, message in (
        ({"budgets": (1, 2)}, r"budgets is \(1, 2\), expected numbers up to num_btoks, 4"),
        ({"dims": (8, 4)}, r"dims is \(8, 4\), expected rising"),
        ({"multi_vector": True, "pooling": "last"}, "pooling is 'last', expected 'btok'"),
    ):
        with pytest.raises(ValueError, match=message):
            BTokConfig(BTOKS[:4], **wrong)
    with pytest.raises(ValueError, match="num_btoks is 8, it was trained for 1, 2, 4"):
        config.with_btoks(8)
    config.save(tmp_path, "qwen2")
    assert BTokConfig.load(tmp_path, "qwen2", None, dims=(8,), multi_vector=True) == config
    for name, value in (("budgets", (3, 4)), ("dims", (7,)), ("multi_vector", False)):
        with pytest.raises(ValueError, match=f"{name} is .*, but .* was saved with"):
            BTokConfig.load(tmp_path, "qwen2", None, **{name: value})


def run_of(tmp_path, **more):
    rows = [{"query": f"q{i}", "positive": f"p{i}", **more} for i in range(4)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"--data {path} --caption-steps 0 --eval-queries 0 --group-size 2 --groups-per-batch 1"
    words += f" --distillation-weight 1 --steps 1 --output {tmp_path / 'run'}"
    return main(["pocket", *words.split()])


def test_a_teacher_needs_scores(tmp_path, capsys):
    for lacking in ({}, {"negatives": ["n"]}, {"scores": [1.0]}):
        assert run_of(tmp_path, **lacking) == 2
        assert "data set pairs has no scores of negatives" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert run_of(tmp_path, negatives=["n"], scores=[1.5, -0.5]) == 0
