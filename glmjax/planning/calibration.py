"""How far the estimates of `roofline` are from what runs on TPUs have really reached.

Each pair is a run that its authors measured and published, and our estimate of the same program,
compiled from the configuration beside them for the same chips that were not there. The published
runs used older compilers and, on v5p and v6e, XLA flags that are left out here (libtpu refuses the
collective fusions on v5p), so the error includes what the compiler has changed. No pair is a GLM:
nobody has published one on TPUs.
"""

from dataclasses import dataclass
from typing import Literal

COMPILER = "jax 0.10.2, libtpu 0.0.42.1"
"""What all estimated programs were compiled with, in November 2026."""

PEER = "MaxText e591f30cb"
"""Whose programs they are: github.com/AI-Hypercomputer/maxtext, at a commit of 22 August 2026."""

CONFIGS = "MaxText/configs/{}/README.md at tag pre-nnx-v0.1.0"
TIERING = "docs/reference/models/tiering.md at the commit of PEER"


@dataclass(frozen=True)
class Pair:
    """A published run. Rates are tokens per second and device."""

    model: str
    topology: str
    settings: str
    measured: float
    """As published, or from published FLOP/s by the formula of `roofline.model_flops`, which is the
    one MaxText used then."""
    estimated: float
    """From the whole time along the schedule, `Times.step`."""
    computing: float
    """From computation alone, `Times.compute`."""
    source: str


PAIRS: tuple[Pair, ...] = (
    Pair(
        "22B", "v4:4x4x4", "fsdp64, 13 rows of 2048 per device, remat full",
        measured=993.6, estimated=966.1, computing=997.0, source=CONFIGS.format("v4"),
    ),
    Pair(
        "52B", "v4:4x4x12", "fsdp192, 7 rows of 2048 per device, remat full",
        measured=392.7, estimated=457.1, computing=488.8, source=CONFIGS.format("v4"),
    ),
    Pair(
        "16B", "v5e:16x16", "fsdp256, 6 rows of 2048 per device, remat full",
        measured=1192.3, estimated=1098.1, computing=1136.4, source=CONFIGS.format("v5e"),
    ),
    Pair(
        "32B", "v5e:16x16", "fsdp256, 4 rows of 2048 per device, remat full",
        measured=677.5, estimated=529.3, computing=556.4, source=CONFIGS.format("v5e"),
    ),
    Pair(
        "64B", "v5e:16x16", "fsdp256, 2 rows of 2048 per device, remat full",
        measured=304.0, estimated=270.1, computing=300.6, source=CONFIGS.format("v5e"),
    ),
    Pair(
        "128B", "v5p:4x4x8", "fsdp16 x tensor8, 1 rows of 2048 per device, remat minimal",
        measured=406.6, estimated=349.3, computing=392.8, source=CONFIGS.format("v5p"),
    ),
    Pair(
        "64B", "v5p:4x4x4", "fsdp16 x tensor4, 3 rows of 2048 per device, remat minimal",
        measured=832.2, estimated=553.7, computing=774.2, source=CONFIGS.format("v5p"),
    ),
    Pair(
        "32B", "v5p:4x4x4", "fsdp16 x tensor4, 6 rows of 2048 per device, remat minimal",
        measured=1683.4, estimated=1404.6, computing=1657.3, source=CONFIGS.format("v5p"),
    ),
    Pair(
        "256B", "v5p:8x8x8", "fsdp64 x tensor8, 1 rows of 2048 per device, remat minimal",
        measured=202.2, estimated=187.8, computing=215.3, source=CONFIGS.format("v5p"),
    ),
    Pair(
        "Llama2-70B", "v5p:8x8x8", "fsdp512, 4 rows of 4096 per device, remat save_dot_except_mlpwi",
        measured=692.0, estimated=652.1, computing=679.6, source=TIERING,
    ),
    Pair(
        "Llama2-70B", "v6e:16x16", "fsdp_transpose256, 4 rows of 4096 per device, remat full",
        measured=900.0, estimated=686.6, computing=748.7, source=TIERING,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Error:
    """Relative error of estimated step times: 0.1 is a tenth too slow, -0.1 a tenth too fast."""

    pairs: int
    mean: float
    worst: float


def step_error(family: str, estimate: Literal["estimated", "computing"]) -> Error | None:
    """Error of one of the estimates of a pair for a generation such as v5p; None where nothing is
    published to compare with."""
    errors = [
        pair.measured / getattr(pair, estimate) - 1
        for pair in PAIRS
        if pair.topology.startswith(f"{family}:")
    ]
    return Error(len(errors), sum(errors) / len(errors), max(errors, key=abs)) if errors else None


def statement(family: str) -> str:
    """One sentence about the estimates for a generation, to stand beside each of them."""
    whole, computing = step_error(family, "estimated"), step_error(family, "computing")
    if whole is None or computing is None:
        return f"estimates for {family} are not calibrated: no published run to compare with"
    return (
        f"on {whole.pairs} published run{'s' if whole.pairs > 1 else ''} the estimated time was "
        f"{whole.mean:+.0%} off on the average and {whole.worst:+.0%} at worst, that of "
        f"computation alone {computing.mean:+.0%} and {computing.worst:+.0%}"
    )
