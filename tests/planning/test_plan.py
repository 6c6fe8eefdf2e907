"""Plans: what is refused before compiling, what is kept, and real ones for absent chips."""

import json
from pathlib import Path

import numpy as np
import pytest
from plans import GIB, make_experiment, make_plan

import glmjax.planning.plan
from glmjax.config import MeshConfig, Quantization, replace
from glmjax.model.params import count_params
from glmjax.planning import hlo
from glmjax.planning.arrange import arrange, flags, place
from glmjax.planning.memory import Memory
from glmjax.planning.plan import plan, plan_from_json, plan_to_json
from glmjax.planning.programs import Program, Serving, compile_program
from glmjax.planning.topologies import Topology
from glmjax.sharding import mesh_sizes

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
needs_libtpu = pytest.mark.tpu
JOBS = "decode", "prefill"


@pytest.fixture
def experiment(tmp_path):
    return replace(make_experiment(), **{"data.cache": str(tmp_path)})


@pytest.mark.parametrize(
    "made", [make_plan(), make_plan(needed=100.0, seconds=None)], ids=["fits", "not"]
)
def test_a_plan_survives_json(made):
    assert plan_from_json(json.loads(json.dumps(plan_to_json(made)))) == made


def test_json_says_by_how_much_and_how_long():
    values = plan_to_json(make_plan(needed=100.0, seconds=None))
    assert (values["fits"], values["margin"], values["estimate"]) == (False, -5 * GIB, None)
    values = plan_to_json(make_plan(seconds=2.0))
    assert values["margin"] == 85 * GIB
    # 2048 tokens a second on all chips.
    assert values["days"] == pytest.approx(400e9 / 2048 / 86400)
    assert values["chip_hours"] == pytest.approx(values["days"] * 24 * 4)


@pytest.fixture
def compiled(monkeypatch):
    """Programs made up instead of compiled; what was asked for is written down."""
    asked = []

    def compile_program(experiment, topology, job, serving, *, memory_only):
        asked.append((experiment.model.remat, memory_only))
        memory = Memory(GIB, 2 * GIB, 2 * GIB, ())
        return Program(1e15, {}, [[0, 0, 0, 0]] * 4, memory, True, None, 1.0)

    monkeypatch.setattr(glmjax.planning.plan, "compile_program", compile_program)
    monkeypatch.setattr(glmjax.planning.plan, "versions", lambda: {"libtpu": "1"})
    return asked


def test_what_was_compiled_is_kept(experiment, compiled):
    first = plan(experiment, "v5p:2x2x1", memory_only=True)
    again = plan(replace(experiment, **{"train.run": "elsewhere"}), "v5p:2x2x1", memory_only=True)
    assert first == again
    assert compiled == [("block", True)]
    for changes in (
        {"model.remat": "none"},
        {"train.microbatch_size": 4},
        {"mesh.tensor": 1, "mesh.fsdp": 4},
    ):
        plan(replace(experiment, **changes), "v5p:2x2x1", memory_only=True)
    plan(experiment, "v5p:2x2x1", job="decode", serving=Serving(4, 256), memory_only=True)
    assert len(compiled) == 5


@pytest.mark.parametrize(
    ("changes", "topology", "message"),
    [
        ({}, "v5p:2x2x2", "a mesh of {'data': 1, 'fsdp': 2, .* does not fit 8 devices"),
        ({"mesh": MeshConfig(data=1, fsdp=-1, tensor=3)}, "v5p:2x2x1", "does not fit 4 devices"),
        ({"mesh": MeshConfig(data=4), "train.batch_size": 6}, "v5p:2x2x1", "do not divide a microbatch of 6 rows"),
        ({"mesh": MeshConfig(data=1, tensor=16)}, "v5p:2x2x4", "has size 8, which mesh axes .'tensor',. of total size 16 do not divide"),
        ({}, "v5q:2x2x1", "no TPU generation 'v5q'"),
    ],
    ids=["devices", "left over", "rows", "heads", "generation"],
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_compiled(
    experiment, compiled, changes, topology, message
):
    with pytest.raises(ValueError, match=message) as error:
        plan(replace(experiment, **changes), topology)
    assert "\n" not in str(error.value)
    assert compiled == []


@pytest.mark.parametrize(
    ("train", "topology", "mesh", "microbatch", "ramp"),
    [
        ({}, Topology("v5p:2x2x1"), (1, 2, 2), None, None),
        ({}, Topology("v5p:2x2x2"), (1, 4, 2), 8, None),
        ({"batch_size": 4224, "microbatch_size": 24, "ramp": (192, 24, 10**6)},
         Topology("v5p:4x8x8"), (1, 128, 2), 128, (256, 128, 10**6)),
        ({"batch_size": 4224}, Topology("v5p:4x8x8", 2), (2, 64, 4), 4224, None),
        ({"batch_size": 6}, Topology("v5p:2x2x2"), (1, 2, 4), 6, None),
        ({}, Topology("v5e:2x2", 2), (2, 2, 2), 8, None),
    ],
    ids=["as it is", "fsdp takes the rest", "ramp", "slices", "tensor grows", "replicas for slices"],
)  # fmt: skip
def test_devices_are_arranged(train, topology, mesh, microbatch, ramp):
    arranged = arrange(make_experiment(**train), topology)
    axes = arranged.mesh
    assert (axes.data, axes.fsdp * axes.fsdp_line, axes.tensor) == mesh
    assert arranged.train.microbatch_size == microbatch
    assert arranged.train.ramp == ramp
    assert mesh_sizes(axes, topology.num_devices)


def test_a_mesh_that_takes_what_is_left_is_arranged_for_slices():
    arranged = arrange(
        replace(make_experiment(), mesh=MeshConfig(data=1, fsdp=-1, tensor=2)),
        Topology("v5e:2x2", 2),
    )
    assert arranged.mesh == MeshConfig(data=2, fsdp=2, tensor=2)


def test_devices_are_arranged_for_serving():
    arranged = arrange(make_experiment(), Topology("v5p:2x2x4"), "decode")
    assert arranged.mesh == MeshConfig(data=2, tensor=8)


def test_a_batch_that_no_mesh_can_share_out_is_named():
    with pytest.raises(ValueError, match="the 7 rows of a batch cannot be split over 16 devices"):
        arrange(make_experiment(batch_size=7), Topology("v5p:2x2x4"))


def test_flags_make_one_experiment_of_the_other():
    default = make_experiment(batch_size=96, microbatch_size=8, ramp=(16, 8, 1000))
    changed = replace(
        place(default, MeshConfig(data=1, fsdp=4, tensor=2), 32), **{"model.remat": "none"}
    )
    assert " ".join(flags(changed, default)) == (
        "--model.remat none --mesh.fsdp 4 --train.microbatch-size 32 --train.ramp 32 32 1000"
    )
    assert flags(default, default) == []


@pytest.fixture(scope="module")
def program():
    """A training step compiled for four absent chips."""
    return compile_program(make_experiment(), Topology("v5p:2x2x1"))


@needs_libtpu
def test_a_small_model_is_planned(experiment, program, monkeypatch):
    monkeypatch.setattr(glmjax.planning.plan, "compile_program", lambda *_, **__: program)
    made = plan(experiment, "v5p:2x2x1")
    assert made.fits and made.estimate is not None
    memory = made.memory
    assert 0 < memory.peak <= memory.needed == made.hbm_bytes - made.margin
    assert any("ffn_in.kernel" in each.name for each in memory.contributors)
    assert {axis for each in made.communication for axis in each.axes} == {"fsdp", "tensor"}
    assert {"all-gather", "reduce-scatter"} <= {each.kind for each in made.communication}
    assert 1 < made.hardware_flops / made.model_flops < 4 / 3
    assert 0 < made.estimate.utilisation < made.estimate.compute_utilisation < 1


@needs_libtpu
def test_flops_of_the_traced_and_of_the_compiled_program_agree(program):
    compiled = 4 * hlo.flops(hlo.read_program(program.text, program.loop_rounds))
    model, T, rows = make_experiment().model, 128, 8
    product = 2 * rows * model.num_heads * T * T * model.head_size * model.num_layers
    # The compiled text has no FLOPs of kernels: two products forward, and again where the block is
    # recomputed, five backward.
    assert compiled == pytest.approx(program.flops - 9 * product, rel=0.05)


@needs_libtpu
def test_only_the_memory_is_the_same_as_of_the_whole(program):
    quick = compile_program(make_experiment(), Topology("v5p:2x2x1"), memory_only=True)
    assert quick.text is None and quick.fits
    assert quick.memory == program.memory
    assert quick.flops == program.flops


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        (Topology("v5p:2x2x1", 2), MeshConfig(data=2, fsdp=2, tensor=2)),
        (Topology("v4:2x2x1"), MeshConfig(data=1, fsdp=2, tensor=2)),
        (Topology("v5e:2x2"), MeshConfig(data=4)),
        (Topology("v6e:2x2"), MeshConfig(data=1, tensor=4)),
        (Topology("tpu7x:2x2x1"), MeshConfig(data=2, fsdp=2, tensor=2)),
    ],
    ids=["two slices", "v4", "v5e", "v6e", "tpu7x"],
)
def test_every_generation_answers(experiment, topology, mesh):
    made = plan(replace(experiment, mesh=mesh), topology, memory_only=True)
    assert made.fits
    assert made.devices == topology.num_devices
    # Parameters and two moments, four bytes each, shared out over fsdp and tensor.
    shared = mesh.fsdp * mesh.tensor
    assert made.memory.arguments == pytest.approx(
        12 * count_params(experiment.model) / shared, rel=0.1
    )


@needs_libtpu
def test_what_does_not_fit_is_an_answer(experiment):
    large = replace(experiment, **{"train.batch_size": 2**17, "model.remat": "none"})
    made = plan(large, "v5e:2x2")
    assert not made.fits and made.estimate is None
    assert made.margin < 0
    assert made.memory.contributors[0].name == "kept for the backward pass"
    assert plan(large, "v5e:2x2", memory_only=True) == made


@needs_libtpu
def test_serving_is_planned(experiment):
    served = replace(experiment, mesh=MeshConfig(data=1, tensor=4))
    made = plan(served, "v5p:2x2x1", job="decode", serving=Serving(batch=4, length=512))
    assert made.fits and made.estimate is not None
    model = experiment.model
    cache = 2 * model.num_layers * 4 * 512 * model.hidden_size * 2
    assert cache / 4 < made.memory.arguments < made.memory.needed
    assert made.estimate.seconds >= 0.5 * made.least_seconds


@needs_libtpu
@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2, tensor=2)], ids=str)
def test_a_prompt_joins_a_running_batch(experiment, mesh):
    """The rows that run need their place meanwhile, so that no less is needed than to decode."""
    served = replace(experiment, mesh=mesh)
    topology = "v5e:1x1" if mesh.data == 1 else "v5e:2x2"
    serving = Serving(batch=4, length=512, prompt=256)
    decode, prefill = (plan(served, topology, job=job, serving=serving) for job in JOBS)
    assert (prefill.prompt, prefill.microbatch_rows) == (256, mesh.data)
    assert prefill.estimate.seconds > 0
    # All weights and keys, and neither a copy of them nor a cache for every row.
    assert prefill.memory.arguments >= 0.99 * decode.memory.arguments
    model, cache = experiment.model, 2 * 2 * experiment.model.num_layers * 512 * 512
    assert prefill.memory.temporaries > 2 * 256 * model.ffn_size
    assert prefill.memory.temporaries < 2 * cache


@needs_libtpu
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_take_their_place_alone(experiment, bits):
    served = replace(experiment, mesh=MeshConfig(data=1))
    integers = replace(served, **{"model.quantization": Quantization(bits)})
    serving = Serving(batch=1, length=128)
    made, floats = (
        plan(x, "v5e:1x1", job="decode", serving=serving, memory_only=True)
        for x in (integers, served)
    )
    weights = sum(
        part.bytes for part in floats.memory.contributors
        if part.name.startswith("params.blocks.") and part.name.endswith(".kernel")
    )  # fmt: skip
    assert floats.memory.needed - made.memory.needed == pytest.approx(
        weights * (1 - bits / 16), rel=0.05
    )
    assert made.weights == f"int{bits}" and floats.weights == "bfloat16"


@needs_libtpu
@pytest.mark.slow
def test_glm_130b_fits_on_1024_chips(tmp_path):
    """One to five minutes on two cores."""
    from glmjax.cli.experiments import load_experiment

    published = load_experiment(EXPERIMENTS / "glm_130b.py")
    topology = Topology("v5p:8x8x16")
    made = plan(replace(arrange(published, topology), **{"data.cache": str(tmp_path)}), topology)
    assert made.fits
    assert made.memory.peak < made.memory.needed < made.hbm_bytes
    # Parameters and two moments in float32, split over all chips, and little more.
    state = 3 * 4 * 128_697_794_560 / 1024
    assert state < made.memory.arguments < 1.2 * state
    assert np.prod(list(made.mesh.values())) == made.chips == 1024
