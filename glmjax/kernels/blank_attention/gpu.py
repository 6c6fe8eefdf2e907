"""Which GPU a program is compiled for."""

import jax
from jax.extend.backend import get_default_device


def compute_capability(device: jax.Device | None = None) -> float:
    """The compute capability of an NVIDIA GPU, such as 9.0 of a Hopper; 0 for anything else.

    None is the default device. Compiling for an absent GPU works under
    `jax.default_device(device)` with a device of a `jax.experimental.topologies` description.
    """
    device = device or get_default_device()
    return float(device.compute_capability) if "NVIDIA" in device.device_kind else 0.0
