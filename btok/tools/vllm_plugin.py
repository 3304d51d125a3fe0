"""vLLM serves a checkpoint of ours: the entry point `btok` of its `vllm.general_plugins`.

A checkpoint that pools more than its last row names its architecture `BTok...` in config.json
(`btok.modules`), which a vLLM without this plugin does not know and so does not serve. With it, its
class is vLLM's own for the backbone and its pooler the mean of the K bottleneck rows in fp32; every
other checkpoint of ours is looked at, too. What would give other vectors is refused: at the start
with a ValueError, or of a request with status 400.

Source: vLLM's documentation, "Plugin System" and "Pooling Models"; run with the version below.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from btok.config import CONFIG_NAME, FORMAT_VERSION, BTokConfig
from btok.families import FAMILIES
from btok.modules import ENGINE_PREFIX, stock_pooling

RUN_WITH = "0.32"  # of vLLM: what is used here is not all promised to stay
ANY_VERSION = "BTOK_ANY_VLLM"
# attributes of the configuration that vLLM hands to all of its processes
IDS, SPECIAL, POOLING = "btok_token_ids", "btok_special_ids", "btok_pooling"
BLANK = 8  # tokens up to which an input is looked at for being blank
EXPORT = "python -m btok export FOLDER NEW_FOLDER"


def register() -> None:
    """Called by vLLM in each of its processes; loads no model, and changes none but ours."""
    from vllm import ModelRegistry, __version__

    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        _check_prompts()
    except (ImportError, AttributeError) as error:  # it may serve other models all right
        logging.getLogger("vllm.btok").warning(
            "btok: off in vLLM %s, it was run with %s (%r)", __version__, RUN_WITH, error
        )
        return
    known = ModelRegistry.get_supported_archs()
    for stock in {family.architecture for family in FAMILIES.values()} & set(known):
        if (ours := f"{ENGINE_PREFIX}{stock}") not in MODELS_CONFIG_MAP:
            ModelRegistry.register_model(ours, f"{__name__}:{ours}")
            MODELS_CONFIG_MAP[ours] = _checked(MODELS_CONFIG_MAP.get(stock))


def _checked(stock: Any) -> Any:
    """vLLM's class of settings for ours, which checks what is to be served before vLLM starts
    processes that load it, after the stock architecture's checks.
    """
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class Checked(stock or VerifyAndUpdateConfig):  # type: ignore[misc]
        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            super().verify_and_update_config(vllm_config)
            check(vllm_config)

    return Checked


def check(vllm_config: Any) -> None:
    """Look at what is to be served; what is not of ours is let through.

    Raises:
        ValueError: a checkpoint of ours that this engine, as it is set up, would give other vectors
            of than `btok.BTokEncoder`.
    """
    model = vllm_config.model_config
    if (saved := _saved(model)) is None:
        return
    ids, pooling = [int(i) for i in saved[IDS]], saved["pooling"]
    ours = model.architecture.startswith(ENGINE_PREFIX)
    names = {"lasttoken": "LAST", "mean": "MEAN", None: None}
    stock = names[stock_pooling(BTokConfig(ids, pooling))]
    if model.runner_type != "pooling" and not ours and stock is not None:
        return  # to generate with
    _check_engine(vllm_config, saved, stock)
    special = [] if model.skip_tokenizer_init else _special_ids(model, ids)
    for name, value in ((IDS, ids), (SPECIAL, special), (POOLING, pooling)):
        setattr(model.hf_config, name, value)


def _refuse(model: Any, why: str) -> NoReturn:
    raise ValueError(f"btok: {model.model} is not served: {why}")


def _saved(model: Any) -> dict[str, Any] | None:
    """`btok_config.json` of what is to be served; None for what is not of ours."""
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    try:
        saved = get_hf_file_to_dict(CONFIG_NAME, model.model, model.revision)
    except ValueError as error:
        _refuse(model, f"its {CONFIG_NAME} cannot be read ({error})")
    if saved is None:
        if model.architecture.startswith(ENGINE_PREFIX):
            _refuse(model, f"it is a {model.architecture} and has no {CONFIG_NAME}")
        return None
    if saved.get("format_version") != FORMAT_VERSION:
        _refuse(
            model,
            f"format_version of its {CONFIG_NAME} is {saved.get('format_version')}, expected "
            f"{FORMAT_VERSION}; use the btok that wrote it",
        )
    if IDS not in saved or "pooling" not in saved:
        _refuse(model, f"its {CONFIG_NAME} has no {IDS} or pooling")
    return saved


def _check_engine(vllm_config: Any, saved: Mapping[str, Any], stock: str | None) -> None:
    """Refuse a vLLM, a checkpoint's files and an engine's options that give other vectors; `stock`
    is the pooling of vLLM's that the checkpoint has, if one.
    """
    import vllm
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    model = vllm_config.model_config
    ours = model.architecture.startswith(ENGINE_PREFIX)
    if not vllm.__version__.startswith(f"{RUN_WITH}.") and ANY_VERSION not in os.environ:
        _refuse(
            model,
            f"this is vLLM {vllm.__version__}, the plugin was run with {RUN_WITH}; install that, "
            f"or set {ANY_VERSION}=1 and compare with `python -m btok check-server`",
        )
    if get_hf_file_to_dict("adapter_config.json", model.model, model.revision) is not None:
        _refuse(model, f"it is adapters; `{EXPORT}` merges them")
    if saved.get("vision_positions", "mrope") != "mrope":
        _refuse(model, "its vision_positions are 'text', which vLLM has no way to give")
    folder = Path(model.model)
    moments = any(folder.glob("optimizer*.safetensors"))
    if moments and not (folder / "model.safetensors.index.json").exists():
        _refuse(
            model,
            f"vLLM would load its optimizer's moments for weights; `{EXPORT}` leaves them out",
        )
    if ours and model.runner_type != "pooling":
        _refuse(model, f"it embeds, and the runner is {model.runner_type!r}; leave --runner out")
    rows = getattr(model.pooler_config, "seq_pooling_type", "nothing")
    if not ours and stock != rows:
        _refuse(
            model,
            f"it pools '{saved['pooling']}' of {len(saved[IDS])} bottleneck tokens, as a "
            f"{model.architecture} vLLM would take {rows}; `{EXPORT}` makes one that says what it "
            "is",
        )
    if ours and rows != "MEAN":
        _refuse(model, f"seq_pooling_type is {rows}, and it pools by itself; leave that out")
    if vllm_config.lora_config is not None:
        _refuse(
            model,
            f"adapters go without the K rows that were trained with them; `{EXPORT}` merges them",
        )
    if ours or stock == "MEAN":  # more rows than the last are pooled
        for on, option in (
            (vllm_config.scheduler_config.enable_chunked_prefill, "chunked-prefill"),
            (vllm_config.cache_config.enable_prefix_caching, "prefix-caching"),
        ):
            if on:
                _refuse(
                    model,
                    f"{option.replace('-', ' ')} leaves a step without all rows that are pooled; "
                    f"give --no-enable-{option}",
                )
    if model.pooler_config.enable_chunked_processing:
        _refuse(model, "enable_chunked_processing embeds parts of an input, which is another model")
    if given := getattr(model.multimodal_config, "mm_processor_kwargs", None):
        _refuse(
            model,
            f"mm_processor_kwargs are {given}, which show pictures otherwise than the checkpoint "
            "does; leave them out, and save another size with its processor",
        )


def _special_ids(model: Any, ids: list[int]) -> list[int]:
    """The special tokens of a tokenizer that ends a text with B, and adds nothing else."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model)
    made, plain = (
        list(tokenizer("a", add_special_tokens=added).input_ids) for added in (True, False)
    )
    if made != plain + ids:
        _refuse(
            model,
            f"its tokenizer makes {made} of the text 'a', expected {plain} and the {len(ids)} "
            f"bottleneck tokens {ids}; `{EXPORT}` makes one that does",
        )
    return sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def _check_prompts() -> None:
    """Have vLLM answer 400 to an input of ours that our encoder would refuse, or make other tokens
    of, and look at what is served whatever its architecture is called.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    stock, start = InputProcessor._validate_model_inputs, InputProcessor.__init__
    if hasattr(stock, "checks_btok"):
        return

    def started(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(vllm_config.model_config.hf_config, IDS):
            check(vllm_config)
        start(self, vllm_config, *args, **kwargs)

    def validate(self: Any, encoder_input: Any, decoder_input: Any) -> Any:
        config = self.model_config.hf_config
        if hasattr(config, IDS) and (why := _wrong(decoder_input, config, self.tokenizer)):
            raise VLLMValidationError(f"btok: {why}")
        return stock(self, encoder_input, decoder_input)

    validate.checks_btok = True  # type: ignore[attr-defined]
    InputProcessor._validate_model_inputs = validate
    InputProcessor.__init__ = started


def _wrong(asked: Mapping[str, Any], config: Any, tokenizer: Any) -> str:
    """The reason why tokens are not those that our encoder makes of any input; empty where they may
    be.
    """
    ids, prompt = getattr(config, IDS), asked.get("prompt_token_ids")
    if prompt is None:
        return "an input is embeddings, expected text or tokens"
    end, marks = list(prompt[len(prompt) - len(ids) :]), set(ids)
    count = sum(i in marks for i in prompt)
    if end != ids or count != len(ids):
        return (
            f"an input has {count} bottleneck tokens and ends with {end}, expected the {len(ids)} "
            f"{ids} once, at its end; the checkpoint's tokenizer and chat template do so unless "
            "told otherwise (add_special_tokens, another template, truncation from the right), and "
            "a text may not spell them"
        )
    rest = list(prompt[: len(prompt) - len(ids)])
    brackets = {getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")}
    spans = [span for kind in (asked.get("mm_placeholders") or {}).values() for span in kind]
    for span in spans:  # what stands for pictures, and the brackets around it
        first, last = span.offset, span.offset + span.length
        first -= first > 0 and rest[first - 1] in brackets
        last += last < len(rest) and rest[last] in brackets
        rest[first:last] = [None] * (last - first)
    text = [i for i in rest if i is not None]
    if spelled := set(getattr(config, SPECIAL)).intersection(text):
        names = [tokenizer.decode([i]) for i in sorted(spelled)]
        return f"a text spells {', '.join(names)}, which is a token here and text to the encoder"
    if not spans and (not text or (len(text) <= BLANK and not tokenizer.decode(text).strip())):
        return "an input is empty, expected a text or a picture"
    return ""


def __getattr__(name: str) -> type:
    """Make the registered class of this name, when vLLM asks for it."""
    stock = name.removeprefix(ENGINE_PREFIX)
    if stock == name or stock not in {family.architecture for family in FAMILIES.values()}:
        raise AttributeError(name)
    return globals().setdefault(name, _served(stock))


def _served(architecture: str) -> type:
    """vLLM's class of a backbone with our pooler."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.adapters import as_embedding_model
    from vllm.model_executor.models.interfaces_base import default_pooling_type

    base = ModelRegistry._try_load_model_cls(architecture)

    # MEAN is not what pools here: it has vLLM switch chunked prefill and prefix caching off, under
    # which a step may hold some of the pooled rows alone
    @default_pooling_type(seq_pooling_type="MEAN", tok_pooling_type="ALL")
    class Served(as_embedding_model(base)):  # type: ignore[misc]
        def _init_pooler(self, vllm_config: Any, prefix: str = "") -> Any:
            return _pooler(vllm_config.model_config)

    Served.__name__ = Served.__qualname__ = f"{ENGINE_PREFIX}{architecture}"
    Served.__module__ = __name__
    return _with_our_pixels(Served) if hasattr(Served, "_processor_factory") else Served


def _with_our_pixels(served: type) -> type:
    """The class with pictures resized by Pillow, as models are trained and as we embed: torchvision
    does not round between rows and columns, and gives edges up to 8 of 255 levels others.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY

    stock: Any = served._processor_factory  # type: ignore[attr-defined]

    class Info(stock.info):  # type: ignore[misc]
        def get_hf_processor(self, **kwargs: object) -> Any:
            import transformers

            made = super().get_hf_processor(**kwargs)  # which keeps it, and so what is put into it
            name = type(made.image_processor).__name__
            if not name.endswith("Pil"):
                by_pillow = getattr(transformers, f"{name}Pil")
                made.image_processor = by_pillow.from_dict(made.image_processor.to_dict())
            return made

    register = MULTIMODAL_REGISTRY.register_processor
    return register(stock.processor, info=Info, dummy_inputs=stock.dummy_inputs)(served)


def _pooler(model: Any) -> Any:
    """`embed` is the checkpoint's embedding; `token_embed` the K rows, each of length 1 unless a
    request says `use_activation: false`.
    """
    from vllm.model_executor.layers.pooler import DispatchPooler
    from vllm.model_executor.layers.pooler.activations import PoolerNormalize
    from vllm.model_executor.layers.pooler.seqwise import (
        EmbeddingPoolerHead,
        SequencePooler,
        get_seq_pooling_method,
    )
    from vllm.model_executor.layers.pooler.tokwise import TokenEmbeddingPoolerHead, TokenPooler

    mean, rows = _methods(len(getattr(model.hf_config, IDS)))
    pooling = getattr(model.hf_config, POOLING)
    head = {"head_dtype": model.head_dtype, "activation": PoolerNormalize()}
    pooled = mean if pooling == "btok" else get_seq_pooling_method(pooling.upper())
    poolers = {"embed": SequencePooler(pooling=pooled, head=EmbeddingPoolerHead(**head))}
    if rows is not None:
        tokens = TokenPooler(pooling=rows, head=TokenEmbeddingPoolerHead(**head))
        poolers["token_embed"] = tokens
    return DispatchPooler(poolers)


def _methods(count: int) -> tuple[Any, Any]:
    """vLLM's two pooling methods of the last hidden states: the mean of each prompt's `count` last
    rows, in fp32, and those rows.
    """
    import torch
    from vllm.model_executor.layers.pooler.seqwise import SequencePoolingMethod
    from vllm.model_executor.layers.pooler.tokwise import TokenPoolingMethod

    def last(hidden: Any, metadata: Any) -> Any:  # [N, count, D]
        cursor = metadata.get_pooling_cursor()
        if cursor.is_partial_prefill():
            raise RuntimeError("btok: partial prefill, which was refused at the start")
        ends = cursor.last_token_indices_gpu[:, None]
        return hidden[ends + torch.arange(1 - count, 1, device=ends.device)].float()

    class MeanOfBTokRows(SequencePoolingMethod):
        def forward(self, hidden_states: Any, pooling_metadata: Any) -> Any:
            return last(hidden_states, pooling_metadata).mean(1)

    class BTokRows(TokenPoolingMethod):
        def forward(self, hidden_states: Any, pooling_metadata: Any) -> Any:
            return list(last(hidden_states, pooling_metadata))

    return MeanOfBTokRows(), BTokRows() if count else None
