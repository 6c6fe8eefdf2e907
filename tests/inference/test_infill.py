import numpy as np
import pytest
from uncached import fill_greedily

from glmjax.config import replace
from glmjax.inference.beam import BeamSearch, beam_search
from glmjax.inference.generate import generate
from glmjax.inference.infill import Filled, infill, infill_text
from glmjax.inference.sampling import Sampling
from glmjax.presets import TRAINED_TOKENS

MASK, SMASK, GMASK = TRAINED_TOKENS.mask, TRAINED_TOKENS.smask, TRAINED_TOKENS.gmask
SOP, CLS, EOS = TRAINED_TOKENS.sop, TRAINED_TOKENS.cls, TRAINED_TOKENS.eos
MASKS = (MASK, SMASK, GMASK)
GREEDY = Sampling(temperature=0.0)
ONE_BLANK = [[30, 31, MASK, 32], [GMASK, 40, 41], [50, 51, 52, SMASK], [60, GMASK]]
MANY_BLANKS = [
    [30, 31, MASK, 32, SMASK, 33, MASK],
    [40, 41, 42, GMASK],
    [MASK, MASK, SMASK],
    [50, SMASK, 51, MASK, GMASK, MASK],
]
LIMIT = 4


def fill_glm(config, params, text, limit):
    """THUDM/GLM: every piece behind the pieces before it, at the position of its mask."""
    ids = [CLS, *text] if text[-1] == GMASK else [CLS, *text, EOS]
    blanks = [i for i, id in enumerate(ids) if id in MASKS]
    positions = [(i, 0) for i in range(len(ids))]
    pieces = []
    for blank in blanks:
        ids.append(SOP)
        positions.append((blank, 1))
        pieces.append(fill_greedily(config, params, ids, positions, limit))
    return pieces


def fill_glm_130b(config, params, text, limit):
    """THUDM/GLM-130B: the first piece takes the place of its mask, then the next is made."""
    ids = list(text) if text[-1] in MASKS else [*text, EOS]
    pieces, end = [], 0
    while any(id in MASKS for id in ids[end:]):
        blank = next(i for i in range(end, len(ids)) if ids[i] in MASKS)
        counts_on = int(ids[blank] == GMASK)
        positions = [(i, 0) for i in range(len(ids))]
        positions.append((len(ids) if counts_on else blank, 1))
        piece = fill_greedily(config, params, [*ids, SOP], positions, limit, counts_on)
        ids[blank : blank + 1] = piece
        end = blank + len(piece)
        pieces.append(piece)
    return pieces


def ends_early(config, params, texts):
    """The model with another <eop>, a token that greedy pieces do hold, so that they differ in
    length."""
    pieces = [
        piece for text in infill(config, params, texts, LIMIT, GREEDY) for piece in text.pieces
    ]
    drawn = np.array([id for piece in pieces for id in piece[1:]])
    eop = int(np.bincount(drawn).argmax())
    return replace(config, special_tokens=replace(config.special_tokens, eop=eop))


@pytest.fixture(scope="module")
def glm_ending(glm):
    config, params = glm
    return ends_early(config, params, MANY_BLANKS), params


@pytest.fixture(scope="module")
def glm_130b_ending(glm_130b):
    config, params = glm_130b
    return ends_early(config, params, MANY_BLANKS), params


def test_glm_fills_blanks_behind_each_other(glm_ending):
    config, params = glm_ending
    filled = infill(config, params, MANY_BLANKS, LIMIT, GREEDY)
    expected = [fill_glm(config, params, text, LIMIT) for text in MANY_BLANKS]
    assert [text.pieces for text in filled] == expected
    lengths = {len(piece) for text in filled for piece in text.pieces}
    assert LIMIT in lengths and len(lengths) > 1


def test_glm_130b_fills_one_blank_after_the_other(glm_130b_ending):
    config, params = glm_130b_ending
    filled = infill(config, params, MANY_BLANKS, LIMIT, GREEDY)
    expected = [fill_glm_130b(config, params, text, LIMIT) for text in MANY_BLANKS]
    assert [text.pieces for text in filled] == expected
    lengths = {len(piece) for text in filled for piece in text.pieces}
    assert LIMIT in lengths and len(lengths) > 1


def test_chatglm_fills_its_blank_without_other_special_tokens(chatglm):
    config, params = chatglm
    filled = infill(config, params, ONE_BLANK, LIMIT, GREEDY)
    prompts = [[*text, SOP] for text in ONE_BLANK]
    assert [text.pieces[0] for text in filled] == generate(config, params, prompts, LIMIT, GREEDY)


def test_glm_4_continues_behind_the_opening_of_its_texts(glm_4):
    config, params = glm_4
    texts = [[30, 31, 32], [40, 41, GMASK], [MASK]]
    filled = infill(config, params, texts, LIMIT, GREEDY)
    prompts = [[GMASK, SOP, 30, 31, 32], [GMASK, SOP, 40, 41], [GMASK, SOP]]
    assert [text.pieces[0] for text in filled] == generate(config, params, prompts, LIMIT, GREEDY)
    assert filled[0].splice() == [30, 31, 32, *filled[0].pieces[0]]


def test_glm_searches_the_best_piece_of_one_blank_after_the_other(glm_ending):
    config, params = glm_ending
    search = BeamSearch(num_beams=2, no_repeat_ngram=2)
    texts = [[30, MASK, 31, SMASK, 32], [40, 41, MASK, GMASK]]
    filled = infill(config, params, texts, LIMIT, search)
    prompts = [[CLS, *texts[0], EOS, SOP], [CLS, *texts[1], SOP]]
    for k in range(2):
        best = [beams[0].ids for beams in beam_search(config, params, prompts, LIMIT, search)]
        assert [text.pieces[k] for text in filled] == best
        prompts = [[*prompt, *piece, SOP] for prompt, piece in zip(prompts, best, strict=True)]


def test_glm_130b_searches_behind_what_it_filled(glm_130b_ending):
    config, params = glm_130b_ending
    search = BeamSearch(num_beams=2)
    (filled,) = infill(config, params, [[30, MASK, 31, GMASK]], LIMIT, search)
    first, second = filled.pieces
    for prompt, piece in (
        ([30, MASK, 31, GMASK, SOP], first),
        ([30, *first, 31, GMASK, SOP], second),
    ):
        assert beam_search(config, params, [prompt], LIMIT, search)[0][0].ids == piece


@pytest.mark.parametrize("name", ["glm_ending", "glm_130b_ending", "chatglm"])
def test_a_batch_equals_each_text_alone(request, name):
    config, params = request.getfixturevalue(name)
    texts = ONE_BLANK if name == "chatglm" else MANY_BLANKS
    sampling = Sampling(temperature=0.9, top_k=60, seed=4)
    together = infill(config, params, texts, LIMIT, sampling)
    assert together == infill(config, params, texts[::-1], LIMIT, sampling)[::-1]
    assert together[:1] == infill(config, params, texts[:1], LIMIT, sampling)
    assert together != infill(config, params, texts, LIMIT, replace(sampling, seed=5))


def test_a_drawn_mask_token_opens_no_blank(glm_130b):
    config, params = glm_130b
    texts = [[30, 31, MASK, 32, MASK]] * 4
    drawn = infill(config, params, texts, LIMIT, GREEDY)[0].pieces[0][1]
    config = replace(config, special_tokens=replace(config.special_tokens, gmask=drawn))
    filled = infill(config, params, texts, LIMIT, GREEDY)[0]
    assert drawn in filled.pieces[0]
    assert len(filled.pieces) == 2


@pytest.mark.parametrize(
    ("changes", "appended"), [({}, GMASK), ({"gmask": None}, MASK)], ids=["gmask", "mask"]
)
def test_a_text_without_blanks_is_continued(glm, changes, appended):
    config, params = glm
    config = replace(config, special_tokens=replace(config.special_tokens, **changes))
    filled = infill(config, params, [[30, 31, 32]], LIMIT, GREEDY)[0]
    assert filled.ids == [30, 31, 32, appended]
    assert filled.splice() == [30, 31, 32, *filled.pieces[0]]
    assert infill(config, params, [[30, 31, 32, appended]], LIMIT, GREEDY) == [filled]


@pytest.mark.parametrize(
    ("filled", "expected"),
    [
        (Filled([1, MASK, 2, MASK], [1, 3], [[7, 8], [9]]), [1, 7, 8, 2, 9]),
        (Filled([MASK, MASK, 5], [0, 1], [[], [6]]), [6, 5]),
        (Filled([3, 4], [], []), [3, 4]),
    ],
    ids=["two", "empty-piece", "none"],
)
def test_pieces_are_spliced_into_their_blanks(filled, expected):
    assert filled.splice() == expected


class Letters:
    """A tokenizer of ASCII characters."""

    special_tokens = TRAINED_TOKENS

    def encode_prompt(self, text):
        for name, id in (("[MASK]", MASK), ("[sMASK]", SMASK), ("[gMASK]", GMASK)):
            text = text.replace(name, chr(id))
        return [ord(letter) if ord(letter) in MASKS else ord(letter) + 100 for letter in text]

    def decode(self, ids):
        return "".join(chr(max(id, 100) - 100) for id in ids)


def test_texts_are_filled(glm):
    config, params = glm
    tokenizer = Letters()
    texts = ["one [MASK] two [sMASK].", "and so on", "[gMASK]"]
    filled = infill_text(config, params, tokenizer, texts, LIMIT, GREEDY)
    ids = infill(config, params, [tokenizer.encode_prompt(text) for text in texts], LIMIT, GREEDY)
    one, two = map(tokenizer.decode, ids[0].pieces)
    assert filled[0] == f"one {one} two {two}."
    assert filled[1] == "and so on" + tokenizer.decode(ids[1].pieces[0])
    assert filled[2] == tokenizer.decode(ids[2].pieces[0])


def test_a_tokenizer_of_another_model_is_refused(glm):
    config, params = glm
    config = replace(config, special_tokens=replace(TRAINED_TOKENS, eop=99))
    with pytest.raises(
        ValueError, match=r"tokenizer has SpecialTokens.*eop=8.*'glm-tiny' has .*eop=99"
    ):
        infill_text(config, params, Letters(), ["a [MASK]"], LIMIT)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("chatglm", [30, MASK, 31, GMASK], "text 1 has 2 blanks, but 'chatglm-tiny' fills one"),
        ("glm_4", [30, MASK, 31], "text 1 has a blank before its end, but 'glm-4-tiny' only cont"),
        ("glm", [30, MASK, SOP], "text 1 holds <sop> .id 7., which only `generate` takes"),
        ("glm", [30, 600, MASK], "text 1 has token 600, but vocab_size = 512"),
        ("glm", [30] * 127 + [MASK], "text 1 of 130 tokens .* needs position 129"),
        ("glm_130b", [30] * 128 + [MASK, 31], "text 1 of 131 tokens .* needs position 130"),
    ],
    ids=[
        "chatglm-two-blanks", "glm-4-blank-inside", "sop", "vocabulary", "too-long", "too-long-130b"
    ],
)  # fmt: skip
def test_unusable_texts_are_refused(request, name, text, message):
    config, params = request.getfixturevalue(name)
    with pytest.raises(ValueError, match=message):
        infill(config, params, [[30, MASK], text], LIMIT)


def test_banned_ids_outside_the_vocabulary_are_refused(glm):
    for settings in (Sampling(banned=(512,)), BeamSearch(banned=(512,))):
        with pytest.raises(ValueError, match="banned has token 512, but vocab_size = 512"):
            infill(*glm, [[30, MASK]], LIMIT, settings)


def test_no_texts_give_nothing(glm_130b):
    assert infill(*glm_130b, [], LIMIT) == []


def test_a_trained_vocabulary_fits(glm):
    tokenizers = pytest.importorskip("glmjax.data.tokenizers")
    tokenizer = tokenizers.train_tokenizer(["The capital of France is Paris, they say."] * 20, 289)
    text = infill_text(*glm, tokenizer, ["The capital of France is [MASK]."], LIMIT, GREEDY)[0]
    assert text.startswith("The capital of France is") and text.endswith(".")
