"""LoRA and DoRA of the language model through peft, with the bottleneck tokens' K rows.

Everything else is frozen: the vision tower, the other rows of the embedding matrix, and lm_head,
its K rows included where it shares the matrix. Saved are `adapter_model.safetensors` and
`adapter_config.json`, as peft names them, with the base model's name or path, and its config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from btok.families import family_of
from btok.files import find, read_json
from btok.tokens import add_to_embeddings

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters of the language model, as the paper trains them by default.

    Args:
        rank, alpha: W + alpha / rank B A, with `rank` rows in A.
        dropout: on the adapters' input, in training mode.
        dora: also train each output's magnitude (DoRA).
        targets: names of linear layers; those of every decoder layer.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    dora: bool = True
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


def attach(backbone: Any, lora: Lora, token_ids: Sequence[int], base: str | Path) -> None:
    """Put new adapters into a backbone, changed in place; they and the K rows alone train.

    Args:
        token_ids: the K bottleneck tokens' ids.
        base: the backbone's folder or hub id, which the saved adapters name.

    Raises:
        ImportError: peft is not installed.
        ValueError: no linear layer has a name in `lora.targets`.
    """
    names = "|".join(lora.targets)
    inner = family_of(backbone.config).language_model
    layers = rf"model\.{inner}\.layers" if inner else r"model\.layers"
    config = _peft().LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=rf"{layers}\.\d+\.\w+\.({names})",
        trainable_token_indices=_rows(token_ids),
        base_model_name_or_path=str(Path(base).resolve() if Path(base).exists() else base),
    )
    _inject(backbone, config)


def base_of(name_or_path: str | Path) -> str | None:
    """The base model that a folder or hub id of adapters names; None for any other.

    Raises:
        ValueError: a base model's folder that is not there any more.
    """
    if not (config := read_json(name_or_path, CONFIG_NAME)):
        return None
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise ValueError(
            f"BTokModel: {name_or_path} has adapters of {base}, which is not there; write where it "
            f"is as base_model_name_or_path into {CONFIG_NAME}"
        )
    return base


def save(backbone: Any, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write the adapters of a backbone that has some, with the weights that `state_of` gave."""
    from safetensors.torch import save_file

    backbone.config.save_pretrained(folder)  # for who reads a tokenizer or token ids by it
    backbone.peft_config["default"].save_pretrained(folder)
    state = {PREFIX + name: weight.contiguous() for name, weight in state.items()}
    save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def load(backbone: Any, name_or_path: str | Path, token_ids: Sequence[int]) -> None:
    """Put saved adapters into their base model, changed in place.

    Raises:
        ImportError: peft is not installed.
        ValueError: adapters of other bottleneck tokens or of another architecture; no weights.
    """
    from safetensors.torch import load_file

    file, weights = (find(name_or_path, name) for name in (CONFIG_NAME, WEIGHTS_NAME))
    if file is None or weights is None:
        raise ValueError(f"BTokModel: {name_or_path} has no {WEIGHTS_NAME} or no {CONFIG_NAME}")
    config = _peft().LoraConfig.from_pretrained(str(file.parent))
    if config.trainable_token_indices != _rows(token_ids):
        raise ValueError(
            f"BTokModel: the adapters of {name_or_path} train the rows "
            f"{config.trainable_token_indices}, expected {_rows(token_ids)} for K = "
            f"{len(token_ids)}"
        )
    add_to_embeddings(backbone, token_ids)
    _inject(backbone, config)
    state = {name.removeprefix(PREFIX): weight for name, weight in load_file(weights).items()}
    shapes, expected = ({n: [*w.shape] for n, w in s.items()} for s in (state, state_of(backbone)))
    if shapes != expected:
        name = min(n for n in shapes | expected if shapes.get(n) != expected.get(n))
        raise ValueError(
            f"BTokModel: the adapters of {name_or_path} do not fit {backbone.name_or_path}: {name} "
            f"has shape {shapes.get(name)}, expected {expected.get(name)}"
        )
    _peft().set_peft_model_state_dict(backbone, state)


@contextmanager
def norms_once(backbone: Any) -> Iterator[None]:
    """A context in which DoRA's norms |W + alpha / rank B A| are computed once, on entry, for all
    passes.

    They are constants of a step, and peft makes them in every forward, by way of an identity matrix
    as large as the layer's input. The weights must not change within.
    """
    layers: list[Any] = []
    if hasattr(backbone, "peft_config"):
        from peft.tuners.lora import LoraLayer

        layers = [m for m in backbone.modules() if isinstance(m, LoraLayer)]
    changed = []
    with torch.no_grad():
        for layer in layers:
            for name, dora in layer.lora_magnitude_vector.items():
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                weight = layer.get_base_layer().weight.to(a.dtype)
                norm = dora.get_weight_norm(weight, b @ a, layer.scaling[name])
                if hasattr(norm, "full_tensor"):  # the weights lie on all ranks
                    norm = norm.full_tensor()
                dora.get_weight_norm = partial(_given, norm)
                dora.get_lora_weight = partial(_given, norm)  # nothing else takes it
                changed.append(dora)
    try:
        yield
    finally:
        for dora in changed:
            del dora.get_weight_norm, dora.get_lora_weight


def _given(value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return value


def merge(backbone: Any) -> None:
    """Add the adapters into the weights, in place; a stock model remains.

    A tied lm_head has the trained K rows from then on, which changes a generative loss slightly.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import TrainableTokensWrapper

    for name, module in list(backbone.named_modules()):
        if isinstance(module, TrainableTokensWrapper):
            module = module.token_adapter
        elif not isinstance(module, LoraLayer):
            continue
        module.merge(safe_merge=True)
        backbone.set_submodule(name, module.get_base_layer())
    del backbone.peft_config


def _inject(backbone: Any, config: Any) -> None:
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import cast_adapter_dtype

    tied = backbone.config.tie_word_embeddings
    backbone.config.tie_word_embeddings = False  # or peft has the K rows of lm_head follow
    try:
        _peft().inject_adapter_in_model(config, backbone)
    finally:
        backbone.config.tie_word_embeddings = tied
    cast_adapter_dtype(backbone, "default")  # fp32 in a model of lower precision
    for module in backbone.modules():
        if isinstance(module, TrainableTokensLayer):
            ids = torch.tensor(module.token_indices["default"])
            module.register_buffer("token_ids", ids.to(module.weight.device), persistent=False)
            module.forward = partial(_look_up, module)  # type: ignore[method-assign]
    backbone.train(backbone.training)  # the new dropouts too


def _look_up(layer: Any, ids: torch.Tensor) -> torch.Tensor:
    """The embeddings [..., D] of ids, with the K rows that train in their places.

    Peft puts them into a copy of the whole matrix in every pass, 0.4 GiB for Qwen2-VL-2B.
    """
    found = layer.base_layer(ids)
    trained = layer.trainable_tokens_delta["default"].to(found.dtype)
    is_row = ids[..., None] == layer.token_ids  # [..., K]
    rows = torch.nn.functional.embedding(is_row.int().argmax(-1), trained)
    return torch.where(is_row.any(-1, keepdim=True), rows, found)


def state_of(backbone: Any) -> dict[str, torch.Tensor]:
    """The adapters' weights and the K rows, by peft's names."""
    return _peft().get_peft_model_state_dict(backbone, save_embedding_layers=False)


def _rows(token_ids: Sequence[int]) -> dict[str, list[int]] | None:
    return {"embed_tokens": list(token_ids)} if len(token_ids) else None


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA adapters need peft; install the extra btok[peft]") from error
    return peft
