"""The reference side of the parity tests: torch modules with every parameter random."""

import types

import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products in full precision on every backend, and torch on one thread."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield


def _randomised(module, seed=0):
    """`module` in eval mode and float64, biases and norm scales as random as its kernels."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + float("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    # Float32 values, float64 arithmetic: what is measured is our rounding, not the reference's.
    return module.double().eval()


def _tensors(module):
    """The state dict in float32 numpy."""
    return {name: t.detach().float().numpy() for name, t in module.state_dict().items()}


def _error(ours, reference):
    """Largest absolute difference in units of the reference's largest absolute value."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.abs(reference).max()


def _to_torch(x):
    """[B, H, W, C] -> [B, C, H, W] in float64; other arrays as they are."""
    import torch

    tensor = torch.tensor(np.asarray(x)).double()
    return tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor


def _from_torch(tensor):
    """The inverse of `_to_torch`."""
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _jit(function):
    """`jax.jit` that compiles in half the time, for programs that run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session")
def reference():
    """The helpers above, in a namespace."""
    return types.SimpleNamespace(
        randomised=_randomised,
        tensors=_tensors,
        error=_error,
        to_torch=_to_torch,
        from_torch=_from_torch,
        normal=_normal,
        jit=_jit,
    )
