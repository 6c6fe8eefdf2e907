"""The compiled training step on pods that are not there, beside MaxText's of equal shape.

Both programs are compiled ahead of time by the same compiler for the same chips and read by the
same analysis (`planning/hlo.py`, `planning/roofline.py`): estimates, nothing was run on a TPU.
Attention kernels are taken at the same share of the matrix units' rate on both sides. The peer's
figures were made once and lie in `experiments/results/peer_maxtext.json`; ours are plans, which
`glmjax bench pods` makes and writes to `experiments/results/pods.json` and `docs/pods.md`.
"""

import datetime
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmjax.config import (
    DataConfig,
    Experiment,
    MeshConfig,
    ObjectiveConfig,
    Remat,
    Saved,
    TrainConfig,
    replace,
)
from glmjax.data.cache import write_whole
from glmjax.planning.plan import plan, plan_to_json
from glmjax.presets import get_config

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
RESULTS, DOCUMENT, PLOT = (
    ROOT / "experiments/results/pods.json", ROOT / "docs/pods.md", ROOT / "docs/pods_scaling.png"
)  # fmt: skip
PEER = ROOT / "experiments/results/peer_maxtext.json"


@dataclass(frozen=True)
class Case:
    """A training step to compile, in one pass unless it has more."""

    topology: str
    mesh: MeshConfig
    rows: int
    """Of a pass, over all chips."""
    remat: Remat = "block"
    saved: tuple[Saved, ...] = ()
    model: str = "glm-130b"
    passes: int = 1
    peer: str | None = None
    """The run of the peer that it is compared with; both without dropout."""


def _mesh(fsdp: int, fsdp_line: int = 1, tensor: int = 1) -> MeshConfig:
    return MeshConfig(data=1, fsdp=fsdp, fsdp_line=fsdp_line, tensor=tensor)


PODS = (
    Case("v5p:4x4x8", _mesh(32, 4), 256, "ffn", passes=17),
    Case("v5p:8x8x8", _mesh(64, tensor=8), 704, "ffn", passes=6),
    Case("v5p:8x8x16", _mesh(128, tensor=8), 1408, "ffn", passes=3),
    Case("v4:8x8x16", _mesh(128, tensor=8), 384, "ffn", passes=11),
    Case("v6e:16x16", _mesh(128, tensor=2), 128, passes=33),
    Case("v5e:16x16", _mesh(16, tensor=16), 64, passes=66),
)
"""GLM-130B as it was trained, 4224 rows a step and dropout, on slices that have room for it."""

COMPARED = (
    Case("v5p:4x4x8", _mesh(32, 4), 128, peer="glm-130b v5p:4x4x8 full b1"),
    Case(
        "v5p:4x4x8", _mesh(32, 4), 256, saved=("qkv", "attention_out", "ffn_in"),
        peer="glm-130b v5p:4x4x8 minimal b2",
    ),
    Case("v5p:4x4x8", _mesh(32, 4), 256, "ffn", peer="glm-130b v5p:4x4x8 minimal b2"),
    Case("v5p:4x4x8", _mesh(32, 4), 512, saved=("qkv",), peer="glm-130b v5p:4x4x8 save_qkv_proj b4"),
    Case(
        "v5p:4x4x8", _mesh(16, tensor=8), 128, "matmuls",
        peer="glm-130b v5p:4x4x8 minimal b1 tensor8",
    ),
    Case("v5p:4x4x8", _mesh(32, 4), 128, "matmuls", peer="glm-130b v5p:4x4x8 minimal b1 tensor8"),
    Case("v5p:8x8x8", _mesh(64, 8), 512, peer="glm-130b v5p:8x8x8 full b1"),
    Case("v4:4x8x8", _mesh(64, 4), 256, peer="glm-130b v4:4x8x8 full b1"),
    Case("v6e:16x16", _mesh(256), 256, peer="glm-130b v6e:16x16 full b1"),
    Case("v5p:2x2x1", _mesh(4), 16, model="chatglm-6b", peer="chatglm-6b v5p:2x2x1 full b4"),
    Case("v5e:4x4", _mesh(16), 16, model="chatglm-6b", peer="chatglm-6b v5e:4x4 full b1"),
    Case("v6e:2x4", _mesh(8), 16, model="chatglm-6b", peer="chatglm-6b v6e:2x4 full b2"),
)  # fmt: skip

SCALING = tuple(
    Case(topology, _mesh(*sizes), sizes[0] * sizes[1], "ffn")
    for topology, sizes in {
        "v5p:4x4x8": (32, 4),
        "v5p:4x8x8": (64, 4),
        "v5p:8x8x8": (64, 8),
        "v5p:8x8x16": (128, 8),
        "v5p:8x16x16": (256, 8),
    }.items()
)
"""A row for each chip on more and more chips."""


def run() -> dict[str, Any]:
    """Compiles every case and writes the results, the document and the plot.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
    """
    results: dict[str, Any] = {"date": datetime.date.today().isoformat()}
    for name, cases in (("compared", COMPARED), ("pods", PODS), ("scaling", SCALING)):
        results[name] = [_record(case) for case in cases]
    write_whole(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    write_whole(DOCUMENT, document(results, json.loads(PEER.read_text())).encode())
    plot_scaling(results["scaling"], PLOT)
    return results


def show(results: Mapping[str, Any]) -> None:
    """Prints the document."""
    print(document(results, json.loads(PEER.read_text())))


def _record(case: Case) -> dict[str, Any]:
    """The plan of a case, and the case."""
    config = get_config(case.model, dtype="bfloat16", remat=case.remat, saved=case.saved)
    if case.peer is not None:
        no_dropout = dict.fromkeys(
            ("embedding_dropout", "attention_dropout", "hidden_dropout"), 0.0
        )
        config = replace(config, **no_dropout)
    experiment = Experiment(
        model=config,
        objective=ObjectiveConfig(positions="1d" if config.positions == "rope_1d" else "2d"),
        data=DataConfig(sequence_length=2048),
        mesh=case.mesh,
        train=TrainConfig(batch_size=case.rows * case.passes, microbatch_size=case.rows),
    )
    logger.info(
        "compiling %s for %s, remat %s, %d rows", case.model, case.topology, case.remat, case.rows
    )
    made = plan(experiment, case.topology)
    kept = " + ".join((case.remat, *case.saved))
    return plan_to_json(made) | {"remat": kept, "peer": case.peer}


DOCUMENT_TEXT = """# Pods that are not there

What libtpu makes of the training step, compiled ahead of time on a machine without a TPU. **Nothing
here was run on a TPU.** Memory, FLOPs and bytes are facts about the compiled programs; seconds and
utilisation (MFU) are estimates of the model in [planning.md](planning.md), which says how far off they
were where the truth is published. Made by `glmjax bench pods` on {date}
({versions}); every figure, with its communication by axis, is in
`experiments/results/pods.json`.

## GLM-130B fits

The published recipe, with dropout and at least 4224 rows of 2,048 tokens a step, on

{pods}

4224 is 33 x 128: on 128 chips the last pass of two rows a chip is half empty, and its empty rows count
here as if they were full (3% of the step).

## Beside MaxText

MaxText's program of the same shape for the same chips, from the same compiler, read by the same
analysis (`experiments/results/peer_maxtext.json` has its commit, versions and settings). Its remat
`full` is `block` here; what more is kept stands behind a plus. In brackets ours over its, times at
equal tokens. "Needs" is what libtpu compares with the memory of a device, of MaxText's programs XLA's
peak, which is about as much. "Compute only": operations and kernels one after the other. "Synchronous
exposed": plus the collectives beside which nothing runs. "Whole schedule": plus waiting for the
others, as scheduled. Attention kernels are taken at half the matrix units' rate on both sides.

{compared}

What the differences come from, and what stops the rest (November 2026, libtpu 0.0.42.1):

* **Communication.** On v5p and v6e gathers and reduce-scatters run on the sparse cores beside products,
  where MaxText's stand alone; "synchronous exposed" and "compute only" are nearly one number. What is
  waited for is the first gather of each layer and pass, before which there is nothing to compute, and
  the last sums. v4 has no sparse cores that do this: its gathers stand alone too.
* **Computation** takes at most 0.95 of MaxText's time for GLM-130B everywhere: no layout copies of
  gathered kernels, rotation by a product, no GELU inside products, attention once. Products run at 84
  to 96% of the matrix units' rate on v5p. ChatGLM-6B on v5p is the exception (0.99): its products are a
  third as wide and run at 76 to 93%.
* **Memory** was to be at most 0.85 of MaxText's at equal rows and remat, and is not. With two and four
  rows a chip the state and the kept outputs alone, equal on both sides, are over 0.8 of its program.
  With one row, and more so on 512 chips, what is left is mostly gathered kernels and gradients of one
  layer: transfers that run beside products hold their buffers longer. The remat that asks for less
  than `minimal`, `ffn`, needs 0.84 of it at 1.10 times the model's FLOPs.

## Scaling

One row for each v5p chip, remat `ffn`. "Alive" is the busiest moment without the gaps that XLA leaves
between buffers; the gaps do not shrink with the state.

{scaling}

![Memory and collective bytes over chips](pods_scaling.png)
"""

HEADER = (
    "| program | mesh | rows per chip, remat | needs GiB | hardware / model FLOPs | compute s | "
    "synchronous s | asynchronous s (waited for) | MFU: compute only | synchronous exposed | "
    "whole schedule | tokens/s/chip |"
)

Record = Mapping[str, Any]
"""A plan as `planning.plan.plan_to_json` writes it; of the peer's also its name."""


def table(pairs: Iterable[tuple[Record, Iterable[Record]]]) -> str:
    """A Markdown table of each peer program, and ours below with its memory and compute time
    over the peer's."""
    lines = [HEADER, "|" + " --- |" * HEADER.count(" | ") + " --- |"]
    for peer, plans in pairs:
        lines.append(_row(f"MaxText {peer['name']}", peer))
        lines += [_row("glmjax", made, peer) for made in plans]
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
    needs = f"{_needed(record) / 2**30:.1f}"
    if estimate is None:
        rows = f"{record['rows'] / record['devices']:g}, {record['remat']}"
        return f"| {name} | {_show_mesh(record)} | {rows} | {_refusal(record)} |" + "  |" * 8
    compute = f"{estimate['compute_seconds']:.2f}"
    if peer is not None:
        tokens, of_peer = (r["rows"] * r["length"] / r["devices"] for r in (record, peer))
        seconds = peer["estimate"]["compute_seconds"] * tokens / of_peer
        needs += f" ({_needed(record) / _needed(peer):.2f}x)"
        compute += f" ({estimate['compute_seconds'] / seconds:.2f}x)"
    cells = (
        name,
        _show_mesh(record),
        f"{record['rows'] / record['devices']:g}, {record['remat']}",
        needs,
        f"{record['hardware_flops'] / record['model_flops']:.2f}",
        compute,
        f"{estimate['synchronous_seconds']:.2f}",
        f"{estimate['asynchronous_seconds']:.2f} ({estimate['waiting_seconds']:.2f})",
        *(f"{share:.1%}" for share in utilisations(record)),
        f"{estimate['tokens_per_second_per_chip']:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _needed(record: Record) -> float:
    """Bytes that libtpu compares with a device's memory; of the peer's programs XLA's peak, which is
    about as much."""
    memory = record["memory"]
    return memory["peak"] if "name" in record else memory["arguments"] + memory["temporaries"]


def _refusal(record: Record) -> str:
    return (
        f"does not fit: needs {_needed(record) / 2**30:.1f} of "
        f"{record['hbm_bytes'] / 2**30:.1f} GiB"
    )


def _show_mesh(record: Record) -> str:
    return " x ".join(f"{axis}{size}" for axis, size in record["mesh"].items() if size > 1)


def document(results: Mapping[str, Any], peer: Mapping[str, Any]) -> str:
    """docs/pods.md, whole."""
    compared: dict[str, list[Record]] = {}
    for record in results["compared"]:
        compared.setdefault(record["peer"], []).append(record)
    peers = {record["name"]: record for record in peer["runs"]}
    versions = results["pods"][0]["versions"]
    return DOCUMENT_TEXT.format(
        date=results["date"],
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        pods=_pods_table(results["pods"]),
        compared=table((peers[name], records) for name, records in compared.items()),
        scaling=_scaling_table(results["scaling"]),
    )


def _pods_table(records: Iterable[Record]) -> str:
    lines = [
        "| slice | chips | mesh | passes x rows, remat | needs of available GiB | hardware / model FLOPs"
        + " | MFU: compute only, whole schedule | tokens/s/chip | days for 400B tokens |",
        "|" + " --- |" * 9,
    ]
    for record in records:
        estimate = record["estimate"]
        assert estimate is not None, f"{record['topology']}: {_refusal(record)}"
        rows = record["microbatch_rows"]
        cells: tuple[str, ...] = (
            record["topology"],
            f"{record['chips']:,}",
            _show_mesh(record),
            f"{record['rows'] // record['microbatch_rows']} x {rows}, {record['remat']}",
            f"{_needed(record) / 2**30:.1f} of {record['hbm_bytes'] / 2**30:.1f}",
            f"{record['hardware_flops'] / record['model_flops']:.2f}",
            f"{estimate['compute_utilisation']:.1%}, {estimate['utilisation']:.1%}",
            f"{estimate['tokens_per_second_per_chip']:.0f}",
            f"{record['days']:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _scaling_table(records: Iterable[Record]) -> str:
    lines = [
        "| chips | mesh | state GiB | alive GiB | needs GiB | collectives GB | compute s | waited s | MFU, whole schedule |",
        "|" + " --- |" * 9,
    ]
    for record in records:
        memory, estimate = record["memory"], record["estimate"]
        cells = (
            f"{record['chips']:,}",
            _show_mesh(record),
            f"{memory['arguments'] / 2**30:.2f}",
            f"{memory['peak'] / 2**30:.1f}",
            f"{_needed(record) / 2**30:.1f}",
            f"{_collective_bytes(record) / 1e9:.0f}",
            f"{estimate['compute_seconds']:.2f}",
            f"{estimate['synchronous_seconds'] + estimate['waiting_seconds']:.2f}",
            f"{estimate['utilisation']:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _collective_bytes(record: Record) -> float:
    return sum(communication["bytes"] for communication in record["communication"])


def plot_scaling(records: list[Record], path: Path) -> None:
    """Memory and collective bytes of a device over the number of chips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    chips = [record["chips"] for record in records]
    alive, state = (
        [record["memory"][part] / 2**30 for record in records] for part in ("peak", "arguments")
    )
    left.plot(
        chips, [_needed(r) / 2**30 for r in records], marker="o", label="needs, gaps included"
    )
    left.plot(chips, alive, marker="o", label="alive at the busiest moment")
    left.plot(chips, state, marker="o", label="parameters and optimizer state")
    collectives = [_collective_bytes(record) / 1e9 for record in records]
    right.plot(chips, collectives, marker="o", color="black")
    left.set(ylabel="GiB of a device", ylim=(0, None))
    right.set(ylabel="GB of collectives a step, of a device", ylim=(0, 1.1 * max(collectives)))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="v5p chips, a row of 2,048 tokens each", xticks=chips, xticklabels=chips)
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=150)
