"""Training timesteps: every distribution is a map of a uniform number u in [0, 1).

A noise level l = t/T of 1 is pure noise. (The diffusers SD3 script indexes a descending table, so
its logit_mean has the opposite sign of ours, which is that of the SD3 paper.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.diffusion.schedules import Schedule, shift_noise_level

TIMESTEP_SAMPLINGS = ("uniform", "logit_normal", "mode", "cosmap", "cubic")

# A flow timestep of exactly 0 has no noise at all, and weightings in SNR are infinite there.
MIN_FLOW_LEVEL = 1e-5


def stratified_uniform(shared: jax.Array, positions: jax.Array, batch_size: int) -> jax.Array:
    """Uniform numbers u_i = (u + i / B) mod 1: one draw for the batch, spread evenly over [0, 1).

    shared: u, scalar in [0, 1), the same for the whole global batch; positions: i, int32 [b] in
    [0, B). Each u_i is uniform on its own (Kingma 2021, "Variational Diffusion Models", I.1).
    """
    u = shared + positions.astype(jnp.float32) / batch_size
    return u - jnp.floor(u)


def noise_level(
    kind: str, u: jax.Array, *, logit_mean: float, logit_std: float, mode_scale: float
) -> jax.Array:
    """Map uniform u in [0, 1) to a noise level in [0, 1] of u's shape (SD3 paper, section 3.1).

    "cubic" is not of that paper: it favours noise, where a picture gets its shapes.
    """
    if kind == "logit_normal":
        return jax.nn.sigmoid(logit_mean + logit_std * jax.scipy.special.ndtri(u))
    if kind == "mode":
        return 1.0 - u - mode_scale * (jnp.cos(jnp.pi * u / 2) ** 2 - 1.0 + u)
    if kind == "cosmap":
        return 1.0 - 1.0 / (jnp.tan(jnp.pi * u / 2) + 1.0)
    if kind == "cubic":  # T2I-Adapter, arXiv:2302.08453, section 3.4
        return 1.0 - u**3
    return u


def to_timesteps(level: jax.Array, schedule: Schedule, low: int, high: int) -> jax.Array:
    """Map noise levels [b] to timesteps float32 [b] in [low, high).

    They are integers for a table schedule, and real and shifted by the schedule's shift for flow.
    """
    if schedule.continuous:
        level = shift_noise_level(level, schedule.config.shift)
        least = max(low, MIN_FLOW_LEVEL * schedule.num_train_timesteps)
        return jnp.clip(low + level * (high - low), least, high)
    return jnp.clip(jnp.floor(low + level * (high - low)), low, high - 1)
