"""A GGUF file becomes a plain checkpoint with the same weights; one in place of it is explained."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from btok import BTokEncoder, BTokModel
from btok.tools.cli import main
from btok.tools.gguf import export_gguf

gguf = pytest.importorskip("gguf", reason="gguf (the extra `gguf`) is not installed")

HEADS, KV_HEADS, LAYERS = 4, 2, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight, heads):
    """Rows of a projection in GGUF's order: the halves that a rotation pairs alternate."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(path, architecture="llama"):
    """A random Llama of two layers and byte tokens; the model is returned."""
    from tokenizers import pre_tokenizers

    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, letters[0] + letters[1]]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    state = {name: weight.numpy() for name, weight in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for i in range(LAYERS):
        for ours, theirs in NAMES.items():
            weight = state[f"model.layers.{i}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if theirs == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{i}.{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_becomes_a_checkpoint_with_its_weights(tmp_path, capsys):
    model = write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "plain"
    assert main(["export", str(tmp_path / "tiny.gguf"), str(out)]) == 0
    assert "dequantised to float32" in capsys.readouterr().out
    ids = torch.arange(40)[None]
    again = LlamaForCausalLM.from_pretrained(out).eval()
    assert again.config.tie_word_embeddings
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"]
    encoder = BTokEncoder.from_pretrained(out, num_btoks=4)
    assert np.allclose(np.linalg.norm(encoder.encode(["a", "some words"]), axis=1), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "tiny.gguf"]


def test_what_cannot_become_a_checkpoint_is_refused(tmp_path, capsys, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for name, size in (("short", 2000), ("header", 20), ("tail", len(whole) - 500)):
        (tmp_path / f"{name}.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{name}.gguf cannot be read"):
            export_gguf(tmp_path / f"{name}.gguf", tmp_path / "out")
    write_gguf(tmp_path / "other.gguf", "bloom")
    with pytest.raises(ValueError, match=r"other\.gguf"):
        export_gguf(tmp_path / "other.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    assert main(["export", str(tmp_path / "tiny.gguf"), str(tmp_path / "full")]) == 2
    assert "full is not empty; name a new folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none.gguf"), str(tmp_path / "out")]) == 2
    assert "none.gguf, which does not exist; expected a file" in capsys.readouterr().err
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", str(tmp_path / "tiny.gguf"), "."]) == 2
    assert "out is ., the folder this runs in; name a new folder" in capsys.readouterr().err


def test_a_gguf_file_in_place_of_a_checkpoint_is_told_with_what_to_do(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    todo = r"is in GGUF; `python -m btok export .*tiny\.gguf FOLDER` makes"
    for load in (BTokModel.from_pretrained, BTokEncoder.from_pretrained):
        for where in (tmp_path, tmp_path / "tiny.gguf"):
            with pytest.raises(ValueError, match=todo):
                load(where)
