"""Random adapters for tests, and torch's networks with the weights of a model."""

import copy
import math

import numpy as np

from sdjax.formats.adapters.layers import AdapterLayer
from sdjax.formats.adapters.spellings import modules_of
from sdjax.models.weights import to_diffusers


def matrices(model):
    """{path: shape} of every Linear and Conv that adapters change."""
    return {path: m.shape for path, m in modules_of(model).items() if len(m.shape) > 1}


def lora(rng, shape, rank, *, scale=1.0, size=0.3):
    """A LoRA of a module, whose change is some `size` of a usual weight."""
    ones = (1,) * (len(shape) - 2)
    width = math.prod(shape[1:])
    down = rng.standard_normal((rank, *shape[1:])) / width**0.5
    up = rng.standard_normal((shape[0], rank, *ones)) * size / (rank**0.5 * scale)
    return AdapterLayer(
        "lora", {"lora_down": down.astype(np.float32), "lora_up": up.astype(np.float32)}, scale
    )


def lora_adapter(model, *, ranks=(4, 2), scales=(1.0, 0.5), wanted=lambda path: True, seed=0):
    """A LoRA of every module, of ranks and scales in turn."""
    rng = np.random.default_rng(seed)
    chosen = {path: shape for path, shape in matrices(model).items() if wanted(path)}
    return {
        path: lora(rng, shape, ranks[i % len(ranks)], scale=scales[i % len(scales)])
        for i, (path, shape) in enumerate(chosen.items())
    }


def dora_adapter(model, **options):
    """A DoRA of every module, with magnitudes that are not those of the base."""
    rng = np.random.default_rng(1)
    found = {}
    for path, layer in lora_adapter(model, **options).items():
        out = len(layer.factors["lora_up"])
        shape = (out, *(1,) * (layer.factors["lora_down"].ndim - 1))
        magnitude = (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32)
        found[path] = AdapterLayer("dora", {**layer.factors, "dora_scale": magnitude}, layer.scale)
    return found


def assert_same(found, wanted):
    """The same modules, kinds, scales and factors, to the bit."""
    assert found.keys() == wanted.keys()
    for path, layer in wanted.items():
        assert (found[path].kind, found[path].scale) == (layer.kind, layer.scale), path
        assert found[path].factors.keys() == layer.factors.keys(), path
        for part, value in layer.factors.items():
            np.testing.assert_array_equal(found[path].factors[part], value, f"{path} {part}")


def with_weights(module, model, name):
    """A copy of a network of torch with the weights of a model."""
    import torch

    own = {key.removeprefix("text_model."): key for key in module.state_dict()}
    tensors = to_diffusers(model.component(name))
    state = {own[key]: torch.from_numpy(np.array(v)) for key, v in tensors.items()}
    copied = copy.deepcopy(module)
    missing, unexpected = copied.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in key for key in missing), missing
    return copied.eval()
