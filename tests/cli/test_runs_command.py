"""`glmjax runs` as a user types it."""

import json
import os
import sys

import pytest
import tiny_run
from run_folders import finished, write_run
from terminals import Terminal

from glmjax.cli.runs import format_number


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three runs and a broken one, in runs/ of the current folder; base was written last."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    write_run(folder / "base", heldout={20: 5.5}, summary=finished(heldout_loss=4.25))
    write_run(folder / "wide/half", (6.0, 3.5), {20: 5.0}, **{"model.hidden_size": 96})
    write_run(folder / "spike", (6.0, None))
    (folder / "broken").mkdir()
    (folder / "broken/metrics.jsonl").write_text("")
    for age, name in enumerate(("base", "wide/half", "spike")):
        os.utime(folder / name / "metrics.jsonl", (1.7e9 - age, 1.7e9 - age))
    return folder


def names(capsys, *arguments) -> list[str]:
    status, out, _ = tiny_run.run_main(capsys, "runs", *arguments, "--json")
    assert status == 0
    return [run["path"] for run in json.loads(out)]


def test_a_run_is_a_line_the_newest_first(capsys, runs):
    status, out, err = tiny_run.run_main(capsys, "runs")
    assert (status, err) == (0, "")
    header, base, half, spike, broken = out.splitlines()
    assert header.split() == [
        "run", "parameters", "step", "tokens", "loss", "held-out", "tokens/s", "state", "written",
    ]  # fmt: skip
    assert base.split()[:8] == [
        "runs/base", "149K", "30/30", "15.4K", "4.000", "4.250", "768", "finished",
    ]  # fmt: skip
    assert base.split()[-3].isdigit() and base.split()[-2:] == ["d", "ago"]
    assert half.split()[:8] == [
        "runs/wide/half", "248K", "20/30", "10.2K", "3.500", "5.000", "1.00K", "unfinished",
    ]  # fmt: skip
    assert spike.split()[2:8] == ["20/30", "10.2K", "6.000", "-", "1.00K", "diverged"]
    assert broken == "runs/broken is no run folder: it has no config.json"


def test_the_terminal_decides_on_columns_and_colours(runs):
    command = [sys.executable, "-m", "glmjax", "runs"]
    with Terminal(command, tiny_run.environment(TERM="xterm-256color")) as terminal:
        assert terminal.wait_for_end() == 0
    header, *lines = terminal.shown.splitlines()
    assert all(len(line) <= 100 for line in [header, *lines])
    assert "held-out" in header and "state" in header
    assert [line.split("runs/")[1].split()[0] for line in lines] == [
        "base", "wide/half", "spike", "broken",
    ]  # fmt: skip
    piped = tiny_run.glmjax("runs", TERM="xterm-256color", COLUMNS="20")
    assert piped.returncode == 0 and "\x1b" not in piped.stdout
    assert len(piped.stdout.splitlines()) == 5 and "parameters" in piped.stdout


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("run", ["base", "broken", "spike", "wide/half"]),
        ("loss", ["wide/half", "base", "spike", "broken"]),
        ("heldout_loss", ["base", "wide/half", "spike", "broken"]),
        ("tokens", ["base", "wide/half", "spike", "broken"]),
        ("parameters", ["wide/half", "base", "spike", "broken"]),
        ("tokens_per_second", ["wide/half", "spike", "base", "broken"]),
        ("written", ["base", "wide/half", "spike", "broken"]),
    ],
)
def test_sorting_puts_what_is_not_known_last(capsys, runs, column, expected):
    assert names(capsys, "--sort", column) == [f"runs/{name}" for name in expected]


def test_names_are_filtered_and_folders_joined(capsys, runs):
    assert names(capsys, "--filter", "half") == ["runs/wide/half"]
    assert names(capsys, "runs/spike", "runs/wide") == ["runs/wide/half", "runs/spike"]
    assert names(capsys, "runs/wide", "runs/wide/half") == ["runs/wide/half"]
    status, out, _ = tiny_run.run_main(capsys, "runs", "--filter", "[x]")
    assert (status, out) == (0, "there is no run with '[x]' in its name in runs\n")


def test_json_has_exact_numbers_and_what_is_wrong(capsys, runs):
    _, out, _ = tiny_run.run_main(capsys, "runs", "--json")
    base, _, spike, broken = json.loads(out)
    assert base == {
        "path": "runs/base", "parameters": 149376, "step": 30, "steps": 30, "tokens": 15360,
        "loss": 4.0, "heldout_loss": 4.25, "tokens_per_second": 768.0, "state": "finished",
        "written": "2023-11-14T22:13:20+00:00", "problem": None,
    }  # fmt: skip
    assert spike["heldout_loss"] is None and spike["state"] == "diverged"
    assert broken["problem"] == "runs/broken is no run folder: it has no config.json"
    assert broken["step"] is None


def test_mistakes_are_explained(capsys, runs):
    assert tiny_run.run_main(capsys, "runs", "nowhere")[::2] == (
        1, "glmjax runs: there is no folder nowhere\n",
    )  # fmt: skip
    status, _, err = tiny_run.run_main(capsys, "runs", "--sort", "speed")
    assert status == 2 and "speed" in err and "tokens_per_second" in err


def test_help_has_examples(capsys):
    status, out, _ = tiny_run.run_main(capsys, "runs", "--help")
    assert status == 0
    assert "glmjax runs --filter deepnorm" in out and "--sort heldout_loss" in out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0"), (7.951, "7.95"), (60, "60"), (999, "999"), (999.6, "1.00K"),
        (149376, "149K"), (2_664_960, "2.66M"), (128_697_794_560, "129B"), (4e11, "400B"),
        (9.999e11, "1.00T"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert format_number(value) == text
