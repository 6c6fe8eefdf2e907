"""Plans as a person reads them: whether it fits first, then why, then how fast it would be."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from glmjax.planning.plan import TOKENS, Estimate, Plan
from glmjax.planning.search import Found
from glmjax.planning.topologies import Topology

GIB = 2**30


def show(
    plan: Plan, console: Console, command: str | None = None, prefill: Plan | None = None
) -> None:
    """Prints a plan; `command` is what trains so, `prefill` what of serving may need more memory."""
    largest = max(plan, prefill or plan, key=lambda plan: plan.memory.needed)
    console.print(_verdict(largest), highlight=False, soft_wrap=True)
    if command is not None:
        console.print(f"as in: {command}", highlight=False, soft_wrap=True)
    console.print(_facts(plan))
    console.print(_memory(plan))
    if prefill is not None:
        console.print(_prefill(prefill))
    if plan.communication:
        console.print(_communication(plan))
    if plan.estimate is not None:
        console.print(_estimate(plan, plan.estimate))
        console.print(f"Estimated, not measured: {plan.calibration}.", highlight=False)
    used = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    console.print(f"compiled with {used} in {plan.compile_seconds:.0f} s", style="dim")


def show_found(found: Sequence[Found], console: Console) -> None:
    """Prints the plans that a search found, the fastest first."""
    table = Table(title="what fits, the fastest first; times are estimates")
    for name in ("mesh", "rows of a pass", "remat", "needs GiB", "s/step", "MFU", "days"):
        table.add_column(name, justify="left" if name in ("mesh", "remat") else "right")
    for each in found:
        plan, estimate = each.plan, each.plan.estimate
        if estimate is not None:
            table.add_row(
                _mesh(plan), f"{plan.microbatch_rows:,}", plan.remat,
                f"{plan.memory.needed / GIB:.1f}", f"{estimate.seconds:.2f}",
                f"{estimate.utilisation:.1%}", f"{plan.days:.1f}",
            )  # fmt: skip
    console.print(table)


def _verdict(plan: Plan) -> str:
    needed, hbm = plan.memory.needed / GIB, plan.hbm_bytes / GIB
    chips = f"{plan.chips:,} chip{'s' if plan.chips > 1 else ''}"
    what = f"{plan.model} on {Topology(plan.topology, plan.num_slices)}, {chips}"
    if plan.fits:
        free = plan.margin / plan.hbm_bytes
        return (
            f"[bold green]It fits[/]: {what}. A device needs {needed:.1f} of {hbm:.1f} GiB, "
            f"{plan.margin / GIB:.1f} GiB ({free:.0%}) stay free."
        )
    return (
        f"[bold red]It does not fit[/]: {what}. A device would need {needed:.1f} GiB, "
        f"{-plan.margin / GIB:.1f} GiB more than the {hbm:.1f} GiB it has."
    )


def _mesh(plan: Plan) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1"


def _facts(plan: Plan) -> Table:
    table = Table(show_header=False, title="the step that was compiled")
    table.add_row("mesh", _mesh(plan))
    if plan.job == "train":
        passes = plan.rows // plan.microbatch_rows
        table.add_row("batch", f"{plan.rows:,} rows of {plan.length:,} tokens")
        table.add_row("passes", f"{passes:,} of {plan.microbatch_rows:,} rows, remat {plan.remat}")
        ratio = plan.hardware_flops / plan.model_flops
        table.add_row("model FLOPs", f"{plan.model_flops:.3e}")
        table.add_row("hardware FLOPs", f"{plan.hardware_flops:.3e}, {ratio:.3f} times as many")
    else:
        rows = f"{plan.rows:,} row{'s' if plan.rows > 1 else ''}"
        table.add_row("weights", f"{plan.weights}, keys and values {plan.cache}")
        table.add_row("batch", f"{rows} with room for {plan.length:,} tokens each")
        table.add_row("FLOPs", f"{plan.hardware_flops:.3e} for a token of every row")
    return table


def _memory(plan: Plan, most: int = 10) -> Table:
    memory = plan.memory
    table = Table(title="memory of a device, GiB", show_footer=False)
    for name in ("what", "shape", "GiB"):
        table.add_column(name, overflow="fold", justify="right" if name == "GiB" else "left")
    for name, size in (
        ("arguments: parameters, state, batch" if plan.job == "train" else "arguments: weights, cache",
         memory.arguments),
        ("temporaries", memory.temporaries),
        ("needed", memory.needed),
        ("available", plan.hbm_bytes),
        ("alive at the busiest moment, of which", memory.peak),
    ):  # fmt: skip
        table.add_row(name, "", f"{size / GIB:.2f}", style="bold" if name == "needed" else None)
    for each in memory.contributors[:most]:
        times = f"{each.count} x " if each.count > 1 else ""
        table.add_row(f"  {each.name}", f"{times}{each.shape}", f"{each.bytes / GIB:.2f}")
    return table


def _prefill(plan: Plan) -> Table:
    """What a prompt takes beside a running batch."""
    table = Table(show_header=False, title="feeding a prompt, beside the rows of the batch")
    prompts = f"{plan.microbatch_rows} at a time, " if plan.microbatch_rows > 1 else ""
    table.add_row("prompt", f"{prompts}up to {plan.prompt:,} tokens")
    for name, size in (
        ("temporaries", plan.memory.temporaries),
        ("needed", plan.memory.needed),
    ):
        table.add_row(f"{name}, GiB", f"{size / GIB:.2f}")
    if plan.estimate is not None:
        table.add_row("estimated time", f"{plan.estimate.seconds * 1e3:.0f} ms")
    return table


def _communication(plan: Plan) -> Table:
    table = Table(
        title="communication of a device in a step; seconds alone on its links, estimated"
    )
    for name in ("axes", "kind", "how", "times", "GB", "s"):
        is_number = name in ("times", "GB", "s")
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for each in plan.communication:
        table.add_row(
            " x ".join(each.axes) or "none", each.kind, each.how,
            f"{each.count:,.0f}", f"{each.bytes / 1e9:,.2f}", f"{each.seconds:.3f}",
        )  # fmt: skip
    return table


def _estimate(plan: Plan, estimate: Estimate) -> Table:
    table = Table(show_header=False, title="estimates of the roofline model")
    if plan.job == "decode":
        rows = [
            ("a token of every row", f"{estimate.seconds * 1e3:.2f} ms"),
            ("reading weights and cache once", f"{plan.least_seconds * 1e3:.2f} ms at least"),
            ("tokens per second", f"{plan.rows / estimate.seconds:,.0f}"),
            ("and chip", f"{estimate.tokens_per_second_per_chip:,.1f}"),
        ]
    else:
        rows = [
            ("step", f"{estimate.seconds:.2f} s"),
            ("  computation", f"{estimate.compute_seconds:.2f} s"),
            ("  communication beside nothing", f"{estimate.synchronous_seconds:.2f} s"),
            ("  waiting for communication", f"{estimate.waiting_seconds:.2f} s"),
            ("communication beside computation", f"{estimate.asynchronous_seconds:.2f} s"),
            ("copies to and from the host", f"{estimate.host_seconds:.2f} s"),
            ("model FLOPs utilisation", f"{estimate.utilisation:.1%}"),
            ("  if communication were free", f"{estimate.compute_utilisation:.1%}"),
            ("tokens per second and chip", f"{estimate.tokens_per_second_per_chip:,.0f}"),
            (f"{TOKENS / 1e9:.0f} billion tokens", f"{plan.days:.1f} days"),
            ("", f"{plan.days * 24 * plan.chips:,.0f} chip-hours"),
        ]
    for name, value in rows:
        table.add_row(name, value)
    return table
