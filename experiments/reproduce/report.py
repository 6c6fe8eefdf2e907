"""The table of numbers on a terminal, in Markdown and as JSON; what is open, and what is not here."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.reproduce.number import VERDICTS, Number, Value, stable, values

COLUMNS = {
    # name: share of the width of a terminal
    "number": 5, "published": 3, "ours": 3, "difference": 2, "verdict": 4,
    "how ours was obtained": 6, "source": 5,
}  # fmt: skip
STYLES = {"differs": "bold red", "differs, open question": "yellow", "differs, explained": "cyan"}
FIGURES = {
    "reproduction_int4_gap.png": "What 4 bits cost in LAMBADA, over size (as GLM-130B table 10)",
    "reproduction_lambada.png": "LAMBADA accuracy over size, GLM beside BLOOM",
    "reproduction_schedule.png": "Learning rate and batch of GLM-130B over training rows",
    "reproduction_memory.png": "Weights and cache of GLM-130B beside the memory of GPUs",
}
INTRODUCTION = """\
Written by `python -m experiments.reproduce`. Whether two numbers agree is computed from the digits that
were published: ours may differ by half of the last one. Where ours was drawn at random it may differ by
four standard errors more.

Not all that counts as published is printed in a paper. Exact counts of parameters and bytes follow from
the shapes in the official code, and are counted a second time from the specs of glmjax; learning rates,
test vectors and worked examples are what the official code gives; where a row compares what was drawn
with what was computed, its source says so. A row without a published value is an implication of numbers
that were published.
"""
OPEN = """\
* Where values get their smaller initial scale: THUDM/LargeScale writes it to the last third of the rows
  of each tensor-parallel shard, which are read as heads, so that queries, keys and values of a third of
  the heads got it. The paper says values; so do the numbers above.
* Rotary angles of GLM-130B: its training code kept frequencies and angles in float16, so that angles
  beyond 1024 are whole radians; SwissArmyTransformer's present file computes them in float32. Which one
  the released weights were evaluated with is not known.
* Rotary pairs of GLM-4: SwissArmyTransformer's chatglm4_model.py pairs halves, transformers and
  chatglm.cpp pair neighbours. Ours are neighbours.
* Query, key and value rows of ChatGLM-6B: SwissArmyTransformer's present chatglm_model.py splits into
  thirds a tensor that its own converter leaves per head. Ours are per head, as in Hugging Face's code.
* GELU of GLM 110M-10B: the tanh form in THUDM/GLM, the erf form in the Hugging Face port; they differ by
  up to 5e-4 (above). Ours is the tanh form.
* The loss scale's window: 2000 in GLM-130B table 11, 200 in its training script. Ours needs none.
* Special ids of ChatGLM-6B before April 2023: the pad id 20003 is inferred, its configuration has 0.
"""
"""What bears on numbers of the table and is none."""
NOT_COMPUTED = """\
* Anything that needs the weights of a published model: LAMBADA, MMLU, BIG-bench-lite, CLUE and FewCLUE,
  SuperGLUE, Winograd, question answering, GEM, CrowS-Pairs, StereoSet, perplexities on WikiText and PTB,
  and bits per byte of the single parts of the Pile. Only what follows from these scores is above.
* Anything that needs 400 billion tokens: losses, spikes, the effect of DeepNorm, of the embedding
  gradient's scale and of FP16 on stability, and the perplexities of the 110M ablations of position
  encodings and GeGLU (24.58, 24.14, 22.95, 22.31), which were trained on 50 GB of text.
* Seconds and out-of-memory results on GPUs (FasterTransformer, SwissArmyTransformer, BMInf): they depend
  on buffers of those programs. Only the bound by memory speed is above.
* The share of multi-task data that was seen (about 36%) and the sizes of its parts: the data was not
  published.
* The 15% more memory that BF16 with FP32 gradients takes: it depends on how stages of the pipeline share
  memory.
* P-tuning and fine-tuning results (ADGEN, SuperGLUE of GLM-130B), and their GPU memory.
* Sizes and checksums of vocabulary files, which are not part of glmjax;
  `tests/data/test_official_tokenizers.py` reads them where they are.
* The 30% of feature dimensions with outliers: it needs activations of the published model.
"""


def summary(numbers: Sequence[Number]) -> str:
    """How many numbers agree, in one line."""
    counts = Counter(number.verdict for number in numbers)
    explained, asked, plain = (counts[verdict] for verdict in VERDICTS[3:6])
    return (
        f"{len(numbers) - counts['implied']} numbers, {counts['equal']} equal, "
        f"{counts['equal to rounding']} to rounding, {counts['within uncertainty']} within "
        f"uncertainty, {explained + asked + plain} differ ({explained} explained, {asked} open "
        f"questions, {plain} for no known reason); {counts['implied']} implications besides"
    )


def show(numbers: Sequence[Number], console: Console) -> None:
    """Prints a table for each topic, and the summary."""
    for topic in topics(numbers):
        table = Table(title=topic, title_justify="left", expand=True)
        for column, share in COLUMNS.items():
            table.add_column(column, overflow="fold", ratio=share)
        for number in numbers:
            if number.topic == topic:
                cells = map(escape, _cells(number))
                table.add_row(*cells, style=STYLES.get(number.verdict))
        console.print(table)
    console.print(summary(numbers), highlight=False)


def topics(numbers: Sequence[Number]) -> list[str]:
    """All topics, in order."""
    return list(dict.fromkeys(number.topic for number in numbers))


def to_markdown(numbers: Sequence[Number]) -> str:
    """The report."""
    lines = ["# Published numbers and ours", "", INTRODUCTION, f"{summary(numbers)}."]
    for topic in topics(numbers):
        lines += ["", f"## {topic}", "", _row(list(COLUMNS)), _row(["---"] * len(COLUMNS))]
        lines += [_row(_cells(number)) for number in numbers if number.topic == topic]
    lines += ["", "## Figures", ""]
    lines += [f"![{caption}]({name})" for name, caption in FIGURES.items()]
    lines += ["", "## Open questions", ""]
    for number in numbers:
        if number.verdict in ("differs, open question", "differs"):
            published, ours = printed(number.published), shown(number.ours, number.published)
            reason = number.question or "no reason is known"
            lines.append(f"* {number.name}: published {published}, ours {ours}; {reason}.")
    return "\n".join([*lines, OPEN, "## Not computed here, and why", "", NOT_COMPUTED])


def to_json(numbers: Sequence[Number]) -> str:
    """All numbers with their verdicts."""

    def rounded(value: Any) -> Any:
        return [stable(each) for each in value] if isinstance(value, tuple) else stable(value)

    rows = [
        {name: rounded(value) for name, value in asdict(number).items()}
        | {"difference": rounded(number.difference), "verdict": number.verdict}
        for number in numbers
    ]
    return json.dumps({"summary": summary(numbers), "numbers": rows}, indent=1) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cells(number: Number) -> list[str]:
    verdict = number.verdict
    if verdict == "differs, explained":
        verdict = f"differs (explained: {number.explanation})"
    elif verdict == "differs, open question":
        verdict = f"differs (open question: {number.question})"
    difference = number.difference
    return [
        number.name, printed(number.published), shown(number.ours, number.published, number.unit),
        "" if difference is None else f"{difference:.2g}", verdict, number.how, number.source,
    ]  # fmt: skip


SHORT = 8
"""Numbers of a list that are shown; JSON has all."""


def printed(text: str) -> str:
    """What was published, with separators in large whole numbers."""
    words = [f"{int(word):,}" if word.isdecimal() else word for word in text.split()]
    if len(words) > SHORT and not any(word.isalpha() for word in words):
        words = [*words[:SHORT], f"... ({len(words)} numbers)"]
    return " ".join(words)


def shown(value: Value, published: str = "", unit: str = "") -> str:
    """Ours with one digit more than was published, at least six."""
    if isinstance(value, str):
        return value
    words = [
        _digits(each, published.split()[i] if published else "0")
        for i, each in enumerate(values(value)[:SHORT])
    ]
    if len(values(value)) > SHORT:
        words.append(f"... ({len(values(value))} numbers)")
    return f"{' '.join(words)} {unit}".strip()


def _digits(value: float, published: str) -> str:
    if isinstance(value, int) and abs(value) < 10**15:
        return f"{value:,}"
    digits = len(Decimal(published).as_tuple().digits) + 1
    return f"{value:.{min(max(6, digits), 15)}g}"
