"""FLOPs of a traced program, with loops counted as often as they run.

XLA's own cost analysis counts the body of a loop once, so a model whose layers are scanned seems to
do the work of one layer. Only matrix products and kernels count; a kernel counts what its
`cost_estimate` says, which for blank attention is the full square of scores, as in the formula for
model FLOPs. What the backward pass computes again counts again: these are hardware FLOPs.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var


def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """FLOPs of one run of a program on all its devices together, such as `jit(f).trace(x).jaxpr`.

    A loop whose number of rounds is only known at run time works through arrays slice by slice, and
    is taken to reach their end; of the branches of a condition the most expensive one is taken.

    Raises:
        ValueError: a kernel with products does not say what it costs.
    """
    return sum(_equation_flops(equation) for equation in _open(jaxpr).eqns)


def loop_rounds(jaxpr: ClosedJaxpr | Jaxpr) -> dict[str, float]:
    """How often loops run whose count is only known at run time, by the function they are in."""
    rounds: dict[str, float] = {}
    for equation in _open(jaxpr).eqns:
        if equation.primitive.name == "pallas_call":
            continue
        if equation.primitive.name == "while":
            rounds[_function(equation)] = _rounds(equation)
        for inner in _inner(equation):
            rounds |= loop_rounds(inner)
    return rounds


def _equation_flops(equation: JaxprEqn) -> float:
    parameters = equation.params
    match equation.primitive.name:
        case "dot_general":
            return _product_flops(equation)
        case "pallas_call":
            return _kernel_flops(equation)
        case "scan":
            return parameters["length"] * count_flops(parameters["jaxpr"])
        case "while":
            return _rounds(equation) * count_flops(parameters["body_jaxpr"])
        case "cond":
            return max(map(count_flops, parameters["branches"]))
        case "shard_map":
            # The body is the part of one device of the axes that it splits by hand.
            sizes, axes = parameters["mesh"].shape, parameters["newly_manual_axes"]
            devices = math.prod(sizes[axis] for axis in axes)
            return devices * count_flops(parameters["jaxpr"])
        case _:
            return sum(map(count_flops, _inner(equation)))


def _product_flops(equation: JaxprEqn) -> float:
    """Two for every multiplication: of each output number, along the contracted axes."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, outputs = _shape(equation.invars[0]), math.prod(_shape(equation.outvars[0]))
    return 2.0 * outputs * math.prod(left[axis] for axis in contracted)


def _kernel_flops(equation: JaxprEqn) -> float:
    """What a kernel says; one that says nothing must have no products."""
    estimate = equation.params["cost_estimate"]
    if estimate is not None:
        return estimate.flops
    if count_flops(equation.params["jaxpr"]) > 0:
        raise ValueError(f"the kernel {equation.params['name']!r} has no cost_estimate")
    return 0.0


def _rounds(loop: JaxprEqn) -> float:
    """In how many slices the body of a loop works through what it slices by its counter."""
    body = _open(loop.params["body_jaxpr"])
    # What counts is handed on with something added; places are computed from it.
    places = {
        equation.invars[0]
        for equation in body.eqns
        if equation.primitive.name == "add"
        and equation.outvars[0] in body.outvars
        and equation.invars[0] in body.invars
    }
    rounds = 1.0
    for equation in body.eqns:
        inputs = {variable for variable in equation.invars if isinstance(variable, Var)}
        if not inputs & places:
            continue
        if all(_shape(variable) == () for variable in equation.outvars):
            places |= set(equation.outvars)
        elif equation.primitive.name == "dynamic_slice":
            sizes = zip(_shape(equation.invars[0]), equation.params["slice_sizes"], strict=True)
            rounds = max(rounds, *(float(-(-whole // part)) for whole, part in sizes))
    return rounds


def _function(equation: JaxprEqn) -> str:
    """The innermost function that an equation comes from, those of JAX left out."""
    jax_folder = str(Path(jax.__file__).parent)
    traceback: Any = equation.source_info.traceback
    return next(f.function_name for f in traceback.frames if not f.file_name.startswith(jax_folder))


def _inner(equation: JaxprEqn) -> Iterator[ClosedJaxpr | Jaxpr]:
    """The programs inside an equation, such as those of jit, remat or custom_vjp."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield part


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _open(jaxpr: ClosedJaxpr | Jaxpr) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
