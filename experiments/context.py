"""Is text easier to continue when what came before is seen both ways?

    glmjax sweep experiments/context.py

Changed: nothing in training, which is the run the other ablations start from. The second half of held-out
texts is scored with the first half before it in two layouts:

    bidirectional   prefix [gMASK] <sop> rest        the prefix is part A
    unidirectional  [gMASK] <sop> prefix rest        everything is part B

The same tokens are scored; the prefix is seen both ways, or from left to right.

Published: LAMBADA accuracy 72.35 against 67.18 and WikiText-103 perplexity 11.33 against 12.22 for
GLM-10B (THUDM/GLM, README.md), bidirectional against unidirectional.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from experiments.classics import SEEDS, base
from glmjax.config import Experiment, ObjectiveConfig, SpecialTokens
from glmjax.data.blanks import OBJECTIVES, Batch, mask_token, row_positions
from glmjax.data.pieces import suffix_piece
from glmjax.data.prepare import Corpora
from glmjax.sweep.ablation import Trend, report
from glmjax.sweep.evaluate import corpora_of, heldout_losses, open_trained
from glmjax.sweep.trials import Scale, Sweep, vary

METRICS = {"bidirectional": "prefix seen both ways", "unidirectional": "prefix from left to right"}
SOURCE = "THUDM/GLM, GLM-10B: WikiText-103 perplexity 11.33 against 12.22"
TRENDS = (Trend("mixture", "mixture", SOURCE, "bidirectional", "unidirectional"),)


def sweep(scale: Scale) -> Sweep:
    trials = vary(base(scale), {"mixture": {}}, "objective", SEEDS[scale])
    say = partial(report, metrics=METRICS, trends=TRENDS)
    return Sweep("context", trials, say, evaluate)


def evaluate(run: Path) -> Mapping[str, float]:
    """Held-out loss of the second halves of texts, in both layouts."""
    experiment, params = open_trained(run)
    corpora = corpora_of(experiment)
    texts = heldout_texts(experiment, corpora)
    size, tokens = experiment.train.batch_size, corpora.tokenizer.special_tokens
    chunks = [texts[i : i + size] for i in range(0, len(texts), size)]
    return {
        layout: heldout_losses(
            experiment.model,
            params,
            [continuations(chunk, experiment.objective, tokens, layout) for chunk in chunks],
        )["loss"]
        for layout in METRICS
    }


def heldout_texts(experiment: Experiment, corpora: Corpora) -> list[np.ndarray]:
    """Rows of held-out text, evenly from all of it: those that lie inside one document."""
    rows = [row for corpus in corpora.texts for row in corpus.heldout]
    texts = [row["tokens"] for row in rows]
    eos = corpora.tokenizer.special_tokens.eos
    inside = [text for text in texts if eos not in text[:-1]]
    size = experiment.train.batch_size
    count = min(len(inside) // size, experiment.train.evaluate_batches) * size
    return [inside[i * len(inside) // count] for i in range(count)]


def continuations(
    texts: list[np.ndarray], objective: ObjectiveConfig, tokens: SpecialTokens, layout: str
) -> Batch:
    """Texts of one length, whose second half is scored. Rows have one token more than texts."""
    N, prefix = len(texts[0]), len(texts[0]) // 2
    mask, positions = mask_token("gmask", objective, tokens), row_positions("gmask", objective)
    length = N - prefix if layout == "bidirectional" else N
    pieces = [suffix_piece(t, length, tokens, mask=mask, positions=positions) for t in texts]
    B, T, part_a = len(pieces), N + 1, N - length + 1
    scored_T = np.arange(T) > prefix
    k_end_T = np.maximum(np.arange(T) + 1, part_a)
    return Batch(
        tokens_BT=np.stack([piece.tokens for piece in pieces]),
        positions_B2T=np.stack([piece.positions_2T for piece in pieces]),
        k_start_BT=np.zeros((B, T), np.int32),
        k_end_BT=np.tile(k_end_T.astype(np.int32), (B, 1)),
        targets_BT=np.stack([piece.targets for piece in pieces]),
        weights_BT=np.stack([piece.weights * scored_T for piece in pieces]).astype(np.float32),
        objective_B=np.full(B, OBJECTIVES.index("gmask"), np.int32),
    )
