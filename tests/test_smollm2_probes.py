"""The probes of the SmolLM2 study: recovery through B alone, figures by hand, the page."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the demo extra")
pytest.importorskip("peft", reason="needs the peft extra")
pytest.importorskip("gguf", reason="needs the gguf extra")

from helpers import tiny_backbone, tiny_module

from bench.models import byte_tokenizer
from btok.adapters import Lora
from btok.data.records import Side
from btok.files import sha256
from btok.model import BTokModel
from btok.packing import pack
from btok.processing import Processor
from examples.smollm2 import fetch, probes, probes_page

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [("a stream of water", "river"), ("to cast a shadow", "dim, shade"), ("x", "y")]
QUICK = ["--inputs", "3", "--lengths", "16", "33", "--btoks", "1", "4", "--seconds", "0.01"]


@pytest.fixture
def tiny():
    model, processor = tiny_module("llama")
    return model.eval(), processor


def sides(processor, which):
    return [processor(Side(pair[which])) for pair in TEXTS]


def packed(model, processor, samples, condense=True):
    return pack(
        samples,
        btok_token_ids=model.btok_token_ids,
        prefix_ids=processor.prefix_ids,
        suffix_ids=processor.suffix_ids,
        backbone_config=model.backbone.config,
        condense=condense,
    )


def bottleneck_rows(model, processor):
    """Where `recover` has the B rows of `TEXTS`, counted by hand."""
    rows, row = [], 0
    for source, target in zip(sides(processor, 0), sides(processor, 1), strict=True):
        row += len(source["input_ids"])
        rows += range(row, row + 4)
        row += 4 + len(processor.prefix_ids) + len(target["input_ids"]) + len(processor.suffix_ids)
    return rows


@pytest.mark.parametrize("condense", [True, False])
def test_another_x_with_the_same_states_of_b_changes_nothing(tiny, condense):
    model, processor = tiny
    sources, targets = sides(processor, 0), sides(processor, 1)
    others = [{"input_ids": source["input_ids"].flip(0) + 1} for source in sources]
    rows, kept = bottleneck_rows(model, processor), []
    layers = model.family.decoder(model.backbone).layers

    def keep(layer, _, states):
        kept.append(states[0, rows].clone())

    def put_back(layer, _, states):
        states = states.clone()
        states[0, rows] = kept.pop(0)
        return states

    def read(sources, hook):
        hooks = [layer.register_forward_hook(hook) for layer in layers]
        found = probes.recover(model, processor, sources, targets, condense)
        for handle in hooks:
            handle.remove()
        return found

    before, after = read(sources, keep), read(others, put_back)
    assert not kept and len(before["loss"]) == 3
    changed = probes.recover(model, processor, others, targets, condense)
    assert changed["loss"] != pytest.approx(before["loss"], rel=1e-3)  # by way of B
    if condense:
        assert after == before
    else:
        assert after["loss"] != pytest.approx(before["loss"], rel=1e-3)


def test_recovered_by_hand(tiny, monkeypatch):
    model, processor = tiny
    sources, targets = sides(processor, 0), sides(processor, 1)
    batch = packed(model, processor, list(zip(sources, targets, strict=True)))
    words = 400
    logits = torch.zeros(len(batch.input_ids), words)
    first, second, third = ((batch.label_samples == i).nonzero()[:, 0] for i in range(3))
    assert [len(each) for each in (first, second, third)] == [6, 11, 2]  # bytes and an end token
    for label in (*first[:3], second[-1]):
        logits[batch.label_rows[label], batch.labels[label]] = 100.0
    monkeypatch.setattr(model, "hidden_states", lambda _: logits)
    monkeypatch.setattr(model.backbone, "lm_head", torch.nn.Identity())
    found = probes.recover(model, processor, sources, targets)
    assert found["loss"] == pytest.approx([math.log(words) * x for x in (3 / 6, 10 / 11, 1)])
    assert found["right"] == pytest.approx([50, 100 / 11, 0]) and found["first"] == [100, 0, 0]


def test_the_mean_loss_is_the_one_that_is_trained(tiny):
    model, processor = tiny
    sources, targets = sides(processor, 0), sides(processor, 1)
    samples = list(zip(sources, targets, strict=True))
    for condense in (True, False):
        with torch.no_grad():
            want = float(model(packed(model, processor, samples, condense)).ntp_loss)
        found = probes.recover(model, processor, sources, targets, condense)["loss"]
        assert sum(found) / 3 == pytest.approx(want, rel=1e-6)


@torch.no_grad()
def greedy(model, processor, source, most):
    """The same as `generate`, all of [x ; B ; T] packed again for each token."""
    written = []
    while len(written) < most:
        target = {"input_ids": written}
        batch = packed(model, processor, [(source, target)])
        states = model.hidden_states(batch)[batch.label_rows[-1:]]
        token = int(model.backbone.lm_head(states).argmax(-1))
        if token == processor.suffix_ids[0]:
            break
        written.append(token)
    return processor.tokenizer.decode(written, skip_special_tokens=True).strip()


def test_greedy_text_comes_from_a_cache_of_the_k_rows(tiny):
    model, processor = tiny
    sources = sides(processor, 0)
    cache = probes.cache_of_b(model, sources)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(3, 2, 4, 16)] * 2
    written = probes.generate(model, processor, sources, most=12)
    assert written == [greedy(model, processor, source, 12) for source in sources]
    assert len(set(written)) == 3  # it depends on x
    assert model.backbone.config._attn_implementation == "condensed"
    assert probes.names_it("Shade, x", "dim, shade") and not probes.names_it("shadow", "dim, shade")
    assert not probes.names_it("", "dim")


def test_attention_by_hand(tiny):
    model, processor = tiny
    (source, *_) = sides(processor, 0)
    length = len(source["input_ids"])
    with torch.no_grad():
        for layer in model.family.decoder(model.backbone).layers:
            layer.self_attn.q_proj.weight.zero_()  # then each row sees all it may see alike
    plain, weighted = probes.attention_of_b(model, source)
    assert plain.shape == weighted.shape == (2, 4, length + 4)
    for k in range(4):
        want = torch.zeros(length + 4)
        want[: length + k + 1] = 1 / (length + k + 1)
        torch.testing.assert_close(plain[:, k], want.expand(2, -1))
    with torch.no_grad():
        ids = probes.with_btoks(model, source)
        embeds = model.backbone.model.embed_tokens(ids)
        layer = model.backbone.model.layers[0]
        values = layer.self_attn.v_proj(layer.input_layernorm(embeds))[0]
    norms = values.unflatten(-1, (2, 16)).norm(dim=-1).sum(1)  # each serves two query heads
    torch.testing.assert_close(weighted[0, -1], norms / norms.sum())
    torch.testing.assert_close(weighted.sum(-1), torch.ones(2, 4))


def test_the_table_of_recovery_by_hand():
    figures = {"right": "50 0", "first": "100 0", "named": "0 100"}
    own, other = {"loss": "1 2", **figures}, {"loss": "2 4", "right": "0 0", "first": "0 100"}
    readings = [
        {"reader": "it", "own": own, "other": other | {"named": "0 0"}},
        {"reader": "untrained", "own": {"loss": "3 3"}, "other": {"loss": "3 5"}},
    ]
    example = {"source": "a | b", "target": "c", "written": {"it": "*c*", "untrained": " "}}
    part = {"inputs": 2, "readings": readings, "examples": [example], "run": {"set": "wordnet"}}
    said = "\n".join(probes_page.recovery_part(part))
    half = 12.706205 * 0.5  # Student's 97.5 % quantile of one degree of freedom; deviation / sqrt 2
    assert (
        f"| it | 1.50 / 3.00 | -1.50 ± {half:.2f} | 25.0 / 0.0 | 50.0 / 50.0 | 50.0 / 0.0 |" in said
    )
    assert "| untrained | 3.00 / 4.00 | -1.00 ± 12.71 |  |  |  |" in said
    assert r"| a \| b | c | \*c\* | (nothing) |" in said


def test_a_wrong_embedding_is_not_timed(tiny, monkeypatch):
    model, processor = tiny
    source = sides(processor, 0)[0]
    probes.check(model, source)
    right = probes.embed(model, [source])
    monkeypatch.setattr(probes, "embed", lambda *_: right + 1e-3)
    with pytest.raises(ValueError, match="the vector of 17 tokens, K = 4 is off by"):
        probes.check(model, source)


@pytest.fixture
def study(tmp_path):
    """A cache folder as the study leaves it, of a tiny model: weights, pairs and two runs."""
    cache = tmp_path / "cache"
    base, tokenizer = cache / "SmolLM2-135M-Instruct", byte_tokenizer()
    backbone = tiny_backbone(layers=3, family="llama")
    backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    backbone.save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [{"query": query, "positive": answer * 9} for query, answer in TEXTS]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    for name in ("wordnet", "debian"):
        folder = cache / "pairs" / name
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text(text * (1 if name == "wordnet" else 40))
        facts = {"sha256": {"test": sha256(folder / "test.jsonl")}}
        (folder / "facts.json").write_text(json.dumps(facts))
    options = dict.fromkeys(probes_page.OF_RUN, 0) | {"steps": 60}
    for name, number in (("wordnet-full-seed0", 4), ("wordnet-last-seed0", 0)):
        run = cache / "runs/smollm2" / name
        trained = BTokModel.from_pretrained(base, num_btoks=number, lora=Lora(rank=2, dora=False))
        torch.manual_seed(0)
        for weight in trained.saved_state().values():
            weight.data.normal_(std=0.1)
        trained.save_pretrained(run / "checkpoint-60")
        Processor.from_pretrained(base, number).save_pretrained(run / "checkpoint-60")
        (run / "checkpoint-60/manifest.json").write_text("{}")
        (run / "config.json").write_text(json.dumps(options))
    return cache


def test_the_command_and_its_page(study, tmp_path, capsys):
    page = tmp_path / "page"
    words = ["--cache", str(study), "--page", str(page)]
    assert probes.main([*words, *QUICK]) == 0, capsys.readouterr().err
    found = json.loads((page / "smollm2-probes.json").read_text())
    assert list(found) == list(probes_page.PROBES)
    recovery, packing = found["recovery"], found["packing"]
    assert [each["reader"] for each in recovery["readings"]] == [
        "wordnet-full-seed0",
        "untrained, K = 4",
    ]
    for reading in recovery["readings"]:
        own, other = (reading[whose] for whose in ("own", "other"))
        assert own.keys() == other.keys() == {"loss", "right", "first", "named"}
        assert all(len(figures.split()) == 3 for figures in own.values())
        assert own["loss"] != other["loss"]
    assert packing["lengths"] == list(probes.PACKED)
    for gap in packing["gaps"]:
        exact = "bf16" not in f"{gap['one']} {gap['other']}"
        # rounding: 1e-6 where vectors are of 256 bits, 2.4e-6 where they are of 512
        assert gap["largest"] < (5e-6 if exact else 0.1), gap
    assert any(gap["largest"] > 1e-4 for gap in packing["gaps"])  # of bf16
    cases = found["overhead"]["cases"]
    assert [(case["num_btoks"], case["tokens"]) for case in cases] == [
        (1, 16),
        (1, 33),
        (4, 16),
        (4, 33),
    ]
    # multiply-adds of a row in a layer: q, o, k, v, and the MLP; of a pair of rows: q k and a v
    keys, others = 2 * 64 * 32, 2 * 64 * 64 + 3 * 64 * 96
    whole = {n: n * (keys + others) + 2 * 64 * n * (n + 1) // 2 for n in (16, 20)}
    short = 2 * whole[16] + 16 * keys + others + 2 * 64 * 16
    long = 2 * whole[20] + 20 * keys + 4 * others + 2 * 64 * (4 * 20 - 6)
    assert cases[2]["modelled"] == pytest.approx(long / short)
    for drawn in found["attention"]["drawn"]:
        shares = torch.tensor(drawn["shares"])
        assert shares.shape == (3, 4, len(drawn["tokens"]) + 1)
        assert shares.sum(-1) == pytest.approx(100, abs=0.2)
    said = (page / "smollm2-probes.md").read_text()
    assert "dequantised Q4_1" in said and "run: `wordnet-full-seed0`, K = 4, steps 60" in said
    assert "--inputs 3 --lengths 16 33 --btoks 1 4 --seconds 0.01 --page FOLDER" in said
    assert str(tmp_path) not in said + json.dumps(found)

    made = {path.name: path.read_bytes() for path in page.iterdir()}
    assert sorted(made) == [
        "smollm2-attention.png",
        "smollm2-overhead.png",
        "smollm2-probes.json",
        "smollm2-probes.md",
    ]
    for path in page.glob("*[md,png]"):
        path.unlink()
    (page / "smollm2-probes.json").write_bytes(made["smollm2-probes.json"])
    assert probes.main(["--from-json", "--page", str(page)]) == 0
    assert {path.name: path.read_bytes() for path in page.iterdir()} == made

    assert probes.main([*words, "--only", "packing"]) == 0
    again = json.loads((page / "smollm2-probes.json").read_text())
    assert again["recovery"] == recovery and again["packing"]["gaps"] == packing["gaps"]
    assert "--only packing" in again["packing"]["settings"]["command"]


def test_a_mistake_is_one_line(study, tmp_path, capsys):
    cache = ["--cache", str(study)]
    (tmp_path / "smollm2-probes.json").write_text('{"packing": ')
    for words, said in (
        ([*cache, "--run", "wordnet-full-seed1"], "finished are wordnet-full-seed0, wordnet-last"),
        ([*cache, "--run", "wordnet-last-seed0"], "of set 'wordnet' with K = 0; expected wordnet"),
        ([*cache, "--runs", str(tmp_path)], "has no last checkpoint; finished are none"),
        (["--only", "all"], "only is ('all',), expected some of recovery, packing, "),
        (["--inputs", "1"], "inputs is 1, expected at least 2"),
        (["--btoks", "0"], "btoks is (0,), expected numbers of at least 1"),
        (["--seconds", "nan"], "seconds is nan, expected above 0"),
        (["--from-json"], "from_json is True, page None"),
        (["--from-json", "--page", str(study)], "which has no smollm2-probes.json"),
        (["--from-json", "--page", str(tmp_path)], "smollm2-probes.json holds no numbers of these"),
        (["--run-name", "x"], "--run-name"),
    ):
        assert probes.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("examples/smollm2/probes.py: ") and said in line


def test_the_committed_page_comes_from_the_committed_numbers(tmp_path):
    committed = ROOT / "bench/results/smollm2-probes.json"
    if not committed.exists():
        pytest.skip("bench/results has no smollm2-probes.json yet")
    probes_page.write_page(json.loads(committed.read_text()), tmp_path)
    for name in ("smollm2-probes.json", "smollm2-probes.md"):
        assert (tmp_path / name).read_bytes() == (committed.parent / name).read_bytes()


@pytest.mark.full
def test_on_the_real_weights():
    try:
        folder = fetch.backbone(fetch.default_cache())
    except (ValueError, ImportError, OSError) as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    model = BTokModel.from_pretrained(folder, num_btoks=4).eval()
    processor = Processor.from_pretrained(folder, 4)
    sources, targets = sides(processor, 0), sides(processor, 1)
    written = probes.generate(model, processor, sources, most=6)
    assert written == [greedy(model, processor, source, 6) for source in sources]
    found = probes.recover(model, processor, sources, targets)
    assert all(1 < loss < 20 for loss in found["loss"])
    probes.check(model, sources[0])
    plain, weighted = probes.attention_of_b(model, sources[0])
    torch.testing.assert_close(plain.sum(-1), torch.ones(30, 4))
    assert plain[..., 0].mean() > 0.3 > weighted[..., 1:-4].max(-1).values.mean()
    gaps = probes.packing(model, sources)["gaps"]
    for gap in gaps:
        exact = "bf16" not in f"{gap['one']} {gap['other']}"
        assert gap["largest"] < (1e-6 if exact else 2e-2), gap
