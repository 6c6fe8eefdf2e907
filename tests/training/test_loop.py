"""A whole run: what it leaves behind, how it ends and how it goes on."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from glmjax.config import Experiment, config_from_json, replace
from glmjax.data.tokenizers import load_tokenizer
from glmjax.sharding import make_mesh
from glmjax.training import loop
from glmjax.training.checkpoint import Checkpoints
from glmjax.training.loop import TrainingError, fit
from glmjax.training.metrics import read_metrics
from glmjax.training.model_folder import load_model
from glmjax.training.step import TrainState, abstract_state

TIMING = ("tokens_per_second", "flops_per_second", "model_flops_utilisation")


def changed(experiment: Experiment, run: Path, **changes) -> Experiment:
    """The experiment in another run folder, with fields of `train` changed."""
    settings = {f"train.{name}": value for name, value in changes.items()}
    return replace(experiment, **{"train.run": str(run)}, **settings)


def saved_state(experiment: Experiment) -> tuple[int, TrainState]:
    """Step and state of the newest checkpoint of a run."""
    mesh = make_mesh(experiment.mesh)
    run = Path(experiment.train.run)
    with jax.set_mesh(mesh), Checkpoints(run / "checkpoints", keep=100) as checkpoints:
        found = checkpoints.restore_latest(abstract_state(experiment, mesh), experiment)
    assert found is not None
    return found


def assert_same_state(found: Experiment, expected: Experiment) -> None:
    """Bit for bit: parameters, moments and counters."""
    (step, state), (expected_step, expected_state) = map(saved_state, (found, expected))
    assert step == expected_step
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)


def rows_without_timing(experiment: Experiment) -> list[dict]:
    rows = read_metrics(Path(experiment.train.run) / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if k not in TIMING and not k.startswith("goodput/")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def trained(tiny_experiment, tiny_summary):
    return tiny_experiment


@pytest.fixture
def copied(trained, tmp_path):
    """The finished run, in a folder that a test may change."""
    shutil.copytree(trained.train.run, tmp_path / "run")
    return changed(trained, tmp_path / "run")


@pytest.fixture
def stop_at(monkeypatch):
    """Sends a signal to this process before a step."""

    def stop(step: int, number: signal.Signals) -> None:
        rate = loop.learning_rate

        def rate_or_signal(experiment: Experiment, current: int) -> float:
            if current == step:
                os.kill(os.getpid(), number)
            return rate(experiment, current)

        monkeypatch.setattr(loop, "learning_rate", rate_or_signal)

    return stop


def test_run_folder_describes_the_run(trained, tiny_summary):
    run = Path(trained.train.run)
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.json", "corpus.json", "goodput.jsonl", "loss.png", "metrics.jsonl",
        "summary.json", "tokenizer.model",
    ]  # fmt: skip
    assert config_from_json(Experiment, json.loads((run / "config.json").read_text())) == trained
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert load_tokenizer(run / "tokenizer.model").vocab_size == 512
    assert [int(p.name) for p in sorted((run / "checkpoints").iterdir())] == [40, 50, 60]

    summary = json.loads((run / "summary.json").read_text())
    assert summary == dataclasses.asdict(tiny_summary)
    assert {
        "steps", "tokens", "heldout_loss", "unigram_loss", "uniform_loss", "tokens_per_second",
        "seconds", "parameters",
    } <= summary.keys()  # fmt: skip
    assert (summary["steps"], summary["tokens"]) == (60, 60 * 8 * 64)
    assert summary["parameters"] == sum(x.size for x in jax.tree.leaves(load_model(run)[1]))
    assert summary["uniform_loss"] == pytest.approx(np.log(512))
    assert summary["tokens_per_second"] * summary["seconds"] == pytest.approx(summary["tokens"])


def test_metrics_have_a_row_for_every_interval(trained):
    rows = rows_without_timing(trained)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(5, 61, 5))
    assert [row["rows"] for row in training] == [8 * row["step"] for row in training]
    assert [row["step"] for row in rows if "heldout_loss" in row] == [20, 40, 60]
    assert training[1]["learning_rate"] == 1e-3
    assert {"loss/mask", "gradient_norm", "embedding_gradient_norm"} <= training[0].keys()
    assert all(row["embedding_gradient_norm"] < row["gradient_norm"] for row in training)
    assert all(row["skipped_steps"] == 0 for row in training)


def test_loss_falls(trained, tiny_summary):
    losses = [row["loss"] for row in rows_without_timing(trained) if "loss" in row]
    assert losses[-1] < losses[0] - 1
    assert tiny_summary.heldout_loss < tiny_summary.uniform_loss - 1.5
    heldout = [row["heldout_loss"] for row in rows_without_timing(trained) if "heldout_loss" in row]
    assert heldout[0] > heldout[1] > heldout[2] == tiny_summary.heldout_loss


def test_finished_run_started_again_stays_as_it_is(copied, tiny_summary):
    run = Path(copied.train.run)
    names = ("metrics.jsonl", "summary.json", "checkpoints/60/metadata.json")
    before = [(run / name).read_bytes() for name in names]
    summary = fit(copied)
    assert (summary.steps, summary.tokens) == (60, 60 * 8 * 64)
    assert summary.heldout_loss == tiny_summary.heldout_loss
    assert [(run / name).read_bytes() for name in names] == before


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_run_stopped_by_a_signal_goes_on_bit_for_bit(trained, tmp_path, stop_at, number):
    experiment = changed(trained, tmp_path / "run")
    handler = signal.getsignal(number)
    stop_at(23, number)
    stopped = fit(experiment)
    assert signal.getsignal(number) is handler
    assert (stopped.signal, stopped.steps, stopped.heldout_loss) == (number.name, 24, None)
    assert saved_state(experiment)[0] == 24

    finished = fit(experiment)
    assert (finished.signal, finished.steps) == (None, 60)
    assert_same_state(experiment, trained)
    # The interval of the stop, steps 21 to 25, has a line for its last step only.
    rows, expected = (
        [row for row in rows_without_timing(e) if row["step"] != 25] for e in (experiment, trained)
    )
    assert rows == expected


def test_resumed_run_writes_the_rows_of_the_uninterrupted_one(trained, copied):
    """From a checkpoint that no line of log_every ends at."""
    uneven = {"log_every": 4, "checkpoint_every": 10, "evaluate_every": 30, "keep_checkpoints": 9}
    whole = changed(trained, Path(copied.train.run).parent / "whole", **uneven)
    fit(whole)
    part = Path(copied.train.run).parent / "part"
    shutil.copytree(whole.train.run, part)
    for step in range(40, 61, 10):
        shutil.rmtree(part / "checkpoints" / str(step))
    fit(replace(whole, **{"train.run": str(part)}))
    assert rows_without_timing(replace(whole, **{"train.run": str(part)})) == rows_without_timing(
        whole
    )
    assert_same_state(whole, trained)


def test_longer_run_continues_a_finished_one(copied):
    summary = fit(replace(copied, **{"train.steps": 64}))
    assert (summary.steps, summary.tokens) == (64, 64 * 8 * 64)
    assert [row["step"] for row in rows_without_timing(copied)][-3:] == [60, 64, 64]


@pytest.fixture
def compiled():
    """The names of the programs that are compiled, or read from the cache on disk, meanwhile."""
    names: list[str] = []

    def listen(event: str, seconds: float, **attributes: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(attributes["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_run_of_another_length_and_folder_compiles_no_step_anew(copied, compiled):
    jax.clear_caches()
    fit(replace(copied, **{"train.steps": 61}))
    assert sum("train_step" in name for name in compiled) == 1
    compiled.clear()
    other = {"train.run": copied.train.run + "-other", "train.steps": 2, "train.log_every": 1}
    fit(replace(copied, **other))
    assert compiled and not any("train_step" in name for name in compiled)


def test_changed_configuration_is_refused(copied):
    run = Path(copied.train.run)
    before = (run / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"optimizer\.clip: 1\.0 -> 2\.0"):
        fit(replace(copied, **{"optimizer.clip": 2.0}))
    assert (run / "config.json").read_bytes() == before


def test_changed_text_is_refused(copied, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(copied.data.path[0], text)
    fit(replace(copied, **{"data.path": copied.data.path}))
    shutil.rmtree(Path(copied.train.run) / "checkpoints")
    (text / "0.txt").write_text((text / "1.txt").read_text() + " ka lo mir")
    with pytest.raises(ValueError, match=r"the text or the vocabulary of .* changed"):
        fit(replace(copied, **{"data.path": (str(text),)}))


def test_batch_that_the_devices_do_not_divide(trained, tmp_path):
    with pytest.raises(ValueError, match=r"the 8 devices .* do not divide a microbatch of 4 rows"):
        fit(changed(trained, tmp_path / "run", microbatch_size=4))
    assert not (tmp_path / "run").exists()


def test_too_many_skipped_steps_stop_the_run(trained, tmp_path, caplog):
    """With this ratio every gradient after the first one explodes."""
    experiment = changed(
        trained, tmp_path / "run", exploding_ratio=1e-3, max_skipped=7, checkpoint_every=2
    )
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(TrainingError, match=r"7 steps in a row up to step 7 .* is kept"),
    ):
        fit(experiment)
    skipped = [r.getMessage() for r in caplog.records if r.getMessage().startswith("skipped step")]
    assert len(skipped) == 7
    assert "skipped step 3 " in skipped[2]
    assert "rows 24 to 31;" in skipped[2]
    assert skipped[2].endswith("--data.skip 3:3")
    step, state = saved_state(experiment)
    assert (step, state.skipped, state.optimizer[0].count) == (6, 5, 1)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_interval_of_skipped_steps_has_no_loss(trained, tmp_path):
    experiment = changed(trained, tmp_path / "run", steps=4, exploding_ratio=1e-3, log_every=2)
    fit(experiment)
    first, second, _ = rows_without_timing(experiment)
    assert (first["skipped_steps"], second["skipped_steps"]) == (1, 2)
    assert "loss" in first and "loss" not in second


def test_ramp_grows_the_batch(trained, tmp_path):
    experiment = changed(
        trained, tmp_path / "run", steps=6, batch_size=32, ramp=(8, 8, 48), log_every=1
    )
    summary = fit(experiment)
    rows = [row["rows"] for row in rows_without_timing(experiment) if "rows" in row]
    # One increment of 8 for every 16 rows, seen by the step that begins after them.
    assert np.diff([0, *rows]).tolist() == [8, 8, 16, 24, 32, 32]
    assert summary.tokens == 120 * 64


@pytest.mark.parametrize(
    "begin",
    [pytest.param(0, id="whole", marks=pytest.mark.slow), pytest.param(3, id="resumed-inside")],
)
def test_profile_writes_a_trace(trained, tmp_path, begin):
    run = tmp_path / "run"
    if begin:
        fit(changed(trained, run, steps=begin))
    fit(changed(trained, run, steps=5, profile="2:4"))
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1


SMALL_DISK = """
import resource, sys
from glmjax.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(sys.argv[1:]))
"""


def test_full_disk_is_one_sentence_and_harms_nothing(copied, tmp_path, compiled_programs):
    """No file may exceed 100 kB, which stops a save as a full disk would."""
    file = tiny_run.write_experiment(tmp_path / "experiment.py", copied)
    result = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, "train", file, "--train.steps", "80"],
        capture_output=True, text=True, check=False,
        env=tiny_run.environment(JAX_COMPILATION_CACHE_DIR=str(compiled_programs)),
    )  # fmt: skip
    assert result.returncode == 1
    *progress, sentence = result.stderr.splitlines()
    assert sentence.startswith("glmjax train: could not save ")
    assert "File too large" in sentence and "what was saved before is unharmed" in sentence
    assert all(
        line.startswith(("attention: ", "continuing ", "from ", "step ")) for line in progress
    ), result.stderr
    run = Path(copied.train.run)
    # Writes under way when the save failed may leave something, which the next start clears away.
    with Checkpoints(run / "checkpoints", keep=3):
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["40", "50", "60"]
    assert saved_state(copied)[0] == 60
