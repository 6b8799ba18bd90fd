"""Diffusion as pure maths on jnp arrays: schedules, predictions, losses, guidance and samplers.

Nothing here knows of a network, a mesh, a config file or a disk: a network is a `denoise_fn`.
"""
