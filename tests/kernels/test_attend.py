"""The one entry of blank attention: which implementation it takes, and work over a mesh."""

import importlib.util
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from glmjax import sharding
from glmjax.kernels import blank_attention
from glmjax.kernels.blank_attention import reference, tpu


def inputs(batch=4, length=24, heads=2):
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (batch, length, heads, 16)) for key in keys]
    start = np.zeros((batch, length), np.int32)
    end = np.maximum(np.arange(length) + 1, np.arange(batch)[:, None] * 5).astype(np.int32)
    return *arrays, start, end


def test_automatic_choice_is_said_once(caplog):
    blank_attention._automatic.cache_clear()
    with caplog.at_level(logging.INFO, logger="glmjax"):
        for _ in range(2):
            automatic = blank_attention.attend(*inputs())
    assert caplog.messages == ["attention: blockwise, chosen for cpu"]
    named = blank_attention.attend(*inputs(), implementation="blockwise")
    np.testing.assert_array_equal(automatic, named)


def test_automatic_choice_on_tpus(monkeypatch, caplog):
    """The Pallas kernels, and the log says so."""
    monkeypatch.setattr(blank_attention, "platform", lambda: "tpu")
    monkeypatch.setattr(tpu, "attend", lambda *arrays: "the kernels")
    blank_attention._automatic.cache_clear()
    with caplog.at_level(logging.INFO, logger="glmjax"):
        for implementation in ("auto", "tpu"):
            out = blank_attention.attend(*inputs(), implementation=implementation)
            assert out == "the kernels"
    blank_attention._automatic.cache_clear()
    assert caplog.messages == ["attention: tpu, chosen for tpu"]


@pytest.mark.parametrize(
    ("capability", "dtype", "installed", "chosen"),
    [
        (9.0, "bfloat16", True, "tokamax"),
        (9.0, "bfloat16", False, "cudnn"),
        (8.0, "bfloat16", True, "cudnn"),
        (9.0, "float32", True, "blockwise"),
        (7.5, "float16", True, "blockwise"),
    ],
)
def test_automatic_choice_on_gpus(monkeypatch, caplog, capability, dtype, installed, chosen):
    """The fastest that takes the inputs, and the log says why not a faster one."""
    monkeypatch.setattr(blank_attention, "compute_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    blank_attention._automatic.cache_clear()
    with caplog.at_level(logging.INFO, logger="glmjax"):
        assert blank_attention._automatic("gpu", dtype, 128, 0.0) == chosen
    blank_attention._automatic.cache_clear()
    (message,) = caplog.messages
    assert message.startswith(f"attention: {chosen}, chosen for gpu")
    assert ("tokamax" in message[20:]) == (chosen != "tokamax")
    assert ("cudnn takes" in message or "cudnn needs" in message) == (chosen == "blockwise")


def test_a_named_implementation_never_falls_back():
    with pytest.raises(
        ValueError, match="attention 'tpu' needs a TPU, and this program runs on cpu"
    ):
        blank_attention.attend(*inputs(), implementation="tpu")


def test_a_rate_without_a_key_drops_nothing():
    np.testing.assert_array_equal(
        blank_attention.attend(*inputs(), None, 0.5), blank_attention.attend(*inputs())
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize(
    ("rules", "shape"),
    [
        ({}, (1, 24, 1, 16)),
        ({"batch": ("data",), "length": ("fsdp",)}, (2, 12, 1, 16)),
    ],
    ids=["rows and heads", "queries too"],
)
def test_a_kernel_works_on_each_devices_part(monkeypatch, rules, shape, dropout):
    """Output and gradients are those of one device, dropped weights included."""
    arrays, key = inputs(), jax.random.key(1)

    def output_and_gradients(*arrays):
        def attend(q, k, v):
            return blank_attention.attend(
                q, k, v, *arrays[3:], key, dropout, implementation="reference"
            )

        out, pull = jax.vjp(attend, *arrays[:3])
        return out, *pull(jnp.cos(out))

    want = output_and_gradients(*arrays)

    local_shapes = set()
    original = reference.attend

    def kernel(q_BTHK, *rest, dropout):
        local_shapes.add(q_BTHK.shape)
        return original(q_BTHK, *rest, dropout)

    monkeypatch.setattr(reference, "attend", kernel)
    monkeypatch.setattr(blank_attention, "_XLA", ())
    for axis, mesh_axes in rules.items():
        monkeypatch.setitem(sharding.RULES, axis, mesh_axes)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        got = jax.jit(output_and_gradients)(*arrays)
    assert local_shapes == {shape}
    for g, w in zip(got, want, strict=True):
        # Sums of at most 24 terms of order one, in another order.
        np.testing.assert_allclose(g, w, atol=24 * np.finfo("float32").eps)


def test_rows_that_a_mesh_does_not_divide(monkeypatch):
    monkeypatch.setattr(blank_attention, "_XLA", ())
    mesh = jax.make_mesh((4, 2, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="axis 'batch' of attention has size 4"),
    ):
        blank_attention.attend(*inputs(), implementation="reference")
