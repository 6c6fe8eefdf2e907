"""`glmjax compare` as a user types it."""

import json
import sys
from html.parser import HTMLParser

import pytest
import tiny_run
from PIL import Image
from run_folders import finished, write_lines, write_run
from terminals import Terminal

from glmjax.cli.compare import labels


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A run, a wider one that saw less, and one that has not logged a step, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    write_run(folder / "base", heldout={20: 5.5, 30: 4.25}, summary=finished(heldout_loss=4.25))
    write_run(folder / "wide", (6.0, 3.5), {20: 5.0}, **{"model.hidden_size": 96, "train.seed": 1})
    write_run(folder / "new", ())
    return folder


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


class Page(HTMLParser):
    """The cells of a page's tables, all of its text, and the addresses that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for name, v in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(data.strip())


def test_fields_results_and_curves_are_shown(capsys, runs):
    status, out, err = tiny_run.run_main(capsys, "compare", "runs/base", "runs/wide")
    assert (status, err) == (0, "")
    lines = words(out)
    assert ["field", "base", "wide"] in lines
    assert ["model.hidden_size", "64", "96"] in lines
    assert ["train.seed", "0", "1"] in lines
    assert "train.run" not in out
    assert ["run", "base", "wide"] in lines  # as columns, since rows would be too wide
    assert ["held-out", "loss", "4.250", "5.000", "(+0.750)"] in lines
    assert ["loss", "4.000", "3.500", "(-0.500)"] in lines
    assert ["tokens", "15.4K", "10.2K", "(-33%)"] in lines
    assert ["parameters", "149K", "248K", "(+66%)"] in lines
    assert ["seconds", "20", "20"] in lines
    # 15,360 tokens in 20 s of the loop; 10,240 in as many
    assert ["tokens/s", "768", "512", "(-33%)"] in lines
    assert ["state", "finished", "unfinished"] in lines
    assert ["heldout_loss"] in lines and ["loss"] in lines
    assert lines.count(["o", "base", "x", "wide"]) == 2
    plot = out[out.index("heldout_loss") :]
    assert plot.count("o") > 20 and plot.count("x") > 20
    assert max(map(len, out.splitlines())) <= 100


def test_places_are_compared_when_asked_for(capsys, runs):
    _, out, _ = tiny_run.run_main(capsys, "compare", "runs/base", "runs/wide", "--places")
    assert "train.run" in out


def test_curves_lie_where_they_belong(capsys, runs):
    """The first point is at the top left, the last at the bottom right."""
    _, out, _ = tiny_run.run_main(capsys, "compare", "runs/base", "runs/new", "--metric", "loss")
    plot = [line for line in out.splitlines() if "┤" in line or "│" in line]
    first, last = plot[0], plot[-1]
    assert first.startswith("6.0┤o") and last.startswith("4.0┤") and last.endswith("o│")
    assert "new has no loss" in out and "new has no heldout_loss" not in out


def test_what_changed_on_the_way_is_told(capsys, runs):
    line = {"step": 20, "changes": {"train.steps": [30, 40], "train.run": ["a", "b"]}}
    write_lines(runs / "wide/history.jsonl", [line])
    _, out, _ = tiny_run.run_main(capsys, "compare", "runs/base", "runs/wide")
    assert "wide: from step 20 on train.steps was 40, no longer 30\n" in out
    assert "no longer a" not in out


def test_other_text_is_told(capsys, runs):
    note = "wide has another text or vocabulary than base: losses may not compare\n"
    _, out, _ = tiny_run.run_main(capsys, "compare", "runs/base", "runs/wide", "--metric", "loss")
    assert note not in out
    (runs / "wide/corpus.json").write_text('{"rows": "1", "tokenizer": "2"}')
    _, out, _ = tiny_run.run_main(capsys, "compare", "runs/base", "runs/wide", "--metric", "loss")
    assert note in out


def test_equal_configurations_and_runs_without_a_step(capsys, runs):
    write_run(runs / "again", ())
    status, out, _ = tiny_run.run_main(capsys, "compare", "runs/new", "runs/again")
    assert status == 0
    assert "the configurations are the same" in out and "what differs" not in out
    assert ["new", "-", "-", "0/30", "0", "149K", "20", "-", "unfinished"] in words(out)


def test_many_runs_are_rows_of_both_tables(capsys, runs):
    paths = [write_run(runs / f"seed{i}", **{"train.seed": 100 + i}) for i in range(20)]
    _, out, _ = tiny_run.run_main(capsys, "compare", *paths)
    lines = words(out)
    assert ["field", "train.seed"] in lines and ["seed19", "119"] in lines
    assert max(map(len, out.splitlines())) <= 100


def test_json_has_everything(capsys, runs):
    status, out, _ = tiny_run.run_main(
        capsys, "compare", "runs/base", "runs/wide", "--x", "tokens", "--smooth", "2", "--json"
    )
    assert status == 0
    values = json.loads(out)
    assert values["differences"] == {"model.hidden_size": [64, 96], "train.seed": [0, 1]}
    assert values["runs"]["base"] == {
        "path": "runs/base", "state": "finished", "step": 30, "steps": 30, "heldout_loss": 4.25,
        "loss": 4.0, "tokens": 15360, "parameters": 149376, "seconds": 20.0,
        "tokens_per_second": 768.0,
    }  # fmt: skip
    assert values["runs"]["wide"]["tokens_per_second"] == 512
    assert values["curves"]["loss"] == {
        "base": {"tokens": [5120, 10240, 15360], "loss": [6.0, 5.5, 4.5]},
        "wide": {"tokens": [5120, 10240], "loss": [6.0, 4.75]},
    }
    assert values["curves"]["heldout_loss"]["wide"] == {"tokens": [10240], "heldout_loss": [5.0]}


def test_a_picture_and_a_page_are_written(capsys, runs):
    write_run(runs / "<b>&$x$", (5.0, 4.0))
    status, out, err = tiny_run.run_main(
        capsys, "compare", "runs/base", "runs/<b>&$x$", "--png", "curves.png",
        "--html", "page.html", "--smooth", "3",
    )  # fmt: skip
    assert status == 0 and "results" in out
    assert err == "wrote curves.png\nwrote page.html\n"
    assert Image.open("curves.png").size == (960, 960)
    text = (runs.parent / "page.html").read_text("utf-8")
    page = Page(text)
    assert page.text.count("<b>&$x$") == 2  # in the table and in the legend of its loss
    assert {"4.250", "4.000", "heldout_loss", "step", "149K"} <= set(page.text)
    assert "a point of a curve is the mean of 3 that follow each other" in page.text
    assert page.tags.count("svg") == 1 and page.tags.count("table") == 1
    assert not {"script", "link", "img", "iframe", "image", "b"} & set(page.tags)
    assert all(address.startswith("#") for address in page.addresses)
    assert "@media (prefers-color-scheme: dark)" in text and "currentColor" in text


def test_a_terminal_gets_colours_and_its_width(runs):
    command = [sys.executable, "-m", "glmjax", "compare", "runs/base", "runs/wide"]
    with Terminal(command, tiny_run.environment(TERM="xterm-256color")) as terminal:
        assert terminal.wait_for_end() == 0
    assert "━━ base  ━━ wide" in terminal.shown
    assert any("⠀" < character <= "⣿" for character in terminal.shown)
    lines = terminal.shown.splitlines()
    assert max(map(len, lines)) == 100
    piped = tiny_run.glmjax("compare", *command[4:], TERM="xterm-256color")
    assert piped.returncode == 0 and "\x1b" not in piped.stdout
    assert "o base  x wide" in piped.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name two run folders or more, got 0"),
        (["runs/base"], "name two run folders or more, got 1"),
        (["runs/base", "nowhere"], "there is no folder nowhere"),
        (["runs/base", "runs"], "runs is no run folder: it has no config.json"),
        (["runs/base", "./runs/base/"], "./runs/base/ is named twice"),
        (["runs/base", "runs/wide", "--metric", "los"], "no metric 'los'; the nearest are loss"),
        (["runs/base", "runs/wide", "--smooth", "0"], "--smooth takes a number of points from 1"),
        (["runs/base", "runs/wide", "--x", "hours"], "hours"),
        (["runs/new", "runs/idle", "--png", "a.png"], "nothing to draw in a.png"),
        (["runs/base", "runs/wide", "--png", "nowhere/a.png"], "nowhere/a.png"),
        (["runs/base", "runs/wide", "--png", "a.xyz"], "Format 'xyz' is not supported"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_explained(capsys, runs, arguments, sentence):
    write_run(runs / "idle", ())
    status, out, err = tiny_run.run_main(capsys, "compare", *arguments)
    assert status in (1, 2) and out == ""
    assert sentence in " ".join(err.replace("│", " ").split())


def test_help_has_examples(capsys):
    status, out, _ = tiny_run.run_main(capsys, "compare", "--help")
    assert status == 0
    assert "glmjax compare runs/base runs/deepnorm" in out and "--html comparison.html" in out


def test_labels_tell_runs_apart():
    assert labels(["runs/a", "runs/b"]) == ["a", "b"]
    assert labels(["x/a/seed0", "x/b/seed0"]) == ["a/seed0", "b/seed0"]
    assert labels(["runs/a", "runs/a/b"]) == ["a", "a/b"]
