"""Official vocabularies by content: detection, text rules and every error, on stand-in files."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocabularies import write_byte_pairs, write_chinese, write_ice_text, write_word_pieces

from glmjax.data.tokenizers import load_tokenizer, train_tokenizer
from glmjax.presets import (
    BERT_TOKENS,
    CHATGLM2_TOKENS,
    CHATGLM_TOKENS,
    CHATGLM_V0_TOKENS,
    CHINESE_TOKENS,
    GPT2_TOKENS,
    ICETK_TOKENS,
    PRESETS,
    ROBERTA_TOKENS,
)

CHATGLM = {"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0}
WRITERS = {
    "gpt2": lambda folder: write_byte_pairs(folder, "gpt2"),
    "roberta": lambda folder: write_byte_pairs(folder, "roberta", "roberta-"),
    "bert": write_word_pieces,
    "chinese": write_chinese,
    "chatglm": lambda folder: write_ice_text(folder, **CHATGLM),
    "chatglm-v0": lambda folder: write_ice_text(folder, tokenizer_class="ChatGLMTokenizer"),
    "glm-130b": lambda folder: write_ice_text(
        folder, tokenizer_class="icetk-glm-130B", num_image_tokens=20000
    ),
}
TOKENS = {
    "gpt2": GPT2_TOKENS, "roberta": ROBERTA_TOKENS, "bert": BERT_TOKENS, "chinese": CHINESE_TOKENS,
    "chatglm": CHATGLM_TOKENS, "chatglm-v0": CHATGLM_V0_TOKENS, "glm-130b": ICETK_TOKENS,
}  # fmt: skip
SIZES = {
    "gpt2": 50266, "roberta": 50269, "bert": 30524, "chinese": 50011, "chatglm": 130344,
    "chatglm-v0": 150344, "glm-130b": 150344,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The first file of each vocabulary."""
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def loaded(files):
    return {name: load_tokenizer(file) for name, file in files.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_content_tells_what_it_is(name, files, loaded):
    assert loaded[name].special_tokens == TOKENS[name]
    assert loaded[name].vocab_size == SIZES[name]
    for path, tokens in ((files[name], TOKENS[name]), (files[name].parent, None)):
        assert load_tokenizer(path, tokens).digest == loaded[name].digest


def test_digests_differ(loaded):
    assert len({tokenizer.digest for tokenizer in loaded.values()}) == len(loaded)


@pytest.mark.parametrize("name", WRITERS)
def test_save_and_pickle(name, loaded, tmp_path):
    tokenizer = loaded[name]
    tokenizer.save(tmp_path / "run")
    text = "hello world [MASK] 12."
    for copy in (load_tokenizer(tmp_path / "run"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.special_tokens == tokenizer.special_tokens
        assert copy.digest == tokenizer.digest
        assert copy.encode_prompt(text) == tokenizer.encode_prompt(text)


@pytest.mark.parametrize("name", WRITERS)
def test_models_have_a_row_for_every_token(name, loaded):
    sizes = [c.vocab_size for c in PRESETS.values() if c.special_tokens == TOKENS[name]]
    assert sizes
    assert min(sizes) >= loaded[name].vocab_size


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(name, loaded, text):
    """All but special tokens and white space alone, which the official code drops."""
    tokenizer = loaded[name]
    assert tokenizer.decode(tokenizer.encode(text)) == ("" if not text.strip() else text)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("hello wrd.\n\t12;"), max_size=40))
def test_layout_round_trip(loaded, text):
    """ChatGLM-6B keeps line breaks, tabs and runs of spaces; single spaces at the ends are lost."""
    tokenizer = loaded["chatglm"]
    ids = tokenizer.encode(f"o{text}o")
    assert tokenizer.decode(ids) == f"o{text}o".replace(" .", ".")
    older = loaded["chatglm-v0"]
    assert older.encode(f"o{text}o") == [id + 20000 for id in ids]


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_ids_have_a_text(name, loaded, data):
    ids = data.draw(st.lists(st.integers(0, loaded[name].vocab_size + 500), max_size=20))
    assert isinstance(loaded[name].decode(ids), str)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "bert", "chinese"])
def test_special_tokens_in_texts_of_glm(name, loaded):
    tokenizer = loaded[name]
    for spelled, id in tokenizer.commands.items():
        assert tokenizer.encode(f"{spelled}{spelled}") == [id, id]
        assert tokenizer.encode(f"hello{spelled}") == [*tokenizer.encode("hello"), id]
    assert tokenizer.encode(" \n\u3000") == []
    assert tokenizer.encode_prompt("[CLS] hello") == tokenizer.encode("[CLS] hello")


@pytest.mark.parametrize("name", ["gpt2", "roberta", "chinese"])
def test_masks_take_the_white_space_before_them(name, loaded):
    tokens = TOKENS[name]
    hello = loaded[name].encode("hello")
    for spelled, id in (
        ("[MASK]", tokens.mask),
        ("[sMASK]", tokens.smask),
        ("[gMASK]", tokens.gmask),
    ):
        assert loaded[name].encode(f"hello \n {spelled}") == [*hello, id]


def test_bert_knows_one_mask(loaded):
    ids = loaded["bert"].encode_prompt("[MASK] [gMASK]")
    assert ids[0] == BERT_TOKENS.mask
    assert BERT_TOKENS.mask not in ids[1:]


def test_bert_lower_cases_and_strips_accents(loaded):
    tokenizer = loaded["bert"]
    assert tokenizer.encode("HELLO\tCaf\u00e9s,  12!") == [104, 106, 107, 113, 110, 111, 114]
    assert tokenizer.decode([104, 106, 107, 113, 110, 111, 114]) == "hello cafes , 12 !"
    assert tokenizer.decode([103, 107]) == "[MASK]s"
    assert tokenizer.encode("wor\x00ld\ue000 \u4e16x" + "o" * 101) == [105, 100, 100]


@pytest.mark.parametrize("name", ["chatglm", "chatglm-v0", "glm-130b"])
def test_texts_of_ice_text_cannot_open_a_blank(name, loaded):
    tokenizer, tokens = loaded[name], TOKENS[name]
    text = "hello [MASK] [gMASK] [sMASK] <sop> <eop> <dBLOCK>"
    assert {*range(tokens.mask, tokens.mask + 8)}.isdisjoint(tokenizer.encode(text))
    assert tokens.mask in tokenizer.encode_prompt(text)
    assert tokens.sop not in tokenizer.encode_prompt(text)


def test_runs_of_spaces(loaded):
    tokenizer = loaded["chatglm"]
    for length, blanks in ((2, [2]), (80, [80]), (81, [80]), (82, [80, 2]), (161, [80, 80])):
        ids = tokenizer.encode(f"hello{' ' * length}hello")
        found = [id - 130007 for id in ids if 130009 <= id <= 130087]
        assert found == blanks
        assert tokenizer.decode(ids) == f"hello{' ' * length}hello"


def test_line_breaks_of_glm_130b_are_spaces(loaded):
    tokenizer = loaded["glm-130b"]
    assert tokenizer.encode("hello\n\tworld") == tokenizer.encode("hello world")
    assert tokenizer.decode(tokenizer.encode("hello<n>world")) == "hello\nworld"


def test_chatglm_closes_spaces_and_drops_padding(loaded):
    tokenizer = loaded["chatglm"]
    hello = tokenizer.encode("hello")
    assert tokenizer.decode([3, 3, *hello, *tokenizer.encode("?"), 130005]) == "hello?"
    assert loaded["glm-130b"].decode([0, *(id + 20000 for id in hello)]) == "hello"


def test_sentences_end_where_the_official_code_says(loaded):
    gpt2 = loaded["gpt2"]
    ends = gpt2.is_sentence_end
    assert ends[gpt2.encode(".")].all()
    assert ends[gpt2.encode(";")].all()
    # Its code looks for a line break in the spelling of the byte, which is another character.
    assert not ends[gpt2.encode("hello\n")].any()
    assert not ends[gpt2.encode("[MASK]<|endoftext|>")].any()


# Errors


def test_trained_vocabularies_are_found_beside_a_checkpoint(documents, tmp_path):
    trained = train_tokenizer(documents, 300)
    trained.save(tmp_path)
    assert load_tokenizer(tmp_path).digest == trained.digest
    with pytest.raises(FileNotFoundError, match=r"has no vocab\.json or gpt2-vocab\.json"):
        load_tokenizer(tmp_path, GPT2_TOKENS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (GPT2_TOKENS, r"no vocab\.json or gpt2-vocab\.json, .* GLM 2B and 10B; .*github\.com/THUDM/GLM"),
        (BERT_TOKENS, r"no vocab\.txt or bert-base.*; it comes from github\.com/THUDM/GLM"),
        (CHINESE_TOKENS, r"no cog-pretrain\.model, .*THUDM/GLM, folder chinese_sentencepiece"),
        (ICETK_TOKENS, r"no ice_text\.model, .* GLM-130B; .* Hugging Face THUDM/chatglm-6b"),
        (CHATGLM_TOKENS, r"no ice_text\.model, .* ChatGLM-6B; .* Hugging Face THUDM/chatglm-6b"),
        (None, r"has no vocabulary; known are tokenizer\.model of glmjax, .*ice_text\.model of GLM-130B"),
        (CHATGLM2_TOKENS, r"has no vocabulary; known are"),
    ],
    ids=["gpt2", "bert", "chinese", "glm-130b", "chatglm", "any", "chatglm2"],
)  # fmt: skip
def test_a_missing_file_is_named_with_its_origin(tokens, message, tmp_path):
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer(tmp_path, tokens)


def test_several_vocabularies_in_a_folder(tmp_path):
    write_byte_pairs(tmp_path, "gpt2", "gpt2-")
    write_byte_pairs(tmp_path, "roberta", "roberta-")
    with pytest.raises(
        ValueError, match=r"several vocabularies, roberta-vocab\.json, gpt2-vocab\.json"
    ):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, GPT2_TOKENS).special_tokens == GPT2_TOKENS
    assert load_tokenizer(tmp_path, ROBERTA_TOKENS).special_tokens == ROBERTA_TOKENS


def test_merges_are_missing(tmp_path):
    file = write_byte_pairs(tmp_path, "gpt2", "gpt2-")
    (tmp_path / "gpt2-merges.txt").unlink()
    message = (
        r"gpt2-vocab\.json has no gpt2-merges\.txt beside it; both come from github\.com/THUDM/GLM"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("#version: 0.2\nh e\nz q\n", r"vocab\.json has no token 'zq', which .* merges\.txt need"),
        ("h e l\n", r"vocab\.json has no token 'e l'"),
        (b"\xff\xfe", r"merges\.txt is not UTF-8 text"),
    ],
    ids=["foreign", "three", "binary"],
)
def test_merges_of_another_vocabulary(content, message, tmp_path):
    file = write_byte_pairs(tmp_path, "gpt2")
    (tmp_path / "merges.txt").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(ValueError, match=message):
        load_tokenizer(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"vocab\.json is not JSON"),
        ('{"a": 0,', r"vocab\.json is not JSON"),
        ("[1, 2]", r"vocab\.json is not a JSON object"),
        ('{"a": 0, "b": 2}', r"vocab\.json does not number its tokens 0, 1, 2"),
        ('{"a": 0, "b": "1"}', r"vocab\.json does not number its tokens"),
        ("{}", r"not GPT-2's \(token 50256 is None instead of '<\|endoftext\|>'\), not RoBERTa's"),
    ],
    ids=["empty", "cut", "list", "gap", "text", "none"],
)
def test_broken_json(content, message, tmp_path):
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "vocab.json")


def test_a_byte_without_a_token(tmp_path):
    file = write_byte_pairs(tmp_path, "gpt2")
    file.write_text(file.read_text().replace('"!"', '"other"', 1))
    with pytest.raises(ValueError, match=r"vocab\.json has no token '!', which bytes"):
        load_tokenizer(file)


def test_a_changed_special_token(tmp_path):
    file = write_word_pieces(tmp_path)
    file.write_text(file.read_text().replace("[MASK]", "[mask]"))
    with pytest.raises(ValueError, match=r"token 103 is '\[mask\]' instead of '\[MASK\]'"):
        load_tokenizer(file)
    file = write_ice_text(tmp_path / "ice", **CHATGLM)
    file.write_bytes(file.read_bytes().replace(b"<|blank_7|>", b"<|blank_x|>"))
    with pytest.raises(
        ValueError, match=r"token 130014 is '<\|blank_x\|>' instead of '<\|blank_7\|>'"
    ):
        load_tokenizer(file)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ice_text.model", "Hugging Face THUDM/chatglm-6b"),
        ("gpt2-vocab.json", "github.com/THUDM/GLM, folder .pytorch_pretrained_bert"),
        ("tokenizer.model", "a run of glmjax train"),
    ],
)
def test_an_absent_file_is_named_with_its_origin(name, source, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_tokenizer(tmp_path / name)
    assert (
        str(caught.value) == f"there is no tokenizer file {tmp_path / name}; it comes from {source}"
    )


def test_other_files(tmp_path):
    (tmp_path / "vocab.bin").touch()
    with pytest.raises(ValueError, match=r"vocab\.bin is no vocabulary: its name ends in none of"):
        load_tokenizer(tmp_path / "vocab.bin")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gpt2", ROBERTA_TOKENS), ("roberta", GPT2_TOKENS), ("bert", GPT2_TOKENS),
        ("chinese", CHATGLM_TOKENS), ("chatglm", CHATGLM_V0_TOKENS), ("chatglm-v0", CHATGLM_TOKENS),
        ("chatglm", CHINESE_TOKENS), ("glm-130b", CHATGLM_V0_TOKENS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_vocabulary_of_another_model(name, other, files):
    with pytest.raises(
        ValueError, match=r"is the vocabulary of .* with SpecialTokens.*the model has"
    ):
        load_tokenizer(files[name], other)


def test_ice_text_alone_must_know_its_model(tmp_path):
    file = write_ice_text(tmp_path)
    with pytest.raises(ValueError, match=r"ice_text\.model serves GLM-130B and both ChatGLM-6B"):
        load_tokenizer(file)
    for tokens in (CHATGLM_TOKENS, CHATGLM_V0_TOKENS, ICETK_TOKENS):
        tokenizer = load_tokenizer(file, tokens)
        assert tokenizer.special_tokens == tokens
        assert tokenizer.encode_prompt("hello [MASK]")[-1] == tokens.mask


def test_glm_130b_reads_the_file_of_chatglm(files):
    assert load_tokenizer(files["chatglm"], ICETK_TOKENS).special_tokens == ICETK_TOKENS


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 7},
        {"tokenizer_class": "LlamaTokenizer", "num_image_tokens": 0},
        {"tokenizer_class": ["ChatGLMTokenizer"], "num_image_tokens": {}},
    ],
    ids=["count", "class", "types"],
)
def test_ice_text_of_unknown_models(fields, tmp_path):
    file = write_ice_text(tmp_path, **fields)
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json has tokenizer_class = .* known are"
    ):
        load_tokenizer(file)


def test_saved_config_says_which_model(loaded):
    config = json.loads(loaded["glm-130b"].files["tokenizer_config.json"])
    assert config == {"tokenizer_class": "icetk-glm-130B", "num_image_tokens": 20000}
