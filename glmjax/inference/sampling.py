"""How the next token is drawn from its logits."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. A pytree of numbers, so that no setting costs a compilation."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: int = 0
    """Draw among so many most probable tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest most probable tokens whose probabilities reach this sum; 1: among all."""
    seed: int = 0
    """The same seed and prompt give the same tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or positive, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2^31), got {self.seed}")

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return dataclasses.astuple(self), None

    @classmethod
    def tree_unflatten(cls, _: None, values: tuple[Any, ...]) -> "Sampling":
        # Inside jit the numbers are traced and cannot be checked again.
        sampling = object.__new__(cls)
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(sampling, field.name, value)
        return sampling


def sample(logits_BV: jax.Array, sampling: Sampling, key_B: jax.Array) -> jax.Array:
    """Draws token ids [B] from float32 logits, every row with its own key.

    The order is THUDM/GLM's: temperature, then top-k, then top-p of what is left. Tokens as probable
    as the last one kept are kept too.
    """

    def draw(logits_BV: jax.Array) -> jax.Array:
        logits_BV = logits_BV / sampling.temperature
        is_cut = (sampling.top_k > 0) | (sampling.top_p < 1)
        logits_BV = jax.lax.cond(is_cut, cut_tail, lambda x, _: x, logits_BV, sampling)
        return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)

    def most_probable(logits_BV: jax.Array) -> jax.Array:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, most_probable, logits_BV)


def cut_tail(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits with -inf for tokens outside top-k and top-p."""
    size = logits_BV.shape[-1]
    sorted_BV = jnp.sort(logits_BV, -1, descending=True)
    rank_V = jnp.arange(size)
    top_k = jnp.where(sampling.top_k > 0, sampling.top_k, size)
    sorted_BV = jnp.where(rank_V < top_k, sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV, -1)
    before_BV = jnp.cumsum(probability_BV, -1) - probability_BV
    is_kept_BV = (rank_V < top_k) & ((before_BV < sampling.top_p) | (sampling.top_p >= 1))
    last_B1 = jnp.min(jnp.where(is_kept_BV, sorted_BV, jnp.inf), -1, keepdims=True)
    return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)
