"""Prompts in the official layout of each family, and the positions of their tokens.

A prompt is a text with blanks, then <sop> and what fills the first blank, <sop> and what fills the
second, and so on; generation continues the last piece. The tokens before the first <sop> see each
other.

    GLM             position counts up to <sop>; a piece repeats the position of its blank, and its
                    block position counts 1, 2, ...
    ChatGLM-6B      the same, with one piece: everything from the first <sop> on
    GLM-130B        the same without block positions; a [gMASK] piece counts straight on instead

ChatGLM2-6B and its successors only continue: any tokens are a prompt, in which none sees what
follows, and positions count straight on. Their texts begin with [gMASK] <sop>.

Sources: THUDM/GLM `generate_samples.py`, THUDM/GLM-130B `generate.py`, Hugging Face
THUDM/chatglm-6b `modeling_chatglm.py`.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glmjax.config import GLMConfig, SpecialTokens

FILLED_IN_TURN = ("rope_1d", "alibi")
"""Position encodings whose texts are laid out as GLM-130B's: one blank at a time."""


class Row(NamedTuple):
    """A prompt without the token that opens each of its M open blanks, and where these are."""

    ids: list[int]
    positions_2T: np.ndarray
    context: int
    """Tokens at the beginning that see each other."""
    opening: int
    """The token that opens a blank: <sop>, or of a prompt that is merely continued the last one."""
    start_M2: np.ndarray
    """Position and block position of that token, for each open blank."""
    advance_M: np.ndarray
    """How far the position moves with every token of the blank: 0, or 1 where it counts on."""


def special_tokens(config: GLMConfig) -> SpecialTokens:
    """The special ids of a model.

    Raises:
        ValueError: the configuration has none.
    """
    if config.special_tokens is None:
        raise ValueError(f"model {config.name!r} has no special_tokens, which generation needs")
    return config.special_tokens


def find_blanks(config: GLMConfig, ids: Sequence[int]) -> list[int]:
    """Indices of the mask tokens of a text, in the order in which they are filled.

    That is left to right; ChatGLM-6B has one blank and prefers [gMASK].
    """
    tokens = special_tokens(config)
    blanks = [i for i, id in enumerate(ids) if id in tokens.masks]
    if config.positions == "rope_2d":
        blanks.sort(key=lambda i: ids[i] != tokens.gmask)
        return blanks[:1]
    return blanks


def prompt_row(config: GLMConfig, ids: Sequence[int], name: str) -> Row:
    """The row of a prompt whose last piece is to be continued.

    Raises:
        ValueError: it is empty, has no <sop> at its end, not one mask token for each <sop>, or ids
            outside the vocabulary; says so of `name`.
    """
    tokens = special_tokens(config)
    ids = [int(id) for id in ids]
    if config.positions == "rope_half":
        if not ids:
            raise ValueError(f"{name} is empty")
        check_ids(config, ids, name)
        return continued(ids)
    if not ids or ids[-1] != tokens.sop:
        end = f"ends in {ids[-1]}" if ids else "is empty"
        raise ValueError(f"{name} {end}, but must end in <sop> (id {tokens.sop})")
    check_ids(config, ids, name)
    blanks = find_blanks(config, ids[: ids.index(tokens.sop)])
    pieces = 1 if config.positions == "rope_2d" else ids.count(tokens.sop)
    if pieces > len(blanks):
        raise ValueError(
            f"{name} has {pieces} <sop> (id {tokens.sop}) but {len(blanks)} mask tokens "
            f"(ids {tokens.masks}) before them"
        )
    return lay_out(config, ids, blanks, num_open=1)


def continued(ids: Sequence[int]) -> Row:
    """The row of a prompt of plain causal text."""
    count = np.arange(len(ids))
    positions_2T = np.stack([count, np.zeros_like(count)]).astype(np.int32)
    return Row(
        list(ids[:-1]), positions_2T[:, :-1], 0,
        ids[-1], positions_2T[:, -1:].T, np.ones(1, np.int32),
    )  # fmt: skip


def lay_out(config: GLMConfig, ids: Sequence[int], blanks: Sequence[int], num_open: int) -> Row:
    """The row of a prompt that ends in the <sop> of num_open blanks.

    `blanks` are the indices of the mask tokens that its pieces fill, in that order.
    """
    tokens = special_tokens(config)
    context = ids.index(tokens.sop)
    starts = [i for i, id in enumerate(ids) if id == tokens.sop]
    if config.positions == "rope_2d":
        starts = [context]
    positions_2T = np.stack([np.arange(len(ids)), np.zeros(len(ids), int)]).astype(np.int32)
    advance = []
    for start, end, blank in zip(starts, [*starts[1:], len(ids)], blanks, strict=False):
        counts_on = config.positions in FILLED_IN_TURN and ids[blank] == tokens.gmask
        if not counts_on:
            positions_2T[0, start:end] = blank
        positions_2T[1, start:end] = np.arange(1, end - start + 1)
        advance.append(counts_on)
    fed = len(ids) - num_open
    return Row(
        list(ids[:fed]), positions_2T[:, :fed], context,
        tokens.sop, positions_2T[:, fed:].T, np.array(advance[-num_open:], np.int32),
    )  # fmt: skip


def check_ids(config: GLMConfig, ids: Sequence[int], name: str) -> None:
    """Checks that ids are in the vocabulary.

    Raises:
        ValueError: one is not; names it.
    """
    for id in ids:
        if not 0 <= id < config.vocab_size:
            raise ValueError(f"{name} has token {id}, but vocab_size = {config.vocab_size}")


def check_positions(config: GLMConfig, row: Row, max_new_tokens: int, name: str) -> None:
    """Checks that no position id of a row exceeds what the model has.

    Raises:
        ValueError: one does; names the row and the numbers.
    """
    fed_M = np.full(len(row.start_M2), max_new_tokens)
    fed_M[-1] -= 1  # The very last token is not fed.
    move_M2 = np.stack([row.advance_M, np.ones_like(row.advance_M)], -1)
    end_M2 = row.start_M2 + move_M2 * fed_M[:, None]
    longest = max(row.positions_2T.max(initial=0), end_M2.max())
    if longest > config.max_positions:
        raise ValueError(
            f"{name} of {len(row.ids)} tokens with max_new_tokens = {max_new_tokens} needs position "
            f"{longest}, but max_positions = {config.max_positions}"
        )


def random_streams(prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Two numbers that name the random stream of each prompt: its checksum, and how many equal
    prompts stand before it. So a prompt draws the same tokens in any batch, and copies differ."""
    copies: dict[int, int] = {}
    streams: list[tuple[int, ...]] = []
    for ids in prompts:
        checksum = zlib.crc32(np.array(ids, np.int32).tobytes())
        copies[checksum] = copies.get(checksum, -1) + 1
        streams.append((checksum, copies[checksum]))
    return streams
