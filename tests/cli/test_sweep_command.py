"""The command `glmjax sweep`, as far as it goes without training."""

import pytest
import tiny_run

from glmjax import cli

SWEEP = '''"""Does it matter?

More words.
"""

from glmjax.config import Experiment, replace
from glmjax.sweep.trials import Sweep, Trial


def sweep(scale):
    steps = {"tiny": 10, "cpu": 20}[scale]
    trials = [Trial({"rate": 1e-3 * n}, replace(Experiment(), **{"train.steps": steps * n})) for n in (1, 2)]
    return Sweep("rates", tuple(trials), lambda results, stem: "It does not.")
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rates.py"
    path.write_text(SWEEP)
    return path


def test_list_shows_what_is_left(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    status, out, _ = tiny_run.run_main(
        capsys, "sweep", file, "--scale", "tiny", "--runs", tmp_path / "runs", "--list"
    )
    assert status == 0 and "rate=0.001" in out and "rate=0.002" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py"], "there is no sweep file absent.py"),
        (["FILE", "--trial", "2"], "--trial 2 is none of the trials 0 to 1 of rates"),
        (["FILE", "--jobs", "0"], "--jobs must be positive, got 0"),
        (["FILE", "--data", "absent"], "there is no absent"),
        (["FILE", "--report"], "there are no results"),
    ],
)
def test_mistakes_are_one_sentence(file, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    status, _, err = tiny_run.run_main(capsys, "sweep", *arguments, "--runs", tmp_path / "runs")
    assert status == 1 and message in err and len(err.splitlines()) == 1


def test_a_file_that_describes_no_sweep_is_named(tmp_path, capsys):
    (tmp_path / "other.py").write_text("def sweep(scale):\n    return 3\n")
    _, _, err = tiny_run.run_main(capsys, "sweep", tmp_path / "other.py")
    assert "other.py does not define sweep(scale) -> glmjax.sweep.trials.Sweep" in err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--help"])
    out = capsys.readouterr().out
    assert "glmjax sweep experiments/scaling.py --report" in out and "--scale" in out
