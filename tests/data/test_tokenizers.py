"""Vocabularies: exact round trips, special tokens that text cannot reach, blanks in prompts."""

import io
import pickle

import pytest
from sentencepiece import SentencePieceTrainer

from glmjax.data import tokenizers
from glmjax.data.tokenizers import check_vocabulary, load_tokenizer, train_tokenizer
from glmjax.presets import TRAINED_TOKENS, get_config


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, 400)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kalo mirten.",
        " leading and trailing  ",
        "runs   of    spaces\tand\t\ttabs",
        "\n\nlines\r\n\r\nof text\n",
        "\u2581 the sign for a space \u2581\u2581",
        "unseen: \u4e2d\u6587\uff0c\u65e5\u672c \U0001f600 \u00e9 e\u0301 \ufeff \u3000 \x00\x07",
        "\u00bd \ufb01 \u2460 are not normalised",
        "<0x0A> <s> </s> <unk> [UNK]",
        "[MASK] [gMASK] <|endoftext|> [CLS]",
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids(tokenizer):
    assert tokenizer.vocab_size == 400
    assert tokenizer.special_tokens == TRAINED_TOKENS
    pieces = [tokenizer.processor.id_to_piece(id) for id in range(10)]
    assert pieces == [
        "[PAD]", "[UNK]", "<|endoftext|>", "[CLS]", "[MASK]", "[sMASK]", "[gMASK]",
        "<|startofpiece|>", "<|endofpiece|>", "[dBLOCK]",
    ]  # fmt: skip


def test_text_cannot_spell_special_tokens(tokenizer):
    spelled = "".join(tokenizer.processor.id_to_piece(id) for id in range(10))
    assert min(tokenizer.encode(spelled)) >= 10


def test_special_and_absent_ids_have_no_text(tokenizer):
    assert tokenizer.decode([3, *tokenizer.encode("kalo"), 2, 8, 400, 511]) == "kalo"


def test_same_documents_give_the_same_vocabulary(tokenizer, documents):
    again = train_tokenizer(reversed(documents), 400)
    assert again.processor.serialized_model_proto() == tokenizer.processor.serialized_model_proto()
    assert again.digest == tokenizer.digest
    assert train_tokenizer(documents, 390).digest != tokenizer.digest


def test_large_corpora_are_sampled_in_any_order(documents, monkeypatch):
    monkeypatch.setattr(tokenizers, "SAMPLE_SIZE", 20_000)
    sampled = train_tokenizer(documents, 350)
    assert train_tokenizer(reversed(documents), 350).digest == sampled.digest
    monkeypatch.setattr(tokenizers, "SAMPLE_SIZE", 10**6)
    assert train_tokenizer(documents, 350).digest != sampled.digest


@pytest.mark.parametrize("mark", ".?!;:\n\u3002", ids=ascii)
def test_sentence_ends(tokenizer, mark):
    ids = tokenizer.encode(f"kalo{mark}")
    assert tokenizer.is_sentence_end[ids[-1]]
    assert not tokenizer.is_sentence_end[tokenizer.encode("kalo")].any()
    assert tokenizer.is_sentence_end.shape == (400,)


def test_special_tokens_end_no_sentence(tokenizer):
    assert not tokenizer.is_sentence_end[:10].any()


def test_prompt_blanks(tokenizer):
    ids = tokenizer.encode_prompt("kalo  [MASK] mir.\n[sMASK][gMASK]")
    assert ids == [*tokenizer.encode("kalo"), 4, *tokenizer.encode(" mir."), 5, 6]


def test_prompt_without_blanks_is_text(tokenizer):
    text = " kalo [mask] [CLS] mir "
    assert tokenizer.encode_prompt(text) == tokenizer.encode(text)


def test_save_load_and_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    (tmp_path / "renamed.model").write_bytes((tmp_path / "new" / "tokenizer.model").read_bytes())
    for copy in (
        load_tokenizer(tmp_path / "new"),
        load_tokenizer(tmp_path / "renamed.model", TRAINED_TOKENS),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert copy.digest == tokenizer.digest
        assert copy.special_tokens == tokenizer.special_tokens
        assert (copy.is_sentence_end == tokenizer.is_sentence_end).all()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["tokenizer.model"]


def test_load_refuses_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file .*absent\.model"):
        load_tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize("content", [b"", b"not a model"], ids=["empty", "text"])
def test_load_refuses_other_files(tmp_path, content):
    path = tmp_path / "wrong.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"wrong\.model"):
        load_tokenizer(path)


def test_load_refuses_other_vocabularies(tmp_path, documents):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=model, vocab_size=100, minloglevel=2
    )
    path = tmp_path / "foreign.model"
    path.write_bytes(model.getvalue())
    message = (
        r"foreign\.model is no known vocabulary: not glmjax's own \(token 0 is '<unk>' instead"
    )
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (
            ["a few words"],
            512,
            r"corpus of 11 characters .* data\.vocab_size = 512.* at most 2\d\d",
        ),
        (["a few words"] * 9, 270, r"data\.vocab_size = 270 is too small.* need 27\d"),
        ([], 512, r"no text .* data\.vocab_size = 512"),
        (["\n\n"], 512, r"no text .* data\.vocab_size = 512"),
    ],
    ids=["small-corpus", "small-vocabulary", "no-documents", "blank"],
)
def test_impossible_vocabulary_sizes(texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, vocab_size)


def test_model_must_cover_the_vocabulary(tokenizer):
    check_vocabulary(get_config("glm-tiny", vocab_size=400), tokenizer)
    with pytest.raises(ValueError, match=r"model\.vocab_size = 399 .* 400"):
        check_vocabulary(get_config("glm-tiny", vocab_size=399), tokenizer)
