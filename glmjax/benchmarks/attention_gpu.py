"""Speed of blank attention on an NVIDIA GPU, beside PyTorch FlexAttention.

Every implementation gets the same bfloat16 inputs and the same intervals of keys. All of them run
in turns in one process, and only after their outputs and gradients were compared with the
reference. FLOPs are those of the scores that are visible, 4 K each in the forward pass (two
products of 2 K) and 10 K more in the backward pass (five products, one of them made again), so
that skipping hidden keys shows as speed. FlexAttention's block mask is made outside the measured
time, though training makes one in each step; what our implementations derive from the intervals is
inside.
"""

import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.kernels.blank_attention import blockwise, cudnn, reference, tokamax
from glmjax.kernels.blank_attention.gpu import compute_capability

RESULTS = Path("experiments/results")
MASKS = "prefix 0", "prefix 700", "prefix 1400", "prefix 2048", "8 samples"
LENGTHS = 2048, 8192
IMPLEMENTATIONS = "tokamax", "cudnn", "blockwise", "flex_attention"
PACKAGES = "jax", "jaxlib", "tokamax", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "torch"


class Case(NamedTuple):
    """What is attended to whom: arrays [B, T, H, K] in float32, intervals [B, T] in int32."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    cotangent: np.ndarray
    k_start: np.ndarray
    k_end: np.ndarray


class Steps(NamedTuple):
    """One implementation, ready to run a case; both steps return before the GPU has finished."""

    forward: Callable[[], list]
    """Starts the forward pass: [output]."""
    both: Callable[[], list]
    """Starts the forward and the backward pass: [output, dq, dk, dv]."""
    wait: Callable[[list], Any]
    """Waits for what a step returned."""
    numpy: Callable[[list], list[np.ndarray]]
    """What a step returned as float32 [B, T, H, K]."""


Prepare = Callable[[Case], Steps]


def run(
    implementations: dict[str, Prepare] | None = None,
    *,
    masks: tuple[str, ...] = MASKS,
    lengths: tuple[int, ...] = LENGTHS,
    batch: int = 4,
    heads: int = 32,
    head_size: int = 128,
    rounds: int = 10,
    calls: int = 10,
) -> dict[str, Any]:
    """Measures all implementations on all masks; None is those that run on the GPU at hand.

    A time is the median over `rounds` of the time of `calls` calls in a row, divided by `calls`.

    Returns:
        The device, driver, versions and command; and for each length, mask and implementation
        `forward` and `both` in milliseconds, with TFLOP/s of visible scores.

    Raises:
        ValueError: there is no NVIDIA GPU, or an implementation differs from the reference.
    """
    # jax and PyTorch share the memory of the GPU; jax would take three quarters of it at its start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if implementations is None:
        implementations = gpu_implementations(head_size)
    results: dict[str, Any] = {
        "environment": _environment(), "batch": batch, "heads": heads, "head_size": head_size,
        "rows": [],
    }  # fmt: skip
    for length in lengths:
        for mask in masks:
            case = make_case(mask, batch, length, heads, head_size)
            steps = {name: prepare(case) for name, prepare in implementations.items()}
            for name, step in steps.items():
                _compare(name, step, case)
            seconds: dict[tuple[str, bool], list[float]] = defaultdict(list)
            for name, both in _turns(steps, rounds):
                seconds[name, both].append(_time(steps[name], both, calls))
            for name in steps:
                row: dict[str, Any] = {"length": length, "mask": mask, "implementation": name}
                for both in (False, True):
                    median = float(np.median(seconds[name, both]))
                    row["both" if both else "forward"] = {
                        "milliseconds": 1e3 * median,
                        "tflops": flops(case, both) / median / 1e12,
                    }
                results["rows"].append(row)
    return results


def show(results: dict[str, Any]) -> None:
    """Prints what `run` measured."""
    print(", ".join(f"{key} {value}" for key, value in results["environment"].items()))
    print(table(results))


def save(results: dict[str, Any], folder: Path = RESULTS) -> None:
    """Writes attention_gpu.json and puts the table into README.md of the folder."""
    (folder / "attention_gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    readme = folder / "README.md"
    before, _, after = readme.read_text().partition("<!-- attention_gpu -->\n")
    after = after.partition("<!-- end -->\n")[2]
    environment = [f"- {key}: {value}" for key, value in results["environment"].items()]
    readme.write_text(
        f"{before}<!-- attention_gpu -->\n{table(results)}\n\n"
        + "\n".join(environment)
        + f"\n<!-- end -->\n{after}"
    )


def table(results: dict[str, Any] | None) -> str:
    """The measured times in Markdown; None and what was not in the run are "not measured"."""
    measured = {} if results is None else {
        (row["length"], row["mask"], row["implementation"]): row for row in results["rows"]
    }  # fmt: skip
    planned = [(t, mask, name) for t in LENGTHS for mask in MASKS for name in IMPLEMENTATIONS]
    lines = [
        "| length | mask | implementation | forward | forward and backward |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key in dict.fromkeys([*planned, *measured]):
        cells = ["not measured"] * 2
        if key in measured:
            cells = [
                f"{times['milliseconds']:.3f} ms, {times['tflops']:.0f} TFLOP/s"
                for times in (measured[key]["forward"], measured[key]["both"])
            ]
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines)


def gpu_implementations(head_size: int) -> dict[str, Prepare]:
    """Those that run on the GPU at hand."""
    capability = compute_capability()
    if not capability:
        raise ValueError(
            "the GPU benchmark of attention needs an NVIDIA GPU, and jax finds only "
            f"{jax.devices()[0].device_kind}"
        )
    implementations = {
        name: jax_steps(module.attend)
        for name, module in (("tokamax", tokamax), ("cudnn", cudnn))
        if module.refusal(jnp.bfloat16, head_size, 0.0, capability) is None
    }
    implementations["blockwise"] = jax_steps(blockwise.attend)
    if importlib.util.find_spec("torch"):
        implementations["flex_attention"] = flex_attention_steps("cuda")
    return implementations


def make_case(mask: str, batch: int, length: int, heads: int, head_size: int) -> Case:
    """Unit normal inputs, and the intervals of a mask such as "prefix 700" or "8 samples".

    Prefixes are those of length 2048 and grow with the length. Samples are equally long, and the
    first half of each is part A.
    """
    random = np.random.default_rng(0)
    arrays = random.standard_normal((4, batch, length, heads, head_size), np.float32)
    # All implementations start from the same bfloat16 numbers.
    arrays = arrays.astype(jnp.bfloat16).astype(np.float32)
    query_T = np.arange(length, dtype=np.int32)
    if mask.startswith("prefix "):
        start_T, context = np.zeros_like(query_T), int(mask.split()[1]) * length // 2048
    else:
        sample = length // int(mask.split()[0])
        start_T, context = query_T // sample * sample, sample // 2
    k_end_T = np.maximum(query_T + 1, start_T + context)
    q, k, v, cotangent = arrays
    k_start, k_end = (np.tile(x, (batch, 1)) for x in (start_T, k_end_T))
    return Case(q, k, v, cotangent, k_start, k_end)


def flops(case: Case, both: bool) -> int:
    """Floating-point operations on visible scores: 4 K each forward, 14 K with the backward."""
    heads, head_size = case.q.shape[2:]
    visible = int((case.k_end - case.k_start).sum())
    return (14 if both else 4) * head_size * heads * visible


def jax_steps(attend: Callable[..., jax.Array], dtype: str = "bfloat16") -> Prepare:
    """Steps of a function of (q, k, v, k_start, k_end)."""

    def prepare(case: Case) -> Steps:
        *arrays, cotangent = (jnp.asarray(x, dtype) for x in case[:4])
        k_start, k_end = jnp.asarray(case.k_start), jnp.asarray(case.k_end)

        @jax.jit
        def both(q, k, v, cotangent, k_start, k_end):
            out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, k_start, k_end), q, k, v)
            return [out, *pull(cotangent)]

        forward = jax.jit(lambda *inputs: [attend(*inputs)])
        return Steps(
            forward=lambda: forward(*arrays, k_start, k_end),
            both=lambda: both(*arrays, cotangent, k_start, k_end),
            wait=jax.block_until_ready,
            numpy=lambda outputs: [np.asarray(x, np.float32) for x in outputs],
        )

    return prepare


def flex_attention_steps(device: str) -> Prepare:
    """Steps of PyTorch FlexAttention with the block mask of the intervals, compiled on a GPU."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend: Callable[..., Any] = flex_attention
    if device == "cuda":
        # fullgraph, so that it never runs uncompiled.
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def prepare(case: Case) -> Steps:
        # Each mask compiles a program of its own, and PyTorch keeps eight at most.
        torch.compiler.reset()
        *arrays, cotangent = (
            torch.tensor(x, device=device, dtype=torch.bfloat16).transpose(1, 2).contiguous()
            for x in case[:4]
        )
        k_start, k_end = (torch.tensor(x, device=device) for x in (case.k_start, case.k_end))

        def sees(b, h, q, k):
            return (k >= k_start[b, q]) & (k < k_end[b, q])

        batch, length = case.k_start.shape
        mask = create_block_mask(sees, batch, None, length, length, device=device)

        def forward():
            with torch.no_grad():
                return [attend(*arrays, block_mask=mask)]

        def both():
            inputs = [x.requires_grad_() for x in arrays]
            out = attend(*inputs, block_mask=mask)
            return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]

        return Steps(
            forward=forward,
            both=both,
            wait=lambda _: torch.cuda.synchronize(),
            numpy=lambda outputs: [x.transpose(1, 2).float().cpu().numpy() for x in outputs],
        )

    return prepare


def _compare(name: str, steps: Steps, case: Case) -> None:
    """Checks output and gradients of two heads of one row against the reference in float32."""
    part = Case(*(x[:1, :, :2] if x.ndim == 4 else x[:1] for x in case))
    expected = jax_steps(reference.attend, "float32")(part)
    with jax.default_matmul_precision("highest"):
        wanted = expected.numpy(expected.both())
    results = steps.numpy(steps.both())
    for what, got, want in zip(("output", "dq", "dk", "dv"), results, wanted, strict=True):
        # A handful of bfloat16 roundings, each half a unit in the last place of the largest term.
        allowed = 8 * float(jnp.finfo(jnp.bfloat16).eps) * max(1.0, float(np.abs(want).max()))
        difference = float(np.abs(got[:1, :, :2] - want).max())
        if not difference <= allowed:
            raise ValueError(
                f"{what} of {name} differs from the reference by {difference:.3g}; "
                f"{allowed:.3g} is allowed"
            )


def _turns(steps: dict[str, Steps], rounds: int) -> Iterator[tuple[str, bool]]:
    """Every step once to compile and warm up, then all of them in turns."""
    for step in steps.values():
        step.wait(step.forward())
        step.wait(step.both())
    for _ in range(rounds):
        for both in (False, True):
            for name in steps:
                yield name, both


def _time(steps: Steps, both: bool, calls: int) -> float:
    step = steps.both if both else steps.forward
    start = time.perf_counter()
    for _ in range(calls):
        outputs = step()
    steps.wait(outputs)
    return (time.perf_counter() - start) / calls


def _environment() -> dict[str, str]:
    """The device, the versions that matter and the command."""
    device = jax.devices()[0]
    environment = {
        "device": device.device_kind,
        "platform": " ".join(device.client.platform_version.split()),
    }
    if compute_capability(device):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        process = subprocess.run(query, check=True, capture_output=True, text=True)
        environment["driver"] = process.stdout.strip()
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    environment |= {name: installed[name] for name in PACKAGES if name in installed}
    return environment | {"command": shlex.join(["glmjax", *sys.argv[1:]])}
