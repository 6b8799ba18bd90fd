"""Metrics of cosines between features: CLIP score, and how different pictures of one prompt are."""

from __future__ import annotations

import numpy as np

from sdjax.evaluation import bootstrap
from sdjax.evaluation.bootstrap import Estimate
from sdjax.evaluation.mmd import normalised


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 max(cos, 0) of CLIP features of pictures and of their captions, [N, D] each -> [N].

    Hessel et al. 2021 with the factor of torchmetrics, 100 in place of 2.5.
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
    """The mean of `clip_scores`; the interval resamples prompts [N] (their numbers) with all their
    pictures."""
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
    """Mean cosine distance between two pictures of one prompt, averaged over prompts.

    0 when the model draws the same picture again and again (mode collapse). Prompts with one
    picture do not count.

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
