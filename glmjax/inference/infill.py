"""Fills every blank of a text, left to right.

GLM keeps one cache: each piece is appended behind the pieces before it, as in training. GLM-130B
learns one piece per text, so each piece is put in the place of its blank and the text is read again
for the next one. ChatGLM-6B knows one blank, and its successors only continue a text. A beam search
decides for the best piece of a blank before the next blank is searched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from glmjax.config import GLMConfig, SpecialTokens
from glmjax.inference.beam import BeamSearch, search_rows
from glmjax.inference.generate import advance, begin, new_ids
from glmjax.inference.prompts import (
    FILLED_IN_TURN,
    Row,
    check_ids,
    check_positions,
    continued,
    lay_out,
    random_streams,
    special_tokens,
)
from glmjax.inference.sampling import Sampling
from glmjax.model.params import Params


class Tokenizer(Protocol):
    """Text to ids and back, such as `glmjax.data.tokenizers.Tokenizer`."""

    @property
    def special_tokens(self) -> SpecialTokens: ...

    def encode_prompt(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...


@dataclass(frozen=True)
class Filled:
    """A text as token ids with M mask tokens at indices `blanks`, and the M pieces that fill them."""

    ids: list[int]
    blanks: list[int]
    pieces: list[list[int]]

    def splice(self) -> list[int]:
        """The text with each mask token replaced by its piece."""
        spliced: list[int] = []
        for start, end, piece in zip(
            [-1, *self.blanks], [*self.blanks, len(self.ids)], [*self.pieces, []], strict=True
        ):
            spliced += [*self.ids[start + 1 : end], *piece]
        return spliced


def infill(
    config: GLMConfig,
    params: Params,
    texts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | BeamSearch = Sampling(),  # noqa: B008 (frozen)
) -> list[Filled]:
    """Fills the blanks of texts, each with at most max_new_tokens, drawn or by beam search.

    A text is token ids with mask tokens anywhere; one without gets [gMASK], or [MASK] where the
    vocabulary lacks it, at its end. Nothing else is expected: the special tokens of the family's
    layout are added here.

    Raises:
        ValueError: a text needs positions that the model lacks, or has two blanks for ChatGLM-6B, or
            one before its end for its successors; a banned id is outside the vocabulary.
    """
    check_ids(config, sampling.banned, "banned")
    opened = [_open(config, ids, f"text {i}") for i, ids in enumerate(texts)]
    streams = random_streams([text.ids for text in opened])
    if not opened:
        return []
    if config.positions in FILLED_IN_TURN or isinstance(sampling, BeamSearch):
        return _fill_in_turn(config, params, opened, max_new_tokens, sampling, streams)
    rows = []
    for i, text in enumerate(opened):
        rows.append(_row(config, text.ids, text.blanks))
        check_positions(config, rows[-1], max_new_tokens, f"text {i}")
    decoding = begin(config, params, rows, max_new_tokens, sampling, streams)
    decoding = advance(config, params, decoding)
    return [
        replace(text, pieces=pieces)
        for text, pieces in zip(opened, new_ids(decoding, rows), strict=True)
    ]


def infill_text(
    config: GLMConfig,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling | BeamSearch = Sampling(),  # noqa: B008 (frozen)
) -> list[str]:
    """Texts with every [MASK], [sMASK] and [gMASK] filled; one without is continued.

    Raises:
        ValueError: the tokenizer belongs to another model, or `infill` refuses a text.
    """
    if tokenizer.special_tokens != config.special_tokens:
        raise ValueError(
            f"the tokenizer has {tokenizer.special_tokens}, but model {config.name!r} has "
            f"{config.special_tokens}"
        )
    ids = [tokenizer.encode_prompt(text) for text in texts]
    filled = infill(config, params, ids, max_new_tokens, sampling)
    return [tokenizer.decode(text.splice()) for text in filled]


def _open(config: GLMConfig, ids: Sequence[int], name: str) -> Filled:
    """A text whose blanks are found, not yet filled."""
    tokens = special_tokens(config)
    ids = [int(id) for id in ids]
    if tokens.sop in ids:
        raise ValueError(f"{name} holds <sop> (id {tokens.sop}), which only `generate` takes")
    if not set(ids) & set(tokens.masks):
        ids.append(tokens.mask if tokens.gmask is None else tokens.gmask)
    check_ids(config, ids, name)
    blanks = [i for i, id in enumerate(ids) if id in tokens.masks]
    if config.positions == "rope_2d" and len(blanks) > 1:
        raise ValueError(f"{name} has {len(blanks)} blanks, but {config.name!r} fills one")
    if config.positions == "rope_half" and blanks[0] < len(ids) - 1:
        raise ValueError(f"{name} has a blank before its end, but {config.name!r} only continues")
    return Filled(ids, blanks, [])


def _row(
    config: GLMConfig, ids: list[int], blanks: list[int], pieces: Sequence[list[int]] = ()
) -> Row:
    """The family's layout around a text whose first blanks have pieces and whose others are to be
    filled."""
    tokens = special_tokens(config)
    if config.positions == "rope_half":
        opening = [id for id in (tokens.gmask, tokens.sop) if id is not None]
        return continued([*opening, *ids[:-1]])
    if config.positions == "learned_2d" and tokens.cls is not None:
        ids, blanks = [tokens.cls, *ids], [blank + 1 for blank in blanks]
    unclosed = {
        "learned_2d": (tokens.gmask,),
        "rope_2d": (ids[-1],),
        **dict.fromkeys(FILLED_IN_TURN, tokens.masks),
    }
    if ids[-1] not in unclosed[config.positions]:
        ids = [*ids, tokens.eos]
    filled = [id for piece in pieces for id in (tokens.sop, *piece)]
    num_open = len(blanks) - len(pieces)
    return lay_out(config, [*ids, *filled, *[tokens.sop] * num_open], blanks, num_open)


def _fill_in_turn(
    config: GLMConfig,
    params: Params,
    texts: list[Filled],
    max_new_tokens: int,
    sampling: Sampling | BeamSearch,
    streams: list[tuple[int, ...]],
) -> list[Filled]:
    """Fills the first blank of every text, then goes on with the next blank of those that have one."""
    texts = list(texts)
    for k in range(max(len(text.blanks) for text in texts)):
        open_texts = [i for i, text in enumerate(texts) if k < len(text.blanks)]
        rows = [_next_row(config, texts[i]) for i in open_texts]
        for i, row in zip(open_texts, rows, strict=True):
            check_positions(config, row, max_new_tokens, f"text {i}")
        if isinstance(sampling, BeamSearch):
            found = search_rows(config, params, rows, max_new_tokens, sampling)
            drawn = [beams[0].ids for beams in found]
        else:
            its_streams = [(*streams[i], k) for i in open_texts]
            decoding = begin(config, params, rows, max_new_tokens, sampling, its_streams)
            drawn = [pieces[0] for pieces in new_ids(advance(config, params, decoding), rows)]
        for i, piece in zip(open_texts, drawn, strict=True):
            texts[i] = replace(texts[i], pieces=[*texts[i].pieces, piece])
    return texts


def _next_row(config: GLMConfig, text: Filled) -> Row:
    """The row of the first blank without a piece. In GLM-130B the pieces so far are part of the
    text, elsewhere they stand behind it."""
    ids, blanks, pieces = text.ids, text.blanks, text.pieces
    if config.positions not in FILLED_IN_TURN:
        return _row(config, ids, blanks[: len(pieces) + 1], pieces)
    blank = blanks[len(pieces)] + sum(len(piece) - 1 for piece in pieces)
    return _row(config, Filled(ids, blanks[: len(pieces)], pieces).splice(), [blank])
