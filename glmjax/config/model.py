"""A model: its shape, its special tokens, and the form of its weights."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from glmjax.config.fields import require_positive

Positions = Literal["learned_2d", "rope_1d", "rope_2d", "rope_half", "alibi"]
Norm = Literal["pre", "post", "sandwich", "deepnorm", "rmsnorm"]
FeedForward = Literal["gelu", "geglu", "swiglu"]
Dtype = Literal["float32", "bfloat16"]
AttentionImplementation = Literal["auto", "reference", "blockwise", "tpu", "tokamax", "cudnn"]
Remat = Literal["none", "matmuls", "ffn", "attention", "block"]
Saved = Literal["qkv", "attention", "attention_out", "ffn_in", "ffn_out"]
Kernel = Literal["qkv", "attention_out", "ffn_in", "ffn_out"]


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
        require_positive(self, "shards", "quantization.")
        if self.scheme not in ("absmax", "zeropoint"):
            raise ValueError(
                f"quantization.scheme must be 'absmax' or 'zeropoint', got {self.scheme!r}"
            )
        if self.group_size is not None:
            require_positive(self, "group_size", "quantization.")
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
    of each head alone, neighbours as pairs (ChatGLM2-6B to GLM-4). alibi: none; scores fall with
    the distance, in each head at a rate of its own (Press et al. 2022)."""
    norm: Norm = "pre"
    """pre: LayerNorm before each branch (GLM). post: after each branch and its residual (Vaswani et
    al. 2017), and on the embeddings. sandwich: before and after each branch (CogView, Ding et al.
    2021). deepnorm: as post, with the residual times sqrt(2 N) (GLM-130B, ChatGLM-6B). rmsnorm: as
    pre, with RMSNorm (ChatGLM2-6B to GLM-4)."""
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
    """Type of activations and matrix products; parameters, norms and loss stay float32."""
    softmax_dtype: Dtype = "float32"
    """Type to which attention scores, their exponentials, the sum of these and the weights are
    rounded."""
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
            require_positive(self, name)
        for name in ("embedding_dropout", "attention_dropout", "hidden_dropout"):
            rate = getattr(self, name)
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1), got {rate}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide hidden_size = {self.hidden_size}"
            )
        if self.num_kv_heads is not None:
            require_positive(self, "num_kv_heads")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}"
            )
        if self.prefix_length < 0:
            raise ValueError(f"prefix_length must not be negative, got {self.prefix_length}")
        if self.prefix_projection and not self.prefix_length:
            raise ValueError("prefix_projection needs a prefix_length")
        self._check_quantization()
        parts = {"rope_1d": 2, "rope_2d": 4, "rope_half": 4}.get(self.positions, 1)
        if self.head_size % parts:
            raise ValueError(
                f"positions = {self.positions!r} needs a head size divisible by {parts}, got "
                f"{self.head_size} (hidden_size {self.hidden_size} / num_heads {self.num_heads})"
            )
        if self.positions == "alibi" and (self.kv_heads < self.num_heads or self.prefix_length):
            raise ValueError(
                f"positions = 'alibi' takes neither num_kv_heads = {self.num_kv_heads} nor "
                f"prefix_length = {self.prefix_length}"
            )
        if self.attention in ("tpu", "tokamax", "cudnn"):
            if self.positions == "alibi":
                raise ValueError(f"attention = {self.attention!r} has no positions = 'alibi'")
            if self.softmax_dtype != "float32":
                raise ValueError(
                    f"attention = {self.attention!r} has no softmax_dtype = {self.softmax_dtype!r}"
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
    def positions_1d(self) -> bool:
        """Whether the position alone says where a token is: objective.positions is "1d"."""
        return self.positions in ("rope_1d", "rope_half", "alibi")

    @property
    def residual_scale(self) -> float:
        """DeepNorm's alpha, sqrt(2 N) (GLM-130B section 2.2); 1 for all other norms."""
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
