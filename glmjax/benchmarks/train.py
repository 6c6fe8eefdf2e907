"""Speed of a training step, beside the same model in PyTorch.

The peer is `transformers` GPT-2 of equal shape with fused AdamW: same layers, width, heads,
vocabulary, batch and length, float32, no dropout, a loss on every token. Both run in turns in one
process, so that the ratio survives a noisy machine. The blank-infilling row is the same model on
rows as pretraining sees them, where only part B has a loss.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.config import DataConfig, Experiment, GLMConfig, OptimizerConfig, TrainConfig, replace
from glmjax.data.blanks import Batch
from glmjax.model.params import count_params
from glmjax.presets import get_config
from glmjax.sharding import make_mesh
from glmjax.training.metrics import flops
from glmjax.training.step import Controls, init_state, put_batch, train_step

Step = Callable[[], None]

SIZES: dict[str, GLMConfig] = {
    "5m": get_config("glm-5m", vocab_size=8192, max_positions=512),
    "110m": get_config("glm-base"),
}


def run(sizes: tuple[str, ...] = ("5m", "110m"), rows: int = 8, rounds: int = 5) -> dict[str, Any]:
    """Measures a step of every size and of its PyTorch twin where torch is installed.

    Returns:
        For each size: parameters, and tokens_per_second and flops_per_second of `glmjax` (loss on
        every token), `glmjax_blanks` (loss on part B) and `pytorch`, each the median over rounds,
        with `ratio` = glmjax over pytorch as the median of the per-round ratios. FLOPs are those of
        the full model, by the formula of `training/metrics.py`.
    """
    results: dict[str, Any] = {"matmul_flops_per_second": _matmul_peak(), "sizes": {}}
    for size in sizes:
        config = replace(
            SIZES[size], embedding_dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0
        )
        length = config.max_positions
        steps: dict[str, Step] = {
            "glmjax": _glmjax_step(config, rows, length, context=0),
            "glmjax_blanks": _glmjax_step(config, rows, length, context=int(0.8 * length)),
        }
        if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            steps["pytorch"] = _pytorch_step(config, rows, length)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for name, step in _turns(steps, rounds):
            seconds[name].append(_time(step))
        result: dict[str, Any] = {
            "parameters": count_params(config), "rows": rows, "length": length, "steps": {},
        }  # fmt: skip
        for name, times in seconds.items():
            median = float(np.median(times))
            result["steps"][name] = {
                "tokens_per_second": rows * length / median,
                "flops_per_second": flops(config, rows, length) / median,
            }
        if "pytorch" in seconds:
            ratios = np.array(seconds["pytorch"]) / np.array(seconds["glmjax"])
            result["ratio"] = float(np.median(ratios))
        results["sizes"][size] = result
    return results


def show(results: dict[str, Any]) -> None:
    """Prints what `run` measured."""
    peak = results["matmul_flops_per_second"]
    print(f"a large float32 product reaches {peak / 1e9:,.0f} GFLOP/s here")
    for size, result in results["sizes"].items():
        print(f"\n{size}: {result['parameters']:,} parameters, {result['rows']} rows of "
              f"{result['length']} tokens, float32, no dropout")  # fmt: skip
        print(f"{'step':16} {'tokens/s':>10} {'GFLOP/s':>8} {'of product':>10}")
        for name, rates in result["steps"].items():
            speed, rate = rates["tokens_per_second"], rates["flops_per_second"]
            print(f"{name:16} {speed:>10,.0f} {rate / 1e9:>8,.0f} {rate / peak:>10.0%}")
        if "ratio" in result:
            print(f"glmjax is {result['ratio']:.2f} times as fast as pytorch")
        else:
            print('pytorch is not installed: pip install "glmjax[peers]" to compare')


def _turns(steps: dict[str, Step], rounds: int) -> Iterator[tuple[str, Step]]:
    """Every step once to compile and warm up, then all of them in turns."""
    for step in steps.values():
        step()
        step()
    for _ in range(rounds):
        yield from steps.items()


def _time(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _matmul_peak(size: int = 2048) -> float:
    """FLOP/s of the best of ten large float32 products: what the machine can do at most."""
    x = jax.device_put(np.ones((size, size), np.float32))
    product = jax.jit(lambda x: x @ x)
    seconds = [_time(lambda: product(x).block_until_ready()) for _ in range(10)]
    return 2 * size**3 / min(seconds)


def _glmjax_step(config: GLMConfig, rows: int, length: int, context: int) -> Step:
    """A step on random rows whose first `context` tokens are part A."""
    experiment = Experiment(
        model=config,
        data=DataConfig(sequence_length=length),
        optimizer=OptimizerConfig(),
        train=TrainConfig(batch_size=rows),
    )
    mesh = make_mesh(experiment.mesh)
    random = np.random.default_rng(0)
    position_T = np.arange(length, dtype=np.int32)
    zeros_BT = np.zeros((rows, length), np.int32)
    batch = Batch(
        tokens_BT=random.integers(0, config.vocab_size, (rows, length), np.int32),
        positions_B2T=np.stack([zeros_BT + position_T, zeros_BT], 1),
        k_start_BT=zeros_BT,
        k_end_BT=zeros_BT + np.maximum(position_T + 1, context),
        targets_BT=random.integers(0, config.vocab_size, (rows, length), np.int32),
        weights_BT=(zeros_BT + position_T >= context).astype(np.float32),
        objective_B=np.zeros(rows, np.int32),
    )
    with jax.set_mesh(mesh):
        state = init_state(experiment, mesh)
        on_device = put_batch(mesh, batch)
    controls = Controls(np.int32(1), np.float32(1e-4), np.float32(1))
    controls = jax.device_put(controls, NamedSharding(mesh, PartitionSpec()))

    def step() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(experiment, state, on_device, controls)
        jax.block_until_ready((state, metrics))

    return step


def _pytorch_step(config: GLMConfig, rows: int, length: int) -> Step:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size, n_positions=length, n_embd=config.hidden_size,
            n_layer=config.num_layers, n_head=config.num_heads, n_inner=config.ffn_size,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens = torch.randint(config.vocab_size, (rows, length))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
