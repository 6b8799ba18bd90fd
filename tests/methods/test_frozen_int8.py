"""Runs of adapters beside frozen kernels in int8: losses, memory, files, resuming, meshes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints.adapters import with_loras
from sdjax.checkpoints.reading import read_any
from sdjax.config import resolve
from sdjax.config_model import blank_method
from sdjax.diffusion.losses import example_keys
from sdjax.errors import UserError
from sdjax.methods.method import Draw
from sdjax.models import int8
from sdjax.models.adapters.networks import MARK
from sdjax.train import loop, startup
from sdjax.train.frozen import placed
from tests.conftest import XLA_FLAGS
from tests.methods.runs import begun_from, broken_off
from tests.methods.test_inputs_of_families import recipe, shapes
from tests.train.test_loop import assert_same_run

CONFIGS = Path(__file__).parents[2] / "configs"
SCRIPT = Path(__file__).with_name("int8_devices.py")
B = 2


def of_adapters(family, method="dpo_adapters", **fields):
    """A recipe of adapters on moments and features, with a denoiser of milliseconds."""
    c = recipe(family, method, name="encoded", path="x", text_embeddings=True)
    if family == "sd":
        c.model.unet.update(block_out_channels=(8, 16), norm_num_groups=4, sample_size=4)
    else:
        c.model.transformer.update(
            num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    c.data.resolution = 32
    c.objective.caption_dropout = 0.0
    c.ema.profiles = ()
    c.model.update(frozen_dtype="int8", remat="block")
    c.method.update(rank=2, beta=40.0, targets=("linear",), **fields)
    return c


def random(abstract, rng):
    """Values for shapes; kernels of about 1 / sqrt(fan_in)."""

    def one(path, v):
        if jnp.issubdtype(v.dtype, jnp.integer):
            return rng.integers(0, 30, v.shape).astype(v.dtype)
        size = np.prod(v.shape[:-1]) ** -0.5 if "." in path else 1.0
        return (rng.normal(size=v.shape) * size).astype(np.float32)

    return {path: jnp.asarray(one(path, v)) for path, v in abstract.items()}


def as_loaded(frozen, rng):
    """Float32 arrays of what files have."""
    wide = {p: jax.ShapeDtypeStruct(v.shape, jnp.float32) for p, v in int8.in_files(frozen).items()}
    return {path: np.asarray(v) for path, v in random(wide, rng).items()}


def on_one_device(abstract):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {p: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where) for p, v in abstract.items()}


@pytest.mark.run
@pytest.mark.parametrize("family, kind", [("sd", "lora"), ("flux", "dora")])
def test_the_loss_and_its_gradients_are_those_of_the_kernels_they_stand_for(family, kind):
    """Of policy and reference, in stacked blocks too, which are computed twice."""
    config = of_adapters(family, kind=kind)
    narrow = blank_method(resolve(config))
    config.model.frozen_dtype = ""
    wide = blank_method(resolve(config))
    rng = np.random.default_rng(0)
    trained = random({p: v for p, v in wide.abstract.items() if wide.trainable(p)}, rng)
    wanted = {p: v for p, v in narrow.abstract.items() if p not in trained}
    frozen = placed(as_loaded(wanted, rng), on_one_device(wanted))
    codes = {p: v for p, v in frozen.items() if v.dtype == jnp.int8}
    networks = {path.split(".")[0] for path in codes}
    assert "vae" not in networks and len(networks) > 1
    stands = dict(int8.in_files(frozen))
    for path, value in codes.items():
        scale = frozen[int8.scale_path(path)]
        lead = scale.ndim - 1
        stands[path] = value * jnp.expand_dims(scale, range(lead, lead + value.ndim - scale.ndim))
    assert stands.keys() == {p for p in wide.abstract if p not in trained}
    shapes = {n: jax.ShapeDtypeStruct((B, *v.shape), v.dtype) for n, v in wide.example.items()}
    batch, positions = random(shapes, rng), jnp.arange(B)
    draw = Draw(jax.random.key(1), example_keys(jax.random.key(1), positions), positions, B)

    def run(method, frozen):
        def mean(trained):
            loss, _ = method.phases[0].loss(trained, frozen, {}, batch, draw)
            return loss.mean()

        options = {"xla_backend_optimization_level": 0}
        return jax.jit(jax.value_and_grad(mean), compiler_options=options)(trained)

    (loss, gradients), (expected, theirs) = run(narrow, frozen), run(wide, stands)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    largest = max(float(jnp.abs(v).max()) for v in theirs.values())
    assert largest > 1e-3
    for path, value in theirs.items():
        np.testing.assert_allclose(gradients[path], value, atol=1e-4 * largest, err_msg=path)


@pytest.fixture
def config(tiny_config, tiny_model):
    c = begun_from(tiny_config, tiny_model, "adapters")
    c.model.frozen_dtype = "int8"
    c.optim.update(groups=(), learning_rate=1e-2)
    c.method.update(rank=2, targets=("all",))
    c.train.update(export=True, sample_every=2)
    return c


@pytest.mark.run
def test_a_run_resumes_to_the_bit_and_its_files_are_of_the_base_itself(
    config, tiny_model, tmp_path, monkeypatch
):
    seen, place = [], startup.place_frozen
    monkeypatch.setattr(
        startup, "place_frozen", lambda *a, **k: seen.append(place(*a, **k)) or seen[-1]
    )
    whole = tmp_path / "whole"
    assert loop.run(resolve(config), str(whole)) == loop.DONE
    assert list((whole / "samples").glob("*.png"))
    broken = broken_off(whole, tmp_path / "broken", 1)
    assert loop.run(resolve(config), str(broken)) == loop.DONE
    config.train.bundle_frozen = True
    bundled = broken_off(whole, tmp_path / "bundled", 1)
    assert loop.run(resolve(config), str(bundled)) == loop.DONE
    again = broken_off(bundled, tmp_path / "again", 1)  # from its copy of the base
    assert loop.run(resolve(config), str(again)) == loop.DONE
    for folder in (broken, bundled, again):
        assert_same_run(whole, folder)
    first, *others = seen
    kinds = {path: value.dtype for path, value in first.items()}
    codes = {path for path, dtype in kinds.items() if dtype == jnp.int8}
    assert len(others) == 3 and {path.split(".")[0] for path in codes} == {"unet", "text_encoder"}
    for other in others:
        assert {path: value.dtype for path, value in other.items()} == kinds
        jax.tree.map(np.testing.assert_array_equal, other, first)
    base, read = read_any(tiny_model), read_any(whole)
    merged = with_loras(base, [str(whole / "adapter")])
    for path, value in read.params.items():
        np.testing.assert_allclose(merged.params[path], value, atol=1e-6, err_msg=path)
        own = path in codes and not path.startswith("text")
        assert np.array_equal(value, base.params[path]) != own, path


def bytes_of(name, frozen_dtype):
    """The bytes of what a full-size recipe keeps frozen on devices."""
    spec = importlib.util.spec_from_file_location("recipe", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    c.model.frozen_dtype = frozen_dtype
    c.data.path = "x"
    method = blank_method(resolve(c))
    kept = {p: v for p, v in method.abstract.items() if MARK not in p}
    return sum(v.size * np.dtype(method.dtypes.get(p, v.dtype)).itemsize for p, v in kept.items())


@pytest.mark.parametrize(
    "name, before, after",
    [
        ("flux_lora", 31.67, 16.21),
        pytest.param("sdxl_lora", 6.46, 3.41, marks=pytest.mark.slow),
    ],
)
def test_frozen_networks_of_full_sizes_take_half(name, before, after):
    found = bytes_of(name, "") / 2**30, bytes_of(name, "int8") / 2**30
    assert found == pytest.approx((before, after), abs=0.01)


@pytest.mark.slow
@pytest.mark.run
def test_every_mesh_has_the_same_losses(tmp_path):
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "out.json")],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    expected, _, count = found["8 x 1 x 1"]
    assert expected[0] != expected[1] and count > 20
    for name, (losses, split, _) in found.items():
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=name)
        assert (split > count / 2) == (name != "8 x 1 x 1")


@pytest.mark.unit
@pytest.mark.parametrize("method", ["lcm_lora", "inpaint_adapters", "edit_adapters", "pivotal"])
def test_other_methods_of_adapters_read_codes_too(method):
    """Their losses are traced, that of a teacher beside the LoRA too."""
    c = recipe("sd", method)
    c.model.frozen_dtype = "int8"
    c.sample.sampler.name = "lcm" if method == "lcm_lora" else "ddim"
    added = {"inpaint_adapters": 5, "edit_adapters": 4}.get(method, 0)
    c.model.unet.in_channels = 4 + added
    if method == "edit_adapters":
        c.data.images = ({"name": "before", "key": "copy"},)
    if method == "pivotal":
        c.method.tokens = ("<new>",)
    found = blank_method(resolve(c))
    kernels = [v.dtype for p, v in found.abstract.items() if p.endswith(".kernel")]
    assert set(kernels) == {jnp.dtype(jnp.int8), jnp.dtype(jnp.float32)}  # the VAE's are float32
    batch = {n: jax.ShapeDtypeStruct((4, *v.shape), v.dtype) for n, v in found.example.items()}
    assert shapes(found, batch)[0] == (4,)


@pytest.mark.unit
def test_other_methods_and_values_are_refused(config):
    config.method = {"name": "denoise"}
    with pytest.raises(UserError, match="frozen_dtype is 'int8' with method 'denoise'"):
        resolve(config)
    config.model.frozen_dtype = "int4"
    with pytest.raises(UserError, match="frozen_dtype is 'int4'; expected '' or 'int8'"):
        resolve(config)
