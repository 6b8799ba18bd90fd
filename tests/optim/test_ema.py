"""Moving averages against closed forms in float64, and reconstruction against tracked averages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from sdjax.optim import ema
from sdjax.optim.ema import EMAConfig, Snapshot

ALL = ("0.99", "warmup-0.999", "inverse-gamma-0.6667", "power-0.05", "power-0.10")


def decay(profile: str, t: int) -> float:
    """Of the t-th update (from 1), in float64 and as the papers write it."""
    kind, _, number = profile.rpartition("-")
    if kind == "":
        return 0.99
    if kind == "warmup":
        return min(0.999, (1 + t) / (10 + t))
    if kind == "inverse-gamma":
        return 1 - (1 + (t - 1)) ** -0.6667
    return (1 - 1 / t) ** (ema.gamma_from_sigma_rel(float(number)) + 1)


def test_all_profiles_at_once_follow_their_definitions():
    rng = np.random.default_rng(0)
    start, points = rng.normal(size=3), rng.normal(size=(200, 3))
    config = EMAConfig(ALL)
    state = ema.init(config, {"a.kernel": jnp.asarray(start, jnp.float32)})
    update = jax.jit(ema.update)
    expected = {profile: start for profile in ALL}
    for t, point in enumerate(points, 1):
        state = update(state, {"a.kernel": jnp.asarray(point, jnp.float32)}, t)
        expected = {p: decay(p, t) * e + (1 - decay(p, t)) * point for p, e in expected.items()}
    assert set(state) == set(ALL)
    for profile in ALL:
        np.testing.assert_allclose(
            state[profile]["a.kernel"], expected[profile], rtol=1e-5, atol=1e-6, err_msg=profile
        )


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("step", [1, 2, 1000, 1_000_000])
def test_rate_keeps_its_digits_late_in_training(profile, step):
    # 1 - (1 - 1/t)^(gamma + 1) in float32 as written would be off by several per cent at 1e6.
    kind, _, number = profile.rpartition("-")
    if kind == "power":
        gamma = ema.gamma_from_sigma_rel(float(number))
        expected = -np.expm1((gamma + 1) * np.log1p(-1 / step)) if step > 1 else 1.0
    else:
        expected = 1 - decay(profile, step)
    np.testing.assert_allclose(
        jax.jit(ema.rate, static_argnums=0)(profile, step), expected, rtol=2e-5
    )


def test_known_decays():
    # numerics of k-diffusion's docstring: power 2/3 reaches .999 at 31.6k steps and .9999 at 1M.
    for step, expected in ((31_600, 1e-3), (1_000_000, 1e-4)):
        np.testing.assert_allclose(ema.rate("inverse-gamma-0.666667", step), expected, rtol=1e-3)
    np.testing.assert_allclose(ema.rate("inverse-gamma-0.75-10", 91), 10**-0.75, rtol=1e-5)
    np.testing.assert_allclose(ema.rate("warmup-0.9999", 1), 9 / 11, rtol=1e-6)
    np.testing.assert_allclose(ema.rate("warmup-0.9999", 10**6), 1e-4, rtol=1e-6)


@pytest.mark.parametrize("sigma_rel, gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_exponent_of_a_width(sigma_rel, gamma):
    actual = ema.gamma_from_sigma_rel(sigma_rel)
    assert abs(actual - gamma) < 0.005  # EDM2, section 3.1
    width = np.sqrt((actual + 1) / ((actual + 2) ** 2 * (actual + 3)))
    np.testing.assert_allclose(width, sigma_rel, rtol=1e-10)


def test_power_profile_is_its_exact_sum():
    points = np.random.default_rng(1).normal(size=50)
    state = ema.init(EMAConfig(("power-0.10",)), {"a": jnp.float32(7.0)})
    for t, point in enumerate(points, 1):
        state = ema.update(state, {"a": jnp.float32(point)}, t)
    gamma = ema.gamma_from_sigma_rel(0.10)
    weights = np.diff((np.arange(51) / 50) ** (gamma + 1))  # the products telescope
    np.testing.assert_allclose(state["power-0.10"]["a"], weights @ points, rtol=1e-5)


@pytest.mark.parametrize("profile, exact", [("0.999", 1.05), ("0.9999", 1.04323)])
def test_bfloat16_parameters_do_not_freeze_the_average(profile, exact):
    # In bfloat16 the average would stay at 1.0 for ever: each change is below half a unit.
    params = {"a": jnp.asarray(1.05, jnp.bfloat16)}
    state = ema.init(EMAConfig((profile,)), {"a": jnp.asarray(1.0, jnp.bfloat16)})
    assert state[profile]["a"].dtype == jnp.float32
    state = jax.jit(
        lambda s: jax.lax.fori_loop(0, 20_000, lambda i, s: ema.update(s, params, i + 1), s)
    )(state)
    reached = 1 + (exact - 1) / 0.05 * (float(params["a"]) - 1)
    np.testing.assert_allclose(state[profile]["a"], reached, rtol=1e-4)


def test_averages_start_in_buffers_of_their_own():
    params = {"a": jnp.ones(4)}
    state = ema.init(EMAConfig(("0.9", "0.99")), params)
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))}
    assert len(pointers) == 3  # so that all can be donated


# ---- reconstruction --------------------------------------------------------------------------


def test_inner_product_is_the_integral():
    for ta, sa, tb, sb in ((50, 0.05, 80, 0.10), (80, 0.05, 50, 0.10), (60, 0.1, 60, 0.1)):
        ga, gb = ema.gamma_from_sigma_rel(sa), ema.gamma_from_sigma_rel(sb)
        expected, _ = integrate.quad(
            lambda t, ta=ta, ga=ga, tb=tb, gb=gb: (ga + 1) * (t / ta) ** ga / ta
            * (gb + 1) * (t / tb) ** gb / tb,
            0, min(ta, tb),
        )  # fmt: skip
        actual = ema._inner(*(np.float64(v) for v in (ta, ga, tb, gb)))
        np.testing.assert_allclose(actual, expected, rtol=1e-9)


@pytest.fixture(scope="module")
def trajectory():
    """A toy run of 4000 steps: snapshots of two widths every 250, and other widths tracked."""
    wanted = ("power-0.07", "power-0.12", "power-0.05", "power-0.10")
    t = jnp.arange(1, 4001, dtype=jnp.float32)
    noise = jax.random.normal(jax.random.key(0), (4000, 2))
    points = jnp.stack([jnp.cos(t / 300), 10 / (10 + t)], -1)
    points = jnp.concatenate([points, jnp.cumsum(noise, 0) / 60], -1)  # [steps, 4]

    @jax.jit
    def chunk(state, first, points):
        def body(state, at):
            return ema.update(state, {"a": at[1]}, at[0]), None

        return jax.lax.scan(body, state, (first + jnp.arange(250), points))[0]

    state = ema.init(EMAConfig(wanted), {"a": jnp.zeros(4)})
    tracked = {}
    for first in range(1, 4001, 250):
        state = chunk(state, first, points[first - 1 : first + 249])
        tracked[first + 249] = jax.tree.map(np.asarray, state)
    snapshots = [
        Snapshot(step, width, tracked[step][f"power-{width:.2f}"])
        for step in tracked
        for width in (0.05, 0.10)
    ]
    return snapshots, tracked


# Between the tracked widths, one of them, and outside, where the fit is coarser.
@pytest.mark.parametrize("sigma_rel, tolerance", [(0.07, 1e-3), (0.05, 1e-6), (0.12, 2e-3)])
@pytest.mark.parametrize("at_step", [2000, 4000])
def test_reconstruction_is_the_average_that_was_not_tracked(
    trajectory, sigma_rel, tolerance, at_step
):
    snapshots, tracked = trajectory
    actual = ema.reconstruct(snapshots, sigma_rel, at_step)["a"]
    assert actual.dtype == np.float32
    expected = tracked[at_step][f"power-{sigma_rel:.2f}"]["a"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_reconstruction_between_snapshots(trajectory):
    weights = ema.posthoc_weights([s.step for s in trajectory[0]], [0.05, 0.1] * 16, 3900, 0.07)
    np.testing.assert_allclose(weights.sum(), 1)


def test_reconstruction_says_what_it_cannot_do(trajectory):
    snapshots, _ = trajectory
    with pytest.raises(ValueError, match="no EMA snapshots"):
        ema.reconstruct([], 0.07)
    with pytest.raises(ValueError, match="at_step=5000: expected a step from 250 to 4000"):
        ema.reconstruct(snapshots, 0.07, 5000)
    with pytest.raises(ValueError, match="twice"):
        ema.reconstruct([*snapshots, snapshots[0]], 0.07)
    with pytest.raises(ValueError, match="sigma_rel=0.3"):
        ema.reconstruct(snapshots, 0.3)


# ---- snapshots -------------------------------------------------------------------------------


def saved(tmp_path, dtype="float32"):
    config = EMAConfig(("0.99", "power-0.05", "power-0.10"))
    rng = np.random.default_rng(0)
    params = {p: jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for p in ("unet.a.kernel", "b")}
    state = ema.init(config, params)
    for step in (1000, 200):
        files = ema.save_snapshots(tmp_path, step, state, dtype=dtype)
    return params, files


def test_snapshots_are_listed_and_read_back(tmp_path):
    params, files = saved(tmp_path)
    assert [f.name for f in files] == [
        "00000200-power-0.05.safetensors",
        "00000200-power-0.10.safetensors",
    ]
    (ema.snapshot_folder(tmp_path) / "00000300-power-0.05.partial").touch()
    found = ema.list_snapshots(tmp_path)
    assert [(s.step, s.sigma_rel) for s in found] == [
        (200, 0.05),
        (200, 0.1),
        (1000, 0.05),
        (1000, 0.1),
    ]
    for snapshot in found:
        tensors = snapshot.load()
        assert tensors.keys() == params.keys()
        for path in params:
            np.testing.assert_array_equal(tensors[path], params[path])
    rebuilt = ema.reconstruct(found, 0.08)  # all are the same, so must be their average
    np.testing.assert_allclose(rebuilt["b"], params["b"], rtol=1e-5)


def test_snapshots_in_half_precision(tmp_path):
    params, files = saved(tmp_path, "float16")
    tensor = ema.list_snapshots(tmp_path)[0].load()["b"]
    assert tensor.dtype == np.float16
    np.testing.assert_allclose(tensor, params["b"], rtol=1e-3)


def test_no_snapshots_without_a_folder(tmp_path):
    assert ema.list_snapshots(tmp_path / "nothing") == []


def test_a_truncated_snapshot_is_named(tmp_path):
    _, files = saved(tmp_path)
    files[0].write_bytes(files[0].read_bytes()[:50])
    with pytest.raises(ValueError, match="00000200-power-0.05.safetensors: cannot read"):
        ema.list_snapshots(tmp_path)[0].load()


def test_snapshots_need_a_power_profile(tmp_path):
    with pytest.raises(ValueError, match="power-0.05"):
        ema.save_snapshots(tmp_path, 1, ema.init(EMAConfig(("0.99",)), {"a": jnp.ones(1)}))


# ---- configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(profiles=("1.0",)),
        dict(profiles=("0",)),
        dict(profiles=("warmup",)),
        dict(profiles=("warmup-1.5",)),
        dict(profiles=("power-0.3",)),
        dict(profiles=("cosine-0.9",)),
        dict(profiles=(0.99,)),
        dict(profiles=("0.99", "0.99")),
        dict(snapshot_every=-1),
        dict(profiles=("0.99",), snapshot_every=10),
        dict(snapshot_dtype="int8"),
    ],
)
def test_bad_configuration_names_the_field(kwargs):
    with pytest.raises(ValueError, match=r"^ema\."):
        EMAConfig(**kwargs)


def test_no_profile_is_no_average():
    state = ema.init(EMAConfig(()), {"a": jnp.ones(1)})
    assert ema.update(state, {"a": jnp.ones(1)}, 1) == {}
