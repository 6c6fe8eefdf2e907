"""Where the time of a run went, over several starts."""

import json
import time
from pathlib import Path

import pytest

from glmjax.training.goodput import Ledger, seconds_spent


def start(step: int, time: float) -> dict:
    return {"step": step, "time": time, "run": "00" * 16}


def line(done: int, time: float, **seconds: float) -> dict:
    return {"step": done, "time": time, "seconds": seconds}


def test_time_of_one_start_is_what_its_lines_say():
    lines = [start(0, 0), line(5, 9, init=2, step=6, data=1), line(10, 14, step=5)]
    assert seconds_spent(lines) == {"init": 2, "step": 11, "data": 1}


@pytest.mark.parametrize(
    ("goes_on_from", "lost"), [(10, 0), (5, 5), (8, 2), (0, 12)],
    ids=["nothing", "a-line", "part-of-a-line", "everything"],
)  # fmt: skip
def test_steps_that_are_made_again_were_lost(goes_on_from, lost):
    lines = [
        start(0, 0), line(5, 9, init=2, step=6, data=1), line(10, 14, step=5),
        start(goes_on_from, 20),
    ]  # fmt: skip
    spent = seconds_spent(lines)
    assert spent.get("lost", 0) == lost
    assert spent.get("step", 0) + spent.get("data", 0) == 12 - lost
    assert spent["down"] == 6
    assert spent["init"] == 2
    assert sum(spent.values()) == 20


def test_a_later_start_makes_steps_of_all_before_it_again():
    lines = [
        start(0, 0), line(10, 10, step=10),
        start(8, 12), line(12, 14, step=2),
        start(4, 20),
    ]  # fmt: skip
    assert seconds_spent(lines) == {"step": 4, "lost": 8, "down": 8}


def test_start_that_wrote_no_line_was_down():
    assert seconds_spent([start(0, 0), start(0, 7)]) == {"down": 7}


def test_ledger_goes_on_over_starts_and_its_shares_make_up_the_whole(tmp_path: Path):
    path = tmp_path / "goodput.jsonl"
    first = Ledger(time.time() - 2, path)
    first.start(0)
    first.enter("step")
    with first.spending("data"):
        time.sleep(0.01)
    shares = first.note(5)
    assert set(shares) == {"init", "data", "step"}
    assert sum(shares.values()) == pytest.approx(1)
    with path.open("a") as file:
        file.write('{"step": 6, "ti')  # a crash

    second = Ledger(time.time(), path)
    assert second.run_id == first.run_id
    second.start(0)
    shares = second.note(0)
    assert set(shares) == {"init", "lost", "down"}
    assert shares["init"] > 0.9
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [row["step"] for row in lines] == [0, 5, 0, 0]


def test_ledger_of_another_process_writes_nothing(tmp_path: Path):
    ledger = Ledger(time.time(), None)
    ledger.start(0)
    assert set(ledger.note(1)) == {"init"}
