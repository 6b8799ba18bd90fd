"""What XLA is told, who is right where two tell it something, and what it does not take."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import TrainConfig
from sdjax.parallel import xla

HIDING = "xla_gpu_enable_latency_hiding_scheduler"
ROUNDING = "xla_allow_excess_precision"
GATHERS = "xla_jf_spmd_threshold_for_windowed_einsum_mib"


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)


def mesh(platform, devices=2, kind="some other"):
    """What `compiler_options` looks at of a mesh of devices that are not here."""
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    return types.SimpleNamespace(devices=np.array([device] * devices), size=devices)


def test_each_backend_is_told_its_own():
    assert xla.compiler_options(mesh("cpu")) == {}
    assert xla.compiler_options(mesh("gpu")) == {HIDING: True, ROUNDING: False}
    assert xla.compiler_options(mesh("gpu", 1)) == {ROUNDING: False}  # nothing to hide
    assert xla.compiler_options(mesh("tpu", 1)) == {GATHERS: "1000000"}
    several = xla.compiler_options(mesh("tpu", kind="TPU v5 lite"))
    assert several[GATHERS] == "1000000" and several["xla_enable_async_all_reduce"] is True
    for kind in ("TPU v4", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x", "TPU v4 lite"):
        assert xla.compiler_options(mesh("tpu", kind=kind)) == {GATHERS: "1000000"}


def test_the_environment_wins_and_train_xla_options_over_both(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1  --{HIDING}=false --{ROUNDING}=true")
    assert xla.compiler_options(mesh("gpu")) == {}
    assert xla.compiler_options(mesh("gpu"), (f"{HIDING}=true",)) == {HIDING: True}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{GATHERS} 5")
    assert GATHERS not in xla.compiler_options(mesh("tpu"))
    assert xla.compiler_options(mesh("tpu", 1), ("xla_b=false",)) == {"xla_b": False}


def test_options_are_checked_and_told():
    options = xla.compiler_options(mesh("gpu"), ("xla_gpu_autotune_level=5", f"{HIDING}=False"))
    assert options == {HIDING: False, ROUNDING: False, "xla_gpu_autotune_level": "5"}
    assert xla.describe(options) == (
        f"XLA options: {HIDING}=false, {ROUNDING}=false, xla_gpu_autotune_level=5"
    )
    assert xla.describe({}) == ""
    for wrong in ("--xla_a=1", "xla_a", "xla_a=", "other=1"):
        with pytest.raises(ValueError, match="expected NAME=VALUE"):
            TrainConfig(xla_options=(wrong,))
    with pytest.raises(ValueError, match="xla_a twice"):
        TrainConfig(xla_options=("xla_a=1", "xla_a=2"))


def test_this_xla_takes_the_options_and_says_which_it_does_not():
    lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(3))
    lowered.compile(compiler_options=xla.compiler_options(mesh("gpu")))  # known on the CPU too
    for own, what in (("xla_gpu_nope=1", "no such option"), (f"{HIDING}=maybe", "not a valid")):
        with pytest.raises(jax.errors.JaxRuntimeError) as caught:
            lowered.compile(compiler_options=xla.compiler_options(mesh("cpu"), (own,)))
        error = xla.as_config_error(caught.value, (own,))
        assert own in str(error) and what in str(error)
        assert xla.as_config_error(caught.value, ()) is None
    assert xla.as_config_error(RuntimeError("out of memory"), ("xla_a=1",)) is None
