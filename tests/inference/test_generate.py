import json

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, load_model, read_npz
from uncached import fill_greedily, full_logits

import glmjax
from glmjax.config import MeshConfig, replace
from glmjax.inference import generate as generate_module
from glmjax.inference.generate import (
    advance,
    begin,
    cache_tokens,
    generate,
    new_ids,
    stream,
)
from glmjax.inference.prompts import find_blanks, lay_out, prompt_row, random_streams
from glmjax.inference.sampling import Sampling
from glmjax.model.attention import KVCache
from glmjax.model.params import abstract_params, param_shardings
from glmjax.model.transformer import decode_step, prefill
from glmjax.presets import TRAINED_TOKENS, get_config
from glmjax.sharding import make_mesh

MASK, SMASK, GMASK = TRAINED_TOKENS.mask, TRAINED_TOKENS.smask, TRAINED_TOKENS.gmask
SOP, EOP, CLS, EOS = TRAINED_TOKENS.sop, TRAINED_TOKENS.eop, TRAINED_TOKENS.cls, TRAINED_TOKENS.eos
GREEDY = Sampling(temperature=0.0)
PROMPTS = [
    [30, 31, 32, GMASK, SOP],
    [CLS, 40, MASK, 41, 42, 43, EOS, SOP],
    [50, 51, 52, 53, 54, 55, 56, 57, 58, SMASK, 59, SOP],
    [GMASK, SOP],
]
# Sums of float32 in another order: some hundred roundings of 6e-8, relative to the largest logit.
FLOAT32 = 2e-5


@pytest.mark.parametrize(
    ("name", "ids", "position", "block"),
    [
        (
            "glm-tiny",
            [101, 11, 12, MASK, 14, MASK, SOP, 15, 16, SOP],
            [0, 1, 2, 3, 4, 5, 3, 3, 3, 5],
            [0, 0, 0, 0, 0, 0, 1, 2, 3, 1],
        ),
        (
            "glm-tiny",
            [101, 11, 12, GMASK, SOP],
            [0, 1, 2, 3, 3],
            [0, 0, 0, 0, 1],
        ),
        ("chatglm-tiny", [20, 21, 22, GMASK, SOP], [0, 1, 2, 3, 3], [0, 0, 0, 0, 1]),
        ("chatglm-tiny", [20, MASK, 22, GMASK, SOP], [0, 1, 2, 3, 3], [0, 0, 0, 0, 1]),
        ("chatglm-tiny", [20, MASK, 22, SOP, SOP], [0, 1, 2, 1, 1], [0, 0, 0, 1, 2]),
        ("glm-130b-tiny", [20, MASK, 22, EOS, SOP], [0, 1, 2, 3, 1], None),
        ("glm-130b-tiny", [20, SMASK, 22, MASK, SOP], [0, 1, 2, 3, 1], None),
        ("glm-130b-tiny", [20, 21, 22, GMASK, SOP], [0, 1, 2, 3, 4], None),
    ],
    ids=[
        "glm-two-pieces", "glm-gmask", "chatglm", "chatglm-prefers-gmask",
        "chatglm-first-sop", "130b-mask", "130b-smask", "130b-gmask",
    ],
)  # fmt: skip
def test_positions_follow_the_family(name, ids, position, block):
    row = prompt_row(glmjax.get_config(name), ids, "prompt")
    assert row.ids == ids[:-1]
    assert row.context == ids.index(SOP)
    assert [*row.positions_2T[0], row.start_M2[0, 0]] == position
    if block is not None:
        assert [*row.positions_2T[1], row.start_M2[0, 1]] == block
    assert row.advance_M.tolist() == [int(position[-1] == len(ids) - 1)]


def test_positions_of_a_causal_model_count():
    row = prompt_row(glmjax.get_config("glm-4-tiny"), [20, SOP, 22, MASK], "prompt")
    assert (row.ids, row.opening, row.context) == ([20, SOP, 22], MASK, 0)
    assert row.positions_2T[0].tolist() == [0, 1, 2]
    assert row.start_M2[:, 0].tolist() == [3]
    assert row.advance_M.tolist() == [1]


def test_decode_equals_the_full_forward_at_every_split(model):
    config, params = model
    piece = np.random.default_rng(0).integers(20, 512, 9).tolist()
    ids = [CLS, 30, 31, 32, MASK, 33, 34, EOS, SOP, *piece]
    context, length = 8, len(ids)
    row = lay_out(config, [*ids, SOP], [4, 4], num_open=1)
    full_TV = full_logits(config, params, ids, row.positions_2T.T)
    # Row b of the batch is split behind token split_B[b]; its later tokens come one by one.
    split_B = np.arange(context, length)
    B = len(split_B)
    tokens_BT = np.array([ids] * B, np.int32)
    positions_B2T = np.stack([row.positions_2T] * B)
    logits_BV, cache = jax.jit(prefill, static_argnums=0)(
        config, params, KVCache.empty(config, B, 2 * length), tokens_BT, positions_B2T,
        np.full(B, context), split_B,
    )  # fmt: skip
    tolerance = FLOAT32 * float(np.abs(full_TV).max())
    np.testing.assert_allclose(logits_BV, full_TV[split_B - 1], atol=tolerance, rtol=0)
    step = jax.jit(decode_step, static_argnums=0)
    for t in range(length - context):
        at_B = np.minimum(split_B + t, length - 1)
        logits_B1V, cache = step(
            config, params, cache, tokens_BT[np.arange(B), at_B][:, None],
            positions_B2T[np.arange(B), :, at_B][:, :, None],
        )  # fmt: skip
        within_B = split_B + t < length
        np.testing.assert_allclose(
            logits_B1V[within_B, 0], full_TV[at_B[within_B]], atol=tolerance, rtol=0
        )


def test_greedy_equals_an_argmax_loop_without_a_cache(model):
    config, params = model
    expected = []
    for ids in PROMPTS:
        context = len(ids) - 1
        blank = find_blanks(config, ids)[0]
        counts_on = config.positions == "rope_1d" and ids[blank] == GMASK
        positions = [(i, 0) for i in range(context)] + [(context if counts_on else blank, 1)]
        expected.append(fill_greedily(config, params, list(ids), positions, 8, int(counts_on)))
    assert generate(config, params, PROMPTS, 8, GREEDY) == expected


def test_a_batch_equals_each_prompt_alone(model):
    config, params = model
    sampling = Sampling(temperature=0.8, top_k=50, top_p=0.9, seed=11)
    together = generate(config, params, PROMPTS, 7, sampling)
    assert together == [generate(config, params, [ids], 7, sampling)[0] for ids in PROMPTS]
    assert together == generate(config, params, PROMPTS, 7, sampling)
    assert together != generate(config, params, PROMPTS, 7, replace(sampling, seed=12))


def test_copies_of_a_prompt_draw_different_tokens(glm):
    config, params = glm
    copies = generate(config, params, [PROMPTS[0]] * 4, 8, Sampling(seed=1))
    assert len(set(map(tuple, copies))) == 4
    assert generate(config, params, [PROMPTS[0]], 8, Sampling(seed=1)) == copies[:1]


def test_a_row_stops_before_its_end_token(glm):
    config, params = glm
    whole = generate(config, params, PROMPTS, 8, GREEDY)
    eop, eos = whole[0][4], whole[1][2]
    tokens = replace(config.special_tokens, eop=eop, eos=eos)
    ends = [[i for i, id in enumerate(ids) if id in (eop, eos)] + [8] for ids in whole]
    assert ends[0][0] != ends[1][0]
    stopped = generate(replace(config, special_tokens=tokens), params, PROMPTS, 8, GREEDY)
    assert stopped == [ids[: end[0]] for ids, end in zip(whole, ends, strict=True)]


def test_steps_can_be_run_one_at_a_time(glm):
    config, params = glm
    sampling = Sampling(seed=5)
    rows = [prompt_row(config, ids, "prompt") for ids in PROMPTS]
    decoding = begin(config, params, rows, 5, sampling, random_streams(PROMPTS))
    lengths = []
    for _ in range(5):
        decoding = advance(config, params, decoding, 1)
        lengths.append([len(pieces[0]) for pieces in new_ids(decoding, rows)])
    assert lengths == [[n] * len(PROMPTS) for n in (1, 2, 3, 4, 5)]
    whole = generate(config, params, PROMPTS, 5, sampling)
    assert [pieces[0] for pieces in new_ids(decoding, rows)] == whole


@pytest.mark.parametrize("steps", [1, 3, 8, 99])
def test_a_stream_is_what_generate_gives(glm, steps):
    config, params = glm
    sampling = Sampling(seed=5)
    (whole,) = generate(config, params, PROMPTS[:1], 8, sampling)
    lists = list(stream(config, params, PROMPTS[0], 8, sampling, steps))
    assert [id for ids in lists for id in ids] == whole
    assert [len(ids) for ids in lists] == [
        1,
        *[steps] * (7 // steps),
        *[7 % steps] * (7 % steps > 0),
    ]


@pytest.fixture(scope="module")
def ended(glm):
    """The model with ends so early that the first prompt has two tokens and the second none."""
    config, params = glm
    whole = generate(config, params, PROMPTS, 8, GREEDY)
    eop, eos = whole[0][2], whole[1][0]
    assert not {eop, eos} & {*whole[0][:2]}
    return replace(config, special_tokens=replace(config.special_tokens, eop=eop, eos=eos))


def test_a_stream_ends_where_the_piece_does(glm, ended):
    (whole,) = generate(*glm, PROMPTS[:1], 8, GREEDY)
    assert list(stream(ended, glm[1], PROMPTS[0], 8, GREEDY, 2)) == [whole[:1], whole[1:2]]
    assert list(stream(ended, glm[1], PROMPTS[1], 8, GREEDY, 2)) == []


def test_a_closed_stream_draws_no_more(glm, monkeypatch):
    """The device is one list ahead of what is read, and no further."""
    config, params = glm
    asked = []
    monkeypatch.setattr(
        generate_module, "advance", lambda *args: asked.append(args[3]) or advance(*args)
    )
    drawn = stream(config, params, PROMPTS[0], 8, GREEDY, 2)
    assert asked == []
    next(drawn), next(drawn)
    drawn.close()
    assert asked == [1, 2, 2]
    assert list(drawn) == []


def test_unusable_streams_are_refused_at_once(glm):
    with pytest.raises(ValueError, match="the prompt ends in 30, but must end in <sop>"):
        stream(*glm, [MASK, 30], 8)
    with pytest.raises(ValueError, match=r"the prompt .* needs position 129"):
        stream(*glm, [30] * 129 + [MASK, SOP], 8)
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        stream(*glm, PROMPTS[0], 8, GREEDY, 0)


def test_rules_of_sampling_hold_in_the_loop(glm, ended):
    config, params = glm
    ends = {ended.special_tokens.eop, ended.special_tokens.eos}
    least = replace(GREEDY, min_new_tokens=5)
    for piece in generate(ended, params, PROMPTS[:1], 8, least):
        assert len(piece) >= 5 and not ends & {*piece}
    (whole,) = generate(config, params, PROMPTS[:1], 8, GREEDY)
    (other,) = generate(config, params, PROMPTS[:1], 8, replace(GREEDY, banned=(whole[0],)))
    assert other and whole[0] not in other


@pytest.mark.slow
def test_rules_count_the_tokens_of_each_blank(glm, ended):
    ids = [CLS, 40, MASK, 41, MASK, EOS, SOP, SOP]
    row = lay_out(ended, ids, [2, 4], num_open=2)
    sampling = replace(GREEDY, min_new_tokens=4, no_repeat_ngram=1)
    decoding = begin(ended, glm[1], [row], 8, sampling, [(0, 0)])
    for piece in new_ids(advance(ended, glm[1], decoding), [row])[0]:
        assert len(piece) >= 4 and len({*piece}) == len(piece)


@pytest.mark.slow
def test_a_batch_is_kept_as_a_history(glm):
    """Prompt, opening and piece of each row in the order in which they were fed, -1 behind them."""
    config, params = glm
    ids = [CLS, 40, MASK, 41, MASK, EOS, SOP, SOP]
    row = lay_out(config, ids, [2, 4], num_open=2)
    decoding = advance(config, params, begin(config, params, [row], 3, GREEDY, [(0, 0)]))
    first, second = new_ids(decoding, [row])[0]
    ids_S = decoding.ids_BS[0].tolist()
    fed = [*ids[:-2], SOP, *first, SOP, *second]
    assert ids_S == fed + [-1] * (len(ids_S) - len(fed))
    assert len(fed) == int(decoding.cache.length_B[0]) + 1  # The very last token is not fed.


@pytest.mark.parametrize(
    ("prompt", "new", "blanks"), [(1, 1, 1), (16, 8, 1), (17, 9, 2), (100, 20, 1)]
)
def test_the_cache_has_the_slots_that_are_announced(glm, prompt, new, blanks):
    config, params = glm
    ids = [30] * (prompt - blanks) + [MASK] * blanks + [SOP] * blanks
    row = lay_out(config, ids, list(range(prompt - blanks, prompt)), num_open=blanks)
    decoding = jax.eval_shape(
        lambda params: begin(config, params, [row] * 3, new, GREEDY, [(0, 0)] * 3), params
    )
    slots = cache_tokens(config, prompt, new, blanks)
    assert decoding.cache.k_NBHSK.shape[3] == slots
    assert slots >= prompt + blanks * (new + 1) - 1


def test_the_slots_of_a_prefix_are_announced_too():
    config = get_config("chatglm-tiny", prefix_length=5)
    tokens = config.special_tokens
    row = prompt_row(config, [30, tokens.gmask, tokens.sop], "prompt")
    decoding = jax.eval_shape(
        lambda params: begin(config, params, [row], 8, GREEDY, [(0, 0)]), abstract_params(config)
    )
    assert decoding.cache.k_NBHSK.shape[3] == cache_tokens(config, 2, 8) == 5 + 16 + 8


def test_the_cache_is_handed_on(glm):
    config, params = glm
    row = prompt_row(config, PROMPTS[0], "prompt")
    decoding = begin(config, params, [row], 8, GREEDY, [(0, 0)])
    advance(config, params, decoding, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(decoding))


def test_one_compilation_serves_a_bucket(glm):
    config, params = glm
    size = advance._cache_size()
    for length, count, limit in [(33, 3, 5), (60, 4, 8), (64, 3, 6)]:
        prompts = [[30 + n] * (length - 1) + [MASK, SOP] for n in range(count)]
        for sampling in (GREEDY, Sampling(temperature=0.7, top_k=3, top_p=0.5, seed=length)):
            generate(config, params, prompts, limit, sampling)
    assert advance._cache_size() == size + 1


@pytest.mark.parametrize(
    "sizes",
    [pytest.param((8, 1, 1), id="data"), pytest.param((2, 2, 2), id="all", marks=pytest.mark.slow)],
)
def test_a_mesh_changes_nothing(glm, sizes):
    config, params = glm
    expected = generate(config, params, PROMPTS, 6, Sampling(seed=2))
    mesh = make_mesh(MeshConfig(*sizes))
    sharded = jax.device_put(params, param_shardings(config, mesh))
    with jax.set_mesh(mesh):
        assert generate(config, sharded, PROMPTS, 6, Sampling(seed=2)) == expected


def test_no_prompts_give_no_pieces(glm):
    assert generate(*glm, [], 8) == []


@pytest.mark.parametrize(
    ("ids", "max_new_tokens", "message"),
    [
        ([], 8, "prompt 1 is empty, but must end in <sop> .id 7."),
        ([30, MASK], 8, "prompt 1 ends in 4, but must end in <sop> .id 7."),
        ([30, SOP], 8, "prompt 1 has 1 <sop> .id 7. but 0 mask tokens"),
        ([30, MASK, SOP, 31, SOP], 8, "prompt 1 has 2 <sop> .id 7. but 1 mask tokens"),
        ([30, 512, MASK, SOP], 8, "prompt 1 has token 512, but vocab_size = 512"),
        ([30, -1, MASK, SOP], 8, "prompt 1 has token -1, but vocab_size = 512"),
        ([30] * 129 + [MASK, SOP], 8, "prompt 1 of 130 tokens .* needs position 129, but max_positions = 128"),
        ([30, MASK, SOP], 129, "prompt 0 of 4 tokens with max_new_tokens = 129 needs position 129"),
        ([30, MASK, SOP], 0, "max_new_tokens must be positive, got 0"),
    ],
    ids=[
        "empty", "no-sop", "no-mask", "too-many-sop", "id-too-large", "id-negative", "prompt-too-long",
        "piece-too-long", "no-tokens",
    ],
)  # fmt: skip
def test_unusable_prompts_are_refused(glm, ids, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(*glm, [PROMPTS[0], ids], max_new_tokens, GREEDY)


def test_the_last_position_is_usable(glm_130b):
    config, params = glm_130b
    prompt = [30] * 119 + [GMASK, SOP]
    assert len(generate(config, params, [prompt], 9, GREEDY)) == 1
    with pytest.raises(ValueError, match="needs position 129, but max_positions = 128"):
        generate(config, params, [prompt], 10, GREEDY)


def test_a_model_without_special_tokens_is_refused(glm):
    config, params = glm
    with pytest.raises(ValueError, match="'glm-tiny' has no special_tokens"):
        generate(replace(config, special_tokens=None), params, PROMPTS, 4)


@pytest.mark.parametrize(
    "case",
    [
        "chatglm6b_small", pytest.param("chatglm6b_28layer", marks=pytest.mark.slow),
        "chatglm6b_ptuning", "chatglm6b_ptuning_projection",
    ],
)  # fmt: skip
def test_chatglm_generates_the_official_tokens(case):
    config, params = load_model(case)
    decoded = read_npz(case, "decode")
    pad = config.special_tokens.pad
    prompts = [ids[np.argmax(ids != pad) :].tolist() for ids in decoded["prompt_ids"]]
    assert generate(config, params, prompts, 8, GREEDY) == decoded["tokens"].tolist()


def test_glm_generates_the_official_tokens():
    config, params = load_model("glm")
    decoded = read_npz("glm", "decode")
    prompt = [*decoded["context_ids"][0].tolist(), int(decoded["start_token"])]
    assert generate(config, params, [prompt], 8, GREEDY) == decoded["tokens"].tolist()


def test_glm_130b_generates_the_official_tokens():
    config, params = load_model("glm130b")
    cases = json.loads((GOLDEN / "glm130b" / "generation.json").read_text())["cases"]
    greedy = [case for case in cases if case["strategy"] == "base"]
    prompts = [case["input"] for case in greedy]
    # Official outputs are whole sequences and keep the end token.
    expected = [
        [id for id in case["outputs"][0][len(case["input"]) :] if id not in case["end_tokens"]]
        for case in greedy
    ]
    assert len(greedy) == 3
    assert generate(config, params, prompts, 16, GREEDY) == expected
