"""Rows that join and leave a running batch are filled as if they were alone."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, load_model, read_npz

from glmjax.config import MeshConfig, replace
from glmjax.inference import slots as slots_module
from glmjax.inference.generate import advance, begin, generate, new_ids
from glmjax.inference.prompts import lay_out, prompt_row
from glmjax.inference.sampling import Sampling
from glmjax.inference.slots import create, free, insert, read, step
from glmjax.model.params import param_shardings
from glmjax.presets import TRAINED_TOKENS
from glmjax.sharding import make_mesh

MASK, GMASK, SOP, EOS = (
    TRAINED_TOKENS.mask, TRAINED_TOKENS.gmask, TRAINED_TOKENS.sop, TRAINED_TOKENS.eos
)  # fmt: skip
GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt that is a row, and what it asks for."""

    row: object
    max_new_tokens: int
    sampling: Sampling
    stream: tuple


def make_request(config, random, index, blanks=1, longest=24):
    """A prompt of up to so many tokens of text with settings of its own. Limits are of one bucket."""
    text = random.integers(20, 500, random.integers(1, longest)).tolist()
    ids = [*text[: len(text) // 2], *[MASK] * blanks, *text[len(text) // 2 :], *[SOP] * blanks]
    row = lay_out(config, ids, [len(text) // 2 + i for i in range(blanks)], num_open=blanks)
    sampling = [
        GREEDY,
        Sampling(temperature=0.7, top_k=40, seed=index),
        Sampling(top_p=0.8, seed=1, no_repeat_ngram=2, min_new_tokens=3),
        Sampling(temperature=0.0, repetition_penalty=1.3, banned=(21, 22, 23)),
    ][random.integers(4)]
    return Request(row, int(random.integers(5, 9)), sampling, (index, 0))


def alone(config, params, request):
    """The pieces of a row that no other row is with."""
    decoding = begin(
        config, params, [request.row], request.max_new_tokens, request.sampling, [request.stream]
    )
    return new_ids(advance(config, params, decoding), [request.row])[0]


def put(config, params, slots, slot, request):
    return insert(config, params, slots, slot, **vars(request))


def serve(config, params, slots, requests, random):
    """The pieces of each request, None of those freed on the way: slots, steps and the moment of
    reading are drawn by lot, and every read is of the steps before the ones that run."""
    waiting, served = list(range(len(requests))), [None] * len(requests)
    who, pieces = {}, {}
    while waiting or who:
        empty = [i for i, row in enumerate(slots.row_B) if row is None]
        for slot in random.permutation(empty)[: random.integers(0, len(empty) + 1)].tolist():
            if waiting:
                who[slot] = waiting.pop(0)
                pieces[slot] = [[] for _ in requests[who[slot]].row.advance_M]
                slots = put(config, params, slots, slot, requests[who[slot]])
        following = step(config, params, slots, int(random.integers(1, 5)))
        for slot, news in read(slots).items():
            for piece, new in zip(pieces[slot], news.pieces, strict=True):
                piece += new
            if news.is_finished:
                served[who.pop(slot)] = pieces[slot]
                following = free(following, slot)
            elif random.random() < 0.05:
                del who[slot]
                following = free(following, slot)
        slots = following
    return served


def check_schedule(config, params, slots, seed, count=10, blanks=1, longest=24):
    """Requests come and go at random, and each gets what it gets alone."""
    random = np.random.default_rng(seed)
    requests = [
        make_request(config, random, i, int(random.integers(1, blanks + 1)), longest)
        for i in range(count)
    ]
    served = serve(config, params, slots, requests, random)
    finished = [i for i, pieces in enumerate(served) if pieces is not None]
    assert len(finished) > count / 2
    for i in finished:
        assert served[i] == alone(config, params, requests[i])


def test_rows_that_come_and_go_equal_those_alone(glm):
    """Prompts are of two length buckets."""
    check_schedule(*glm, create(*glm, 2, 32), seed=0)


def test_rows_with_several_blanks_in_an_int8_cache(glm):
    config, params = replace(glm[0], cache_dtype="int8"), glm[1]
    slots = create(config, params, 3, 40, max_blanks=2)
    check_schedule(config, params, slots, seed=3, count=8, blanks=2, longest=10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_rows_of_every_family_come_and_go(model, seed):
    config, params = model
    config = replace(config, cache_dtype=["float32", "int8"][seed % 2])
    blanks = 2 if config.positions == "learned_2d" else 1
    slots = create(config, params, 1 + seed % 4, 64, max_blanks=blanks)
    check_schedule(config, params, slots, seed, count=16, blanks=blanks)


@pytest.mark.parametrize(
    "sizes",
    [pytest.param((2, 1, 2), id="half"), pytest.param((2, 2, 2), id="all", marks=pytest.mark.slow)],
)
def test_a_mesh_changes_nothing(glm, sizes):
    config, params = glm
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    random = np.random.default_rng(4)
    requests = [make_request(config, random, i, longest=12) for i in range(6)]
    expected = [alone(config, params, request) for request in requests]
    sharded = jax.device_put(params, param_shardings(config, mesh))
    with jax.set_mesh(mesh):
        slots = create(config, sharded, 4, 32)
        assert serve(config, sharded, slots, requests, WithoutAccidents(0)) == expected
        with pytest.raises(ValueError, match=r"num_slots = 3 does not divide over the \d parts"):
            create(config, sharded, 3, 32)


class WithoutAccidents(np.random.Generator):
    """Lots of which none frees a row before its end."""

    def __init__(self, seed):
        super().__init__(np.random.PCG64(seed))

    def random(self):
        return 1.0


def test_nothing_is_compiled_when_rows_join_and_leave(glm):
    config, params = glm
    random = np.random.default_rng(5)
    sizes = slots_module._insert._cache_size(), slots_module._run._cache_size()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: (
            compiled.append(event) if event.endswith("compile_duration") else None
        )
    )
    for round in range(3):
        requests = [make_request(config, random, i) for i in range(6)]
        serve(config, params, create(config, params, 2, 32), requests, random)
        if round == 0:
            compiled.clear()
    assert slots_module._insert._cache_size() <= sizes[0] + 2  # Two length buckets.
    assert slots_module._run._cache_size() <= sizes[1] + 1
    assert compiled == []


@pytest.mark.slow
def test_official_tokens_of_glm_130b():
    config, params = load_model("glm130b")
    cases = json.loads((GOLDEN / "glm130b" / "generation.json").read_text())["cases"]
    cases = [case for case in cases if case["strategy"] == "base"]
    slots = create(config, params, 2, 48)
    pieces: list[list[int]] = [[], [], []]
    # The third joins in the middle of the others, once one of them has been thrown out and is asked
    # again for the same.
    slots = put(config, params, slots, 0, golden_request(config, cases[0]["input"], 16))
    slots = put(config, params, slots, 1, golden_request(config, cases[1]["input"], 16))
    slots = step(config, params, slots, 2)
    pieces[0] += read(slots)[0].pieces[0]
    slots = free(slots, 1)
    slots = put(config, params, slots, 1, golden_request(config, cases[2]["input"], 16))
    while not all(news.is_finished for news in read(slots).values()) or len(read(slots)) < 2:
        slots = step(config, params, slots, 5)
        pieces[0] += read(slots)[0].pieces[0]
        pieces[2] += read(slots)[1].pieces[0]
    slots = free(free(slots, 0), 1)
    slots = put(config, params, slots, 0, golden_request(config, cases[1]["input"], 16))
    slots = step(config, params, slots, 100)
    pieces[1] += read(slots)[0].pieces[0]
    assert pieces == [
        [id for id in case["outputs"][0][len(case["input"]) :] if id not in case["end_tokens"]]
        for case in cases
    ]


def golden_request(config, ids, limit):
    return Request(prompt_row(config, ids, "prompt"), limit, GREEDY, (0, 0))


@pytest.mark.parametrize(
    "case", ["chatglm6b_ptuning", pytest.param("chatglm6b_small", marks=pytest.mark.slow)]
)
def test_official_tokens_of_chatglm(case):
    """With a learnt prefix in front of every slot."""
    config, params = load_model(case)
    decoded = read_npz(case, "decode")
    slots = create(config, params, 3, 40)
    for ids, tokens in zip(decoded["prompt_ids"], decoded["tokens"], strict=True):
        prompt = ids[np.argmax(ids != config.special_tokens.pad) :].tolist()
        slots = put(config, params, slots, 2, golden_request(config, prompt, 8))
        slots = step(config, params, slots, 8)
        assert read(slots) == {2: ([tokens.tolist()], True)}
        slots = free(slots, 2)


def test_reading_does_not_wait_for_the_steps_that_run(glm):
    """An old value serves `read`, though its arrays have been taken by the next steps."""
    config, params = glm
    request = golden_request(config, [30, 31, GMASK, SOP], 8)
    (whole,) = alone(config, params, request)
    slots = put(config, params, create(config, params, 2, 32), 1, request)
    first = step(config, params, slots, 3)
    second = step(config, params, first, 3)
    third = step(config, params, second, 3)
    assert slots.decoding.cache.k_NBHSK.is_deleted() and second.decoding.ids_BS.is_deleted()
    assert read(slots) == {}
    assert [read(s)[1].pieces[0] for s in (first, second, third)] == [
        whole[:3], whole[3:6], whole[6:]
    ]  # fmt: skip
    assert [read(s)[1].is_finished for s in (first, second, third)] == [False, False, True]


def test_a_freed_slot_says_no_more(glm):
    """Neither of the row that left nor, before its first step, of the one that comes after it."""
    config, params = glm
    one, other = (golden_request(config, [30, id, GMASK, SOP], 8) for id in (31, 32))
    slots = put(config, params, create(config, params, 2, 32), 0, one)
    slots = put(config, params, step(config, params, slots, 2), 1, one)
    assert list(read(slots)) == [0]
    slots = put(config, params, free(slots, 0), 0, other)
    assert read(slots) == {}
    slots = step(config, params, slots, 8)
    assert read(slots) == {
        0: (alone(config, params, other), True), 1: (alone(config, params, one), True)
    }  # fmt: skip


def test_copies_of_a_prompt_differ_by_their_streams(glm):
    config, params = glm
    prompt, sampling = [30, 31, GMASK, SOP], Sampling(seed=6)
    request = dataclasses.replace(golden_request(config, prompt, 8), sampling=sampling)
    slots = create(config, params, 2, 32)
    for slot in (0, 1):
        stream = dataclasses.replace(request, stream=(7, slot))
        slots = put(config, params, slots, slot, stream)
    news = read(step(config, params, slots, 8))
    assert news[0].pieces != news[1].pieces


def test_slots_have_room_for_whole_tiles_and_prefix(glm):
    config, params = glm
    assert create(config, params, 1, 40).length == 40
    assert create(config, params, 1, 130).length == 256
    config, params = load_model("chatglm6b_ptuning")
    slots = create(config, params, 1, 129)
    assert slots.length == 256 - config.prefix_length
    assert slots.decoding.cache.k_NBHSK.shape[3] == 256


@pytest.mark.parametrize(
    ("slot", "blanks", "length", "limit", "sampling", "message"),
    [
        (2, 1, 8, 4, GREEDY, "slot 2 does not exist: there are 2"),
        (-1, 1, 8, 4, GREEDY, "slot -1 does not exist: there are 2"),
        (0, 1, 8, 4, GREEDY, "slot 0 is taken"),
        (1, 2, 8, 4, GREEDY, "a row has 2 blanks, but the slots take 1"),
        (1, 1, 29, 4, GREEDY, "a row of 29 tokens with num_blanks = 1 .* = 4 needs 33, but the slots have room for 32"),
        (1, 1, 99, 1, GREEDY, "a row of 99 tokens .* needs 100, but the slots have room for 32"),
        (1, 1, 8, 0, GREEDY, "max_new_tokens must be positive, got 0"),
        (1, 1, 8, 4, Sampling(banned=tuple(range(20, 37))), "a row bans 17 ids, but the slots take 16"),
    ],
    ids=["beyond", "negative", "taken", "blanks", "too-long", "much-too-long", "no-tokens", "banned"],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused(
    glm, one_taken, slot, blanks, length, limit, sampling, message
):
    config, params = glm
    ids = [30] * (length - blanks) + [MASK] * blanks + [SOP] * blanks
    row = lay_out(config, ids, [length - blanks + i for i in range(blanks)], num_open=blanks)
    with pytest.raises(ValueError, match=message):
        insert(config, params, one_taken, slot, row, limit, sampling, (0, 0))


@pytest.fixture(scope="module")
def one_taken(glm):
    config, params = glm
    slots = create(config, params, 2, 32)
    return put(config, params, slots, 0, golden_request(config, [30, GMASK, SOP], 8))


def test_a_row_fills_its_slot_to_the_last_token(glm):
    config, params = glm
    request = golden_request(config, [30] * 23 + [GMASK, SOP], 8)
    slots = create(config, params, 2, 24 + 8)
    slots = step(config, params, put(config, params, slots, 1, request), 8)
    assert read(slots) == {1: (alone(config, params, request), True)}
    longer = golden_request(config, [30] * 24 + [GMASK, SOP], 8)
    with pytest.raises(ValueError, match="needs 33, but the slots have room for 32"):
        put(config, params, slots, 0, longer)


def test_rows_beyond_the_positions_are_refused(glm):
    config, params = glm
    slots = create(config, params, 1, 256)
    with pytest.raises(ValueError, match=r"a row of 130 tokens .* position 129"):
        put(config, params, slots, 0, golden_request(config, [30] * 129 + [MASK, SOP], 4))


def test_empty_slots_cannot_be_freed(glm, one_taken):
    with pytest.raises(ValueError, match="slot 1 is empty"):
        free(one_taken, 1)
    with pytest.raises(ValueError, match="slot 2 does not exist: there are 2"):
        free(one_taken, 2)


@pytest.mark.parametrize("name", ["num_slots", "length", "max_blanks"])
def test_sizes_are_positive(glm, name):
    sizes = {"num_slots": 2, "length": 8, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        create(*glm, **sizes)


def test_nothing_to_do_is_nothing(glm):
    config, params = glm
    slots = create(config, params, 2, 32)
    assert read(step(config, params, slots)) == {}
    assert generate(config, params, [], 4) == []
