"""A miniature of all 78 data sets of MMEB-V2: a few synthetic records each, pictures and frames."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from btok.evaluation import mmeb_v2
from btok.evaluation.mmeb_v2 import DataSet

WORDS = ["red", "blue", "seven", "heron", "page", "dance", "pour", "open", "lamp", "cook", "walk"]


class Miniature:
    """Records and media of any data set, below a folder; the same for the same seed."""

    def __init__(self, root: Path, seed: int = 0, rows: int = 3) -> None:
        self.root, self.seed, self.rows = root, seed, rows

    def make(self, name: str) -> dict[str, list[Mapping[str, Any]]]:
        """Write a data set; its records, and of a document set also `corpus` and `qrels`."""
        spec = mmeb_v2.data_set(name)
        self.random = np.random.default_rng([self.seed, *name.encode()])
        made = getattr(self, f"_{spec.family}")(spec)
        parts = {"queries": made["records"], **{k: v for k, v in made.items() if k != "records"}}
        for part in spec.configs:
            rows = parts[part] if part in parts else made["records"]
            rows = [row for row in rows if row.get("subset", part) == part]
            path = self.root / spec.records / part / f"{spec.split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return made

    def words(self, count: int = 3) -> str:
        return " ".join(self.random.choice(WORDS, count))

    def names(self, count: int) -> list[str]:
        return [f"{word} {self.words(1)}" for word in self.random.choice(WORDS, count, False)]

    def picture(self, path: str, width: int = 24, height: int = 20) -> str:
        file = self.root / path
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = self.random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((width, height)).save(file)
        return path

    def frames(self, spec: DataSet, folder: str, count: int = 9) -> None:
        for i in range(count):
            self.picture(f"{spec.media}/{folder}/frame_{i + 1:04d}.jpg", 12, 12)

    def _query(self, spec: DataSet, i: int) -> dict[str, Any]:
        path = f"{spec.name}/q{i}.jpg"
        self.picture(f"{spec.media}/{path}")
        inst = f"<|image_1|>\nRepresent the given image of {spec.name}"
        return {"qry_inst": inst, "qry_text": self.words() if i else "", "qry_img_path": path}

    def _answers(self, spec: DataSet) -> dict[str, Any]:
        return {
            "records": [
                self._query(spec, i) | {"tgt_text": self.names(4)} for i in range(self.rows)
            ]
        }

    def _images(self, spec: DataSet) -> dict[str, Any]:
        paths = [f"{spec.name}/{i}.jpg" for i in range(4)]
        for path in paths:
            self.picture(f"{spec.media}/{path}")
        captioned = spec.name in ("WebQA", "EDIS", "RefCOCO-Matching")
        records = []
        for i in range(self.rows):
            query = self._query(spec, i)
            if not spec.query_image:
                query = {"qry_inst": "Find an image of:", "qry_text": self.words()}
            order = self.random.permutation(paths).tolist()
            captions = self.names(4) if captioned else [""] * 4
            target = {"tgt_inst": "<|image_1|>\nRepresent the image.", "tgt_text": captions}
            records.append(query | target | {"tgt_img_path": order})
        return {"records": records}

    def _labels(self, spec: DataSet) -> dict[str, Any]:
        records = []
        for i in range(self.rows):
            self.frames(spec, f"v{i}")
            choice = spec.labels or self.names(4)
            row = {"video_id": f"v{i}", "pos_text": str(self.random.choice(choice))}
            records.append(row if spec.labels else row | {"neg_text": choice})
        return {"records": records}

    def _videos(self, spec: DataSet) -> dict[str, Any]:
        records = []
        for i in range(self.rows):
            self.frames(spec, f"v{i}")
            words: Any = self.words()
            words = words if spec.text != "enCap" and spec.name != "MSVD" else [words, "unused"]
            name = f"test/v{i}.mp4" if spec.video == "video" else f"v{i}"
            records.append({spec.video: name, spec.text: words})
        return {"records": records}

    def _options(self, spec: DataSet) -> dict[str, Any]:
        parts: Sequence[str] = spec.configs if len(spec.configs) > 1 else [""] * self.rows
        return {"records": [self._question(spec, i, part) for i, part in enumerate(parts)]}

    def _question(self, spec: DataSet, i: int, part: str) -> dict[str, Any]:
        video = f"v_v{i}" if spec.options == "yes or no" else f"v{i}"
        self.frames(spec, f"{part}/{video}" if part else video)
        row: dict[str, Any] = {"question": f"which {self.words()}?", spec.video: f"v{i}"}
        names = self.names(5)
        right = int(self.random.integers(4))
        lettered = [f"{'ABCDE'[j]}. {name}." for j, name in enumerate(names)]
        return (
            row
            | {
                "MVBench": {"subset": part, "candidates": names[:4], "answer": names[right]},
                "NExTQA": {f"a{j}": name for j, name in enumerate(names)} | {"answer": right},
                "Video-MME": {"options": lettered[:4], "answer": "ABCD"[right]},
                "EgoSchema": {"option": lettered, "answer": str(right)},
                "ActivityNetQA": {"answer": ["yes", "no"][right % 2]},
            }[spec.name]
        )

    def _clips(self, spec: DataSet) -> dict[str, Any]:
        return {"records": [self._clip(spec, i) for i in range(self.rows)]}

    def _clip(self, spec: DataSet, i: int) -> dict[str, Any]:
        if not spec.query_with_image:
            for clip in ("query", "positive_clip", *(f"negative_clip_{j}" for j in range(3))):
                self.frames(spec, f"v{i}/{clip}", 9 if clip == "query" else 3)
            return {"query": self.words(), "video_path": f"videos/v{i}.mp4"}
        clips = [f"{kind}/v{i}/{j}.mp4" for kind in ("pos", "neg") for j in range(2)]
        for clip in clips:
            self.frames(spec, "video_frames/" + clip[:-4].replace("/", "_"), 4)
        given = ("", f"ego/{i}.jpg", f"movie/{i}.mp4")[i % 3]
        if given.endswith(".jpg"):
            self.picture(f"{spec.media}/query_{given}")
        elif given:
            self.frames(spec, f"video_frames/movie_{i}", 3)
        rows = [{"output_path": clip} for clip in clips]
        row = {"query": self.words(), "input_frames": given}
        return row | {"positive_frames": rows[:2], "negative_frames": rows[2:]}

    def _pages(self, spec: DataSet) -> dict[str, Any]:
        ids: list[Any] = [40, 3, 17, 25, 8]  # a set of them is in another order
        if spec.hashed_names:
            ids = [f"page-{'x' * 60}-{i}.png" for i in ids]
        for key in ids:
            name = f"{key}.png"
            if spec.hashed_names:
                digest = hashlib.md5(key.encode()).hexdigest()[:8]
                name = f"{key[:-4][:50]}_{digest}.png"
            self.picture(f"{spec.media}/{name}", 20, 28)
        records = [{"query-id": i, "query": f"{self.words()}?"} for i in range(self.rows)]
        qrels = [
            {
                "query-id": i,
                "corpus-id": ids[j],
                "score": int(self.random.integers(0, 3)) + (j == i),
            }
            for i in range(self.rows)
            for j in dict.fromkeys([i, *self.random.integers(0, len(ids), 3).tolist()])
        ]
        if spec.hashed_names:  # as theirs, not graded
            qrels = [row | {"score": min(row["score"], 1)} for row in qrels]
        return {"records": records, "corpus": [{"corpus-id": key} for key in ids], "qrels": qrels}
