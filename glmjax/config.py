"""Every setting of glmjax, as frozen dataclasses.

A model is described by `GLMConfig`, a training run by `Experiment`. Both check themselves when they
are made, so a wrong combination fails before any array exists. The text under a field is also what
`glmjax train --help` prints.
"""

import dataclasses
import difflib
import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_type_hints

Positions = Literal["learned_2d", "rope_1d", "rope_2d", "rope_half"]
Norm = Literal["pre", "deepnorm", "rmsnorm"]
FeedForward = Literal["gelu", "geglu", "swiglu"]
Dtype = Literal["float32", "bfloat16"]
AttentionImplementation = Literal["auto", "reference", "blockwise", "tpu", "tokamax", "cudnn"]
Remat = Literal["none", "matmuls", "ffn", "attention", "block"]
Saved = Literal["qkv", "attention", "attention_out", "ffn_in", "ffn_out"]
Kernel = Literal["qkv", "attention_out", "ffn_in", "ffn_out"]

Config = TypeVar("Config")


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a meaning of their own. A vocabulary without an id holds None there."""

    mask: int
    """[MASK], a blank of a few tokens."""
    sop: int
    """Start of piece: the first input of every filled blank."""
    eop: int
    """End of piece: the last target of every filled blank."""
    eos: int
    """End of document."""
    pad: int
    """Fills the end of short rows."""
    smask: int | None = None
    """[sMASK], a blank of whole sentences."""
    gmask: int | None = None
    """[gMASK], a blank of a long continuation."""
    cls: int | None = None
    """[CLS] (ENC), prepended to every document by GLM 110M-10B."""
    dblock: int | None = None
    """[dBLOCK], the noise token of part B."""

    @property
    def masks(self) -> tuple[int, ...]:
        """The ids that open a blank."""
        return tuple(i for i in (self.mask, self.smask, self.gmask) if i is not None)


@dataclass(frozen=True)
class Quantization:
    """Matrices as integers with a scale per output (GLM-130B section 4)."""

    bits: Literal[4, 8]
    """Width of an integer; two of 4 bits share a byte."""
    shards: int = 1
    """attention_out and ffn_out have scales for each of so many equal parts of their inputs:
    GLM-130B's shards were quantised one by one."""
    scheme: Literal["absmax", "zeropoint"] = "absmax"
    """absmax: integers are centred on 0, as in the published models. zeropoint: on the middle of the
    weights that share a scale (GLM-130B equations 9 to 11)."""
    group_size: int | None = None
    """So many inputs that follow each other share a scale; None: all. In attention_out whole heads."""
    kernels: tuple[Kernel, ...] = ("qkv", "attention_out", "ffn_in", "ffn_out")
    """Matrices of a block that become integers; qkv: all for queries, keys and values."""
    embeddings: bool = False
    """Word embedding and output layer become integers too, with scales for each word."""
    float_layers: tuple[int, ...] = ()
    """Blocks, from 0, that stay floats."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"quantization.bits must be 4 or 8, got {self.bits}")
        _require_positive(self, "shards", "quantization.")
        if self.scheme not in ("absmax", "zeropoint"):
            raise ValueError(
                f"quantization.scheme must be 'absmax' or 'zeropoint', got {self.scheme!r}"
            )
        if self.group_size is not None:
            _require_positive(self, "group_size", "quantization.")
        unknown = sorted(set(self.kernels) - set(get_args(Kernel)))
        if unknown:
            raise ValueError(
                f"quantization.kernels takes {', '.join(get_args(Kernel))}, got {unknown[0]!r}"
            )
        if not (self.kernels or self.embeddings):
            raise ValueError("quantization needs kernels or embeddings")
        # Sets, whatever their order: equal configurations compare equal.
        ordered = tuple(kernel for kernel in get_args(Kernel) if kernel in self.kernels)
        object.__setattr__(self, "kernels", ordered)
        object.__setattr__(self, "float_layers", tuple(sorted(set(self.float_layers))))

    def groups(self, kernel: Kernel | Literal["embeddings"], inputs: int) -> int:
        """How many parts of so many inputs of a kernel have a scale each."""
        if self.group_size is not None:
            return inputs // self.group_size
        return self.shards if kernel in ("attention_out", "ffn_out") else 1


@dataclass(frozen=True)
class GLMConfig:
    """One transformer for all families: GLM 110M-10B, GLM-130B, ChatGLM-6B and its successors."""

    name: str = "custom"
    """Name of the preset, for logs and checkpoints."""
    num_layers: int = 12
    """Number of transformer blocks (N)."""
    hidden_size: int = 768
    """Width of the residual stream (D)."""
    num_heads: int = 12
    """Attention heads (H); the head size K is hidden_size / num_heads."""
    num_kv_heads: int | None = None
    """Heads of keys and values (G), each shared by H / G heads of queries; None: H."""
    ffn_size: int = 3072
    """Inner width of the feed-forward layer (F); for geglu and swiglu the width of each half."""
    vocab_size: int = 30592
    """Rows of the word embedding (V), padding included."""
    max_positions: int = 512
    """Longest position id; the learned tables have one row more."""
    positions: Positions = "learned_2d"
    """learned_2d: two added tables (GLM). rope_1d: rotary (GLM-130B). rope_2d: rotary, one half of
    each head by position and one by block position (ChatGLM-6B). rope_half: rotary, the first half
    of each head alone, neighbours as pairs (ChatGLM2-6B to GLM-4)."""
    norm: Norm = "pre"
    """pre: LayerNorm before each branch (GLM). deepnorm: the residual is the normalised input times
    sqrt(2 N) (GLM-130B, ChatGLM-6B). rmsnorm: as pre, with RMSNorm (ChatGLM2-6B to GLM-4)."""
    ffn: FeedForward = "gelu"
    """gelu: tanh form. geglu: value * gelu(gate), erf form (GLM-130B). swiglu: silu(gate) * value
    (ChatGLM2-6B to GLM-4)."""
    biases: Literal["all", "qkv"] = "all"
    """Which matrix products of a block have a bias: all, or those for queries, keys and values."""
    tied_embeddings: bool = True
    """The output layer is the transposed word embedding."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every norm."""
    rope_base: float = 10000.0
    """Rotary frequencies are the powers of 1 / rope_base."""
    rope_frequencies: Literal["float32", "float16"] = "float16"
    """Precision to which rotary frequencies are rounded; the official GLM-130B and ChatGLM-6B code
    rounds them to float16."""
    special_tokens: SpecialTokens | None = None
    """Special ids of the vocabulary, needed to train and to generate."""
    prefix_length: int = 0
    """Learnt keys and values in front of every layer (P-tuning v2); 0: none."""
    prefix_projection: bool = False
    """The prefix is made from embeddings by two layers."""
    quantization: Quantization | None = None
    """Which matrices are stored as integers, and how; None: none."""
    initializer_scale: float = 0.02
    """Standard deviation of the normal initialisers of embeddings and of pre-norm projections."""
    embedding_dropout: float = 0.1
    """Dropout after the embeddings, in training."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities, in training."""
    hidden_dropout: float = 0.1
    """Dropout on both residual branches, in training."""
    embedding_gradient_scale: float = 1.0
    """Embedding gradient shrink alpha (GLM-130B section 2.3): the word embedding's gradient is
    multiplied by it, the forward pass is unchanged."""
    dtype: Dtype = "float32"
    """Type of activations and matrix products; parameters, softmax, norms and loss stay float32."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Type of cached keys and values; None: that of dtype. int8 has a scale per token and head."""
    attention: AttentionImplementation = "auto"
    """auto: the one made for the platform. reference: dense, T x T scores. blockwise: plain XLA that
    works through key blocks, memory linear in T. tpu: Pallas kernels. tokamax, cudnn: kernels of
    others for NVIDIA GPUs."""
    remat: Remat = "matmuls"
    """What the backward pass recomputes. none: nothing. matmuls: all but matrix products and
    attention. ffn: the product for queries, keys and values too. attention: all but attention and
    its output product. block: everything inside each block."""
    saved: tuple[Saved, ...] = ()
    """Outputs inside a block that are kept on top of those that `remat` keeps."""
    offloaded: tuple[Saved, ...] = ()
    """Kept outputs that wait for the backward pass in the memory of the host."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers", "hidden_size", "num_heads", "ffn_size", "vocab_size", "max_positions",
            "rope_base",
        ):  # fmt: skip
            _require_positive(self, name)
        for name in ("embedding_dropout", "attention_dropout", "hidden_dropout"):
            rate = getattr(self, name)
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1), got {rate}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide hidden_size = {self.hidden_size}"
            )
        if self.num_kv_heads is not None:
            _require_positive(self, "num_kv_heads")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}"
            )
        if self.prefix_length < 0:
            raise ValueError(f"prefix_length must not be negative, got {self.prefix_length}")
        if self.prefix_projection and not self.prefix_length:
            raise ValueError("prefix_projection needs a prefix_length")
        self._check_quantization()
        parts = {"learned_2d": 1, "rope_1d": 2, "rope_2d": 4, "rope_half": 4}[self.positions]
        if self.head_size % parts:
            raise ValueError(
                f"positions = {self.positions!r} needs a head size divisible by {parts}, got "
                f"{self.head_size} (hidden_size {self.hidden_size} / num_heads {self.num_heads})"
            )
        if self.remat == "none" and (self.saved or self.offloaded):
            raise ValueError(
                f"model.saved = {self.saved} and model.offloaded = {self.offloaded} need another "
                "model.remat than 'none', which keeps everything on the device"
            )
        if self.special_tokens is not None:
            for token, id in dataclasses.asdict(self.special_tokens).items():
                if id is not None and not 0 <= id < self.vocab_size:
                    raise ValueError(
                        f"special token {token} = {id} is outside vocab_size = {self.vocab_size}"
                    )

    @property
    def head_size(self) -> int:
        """Width of one attention head (K)."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values (G)."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def residual_scale(self) -> float:
        """DeepNorm's alpha, sqrt(2 N) (GLM-130B section 2.2); 1 for pre-norm."""
        return math.sqrt(2 * self.num_layers) if self.norm == "deepnorm" else 1.0

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        for name in ("num_heads", "ffn_size"):
            if getattr(self, name) % self.quantization.shards:
                raise ValueError(
                    f"quantization.shards = {self.quantization.shards} does not divide {name} = "
                    f"{getattr(self, name)}"
                )
        for name in ("hidden_size", "head_size", "ffn_size"):
            if self.quantization.bits == 4 and getattr(self, name) % 2:
                raise ValueError(
                    f"quantization to 4 bits needs an even {name}, got {getattr(self, name)}"
                )
        for layer in self.quantization.float_layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"quantization.float_layers has {layer}, and there are layers 0 to "
                    f"{self.num_layers - 1}"
                )
        self._check_group_size(self.quantization)

    def _check_group_size(self, quantization: Quantization) -> None:
        size, shards = quantization.group_size, quantization.shards
        if size is None:
            return
        kernels = quantization.kernels
        inputs = {}
        if kernels != ("ffn_out",):
            inputs["hidden_size"] = self.hidden_size
        if "attention_out" in kernels and shards > 1:
            inputs[f"hidden_size / {shards} shards"] = self.hidden_size // shards
        if "ffn_out" in kernels:
            name = f"ffn_size / {shards} shards" if shards > 1 else "ffn_size"
            inputs[name] = self.ffn_size // shards
        for name, count in inputs.items():
            if count % size:
                raise ValueError(
                    f"quantization.group_size = {size} does not divide {name} = {count}"
                )
        if "attention_out" in kernels and size % self.head_size:
            raise ValueError(
                f"quantization.group_size = {size} is no multiple of the head size "
                f"{self.head_size}: groups of attention_out are whole heads"
            )


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
        _require_positive(self, "mean_span", "objective.")
        _require_positive(self, "pieces_per_row", "objective.")


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
        _require_positive(self, "vocab_size", "data.")
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
            _require_positive(self, name, "optimizer.")
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
            _require_positive(self, name, "distributed.")


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
            _require_positive(self, name, "train.")
        if "://" in self.run:
            raise ValueError(
                f"train.run = {self.run!r} is an address, not a folder; mount the bucket on every host"
            )
        if self.microbatch_size is not None:
            _require_positive(self, "microbatch_size", "train.")
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
        if (objective.positions == "1d") != (model.positions in ("rope_1d", "rope_half")):
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


def replace(config: Config, **changes: Any) -> Config:
    """A copy of a configuration with some fields changed; dots reach into nested ones.

    `replace(experiment, **{"train.steps": 10})` is what `--train.steps 10` does.

    Raises:
        ValueError: a field is unknown; the nearest known one is named.
    """
    nested: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
        if head not in names:
            near = difflib.get_close_matches(head, names, n=1, cutoff=0)[0]
            raise ValueError(
                f"{type(config).__name__} has no field {head!r}; the nearest is {near!r}"
            )
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            nested[head] = {"": value}
    values = {
        head: inner[""] if "" in inner else replace(getattr(config, head), **inner)
        for head, inner in nested.items()
    }
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def config_to_json(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries, ready for `json.dumps`."""
    return dataclasses.asdict(config)


def config_from_json(kind: type[Config], values: dict[str, Any]) -> Config:
    """The configuration that `config_to_json` wrote; fields it lacks take their defaults.

    Raises:
        ValueError: a field is unknown, or one without a default is missing.
    """
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(map(repr, unknown))}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    missing = sorted(set(required) - set(values))
    if missing:
        raise ValueError(f"{kind.__name__} lacks the field {', '.join(map(repr, missing))}")

    def parse(hint: Any, value: Any) -> Any:
        nested: Any = next(filter(dataclasses.is_dataclass, (hint, *get_args(hint))), None)
        if nested is not None and value is not None:
            return config_from_json(nested, value)
        return _as_tuple(value)

    return kind(**{name: parse(hints[name], value) for name, value in values.items()})


def _as_tuple(value: Any) -> Any:
    """JSON has lists where configurations, which are hashed, have tuples."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def parse_range(text: str, name: str) -> tuple[int, int]:
    """Reads "FIRST:LAST" as two step numbers, both included.

    Raises:
        ValueError: not of that form, or LAST is before FIRST.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"{name} takes FIRST:LAST with FIRST <= LAST, got {text!r}")
    return int(match[1]), int(match[2])


def _require_positive(config: Any, name: str, prefix: str = "") -> None:
    value = getattr(config, name)
    if not value > 0:
        raise ValueError(f"{prefix}{name} must be positive, got {value}")
