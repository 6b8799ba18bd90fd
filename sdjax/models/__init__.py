"""The networks, as nnx modules: arrays in, arrays out. They do not depend on meshes or training."""
