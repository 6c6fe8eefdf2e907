"""Beam search against the official runs and against one without a cache."""

import json

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, load_model, read_npz
from uncached import full_logits

from glmjax.config import MeshConfig, replace
from glmjax.inference import beam
from glmjax.inference.beam import Beam, BeamSearch, beam_search
from glmjax.inference.prompts import prompt_row
from glmjax.model.params import param_shardings
from glmjax.presets import TRAINED_TOKENS
from glmjax.sharding import make_mesh

MASK, GMASK, SOP = TRAINED_TOKENS.mask, TRAINED_TOKENS.gmask, TRAINED_TOKENS.sop
CLS, EOS = TRAINED_TOKENS.cls, TRAINED_TOKENS.eos
PROMPTS = [
    [30, 31, 32, GMASK, SOP],
    [CLS, 40, MASK, 41, 42, 43, EOS, SOP],
    [50, 51, 52, 53, 54, 55, 56, 57, 58, MASK, 59, SOP],
]
LIMIT = 6
# Logits may be off by 2e-5 of the largest, about 10; a score is a mean of a few log-probabilities.
TOLERANCE = 4e-4


def golden_cases():
    cases = json.loads((GOLDEN / "glm130b" / "generation.json").read_text())["cases"]
    return [case for case in cases if case["strategy"] == "beam"]


def golden_search(case):
    settings = case["settings"]
    return BeamSearch(
        num_beams=settings["num_beams"],
        length_penalty=settings["length_penalty"],
        no_repeat_ngram=settings["ngram"],
        min_new_tokens=settings["min_gen"],
    )


def test_glm_130b_finds_the_official_beams():
    config, params = load_model("glm130b")
    cases = golden_cases()
    assert len(cases) == 12
    for case in cases:
        search = golden_search(case)
        (beams,) = beam_search(config, params, [case["input"]], case["max_gen_length"], search)
        # Official outputs are whole sequences and keep the end token.
        pieces = [ids[len(case["input"]) :] for ids in case["outputs"]]
        expected = [ids[:-1] if ids[-1] in case["end_tokens"] else ids for ids in pieces]
        assert [beam.ids for beam in beams] == expected
        # Official logits in float32 are off by up to 4e-5; log-probabilities are about -4.
        np.testing.assert_allclose([beam.score for beam in beams], case["scores"], rtol=1e-5)


def search_slowly(config, params, prompt, limit, search):
    """The official rules as loops over lists, with a full forward for every beam."""
    row = prompt_row(config, prompt, "prompt")
    ends = (config.special_tokens.eop, config.special_tokens.eos)
    move = np.array([row.advance_M[0], 1])

    def penalise(score, length):
        return score / ((5 + length) / 6) ** search.length_penalty

    def next_scores(piece):
        ids = [*row.ids, row.opening, *piece]
        opened = [row.start_M2[0] + i * move for i in range(len(piece) + 1)]
        scores_V = full_logits(config, params, ids, [*row.positions_2T.T, *opened])[-1].copy()
        forbidden = list(search.banned)
        if len(piece) < search.min_new_tokens:
            forbidden += ends
        for *start, last in search.banned_prefixes:
            if piece == start:
                forbidden.append(last)
        n = search.no_repeat_ngram
        if n and len(ids) > n:
            for end in range(len(ids) - len(piece), len(ids)):
                before = ids[max(end - n + 1, 0) : end]
                if before == ids[len(ids) - n + 1 :]:
                    forbidden.append(ids[end])
        scores_V[forbidden] = -np.inf
        scores_V = scores_V.astype(np.float64)
        return scores_V - np.logaddexp.reduce(scores_V)

    live, finished = [(0.0, [])], []
    for _ in range(limit):
        candidates = [
            (score + new, piece, token)
            for score, piece in live
            for token, new in enumerate(next_scores(piece))
        ]
        candidates = sorted(candidates, key=lambda item: -item[0])[: 3 * search.num_beams]
        live = []
        for score, piece, token in candidates:
            length = len(row.ids) + 1 + len(piece) + 1
            if token in ends:
                finished.append(Beam(piece, penalise(score, length)))
            elif len(live) < search.num_beams:
                live.append((score, [*piece, token]))
            else:
                break
        finished = sorted(finished, key=lambda beam: -beam.score)[: search.num_beams]
        is_full = len(finished) == search.num_beams
        if is_full and finished[-1].score >= penalise(live[0][0], length):
            return finished
    length = len(row.ids) + 1 + limit
    finished += [Beam(piece, penalise(score, length)) for score, piece in live]
    return sorted(finished, key=lambda beam: -beam.score)[: search.num_beams]


@pytest.fixture(
    scope="module",
    params=[
        "glm",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("glm_130b", "chatglm")),
    ],
)
def ending(request):
    """A model with end tokens that its beams do come to."""
    config, params = request.getfixturevalue(request.param)
    search = BeamSearch(num_beams=3, no_repeat_ngram=0)
    found = beam_search(config, params, PROMPTS, LIMIT, search)
    tokens = [id for beams in found for beam in beams for id in beam.ids[1:]]
    *_, eos, eop = np.argsort(np.bincount(tokens, minlength=config.vocab_size), stable=True)
    tokens = replace(config.special_tokens, eop=int(eop), eos=int(eos))
    return replace(config, special_tokens=tokens), params


SEARCHES = [
    BeamSearch(num_beams=3, no_repeat_ngram=0, length_penalty=0.7),
    BeamSearch(num_beams=3, no_repeat_ngram=2, min_new_tokens=3, length_penalty=-1.0),
]


def assert_equal(found, expected):
    assert [[beam.ids for beam in beams] for beams in found] == [
        [beam.ids for beam in beams] for beams in expected
    ]
    for beams, others in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            [beam.score for beam in beams], [beam.score for beam in others], atol=TOLERANCE
        )


def test_a_batch_finds_what_the_rules_say(ending):
    config, params = ending
    lengths = set()
    for search in SEARCHES:
        found = beam_search(config, params, PROMPTS, LIMIT, search)
        expected = [search_slowly(config, params, ids, LIMIT, search) for ids in PROMPTS]
        assert_equal(found, expected)
        lengths |= {len(beam.ids) for beams in found for beam in beams}
    assert LIMIT in lengths and min(lengths) < 3


def test_bans_hold(ending):
    config, params = ending
    free = BeamSearch(num_beams=3, no_repeat_ngram=0, min_new_tokens=2)
    pieces = [
        beam.ids for beams in beam_search(config, params, PROMPTS, LIMIT, free) for beam in beams
    ]
    banned = pieces[-1][-1]
    prefixes = {tuple(ids[: 1 + n % 3]) for n, ids in enumerate(pieces)}
    search = replace(free, banned=(banned,), banned_prefixes=tuple(prefixes))
    found = beam_search(config, params, PROMPTS, LIMIT, search)
    assert_equal(found, [search_slowly(config, params, ids, LIMIT, search) for ids in PROMPTS])
    pieces = [beam.ids for beams in found for beam in beams]
    assert all(banned not in ids for ids in pieces)
    assert prefixes.isdisjoint(tuple(ids[:n]) for ids in pieces for n in (1, 2, 3))


def test_one_beam_behind_a_prefix_is_greedy():
    config, params = load_model("chatglm6b_ptuning")
    decoded = read_npz("chatglm6b_ptuning", "decode")
    pad = config.special_tokens.pad
    prompts = [ids[np.argmax(ids != pad) :].tolist() for ids in decoded["prompt_ids"]]
    found = beam_search(config, params, prompts, 8, BeamSearch(1, no_repeat_ngram=0))
    assert [beams[0].ids for beams in found] == decoded["tokens"].tolist()


@pytest.mark.slow
def test_an_int8_cache_finds_the_same_alone_and_together(glm):
    config, params = glm
    config = replace(config, cache_dtype="int8")
    together = beam_search(config, params, PROMPTS, LIMIT)
    assert_equal(together, [beam_search(config, params, [ids], LIMIT)[0] for ids in PROMPTS])


def test_settings_share_a_compilation(glm):
    config, params = glm
    size = beam._search._cache_size()
    for limit, search in [
        (5, BeamSearch(num_beams=2)),
        (7, BeamSearch(2, 0.5, 0, 3, (30, 40))),
        (8, BeamSearch(2, -1.0, 2, banned_prefixes=((9,), (3, 4)))),
    ]:
        assert len(beam_search(config, params, PROMPTS[:2], limit, search)) == 2
    assert beam._search._cache_size() == size + 1


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((4, 1, 2), id="data-tensor"),
        pytest.param((2, 2, 2), id="all", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_nothing(glm, sizes):
    config, params = glm
    expected = beam_search(config, params, PROMPTS[:2], LIMIT, BeamSearch(2))
    mesh = make_mesh(MeshConfig(*sizes))
    sharded = jax.device_put(params, param_shardings(config, mesh))
    with jax.set_mesh(mesh):
        found = beam_search(config, sharded, PROMPTS[:2], LIMIT, BeamSearch(2))
    assert_equal(found, expected)


def test_no_prompts_give_nothing(glm):
    assert beam_search(*glm, [], 8) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams must be positive, got 0"),
        ({"length_penalty": float("inf")}, "length_penalty must be finite, got inf"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be 0 .off. or positive, got -1"),
        ({"min_new_tokens": -2}, "min_new_tokens must be 0 or positive, got -2"),
        ({"banned": (3, -5)}, "banned ids must be 0 or positive, got -5"),
        ({"banned_prefixes": ((3,), ())}, r"banned_prefixes take one id or more, .* got \(\)"),
        ({"num_beams": 171}, "num_beams = 171 needs 513 candidates, but vocab_size = 512"),
        ({"banned": (512,)}, "banned has token 512, but vocab_size = 512"),
        ({"banned_prefixes": ((1, 600),)}, r"banned prefix \(1, 600\) has token 600, but vocab_"),
    ],
    ids=[
        "beams", "penalty", "ngram", "min", "banned", "empty-prefix", "too-many", "vocabulary",
        "prefix-vocabulary",
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(glm, settings, message):
    with pytest.raises(ValueError, match=message):
        beam_search(*glm, PROMPTS, 8, BeamSearch(**settings))


@pytest.mark.parametrize(
    ("ids", "max_new_tokens", "message"),
    [
        ([30, MASK], 8, "prompt 1 ends in 4, but must end in <sop> .id 7."),
        ([30, MASK, SOP], 129, "prompt 0 of 4 tokens with max_new_tokens = 129 needs position 129"),
        ([30, MASK, SOP], 0, "max_new_tokens must be positive, got 0"),
    ],
    ids=["no-sop", "piece-too-long", "no-tokens"],
)
def test_unusable_prompts_are_refused(glm, ids, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        beam_search(*glm, [PROMPTS[0], ids], max_new_tokens)
