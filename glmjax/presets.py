"""Published models as constants. Each fact stands beside its source.

Shapes: THUDM/GLM `config_tasks/model_blocklm_*.sh`, THUDM/GLM-130B `configs/model_glm_130b.sh`,
Hugging Face `config.json` of THUDM/chatglm-6b, chatglm2-6b, chatglm3-6b and glm-4-9b. Special ids:
THUDM/GLM `data_utils/tokenization.py`, THUDM/icetk, THUDM/chatglm-6b and chatglm2-6b
`tokenization_chatglm.py`, THUDM/codegeex4-all-9b `tokenizer_config.json` (that of GLM-4).
"""

import difflib
from typing import Any

from glmjax.config import GLMConfig, SpecialTokens, replace

# The BERT vocabulary has no [sMASK] or [gMASK]: those models mask everything with [MASK].
BERT_TOKENS = SpecialTokens(mask=103, sop=30522, eop=30523, eos=0, pad=0, cls=101)
ROBERTA_TOKENS = SpecialTokens(
    mask=50264, sop=50265, eop=50266, eos=2, pad=2, cls=0, gmask=50267, smask=50268
)
GPT2_TOKENS = SpecialTokens(
    mask=50260, sop=50257, eop=50258, eos=50256, pad=50256,
    gmask=50263, smask=50264, cls=50259, dblock=50265,
)  # fmt: skip
CHINESE_TOKENS = SpecialTokens(
    mask=50003, sop=50006, eop=50007, eos=50000, pad=50000,
    gmask=50009, smask=50008, cls=50002, dblock=50010,
)  # fmt: skip
# GLM-10B-Chinese as THUDM/GLM published it, trained before [gMASK] had an id of its own. Its Hugging
# Face form has the row of <eop> a second time in the embedding, as that of [gMASK] above.
CHINESE_ORIGINAL_TOKENS = replace(CHINESE_TOKENS, gmask=50007, dblock=50009)
ICETK_TOKENS = SpecialTokens(
    mask=150000, sop=150004, eop=150005, eos=20002, pad=0, gmask=150001, smask=150002, dblock=150007
)
# ChatGLM-6B after April 2023: the 20000 image tokens are gone and every id moved down by as much.
CHATGLM_TOKENS = SpecialTokens(
    mask=130000,
    sop=130004,
    eop=130005,
    eos=130005,
    pad=3,
    gmask=130001,
    smask=130002,
    dblock=130007,
)
CHATGLM_V0_TOKENS = SpecialTokens(
    mask=150000,
    sop=150004,
    eop=150005,
    eos=150005,
    pad=20003,
    gmask=150001,
    smask=150002,
    dblock=150007,
)
CHATGLM2_TOKENS = SpecialTokens(
    mask=64789, sop=64792, eop=64793, eos=2, pad=0, gmask=64790, smask=64791
)
GLM_4_TOKENS = SpecialTokens(
    mask=151330, sop=151333, eop=151334, eos=151329, pad=151329, gmask=151331, smask=151332
)
# Vocabularies trained by glmjax: special tokens first, so that their ids do not depend on the size.
TRAINED_TOKENS = SpecialTokens(
    pad=0, eos=2, cls=3, mask=4, smask=5, gmask=6, sop=7, eop=8, dblock=9
)


def _glm(
    name: str, layers: int, width: int, vocabulary: int, length: int, tokens: SpecialTokens
) -> GLMConfig:
    """GLM 110M-10B: pre-norm, learned 2D positions, heads of 64 and F = 4 D at every size."""
    return GLMConfig(
        name=name, num_layers=layers, hidden_size=width, num_heads=width // 64, ffn_size=4 * width,
        vocab_size=vocabulary, max_positions=length, special_tokens=tokens,
    )  # fmt: skip


_GLM_130B = GLMConfig(
    name="glm-130b", num_layers=70, hidden_size=12288, num_heads=96, ffn_size=32768,
    vocab_size=150528, max_positions=2048, positions="rope_1d", norm="deepnorm", ffn="geglu",
    special_tokens=ICETK_TOKENS, initializer_scale=0.0052, embedding_gradient_scale=0.1,
)  # fmt: skip
_CHATGLM_6B = GLMConfig(
    name="chatglm-6b", num_layers=28, hidden_size=4096, num_heads=32, ffn_size=16384,
    vocab_size=130528, max_positions=2048, positions="rope_2d", norm="deepnorm", ffn="gelu",
    special_tokens=CHATGLM_TOKENS,
)  # fmt: skip
_CHATGLM2_6B = GLMConfig(
    name="chatglm2-6b", num_layers=28, hidden_size=4096, num_heads=32, num_kv_heads=2,
    ffn_size=13696, vocab_size=65024, max_positions=32768, positions="rope_half", norm="rmsnorm",
    ffn="swiglu", biases="qkv", tied_embeddings=False, rope_frequencies="float32",
    special_tokens=CHATGLM2_TOKENS,
)  # fmt: skip

# Small models of our own, for tests, notebooks and CPUs.
_GLM_TINY = GLMConfig(
    name="glm-tiny", num_layers=2, hidden_size=64, num_heads=4, ffn_size=256, vocab_size=512,
    max_positions=128, special_tokens=TRAINED_TOKENS,
)  # fmt: skip

PRESETS = {
    config.name: config
    for config in (
        _glm("glm-base", 12, 768, 30592, 512, BERT_TOKENS),
        _glm("glm-large", 24, 1024, 30592, 512, BERT_TOKENS),
        _glm("glm-doc", 24, 1024, 30592, 512, BERT_TOKENS),
        _glm("glm-410m", 30, 1024, 30592, 512, BERT_TOKENS),
        _glm("glm-515m", 30, 1152, 30592, 512, BERT_TOKENS),
        _glm("glm-roberta-large", 24, 1024, 50304, 512, ROBERTA_TOKENS),
        _glm("glm-2b", 36, 2048, 50304, 1024, GPT2_TOKENS),
        _glm("glm-10b", 48, 4096, 50304, 1024, GPT2_TOKENS),
        _glm("glm-large-chinese", 24, 1024, 50048, 1024, CHINESE_TOKENS),
        _glm("glm-10b-chinese", 48, 4096, 50048, 1024, CHINESE_TOKENS),
        _GLM_130B,
        _CHATGLM_6B,
        replace(
            _CHATGLM_6B, name="chatglm-6b-v0", vocab_size=150528, special_tokens=CHATGLM_V0_TOKENS
        ),
        _CHATGLM2_6B,
        replace(_CHATGLM2_6B, name="chatglm3-6b", max_positions=8192),
        replace(
            _CHATGLM2_6B, name="glm-4-9b", num_layers=40, vocab_size=151552, max_positions=131072,
            layer_norm_epsilon=1.5625e-7, special_tokens=GLM_4_TOKENS,
        ),
        _GLM_TINY,
        replace(
            _GLM_TINY, name="glm-130b-tiny", positions="rope_1d", norm="deepnorm", ffn="geglu",
            ffn_size=176, initializer_scale=0.0052,
        ),
        replace(_GLM_TINY, name="chatglm-tiny", positions="rope_2d", norm="deepnorm"),
        replace(
            _GLM_TINY, name="glm-4-tiny", num_kv_heads=2, positions="rope_half", norm="rmsnorm",
            ffn="swiglu", biases="qkv", ffn_size=176, tied_embeddings=False,
            rope_frequencies="float32",
        ),
        replace(
            _GLM_TINY, name="glm-5m", num_layers=6, hidden_size=256, num_heads=4, ffn_size=1024,
            vocab_size=8192, max_positions=2048,
        ),
    )
}  # fmt: skip


def get_config(name: str, /, **changes: Any) -> GLMConfig:
    """The preset of that name, with some fields changed.

    Raises:
        ValueError: no preset or no field has that name; the nearest one is named.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)[0]
        raise ValueError(f"no model is called {name!r}; the nearest is {near!r}")
    return replace(PRESETS[name], **changes)


def list_configs() -> list[str]:
    """Names of all presets."""
    return list(PRESETS)
