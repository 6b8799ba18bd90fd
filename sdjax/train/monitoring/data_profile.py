"""A few numbers of the data that a run trains on, and how far from them something else is.

Process 0 measures the first examples of a run as they are trained on, cropped and augmented, with
the captions chosen for them, and writes `data_profile.json` into the workdir. A server compares
what it is asked for, and draws, with that.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.system import paths, text_files, untrusted

FILE = "data_profile.json"
EXAMPLES = 1024  # of one process; with 10 bins that leaves a PSI of some 0.01 to chance
FEWEST = 64  # below which there is no profile
PROMPT_TOKENS = "prompt_tokens"
MEASURES = (PROMPT_TOKENS, "brightness", "contrast", "saturation")
_BINS = 10
_SIDE = 64  # pixels of a picture that are measured, in each direction, evenly spaced
_LEAST = 1e-3  # share of a bin without values, where PSI would be infinite


def prompt_lengths(tokens: np.ndarray, tokenizer: TextTokenizer) -> np.ndarray:
    """Return the number of tokens, without marks, of rows [n, L]; int [n], at most what fits."""
    ends = tokens == tokenizer.eos_id
    first = np.where(ends.any(1), ends.argmax(1), tokens.shape[1])
    return np.maximum(first - tokenizer.marks_before, 0)


def picture_measures(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return brightness, contrast and saturation of pictures [n, H, W, 3] in [0, 1], each [n].

    Mean and deviation of the luma (ITU-R BT.601), and the mean saturation of HSV.
    """
    rows, columns = (max(1, size // _SIDE) for size in images.shape[1:3])
    pixels = np.asarray(images[:, ::rows, ::columns], np.float32)
    luma = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    most, least = pixels.max(-1), pixels.min(-1)
    saturation = np.divide(most - least, most, out=np.zeros_like(most), where=most > 0)
    return {
        "brightness": luma.mean((1, 2)),
        "contrast": luma.std((1, 2)),
        "saturation": saturation.mean((1, 2)),
    }


@dataclasses.dataclass(frozen=True)
class Distribution:
    """The distribution of a measure: its mean, and the shares of values between edges.

    edges: rising, the deciles of the values without repetitions; shares: [len(edges) + 1].
    """

    mean: float
    edges: tuple[float, ...]
    shares: tuple[float, ...]

    def psi(self, values: Sequence[float]) -> float:
        """Return the population stability index of values against this distribution.

        sum((a - e) ln(a / e)) over the bins, of the shares e here and a there: the symmetric
        Kullback-Leibler divergence. By custom below 0.1 is no change, above 0.25 a large one.
        """
        shares = _shares(np.asarray(values, np.float64), self.edges)
        expected, actual = (np.maximum(s, _LEAST) for s in (np.array(self.shares), shares))
        return float(np.sum((actual - expected) * np.log(actual / expected)))


def distribution(values: Sequence[float]) -> Distribution:
    """Return the distribution of values, of which there are some."""
    array = np.asarray(values, np.float64)
    edges = np.unique(np.quantile(array, np.arange(1, _BINS) / _BINS, method="higher"))
    kept = tuple(float(edge) for edge in edges)
    return Distribution(float(array.mean()), kept, tuple(map(float, _shares(array, kept))))


def _shares(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """The shares of values in the bins up to and with each edge, and above the last."""
    counts = np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1)
    return counts / max(len(values), 1)


def read_profile(folder: paths.Path) -> dict[str, Distribution]:
    """Return {measure: distribution} of a workdir; {} where there is none, or none that is valid.

    The workdir may be a stranger's.
    """
    try:
        found = text_files.read_object(folder / FILE)["measures"]
        return {name: _checked(found[name]) for name in MEASURES if name in found}
    except untrusted.damage(text_files.TextError):
        return {}


def _checked(found: Mapping[str, Any]) -> Distribution:
    """A distribution out of JSON; raises ValueError, KeyError or TypeError."""
    mean = float(found["mean"])
    edges, shares = (tuple(map(float, found[key])) for key in ("edges", "shares"))
    numbers = (mean, *edges, *shares)
    if not all(map(math.isfinite, numbers)) or len(shares) != len(edges) + 1 or len(edges) >= _BINS:
        raise ValueError("no distribution")
    return Distribution(mean, edges, shares)


class DataProfiler:
    """Measures the first examples of a run, on process 0, unless the workdir has their profile.

    Args:
        tokenizers: {field of a batch: tokenizer}; the first one's tokens are counted.
    """

    def __init__(self, folder: paths.Path, tokenizers: Mapping[str, TextTokenizer]):
        self._folder = folder
        self._field = next(iter(tokenizers), "")
        self._tokenizer = tokenizers.get(self._field)
        self._values: dict[str, list[float]] = {name: [] for name in MEASURES}
        self._done = jax.process_index() != 0 or paths.exists(folder / FILE)

    def observe(self, batch: Mapping[str, np.ndarray]) -> None:
        """Measure the examples of a batch as the networks take them: pictures in [-1, 1]."""
        if self._done:
            return
        if self._tokenizer is not None and self._field in batch:
            lengths = prompt_lengths(np.asarray(batch[self._field]), self._tokenizer)
            self._values[PROMPT_TOKENS].extend(lengths.tolist())
        image = batch.get("image")
        if image is not None and image.ndim == 4 and image.shape[-1] == 3:  # no latents
            for name, values in picture_measures(np.clip((image + 1) / 2, 0, 1)).items():
                self._values[name].extend(values.tolist())
        if max(map(len, self._values.values())) >= EXAMPLES:
            self.close()

    def close(self) -> None:
        """Write what was measured, if it is enough; where that fails, it is only said."""
        if self._done:
            return
        self._done = True
        found = {
            name: dataclasses.asdict(distribution(finite))
            for name, values in self._values.items()
            if len(finite := [v for v in values if math.isfinite(v)]) >= FEWEST
        }
        if not found:
            return
        count = max(map(len, self._values.values()))
        try:
            text = json.dumps({"examples": count, "measures": found}, indent=1)
            paths.write_text(self._folder / FILE, text + "\n")
        except paths.storage_errors(ValueError) as error:
            print(f"warning: {error}", flush=True)
