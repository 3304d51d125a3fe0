"""Bottleneck tokens in the vocabulary, and checkpoints that carry them."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import BTOKS, text, tiny_backbone, tiny_tokenizer

from btok.model import BTokModel
from btok.packing import pack
from btok.tokens import add_to_embeddings, add_to_tokenizer


def embed(model):
    batch = pack(
        [(text(6, 1), None)],
        btok_token_ids=model.btok_token_ids,
        prefix_ids=(),
        suffix_ids=(),
        backbone_config=model.backbone.config,
    )
    with torch.no_grad():
        return model.eval()(batch).embeddings


def test_tokens_are_added_once():
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    assert add_to_tokenizer(tokenizer, 3) == [size, size + 1, size + 2]
    assert add_to_tokenizer(tokenizer, 4) == [size, size + 1, size + 2, size + 3]
    assert tokenizer.encode("<|btok_1|>") == [size + 1]
    with pytest.raises(ValueError, match="num_btoks is -1"):
        add_to_tokenizer(tokenizer, -1)


def test_spare_rows_are_kept_as_they_are():
    backbone = tiny_backbone()
    before = backbone.get_input_embeddings().weight.clone()
    add_to_embeddings(backbone, BTOKS)
    assert torch.equal(backbone.get_input_embeddings().weight, before)


def test_new_rows_follow_the_existing_ones_and_stay_tied():
    rows = []
    for _ in range(2):
        backbone = tiny_backbone()
        old = backbone.get_input_embeddings().weight.detach().clone()
        add_to_embeddings(backbone, [120, 121, 150], seed=3)
        weight = backbone.get_input_embeddings().weight.detach()
        assert weight.shape[0] == 151 and torch.equal(weight[:120], old)
        assert backbone.lm_head.weight is backbone.get_input_embeddings().weight
        assert backbone.config.text_config.vocab_size == 151
        assert 0.5 < float(weight[120:].std() / old.std()) < 2
        rows.append(weight[120:])
    assert torch.equal(*rows)


def test_init_from_the_end_token():
    backbone = tiny_backbone()
    add_to_embeddings(backbone, BTOKS, init="eos")
    weight = backbone.get_input_embeddings().weight
    assert torch.equal(weight[list(BTOKS)], weight[1].expand(len(BTOKS), -1))
    with pytest.raises(ValueError, match="init is 'zero'"):
        add_to_embeddings(backbone, BTOKS, init="zero")


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    model = BTokModel.from_backbone(
        tiny_backbone(), btok_token_ids=BTOKS[:3], target_positions="continue"
    )
    model.save_pretrained(tmp_path)
    again = BTokModel.from_pretrained(tmp_path)
    assert again.btok_token_ids == BTOKS[:3]
    assert (again.settings.pooling, again.settings.target_positions) == ("btok", "continue")
    assert torch.equal(embed(again), embed(model))
    settings = json.loads((tmp_path / "btok_config.json").read_text())
    assert settings["format_version"] == 1 and settings["num_btoks"] == 3


def test_a_plain_checkpoint_gets_bottleneck_tokens(tmp_path):
    tiny_backbone().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = BTokModel.from_pretrained(tmp_path)
    assert model.btok_token_ids == tuple(range(len(tokenizer), len(tokenizer) + 4))
    baseline = BTokModel.from_pretrained(tmp_path, num_btoks=0)
    assert baseline.btok_token_ids == () and baseline.settings.pooling == "last"


def test_a_checkpoint_with_other_settings_is_refused(tmp_path):
    model = BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:3])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_btoks is 4, but .* was saved with 3"):
        BTokModel.from_pretrained(tmp_path, num_btoks=4)
    with pytest.raises(ValueError, match="pooling is 'last'"):
        BTokModel.from_pretrained(tmp_path, pooling="last")
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "bert"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is 'bert', expected one of"):
        BTokModel.from_pretrained(tmp_path)
