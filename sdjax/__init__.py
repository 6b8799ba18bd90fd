"""sdjax: Stable Diffusion training for JAX."""
