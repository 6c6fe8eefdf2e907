"""The implementations for NVIDIA GPUs: what can be known of them without a GPU.

Their masks and what surrounds the kernels run on the CPU, with the same library's plain XLA in
place of the kernel. Where jax's CUDA plugin is installed (`pip install "glmjax[gpu]"`),
`JAX_PLATFORMS=cpu pytest tests/kernels/test_gpu.py` also compiles the kernels for an absent H100.
"""

import importlib.util
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from test_blank_attention import inputs, intervals, output_and_gradients

from glmjax.kernels.blank_attention import cudnn, gpu, reference, tokamax

needs_tokamax = pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or os.getenv("JAX_PLATFORMS") != "cpu",
    reason="needs jax[cuda13] and JAX_PLATFORMS=cpu",
)
XLA = [
    pytest.param("cudnn", id="cudnn"),
    pytest.param("tokamax", id="tokamax", marks=needs_tokamax),
]


def with_xla(name: str):
    """The implementation of that name with its library's XLA in place of the kernel."""
    if name == "cudnn":
        return partial(cudnn.masked_attention, implementation="xla")
    from tokamax._src.ops.attention.base import DotProductAttention

    return partial(tokamax.interval_attention, DotProductAttention())


def attend(name, q, k, v, start, end, seeds=None, dropout=0.0):
    return with_xla(name)(q, k, v, start, end)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [7, 64])
@pytest.mark.parametrize(
    "kind", ["causal", "bidirectional", "prefix", "packed 5", "padded", "blind"]
)
@pytest.mark.parametrize("name", XLA)
def test_the_mask_is_the_reference(name, kind, length, dtype):
    start, end = intervals(kind, 2, length)
    arrays = inputs(2, length, dtype)
    expected = output_and_gradients(
        reference.attend, *[a.astype("float32") for a in arrays], start, end
    )
    got = output_and_gradients(partial(attend, name), *arrays, start, end)
    # As in test_blank_attention.py: a handful of roundings of the largest term.
    for x, want in zip(got, expected, strict=True):
        scale = max(1.0, float(jnp.abs(want).max()))
        difference = jnp.abs(x.astype("float32") - want).max()
        assert difference <= 8 * float(jnp.finfo(dtype).eps) * scale


@pytest.mark.parametrize("name", XLA)
def test_a_query_that_sees_nothing_is_zero_and_has_no_gradient(name):
    """Also where the interval is empty in other words: backwards, before or beyond all keys."""
    length = 40
    start, end = intervals("prefix", 1, length)
    start[0, :4], end[0, :4] = [7, 7, -5, length], [7, 3, 0, length + 9]
    q, k, v, cotangent = inputs(1, length, "float32")
    out, dq, dk, dv = output_and_gradients(partial(attend, name), q, k, v, cotangent, start, end)
    assert not out[0, :4].any() and not dq[0, :4].any()
    assert out[0, 4:].any(-1).all() and dq[0, 4:].any(-1).all()
    # Such queries add nothing to the gradients of keys and values either.
    without = cotangent.at[:, :4].set(0)
    same = output_and_gradients(partial(attend, name), q, k, v, without, start, end)
    np.testing.assert_array_equal(dk, same[2])
    np.testing.assert_array_equal(dv, same[3])


@pytest.mark.parametrize("name", XLA)
def test_only_visible_keys_matter(name):
    length = 12
    start, end = intervals("packed 5", 1, length)
    q, k, v, noise = inputs(1, length, "float32")
    run = jax.jit(partial(attend, name))
    out = run(q, k, v, start, end)
    for t in range(length):
        hidden = (np.arange(length) < start[0, t]) | (np.arange(length) >= end[0, t])
        other = jnp.where(hidden[None, :, None, None], 1e6 * noise, 0)
        np.testing.assert_array_equal(run(q, k + other, v + other, start, end)[0, t], out[0, t])


@pytest.mark.parametrize("name", XLA)
def test_fewer_queries_than_keys(name):
    q, k, v, _ = inputs(2, 300, "float32")
    start, end = np.zeros((2, 3), np.int32), np.array([[5, 6, 7], [290, 299, 300]], np.int32)
    want = reference.attend(q[:, :3], k, v, start, end)
    got = attend(name, q[:, :3], k, v, start, end)
    np.testing.assert_allclose(got, want, atol=8 * np.finfo("float32").eps)


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        (cudnn, ("bfloat16", 64, 0.0, 0.0), "8.0 or newer, and this device has none"),
        (cudnn, ("bfloat16", 64, 0.0, 7.5), "8.0 or newer, and this device has 7.5"),
        (cudnn, ("float32", 64, 0.0, 9.0), "not float32"),
        (cudnn, ("bfloat16", 60, 0.0, 9.0), "not 60"),
        (cudnn, ("bfloat16", 136, 0.0, 9.0), "not 136"),
        (cudnn, ("bfloat16", 64, 0.1, 9.0), "the dropout is 0.1"),
        (tokamax, ("bfloat16", 64, 0.0, 8.0), "9.x or 10.x, and this device has 8.0"),
        (tokamax, ("bfloat16", 64, 0.0, 12.0), "9.x or 10.x, and this device has 12.0"),
        (tokamax, ("float32", 64, 0.0, 9.0), "not float32"),
        (tokamax, ("bfloat16", 264, 0.0, 9.0), "not 264"),
        (tokamax, ("bfloat16", 64, 0.1, 10.0), "the dropout is 0.1"),
    ],
)
def test_what_is_refused_is_said(module, arguments, says):
    assert says in module.refusal(jnp.dtype(arguments[0]), *arguments[1:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
def test_what_glm_needs_is_not_refused(head_size, dtype):
    assert cudnn.refusal(jnp.dtype(dtype), head_size, 0.0, 8.0) is None


def test_tokamax_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(tokamax.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "glmjax[gpu]"' in tokamax.refusal(jnp.dtype("bfloat16"), 64, 0.0, 9.0)


@pytest.mark.parametrize("module", [cudnn, tokamax], ids=["cudnn", "tokamax"])
def test_on_another_platform_it_says_what_to_choose(module):
    assert gpu.compute_capability(jax.devices("cpu")[0]) == 0
    q, k, v, _ = inputs(1, 8, "bfloat16")
    start, end = intervals("causal", 1, 8)
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(ValueError, match=r'needs an NVIDIA GPU .*; choose attention "blockwise"$'),
    ):
        module.attend(q, k, v, start, end)


@needs_cuda
@pytest.mark.parametrize(
    "module",
    [pytest.param(cudnn, id="cudnn"), pytest.param(tokamax, id="tokamax", marks=needs_tokamax)],
)
def test_compiles_for_an_absent_h100_on_two_axes(module):
    """Forward and backward, rows and heads of 8 GPUs; only cuDNN holds something T x T."""
    h100 = (Path(__file__).parent / "h100.txtpb").read_text()
    devices = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x8", topology="1x1x8", target_config=h100
    ).devices
    assert gpu.compute_capability(devices[0]) == 9.0
    mesh = jax.sharding.Mesh(np.array(devices).reshape(4, 2), ("data", "model"))
    heads, rows = PartitionSpec("data", None, "model", None), PartitionSpec("data", None)
    sharded = jax.shard_map(
        module.attend, mesh=mesh, check_vma=False,
        in_specs=(heads, heads, heads, rows, rows), out_specs=heads,
    )  # fmt: skip

    def gradients(q, k, v, cotangent, start, end):
        return jax.vjp(lambda q, k, v: sharded(q, k, v, start, end), q, k, v)[1](cotangent)

    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct(
            (4, length, 8, 80), jnp.bfloat16, sharding=NamedSharding(mesh, heads)
        )
        i = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=NamedSharding(mesh, rows))
        with jax.default_device(devices[0]):
            compiled = jax.jit(gradients).lower(x, x, x, x, i, i).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Masks of 2 T T bytes are most of what cuDNN holds at these lengths.
    assert temporary_bytes(8192) / temporary_bytes(4096) == (
        pytest.approx(4, rel=0.25) if module is cudnn else pytest.approx(2, rel=0.05)
    )
