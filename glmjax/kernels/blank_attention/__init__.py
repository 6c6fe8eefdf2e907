"""Attention where query q sees the keys k_start[q] <= k < k_end[q].

`attend` is the one entry. Each implementation is a module of its own with a function
`attend(q_BTHK, k_BSHK, v_BSHK, k_start_BT, k_end_BT, seeds_BH2, dropout)`; `reference` is the
meaning of all of them. Those in plain XLA take ALiBi's positions and the type of the softmax too.
"""

import functools
import importlib
import logging

import jax

from glmjax.config import AttentionImplementation, Dtype
from glmjax.kernels.blank_attention.alibi import Positions
from glmjax.kernels.blank_attention.dropout import head_seeds
from glmjax.kernels.blank_attention.gpu import compute_capability
from glmjax.sharding import named_sharding, per_device, target_device

logger = logging.getLogger(__name__)

# XLA splits these over a mesh by itself; kernels are opaque to it and get their part of the arrays.
_XLA = ("reference", "blockwise")


def attend(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    dropout_key: jax.Array | None = None,
    dropout: float = 0.0,
    *,
    implementation: AttentionImplementation = "auto",
    positions: Positions | None = None,
    softmax_dtype: Dtype = "float32",
) -> jax.Array:
    """Attention output [B, T, H, K], by the implementation of that name.

    "auto" takes the one made for the platform and says in the log which. Under a mesh every device
    works on its rows and heads. Weights are dropped with probability `dropout` if a key is given.
    With positions scores fall with the distance between query and key (ALiBi). What the softmax
    computes is rounded to its type.

    Raises:
        ValueError: the implementation does not exist on this platform or lacks what is asked for,
            or a mesh axis does not divide the rows or heads.
    """
    require_platform(implementation)
    needs_xla = positions is not None or softmax_dtype != "float32"
    if implementation == "auto":
        implementation = _automatic(
            platform(), q_BTHK.dtype.name, q_BTHK.shape[-1], dropout, needs_xla
        )
    kernel = importlib.import_module(f"glmjax.kernels.blank_attention.{implementation}").attend
    seeds_BH2, rate = None, 0.0
    if dropout_key is not None and dropout:
        seeds_BH2, rate = head_seeds(dropout_key, q_BTHK.shape[0], q_BTHK.shape[2]), dropout
    arrays = q_BTHK, k_BSHK, v_BSHK, k_start_BT, k_end_BT, seeds_BH2
    if needs_xla:
        if implementation not in _XLA:
            raise ValueError(
                f"attention {implementation!r} has neither ALiBi nor a bfloat16 softmax; "
                "'reference' and 'blockwise' have"
            )
        return kernel(*arrays, rate, positions, softmax_dtype)
    if implementation in _XLA or jax.sharding.get_abstract_mesh().size <= 1:
        return kernel(*arrays, rate)
    return _sharded(functools.partial(kernel, dropout=rate), *arrays)


def platform() -> str:
    """Where the program that is being traced will run: "cpu", "gpu" or "tpu"."""
    return target_device().platform


def require_platform(implementation: AttentionImplementation) -> None:
    """Raises ValueError if the implementation is the TPU kernels and the program runs elsewhere."""
    if implementation == "tpu" and platform() != "tpu":
        raise ValueError(f"attention 'tpu' needs a TPU, and this program runs on {platform()}")


def uses_tpu(implementation: AttentionImplementation) -> bool:
    """Whether an implementation is the TPU kernels here; raises like `require_platform`."""
    require_platform(implementation)
    return implementation in ("auto", "tpu") and platform() == "tpu"


@functools.cache
def _automatic(
    platform: str, dtype: str, head_size: int, dropout: float, needs_xla: bool = False
) -> AttentionImplementation:
    """The implementation made for a platform; cached, so that the log says each choice once."""
    chosen: AttentionImplementation = "blockwise"
    refusals = []
    if needs_xla:
        refusals.append("ALiBi and a bfloat16 softmax are in plain XLA alone")
    elif platform == "tpu":
        chosen = "tpu"
    elif platform == "gpu":
        # The order of preference: tokamax skips hidden keys, cuDNN does not.
        candidates: tuple[AttentionImplementation, ...] = "tokamax", "cudnn"
        for name in candidates:
            kernel = importlib.import_module(f"glmjax.kernels.blank_attention.{name}")
            refusal = kernel.refusal(dtype, head_size, dropout, compute_capability())
            if refusal is None:
                chosen = name
                break
            refusals.append(refusal)
    logger.info("; ".join([f"attention: {chosen}, chosen for {platform}", *refusals]))
    return chosen


def _sharded(kernel, q_BTHK, k_BSHK, v_BSHK, k_start_BT, k_end_BT, seeds_BH2):
    """The kernel on each device's rows and heads; queries may be split too, keys never are."""
    queries, keys = ("batch", "length", "heads", "head"), ("batch", "keys", "heads", "head")
    # Says which rows or heads a mesh axis does not divide, before shard_map does.
    split = named_sharding(
        jax.sharding.get_abstract_mesh(), queries, q_BTHK.shape, "attention"
    ).spec

    def local(q_BTHK, k_BSHK, v_BSHK, k_start_BT, k_end_BT, seeds_BH2):
        if seeds_BH2 is not None and split[1] is not None:
            # Dropout counts queries from the start of the whole row.
            first = jax.lax.axis_index(split[1]) * q_BTHK.shape[1]
            seeds_BH2 = seeds_BH2.at[..., 0].add(first)
        return kernel(q_BTHK, k_BSHK, v_BSHK, k_start_BT, k_end_BT, seeds_BH2)

    rows = ("batch", "length")
    in_axes = (queries, keys, keys, rows, rows, ("batch", "heads"))
    return per_device(local, in_axes, queries)(
        q_BTHK, k_BSHK, v_BSHK, k_start_BT, k_end_BT, seeds_BH2
    )
