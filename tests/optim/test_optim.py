"""Optimizers against optax used directly and torch; schedules against closed forms."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from optax import contrib

from sdjax.errors import UserError
from sdjax.optim import optimizers
from sdjax.optim.optimizers import OptimConfig, make_lr_schedule, make_optimizer

TOTAL = 10
SHAPES = {
    "unet.conv_in.kernel": (3, 3, 2, 4),
    "unet.down_blocks.0.conv1.kernel": (3, 3, 4, 6),
    "unet.down_blocks.0.conv1.bias": (6,),
    "unet.down_blocks.0.norm1.scale": (6,),
    "text_encoder.embeddings.token_embedding.embedding": (9, 4),
    "text_encoder.layers.0.q_proj.kernel": (4, 4),
    "text_encoder.layers.0.q_proj.bias": (4,),
}


def tree(seed: int, scale: float = 1.0, shapes=SHAPES) -> dict:
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.normal(size=s) * scale, jnp.float32) for p, s in shapes.items()}


def train(
    tx: optax.GradientTransformation, params: dict, steps: int = TOTAL
) -> tuple[dict, object]:
    """`steps` updates with gradients that depend on the step and the parameters."""
    noise = [tree(100 + k, 0.3, {p: v.shape for p, v in params.items()}) for k in range(steps)]

    @jax.jit
    def step(params, state, noise):
        grads = jax.tree.map(lambda p, n: (0.5 * p + n).astype(p.dtype), params, noise)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for k in range(steps):
        params, state = step(params, state, noise[k])
    return params, state


def assert_close(actual: dict, expected: dict, rtol: float = 2e-6) -> None:
    assert actual.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(actual[path], expected[path], rtol=rtol, atol=1e-7, err_msg=path)


MASK = {p: len(s) > 1 for p, s in SHAPES.items()}


# ---- schedules -------------------------------------------------------------------------------

PEAK, END, WARM, LAST = 3e-4, 1e-5, 5, 99


def after_warmup(kind: str, k: np.ndarray) -> np.ndarray:
    u = (k - WARM) / (LAST - WARM)
    return {
        "constant": np.full_like(k, PEAK),
        "linear": PEAK + (END - PEAK) * u,
        "cosine": END + (PEAK - END) * 0.5 * (1 + np.cos(np.pi * u)),
        "polynomial": END + (PEAK - END) * (1 - u) ** 2,
        "rsqrt": np.maximum(PEAK * np.sqrt(30 / np.maximum(k, 30)), END),
        "piecewise": PEAK * np.where(k >= 40, 0.5, 1) * np.where(k >= 70, 0.2, 1),
    }[kind]


def schedule_config(kind: str, **kwargs) -> OptimConfig:
    extra = dict(boundaries=(40, 70), scales=(0.5, 0.2)) if kind == "piecewise" else {}
    return OptimConfig(
        learning_rate=PEAK,
        end_value=END,
        schedule=kind,
        power=2.0,
        rsqrt_steps=30,
        **extra,
        **kwargs,
    )


@pytest.mark.parametrize("kind", optimizers.SCHEDULES)
def test_schedule_is_its_closed_form(kind):
    schedule = make_lr_schedule(schedule_config(kind, warmup_steps=WARM), LAST + 1)
    k = np.arange(LAST + 1, dtype=np.float64)
    expected = np.where(k < WARM, PEAK * k / WARM, after_warmup(kind, k))
    actual = jax.vmap(schedule)(jnp.arange(LAST + 1))
    np.testing.assert_allclose(actual, expected, rtol=2e-5)


def test_cosine_is_optax_warmup_cosine():
    config = OptimConfig(learning_rate=PEAK, end_value=END, schedule="cosine", warmup_steps=WARM)
    ours = make_lr_schedule(config, LAST + 1)
    theirs = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARM, LAST, END)
    for k in range(LAST + 1):
        np.testing.assert_allclose(ours(k), theirs(k), rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial"])
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("total", [9, 42, 1000])
def test_last_step_has_the_end_value_exactly(kind, warmup, total):
    schedule = make_lr_schedule(schedule_config(kind, warmup_steps=warmup), total)
    for rate in (schedule, jax.jit(schedule)):
        assert np.float32(rate(total - 1)) == np.float32(rate(total)) == np.float32(END)
        assert rate(total - 2) > np.float32(END)


def test_a_run_shorter_than_its_warmup_only_warms_up():
    schedule = make_lr_schedule(schedule_config("cosine", warmup_steps=100), 10)
    np.testing.assert_allclose([schedule(k) for k in (0, 9)], [0, PEAK * 0.09], rtol=1e-6)
    one = make_lr_schedule(schedule_config("cosine"), 1)
    assert np.isfinite(one(0))


def test_step_k_uses_the_rate_of_k():
    config = OptimConfig(name="sgd", momentum=0.0, learning_rate=0.5, schedule="linear",
                         clip_norm=0.0, warmup_steps=3)  # fmt: skip
    schedule = make_lr_schedule(config, TOTAL)
    params = {"a.kernel": jnp.zeros((2, 2))}
    tx = make_optimizer(config, TOTAL, params)
    state = tx.init(params)
    for k in range(TOTAL):
        updates, state = tx.update({"a.kernel": jnp.ones((2, 2))}, state, params)
        np.testing.assert_allclose(-updates["a.kernel"], schedule(k), rtol=1e-6)


# ---- optimizers ------------------------------------------------------------------------------


def reference(name: str, schedule, decay: float) -> optax.GradientTransformation:
    if name == "adamw":
        tx = optax.adamw(schedule, 0.9, 0.99, 1e-6, weight_decay=decay, mask=MASK)
    elif name == "lion":
        tx = optax.lion(schedule, 0.9, 0.99, weight_decay=decay, mask=MASK)
    elif name == "adafactor":
        tx = optax.adafactor(schedule)
    elif name == "muon":
        dims = contrib.MuonDimensionNumbers
        muon = {p: None for p in SHAPES} | {
            "unet.down_blocks.0.conv1.kernel": dims((0, 1, 2), 3),
            "text_encoder.layers.0.q_proj.kernel": dims(0, 1),
        }
        tx = contrib.muon(
            schedule, beta=0.95, eps=1e-6, adam_b1=0.9, adam_b2=0.99, consistent_rms=0.2,
            muon_weight_dimension_numbers=muon,
        )  # fmt: skip
    else:
        base = optax.chain(
            optax.scale_by_rms(0.99, 1e-6, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(decay, MASK),
            optax.scale_by_learning_rate(schedule),
        )
        tx = contrib.schedule_free(base, schedule, b1=0.9)
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "schedule_free"])
def test_optimizer_is_optax_used_directly(name):
    decay = 0.0 if name in ("adafactor", "muon") else 0.1
    config = OptimConfig(name=name, learning_rate=0.01, b2=0.99, eps=1e-6, weight_decay=decay,
                         momentum=0.95, schedule="cosine", warmup_steps=3)  # fmt: skip
    theirs = reference(name, make_lr_schedule(config, TOTAL), decay)
    params = tree(0)
    actual, _ = train(make_optimizer(config, TOTAL, params), params)
    expected, _ = train(theirs, params)
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_decay_is_decoupled_and_scaled_by_the_rate(name):
    kwargs = dict(name=name, learning_rate=0.01, clip_norm=0.0)
    params, grads = tree(0), tree(1)
    updates = []
    for decay in (0.0, 0.1):
        tx = make_optimizer(OptimConfig(weight_decay=decay, **kwargs), TOTAL, params)
        updates.append(jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)[0])
    for path, shape in SHAPES.items():
        expected = -0.01 * 0.1 * params[path] if len(shape) > 1 else jnp.zeros(shape)
        np.testing.assert_allclose(updates[1][path] - updates[0][path], expected, atol=2e-8)


TORCH = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-6),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-6),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.8),
    "rmsprop": lambda groups: torch.optim.RMSprop(
        groups, lr=0.01, alpha=0.99, eps=1e-6, momentum=0.8
    ),
}


@pytest.mark.parametrize("name", sorted(TORCH))
def test_optimizer_is_torchs(name):
    config = OptimConfig(name=name, learning_rate=0.01, b2=0.99, eps=1e-6, weight_decay=0.1,
                         momentum=0.8, clip_norm=0.7)  # fmt: skip
    start = tree(0)
    actual, _ = train(make_optimizer(config, TOTAL, start), start)

    params = {p: torch.nn.Parameter(torch.from_numpy(np.array(v))) for p, v in start.items()}
    groups = [
        {"params": [v for p, v in params.items() if MASK[p]], "weight_decay": 0.1},
        {"params": [v for p, v in params.items() if not MASK[p]], "weight_decay": 0.0},
    ]
    optimizer = TORCH[name](groups)
    for k in range(TOTAL):
        noise = tree(100 + k, 0.3)
        for path, v in params.items():
            v.grad = 0.5 * v.detach() + torch.from_numpy(np.array(noise[path]))
        torch.nn.utils.clip_grad_norm_(params.values(), 0.7)
        optimizer.step()
    assert_close(actual, {p: v.detach().numpy() for p, v in params.items()}, rtol=1e-4)


def test_momentum_free_sgd_and_no_clipping_is_the_gradient():
    config = OptimConfig(name="sgd", momentum=0.0, learning_rate=0.1, clip_norm=0.0)
    params, grads = tree(0), tree(1, 100.0)
    tx = make_optimizer(config, TOTAL, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert_close(updates, {p: -0.1 * g for p, g in grads.items()})


def test_clipping_is_by_the_norm_of_all_trained_gradients():
    config = OptimConfig(name="sgd", momentum=0.0, learning_rate=1.0, clip_norm=0.5,
                         groups=(("^text_encoder", 0.0),))  # fmt: skip
    params, grads = tree(0), tree(1, 100.0)
    tx = make_optimizer(config, TOTAL, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)


def test_decay_leaves_norms_and_biases_alone():
    config = OptimConfig(weight_decay=0.1, learning_rate=0.01)
    params = tree(0)
    tx = make_optimizer(config, TOTAL, params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in updates.items():
        bare = path.endswith((".bias", ".scale"))
        np.testing.assert_allclose(update, 0 * update if bare else -0.001 * params[path], rtol=1e-6)


def test_muon_takes_inner_matrices_only():
    taken = {p for p, shape in SHAPES.items() if optimizers.is_muons(p, len(shape))}
    assert taken == {
        "unet.down_blocks.0.conv1.kernel",
        "text_encoder.layers.0.q_proj.kernel",
    }


# ---- groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_group_trains_as_with_its_own_rate(name):
    kwargs = dict(name=name, weight_decay=0.1, clip_norm=0.0)
    params = tree(0)
    grouped = OptimConfig(learning_rate=0.01, groups=(("^text_encoder", 0.2),), **kwargs)
    actual, _ = train(make_optimizer(grouped, TOTAL, params), params)
    fast, slow = (
        train(make_optimizer(OptimConfig(learning_rate=lr, **kwargs), TOTAL, params), params)[0]
        for lr in (0.01, 0.002)
    )
    assert_close(
        actual, {p: (slow if p.startswith("text_encoder") else fast)[p] for p in SHAPES}, rtol=1e-5
    )


FROZEN_TEXT = (("^text_encoder", 0.0),)


def test_frozen_parameters_stay_bit_for_bit():
    params = tree(0)
    config = OptimConfig(learning_rate=0.1, weight_decay=0.1, groups=FROZEN_TEXT)
    new, _ = train(make_optimizer(config, TOTAL, params), params, 3)
    for path in params:
        frozen = path.startswith("text_encoder")
        assert np.array_equal(new[path], params[path]) == frozen, path


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_frozen_parameters_have_no_moments(name):
    config = OptimConfig(name=name, groups=FROZEN_TEXT)
    params = tree(0)
    trained = optimizers.trainable_paths(config, params)
    assert trained == {p for p in SHAPES if not p.startswith("text_encoder")}
    state = jax.eval_shape(make_optimizer(config, TOTAL, params).init, params)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert any("conv1" in n for n in names)
    assert not any("text_encoder" in n for n in names)
    # The same state as if they had been split off before.
    kept = {p: params[p] for p in params if p in trained}
    split = make_optimizer(config, TOTAL, kept, all_paths=params)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(split.init, kept))


def test_first_matching_group_wins():
    config = OptimConfig(groups=(("q_proj", 0.5), ("^text_encoder", 0.1)))
    rates = optimizers.multipliers(config, SHAPES)
    assert rates["text_encoder.layers.0.q_proj.kernel"] == 0.5
    assert rates["text_encoder.embeddings.token_embedding.embedding"] == 0.1
    assert rates["unet.conv_in.kernel"] == 1.0


def test_groups_that_take_nothing_are_named():
    config = OptimConfig(groups=(("^unet", 0.5), ("textencoder", 0.1), ("conv1", 0.2)))
    with pytest.raises(ValueError, match=r"\['textencoder', 'conv1'\] match no parameter"):
        make_optimizer(config, TOTAL, tree(0))


# ---- state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_moments_are_float32_whatever_the_parameters(name):
    params = {p: v.astype(jnp.bfloat16) for p, v in tree(0).items()}
    tx = make_optimizer(OptimConfig(name=name), TOTAL, params)
    state = jax.eval_shape(tx.init, params)
    updates, state = jax.eval_shape(tx.update, params, state, params)
    assert {v.dtype for v in updates.values()} == {jnp.dtype(jnp.float32)}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} <= {"float32", "int32"}


def test_adam_moves_on_tiny_bfloat16_gradients():
    params = {"a.kernel": jnp.ones((4, 4), jnp.bfloat16)}
    tx = make_optimizer(OptimConfig(learning_rate=0.1, eps=1e-12), TOTAL, params)
    grads = {"a.kernel": jnp.full((4, 4), 1e-9, jnp.bfloat16)}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a.kernel"], -0.1, rtol=5e-3)


def test_structure_of_the_state_does_not_depend_on_rates():
    params = tree(0)
    one = OptimConfig(weight_decay=0.0, clip_norm=0.0)
    other = OptimConfig(weight_decay=0.1, clip_norm=1.0, schedule="cosine", warmup_steps=2,
                        groups=(("unet", 0.5),))  # fmt: skip
    states = [jax.eval_shape(make_optimizer(c, TOTAL, params).init, params) for c in (one, other)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_schedule_free_is_evaluated_at_its_average():
    config = OptimConfig(name="schedule_free", learning_rate=0.05, groups=(("bias", 0.0),))
    params = tree(0)
    new, state = train(make_optimizer(config, TOTAL, params), params)
    averaged = jax.jit(optimizers.eval_params)(state, new)
    for path in params:
        if "bias" in path:
            np.testing.assert_array_equal(averaged[path], params[path])
        else:
            z = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "z"))
                     if hasattr(s, "z")).z[path]  # fmt: skip
            np.testing.assert_allclose(
                new[path], 0.9 * averaged[path] + 0.1 * z, rtol=1e-4, atol=1e-6
            )


def test_other_optimizers_are_evaluated_as_they_are():
    params = tree(0)
    state = make_optimizer(OptimConfig(), TOTAL, params).init(params)
    assert_close(optimizers.eval_params(state, params), params, rtol=0)


def test_learning_rate_is_computed_once_and_not_in_every_update():
    config = OptimConfig(schedule="cosine", warmup_steps=3, clip_norm=0.0)
    params = tree(0)
    tx = make_optimizer(config, TOTAL, params)
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert text.count(" cosine(") == 1


# ---- configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, kwargs",
    [
        ("name", dict(name="adagrad")),
        ("schedule", dict(schedule="exp")),
        ("learning_rate", dict(learning_rate=0.0)),
        ("learning_rate", dict(learning_rate=float("nan"))),
        ("b1", dict(b1=1.0)),
        ("b1", dict(name="schedule_free", b1=0.0)),
        ("b2", dict(b2=-0.1)),
        ("warmup_steps", dict(warmup_steps=-1)),
        ("clip_norm", dict(clip_norm=-1.0)),
        ("power", dict(power=0.0)),
        ("boundaries", dict(schedule="piecewise")),
        ("boundaries", dict(schedule="piecewise", boundaries=(5, 5), scales=(0.1, 0.1))),
        ("boundaries", dict(schedule="piecewise", boundaries=(5,), scales=(0.1,), warmup_steps=9)),
        ("scales", dict(boundaries=(5,), scales=())),
        ("groups", dict(groups=(("(", 0.1),))),
        ("groups", dict(groups=(("unet", -1.0),))),
        ("groups", dict(groups=("unet",))),
    ],
)
def test_bad_configuration_names_the_field(field, kwargs):
    with pytest.raises(ValueError, match=rf"^optim\.{field}"):
        OptimConfig(**kwargs)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_cycles_begin_the_schedule_anew(schedule):
    """Each ends at end_value, whatever the run's length; the last may be cut short."""
    config = OptimConfig(schedule=schedule, warmup_steps=2, learning_rate=0.1, end_value=0.01)
    one = make_lr_schedule(config, 10)
    cycled = make_lr_schedule(dataclasses.replace(config, cycle_steps=10), 25)
    for count in range(25):
        np.testing.assert_allclose(cycled(count), one(count % 10), rtol=1e-6)
    np.testing.assert_allclose([cycled(9), cycled(10), cycled(12)], [0.01, 0, 0.1], rtol=1e-6)
    with pytest.raises(UserError, match="optim.cycle_steps=-1"):
        OptimConfig(cycle_steps=-1)
