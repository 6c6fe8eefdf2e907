"""Counting the bundles of a kernel: on programs written here, and on kernels compiled for real."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.planning.bundles import UNITS, execute, parse_program, read_program
from glmjax.planning.prefetch import prefetched_scalars
from glmjax.planning.topologies import GENERATIONS, absent_mesh, compile_absent

issue = partial(execute, delay_slots=4)

PREFETCH = """
%s1_s0 = inlined_call_operand.hbm [shape: LAYOUT, index: 0, kind: input] /* operand 0 */
%s2_s1 = smov [#allocation5]
%3 = dma.hbm_to_smem /*hbm=*/%s1_s0, /*size_in_granules=*/16, /*smem=*/%s2_s1, /*flag=*/[#allocation2]
"""


def program(*bundles, layout="s32[3]"):
    """A program from bundles, each a text `LABEL: instruction ;; instruction`."""
    lines = ["= control target key start", "= control target key end", ""]
    for at, bundle in enumerate(
        (*PREFETCH.replace("LAYOUT", layout).strip().splitlines(), *bundles)
    ):
        mark = "LB" if "Start region" in bundle else "  "
        instructions, _, comment = bundle.partition(" // ")
        address = hex(at) if at else "0"
        lines.append(f"{address:>6} {mark}: > {{ {instructions} }} /* {comment} */")
    rows = [" ".join(["1", *["0"] * (len(UNITS) - 2), str(at % 2)]) for at in range(len(lines) - 3)]
    capacity = " ".join(["2"] * len(UNITS))
    return parse_program(
        "\n".join(lines), "\n".join(["== CAPACITY:", "MXU", capacity, "== UTILIZATION:", *rows])
    )


LOOP = (
    "%s4_s2 = sld [smem:[#allocation5 + $0x1]]  ;;  %s5_s3 = smov 0",
    "%s6_s3 = sadd.s32 1, %s5_s3 // Start region 7",
    "%p7_p0 = scmp.lt.s32.totalorder %s6_s3, %s4_s2",
    "%8 = sbr.rel (%p7_p0) target = $region7",
    *["%9 = vst [vmem:[#allocation3]] %v1_v0"] * 4,
)


@pytest.mark.parametrize("trips", [1, 2, 50])
def test_a_loop_is_counted_as_often_as_its_operand_says(trips):
    counts = issue(program(*LOOP), [np.array([9, trips, 9], np.int32)])
    # Four bundles go before, seven are in the loop: four of them follow its branch.
    assert counts.cycles == 4 + 7 * trips
    assert counts.slots("MXU") == counts.cycles
    assert counts.busiest() == ("MXU", 0.5)


def test_fewer_bundles_may_follow_a_branch():
    counts = execute(program(*LOOP), [np.array([0, 10, 0], np.int32)], delay_slots=1)
    # Four bundles before, four in the loop, and at the end three more that follow it.
    assert counts.cycles == 4 + 4 * 10 + 3


@pytest.mark.parametrize(("value", "cycles"), [(3, 4 + 2 + 4 + 1), (4, 4 + 2 + 4 + 3 + 1)])
def test_a_branch_skips_a_region(value, cycles):
    counts = issue(
        program(
            "%s4_s2 = sld [smem:[#allocation5]]",
            "%p5_p1 = scmp.ne.s32.totalorder %s4_s2, 4",
            "%6 = sbr.rel (%p5_p1) target = $region8",
            *["%9 = vnop"] * 4,
            *["%9 = vnop"] * 3,
            "%9 = vnop // Start/End empty region 8",
        ),
        [np.array([value, 0, 0], np.int32)],
    )
    assert counts.cycles == cycles


def test_instructions_of_a_bundle_read_before_any_writes():
    """Two registers swap in one bundle, and a guard that does not hold keeps the other value."""
    counts = issue(
        program(
            "%s4_s2 = smov 1  ;;  %s5_s3 = smov 0  ;;  %p6_p0 = pmov 0",
            "%s7_s2 = smov %s5_s3  ;;  %s8_s3 = smov %s4_s2",
            "%p9_p0 = scmp.eq.s32.totalorder %s7_s2, 1",
            "%s10_s4 = smov (!%p9_p0, %s8_s3), 7",
            "%p11_p2 = scmp.ne.s32.totalorder %s10_s4, 7",
            "%12 = sbr.rel (%p11_p2) target = $region1",
            *["%9 = vnop"] * 4,
            "%9 = vnop",
            "%9 = vnop // Start/End empty region 1",
        ),
        [np.zeros(3, np.int32)],
    )
    # s2 = 0, so p0 is false, !p0 holds, s4 = 7, and the branch is not taken.
    assert counts.cycles == 3 + 6 + 4 + 1 + 1


def test_bytes_lie_four_rows_to_a_word():
    """The sign of row 2, column 1 of a table of bytes: word 1, third byte."""
    table = np.zeros((1, 4, 4), np.int8)
    table[0, 2, 1] = -5
    taken = program(
        "%s4_s2 = sld [smem:[#allocation5 + $0x1]]",
        "%s5_s3 = sshll.u32 %s4_s2, 8",
        "%s6_s4 = sshra.s32 %s5_s3, 24",
        "%p7_p0 = scmp.eq.s32.totalorder %s6_s4, 4294967291",
        "%8 = sbr.rel (%p7_p0) target = $region1",
        *["%9 = vnop"] * 4,
        *["%9 = vnop"] * 10,
        "%9 = vnop // Start/End empty region 1",
        layout="s8[1,4,4]",
    )
    assert issue(taken, [table]).cycles == 3 + 5 + 4 + 1
    assert issue(taken, [0 * table]).cycles == 3 + 5 + 4 + 10 + 1


def test_what_an_unknown_instruction_writes_is_unknown():
    stale = program(
        "%p4_p0 = pmov 1",
        "%p5_p0 = snew.s32 1, 2",
        "%6 = sbr.rel (%p5_p0) target = $region1",
        "%9 = vnop // Start/End empty region 1",
    )
    with pytest.raises(ValueError, match="unknown predicate"):
        issue(stale, [np.zeros(3, np.int32)])


def test_what_a_vector_decides_is_not_guessed():
    branch = program(
        "%s4_s2 = spop %v1",
        "%p5_p0 = scmp.eq.s32.totalorder %s4_s2, 0",
        "%6 = sbr.rel (%p5_p0) target = $region1",
        "%9 = vnop // Start/End empty region 1",
    )
    with pytest.raises(ValueError, match="unknown predicate"):
        issue(branch, [np.zeros(3, np.int32)])


def test_operands_must_be_those_of_the_program():
    with pytest.raises(ValueError, match=r"operand 0 is s32 \(3,\), got int32 \(4,\)"):
        issue(program(*LOOP), [np.zeros(4, np.int32)])


def test_a_program_without_end_is_given_up():
    with pytest.raises(ValueError, match="did not end within 100 bundles"):
        issue(program(*LOOP), [np.array([0, 99, 0], np.int32)], most=100)


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="0 programs named 'attention'"):
        read_program(tmp_path, "attention")


def loop_kernel(counts_ref, x_ref, out_ref):
    """Adds x in a loop in a loop, as often as row and column of the grid say."""
    out_ref[...] = jnp.zeros_like(out_ref)
    trips = counts_ref[pl.program_id(0), pl.program_id(1)]

    @pl.loop(0, trips)
    def outer(i):
        @pl.loop(0, i)
        def inner(j):
            out_ref[...] += x_ref[...]


def looped(counts, x):
    return pl.pallas_call(
        loop_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(2, 3),
            in_specs=[pl.BlockSpec((8, 128), lambda i, j, counts: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, j, counts: (i * 3 + j, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((48, 128), jnp.float32),
        name="looped",
    )(counts, x)


def compile_looped(generation):
    sharding = NamedSharding(absent_mesh(generation), PartitionSpec())
    counts = jax.ShapeDtypeStruct((2, 3), jnp.int32, sharding=sharding)
    x = jax.ShapeDtypeStruct((16, 128), jnp.float32, sharding=sharding)
    jax.jit(looped).lower(counts, x).compile()


@pytest.mark.tpu
@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e"])
def test_a_compiled_kernel_is_counted(generation, tmp_path):
    """Loops in loops need cycles quadratic in their trips, wherever in the operand those stand."""
    compile_absent(compile_looped, generation, dump=tmp_path)
    kernel = read_program(tmp_path, "looped")
    delay_slots = GENERATIONS[generation].delay_slots

    def cycles(*counts):
        return execute(kernel, [np.array(counts, np.int32)], delay_slots).cycles

    once = [1, 1, 1]
    totals = [cycles([n, 1, 1], once) for n in range(1, 40)]
    # The second difference is the body of the inner loop.
    (body,) = set(np.diff(totals, 2)[2:].tolist())
    assert body >= 3
    for n in (5, 20):
        assert cycles([1, 1, n], once) == cycles(once, [1, n, 1]) == totals[n - 1]


def test_prefetched_scalars_are_what_the_kernel_is_called_with():
    counts = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    x = jnp.zeros((16, 128))

    @jax.jit
    def twice(counts, x):
        first = jax.vmap(partial(looped, counts * 2))(x[None])
        return first, looped(jnp.maximum(counts, 2), x)

    scalars = prefetched_scalars(jax.checkpoint(lambda c, x: looped(c + 1, x)), counts, x)
    np.testing.assert_array_equal(scalars["looped"][0], counts + 1)
    np.testing.assert_array_equal(
        prefetched_scalars(twice, counts, x)["looped"][0], np.maximum(counts, 2)
    )
