"""The command `glmjax infill`."""

import json
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from glmjax.cli.models import Model, ModelFlags, opened_model

HELP = """Fills the blanks of texts with a trained model.

examples:
  glmjax infill --checkpoint runs/quickstart "The capital of France is [MASK]."
  glmjax infill --checkpoint runs/quickstart --temperature 0.8 --seed 1 "Return [MASK] of [MASK]."
  glmjax infill --checkpoint runs/quickstart "This function [gMASK]"
  glmjax infill --checkpoint glm-130b --num-beams 4 --ban 20068 "Paris is [MASK]."
  glmjax infill --checkpoint glm-130b-sat --quantize int4 "Paris is [MASK]."
  glmjax infill --checkpoint glm-10b --tokenizer gpt2-vocab.json "Paris is [MASK]."
  glmjax infill --checkpoint runs/quickstart --json < texts.txt"""


@dataclass(frozen=True)
class InfillFlags:
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts with blanks; without any, one from each line of standard input."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="DIR")] = "runs/quickstart"
    """A run folder, its checkpoints, a saved model or an official one, beside its vocabulary."""
    model: Model = field(default_factory=ModelFlags)
    """How it is opened."""
    max_new_tokens: int = 32
    """Longest filling of one blank, in tokens."""
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_k: int = 0
    """Draw among so many most probable tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities reach this sum."""
    seed: int = 0
    """The same seed and text give the same filling."""
    repetition_penalty: float = 1.0
    """Above 1 tokens that the text or the filling has already are less probable."""
    num_beams: int = 0
    """Search the filling of the highest probability among so many instead of drawing; 0: draw."""
    length_penalty: float = 1.0
    """With --num-beams: above 0 the log-probability of a long filling counts less."""
    no_repeat_ngram: int | None = None
    """A filling does not repeat so many tokens in a row; 0: it may. Default: 3 with --num-beams,
    else 0."""
    min_new_tokens: int = 0
    """A filling does not end before it has so many tokens."""
    ban: tuple[int, ...] = ()
    """Ids of tokens that no filling has."""
    json: bool = False
    """One JSON object for each text."""


def main(arguments: list[str]) -> int:
    flags = tyro.cli(InfillFlags, args=arguments, prog="glmjax infill", description=HELP)

    from glmjax.inference.infill import infill_text

    settings = _settings(flags)
    texts = list(flags.texts) or [line.rstrip("\n") for line in sys.stdin]
    with opened_model(flags.checkpoint, flags.model) as (config, params, tokenizer):
        filled = infill_text(config, params, tokenizer, texts, flags.max_new_tokens, settings)
    for text, result in zip(texts, filled, strict=True):
        print(json.dumps({"text": text, "filled": result}) if flags.json else result)
    return 0


def _settings(flags: InfillFlags) -> Any:
    """How fillings are drawn (`Sampling`) or searched (`BeamSearch`).

    Raises:
        ValueError: a flag is given that has no meaning for it.
    """
    from glmjax.inference.beam import BeamSearch
    from glmjax.inference.sampling import Sampling

    of_drawing = ("temperature", "top_k", "top_p", "seed", "repetition_penalty")
    of_search = ("num_beams", "length_penalty")
    is_search = flags.num_beams != 0
    kind: Any = BeamSearch if is_search else Sampling
    names, others = (of_search, of_drawing) if is_search else (of_drawing, of_search)
    for name in others:
        if getattr(flags, name) != getattr(InfillFlags, name):
            mode = "with" if is_search else "without"
            raise ValueError(f"--{name.replace('_', '-')} has no meaning {mode} --num-beams")
    settings = {name: getattr(flags, name) for name in names}
    if flags.no_repeat_ngram is not None:
        settings["no_repeat_ngram"] = flags.no_repeat_ngram
    return kind(**settings, min_new_tokens=flags.min_new_tokens, banned=flags.ban)
