"""Every kind of integers and every arrangement, through `load`, `convert` and back."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN
from official_tensors import assert_same

import glmjax
from glmjax.cli import main
from glmjax.cli.quantize_flags import QuantizeFlags
from glmjax.config import MeshConfig, Quantization
from glmjax.interop.convert import convert, export
from glmjax.interop.inspection import inspect
from glmjax.model.params import (
    Arrangement,
    abstract_params,
    param_shardings,
)
from glmjax.model.parts import assemble, take_apart
from glmjax.sharding import make_mesh

CASE = GOLDEN / "chatglm6b_small"
KINDS = {
    "zeropoint": Quantization(4, scheme="zeropoint"),
    "groups": Quantization(8, group_size=16),
    "groups of zeropoint": Quantization(4, scheme="zeropoint", group_size=16),
    "embeddings": Quantization(4, embeddings=True),
    "some kernels": Quantization(8, kernels=("attention_out", "ffn_out")),
    "some layers": Quantization(4, float_layers=(0, 2)),
    "embeddings alone": Quantization(8, kernels=(), embeddings=True),
}
ARRANGEMENTS = [Arrangement(*flags) for flags in itertools.product((False, True), repeat=3)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_becomes_integers_and_what_stays(kind):
    plain = take_apart(*glmjax.load(CASE))
    config, params = glmjax.load(CASE, quantize=kind)
    assert config.quantization == kind
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, abstract_params(config)
    )
    names = {f"blocks.{kernel}.kernel" for kernel in kind.kernels}
    names |= {"word_embedding"} if kind.embeddings else set()
    expected = {key for key in plain if key[0] in names and key[1] not in kind.float_layers}
    parts = take_apart(config, params)
    assert expected == set(plain) - set(parts)
    for key in expected:
        assert (f"{key[0]}.zero", key[1]) in parts or kind.scheme == "absmax"
    for key in set(plain) - expected:
        np.testing.assert_array_equal(parts[key].read(), plain[key].read())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_integers_and_back_are_off_by_half_a_scale(kind, tmp_path):
    """And by what float16 rounds: 2^-11 of the scale and the quotient, up to 254 steps away each."""
    plain = take_apart(*glmjax.load(CASE, dtype="float32"))
    convert(CASE, tmp_path / "integers", quantize=kind)
    scales = [
        part.read().max()
        for (name, _), part in take_apart(*glmjax.load(tmp_path / "integers")).items()
        if part.dtype == np.float16 and name.endswith(".scale") and "norm" not in name
    ]
    config, floats = glmjax.load(tmp_path / "integers", quantize="float", dtype="float32")
    assert config.quantization is None
    errors = [
        np.abs(part.read() - plain[key].read()).max()
        for key, part in take_apart(config, floats).items()
    ]
    assert 0 < max(errors) <= (0.5 + 2 * 254 * 2**-11) * max(scales)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("kind", [KINDS["groups of zeropoint"], KINDS["some layers"]])
def test_parts_are_the_same_in_every_arrangement(kind, arrangement, tmp_path):
    config, params = glmjax.load(CASE, quantize=kind)
    parts = take_apart(config, params)
    found = assemble(config, parts, arrangement=arrangement)
    assert isinstance(found.blocks, tuple) == (arrangement.apart or bool(kind.float_layers))
    types = {leaf.dtype.name for leaf in jax.tree.leaves(found)}
    assert types & {"int4", "int8"} == {"int8" if arrangement.packed else "int4"}
    abstract = abstract_params(config, arrangement)
    assert jax.tree.structure(found) == jax.tree.structure(abstract)
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(abstract), strict=True):
        assert leaf.shape == expected.shape
    glmjax.save(tmp_path / "model", config, found)
    assert_same(glmjax.load(tmp_path / "model")[1], params)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_a_mesh_has_shares_of_every_arrangement(arrangement):
    kind = Quantization(4, scheme="zeropoint", embeddings=True)
    config, params = glmjax.load(CASE, quantize=kind)
    expected = take_apart(config, params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        found = assemble(config, expected, arrangement=arrangement)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == param_shardings(
        config, mesh, arrangement
    )
    for key, part in take_apart(config, found).items():
        np.testing.assert_array_equal(part.read(), expected[key].read())


def test_for_decoding_on_a_cpu_blocks_lie_apart():
    config, params = glmjax.load(CASE, quantize="int4", for_decoding=True)
    assert len(params.blocks) == config.num_layers
    assert params.blocks[1].qkv.kernel.values.dtype == np.int8
    _, stored = glmjax.load(CASE, quantize="int4")
    np.testing.assert_array_equal(
        params.blocks[1].ffn_in.kernel.values, stored.blocks.ffn_in.kernel.values[1]
    )


@pytest.mark.parametrize("to", ["hf", "ranks"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_official_formats_refuse_what_they_cannot_say(kind, to, tmp_path):
    with pytest.raises(ValueError, match="no official format holds a model in int"):
        convert(CASE, tmp_path / "official", to, quantize=kind)
    config, params = glmjax.load(CASE, quantize=kind)
    with pytest.raises(ValueError, match="no official format holds a model in int"):
        export(tmp_path / "official", config, params, to)
    assert not list(tmp_path.iterdir())


def test_the_published_kinds_are_refused_only_by_too_few_ranks(tmp_path):
    config, params = glmjax.load(CASE, quantize=Quantization(4, shards=2))
    with pytest.raises(ValueError, match=r"2 scales a row of .* do not fit 1 ranks"):
        export(tmp_path / "official", config, params)


def test_other_kinds_of_integers_are_refused(tmp_path):
    convert(CASE, tmp_path / "model", quantize=KINDS["zeropoint"])
    with pytest.raises(ValueError, match="kernels of int4, zeropoint, which cannot become int4:"):
        glmjax.load(tmp_path / "model", quantize="int4")
    kind = glmjax.load(tmp_path / "model", quantize=KINDS["zeropoint"])[0].quantization
    assert kind == KINDS["zeropoint"]


def test_the_order_of_layers_and_kernels_does_not_matter():
    kind = Quantization(4, kernels=("ffn_out", "qkv"), float_layers=(27, 0, 27))
    assert kind == Quantization(4, kernels=("qkv", "ffn_out"), float_layers=(0, 27))


def test_the_command_takes_every_kind(tmp_path):
    command = (
        "--quantize int4 --scheme zeropoint --group-size 16 --kernels ffn_in ffn_out "
        "--quantize-embeddings --float-layers 2 0"
    )
    assert main(["convert", str(CASE), str(tmp_path / "model"), *command.split()]) == 0
    assert inspect(tmp_path / "model").quantization == (
        "int4, zeropoint, a scale for 16 inputs, ffn_in and ffn_out, with embeddings, "
        "layers 0 2 floats"
    )


def test_flags_say_every_kind():
    assert QuantizeFlags().quantization() is None
    assert QuantizeFlags("float").quantization() == "float"
    assert QuantizeFlags("int8").quantization() == Quantization(8)
    for kind in KINDS.values():
        flags = QuantizeFlags(
            "int4" if kind.bits == 4 else "int8", kind.scheme, kind.group_size, kind.kernels,
            kind.embeddings, kind.float_layers,
        )  # fmt: skip
        assert flags.quantization() == kind
        with pytest.raises(ValueError, match="how to quantise: add --quantize int8 or"):
            dataclasses.replace(flags, quantize=None).quantization()
