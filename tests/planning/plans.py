"""Plans made up for tests, and the experiment that they are of."""

from dataclasses import replace

from glmjax.config import DataConfig, Experiment, MeshConfig, ObjectiveConfig, TrainConfig
from glmjax.planning.memory import Contributor, Memory
from glmjax.planning.plan import Communication, Estimate, Plan
from glmjax.presets import get_config

GIB = 2**30


def make_experiment(**train: object) -> Experiment:
    """A small GLM of the 130B family whose heads and widths divide by eight."""
    model = get_config(
        "glm-130b-tiny", hidden_size=512, num_heads=8, ffn_size=1024, vocab_size=1024,
        dtype="bfloat16", remat="block",
        embedding_dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    return Experiment(
        model=model,
        objective=ObjectiveConfig(positions="1d"),
        data=DataConfig(sequence_length=128),
        mesh=MeshConfig(data=1, fsdp=2, tensor=2),
        train=TrainConfig(**{"batch_size": 8} | train),  # type: ignore[arg-type]
    )


def make_plan(needed: float = 10.0, seconds: float | None = 2.0, **changes: object) -> Plan:
    """A plan that needs so many of 95 GiB, with a step of so many seconds, or without an estimate."""
    arguments, temporaries = int(GIB), int((needed - 1) * GIB)
    estimate = seconds and Estimate(
        seconds=seconds, compute_seconds=seconds / 2, synchronous_seconds=seconds / 4,
        asynchronous_seconds=0.3, host_seconds=0.0, waiting_seconds=seconds / 4,
        tokens_per_second_per_chip=4096 / seconds / 4, utilisation=0.5 / seconds,
        compute_utilisation=0.6 / seconds,
    )  # fmt: skip
    plan = Plan(
        job="train", model="glm-130b", topology="v5p:2x2x1", num_slices=1, chips=4, devices=4,
        mesh={"data": 1, "fsdp": 2, "fsdp_line": 1, "tensor": 2},
        weights="bfloat16", cache="", rows=16, microbatch_rows=4, length=256, prompt=0,
        remat="block", fits=needed <= 95, hbm_bytes=95 * GIB,
        memory=Memory(
            arguments, temporaries, arguments + temporaries // 2,
            (Contributor("kept for the backward pass", "bf16[70,1,2048,12288]", 6, 3 * GIB),),
        ),
        hardware_flops=5e15, model_flops=4e15,
        communication=(
            Communication(("fsdp",), "all-gather", "synchronous", 70.0, 3e9, 0.25),
            Communication(("data", "fsdp"), "reduce-scatter", "fused", 7.0, 1e9, 0.125),
        ),
        estimate=estimate or None, calibration="estimates are not calibrated",
        versions={"jax": "0.10.2"}, compile_seconds=12.0,
    )  # fmt: skip
    return replace(plan, **changes)  # type: ignore[arg-type]
