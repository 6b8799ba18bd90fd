"""Prompts with weights: the examples of A1111's web UI, and a written-out torch reference."""

import numpy as np
import pytest
import torch

from sdjax import sample
from sdjax.checkpoints.reading import read_any
from sdjax.errors import UserError
from sdjax.families.sd3 import SD3
from sdjax.sampling.a1111 import (
    Piece,
    check_syntax,
    embed_prompts,
    parse_weights,
    split_chunks,
)

LONG = (
    "a (red circle:1.4) and a [blue square], a green star and ((a small)) red circle, "
    "a blue star and a red circle"
)


def pieces(prompt):
    return [(piece.text, pytest.approx(piece.weight)) for piece in parse_weights(prompt)]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [  # the examples of modules/prompt_parser.py, and its rules
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("closed) too early", [("closed) too early", 1.0)]),
        ("[less] ((more))", [("less", 1 / 1.1), (" ", 1.0), ("more", 1.21)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("a: b (c :1.5)", [("a: b ", 1.0), ("c ", 1.5)]),
        ("", [("", 1.0)]),
        ("one BREAK (two)", [("one", 1.0), (None, 1.0), ("", 1.0), ("two", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1),
             ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1)],
        ),
    ],
)  # fmt: skip
def test_weights_are_read_as_the_web_ui_reads_them(prompt, found):
    assert pieces(prompt) == found


def test_a_weight_that_is_no_number_is_named():
    with pytest.raises(UserError, match=r"the weight '1\.2\.3' in the prompt"):
        parse_weights("(a:1.2.3)")


def test_a_learnt_word_stays_in_one_chunk(pipeline_folder):
    """As A1111's `tokenize_line`: a word of several vectors that does not fit begins the next."""
    tokenizer = read_any(pipeline_folder).tokenizers["tokens"].with_token("<cat>", 3)
    first = tokenizer.largest_id - 2
    (a, cat) = tokenizer.encode(["a <cat>"])[0, 1:3]
    assert cat == first
    found = split_chunks(parse_weights("a " * 12 + "(<cat>:1.5)"), tokenizer)
    assert [chunk.tokens for chunk in found] == [(a,) * 12, (first, first + 1, first + 2)]
    assert found[1].weights == (1.5,) * 3
    (whole,) = split_chunks(parse_weights("a " * 11 + "<cat>"), tokenizer)
    assert whole.tokens == ((a,) * 11 + (first, first + 1, first + 2))


def test_a_chunk_ends_at_a_comma_that_is_near(pipeline_folder):
    tokenizer = read_any(pipeline_folder).tokenizers["tokens"]
    size = tokenizer.context_length - 2
    words = [Piece("a red circle, " + "star " * size)]
    comma = tokenizer.encode([","])[0, 1]
    first, *rest = split_chunks(words, tokenizer)
    assert first.tokens[-1] == comma and len(first.tokens) < size
    assert all(len(chunk.tokens) <= size for chunk in rest)
    whole = [token for chunk in (first, *rest) for token in chunk.tokens]
    assert whole == tokenizer.of_length(200).encode([words[0].text])[0, 1 : len(whole) + 1].tolist()
    assert [
        len(c.tokens) for c in split_chunks([Piece("a"), Piece(None), Piece("a")], tokenizer)
    ] == [1, 1]
    assert [len(c.tokens) for c in split_chunks([Piece("")], tokenizer)] == [0]


def reference(encoders, prompt_pieces, chunks, *, penultimate):
    """What the web UI makes of pieces that end where chunks end: states and the first pooled.

    Written from its description: each chunk is BOS, text, EOS and padding; weights multiply the
    states; then the states are scaled to the mean that they had.
    """
    states, pooled = [], None
    for tokenizer, encoder in encoders:
        size, rows, weights = encoder.config.max_position_embeddings, [], []
        flat = [
            (token, weight)
            for text, weight in prompt_pieces
            for token in tokenizer(text, add_special_tokens=False).input_ids
        ]
        for length in chunks:
            part, flat = flat[:length], flat[length:]
            fill = size - 2 - len(part)
            ids = [tokenizer.bos_token_id, *(t for t, _ in part), tokenizer.eos_token_id]
            rows.append(ids + [tokenizer.pad_token_id] * fill)
            weights.append([1.0, *(w for _, w in part), 1.0] + [1.0] * fill)
        assert not flat
        with torch.no_grad():
            out = encoder(torch.tensor(rows), output_hidden_states=True)
        z = out.hidden_states[-2] if penultimate else out.last_hidden_state
        own = []
        for chunk, row in zip(z, torch.tensor(weights), strict=True):
            scaled = chunk * row[:, None]
            own.append(scaled * (chunk.mean() / scaled.mean()))
        states.append(torch.cat(own))
        pooled = getattr(out, "text_embeds", None)
    return torch.cat(states, -1).numpy(), None if pooled is None else pooled[0].numpy()


@pytest.mark.parametrize("xl", [False, True])
def test_embeddings_are_those_of_a_torch_reference(xl, request):
    pipeline = request.getfixturevalue("torch_xl_pipeline" if xl else "torch_pipeline")
    model = read_any(request.getfixturevalue("xl_folder" if xl else "pipeline_folder"))
    found = embed_prompts(model, model.params, [LONG, "(a star)", ""])
    read = [(piece.text, piece.weight) for piece in parse_weights(LONG)]
    chunks = [len(c.tokens) for c in split_chunks(parse_weights(LONG), model.tokenizers["tokens"])]
    assert len(chunks) > 2 and max(chunks) <= 14
    encoders = [(pipeline.tokenizer, pipeline.text_encoder)]
    encoders += [(pipeline.tokenizer_2, pipeline.text_encoder_2)] if xl else []
    want, pooled = reference(encoders, read, chunks, penultimate=xl)
    np.testing.assert_allclose(found["context"][0], want, atol=2e-5)
    count = len(pipeline.tokenizer("a star", add_special_tokens=False).input_ids)
    short, _ = reference(
        encoders, [("a star", 1.1)], [count] + [0] * (len(chunks) - 1), penultimate=xl
    )
    np.testing.assert_allclose(found["context"][1], short, atol=2e-5)
    if xl:  # SDXL's empty prompt is zeros; chunks that fill up are not
        np.testing.assert_allclose(found["pooled"][0], pooled, atol=2e-5)
        assert not found["context"][2].any() and not found["pooled"][2].any()


def test_the_verb_draws_what_plain_prompts_draw_where_nothing_is_weighted(
    pipeline_folder, tmp_path
):
    common = [f"--model={pipeline_folder}", "--steps=2", "--prompts", "a red circle", "a star",
              "--negative_prompt=a blue square"]  # fmt: skip
    assert sample.main([*common, f"--output={tmp_path / 'plain'}"]) == 0
    syntax = "--prompt_syntax=a1111"
    assert sample.main([*common, f"--output={tmp_path / 'a1111'}", syntax]) == 0
    from PIL import Image

    plain, own = (Image.open(tmp_path / n / "00001.png") for n in ("plain", "a1111"))
    difference = np.asarray(plain, np.int64) - np.asarray(own, np.int64)
    assert np.abs(difference).max() <= 1 and own.text["prompt_syntax"] == "a1111"


def test_what_weights_do_not_go_with_is_refused(pipeline_folder, tmp_path, capsys):
    common = [f"--model={pipeline_folder}", f"--output={tmp_path}", "--prompt_syntax=a1111"]
    for option in ("--explain", "--interpolate=1"):
        assert sample.main([*common, "--prompts", "a", "b", option]) == 2
        assert "--prompt_syntax=a1111 does not go with" in capsys.readouterr().err

    class Other:
        family = SD3

    with pytest.raises(UserError, match="is for SD1, SD2 and SDXL.*'sd3'"):
        check_syntax(Other())
