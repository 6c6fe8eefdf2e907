"""Attention over a cache and writing into one: the TPU kernels, interpreted, and the XLA form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from glmjax.kernels.blank_attention import decode_reference, reference, tpu_cache, tpu_decode
from glmjax.kernels.blank_attention.tpu_decode import DecodeTiles

LAYERS, LAYER = 2, 1
# Sums of a few hundred float32 terms in another order; one rounding of the output in bfloat16, whose
# weights are rounded too.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7, "int8": 2e-6}
TILES = DecodeTiles(heads=4, keys=128)

xla = decode_reference.attend_cache
layer = decode_reference.attend_layer
kernel = partial(tpu_decode.attend_cache, tiles=TILES, interpret=True)
racing = partial(
    tpu_decode.attend_cache, tiles=TILES, interpret=pltpu.InterpretParams(detect_races=True)
)
FUNCTIONS = [pytest.param(xla, id="xla"), pytest.param(layer, id="xla-layer"),
             pytest.param(kernel, id="kernel")]  # fmt: skip


def make_case(dtype, batch=5, T=1, heads=4, size=300, K=64, seed=0):
    """Queries, cache and intervals: an empty row, a full row, and rows that start anywhere."""
    rng = np.random.default_rng(seed)
    q_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    q_BTHK = jnp.asarray(rng.standard_normal((batch, T, heads, K)), q_dtype)
    k, v = rng.standard_normal((2, LAYERS, batch, heads, size, K)).astype(np.float32)
    k_start_BT = rng.integers(0, size // 2 + 1, (batch, T))
    k_end_BT = rng.integers(0, size + 1, (batch, T))
    k_start_BT[:3] = k_end_BT[:1] = 0
    k_end_BT[1:2] = size
    k_end_BT[2:3] = size // 3 + np.arange(T)  # As in decoding behind a prompt.
    scales = ()
    if dtype == "int8":
        scales = tuple(np.abs(x).max(-1) / 127 for x in (k, v))
        k, v = (np.round(x / scale[..., None]) for x, scale in zip((k, v), scales, strict=True))
    return q_BTHK, jnp.asarray(k, dtype), jnp.asarray(v, dtype), k_start_BT, k_end_BT, scales


def run(function, case):
    q_BTHK, k, v, k_start_BT, k_end_BT, scales = case
    return np.asarray(
        jax.jit(function)(q_BTHK, k, v, LAYER, k_start_BT, k_end_BT, *scales), np.float32
    )


def dense(case):
    q_BTHK, k, v, k_start_BT, k_end_BT, scales = case
    k, v = (jnp.asarray(x[LAYER], jnp.float32) for x in (k, v))
    if scales:
        k, v = (x * scale[LAYER][..., None] for x, scale in zip((k, v), scales, strict=True))
    k_BSHK, v_BSHK = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    return np.asarray(
        reference.attend(
            q_BTHK.astype(jnp.float32), k_BSHK, v_BSHK,
            jnp.asarray(k_start_BT), jnp.asarray(k_end_BT),
        )
    )  # fmt: skip


CASES = [
    pytest.param({"dtype": "float32"}, id="float32"),
    pytest.param({"dtype": "bfloat16", "T": 2, "K": 128}, id="bfloat16"),
    pytest.param({"dtype": "int8", "T": 3, "heads": 8, "K": 96}, id="int8"),
    pytest.param({"dtype": "int8", "T": 8, "heads": 3, "size": 256}, id="int8-heads-in-one"),
    pytest.param({"dtype": "float32", "T": 8, "K": 80, "size": 257}, id="one-slot-too-many"),
    pytest.param({"dtype": "bfloat16", "T": 5, "heads": 6, "size": 384}, id="whole-tiles"),
    pytest.param({"dtype": "float32", "T": 4, "size": 20}, id="less-than-a-tile"),
    pytest.param({"dtype": "bfloat16", "T": 7, "batch": 2, "size": 1}, id="one-slot"),
    pytest.param({"dtype": "float32", "T": 6, "batch": 1}, id="empty-batch"),
    pytest.param({"dtype": "bfloat16", "T": 16, "heads": 2, "K": 128}, id="shared-heads"),
    pytest.param({"dtype": "int8", "T": 36, "heads": 2, "batch": 3}, id="shared-heads-int8"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_reference(case, function):
    arrays = make_case(**case)
    out_BTHK, expected_BTHK = run(function, arrays), dense(arrays)
    tolerance = TOLERANCE[case["dtype"]] * np.abs(expected_BTHK).max()
    np.testing.assert_allclose(out_BTHK, expected_BTHK, rtol=0, atol=tolerance)
    assert not np.any(out_BTHK[0])


@pytest.mark.parametrize("case", [CASES[1], CASES[2]])
def test_has_no_races(case):
    """Also fills memory with NaN first: nothing is read that was not copied."""
    arrays = make_case(**case | {"batch": 3})
    tolerance = TOLERANCE[case["dtype"]] * np.abs(dense(arrays)).max()
    np.testing.assert_allclose(run(racing, arrays), dense(arrays), rtol=0, atol=tolerance)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_no_query_sees_changes_no_bit(dtype, function):
    q_BTHK, k, v, k_start_BT, k_end_BT, scales = make_case(dtype, T=2)
    slot_S = np.arange(k.shape[3])
    unseen_BS = (slot_S < k_start_BT.min(1)[:, None]) | (slot_S >= k_end_BT.max(1)[:, None])
    garbage = 127 if dtype == "int8" else 1e30
    sign_HS = np.random.default_rng(1).choice([-1, 1], (k.shape[2], k.shape[3]))

    def spoil(x, value):
        unseen = unseen_BS[:, None].reshape(len(unseen_BS), 1, -1, *(1,) * (x.ndim - 4))
        sign = sign_HS.reshape(*sign_HS.shape, *(1,) * (x.ndim - 4))
        return jnp.where(unseen, jnp.asarray(sign * value, x.dtype), x)

    spoiled = (
        q_BTHK, spoil(k, garbage), spoil(v, garbage), k_start_BT, k_end_BT,
        tuple(spoil(jnp.asarray(scale), 1e30) for scale in scales),
    )  # fmt: skip
    clean = q_BTHK, k, v, k_start_BT, k_end_BT, scales
    np.testing.assert_array_equal(run(function, spoiled), run(function, clean))


def test_only_visible_blocks_are_copied():
    k_start_BT = np.array([[0], [300], [0], [0], [130]])
    k_end_BT = np.array([[0], [500], [129], [0], [1000]])
    steps = tpu_decode.make_steps(k_start_BT, k_end_BT, 512, TILES)
    blocks = np.stack([steps.row_I, steps.copy_row_I, steps.copy_block_I], 1)
    np.testing.assert_array_equal(
        blocks[: int(steps.count_1[0])],
        [
            [0, 0, 0],
            [1, 1, 2], [1, 1, 3],
            [2, 2, 0], [2, 2, 1],
            [3, 2, 1],  # Sees nothing, and finds the block of the row before it.
            [4, 4, 1], [4, 4, 2], [4, 4, 3],
        ],
    )  # fmt: skip


def test_tiles_change_nothing_but_roundings():
    arrays = make_case("float32", T=2, heads=6)
    expected = run(kernel, arrays)
    for tiles in (DecodeTiles(1, 128), DecodeTiles(2, 256), DecodeTiles(6, 512)):
        function = partial(tpu_decode.attend_cache, tiles=tiles, interpret=True)
        np.testing.assert_allclose(run(function, arrays), expected, rtol=0, atol=2e-6)


def test_unusable_calls_are_refused():
    with pytest.raises(ValueError, match="at most 128 queries per row, got 129"):
        run(kernel, make_case("float32", T=129))
    with pytest.raises(ValueError, match="must be a multiple of 128, got 100"):
        run(partial(kernel, tiles=DecodeTiles(4, 100)), make_case("float32"))


@pytest.mark.parametrize(
    ("dtype", "T", "size"),
    [("float32", 1, 100), ("bfloat16", 5, 256), ("int8", 8, 300), ("int8", 3, 20), ("bfloat16", 40, 96)],
    ids=["one", "a-few", "int8", "less-than-a-block", "many"],
)  # fmt: skip
def test_writing_touches_the_new_slots_alone(dtype, T, size):
    rng = np.random.default_rng(0)
    batch, heads, K = 5, 3, 64
    shapes = {(K,): dtype, (): "float32"} if dtype == "int8" else {(K,): dtype}
    old, new = [], []
    for tail, kind in shapes.items():
        old.append(rng.integers(-99, 99, (LAYERS, batch, heads, size, *tail)).astype(kind))
        new.append(rng.integers(-99, 99, (batch, T, heads, *tail)).astype(kind))
    slot_B = np.array([0, size - T, 7, 13, min(30, size - T)])
    if T <= tpu_cache.FEW:
        slot_B[2:4] = size - 1, size  # Behind the last slot they are dropped.
    written = jax.jit(partial(tpu_cache.write, interpret=True))(old, LAYER, new, slot_B)
    for before, tokens, after in zip(old, new, written, strict=True):
        for row, slot in enumerate(slot_B):
            kept = tokens[row, : size - slot]
            before[LAYER, row, :, slot : slot + T] = np.swapaxes(kept, 0, 1)
        np.testing.assert_array_equal(after, before)


def test_writing_has_no_races():
    rng = np.random.default_rng(0)
    old = rng.standard_normal((LAYERS, 3, 2, 64, 64), np.float32)
    new = rng.standard_normal((3, 4, 2, 64), np.float32)
    interpret = pltpu.InterpretParams(detect_races=True)
    (after,) = jax.jit(partial(tpu_cache.write, interpret=interpret))(
        [old], LAYER, [new], np.array([0, 30, 60])
    )
    for row, slot in enumerate((0, 30, 60)):
        old[LAYER, row, :, slot : slot + 4] = np.swapaxes(new[row], 0, 1)
    np.testing.assert_array_equal(after, old)
    assert not interpret_pallas_call.races.races_found


def test_bits_of_bfloat16_are_its_numbers():
    """A cache as it lies on CPUs, written and read."""
    q_BTHK, k, v, k_start_BT, k_end_BT, _ = make_case("bfloat16", T=2)
    new_BTHK = jnp.asarray(np.random.default_rng(3).standard_normal(q_BTHK.shape), jnp.float32)
    slot_B = np.array([0, 298, 99, 7, 50])
    bits = [jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (k, v)]
    outputs = [
        run(xla, (q_BTHK, *cache, k_start_BT, k_end_BT, ()))
        for cache in (
            decode_reference.write(arrays, LAYER, [new_BTHK, -new_BTHK], slot_B)
            for arrays in ([k, v], bits)
        )
    ]
    np.testing.assert_array_equal(*outputs)
    assert not np.array_equal(outputs[0], run(xla, (q_BTHK, k, v, k_start_BT, k_end_BT, ())))
