"""The mteb encoder: what a task gives becomes sides, and scores come out of `mteb.evaluate`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tiny_checkpoint, tiny_module
from PIL import Image

from btok import BTokEncoder, Side

mteb = pytest.importorskip("mteb", reason="mteb (the extra `eval`) is not installed")
from datasets import Dataset  # noqa: E402
from mteb.abstasks import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.mocks.mock_tasks import MockRetrievalTask, MockSTSTask  # noqa: E402
from mteb.types import PromptType  # noqa: E402

from btok.tools.mteb import MTEBEncoder  # noqa: E402

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8) for _ in range(8)]
TEXTS = [f"{word} {i}" for i, word in enumerate(("red", "a blue", "seven", "the", "x", "of", "y"))]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return BTokEncoder.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(encoder):
    return MTEBEncoder(encoder)


def encode(model, batches, prompt=None, prompt_type=None, **kwargs):
    options = {"task_metadata": SimpleNamespace(prompt=prompt), "prompt_type": prompt_type}
    return model.encode(batches, hf_split="test", hf_subset="default", **options, **kwargs)


def scores(model, task):
    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
    result = mteb.evaluate(model, task, encode_kwargs={"batch_size": 3}, **options)
    (split,) = result.task_results[0].scores["test"]
    return split


def test_batches_of_texts_and_images(model, encoder):
    images = [Image.fromarray(p) for p in PICTURES]
    batches = [
        {"text": TEXTS[:2], "title": ["not", "used"]},
        {"image": images[:2]},
        {"text": TEXTS[2:4], "image": [None, images[2]]},
        {"image": [images[3:5]]},
        {"text": ["x" * 50]},
    ]
    sides = [Side(TEXTS[0]), Side(TEXTS[1]), Side(images=PICTURES[:1]), Side(images=PICTURES[1:2])]
    sides += [Side(TEXTS[2]), Side(TEXTS[3], images=PICTURES[2:3]), Side(images=PICTURES[3:5])]
    rows = encode(model, iter(batches), batch_size=2, show_progress_bar=False)
    assert rows.dtype == np.float32
    assert np.abs(rows - encoder.encode([*sides, Side("x" * 50)])).max() < 1e-6


@pytest.mark.parametrize(
    ("prompt", "prompt_type", "instruction"),
    [
        (None, PromptType.query, None),
        ("Find:", None, "Find:"),
        ("Find:", PromptType.query, "Find:"),
        ("Find:", PromptType.document, None),
        ({"query": "Find:", "document": "Show:"}, PromptType.query, "Find:"),
        ({"query": "Find:", "document": "Show:"}, PromptType.document, "Show:"),
        ({"query": "Find:"}, PromptType.document, None),
        ({"query": "Find:"}, None, None),
    ],
)
def test_a_tasks_prompt_is_the_instruction(model, encoder, prompt, prompt_type, instruction):
    rows = encode(model, [{"text": TEXTS}], prompt, prompt_type)
    assert np.abs(rows - encoder.encode(TEXTS, instruction)).max() < 1e-6


class TextToImage(AbsTaskRetrieval):
    """A text finds the picture that our own encoder puts first."""

    metadata = TaskMetadata(
        name="TinyTextToImage",
        type="Any2AnyRetrieval",
        description="tiny",
        dataset={"path": "none", "revision": "none"},
        modalities=["text", "image"],
        category="t2i",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_1",
        prompt={"query": "Find the picture:"},
    )

    def __init__(self, encoder, **kwargs):
        super().__init__(**kwargs)
        queries = encoder.encode(TEXTS, "Find the picture:")
        self.best = (queries @ encoder.encode(PICTURES).T).argmax(1)

    def load_data(self, *_, **__):
        queries = {"id": [f"q{i}" for i in range(len(TEXTS))], "text": TEXTS}
        corpus = {"id": [f"d{i}" for i in range(len(PICTURES))]}
        corpus["image"] = [Image.fromarray(p) for p in PICTURES]
        self.dataset = {"default": {"test": {
            "queries": Dataset.from_dict(queries),
            "corpus": Dataset.from_dict(corpus),
            "relevant_docs": {f"q{i}": {f"d{j}": 1} for i, j in enumerate(self.best)},
            "top_ranked": None,
        }}}  # fmt: skip
        self.data_loaded = True


def test_a_task_of_texts_and_images_is_scored(model, encoder):
    task = TextToImage(encoder)
    assert scores(model, task)["ndcg_at_1"] == 1
    task.best = (task.best + 1) % len(PICTURES)
    assert scores(model, task)["ndcg_at_1"] == 0


def test_tasks_of_texts_are_scored(model):
    assert 0 < scores(model, MockRetrievalTask())["ndcg_at_10"] <= 1
    assert abs(scores(model, MockSTSTask())["cosine_spearman"]) == pytest.approx(1)


def test_the_first_path_leads_here():
    from btok.evaluation.mteb import MTEBEncoder as first

    assert first is MTEBEncoder


def test_the_model_is_known_by_its_digest(model, encoder):
    meta = model.mteb_model_meta
    assert (meta.name, meta.revision) == (f"btok/{encoder.checkpoint.name}", encoder.digest)
    assert (meta.embed_dim, meta.modalities) == (64, ["text", "image"])
    assert MTEBEncoder(encoder, "someone/model").mteb_model_meta.name == "someone/model"
    with pytest.raises(ValueError, match="checkpoint is None"):
        MTEBEncoder(BTokEncoder(*tiny_module()))


def test_what_cannot_be_done_is_named(model):
    with pytest.raises(ValueError, match="precision"):
        encode(model, [{"text": TEXTS}], precision="int8")
    with pytest.raises(ValueError, match="input 1: it is empty"):
        encode(model, [{"text": ["a", ""]}])
