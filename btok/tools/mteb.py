"""mteb: an encoder that `mteb.evaluate` takes, for tasks of texts, images and videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.inputs import FRAMES, read_video

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import PromptType
except ImportError as error:
    raise ImportError('btok.tools.mteb needs mteb: pip install "btok[eval]"') from error

COLUMNS = ("text", "image", "video")


class MTEBEncoder(AbsEncoder):
    """`mteb.evaluate(MTEBEncoder(encoder), tasks)`.

    A task's own prompt is the instruction of its queries and of a task without the two roles;
    documents get one only where the task has a prompt for them. An empty input is refused, and so
    is sound. Of a video 8 frames are taken, as of a video file.

    Args:
        encoder: from `BTokEncoder.from_pretrained`; its digest, with the options that `using` gave
            it, is the model's revision, by which mteb's cache knows results.
        name: "organization/model" in the results; None for "btok/" and the checkpoint's folder.

    Raises:
        ImportError: mteb is missing (the extra `eval`).
        ValueError: an encoder that does not know its checkpoint, or gives several vectors an input.
    """

    def __init__(self, encoder: BTokEncoder, name: str | None = None) -> None:
        self.encoder = encoder
        if encoder.options.multi_vector:
            had = f"MTEBEncoder: encoder has multi_vector {encoder.options.multi_vector}"
            raise ValueError(f"{had}, expected one vector per input")
        calibration = encoder.calibration if encoder.options.calibrated else None
        options = encoder.options.described(calibration)
        words = [f"{name}={value}" for name, value in sorted(options.items())]
        values = {
            "revision": " ".join([encoder.digest, *words]),
            "name": name or f"btok/{getattr(encoder.checkpoint, 'name', 'model')}",
            "modalities": list(COLUMNS) if encoder.processor.has_vision else ["text"],
            "n_parameters": sum(p.numel() for p in encoder.model.parameters()),
            "embed_dim": encoder.dims,
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": True,
            "framework": ["PyTorch", "Transformers"],
        }
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=values)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embed what a DataLoader of mteb gives, in its order: float32 [N, D].

        Args:
            inputs: batches; the files of a data set's images and videos are read here, with PyAV
                and without torchcodec.
            kwargs: batch_size and show_progress_bar; precision, None or "float32".

        Raises:
            ValueError: another argument or precision; a batch with sound, or with no column that
                is known; an input that is empty or cannot be read (the message tells which).
        """
        precision = kwargs.pop("precision", None)
        if unknown := kwargs.keys() - {"batch_size", "show_progress_bar"}:
            raise ValueError(f"MTEBEncoder.encode: it does not take {sorted(unknown)}")
        if precision not in (None, "float32"):
            raise ValueError(
                f"MTEBEncoder.encode: precision is {precision!r}, expected 'float32'; "
                "mteb.models.CompressionWrapper makes others of it"
            )
        prompt = task_metadata.prompt
        if isinstance(prompt, dict):
            prompt = prompt.get(prompt_type.value) if prompt_type else None
        elif prompt_type == PromptType.document:
            prompt = None
        show = kwargs.get("show_progress_bar", True)
        # the frames of so many videos are held at once: 3 GB where all are 1080p
        window = 64 if "video" in task_metadata.modalities else 1024
        rows: dict[int, np.ndarray] = {}
        sides = _sides(_as_files(inputs))
        for made in self.encoder.encode_iter(sides, prompt, show_progress=show, window=window):
            rows |= zip(made.ids, made.vectors, strict=True)
        return np.stack([rows[i] for i in range(len(rows))])


def _as_files(inputs: Any) -> Any:
    """The batches of a DataLoader with a data set's images and videos as the files they are stored
    as.
    """
    # decoded images of a whole window would fill the memory, and datasets' videos take torchcodec
    dataset: Any = getattr(inputs, "dataset", None)
    features = getattr(dataset, "features", None) or {}
    _refuse_sound(features)  # before it is decoded
    files = [name for name in ("image", "video") if getattr(features.get(name), "decode", False)]
    if not files:
        return inputs
    for name in files:
        dataset = dataset.cast_column(name, replace(features[name], decode=False))
    settings = {"collate_fn": inputs.collate_fn, "num_workers": inputs.num_workers}
    return DataLoader(dataset, inputs.batch_size, **settings)


def _refuse_sound(columns: Iterable[str]) -> None:
    if "audio" in columns:
        raise ValueError(
            "MTEBEncoder.encode: inputs has the column 'audio', expected text, image or video"
        )


def _sides(batches: Iterable[dict[str, Any]]) -> Iterator[Side]:
    """The rows of batches, which are columns; a row without an image, say, has None there."""
    number = 0
    for batch in batches:
        _refuse_sound(batch)
        if not (lengths := [len(batch[name]) for name in COLUMNS if name in batch]):
            raise ValueError(
                f"MTEBEncoder.encode: a batch has {sorted(batch)}, expected text, image or video"
            )
        nothing = [None] * lengths[0]
        rows = zip(*(batch.get(name, nothing) for name in COLUMNS), strict=True)
        for text, image, video in rows:
            shown = image if isinstance(image, list) else [image]
            images = [file for each in shown if (file := _file(each)) is not None]
            try:
                frames, seconds = _frames(_file(video))
            except ImportError:
                raise
            except Exception as error:  # a decoder of a broken file may raise anything
                raise ValueError(f"MTEBEncoder.encode: input {number}: {error}") from error
            yield Side(text or "", images, frames, seconds)
            number += 1


def _file(value: Any) -> Any:
    """The bytes of a stored file, or the path of one that lies on this machine; else the value."""
    if not isinstance(value, dict) or not {"bytes", "path"} <= value.keys():
        return value
    return value["path"] if value["bytes"] is None else value["bytes"]


def _frames(video: Any) -> tuple[Any, Sequence[float]]:
    """The frames of a video and their seconds; a path stays one, to be read when its turn comes.

    Args:
        video: a file's path or bytes; torchcodec's VideoDecoder; frames, uint8 [T, 3, H, W], of
            which no times are known; None.
    """
    if video is None:
        return (), ()
    if isinstance(video, str | Path):
        return video, ()
    if isinstance(video, bytes):
        with NamedTemporaryFile() as file:
            file.write(video)
            file.flush()
            return read_video(file.name)
    middles = (np.arange(FRAMES) + 0.5) / FRAMES  # of equal parts, which read_video takes, too
    if hasattr(video, "get_frames_played_at"):
        start, end = video.metadata.begin_stream_seconds, video.metadata.end_stream_seconds
        found = video.get_frames_played_at((start + (end - start) * middles).tolist())
        at, which = np.unique(found.pts_seconds.numpy(), return_index=True)
        return _channels_last(found.data[which]), (at - start).tolist()
    if getattr(video, "shape", ())[1:2] != (3,) or len(video.shape) != 4:
        raise TypeError(
            f"video is a {type(video).__name__} {list(getattr(video, 'shape', ()))}, expected a "
            "file, torchcodec's VideoDecoder or frames [T, 3, H, W]"
        )
    which = np.unique((len(video) * middles).astype(int))
    return _channels_last(video[which]), ()


def _channels_last(frames: Any) -> list[np.ndarray]:
    """Frames [n, 3, H, W] as pictures [H, W, 3]."""
    return list(np.asarray(frames).transpose(0, 2, 3, 1))
