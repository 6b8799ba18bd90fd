"""Words of several tokens: in order, whole or not at all, and as in the pipelines of diffusers."""

import numpy as np
import pytest

from sdjax.data.text.tokenizer import Tokenizer
from sdjax.data.text.tokenizer_files import TokenizerError
from sdjax.errors import UserError
from sdjax.families.embeddings import with_tokens

TEXTS = ["a <cat> b", "<cat>", "a red<cat>, b <cat>!", "a circle"]


@pytest.fixture(scope="module")
def plain():
    words = ["a red circle", "a blue square", "a green star and a small red circle"]
    return Tokenizer.train(words * 4, 560, context_length=16)


def test_a_word_of_three_vectors_is_three_ids_in_order(plain):
    """FT-31; only the first was used in diffusers#4450."""
    longer = plain.with_token("<cat>", 3)
    first = plain.largest_id + 1
    (row,) = longer.encode(["a <cat> b"])
    (a, b) = plain.encode(["a b"])[0, 1:3]
    want = [plain.bos_id, a, first, first + 1, first + 2, b, plain.eos_id]
    assert row[: len(want)].tolist() == want
    assert longer.largest_id == first + 2 and longer.added_words == ("<cat>", "<cat>_1", "<cat>_2")
    # Captions without the word are what they were.
    np.testing.assert_array_equal(longer.encode(["a circle"]), plain.encode(["a circle"]))


@pytest.mark.parametrize(("length", "kept"), [(8, 3), (7, 3), (6, 0), (5, 0)])
def test_a_caption_that_is_cut_keeps_a_word_whole_or_leaves_it_out(plain, length, kept):
    longer = plain.with_token("<cat>", 3).of_length(length)
    text = "a a <cat> b b b"
    (row,), (whole,) = longer.encode_with_lengths([text])
    assert whole == 10 and longer.truncated == 1
    assert (row > plain.largest_id).sum() == kept
    assert row[-1] == plain.eos_id
    before = row[: 3 + kept]
    assert before.tolist() == [*plain.encode(["a a"])[0, :3], *range(plain.largest_id + 1,
                               plain.largest_id + 1 + kept)]  # fmt: skip


@pytest.mark.parametrize(
    "word", ["<cat>", "<CAT>", "<cat>_2", "<cat>_3", "circle</w>", "circle", "a"]
)
def test_a_word_that_is_in_the_vocabulary_already_is_an_error(plain, word):
    """FT-33. <cat>_3 would be the fourth vector of <cat>."""
    longer = plain.with_token("<cat>", 3)
    with pytest.raises(TokenizerError, match="already; choose another word"):
        longer.with_token(word)


def test_words_that_others_would_follow_are_an_error(plain):
    longer = plain.with_token("<cat>_2")
    with pytest.raises(TokenizerError, match="'<cat>_2' in its vocabulary"):
        longer.with_token("<cat>", 2)


@pytest.mark.parametrize(
    ("word", "count", "words"),
    [("", 1, "empty"), (" <cat>", 1, "spaces"), ("<cat>", 15, "1 to 14"), ("<cat>", 0, "1 to 14")],
)
def test_words_without_room_or_letters_are_errors(plain, word, count, words):
    with pytest.raises(UserError, match=words):
        plain.with_token(word, count)


def test_a_saved_tokenizer_has_its_words_again(plain, tmp_path):
    longer = with_tokens({"tokens": plain}, {"<cat>": 3, "My Dog": 1})["tokens"]
    longer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.identity == longer.identity
    texts = [*TEXTS, "my dog and My Dog"]
    np.testing.assert_array_equal(again.encode(texts), longer.encode(texts))


def test_words_become_the_tokens_that_pipelines_of_diffusers_make(plain, tmp_path):
    import transformers
    from diffusers.loaders import TextualInversionLoaderMixin

    plain.save(tmp_path / "plain")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "plain")
    theirs.add_tokens(["<cat>", "<cat>_1", "<cat>_2"])
    ours = plain.with_token("<cat>", 3)
    prompts = TextualInversionLoaderMixin().maybe_convert_prompt(TEXTS, theirs)
    want = theirs(prompts, padding="max_length", max_length=16, return_tensors="np").input_ids
    np.testing.assert_array_equal(ours.encode(TEXTS), want)
    # And the folder that they write.
    theirs.save_pretrained(tmp_path / "theirs")
    read = Tokenizer.load(tmp_path / "theirs", context_length=16)
    np.testing.assert_array_equal(read.encode(TEXTS), want)
