"""What the sweeps in this folder have in common: books in English and Chinese, and small models.

The text is `data/classics_en` (github.com/mlschmitt/classic-books-markdown, books first published by
1910) and `data/classics_zh` (github.com/NiuTrans/Classical-Modern, original texts): 24 million tokens,
of which every tenth book or chapter, chosen by hash, is held out. Put them there, or name your own
text with `--data`.
"""

from typing import Any

from glmjax.config import (
    DataConfig,
    Experiment,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    replace,
)
from glmjax.presets import get_config
from glmjax.sweep.trials import Scale

DATA = ("data/classics_en", "data/classics_zh")

SIZES: dict[Scale, dict[str, Any]] = {
    # Parameters with the word embedding: 0.2 M, 1.9 M, 111 M, 1.3 B.
    "tiny": {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "vocab_size": 1024},
    "cpu": {"num_layers": 4, "hidden_size": 128, "num_heads": 2, "vocab_size": 8192},
    "gpu": {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "vocab_size": 32768},
    "pod": {"num_layers": 24, "hidden_size": 2048, "num_heads": 16, "vocab_size": 50304},
}
"""The model of the ablations at each scale."""

SEEDS: dict[Scale, int] = {"tiny": 2, "cpu": 3, "gpu": 3, "pod": 3}


def base(scale: Scale, **changes: Any) -> Experiment:
    """The run that ablations change: a GLM with learned 2D positions, Pre-LN and GELU, trained on
    GLM-130B's mixture of [MASK] and [gMASK] rows. `changes` as `glmjax.config.replace` takes them."""
    size = SIZES[scale]
    length = {"tiny": 64, "cpu": 256, "gpu": 512, "pod": 1024}[scale]
    steps = {"tiny": 20, "cpu": 300, "gpu": 2000, "pod": 20_000}[scale]
    rows = {"tiny": 8, "cpu": 8, "gpu": 128, "pod": 1024}[scale]
    experiment = Experiment(
        model=get_config(
            "glm-tiny", name=f"classics-{scale}", **size, ffn_size=4 * size["hidden_size"],
            max_positions=length, embedding_dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0,
            dtype="float32" if scale in ("tiny", "cpu") else "bfloat16",
        ),
        objective=ObjectiveConfig(
            token=0.3, draw="row", document_min_ratio=0.2, document_suffix=1.0  # GLM-130B
        ),
        data=DataConfig(
            path=() if scale == "tiny" else DATA, vocab_size=size["vocab_size"],
            sequence_length=length,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3 if scale in ("tiny", "cpu") else 6e-4, floor_ratio=0.1,
            warmup=steps // 10, decay=steps, beta2=0.95, epsilon=1e-8,
        ),
        train=TrainConfig(
            steps=steps, batch_size=rows, log_every=max(1, steps // 50),
            evaluate_every=max(1, steps // 3), evaluate_batches=32 if scale != "tiny" else 2,
            checkpoint_every=steps if scale == "cpu" else max(1, steps // 10),
        ),
    )  # fmt: skip
    return replace(experiment, **changes) if changes else experiment
