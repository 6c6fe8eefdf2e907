"""Run folders made up for tests that read them: 512 tokens a step, a row of metrics every 10 steps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glmjax.config import DataConfig, Experiment, TrainConfig, config_to_json, replace
from glmjax.presets import get_config

TOKENS_OF_A_STEP = 8 * 64


def make_experiment(**changes: Any) -> Experiment:
    experiment = Experiment(
        model=get_config("glm-tiny"),
        data=DataConfig(vocab_size=512, sequence_length=64),
        train=TrainConfig(steps=30, batch_size=8, log_every=10, evaluate_every=20),
    )
    return replace(experiment, **changes)


def training_row(step: int, loss: float | None, tokens_per_second: float = 1000.0) -> dict:
    """A row as the loop writes it; without a loss when all of its steps were skipped."""
    row = {
        "step": step, "loss": loss, "gradient_norm": 1.5, "learning_rate": 1e-3, "rows": 8 * step,
        "skipped_steps": 0 if loss else 10, "tokens_per_second": tokens_per_second,
    }  # fmt: skip
    return {name: value for name, value in row.items() if value is not None}


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(
    path: Path,
    losses: Sequence[float | None] = (6.0, 5.0, 4.0),
    heldout: dict[int, float] | None = None,
    summary: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A folder of a run with these training losses, held-out losses by step, and changed fields.

    Its loop took 20 seconds, after 7 of starting and compiling.
    """
    path.mkdir(parents=True)
    experiment = make_experiment(**{"train.run": str(path), **changes})
    (path / "config.json").write_text(json.dumps(config_to_json(experiment)))
    (path / "corpus.json").write_text("{}")
    rows = [training_row(10 * i, loss) for i, loss in enumerate(losses, 1)]
    rows += [{"step": step, "heldout_loss": loss} for step, loss in (heldout or {}).items()]
    write_lines(path / "metrics.jsonl", sorted(rows, key=lambda row: row["step"]))
    seconds = {"init": 3.0, "compile": 4.0, "step": 15.0, "evaluate": 5.0}
    write_lines(
        path / "goodput.jsonl",
        [
            {"step": 0, "time": 1e9, "run": "ab" * 16},
            {"step": 10 * len(losses), "time": 1e9 + 27, "seconds": seconds},
        ],
    )
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def finished(steps: int = 30, **values: Any) -> dict[str, Any]:
    """What summary.json holds when a run has ended."""
    return {
        "steps": steps, "tokens": steps * TOKENS_OF_A_STEP, "heldout_loss": 4.5, "unigram_loss": 5.0,
        "uniform_loss": 6.2, "tokens_per_second": 768.0, "seconds": 20.0, "parameters": 149376,
        "signal": None, "goodput": {}, **values,
    }  # fmt: skip
