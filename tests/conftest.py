"""All tests run on eight CPU devices, with full-precision products.

Programs are compiled quickly rather than well, here and in the processes that tests start: most of
the time goes into compilation. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test` compiles them as users do.
"""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

pytest_plugins = ("tiny_run",)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program takes some of the memory maps of a process, of which Linux allows 65,530."""
    yield
    jax.clear_caches()
