"""The compiled training step on pods that are not there, beside MaxText's of equal shape.

Both programs are compiled ahead of time by the same compiler for the same chips and read by the
same analysis (`planning/hlo.py`, `planning/roofline.py`): estimates, nothing was run on a TPU.
Attention kernels are taken at the same share of the matrix units' rate on both sides. The peer's
figures were made once and lie in `experiments/results/peer_maxtext.json`; ours are plans.
"""

from collections.abc import Iterable, Mapping
from typing import Any

HEADER = (
    "| program | mesh | rows per chip, remat | peak GiB | hardware / model FLOPs | compute s | "
    "synchronous s | asynchronous s (waited for) | MFU: compute only | synchronous exposed | "
    "whole schedule | tokens/s/chip |"
)

Record = Mapping[str, Any]
"""A plan as `planning.plan.plan_to_json` writes it; of the peer's also its name."""


def table(pairs: Iterable[tuple[Record, Iterable[Record]]]) -> str:
    """A Markdown table of each peer program, and ours below with its peak and compute time over
    the peer's."""
    lines = [HEADER, "|" + " --- |" * HEADER.count(" | ") + " --- |"]
    for peer, plans in pairs:
        lines.append(_row(f"MaxText {peer['name']}", peer))
        for plan in plans:
            lines.append(_row("glmjax", plan, peer))
    return "\n".join(lines)


def utilisations(record: Record) -> tuple[float, float, float]:
    """MFU if all communication were free, if the asynchronous were and the rest exposed, and along
    the whole schedule."""
    estimate = record["estimate"]
    compute = estimate["compute_seconds"]
    exposed = max(compute + estimate["synchronous_seconds"], estimate["asynchronous_seconds"])
    at_once = estimate["utilisation"] * estimate["seconds"]
    return at_once / compute, at_once / exposed, estimate["utilisation"]


def _row(name: str, record: Record, peer: Record | None = None) -> str:
    estimate = record["estimate"]
    mesh = " x ".join(f"{axis}{size}" for axis, size in record["mesh"].items() if size > 1)
    peak = f"{record['memory']['peak'] / 2**30:.1f}"
    compute = f"{estimate['compute_seconds']:.2f}"
    if peer is not None:
        tokens, of_peer = (r["rows"] * r["length"] / r["devices"] for r in (record, peer))
        seconds = peer["estimate"]["compute_seconds"] * tokens / of_peer
        peak += f" ({record['memory']['peak'] / peer['memory']['peak']:.2f}x)"
        compute += f" ({estimate['compute_seconds'] / seconds:.2f}x)"
    cells = (
        name,
        mesh,
        f"{record['rows'] / record['devices']:g}, {record['remat']}",
        peak,
        f"{record['hardware_flops'] / record['model_flops']:.2f}",
        compute,
        f"{estimate['synchronous_seconds']:.2f}",
        f"{estimate['asynchronous_seconds']:.2f} ({estimate['waiting_seconds']:.2f})",
        *(f"{share:.1%}" for share in utilisations(record)),
        f"{estimate['tokens_per_second_per_chip']:.0f}",
    )
    return f"| {' | '.join(cells)} |"
