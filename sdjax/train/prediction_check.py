"""Before the first step: whether loaded weights predict what the run trains them to predict.

A network that was trained on v and is trained on epsilon runs without an error, and draws noise for
a long time. Its own loss tells: the output of the loaded weights is compared with both targets.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sdjax.checkpoints.assemble import Assembled
from sdjax.config import Config
from sdjax.diffusion.losses import example_keys
from sdjax.families.registry import model_of
from sdjax.methods.method import Batch, Method
from sdjax.models import placement
from sdjax.models.params import Params
from sdjax.parallel.activations import Activations, kernels_of
from sdjax.train.announce import announce_line

# The error of the right type is a small fraction of the other one's; those of a network that is
# as good as new are nearly equal.
FAR_LOWER = 0.5
TIMESTEPS = 4  # the middles of as many equal parts of the range


def warn(
    config: Config, assembled: Assembled, method: Method, params: Params, batch: Batch, mesh: Mesh
) -> None:
    """Print a warning if loaded weights predict another type far better.

    Nothing is computed unless the denoiser was loaded and predicts epsilon or v.

    Args:
        params: of every network, before the first step.
        batch: the first one, over the mesh.
    """
    denoiser = model_of(config.model).family.denoiser
    if denoiser not in assembled.sources or method.predictions is None:
        return
    found = _errors(config, method, params, batch, mesh)
    if line := warning(config.objective.prediction_type, found):
        announce_line(line)


def warning(prediction_type: str, errors: Mapping[str, float]) -> str:
    """Return the warning about these mean squared errors by prediction type, or ""."""
    best = min(errors, key=lambda kind: errors[kind])
    own, other = errors[prediction_type], errors[best]
    if not other < FAR_LOWER * own:
        return ""
    return (
        f"WARNING: objective.prediction_type is {prediction_type!r}, with a mean squared error of "
        f"{own:.4f} on the first batch; taken for {best!r} the loaded network has {other:.4f}. "
        f"What init_from says is probably wrong. Stop, and set "
        f"config.init_prediction_type={best!r}, or convert the file with --prediction_type={best}"
    )


def _errors(
    config: Config, method: Method, params: Params, batch: Batch, mesh: Mesh
) -> dict[str, float]:
    """{prediction type: mean squared error} of as many examples as a step takes at once."""
    assert method.predictions is not None
    predictions, timesteps = method.predictions, method.timesteps(TIMESTEPS)
    rows = config.data.batch_size // config.train.accumulation
    activations = Activations(mesh, kernels_of(mesh.devices.flat[0]), config.model.attention)

    @jax.jit
    def on_mesh(params: Params, batch: Batch) -> dict[str, jax.Array]:
        few = {field: value[:rows] for field, value in batch.items()}
        keys = example_keys(jax.random.key(0), jnp.arange(rows))
        with placement.placed(activations):
            return predictions(params, few, keys, timesteps)

    return {kind: float(e) for kind, e in on_mesh(params, batch).items()}
