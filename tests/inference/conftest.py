"""Small models of the families."""

import dataclasses

import jax
import pytest

import glmjax


@pytest.fixture(
    scope="session", params=["glm-tiny", "glm-130b-tiny", "chatglm-tiny"], ids=lambda name: name
)
def model(request):
    """Configuration and parameters of each family; large initial values set the logits well apart."""
    return _model(request.param)


@pytest.fixture(scope="session")
def glm():
    return _model("glm-tiny")


@pytest.fixture(scope="session")
def glm_130b():
    return _model("glm-130b-tiny")


@pytest.fixture(scope="session")
def chatglm():
    return _model("chatglm-tiny")


@pytest.fixture(scope="session")
def glm_4():
    return _model("glm-4-tiny")


def _model(name):
    # A tied output layer would repeat the last token, and fresh DeepNorm layers hardly look back.
    config = glmjax.get_config(name, initializer_scale=0.1, tied_embeddings=False)
    params = glmjax.init(config, jax.random.key(7))
    blocks = jax.tree.map(lambda x: 2 * x if x.ndim > 2 else x, params.blocks)
    return config, dataclasses.replace(params, blocks=blocks)
