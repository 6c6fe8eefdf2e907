"""The published training runs: what follows from their values, and that such runs train."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from glmjax.cli import main
from glmjax.cli.experiments import load_experiment
from glmjax.config import Experiment, replace
from glmjax.data.blanks import OBJECTIVES, make_batch
from glmjax.data.ramp import batch_sizes, rows_before
from glmjax.model.params import count_params
from glmjax.presets import TRAINED_TOKENS
from glmjax.training.loop import fit
from glmjax.training.metrics import flops, read_metrics
from glmjax.training.schedule import embedding_gradient_scale, learning_rate, warm_up_and_decay

FOLDER = tiny_run.REPOSITORY / "experiments"
RECIPES = (
    "glm_base.py", "glm_large.py", "glm_2b.py", "glm_10b.py", "glm_10b.py:longer", "glm_130b.py",
    "glm_130b.py:as_it_happened",
)  # fmt: skip
CHIPS = {"glm_base": 16, "glm_large": 16, "glm_2b": 64, "glm_10b": 64, "glm_130b": 1024}
"""The slice of each docstring."""


def recipe(name: str) -> Experiment:
    return load_experiment(FOLDER / name)


@pytest.fixture(params=RECIPES)
def name(request) -> str:
    return request.param


def test_every_recipe_is_in_the_table(name):
    assert f"`{name.partition(':')[0]}`" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("glm_base.py", 109_338_624),
        ("glm_large.py", 334_688_256),
        ("glm_2b.py", 1_920_122_880),
        ("glm_10b.py", 9_880_682_496),
        ("glm_130b.py", 128_697_794_560),
    ],
)
def test_parameter_counts_are_the_published_models(name, parameters):
    assert count_params(recipe(name).model) == parameters


def test_microbatches_are_spread_evenly_over_the_slice(name):
    experiment = recipe(name)
    mesh, train = experiment.mesh, experiment.train
    fixed = math.prod(n for n in (mesh.data, mesh.fsdp, mesh.tensor) if n != -1)
    chips = CHIPS[name.partition(".")[0]]
    left = chips // fixed
    assert fixed * left == chips
    rows = math.prod(left if n == -1 else n for n in (mesh.data, mesh.fsdp))
    assert train.microbatch_size % rows == train.batch_size % train.microbatch_size == 0


def test_the_batch_of_glm_130b_grows_as_published():
    """168 increments of 24 rows, one every 32,697 rows, over 2.5% of 450 billion tokens."""
    train = recipe("glm_130b.py").train
    _, _, rows = train.ramp
    sizes = batch_sizes(train)
    assert sizes == list(range(192, 4225, 24)) and len(sizes) - 1 == 168
    assert rows // 168 == 32_697
    assert rows == 450 * 10**9 // 2048 * 25 // 1000
    assert rows_before(train, train.steps) * 2048 == pytest.approx(400e9, rel=2e-3)


@pytest.mark.parametrize(
    ("rows", "rate"),
    [
        (0, 0.0),
        (549_316, 4.0e-5),
        (1_098_632, 8.0e-5),
        (50_000_000, 6.956234817e-5),
        (99_426_268, 4.4e-5),
        (197_753_905, 8e-6),
        (219_726_562, 8e-6),
    ],
)
def test_learning_rate_of_glm_130b_by_rows(rows, rate):
    config = recipe("glm_130b.py").optimizer
    assert config.schedule_unit == "samples"
    assert warm_up_and_decay(config, rows) == pytest.approx(rate, rel=1e-8)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("glm_base.py", {3000: 2e-4, 6000: 4e-4, 63_000: 2.1e-4, 120_000: 2e-5, 150_000: 2e-5}),
        ("glm_large.py", {4000: 1e-4, 8000: 2e-4, 84_000: 1.05e-4, 160_000: 1e-5, 200_000: 1e-5}),
        ("glm_2b.py", {7000: 1e-4, 91_000: 5.5e-5, 175_000: 1e-5, 250_000: 1e-5}),
        ("glm_10b.py", {7000: 1e-4, 91_000: 5.5e-5, 175_000: 1e-5, 250_000: 1e-5}),
        ("glm_10b.py:longer", {250: 3e-5, 25_125: 1.65e-5, 50_000: 3e-6}),
    ],
)
def test_learning_rates_by_steps(name, rates):
    """The n-th step takes the rate of position n of the original schedules."""
    experiment = recipe(name)
    assert experiment.train.steps >= max(rates)
    found = {n: learning_rate(experiment, n - 1) for n in rates}
    assert found == pytest.approx(rates)


def test_flops_of_glm_130b_are_those_it_reports():
    """Its log: 134 TFLOP/s a GPU at 88.5 s a step, and 141 at 122.5 s with 6144 rows, on 768 GPUs."""
    experiment = recipe("glm_130b.py")
    length = experiment.data.sequence_length
    per_step = flops(experiment.model, experiment.train.batch_size, length, recompute=True)
    assert per_step == pytest.approx(9.1176e18, rel=1e-5)
    assert per_step / 88.5 / 768 == pytest.approx(134.15e12, rel=1e-4)
    larger = flops(experiment.model, 6144, length, recompute=True)
    assert larger / 122.5 / 768 == pytest.approx(140.97e12, rel=1e-4)


def test_what_happened_to_glm_130b():
    planned, happened = recipe("glm_130b.py"), recipe("glm_130b.py:as_it_happened")
    scales = {0: 0.1, 6250: 0.55, 20_000: 1.0, 22_800: 0.2, 33_000: 1.0, 34_000: 0.5, 49_299: 0.1}
    found = {step: embedding_gradient_scale(happened, step) for step in scales}
    assert found == pytest.approx(scales)
    assert {embedding_gradient_scale(planned, step) for step in scales} == {0.1}

    def shrunk(step):
        return learning_rate(happened, step) / learning_rate(planned, step)

    assert shrunk(25_999) == 1
    # Half of what lies above the minimum, which stays.
    assert 0.5 < shrunk(26_000) < 0.6
    assert shrunk(42_699) > 0.8 and shrunk(42_700) == pytest.approx(0.5)


def test_what_happened_can_be_said_on_the_command_line(monkeypatch):
    """The commands of docs/loss_spikes.md."""
    asked = []

    def stop(experiment, _began):
        asked.append(experiment)
        raise KeyboardInterrupt

    monkeypatch.setattr("glmjax.training.loop.fit", stop)
    flags = (tiny_run.REPOSITORY / "docs" / "loss_spikes.md").read_text()
    flags = flags.split("## What GLM-130B did")[1].split("```")[1]
    words = flags.replace("\\\n", " ").split()
    assert words[:3] == ["glmjax", "train", "experiments/glm_130b.py"]
    assert main(["train", str(FOLDER / "glm_130b.py"), *words[3:]]) == 130
    assert asked == [recipe("glm_130b.py:as_it_happened")]


def test_help_needs_no_data(capsys):
    with pytest.raises(SystemExit):
        main(["train", str(FOLDER / "glm_130b.py"), "--help"])
    assert "5493164" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "absent"),
    [
        ("glm_130b.py", "data/pile, data/wudao, data/chinese-web, data/multitask, .*ice_text.model"),
        ("glm_base.py", "data/wikipedia, data/bookscorpus, data/bert-base-uncased-vocab.txt"),
    ],
)  # fmt: skip
def test_training_without_the_data_names_it(capsys, monkeypatch, tmp_path, file, absent):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(FOLDER / file)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(f"there is no {absent}; put the data there or name your own with", err)
    assert not any(tmp_path.iterdir())


def test_rows_of_real_length_keep_within_the_position_tables(name):
    """Text has as many positions as tokens; part B repeats them (or, in 1d, counts on)."""
    experiment = recipe(name)
    model, data = experiment.model, experiment.data
    rng, rows = np.random.default_rng(0), 8
    texts = list(rng.integers(200, 30_000, (rows, data.text_length), dtype=np.int32))
    pairs = [(text[:50], text[50:60]) for text in texts]
    seen = set()
    for step in range(24):
        batch = make_batch(
            texts, experiment.objective, model.special_tokens,
            sequence_length=data.sequence_length, seed=1, step=step,
            row_indices=range(step * rows, (step + 1) * rows),
            is_sentence_end_V=np.arange(model.vocab_size) % 25 == 0,
            pairs=pairs if experiment.objective.multitask else None,
        )  # fmt: skip
        assert batch.tokens_BT.shape == (rows, data.sequence_length)
        assert 0 < batch.positions_B2T.max() <= model.max_positions
        assert (batch.weights_BT.sum(1) > 0).all()
        seen |= {OBJECTIVES[i] for i in batch.objective_B}
    expected = {"130": {"mask", "gmask", "multitask"}, "10b": {"mask", "smask", "gmask"}}
    expected["2b"] = expected["10b"]
    kinds = [kinds for key, kinds in expected.items() if key in name]
    assert seen == (kinds[0] if kinds else {"mask"})


def shrunk(experiment: Experiment, folder: Path) -> Experiment:
    """The same kind of run in miniature: 8 steps of at most 8 rows of 96 tokens on 8 devices."""
    model, train = experiment.model, experiment.train
    changes: dict[str, object] = {
        "model.dtype": "float32",  # XLA aborts on sums of bfloat16 over CPU devices
        "model.num_layers": 2, "model.hidden_size": 64, "model.num_heads": 4,
        "model.ffn_size": 176 if model.ffn == "geglu" else 256, "model.vocab_size": 512,
        "model.max_positions": 128, "model.special_tokens": TRAINED_TOKENS,
        "data.path": (str(folder / "text"),), "data.weights": (), "data.tokenizer": None,
        "data.vocab_size": 512, "data.text_length": 64, "data.sequence_length": 96,
        "data.cache": str(folder / "cache"), "data.skip": (),
        "optimizer.warmup": 4, "optimizer.decay": 32, "optimizer.learning_rate": 1e-3,
        "mesh.data": -1, "mesh.fsdp": 4, "mesh.tensor": 2,
        "train.run": str(folder / "run"), "train.steps": 8, "train.batch_size": 8,
        "train.microbatch_size": 4, "train.ramp": train.ramp and (4, 2, 12),
        "train.log_every": 1, "train.evaluate_every": 8, "train.evaluate_batches": 2,
    }  # fmt: skip
    if experiment.objective.multitask:
        changes["data.multitask"] = (str(folder / "pairs.jsonl"),)
    return replace(experiment, **changes)


@pytest.mark.parametrize(
    "name",
    [
        "glm_130b.py",
        *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name != "glm_130b.py"),
    ],
)
def test_miniature_trains(name, tmp_path, compiled_programs):
    tiny_run.write_text(tmp_path / "text")
    pairs = [{"text": f"{i} kalo mirten", "target": f"suar {i}"} for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    experiment = shrunk(recipe(name), tmp_path)
    summary = fit(experiment)
    assert (summary.steps, summary.signal) == (8, None)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 8 and all(row["skipped_steps"] == 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    sizes = np.diff([0, *(row["rows"] for row in rows)])
    assert sizes.tolist() == ([4, 4, 6] if experiment.train.ramp else [8] * 3) + [8] * 5
