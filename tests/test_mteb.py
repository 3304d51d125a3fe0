"""The mteb encoder: what a task gives becomes sides, and scores come out of `mteb.evaluate`.

The last tests put the same vectors through mteb's retrieval and through our own runner.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import nested_checkpoint, tiny_checkpoint, tiny_module
from PIL import Image
from torch.utils.data import DataLoader

from btok import BTokEncoder, Side
from btok.data.records import RetrievalTask
from btok.evaluation.runner import evaluate
from btok.inputs import read_video

mteb = pytest.importorskip("mteb", reason="mteb (the extra `eval`) is not installed")
from datasets import Dataset, Video  # noqa: E402
from datasets import Image as Picture  # noqa: E402
from mteb.abstasks import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.mocks import mock_tasks  # noqa: E402
from mteb.mocks.mock_tasks.create_mock_samples import create_mock_video_bytes  # noqa: E402
from mteb.models.abs_encoder import AbsEncoder  # noqa: E402
from mteb.models.model_meta import ModelMeta, ScoringFunction  # noqa: E402
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


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Files of 5, 8, 24 and 60 frames, at 12 a second."""
    pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    paths = []
    for frames in (5, 8, 24, 60):
        (made,) = create_mock_video_bytes(RNG, 1, fps=12, duration_s=frames / 12)
        paths.append(tmp_path_factory.mktemp("videos") / f"{frames}.mp4")
        paths[-1].write_bytes(made)
    return paths


def encode(model, batches, prompt=None, prompt_type=None, **kwargs):
    metadata = SimpleNamespace(prompt=prompt, modalities=["text", "image", "video"])
    options = {"task_metadata": metadata, "prompt_type": prompt_type}
    return model.encode(batches, hf_split="test", hf_subset="default", **options, **kwargs)


def scores(model, task, **kwargs):
    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
    result = mteb.evaluate(model, task, encode_kwargs={"batch_size": 3, **kwargs}, **options)
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


def test_batches_of_texts_images_and_videos(model, encoder, videos):
    frames, seconds = zip(*map(read_video, videos), strict=True)
    stored = [{"path": "clip.mp4", "bytes": path.read_bytes()} for path in videos]
    batches = [
        {"video": [videos[0], {"path": str(videos[1]), "bytes": None}]},
        {"text": TEXTS[:2], "video": stored[2:]},
        {"text": [TEXTS[2], None, TEXTS[3]], "video": [None, stored[0], stored[1]]},
        {"image": [Image.fromarray(PICTURES[0]), None], "video": [None, stored[0]]},
        {"text": TEXTS[:1], "image": [[PICTURES[1], PICTURES[2]]], "video": [stored[3]]},
    ]
    clips = [{"video": f, "frame_seconds": at} for f, at in zip(frames, seconds, strict=True)]
    sides = [Side(**clips[0]), Side(**clips[1])]
    sides += [Side(TEXTS[0], **clips[2]), Side(TEXTS[1], **clips[3])]
    sides += [Side(TEXTS[2]), Side(**clips[0]), Side(TEXTS[3], **clips[1])]
    sides += [Side(images=PICTURES[:1]), Side(**clips[0])]
    sides += [Side(TEXTS[0], PICTURES[1:3], **clips[3])]
    assert [len(f) for f in frames] == [5, 8, 8, 8]
    assert np.abs(encode(model, batches) - encoder.encode(sides)).max() < 1e-6


def test_a_data_sets_files_are_read_by_our_own_readers(model, encoder, videos):
    """Also where torchcodec is missing; each row lacks something."""
    rows = {"text": TEXTS[:3], "image": [Image.fromarray(PICTURES[0]), None, None]}
    rows["video"] = [None, str(videos[0]), None]
    stored = Dataset.from_dict(rows).cast_column("video", Video())
    columns = {"collate_fn": lambda batch: {key: [row[key] for row in batch] for key in batch[0]}}
    frames, seconds = read_video(videos[0])
    sides = [Side(TEXTS[0], PICTURES[:1]), Side(TEXTS[1], (), frames, seconds), Side(TEXTS[2])]
    made = encode(model, DataLoader(stored, batch_size=2, **columns))
    assert np.abs(made - encoder.encode(sides)).max() < 1e-6


def test_frames_alone_are_taken_from_the_middles_of_equal_parts(model, encoder):
    frames = RNG.integers(0, 256, (50, 24, 32, 3), dtype=np.uint8)
    taken = {50: [3, 9, 15, 21, 28, 34, 40, 46], 9: [0, 1, 2, 3, 5, 6, 7, 8], 3: [0, 1, 2]}
    batch = [torch.from_numpy(frames[:count]).permute(0, 3, 1, 2) for count in taken]
    expected = encoder.encode([Side(video=frames[which]) for which in taken.values()])
    assert np.abs(encode(model, [{"video": batch}]) - expected).max() < 1e-6
    assert np.abs(encode(model, [{"video": [f.numpy() for f in batch]}]) - expected).max() < 1e-6


class Decoder:
    """The part of torchcodec's VideoDecoder that is used, where it cannot be imported."""

    def __init__(self, path):
        import av

        with av.open(str(path)) as container:
            shown = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
        self.times, pixels = map(np.stack, zip(*shown, strict=True))
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        begin, end = self.times[0], self.times[-1] + 1 / 12
        self.metadata = SimpleNamespace(begin_stream_seconds=begin, end_stream_seconds=end)

    def get_frames_played_at(self, seconds):
        which = np.searchsorted(self.times, seconds, side="right") - 1
        times = torch.from_numpy(self.times[which])
        return SimpleNamespace(data=self.pixels[which], pts_seconds=times)


def test_a_decoder_gives_what_its_file_gives(model, videos):
    try:
        from torchcodec.decoders import VideoDecoder
    except Exception:  # it is missing, or its FFmpeg
        VideoDecoder = Decoder
    decoders = [VideoDecoder(str(path)) for path in videos]
    rows = encode(model, [{"video": decoders}]), encode(model, [{"video": videos}])
    assert np.abs(rows[0] - rows[1]).max() < 1e-6


class TextFinds(AbsTaskRetrieval):
    """A text finds the image or the video that our own encoder puts first."""

    metadata = TaskMetadata(
        name="TinyTextFinds",
        type="Any2AnyRetrieval",
        description="tiny",
        dataset={"path": "none", "revision": "none"},
        modalities=["text", "image"],
        category="t2i",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_1",
        prompt={"query": "Find it:"},
    )
    column, feature = "image", Picture()

    def __init__(self, encoder, items):
        super().__init__()
        self.items = items
        queries = encoder.encode(TEXTS, "Find it:")
        self.best = (queries @ encoder.encode(items).T).argmax(1)

    def load_data(self, *_, **__):
        queries = {"id": [f"q{i}" for i in range(len(TEXTS))], "text": TEXTS}
        stored = [str(item) if isinstance(item, Path) else item for item in self.items]
        corpus = {"id": [f"d{i}" for i in range(len(stored))], self.column: stored}
        corpus = Dataset.from_dict(corpus).cast_column(self.column, self.feature)
        self.dataset = {"default": {"test": {
            "queries": Dataset.from_dict(queries),
            "corpus": corpus,
            "relevant_docs": {f"q{i}": {f"d{j}": 1} for i, j in enumerate(self.best)},
            "top_ranked": None,
        }}}  # fmt: skip
        self.data_loaded = True


class TextFindsVideo(TextFinds):
    metadata = TextFinds.metadata.model_copy(
        update={"name": "TinyTextFindsVideo", "modalities": ["text", "video"], "category": "t2v"}
    )
    column, feature = "video", Video()


def test_a_task_of_texts_and_images_is_scored(model, encoder):
    task = TextFinds(encoder, [Image.fromarray(p) for p in PICTURES])
    assert scores(model, task)["ndcg_at_1"] == 1
    task.best = (task.best + 1) % len(PICTURES)
    assert scores(model, task)["ndcg_at_1"] == 0


def test_a_task_of_texts_and_videos_is_scored(model, encoder, videos):
    task = TextFindsVideo(encoder, videos)
    assert scores(model, task)["ndcg_at_1"] == 1
    task.best = (task.best + 1) % len(videos)
    assert scores(model, task)["ndcg_at_1"] == 0


def test_tasks_of_texts_are_scored(model):
    task = mock_tasks.MockRetrievalTask()
    assert 0 < scores(model, task)["ndcg_at_10"] <= 1
    assert scores(model, task, precision="float32") == scores(model, task)
    assert abs(scores(model, mock_tasks.MockSTSTask())["cosine_spearman"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("task", "score"),
    [
        ("MockVideoRetrievalT2V", "ndcg_at_10"),
        ("MockVideoRetrievalV2T", "ndcg_at_10"),
        ("MockVideoZeroshotClassificationTask", "accuracy"),
        ("MockVideoPairClassificationTask", "max_ap"),
    ],
)
def test_mtebs_own_video_tasks_are_scored(model, task, score):
    pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    assert 0 < scores(model, getattr(mock_tasks, task)())[score] <= 1


def test_the_first_path_leads_here():
    from btok.evaluation.mteb import MTEBEncoder as first

    assert first is MTEBEncoder


def test_the_model_is_known_by_its_digest(model, encoder):
    meta = model.mteb_model_meta
    assert (meta.name, meta.revision) == (f"btok/{encoder.checkpoint.name}", encoder.digest)
    assert (meta.embed_dim, meta.modalities) == (64, ["text", "image", "video"])
    assert MTEBEncoder(encoder, "someone/model").mteb_model_meta.name == "someone/model"
    with pytest.raises(ValueError, match="checkpoint is None"):
        MTEBEncoder(BTokEncoder(*tiny_module()))


def test_other_vectors_of_a_checkpoint_have_a_revision_of_their_own(tmp_path):
    encoder = BTokEncoder.from_pretrained(nested_checkpoint(tmp_path / "nested"))
    small = MTEBEncoder(encoder.using(num_btoks=2, dims=16)).mteb_model_meta
    assert small.revision == f"{encoder.digest} dims=16 num_btoks=2" and small.embed_dim == 16
    assert MTEBEncoder(encoder).mteb_model_meta.revision == encoder.digest
    with pytest.raises(ValueError, match="encoder has multi_vector True, expected one vector"):
        MTEBEncoder(encoder.using(multi_vector=True))


def test_what_cannot_be_done_is_named(model):
    with pytest.raises(ValueError, match="precision is 'int8', expected 'float32'"):
        encode(model, [{"text": TEXTS}], precision="int8")
    with pytest.raises(ValueError, match="precision is 'binary', expected 'float32'"):
        scores(model, mock_tasks.MockSTSTask(), precision="binary")
    with pytest.raises(ValueError, match=r"does not take \['normalize'\]"):
        encode(model, [{"text": TEXTS}], normalize=True)
    with pytest.raises(ValueError, match="input 1: it is empty"):
        encode(model, [{"text": ["a", ""]}])
    with pytest.raises(ValueError, match="input 1: it is empty"):
        encode(model, [{"text": ["a", None], "image": [None, None], "video": [None, None]}])
    with pytest.raises(ValueError, match=r"a batch has \['id'\], expected text, image or video"):
        encode(model, [{"id": ["d0"]}])


def test_sound_is_refused(model):
    sound = {"array": np.zeros(160), "sampling_rate": 16000}
    line = "inputs has the column 'audio', expected text, image or video"
    with pytest.raises(ValueError, match=line):
        encode(model, [{"text": ["a"], "audio": [sound]}])
    # a data set's is refused before it is decoded, which takes torchcodec
    undecoded = SimpleNamespace(dataset=SimpleNamespace(features={"audio": None}))
    with pytest.raises(ValueError, match=line):
        encode(model, undecoded)


@pytest.mark.parametrize(
    ("video", "why"),
    [
        (b"no video", "cannot be read"),
        (
            torch.zeros(4, 8, 8, 3, dtype=torch.uint8),
            r"is a Tensor \[4, 8, 8, 3\], expected a file",
        ),
        ({"frames": [], "fps": 2}, r"is a dict \[\], expected a file"),
        (3, r"is a int \[\], expected a file"),
    ],
)
def test_a_video_that_cannot_be_read_is_named(model, video, why):
    pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    with pytest.raises(ValueError, match=f"encode: input 2: video .*{why}"):
        encode(model, [{"text": ["a", "b"]}, {"video": [video]}])


class Table(AbsEncoder):
    """An encoder that knows each text's vector."""

    def __init__(self, vectors):
        self.vectors = vectors
        values = {"name": "none/table", "revision": "none", "modalities": ["text"]}
        values |= {"similarity_fn_name": ScoringFunction.COSINE}
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=values)

    def encode(self, inputs, **_):
        return np.stack([self.vectors[text] for batch in inputs for text in batch["text"]])


class Graded(AbsTaskRetrieval):
    """A retrieval task of given judgements; keeps the scores of each query, before rounding."""

    metadata = TaskMetadata(
        name="TinyGraded",
        type="Retrieval",
        description="tiny",
        dataset={"path": "none", "revision": "none"},
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_5",
    )

    def __init__(self, queries, candidates, qrels, pools=None):
        super().__init__()
        named = [
            {"id": [f"{kind}{i}" for i in range(len(texts))], "text": texts}
            for kind, texts in (("q", queries), ("d", candidates))
        ]
        judged = {
            f"q{i}": {f"d{j}": grade for j, grade in row.items()} for i, row in enumerate(qrels)
        }
        ranked = pools and {f"q{i}": [f"d{j}" for j in pool] for i, pool in enumerate(pools)}
        parts = ("queries", "corpus", "relevant_docs", "top_ranked")
        values = (*map(Dataset.from_dict, named), judged, ranked)
        self.dataset = {"default": {"test": dict(zip(parts, values, strict=True))}}
        self.data_loaded = True

    def load_data(self, *_, **__):
        pass

    def task_specific_scores(self, scores, *_, **__):
        self.by_query = scores
        return {}


@pytest.fixture(scope="module", params=["all", "pools"])
def graded(request):
    """30 queries, 60 candidates, or 12 for each query; 1 to 9 positives of the grades 1 to 3;
    vectors without ties."""
    rng = np.random.default_rng(7)
    queries = [f"query {i}" for i in range(30)]
    candidates = [f"candidate {i}" for i in range(60)]
    rows = rng.standard_normal((90, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ranked = np.sort(rows[:30] @ rows[30:].T)
    assert np.diff(ranked).min() > 1e-6
    pools = [rng.permutation(60)[:12].tolist() for _ in queries]
    counts = [1 + i % 9 for i in range(30)]
    qrels = [
        {j: int(rng.integers(1, 4)) for j in pool[:n]}
        for pool, n in zip(pools, counts, strict=True)
    ]
    pools = [sorted(pool) for pool in pools] if request.param == "pools" else None
    vectors = dict(zip(queries + candidates, rows, strict=True))
    task = Graded(queries, candidates, qrels, pools)
    reported = scores(Table(vectors), task)

    def ours(metric):
        """The score of the whole, and of each query alone."""

        def run(which):
            sides = [Side(queries[i]) for i in which], [Side(text) for text in candidates]
            given = [qrels[i] for i in which], pools and [pools[i] for i in which]
            task = RetrievalTask("t", "", "", metric, *sides, *given)
            rows = evaluate(lambda sides: np.stack([vectors[s.text] for s in sides]), [task])
            return rows["tasks"]["t"]["score"] / 100

        return run(range(30)), [run([i]) for i in range(30)]

    return SimpleNamespace(task=task, reported=reported, ours=ours, qrels=qrels)


@pytest.mark.parametrize(
    ("metric", "reported", "trec"),
    [
        ("ndcg@5", "ndcg_at_5", "ndcg_cut_5"),  # of both the gain is the grade, not 2^grade - 1
        ("ndcg@10", "ndcg_at_10", "ndcg_cut_10"),
        ("hit@1", "hit_rate_at_1", "success_1"),
        ("hit@1", "precision_at_1", "P_1"),
        ("hit@5", "hit_rate_at_5", "success_5"),
    ],
)
def test_our_scores_are_mtebs(graded, metric, reported, trec):
    """Exact per query; mteb reports the mean rounded to five decimals."""
    whole, single = graded.ours(metric)
    theirs = [graded.task.by_query[f"q{i}"][trec] for i in range(30)]
    assert 0 < whole < 1 and len(set(single)) > 1
    assert np.abs(np.subtract(single, theirs)).max() < 1e-6
    assert abs(whole - np.mean(theirs)) < 1e-6
    assert abs(whole - graded.reported[reported]) <= 5e-6 + 1e-9


def test_mtebs_accuracy_is_its_recall_at_one(graded):
    """It is our hit@1 only where each query has one positive: here it is the first hit's share."""
    _, hits = graded.ours("hit@1")
    shares = [hit / len(qrels) for hit, qrels in zip(hits, graded.qrels, strict=True)]
    assert graded.reported["accuracy"] == graded.reported["recall_at_1"]
    assert abs(np.mean(shares) - graded.reported["accuracy"]) <= 5e-6 + 1e-9
    assert np.mean(shares) < np.mean(hits)


def test_our_mrr_is_mtebs_of_all_ranks(graded):
    whole, _ = graded.ours("mrr")
    assert abs(whole - graded.reported["mrr_at_100"]) <= 5e-6 + 1e-9


@pytest.mark.parametrize(("positive", "hit"), [(0, 1), (1, 0)])
def test_of_equal_scores_ours_are_in_the_pools_order_and_mtebs_by_name(positive, hit):
    """mteb's, trec_eval's, has the later name first; ours the earlier candidate."""
    vectors = dict.fromkeys(("query", "one", "other"), np.ones(4, np.float32) / 2)
    sides = [Side("query")], [Side("one"), Side("other")]
    task = RetrievalTask("t", "", "", "hit@1", *sides, [{positive: 1}])
    rows = evaluate(lambda sides: np.stack([vectors[s.text] for s in sides]), [task])
    theirs = scores(Table(vectors), Graded(["query"], ["one", "other"], [{positive: 1}]))
    assert rows["tasks"]["t"]["score"] == 100 * hit
    assert theirs["hit_rate_at_1"] == 1 - hit
