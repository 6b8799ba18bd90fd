"""Pictures while training: fixed prompts and noise, so that one step can be held beside another."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import jax
import numpy as np

from sdjax.config import Config
from sdjax.data import named_images, pipeline, transforms
from sdjax.data.batches import as_floats
from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.families.conditioning import encode_text
from sdjax.methods.method import Examples, Method
from sdjax.models.params import Params
from sdjax.sampling.grids import grid, save_png
from sdjax.sampling.strips import append_column
from sdjax.system import paths
from sdjax.train.monitoring.telemetry import Telemetry
from sdjax.train.state import State
from sdjax.train.weight_sets import RAW, evaluated_set, weight_sets


def read_examples(config: Config, tokenizers: Mapping[str, TextTokenizer], count: int) -> Examples:
    """The first `count` examples of the evaluation split; of a mixture, its parts' in turn."""
    sources = pipeline.open_parts(config.data, config.data.eval_split)
    turns = itertools.zip_longest(*(((s, i) for i in range(min(count, len(s)))) for s in sources))
    side = config.data.resolution
    rng = np.random.default_rng(0)  # for the centre crop, which draws nothing from it
    captions, images = [], []
    named: dict[str, list[np.ndarray]] = {image.name: [] for image in config.data.images}
    for source, i in itertools.islice((turn for row in turns for turn in row if turn), count):
        example = source[i]
        captions.append(example["text"])
        if "image" not in example:  # encoded ahead, and drawing takes captions alone
            images.append(np.zeros((side, side, 3), np.float32))
            continue
        prepared = transforms.prepare(
            example["image"], rng, height=side, width=side, crop="center", flip=False,
            images=example["images"],
        )  # fmt: skip
        images.append(prepared.image)
        for name, picture in prepared.images.items():
            named[name].append(picture)
    tokens = encode_text(tokenizers, captions)
    fields = {name: np.stack(rows) for name, rows in named.items() if rows}
    others = as_floats(fields, named_images.kinds_of(config.data.images))
    return Examples(tuple(captions), np.stack(images), tokens, others)


def _with_prompts(
    examples: Examples, prompts: tuple[str, ...], tokens: Mapping[str, np.ndarray]
) -> Examples:
    """The pictures of examples, from the first again where there are too few, with prompts."""
    rows = np.arange(len(prompts)) % len(examples.images)
    named = {name: pictures[rows] for name, pictures in examples.named.items()}
    return Examples(prompts, examples.images[rows], tokens, named)


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

    def _get_examples(self) -> Examples:
        sample, side = self._config.sample, self._config.data.resolution
        prompts = ("",) * sample.count if self._blind else sample.prompts
        if prompts and self._tokenizers and self._method.reads_pictures:
            return _with_prompts(
                read_examples(self._config, self._tokenizers, len(prompts)),
                prompts,
                encode_text(self._tokenizers, prompts),
            )
        if prompts and self._tokenizers:
            images = np.zeros((len(prompts), side, side, 3), np.float32)
            return Examples(prompts, images, encode_text(self._tokenizers, prompts))
        return read_examples(self._config, self._tokenizers, sample.count)

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
