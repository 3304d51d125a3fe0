"""What else a real decoder lets one ask of a trained run of the study: four probes and their page.

    python examples/smollm2/probes.py [--run wordnet-full-seed0] --page bench/results
    python examples/smollm2/probes.py --only overhead --page bench/results     one of them again
    python examples/smollm2/probes.py --from-json --page bench/results         the page alone

recovery   how much of a target the bottleneck rows hold: next-token loss and greedy text of T that
           sees B and earlier T alone, beside the same with the B of another input
packing    how far the embedding of [x ; B] moves when others are packed with it, fp32 and bf16
overhead   wall time of [x ; B] over last-token pooling of x on the same pretrained weights
attention  what the B rows attend to in x, as a picture

Every probe's numbers go into FOLDER/smollm2-probes.json, and the page and pictures are made of that
file alone. A probe that is not asked for keeps the numbers it has there.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_encoding import predicted
from bench.harness import settle_allocator
from bench.models import Shape
from btok import adapters
from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.label_loss import at_least_fp32
from btok.model import BTokModel, model_digest
from btok.packing import Sample, group_by_tokens, pack
from btok.processing import Processor
from btok.tools import command_line
from examples.smollm2 import pairs
from examples.smollm2.fetch import backbone, default_cache
from examples.smollm2.probes_page import OF_RUN, PROBES, STEM, before, page, write_page
from examples.smollm2.runs import PACKAGES, SIDES
from examples.smollm2.study import RESULTS
from examples.studies.duel import duel
from examples.studies.provenance import surroundings

PROG = "examples/smollm2/probes.py"
CODE = tuple(f"examples/smollm2/{name}.py" for name in ("fetch", "pairs", "probes"))
OTHERS = ("tokens", "no-mask")  # variants that are read beside the run
SHOWN, DRAWN = 10, 3  # test inputs whose text is shown, and whose attention is drawn
PACKED = (1, 7, 12, 16, 31, 64, 100, 129, 200, 333)  # tokens of the inputs that are packed
Sides = Sequence[Mapping[str, Any]]  # as the processor gives them


@dataclass(frozen=True)
class Options:
    """The command line."""

    cache: Path = field(default_factory=default_cache)
    """Folder of weights and data."""
    runs: Path | None = None
    """Folder of trained runs; None for runs/smollm2 in the cache."""
    run: str = "wordnet-full-seed0"
    """The run that is probed: one with bottleneck tokens."""
    page: Path | None = None
    """Folder of the page, its pictures and numbers; None prints the page alone."""
    from_json: bool = False
    """Run nothing: make the page and pictures of the numbers that are there."""
    only: tuple[str, ...] = PROBES
    """Probes to run."""
    inputs: int = 200
    """Test pairs that are recovered."""
    lengths: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    """Tokens of an input whose overhead is timed."""
    btoks: tuple[int, ...] = (1, 4, 16)
    """Numbers K whose overhead is timed."""
    seconds: float = 8.0
    """That the pairs of a timed case take, about; at least 7 pairs, at most 101."""

    def __post_init__(self) -> None:
        if self.inputs < 2:
            raise ValueError(f"inputs is {self.inputs}, expected at least 2: each is read by two")
        for name in ("lengths", "btoks"):
            if not (had := getattr(self, name)) or min(had) < 1:
                raise ValueError(f"{name} is {had}, expected numbers of at least 1")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}, expected above 0")
        if not self.only or set(self.only) - set(PROBES):
            raise ValueError(f"only is {self.only}, expected some of {', '.join(PROBES)}")
        if self.from_json and self.page is None:
            raise ValueError("from_json is True, page None; expected the folder of the JSON file")

    @property
    def folder(self) -> Path:
        """The folder of the trained runs."""
        return self.runs or self.cache / "runs" / "smollm2"

    @property
    def command(self) -> str:
        """The command line that makes the same numbers, but for folders."""
        words = ["python", PROG, "--run", self.run]
        for name in ("only", "inputs", "lengths", "btoks", "seconds"):
            if (had := getattr(self, name)) != getattr(Options, name):
                words += [f"--{name}", *map(str, had if isinstance(had, tuple) else (had,))]
        return shlex.join(words)


class Probed(NamedTuple):
    """A run to be probed.

    Args:
        facts: its name, options, digest and commit.
        texts: (source, target) of its set's test pairs, the target on the side it generates.
    """

    encoder: BTokEncoder
    facts: dict[str, Any]
    texts: Sequence[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for a mistake or for what cannot be had, told in
    one line.
    """
    try:
        options = command_line.parse(Options, sys.argv[1:] if argv is None else argv, PROG)
        found = before(options.page) if options.page else {}
        if options.from_json and not found:
            raise ValueError(f"page is {options.page}, which has no {STEM}.json")
        for name, numbers in () if options.from_json else probe(options):
            found[name] = numbers
            if options.page:  # what is done is kept if the next is stopped
                write_page(found, options.page)
        if options.from_json and options.page:
            write_page(found, options.page)
        elif options.page is None:
            print(page(found), end="")
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    return 0


def probe(options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    """The probes that were asked for, one after the other: its name; its numbers, with what they
    depend on.
    """
    settings = {"command": options.command, **surroundings(*CODE, packages=PACKAGES)}
    settings["load"] = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    calls: dict[str, Callable[[Probed], dict[str, Any]]] = {
        "recovery": partial(recovery, options),
        "packing": lambda run: packing(run.encoder.model, packed_sources(options.cache, run)),
        "attention": attention,
    }
    for name in sorted(options.only, key=PROBES.index):
        if name == "overhead":  # of the pretrained weights, whichever run there is
            facts, numbers = {}, overhead(backbone(options.cache), options)
        else:
            probed = load_run(options)
            facts, numbers = probed.facts, calls[name](probed)
        yield name, {"settings": settings, "run": facts, **numbers}
        print(f"{name}: done", file=sys.stderr, flush=True)


@cache
def load_run(options: Options) -> Probed:
    """The run of that name, with the test pairs of the set it was trained on.

    Raises:
        ValueError: no such run, one that is not finished, or one without bottleneck tokens.
    """
    runs, name = options.folder, options.run
    if (checkpoint := finished(runs, name)) is None:
        there = sorted(path.name for path in runs.glob("*") if finished(runs, path.name))
        raise ValueError(
            f"run is {name!r}, of which {runs} has no last checkpoint; finished are "
            f"{', '.join(there) or 'none'}"
        )
    encoder = command_line.load(str(checkpoint))
    encoder.model.eval()
    number = len(encoder.model.btok_token_ids)
    trained_on = next((each for each in SIDES if each in name.split("-")), "")
    if not number or not trained_on:
        raise ValueError(
            f"run is {name!r}, of set {trained_on!r} with K = {number}; expected "
            f"{' or '.join(SIDES)}, and K above 0"
        )
    config = json.loads((runs / name / "config.json").read_text("utf-8"))
    record = RESULTS / f"{name}.json"
    commit = json.loads(record.read_text("utf-8"))["settings"]["commit"] if record.exists() else ""
    facts = {"name": name, "set": trained_on, "num_btoks": number}
    facts |= {key: config[key] for key in OF_RUN}
    facts |= {"digest": model_digest(checkpoint), "commit": commit or "not recorded"}
    one, other = (0, 1) if SIDES[trained_on] == "positive" else (1, 0)
    texts = pairs.load(options.cache, trained_on).pairs("test")
    return Probed(encoder, facts, [(pair[one], pair[other]) for pair in texts])


def finished(runs: Path, name: str) -> Path | None:
    """A run's last checkpoint, if it has come to its last step."""
    config = runs / name / "config.json"
    steps = json.loads(config.read_text("utf-8"))["steps"] if config.exists() else 0
    checkpoint = runs / name / f"checkpoint-{steps}"
    return checkpoint if (checkpoint / "manifest.json").exists() else None


def recovery(options: Options, probed: Probed) -> dict[str, Any]:
    """The run, those of `OTHERS` with its seed that are finished, and an untrained model, each read
    with the right B and with the B of the input before.

    Returns:
        `readings`, with the figures of N inputs as texts of N numbers, and `examples`.
    """
    name, texts = options.run, probed.texts[: options.inputs]
    readers = [(name, True, probed.encoder)]
    for other in OTHERS:
        sibling = name.replace("-full-", f"-{other}-")
        if sibling != name and (checkpoint := finished(options.folder, sibling)):
            readers.append((sibling, True, command_line.load(str(checkpoint))))
    if "no-mask" in readers[-1][0]:
        readers.append((f"{readers[-1][0]}, T sees x", False, readers[-1][2]))
    number = probed.facts["num_btoks"]
    untrained = command_line.load(str(backbone(options.cache)), num_btoks=number)
    readers.append((f"untrained, K = {number}", True, untrained))
    readings, written = [], {}
    for says, condense, encoder in readers:
        print(f"  {says}", file=sys.stderr, flush=True)
        model, processor = encoder.model.eval(), encoder.processor
        sources, targets = ([processor(Side(pair[side])) for pair in texts] for side in (0, 1))
        if condense:  # only then is all that T sees a cache of K rows
            written[says] = generate(model, processor, sources)
        reading: dict[str, Any] = {"reader": says}
        for whose, shift in (("own", 0), ("other", 1)):
            read = [(i - shift) % len(texts) for i in range(len(texts))]
            figures = recover(model, processor, [sources[i] for i in read], targets, condense)
            if condense:
                wrote = zip((written[says][i] for i in read), texts, strict=True)
                figures["named"] = [100.0 * names_it(text, pair[1]) for text, pair in wrote]
            reading[whose] = {key: " ".join(f"{x:.4g}" for x in f) for key, f in figures.items()}
        readings.append(reading)
    examples = [
        {"source": source, "target": target, "written": {r: w[i] for r, w in written.items()}}
        for i, (source, target) in enumerate(texts[:SHOWN])
    ]
    return {"inputs": len(texts), "readings": readings, "examples": examples}


def names_it(written: str, answer: str) -> bool:
    """Whether one of a text's parts, between commas, is one of the answer's."""
    of_text, of_answer = ({p.strip().lower() for p in t.split(",")} for t in (written, answer))
    return not of_text.isdisjoint(of_answer)


@torch.inference_mode()
def recover(
    model: BTokModel, processor: Processor, sources: Sides, targets: Sides, condense: bool = True
) -> dict[str, list[float]]:
    """Read each target through its source's bottleneck rows, every token given those before it.

    Args:
        condense: False lets the target see the source as well.

    Returns:
        By input, over its counted tokens: the mean `loss` -log p in nats; the share `right` that
        are the most probable ones, in percent; the same of the `first`, which has only B to go by.
    """
    samples: list[Sample] = list(zip(sources, targets, strict=True))
    found: dict[str, list[float]] = {"loss": [], "right": [], "first": []}
    lengths = [sum(len(side["input_ids"]) for side in sample if side) for sample in samples]
    for turn in group_by_tokens(lengths, 2048):
        batch = pack(
            [samples[i] for i in turn],
            btok_token_ids=model.btok_token_ids,
            prefix_ids=processor.prefix_ids,
            suffix_ids=processor.suffix_ids,
            backbone_config=model.backbone.config,
            target_positions=model.settings.target_positions,
            condense=condense,
        ).to(model.backbone.device)
        states = model.hidden_states(batch)[batch.label_rows]
        logits = at_least_fp32(model.backbone.lm_head(states))  # [R, vocabulary]
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        right = 100.0 * (logits.argmax(-1) == batch.labels)
        for sample in range(len(turn)):
            mine = batch.label_samples == sample
            found["loss"].append(float(losses[mine].mean()))
            found["right"].append(float(right[mine].mean()))
            found["first"].append(float(right[mine][0]))
    return found


@contextmanager
def transformers_attention(model: BTokModel, name: str) -> Iterator[Any]:
    """The backbone with one of transformers' own attentions within, to be called as a stock one."""
    model.backbone.set_attn_implementation(name)
    try:
        yield model.backbone
    finally:
        model.backbone.set_attn_implementation("condensed")


@torch.inference_mode()
def cache_of_b(model: BTokModel, sources: Sides) -> Any:
    """The keys and values of the K rows of each [x ; B], without those of x.

    Returns:
        transformers' DynamicCache: in every layer [N, Hkv, K, head dim], keys and values.
    """
    from transformers import DynamicCache

    number, cache = len(model.btok_token_ids), DynamicCache()
    kept = []
    with transformers_attention(model, "sdpa") as stock:
        for source in sources:
            whole = stock.model(input_ids=with_btoks(model, source), use_cache=True).past_key_values
            kept.append([[t[:, :, -number:] for t in (x.keys, x.values)] for x in whole.layers])
    for index, layer in enumerate(zip(*kept, strict=True)):
        keys, values = (torch.cat(part) for part in zip(*layer, strict=True))
        cache.update(keys, values, index)
    return cache


@torch.inference_mode()
def generate(model: BTokModel, processor: Processor, sources: Sides, most: int = 24) -> list[str]:
    """The most probable continuation, token by token, of what opens a target behind B alone.

    It ends with what closes a target, or after `most` tokens; special tokens are left out.
    """
    cache = cache_of_b(model, sources)
    device, end = model.backbone.device, processor.suffix_ids[0]
    lengths = [len(source["input_ids"]) + len(model.btok_token_ids) for source in sources]
    # rows of [x ; B] count, as if x were still there
    at = torch.tensor(lengths)[:, None] + torch.arange(len(processor.prefix_ids))
    at, ids = at.to(device), torch.tensor([processor.prefix_ids] * len(sources)).to(device)
    written = ids[:, :0]
    with transformers_attention(model, "sdpa") as stock:
        while written.shape[1] < most and not (written == end).any(1).all():
            states = stock.model(
                input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            ids, at = stock.lm_head(states).argmax(-1, keepdim=True), at[:, -1:] + 1
            written = torch.cat([written, ids], 1)
    rows = [row[: row.index(end)] if end in row else row for row in written.tolist()]
    return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def with_btoks(model: BTokModel, source: Mapping[str, Any]) -> Tensor:
    """int64 [1, L + K], the token ids of [x ; B] on the model's device."""
    own = torch.as_tensor(source["input_ids"]).reshape(-1)
    ids = torch.cat([own, torch.tensor(list(model.btok_token_ids), dtype=own.dtype)])
    return ids[None].to(model.backbone.device)


def packed_sources(cache: Path, probed: Probed) -> Sides:
    """Inputs of `PACKED` tokens, cut from Debian's descriptions one behind the other."""
    text = " ".join(text for _, text in pairs.load(cache, "debian").pairs("test")[:100])
    ids = probed.encoder.processor(Side(text))["input_ids"]
    return [{"input_ids": own} for own in ids[: sum(PACKED)].split(PACKED)]


@torch.inference_mode()
def packing(model: BTokModel, sources: Sides) -> dict[str, Any]:
    """The largest differences between embeddings of the same inputs that should be the same.

    In fp32 the model as it is; in fp32 and bf16 its export with the adapters merged, loaded from a
    folder by btok and by transformers: there each [x ; B] goes alone through the stock forward, and
    the mean of the last K rows is brought to unit norm.

    Returns:
        `lengths` of the inputs in tokens, and `gaps`: what is compared, the largest difference of
        any component, the tokens of the input that has it, and the smallest cosine.
    """
    rows = {"adapters alone": alone(model, sources), "adapters packed": embed(model, sources)}
    merged, device = copy.deepcopy(model), model.backbone.device
    if hasattr(merged.backbone, "peft_config"):
        adapters.merge(merged.backbone)
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            ours = BTokModel.from_pretrained(folder, dtype=dtype).to(device).eval()
            stock = type(model.backbone).from_pretrained(folder, dtype=dtype).to(device).eval()
            own = [stock.model(with_btoks(model, x)).last_hidden_state[0] for x in sources]
            means = [states[-len(model.btok_token_ids) :].float().mean(0) for states in own]
            rows |= {f"{kind} alone": alone(ours, sources), f"{kind} packed": embed(ours, sources)}
            rows[f"{kind} stock"] = F.normalize(torch.stack(means), dim=-1)
    compared = [(f"{how} packed", f"{how} alone") for how in ("adapters", "fp32", "bf16")]
    compared += [("fp32 alone", "adapters alone")]
    compared += [(f"{how} alone", f"{how} stock") for how in ("fp32", "bf16")]
    compared += [(f"bf16 {how}", "fp32 stock") for how in ("alone", "packed", "stock")]
    gaps = []
    for one, other in compared:
        apart = (rows[one] - rows[other]).abs().max(1).values  # [N]
        cosine = F.cosine_similarity(rows[one].double(), rows[other].double()).min()
        gap = {"one": one, "other": other, "largest": float(f"{float(apart.max()):.3g}")}
        gap["tokens"] = len(sources[int(apart.argmax())]["input_ids"])
        gaps.append(gap | {"cosine": round(float(cosine), 9)})
    return {"lengths": [len(x["input_ids"]) for x in sources], "gaps": gaps}


@torch.inference_mode()
def embed(model: BTokModel, sources: Sides) -> Tensor:
    """The unit vectors [N, D] of token ids, embedded in one packed row."""
    return model(model.pack(sources).to(model.backbone.device)).embeddings


def alone(model: BTokModel, sources: Sides) -> Tensor:
    """The unit vectors [N, D] of token ids, each embedded in a row of its own."""
    return torch.cat([embed(model, [source]) for source in sources])


def overhead(folder: Path, options: Options) -> dict[str, Any]:
    """Times of K rows over the last token's, by K and length, on a checkpoint's own weights.

    Raises:
        ValueError: an embedding that is not transformers' own, which is then not timed.
    """
    settle_allocator()
    whole = command_line.load(str(folder), num_btoks=max(options.btoks)).model.eval()
    config = whole.backbone.config
    shape = Shape(*(getattr(config, name) for name in Shape._fields))
    last = BTokModel.from_backbone(whole.backbone, btok_token_ids=(), pooling="last").eval()
    generator = torch.Generator().manual_seed(0)
    cases = []
    for number in options.btoks:
        ids = list(whole.btok_token_ids)[:number]
        ours = BTokModel.from_backbone(whole.backbone, btok_token_ids=ids).eval()
        for tokens in options.lengths:
            source = {"input_ids": torch.randint(ids[0], (tokens,), generator=generator)}
            for model in (last, ours):
                check(model, source)
            calls = [partial(embed, model, [source]) for model in (last, ours)]
            timed = duel(calls[0], calls[1], options.seconds)
            ratio = predicted(shape, "packed last token", [tokens], number)
            cases.append({"tokens": tokens, "num_btoks": number, "modelled": ratio, **timed})
            print(f"  {tokens}, K = {number}: {timed['ratio']:.3f}", file=sys.stderr, flush=True)
    return {"layers": shape.num_hidden_layers, "width": shape.hidden_size, "cases": cases}


@torch.inference_mode()
def check(model: BTokModel, source: Mapping[str, Any]) -> None:
    """A ValueError unless an embedding is that of transformers' own forward."""
    with transformers_attention(model, "sdpa") as stock:
        states = stock.model(with_btoks(model, source), use_cache=False).last_hidden_state[0]
    want = F.normalize(states[-(len(model.btok_token_ids) or 1) :].mean(0), dim=-1)
    apart = float((embed(model, [source])[0] - want).norm())
    if not apart <= 1e-5:
        tokens, number = len(source["input_ids"]), len(model.btok_token_ids)
        raise ValueError(f"the vector of {tokens} tokens, K = {number} is off by {apart:.1e}")


def attention(probed: Probed) -> dict[str, Any]:
    """The attention of the B rows, for the first `DRAWN` inputs of at least eight tokens.

    Returns:
        `drawn`: of each input the `tokens` of x; `shares` [3, K, L + 1] in percent by third of the
        layers, the last of a row that of B itself; `first`, the first token's plain attention by
        third, in percent.
    """
    model, processor = probed.encoder.model, probed.encoder.processor
    drawn: list[dict[str, Any]] = []
    sources = (processor(Side(text))["input_ids"] for text, _ in probed.texts)
    for ids in islice((ids for ids in sources if len(ids) >= 8), DRAWN):
        plain, weighted = (100 * t.cpu().numpy() for t in attention_of_b(model, {"input_ids": ids}))
        of_b = weighted[..., len(ids) :].sum(-1, keepdims=True)
        shares = np.concatenate([weighted[..., : len(ids)], of_b], -1)  # [layers, K, L + 1]
        thirds = [np.round(third.mean(0), 2).tolist() for third in np.array_split(shares, 3)]
        first = [round(float(t.mean()), 1) for t in np.array_split(plain[..., 0], 3)]
        tokens = [processor.tokenizer.decode([i]) for i in ids.tolist()]
        drawn.append({"tokens": tokens, "shares": thirds, "first": first})
    return {"layers": len(weighted), "drawn": drawn}


@torch.inference_mode()
def attention_of_b(model: BTokModel, source: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Attention of the K rows in [x ; B], by layer, over what they see; rows sum to 1.

    A decoder's heads rest on the first token where they look for nothing. So beside the mean over
    heads of the weights a[h, i, j] stands the share of what they bring, the sum over heads of
    a[h, i, j] |v[h, j]| (Kobayashi et al. 2020, arXiv 2004.10102).

    Returns:
        plain, weighted: [layers, K, L + K].
    """
    with transformers_attention(model, "eager") as stock:
        output = stock.model(with_btoks(model, source), output_attentions=True, use_cache=True)
    number = len(model.btok_token_ids)
    plain, weighted = [], []
    for weights, layer in zip(output.attentions, output.past_key_values.layers, strict=True):
        rows = weights[0, :, -number:].float()  # [Hq, K, L + K]
        norms = layer.values[0].float().norm(dim=-1)  # [Hkv, L + K]
        brought = rows * norms.repeat_interleave(len(rows) // len(norms), 0)[:, None]
        plain.append(rows.mean(0))
        weighted.append(F.normalize(brought.sum(0), p=1, dim=-1))
    return torch.stack(plain), torch.stack(weighted)


if __name__ == "__main__":
    sys.exit(main())
