"""T5's tokenizer against transformers, on a tiny vocabulary that SentencePiece has trained.

`tiny_spiece.model` has 49 pieces and a table that normalises some letters, as nmt_nfkc does.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from sdjax.data.text.sentencepiece_file import read_pieces
from sdjax.data.text.t5_tokenizer import T5Tokenizer
from sdjax.data.text.tokenizer import Tokenizer
from sdjax.data.text.tokenizer_files import TokenizerError
from sdjax.data.text.tokenizers import inner_folder, load_tokenizer

transformers = pytest.importorskip("transformers")
SPIECE = Path(__file__).with_name("tiny_spiece.model")
LENGTH = 24
TEXTS = [
    "a small red circle", "", "  two   spaces\tand tab\nline ", "Ünïcödé ﬁne ①②③ ＦＵＬＬ",
    "e\u0301clair\u00a0nbsp\u3000wide…", "😀 unknown", "</s> in text <extra_id_0> x", "a" * 300,
    "x</s>y <pad> <unk>", "\u200bzero", "▁under ▁ x", "ﷺ ½", "\u0007bell", "one, two; three!",
]  # fmt: skip
# What SentencePiece 0.2.3 itself encodes with `tiny_spiece.model`, and EOS.
KNOWN = {
    "a small red circle": [15, 24, 36, 22, 27, 3, 33, 10, 39, 37, 40, 4, 1],
    "": [1],
    "Ünïcödé ﬁne ①②③ ＦＵＬＬ": [3, 2, 6, 2, 47, 2, 10, 2, 3, 28, 41, 4, 32, 30, 2, 3, 2, 1],
    "e\u0301\xa0nbsp\u3000wide\u2026": [3, 2, 3, 6, 43, 12, 29, 3, 11, 8, 10, 4, 2, 1],
    "ﷺ ½": [3, 2, 32, 2, 30, 1],
    "one, two; three!": [16, 6, 4, 13, 23, 11, 17, 2, 3, 5, 33, 4, 2, 1],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with spiece.model alone."""
    made = tmp_path_factory.mktemp("t5")
    shutil.copy(SPIECE, made / "spiece.model")
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    return T5Tokenizer.load(folder, context_length=LENGTH)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    made = tmp_path_factory.mktemp("saved") / "tokenizer_3"
    tokenizer.save(made)
    return made


def test_tokens_are_those_of_transformers(tokenizer, saved):
    theirs = transformers.T5TokenizerFast.from_pretrained(saved)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    expected = theirs(TEXTS, max_length=LENGTH, **options)
    np.testing.assert_array_equal(tokenizer.encode(TEXTS), expected.input_ids)
    for text, row in zip(TEXTS, expected.input_ids, strict=True):
        np.testing.assert_array_equal(tokenizer.encode([text])[0], row, err_msg=repr(text))
    lengths = np.minimum(tokenizer.encode_with_lengths(TEXTS)[1], LENGTH)
    np.testing.assert_array_equal(lengths, expected.attention_mask.sum(1))
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.pad_token_id, theirs.eos_token_id) == (tokenizer.pad_id, tokenizer.eos_id)
    assert theirs.model_max_length == LENGTH


def test_vocabulary_is_that_of_the_protocol_buffer():
    buffers = pytest.importorskip("transformers.utils.sentencepiece_model_pb2_new")
    model = buffers.ModelProto()
    model.ParseFromString(SPIECE.read_bytes())
    pieces = read_pieces(SPIECE.read_bytes(), SPIECE)
    assert pieces.scores == tuple((piece.piece, piece.score) for piece in model.pieces)
    assert pieces.charsmap == model.normalizer_spec.precompiled_charsmap != b""


def test_tokens_are_those_of_sentencepiece(tokenizer):
    for text, ids in KNOWN.items():
        assert tokenizer.encode([text])[0].tolist() == ids + [0] * (LENGTH - len(ids)), text


def test_letters_are_normalised_as_by_sentencepiece(tokenizer):
    ids = {piece: index for piece, index in tokenizer.vocabulary.items()}
    row = tokenizer.encode(["ﬁ"])[0]
    np.testing.assert_array_equal(row, tokenizer.encode(["fi"])[0])
    np.testing.assert_array_equal(tokenizer.encode(["a…"]), tokenizer.encode(["a..."]))
    assert (ids["<pad>"], ids["</s>"], ids["<unk>"]) == (0, 1, 2)
    assert ids["<extra_id_0>"] == tokenizer.largest_id == 148


def test_row_has_no_mark_before_its_text_and_eos_even_where_it_is_cut(tokenizer):
    assert tokenizer.null_tokens.tolist() == [1] + [0] * (LENGTH - 1)
    before = tokenizer.truncated
    row = tokenizer.encode(["a" * 300])[0]
    assert row[-1] == 1 and 1 not in row[:-1] and tokenizer.truncated == before + 1
    longer = tokenizer.of_length(400)
    assert longer.encode(["a" * 300])[0, 299] != 0 and longer.truncated == 0
    assert longer.identity != tokenizer.identity


def test_tokenizer_is_the_same_after_save_and_load_and_pickle(tokenizer, saved, folder):
    again = load_tokenizer("t5", saved)
    assert again.context_length == LENGTH and again.identity == tokenizer.identity
    assert pickle.loads(pickle.dumps(tokenizer)).identity == tokenizer.identity
    np.testing.assert_array_equal(again.encode(TEXTS), tokenizer.encode(TEXTS))
    assert (saved / "spiece.model").read_bytes() == SPIECE.read_bytes()
    assert inner_folder(saved.parent, "tokenizer_3") == saved
    assert inner_folder(folder, "tokenizer_3") == folder


def test_trained_vocabulary_is_that_of_its_captions(tmp_path):
    captions = [f"a {c} {s} é" for c in ("red", "blue", "green") for s in ("circle", "square")] * 3
    made = T5Tokenizer.train(captions, 120, context_length=12)
    assert made.vocab_size == 120
    others = [*reversed(captions)]
    assert T5Tokenizer.train(others, 120, context_length=12).identity == made.identity
    assert len(made.encode_with_lengths(captions)[0]) == 18
    assert made.encode_with_lengths(["a red circle é"])[1] <= 6  # some words are one piece
    made.save(tmp_path / "t5")
    theirs = transformers.T5TokenizerFast.from_pretrained(tmp_path / "t5")
    expected = theirs(captions, max_length=12, padding="max_length", return_tensors="np")
    np.testing.assert_array_equal(made.encode(captions), expected.input_ids)
    assert made.encode(["a red ~{|"])[0].tolist().count(2) == 0  # every letter of ASCII is there
    with pytest.raises(ValueError, match="vocab_size = 20: .* take 98"):
        T5Tokenizer.train(captions, 20)


def test_folder_of_another_tokenizer_is_named(saved, tmp_path):
    with pytest.raises(TokenizerError, match="no tokenizer.json and no spiece.model; expected"):
        T5Tokenizer.load(tmp_path)
    clip = Tokenizer.train(["a red circle"], 560)
    clip.save(tmp_path / "clip")
    vocab = json.loads((tmp_path / "clip" / "vocab.json").read_text())
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": []}
    (tmp_path / "clip" / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(TokenizerError, match="expected T5's Unigram model, found 'BPE'"):
        T5Tokenizer.load(tmp_path / "clip")
    with pytest.raises(TokenizerError, match="found type 'Unigram'"):
        Tokenizer.load(saved)
    with pytest.raises(TokenizerError, match="ids go up to 148.*has 100 tokens"):
        T5Tokenizer.load(saved).check_vocabulary(100, saved)
    with pytest.raises(ValueError, match="context_length = 1: it must hold"):
        T5Tokenizer.load(saved).of_length(1)


@pytest.mark.parametrize("cut", [1, 7, 400, 1400, 1690])
def test_damaged_sentencepiece_model_is_named(cut, tmp_path):
    (tmp_path / "spiece.model").write_bytes(SPIECE.read_bytes()[:cut])
    with pytest.raises(TokenizerError, match=f"{tmp_path.name}"):
        T5Tokenizer.load(tmp_path)


@pytest.mark.parametrize("change", [
    {"model": {"type": "Unigram", "vocab": [["<pad>", 0.0]], "unk_id": 2}},
    {"model": {"type": "Unigram", "vocab": {"<pad>": 0}}},
    {"model": {"type": "Unigram", "vocab": [["<pad>"], 3]}},
    {"model": None},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": 3},
    {"added_tokens": [3]},
])  # fmt: skip
def test_damaged_tokenizer_json_is_named(change, saved, tmp_path):
    content = json.loads((saved / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=f"{tmp_path.name}"):
        T5Tokenizer.load(tmp_path)


def test_damaged_table_of_letters_is_named_when_it_is_used(tmp_path):
    whole = SPIECE.read_bytes()
    start = whole.index(read_pieces(whole, SPIECE).charsmap)
    units = np.frombuffer(whole, np.uint8).copy()
    units[start + 4 : start + 1028] = 255
    (tmp_path / "spiece.model").write_bytes(units.tobytes())
    with pytest.raises(TokenizerError, match="table that normalises letters is damaged"):
        T5Tokenizer.load(tmp_path).encode(["a red circle", "a blue one"])
