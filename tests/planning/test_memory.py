"""Reading what XLA writes about the memory of a program."""

import pytest

from glmjax.planning.memory import Contributor, parse_memory, read_memory

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 3, shape |f32[1024]| at ShapeIndex {}, maybe-live-out:
 value: <1 fusion.3{1} @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
 value: <9 param.7 @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 1: size 512, page 0, parameter 0, shape |s32[]| at ShapeIndex {}:
 value: <2 param.8 @0> (size=512,offset=0): s32[]{:T(128)}
allocation 2: size 20000, preallocated-temp:
 value: <3 custom-call.36 @0> (size=8192,offset=0): bf16[2,2048]{1,0:T(8,128)(2,1)}
 value: <4 fusion.1 @0> (size=8192,offset=0): bf16[2,2048]{1,0:T(8,128)(2,1)}
 value: <5 while.2{3} (phi) @0> (size=8192,offset=0): bf16[2,2048]{1,0:T(8,128)(2,1)}
 value: <6 fusion.2 @0> (size=8192,offset=8192): bf16[2,2048]{1,0:T(8,128)(2,1)}
 value: <7 copy.9 @0> (size=2048,offset=0): f32[512]{0:T(512)}
allocation 3: size 900000, color 1, preallocated-temp:
 value: <8 copy.5 @1> (size=900000,offset=0): f32[225000]{0:T(1024)S(1)}
"""

LIVE_RANGES = """HloLiveRange (max 30):
  BufferLiveRange:
    copy.9{}:25-30
  Live ranges at 12 (peak):
    custom-call.36{}: 8192 bytes (cumulative: 8192 bytes)
    while.2{3}: 8192 bytes (cumulative: 16384 bytes)
    fusion.2{}: 8192 bytes (cumulative: 24576 bytes)
    param.7{}: 4096 bytes (cumulative: 28672 bytes)
    copy.5{}: 900000 bytes (cumulative: 928672 bytes)
  Stack trace breakdown for peak usage: 928672 bytes
"""

DYNAMIC_UPDATE = (
    "jit(train_step)/jvp()/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice"
)

PROGRAM = f"""
  %param.7 = f32[1024]{{0}} parameter(3), metadata={{op_name="state.params.final_norm.scale"}}
  %fusion.3 = (f32[1024]{{0}}) fusion(%param.7), metadata={{op_name="jit(train_step)/sub"}}
  %custom-call.36 = bf16[2,2048]{{1,0}} custom-call(), metadata={{op_name="broadcast.8"}}
  %fusion.1 = bf16[2,2048]{{1,0}} fusion(%x), metadata={{op_name="{DYNAMIC_UPDATE}"}}
  ROOT %fusion.2 = bf16[2,2048]{{1,0}} fusion(%x), metadata={{op_name="jit(train_step)/transpose(jvp())/mul"}}
"""


def test_what_is_alive_is_counted_once_per_place():
    memory = parse_memory(ASSIGNMENT, LIVE_RANGES, PROGRAM)
    # Vector memory, of color 1, is not the device's; a loop's result lies where its start did.
    assert memory.arguments == 4096 + 512
    assert memory.temporaries == 20000
    assert memory.needed == 24608
    assert memory.peak == 8192 + 8192 + 4096
    assert memory.contributors == (
        Contributor("backward/mul", "bf16[2,2048]", 1, 8192),
        Contributor("kept for the backward pass", "bf16[2,2048]", 1, 8192),
        Contributor("state.params.final_norm.scale", "f32[1024]", 1, 4096),
    )


def test_buffers_of_one_kind_are_shown_together():
    same = PROGRAM.replace("transpose(jvp())/mul", DYNAMIC_UPDATE.removeprefix("jit(train_step)/"))
    first, *_ = parse_memory(ASSIGNMENT, LIVE_RANGES, same).contributors
    assert first == Contributor("kept for the backward pass", "bf16[2,2048]", 2, 16384)


def test_a_program_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="after_optimizations-buffer-assignment of jit_step"
    ):
        read_memory(tmp_path, "jit_step")
