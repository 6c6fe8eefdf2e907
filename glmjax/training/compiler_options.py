"""What the compiler is told beyond its defaults, for each kind of device, and why.

Each was read off compiled programs of GLM-130B (docs/planning.md). XLA takes them through
`Lowered.compile(compiler_options=...)`.
"""

from typing import NamedTuple


class Option(NamedTuple):
    """One setting of the compiler."""

    name: str
    value: str
    reason: str


_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
PLANE_SUMS = Option(
    f"{_OFFLOAD}nd_reduce_scatter", "true",
    "without it a sum over more than a ring of chips becomes an all-reduce of twice the bytes, also "
    "on v5e, where nothing is offloaded",
)  # fmt: skip
SPARSE_CORE = (
    Option(
        f"{_OFFLOAD}all_gather", "true",
        "the sparse cores gather the parameters of a layer while the tensor core works on another",
    ),
    Option(f"{_OFFLOAD}2d_all_gather", "true", "the same for a plane of the torus"),
    Option(f"{_OFFLOAD}reduce_scatter", "true", "gradients leave while the backward pass goes on"),
    PLANE_SUMS,
    Option(f"{_OFFLOAD}all_reduce", "true", "sums over replicas and over tensor devices overlap too"),
    Option(
        "xla_tpu_sparse_core_all_gather_latency_multiplier", "2",
        "the scheduler thinks offloaded gathers twice as fast as the links and starts them too late",
    ),
    Option("xla_tpu_sparse_core_reduce_scatter_latency_multiplier", "2", "the same"),
    Option("xla_tpu_use_tc_device_shape_on_sc", "true", "offloaded arrays keep their layout"),
)  # fmt: skip

OPTIONS: dict[str, tuple[Option, ...]] = {
    "TPU v5 lite": (PLANE_SUMS,),
    "TPU v5": SPARSE_CORE,
    "TPU v5p": SPARSE_CORE,
    "TPU v6 lite": SPARSE_CORE,
}
"""By `device_kind`. v4 needs none, and on TPU7x these are the defaults."""


def options_for(device_kind: str) -> dict[str, str | bool]:
    """The options for programs that run on such devices, as `compile` takes them."""
    return {option.name: option.value for option in OPTIONS.get(device_kind, ())}
