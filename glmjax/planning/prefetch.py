"""The scalars that Pallas kernels of a function prefetch, computed without running the kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

Scalars = dict[str, list[np.ndarray]]

# Calls whose body is evaluated equation by equation, since a kernel may be inside.
_CALLS = ("jit", "pjit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call")


def prefetched_scalars(function: Callable[..., Any], *arguments: Any) -> Scalars:
    """For each kernel by name, its scalar-prefetch operands (a dynamic grid first) for these
    arguments. Outputs of kernels count as zeros, so operands must not depend on them."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    scalars: Scalars = {}
    _evaluate(jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(arguments), scalars)
    return scalars


def _evaluate(
    jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any], scalars: Scalars
) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        name, parameters = equation.primitive.name, equation.params
        if name == "pallas_call":
            mapping = parameters["grid_mapping"]
            count = mapping.num_dynamic_grid_bounds + mapping.num_index_operands
            scalars[parameters["name"]] = [np.asarray(x) for x in inputs[:count]]
            outputs = [jnp.zeros(aval.shape, aval.dtype) for aval in parameters["out_avals"]]
        elif name in _CALLS:
            inner = parameters["call_jaxpr" if "call_jaxpr" in parameters else "jaxpr"]
            constants = inner.consts if isinstance(inner, ClosedJaxpr) else ()
            inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            outputs = _evaluate(inner, constants, inputs, scalars)
        else:
            outputs = equation.primitive.bind(*inputs, **parameters)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
