"""How often the loops of a scheduled HLO module repeat.

The compiler drops the trip counts that it knows, so they are read off again: where the counter
starts, what a round adds to it (collective matrix products do two steps in one) and what the
condition compares it with. A limit may be a constant that an outer loop carries along.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from glmjax.planning.hlo_text import (
    Computation,
    Instruction,
    Module,
    called_computations,
    dimensions,
)

_CONSTANT = -1


@dataclass(frozen=True)
class _Linear:
    """A scalar of a loop: one element of the loop's tuple, or none, plus a constant."""

    element: int
    offset: int

    def __add__(self, other: "_Linear") -> "_Linear":
        return _Linear(max(self.element, other.element), self.offset + other.offset)


def known_trips(
    module: Module, computation: Computation, at: Instruction, carry: Mapping[int, int]
) -> tuple[float | None, int | None, dict[int, int]]:
    """Trip count of a while loop if it is known, which element of its tuple counts, and the
    elements that are constants throughout.

    Args:
        module: All computations.
        computation: The one that holds the loop.
        at: The loop.
        carry: Constants among the tuple that `computation` itself is the body of a loop over.
    """
    body = module.computations[at.called("body")]
    *_, root = body.values()
    start: dict[int, int] = {}
    step: dict[int, int] = {}
    begin = computation[at.operands[0]]
    for element, (first, last) in enumerate(zip(begin.operands, root.operands, strict=False)):
        if not re.match(r"[su]\d+\[\]", body[last].shape):
            continue
        before, after = _scalar(module, computation, first), _scalar(module, body, last)
        if before and (before.element == _CONSTANT or before.element in carry):
            start[element] = carry.get(before.element, 0) + before.offset
        if after and after.element == element:
            step[element] = after.offset
    constants = {element: value for element, value in start.items() if step.get(element) == 0}
    counter, limit = _compared(module, at.called("condition"))
    if counter and limit and not step.get(counter.element):
        counter, limit = limit, counter
    if not counter or not step.get(counter.element):
        return None, None, constants
    if not limit or (limit.element != _CONSTANT and limit.element not in constants):
        return None, counter.element, constants
    end = constants.get(limit.element, 0) + limit.offset
    length = end - start.get(counter.element, 0) - counter.offset
    return max(0.0, math.ceil(length / step[counter.element])), counter.element, constants


def _compared(module: Module, condition: str) -> list[_Linear | None]:
    """Both sides of the comparison that ends a loop: the one that counts is less than the limit."""
    computation = module.computations[condition]
    *_, root = computation.values()
    known: dict[str, _Linear | None] = {}
    if root.opcode == "fusion":
        values = [_scalar(module, computation, name) for name in root.operands]
        computation = module.computations[called_computations(root)[0]]
        known = _arguments(computation, values)
        *_, root = computation.values()
    if root.opcode != "compare" or root.attribute(r"direction=(\w+)") not in ("LT", "GT", "NE"):
        return [None, None]
    return [_scalar(module, computation, name, known) for name in root.operands]


def _scalar(
    module: Module,
    computation: Computation,
    name: str,
    known: Mapping[str, _Linear | None] | None = None,
) -> _Linear | None:
    """What a scalar is in terms of the loop's tuple; None where that cannot be read off."""
    if known and name in known:
        return known[name]
    at = computation[name]
    match at.opcode:
        case "constant" if re.fullmatch(r"-?\d+", at.literal):
            return _Linear(_CONSTANT, int(at.literal))
        case "get-tuple-element" if computation[at.operands[0]].opcode == "parameter":
            return _Linear(int(at.attribute(r"index=(\d+)") or 0), 0)
        case "copy" | "bitcast" | "convert" | "reshape":
            return _scalar(module, computation, at.operands[0], known)
        case "add":
            left, right = (_scalar(module, computation, operand, known) for operand in at.operands)
            if left and right and _CONSTANT in (left.element, right.element):
                return left + right
        case "fusion":
            values = [_scalar(module, computation, operand, known) for operand in at.operands]
            fused = module.computations[called_computations(at)[0]]
            *_, root = fused
            return _scalar(module, fused, root, _arguments(fused, values))
    return None


def _arguments(called: Computation, values: list[_Linear | None]) -> dict[str, _Linear | None]:
    return {at.name: values[int(at.literal)] for at in called.values() if at.opcode == "parameter"}


def expected_trips(
    module: Module, at: Instruction, counter: int | None, given: Mapping[str, float]
) -> float:
    """Trips of a loop whose count the program computes: as given, else to the end of its arrays."""
    frame = at.attribute(r"stack_frame_id=(\d+)")
    function = module.functions.get(int(frame), "") if frame else ""
    if function in given:
        return given[function]
    body = module.computations[at.called("body")]
    counts = _following(
        body,
        {
            element.name
            for element in body.values()
            if element.opcode == "get-tuple-element"
            and element.attribute(r"index=(\d+)") == str(counter)
        },
    )
    rounds = [_rounds(body, counts)]
    for fusion in body.values():
        if fusion.opcode == "fusion":
            fused = module.computations[called_computations(fusion)[0]]
            arguments = {
                element.name
                for element in fused.values()
                if element.opcode == "parameter" and fusion.operands[int(element.literal)] in counts
            }
            rounds.append(_rounds(fused, _following(fused, arguments)))
    if max(rounds) == 1:
        raise ValueError(
            f"how often the loop {at.name} of {function or at.source or 'an unnamed function'} "
            "repeats is known only when the program runs; give its expected count"
        )
    return max(rounds)


def _following(computation: Computation, names: set[str]) -> set[str]:
    """Those values of a computation and all that are computed from them."""
    names = set(names)
    for at in computation.values():
        if names.intersection(at.operands):
            names.add(at.name)
    return names


def _rounds(computation: Computation, counts: set[str]) -> float:
    """In how many slices a computation takes arrays apart at positions that follow a counter."""
    return max(
        (
            float(math.ceil(whole / part))
            for at in computation.values()
            if at.opcode == "dynamic-slice"
            for whole, part, position in zip(
                dimensions(computation[at.operands[0]].shape),
                dimensions(at.shape),
                at.operands[1:],
                strict=True,
            )
            if position in counts
        ),
        default=1.0,
    )
