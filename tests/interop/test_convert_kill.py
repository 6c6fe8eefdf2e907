"""A conversion that is killed, or finds the disk full, leaves nothing that looks finished, and goes on."""

import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import glmjax
from glmjax.interop.convert import convert

# Each part is followed by a line of progress and a pause, so that there is time to be killed.
SLOW = """
import sys, time
from glmjax.interop.convert import convert

def progress(done, total):
    print(done, flush=True)
    time.sleep(0.005)

source, target, to, ranks = sys.argv[1:]
convert(source, target, to, ranks=int(ranks), progress=progress)
"""
SMALL_DISK = """
import resource, sys
from glmjax.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""
TARGETS = [
    pytest.param("hf", "1", id="hf", marks=pytest.mark.slow),
    pytest.param("ranks", "2", id="ranks", marks=pytest.mark.slow),  # PyTorch is slow to import
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of 24 layers, in the format of glmjax."""
    pytest.importorskip("safetensors")
    config = glmjax.get_config("glm-130b-tiny", num_layers=24)
    path = tmp_path_factory.mktemp("source") / "model"
    glmjax.save(path, config, glmjax.init(config, jax.random.key(0)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def assert_nothing_looks_finished(target: Path) -> None:
    assert not target.exists()
    with pytest.raises(FileNotFoundError):
        glmjax.load(target)
    unfinished = target.with_name(f"{target.name}.unfinished")
    weights = [file for file in unfinished.rglob("*") if file.suffix in (".pt", ".safetensors")]
    for path in (unfinished, *weights):
        with pytest.raises(ValueError, match=r"unfinished (is the beginning|holds no model)"):
            glmjax.load(path)


@pytest.mark.parametrize("to, ranks", TARGETS)
def test_a_conversion_that_is_killed_goes_on(to, ranks, source, tmp_path):
    if to == "ranks":
        pytest.importorskip("torch")
    target = tmp_path / "killed" / "model"
    generator = random.Random(0)
    command = [sys.executable, "-c", SLOW, str(source), str(target), to, ranks]
    before = 0
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        began = int(process.stdout.readline())
        assert began >= before  # what was whole is not written again
        for _ in range(generator.randrange(15, 60)):
            process.stdout.readline()
        time.sleep(generator.uniform(0, 0.01))
        process.kill()
        assert process.wait() == -9
        assert_nothing_looks_finished(target)
        before = began
    assert before > 0
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    convert(source, tmp_path / "whole" / "model", to, ranks=int(ranks))
    assert contents(target) == contents(tmp_path / "whole" / "model")
    assert not target.with_name("model.unfinished").exists()


@pytest.mark.parametrize("to, ranks", [pytest.param("glmjax", "1", id="glmjax"), *TARGETS])
def test_a_full_disk_is_one_error(to, ranks, source, tmp_path):
    if to == "ranks":
        pytest.importorskip("torch")
    target = tmp_path / "small" / "model"
    arguments = ["convert", str(source), str(target), "--to", to, "--ranks", ranks]
    command = [sys.executable, "-c", SMALL_DISK, "20000", *arguments]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"glmjax convert: could not save {target} (")
    assert ("RuntimeError" if to == "ranks" else "File too large") in last  # as PyTorch puts it
    assert_nothing_looks_finished(target)
    convert(source, target, to, ranks=int(ranks))
    convert(source, tmp_path / "whole" / "model", to, ranks=int(ranks))
    assert contents(target) == contents(tmp_path / "whole" / "model")


def test_the_remains_of_other_work_are_removed(source, tmp_path):
    def stop(done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "model", "hf", shard_bytes=10_000, progress=stop)
    assert len(list((tmp_path / "model.unfinished").glob("model-*.safetensors"))) > 2
    convert(source, tmp_path / "model", "hf")
    names = {"config.json", "model.safetensors"}
    assert {file.name for file in (tmp_path / "model").iterdir()} == names
