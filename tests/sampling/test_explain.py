"""Heat maps of words, against cross-attention that a diffusers pipeline stores as it draws."""

import types

import numpy as np
import pytest
from PIL import Image

from sdjax import sample
from sdjax.data.text.tokenizer import Tokenizer
from sdjax.errors import UserError
from sdjax.models.unet_config import UNetConfig
from sdjax.sampling import explain

PROMPTS = ["a red circle", "a green star, and a small red circle"]
HEIGHT, WIDTH, STEPS = 16, 24, 4
LATENT = (HEIGHT // 2, WIDTH // 2)  # the VAE of the tests halves once


def sizes(h, w):
    """{number of places: (height, width)} of each level."""
    found = {}
    for _ in range(3):
        found[h * w] = (h, w)
        h, w = -(-h // 2), -(-w // 2)
    return found


class Storing:
    """diffusers' AttnProcessor that keeps the probabilities of the prompts, the second half."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        layers = ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        query, key, value = (attn.head_to_batch_dim(layer(x)) for layer, x in layers)
        attention_probs = attn.get_attention_scores(query, key)  # [B heads, L, M]
        if encoder_hidden_states is not None:
            batch = len(hidden_states)
            by_head = attention_probs.reshape(batch, attn.heads, *attention_probs.shape[1:])
            self.kept.append(by_head[batch // 2 :])
        return attn.to_out[0](attn.batch_to_head_dim(attention_probs @ value))


def torch_maps(pipeline, latents, parts, steps):
    """(pictures, attention to each token [prompts, tokens, H, W]) as straightforwardly as can be:
    every map of every layer and step enlarged and added."""
    import torch

    before = pipeline.unet.attn_processors
    kept, counted = {part: [] for part in ("down", "mid", "up")}, []

    def collect(pipe, step, t, values):
        if step in steps:
            counted.extend(p for part in parts for p in kept[part])
        for maps in kept.values():
            maps.clear()
        return values

    pipeline.unet.set_attn_processor({n: Storing(kept[n.split("_")[0]]) for n in before})
    try:
        out = pipeline(
            PROMPTS, negative_prompt=["a blue square"] * 2, height=HEIGHT, width=WIDTH,
            num_inference_steps=STEPS, guidance_scale=4.0, latents=torch.from_numpy(latents),
            output_type="np", callback_on_step_end=collect,
        )  # fmt: skip
    finally:
        pipeline.unet.set_attn_processor(before)
    total, heads = 0.0, 0
    for p in counted:  # [B, heads, L, M]
        h, w = sizes(*LATENT)[p.shape[2]]
        maps = p.sum(1).transpose(1, 2).reshape(len(p), -1, h, w)
        total = total + torch.nn.functional.interpolate(
            maps.double(), size=(HEIGHT, WIDTH), mode="bicubic"
        )
        heads += p.shape[1]
    return out.images, total.numpy() / heads


def run(folder, output, latents, *options):
    np.save(output / "latents.npy", latents)
    arguments = ["--prompts", *PROMPTS, "--negative_prompt=a blue square", f"--steps={STEPS}",
                 "--guidance=4", f"--height={HEIGHT}", f"--width={WIDTH}",
                 f"--latents={output / 'latents.npy'}", f"--model={folder}", f"--output={output}",
                 *options]  # fmt: skip
    assert sample.main(arguments) == 0


def normal():
    return np.random.default_rng(0).standard_normal((2, 4, *LATENT)).astype(np.float32)


@pytest.fixture(scope="module")
def explained(torch_pipeline, pipeline_folder, tmp_path_factory):
    """(our folder, torch's pictures, torch's maps) of all layers and steps."""
    output = tmp_path_factory.mktemp("explained")
    run(pipeline_folder, output, normal(), "--explain", "--explain_layers=all", "--trajectory")
    every = torch_maps(torch_pipeline, normal(), ("down", "mid", "up"), range(STEPS))
    return types.SimpleNamespace(folder=output, images=every[0], maps=every[1])


def check(folder, maps, tokenizer):
    for i, prompt in enumerate(PROMPTS):
        found = np.load(folder / f"{i:05d}-words.npz")
        assert found["words"].tolist() == prompt.replace(",", "").split()
        assert found["maps"].dtype == np.float32
        assert found["maps"].shape == (len(found["words"]), HEIGHT, WIDTH)
        offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        place = 0
        for word, ours in zip(found["words"], found["maps"], strict=True):
            start = prompt.index(word, place)
            place = start + len(word)
            tokens = [k for k, (a, b) in enumerate(offsets) if start <= a < b <= place]
            want = np.maximum(maps[i, tokens].mean(0), 0.0)
            # Both in float32, over four steps of sampling that a difference goes through.
            assert np.abs(ours - want).max() < 1e-4 * want.max(), word
            assert ours.min() >= 0.0 and ours.max() > ours.min()


def test_heat_maps_are_those_of_a_storing_pipeline(explained, torch_pipeline):
    check(explained.folder, explained.maps, torch_pipeline.tokenizer)
    for i, image in enumerate(explained.images):
        ours = np.asarray(Image.open(explained.folder / f"{i:05d}.png"), np.float32) / 255
        assert np.abs(ours - image).max() < 0.01


def test_layers_and_steps_can_be_chosen_and_sdxl_explained(torch_xl_pipeline, xl_folder, tmp_path):
    options = ("--explain", "--explain_layers", "up", "mid", "--explain_steps=0:0.5")
    run(xl_folder, tmp_path, normal(), *options)
    _, maps = torch_maps(torch_xl_pipeline, normal(), ("mid", "up"), range(STEPS // 2))
    check(tmp_path, maps, torch_xl_pipeline.tokenizer)


def test_looking_on_does_not_change_the_pictures(explained, pipeline_folder, tmp_path):
    run(pipeline_folder, tmp_path, normal())
    for i in range(2):
        name = f"{i:05d}.png"
        assert np.array_equal(Image.open(explained.folder / name), Image.open(tmp_path / name))
    assert not list(tmp_path.glob("*words*"))


def test_there_is_a_tile_for_each_word(explained):
    sheet = np.asarray(Image.open(explained.folder / "00000-words.png"))
    factor, gap, columns = -(-128 // WIDTH), 6, 2
    assert sheet.shape[1] == gap + columns * (WIDTH * factor + gap)
    picture = np.asarray(Image.open(explained.folder / "00000.png"))
    maps = np.load(explained.folder / "00000-words.npz")["maps"]
    tile = sheet[gap : gap + HEIGHT * factor : factor, gap : gap + WIDTH * factor : factor]
    # Where a map is lowest the picture shows, where it is highest the colour map's last colour.
    low = np.unravel_index(maps[0].argmin(), maps[0].shape)
    high = np.unravel_index(maps[0].argmax(), maps[0].shape)
    assert np.array_equal(tile[low], picture[low])
    assert tile[high].tolist() == [122, 4, 3]  # of turbo


def test_all_tokens_together_have_all_the_attention():
    """A softmax sums to one at each place, whatever is added up and enlarged."""
    rng = np.random.default_rng(0)
    sums = {}
    for level, (h, w) in {"0": (7, 5), "2": (2, 2)}.items():
        p = rng.random((3, h, w, 6))
        sums[level] = (p / p.sum(-1, keepdims=True)).sum(0)
    words = [explain.Word(str(i), i, i + 1) for i in range(6)]
    maps = explain.word_maps(6, sums, words, (28, 21))
    assert np.all(maps.sum(0) > 1 - 1e-6)  # what is cut off below zero makes it more
    mean = explain.word_maps(6, sums, [explain.Word("all", 0, 6)], (28, 21))
    assert np.allclose(mean, 1 / 6, atol=1e-7)


@pytest.mark.parametrize("size, larger", [(8, 64), (3, 7), (1, 5), (6, 6)])
def test_bicubic_enlargement_is_torchs(size, larger):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(1, 1, size, size))
    want = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=(larger, larger), mode="bicubic"
    )
    rows = explain.cubic(size, larger)
    assert np.abs(rows @ x[0, 0] @ rows.T - want.numpy()[0, 0]).max() < 1e-12


def test_words_have_the_tokens_that_they_cover(torch_pipeline, tmp_path):
    torch_pipeline.tokenizer.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path, context_length=40)
    prompt = "  A \"red\"  circle, (zebra-like) 'n it's 3.5 - Größe…"
    words = explain.words_of(prompt, tokenizer)
    assert [w.text for w in words] == ["A", "red", "circle", "zebra-like", "n", "it's", "3.5",
                                       "Größe"]  # fmt: skip
    offsets = torch_pipeline.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    place = 0
    for word in words:
        start = prompt.index(word.text, place)
        place = start + len(word.text)
        covered = [k for k, (a, b) in enumerate(offsets) if start <= a < b <= place]
        assert list(range(word.first, word.last)) == covered, word
    # BOS, 14 tokens and EOS: what is beyond has no map.
    short = explain.words_of(prompt, Tokenizer.load(tmp_path, context_length=16))
    assert short == [w for w in words if w.last <= 15] + [
        explain.Word(w.text, w.first, 15) for w in words if w.first < 15 < w.last
    ]
    assert tokenizer.truncated == 0


def test_a_learnt_word_has_all_of_its_tokens(torch_pipeline, tmp_path):
    torch_pipeline.tokenizer.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path, context_length=40).with_token("<cat>", 3)
    tokenizer = tokenizer.with_token("my dog")
    words = explain.words_of('A "<cat>", red', tokenizer)
    ids = tokenizer.encode(['A "<cat>", red'])[0]
    assert [word.text for word in words] == ["A", "<cat>", "red"]
    first = tokenizer.largest_id - 3
    cat = words[1]
    assert ids[cat.first : cat.last].tolist() == [first, first + 1, first + 2]
    with pytest.raises(UserError, match="the learnt word 'my dog' has one"):
        explain.words_of("my dog", tokenizer)


@pytest.mark.parametrize(
    "text, want",
    [("0:1", (0, 10)), ("0:0.5", (0, 5)), ("0.5:1", (5, 10)), ("0.3:0.7", (3, 7)),
     ("0.99:1", (9, 10)), ("0:0.01", (0, 1))],
)  # fmt: skip
def test_fractions_of_the_steps(text, want):
    assert explain.parse_steps(text, 10) == want


@pytest.mark.parametrize("text", ["", "1", "0.5:0.2", "0:2", "a:b", "-1:1", "0:nan", "0:0.5:1"])
def test_other_fractions_are_refused(text):
    with pytest.raises(UserError, match="FIRST < LAST"):
        explain.parse_steps(text, 10)


def test_parts_without_attention_are_refused():
    config = UNetConfig(down_block_types=("DownBlock2D",) * 4)
    with pytest.raises(UserError, match="--explain_layers=down.*'all'"):
        explain.HeatMaps(config, ("down",), 0, 1)
    assert explain.HeatMaps(config, ("down", "up"), 0, 1).levels() == [0, 1, 2]
    assert explain.parse_layers(["up", "all"]) == ("down", "mid", "up")
