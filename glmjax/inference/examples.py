"""Held-out sentences with a blank, to look at what a model learnt."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from glmjax.config import GLMConfig
from glmjax.data.prepare import Corpora
from glmjax.inference.infill import infill
from glmjax.inference.sampling import Sampling
from glmjax.model.params import Params

SENTENCE_TOKENS = (12, 40)
BLANK_TOKENS = (1, 3)


@dataclass(frozen=True)
class Example:
    """A sentence with one blank, what stood there and what the model put there."""

    text: str
    truth: str
    filled: str


def fill_heldout(
    config: GLMConfig, params: Params, corpora: Corpora, count: int, seed: int = 0
) -> list[Example]:
    """Greedily fills one blank of 1 to 3 tokens in each of `count` held-out sentences."""
    random = np.random.default_rng(seed)
    tokenizer = corpora.tokenizer
    sentences = list(_sentences(corpora))
    chosen = random.choice(len(sentences), min(count, len(sentences)), replace=False)
    texts, truths = [], []
    for sentence in (sentences[i] for i in sorted(chosen)):
        size = int(random.integers(*BLANK_TOKENS, endpoint=True))
        start = int(random.integers(2, len(sentence) - size - 2))
        truths.append(sentence[start : start + size])
        mask = [tokenizer.special_tokens.mask]
        texts.append([*sentence[:start], *mask, *sentence[start + size :]])
    filled = infill(config, params, texts, 2 * BLANK_TOKENS[1], Sampling(temperature=0.0))
    return [
        Example(
            text=f"{tokenizer.decode(text.ids[: text.blanks[0]])} [MASK]"
            f"{tokenizer.decode(text.ids[text.blanks[0] + 1 :])}",
            truth=tokenizer.decode(truth),
            filled=tokenizer.decode(text.pieces[0]),
        )
        for text, truth in zip(filled, truths, strict=True)
    ]


def _sentences(corpora: Corpora) -> Iterator[list[int]]:
    """Whole sentences of the held-out rows as ids: between two sentence ends, of middling length,
    on one line and without special tokens."""
    tokenizer = corpora.tokenizer
    special = {tokenizer.special_tokens.cls, tokenizer.special_tokens.eos}
    for corpus in corpora.texts:
        for row in corpus.heldout:
            tokens = row["tokens"].tolist()
            ends = np.flatnonzero(tokenizer.is_sentence_end[row["tokens"]]).tolist()
            for before, end in itertools.pairwise(ends):
                sentence = tokens[before + 1 : end + 1]
                least, most = SENTENCE_TOKENS
                if least <= len(sentence) <= most and special.isdisjoint(sentence):
                    yield sentence
