"""The chat on a terminal: what is typed, what is shown, and the commands."""

import json
import os
import resource
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from glmjax.cli.markdown import render, split_finished
from glmjax.data.cache import write_whole
from glmjax.inference.chat import Prompt, Round, Speaker, answer, make_prompt
from glmjax.inference.generate import SHORTEST, bucket, cache_tokens
from glmjax.inference.sampling import Sampling


class Measured(NamedTuple):
    """What an answer took."""

    prompt_tokens: int
    new_tokens: int
    first_seconds: float
    """Until the first token, compilation included."""
    seconds: float
    """In all."""

    @property
    def speed(self) -> float:
        """Tokens per second behind the first."""
        return (self.new_tokens - 1) / max(self.seconds - self.first_seconds, 1e-9)


@dataclass(frozen=True)
class Talk:
    """A conversation at one moment."""

    seed: int
    rounds: tuple[Round, ...] = ()
    last: Measured | None = None
    buckets: frozenset[int] = frozenset()
    """Lengths of prompts for which programs are compiled."""


def converse(speaker: Speaker, sampling: Sampling) -> None:
    """Talks until Ctrl-D, /quit, or Ctrl-C where nothing is typed."""
    console = Console(highlight=False)
    session = _input()
    talk = Talk(sampling.seed)
    _say(console, f"{speaker.config.name}: write something, or /help")
    while True:
        try:
            line = session.prompt("> ")
        except (EOFError, KeyboardInterrupt):
            return
        name, _, argument = line.strip().partition(" ")
        if name == "/quit":
            return
        try:
            if line.startswith("/"):
                if name not in COMMANDS:
                    raise ValueError(f"there is no command {name}; /help lists them")
                talk = COMMANDS[name].run(console, speaker, sampling, talk, argument.strip())
            elif name:
                talk = reply(console, speaker, sampling, talk, line)
        except (ValueError, OSError) as error:
            console.print(str(error), style="red", markup=False)


def reply(
    console: Console, speaker: Speaker, sampling: Sampling, talk: Talk, question: str
) -> Talk:
    """Shows the answer to a question while it is drawn; the talk goes on with both.

    Ctrl-C ends the answer, of which stays what was said.
    """
    prompt = make_prompt(speaker, talk.rounds, question)
    if prompt.dropped:
        _say(console, f"no room for the whole conversation; rounds left out: {prompt.dropped}")
    size = bucket(len(prompt.ids) - 1, SHORTEST)
    waiting = f"reading {len(prompt.ids)} tokens"
    if size not in talk.buckets:
        waiting = f"preparing programs for questions of up to {size + 1} tokens"

    text, measured = _show(console, speaker, replace(sampling, seed=talk.seed), prompt, waiting)
    rounds = (*talk.rounds, Round(question, text)) if text else talk.rounds
    return replace(talk, rounds=rounds, last=measured, buckets=talk.buckets | {size})


def _show(
    console: Console, speaker: Speaker, sampling: Sampling, prompt: Prompt, waiting: str
) -> tuple[str, Measured]:
    """The text of an answer, which has been shown."""
    began = time.perf_counter()
    text, first, num_tokens, end = "", None, 0, None
    spinner = Spinner("dots", Text(waiting, style="dim"))
    # Finished blocks go above the live region, which holds the last block and is wiped at the end.
    with (
        _listening_for_stop() as is_stopped,
        Live(spinner, console=console, transient=True, refresh_per_second=10) as live,
    ):
        unfinished = ""
        for piece in answer(speaker, prompt, sampling, is_stopped):
            first = first or time.perf_counter() - began
            num_tokens, end = piece.num_tokens, piece.end
            text += piece.text
            blocks, unfinished = split_finished(unfinished + piece.text)
            for block in blocks:
                console.print(render(console, block), "")
            if unfinished:
                live.update(render(console, unfinished, height=max(1, console.height - 2)))
    if unfinished:
        console.print(render(console, unfinished))
    if end == "stopped":
        _say(console, "stopped")
    elif end == "length":
        _say(console, f"cut off after {num_tokens} tokens, the most that --max-new-tokens allows")
    elif not text:
        _say(console, "(no answer)")
    console.print()
    seconds = time.perf_counter() - began
    return text, Measured(len(prompt.ids), num_tokens, first or seconds, seconds)


class Command(NamedTuple):
    run: Callable[[Console, Speaker, Sampling, Talk, str], Talk]
    usage: str
    help: str


def _help(console: Console, speaker: Speaker, sampling: Sampling, talk: Talk, _: str) -> Talk:
    table = Table.grid(padding=(0, 2))
    for command in COMMANDS.values():
        table.add_row(command.usage, command.help)
    table.add_row("/quit", "leave; also Ctrl-D, and Ctrl-C where nothing is typed")
    table.add_row("Alt-Enter", "another line; also \\ at the end of one")
    table.add_row("Ctrl-C", "stop the answer, or forget what is typed")
    console.print(table, "")
    return talk


def _clear(console: Console, speaker: Speaker, sampling: Sampling, talk: Talk, _: str) -> Talk:
    _say(console, "the conversation starts anew")
    return replace(talk, rounds=())


def _retry(console: Console, speaker: Speaker, sampling: Sampling, talk: Talk, _: str) -> Talk:
    if not talk.rounds:
        raise ValueError("there is no question yet to answer again")
    *rounds, last = talk.rounds
    again = replace(talk, rounds=tuple(rounds), seed=talk.seed + 1)
    return reply(console, speaker, sampling, again, last.question)


def _save(console: Console, speaker: Speaker, sampling: Sampling, talk: Talk, name: str) -> Talk:
    if not name:
        raise ValueError("say where: /save FILE")
    rounds = [round._asdict() for round in talk.rounds]
    content = json.dumps(rounds, ensure_ascii=False, indent=1) + "\n"
    write_whole(Path(name).expanduser(), content.encode())
    _say(console, f"the conversation is in {name}")
    return talk


def _load(console: Console, speaker: Speaker, sampling: Sampling, talk: Talk, name: str) -> Talk:
    if not name:
        raise ValueError("say from where: /load FILE")
    rounds = read_rounds(Path(name).expanduser())
    _say(console, f"the conversation goes on from {name}, rounds so far: {len(rounds)}")
    return replace(talk, rounds=rounds)


def read_rounds(file: Path) -> tuple[Round, ...]:
    """The conversation that /save wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        rounds = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        rounds = None
    fields = set(Round._fields)
    if type(rounds) is not list or not all(
        type(row) is dict and set(row) == fields and all(type(row[name]) is str for name in fields)
        for row in rounds
    ):
        raise ValueError(f"{file} is no conversation that /save wrote")
    return tuple(Round(**row) for row in rounds)


def _stats(console: Console, speaker: Speaker, sampling: Sampling, talk: Talk, _: str) -> Talk:
    table = Table.grid(padding=(0, 2))
    if talk.last is not None:
        last = talk.last
        slots = cache_tokens(speaker.config, last.prompt_tokens - 1, speaker.max_new_tokens)
        filled = speaker.config.prefix_length + last.prompt_tokens + last.new_tokens - 1
        table.add_row("tokens per second", f"{last.speed:.2f} behind the first")
        table.add_row("first token after", f"{last.first_seconds:.2f} s")
        table.add_row("tokens", f"{last.prompt_tokens} of the prompt, {last.new_tokens} new")
        table.add_row("cache", f"{filled:,} of {slots:,} slots filled")
    table.add_row("rounds", str(len(talk.rounds)))
    table.add_row("memory", memory())
    console.print(table, "")
    return talk


def memory() -> str:
    """The most memory that was used so far: of the device where it counts, else of the process."""
    used = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in used:
        return f"{used['peak_bytes_in_use'] / 1e9:.2f} GB on the device at most"
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{most / 1e9:.2f} GB at most"


COMMANDS = {
    "/help": Command(_help, "/help", "this"),
    "/clear": Command(_clear, "/clear", "forget the conversation"),
    "/retry": Command(_retry, "/retry", "answer the last question again, with the next seed"),
    "/save": Command(_save, "/save FILE", "write the conversation as JSON"),
    "/load": Command(_load, "/load FILE", "go on with a saved conversation"),
    "/stats": Command(_stats, "/stats", "speed, cache and memory of the last answer"),
}


def _say(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False)


def _input() -> PromptSession[str]:
    """Reads what is typed, of several lines if need be, and remembers it for the next start."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    home = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    file = home / "glmjax" / "chat_history"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    return PromptSession(
        history=FileHistory(str(file)),
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        completer=WordCompleter([*COMMANDS, "/quit"], sentence=True),
        complete_style=CompleteStyle.READLINE_LIKE,
        complete_while_typing=False,
    )


@contextmanager
def _listening_for_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; nothing else that is typed meanwhile shows."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    settings: list[Any] = termios.tcgetattr(sys.stdin)
    silent = [*settings[:3], settings[3] & ~termios.ECHO, *settings[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield stopped.is_set
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
        signal.signal(signal.SIGINT, before)
