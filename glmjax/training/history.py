"""Which configuration a run had from which step on.

A run may be continued with another configuration as long as the steps that are done stay as they
were: fields that do not change the mathematics of a step are free, and schedules may change from the
next step on. Every change is a line of history.jsonl in the run folder.
"""

import datetime
import json
import logging
from pathlib import Path
from typing import Any

from glmjax.config import Experiment, config_from_json, config_to_json
from glmjax.data.cache import write_whole

logger = logging.getLogger(__name__)

# What may differ between a checkpoint and the run that continues it: none of it changes the
# mathematics of a step. Everything in train may change but the three fields below.
MAY_CHANGE = (
    "train.", "mesh.", "distributed.", "data.workers", "data.cache",
    "model.attention", "model.remat", "model.name",
)  # fmt: skip
TRAIN_MUST_MATCH = ("train.seed", "train.batch_size", "train.ramp")
# Tuples of entries that each begin at a step: those that have begun must match.
SCHEDULES = (
    "data.skip", "optimizer.learning_rate_changes", "optimizer.embedding_gradient_scale_changes",
)  # fmt: skip


def changed_fields(old: Experiment, new: Experiment) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, by name such as train.steps, as (old value, new value)."""
    before, after = _flatten(config_to_json(old)), _flatten(config_to_json(new))
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


def check_continuation(saved: Experiment, current: Experiment, step: int, checkpoint: str) -> None:
    """Checks that a run may go on from a checkpoint of `step` steps with another configuration.

    Raises:
        ValueError: a field differs that must agree, or a schedule differs before `step`.
    """
    changed = changed_fields(saved, current)
    refused = [
        f"{name}: {old} -> {new}"
        for name, (old, new) in changed.items()
        if name in TRAIN_MUST_MATCH or not name.startswith((*MAY_CHANGE, *SCHEDULES))
    ]
    if refused:
        raise ValueError(
            f"checkpoint {checkpoint} belongs to another configuration (checkpoint value -> this "
            "run's value): " + "; ".join(refused)
        )
    for name in SCHEDULES:
        if _begun(saved, name, step) != _begun(current, name, step):
            old, new = changed[name]
            raise ValueError(
                f"{name}: {old} -> {new} would change steps before {step}, which are done in "
                f"checkpoint {checkpoint}; keep those entries and add later ones, or move checkpoints "
                "away to go on from an earlier one"
            )


def record_changes(run: Path, step: int, experiment: Experiment) -> None:
    """Says and notes in history.jsonl how the configuration differs from the one in config.json."""
    path = run / "config.json"
    if not path.exists():
        return
    changed = changed_fields(config_from_json(Experiment, json.loads(path.read_text())), experiment)
    if not changed:
        return
    for name, (old, new) in changed.items():
        logger.info("from step %d on %s is %s, no longer %s", step, name, new, old)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"step": step, "time": now, "changes": changed}) + "\n"
    history = run / "history.jsonl"
    write_whole(history, (history.read_bytes() if history.exists() else b"") + line.encode())


def _begun(experiment: Experiment, name: str, step: int) -> list[tuple[Any, ...]]:
    """The entries of a schedule that began before a step."""
    room, field = name.split(".")
    entries = getattr(getattr(experiment, room), field)
    if name == "data.skip":
        entries = experiment.data.skip_ranges()
    return [entry for entry in entries if entry[0] < step]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, dict)
        flat.update(_flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value})
    return flat
