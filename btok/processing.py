"""Sides become token ids and pixel patches, without torchvision.

The stock Qwen-VL processors need torchvision for video and refuse to load without it, even for
images. This one needs numpy and Pillow, reads and writes the same files, and gives the same pixels.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch

from btok.data.records import Side
from btok.families import DEFAULT, FAMILIES, named_family
from btok.families.family import IMAGE_FILE, VIDEO_FILE, Seen, encode_text
from btok.files import one_line, read_json, write_json
from btok.inputs import rgb_array as rgb_array  # where it was to be had before
from btok.tokens import STEM, add_to_tokenizer, end_with_btoks
from btok.vision import Processed


class Processor:
    """Tokenizer and image processor of a checkpoint.

    A side becomes the tokens of its images and its video, as the family's image processor has them,
    and the text as it is. Models without vision take text alone.

    Args:
        tokenizer: a transformers tokenizer, with the family's special tokens where there is vision.
        model_type: the backbone's, one of `btok.families.FAMILIES`.
        num_btoks: K, of the tokens that `save_pretrained` has all inputs of other engines end with;
            None for as many as the tokenizer has.
        settings: of the family's image processor; for Qwen's `QwenImageProcessor` names them.

    Attributes:
        bare: pictures stand without brackets and a line break around them, as VLM2Vec's evaluation
            has them; not a setting that is saved.

    Raises:
        ValueError: an unknown model type, and what the image processor refuses.
        TypeError: a setting that it does not have.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        model_type: str = DEFAULT,
        num_btoks: int | None = None,
        **settings: Any,
    ) -> None:
        family = named_family(model_type, "Processor: model_type")
        self.tokenizer, self.model_type, self.bare = tokenizer, model_type, False
        self.image_processor = None
        if family.vision is not None:
            known = family.vision.image_processor.SETTINGS
            if unknown := settings.keys() - set(known):
                raise TypeError(
                    f"Processor: {', '.join(sorted(unknown))} is no setting of a {model_type}, "
                    f"expected {', '.join(known)}"
                )
            self.image_processor = family.vision.image_processor(tokenizer, **settings)
        vocabulary = tokenizer.get_vocab()
        turn = next((turn for turn in family.turns if turn[1] in vocabulary), family.turns[-1])
        self.prefix_ids, self.suffix_ids = (
            tokenizer.encode(part, add_special_tokens=False) for part in turn
        )
        reserved = self.image_processor.reserved if self.image_processor else frozenset[int]()
        absent = (n for n in count() if f"{STEM}{n}|>" not in vocabulary)
        self.num_btoks = next(absent) if num_btoks is None else num_btoks
        self.reserved = reserved | {i for name, i in vocabulary.items() if name.startswith(STEM)}

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, num_btoks: int = 4, **settings: Any
    ) -> Processor:
        """Load a checkpoint's tokenizer, give it K bottleneck tokens, and read its pixel settings.

        `settings`, as the class takes them, go before those in the checkpoint's files, ours or
        stock ones; a stock file's upper bound on a video is not taken. The model type is that of
        `config.json`. No code that comes with a checkpoint is run.

        Raises:
            ValueError: a file of it is damaged, or has a setting out of range.
            OSError: no such checkpoint.
        """
        tokenizer = _tokenizer(name_or_path)
        add_to_tokenizer(tokenizer, num_btoks)

        both = read_json(name_or_path, "processor_config.json")  # first, as transformers has it
        image = _part(both, "image_processor") or read_json(name_or_path, IMAGE_FILE)
        video = _part(both, "video_processor") or read_json(name_or_path, VIDEO_FILE)
        written_for = str(both.get("processor_class") or image.get("processor_class"))
        by_class = {
            f"{family.vision.image_processor.stock}Processor": model_type
            for model_type, family in FAMILIES.items()
            if family.vision
        }
        config = read_json(name_or_path, "config.json")
        kind = config.get("model_type", by_class.get(written_for, DEFAULT))
        kind = settings.pop("model_type", kind)
        vision = named_family(kind, "Processor: model_type").vision
        saved = vision.image_processor.read(image, video, config) if vision else {}
        return cls(tokenizer, model_type=kind, num_btoks=num_btoks, **saved | settings)

    @property
    def mask_token_id(self) -> int:
        """The id of the token that stands for a hidden one: the tokenizer's mask token, or that of
        its padding or the end of a text, which stand within none.
        """
        known = ("mask_token_id", "pad_token_id", "eos_token_id")
        found = (getattr(self.tokenizer, name, None) for name in known)
        if (number := next((i for i in found if i is not None), None)) is None:
            raise ValueError("Processor: the tokenizer has none of mask, pad and eos token")
        return int(number)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer and the files that the stock image and video processors read.

        These give the same patches then. What the stock tokenizer makes of a text or a conversation
        ends with the K tokens: see `btok.tokens.end_with_btoks`.
        """
        shown = None if self.image_processor is None else self.image_processor.shown
        tokenizer = copy.deepcopy(self.tokenizer)
        if not end_with_btoks(tokenizer, self.num_btoks, shown):
            warnings.warn(
                f"{type(tokenizer).__name__} cannot end inputs with bottleneck tokens; other "
                "engines than this library will lack them",
                stacklevel=2,
            )
        tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            for name, own in self.image_processor.files().items():
                write_json(Path(folder) / name, own)

    def __call__(self, side: Side) -> dict[str, Any]:
        """Token ids and patches of one side.

        Returns:
            `input_ids` int64 [L]; where there are images or a video `vision`, a
            `btok.vision.Vision` of each kind, its pixels uint8; what else the family's positions
            take (Qwen2.5-VL's `second_per_grid_ts` [1]). Asked for `pixel_values` or
            `image_grid_thw`, or a video's, it gives floats and grids as Qwen's processors do.

        Raises:
            TypeError, ValueError: an image that is no picture, times that are not one per frame,
                pictures for a model without vision.
        """
        seen = Seen([], "", {})
        if len(side.images) or len(side.video):
            if self.image_processor is None:
                had = f"a side has images or a video, a {self.model_type} takes text alone"
                raise ValueError(had)
            seen = self.image_processor(side)
            if self.bare:
                brackets = self.image_processor.brackets
                if brackets is None:
                    had = f"a {self.model_type} shows more than its patches"
                    raise ValueError(f"Processor: bare is True, {had}; expected False")
                seen = seen._replace(ids=[i for i in seen.ids if i not in brackets], gap="")
        ids = seen.ids + (self.encode(seen.gap + side.text) if side.text else [])
        return Processed({"input_ids": torch.tensor(ids), **seen.shown})

    @property
    def has_vision(self) -> bool:
        """Whether the model takes images and videos, or text alone."""
        return self.image_processor is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it is: what spells a special token stays text.

        Raises:
            ValueError: the tokenizer finds a placeholder or bottleneck token all the same, as one
                does that has it among its ordinary entries.
        """
        ids = encode_text(self.tokenizer, text)
        if found := self.reserved.intersection(ids):
            names = self.tokenizer.convert_ids_to_tokens(sorted(found))
            raise ValueError(
                f"a text has {', '.join(names)}, which this tokenizer takes for the places of "
                "pictures or bottleneck tokens, expected none"
            )
        return ids


def _tokenizer(name_or_path: str | Path) -> Any:
    """A checkpoint's tokenizer, which has encoded something."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        tokenizer.encode("a")  # some settings are looked at here alone
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # of damaged files transformers raises nearly anything
        why = one_line(error)
        raise ValueError(f"the tokenizer of {name_or_path} cannot be read: {why}") from error
    return tokenizer


def _part(file: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The JSON object that a file has under a name; an empty one for null."""
    if not isinstance(value := file.get(name), Mapping | None):
        raise ValueError(f"Processor: {name} is {value!r:.60}, expected a JSON object")
    return value or {}
