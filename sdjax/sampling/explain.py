"""Which places of a picture attended to which word: DAAM heat maps.

Tang et al. 2022, "What the DAAM: Interpreting Stable Diffusion Using Cross Attention"
(arXiv:2210.04885), section 2.2: the probabilities of all cross-attention, summed over heads, layers
and steps at their own resolutions and enlarged bicubically to the picture. Enlarging is linear, so
the sums come first, within the sampling loop, and one map for each resolution is all that is kept.

The authors' code drops what is below 0 in the enlarged map of each head and layer; here that
happens once, in the sum.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.errors import UserError
from sdjax.models.unet_config import DOWN_TYPES, UP_TYPES, UNetConfig
from sdjax.sampling.grids import grid, save_png
from sdjax.sampling.request import SamplingRequest
from sdjax.system import paths

PARTS = ("down", "mid", "up")
# What may stand around a word without being of it.
PUNCTUATION = string.punctuation + "“”‘’«»„…–—"

State = tuple[jax.Array, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class HeatMaps:
    """A `Callback` that adds up cross-attention.

    Its state is (number of maps added [B], {level: their sum [B, h, w, L]}), float32.

    unet: whose attention it is.
    layers: of PARTS, which way of the network to look at.
    first, last: the evaluations first <= i < last are added up.
    """

    unet: UNetConfig
    layers: tuple[str, ...]
    first: int
    last: int

    def __post_init__(self) -> None:
        if not self.levels():
            raise UserError(
                f"--explain_layers={' '.join(self.layers)}: this network has no cross-attention "
                "there; try 'all'"
            )

    def levels(self) -> list[int]:
        """Which resolutions have layers that are looked at, 0 being the finest."""
        config, end = self.unet, len(self.unet.block_out_channels) - 1
        found: set[int] = set()
        if "down" in self.layers:
            found |= {i for i, kind in enumerate(config.down_block_types) if kind == DOWN_TYPES[0]}
        if "mid" in self.layers:
            found.add(end)
        if "up" in self.layers:
            found |= {
                end - i for i, kind in enumerate(config.up_block_types) if kind == UP_TYPES[0]
            }
        return sorted(found)

    def wants(self, path: str) -> bool:
        """Cross-attention of the chosen parts."""
        return path.endswith(".attn2") and path.split("_")[0] in self.layers

    def start(self, shape: tuple[int, ...], length: int) -> State:
        """Nothing seen yet; see `Callback`."""
        batch, height, width, _ = shape
        sums = {}
        for level in range(len(self.unet.block_out_channels)):
            if level in self.levels():
                sums[str(level)] = jnp.zeros((batch, height, width, length))
            height, width = -(-height // 2), -(-width // 2)
        return jnp.zeros(batch), sums

    def see(
        self, state: State, i: jax.Array, x0: jax.Array, probabilities: Mapping[str, jax.Array]
    ) -> State:
        """Adds {path: [B, heads, h w, L]} to the sums."""
        count, sums = state[0], dict(state[1])
        counts = ((i >= self.first) & (i < self.last)).astype(jnp.float32)
        for path, p in probabilities.items():
            if self.wants(path):
                level = self._level(path)
                sums[level] += counts * p.sum(1).reshape(sums[level].shape)
                count += counts * p.shape[1]
        return count, sums

    def _level(self, path: str) -> str:
        part, number = path.split(".")[:2]
        end = len(self.unet.block_out_channels) - 1
        return {"down_blocks": number, "mid_block": str(end)}.get(part) or str(end - int(number))


def parse_layers(names: Sequence[str]) -> tuple[str, ...]:
    """Parts of the network in request, without repetition; "all" is all of them."""
    return tuple(part for part in PARTS if part in names or "all" in names)


def parse_steps(text: str, evaluations: int) -> tuple[int, int]:
    """FIRST:LAST, fractions of the way from noise (0) to picture (1) -> a range of evaluations.

    Raises:
        UserError: it is no such range.
    """
    try:
        first, last = (float(part) for part in text.split(":"))
    except ValueError:
        first, last = 1.0, 0.0
    if not 0.0 <= first < last <= 1.0:
        raise UserError(
            f"--explain_steps={text}; expected FIRST:LAST with 0 <= FIRST < LAST <= 1, as 0:0.5 "
            "for the first half of the steps"
        )
    start = min(int(first * evaluations + 1e-6), evaluations - 1)
    return start, max(int(np.ceil(last * evaluations - 1e-6)), start + 1)


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a prompt and its tokens, first <= position < last."""

    text: str
    first: int
    last: int


def words_of(prompt: str, tokenizer: TextTokenizer) -> list[Word]:
    """The words of a prompt that is cut to the context length, without punctuation around them.

    BPE never crosses a space, so each word has the tokens that it has alone.

    Raises:
        UserError: a learnt word has a space.
    """
    chunks = prompt.split()
    learnt = getattr(tokenizer, "added_words", ())
    for word in learnt:
        if " " in word and word.lower() in prompt.lower():
            raise UserError(
                f"--explain reads words at spaces, and the learnt word {word!r} has one: give it "
                "another name, as --embedding=FILE:WORD"
            )
    cores = [_core(chunk, learnt) for chunk in chunks]
    pieces = [
        chunk.partition(core) if core else ("", "", chunk)
        for chunk, core in zip(chunks, cores, strict=True)
    ]
    texts = [*chunks, *(part for piece in pieces for part in piece)]
    cut = tokenizer.truncated
    marks = tokenizer.marks_before + tokenizer.marks_after
    lengths = tokenizer.encode_with_lengths(texts)[1] - marks
    tokenizer.truncated = cut  # counts captions
    words, position = [], tokenizer.marks_before
    for i, (chunk, core) in enumerate(zip(chunks, cores, strict=True)):
        whole = int(lengths[i])
        before, inner, after = (int(n) for n in lengths[len(chunks) + 3 * i :][:3])
        # Punctuation may melt with its neighbour into one token; then it stays.
        text, first, count = (
            (core, position + before, inner)
            if before + inner + after == whole
            else (chunk, position, whole)
        )
        position += whole
        last = min(first + count, tokenizer.context_length - tokenizer.marks_after)
        if core and first < last:
            words.append(Word(text, first, last))
    return words


def _core(chunk: str, learnt: Sequence[str]) -> str:
    """The learnt word in a text without spaces, or else the text without punctuation around it."""
    for word in learnt:
        at = chunk.lower().find(word.lower())
        if at >= 0:
            return chunk[at : at + len(word)]
    return chunk.strip(PUNCTUATION)


def check_words(prompts: Sequence[str], tokenizers: Sequence[TextTokenizer]) -> list[list[Word]]:
    """The words of each prompt.

    Raises:
        UserError: a prompt has none, or two text encoders split it differently.
    """
    found = []
    for i, prompt in enumerate(prompts):
        words, *others = (words_of(prompt, tokenizer) for tokenizer in tokenizers)
        if not words:
            raise UserError(f"--explain: prompt {i} ({prompt!r}) has no words to explain")
        if any(other != words for other in others):
            raise UserError(
                f"--explain: the tokenizers of the two text encoders split prompt {i} ({prompt!r}) "
                "differently, so that their words do not lie side by side in the context"
            )
        found.append(words)
    return found


def word_maps(
    count: float, sums: Mapping[str, np.ndarray], words: Sequence[Word], size: tuple[int, int]
) -> np.ndarray:
    """Mean attention to each word [words, H, W] float32, of one picture's state of `HeatMaps`.

    Args:
        count: how many maps were added up.
        sums: {level: [h, w, L]}.
        words: the tokens of each are averaged.
        size: (H, W).
    """
    total = np.zeros((len(words), *size))
    for level in sums.values():
        small = np.stack([level[..., w.first : w.last].mean(-1, dtype=np.float64) for w in words])
        rows, columns = (cubic(a, b) for a, b in zip(small.shape[1:], size, strict=True))
        total += rows @ small @ columns.T  # [words, H, W]
    return (np.maximum(total, 0.0) / count).astype(np.float32)


def cubic(size: int, larger: int) -> np.ndarray:
    """[larger, size] weights that enlarge a row bicubically, its ends repeated.

    Cubic convolution (Keys 1981) with a = -0.75, as torch's `interpolate(mode="bicubic")` has it,
    and so DAAM.
    """
    a = -0.75
    places = (np.arange(larger) + 0.5) * size / larger - 0.5
    matrix = np.zeros((larger, size))
    for offset in (-1, 0, 1, 2):
        neighbours = np.floor(places).astype(int) + offset
        x = np.abs(places - neighbours)
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weights = np.where(x <= 1, near, far)
        np.add.at(matrix, (np.arange(larger), neighbours.clip(0, size - 1)), weights)
    return matrix


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] under a heat map [H, W], whose lowest and highest place set the colours."""
    import matplotlib

    span = float(heat.max() - heat.min())
    strength = (heat - heat.min()) / span if span else np.zeros_like(heat)
    colours = matplotlib.colormaps["turbo"](strength)[..., :3] * 255
    strength = strength[..., None]
    return (image * (1 - strength) + colours * strength).round().astype(np.uint8)


class Explanation:
    """`sample --explain`: which callback to draw with, and what to write of it.

    Args:
        layers: of PARTS or "all"; None for down and up, as in the paper.
        steps: see `parse_steps`; None for all.

    Raises:
        UserError: an option or a prompt is not to be explained.
    """

    def __init__(self, request: SamplingRequest, layers: Sequence[str] | None, steps: str | None):
        if not isinstance(request.model.denoiser, UNetConfig):
            raise UserError(
                f"--explain shows the cross-attention of a UNet, and the family "
                f"{request.model.family.name!r} has none; leave it out, or see --trajectory"
            )
        first, last = parse_steps(steps or "0:1", len(request.plan.timesteps))
        layers = parse_layers(layers or ("down", "up"))
        self.callback = HeatMaps(request.model.denoiser, layers, first, last)
        self.words = check_words(request.texts, list(request.model.tokenizers.values()))

    def write(
        self,
        folder: paths.Path,
        number: int,
        image: np.ndarray,
        states: tuple[np.ndarray, Mapping[str, np.ndarray]],
        settings: Mapping[str, Any],
    ) -> None:
        """See `write_words`; states: of all pictures."""
        count, sums = states
        state = count[number], {level: x[number] for level, x in sums.items()}
        write_words(folder, number, image, self.words[number], state, settings)


def write_words(
    folder: paths.Path,
    number: int,
    image: np.ndarray,
    words: Sequence[Word],
    state: tuple[np.ndarray, Mapping[str, np.ndarray]],
    settings: Mapping[str, Any],
) -> None:
    """NNNNN-words.png, the picture under the heat map of each word, and NNNNN-words.npz.

    The .npz has "words" [words] and "maps" [words, H, W] float32, the mean attention probability of
    a word's tokens: comparable between words and pictures, where the colours are each word's own.

    Args:
        state: of `HeatMaps` for this picture: (count, {level: [h, w, L]}).
    """
    count, sums = state
    maps = word_maps(float(count), sums, words, (image.shape[0], image.shape[1]))
    texts = [word.text for word in words]
    tiles = np.stack([overlay(image, heat) for heat in maps])
    save_png(folder / f"{number:05d}-words.png", grid(tiles, texts), settings)
    with paths.writing(folder / f"{number:05d}-words.npz") as local, open(local, "wb") as file:
        np.savez_compressed(file, words=np.array(texts), maps=maps)
