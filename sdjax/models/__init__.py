"""The networks, as nnx modules: arrays in, arrays out. They know nothing of meshes or training."""
