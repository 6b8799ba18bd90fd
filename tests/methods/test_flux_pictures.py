"""FLUX.1 that reads a picture: Fill, Kontext, Canny and Depth are trained, and diffusers draws."""

import dataclasses
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.checkpoints.adapters import with_loras
from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.widening import widened
from sdjax.config import default, resolve
from sdjax.config_model import blank_method, method_of_run
from sdjax.diffusion.losses import NOISE, example_keys, fold_keys, normal_like
from sdjax.errors import UserError
from sdjax.families.family import said_task
from sdjax.formats.diffusers_folder import write_diffusers
from sdjax.methods import condition, denoise, inpaint
from sdjax.models.weights import to_diffusers
from sdjax.train import loop
from tests.data.test_named_images import Copies
from tests.encoding.test_encoded import encoded_once, on
from tests.families import torch_transformers
from tests.methods.runs import broken_off, to_torch
from tests.methods.test_encoded_inputs import loss_and_fields
from tests.train.test_loop import assert_same_run
from tests.train.test_mesh import on_meshes, read

IMAGES = {
    "inpaint": ({"name": "mask", "key": "matte", "kind": "mask"},),
    "edit": ({"name": "before", "key": "copy"},),
    "condition": ({"name": "control", "key": "edge", "kind": "condition"},),
}
PIPELINES = {
    "inpaint": "FluxFillPipeline",
    "edit": "FluxKontextPipeline",
    "condition": "FluxControlPipeline",
}
CHANNELS = {"inpaint": 4 * (4 + 4 + 4), "edit": 4 * 4, "condition": 4 * (4 + 4)}  # of a token
WIDE = {
    "inpaint": "transformer.x_embedder is given 32 channels of zeros beside 16",
    "edit": "the transformer is to read a picture as tokens (model.kontext)",
    "condition": "transformer.x_embedder is given 16 channels of zeros beside 16",
}
# Sines of 1000 times this: of 30,000 float32 knows them to 1e-3.
GUIDANCE = {"inpaint": 1.0, "edit": 1.0, "condition": 2.5}
TIMES = np.array([250.0, 800.0], np.float32)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    Copies(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(scope="module")
def dev(torch_pipeline, tmp_path_factory):
    """A folder of a tiny FLUX.1-dev."""
    folder = tmp_path_factory.mktemp("flux")
    made = torch_transformers.flux(torch_pipeline.tokenizer, folder / "t5")
    made.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(params=list(IMAGES))
def method(request):
    return request.param


def recipe(base, folder, copies, method, **fields):
    c = default(family="flux", method=method)
    for group in ("data", "optim", "train", "validation"):
        c[group] = base[group]
    c.update(init_from=str(folder))
    c.method.update(fields)
    images = IMAGES[method.removesuffix("_adapters")]
    c.data.update(
        name="copies", data_dir=copies, images=images, eval_split="train", batch_size=4, flip=True
    )
    c.optim.groups = () if method.endswith("adapters") else ((r"^text_encoder", 0.0),)
    c.train.update(steps=2, checkpoint_every=1, export=True)
    c.ema.profiles = ()
    c.sample.update(count=2)
    c.sample.sampler.steps = 2
    return c


@pytest.fixture
def config(tiny_config, dev, copies, method):
    return recipe(tiny_config, dev, copies, method)


def test_a_widened_transformer_predicts_what_it_did(dev, method):
    """The new columns of x_embedder are zeros (diffusers train_control_flux.py)."""
    model = read_any(dev)
    wide, note = widened(model, method, name="init_from=DIR")
    assert note == f"init_from=DIR: {WIDE[method]}"
    assert wide.denoiser.in_channels == CHANNELS[method] and wide.denoiser.outputs == 16
    kernel = wide.params["transformer.x_embedder.kernel"]
    assert kernel.shape == (CHANNELS[method], 32) and not kernel[16:].any()
    np.testing.assert_array_equal(kernel[:16], model.params["transformer.x_embedder.kernel"])
    assert wide.settings.get("kontext", False) == (method == "edit")
    again, nothing = widened(wide, method, name="x")
    assert again is wide and nothing == ""
    if method != "edit":
        other = {"inpaint": "condition", "condition": "inpaint"}[method]
        with pytest.raises(UserError, match=f"in_channels {CHANNELS[method]}, for another task"):
            widened(wide, other, name="x")


def wide_folder(dev, method, folder):
    """A model of a task whose channels are random, as a folder."""
    model, _ = widened(read_any(dev), method, name="x")
    rng = np.random.default_rng(1)
    kernel = model.params["transformer.x_embedder.kernel"]
    drawn = rng.normal(size=kernel.shape, scale=0.2).astype(np.float32)
    params = {**model.params, "transformer.x_embedder.kernel": drawn}
    write_diffusers(folder, dataclasses.replace(model, params=params))
    return folder


def latents_of(pipeline, images, noise=None):
    """[N, 3, H, W] -> latents of a VAE of diffusers, scaled: the mode, or a sample."""
    found = pipeline.vae.encode(images).latent_dist
    latents = found.mean if noise is None else found.mean + found.std * noise
    config = pipeline.vae.config
    return (latents - config.shift_factor) * config.scaling_factor


def prediction(pipeline, method, xt, t, text, beside):
    """The transformer of diffusers, fed as its pipeline of the task feeds it."""
    kind = getattr(diffusers, PIPELINES[method])
    count, channels, height, width = xt.shape
    pack = lambda x: kind._pack_latents(x, count, x.shape[1], *x.shape[2:])  # noqa: E731
    ids = kind._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32)
    tokens = pack(xt)
    if method == "edit":
        others = ids.clone()
        others[..., 0] = 1
        tokens, ids = torch.cat([tokens, pack(beside)], dim=1), torch.cat([ids, others])
    else:
        tokens = torch.cat([tokens, pack(beside)], dim=2)
    out = pipeline.transformer(
        hidden_states=tokens, timestep=t / 1000, guidance=torch.full((count,), GUIDANCE[method]),
        pooled_projections=text["pooled"], encoder_hidden_states=text["context"],
        txt_ids=torch.zeros(text["context"].shape[1], 3), img_ids=ids, return_dict=False,
    )[0]  # fmt: skip
    return kind._unpack_latents(out[:, : height * width // 4], 2 * height, 2 * width, 2)


def test_loss_and_gradient_are_those_of_diffusers(config, method, dev, copies, tmp_path):
    """The targets, inputs and tokens of the pipelines and of their training scripts."""
    folder = wide_folder(dev, method, tmp_path / "wide")
    config.init_from = str(folder)
    if method == "condition":
        config.method.guidance = GUIDANCE[method]
    assembled = assemble(resolve(config))
    made = method_of_run(assembled.config, assembled.tokenizers)
    rng = np.random.default_rng(2)
    batch = {n: rng.uniform(0, 1, (3, *v.shape)) for n, v in made.example.items()}
    batch = {n: v.astype(np.float32) for n, v in batch.items() if "tokens" not in n}
    batch["image"] = 2 * batch["image"] - 1
    text = {"context": rng.normal(size=(3, 6, 24)), "pooled": rng.normal(size=(3, 12))}
    text = {name: value.astype(np.float32) for name, value in text.items()}
    keys = example_keys(jax.random.key(4), jnp.arange(3))
    params = {path: jnp.asarray(value) for path, value in assembled.params.items()}
    own = {p: v for p, v in params.items() if p.startswith("transformer.")}

    def loss(own):
        losses = made.validate({**params, **own}, {**batch, **text}, keys, TIMES)
        return losses.sum(), losses

    gradients, losses = jax.jit(jax.grad(loss, has_aux=True))(own)

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == PIPELINES[method]
    xt = jnp.zeros((3, 8, 8, 4))

    def of(*streams):
        return to_torch(normal_like(functools.reduce(fold_keys, streams, keys), xt))

    images = to_torch(batch["image"])
    with torch.no_grad():
        x0 = latents_of(pipeline, images, of(denoise.LATENTS))
        if method == "edit":
            beside = latents_of(pipeline, to_torch(batch["before"]))
        elif method == "condition":
            shown = 2 * to_torch(batch["control"]) - 1
            beside = latents_of(pipeline, shown, of(condition.LATENTS))
        else:
            task = inpaint.Inpainting(assembled.config.method)
            mask = to_torch(task.masks({n: jnp.asarray(v) for n, v in batch.items()}, keys))
            hidden = latents_of(pipeline, images * (1 - mask))
            squares = mask[:, 0].view(3, 8, 2, 8, 2).permute(0, 2, 4, 1, 3).reshape(3, 4, 8, 8)
            beside = torch.cat([hidden, squares], dim=1)
    words = {name: torch.from_numpy(value) for name, value in text.items()}
    total = torch.zeros(())
    for i, t in enumerate(TIMES):
        eps, sigma = of(denoise.STRATA + i, NOISE), float(t) / 1000
        noisy = (1 - sigma) * x0 + sigma * eps
        out = prediction(pipeline, method, noisy, torch.full((3,), float(t)), words, beside)
        theirs = ((out - (eps - x0)) ** 2).mean(dim=(1, 2, 3))
        # 1e-5 of the loss, and what sines of thousands differ by in float32.
        np.testing.assert_allclose(losses[:, i], theirs.detach(), rtol=1e-4)
        total = total + theirs.sum()
    total.backward()
    ours = to_diffusers({p.removeprefix("transformer."): v for p, v in gradients.items()})
    theirs = {n: p.grad.numpy() for n, p in pipeline.transformer.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(ours[name], value, atol=3e-4 * scale + 1e-7, err_msg=name)
    assert np.abs(theirs["x_embedder.weight"][:, -1]).max() > 0  # the picture is read


def test_losses_of_what_was_encoded_are_those_of_the_pictures(config, method, tmp_path):
    if method == "inpaint":
        config.method.whole = 0.4
    encoded_once(config, tmp_path / "data", flipped=True)
    trained, held, _ = loss_and_fields(config, "transformer.x_embedder")
    theirs = loss_and_fields(on(config, tmp_path / "data"), "transformer.x_embedder")
    read = {"inpaint": {"mask", "masked_moments"}, "edit": {"before_moments"},
            "condition": {"control"}}[method]  # fmt: skip
    assert theirs[2] == {"moments", "tokens", "tokens_2", *read}
    # As of UNets (test_encoded_inputs.py).
    np.testing.assert_allclose(theirs[0], trained, rtol=2e-5)
    np.testing.assert_allclose(theirs[1], held, rtol=2e-5)
    assert np.ptp(trained) > 0


@pytest.mark.parametrize("method", [pytest.param("inpaint", marks=pytest.mark.slow), "edit",
                                    "condition"])  # fmt: skip
def test_a_run_resumes_to_the_bit_and_diffusers_loads_it(config, method, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert loop.run(resolve(config), str(whole)) == loop.DONE
    said = capsys.readouterr().out
    assert WIDE[method] in said
    option = "--control_image=FILE" if method == "condition" else "--init_image=FILE"
    assert option in said
    broken = broken_off(whole, tmp_path / "broken", 1)
    config.train.export = False
    assert loop.run(resolve(config), str(broken)) == loop.DONE
    assert_same_run(whole, broken)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(whole / "diffusers")
    assert type(pipeline).__name__ == PIPELINES[method]
    assert pipeline.transformer.config.in_channels == CHANNELS[method]
    kernel = pipeline.transformer.x_embedder.weight.detach().numpy()
    if method != "edit":
        assert np.abs(kernel[:, 16:]).max() > 0  # it has begun to read them
    trained = read_any(whole)
    assert trained.settings.get("kontext", False) == (method == "edit")


@pytest.mark.parametrize("kind", [pytest.param("edit", marks=pytest.mark.slow), "condition"])
def test_a_lora_is_that_of_diffusers(kind, tiny_config, dev, copies, tmp_path):
    """`FluxControlPipeline` widens FLUX.1-dev for a LoRA whose x_embedder reads more."""
    targets = ("attention", "x_embedder") if kind == "condition" else ("attention",)
    c = recipe(tiny_config, dev, copies, f"{kind}_adapters", rank=2, targets=targets)
    c.optim.learning_rate = 1e-2
    whole = tmp_path / "whole"
    assert loop.run(resolve(c), str(whole)) == loop.DONE
    broken = broken_off(whole, tmp_path / "broken", 1)
    assert loop.run(resolve(c), str(broken)) == loop.DONE
    assert_same_run(whole, broken)
    folded = read_any(whole)
    ours = to_diffusers(folded.component("transformer"))
    pipeline = getattr(diffusers, PIPELINES[kind]).from_pretrained(dev)
    pipeline.load_lora_weights(whole / "adapter")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights(**({"reset_to_overwritten_params": False} if kind == "condition"
                                    else {}))  # fmt: skip
    theirs = {n: p.detach().numpy() for n, p in pipeline.transformer.named_parameters()}
    base = read_any(dev)
    # FLUX.1-dev is given the inputs, or reads the tokens, from each of the files and the run.
    for place in (whole, whole / "adapter", whole / "adapter" / "whole.safetensors"):
        merged = with_loras(base, [str(place)])
        assert merged.denoiser == folded.denoiser and said_task(merged) == said_task(folded)
        for path, value in folded.params.items():
            np.testing.assert_allclose(merged.params[path], value, atol=1e-6, err_msg=path)
    for name, value in theirs.items():
        np.testing.assert_allclose(
            ours[name.replace(".base_layer", "")], value, atol=1e-5, err_msg=name
        )
    assert kind == "edit" or np.abs(theirs["x_embedder.weight"][:, 16:]).max() > 0


def test_adapters_that_never_see_the_picture_are_refused(tiny_config, dev, copies, tmp_path):
    c = recipe(tiny_config, dev, copies, "condition_adapters", rank=2)
    with pytest.raises(UserError, match="would have no effect. Add 'x_embedder'"):
        loop.run(resolve(c), str(tmp_path / "run"))
    c.init_from = str(wide_folder(dev, "condition", tmp_path / "wide"))  # which reads it
    assembled = assemble(resolve(c))
    made = method_of_run(assembled.config, assembled.tokenizers)
    assert made.start(assembled.params) == {}


@pytest.mark.slow  # a process of eight devices each
@pytest.mark.parametrize("kind", ["edit", "condition"])
def test_losses_do_not_depend_on_the_mesh(kind, tiny_config, dev, copies, tmp_path):
    c = recipe(tiny_config, dev, copies, kind)
    c.data.batch_size = 8
    c.optim.learning_rate = 2e-4
    on_meshes(tmp_path, {kind: (c, [(1, 1, 1), (8, 1, 1), (2, 4, 1)])})
    output, _ = read(tmp_path, kind)
    one, *others = output["runs"]
    for result in others:
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-5)
        np.testing.assert_allclose(result["grad_norm"], one["grad_norm"], rtol=1e-4)
        assert result["recompiled"] == 0


def test_what_does_not_fit_is_refused(tiny_config, dev, copies):
    c = default(family="flux", method="edit")
    c.data.images = IMAGES["edit"]
    with pytest.raises(UserError, match="model.kontext is False, but method 'edit' shows"):
        blank_method(resolve(c))
    c = default(family="sd3", method="condition")
    with pytest.raises(UserError, match="'condition' is for FLUX.1; model.family is 'sd3'"):
        blank_method(resolve(c))
    c = default(family="flux", method="condition")
    c.data.images = IMAGES["condition"]
    with pytest.raises(UserError, match=r"in_channels is 64.*'condition' takes 16 \+ 16"):
        blank_method(resolve(c))
    c.method.guidance = -1.0
    with pytest.raises(UserError, match="method.guidance is -1.0"):
        resolve(c)
    c = default(family="flux", preset="control")
    with pytest.raises(UserError, match="'denoise' takes 16; method.name=condition, or condition_"):
        blank_method(resolve(c))
