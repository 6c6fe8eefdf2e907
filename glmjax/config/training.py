"""A training run: objective, data, optimizer, devices and the loop."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Literal

from glmjax.config.fields import parse_range, require_positive
from glmjax.config.model import GLMConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """How blanks are drawn from text: the GLM paper section 2.1, GLM-130B section 2.2.

    A row is drawn token-level with probability `token`, sentence-level with `sentence`, else
    document-level; multi-task rows come from `data.multitask` with probability `multitask`.
    """

    token: float = 1.0
    """Share of rows (or batches) with [MASK] blanks of a few tokens."""
    sentence: float = 0.0
    """Share with [sMASK] blanks of whole sentences; the rest is document-level, [gMASK]."""
    multitask: float = 0.0
    """Share of rows made of (text, target) pairs of data.multitask; drawn before the others."""
    draw: Literal["batch", "row"] = "batch"
    """Whether a whole batch shares one objective (THUDM/GLM) or each row draws its own (GLM-130B)."""
    mask_ratio: float = 0.15
    """Share of the tokens inside token- and sentence-level blanks."""
    mean_span: float = 3.0
    """Mean of the Poisson distribution of token-level span lengths."""
    single_span: float = 0.0
    """Probability that a text has exactly one token-level span. With draw = "batch" it is drawn once
    a batch and makes the batch token-level."""
    short_sequence: float = 0.0
    """Probability that a row is cut to short texts."""
    document_min_ratio: float = 0.5
    """Smallest share of a text that a document-level blank covers."""
    document_suffix: float = 0.5
    """Probability that a document-level blank is the end of the text, with no end-of-piece; else it
    is one span anywhere."""
    decoder_noise: float = 0.0
    """Probability that a token of part B is replaced by [dBLOCK] in token-level rows."""
    pieces_per_row: int = 1
    """Independent texts packed side by side in each token-level or multi-task row (GLM-130B: 4)."""
    positions: Literal["2d", "1d"] = "2d"
    """2d: position and block position. 1d: GLM-130B's rule, where [gMASK] and multi-task rows count
    straight on and [MASK] rows repeat the blank's position."""
    task_masks: bool = True
    """Use [sMASK] and [gMASK]; otherwise every blank is [MASK]."""
    shuffle_spans: bool = True
    """Put the spans of part B in random order."""
    cross_document_attention: bool = False
    """Treat the documents packed in one row as a single text, as THUDM/GLM does. Off, every
    document gets its own blanks and its own interval, and sees only itself."""
    cut_targets: bool = False
    """Cut the end of part B off when a piece overflows its slot, as GLM-130B's code did. Off, the
    end of the text is cut instead and every blank keeps its whole target."""

    def __post_init__(self) -> None:
        for name in (
            "token", "sentence", "multitask", "mask_ratio", "single_span", "short_sequence",
            "document_min_ratio", "document_suffix", "decoder_noise",
        ):  # fmt: skip
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"objective.{name} must be in [0, 1], got {value}")
        if self.token + self.sentence > 1 + 1e-9:
            raise ValueError(
                f"objective.token = {self.token} and objective.sentence = {self.sentence} exceed 1"
            )
        require_positive(self, "mean_span", "objective.")
        require_positive(self, "pieces_per_row", "objective.")


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how long its rows are. Without path and tfds: the documentation of
    the running Python, numpy and jax, which is on every machine."""

    path: tuple[str, ...] = ()
    """Files or folders of text: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet."""
    tfds: tuple[str, ...] = ()
    """Names of text datasets in the TFDS catalogue, such as tiny_shakespeare or wiki40b/en."""
    multitask: tuple[str, ...] = ()
    """Files or folders of (text, target) pairs for multi-task rows."""
    weights: tuple[float, ...] = ()
    """Sampling weight of each entry of path, then of tfds; empty: in proportion to their tokens."""
    text_field: str = "text"
    """Field of jsonl, parquet and TFDS records that holds the text."""
    target_field: str = "target"
    """Field of multi-task records that holds the target."""
    tokenizer: str | None = None
    """A vocabulary of the family, such as an official one: its file or folder; None trains one on
    the corpus."""
    vocab_size: int = 8192
    """Pieces of a newly trained tokenizer, special tokens included."""
    sequence_length: int = 512
    """Tokens of a training row (T), blanks included."""
    text_length: int | None = None
    """Tokens of raw text that a row is made from; None: sequence_length for token-level rows with
    room left for their blanks. GLM-130B used 2000 for 2048."""
    cache: str = "~/.cache/glmjax"
    """Folder of prepared corpora and tokenizers; safe to delete."""
    heldout: float = 0.1
    """Share of the documents, chosen by hash, that is never trained on."""
    workers: int = 0
    """Processes that build batches beside the training process."""
    skip: tuple[str, ...] = ()
    """Ranges of steps whose data is left out, such as 40701:40900 (both ends included)."""

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "data.")
        if self.sequence_length < 16:
            raise ValueError(
                f"data.sequence_length must be at least 16, got {self.sequence_length}"
            )
        if self.text_length is not None and not 8 <= self.text_length <= self.sequence_length:
            raise ValueError(
                f"data.text_length must be between 8 and data.sequence_length = "
                f"{self.sequence_length}, got {self.text_length}"
            )
        if not 0 < self.heldout < 1:
            raise ValueError(f"data.heldout must be between 0 and 1, got {self.heldout}")
        if self.workers < 0:
            raise ValueError(f"data.workers must not be negative, got {self.workers}")
        sources = len(self.path) + len(self.tfds)
        if self.weights and len(self.weights) != sources:
            raise ValueError(f"data.weights has {len(self.weights)} entries for {sources} sources")
        if any(weight <= 0 for weight in self.weights):
            raise ValueError(f"data.weights must be positive, got {self.weights}")
        self.skip_ranges()

    def skip_ranges(self) -> tuple[tuple[int, int], ...]:
        """The skipped ranges as sorted (first, last) pairs, both included.

        Raises:
            ValueError: a range is not FIRST:LAST, or two ranges overlap.
        """
        ranges = sorted(parse_range(text, "data.skip") for text in self.skip)
        for (_, last), (first, _) in itertools.pairwise(ranges):
            if first <= last:
                raise ValueError(f"data.skip ranges overlap at step {first}")
        return tuple(ranges)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a warm-up and a decay. Defaults are those of GLM-Large (THUDM/GLM, config/)."""

    learning_rate: float = 2e-4
    """Peak learning rate."""
    floor_ratio: float = 0.05
    """Learning rate at the end of the decay, as a share of the peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup: int = 8000
    """Length of the linear warm-up, in units of schedule_unit."""
    decay: int = 160_000
    """Where the decay ends, warm-up included, in units of schedule_unit."""
    schedule_unit: Literal["steps", "samples"] = "steps"
    """Count the schedule in optimizer steps (GLM) or in training rows (GLM-130B)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    epsilon: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of everything but LayerNorms and biases."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """How both moments are stored: 8, 4 or 2 bytes a parameter beside the 4 of the parameter."""
    offload: bool = False
    """Keep the moments in the memory of the host between steps (TPU and GPU)."""
    learning_rate_changes: tuple[tuple[int, float, float], ...] = ()
    """(step, learning_rate, floor_ratio) triples in order of step: from each step on these values
    hold, as in 26000 4e-5 0.2 42700 4e-5 0.1."""
    embedding_gradient_scale_changes: tuple[tuple[int, int, float], ...] = ()
    """(step, steps, scale) triples in order of step: from each step on the embedding gradient scale
    goes to `scale`, linearly over so many steps or, with 0, at once; 6000 500 1.0 33600 0 0.5."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon", "clip", "decay"):
            require_positive(self, name, "optimizer.")
        if not 0 <= self.warmup <= self.decay:
            raise ValueError(
                f"optimizer.warmup = {self.warmup} must lie between 0 and optimizer.decay = {self.decay}"
            )
        for name in ("floor_ratio", "beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1], got {value}")
        for name in ("learning_rate_changes", "embedding_gradient_scale_changes"):
            changes = getattr(self, name)
            steps = [step for step, *_ in changes]
            if steps != sorted(steps) or min(steps, default=0) < 0:
                raise ValueError(f"optimizer.{name} must be in order of step, got {changes}")
        for change in self.learning_rate_changes:
            _, rate, ratio = change
            if rate <= 0 or not 0 <= ratio <= 1:
                raise ValueError(
                    "optimizer.learning_rate_changes takes (step, a positive rate, a ratio in "
                    f"[0, 1]), got {change}"
                )
        for change in self.embedding_gradient_scale_changes:
            _, duration, scale = change
            if duration < 0 or not 0 <= scale <= 1:
                raise ValueError(
                    "optimizer.embedding_gradient_scale_changes takes (step, steps >= 0, a scale in "
                    f"[0, 1]), got {change}"
                )


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged. One axis may be -1: it takes the devices that are left."""

    data: int = -1
    """Replicas, each with its own part of the batch."""
    fsdp: int = 1
    """Devices that share parameters and optimizer state, and split the batch too."""
    tensor: int = 1
    """Devices that split heads, feed-forward width, vocabulary and, between blocks, the sequence."""
    fsdp_line: int = 1
    """Like fsdp, in as many groups: parameters are split over fsdp x fsdp_line devices and gathered
    over one after the other. For TPU slices with three dimensions, where fsdp is a plane and
    fsdp_line the rest, as in 32 x 4 on v5p:4x4x8."""

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh sizes must be positive with at most one -1, got {sizes}")


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of one job find each other. On Cloud TPU, in GKE and under Slurm jax finds
    out itself; elsewhere give all of coordinator, num_processes and process, as flags or as
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Else there is one process."""

    coordinator: str | None = None
    """HOST:PORT at which process 0 awaits the others."""
    num_processes: int | None = None
    """Processes of the job."""
    process: int | None = None
    """Number of this process, from 0."""
    start_seconds: int = 300
    """How long processes wait for each other at the start."""
    barrier_seconds: int = 1200
    """How long processes wait for each other when a checkpoint is written."""
    heartbeat_seconds: int = 100
    """A process that shows no sign of life for so long is lost, and the others end."""

    def __post_init__(self) -> None:
        for name in ("start_seconds", "barrier_seconds", "heartbeat_seconds"):
            require_positive(self, name, "distributed.")


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how often, where to."""

    run: str = "runs/default"
    """Folder of the run: config.json, history.jsonl, metrics.jsonl, summary.json, loss.png and
    checkpoints/."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_size: int = 32
    """Rows of one optimizer step, over all devices."""
    microbatch_size: int | None = None
    """Rows of one forward and backward pass, over all devices; None: the whole batch. A growing
    batch that is no multiple of it is filled up with empty rows."""
    ramp: tuple[int, int, int] | None = None
    """Batch-size ramp (start, increment, rows): grows from start by increment over so many rows."""
    seed: int = 0
    """Seed of parameters, data order, blanks and dropout."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: int = 200
    """Steps between two held-out evaluations; one is always made at the end."""
    evaluate_batches: int = 16
    """Batches of one held-out evaluation."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; one is always made at the end."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints are kept."""
    exploding_ratio: float = 20.0
    """A step whose gradient norm exceeds its running mean so many times is skipped."""
    max_skipped: int = 10
    """Skipped steps in a row after which the run stops."""
    profile: str | None = None
    """Steps to trace with jax.profiler, such as 10:15."""
    compilation_cache: str | None = None
    """Folder or gs:// address where compiled programs are kept for the next start; None: what
    JAX_COMPILATION_CACHE_DIR says."""
    local_checkpoints: str | None = None
    """Folder on a disk of each host for checkpoints between the durable ones; None: none are made."""
    local_checkpoint_every: int = 50
    """Steps between two local checkpoints."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs glmjax[tensorboard])."""
    wandb: str | None = None
    """Weights & Biases project to log to (needs glmjax[wandb])."""

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "log_every", "evaluate_every", "evaluate_batches",
            "checkpoint_every", "keep_checkpoints", "exploding_ratio", "max_skipped",
            "local_checkpoint_every",
        ):  # fmt: skip
            require_positive(self, name, "train.")
        if "://" in self.run:
            raise ValueError(
                f"train.run = {self.run!r} is an address, not a folder; mount the bucket on every host"
            )
        if self.microbatch_size is not None:
            require_positive(self, "microbatch_size", "train.")
            if self.batch_size % self.microbatch_size:
                raise ValueError(
                    f"train.microbatch_size = {self.microbatch_size} does not divide "
                    f"train.batch_size = {self.batch_size}"
                )
        if self.ramp is not None:
            start, increment, _ = self.ramp
            if (
                min(self.ramp) < 1
                or start > self.batch_size
                or (self.batch_size - start) % increment
            ):
                raise ValueError(
                    f"train.ramp = {self.ramp} does not reach train.batch_size = {self.batch_size} "
                    "in whole increments"
                )
        if self.profile is not None:
            parse_range(self.profile, "train.profile")


@dataclass(frozen=True)
class Experiment:
    """A training run, whole: what `glmjax train EXPERIMENT` reads and writes to config.json."""

    model: GLMConfig = field(default_factory=GLMConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        model, objective, data = self.model, self.objective, self.data
        # A blank has the position of its mask, so that positions count the text alone.
        field = "text_length" if data.text_length and not data.multitask else "sequence_length"
        length = getattr(data, field)
        if model.positions == "learned_2d" and length > model.max_positions:
            raise ValueError(
                f"data.{field} = {length} exceeds model.max_positions = {model.max_positions}"
            )
        if (objective.positions == "1d") != model.positions_1d:
            raise ValueError(
                f"objective.positions = {objective.positions!r} does not fit model.positions = "
                f"{model.positions!r}"
            )
        if data.sequence_length % objective.pieces_per_row:
            raise ValueError(
                f"objective.pieces_per_row = {objective.pieces_per_row} does not divide "
                f"data.sequence_length = {data.sequence_length}"
            )
        if self.optimizer.embedding_gradient_scale_changes and not model.embedding_gradient_scale:
            raise ValueError(
                "optimizer.embedding_gradient_scale_changes needs a model.embedding_gradient_scale "
                "> 0: a gradient that is 0 cannot be scaled up"
            )
        if bool(objective.multitask) != bool(data.multitask):
            raise ValueError(
                f"objective.multitask = {objective.multitask} does not fit data.multitask = "
                f"{data.multitask}: give both or neither"
            )
