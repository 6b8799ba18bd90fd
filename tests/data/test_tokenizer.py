"""The tokenizer gives the ids of `transformers.CLIPTokenizer`, whatever the text and the layout."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from sdjax.data.text.tokenizer import Tokenizer, TokenizerError

CAPTIONS = [f"a {c} {s}" for c in ("red", "blue", "green") for s in ("circle", "square", "star")]
CAPTIONS += ["a small red circle left of a large blue square", "Naïve café, 東京 & 😀!"]
HARD = [
    "",
    " ",
    " \t\n ",
    "a red circle",
    "A  Red\n\tCIRCLE  ",
    "it's they're I'll we've I'm he'd",
    "don't stop!!! ... -- (ok) 'twas",
    "1234567890 3.14159 1e-5 ²³½ Ⅷ",
    "naïve café cafe\u0301 Å \u212b ﬁ straße İstanbul ΑΣ",
    "東京タワーの写真 한국어 แมว हिन्दी",
    "שלום עולם مرحبا بالعالم",
    "😀👩🏽‍🚀🏳️‍🌈 🇩🇪❤️",
    "&lt;b&gt;bold&lt;/b&gt; &amp; <i>x</i> &nbsp;&#39;",
    "nul \x00 bell \x07 del \x7f nbsp \xa0 zwsp \u200b bom \ufeff ideographic\u3000space",
    "line\u2028sep\u2029par\x85next\x1cfs",
    "a <|endoftext|> b<|startoftext|>c",
    "<|ENDOFTEXT|> <|endoftext|",
    "<|endoftext|>",
    "wow! such pad!",
    "word " * 200,
    "x" * 3000,
    "😀" * 100,
    "a " * 75,
    "a " * 76,
    "Ġ Ã© </w> a</w>",
]


def ids_of_transformers(folder, captions, length=None):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )["input_ids"]


@pytest.fixture
def clip_folder():
    if "SDJAX_TEST_DATA" not in os.environ:
        pytest.skip("SDJAX_TEST_DATA is not set")
    return os.path.join(os.environ["SDJAX_TEST_DATA"], "clip_tokenizer")


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(CAPTIONS * 3, 640, context_length=24)


def test_clip_vocabulary_gives_the_ids_of_transformers(clip_folder):
    tokenizer = Tokenizer.load(clip_folder)
    tokens = tokenizer.encode(HARD)
    assert tokens.dtype == np.int32 and tokens.shape == (len(HARD), 77)
    np.testing.assert_array_equal(tokens, ids_of_transformers(clip_folder, HARD))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49408, 49406, 49407)
    assert tokenizer.pad_id == 49407
    # OpenAI CLIP: tokenize("a photo of a cat") = 320, 1125, 539, 320, 2368
    assert tokenizer.encode(["a photo of a cat"])[0, :7].tolist() == [
        *(49406, 320, 1125, 539, 320, 2368, 49407)
    ]


def sd2_folder(source, folder, *, decoder: bool, normalized: bool):
    """The files as SD2's repositories have them: padding with `!`, tokens as objects."""
    shutil.copytree(source, folder)

    def token(text):
        flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
        return {"content": text, **flags}

    bos, eos = token("<|startoftext|>"), token("<|endoftext|>")
    special = {"bos_token": bos, "eos_token": eos, "pad_token": "!", "unk_token": eos}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {
        "bos_token": {"__type": "AddedToken", **bos},
        "eos_token": {"__type": "AddedToken", **eos},
        "pad_token": "<|endoftext|>",
        "unk_token": {"__type": "AddedToken", **eos},
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    if decoder:
        tokens = {49406: bos, 49407: eos, 0: token("!")}
        config["added_tokens_decoder"] = {str(i): {**t, "special": True} for i, t in tokens.items()}
        config["pad_token"] = "!"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("decoder", [False, True])
def test_sd2_pads_with_exclamation_mark(clip_folder, tmp_path, decoder, normalized):
    folder = tmp_path / "sd2"
    sd2_folder(clip_folder, folder, decoder=decoder, normalized=normalized)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.pad_id == 0 and tokenizer.null_tokens.tolist() == [49406, 49407] + [0] * 75
    np.testing.assert_array_equal(tokenizer.encode(HARD), ids_of_transformers(folder, HARD))
    tokenizer.save(tmp_path / "again")
    np.testing.assert_array_equal(
        tokenizer.encode(HARD), ids_of_transformers(tmp_path / "again", HARD)
    )


def test_folder_written_by_transformers_5_is_read(clip_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    reference = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    reference.add_tokens(["sks-dog"])
    reference.save_pretrained(tmp_path)
    if not (tmp_path / "tokenizer.json").exists():
        pytest.skip("transformers 4 writes vocab.json and merges.txt")
    captions = [*HARD, "a photo of sks-dog running", "SKS-dog"]
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 49409
    np.testing.assert_array_equal(
        tokenizer.encode(captions), ids_of_transformers(tmp_path, captions)
    )
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    np.testing.assert_array_equal(tokenizer.encode(captions), again.encode(captions))
    np.testing.assert_array_equal(
        tokenizer.encode(captions), ids_of_transformers(tmp_path / "again", captions)
    )


def test_trained_vocabulary_loads_in_transformers(trained, tmp_path):
    trained.save(tmp_path)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        assert (tmp_path / name).is_file()
    np.testing.assert_array_equal(trained.encode(HARD), ids_of_transformers(tmp_path, HARD))
    again = Tokenizer.load(tmp_path)
    assert again.context_length == 24 and again.vocab_size == trained.vocab_size
    np.testing.assert_array_equal(trained.encode(HARD), again.encode(HARD))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        again.save(tmp_path / "again")
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_trained_vocabulary_has_the_layout_of_clip(trained, clip_folder):
    assert trained.bos_id == trained.vocab_size - 2 and trained.eos_id == trained.vocab_size - 1
    ours, clip = trained._vocab, Tokenizer.load(clip_folder)._vocab
    bytes_of = [token for token, index in clip.items() if index < 512]
    assert {token: ours[token] for token in bytes_of} == {token: clip[token] for token in bytes_of}
    words = trained.encode_with_lengths(["red circle", "blue square"])[1]
    assert words.tolist() == [4, 4], "frequent words are one token each"


def test_training_does_not_depend_on_the_order_of_captions(trained):
    other = Tokenizer.train(sorted(CAPTIONS * 3, reverse=True), 640, context_length=24)
    assert other._merges == trained._merges and other._vocab == trained._vocab


def test_vocabulary_size_is_kept_and_smallest_is_named():
    assert Tokenizer.train(CAPTIONS, 530).vocab_size == 530
    assert Tokenizer.train([], 600).vocab_size == 514
    with pytest.raises(ValueError, match="vocab_size = 500.* 514"):
        Tokenizer.train(CAPTIONS, 500)


def test_every_byte_has_a_token(trained):
    captions = ["\x00", "ÿ", "𝕏", "\U0010ffff"]
    tokens = trained.encode(captions)
    assert (tokens[:, 1] != trained.eos_id).all()


def test_truncation_keeps_eos_and_is_counted(trained):
    tokenizer = Tokenizer.train(CAPTIONS * 3, 640, context_length=24)
    tokens, lengths = tokenizer.encode_with_lengths(["red " * 22, "red " * 23, ""])
    assert lengths.tolist() == [24, 25, 2] and tokenizer.truncated == 1
    assert (tokens[:2, -1] == tokenizer.eos_id).all()
    tokenizer.encode(["red " * 99] * 2)
    assert tokenizer.truncated == 3


def test_a_caption_that_comes_again_is_encoded_once(trained, monkeypatch):
    tokenizer = Tokenizer.train(CAPTIONS, 640, context_length=6)
    long = "a photo of a cat on a mat by the door"
    first, expected = tokenizer.encode([long]), tokenizer.encode([long, "cat"])
    first[:] = -1  # what was handed out is the caller's
    monkeypatch.setattr(tokenizer, "_encode", None)  # nothing is encoded any more
    np.testing.assert_array_equal(tokenizer.encode([long]), expected[:1])
    assert tokenizer.encode_with_lengths([long])[1][0] > 6
    assert tokenizer.truncated == 4  # each time
    monkeypatch.undo()
    monkeypatch.setattr("sdjax.data.text.text_tokenizer.KEPT", 2)
    for text in ("one", "two", "three", "one", long):  # more than are remembered
        np.testing.assert_array_equal(tokenizer.encode([text]), tokenizer.encode([text, ""])[:1])


def test_pickled_tokenizer_is_the_same(trained):
    again = pickle.loads(pickle.dumps(trained))
    np.testing.assert_array_equal(trained.encode(HARD), again.encode(HARD))


def test_surrogates_are_mended(trained):
    tokens = trained.encode(["lone \ud83d x", "pair \ud83d\ude00", "pair 😀", "lone \ufffd x"])
    np.testing.assert_array_equal(tokens[0], tokens[3])
    np.testing.assert_array_equal(tokens[1], tokens[2])


def test_context_length_can_be_set_on_loading(clip_folder):
    tokenizer = Tokenizer.load(clip_folder, context_length=8)
    np.testing.assert_array_equal(
        tokenizer.encode(HARD), ids_of_transformers(clip_folder, HARD, length=8)
    )
    with pytest.raises(ValueError, match="context_length = 2"):
        Tokenizer.load(clip_folder, context_length=2)


@pytest.mark.parametrize("caption", [None, 3, ["a"]])
def test_what_is_not_text_is_refused(trained, caption):
    with pytest.raises(TypeError, match="expected a string"):
        trained.encode(["a", caption])


def test_one_string_is_refused(trained):
    with pytest.raises(TypeError, match="wrap it in a list"):
        trained.encode("a red circle")


def test_broken_folders_are_named(trained, tmp_path):
    with pytest.raises(TokenizerError, match="no vocab.json and no merges.txt"):
        Tokenizer.load(tmp_path)
    trained.save(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nzz qq\n")
    with pytest.raises(TokenizerError, match="do not fit together"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": ')
    with pytest.raises(TokenizerError, match="vocab.json: not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}')
    with pytest.raises(TokenizerError, match="Unigram"):
        Tokenizer.load(tmp_path)
