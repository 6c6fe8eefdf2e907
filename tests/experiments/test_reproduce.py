"""The table of published numbers: that it says what is computed, and that a wrong number shows."""

import json
import re
from dataclasses import replace

import pytest
import tiny_run
from rich.console import Console

from experiments.reproduce import __main__ as program
from experiments.reproduce import report
from experiments.reproduce.number import VERDICTS, Number, agreement, values
from glmjax.training import metrics

RESULTS = tiny_run.REPOSITORY / "experiments" / "results"
DIFFERS = VERDICTS[3:6]


@pytest.fixture(scope="module")
def numbers() -> list[Number]:
    return program.all_numbers()


def number(published: str, ours, **fields) -> Number:
    return Number("topic", "name", published, ours, "", "how", "source", **fields)


@pytest.mark.parametrize(
    ("printed", "ours", "expected"),
    [
        ("768", 768, "equal"),
        ("4.0e-5", 4e-5, "equal"),
        ("768", 769, None),
        ("134.15", 134.146, "equal to rounding"),
        ("134.15", 134.156, None),
        ("1.3e11", 128_697_794_560, "equal to rounding"),
        ("1.30e11", 128_697_794_560, None),
        ("30 121", (30, 121), "equal"),
        ("30 121", (30, 122), None),
        ("30 121", (30,), None),
        ("3.8 0.5", (3.82, 0.46), "equal to rounding"),
        ("fits", "fits", "equal"),
        ("fits", "does not fit", None),
    ],
)
def test_agreement_follows_from_the_printed_digits(printed, ours, expected):
    assert agreement(printed, ours) == expected


def test_what_was_drawn_may_be_off_by_its_uncertainty():
    assert agreement("0.285", 0.2898, 0.005) == "within uncertainty"
    assert agreement("0.285", 0.2898, 0.004) is None


def test_an_explanation_excuses_one_value_alone():
    known = number("43.3", 42.9955, known="43.0", explanation="rounded")
    assert known.verdict == "differs, explained"
    assert replace(known, ours=42.9).verdict == "differs"
    assert replace(known, explanation="", question="why").verdict == "differs, open question"
    assert replace(known, ours=43.27).verdict == "equal to rounding"


def test_the_report_is_the_committed_one(tmp_path, capsys):
    assert program.main(["--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\d+ numbers, \d+ equal, \d+ to rounding, .* differ", shown)
    for name in ("reproduction.md", "reproduction.json"):
        assert (tmp_path / name).read_bytes() == (RESULTS / name).read_bytes(), (
            f"{name} is not what is committed: run python -m experiments.reproduce"
        )
    for name in report.FIGURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (RESULTS / name).is_file()


def test_every_number_has_its_origin(numbers):
    assert len({(each.topic, each.name) for each in numbers}) == len(numbers)
    for each in numbers:
        assert each.how and each.topic and (each.source or not each.published), each.name


def test_only_differences_have_reasons(numbers):
    """A reason must belong to a difference that is there, and differences have one reason each."""
    for each in numbers:
        reasons = bool(each.explanation) + bool(each.question)
        assert reasons == bool(each.known) == (each.verdict in DIFFERS), each.name


def test_every_wrong_number_shows(numbers):
    """Twice as much, or one more where that is the same, is never right, nor excused."""
    for each in numbers:
        if not each.published:
            continue
        if isinstance(each.ours, str):
            wrong = "of another kind"
        else:
            *others, last = values(each.ours)
            wrong = (*others, 2 * last + 1)
            wrong = wrong if others else wrong[0]
        assert replace(each, ours=wrong).verdict == "differs", each.name


def test_published_numbers_of_the_headlines_are_there(numbers):
    published = {each.published for each in numbers}
    assert {
        "9.1176e18", "134.15", "140.97", "43.3", "32.5", "3.8", "442.4", "257.01", "13744473856",
        "29360128", "957059072", "3.1572", "11.832159566199232", "128697794560", "3892920320",
        "0.634",
    } <= published  # fmt: skip


def test_a_number_that_differs_is_the_exit_status(monkeypatch, tmp_path, capsys, numbers):
    wrong = [number("3.8", 3.9), *numbers[:3]]
    monkeypatch.setattr(program, "all_numbers", lambda: wrong)
    monkeypatch.setattr(program.figures, "draw", lambda folder: None)
    assert program.main(["--out", str(tmp_path)]) == 1
    assert "1 for no known reason" in capsys.readouterr().out
    assert (
        "* name: published 3.8, ours 3.9; no reason is known."
        in (tmp_path / "reproduction.md").read_text()
    )


def test_the_numbers_come_from_the_library(monkeypatch):
    """With a wrong formula in the library the table is wrong."""
    right = {each.name: each.verdict for each in program.compute.numbers()}
    monkeypatch.setattr(
        program.compute, "flops", lambda *rest, **more: 1.01 * metrics.flops(*rest, **more)
    )
    wrong = {each.name: each.verdict for each in program.compute.numbers()}
    changed = {name for name in right if right[name] != wrong[name]}
    assert {"FLOPs of a step, 4224 rows", "rate at 4224 rows, from the formula"} <= changed
    assert {wrong[name] for name in changed} == {"differs"}


def test_json_has_what_the_table_has(numbers):
    found = json.loads(report.to_json(numbers))
    assert found["summary"] == report.summary(numbers)
    assert [row["verdict"] for row in found["numbers"]] == [each.verdict for each in numbers]
    row = next(row for row in found["numbers"] if row["published"] == "134.15")
    assert row["ours"] == pytest.approx(134.146, abs=1e-3)
    assert row["difference"] == pytest.approx(-0.004, abs=1e-3)


def test_the_terminal_shows_reasons(numbers, capsys):
    differing = [each for each in numbers if each.verdict in DIFFERS]
    report.show(differing, Console(width=300))
    shown = " ".join(capsys.readouterr().out.split())
    assert "explained:" in shown and "open question:" in shown
    assert f"{len(differing)} differ" in shown


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "all_numbers", list)
    (tmp_path / "file").write_text("")
    assert program.main(["--out", str(tmp_path / "file" / "folder")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("reproduce: ") and err.count("\n") == 1


def test_help(capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert "python -m experiments.reproduce --out" in capsys.readouterr().out
