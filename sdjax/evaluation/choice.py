"""Which metrics can be computed of what there is, and what the others lack."""

from __future__ import annotations

from collections.abc import Sequence

from sdjax.errors import UserError
from sdjax.evaluation.evaluation import Inputs, made_by, tower_for
from sdjax.evaluation.metrics import neighbours
from sdjax.evaluation.metrics.fidelity import is_of_shapes
from sdjax.evaluation.towers import CLIP_EXAMPLE, INCEPTION_URL

# {need: description of the missing input, and how to provide it}.
NEEDS = {
    "pictures": "pictures: draw with --model and --num_samples above 0, or give --images=DIR",
    "inception": "the Inception weights: give --inception=FILE, pytorch-fid's file, published at "
    f"{INCEPTION_URL}, or --download",
    "clip": "a CLIP: give --clip=DIR, a transformers folder such as https://huggingface.co/"
    f"{CLIP_EXAMPLE}, or --download",
    "features": "a network that makes features: give --inception=FILE, --clip=DIR or --download; "
    "or --features=pixels, which takes no weights and sees near copies alone",
    "moments": "pictures to compare with: --dataset=PATH of pictures (a run's own may be encoded), "
    "or --reference=FILE.npz",
    "reference": "single pictures to compare with: --dataset=PATH of pictures (a run's own may be "
    "encoded), or a --reference=FILE.npz that sdjax.evaluate wrote (pytorch-fid's has no features)",
    "train": "the pictures that the model was trained on, of another split than those compared "
    "with: --dataset=PATH of pictures (a run's own may be encoded)",
    "captions": "captions: draw with --model, or put a metadata.jsonl beside the pictures",
    "several": "several pictures of a prompt: draw with --per_prompt=4",
    "shapes": "captions of captioned_shapes, the only ones that the reader understands",
    "masked": "a model for inpainting, which draws parts of the pictures of --dataset",
    "validate": "the workdir of a run as --model, alone, for its objective",
    "example_losses": "the workdir of a run as --model, alone, for its objective",
    "model": "a model that draws again: give --model, without --images",
}
METRICS: dict[str, tuple[str, ...]] = {
    "fid": ("pictures", "inception", "moments"),
    "kid": ("pictures", "inception", "reference"),
    "cmmd": ("pictures", "clip", "reference"),
    "clip_score": ("pictures", "clip", "captions"),
    "precision": ("pictures", "features", "reference"),
    "recall": ("pictures", "features", "reference"),
    "density": ("pictures", "features", "reference"),
    "coverage": ("pictures", "features", "reference"),
    "diversity": ("pictures", "features", "captions", "several"),
    "memorised": ("pictures", "train", "reference"),
    "fidelity": ("pictures", "captions", "shapes"),
    "inside_error": ("pictures", "masked"),
    "outside_error": ("pictures", "masked"),
    "validation_loss": ("validate",),
    "example_loss": ("example_losses",),
    "robustness": ("pictures", "captions", "model"),
}
# {metric of an autoencoder: whether more is better}; see `sdjax.evaluation.autoencoders`.
AUTOENCODER_METRICS = {"psnr": True, "ssim": True, "lpips": False, "rfid": False}
# Not computed unless they are asked for: they take as long as many others together.
ON_REQUEST = ("example_loss", "robustness")
BY_DEFAULT = tuple(name for name in METRICS if name not in ON_REQUEST)

# The least numbers of pictures: generated, and to compare with.
LEAST = {
    "fid": (2, 2),
    "kid": (2, 2),
    "cmmd": (2, 2),
    "precision": (neighbours.PRECISION_K + 1, neighbours.PRECISION_K + 1),
    "recall": (neighbours.PRECISION_K + 1, neighbours.PRECISION_K + 1),
    "density": (1, neighbours.DENSITY_K + 1),
    "coverage": (1, neighbours.DENSITY_K + 1),
}


def lacking(inputs: Inputs, metric: str) -> list[str]:
    """The keys of `NEEDS` that a metric lacks."""
    captions = inputs.captions or ()
    tower = tower_for(inputs, metric)
    given = inputs.statistics
    fitting = given if given is not None and tower is not None and made_by(given, tower) else None
    has = {
        "pictures": inputs.captions is not None,
        "inception": inputs.inception is not None,
        "clip": inputs.clip is not None,
        "features": tower is not None,
        "moments": fitting is not None or inputs.reference is not None,
        "reference": (fitting is not None and fitting.features is not None)
        or inputs.reference is not None,
        "train": inputs.train is not None,
        "captions": bool(captions),
        "several": len(set(captions)) < len(captions),
        "shapes": is_of_shapes(captions),
        "masked": inputs.masked is not None,
        "validate": inputs.validate is not None,
        "example_losses": inputs.example_losses is not None,
        "model": inputs.draws,
    }
    return [need for need in METRICS[metric] if not has[need]]


def _too_few(inputs: Inputs, metric: str) -> list[str]:
    """The complaint, as a list, if there are not enough pictures of either kind; else []."""
    given = inputs.statistics
    if inputs.pictures is not None:
        judged = len(inputs.pictures)
    else:
        judged = len(inputs.captions or ())
    compared = len(inputs.reference) if inputs.reference is not None else None
    if given is not None and given.features is not None:
        compared = len(given.features)
    least = LEAST.get(metric, (1, 1))
    if "pictures" in METRICS[metric] and judged < least[0]:
        return [f"at least {least[0]} pictures, and there are {judged}; see --num_samples"]
    if compared is not None and compared < least[1]:
        return [f"at least {least[1]} pictures to compare with, and there are {compared}"]
    return []


def check_names(names: Sequence[str], known: Sequence[str] = tuple(METRICS)) -> None:
    """Raise a UserError if one of the names is none of the metrics that are `known`."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--metrics has {', '.join(unknown)}; expected some of {', '.join(known)}")


def choose(names: Sequence[str] | None, inputs: Inputs) -> tuple[list[str], list[str]]:
    """The metrics to compute, and lines about those left out and why.

    Args:
        names: the metrics to compute; None for all of `BY_DEFAULT` that the inputs allow.

    Raises:
        UserError: a name is no metric, or the metric lacks an input; the message says how to
            provide it.
    """
    chosen: list[str] = []
    left_out: dict[str, list[str]] = {}
    check_names(names or ())
    for name in BY_DEFAULT if names is None else names:
        missing = [NEEDS[need] for need in lacking(inputs, name)] + _too_few(inputs, name)
        if not missing:
            chosen.append(name)
        elif names is not None:
            raise UserError(f"--metrics={name}: this takes {missing[0]}")
        else:
            left_out.setdefault(missing[0], []).append(name)
    return chosen, [f"left out, {', '.join(ms)}: takes {why}" for why, ms in left_out.items()]
