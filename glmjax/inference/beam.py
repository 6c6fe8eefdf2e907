"""Beam search by the rules and scores of THUDM/GLM-130B (`generation/strategies.py`).

Every step makes 3 W candidates from the W beams of a prompt, (end tokens + 1) W. From the best down,
those that end join the finished list and the others become the next beams until there are W. A
finished list keeps the W best of

    sum of log-probabilities / ((5 + length) / 6)^length_penalty

where length counts the prompt, the piece and its end token. A prompt is done when its list is full
and no beam, scored so, beats the worst on it; beams that reach max_new_tokens join the list as they
are.

All prompts are moved to end in the same cache slot. What the beams of a prompt share stays where it
is, and only the few slots behind it follow the beams from parent to child.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from glmjax.config import GLMConfig
from glmjax.inference.generate import SHORTEST, Batch, as_batch, batch_parts, bucket
from glmjax.inference.prompts import Row, check_ids, check_positions, prompt_row, special_tokens
from glmjax.inference.sampling import History, ban, check_bans, forbid, pad_ids
from glmjax.model.attention import BlankMask, KVCache
from glmjax.model.params import Params
from glmjax.model.prefix import start_cache
from glmjax.model.transformer import extend, logits, prefill
from glmjax.sharding import constrain

FEWEST_PREFIXES = 4
"""Banned prefixes, and ids of one, in the smallest bucket."""


@dataclass(frozen=True)
class BeamSearch:
    """How beams are searched; defaults are those of the GLM-130B demo (`scripts/generate.sh`)."""

    num_beams: int = 4
    """Beams that are followed, and pieces that are returned, for each prompt."""
    length_penalty: float = 1.0
    """Above 0 a log-probability counts less the longer the text is; 0: as it is."""
    no_repeat_ngram: int = 3
    """No so many tokens stand in a row that did before, counting only those whose last token was
    generated; 0: off."""
    min_new_tokens: int = 0
    """A piece does not end before it has so many tokens."""
    banned: tuple[int, ...] = ()
    """Ids that are never generated."""
    banned_prefixes: tuple[tuple[int, ...], ...] = ()
    """Sequences of ids with which no piece begins."""

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be positive, got {self.num_beams}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, got {self.length_penalty}")
        check_bans(self.no_repeat_ngram, self.min_new_tokens, self.banned)
        for prefix in self.banned_prefixes:
            if min(prefix, default=-1) < 0:
                raise ValueError(
                    f"banned_prefixes take one id or more, 0 or positive, got {prefix}"
                )


@dataclass(frozen=True)
class Beam:
    """The new ids of a prompt, without the end token, and their penalised log-probability."""

    ids: list[int]
    score: float


class _Rules(NamedTuple):
    """The settings as arrays, so that none but the number of beams costs a compilation."""

    divisor_S: Any
    """What the score of a text of so many tokens is divided by."""
    no_repeat_ngram: Any
    min_new_tokens: Any
    banned: Any
    prefix_nL: Any
    """Banned prefixes, padded with -1."""


@struct.dataclass
class _Beams:
    """W beams for each of B prompts, R = B W, of `count` tokens. Texts of S tokens are the prompt with
    its opening, then the piece, then -1."""

    cache: KVCache
    ids_BWS: Any
    score_BW: Any
    """Sums of log-probabilities; -inf where there is no beam."""
    finished_BWS: Any
    """The best finished texts, best first, without their end tokens."""
    finished_score_BW: Any
    """Their penalised scores; -inf where there is none."""
    is_done_B: Any
    count: Any


def beam_search(
    config: GLMConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    search: BeamSearch = BeamSearch(),
) -> list[list[Beam]]:
    """The best pieces for each prompt, best first, of at most max_new_tokens.

    Prompts are as in `generate`. There are num_beams pieces, or fewer where all others are
    forbidden.

    Raises:
        ValueError: a prompt has another layout, or needs positions that the model does not have; the
            settings name ids outside the vocabulary or too many beams for it.
    """
    rows = [prompt_row(config, ids, f"prompt {i}") for i, ids in enumerate(prompts)]
    for i, row in enumerate(rows):
        check_positions(config, row, max_new_tokens, f"prompt {i}")
    return search_rows(config, params, rows, max_new_tokens, search)


def search_rows(
    config: GLMConfig, params: Params, rows: Sequence[Row], max_new_tokens: int, search: BeamSearch
) -> list[list[Beam]]:
    """`beam_search` for rows with one open blank each."""
    check_ids(config, search.banned, "banned")
    for prefix in search.banned_prefixes:
        check_ids(config, prefix, f"banned prefix {prefix}")
    candidates = (len(_end_ids(config)) + 1) * search.num_beams
    if candidates > config.vocab_size:
        raise ValueError(
            f"num_beams = {search.num_beams} needs {candidates} candidates, but vocab_size = "
            f"{config.vocab_size}"
        )
    if not rows:
        return []
    parts = batch_parts()
    B = -(-bucket(len(rows)) // parts) * parts
    T = bucket(max(len(row.ids) for row in rows), SHORTEST)
    batch = as_batch(rows, [max_new_tokens] * len(rows), [()] * len(rows), B, T, 1)
    E = bucket(max_new_tokens)
    found = _search(config, params, batch, _rules(search, T + 1 + E), search.num_beams, E)
    ids_BWS, score_BW = map(np.asarray, found)
    return [
        [
            Beam([int(id) for id in ids_S[len(row.ids) + 1 :] if id >= 0], float(score))
            for ids_S, score in zip(ids_WS, score_W, strict=True)
            if score > -np.inf
        ]
        for row, ids_WS, score_W in zip(rows, ids_BWS, score_BW, strict=False)
    ]


@partial(jax.jit, static_argnames=("config", "num_beams", "E"))
def _search(
    config: GLMConfig,
    params: Params,
    prompts: Batch,
    rules: _Rules,
    num_beams: int,
    E: int,
) -> tuple[jax.Array, jax.Array]:
    """Finished texts [B, W, S] and their scores [B, W], best first."""

    def goes_on(beams: _Beams) -> jax.Array:
        return (beams.count < jnp.max(prompts.limit_B)) & ~jnp.all(beams.is_done_B)

    step = partial(_step, config, params, prompts, rules)
    start = _start(config, params, prompts, num_beams, E)
    beams = jax.lax.while_loop(goes_on, step, start)
    # Beams of prompts that are not done have reached the limit.
    length_B = prompts.length_B + 1 + beams.count
    score_BW = jnp.where(beams.is_done_B[:, None], -jnp.inf, beams.score_BW)
    finished = _keep_best(beams, beams.ids_BWS, _penalised(rules, score_BW, length_B))
    # Replicated, so that every process can read it.
    return constrain(finished[0]), constrain(finished[1])


def _start(config: GLMConfig, params: Params, prompts: Batch, num_beams: int, E: int) -> _Beams:
    """The first beam of every prompt, and copies of it without a score."""
    B, T = prompts.tokens_BT.shape
    end = config.prefix_length + T
    _, cache = prefill(
        config, params, start_cache(config, params, B, T), prompts.tokens_BT,
        prompts.positions_B2T, prompts.context_B, prompts.length_B,
    )  # fmt: skip

    def lay_behind_each_other(x_NBHS: jax.Array, empty_NRHS: jax.Array) -> jax.Array:
        move_to_end = jax.vmap(partial(jnp.roll, axis=2), in_axes=(1, 0), out_axes=1)
        x_NBHS = move_to_end(x_NBHS[:, :, :, :end], T - prompts.length_B)
        x_NRHS = jnp.repeat(x_NBHS, num_beams, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(empty_NRHS, x_NRHS, 0, axis=3)

    R = B * num_beams
    filled = _map_slots(lay_behind_each_other, cache, KVCache.empty(config, R, end + E))
    is_fed_BT = jnp.arange(T) < prompts.length_B[:, None]
    ids_BS = jnp.full((B, T + 1 + E), -1).at[:, :T].set(jnp.where(is_fed_BT, prompts.tokens_BT, -1))
    ids_BS = ids_BS.at[jnp.arange(B), prompts.length_B].set(prompts.opening_B)
    ids_BWS = jnp.repeat(ids_BS[:, None], num_beams, 1)
    no_score_BW = jnp.full((B, num_beams), -jnp.inf)
    return _Beams(
        cache=replace(filled, length_B=jnp.full(R, end, jnp.int32)),
        ids_BWS=ids_BWS,
        score_BW=no_score_BW.at[:, 0].set(0),
        finished_BWS=ids_BWS,
        finished_score_BW=no_score_BW,
        is_done_B=prompts.num_blanks_B == 0,
        count=jnp.int32(0),
    )


def _step(
    config: GLMConfig, params: Params, prompts: Batch, rules: _Rules, beams: _Beams
) -> _Beams:
    """Every beam by one token."""
    (B, W, S), T = beams.ids_BWS.shape, prompts.tokens_BT.shape[1]
    scores_RV, cache = _score(config, params, prompts, rules, beams)
    num_candidates = (len(_end_ids(config)) + 1) * W
    # The best of all are among the best of each beam.
    best_RC, token_RC = jax.lax.top_k(scores_RV, num_candidates)
    best_BC, index_BC = jax.lax.top_k(best_RC.reshape(B, -1), num_candidates)
    token_BC = jnp.take_along_axis(token_RC.reshape(B, -1), index_BC, 1)
    parent_BC = index_BC // num_candidates
    is_end_BC = jnp.isin(token_BC, jnp.array(_end_ids(config)))
    num_going_on_BC = jnp.cumsum(~is_end_BC, 1)

    is_finished_BC = is_end_BC & (num_going_on_BC <= W) & ~beams.is_done_B[:, None]
    length_B = prompts.length_B + 2 + beams.count
    finished_BWS, finished_score_BW = _keep_best(
        beams,
        jnp.take_along_axis(beams.ids_BWS, parent_BC[..., None], 1),
        _penalised(rules, jnp.where(is_finished_BC, best_BC, -jnp.inf), length_B),
    )

    # The first W that go on; a stable sort leaves them in their order.
    chosen_BW = jnp.argsort(is_end_BC, axis=1, stable=True)[:, :W]
    parent_BW, token_BW, score_BW = (
        jnp.take_along_axis(x_BC, chosen_BW, 1) for x_BC in (parent_BC, token_BC, best_BC)
    )
    ids_BWS = jnp.take_along_axis(beams.ids_BWS, parent_BW[..., None], 1)
    ids_BWS = ids_BWS.at[jnp.arange(B), :, prompts.length_B + 1 + beams.count].set(token_BW)
    best_B = _penalised(rules, score_BW[:, :1], length_B)[:, 0]
    worst_B = finished_score_BW[:, -1]
    return _Beams(
        cache=_follow(cache, parent_BW, config.prefix_length + T, S - T - 1),
        ids_BWS=ids_BWS,
        score_BW=score_BW,
        finished_BWS=finished_BWS,
        finished_score_BW=finished_score_BW,
        is_done_B=beams.is_done_B | ((worst_B > -jnp.inf) & (worst_B >= best_B)),
        count=beams.count + 1,
    )


def _score(
    config: GLMConfig, params: Params, prompts: Batch, rules: _Rules, beams: _Beams
) -> tuple[jax.Array, KVCache]:
    """Log-probabilities of every beam with every next token, [R, V]."""
    (B, W, S), T = beams.ids_BWS.shape, prompts.tokens_BT.shape[1]
    move_B2 = jnp.stack([prompts.advance_BM[:, 0], jnp.ones(B, jnp.int32)], -1)
    position_B2 = prompts.start_BM2[:, 0] + beams.count * move_B2
    length_R = jnp.repeat(prompts.length_B, W)
    ids_RS = beams.ids_BWS.reshape(B * W, S)
    history = History(ids_RS, length_R + 1 + beams.count, length_R + 1, _end_ids(config))
    token_R1 = jnp.take_along_axis(ids_RS, history.length_B[:, None] - 1, 1)
    position_R21 = jnp.repeat(position_B2, W, axis=0)[:, :, None]
    seen_R1 = (beams.cache.length_B + 1)[:, None]
    mask = BlankMask((T - length_R)[:, None], seen_R1)
    x_R1D, cache = extend(
        config, params, beams.cache, token_R1, position_R21, mask, jnp.ones(B * W, jnp.int32)
    )
    logits_RV = logits(config, params, x_R1D)[:, 0]
    logits_RV = forbid(
        logits_RV, history, rules.no_repeat_ngram, rules.min_new_tokens, rules.banned
    )
    logits_RV = ban(logits_RV, _ends_of_prefixes(rules.prefix_nL, history))
    return jax.nn.log_softmax(logits_RV) + beams.score_BW.reshape(-1, 1), cache


def _ends_of_prefixes(prefix_nL: jax.Array, history: History) -> jax.Array:
    """[R, n]: the last id of each banned prefix whose other ids are the piece so far, else -1."""
    length_n, place_L = jnp.sum(prefix_nL >= 0, 1), jnp.arange(prefix_nL.shape[1])
    piece_RL = jnp.take_along_axis(
        history.ids_BS, history.prompt_B[:, None] + place_L, 1, mode="fill", fill_value=-1
    )
    is_last_nL = place_L == length_n[:, None] - 1
    is_same_RnL = (piece_RL[:, None] == prefix_nL) | (place_L >= length_n[:, None] - 1)
    count_R1 = (history.length_B - history.prompt_B)[:, None]
    is_next_Rn = jnp.all(is_same_RnL, -1) & (count_R1 == length_n - 1)
    return jnp.where(is_next_Rn, jnp.max(jnp.where(is_last_nL, prefix_nL, -1), 1, initial=-1), -1)


def _keep_best(
    beams: _Beams, new_BCS: jax.Array, new_score_BC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The finished lists with new texts; of equals the one that came last is first."""
    ids_BFS = jnp.concatenate([new_BCS[:, ::-1], beams.finished_BWS], 1)
    score_BF = jnp.concatenate([new_score_BC[:, ::-1], beams.finished_score_BW], 1)
    score_BW, best_BW = jax.lax.top_k(score_BF, beams.finished_score_BW.shape[1])
    return jnp.take_along_axis(ids_BFS, best_BW[..., None], 1), score_BW


def _penalised(rules: _Rules, score_BC: jax.Array, length_B: jax.Array) -> jax.Array:
    """Scores of texts of so many tokens; -inf stays."""
    return score_BC / rules.divisor_S[length_B][:, None]


def _follow(cache: KVCache, parent_BW: jax.Array, end: int, E: int) -> KVCache:
    """The cache with the E slots behind the prompts taken from the parents of the beams."""
    B, W = parent_BW.shape

    def take(x_NRHS: jax.Array) -> jax.Array:
        tail_NRHE = x_NRHS[:, :, :, end : end + E]
        tail_NBWHE = tail_NRHE.reshape(len(tail_NRHE), B, W, *tail_NRHE.shape[2:])
        tail_NBWHE = jax.vmap(partial(jnp.take, axis=1), (1, 0), 1)(tail_NBWHE, parent_BW)
        return jax.lax.dynamic_update_slice_in_dim(
            x_NRHS, tail_NBWHE.reshape(tail_NRHE.shape), end, axis=3
        )

    return _map_slots(take, cache)


def _map_slots(function: Any, cache: KVCache, *others: KVCache) -> KVCache:
    """The cache with a function applied to its arrays [N, B, H, S, ...]."""
    return jax.tree.map(lambda x, *xs: function(x, *xs) if x.ndim > 1 else x, cache, *others)


def _end_ids(config: GLMConfig) -> tuple[int, ...]:
    tokens = special_tokens(config)
    return tokens.eop, tokens.eos


def _rules(search: BeamSearch, longest_text: int) -> _Rules:
    n, L = len(search.banned_prefixes), max(map(len, search.banned_prefixes), default=0)
    prefixes = [*search.banned_prefixes, *[()] * (bucket(n, FEWEST_PREFIXES) - n)]
    return _Rules(
        (((5 + np.arange(longest_text + 1)) / 6) ** search.length_penalty).astype(np.float32),
        np.int32(search.no_repeat_ngram),
        np.int32(search.min_new_tokens),
        pad_ids(search.banned),
        np.stack([pad_ids(prefix, bucket(L, FEWEST_PREFIXES)) for prefix in prefixes]),
    )
