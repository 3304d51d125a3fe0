"""`python -m btok merge`: checkpoints of one architecture become their weighted mean.

Whole models are read and written tensor by tensor, in parts; LoRA adapters are put beside each
other, as the mean of their factors is not the mean of what they add.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from btok import adapters
from btok.config import CONFIG_NAME, must_be_trained
from btok.files import may_be_folder, read_json, rename, sha256, write_json
from btok.model import model_digest
from btok.tools.evaluate import DECIDING
from btok.tools.export import RUN, must_be_new

MERGED = "merged.json"
NEAR = 1e-6  # that weights may be from 1 in sum
ELEMENTS = 1 << 24  # of a tensor that are in memory at a time, of each checkpoint
OF_WRITER = ("transformers_version", "_name_or_path", "name_or_path", "peft_version")
PLAIN = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}


@dataclass(frozen=True)
class Merge:
    """Make the weighted mean of checkpoints' weights, or of what LoRA adapters of one base add.

    Args:
        checkpoints: folders, at least two, of the same architecture, settings and tokenizer.
        weights: one per checkpoint, 1 in sum; below 0 to take away what one has (2 -1).
        output: a new folder.
    """

    checkpoints: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT CHECKPOINT [...]")
    ]
    weights: tuple[float, ...]
    output: Path


def merge(checkpoints: Sequence[str | Path], weights: Sequence[float], output: str | Path) -> None:
    """Write sum_i w_i W_i of checkpoints' weights W_i, made in fp32 and kept in their own dtype.

    Of LoRA adapters of one base model it is that mean of their updates, exactly: their ranks one
    after another, B = [w_1 B_1, w_2 B_2, ...] and A = [A_1; A_2; ...]; and of their K rows.

    Args:
        checkpoints: folders that `BTokModel.save_pretrained` and `Processor.save_pretrained` wrote.
        weights: one per checkpoint, finite and 1 in sum; some may be negative (task arithmetic,
            https://arxiv.org/abs/2212.04089). One of weight 0 is checked, and adds nothing.
        output: a new folder, there whole or not at all; `merged.json` in it says what it is of.

    Raises:
        ValueError: fewer than two checkpoints, weights that are not finite or not 1 in sum,
            checkpoints that differ in more than weights, adapters with DoRA, an output that is not
            empty, in a checkpoint's folder or the one this runs in.
    """
    folders, out = [*map(Path, checkpoints)], Path(output)
    if len(folders) < 2:
        raise ValueError(f"merge: checkpoints has {len(folders)}, expected at least 2")
    if len(weights) != len(folders):
        raise ValueError(
            f"merge: weights has {len(weights)} for {len(folders)} checkpoints, expected as many"
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise ValueError(f"merge: weights has {weight}, expected finite numbers")
    if not abs(sum(weights) - 1) <= NEAR:  # fsum would raise where a sum is too large
        said = " + ".join(map(str, weights))
        raise ValueError(f"merge: weights is {said} = {sum(weights)}, expected 1 in sum")
    must_be_new("merge: output", out, replaced=True)
    for folder in folders:
        if folder.resolve() in out.resolve().parents:
            raise ValueError(
                f"merge: output is {out}, which is in the checkpoint {folder}; name a new folder"
            )
    draft = out.with_name(f"{out.name}.draft")
    may_be_folder("merge: output's draft", draft)
    killed = (draft / MERGED).exists()  # the call that began it
    if draft.exists() and any(draft.iterdir()) and not killed:
        raise ValueError(
            f"merge: output's draft {draft} holds files of others; delete it, or name another "
            "output"
        )
    adapted = check(folders)
    digests = [model_digest(folder) for folder in folders]
    if killed:
        shutil.rmtree(draft)
    of = [
        {"checkpoint": str(folder), "model": digest, "weight": weight}
        for folder, digest, weight in zip(folders, digests, weights, strict=True)
    ]
    draft.mkdir(parents=True, exist_ok=True)
    try:
        write_json(draft / MERGED, {"merged": of})  # first: it says whose draft this is
        copy_files(folders[0], draft)
        if adapted:
            merge_adapters(folders, weights, draft)
        else:
            merge_weights(folders, weights, draft / "model.safetensors")
        rename(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check(folders: Sequence[Path]) -> bool:
    """Whether checkpoints are adapters; a ValueError where they differ in more than weights."""
    for folder in folders:
        must_be_trained("merge: checkpoint", folder)
    bases = [adapters.base_of(folder) for folder in folders]
    first, base = folders[0], bases[0]
    for folder, other in zip(folders[1:], bases[1:], strict=True):
        if (base is None) != (other is None):
            which = first if other is None else folder
            raise ValueError(
                f"merge: {which} has adapters and the other checkpoint none; `python -m btok "
                f"export {which} FOLDER` makes a plain one first"
            )
        if base is not None and other is not None and not _same(base, other):
            raise ValueError(
                f"merge: {folder} has adapters of {other}, {first} of {base}, expected one base "
                "model; `python -m btok export` makes plain checkpoints first"
            )
    for folder in folders if base is not None else ():
        config = read_json(folder, adapters.CONFIG_NAME)
        for name, plain in PLAIN.items():
            if (had := config.get(name) or plain) != plain:
                raise ValueError(
                    f"merge: the adapters of {folder} have {name} {had}, which do not add up; "
                    f"`python -m btok export {folder} FOLDER` makes a plain checkpoint first"
                )
    for folder in folders[1:]:
        compare(first, folder)
    return base is not None


def _same(one: str, other: str) -> bool:
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def compare(first: Path, other: Path) -> None:
    """A ValueError for the first file beside the weights in which checkpoints differ."""
    patterns = (CONFIG_NAME, *DECIDING, "chat_template.jinja")
    listed = {path.name for folder in (first, other) for p in patterns for path in folder.glob(p)}
    for name in sorted(listed, key=lambda name: (name != CONFIG_NAME, name != "config.json", name)):
        one, two = first / name, other / name
        for path in (one, two):
            if not path.exists():
                raise ValueError(f"merge: {path.parent} has no {name}, expected the same files")
        if sha256(one) == sha256(two):
            continue
        if one.suffix != ".json":
            raise ValueError(f"merge: {name} of {other} and {first} differ, expected the same")
        had, expected = (read_json(folder, name) for folder in (other, first))
        for key in sorted({*had, *expected} - {*OF_WRITER, "base_model_name_or_path"}):
            if had.get(key) != expected.get(key):
                raise ValueError(
                    f"merge: {name} of {other} has {key} {had.get(key)!r:.60}, of {first} "
                    f"{expected.get(key)!r:.60}, expected the same"
                )


def copy_files(folder: Path, draft: Path) -> None:
    """Copy what beside the weights makes a checkpoint."""
    for path in folder.iterdir():
        if path.is_dir() and path.name[:2] in ("1_", "2_"):  # of sentence-transformers
            shutil.copytree(path, draft / path.name)
        own = path.name.startswith((*RUN, MERGED, adapters.CONFIG_NAME))
        if path.suffix in (".json", ".txt", ".jinja", ".model") and not own:
            shutil.copy(path, draft)


def mean(weights: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    """sum_i w_i x_i of one dtype, in fp32 or, of float64, in that; of whole numbers what is equal
    in all, or a ValueError."""
    dtype = parts[0].dtype
    if not dtype.is_floating_point:
        if not all(torch.equal(part, parts[0]) for part in parts):
            raise ValueError(f"it is {dtype} and differs, expected the same numbers")
        return parts[0]
    wide = torch.promote_types(dtype, torch.float32)
    # what has weight 0 is left out: 0 times inf is a NaN, and adding 0 changes the sign of -0.0
    terms = [w * part.to(wide) for w, part in zip(weights, parts, strict=True) if w != 0]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.to(dtype)


def same_tensors(folders: Sequence[Path], kinds: Sequence[Mapping[str, str]]) -> None:
    """A ValueError for a tensor that is of another kind in one of the folders.

    Args:
        kinds: by name what the tensors of each folder are, in words.
    """
    for folder, own in zip(folders[1:], kinds[1:], strict=True):
        for name in sorted(own.keys() | kinds[0].keys()):
            had, expected = (of.get(name, "not there") for of in (own, kinds[0]))
            if had != expected:
                raise ValueError(
                    f"merge: {name} of {folder} is {had}, of {folders[0]} {expected}, expected the "
                    "same"
                )


def merge_weights(folders: Sequence[Path], weights: Sequence[float], path: Path) -> None:
    """Write the mean of whole models as a safetensors file, tensor by tensor."""
    with ExitStack() as stack:
        tensors = [_opened(folder, stack) for folder in folders]
        kinds = [{n: f"{t.get_dtype()} {t.get_shape()}" for n, t in own.items()} for own in tensors]
        same_tensors(folders, kinds)
        first = tensors[0]
        size = {name: _bytes(tensor) for name, tensor in first.items()}
        # as safetensors has them, so that each begins where its kind may
        names = sorted(size, key=lambda name: (-size[name][0], name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            kind, shape = first[name].get_dtype(), first[name].get_shape()
            end = at + math.prod(size[name])
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for parts in _in_parts([own[name] for own in tensors]):
                    try:
                        found = mean(weights, parts)
                    except ValueError as error:
                        raise ValueError(f"merge: {name}: {error}") from error
                    file.write(found.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())


def _opened(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The tensors of a whole model by name, opened and not yet read."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"merge: {folder} holds no weights as model*.safetensors")
    opened = [stack.enter_context(safe_open(path, "pt")) for path in files]
    return {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118


def _bytes(tensor: Any) -> tuple[int, int]:
    """The bytes of an element of a tensor, and the number of its elements."""
    shape = tensor.get_shape()
    one = tensor[:0] if shape else tensor[...]
    return one.element_size(), math.prod(shape)


def _in_parts(tensors: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Yield the same rows of each tensor, so many at a time; tensors without rows at once."""
    shape = tensors[0].get_shape()
    if not shape:
        yield [tensor[...] for tensor in tensors]
        return
    rows = max(ELEMENTS // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], rows):
        yield [tensor[start : min(start + rows, shape[0])] for tensor in tensors]


def merge_adapters(folders: Sequence[Path], weights: Sequence[float], draft: Path) -> None:
    """Write adapters whose update is the mean of these adapters' updates."""
    used = [(folder, w) for folder, w in zip(folders, weights, strict=True) if w != 0]
    every = {folder: load_file(folder / adapters.WEIGHTS_NAME) for folder in folders}
    kinds = [{name: str([*x.shape]) for name, x in every[folder].items()} for folder in folders]
    same_tensors(folders, kinds)
    merged: dict[str, Tensor] = {}
    for name in every[folders[0]]:
        parts = [every[folder][name] for folder, _ in used]
        if ".lora_A." in name:
            merged[name] = torch.cat(parts)
        elif ".lora_B." in name:
            scaled = [mean([w], [part]) for (_, w), part in zip(used, parts, strict=True)]
            merged[name] = torch.cat(scaled, 1)
        else:  # the K rows, which stand in the places of the base model's
            merged[name] = mean([w for _, w in used], parts)
    config = dict(read_json(folders[0], adapters.CONFIG_NAME))
    # alpha / rank is what it was
    config |= {name: config[name] * len(used) for name in ("r", "lora_alpha")}
    write_json(draft / adapters.CONFIG_NAME, config)
    save_file(merged, draft / adapters.WEIGHTS_NAME, metadata={"format": "pt"})
