"""How does the loss of a GLM fall with its size and its text, and is the next larger run foreseen?

    glmjax sweep experiments/scaling.py
    glmjax sweep experiments/scaling.py --scale gpu --jobs 4

Budgets of FLOPs are spent on models of several sizes, each with a cosine schedule that ends with its
own text. L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022) is fitted to them. One more run of
three times the largest budget is foreseen with an interval, trained, and compared; no fit sees it.
Every trained model is also measured with INT8 and INT4 weights, as in Table 10 of GLM-130B.

At the scale cpu no run reads any of the 24 million tokens of the classics twice. At gpu the longest
reads them 24 times, though text wears out after about four (Muennighoff et al. 2023), and at pod 122
billion tokens are read: name more text there with --data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.classics import base
from experiments.scaling_report import report
from glmjax.config import Experiment, Quantization
from glmjax.interop.transform import transform
from glmjax.model.parts import assemble
from glmjax.sweep.evaluate import heldout_batches, heldout_losses, open_trained
from glmjax.sweep.trials import Scale, Sweep, Trial
from glmjax.training.metrics import flops
from glmjax.training.model_folder import open_model

Size = tuple[int, int]
"""Width and number of layers."""


@dataclass(frozen=True)
class Grid:
    """The runs of a scale."""

    budgets: Mapping[float, tuple[Size, ...]]
    """The sizes that each budget of FLOPs is spent on."""
    heldout: tuple[float, Size]
    """The budget and size of the run that is foreseen."""
    head_size: int
    batch_size: int
    learning_rate: float
    """Peak for a width of 128; it falls with the root of the width."""


GRIDS: Mapping[Scale, Grid] = {
    "tiny": Grid(  # 0.05 M to 0.25 M parameters, 8e10 FLOPs in all
        budgets={
            4e9: ((32, 1), (48, 1), (64, 1)),
            1.2e10: ((32, 1), (64, 1), (80, 2)),
        },
        heldout=(3.6e10, (64, 2)),
        head_size=16, batch_size=8, learning_rate=4e-3,
    ),
    # 0.3 M to 5.4 M parameters, 2.2e14 FLOPs: 45 minutes on two cores. Runs of fewer than 150 steps are
    # left out: of the three that were tried at 2.2e12 FLOPs, one diverged in its short warm-up and one
    # ended at the unigram loss.
    "cpu": Grid(
        budgets={
            2.2e12: ((32, 1), (32, 2), (64, 1)),
            6.6e12: ((32, 1), (64, 1), (96, 2), (128, 2), (128, 4), (192, 4)),
            2e13: ((32, 1), (64, 1), (64, 2), (96, 2), (128, 4), (192, 4), (256, 4)),
        },
        heldout=(6e13, (192, 4)),
        head_size=32, batch_size=8, learning_rate=3e-3,
    ),
    "gpu": Grid(  # 10 M to 522 M parameters, 7.2e17 FLOPs: 30 minutes at 40% of an H200's 989 TFLOP/s
        budgets={
            7.8e15: ((256, 2), (256, 4), (384, 6), (512, 8), (768, 12)),
            2.3e16: ((256, 4), (384, 6), (512, 8), (640, 10), (1024, 12)),
            7e16: ((384, 6), (512, 8), (768, 12), (1024, 16), (1408, 20)),
        },
        heldout=(2.1e17, (768, 12)),
        head_size=64, batch_size=128, learning_rate=1.5e-3,
    ),
    "pod": Grid(  # 0.12 B to 6.6 B parameters, 2.0e21 FLOPs: a day at 40% of a v5p-256, 128 chips
        budgets={
            2.2e19: ((768, 12), (1024, 16), (1536, 16), (2048, 20), (2560, 26)),
            6.6e19: ((1024, 16), (1536, 16), (2048, 20), (2560, 26), (3072, 32)),
            2e20: ((1024, 16), (1536, 16), (2048, 20), (2560, 26), (4096, 32)),
        },
        heldout=(6e20, (2560, 26)),
        head_size=128, batch_size=1024, learning_rate=1.2e-3,
    ),
}  # fmt: skip

WEIGHTS = {
    f"int{bits} {scheme}": Quantization(bits, scheme=scheme)
    for bits in (8, 4)
    for scheme in ("absmax", "zeropoint")
}
"""The integers that trained models are measured with: those of Table 10 of GLM-130B and two more."""


def sweep(scale: Scale) -> Sweep:
    grid = GRIDS[scale]
    runs = [(budget, size, False) for budget, sizes in grid.budgets.items() for size in sizes]
    trials = tuple(
        Trial(
            {"budget": budget, "width": size[0], "layers": size[1], "held_out": held_out},
            experiment(scale, budget, size),
        )
        for budget, size, held_out in [*runs, (*grid.heldout, True)]
    )
    return Sweep("scaling", trials, report, evaluate)


def experiment(scale: Scale, budget: float, size: Size) -> Experiment:
    """The run that spends a budget of FLOPs on a model of so many parameters."""
    grid, (width, layers) = GRIDS[scale], size
    model = {
        "model.hidden_size": width, "model.num_layers": layers, "model.ffn_size": 4 * width,
        "model.num_heads": width // grid.head_size,
    }  # fmt: skip
    run = base(scale, **model)
    steps = round(budget / flops(run.model, grid.batch_size, run.data.sequence_length))
    saves = 1 if scale in ("tiny", "cpu") else 10
    return base(
        scale,
        **model,
        **{
            "optimizer.learning_rate": grid.learning_rate * (128 / width) ** 0.5,
            "optimizer.warmup": steps // 10, "optimizer.decay": steps,
            "train.steps": steps, "train.batch_size": grid.batch_size,
            "train.evaluate_every": steps, "train.checkpoint_every": max(1, steps // saves),
            "train.log_every": max(1, steps // 50),
            "mesh.data": 1 if scale == "pod" else -1, "mesh.fsdp": -1 if scale == "pod" else 1,
        },
    )  # fmt: skip


def evaluate(run: Path) -> dict[str, float]:
    """Held-out loss of a trained model with the matrices of its blocks as floats and as integers."""
    trained, params = open_trained(run)
    batches = heldout_batches(trained)
    losses = {"loss/float": heldout_losses(trained.model, params, batches)["loss"]}
    for name, quantization in WEIGHTS.items():
        # To integers and back: the numbers that these stand for, through the same compiled program.
        config, parts = transform(*open_model(run), quantize=quantization)
        config, parts = transform(config, parts, dtype="float32", quantize="float")
        losses[f"loss/{name}"] = heldout_losses(config, assemble(config, parts), batches)["loss"]
    return losses
