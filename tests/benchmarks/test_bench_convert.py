"""The benchmark of conversions on tiny models."""

import json
import sys
from dataclasses import replace

import pytest

from glmjax.benchmarks import convert as bench
from glmjax.benchmarks.convert import Model, Step

pytest.importorskip("safetensors")

TINY = Model("chatglm-tiny", 2, None, (
    Step("hf"),
    Step("hf", "glmjax"),
    Step("glmjax", "again", ("--to", "hf"), there_and_back=True),
))  # fmt: skip


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "checkpoints.md"
    file.write_text(f"before\n\n{bench.BEGIN}\nan old table\n{bench.END}\n\nafter\n")
    return file


@pytest.mark.slow
def test_steps_are_measured_written_down_and_cleaned_up(document, tmp_path, capsys):
    results = tmp_path / "convert.json"
    (tmp_path / "disk").mkdir()
    found = bench.run(str(tmp_path / "disk"), [TINY], 10**7, results, document)
    assert json.loads(results.read_text()) == found
    assert not list((tmp_path / "disk").iterdir())
    (model,) = found["models"]
    load, there, back = model["steps"]
    assert load["source_bytes"] == there["source_bytes"] == back["source_bytes"]
    assert there["target_bytes"] >= there["source_bytes"]  # and the files beside the weights
    assert back["identical"]
    for step in (load, there, back):
        assert step["seconds"] > 0 and step["cpu_seconds"] > 0
        assert step["peak"] >= 50 * 2**20  # Python with jax takes more
        if sys.platform == "linux":
            assert 0 < step["anonymous"] <= step["peak"]
    bench.show(found)
    table = capsys.readouterr().out.strip()
    written = f"before\n\n{bench.BEGIN}\n\n{table}\n\n{bench.END}\n\nafter\n"
    assert document.read_text() == written


def test_ranks_without_data_are_a_model(tmp_path):
    pytest.importorskip("torch")
    model = Model("glm-130b-tiny", 2, 2, ())
    bench.make_source(model, tmp_path / "ranks")
    config = bench.open_source(tmp_path / "ranks").config
    assert replace(config, name="") == replace(model.config, name="")
    # Sparse: of the weights nothing is on the disk.
    for file in (tmp_path / "ranks" / "release").iterdir():
        assert file.stat().st_blocks * 512 < file.stat().st_size


def test_a_command_that_fails_says_why():
    command = [sys.executable, "-c", "import sys; sys.exit('the disk is full')"]
    with pytest.raises(RuntimeError, match="the disk is full"):
        bench.measure(command)


def test_memory_is_that_of_the_command():
    large, small = (
        bench.measure([sys.executable, "-c", f"import time; x = b'x' * {size}; time.sleep(0.3)"])
        for size in (300 * 2**20, 0)
    )
    assert large["peak"] - small["peak"] == pytest.approx(300 * 2**20, rel=0.05)
    if sys.platform == "linux":
        assert large["anonymous"] - small["anonymous"] == pytest.approx(300 * 2**20, rel=0.05)
        assert large["of_files"] < 50 * 2**20


def test_the_limit_is_two_layers_and_a_gigabyte():
    config = bench.get_config("chatglm-6b")
    shapes = bench.part_specs(config)
    layer = sum(bench.math.prod(spec.shape) for (_, n), spec in shapes.items() if n == 5)
    assert bench.memory_limit(config) == 4 * layer + 10**9
    assert layer == 201_379_840  # 12 x 4096 x 4096 and biases and norms
