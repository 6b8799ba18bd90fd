"""Pictures while training: fixed prompts and noise, so that one step can be held beside another."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sdjax.config import Config
from sdjax.data import pipeline, transforms
from sdjax.data.batches import as_floats
from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.families.conditioning import encode_text
from sdjax.methods.method import Examples, Method
from sdjax.models.params import Params
from sdjax.sampling.generate import to_uint8
from sdjax.sampling.grids import grid, save_png
from sdjax.sampling.strips import append_column
from sdjax.system import paths
from sdjax.train.captions import Encode
from sdjax.train.monitoring.telemetry import Telemetry
from sdjax.train.state import State
from sdjax.train.weight_sets import RAW, evaluated_set, weight_sets


def read_examples(config: Config, tokenizers: Mapping[str, TextTokenizer], count: int) -> Examples:
    """The first `count` examples of the evaluation split; of a mixture, its parts' in turn."""
    sources = pipeline.open_parts(config.data, config.data.eval_split)
    turns = itertools.zip_longest(*(((s, i) for i in range(min(count, len(s)))) for s in sources))
    chosen = itertools.islice((turn for row in turns for turn in row if turn), count)
    examples = [source[i] for source, i in chosen]
    captions = [example["text"] for example in examples]
    side = config.data.resolution
    grid = side // config.model.networks["vae"].downscale
    rows = [_squares(example, side) | _moments(example, grid) for example in examples]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    pictures = as_floats(stacked, pipeline.kinds_of(config.data))
    images = pictures.pop("image")
    return Examples(tuple(captions), images, encode_text(tokenizers, captions), pictures)


def _squares(example: Mapping[str, Any], side: int) -> dict[str, np.ndarray]:
    """The pictures of an example, uint8 [side, side, C] out of their middles."""
    rng = np.random.default_rng(0)  # for the centre crop, which draws nothing from it

    def square(picture: np.ndarray, images: Mapping[str, np.ndarray]) -> transforms.Prepared:
        return transforms.prepare(
            picture, rng, height=side, width=side, crop="center", flip=False, images=images
        )

    named = example["images"]
    if "image" in example:
        prepared = square(example["image"], named)
        return {"image": prepared.pixels, **prepared.images}
    # Encoded ahead: drawing takes captions and what was kept as pixels.
    blank = np.full((side, side, 3), 127, np.uint8)
    return {"image": blank, **{name: square(p, {}).pixels for name, p in named.items()}}


def _moments(example: Mapping[str, Any], grid: int) -> dict[str, np.ndarray]:
    """The moments of named pictures, [grid, grid, 2C] out of their middles; {} of pixels."""
    found = {}
    for field, moments in example.get("others", {}).items():
        side = min(moments.shape[:2])
        top, left = ((length - side) // 2 for length in moments.shape[:2])
        places = np.arange(grid) * side // grid
        found[field] = moments[top + places][:, left + places]
    return found


def beside_conditions(config: Config, examples: Examples, images: np.ndarray) -> np.ndarray:
    """Return pictures uint8 [N, H, W, 3] with the conditions that they follow on their left."""
    kinds = pipeline.kinds_of(config.data)
    shown = [to_uint8(v) for name, v in examples.named.items() if kinds.get(name) == "condition"]
    return np.concatenate([*shown, images], axis=2)


class Gallery:
    """The same prompts (or pictures) and noise every time, so that grids can be compared.

    With `sample.compare` they are drawn with the first average and with the raw weights, guided and
    not. A model that has never seen a caption (`objective.caption_dropout = 1`) draws without.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        tokenizers: Mapping[str, TextTokenizer],
        folder: paths.Path,
    ):
        self._config, self._method, self._tokenizers = config, method, tokenizers
        self._folder = folder / "samples"
        drawn = config.draws
        self._blind = drawn and config.objective.caption_dropout == 1.0
        self._guidance = (True, False) if drawn and not self._blind else (False,)
        self._examples = self._get_examples()  # now: a wrong split is no news for step 1000

    def encode(self, encode: Encode) -> None:
        """Keep what text encoders make of the prompts, to draw without the encoders."""
        negative = encode_text(self._tokenizers, [self._config.sample.negative_prompt])
        away = {name: rows[0] for name, rows in encode(negative).items()}
        made = encode(self._examples.tokens)
        self._examples = dataclasses.replace(self._examples, tokens=made, negative=away)

    def _get_examples(self) -> Examples:
        sample, side = self._config.sample, self._config.data.resolution
        prompts = ("",) * sample.count if self._blind else sample.prompts
        if not (prompts and self._tokenizers):
            return read_examples(self._config, self._tokenizers, sample.count)
        tokens = encode_text(self._tokenizers, prompts)
        if not (self._config.data.images or self._method.reads_pictures):
            return Examples(prompts, np.zeros((len(prompts), side, side, 3), np.float32), tokens)
        # The pictures of as many examples, from the first again.
        read = read_examples(self._config, self._tokenizers, len(prompts))
        rows = np.arange(len(prompts)) % len(read.captions)
        named = {name: pictures[rows] for name, pictures in read.named.items()}
        return Examples(prompts, read.images[rows], tokens, named)

    def show(self, step: int, state: State, frozen: Params, telemetry: Telemetry) -> paths.Path:
        """Draw, write DIR/samples/STEP.png and those it is compared with, and TensorBoard images.

        Returns:
            The path of STEP.png, drawn with the weights that are exported, guided.
        """
        main = (evaluated_set(self._config.ema.profiles), self._guidance[0])
        sets = weight_sets(state)
        for weights, guided in self._variants():
            params = {**frozen, **sets[weights]()}
            images = self._method.pictures(params, self._examples, self._config.seed, guided=guided)
            images = beside_conditions(self._config, self._examples, images)
            words = [weights, "guided" if guided else "unguided"][: len(self._guidance)]
            variant = "" if (weights, guided) == main else "-" + "-".join(words)
            if jax.process_index() == 0:
                self._write(step, variant, images)
                telemetry.images(step, f"samples{variant}", images, self._examples.captions)
        return self._folder / f"{step:08d}.png"

    def _variants(self) -> list[tuple[str, bool]]:
        """(set of weights, whether guided) of each grid; that of STEP.png first."""
        own = evaluated_set(self._config.ema.profiles)
        if not self._config.sample.compare:
            return [(own, self._guidance[0])]
        return [(name, guided) for name in dict.fromkeys((own, RAW)) for guided in self._guidance]

    def _write(self, step: int, variant: str, images: np.ndarray) -> None:
        captions = self._examples.captions
        save_png(
            self._folder / f"{step:08d}{variant}.png",
            grid(images, captions),
            {"step": step, "prompts": "\n".join(captions)},
        )
        append_column(self._folder / f"strip{variant}.png", step, images)
