"""The command `glmjax chat`."""

import importlib.util
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from glmjax.cli.models import Model, ModelFlags, opened_model
from glmjax.config import replace

HELP = """Talks with a model on the terminal.

ChatGLM-6B answers; GLM and GLM-130B continue what you write. In the chat /help lists the commands,
Alt-Enter or a \\ at the end of a line starts another line, Ctrl-C stops an answer, Ctrl-D leaves.
With --prompt, or when standard input is a file or a pipe, the whole of which is one question, only
the answer goes to standard output. Compiled programs are kept in ~/.cache/glmjax/compiled, so that
the next start is quicker.

examples:
  glmjax chat --checkpoint chatglm-6b
  glmjax chat --checkpoint chatglm-6b --quantize int4
  glmjax chat --checkpoint chatglm-6b --prefix ptuning/checkpoint-3000 --temperature 0
  glmjax chat --checkpoint chatglm-6b-int4 --prompt "Why is the sky blue?"
  glmjax chat --checkpoint chatglm-6b-int4 --json < question.txt"""


@dataclass(frozen=True)
class ChatFlags:
    checkpoint: Annotated[str, tyro.conf.arg(metavar="DIR")] = "chatglm-6b"
    """A folder of ChatGLM-6B, a run folder or any other model with its vocabulary."""
    model: Model = field(default_factory=ModelFlags)
    """How it is opened."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Answer this and end."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; without it 512, or half of the positions that the model has."""
    temperature: float = 0.95
    """0 takes the most probable token."""
    top_k: int = 0
    """Draw among so many most probable tokens; 0: all."""
    top_p: float = 0.7
    """Draw among the fewest tokens whose probabilities reach this sum."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that came before; 1: off."""
    seed: int = 0
    """The same seed and conversation give the same answer; /retry goes on to the next seed."""
    json: bool = False
    """One JSON object with the answer, its tokens and its speed."""


def main(arguments: list[str]) -> int:
    flags = tyro.cli(ChatFlags, args=arguments, prog="glmjax chat", description=HELP)

    logging.getLogger("glmjax").setLevel(logging.WARNING)
    from glmjax.inference.chat import Speaker, check_chats
    from glmjax.inference.sampling import Sampling

    sampling = Sampling(
        flags.temperature, flags.top_k, flags.top_p, flags.seed,
        repetition_penalty=flags.repetition_penalty,
    )  # fmt: skip
    question = flags.prompt
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().strip("\n")
    if question is None:
        _check_terminal(flags)

    with opened_model(flags.checkpoint, flags.model, check_chats) as (config, params, tokenizer):
        # Long conversations would need gigabytes in float32.
        config = replace(config, cache_dtype=config.cache_dtype or "bfloat16")
        most = flags.max_new_tokens
        speaker = Speaker(
            config, params, tokenizer, min(512, config.max_positions // 2) if most is None else most
        )
        if question is not None:
            return _answer_once(speaker, sampling, question, flags.json)

        from glmjax.cli.terminal import converse

        converse(speaker, sampling)
    return 0


def _check_terminal(flags: ChatFlags) -> None:
    if flags.json:
        raise ValueError("--json needs a --prompt or a question on standard input")
    if not sys.stdout.isatty():
        raise ValueError("standard output is no terminal; give a --prompt")
    if importlib.util.find_spec("prompt_toolkit") is None:
        raise ModuleNotFoundError(
            'a chat on the terminal needs prompt_toolkit: pip install "glmjax[chat]"'
        )


def _answer_once(speaker: Any, sampling: Any, question: str, as_json: bool) -> int:
    """Prints the answer while it is drawn, or everything about it at the end."""
    from glmjax.inference.chat import answer, make_prompt

    prompt = make_prompt(speaker, (), question)
    began = time.perf_counter()
    texts, first = list[str](), 0.0
    for piece in answer(speaker, prompt, sampling):
        first = first or time.perf_counter() - began
        texts.append(piece.text)
        if not as_json:
            print(piece.text, end="", flush=True)
    seconds = time.perf_counter() - began
    if not as_json:
        print()
        return 0
    record = {
        "prompt": question,
        "answer": "".join(texts),
        "end": piece.end,
        "prompt_tokens": len(prompt.ids),
        "tokens": piece.num_tokens,
        "seconds_to_first_token": round(first, 3),
        "seconds": round(seconds, 3),
    }
    print(json.dumps(record, ensure_ascii=False))
    return 0
