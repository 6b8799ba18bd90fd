"""Tokenizers of strangers: whatever is wrong with their files is said in words."""

import json

import pytest

from sdjax.data.text.tokenizer import Tokenizer, TokenizerError


@pytest.fixture(scope="module")
def good():
    return Tokenizer.train(["a small red circle", "a large blue square"], 530, context_length=8)


def other(file, change):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(change(content) or content))


def as_one_file(folder, **changes):
    """The layout of transformers 5."""
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model | changes}))


VOCABULARIES = {
    "an id beyond 32 bits": ({"a": 2**40}, "token 'a' has the id 1099511627776; expected 0 to"),
    "a negative id": ({"a": -1}, "token 'a' has the id -1"),
    "an id of 4,000 digits": ({"a": 10**4000}, "has the id a number of 13,288 bits"),
    "an id that is no number": ({"a": "1"}, "token 'a' has the id '1'"),
    "an id that is true": ({"a": True}, "token 'a' has the id True"),
    "an id that is a list": ({"a": [[[1]]]}, "token 'a' has the id"),
    "an id twice": ({"again": 3}, "two tokens have the same id"),
    "a token of a megabyte": (
        {"x" * 10**6: None},
        r"token 'xxx.*1,000,000 in all\) has the id None",
    ),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_that_are_none_are_refused_in_either_layout(tmp_path, good, name):
    change, message = VOCABULARIES[name]
    good.save(tmp_path)
    other(tmp_path / "vocab.json", lambda vocab: vocab | change)
    with pytest.raises(TokenizerError, match=f"vocab.json: .*{message}") as seen:
        Tokenizer.load(tmp_path)
    assert len(str(seen.value)) < 500
    as_one_file(tmp_path)
    with pytest.raises(TokenizerError, match=f"tokenizer.json: .*{message}"):
        Tokenizer.load(tmp_path)


def test_ids_with_holes_count_by_the_largest(tmp_path, good):
    good.save(tmp_path)
    other(tmp_path / "vocab.json", lambda vocab: vocab | {"far": 40_000})
    found = Tokenizer.load(tmp_path)
    assert found.largest_id == 40_000 and found.vocab_size == good.vocab_size + 1
    found.check_vocabulary(40_001, "x")
    with pytest.raises(TokenizerError, match="x: the tokenizer's ids go up to 40,000, and the"):
        found.check_vocabulary(40_000, "x")
    assert good.largest_id == good.vocab_size - 1


CHANGES = {
    "vocab.json": [lambda _: [1], lambda _: {"a": 0}],
    "tokenizer_config.json": [
        lambda _: [1],
        lambda found: found | {"model_max_length": "77"},
        lambda found: found | {"model_max_length": -5},
        lambda found: found | {"model_max_length": [77]},
        lambda found: found | {"model_max_length": None},
        lambda found: found | {"bos_token": 3},
        lambda found: found | {"bos_token": {"text": "a"}},
        lambda found: found | {"pad_token": {"content": ["a"]}},
        lambda found: found | {"added_tokens_decoder": [1]},
        lambda found: found | {"added_tokens_decoder": {"x": {"content": "a"}}},
        lambda found: found | {"added_tokens_decoder": {"3": {"content": "a"}}},
        lambda found: found | {"added_tokens_decoder": {"3": {"content": 4}}},
        lambda found: found | {"added_tokens_decoder": {"3": "a", "4": None}},
        lambda found: found | {"added_tokens_decoder": {"3": {"content": "a", "flag": 1}}},
        lambda found: found | {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}},
    ],
    "special_tokens_map.json": [lambda _: [1], lambda _: {"unk_token": [[]]}],
}


@pytest.mark.parametrize("name, number", [(n, i) for n in CHANGES for i in range(len(CHANGES[n]))])
def test_fields_of_another_type_are_refused_in_words(tmp_path, good, name, number):
    good.save(tmp_path)
    if name == "special_tokens_map.json":  # read where nothing else lists the tokens
        other(tmp_path / "tokenizer_config.json", lambda found: found.pop("added_tokens_decoder")
              and found)  # fmt: skip
    other(tmp_path / name, CHANGES[name][number])
    with pytest.raises(TokenizerError, match=str(tmp_path)) as seen:
        Tokenizer.load(tmp_path)
    assert len(str(seen.value)) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab": [1]}, {"vocab": {"a": 0.5}}, {"merges": 3}, {"merges": [3]}, {"merges": None},
        {"merges": [["a", 3]]}, {"merges": ["a b c"]}, {"merges": [["a", "nowhere"]]},
        {"type": {"a": [1] * 1000}}, {"end_of_word_suffix": ["</w>"] * 1000},
    ],
)  # fmt: skip
def test_models_of_another_shape_are_refused_in_words(tmp_path, good, changes):
    good.save(tmp_path)
    as_one_file(tmp_path, **changes)
    with pytest.raises(TokenizerError, match=str(tmp_path)) as seen:
        Tokenizer.load(tmp_path)
    assert len(str(seen.value)) < 1000


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "", "\0\0", "3"])
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_no_json_are_refused_in_words(tmp_path, good, name, text):
    good.save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.load(tmp_path)
