"""Conversations: a question goes in, and its answer comes out piece by piece while it is drawn.

ChatGLM-6B reads the rounds so far in its official layout. The other models were trained to continue
texts, so to them a conversation is one text, which their answers continue.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import jax

from glmjax.config import GLMConfig, SpecialTokens
from glmjax.data.chat import chat_prompt, settled, tidy_answer
from glmjax.inference.generate import stream
from glmjax.inference.prompts import special_tokens
from glmjax.inference.sampling import Sampling
from glmjax.model.params import Params


class Tokenizer(Protocol):
    """Text to ids and back, such as `glmjax.data.tokenizers.Tokenizer`."""

    @property
    def special_tokens(self) -> SpecialTokens: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...


class Round(NamedTuple):
    """A question and its answer. A conversation is a tuple of these."""

    question: str
    answer: str


@dataclass(frozen=True, eq=False, repr=False)
class Speaker:
    """A model that answers, each time with at most max_new_tokens.

    Raises:
        ValueError: it cannot: its vocabulary is another or cannot be read, or max_new_tokens leaves
            no room for a question.
    """

    config: GLMConfig
    params: Params
    tokenizer: Tokenizer
    max_new_tokens: int

    def __post_init__(self) -> None:
        config, longest = self.config, self.config.max_positions
        check_chats(config)
        if self.tokenizer.special_tokens != config.special_tokens:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.special_tokens}, but model {config.name!r} has "
                f"{config.special_tokens}"
            )
        if not 0 < self.max_new_tokens < longest:
            raise ValueError(
                f"max_new_tokens must be in [1, {longest}), since {config.name!r} has {longest} "
                f"positions; got {self.max_new_tokens}"
            )

    @property
    def tidy(self) -> Callable[[str], str]:
        """What the official code does to a decoded answer."""
        return tidy_answer if self.config.positions == "rope_2d" else str


class Prompt(NamedTuple):
    """A conversation that waits for its next answer, as token ids."""

    ids: list[int]
    dropped: int
    """Rounds at its beginning for which there was no room."""


class Piece(NamedTuple):
    """What is new of an answer; the texts of all pieces are the answer."""

    text: str
    num_tokens: int
    """Tokens of the answer so far, those included whose text is still held back."""
    end: Literal["done", "length", "stopped"] | None
    """Why this piece is the last one; None: it is not."""


def check_chats(config: GLMConfig) -> None:
    """Checks that glmjax reads the vocabulary of a model.

    Raises:
        ValueError: it does not.
    """
    if config.positions == "rope_half":
        raise ValueError(
            f"{config.name!r} cannot chat here: glmjax does not read the vocabularies of ChatGLM2-6B "
            "and its successors"
        )


def make_prompt(speaker: Speaker, rounds: Sequence[Round], question: str) -> Prompt:
    """The prompt of a question after some rounds, of which the first ones give way if need be.

    Raises:
        ValueError: the question is empty, holds a blank, or alone is too long.
    """
    if not question.strip():
        raise ValueError("the question is empty")
    room = speaker.config.max_positions - speaker.max_new_tokens
    for dropped in range(len(rounds) + 1):
        ids = _lay_out(speaker, rounds[dropped:], question)
        if len(ids) <= room:
            return Prompt(ids, dropped)
    raise ValueError(
        f"the question has {len(ids)} tokens; with max_new_tokens = {speaker.max_new_tokens} the "
        f"{speaker.config.max_positions} positions of {speaker.config.name!r} leave room for {room}"
    )


def _lay_out(speaker: Speaker, rounds: Sequence[Round], question: str) -> list[int]:
    tokens, encode = special_tokens(speaker.config), speaker.tokenizer.encode
    blank = tokens.mask if tokens.gmask is None else tokens.gmask
    if speaker.config.positions == "rope_2d":
        return [*encode(chat_prompt(question, rounds)), blank, tokens.sop]
    ids = encode("\n".join(["".join(round) for round in rounds] + [question]))
    if not {*tokens.masks, tokens.sop}.isdisjoint(ids):
        raise ValueError("the text holds a blank, which `glmjax infill` fills")
    if speaker.config.positions == "learned_2d":
        ids = ids if tokens.cls is None else [tokens.cls, *ids]
    closing = [] if blank == tokens.gmask else [tokens.eos]
    return [*ids, blank, *closing, tokens.sop]


def answer(
    speaker: Speaker,
    prompt: Prompt,
    sampling: Sampling,
    is_stopped: Callable[[], bool] = lambda: False,
    steps: int | None = None,
) -> Iterator[Piece]:
    """The answer to a prompt, while it is drawn.

    A piece comes after every `steps` tokens, which is also how often `is_stopped` is asked; None: 1
    on CPUs, where a token takes long, and 8 on accelerators. A text never ends inside a character,
    and what was given is never taken back: marks whose width the next character decides wait for it.
    """
    if steps is None:
        steps = 1 if jax.default_backend() == "cpu" else 8
    ids: list[int] = []
    shown = ""
    end: Literal["done", "length", "stopped"] = "done"
    limit = speaker.max_new_tokens
    for new in stream(speaker.config, speaker.params, prompt.ids, limit, sampling, steps):
        ids += new
        if is_stopped():
            end = "stopped"
            break
        text = speaker.tidy(settled(speaker.tokenizer.decode(ids)))
        yield Piece(text[len(shown) :], len(ids), None)
        shown = text
    if end == "done" and len(ids) == limit:
        end = "length"
    yield Piece(answer_text(speaker, ids)[len(shown) :], len(ids), end)


def answer_text(speaker: Speaker, ids: Sequence[int]) -> str:
    """The text of a whole answer, without a character at its end of which bytes are missing."""
    return speaker.tidy(speaker.tokenizer.decode(ids).rstrip("\ufffd"))
