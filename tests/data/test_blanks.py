"""Rows and batches: what holds for every objective, and what each setting changes."""

import numpy as np
import pytest

from glmjax.config import ObjectiveConfig, SpecialTokens, replace
from glmjax.data.blanks import OBJECTIVES, Batch, make_batch, text_length

GLM = SpecialTokens(
    pad=0, eos=2, cls=3, mask=4, smask=5, gmask=6, sop=7, eop=8, dblock=9
)  # fmt: skip
PLAIN = replace(GLM, cls=None)
SENTENCE_END = 10
IS_SENTENCE_END = np.arange(1000) == SENTENCE_END
LENGTH = 256
DEFAULT = ObjectiveConfig()
MIXTURE = ObjectiveConfig(token=0.5, sentence=0.3, decoder_noise=0.1, short_sequence=0.2)
GLM_130B = ObjectiveConfig(
    token=0.3, draw="row", positions="1d", pieces_per_row=4, document_suffix=1.0,
    document_min_ratio=0.2, single_span=0.02, short_sequence=0.02,
)  # fmt: skip
SENTENCE = ObjectiveConfig(token=0, sentence=1)
DOCUMENT = ObjectiveConfig(token=0)
OBJECTIVE_CASES = pytest.mark.parametrize(
    "objective",
    [
        DEFAULT,
        MIXTURE,
        SENTENCE,
        DOCUMENT,
        replace(GLM_130B, positions="2d", token=0.5),
        replace(GLM_130B, positions="2d", token=0.5, cross_document_attention=True),
        replace(MIXTURE, cross_document_attention=True),
    ],
    ids=["glm", "glm-mixture", "sentence", "document", "130b", "130b-cross", "glm-cross"],
)


def window(seed: int, length: int, tokens: SpecialTokens, document: int = 60) -> np.ndarray:
    """A window of a stream of documents of about `document` tokens."""
    rng = np.random.default_rng(seed)
    text = rng.integers(11, 1000, length)
    text[rng.random(length) < 0.05] = SENTENCE_END
    position = 0
    while position < length:
        if position:
            text[position - 1] = tokens.eos
        if tokens.cls is not None:
            text[position] = tokens.cls
        position += int(rng.integers(document // 2, 2 * document))
    return text.astype(np.uint16)


def tokens_of(objective: ObjectiveConfig) -> SpecialTokens:
    """GLM-130B, which draws by row, has no [CLS]."""
    return PLAIN if objective.draw == "row" else GLM


def texts_for(objective, tokens=None, rows=16, length=LENGTH, document=60) -> list[np.ndarray]:
    n = text_length(objective, length)
    tokens = tokens or tokens_of(objective)
    return [window(seed, n, tokens, document) for seed in range(rows)]


def batch_of(
    objective, texts, tokens=None, *, length=LENGTH, seed=0, step=0, rows=None, pairs=None
) -> Batch:
    return make_batch(
        texts, objective, tokens or tokens_of(objective),
        sequence_length=length, seed=seed, step=step,
        row_indices=range(len(texts)) if rows is None else rows,
        is_sentence_end_V=IS_SENTENCE_END, pairs=pairs,
    )  # fmt: skip


def pieces_of(batch: Batch, row: int) -> list[slice]:
    """Where the pieces of a row lie, from its intervals alone."""
    used = np.flatnonzero(batch.k_end_BT[row])
    starts = batch.k_start_BT[row, used]
    return [slice(int(start), int(used[starts == start][-1]) + 1) for start in np.unique(starts)]


def blanks_of(batch: Batch, row: int, piece: slice) -> list[np.ndarray]:
    """Targets of the blanks of a piece, in the order of part B, end-of-piece included."""
    sops = piece.start + np.flatnonzero(batch.tokens_BT[row, piece] == GLM.sop)
    ends = [*sops, piece.stop][1:]
    return [batch.targets_BT[row, a:b] for a, b in zip(sops, ends, strict=True)]


def restore(batch: Batch, row: int, piece: slice) -> list[int]:
    """Puts the blanks of a piece back into its part A."""
    tokens, positions = batch.tokens_BT[row, piece], batch.positions_B2T[row, 0, piece]
    sops = np.flatnonzero(tokens == GLM.sop)
    context = sops[0] if len(sops) else len(tokens)
    parts = [[token] for token in tokens[:context].tolist()]
    for sop, blank in zip(sops, blanks_of(batch, row, piece), strict=True):
        assert parts[positions[sop]][0] in GLM.masks
        parts[positions[sop]] = [token for token in blank.tolist() if token != GLM.eop]
    return [token for part in parts for token in part]


def all_blanks(batch: Batch) -> list[np.ndarray]:
    rows = range(len(batch.tokens_BT))
    return [blank for row in rows for piece in pieces_of(batch, row)
            for blank in blanks_of(batch, row, piece)]  # fmt: skip


def assert_same(a: Batch, b: Batch):
    for name, x, y in zip(Batch._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def test_types_and_shapes():
    batch = batch_of(DEFAULT, texts_for(DEFAULT, rows=3))
    assert {name: (x.shape, x.dtype.name) for name, x in batch._asdict().items()} == {
        "tokens_BT": ((3, 256), "int32"),
        "positions_B2T": ((3, 2, 256), "int32"),
        "k_start_BT": ((3, 256), "int32"),
        "k_end_BT": ((3, 256), "int32"),
        "targets_BT": ((3, 256), "int32"),
        "weights_BT": ((3, 256), "float32"),
        "objective_B": ((3,), "int32"),
    }


@OBJECTIVE_CASES
def test_rows_do_not_depend_on_the_rows_beside_them(objective):
    texts = texts_for(objective)
    whole = batch_of(objective, texts, step=5)
    for rows in ([0, 1, 2, 3], [9, 4, 15], [7]):
        part = batch_of(objective, [texts[row] for row in rows], step=5, rows=rows)
        assert_same(part, Batch(*(field[rows] for field in whole)))


@pytest.mark.parametrize("change", [{"seed": 1}, {"rows": range(16, 32)}], ids=["seed", "row"])
def test_seed_and_row_index_change_the_blanks(change):
    texts = texts_for(DEFAULT)
    first, other = batch_of(DEFAULT, texts), batch_of(DEFAULT, texts, **change)
    assert_same(first, batch_of(DEFAULT, texts))
    assert (first.tokens_BT != other.tokens_BT).any(axis=1).all()


@OBJECTIVE_CASES
def test_filling_the_blanks_restores_the_text(objective):
    objective = replace(objective, short_sequence=0.0, decoder_noise=0.0)
    for step in range(6):
        texts = texts_for(objective)
        batch = batch_of(objective, texts, step=step)
        for row, text in enumerate(texts):
            pieces = pieces_of(batch, row)
            restored = [token for piece in pieces for token in restore(batch, row, piece)]
            slots = 1
            if OBJECTIVES[batch.objective_B[row]] == "mask":
                slots = objective.pieces_per_row
            if slots == 1:  # the end of a text that is too long is cut
                assert restored == text[: len(restored)].tolist()
                assert len(restored) >= 0.85 * len(text)
            else:
                quarters = text.reshape(slots, -1)
                by_slot = [[] for _ in range(slots)]
                for piece in pieces:
                    by_slot[piece.start * slots // LENGTH] += restore(batch, row, piece)
                for quarter, tokens in zip(quarters, by_slot, strict=True):
                    assert tokens == quarter[: len(tokens)].tolist()
                    assert len(tokens) >= 0.85 * len(quarter)


@OBJECTIVE_CASES
def test_intervals_are_the_official_mask_inside_each_piece(objective):
    for step in range(3):
        batch = batch_of(objective, texts_for(objective, rows=4), step=step)
        for row in range(4):
            keys = np.arange(LENGTH)
            start, end = batch.k_start_BT[row, :, None], batch.k_end_BT[row, :, None]
            visible = (start <= keys) & (keys < end)
            expected = np.zeros((LENGTH, LENGTH), bool)
            for piece in pieces_of(batch, row):
                context = int((batch.positions_B2T[row, 1, piece] == 0).sum())
                i, j = np.indices((piece.stop - piece.start,) * 2)
                expected[piece, piece] = (j < context) | (j <= i)
            np.testing.assert_array_equal(visible, expected)


@OBJECTIVE_CASES
def test_only_part_b_counts(objective):
    for step in range(4):
        batch = batch_of(objective, texts_for(objective), step=step)
        in_part_b = batch.positions_B2T[:, 1] > 0
        not_cls = batch.targets_BT != GLM.cls
        np.testing.assert_array_equal(batch.weights_BT, in_part_b & not_cls)
        assert (batch.weights_BT.sum(axis=1) > 0).all()


@OBJECTIVE_CASES
def test_padding_is_empty(objective):
    batch = batch_of(objective, texts_for(objective))
    padding = batch.k_end_BT == 0
    assert padding.any()
    assert (batch.tokens_BT[padding] == GLM.pad).all()
    assert (batch.targets_BT[padding] == GLM.pad).all()
    for field in (batch.k_start_BT, batch.weights_BT, *batch.positions_B2T.swapaxes(0, 1)):
        assert (field[padding] == 0).all()


@OBJECTIVE_CASES
def test_part_a_positions_count_from_zero_in_every_piece(objective):
    batch = batch_of(objective, texts_for(objective))
    for row in range(len(batch.tokens_BT)):
        for piece in pieces_of(batch, row):
            position, block = batch.positions_B2T[row, :, piece]
            context = int((block == 0).sum())
            assert position[:context].tolist() == list(range(context))
            for end, count in zip(*run_ends(block[context:]), strict=True):
                blank = slice(context + end - count, context + end)
                assert block[blank].tolist() == list(range(1, count + 1))
                assert len(set(position[blank].tolist())) == 1


def run_ends(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends and lengths of the blanks of a part B, from its block positions."""
    ends = np.append(np.flatnonzero(block == 1)[1:], len(block)) if len(block) else np.array([])
    return ends, np.diff(ends, prepend=0)


@pytest.mark.parametrize("objective", [DEFAULT, GLM_130B], ids=["glm", "130b"])
def test_every_row_has_targets_however_short_its_documents(objective):
    tokens = PLAIN
    for document in (2, 3, 5, 8):
        texts = texts_for(objective, tokens, document=document)
        for step in range(3):
            batch = batch_of(objective, texts, tokens, step=step)
            assert (batch.weights_BT.sum(axis=1) > 0).all()


@OBJECTIVE_CASES
def test_text_as_long_as_the_row_still_gets_its_blanks(objective):
    for document in (20, 10_000):
        texts = [window(seed, LENGTH, tokens_of(objective), document) for seed in range(16)]
        batch = batch_of(objective, texts)
        assert (batch.weights_BT.sum(axis=1) > 0).all()
        if objective.token + objective.sentence == 1:
            assert {int(blank[-1]) for blank in all_blanks(batch)} == {GLM.eop}


@OBJECTIVE_CASES
def test_cut_rows_see_nothing_behind_their_slots(objective):
    cut = replace(objective, cut_targets=True)
    texts = [window(seed, LENGTH, tokens_of(cut), document=20) for seed in range(16)]
    batch = batch_of(cut, texts)
    slots = np.full(16, 1)
    slots[batch.objective_B == 0] = cut.pieces_per_row
    slot_length = (LENGTH // slots)[:, None]
    slot_end = (np.arange(LENGTH) // slot_length + 1) * slot_length
    assert (batch.k_end_BT <= slot_end).all()
    assert (batch.k_end_BT == slot_end).any()


def test_documents_see_only_themselves_unless_told():
    texts = texts_for(DEFAULT)
    apart = batch_of(DEFAULT, texts)
    together = batch_of(replace(DEFAULT, cross_document_attention=True), texts)
    for row, text in enumerate(texts):
        documents = (text[: len(text) - 10] == GLM.eos).sum()
        assert len(pieces_of(apart, row)) >= documents
        assert len(pieces_of(together, row)) == 1
        for piece in pieces_of(apart, row):
            restored = restore(apart, row, piece)
            assert GLM.eos not in restored[:-1] and GLM.cls not in restored[1:]


@OBJECTIVE_CASES
def test_closed_blanks_hold_the_end_of_a_document_only_where_the_original_does(objective):
    closed = [
        blank
        for step in range(4)
        for blank in all_blanks(batch_of(objective, texts_for(objective), step=step))
        if blank[-1] == GLM.eop
    ]
    ends_inside = any(GLM.eos in blank or GLM.cls in blank for blank in closed)
    assert closed
    assert ends_inside == (objective.draw == "row" and objective.cross_document_attention)


def test_batch_draws_share_one_objective_and_rows_draw_their_own():
    shared, own = replace(MIXTURE, short_sequence=0.0), replace(MIXTURE, draw="row")
    texts = texts_for(shared)
    seen = [set(batch_of(shared, texts, step=step).objective_B.tolist()) for step in range(40)]
    assert all(len(objectives) == 1 for objectives in seen)
    assert set.union(*seen) == {0, 1, 2}
    assert set(batch_of(own, texts).objective_B.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("draw", ["batch", "row"])
def test_shares_of_objectives(draw):
    pairs = [(np.array([11, 12]), np.array([13]))]
    objective = replace(MIXTURE, draw=draw, multitask=0.2, short_sequence=0.0)
    text = window(0, 16, GLM)
    counts = np.zeros(4)
    for step in range(100):
        rows = range(20 * step, 20 * step + 20)
        batch = batch_of(objective, [text] * 20, length=32, step=step, rows=rows, pairs=pairs)
        counts += np.bincount(batch.objective_B, minlength=4)
    draws = 100 if draw == "batch" else 2000
    expected = np.array([0.4, 0.24, 0.16, 0.2])
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts / 2000 - expected) < 4 * deviation).all()


@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.3])
def test_mask_ratio_is_the_covered_share(ratio):
    objective = ObjectiveConfig(mask_ratio=ratio)
    text = window(0, 400, GLM, document=10_000)
    blanks = all_blanks(batch_of(objective, [text] * 50, length=1024))
    covered = sum(len(blank) - 1 for blank in blanks) / (50 * 400)
    # The last blank overshoots the goal: by 1.1 tokens on average, by E[L^2] / (2 E[L]) < 3 at most.
    assert ratio - 1 / 400 <= covered <= ratio + 3 / 400


@pytest.mark.parametrize("mean", [2.0, 6.0])
def test_mean_span_is_the_mean_length(mean):
    objective = ObjectiveConfig(mean_span=mean, mask_ratio=0.3)
    text = window(0, 1500, GLM, document=10_000)
    blanks = all_blanks(batch_of(objective, [text] * 20, length=2560))
    lengths = np.array([len(blank) - 1 for blank in blanks])
    expected = mean / (1 - np.exp(-mean))
    assert abs(lengths.mean() - expected) < 5 * lengths.std() / len(lengths) ** 0.5


@pytest.mark.parametrize("draw", ["batch", "row"])
def test_single_span(draw):
    objective = replace(DEFAULT, single_span=1.0, draw=draw, sentence=0.0)
    batch = batch_of(objective, texts_for(objective))
    for row in range(16):
        assert [len(blanks_of(batch, row, piece)) for piece in pieces_of(batch, row)] == (
            [1] * len(pieces_of(batch, row))
        )


def test_single_span_makes_the_batch_token_level():
    objective = replace(DOCUMENT, single_span=1.0)
    assert batch_of(objective, texts_for(objective)).objective_B.tolist() == [0] * 16


def test_short_sequences_of_a_batch_are_windows_that_start_at_sentences():
    objective = replace(DEFAULT, short_sequence=1.0, cross_document_attention=True)
    texts = texts_for(objective, document=10_000)
    counts = set()
    for step in range(20):
        batch = batch_of(objective, texts, step=step)
        for row, text in enumerate(texts):
            pieces = pieces_of(batch, row)
            counts.add(len(pieces))
            starts = {1, *(np.flatnonzero(IS_SENTENCE_END[text]) + 1)}
            for piece in pieces:
                cls, *words = restore(batch, row, piece)
                assert cls == GLM.cls
                found = [s for s in starts if text[s : s + len(words)].tolist() == words]
                assert found
    assert min(counts) == 1 and max(counts) > 3


def test_short_sequences_of_rows_are_prefixes_of_their_slots():
    objective = replace(GLM_130B, token=1.0, short_sequence=1.0, positions="2d")
    texts = texts_for(objective, document=10_000, length=512)
    batch = batch_of(objective, texts, length=512)
    lengths = []
    for row, text in enumerate(texts):
        slots = text.reshape(4, -1)
        for piece, slot in zip(pieces_of(batch, row), slots, strict=True):
            tokens = restore(batch, row, piece)
            assert tokens == slot[: len(tokens)].tolist()
            lengths.append(len(tokens))
    assert min(lengths) >= 32 and max(lengths) < len(slots[0])
    assert len(set(lengths)) > 20


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_document_min_ratio(ratio):
    objective = replace(DOCUMENT, document_min_ratio=ratio, document_suffix=1.0)
    text = window(0, 200, GLM, document=10_000)
    lengths = {len(all_blanks(batch_of(objective, [text], step=step))[0]) for step in range(300)}
    assert min(lengths) >= int(ratio * 200) and max(lengths) <= 198
    span = 198 - int(ratio * 200)
    assert min(lengths) < int(ratio * 200) + 0.1 * span + 1
    assert max(lengths) > 198 - 0.1 * span - 1


def test_document_length_is_one_share_for_the_whole_batch():
    objective = replace(DOCUMENT, document_suffix=1.0)
    text = window(0, 200, GLM, document=10_000)
    for step in range(5):
        blanks = all_blanks(batch_of(objective, [text] * 8, step=step))
        assert len({len(blank) for blank in blanks}) == 1
    own = all_blanks(batch_of(replace(objective, draw="row"), [text] * 8))
    assert len({len(blank) for blank in own}) > 4


@pytest.mark.parametrize("suffix", [0.0, 0.5, 1.0])
def test_document_suffix(suffix):
    objective = replace(DOCUMENT, document_suffix=suffix)
    text = window(0, 50, GLM, document=10_000)
    closed = [
        blank[-1] == GLM.eop for blank in all_blanks(batch_of(objective, [text] * 400, length=64))
    ]
    assert abs(np.mean(closed) - (1 - suffix)) <= 4 * (suffix * (1 - suffix) / 400) ** 0.5


def test_several_documents_always_lose_their_end_together():
    objective = replace(DOCUMENT, document_suffix=0.0, cross_document_attention=True)
    texts = texts_for(objective)
    batch = batch_of(objective, texts)
    for row, text in enumerate(texts):
        (piece,) = pieces_of(batch, row)
        (blank,) = blanks_of(batch, row, piece)
        assert (text == GLM.eos).any()
        assert blank.tolist() == text[: len(restore(batch, row, piece))][-len(blank) :].tolist()


@pytest.mark.parametrize("objective", [DEFAULT, SENTENCE], ids=["token", "sentence"])
def test_decoder_noise_is_token_level_only(objective):
    texts = texts_for(objective)
    clean = batch_of(objective, texts)
    noisy = batch_of(replace(objective, decoder_noise=0.5), texts)
    changed = clean.tokens_BT != noisy.tokens_BT
    assert changed.any() == (objective is DEFAULT)
    assert (noisy.tokens_BT[changed] == GLM.dblock).all()
    assert (clean.tokens_BT[changed] != GLM.sop).all()
    assert (clean.weights_BT[changed] == 1).all()
    assert_same(clean, noisy._replace(tokens_BT=clean.tokens_BT))


@pytest.mark.parametrize("pieces", [1, 4])
def test_pieces_per_row(pieces):
    objective = replace(DEFAULT, pieces_per_row=pieces)
    texts = texts_for(objective, document=10_000)
    batch = batch_of(objective, texts)
    for row in range(len(texts)):
        starts = [piece.start for piece in pieces_of(batch, row)]
        assert starts == [LENGTH // pieces * slot for slot in range(pieces)]


def test_pieces_per_row_leaves_continuations_whole():
    objective = replace(GLM_130B, token=0.0)
    texts = texts_for(objective, document=10_000)
    batch = batch_of(objective, texts)
    assert all(len(pieces_of(batch, row)) == 1 for row in range(len(texts)))


def test_one_dimensional_positions():
    pairs = [(np.arange(11, 21), np.arange(21, 26))]
    objective = replace(GLM_130B, token=0.4, multitask=0.3)
    texts = texts_for(objective)
    batch = batch_of(objective, texts, pairs=pairs)
    both = batch_of(replace(objective, positions="2d"), texts, PLAIN, pairs=pairs)
    assert set(batch.objective_B.tolist()) == {0, 2, 3}
    assert (batch.positions_B2T[:, 1] == 0).all()
    for row, kind in enumerate(batch.objective_B):
        for piece in pieces_of(batch, row):
            position = batch.positions_B2T[row, 0, piece].tolist()
            if OBJECTIVES[kind] == "mask":
                assert position == both.positions_B2T[row, 0, piece].tolist()
            else:
                assert position == list(range(len(position)))


@pytest.mark.parametrize(
    ("objective", "mask"),
    [(DEFAULT, GLM.mask), (SENTENCE, GLM.smask), (DOCUMENT, GLM.gmask)],
    ids=["token", "sentence", "document"],
)
def test_task_masks(objective, mask):
    texts = texts_for(objective)
    ours = batch_of(objective, texts)
    assert np.isin(ours.tokens_BT, GLM.masks).sum() == (ours.tokens_BT == mask).sum() > 0
    bert = replace(GLM, smask=None, gmask=None)
    plain = batch_of(replace(objective, task_masks=False), texts, bert)
    expected = np.where(ours.tokens_BT == mask, GLM.mask, ours.tokens_BT)
    np.testing.assert_array_equal(plain.tokens_BT, expected)


@pytest.mark.parametrize("shuffle", [True, False])
def test_shuffle_spans(shuffle):
    objective = replace(DEFAULT, shuffle_spans=shuffle)
    batch = batch_of(objective, texts_for(objective))
    in_order = []
    for row in range(16):
        for piece in pieces_of(batch, row):
            masks = batch.positions_B2T[row, 0, piece][batch.tokens_BT[row, piece] == GLM.sop]
            in_order.append(masks.tolist() == sorted(masks.tolist()))
    assert all(in_order) != shuffle


def test_every_blank_keeps_its_target_and_the_text_is_cut_instead():
    objective = replace(GLM_130B, token=1.0, positions="2d", single_span=0.0, short_sequence=0.0)
    texts = [window(seed, 500, PLAIN, document=10_000) for seed in range(8)]
    batch = batch_of(objective, texts, length=512)
    for row, text in enumerate(texts):
        for quarter, piece in zip(text.reshape(4, -1), pieces_of(batch, row), strict=True):
            assert all(blank[-1] == GLM.eop for blank in blanks_of(batch, row, piece))
            tokens = restore(batch, row, piece)
            assert tokens == quarter[: len(tokens)].tolist()
            assert len(tokens) < len(quarter)


def test_cut_targets_cuts_the_end_of_part_b():
    objective = replace(
        GLM_130B, token=1.0, positions="2d", single_span=0.0, short_sequence=0.0, cut_targets=True
    )
    texts = [window(seed, 500, PLAIN, document=10_000) for seed in range(8)]
    cut = batch_of(objective, texts, length=512)
    whole = batch_of(objective, texts, length=1024)  # the same draws with room to spare
    for name in ("tokens_BT", "positions_B2T", "targets_BT", "weights_BT"):
        slots, roomy_slots = (
            np.array(np.split(getattr(batch, name), 4, axis=-1)) for batch in (cut, whole)
        )
        np.testing.assert_array_equal(slots, roomy_slots[..., :128], err_msg=name)
    assert cut.weights_BT.sum() < whole.weights_BT.sum()
    for row in range(8):
        for slot, piece in enumerate(pieces_of(cut, row)):
            assert (piece.start, piece.stop) == (128 * slot, 128 * slot + 128)
            assert cut.k_end_BT[row, piece].max() == piece.stop


def test_multitask_rows_hold_one_pair_a_slot():
    pairs = [(np.arange(11, 41), np.arange(51, 61)), (np.array([11, 12]), np.array([60]))]
    objective = replace(GLM_130B, multitask=1.0)
    batch = batch_of(objective, texts_for(objective), PLAIN, pairs=pairs)
    layouts = set()
    for row in range(16):
        pieces = pieces_of(batch, row)
        assert [piece.start for piece in pieces] == [0, 64, 128, 192]
        for piece in pieces:
            layouts.add(tuple(batch.tokens_BT[row, piece].tolist()))
            assert batch.targets_BT[row, piece.stop - 1] == GLM.eop
    assert layouts == {
        (*text.tolist(), GLM.mask, GLM.sop, *target.tolist()) for text, target in pairs
    }


@pytest.mark.parametrize(
    ("text", "target", "kept_text", "kept_target"),
    [(70, 20, 42, 20), (70, 60, 16, 46), (5, 90, 5, 57)],
    ids=["text cut", "both cut", "target cut"],
)
def test_overlong_pairs(text, target, kept_text, kept_target):
    pairs = [(np.arange(100, 100 + text), np.arange(300, 300 + target))]
    objective = replace(GLM_130B, multitask=1.0)
    batch = batch_of(objective, texts_for(objective, rows=1), PLAIN, pairs=pairs)
    expected = [*range(100, 100 + kept_text), GLM.mask, *range(300, 300 + kept_target), GLM.eop]
    assert batch.targets_BT[0, : len(expected)].tolist() == expected


@pytest.mark.parametrize(
    ("objective", "tokens", "message"),
    [
        (SENTENCE, replace(GLM, smask=None), "special token smask"),
        (DOCUMENT, replace(GLM, gmask=None), "special token gmask"),
        (replace(DEFAULT, decoder_noise=0.1), replace(GLM, dblock=None), "special token dblock"),
        (replace(DEFAULT, multitask=0.05), GLM, "objective.multitask = 0.05"),
    ],
    ids=["smask", "gmask", "dblock", "pairs"],
)
def test_missing_tokens_and_pairs_are_named(objective, tokens, message):
    with pytest.raises(ValueError, match=message):
        batch_of(objective, texts_for(objective), tokens)


def test_empty_target_is_refused():
    objective = replace(DEFAULT, multitask=1.0)
    with pytest.raises(ValueError, match="pair 0 of the multi-task data has an empty target"):
        batch_of(objective, texts_for(objective), pairs=[(np.array([11]), np.array([], int))])


@pytest.mark.parametrize("length", [64, 512, 2048])
@pytest.mark.parametrize(
    "objective",
    [DEFAULT, SENTENCE, DOCUMENT, GLM_130B, replace(DEFAULT, mask_ratio=0.3, mean_span=1.0)],
    ids=["token", "sentence", "document", "130b", "dense"],
)
def test_text_length_leaves_room_for_the_blanks(objective, length):
    n = text_length(objective, length)
    token_level = replace(objective, token=1.0) if objective.token else objective
    texts = [window(seed, n, PLAIN, document=10_000) for seed in range(16)]
    batch = batch_of(
        replace(token_level, positions="2d", short_sequence=0.0), texts, PLAIN, length=length
    )
    kept = [
        sum(len(restore(batch, row, piece)) for piece in pieces_of(batch, row)) / n
        for row in range(16)
    ]
    assert np.mean(kept) > 0.99
    filled = (batch.k_end_BT > 0).mean()
    assert filled > (0.8 if length == 64 else 0.93)
