"""The train step: accumulation equals the big batch, randomness is of (seed, step, position)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.checkpoints.assemble import assemble
from sdjax.config import resolve
from sdjax.config_model import method_of_run
from sdjax.data.text.tokenizer import Tokenizer
from sdjax.diffusion.losses import example_keys
from sdjax.methods.method import COPY, Draw, Phase
from sdjax.optim.ema import EMAConfig
from sdjax.train.state import Optimization, init_state
from sdjax.train.step import make_train_step

EMA = EMAConfig(profiles=("0.5",))


def quadratic(params, frozen, averages, batch, draw):
    """A loss with noise of its own: |w x + b + noise|^2 per example."""
    noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(draw.keys)
    out = batch["x"] @ params["m.w.kernel"] * frozen["scale"] + params["m.b.bias"] + noise
    loss = jnp.sum(out**2, axis=-1)
    t = draw.positions.astype(jnp.float32) * 100
    return loss, {"loss": loss, "timesteps": t}


def setup(accumulation=1, seed=0, loss=quadratic, spans=None, copied_at=()):
    optimizer = optax.adam(0.1)
    phase = Phase("main", loss, lambda path: True)
    paths = frozenset(("m.w.kernel", "m.b.bias"))
    optimizations = (Optimization(phase, optimizer, paths, spans or {}),)
    step = make_train_step(
        optimizations,
        positions=np.arange(8, dtype=np.int32),
        seed=seed,
        accumulation=accumulation,
        buckets=2,
        num_timesteps=1000,
        copied_at=copied_at,
    )
    params = {"m.w.kernel": jnp.ones((4, 3)), "m.b.bias": jnp.zeros(3)}
    batch = {"x": jax.random.normal(jax.random.key(9), (8, 4))}
    state = init_state(params, optimizations, EMA, copied=bool(copied_at))
    return jax.jit(step), state, {"scale": jnp.float32(2.0)}, batch


def test_accumulation_equals_the_big_batch():
    results = []
    for parts in (1, 2, 4):
        step, state, frozen, batch = setup(parts)
        for _ in range(3):
            state, metrics = step(state, frozen, batch)
        results.append((state, metrics))
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), results[0], other
        )


def test_a_path_moves_in_its_span_of_steps_alone():
    step, state, frozen, batch = setup(spans={"m.w.kernel": (1, 3)})
    moved = []
    for _ in range(4):
        before = state["params"]
        state, metrics = step(state, frozen, batch)
        moved.append({p: bool(np.any(v != before[p])) for p, v in state["params"].items()})
        ratios = metrics["update_ratios"]
        assert (float(sum(ratios.values())) > 0) or not any(moved[-1].values())
    assert [one["m.w.kernel"] for one in moved] == [False, True, True, False]
    assert all(one["m.b.bias"] for one in moved)


def test_a_phase_begins_at_its_first_step_and_a_loss_knows_the_step():
    def counted(*args):
        loss, aux = quadratic(*args)
        return loss, {**aux, "step": jnp.full(8, args[-1].step)}

    phases = (
        Phase("main", counted, lambda path: path.startswith("m.w.")),
        Phase("late", counted, lambda path: path.startswith("m.b."), first=2),
    )
    optimizations = tuple(
        Optimization(phase, optax.adam(0.1), frozenset([path]))
        for phase, path in zip(phases, ("m.w.kernel", "m.b.bias"), strict=True)
    )
    _, _, frozen, batch = setup()
    params = {"m.w.kernel": jnp.ones((4, 3)), "m.b.bias": jnp.zeros(3)}
    state, step = init_state(params, optimizations, EMA), jax.jit(
        make_train_step(
            optimizations, positions=np.arange(8, dtype=np.int32), seed=0, accumulation=1,
            buckets=2, num_timesteps=1000,
        )
    )  # fmt: skip
    for done in range(4):
        before = state["params"]["m.b.bias"], state["opt_state"]["late"]
        state, metrics = step(state, frozen, batch)
        late = metrics["phases"]["late"]
        assert metrics["phases"]["main"]["aux"]["step"] == done
        moved = bool(np.any(state["params"]["m.b.bias"] != before[0]))
        assert moved == (done >= 2) == bool(np.isfinite(late["loss"]))
        if done < 2:
            jax.tree.map(np.testing.assert_array_equal, state["opt_state"]["late"], before[1])
    assert state["health"]["skipped"] == 0


def test_the_update_is_optax_on_the_mean_gradient():
    step, state, frozen, batch = setup()
    key = jax.random.fold_in(jax.random.key(0), 0)
    positions = jnp.arange(8)
    mean = lambda p: jnp.mean(  # noqa: E731
        quadratic(p, frozen, {}, batch, Draw(key, example_keys(key, positions), positions, 8))[0]
    )
    loss, grads = jax.value_and_grad(mean)(state["params"])
    optimizer = optax.adam(0.1)
    updates, _ = optimizer.update(grads, optimizer.init(state["params"]))
    want = optax.apply_updates(state["params"], updates)
    new, metrics = step(state, frozen, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
    for path, value in want.items():
        np.testing.assert_allclose(new["params"][path], value, rtol=1e-6)
        average = (state["params"][path] + value) / 2
        np.testing.assert_allclose(new["ema"]["0.5"][path], average, rtol=1e-6)


def test_an_examples_weight_multiplies_its_loss_and_gradient():
    step, state, frozen, batch = setup()
    weight = jnp.arange(8.0) / 4
    _, metrics = step(state, frozen, batch | {"weight": weight})
    key = jax.random.fold_in(jax.random.key(0), 0)
    positions = jnp.arange(8)
    draw = Draw(key, example_keys(key, positions), positions, 8)
    mean = lambda p: jnp.mean(weight * quadratic(p, frozen, {}, batch, draw)[0])  # noqa: E731
    loss, grads = jax.value_and_grad(mean)(state["params"])
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
    accumulated, *_ = setup(4)
    _, other = accumulated(state, frozen, batch | {"weight": weight})
    np.testing.assert_allclose(other["loss"], loss, rtol=1e-5)


def test_weights_of_one_train_as_none_to_the_bit():
    """So ratings that are all the same do, whose weights are ones."""
    step, state, frozen, batch = setup()
    plain, _ = step(state, frozen, batch)
    weighed, _ = step(state, frozen, batch | {"weight": jnp.ones(8)})
    for path, value in plain["params"].items():
        np.testing.assert_array_equal(weighed["params"][path], value)


def test_noise_depends_on_seed_and_step_alone():
    step, state, frozen, batch = setup()
    _, first = step(state, frozen, batch)
    _, again = step(state, frozen, batch)
    assert first["loss"] == again["loss"]
    _, later = step(state | {"step": jnp.int32(1)}, frozen, batch)
    step, *_ = setup(seed=1)
    _, other = step(state, frozen, batch)
    assert len({float(m["loss"]) for m in (first, later, other)}) == 3


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_only_counters(where):
    def loss(params, *args, **kwargs):
        values, aux = quadratic(params, *args, **kwargs)
        if where == "loss":
            return values * jnp.nan, aux
        # sqrt has an infinite slope at 0: a finite loss with a NaN gradient
        return values + jnp.sqrt(params["m.b.bias"][0] * 0.0), aux

    step, state, frozen, batch = setup(loss=loss)
    new, metrics = step(state, frozen, batch)
    assert not metrics["finite"]
    for part in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, new[part], state[part])
    assert new["step"] == 1
    assert new["health"] == {"skipped": 1, "in_a_row": 1}
    step, *_ = setup()
    new, metrics = step(new, frozen, batch)
    assert metrics["finite"] and new["health"] == {"skipped": 1, "in_a_row": 0}


def test_copies_are_taken_after_so_many_updates_of_which_a_skipped_step_is_none():
    def loss(params, frozen, averages, batch, draw):
        values, aux = quadratic(params, frozen, averages, batch, draw)
        apart = jnp.abs(params["m.b.bias"] - averages[COPY]["m.b.bias"]).sum()
        each = jnp.ones(len(values))
        return values, aux | {"apart": apart * each, "copies": draw.copies * each}

    step, state, frozen, batch = setup(loss=loss, copied_at=(2, 3))
    broken = {"scale": jnp.float32(jnp.nan)}
    before, found = [], []
    for given in (frozen, broken, frozen, frozen, frozen):
        before.append(state["params"])
        state, metrics = step(state, given, batch)
        found.append((float(metrics["aux"]["copies"]), bool(metrics["aux"]["apart"] > 0)))
    # The second step is skipped: updates 1, 2, 3 and 4 are steps 1, 3, 4 and 5.
    assert found == [(0, False), (0, True), (0, True), (1, False), (2, False)]
    for path, value in before[4].items():
        np.testing.assert_array_equal(state[COPY][path], value)
    assert COPY not in setup()[1]


def test_buckets_add_up_to_the_batch():
    step, state, frozen, batch = setup(2)
    _, metrics = step(state, frozen, batch)
    assert metrics["buckets"]["count"].tolist() == [5, 3]
    np.testing.assert_allclose(metrics["buckets"]["sum"].sum() / 8, metrics["loss"], rtol=1e-5)


@pytest.fixture
def text_to_image(tiny_config):
    config = resolve(tiny_config)
    assembled = assemble(config)
    return assembled.config, assembled


@pytest.fixture
def losses(text_to_image):
    """A function (caption dropout, batch) -> losses [4], of networks in which nothing is zero."""
    config, assembled = text_to_image
    rng = np.random.default_rng(3)
    abstract = method_of_run(config, assembled.tokenizers).abstract
    params = {p: rng.normal(size=v.shape, scale=0.2) for p, v in abstract.items()}
    params = {p: jnp.asarray(v, jnp.float32) for p, v in params.items()} | assembled.params
    key, positions = jax.random.key(1), jnp.arange(4)

    @functools.cache
    def step(rate):
        objective = dataclasses.replace(config.objective, caption_dropout=rate)
        own = dataclasses.replace(config, objective=objective)
        method = method_of_run(own, assembled.tokenizers)
        keys = example_keys(key, positions)
        draw = Draw(key, keys, positions, 4)
        loss = lambda params, batch: method.phases[0].loss(params, {}, {}, batch, draw)[0]  # noqa: E731
        return jax.jit(loss, compiler_options={"xla_backend_optimization_level": 0})

    return lambda rate, batch: np.asarray(step(rate)(params, batch))


def test_caption_dropout_is_the_prompt_that_sampling_negates(text_to_image, losses):
    tokenizer: Tokenizer = text_to_image[1].tokenizers["tokens"]
    image = np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
    caption = {"image": image, "tokens": tokenizer.encode(["a red circle"] * 4)}
    empty = {"image": image, "tokens": np.tile(tokenizer.encode([""]), (4, 1))}
    dropped, kept = losses(1.0, caption), losses(0.0, caption)
    assert np.isfinite(kept).all() and np.all(dropped != kept)
    np.testing.assert_array_equal(dropped, losses(0.0, empty))


def test_networks_that_do_not_fit_together_are_refused(text_to_image):
    config, assembled = text_to_image
    for field, value in (("in_channels", 9), ("cross_attention_dim", 32)):
        unet = dataclasses.replace(config.model.unet, **{field: value})
        bad = dataclasses.replace(config, model=dataclasses.replace(config.model, unet=unet))
        with pytest.raises(ValueError, match=field):
            method_of_run(bad, assembled.tokenizers)
