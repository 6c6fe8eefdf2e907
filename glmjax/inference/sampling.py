"""How the next token is drawn from its logits."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MOST_BANNED = 16
"""Banned ids of the smallest bucket."""


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. A pytree of numbers, so that no setting costs a compilation.

    Inside a running batch each number may be an array [B], and `banned` one of [B, n] with -1 where
    there is none: `per_row` makes these.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: int = 0
    """Draw among so many most probable tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest most probable tokens whose probabilities reach this sum; 1: among all."""
    seed: int = 0
    """The same seed and prompt give the same tokens."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens of the prompt and the piece are divided by it, negative ones
    multiplied; 1: off (CTRL, Hugging Face transformers)."""
    no_repeat_ngram: int = 0
    """No so many tokens stand in a row that did before, counting only those whose last token was
    generated (THUDM/GLM-130B `generation/strategies.py`); 0: off."""
    min_new_tokens: int = 0
    """A piece does not end before it has so many tokens."""
    banned: tuple[int, ...] = ()
    """Ids that are never drawn."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or positive, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2^31), got {self.seed}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        check_bans(self.no_repeat_ngram, self.min_new_tokens, self.banned)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        *numbers, banned = (getattr(self, field.name) for field in dataclasses.fields(self))
        return (*numbers, pad_ids(banned) if isinstance(banned, tuple) else banned), None

    @classmethod
    def tree_unflatten(cls, _: None, values: tuple[Any, ...]) -> "Sampling":
        # Inside jit the numbers are traced and cannot be checked again.
        sampling = object.__new__(cls)
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(sampling, field.name, value)
        return sampling


class History(NamedTuple):
    """What stands before the next token of each row.

    The prompt of a later blank of a row includes the pieces before it: rules that count generated
    tokens count those of one blank.
    """

    ids_BS: Any
    """The prompt and the piece so far, without gaps; what follows is not read."""
    length_B: Any
    """Tokens of both."""
    prompt_B: Any
    """Tokens of the prompt."""
    end_ids: tuple[int, ...]
    """Tokens that end a piece."""


def check_bans(no_repeat_ngram: int, min_new_tokens: int, banned: Sequence[int]) -> None:
    """Checks settings that forbid tokens.

    Raises:
        ValueError: one is negative; names it.
    """
    if no_repeat_ngram < 0:
        raise ValueError(f"no_repeat_ngram must be 0 (off) or positive, got {no_repeat_ngram}")
    if min_new_tokens < 0:
        raise ValueError(f"min_new_tokens must be 0 or positive, got {min_new_tokens}")
    if min(banned, default=0) < 0:
        raise ValueError(f"banned ids must be 0 or positive, got {min(banned)}")


def pad_ids(ids: Sequence[int], smallest: int = MOST_BANNED) -> np.ndarray:
    """Ids as int32, padded with -1 to a power of two."""
    size = max(smallest, 1 << (len(ids) - 1).bit_length()) if ids else smallest
    return np.array([*ids, *[-1] * (size - len(ids))], np.int32)


def per_row(samplings: Sequence[Sampling], num_banned: int = MOST_BANNED) -> Sampling:
    """The settings of B rows as one, with numpy arrays [B] and, of banned ids, [B, n].

    n is the power of two, num_banned or more, that holds the ids of each row.
    """
    num_banned = max([num_banned, *(len(pad_ids(sampling.banned)) for sampling in samplings)])
    rows = [
        (*sampling.tree_flatten()[0][:-1], pad_ids(sampling.banned, num_banned))
        for sampling in samplings
    ]
    arrays = [
        np.array(column, np.float32 if isinstance(field.default, float) else np.int32)
        for column, field in zip(zip(*rows, strict=True), dataclasses.fields(Sampling), strict=True)
    ]
    return Sampling.tree_unflatten(None, tuple(arrays))


def sample(
    logits_BV: jax.Array, sampling: Sampling, key_B: jax.Array, history: History
) -> jax.Array:
    """Draws token ids [B] from float32 logits, every row with its own key.

    First come the rules about what stands before, then in THUDM/GLM's order temperature, top-k, and
    top-p of what is left. Tokens as probable as the last one kept are kept too.
    """
    logits_BV = apply_rules(logits_BV, sampling, history)
    is_drawn_B = jnp.broadcast_to(jnp.asarray(sampling.temperature) > 0, len(logits_BV))

    def most_probable(logits_BV: jax.Array) -> jax.Array:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)

    def draw(logits_BV: jax.Array) -> jax.Array:
        divisor_B = jnp.where(is_drawn_B, sampling.temperature, 1)
        scaled_BV = logits_BV / divisor_B[:, None]
        scaled_BV = cut_tail(scaled_BV, sampling)
        drawn_B = jax.vmap(jax.random.categorical)(key_B, scaled_BV).astype(jnp.int32)
        return jnp.where(is_drawn_B, drawn_B, most_probable(logits_BV))

    return jax.lax.cond(jnp.any(is_drawn_B), draw, most_probable, logits_BV)


def cut_tail(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits with -inf for tokens outside top-k and top-p."""
    B = len(logits_BV)
    top_k_B1, top_p_B1 = (jnp.broadcast_to(x, B)[:, None] for x in (sampling.top_k, sampling.top_p))

    def cut_k(x_BV: jax.Array) -> jax.Array:
        count_B1 = jnp.where(top_k_B1 > 0, top_k_B1, jnp.inf)
        return jnp.where(largest(x_BV, jnp.ones_like(x_BV), count_B1), x_BV, -jnp.inf)

    def cut_p(x_BV: jax.Array) -> jax.Array:
        probability_BV = jax.nn.softmax(x_BV)
        share_B1 = jnp.where(top_p_B1 < 1, top_p_B1, jnp.inf)
        return jnp.where(largest(x_BV, probability_BV, share_B1), x_BV, -jnp.inf)

    return _if_any(top_p_B1 < 1, cut_p, _if_any(top_k_B1 > 0, cut_k, logits_BV))


def largest(x_BV: jax.Array, weight_BV: jax.Array, target_B1: jax.Array) -> jax.Array:
    """True for the fewest largest float32 numbers of each row whose weights reach a sum, and for
    those equal to the last of them; for all where they do not reach it.

    The bound is found bit by bit, which takes 32 passes over the numbers: sorting 130,000 of them on
    a CPU takes 15 times as long.
    """
    bits_BV = jax.lax.bitcast_convert_type(jnp.where(x_BV == 0, 0, x_BV), jnp.uint32)
    top = jnp.uint32(1 << 31)
    # As unsigned integers these are in the order of the numbers.
    order_BV = jnp.where(bits_BV < top, bits_BV ^ top, ~bits_BV)

    def add_bit(n: jax.Array, bound_B1: jax.Array) -> jax.Array:
        higher_B1 = bound_B1 | (top >> n.astype(jnp.uint32))
        sum_B1 = jnp.sum(jnp.where(order_BV >= higher_B1, weight_BV, 0), -1, keepdims=True)
        return jnp.where(sum_B1 >= target_B1, higher_B1, bound_B1)

    bound_B1 = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(target_B1.shape, jnp.uint32))
    return order_BV >= bound_B1


def apply_rules(logits_BV: jax.Array, sampling: Sampling, history: History) -> jax.Array:
    """The logits after the repetition penalty, and -inf for what must not come next.

    A rule that no row uses costs nothing.
    """
    B = len(logits_BV)
    penalty_B = jnp.broadcast_to(sampling.repetition_penalty, B)
    logits_BV = _if_any(penalty_B != 1, lambda x_BV: penalise(x_BV, penalty_B, history), logits_BV)
    return forbid(
        logits_BV, history, sampling.no_repeat_ngram, sampling.min_new_tokens, sampling.banned
    )


def forbid(
    logits_BV: jax.Array, history: History, no_repeat_ngram: Any, min_new_tokens: Any, banned: Any
) -> jax.Array:
    """-inf for what must not come next, by the rules of `Sampling`."""
    B = len(logits_BV)
    ngram_B, least_B = (jnp.broadcast_to(x, B) for x in (no_repeat_ngram, min_new_tokens))
    banned_Bn = jnp.broadcast_to(banned, (B, np.shape(banned)[-1]))
    end_Bn = jnp.broadcast_to(jnp.array(history.end_ids, jnp.int32), (B, len(history.end_ids)))
    is_short_B = history.length_B - history.prompt_B < least_B
    end_Bn = jnp.where(is_short_B[:, None], end_Bn, -1)
    logits_BV = _if_any(banned_Bn >= 0, lambda x_BV: ban(x_BV, banned_Bn), logits_BV)
    logits_BV = _if_any(is_short_B, lambda x_BV: ban(x_BV, end_Bn), logits_BV)
    return _if_any(
        ngram_B > 0, lambda x_BV: ban(x_BV, repeated_ngrams(history, ngram_B)), logits_BV
    )


def _if_any(
    is_on: jax.Array, rule: Callable[[jax.Array], jax.Array], logits_BV: jax.Array
) -> jax.Array:
    return jax.lax.cond(jnp.any(is_on), rule, lambda x_BV: x_BV, logits_BV)


def penalise(logits_BV: jax.Array, penalty_B: jax.Array, history: History) -> jax.Array:
    """Logits of tokens that stand before, divided by the penalty or, if negative, multiplied."""
    B, V = logits_BV.shape
    ids_BS = history.ids_BS
    is_there_BS = jnp.arange(ids_BS.shape[1]) < history.length_B[:, None]
    ids_BS = jnp.where(is_there_BS, ids_BS, V)
    seen_BV = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], ids_BS].set(True, mode="drop")
    penalty_B1 = penalty_B[:, None]
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def ban(logits_BV: jax.Array, ids_Bn: jax.Array) -> jax.Array:
    """-inf for the ids of each row; -1 stands for none."""
    B, V = logits_BV.shape
    ids_Bn = jnp.where(ids_Bn < 0, V, ids_Bn)
    return logits_BV.at[jnp.arange(B)[:, None], ids_Bn].set(-jnp.inf, mode="drop")


def repeated_ngrams(history: History, ngram_B: jax.Array) -> jax.Array:
    """For each generated token its id if it, put next, would repeat the n tokens that end with it,
    else -1: [B, S].

    As in the official code nothing is repeated until the row is longer than n.
    """
    ids_BS, length_B1 = history.ids_BS, history.length_B[:, None]
    ngram_B1, slot_S = ngram_B[:, None], jnp.arange(ids_BS.shape[1])
    is_repeated_BS = (
        (ngram_B1 > 0) & (length_B1 > ngram_B1) & (slot_S + 1 >= ngram_B1)
        & (history.prompt_B[:, None] <= slot_S) & (slot_S < length_B1)
    )  # fmt: skip

    def compare(back: jax.Array, is_repeated_BS: jax.Array) -> jax.Array:
        last_B1 = jnp.take_along_axis(ids_BS, jnp.maximum(length_B1 - back, 0), 1)
        before_BS = ids_BS[:, jnp.maximum(slot_S - back, 0)]
        return is_repeated_BS & ((before_BS == last_B1) | (back >= ngram_B1))

    is_repeated_BS = jax.lax.fori_loop(1, jnp.max(ngram_B), compare, is_repeated_BS)
    return jnp.where(is_repeated_BS, ids_BS, -1)
