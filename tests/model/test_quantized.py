"""Kernels as integers, and weights of fewer bits than the products they are in."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glmjax
from glmjax.config import GLMConfig, MeshConfig, Quantization
from glmjax.model import transformer
from glmjax.model.attention import KVCache
from glmjax.model.layers import linear
from glmjax.model.params import (
    Block,
    Linear,
    Params,
    Quantized,
    abstract_params,
    count_params,
    leaf_name,
    param_shardings,
    specs,
)
from glmjax.sharding import make_mesh

FORWARD = jax.jit(transformer.forward, static_argnums=0)
MODELS = {
    "glm-tiny": Quantization(8),
    "glm-130b-tiny": Quantization(4, shards=2),
    "chatglm-tiny": Quantization(4),
    "glm-4-tiny": Quantization(8, shards=2),
}
OPTIONS = {
    "zeropoint": ("glm-130b-tiny", Quantization(4, scheme="zeropoint")),
    "groups": ("glm-130b-tiny", Quantization(4, group_size=16)),
    "everything": ("chatglm-tiny", Quantization(
        8, scheme="zeropoint", group_size=32, kernels=("qkv", "ffn_in"), embeddings=True,
        float_layers=(1,),
    )),
    "an output layer": ("glm-4-tiny", Quantization(4, embeddings=True, float_layers=(0,))),
}  # fmt: skip


def draw(config: GLMConfig) -> Params:
    """Random parameters, quantised and all; integers of every value that the official code writes."""
    random = np.random.default_rng(0)

    def leaf(path, abstract):
        name, shape = leaf_name(path), abstract.shape
        if name.endswith(".values") and config.quantization.bits == 8:
            return random.integers(-127, 128, shape).astype(np.int8)
        if name.endswith(".values"):
            even, odd = random.integers(-7, 8, (2, *shape))
            return (even * 16 + odd % 16).astype(np.int8)
        if name.endswith(".zero"):
            return random.integers(-5, 6, shape).astype(np.float32)
        if abstract.dtype == np.float16:
            largest = {4: 7, 8: 127}[config.quantization.bits]
            return (random.uniform(0.1, 0.4, shape) / largest).astype(np.float16)
        return (name.endswith("scale") + 0.1 * random.standard_normal(shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def weights(bits: int, quantized: Quantized, inputs: int) -> np.ndarray:
    """A matrix [*outputs, *inputs] in float32, by the definition of the format."""
    values = quantized.values.astype(int)
    if bits == 4:
        low = values & 15
        pairs = np.stack([values >> 4, np.where(low > 7, low - 16, low)], -1)
        values = pairs.reshape(*values.shape[:-1], -1)
    first = values.ndim - inputs

    def for_each_weight(numbers: np.ndarray) -> np.ndarray:
        """Numbers [group, *outputs] where their group is."""
        each = np.repeat(np.moveaxis(numbers, 0, -1), values.shape[first] // len(numbers), axis=-1)
        return each.reshape(*each.shape, *[1] * (inputs - 1)).astype(np.float32)

    if quantized.zero is not None:
        values = values + for_each_weight(quantized.zero)
    return (values * for_each_weight(quantized.scale)).astype(np.float32)


def dense(config: GLMConfig, params: Params) -> Params:
    """The same model with matrices in float32 in the order of plain kernels."""
    bits = config.quantization.bits

    def table(embedding):
        return weights(bits, embedding, 1) if isinstance(embedding, Quantized) else embedding

    def layer(name: str, kernel: Quantized) -> np.ndarray:
        if name == "attention_out":
            return np.moveaxis(weights(bits, kernel, 2), 0, -1)
        if name == "ffn_in":  # behind the gate
            return np.swapaxes(weights(bits, kernel, 1), -1, -2)
        return np.moveaxis(weights(bits, kernel, 1), -1, 0)

    def block(params_n: Block) -> Block:
        return params_n.replace(**{
            field.name: value.replace(kernel=layer(field.name, value.kernel))
            for field in dataclasses.fields(Block)
            if isinstance(value := getattr(params_n, field.name), Linear)
            and isinstance(value.kernel, Quantized)
        })  # fmt: skip

    blocks = params.blocks
    if not isinstance(blocks, tuple):
        blocks = [jax.tree.map(operator.itemgetter(n), blocks) for n in range(config.num_layers)]
    return params.replace(
        word_embedding=table(params.word_embedding),
        output_embedding=table(params.output_embedding),
        blocks=jax.tree.map(lambda *leaves: np.stack(leaves), *map(block, blocks)),
    )


@pytest.mark.parametrize("name, quantization", [*MODELS.items(), *OPTIONS.values()])
def test_quantised_kernels_are_their_dequantised_values(name, quantization, rows):
    config = glmjax.get_config(name, quantization=quantization)
    params = draw(config)
    inputs = rows.tokens_BT, rows.positions_B2T, rows.mask
    found = FORWARD(config, params, *inputs)
    plain = dataclasses.replace(config, quantization=None)
    expected = FORWARD(plain, dense(config, params), *inputs)
    assert np.asarray(expected).std() > 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_bytes_hold_the_even_number_in_the_high_half():
    kernel = Quantized(jnp.array([[30, 121, -43]], jnp.int8), jnp.ones((1, 1), jnp.float16))
    y = linear("btd,df->btf", Linear(kernel, None), jnp.eye(6)[None])
    np.testing.assert_array_equal(y[0, :, 0], [1, -2, 7, -7, -3, 5])


def trained(params: Params) -> dict[str, jax.Array]:
    """The leaves that have gradients."""
    return {
        leaf_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if ".kernel" not in leaf_name(path)
    }


@functools.partial(jax.jit, static_argnums=0)
def gradients(config: GLMConfig, params: Params, rows) -> dict[str, jax.Array]:
    """Of everything but kernels, in front of, in and behind the blocks."""

    def loss(leaves):
        whole = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaves.get(leaf_name(path), leaf), params
        )
        inputs = rows.tokens_BT, rows.positions_B2T, rows.mask
        return jnp.square(transformer.encode(config, whole, *inputs)).mean()

    return jax.grad(loss)(trained(params))


def test_gradients_pass_through_quantised_kernels(rows):
    """As tuning a prefix in front of an int4 model needs."""
    config = glmjax.get_config("glm-130b-tiny", quantization=Quantization(4, 2), prefix_length=5)
    params = draw(config)
    found = gradients(config, params, rows)
    plain = dataclasses.replace(config, quantization=None)
    expected = gradients(plain, dense(config, params), rows)
    assert np.any(found["prefix.embedding"])
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("name", ["glm-130b-tiny", "glm-4-tiny"])
def test_a_mesh_changes_nothing(name, rows):
    config = glmjax.get_config(name, quantization=Quantization(4, 2))
    params, inputs = draw(config), (rows.tokens_BT, rows.positions_B2T, rows.mask)
    expected = FORWARD(config, params, *inputs)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, param_shardings(config, mesh))
        found = FORWARD(config, sharded, *inputs)
    kernel = sharded.blocks.ffn_in.kernel
    assert kernel.values.sharding.spec[-2:] == ("tensor", "fsdp")
    assert kernel.scale.sharding.spec[-1] == "tensor"
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_decoding_dequantises_too(rows):
    config = glmjax.get_config("glm-4-tiny", quantization=Quantization(4))
    params = draw(config)
    prompts = rows.tokens_BT[:, :6].tolist()
    greedy = glmjax.Sampling(temperature=0)
    plain = dataclasses.replace(config, quantization=None)
    expected = glmjax.generate(plain, dense(config, params), prompts, 8, greedy)
    assert glmjax.generate(config, params, prompts, 8, greedy) == expected


@pytest.mark.parametrize("name, quantization", [*MODELS.items(), *OPTIONS.values()])
def test_counts_are_those_of_the_weights(name, quantization):
    quantized = glmjax.get_config(name, quantization=quantization)
    assert count_params(quantized) == count_params(glmjax.get_config(name))


def test_scales_have_a_group_for_each_shard():
    blocks = specs(glmjax.get_config("glm-130b", quantization=Quantization(4, 8))).blocks
    assert blocks.qkv.kernel.values.shape == (70, 3, 96, 128, 6144)
    assert blocks.qkv.kernel.scale.shape == (70, 1, 3, 96, 128)
    assert blocks.attention_out.kernel.values.shape == (70, 12288, 96, 64)
    assert blocks.attention_out.kernel.scale.shape == (70, 8, 12288)
    assert blocks.ffn_in.kernel.scale.shape == (70, 1, 2, 32768)
    assert blocks.ffn_out.kernel.values.shape == (70, 12288, 16384)
    assert blocks.ffn_out.kernel.scale.shape == (70, 8, 12288)


def test_a_quantised_model_has_no_initial_values():
    config = glmjax.get_config("glm-tiny", quantization=Quantization(8))
    with pytest.raises(ValueError, match="no initial values; quantise those of a trained model"):
        glmjax.init(config, jax.random.key(0))


@pytest.mark.parametrize("norms", ["float32", "float16"])
def test_weights_in_float16_are_the_same_numbers(family, rows, norms):
    """Rounding anything on the way would show at 5e-4; sums in another order do at 1e-7."""
    config, params = family
    narrow = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(norms if "norm" in leaf_name(path) else "float16"), params
    )
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    inputs = rows.tokens_BT, rows.positions_B2T, rows.mask
    expected = FORWARD(config, wide, *inputs)
    tolerance = 2e-6 * np.abs(expected).max()
    np.testing.assert_allclose(FORWARD(config, narrow, *inputs), expected, rtol=0, atol=tolerance)
    step = jax.jit(functools.partial(transformer.decode_step, config))
    cache = KVCache.empty(config, len(rows.tokens_BT), 24)
    few = cache, rows.tokens_BT[:, :4], rows.positions_B2T[..., :4]
    found, expected = step(narrow, *few)[0], step(wide, *few)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
