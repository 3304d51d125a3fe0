"""Recipes: every setting of a run in one frozen dataclass, and the model it starts from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from btok.adapters import Lora
from btok.config import BTokConfig, Pooling, TargetPositions, rising
from btok.model import BTokModel
from btok.objective import Objective
from btok.processing import Processor
from train.pocket import model as pocket

# what a setting must be that is not None, and which
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "at least 0": (
        lambda x: x >= 0,
        "num_btoks lora_rank ntp_weight ntp_steps reconstruction_weight contrastive_from hardness "
        "distillation_weight caption_steps reading_steps steps warmup_steps weight_decay muon_rate "
        "vision_memory workers max_skipped seed",
    ),
    "at least 1": (
        lambda x: x >= 1,
        "groups_per_batch checkpoint_every chunk_tokens replicas max_pixels",
    ),
    "at least 2": (lambda x: x >= 2, "group_size"),
    "0 or at least 40": (lambda x: x == 0 or x >= 40, "eval_queries"),
    "above 0": (lambda x: x > 0, "temperature learning_rate clip_norm teacher_temperature"),
    "from 0 to 1": (lambda x: 0 <= x <= 1, "final_rate multi_vector"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "lora_dropout"),
    "above 0 and below 1": (lambda x: 0 < x < 1, "beta2"),
    "above 0 and at most 1": (lambda x: 0 < x <= 1, "mask_rate"),
}


@dataclass(frozen=True)
class Recipe:
    """Settings of one run; a flag each."""

    output: Path = Path("runs/pocket")
    """Run folder; a run that stopped goes on when the same command is given again."""
    model: str = "pocket"
    """"pocket" for a small Qwen2-VL made here, or a folder or hub id of a checkpoint."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of products, and of weights that do not train; those that train are float32."""
    lora_rank: int = 0
    """Rank of LoRA adapters, which then train alone with the K rows; 0 trains the whole model."""
    lora_alpha: float = 32.0
    """Scale of the adapters: what they add counts alpha / rank times."""
    lora_dropout: float = 0.05
    """Dropout on the adapters' input, as a share."""
    dora: bool = True
    """Train the magnitude of each output too, with adapters (DoRA)."""
    num_btoks: int = 4
    """K bottleneck tokens; 0 is the baseline without them."""
    pooling: Pooling | None = None
    """Rows whose mean is the embedding; None for "btok", or "last" where K is 0."""
    condense: bool = True
    """Let targets see the source through the bottleneck tokens only."""
    ntp_weight: float = 0.5
    """Weight of the generative loss; 0 trains without it."""
    ntp_steps: int | None = None
    """Training steps after which `ntp_weight` is 0; None for never."""
    reconstruction_weight: float = 0.0
    """Weight of restoring hidden tokens of a side's own text, where it generates no other."""
    mask_rate: float = 0.5
    """Share of tokens that are hidden for `reconstruction_weight`."""
    contrastive_from: int = 0
    """Training steps before the contrastive loss sets in: a compression warm-up."""
    budgets: tuple[int, ...] = ()
    """Numbers of bottleneck tokens, the first ones, to embed with, besides K; each step trains all,
    and each target sees a budget drawn at random."""
    dims: tuple[int, ...] = ()
    """Numbers of components, the first ones, to embed in, besides all."""
    multi_vector: float = 0.0
    """Share of the late-interaction loss, of the K rows as vectors, in the contrastive loss."""
    data: Path | None = None
    """What to train on: a mixture (.toml), one data set (.jsonl, .parquet), or a folder with the
    paper's public data sets; None for the pocket benchmark."""
    tasks: Literal["all", "image", "video", "visdoc"] = "all"
    """Tasks of the pocket benchmark to train on: all nine, or one modality's."""
    workers: int = 0
    """Processes that read and decode ahead of each training process."""
    max_skipped: int = 100
    """Pairs that may turn out unreadable, each counted once, before the run stops."""
    ntp_side: Literal["positive", "query", "both", "none"] | None = None
    """Side to generate, in place of each data set's own."""
    target_positions: TargetPositions = "reference"
    """Where a target's positions start: at len([x ; B]), or after its highest position."""
    attention: Literal["auto", "triton", "sdpa", "varlen", "xformers", "reference"] = "auto"
    """Implementation of the condensed attention."""
    temperature: float = 0.02
    """Temperature of InfoNCE."""
    negatives: Literal["batch", "group"] = "group"
    """A query's negatives: the whole global batch, or its own group."""
    margin: float | None = None
    """Candidates nearer than the positive by more than this cosine are no negatives."""
    hardness: float = 0.0
    """How much more near negatives weigh (beta of arXiv 2010.04592); 0 for all alike."""
    distillation_weight: float = 0.0
    """Weight of a reranker's scores in the rows of the data; 0 passes over them."""
    distillation: Literal["kl", "margin_mse"] = "kl"
    """What is compared with a reranker's scores: softmaxes, or differences from the positive."""
    teacher_temperature: float = 1.0
    """What divides a reranker's scores, to be on the scale of a softmax."""
    group_size: int = 16
    """Pairs of one task that are drawn together."""
    groups_per_batch: int = 4
    """Groups in a global batch; a multiple of the processes."""
    caption_steps: int = 600
    """Steps of plain captioning that teach the small model to see, before bottleneck tokens."""
    reading_steps: int = 60
    """The first captioning steps, on single digits alone."""
    steps: int = 400
    """Training steps with bottleneck tokens."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW; linear warm-up, then linear decay, in each phase."""
    muon_rate: float = 3.0
    """Muon's rate over AdamW's, for the layers' matrices; 0 for AdamW on everything."""
    warmup_steps: int = 40
    """Steps of warm-up to the peak rate."""
    final_rate: float = 0.05
    """What the rate decays to, as a share of the peak."""
    beta2: float = 0.98
    """AdamW's decay of squared gradients."""
    weight_decay: float = 0.01
    """Weight decay of every parameter."""
    chunk_tokens: int | None = None
    """Tokens of a packed pass; a batch of more takes several. None for one pass."""
    gradcache: bool = False
    """Keep the activations of one pass at a time (GradCache); embeds everything once more."""
    checkpoint_activations: bool = False
    """Make each layer's activations again in the backward instead of keeping them."""
    freeze_vision: bool = False
    """Keep the vision tower from training; with adapters it never does."""
    shard: bool = False
    """Lay a whole model's weights, gradients and moments over all GPUs (FSDP2)."""
    replicas: int = 1
    """Groups of GPUs that hold the whole model each, with `shard`; nodes, say."""
    max_pixels: int | None = None
    """Most pixels that an image is shown with; None for the model's own bound."""
    reuse_vision: bool = True
    """Run a frozen vision tower once per image and step."""
    vision_memory: int = 1 << 30
    """Bytes of a frozen vision tower's outputs that stay on the device; the rest waits in the
    host's memory."""
    clip_norm: float = 1.0
    """Bound on the gradient's norm."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the newest two are kept."""
    tensorboard: bool = False
    """Write the log's numbers for TensorBoard too (needs the extra `tensorboard`)."""
    eval_queries: int = 400
    """Test queries per task, before and after training; 0 for no evaluation."""
    seed: int = 0
    """Seed of the first weights and the order of the data."""

    def __post_init__(self) -> None:
        for expected, (fits, names) in RANGES.items():
            for name in names.split():
                if (had := getattr(self, name)) is not None and not fits(had):
                    raise ValueError(f"{name} is {had}, expected {expected}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}, expected a finite number")
        if self.pooling_rows not in (("btok", "last") if self.num_btoks else ("last", "mean")):
            raise ValueError(
                f"num_btoks is {self.num_btoks} and pooling '{self.pooling}'; K = 0 needs pooling "
                "'last' or 'mean', and K > 0 'btok' or 'last'"
            )
        if self.budgets and rising(every := (*self.budgets, self.num_btoks)):
            object.__setattr__(self, "budgets", every)
        try:  # before a model is there that has them
            BTokConfig(range(self.num_btoks), self.pooling_rows, **self.nested)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("BTokModel: ")) from None
        last = self.contrastive_from - 1
        if last >= 0 and not (self.objective.weight(last) or self.reconstruction_weight):
            raise ValueError(
                f"contrastive_from is {self.contrastive_from}, and step {last} has nothing else to "
                "train; expected a reconstruction_weight above 0, or an ntp_weight that lasts"
            )
        if self.replicas > 1 and not self.shard:
            raise ValueError(f"replicas is {self.replicas}, which needs shard")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse settings that do not go together with others: all of them at once."""
        pocket, shard, data = "model is pocket", "shard is true", f"data is {self.data}"
        given = {pocket: self.model == "pocket", shard: self.shard, data: self.data is not None}
        said, flags = [], dict[str, None]()
        for what, name, expected, why in (
            (pocket, "lora_rank", 0, "its weights begin at random, and adapters leave them so"),
            (shard, "lora_rank", 0, "what trains is small, and the same on every GPU"),
            (shard, "muon_rate", 0, "Muon needs whole matrices"),
            (shard, "caption_steps", 0, "that phase is not sharded"),
            (shard, "eval_queries", 0, "evaluate its checkpoints"),
            (data, "caption_steps", 0, "that phase is for the pocket benchmark"),
            (data, "tasks", "all", "those are the pocket benchmark's"),
        ):
            if given[what] and (had := getattr(self, name)) != expected:
                said.append(f"{what} and {name} is {had}: {why}")
                flags[f"--{name.replace('_', '-')} {expected}"] = None
        if said:
            raise ValueError(f"{'; '.join(said)}; add {' '.join(flags)}")

    @property
    def pooling_rows(self) -> Pooling:
        """The pooling, also where `pooling` is None and K decides."""
        return self.pooling or ("btok" if self.num_btoks else "last")

    @property
    def nested(self) -> dict[str, Any]:
        """The smaller sizes that a model says it was trained for: `budgets`, `dims` and
        `multi_vector` of `BTokConfig`.
        """
        multi_vector = self.multi_vector > 0
        return {"budgets": self.budgets, "dims": self.dims, "multi_vector": multi_vector}

    @property
    def weights(self) -> torch.dtype:
        """The dtype of the model's weights as it is loaded: float32 where it trains as a whole."""
        # an update of 1e-5 is lost in a bfloat16 weight of 1e-2, whose neighbour is 6e-5 away
        return getattr(torch, self.dtype) if self.lora_rank else torch.float32

    @property
    def objective(self) -> Objective:
        """The loss that these settings describe."""
        own = {f.name: getattr(self, f.name) for f in fields(Objective)}
        return Objective(**own)

    @property
    def captions(self) -> Recipe:
        """The captioning phase as a recipe of its own, which generates each pair's own side."""
        phase = replace(self, steps=self.caption_steps, caption_steps=0)
        plain: dict[str, Any] = {"budgets": (), "dims": (), "reconstruction_weight": 0.0}
        plain |= {"multi_vector": 0.0, "distillation_weight": 0.0, "ntp_side": None}
        plain |= {"ntp_weight": 1.0, "ntp_steps": None, "contrastive_from": self.caption_steps}
        return replace(phase, **plain)

    @property
    def total_steps(self) -> int:
        """Steps of the run, the captioning phase included."""
        return self.caption_steps + self.steps

    def described(self) -> dict[str, Any]:
        """All settings, as JSON has them."""

        def said(x: Any) -> Any:
            return str(x) if isinstance(x, Path) else list(x) if isinstance(x, tuple) else x

        return {name: said(x) for name, x in vars(self).items()}

    def learning_rate_at(self, step: int) -> float:
        """The rate of a training step, from 0: linear warm-up, then linear decay."""
        warm = (step + 1) / max(self.warmup_steps, 1)
        left = (self.steps - step) / max(self.steps - self.warmup_steps, 1)
        decayed = self.final_rate + (1 - self.final_rate) * left
        return self.learning_rate * min(1.0, warm, decayed)


# arXiv 2604.11095: global batches of two blocks of 512 pairs, whatever the number of processes
PAPER = Recipe(
    output=Path("runs/btok-qwen2vl-2b"),
    model="Qwen/Qwen2-VL-2B-Instruct",
    data=Path("data"),
    workers=4,
    max_skipped=10_000,
    dtype="bfloat16",
    lora_rank=16,
    ntp_weight=5.0,
    ntp_steps=2000,
    negatives="batch",
    group_size=512,
    groups_per_batch=2,
    caption_steps=0,
    reading_steps=0,
    steps=5000,
    learning_rate=5e-5,
    muon_rate=0.0,
    warmup_steps=100,
    final_rate=0.0,
    beta2=0.999,
    chunk_tokens=16384,
    gradcache=True,
    checkpoint_activations=True,
    eval_queries=0,
)
RECIPES = {
    "pocket": Recipe(),
    "btok-qwen2vl-2b": PAPER,
    **{
        f"btok-{name}": replace(PAPER, output=Path(f"runs/btok-{name}"), model=model)
        for name, model in (
            ("qwen2vl-7b", "Qwen/Qwen2-VL-7B-Instruct"),
            ("qwen2_5vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct"),
            ("qwen3vl-8b", "Qwen/Qwen3-VL-8B-Instruct"),
            ("qwen3vl-2b", "Qwen/Qwen3-VL-2B-Instruct"),
        )
    },
    "vlm2vec-qwen2vl-2b": replace(
        PAPER,
        output=Path("runs/vlm2vec-qwen2vl-2b"),
        num_btoks=0,
        lora_alpha=64.0,
        lora_dropout=0.1,
        ntp_weight=0.0,
    ),
}


def load(
    recipe: Recipe, resume: Path | None = None, empty: bool = False
) -> tuple[BTokModel, Processor]:
    """The model and the processor a run starts from, or goes on with.

    Args:
        resume: its checkpoint.
        empty: a model on the device meta, whose weights come from rank 0.
    """
    settings: dict[str, Any] = {"pooling": recipe.pooling_rows}
    settings["target_positions"] = recipe.target_positions
    if recipe.model == "pocket" and resume is None:
        model, processor = pocket.build(recipe.num_btoks, recipe.seed, **settings)
    else:
        rank, alpha = recipe.lora_rank, recipe.lora_alpha
        if resume is None and rank:
            settings["lora"] = Lora(rank, alpha, recipe.lora_dropout, recipe.dora)
        torch.manual_seed(recipe.seed)  # adapters begin at random, and alike on all ranks
        model = BTokModel.from_pretrained(
            resume or recipe.model,
            num_btoks=recipe.num_btoks,
            dtype=recipe.weights,
            empty=empty,
            **({} if resume else settings),
        )
        processor = Processor.from_pretrained(resume or recipe.model, recipe.num_btoks)
    if resume is None:  # what a checkpoint was trained for before, it need not be afterwards
        model.settings = replace(model.settings, **recipe.nested)
        model.settings.check_width(model.backbone.config.get_text_config().hidden_size)
    if (most := recipe.max_pixels) is not None:
        bounded: Any = processor.image_processor
        low = getattr(bounded, "min_pixels", None)
        if low is None:
            raise ValueError(f"max_pixels is {most}; {recipe.model} has no such bound, give none")
        if most < low:
            raise ValueError(f"max_pixels is {most}, expected at least the model's lowest, {low}")
        bounded.max_pixels = most
    return model, processor
