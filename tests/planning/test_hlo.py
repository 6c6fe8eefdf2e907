import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.config import MeshConfig
from glmjax.planning import hlo
from glmjax.planning.topologies import absent_devices, compile_absent
from glmjax.sharding import make_mesh

MODULE = """HloModule jit_step, is_scheduled=true, num_partitions=8

FunctionNames
1 "step"
2 "loss.<locals>.chunk"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=1}}
2 {{file_name_id=1 function_name_id=2 line=2 end_line=2 column=1 end_column=1}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}

{computations}
ENTRY %main (x: bf16[16,32], w: bf16[32,64], n: s32[]) -> bf16[16,64] {{
  %x = bf16[16,32]{{1,0}} parameter(0)
  %w = bf16[32,64]{{1,0}} parameter(1)
  %n = s32[] parameter(2)
{entry}
}}
"""


def program(entry, computations="", **trips):
    return hlo.read_program(MODULE.format(entry=entry, computations=computations), trips)


def only(kind, loop):
    ((count, event),) = [(n, e) for n, e in hlo.executed(loop) if isinstance(e, kind)]
    return count, event


LOOP = """
%body (t: (s32[], s32[], bf16[24,8])) -> (s32[], s32[], bf16[24,8]) {{
  %t = (s32[], s32[], bf16[24,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] get-tuple-element(%t), index=1
  %rows = bf16[24,8]{{1,0}} get-tuple-element(%t), index=2
  %step = s32[] constant({step})
  %zero = s32[] constant(0)
  %next = s32[] add(%i, %step)
  %part = bf16[4,8]{{1,0}} dynamic-slice(%rows, %i, %zero), dynamic_slice_sizes={{4,8}}
  %twice = bf16[4,8]{{1,0}} add(%part, %part), backend_config={{"estimated_cycles":"10"}}
  ROOT %out = (s32[], s32[], bf16[24,8]{{1,0}}) tuple(%next, %limit, %rows)
}}

%fused_less (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=LT
}}

%condition (t: (s32[], s32[], bf16[24,8])) -> pred[] {{
  %t.1 = (s32[], s32[], bf16[24,8]{{1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %limit.1 = s32[] {limit}
  ROOT %wrapped = pred[] fusion(%i.1, %limit.1), kind=kLoop, calls=%fused_less
}}
"""
WHILE = """  %start = s32[] constant(2)
  %end = s32[] {end}
  %big = bf16[24,8]{{1,0}} bitcast(%x)
  %begin = (s32[], s32[], bf16[24,8]{{1,0}}) tuple(%start, %end, %big)
  ROOT %loop = (s32[], s32[], bf16[24,8]{{1,0}}) while(%begin), condition=%condition, body=%body, \
metadata={{op_name="jit(step)/while" stack_frame_id=2}}"""
IN_TUPLE = "get-tuple-element(%t.1), index=1"


@pytest.mark.parametrize(
    ("step", "limit", "end", "given", "expected"),
    [
        (1, "constant(12)", "constant(0)", {}, 10),
        (2, "constant(11)", "constant(0)", {}, 5),
        (1, IN_TUPLE, "constant(9)", {}, 7),
        (1, IN_TUPLE, "copy(%n)", {}, 6),
        (1, IN_TUPLE, "copy(%n)", {"loss.<locals>.chunk": 2.5}, 2.5),
    ],
    ids=["constant", "two steps a round", "limit carried along", "to the end of its rows", "given"],
)
def test_loops_are_weighted_by_their_trips(step, limit, end, given, expected):
    loop = program(WHILE.format(end=end), LOOP.format(step=step, limit=limit), **given)
    _, inner = only(hlo.Loop, loop)
    assert inner.trips == expected
    assert inner.dynamic == ("copy" in end)
    assert hlo.cycles(loop) == 10 * expected


def test_a_loop_of_unknown_length_is_named():
    body = LOOP.format(step=1, limit=IN_TUPLE).replace("dynamic-slice(%rows, %i", "slice(%rows, %i")
    with pytest.raises(ValueError, match=r"loop of loss\.<locals>\.chunk repeats is known only"):
        program(WHILE.format(end="copy(%n)"), body)


PRODUCTS = {
    "dot": (
        "bf16[16,64] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        2 * 16 * 32 * 64,
    ),
    "convolution": ("bf16[16,64] convolution(%x, %w), dim_labels=bf_io->bf", 2 * 16 * 32 * 64),
    "batched": (
        "bf16[5,16,64] convolution(%a, %b), window={size=5 stride=4 pad=0_0 lhs_dilate=5}, \
dim_labels=0bf_0io->0bf",
        2 * 5 * 16 * 32 * 64,
    ),
    "two contracted axes": (
        "bf16[16,64,1] convolution(%c, %d), window={size=5}, dim_labels=bf0_io0->bf0",
        2 * 16 * 64 * 32 * 5,
    ),
    "padded": (
        "bf16[16,64,5] convolution(%c, %d), window={size=5 pad=2_2}, dim_labels=bf0_io0->bf0",
        2 * 16 * 64 * 32 * (3 + 4 + 5 + 4 + 3),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_of_products_are_counted_from_shapes(name):
    text, expected = PRODUCTS[name]
    entry = f"""  %a = bf16[5,16,32]{{2,1,0}} bitcast(%x)
  %b = bf16[5,32,64]{{2,1,0}} bitcast(%w)
  %c = bf16[16,32,5]{{2,1,0}} bitcast(%x)
  %d = bf16[32,64,5]{{2,1,0}} bitcast(%w)
  ROOT %y = {text}"""
    assert hlo.flops(program(entry)) == expected


GROUPS = {
    "listed": ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
    "iota": ("replica_groups=[4,2]<=[8]", ("tensor",)),
    "transposed": ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
    "mesh": ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}", ("fsdp",)),
    "mesh of other devices": (
        "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}",
        ("data", "fsdp"),
    ),
    "all": ("use_global_device_ids=true", ("data", "fsdp", "tensor")),
}


@pytest.mark.parametrize("name", GROUPS)
def test_collectives_know_their_mesh_axes_and_bytes(name):
    groups, axes = GROUPS[name]
    loop = program(
        f"  ROOT %y = bf16[32,32] all-gather(%x), channel_id=1, {groups}, dimensions={{0}}"
    )
    count, collective = only(hlo.Collective, loop)
    assert count == 1
    assert collective.axes({"data": 2, "fsdp": 2, "tensor": 2}) == axes
    assert collective.group_size == 2 ** len(axes)
    assert collective.size == 2 * 16 * 32 * collective.group_size
    assert collective.how == "synchronous"


def test_a_permutation_runs_over_the_axis_it_crosses():
    loop = program(
        "  ROOT %y = bf16[16,32] collective-permute(%x), "
        "source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}"
    )
    _, collective = only(hlo.Collective, loop)
    assert collective.axes({"data": 4, "tensor": 2}) == ("tensor",)
    assert collective.size == 2 * 16 * 32


GROUP = "channel_id=1, replica_groups=[1,8]<=[8]"
ASYNCHRONOUS = {
    "a start and a done": (
        "asynchronous",
        f"""  %s = (bf16[16,32], bf16[128,32]) all-gather-start(%x), {GROUP}, dimensions={{0}}
  %work = bf16[16,32] add(%x, %x), backend_config={{"estimated_cycles":"7"}}
  ROOT %d = bf16[128,32] all-gather-done(%s)""",
    ),
    "a SparseCore": (
        "offloaded",
        """  %s = ((bf16[16,32]), bf16[128,32]) call-start(%x), async_execution_thread="sparsecore", \
to_apply=%gather
  %work = bf16[16,32] add(%x, %x), backend_config={"estimated_cycles":"7"}
  ROOT %d = bf16[128,32] call-done(%s)""",
    ),
    "steps in fusions": (
        "fused",
        """  %s = (bf16[16,32], bf16[128,32]) fusion(%x), kind=kCustom, calls=%gather
  %work = bf16[16,64] fusion(%x, %w), kind=kOutput, calls=%gather_and_multiply, \
backend_config={"estimated_cycles":"7"}
  ROOT %d = bf16[128,32] fusion(%x), kind=kCustom, calls=%gather""",
    ),
}
GATHER = f"""
%gather (p: bf16[16,32]) -> bf16[128,32] {{
  %p = bf16[16,32] parameter(0)
  ROOT %g = bf16[128,32] all-gather(%p), {GROUP}, dimensions={{0}}
}}

%gather_and_multiply (p: bf16[16,32], q: bf16[32,64]) -> bf16[16,64] {{
  %p.1 = bf16[16,32] parameter(0)
  %q.1 = bf16[32,64] parameter(1)
  %g.1 = bf16[128,32] all-gather(%p.1), {GROUP}, dimensions={{0}}
  ROOT %m = bf16[16,64] convolution(%p.1, %q.1), dim_labels=bf_io->bf
}}
"""


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_an_asynchronous_collective_is_one_event_and_a_wait(name):
    how, entry = ASYNCHRONOUS[name]
    start, work, wait = program(entry, GATHER).events
    assert (start.kind, start.how, start.size) == ("all-gather", how, 128 * 32 * 2)
    assert work.cycles == 7
    assert wait == hlo.Wait(start.name)


def test_slices_reduce_over_the_data_center_network():
    transfer = (
        "is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_rendezvous="all-reduce.3_0",_xla_megascale_target="{1,2}x{0:7}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    entry = f"""  %token = token[] after-all()
  %s = (bf16[16,32], u32[], token[]) send(%x, %token), channel_id=2, {transfer}
  %r = (bf16[16,32], u32[], token[]) recv(%token), channel_id=1, {transfer}
  %sent = token[] send-done(%s), channel_id=2, is_host_transfer=true
  ROOT %received = (bf16[16,32], token[]) recv-done(%r), channel_id=1, is_host_transfer=true"""
    start, wait = program(entry).events
    assert (start.kind, start.size, start.how) == ("all-reduce", 2 * 16 * 32, "asynchronous")
    assert start.axes({"data": 2, "fsdp": 8}) == ("data",)
    assert wait == hlo.Wait(start.name)


def test_copies_to_the_host_run_beside_the_rest():
    entry = """  %s = (bf16[4,16,32]{2,1,0:T(8,128)S(5)}, bf16[16,32]{1,0}, u32[]) \
dynamic-update-slice-start(%h, %x, %n)
  ROOT %d = bf16[4,16,32]{2,1,0:T(8,128)S(5)} dynamic-update-slice-done(%s)"""
    assert program(entry).events == (hlo.Transfer("s", 2 * 16 * 32), hlo.Wait("s"))


def test_a_reduce_scatter_may_be_written_as_a_fusion():
    scatter = f"""
%all-reduce-scatter.1 (p: bf16[16,32]) -> bf16[2,32] {{
  %p = bf16[16,32] parameter(0)
  %r = bf16[16,32] all-reduce(%p), {GROUP}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %s = bf16[2,32] dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={{2,32}}
}}
"""
    entry = "  ROOT %y = bf16[2,32] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    _, collective = only(hlo.Collective, program(entry, scatter))
    assert (collective.kind, collective.size) == ("reduce-scatter", 16 * 32 * 2)


def test_kernels_are_counted_though_their_metadata_spans_lines():
    entry = """  %k.3 = bf16[16,32] custom-call(%x), custom_call_target="tpu_custom_call", \
kernel_metadata={
}, metadata={op_name="jit(step)/pallas"}
  ROOT %y = bf16[16,32] add(%k.3, %x), backend_config={"estimated_cycles":"5"}"""
    loop = program(entry)
    assert hlo.kernels(loop) == {"k": 1}
    assert hlo.cycles(loop) == 5


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%some, %more}", "true_computation=%some, false_computation=%more"],
)
def test_every_branch_of_a_condition_counts(branches):
    computations = """
%some (p: bf16[16,32]) -> bf16[16,32] {
  %p = bf16[16,32] parameter(0)
  ROOT %a = bf16[16,32] add(%p, %p), backend_config={"estimated_cycles":"3"}
}

%more (q: bf16[16,32]) -> bf16[16,32] {
  %q = bf16[16,32] parameter(0)
  ROOT %b = bf16[16,32] add(%q, %q), backend_config={"estimated_cycles":"4"}
}
"""
    loop = program(f"  ROOT %y = bf16[16,32] conditional(%n, %x, %x), {branches}", computations)
    assert hlo.cycles(loop) == 7


def test_only_what_slices_touch_passes_hbm():
    fused = """
%take (p: bf16[16,32], i: s32[]) -> bf16[1,32] {
  %p = bf16[16,32] parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = bf16[1,32] dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,32}
}
"""
    entry = """  %row = bf16[1,32]{1,0:T(2,128)S(1)} fusion(%x, %n), kind=kLoop, calls=%take
  ROOT %y = bf16[1,32]{1,0} copy(%row)"""
    row, copy = program(entry, fused).events
    assert row.hbm_bytes == 64 + 4  # the row and its number; the result stays in vector memory
    assert copy.hbm_bytes == 64


def test_what_is_turned_for_a_slice_is_not_read_whole():
    fused = """
%turn (p: s4[16,32]) -> s4[16,32] {
  %p = s4[16,32]{1,0:T(64,128)(8,1)E(4)} parameter(0)
  ROOT %c = s4[16,32]{1,0:T(8,128)(8,1)E(4)} copy(%p)
}

%take (p: s4[16,32], i: s32[]) -> s4[1,32] {
  %p = s4[16,32]{1,0:T(64,128)(8,1)E(4)} parameter(0)
  %turned = s4[16,32]{1,0:T(8,128)(8,1)E(4)} fusion(%p), kind=kLoop, calls=%turn
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = s4[1,32] dynamic-slice(%turned, %i, %zero), dynamic_slice_sizes={1,32}
}
"""
    entry = """  %w = s4[16,32] bitcast(%x)
  ROOT %row = s4[1,32]{1,0:T(8,128)S(1)} fusion(%w, %n), kind=kLoop, calls=%take"""
    (row,) = program(entry, fused).events
    assert row.hbm_bytes == 32 / 2 + 4  # four bits a number


def test_a_look_up_reads_the_rows_that_it_finds():
    fused = """
%look (p: bf16[16,32], i: s32[2]) -> bf16[2,32] {
  %p = bf16[16,32] parameter(0)
  %i = s32[2] parameter(1)
  ROOT %g = bf16[2,32] gather(%p, %i), offset_dims={1}, collapsed_slice_dims={0}
}
"""
    rows = "  %i = s32[2] broadcast(%n)\n"
    fusion = "  ROOT %y = bf16[2,32] fusion(%x, %i), kind=kCustom, calls=%look"
    alone = "  ROOT %y = bf16[2,32] gather(%x, %i), offset_dims={1}, collapsed_slice_dims={0}"
    for entry, number_bytes in ((fusion, 8), (alone, 0)):
        *_, found = program(rows + entry, fused).events
        assert found.hbm_bytes == 2 * (2 * 32 * 2) + number_bytes


def compile_layers(num_layers, length):
    """A scanned stack of sharded products, and the loss of as many rows as are asked for."""
    devices = absent_devices("v5p:2x2x1")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=1), devices)

    def step(w_NDD, x_BD, rows):
        x_BD, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_NDD)
        return jax.lax.fori_loop(
            0, rows, lambda i, s: s + jax.lax.dynamic_slice_in_dim(x_BD, i * 8, 8, 1).sum(), 0.0
        )

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
        )

    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(
            array((num_layers, 1024, 1024), jnp.bfloat16, None, "fsdp"),
            array((length, 1024), jnp.bfloat16, "fsdp"),
            array((), np.int32),
        )  # fmt: skip
    return compiled.compile().as_text()


@pytest.mark.tpu
def test_a_program_compiled_for_absent_chips_is_read():
    text = compile_absent(compile_layers, 6, 4096)
    loop = hlo.read_program(text)
    assert hlo.flops(loop) == 6 * 2 * (4096 // 4) * 1024 * 1024
    at_peak = hlo.flops(loop) / (2 * 131_072)
    operations = [(n, e) for n, e in hlo.executed(loop) if isinstance(e, hlo.Operation)]
    assert at_peak < sum(n * e.cycles for n, e in operations if e.flops) < 3 * at_peak
    gathered = sum(
        count * event.size
        for count, event in hlo.executed(loop)
        if isinstance(event, hlo.Collective) and event.axes({"fsdp": 4}) == ("fsdp",)
    )
    assert gathered >= 6 * 2 * 1024 * 1024 * 3 / 4
    (chunks,) = [e for _, e in hlo.executed(loop) if isinstance(e, hlo.Loop) and e.dynamic]
    assert chunks.trips == 128
