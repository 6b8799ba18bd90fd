"""Metrics of cosines between features: CLIP score, and the diversity of pictures of one prompt."""

from __future__ import annotations

import numpy as np

from sdjax.evaluation.metrics import bootstrap
from sdjax.evaluation.metrics.bootstrap import Estimate
from sdjax.evaluation.metrics.mmd import normalised


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The scores 100 max(cos, 0) of pictures with their captions, float64 [N].

    images, texts: CLIP features [N, D].
    Hessel et al. 2021 with the factor of torchmetrics, 100 in place of 2.5.
    Raises ValueError if the shapes differ.
    """
    if images.shape != texts.shape:
        raise ValueError(
            f"clip_scores: features {list(images.shape)} of pictures, {list(texts.shape)} of texts"
        )
    return 100 * (normalised(images) * normalised(texts)).sum(1).clip(0)


def clip_score(
    images: np.ndarray,
    texts: np.ndarray,
    *,
    prompts: np.ndarray,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of `clip_scores`, with an interval that resamples prompts with all their pictures.

    prompts: [N], the number of each picture's prompt.
    """
    return bootstrap.mean(
        clip_scores(images, texts), groups=prompts, resamples=resamples, seed=seed
    )


def diversity(
    features: np.ndarray,
    prompts: np.ndarray,
    *,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean cosine distance between two pictures of one prompt, averaged over prompts.

    0 if the model always draws the same picture (mode collapse). Prompts with one picture do not
    count.

    Args:
      features: [N, D].
      prompts: [N], the number of each picture's prompt.

    Raises:
      ValueError: no prompt has two pictures.
    """
    unit = normalised(features)
    means = []
    for prompt in np.unique(prompts):
        own = unit[prompts == prompt]
        if len(own) > 1:
            cosines = own @ own.T
            pairs = len(own) * (len(own) - 1)
            means.append(1 - (cosines.sum() - np.trace(cosines)) / pairs)
    if not means:
        raise ValueError("diversity: no prompt has two pictures; draw several of each prompt")
    return bootstrap.mean(np.array(means), resamples=resamples, seed=seed)
