"""`glmjax plan` as a user types it, with plans made up instead of compiled."""

import json

import pytest
import tiny_run
from plans import GIB, make_experiment, make_plan

import glmjax.planning.plan
import glmjax.planning.search
from glmjax.config import Quantization
from glmjax.planning.programs import Serving
from glmjax.planning.search import Found
from glmjax.presets import get_config, list_configs


@pytest.fixture(scope="module")
def experiment_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return tiny_run.write_experiment(folder / "small.py", make_experiment(batch_size=64))


@pytest.fixture
def planned(monkeypatch):
    """What was asked for; the answer can be set."""
    asked = {"answer": make_plan(needed=20.0), "prefill": make_plan(job="prefill"), "jobs": []}

    def plan(experiment, topology, job="train", serving=None):
        asked.update(experiment=experiment, topology=topology, serving=serving)
        asked["jobs"].append(job)
        return asked["prefill" if job == "prefill" else "answer"]

    monkeypatch.setattr(glmjax.planning.plan, "plan", plan)
    return asked


def test_the_answer_comes_first(capsys, experiment_file, planned):
    status, out, _ = tiny_run.run_main(capsys, "plan", experiment_file, "--topology", "v5p:2x2x1")
    assert status == 0
    assert out.startswith(
        "It fits: glm-130b on v5p:2x2x1, 4 chips. A device needs 20.0 of 95.0 GiB"
    )
    for shown in ("6 x bf16[70,1,2048,12288]", "1.250 times as many", "all-gather", "data x fsdp",
                  "25.0%", "chip-hours", "Estimated, not measured: estimates are not calibrated."):  # fmt: skip
        assert shown in out


def test_what_does_not_fit_says_by_how_much(capsys, experiment_file, planned):
    planned["answer"] = make_plan(needed=120.0, seconds=None)
    status, out, _ = tiny_run.run_main(capsys, "plan", experiment_file, "--topology", "v5p:2x2x1")
    assert status == 0
    assert out.startswith("It does not fit: glm-130b on v5p:2x2x1")
    assert "25.0 GiB more than the 95.0 GiB it has" in out
    assert "chip-hours" not in out


def test_json_is_one_object(capsys, experiment_file, planned):
    status, out, _ = tiny_run.run_main(
        capsys,
        "plan",
        experiment_file,
        "--topology",
        "v5p:2x2x1",
        "--json",
        "--model.remat",
        "none",
    )
    values = json.loads(out)
    assert status == 0 and out.count("\n") == 1
    assert values["fits"] and values["margin"] == 75 * GIB
    assert values["memory"]["contributors"][0]["bytes"] == 3 * GIB
    assert values["communication"][0]["axes"] == ["fsdp"]
    assert values["estimate"]["utilisation"] == 0.25
    assert values["command"] == f"glmjax train {experiment_file} --model.remat none"


def test_flags_of_train_are_flags_of_plan(capsys, experiment_file, planned):
    tiny_run.run_main(
        capsys, "plan", experiment_file, "--topology", "v6e:2x4", "--slices", "2",
        "--mesh.data", "4", "--mesh.tensor", "4", "--mesh.fsdp", "1", "--train.batch-size", "32",
    )  # fmt: skip
    assert (planned["topology"].name, planned["topology"].num_slices) == ("v6e:2x4", 2)
    assert planned["experiment"].mesh.tensor == 4
    assert planned["experiment"].train.batch_size == 32


def test_a_mesh_for_other_devices_is_arranged_unless_one_is_given(capsys, experiment_file, planned):
    _, out, _ = tiny_run.run_main(capsys, "plan", experiment_file, "--topology", "v5p:2x2x2")
    assert planned["experiment"].mesh.fsdp == 4
    assert "--mesh.fsdp 4" in out
    tiny_run.run_main(
        capsys, "plan", experiment_file, "--topology", "v5p:2x2x2", "--mesh.fsdp", "3"
    )
    assert planned["experiment"].mesh.fsdp == 3


def test_serving_has_its_own_flags(capsys, experiment_file, planned):
    planned["answer"] = make_plan(job="decode", rows=8, cache="bfloat16")
    _, out, _ = tiny_run.run_main(
        capsys, "plan", experiment_file, "--topology", "v5p:2x2x1", "--job", "decode",
        "--batch", "8", "--length", "1024", "--prompt", "256", "--quantize", "int4",
    )  # fmt: skip
    assert planned["jobs"] == ["decode", "prefill"]
    assert planned["serving"] == Serving(8, 1024, 256)
    assert planned["experiment"].model.quantization == Quantization(4)
    assert planned["experiment"].mesh.tensor == 4
    assert "a token of every row" in out and "ms at least" in out


def test_the_step_that_needs_more_decides(capsys, experiment_file, planned):
    arguments = "plan", experiment_file, "--topology", "v5p:2x2x1", "--job", "decode"
    planned["answer"] = make_plan(20.0, job="decode", rows=8, cache="bfloat16")
    planned["prefill"] = make_plan(30.0, seconds=0.125, job="prefill", prompt=256)
    _, out, _ = tiny_run.run_main(capsys, *arguments)
    assert "A device needs 30.0 of 95.0 GiB" in out
    assert "4 at a time, up to 256 tokens" in out and "125 ms" in out
    _, out, _ = tiny_run.run_main(capsys, *arguments, "--json")
    values = json.loads(out)
    assert values["fits"] and values["memory"]["arguments"] == GIB
    assert values["prefill"]["prompt"] == 256 and values["prefill"]["margin"] == 65 * GIB
    planned["prefill"] = make_plan(100.0, seconds=None, job="prefill", prompt=256)
    assert tiny_run.run_main(capsys, *arguments)[1].startswith("It does not fit")
    assert not json.loads(tiny_run.run_main(capsys, *arguments, "--json")[1])["fits"]


@pytest.mark.parametrize("name", list_configs())
def test_a_published_model_needs_no_experiment(name, capsys, planned):
    planned["answer"] = make_plan(job="decode", rows=1, cache="bfloat16")
    status, _, _ = tiny_run.run_main(
        capsys, "plan", name, "--topology", "v5e:1x1", "--job", "decode", "--batch", "1"
    )
    assert status == 0
    assert planned["experiment"].model == get_config(name, dtype="bfloat16")
    assert (planned["topology"].chips, planned["experiment"].mesh.tensor) == (1, 1)


@pytest.mark.parametrize("arguments", [("chatglm-6b",), ("file", "--quantize", "int8")])
def test_what_is_for_serving_alone(arguments, capsys, experiment_file, planned):
    name, *others = (experiment_file if x == "file" else x for x in arguments)
    status, _, err = tiny_run.run_main(capsys, "plan", name, "--topology", "v5p:2x2x1", *others)
    assert status == 1 and "are for --job decode" in err
    assert planned["jobs"] == []


@pytest.mark.parametrize(
    "arguments",
    [("--topology", "v5p:2x2x1", "--search"), ("--chips", "4", "--generation", "v5p")],
    ids=["search", "chips"],
)
def test_a_search_shows_what_fits_and_the_best(capsys, experiment_file, monkeypatch, arguments):
    def search(experiment, topology, most, report):
        report("12 candidates")
        assert topology.name == "v5p:2x2x1"
        return [Found(experiment, make_plan(seconds=s)) for s in (1.0, 2.0)]

    monkeypatch.setattr(glmjax.planning.search, "search", search)
    status, out, err = tiny_run.run_main(capsys, "plan", experiment_file, *arguments)
    assert status == 0
    assert "12 candidates" in err
    assert "the fastest first" in out and "50.0%" in out and "It fits" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give a --topology, or --chips and a --generation"),
        (("--chips", "4"), "give a --topology, or --chips and a --generation"),
        (("--topology", "v5p:2x2x1", "--chips", "8"), "give a --topology, or --chips"),
        (("--topology", "v5p:2x2"), "a slice of v5p has 3 sides"),
        (("--topology", "v8:2x2"), "no TPU generation 'v8'"),
        (("--chips", "13", "--generation", "v5e"), "no slices of v5e have 13 chips"),
        (("--topology", "v5p:2x2x1", "--mesh.fsdp", "3"), "does not fit 4 devices"),
        (("--topology", "v5p:2x2x1", "--search", "--job", "decode"), "--search is for training"),
        (("--topology", "v5p:2x2x1", "--batch", "0"), "batch must be positive, got 0"),
        (
            ("--topology", "v5p:2x2x1", "--length", "128", "--prompt", "256"),
            "a prompt of 256 tokens does not fit a cache of 128",
        ),
    ],
    ids=[
        "nothing",
        "half",
        "both",
        "sides",
        "generation",
        "chips",
        "mesh",
        "search for serving",
        "no rows",
        "long prompt",
    ],
)
def test_mistakes_are_one_sentence(capsys, experiment_file, arguments, sentence):
    status, out, err = tiny_run.run_main(capsys, "plan", experiment_file, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("glmjax plan: ") and sentence in err
    assert err.count("\n") == 1


def test_without_libtpu_it_says_what_to_install(capsys, experiment_file, monkeypatch, tmp_path):
    monkeypatch.setattr("glmjax.planning.topologies.find_spec", lambda name: None)
    status, _, err = tiny_run.run_main(
        capsys, "plan", experiment_file, "--topology", "v5p:2x2x1", "--data.cache", tmp_path
    )
    assert status == 1
    assert (
        err == 'glmjax plan: compiling for absent TPUs needs libtpu: pip install "glmjax[plan]"\n'
    )


def test_help_has_examples(capsys):
    status, out, _ = tiny_run.run_main(capsys, "plan", "--help")
    assert status == 0
    assert "glmjax plan experiments/glm_130b.py --topology v5p:8x8x16" in out
    assert "--mesh.tensor" in out
