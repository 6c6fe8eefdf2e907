"""All tests run on eight CPU devices, with full-precision products.

Programs are compiled quickly rather than well, here and in the processes that tests start: most of
the time goes into compilation. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= make test` compiles them
as users do.
"""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Without the MLIR passes of XLA's newer fusions: a third of the time up to jax 0.10, ignored in 0.12.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests say themselves where programs are kept.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

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
