"""What a run writes down: FLOPs and utilisation, metrics.jsonl, and trackers as extras."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from glmjax.config import Experiment, GLMConfig
from glmjax.data.cache import write_whole

# Dense bfloat16 FLOP/s of one jax device, from the vendors' data sheets. A v4 or v5p device is a
# whole chip (two cores), a tpu7x device is half a chip.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def flops(config: GLMConfig, rows: int, length: int, *, recompute: bool = False) -> float:
    """FLOPs of a training step by the Megatron formula that GLM-130B reports (appendix, equation
    of training.py): F = 24 k B s N D^2 (1 + s / 6D + V / 16 N D), k = 3, or 4 where the backward
    pass recomputes the blocks. Written out so that it holds for any feed-forward width.
    """
    N, D, F, V = config.num_layers, config.hidden_size, config.ffn_size, config.vocab_size
    attention = 2 * D * (D + config.kv_heads * config.head_size)
    ffn_matrices = 2 if config.ffn == "gelu" else 3
    per_token = 2 * N * (attention + ffn_matrices * D * F) + 4 * N * length * D + 1.5 * V * D
    return (4.0 if recompute else 3.0) * rows * length * per_token


def model_flops_utilisation(
    flops_per_second: float, device_kind: str, devices: int
) -> float | None:
    """Share of the devices' peak, or None for a device whose peak is not known."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else flops_per_second / (peak * devices)


Writer = Callable[[int, dict[str, Any]], object]


def open_writers(experiment: Experiment) -> list[Writer]:
    """Where metrics go: metrics.jsonl always, TensorBoard and Weights & Biases if asked for.

    Raises:
        ModuleNotFoundError: a tracker was asked for whose extra is not installed.
    """
    run, train = Path(experiment.train.run), experiment.train
    writers = [_jsonl_writer(run / "metrics.jsonl")]
    if train.tensorboard:
        tracker = _import_extra("tensorboardX", "tensorboard")
        tensorboard = tracker.SummaryWriter(str(run / "tensorboard"))
        writers.append(
            lambda step, row: [
                tensorboard.add_scalar(name, value, step)
                for name, value in row.items()
                if isinstance(value, int | float)
            ]
        )
    if train.wandb:
        wandb = _import_extra("wandb", "wandb")
        wandb_run = wandb.init(project=train.wandb, name=run.name, dir=str(run), resume="allow")
        writers.append(lambda step, row: wandb_run.log(row, step=step))
    return writers


def _import_extra(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'train.{extra} needs a package that is not installed: pip install "glmjax[{extra}]"'
        ) from error


def _jsonl_writer(path: Path) -> Writer:
    def write(step: int, row: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")

    return write


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.endswith("}"):
            rows.append(json.loads(line))
    return rows


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the rows after `step`, which a resumed run writes again."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
