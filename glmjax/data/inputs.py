"""Token ids around a text as the official tokenizers build them, and batches of them.

`glmjax.infill` and `glmjax.generate` need none of this: they lay out and pad rows themselves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glmjax.config import SpecialTokens
from glmjax.data.vocabularies import SpellingTokenizer, Tokenizer, WordPieceTokenizer


class Prompts(NamedTuple):
    """B prompts padded on the left to T tokens.

    A token i >= start sees the keys start <= j < max(i + 1, context) of its row.
    """

    tokens_BT: np.ndarray
    positions_B2T: np.ndarray
    """Positions and block positions; both 0 in the padding."""
    start_B: np.ndarray
    """Index of the first token behind the padding."""
    context_B: np.ndarray
    """Index of <sop>, where the tokens end that see each other."""


def glm_ids(tokenizer: SpellingTokenizer, text: str) -> list[int]:
    """A text for GLM 110M-10B: [CLS], the text and the end of a document, of BERT's [SEP].

    Source: Hugging Face THUDM/glm-10b, tokenization_glm.py.
    """
    tokens = tokenizer.special_tokens
    closing = tokens.eos
    if isinstance(tokenizer, WordPieceTokenizer):
        closing = tokenizer.commands["[SEP]"]
    return [tokenizer.commands["[CLS]"], *tokenizer.encode(text), closing]


def chatglm_ids(tokenizer: Tokenizer, text: str, answer: str | None = None) -> list[int]:
    """A text for ChatGLM-6B with [gMASK] <sop> behind it, and its answer with <eop> if given.

    Source: Hugging Face THUDM/chatglm-6b, tokenization_chatglm.py.

    Raises:
        ValueError: the vocabulary has no [gMASK].
    """
    tokens = tokenizer.special_tokens
    if tokens.gmask is None:
        raise ValueError("ChatGLM-6B's prompts need [gMASK], which this vocabulary lacks")
    ids = [*tokenizer.encode(text), tokens.gmask, tokens.sop]
    return ids if answer is None else [*ids, *tokenizer.encode(answer), tokens.eop]


def pad_left(rows: Sequence[Sequence[int]], tokens: SpecialTokens) -> Prompts:
    """A batch of ChatGLM-6B from rows of `chatglm_ids`.

    From <sop> on, the position stays at that of [gMASK] and the block position counts 1, 2, ...

    Raises:
        ValueError: a row lacks [gMASK] or <sop>.
    """
    length = max(map(len, rows))
    tokens_BT = np.full((len(rows), length), tokens.pad, np.int32)
    positions_B2T = np.zeros((len(rows), 2, length), np.int32)
    start_B = np.array([length - len(row) for row in rows])
    context_B = np.zeros_like(start_B)
    for i, row in enumerate(rows):
        if tokens.gmask not in row or tokens.sop not in row:
            raise ValueError(
                f"row {i} lacks [gMASK] (id {tokens.gmask}) or <sop> (id {tokens.sop})"
            )
        start, context = start_B[i], row.index(tokens.sop)
        tokens_BT[i, start:] = row
        positions_B2T[i, 0, start:] = np.arange(len(row))
        positions_B2T[i, 0, start + context :] = row.index(tokens.gmask)
        positions_B2T[i, 1, start + context :] = np.arange(1, len(row) - context + 1)
        context_B[i] = start + context
    return Prompts(tokens_BT, positions_B2T, start_B, context_B)
