"""AdamW, how its moments are stored, and which parameters decay.

Its learning rate comes from `schedule`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from glmjax.config import GLMConfig, OptimizerConfig
from glmjax.model.params import Params, leaf_name, specs


@struct.dataclass
class Codes:
    """A float32 array in 8 bits: sign(code) scale (|code| / limit)^power, a scale for each row.

    Powers make small numbers, of which moments are full, finer: down to 6e-5 of the largest first
    moment of a row, and 2e-10 of the largest second moment, which has no sign.
    """

    code: Any
    scale: Any


FIRST, SECOND = (jnp.int8, 127, 2), (jnp.uint8, 255, 4)
"""Type, limit and power of the codes of first and second moments."""


def decays(config: GLMConfig) -> object:
    """True for every parameter with weight decay: all but layer norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaf_name(path).rsplit(".", 1)[-1] not in ("scale", "bias"), specs(config)
    )


def adamw(model: GLMConfig, config: OptimizerConfig) -> optax.GradientTransformation:
    """Decoupled AdamW up to the factor -learning_rate, which `train_step` applies."""
    return optax.chain(
        _store(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon), config),
        optax.add_decayed_weights(config.weight_decay, decays(model)),
    )


def optimizer_shardings(params: Params, state: Any, config: OptimizerConfig) -> Any:
    """Moments lie like their parameters, on the host if so configured; the rest everywhere."""
    everywhere = NamedSharding(jax.tree.leaves(params)[0].mesh, PartitionSpec())
    kind = "pinned_host" if config.offload else None

    def like(sharding: NamedSharding, stored: Any) -> Any:
        spec = (*sharding.spec, *(None,) * (jax.tree.leaves(stored)[0].ndim - len(sharding.spec)))
        whole = NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=kind)
        if not isinstance(stored, Codes):
            return whole
        by_row = NamedSharding(sharding.mesh, PartitionSpec(*spec[:-1], None), memory_kind=kind)
        return Codes(whole, by_row)

    adam, *rest = state
    moments = {name: jax.tree.map(like, params, getattr(adam, name)) for name in ("mu", "nu")}
    return (adam._replace(count=everywhere, **moments), *jax.tree.map(lambda _: everywhere, rest))


def _store(
    adam: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformation:
    """Adam that keeps its moments between steps as the configuration says."""
    if config.moments == "float32":
        return adam

    def encode(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        if config.moments == "bfloat16":
            to_bfloat16 = partial(optax.tree_utils.tree_cast, dtype=jnp.bfloat16)
            return state._replace(mu=to_bfloat16(state.mu), nu=to_bfloat16(state.nu))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.count))
        return state._replace(
            mu=_encode(state.mu, keys[0], *FIRST), nu=_encode(state.nu, keys[1], *SECOND)
        )

    def decode(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        return state._replace(mu=_decode(state.mu, *FIRST), nu=_decode(state.nu, *SECOND))

    def init(params: Params) -> optax.ScaleByAdamState:
        return encode(adam.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, decode(state), params)
        return updates, encode(state)

    return optax.GradientTransformation(init, update)


def _encode(tree: Any, key: jax.Array, dtype: Any, limit: int, power: int) -> Any:
    """Codes of all leaves, rounded up or down at random so that slow changes are not lost.

    What is not 0 does not become 0: a second moment of 0 would make a step of any size.
    """
    leaves, structure = jax.tree.flatten(tree)
    codes = []
    for leaf, leaf_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        size = jnp.abs(leaf)
        scale = jnp.max(size, axis=-1, keepdims=True)
        share = (size / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)) ** (1 / power)
        up = jax.random.uniform(leaf_key, leaf.shape)
        code = jnp.clip(jnp.floor(share * limit + up), jnp.where(size > 0, 1, 0), limit)
        codes.append(Codes((jnp.sign(leaf) * code).astype(dtype), scale))
    return jax.tree.unflatten(structure, codes)


def _decode(tree: Any, dtype: Any, limit: int, power: int) -> Any:
    def decode(stored: Any) -> jax.Array:
        if not isinstance(stored, Codes):
            return stored.astype(jnp.float32)
        share = stored.code.astype(jnp.float32) / limit
        return jnp.sign(share) * stored.scale * jnp.abs(share) ** power

    return jax.tree.map(decode, tree, is_leaf=lambda x: isinstance(x, Codes))
