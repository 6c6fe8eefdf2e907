import dataclasses

import pytest

import glmjax
from glmjax.config import (
    DataConfig,
    Experiment,
    GLMConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Quantization,
    TrainConfig,
    parse_range,
    replace,
)  # fmt: skip


def test_replace_reaches_into_nested_fields():
    experiment = replace(Experiment(), **{"train.steps": 7, "model.num_layers": 3})
    assert (experiment.train.steps, experiment.model.num_layers) == (7, 3)
    assert experiment.data == DataConfig()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GLMConfig(hidden_size=100, num_heads=3), "num_heads = 3 .* hidden_size = 100"),
        (lambda: GLMConfig(num_layers=0), "num_layers must be positive, got 0"),
        (lambda: GLMConfig(hidden_dropout=1.0), "hidden_dropout must be in .* got 1.0"),
        (
            lambda: GLMConfig(hidden_size=36, num_heads=6, positions="rope_2d"),
            "'rope_2d' needs a head size divisible by 4, got 6",
        ),
        (lambda: GLMConfig(hidden_size=36, num_heads=6, positions="rope_half"), "divisible by 4, got 6"),
        (lambda: GLMConfig(num_heads=12, num_kv_heads=5), "num_kv_heads = 5 does not divide num_heads = 12"),
        (lambda: GLMConfig(num_kv_heads=0), "num_kv_heads must be positive, got 0"),
        (lambda: GLMConfig(prefix_length=-1), "prefix_length must not be negative, got -1"),
        (lambda: GLMConfig(prefix_projection=True), "prefix_projection needs a prefix_length"),
        (lambda: Quantization(3), "quantization.bits must be 4 or 8, got 3"),
        (lambda: GLMConfig(quantization=Quantization(8, 5)), "shards = 5 does not divide num_heads = 12"),
        (
            lambda: GLMConfig(hidden_size=12, num_heads=4, ffn_size=8, quantization=Quantization(4)),
            "to 4 bits needs an even head_size, got 3",
        ),
        (lambda: Quantization(4, scheme="max"), "scheme must be 'absmax' or 'zeropoint', got 'max'"),
        (lambda: Quantization(4, group_size=0), "quantization.group_size must be positive, got 0"),
        (lambda: Quantization(4, kernels=("qkv", "ffn")), "kernels takes qkv, .*, ffn_out, got 'ffn'"),
        (lambda: Quantization(4, kernels=()), "needs kernels or embeddings"),
        (
            lambda: GLMConfig(quantization=Quantization(4, float_layers=(3, 12))),
            "float_layers has 12, and there are layers 0 to 11",
        ),
        (
            lambda: GLMConfig(quantization=Quantization(4, group_size=500)),
            "group_size = 500 does not divide hidden_size = 768",
        ),
        (
            lambda: GLMConfig(quantization=Quantization(4, 4, group_size=256)),
            "group_size = 256 does not divide hidden_size / 4 shards = 192",
        ),
        (
            lambda: GLMConfig(quantization=Quantization(4, group_size=32)),
            "group_size = 32 is no multiple of the head size 64",
        ),
        (lambda: GLMConfig(remat="none", saved=("qkv",)), r"saved = \('qkv',\) .* than 'none'"),
        (lambda: glmjax.get_config("glm-base", vocab_size=200), "sop = 30522 .* vocab_size = 200"),
        (lambda: glmjax.get_config("glm-bas"), "'glm-bas'; the nearest is 'glm-base'"),
        (lambda: glmjax.get_config("glm-base", layers=2), "no field 'layers'; the nearest is 'num_layers'"),
        (lambda: replace(Experiment(), **{"train.stepz": 3}), "no field 'stepz'; .* 'steps'"),
        (lambda: ObjectiveConfig(token=0.7, sentence=0.4), "0.7 and .* 0.4 exceed 1"),
        (lambda: ObjectiveConfig(mask_ratio=1.5), "mask_ratio must be in .* got 1.5"),
        (lambda: DataConfig(skip=("9:3",)), "data.skip takes FIRST:LAST .* got '9:3'"),
        (lambda: DataConfig(skip=("1:5", "5:9")), "overlap at step 5"),
        (lambda: DataConfig(path=("a",), weights=(1.0, 2.0)), "2 entries for 1 sources"),
        (lambda: DataConfig(text_length=600), "between 8 and .* = 512, got 600"),
        (lambda: OptimizerConfig(warmup=9, decay=5), "warmup = 9 .*decay = 5"),
        (lambda: OptimizerConfig(learning_rate_changes=((9, 1e-4, 0.1), (5, 1e-5, 0.1))), "in order of step, got .*9"),
        (lambda: OptimizerConfig(learning_rate_changes=((9, 1e-4, 4e-6), (12, 0.0, 0.1))), r"got \(12, 0.0, 0.1\)"),
        (lambda: OptimizerConfig(embedding_gradient_scale_changes=((-1, 0, 0.5),)), "in order of step, got .*-1"),
        (lambda: OptimizerConfig(embedding_gradient_scale_changes=((9, 1, 2.0),)), r"got \(9, 1, 2.0\)"),
        (
            lambda: Experiment(
                model=GLMConfig(embedding_gradient_scale=0.0),
                optimizer=OptimizerConfig(embedding_gradient_scale_changes=((9, 1, 0.5),)),
            ),
            "needs a model.embedding_gradient_scale > 0",
        ),
        (lambda: MeshConfig(data=-1, fsdp=-1), "at most one -1"),
        (lambda: TrainConfig(batch_size=10, microbatch_size=4), "microbatch_size = 4 does not divide train.batch_size = 10"),
        (lambda: TrainConfig(batch_size=10, ramp=(3, 2, 100)), "does not reach .* = 10"),
        (lambda: TrainConfig(run="gs://bucket/run"), "'gs://bucket/run' is an address, not a folder"),
        (lambda: Experiment(data=DataConfig(sequence_length=1024)), "sequence_length = 1024 exceeds .* = 512"),
        (lambda: Experiment(data=DataConfig(text_length=600, sequence_length=640)), "text_length = 600 exceeds .* = 512"),
        (
            lambda: Experiment(model=glmjax.get_config("glm-130b-tiny")),
            "positions = '2d' does not fit model.positions = 'rope_1d'",
        ),
        (
            lambda: Experiment(objective=ObjectiveConfig(multitask=0.05)),
            "multitask = 0.05 does not fit data.multitask",
        ),
        (lambda: parse_range("4", "x"), "x takes FIRST:LAST"),
    ],
)  # fmt: skip
def test_wrong_combinations_name_both_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", glmjax.list_configs())
def test_presets_are_frozen_and_hashable(name):
    config = glmjax.get_config(name)
    assert config.name == name
    assert hash(config) == hash(glmjax.get_config(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 1
