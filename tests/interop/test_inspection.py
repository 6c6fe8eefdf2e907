"""`glmjax inspect`: what it says of each format, right or wrong."""

import io
import json
import shutil

import jax
import pytest
from golden_cases import GOLDEN
from rich.console import Console
from safetensors.numpy import load_file, save_file

import glmjax
from glmjax.cli import main
from glmjax.interop.inspection import inspect, show

CASES = [
    ("glm", "Hugging Face", "glm of another size", 229_888, None),
    ("glm130b", "Hugging Face", "glm-130b of another size", 218_816, None),
    ("chatglm6b_small", "Hugging Face", "chatglm-6b of another size", 220_544, None),
    ("glm/mp2", "tensor-parallel ranks", "glm of another size", 229_888, None),
    ("glm130b/mp4", "tensor-parallel ranks", "glm-130b of another size", 218_816, None),
    ("glm130b/mp2_int4", "tensor-parallel ranks", "glm-130b of another size", 218_816,
     "int4, 2 scales a row of split inputs"),
]  # fmt: skip


def shown(report) -> str:
    console = Console(file=io.StringIO(), width=120)
    show(report, console)
    return console.file.getvalue()


@pytest.mark.parametrize("case, form, model, parameters, quantization", CASES)
def test_official_checkpoints(case, form, model, parameters, quantization):
    if "mp" in case.split("/")[-1]:
        pytest.importorskip("torch")
    report = inspect(GOLDEN / case)
    assert (report.format, report.model, report.parameters) == (form, model, parameters)
    assert (report.quantization, report.problems) == (quantization, [])
    assert sum(report.dtypes.values()) == report.tensors
    assert report.config["hidden_size"] == 64
    assert f"{parameters:,}" in shown(report)


def test_a_model_of_our_own(tmp_path):
    config = glmjax.get_config("glm-tiny")
    glmjax.save(tmp_path / "model", config, glmjax.init(config, jax.random.key(0)))
    report = inspect(tmp_path / "model")
    assert (report.format, report.model) == ("glmjax (orbax)", "glm-tiny")
    assert report.parameters == glmjax.count_params(config)
    assert report.bytes == 4 * report.parameters


def test_a_prefix(tmp_path):
    tensors = load_file(GOLDEN / "chatglm6b_ptuning" / "model.safetensors")
    held = {name: x for name, x in tensors.items() if "prefix_encoder" in name}
    save_file(held, tmp_path / "model.safetensors")
    report = inspect(tmp_path)
    assert (report.model, report.prefix_length) == ("P-tuning v2 prefix", 6)
    assert report.parameters == 6 * 3 * 2 * 48


def test_problems_are_listed_and_set_the_status(tmp_path, capsys):
    shutil.copy(GOLDEN / "glm" / "config.json", tmp_path)
    tensors = load_file(GOLDEN / "glm" / "model.safetensors")
    del tensors["transformer.layers.1.mlp.dense_4h_to_h.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    problem = "missing: transformer.layers.1.mlp.dense_4h_to_h.bias [64]"
    assert inspect(tmp_path).problems == [problem]
    assert main(["inspect", str(tmp_path)]) == 1
    assert problem in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [problem]


def test_the_command_on_a_good_checkpoint(capsys):
    assert main(["inspect", str(GOLDEN / "glm"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 229_888 and report["dtypes"] == {"float16": 53}


def test_nothing_there_is_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("glmjax inspect: there is no ")


def test_checksums_are_verified(tmp_path, capsys):
    shutil.copytree(GOLDEN / "glm", tmp_path / "model")
    (tmp_path / "model" / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert main(["inspect", str(tmp_path / "model"), "--verify"]) == 1
    assert "config.json has SHA-256" in capsys.readouterr().err


def test_the_convert_command(tmp_path, capsys):
    target = tmp_path / "model"
    assert main(["convert", str(GOLDEN / "glm130b"), str(target), "--quantize", "int4"]) == 0
    config, _ = glmjax.load(target)
    assert config.quantization.bits == 4
    assert main(["convert", str(GOLDEN / "glm"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    capsys.readouterr()
    assert main(["convert", str(GOLDEN / "glm"), str(tmp_path / "hf"), "--to", "hf"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"glmjax convert: {tmp_path / 'hf'} exists; not overwriting it"
