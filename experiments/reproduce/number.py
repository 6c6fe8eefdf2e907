"""A published number beside ours, and what comparing them says."""

import math
from dataclasses import dataclass
from decimal import Decimal

Value = float | str | tuple[float, ...]


@dataclass(frozen=True)
class Number:
    """One row of the table. Whether both agree is computed, never stated."""

    topic: str
    name: str
    published: str
    """As printed, because the last digit says how it was rounded: "134.15", "1.3e11". Several numbers
    have spaces between them; a word is one of a claim. Empty: nothing was published, and ours is an
    implication of numbers that were."""
    ours: Value
    unit: str
    how: str
    """How ours was obtained."""
    source: str
    """Of what was published."""
    uncertainty: float = 0.0
    """How far ours may be off: four standard errors where it was drawn at random, what is cut off where
    it was computed in float32."""
    known: str = ""
    """What ours is instead, as one would print it, where it is known to differ. Only this value is
    excused by `explanation` or `question`; any other one differs for no known reason."""
    explanation: str = ""
    """Why both differ."""
    question: str = ""
    """What is not understood about the difference."""

    @property
    def verdict(self) -> str:
        """One of VERDICTS."""
        if not self.published:
            return "implied"
        found = agreement(self.published, self.ours, self.uncertainty)
        if found is not None:
            return found
        if self.known and agreement(self.known, self.ours) is not None:
            return "differs, explained" if self.explanation else "differs, open question"
        return "differs"

    @property
    def difference(self) -> float | None:
        """Ours minus published; of several numbers the largest one. None for words and implications."""
        if not self.published or isinstance(self.ours, str):
            return None
        if self.verdict == "equal":
            return 0.0
        pairs = zip(values(self.ours), self.published.split(), strict=False)
        return max((stable(ours) - float(printed) for ours, printed in pairs), key=abs)


VERDICTS = (
    "equal", "equal to rounding", "within uncertainty", "differs, explained",
    "differs, open question", "differs", "implied",
)  # fmt: skip


def agreement(printed: str, ours: Value, uncertainty: float = 0.0) -> str | None:
    """How numbers or a word agree with what is printed: the first of VERDICTS that holds, or None.

    Rounding takes away up to half of the last digit that is printed.
    """
    if isinstance(ours, str):
        return "equal" if ours == printed else None
    words = printed.split()
    if len(words) != len(values(ours)):
        return None
    pairs = [(value, Decimal(word)) for value, word in zip(values(ours), words, strict=True)]
    if all(math.isclose(value, float(number), rel_tol=1e-12) for value, number in pairs):
        return "equal"
    beyond = max(abs(value - float(number)) - half_of_last_digit(number) for value, number in pairs)
    if beyond <= 0:
        return "equal to rounding"
    return "within uncertainty" if beyond <= uncertainty else None


def half_of_last_digit(number: Decimal) -> float:
    """The most that rounding to the printed digits takes away, with room for float64."""
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int), number
    return 0.5 * 10.0**exponent * (1 + 1e-9)


def values(value: float | tuple[float, ...]) -> tuple[float, ...]:
    """One number or several, as several."""
    return value if isinstance(value, tuple) else (value,)


def stable(value: float) -> float:
    """A float to ten digits, which are the same on every machine."""
    return float(f"{value:.10g}") if isinstance(value, float) else value
