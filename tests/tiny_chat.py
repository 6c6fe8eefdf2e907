"""A ChatGLM of two narrow layers with the vocabulary of ChatGLM-6B."""

import os
import shutil
from pathlib import Path

import jax
import tiny_vocabularies

from glmjax import get_config, init, save
from glmjax.config import GLMConfig
from glmjax.model.params import Params
from glmjax.presets import CHATGLM_TOKENS


def make_model(**changes: object) -> tuple[GLMConfig, Params]:
    """Large initial values and an output layer of its own: it says something new with every token."""
    config = get_config(
        "chatglm-tiny",
        **{
            "vocab_size": 130528, "hidden_size": 32, "num_heads": 2, "ffn_size": 64,
            "special_tokens": CHATGLM_TOKENS, "max_positions": 160, "tied_embeddings": False,
            "initializer_scale": 0.3, **changes,
        },
    )  # fmt: skip
    return config, init(config, jax.random.key(1))


def write_vocabulary(folder: Path) -> Path:
    """The official one if GLMJAX_VOCABULARIES names a folder that has it, else one of its size."""
    if official := os.environ.get("GLMJAX_VOCABULARIES"):
        for name in ("ice_text.model", "tokenizer_config.json"):
            shutil.copy(Path(official) / "chatglm-6b" / name, folder)
    else:
        tiny_vocabularies.write_ice_text(
            folder, tokenizer_class="ChatGLMTokenizer", num_image_tokens=0
        )
    return folder


def write_model(folder: Path) -> Path:
    """A folder with both."""
    save(folder, *make_model())
    return write_vocabulary(folder)
