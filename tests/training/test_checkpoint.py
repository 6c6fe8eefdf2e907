"""Checkpoints come back bit for bit, or are noticed not to."""

import gc
import json
import logging
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.config import (
    DataConfig,
    Experiment,
    GLMConfig,
    MeshConfig,
    ObjectiveConfig,
    config_from_json,
    config_to_json,
    replace,
)
from glmjax.model.params import Params, abstract_params, param_shardings
from glmjax.presets import PRESETS
from glmjax.sharding import make_mesh
from glmjax.training.checkpoint import CheckpointError, Checkpoints

CONFIG = replace(PRESETS["glm-tiny"], num_layers=1, hidden_size=16, ffn_size=32, vocab_size=64)
EXPERIMENT = Experiment(model=CONFIG, data=DataConfig(sequence_length=128))


@struct.dataclass
class State:
    step: jax.Array
    params: Params
    optimizer: optax.OptState
    half: jax.Array
    counts: jax.Array


def make_params(config: GLMConfig, seed: int = 0) -> Params:
    """Noise in the shape of the parameters; `init` would spend seconds on compiling."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape, np.float32)),
        abstract_params(config),
    )


def put(state: State, mesh: jax.sharding.Mesh) -> State:
    """The same state on a mesh: parameters and moments split, the rest on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = param_shardings(CONFIG, mesh)
    moments, *rest = state.optimizer
    return State(
        jax.device_put(state.step, everywhere),
        jax.device_put(state.params, shardings),
        (
            optax.ScaleByAdamState(
                jax.device_put(moments.count, everywhere),
                jax.device_put(moments.mu, shardings),
                jax.device_put(moments.nu, shardings),
            ),
            *rest,
        ),
        jax.device_put(state.half, everywhere),
        jax.device_put(state.counts, everywhere),
    )


def abstract(state: State) -> State:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same_bits(found: object, expected: object) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def state() -> State:
    params = make_params(CONFIG)
    half = jnp.array([1.5, -0.0, jnp.inf, jnp.nan, 3e-40], jnp.bfloat16)
    state = State(jnp.int32(0), params, optax.adamw(1e-3).init(params), half, jnp.arange(8))
    return put(state, make_mesh(MeshConfig(data=2, fsdp=4)))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, state: State) -> Path:
    run = tmp_path_factory.mktemp("run")
    (run / "config.json").write_text(json.dumps(config_to_json(EXPERIMENT)))
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state.replace(step=state.step + step), EXPERIMENT)
    return run


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2, whose states differ by `step`."""
    return shutil.copytree(finished_run, tmp_path / "run")


def restored_step(folder: Path, state: State) -> int:
    """The step that a new process would go on from; checks that its state is complete."""
    with Checkpoints(folder, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(abstract(state), EXPERIMENT)
    assert restored is not None
    step, found = restored
    assert_same_bits(found, state.replace(step=state.step + step))
    return step


def test_round_trip_is_bit_exact(run, state):
    assert restored_step(run / "checkpoints", state) == 2


def test_empty_folder_has_no_checkpoint(tmp_path, state):
    with Checkpoints(tmp_path / "new", keep=1) as checkpoints:
        assert checkpoints.restore_latest(abstract(state), EXPERIMENT) is None


@pytest.mark.parametrize(
    ("mesh", "devices"),
    [(MeshConfig(fsdp=4, data=1), 4), (MeshConfig(data=8), 8), (MeshConfig(tensor=2), 8),
     (MeshConfig(), 1)],
    ids=["8-to-4-devices", "fsdp-to-data", "tensor", "one-device"],
)  # fmt: skip
def test_restores_onto_another_mesh(run, state, mesh, devices):
    other = put(state, make_mesh(mesh, jax.devices()[:devices]))
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        _, found = checkpoints.restore_latest(abstract(other), EXPERIMENT)
    assert_same_bits(found, state.replace(step=state.step + 2))
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, other)


def test_saved_state_may_be_donated_at_once(tmp_path):
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(1 << 23)
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for step in range(5):
            checkpoints.save(step, {"x": x}, EXPERIMENT)
            for _ in range(8):
                x = add_one(x)
    for step in (4, 3, 2, 1, 0):
        with Checkpoints(tmp_path, keep=5) as checkpoints:
            found, restored = checkpoints.restore_latest(
                {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}, EXPERIMENT
            )
        assert found == step
        np.testing.assert_array_equal(restored["x"], 8.0 * step)
        shutil.rmtree(tmp_path / str(step))


def test_newest_are_kept(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 10, 20, 100):
            checkpoints.save(step, state, EXPERIMENT)
        checkpoints.wait()
        assert checkpoints.steps() == [20, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "20"]


def test_step_that_exists_is_left_alone(run, state):
    before = {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")}
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(2, state, EXPERIMENT)
    assert {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")} == before


def test_metadata_says_what_made_it(run):
    metadata = json.loads((run / "checkpoints/2/metadata.json").read_text())
    assert config_from_json(Experiment, metadata["experiment"]) == EXPERIMENT
    assert (metadata["step"], metadata["seed"]) == (2, 0)
    assert metadata["jax"] == jax.__version__
    assert set(metadata) == {"glmjax", "commit", "jax", "step", "seed", "experiment"}


# Damage


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, *(pytest.param(d, marks=pytest.mark.slow) for d in (delete, truncate))]
)
def test_damage_to_any_file_is_reported_and_the_previous_step_used(run, state, caplog, damage):
    folder = run / "checkpoints/2"
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        content = file.read_bytes()
        damage(file)
        caplog.clear()
        assert restored_step(run / "checkpoints", state) == 1, file
        (warning,) = caplog.messages
        assert str(folder) in warning and "step 1 is used" in warning
        file.write_bytes(content)
    assert restored_step(run / "checkpoints", state) == 2


def test_report_names_the_file_and_the_cause(run, state, caplog):
    data = max((run / "checkpoints/2/state").rglob("d/*"), key=lambda path: path.stat().st_size)
    name = data.relative_to(run / "checkpoints/2")
    for damage, cause in (
        (flip_a_bit, f"({name} has changed)"),
        (truncate, f"({name} has {data.stat().st_size // 2} bytes instead of"),
        (delete, f"({name} is missing)"),
    ):
        damage(data)
        caplog.clear()
        restored_step(run / "checkpoints", state)
        assert cause in caplog.text


def test_all_damaged_is_an_error_naming_them(run, state):
    for step in (1, 2):
        flip_a_bit(run / f"checkpoints/{step}/metadata.json")
    with (
        Checkpoints(run / "checkpoints", keep=2) as checkpoints,
        pytest.raises(CheckpointError, match=r"every checkpoint in .*: 2: .*; 1: metadata.json"),
    ):
        checkpoints.restore_latest(abstract(state), EXPERIMENT)


@pytest.mark.parametrize(("next_step", "left"), [(2, [1, 2]), (3, [1, 3])], ids=["same", "later"])
def test_damaged_step_goes_when_a_new_one_is_whole(run, state, next_step, left):
    delete(run / "checkpoints/2/state/manifest.ocdbt")
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        checkpoints.restore_latest(abstract(state), EXPERIMENT)
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(next_step, state.replace(step=state.step + next_step), EXPERIMENT)
        checkpoints.wait()
        assert checkpoints.steps() == left
    assert restored_step(run / "checkpoints", state) == next_step


@pytest.mark.slow
def test_kill_during_a_save_leaves_the_previous_step(tmp_path, caplog):
    script = """
        import os, signal, sys
        import jax, numpy as np
        from glmjax.config import Experiment
        from glmjax.training.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1], keep=1)
        checkpoints.save(1, {"x": jax.numpy.arange(3)}, Experiment())
        checkpoints.wait()
        noise = np.random.default_rng(0).random((1 << 25,), np.float32)
        checkpoints.save(2, {"x": jax.device_put(noise)}, Experiment())
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert process.stderr == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.unfinished"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        step, found = checkpoints.restore_latest(
            {"x": jax.ShapeDtypeStruct((3,), int)}, Experiment()
        )
    assert (step, found["x"].tolist()) == (1, [0, 1, 2])
    assert caplog.messages == [f"removed {tmp_path / '2.unfinished'}: its save was interrupted"]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.fixture
def small_disk():
    """No file may exceed 64 KiB, which stops a save as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()


# orbax closes its event loop on the first failed write; the others then complain to no one.
leftover_writes = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


@leftover_writes
@pytest.mark.parametrize("surfaces_in", ["wait", "save", "close"])
def test_full_disk_is_one_error_and_harms_nothing(tmp_path, state, small_disk, surfaces_in):
    noise = jax.random.normal(jax.random.key(0), (1 << 18,))
    small = {"x": noise[:8]}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, small, EXPERIMENT)
    checkpoints.save(2, {"x": noise}, EXPERIMENT)
    surface = {
        "wait": checkpoints.wait,
        "save": lambda: checkpoints.save(3, small, EXPERIMENT),
        "close": checkpoints.close,
    }[surfaces_in]
    with pytest.raises(CheckpointError, match=f"could not save {tmp_path}/2 .*unharmed") as error:
        surface()
    assert "\n" not in str(error.value)
    assert checkpoints.steps() == [1]
    if surfaces_in != "close":
        checkpoints.wait()
        checkpoints.save(4, small, EXPERIMENT)
        checkpoints.close()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        step, found = checkpoints.restore_latest(
            {"x": jax.ShapeDtypeStruct((8,), jnp.float32)}, EXPERIMENT
        )
    assert step == (1 if surfaces_in == "close" else 4)
    assert_same_bits(found, small)
    assert [path.name for path in tmp_path.iterdir()] == [str(step)]


def test_nothing_is_printed(tmp_path, state, capfd, caplog):
    with caplog.at_level(logging.INFO), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, EXPERIMENT)
        checkpoints.restore_latest(abstract(state), EXPERIMENT)
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


def test_large_layers_are_chunks(tmp_path):
    """So that one of them can be read without the others; small ones stay together."""
    shapes = {"kernel": (3, 512, 1024), "bias": (3, 1024)}
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    halves = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    blocks = {name: jnp.zeros(shape, device=halves) for name, shape in shapes.items()}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"blocks": blocks, "step": jnp.int32(1)}, EXPERIMENT)
    chunks = {
        name: tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": f"file://{tmp_path}/1/state"},
                "path": f"blocks.{name}/",
            }
        ).result().chunk_layout.read_chunk.shape
        for name in shapes
    }  # fmt: skip
    assert {name: chunk[0] for name, chunk in chunks.items()} == {"kernel": 1, "bias": 3}


def test_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot make the folder .*/file/checkpoints"):
        Checkpoints(tmp_path / "file/checkpoints", keep=1)


# Configuration


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({"train.seed": 1}, ["train.seed: 0 -> 1"]),
        ({"train.batch_size": 64}, ["train.batch_size: 32 -> 64"]),
        ({"train.ramp": (8, 8, 100)}, ["train.ramp: None -> (8, 8, 100)"]),
        ({"optimizer.learning_rate": 1e-3}, ["optimizer.learning_rate: 0.0002 -> 0.001"]),
        ({"data.path": ("a",), "objective.mask_ratio": 0.2},
         ["data.path: () -> ('a',)", "objective.mask_ratio: 0.15 -> 0.2"]),
        ({"model.dtype": "bfloat16"}, ["model.dtype: float32 -> bfloat16"]),
        ({"model.special_tokens.mask": 5}, ["model.special_tokens.mask: 4 -> 5"]),
    ],
    ids=["seed", "batch", "ramp", "optimizer", "data-and-objective", "dtype", "special-tokens"],
)  # fmt: skip
def test_another_configuration_is_refused(run, state, changes, differences):
    other = replace(EXPERIMENT, **changes)
    with (
        Checkpoints(run / "checkpoints", keep=2) as checkpoints,
        pytest.raises(ValueError, match="another configuration") as error,
    ):
        checkpoints.restore_latest(abstract(state), other)
    assert str(error.value).endswith("): " + "; ".join(differences))


def test_what_does_not_change_the_mathematics_may_change(run, state):
    other = replace(
        EXPERIMENT,
        **{
            "train.run": "elsewhere", "train.steps": 9, "train.microbatch_size": 8,
            "train.keep_checkpoints": 9, "mesh.fsdp": 4, "data.workers": 2, "data.cache": "x",
            "data.skip": ("3:4",), "model.attention": "reference", "model.remat": "block",
            "model.name": "other",
        },
    )  # fmt: skip
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        step, _ = checkpoints.restore_latest(abstract(state), other)
    assert step == 2


@pytest.mark.parametrize("name", PRESETS)
def test_configuration_survives_json(name):
    config = PRESETS[name]
    experiment = Experiment(
        model=config,
        objective=ObjectiveConfig(
            positions="1d" if config.positions in ("rope_1d", "rope_half") else "2d"
        ),
        data=DataConfig(
            path=("a", "b"), weights=(1.0, 0.1), sequence_length=128, skip=("1:2", "5:6")
        ),
    )
    experiment = replace(experiment, **{"train.ramp": (8, 8, 1000)})
    text = json.dumps(config_to_json(experiment))
    assert config_from_json(Experiment, json.loads(text)) == experiment


def test_unknown_and_missing_fields_of_json_are_named():
    values = config_to_json(EXPERIMENT)
    values["model"] |= {"colour": 1, "depth": 2}
    with pytest.raises(ValueError, match="GLMConfig has no field 'colour', 'depth'"):
        config_from_json(Experiment, values)
    with pytest.raises(ValueError, match="SpecialTokens lacks the field 'eop', 'eos'"):
        config_from_json(GLMConfig, {"special_tokens": {"mask": 1, "sop": 2, "pad": 3}})
    assert config_from_json(GLMConfig, {"num_layers": 3}) == GLMConfig(num_layers=3)
