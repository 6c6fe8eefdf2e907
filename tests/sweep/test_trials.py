"""What a sweep is: names, folders, and settings that make the same training."""

from pathlib import Path

import pytest

from glmjax.config import Experiment, replace
from glmjax.sweep.trials import Sweep, Trial, run_folder, settings_digest, vary


def say(results, stem):
    return ""


@pytest.mark.parametrize(
    "changes",
    [
        {"train.run": "elsewhere"},
        {"train.compilation_cache": "programs"},
        {"data.cache": "cache"},
        {"distributed.start_seconds": 9},
    ],
)
def test_where_a_training_runs_does_not_change_what_it_computes(changes):
    assert settings_digest(replace(Experiment(), **changes)) == settings_digest(Experiment())


@pytest.mark.parametrize(
    "changes",
    [
        {"train.seed": 1},
        {"model.norm": "deepnorm"},
        {"optimizer.beta2": 0.95},
        {"data.path": ("books",)},
        {"train.steps": 7},
        {"objective.decoder_noise": 0.1},
    ],
)
def test_every_other_setting_makes_another_training(changes):
    assert settings_digest(replace(Experiment(), **changes)) != settings_digest(Experiment())


def test_a_text_is_known_by_its_name_wherever_it_lies():
    here, there, other = (
        replace(Experiment(), **{"data.path": (path,)})
        for path in ("data/books", "/mnt/disk/books", "data/letters")
    )
    assert settings_digest(here) == settings_digest(there) != settings_digest(other)


def test_a_trial_trains_in_the_folder_that_another_sweep_gave_to_the_same_settings(tmp_path):
    first = Trial({"positions": "alibi"}, Experiment())
    second = Trial({"rate": 2e13}, Experiment())
    folder = run_folder(first, tmp_path)
    assert folder.name.startswith("positions-alibi-seed-0-")
    assert run_folder(second, tmp_path).name.startswith("rate-2e-13-seed-0-")
    folder.mkdir()
    assert run_folder(second, tmp_path) == folder
    other = Trial({"positions": "alibi"}, replace(Experiment(), **{"train.seed": 1}))
    assert run_folder(other, tmp_path) != folder


def test_vary_makes_every_variant_with_every_seed():
    trials = vary(Experiment(), {"pre": {}, "post": {"model.norm": "post"}}, factor="norm", seeds=2)
    assert [trial.name for trial in trials] == [
        "norm=pre seed=0", "norm=post seed=0", "norm=pre seed=1", "norm=post seed=1",
    ]  # fmt: skip
    assert [trial.experiment.model.norm for trial in trials] == ["pre", "post", "pre", "post"]
    assert [trial.experiment.train.seed for trial in trials] == [0, 0, 1, 1]


def test_two_trials_of_one_name_are_refused():
    trial = Trial({"norm": "pre"}, Experiment())
    with pytest.raises(ValueError, match="sweep norms has two trials norm=pre seed=0"):
        Sweep("norms", (trial, trial), say)
    with pytest.raises(ValueError, match="sweep norms has no trials"):
        Sweep("norms", (), say)


def test_a_sweep_file_that_was_never_run_has_new_folders():
    folder = run_folder(Trial({}, Experiment()), Path("nowhere"))
    assert folder == Path("nowhere") / f"seed-0-{settings_digest(Experiment())}"
