"""LoRA adapters: what is added to which rows, and what is refused."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, load_case
from official_tensors import assert_same
from safetensors.numpy import load_file, save_file

import glmjax
from glmjax.cli import main
from glmjax.interop.convert import convert
from glmjax.interop.folders import open_folder

MODULES = {
    "attention.query_key_value": (192, 64), "attention.dense": (64, 64),
    "mlp.dense_h_to_4h": (256, 64), "mlp.dense_4h_to_h": (64, 256),
}  # fmt: skip
"""Of the blocks of chatglm6b_small and of glm: rows and columns."""
ALL = [f"transformer.layers.{n}.{module}" for n in range(4) for module in MODULES]
QKV = [name for name in ALL if name.endswith("query_key_value")]
CHATGLM = GOLDEN / "chatglm6b_small"


def shape_of(module):
    return MODULES[module.split(".", 3)[3]]


def factors(modules=QKV, rank=3, dtype="float32"):
    rng = np.random.default_rng(0)
    made = {}
    for module in modules:
        outputs, inputs = shape_of(module)
        made[module] = (
            (rng.normal(size=(rank, inputs)) / 8).astype(dtype),
            (rng.normal(size=(outputs, rank)) / 8).astype(dtype),
        )
    return made


def tensors_of(made, wrap="base_model.model."):
    return {
        f"{wrap}{module}.lora_{letter}.weight": factor
        for module, pair in made.items()
        for letter, factor in zip("AB", pair, strict=True)
    }


def write_adapter(folder, tensors, **settings):
    """What PEFT saves: its settings with their defaults, and the factors."""
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "chatglm-6b",
        "r": 3, "lora_alpha": 12, "lora_dropout": 0.1, "bias": "none", "fan_in_fan_out": False,
        "target_modules": ["query_key_value"], "modules_to_save": None, "use_rslora": False,
        "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
        "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_merged(folder, source, made, scale, wrap=""):
    """The same model with the sums in its file, in float32."""
    tensors = {name: x.astype("float32") for name, x in load_file(source).items()}
    for module, (a, b) in made.items():
        tensors[f"{wrap}{module}.weight"] += np.float32(scale) * b @ a
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(source.parent / "config.json", folder)
    return folder


def in_float32(folder, case):
    return write_merged(folder, GOLDEN / case / "model.safetensors", {}, 1)


def assert_close(found, expected):
    """Equal but for the order in which float32 products of rank 3 are summed."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["chatglm6b_small", "glm"])
@pytest.mark.parametrize(
    "modules", [QKV, ALL, [ALL[5], ALL[15]]], ids=["query_key_value", "all", "two layers"]
)
def test_the_sum_is_that_of_the_official_matrices(case, modules, tmp_path):
    made = factors(modules)
    short = sorted({name.rpartition(".")[2] for name in modules})
    layers = {"layers_to_transform": [1]} if len(modules) == 2 else {}
    short = [] if len(modules) == 2 else short
    adapter = write_adapter(tmp_path / "lora", tensors_of(made), target_modules=short, **layers)
    base = in_float32(tmp_path / "base", case)
    merged = write_merged(tmp_path / "merged", GOLDEN / case / "model.safetensors", made, 4)
    config, params = glmjax.load(base, lora=adapter)
    expected_config, expected = glmjax.load(merged)
    assert config == expected_config
    assert_close(params, expected)
    with pytest.raises(AssertionError):
        assert_close(params, glmjax.load(base)[1])


def test_names_of_a_wrapped_glm(tmp_path):
    made = factors()
    adapter = write_adapter(tmp_path / "lora", tensors_of(made, "base_model.model.glm."))
    plain = write_adapter(tmp_path / "plain", tensors_of(made))
    assert_same(*(glmjax.load(GOLDEN / "glm", lora=path)[1] for path in (adapter, plain)))


@pytest.mark.parametrize("case", ["glm130b/mp2", "converted"])
def test_every_format_takes_an_adapter(case, tmp_path):
    """Ranks and folders of glmjax hold the same kernels, so that the same is added."""
    path = GOLDEN / case
    if case == "glm130b/mp2":
        pytest.importorskip("torch")
    else:
        path = tmp_path / "converted"
        glmjax.save(path, *glmjax.load(GOLDEN / "glm130b"))
    name = "transformer.layers.2.mlp.dense_h_to_4h"
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 64)).astype("f"), rng.normal(size=(336, 3)).astype("f")
    adapter = write_adapter(
        tmp_path / "lora", tensors_of({name: (a, b)}), target_modules="regular.*expression"
    )
    base, changed = (
        glmjax.load(path, lora=lora)[1].blocks.ffn_in.kernel for lora in (None, adapter)
    )
    # Gate and value are the two halves of the official rows.
    added = np.moveaxis((4 * b @ a).reshape(2, 168, 64), 2, 1)
    expected = (np.asarray(base[2], "f") + added).astype("float16")
    np.testing.assert_allclose(changed[2], expected, rtol=2**-10)
    np.testing.assert_array_equal(changed[:2], base[:2])


def test_keys_and_values_have_adapters_of_their_own(tmp_path):
    name = "model.layers.1.self_attn.v_proj"
    (tensors,) = open_folder(GOLDEN / "glm4").ranks
    outputs, inputs = tensors[f"{name}.weight"].shape
    a, b = np.ones((3, inputs), "f"), np.ones((outputs, 3), "f")
    adapter = write_adapter(tmp_path, tensors_of({name: (a, b)}), target_modules=[], lora_alpha=1)
    base, changed = (
        glmjax.load(GOLDEN / "glm4", lora=lora, dtype="float32")[1].blocks
        for lora in (None, adapter)
    )
    np.testing.assert_array_equal(changed.q.kernel, base.q.kernel)
    difference = np.asarray(changed.kv.kernel - base.kv.kernel)
    np.testing.assert_array_equal(difference[:, :, 0], 0)
    np.testing.assert_allclose(difference[1, :, 1], 1, rtol=2**-9)


def test_logits_are_those_of_the_adapted_model(tmp_path):
    """Against products with the factors beside the kernel: x W + s (x A) B, as in training."""
    made = factors(QKV)
    adapter = write_adapter(tmp_path / "lora", tensors_of(made))
    config, params = glmjax.load(in_float32(tmp_path / "base", "chatglm6b_small"), lora=adapter)
    torch = pytest.importorskip("torch")
    stored = torch.from_numpy(load_file(CHATGLM / "model.safetensors")[f"{QKV[1]}.weight"].copy())
    layer = torch.nn.Linear(64, 192, bias=False)
    layer.weight.data = stored.float()
    a, b = map(torch.from_numpy, made[QKV[1]])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (layer(x) + 4 * (x @ a.T) @ b.T).reshape(5, 4, 3, 16)  # head, q k v, size
    found = np.einsum("td,dchk->thck", x.numpy(), params.blocks.qkv.kernel[1])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    batch = load_case("chatglm6b_small").batch
    arguments = batch.tokens_BT, batch.positions_B2T, batch.mask
    merged = write_merged(tmp_path / "merged", CHATGLM / "model.safetensors", made, 4)
    logits = glmjax.forward(config, params, *arguments)
    np.testing.assert_allclose(
        logits, glmjax.forward(*glmjax.load(merged), *arguments), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 6}, 2), ({"use_rslora": True, "lora_alpha": 6}, 6 / math.sqrt(3)),
        ({"r": 8, "rank_pattern": {"query_key_value": 3}}, 4),
        ({"alpha_pattern": {"query_key_value": 1.5}}, 0.5),
        ({"alpha_pattern": {r"^transformer\.layers\.2\.attention\.query_key_value": 3}}, 1),
        ({"alpha_pattern": {"^query_key_value": 3, "key_value": 3}}, 4),
    ],
    ids=["alpha", "stabilised", "ranks", "alphas", "whole name", "no name"],
)  # fmt: skip
def test_scales(settings, scale, tmp_path):
    made = factors([QKV[2]])
    adapter = write_adapter(
        tmp_path / "lora", tensors_of(made), **{"target_modules": []} | settings
    )
    base = in_float32(tmp_path / "base", "chatglm6b_small")
    merged = write_merged(tmp_path / "merged", CHATGLM / "model.safetensors", made, scale)
    assert_close(glmjax.load(base, lora=adapter)[1], glmjax.load(merged)[1])


@pytest.mark.parametrize("integers", ["int8", "int4"])
def test_quantised_behind_the_sum(integers, tmp_path):
    made = factors()
    adapter = write_adapter(tmp_path / "lora", tensors_of(made))
    summed = tmp_path / "summed"
    glmjax.save(summed, *glmjax.load(CHATGLM, lora=adapter))
    assert_same(
        glmjax.load(CHATGLM, lora=adapter, quantize=integers)[1],
        glmjax.load(summed, quantize=integers)[1],
    )


def test_convert_adds_an_adapter(tmp_path):
    adapter = write_adapter(tmp_path / "lora", tensors_of(factors()))
    merged = tmp_path / "merged"
    arguments = "convert", CHATGLM, merged, "--lora", adapter, "--quantize", "int4"
    assert main([str(argument) for argument in arguments]) == 0
    assert_same(glmjax.load(merged)[1], glmjax.load(CHATGLM, lora=adapter, quantize="int4")[1])


def test_another_adapter_is_not_the_rest_of_a_conversion(tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path / "lora", tensors_of(factors()))
    other = write_adapter(tmp_path / "other", tensors_of(factors()), lora_alpha=1)
    reads = 0

    def interrupt(done, total):
        nonlocal reads
        reads += 1
        if reads == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(CHATGLM, tmp_path / "merged", lora=adapter, progress=interrupt)
    convert(CHATGLM, tmp_path / "merged", lora=other)
    assert_same(glmjax.load(tmp_path / "merged")[1], glmjax.load(CHATGLM, lora=other)[1])


def test_a_quantised_model_takes_none(tmp_path):
    adapter = write_adapter(tmp_path / "lora", tensors_of(factors()))
    quantised = tmp_path / "int4"
    glmjax.save(quantised, *glmjax.load(CHATGLM, quantize="int4"))
    for quantize in (None, "int4"):
        with pytest.raises(ValueError, match="is quantised, and an adapter is added to floats"):
            glmjax.load(quantised, lora=adapter, quantize=quantize)
    floats = tmp_path / "floats"
    glmjax.save(floats, *glmjax.load(quantised, quantize="float"))
    assert_same(
        glmjax.load(quantised, lora=adapter, quantize="float")[1],
        glmjax.load(floats, lora=adapter)[1],
    )


def test_bin_files(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = tensors_of(factors())
    safetensors = write_adapter(tmp_path / "safetensors", tensors)
    pickled = write_adapter(tmp_path / "bin", tensors)
    (pickled / "adapter_model.safetensors").unlink()
    held = {name: torch.from_numpy(x) for name, x in tensors.items()}
    torch.save(held, pickled / "adapter_model.bin")
    assert_same(*(glmjax.load(CHATGLM, lora=path)[1] for path in (safetensors, pickled)))


def test_all_that_does_not_fit_is_listed(tmp_path):
    tensors = tensors_of(factors())
    start = "base_model.model.transformer."
    name = f"{start}layers.%d.attention.query_key_value.lora_%s.weight"
    del tensors[name % (0, "A")], tensors[name % (3, "A")], tensors[name % (3, "B")]
    tensors[name % (1, "B")] = np.zeros((192, 4), "f")
    tensors[name % (2, "A")] = np.zeros((3, 64), "int8")
    tensors[name % (2, "B")] = np.full((192, 3), np.nan, "f")
    tensors[name % (4, "A")] = np.zeros((3, 64), "f")
    tensors[f"{start}word_embeddings.lora_embedding_A"] = np.zeros((3, 320), "f")
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 64), "f")
    adapter = write_adapter(tmp_path, tensors)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        glmjax.load(CHATGLM, lora=adapter)
    kernel = "transformer.layers.%d.attention.query_key_value.lora_%s.weight"
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == sorted([
        f"missing: {kernel % (0, 'A')} [3, 64]",
        f"missing: {kernel % (3, 'A')} [3, 64]",
        f"missing: {kernel % (3, 'B')} [192, 3]",
        f"wrong shape: {kernel % (1, 'B')} [192, 4], expected [192, 3]",
        f"wrong type: {kernel % (2, 'A')} int8, expected float16 or bfloat16 or float32",
        f"NaN or infinity: {kernel % (2, 'B')}",
        f"unexpected: {name % (4, 'A')} [3, 64]",
        f"unexpected: {start}word_embeddings.lora_embedding_A [3, 320]",
        "unexpected: base_model.model.lm_head.lora_A.weight [3, 64]",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA', not 'LORA'"),
        ({"bias": "lora_only"}, "cannot merge: bias = 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"cannot merge: modules_to_save = \['lm_head'\]"),
        ({"use_dora": True}, "cannot merge: use_dora = True"),
        ({"fan_in_fan_out": True}, "cannot merge: fan_in_fan_out = True"),
        ({"enable_lora": [True, False, True]}, "cannot merge: enable_lora = "),
        ({"init_lora_weights": "pissa"}, "cannot merge: init_lora_weights = 'pissa'"),
        ({"of_tomorrow": 1, "lora_bias": True}, "cannot merge: of_tomorrow = 1, lora_bias = True"),
        ({"r": 0, "lora_alpha": "16"}, "mean nothing: r = 0, lora_alpha = '16'"),
        ({"r": None}, "mean nothing: r = None"),
        ({"rank_pattern": {"(a+)+b": 3}}, "mean nothing: rank_pattern = "),
        ({"layers_to_transform": ["1"]}, r"mean nothing: layers_to_transform = \['1'\]"),
        ({"target_modules": [1]}, r"mean nothing: target_modules = \[1\]"),
    ],
)
def test_settings_that_are_refused(settings, message, tmp_path):
    adapter = write_adapter(tmp_path, tensors_of(factors()), **settings)
    with pytest.raises(ValueError, match=message):
        glmjax.load(CHATGLM, lora=adapter)


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        glmjax.load(CHATGLM, lora=tmp_path)
    write_adapter(tmp_path, {})
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors or "):
        glmjax.load(CHATGLM, lora=tmp_path)


def test_an_adapter_without_factors(tmp_path):
    write_adapter(tmp_path, {}, target_modules="all-linear")
    with pytest.raises(ValueError, match="holds no factors"):
        glmjax.load(CHATGLM, lora=tmp_path)


def test_a_sum_that_the_type_cannot_hold(tmp_path):
    made = {QKV[0]: (np.full((3, 64), 1e3, "f"), np.full((192, 3), 1e3, "f"))}
    adapter = write_adapter(tmp_path, tensors_of(made), target_modules=[])
    with pytest.raises(ValueError, match=r"layers\.0.*larger than float16 can be"):
        glmjax.load(CHATGLM, lora=adapter)
