"""Files of learnt words: every layout that others write, and what is refused with its reason."""

import dataclasses

import numpy as np
import pytest

from sdjax.data.text.tokenizer import Tokenizer
from sdjax.errors import UserError
from sdjax.families.embeddings import Embedding
from sdjax.families.family import Model
from sdjax.families.sd import CLIP_H, SD
from sdjax.families.sdxl import CLIP_BIGG, SDXL
from sdjax.formats.embeddings import (
    file_names,
    parse_option,
    read_embedding,
    with_files,
    write_embeddings,
)
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.weights import load_file, save_file
from sdjax.system import paths

SD1 = Model(SD, {"text_encoder": CLIPTextConfig()})
SD2 = Model(SD, {"text_encoder": CLIP_H})
SDXL_BASE = Model(SDXL, {"text_encoder": CLIPTextConfig(), "text_encoder_2": CLIP_BIGG})
REFINER = Model(SDXL, {"text_encoder_2": CLIP_BIGG})


def rows(count, width, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


L, G = rows(2, 768), rows(2, 1280, 1)


def save(file, **tensors):
    save_file(tensors, file)
    return file


def torch_saved(file, content):
    torch = pytest.importorskip("torch")

    def tensors(x):
        if isinstance(x, dict):
            return {key: tensors(value) for key, value in x.items()}
        return torch.from_numpy(x) if isinstance(x, np.ndarray) else x

    torch.save(tensors(content), file)
    return file


def a1111(values):
    """The content of an embedding that A1111's web UI saves (textual_inversion.py, `save`)."""
    return {
        "string_to_token": {"*": 265}, "string_to_param": {"*": values}, "name": "my-cat",
        "step": 3000, "sd_checkpoint": "abcd", "sd_checkpoint_name": "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("write", "word"),
    [
        (lambda folder: save(folder / "cat.safetensors", **{"<cat>": L}), "<cat>"),
        (lambda folder: save(folder / "cat.safetensors", emb_params=L), "cat"),
        (lambda folder: save(folder / "cat.safetensors", clip_l=L), "cat"),
        (lambda folder: save(folder / "my cat.safetensors", emb_params=L), "my cat"),
        (lambda folder: torch_saved(folder / "cat.pt", a1111(L)), "cat"),
        (lambda folder: torch_saved(folder / "learned_embeds.bin", {"<cat>": L}), "<cat>"),
    ],
)
def test_every_layout_of_one_encoder_is_read(tmp_path, write, word):
    """FT-32; the name in A1111's file is not the word there, its file's name is."""
    found = read_embedding(write(tmp_path), SD1)
    assert found.token == word and found.count == 2
    assert found.rows.keys() == {"text_encoder"}
    np.testing.assert_array_equal(found.rows["text_encoder"], L)
    assert read_embedding(write(tmp_path), SD1, "<other>").token == "<other>"


def test_a_single_row_and_half_precision_are_read(tmp_path):
    file = save(tmp_path / "cat.safetensors", **{"<cat>": L[0].astype(np.float16)})
    found = read_embedding(file, SD1)
    assert found.count == 1 and found.rows["text_encoder"].dtype == np.float32
    np.testing.assert_array_equal(found.rows["text_encoder"], L[:1].astype(np.float16))


@pytest.mark.parametrize("layout", ["one file", "two files"])
def test_both_layouts_of_two_encoders_are_read(tmp_path, layout):
    file = tmp_path / "cat [v1].safetensors"
    if layout == "one file":
        save(file, clip_l=L, clip_g=G)
    else:
        save(file, **{"<cat>": L})
        save(tmp_path / "cat [v1]_2.safetensors", **{"<cat>": G})
    found = read_embedding(file, SDXL_BASE)
    assert found.token == ("cat [v1]" if layout == "one file" else "<cat>")
    np.testing.assert_array_equal(found.rows["text_encoder"], L)
    np.testing.assert_array_equal(found.rows["text_encoder_2"], G)
    assert read_embedding(file, REFINER).rows.keys() == {"text_encoder_2"}


NAN = L.copy()
NAN[1, 5] = np.nan


@pytest.mark.parametrize(
    ("model", "tensors", "words"),
    [
        (SD1, {"<cat>": rows(2, 1024)}, "rows of 1024 numbers, and text_encoder of .* of 768"),
        (SD2, {"<cat>": L}, "rows of 768 numbers, and text_encoder of .* of 1024"),
        (SDXL_BASE, {"clip_l": L, "clip_g": rows(2, 1024)}, "1024 numbers, and text_encoder_2"),
        (SDXL_BASE, {"clip_l": L, "clip_g": rows(3, 1280)}, "different numbers of rows"),
        (SDXL_BASE, {"<cat>": L}, "no rows for text_encoder_2.*clip_l and clip_g"),
        (SD1, {"clip_l": L, "clip_g": G}, "nothing that reads clip_g: it is an embedding of SDXL"),
        (SD1, {"<cat>": NAN}, "1 NaN among 1,536"),
        (SD1, {"<cat>": L.astype(np.int32)}, "is of int32; expected floats"),
        (SD1, {"<cat>": L[None]}, r"is \(1, 2, 768\)"),
        (SD1, {"<cat>": L[:0]}, r"is \(0, 768\)"),
        (SD1, {"a": L, "b": L}, "2 arrays"),
        (SD1, {"x" * 101: L}, "1 to 100 letters"),
        (SD1, {"a\nb": L}, "1 to 100 letters"),
    ],
)
def test_files_of_other_models_and_damaged_ones_are_refused(tmp_path, model, tensors, words):
    file = save(tmp_path / "cat.safetensors", **tensors)
    with pytest.raises(UserError, match=f"(?s)cat.safetensors.*{words}"):
        read_embedding(file, model)


def test_files_that_are_no_embeddings_are_refused(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"x")
    large = tmp_path / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(65 * 2**20)
    for file, words in ((tmp_path / "cat.png", "expected a file"), (large, "a whole model?")):
        with pytest.raises(UserError, match=words):
            read_embedding(file, SD1)


def test_a_pickle_that_asks_for_more_than_tensors_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    inside = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 768))})
    torch.save({"string_to_param": inside}, tmp_path / "cat.pt")
    with pytest.raises(UserError, match="refused: .*Nothing was run"):
        read_embedding(tmp_path / "cat.pt", SD1)


def test_an_option_names_a_file_whose_name_may_have_colons(tmp_path):
    file = tmp_path / "a:b.safetensors"
    file.write_bytes(b"")
    assert parse_option(str(file)) == (str(file), "")
    assert parse_option(f"{file}:<c:d>") == (str(file), "<c:d>")
    with pytest.raises(UserError, match="no such file; expected FILE"):
        parse_option(f"{tmp_path}/other:<cat>")


def test_what_is_written_is_read_again(tmp_path):
    xl = Embedding("<cat>", {"text_encoder": L, "text_encoder_2": G})
    written = write_embeddings(paths.to_path(tmp_path / "xl"), SDXL, [xl])
    names = [file.name for file in written]
    assert names == [
        "learned_embeds.safetensors", "learned_embeds_2.safetensors", "cat.safetensors",
    ]  # fmt: skip
    assert load_file(written[2]).keys() == {"clip_l", "clip_g"}
    for file in (written[0], written[2]):
        found = read_embedding(file, SDXL_BASE)
        for name, value in xl.rows.items():
            np.testing.assert_array_equal(found.rows[name], value)
    sd = Embedding("<cat>", {"text_encoder": L})
    written = write_embeddings(paths.to_path(tmp_path / "sd"), SD, [sd])
    assert [file.name for file in written] == ["learned_embeds.safetensors", "cat.safetensors"]
    for file in written:
        assert load_file(file).keys() == {"<cat>"}


def test_several_words_have_folders_whose_names_differ(tmp_path):
    words = [Embedding(token, {"text_encoder": L}) for token in ("<cat>", "cat", "<猫>", "***")]
    assert file_names(words) == ["cat", "cat-2", "猫", "word"]
    written = write_embeddings(paths.to_path(tmp_path), SD, words)
    assert (tmp_path / "cat-2" / "learned_embeds.safetensors") in written
    assert len({file for file in written}) == 8


def test_words_of_files_are_added_to_a_model(tmp_path):
    tokenizer = Tokenizer.train(["a cat"] * 4, 520)
    config = dataclasses.replace(CLIPTextConfig(), vocab_size=tokenizer.vocab_size)
    table = rows(tokenizer.vocab_size, 768)
    path = "text_encoder.embeddings.token_embedding.embedding"
    model = Model(SD, {"text_encoder": config}, params={path: table},
                  tokenizers={"tokens": tokenizer})  # fmt: skip
    one = save(tmp_path / "one.safetensors", **{"<cat>": L})
    two = save(tmp_path / "two.safetensors", emb_params=L[:1])
    found, words = with_files(model, [str(one), f"{two}:<dog>"])
    assert [word.token for word in words] == ["<cat>", "<dog>"]
    np.testing.assert_array_equal(found.params[path], np.concatenate([table, L, L[:1]]))
    ids = found.tokenizers["tokens"].encode(["<dog> <cat>"])[0, 1:4]
    np.testing.assert_array_equal(found.params[path][ids], [L[0], L[0], L[1]])
    assert found.networks["text_encoder"].vocab_size == tokenizer.vocab_size + 3
    assert with_files(model, []) == (model, [])
    with pytest.raises(UserError, match="in its vocabulary already"):  # FT-33
        with_files(model, [f"{one}:a"])


def test_the_workdir_of_a_run_stands_for_the_words_that_it_learned(tmp_path):
    tokenizer = Tokenizer.train(["a cat"] * 4, 520)
    config = dataclasses.replace(CLIPTextConfig(), vocab_size=tokenizer.vocab_size)
    table = rows(tokenizer.vocab_size, 768)
    path = "text_encoder.embeddings.token_embedding.embedding"
    model = Model(SD, {"text_encoder": config}, params={path: table},
                  tokenizers={"tokens": tokenizer})  # fmt: skip
    cat, dog = (Embedding(f"<{word}>", {"text_encoder": L}) for word in ("cat", "dog"))
    write_embeddings(tmp_path / "one" / "embedding", SD, [cat])
    write_embeddings(tmp_path / "two" / "embedding", SD, [cat, dog])
    _, words = with_files(model, [f"{tmp_path / 'one'}:<kitten>"])
    assert [word.token for word in words] == ["<kitten>"]
    _, words = with_files(model, [str(tmp_path / "two")])
    assert {word.token for word in words} == {"<cat>", "<dog>"}
    with pytest.raises(UserError, match="has 2 words, and one name"):
        with_files(model, [f"{tmp_path / 'two'}:<kitten>"])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="has no words; expected a file, or the workdir"):
        with_files(model, [str(tmp_path / "none")])


@pytest.mark.parametrize("name", ["learned_embeds.safetensors", "cat.safetensors"])
def test_what_is_written_loads_in_diffusers(tmp_path, torch_pipeline, name):
    import copy

    rows_24 = rows(2, 24)
    word = Embedding("<cat>", {"text_encoder": rows_24})
    write_embeddings(paths.to_path(tmp_path), SD, [word])
    pipeline = copy.deepcopy(torch_pipeline)
    pipeline.load_textual_inversion(str(tmp_path / name))
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1"])
    table = pipeline.text_encoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table[ids], rows_24)
