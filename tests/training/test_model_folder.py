"""Models are written and read in parts, come back bit for bit, or are noticed not to be whole."""

import json
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_run

from glmjax.config import (
    DataConfig,
    Experiment,
    GLMConfig,
    MeshConfig,
    Quantization,
    config_to_json,
    replace,
)
from glmjax.model.params import Params, abstract_params, leaf_name, param_shardings
from glmjax.model.parts import Key, part_specs
from glmjax.presets import PRESETS
from glmjax.sharding import make_mesh
from glmjax.training import model_folder
from glmjax.training.checkpoint import CheckpointError, Checkpoints, absolute_path, save_tree
from glmjax.training.model_folder import create_model, load_model, open_model, save_model

CONFIG = replace(PRESETS["glm-tiny"], num_layers=2, hidden_size=16, ffn_size=32, vocab_size=64)
LARGER = replace(CONFIG, num_layers=8, hidden_size=256, ffn_size=1024)
CONFIGS = {
    "tied": CONFIG,
    "untied": replace(PRESETS["glm-130b-tiny"], tied_embeddings=False),
    "quantised": replace(CONFIG, quantization=Quantization(bits=8)),
    "layers differ": replace(
        CONFIG,
        quantization=Quantization(4, scheme="zeropoint", embeddings=True, float_layers=(1,)),
    ),
}
TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int8]


def make_parts(config: GLMConfig = CONFIG, seed: int = 0) -> dict[Key, np.ndarray]:
    """Random bits, each parameter of another type."""
    generator = np.random.default_rng(seed)
    specs = part_specs(config)
    names = dict.fromkeys(name for name, _ in specs)
    types = {name: TYPES[i % len(TYPES)] for i, name in enumerate(names)}
    return {
        key: (8 * generator.standard_normal(spec.shape, np.float32)).astype(types[key[0]])
        for key, spec in specs.items()
    }


def dtypes(parts: dict[Key, np.ndarray]) -> dict[str, np.dtype]:
    return {name: part.dtype for (name, _), part in parts.items()}


def file_name(key: Key, part: np.ndarray) -> str:
    """What zarr calls the chunk of a part."""
    name, layer = key
    indices = ([] if layer is None else [layer]) + [0] * part.ndim
    return f"state/params.{name}/{'.'.join(map(str, indices))}"


def write(
    path: Path, parts: dict[Key, np.ndarray], config: GLMConfig = CONFIG, stop_after: int = 999
) -> list[Key]:
    """Writes parts, at most so many; returns which."""
    written = []
    with create_model(path, config, dtypes(parts), "source") as writers:
        for key, writer in writers.items():
            if len(written) == stop_after:
                raise KeyboardInterrupt
            writer(parts[key])
            written.append(key)
    return written


def interrupt(
    path: Path, parts: dict[Key, np.ndarray], after: int, config: GLMConfig = CONFIG
) -> list[Key]:
    with pytest.raises(KeyboardInterrupt):
        write(path, parts, config, stop_after=after)
    return list(parts)[:after]


def assert_parts(path: Path, expected: dict[Key, np.ndarray]) -> None:
    """The model has these bits, part by part."""
    _, parts = open_model(path)
    assert list(parts) == list(expected)
    for key, part in parts.items():
        assert (part.shape, part.dtype) == (expected[key].shape, expected[key].dtype)
        found = part.read()
        assert (found.shape, found.dtype) == (part.shape, part.dtype)
        assert found.tobytes() == expected[key].tobytes(), key


def stacked(parts: dict[Key, np.ndarray], name: str) -> np.ndarray:
    if apart := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        return parts[f"blocks.{apart[2]}", int(apart[1])]
    layers = [part for (n, _), part in parts.items() if n == name]
    return layers[0] if (name, None) in parts else np.stack(layers)


def make_params(config: GLMConfig = CONFIG, seed: int = 0) -> Params:
    parts = make_parts(config, seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(stacked(parts, leaf_name(path))), abstract_params(config)
    )


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


# Parts


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parts_come_back(tmp_path, config):
    parts = make_parts(config)
    write(tmp_path / "model", parts, config)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert open_model(tmp_path / "model")[0] == config
    assert_parts(tmp_path / "model", parts)


def test_a_part_is_a_file_of_its_bytes(tmp_path):
    parts = make_parts()
    write(tmp_path / "model", parts)
    for key, part in parts.items():
        assert (tmp_path / "model" / file_name(key, part)).read_bytes() == part.tobytes()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_orbax_restores_it_sharded_and_in_part(tmp_path, config):
    parts = make_parts(config)
    write(tmp_path / "model", parts, config)
    shardings = param_shardings(config, make_mesh(MeshConfig(data=2, fsdp=4)))
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        make_params(config),
        shardings,
    )
    some: Any = {"final_norm": {"scale": abstract.final_norm.scale}}
    if not isinstance(abstract.blocks, tuple):
        some["blocks"] = {"qkv": {"bias": abstract.blocks.qkv.bias}}
    for wanted in (abstract, some):
        tree = {"params": wanted}
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.restore(
                tmp_path / "model/state",
                args=ocp.args.PyTreeRestore(
                    tree,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                    partial_restore=True,
                ),
            )["params"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            assert_same_bits(leaf, stacked(parts, leaf_name(path)))
        assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
            lambda x: x.sharding, wanted
        )


def test_parts_may_be_written_in_any_order_and_layout(tmp_path):
    parts = make_parts()
    with create_model(tmp_path / "model", CONFIG, dtypes(parts), "source") as writers:
        for key in reversed(parts):
            writers[key](np.asfortranarray(parts[key]))
    assert_parts(tmp_path / "model", parts)


def test_wrong_part_is_refused(tmp_path):
    parts = make_parts()
    key = ("blocks.qkv.bias", 1)
    with create_model(tmp_path / "model", CONFIG, dtypes(parts), "source") as writers:
        for wrong in (parts[key].astype(np.float64), parts[key][:1]):
            with pytest.raises(ValueError, match=r"blocks.qkv.bias of layer 1 must be \w+\[3, "):
                writers[key](wrong)
        for key, writer in writers.items():
            writer(parts[key])


def test_parts_left_out_are_an_error(tmp_path):
    parts = make_parts()
    with (
        pytest.raises(ValueError, match=r"2 parts of .*/model were not written: final_norm.scale"),
        create_model(tmp_path / "model", CONFIG, dtypes(parts), "source") as writers,
    ):
        for key in list(writers)[:-2]:
            writers[key](parts[key])
    assert not (tmp_path / "model").exists()


# Going on after an interruption


def test_interrupted_work_goes_on_with_the_rest(tmp_path):
    parts = make_parts()
    done = interrupt(tmp_path / "model", parts, after=7)
    with pytest.raises(FileNotFoundError, match="/model does not exist"):
        load_model(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no model"):
        load_model(tmp_path / "model.unfinished")
    done += interrupt(tmp_path / "model", parts, after=0)
    rest = write(tmp_path / "model", parts)
    assert done + rest == list(parts)
    assert_parts(tmp_path / "model", parts)


def stop(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_work_interrupted_before_the_new_name_is_finished(tmp_path, monkeypatch):
    parts = make_parts()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_folder, "give_name", stop)
        write(tmp_path / "model", parts)
    assert [path.name for path in tmp_path.iterdir()] == ["model.unfinished"]
    assert write(tmp_path / "model", parts) == []
    assert_parts(tmp_path / "model", parts)


def cut_the_last_line(folder: Path) -> str:
    journal = folder / "checksums-so-far.txt"
    os.truncate(journal, journal.stat().st_size - 3)
    return journal.read_text().splitlines()[-1].split()[-1]


def delete_a_part(folder: Path) -> str:
    name = (folder / "checksums-so-far.txt").read_text().splitlines()[-2].split()[-1]
    (folder / name).unlink()
    return name


def test_work_on_layers_that_differ_goes_on_too(tmp_path):
    config = CONFIGS["layers differ"]
    parts = make_parts(config)
    done = interrupt(tmp_path / "model", parts, after=len(parts) // 2, config=config)
    assert done + write(tmp_path / "model", parts, config) == list(parts)
    assert_parts(tmp_path / "model", parts)


@pytest.mark.parametrize("damage", [cut_the_last_line, delete_a_part])
def test_what_is_not_surely_whole_is_written_again(tmp_path, damage):
    parts = make_parts()
    done = interrupt(tmp_path / "model", parts, after=7)
    lost = damage(tmp_path / "model.unfinished")
    again = [key for key in done if file_name(key, parts[key]).startswith(lost)]
    assert len(again) == 1
    assert write(tmp_path / "model", parts) == again + list(parts)[7:]
    assert_parts(tmp_path / "model", parts)


@pytest.mark.parametrize(
    "changes",
    [{"source": "another"}, {"config": replace(CONFIG, layer_norm_epsilon=1e-6)},
     {"types": {name: np.float64 for name, _ in part_specs(CONFIG)}}],
    ids=["source", "configuration", "types"],
)  # fmt: skip
def test_remains_of_other_work_are_removed(tmp_path, caplog, changes):
    parts = make_parts()
    interrupt(tmp_path / "model", parts, after=7)
    (tmp_path / "model.unfinished/other").write_text("")
    settings = {"config": CONFIG, "types": dtypes(parts), "source": "source"} | changes
    with (
        pytest.raises(KeyboardInterrupt),
        create_model(
            tmp_path / "model", settings["config"], settings["types"], settings["source"]
        ) as writers,
    ):
        assert list(writers) == list(parts)
        raise KeyboardInterrupt
    assert not (tmp_path / "model.unfinished/other").exists()
    (message,) = caplog.messages
    assert message.startswith(f"removed {tmp_path}/model.unfinished: ")


def test_two_processes_do_not_write_the_same_model(tmp_path):
    parts = make_parts()
    for source in ("source", "another"):
        with create_model(tmp_path / "model", CONFIG, dtypes(parts), "source") as writers:
            with (
                pytest.raises(CheckpointError, match=r"another process is writing .*/model"),
                create_model(tmp_path / "model", CONFIG, dtypes(parts), source),
            ):
                pass
            for key, writer in writers.items():
                writer(parts[key])
        assert_parts(tmp_path / "model", parts)


@pytest.mark.slow
def test_killed_five_times_it_ends_with_the_same_bits(tmp_path):
    script = """
        import os, signal, sys, threading, time
        import test_model_folder as t
        kill_at, delay = int(sys.argv[2]), float(sys.argv[3])
        def kill():
            os.kill(os.getpid(), signal.SIGKILL)
        parts = t.make_parts(t.LARGER)
        with t.create_model(sys.argv[1], t.LARGER, t.dtypes(parts), "source") as writers:
            print(len(writers), flush=True)
            for i, (key, writer) in enumerate(writers.items()):
                if i == kill_at:
                    threading.Timer(delay, kill).start()
                if i == kill_at + 3:
                    time.sleep(60)
                writer(parts[key])
    """
    environment = tiny_run.environment(1)
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], *folders])
    path = tmp_path / "model"
    parts = make_parts(LARGER)
    left = [len(parts)]
    for _ in range(5):
        kill_at, delay = random.randrange(left[-1] // 3), random.uniform(0, 0.01)
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), path, str(kill_at), str(delay)],
            capture_output=True, check=False, text=True, env=environment,
        )  # fmt: skip
        assert process.returncode == -signal.SIGKILL, process.stderr
        left.append(int(process.stdout))
        assert not path.exists()
        with pytest.raises(ValueError, match="holds no model"):
            load_model(tmp_path / "model.unfinished")
    assert left == sorted(left, reverse=True)
    write(path, parts, LARGER)
    assert_parts(path, parts)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# What is at the destination


def test_a_model_is_replaced_when_the_new_one_is_whole(tmp_path):
    old, new = make_parts(seed=1), make_parts(seed=2)
    write(tmp_path / "model", old)
    interrupt(tmp_path / "model", new, after=7)
    assert_parts(tmp_path / "model", old)
    (tmp_path / "model.replaced").mkdir()  # left by a process that was killed while it renamed
    (tmp_path / "model.replaced/file").write_text("")
    write(tmp_path / "model", new)
    assert_parts(tmp_path / "model", new)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def small_disk():
    """No file may exceed 64 KiB, which stops a save as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_what_is_whole(tmp_path, small_disk):
    parts = make_parts(LARGER)
    with pytest.raises(
        CheckpointError, match=rf"could not save {tmp_path}/model \(OSError"
    ) as error:
        write(tmp_path / "model", parts, LARGER)
    assert "model.unfinished keeps what is whole" in str(error.value)
    assert "\n" not in str(error.value)
    small_disk()
    assert 0 < len(write(tmp_path / "model", parts, LARGER)) < len(parts)
    assert_parts(tmp_path / "model", parts)


def test_too_small_a_disk_is_refused_at_the_start(tmp_path, monkeypatch):
    parts = make_parts(LARGER)
    interrupt(tmp_path / "model", parts, after=7, config=LARGER)
    needed = sum(part.nbytes for part in list(parts.values())[7:])
    disk = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(model_folder.shutil, "disk_usage", lambda path: disk)
    with pytest.raises(
        CheckpointError, match=rf"/model \(OSError: {needed / 1e9:.3f} GB are needed"
    ):
        write(tmp_path / "model", parts, LARGER)
    disk.free = needed
    assert write(tmp_path / "model", parts, LARGER) == list(parts)[7:]


def test_full_disk_keeps_the_old_model(tmp_path, small_disk):
    params = make_params()
    save_model(tmp_path / "model", CONFIG, params)
    large = replace(CONFIG, vocab_size=1 << 14)
    with pytest.raises(CheckpointError, match=f"could not save {tmp_path}/model "):
        save_model(tmp_path / "model", large, make_params(large))
    assert_same_bits(load_model(tmp_path / "model")[1], params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Damage


@pytest.mark.parametrize("in_parts", [True, False], ids=["parts", "orbax"])
@pytest.mark.parametrize(
    ("damage", "cause"),
    [(flip_a_bit, " has changed"), (truncate, r" has \d+ bytes instead of \d+"),
     (Path.unlink, "( is missing|: No such file or directory)")],
    ids=["bit", "truncated", "missing"],
)  # fmt: skip
def test_damage_to_any_file_is_an_error_that_names_it(tmp_path, in_parts, damage, cause):
    if in_parts:
        save_model(tmp_path / "model", CONFIG, make_params())
    else:
        save_as_orbax(tmp_path / "model", make_params())
    files = [file for file in (tmp_path / "model").rglob("*") if file.is_file()]
    for file in files:
        if file.name.startswith("checksums-"):
            continue
        content = file.read_bytes()
        damage(file)
        name = file.relative_to(tmp_path / "model")
        with pytest.raises(CheckpointError, match=f"/model is damaged: {name}{cause}$"):
            load_model(tmp_path / "model")
        file.write_bytes(content)
    load_model(tmp_path / "model")


def test_damaged_part_leaves_the_others_readable(tmp_path):
    parts = make_parts()
    write(tmp_path / "model", parts)
    flip_a_bit(tmp_path / "model/state/params.blocks.qkv.kernel/1.0.0.0.0")
    _, found = open_model(tmp_path / "model")
    assert found["blocks.qkv.kernel", 0].read().tobytes() == (
        parts["blocks.qkv.kernel", 0].tobytes()
    )
    with pytest.raises(CheckpointError, match=r"qkv.kernel/1\.0\.0\.0\.0 has changed"):
        found["blocks.qkv.kernel", 1].read()


def test_part_without_a_checksum_is_an_error(tmp_path):
    write(tmp_path / "model", make_parts())
    table = tmp_path / "model/checksums-0-of-1.txt"
    head, *lines = table.read_text().split("\n")
    kept = [line for line in lines if "word_embedding/0.0" not in line]
    table.write_text("\n".join([head.replace(str(len(lines)), str(len(kept))), *kept]))
    with pytest.raises(CheckpointError, match=r"params.word_embedding/0.0 has no checksum"):
        open_model(tmp_path / "model")


def test_shapes_of_another_configuration_are_an_error(tmp_path):
    save_as_orbax(tmp_path / "model", make_params(), replace(CONFIG, ffn_size=64))
    with pytest.raises(CheckpointError, match=r"ffn_in.kernel of layer 0 as .* configuration says"):
        open_model(tmp_path / "model")


def test_parameters_that_a_folder_lacks_are_an_error(tmp_path):
    save_as_orbax(tmp_path / "model", make_params(), replace(CONFIG, tied_embeddings=False))
    with pytest.raises(CheckpointError, match="lacks the parameter output_embedding"):
        open_model(tmp_path / "model")


# Whole models


def save_as_orbax(path: Path, params: Params, config: GLMConfig = CONFIG) -> None:
    """As jobs of several processes and older versions of glmjax do."""
    save_tree(absolute_path(path), {"params": params}, {"model": config_to_json(config)})


@pytest.mark.parametrize("save", [save_model, lambda path, _, params: save_as_orbax(path, params)],
                         ids=["parts", "orbax"])  # fmt: skip
def test_types_and_bits_of_a_model_come_back(
    tmp_path, save: Callable[[Path, GLMConfig, Params], None]
):
    for seed in (0, 1):  # the second replaces the first
        params = make_params(seed=seed)
        save(tmp_path / "model", CONFIG, params)
        config, found = load_model(tmp_path / "model")
        assert config == CONFIG
        assert_same_bits(found, params)
        assert_parts(tmp_path / "model", make_parts(seed=seed))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sharded_model_comes_back(tmp_path, config):
    shardings = param_shardings(config, make_mesh(MeshConfig(data=2, fsdp=4)))
    params = make_params(config)
    save_model(tmp_path / "model", config, jax.device_put(params, shardings))
    assert_same_bits(load_model(tmp_path / "model")[1], params)
    other = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(other):
        _, found = load_model(tmp_path / "model")
    assert_same_bits(found, params)
    assert jax.tree.map(lambda x: x.sharding, found) == param_shardings(config, other)


def test_configuration_of_an_older_version_is_completed(tmp_path):
    """Fields that came later have the values that the older version implied."""
    params = make_params()
    later = ("num_kv_heads", "biases", "rope_base", "prefix_length", "prefix_projection",
             "quantization")  # fmt: skip
    model = {k: v for k, v in config_to_json(CONFIG).items() if k not in later}
    save_tree(absolute_path(tmp_path / "model"), {"params": params}, {"model": model})
    config, found = load_model(tmp_path / "model")
    assert config == CONFIG
    assert_same_bits(found, params)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2, made of parts of these seeds."""
    experiment = Experiment(model=CONFIG, data=DataConfig(sequence_length=128))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config_to_json(experiment)))
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            params = make_params(seed=step)
            state = {"step": jnp.int32(step), "params": params, "optimizer": (params, params)}
            checkpoints.save(step, state, experiment)
    return run


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/2"])
def test_model_of_a_run(run, part):
    config, params = load_model(run / part)
    assert config == CONFIG
    assert_same_bits(params, make_params(seed=2))
    assert_parts(run / part, make_parts(seed=2))


def test_newest_whole_checkpoint_of_a_run_is_taken(run, caplog):
    flip_a_bit(run / "checkpoints/2/metadata.json")
    assert_parts(run, make_parts(seed=1))
    assert "step 1 is used instead" in caplog.text
    flip_a_bit(run / "checkpoints/1/metadata.json")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        open_model(run)


def test_nothing_else_is_overwritten(run):
    (run / "empty").mkdir()
    save_model(run / "empty", CONFIG, make_params())
    for path in (run, run / "checkpoints", run / "checkpoints/2", run / "config.json"):
        with pytest.raises(FileExistsError, match=f"{path} exists and is not a glmjax model"):
            save_model(path, CONFIG, make_params())
    assert_parts(run, make_parts(seed=2))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="/absent does not exist"):
        open_model(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=f"{path} holds no model"):
            open_model(path)


def test_nothing_is_printed(tmp_path, capfd, caplog):
    params = make_params()
    with caplog.at_level(logging.INFO):
        save_model(tmp_path / "model", CONFIG, params)
        load_model(tmp_path / "model")
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")
