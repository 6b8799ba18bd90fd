"""IP-Adapters against diffusers: the UNet that has loaded one, its gradients, and the counts."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.families import sd, sdxl
from sdjax.families.beside.ip_adapter import crossings
from sdjax.models import weights
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.ip_adapter.network import IPAdapter, together, weighed
from sdjax.models.unet import UNet, UNetConfig
from tests.models.test_controlnet import SD1, XL, inputs

PUBLISHED = {  # UNet, features of the tower, layers, parameters
    "sd1": (UNetConfig(), 1024, 16, 22_319_616),
    "sdxl": (sdxl.UNET_SDXL, 1280, 70, 351_285_248),
}


def widths_of(unet):
    return tuple(width for _, width in crossings(unet))


def config_of(unet, dim=12, tokens=4, **resampler):
    return IPAdapterConfig(dim, unet.cross_attention_dim, tokens, widths_of(unet), **resampler)


def file_of(tensors):
    """{"image_proj": ..., "ip_adapter": ...} of our names, as the original's files have them."""
    found = {"image_proj": {}, "ip_adapter": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part == "ip_adapter":
            number, _, leaf = rest.partition(".")
            rest = f"{2 * int(number) + 1}.{leaf}"
        found[part][rest] = value
    return found


def loaded_unet(reference, unet, adapters, seed=2):
    """diffusers' UNet in float64 with these adapters, {name of ours: array} each."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    made = diffusers.UNet2DConditionModel.from_config(unet.to_json())
    made = reference.randomised(made, seed)
    files = [
        {part: {k: torch.tensor(v).double() for k, v in own.items()}
         for part, own in file_of(tensors).items()}
        for tensors in adapters
    ]  # fmt: skip
    made._load_ip_adapter_weights(files, low_cpu_mem_usage=False)
    return made.double().eval()


def random_params(config, seed):
    rng = np.random.default_rng(seed)
    _, abstract = weights.abstract(IPAdapter, config)
    return {
        p: (rng.normal(size=v.shape) / math.prod(v.shape[:-1]) ** 0.5).astype(np.float32)
        if len(v.shape) > 1
        else (0.3 * rng.normal(size=v.shape) + ("scale" in p)).astype(np.float32)
        for p, v in abstract.items()
    }


@pytest.mark.parametrize("control", [SD1, XL], ids=["sd1", "xl"])
def test_a_unet_that_sees_two_pictures_and_every_gradient_equal_diffusers(control, reference):
    """FT-54. One of the adapters has half of its weight."""
    unet = control.unet
    config = config_of(unet)
    params = [random_params(config, seed) for seed in (0, 1)]
    torch_unet = loaded_unet(reference, unet, [weights.to_diffusers(p) for p in params])
    for processor in torch_unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [1.0, 0.5]
    (xt, t, context, _), added = inputs(reference, control)
    text = context["context"] if added else context
    embeddings = [reference.normal(seed, 2, 12) for seed in (7, 8)]
    more = {k: reference.to_torch(v) for k, v in added.items()}
    want = torch_unet(
        *(reference.to_torch(x) for x in (xt, t, text)),
        added_cond_kwargs={
            **more, "image_embeds": [reference.to_torch(e)[:, None] for e in embeddings],
        },
    ).sample  # fmt: skip
    cotangent = reference.normal(20, *reference.from_torch(want).shape)
    (want * reference.to_torch(cotangent)).sum().backward()
    graph, _ = weights.abstract(IPAdapter, config)
    network, abstract = weights.abstract(UNet, unet, remat="block")
    own = {
        n: v for n, v in reference.tensors(torch_unet).items()
        if "processor" not in n and "encoder_hid_proj" not in n
    }  # fmt: skip
    frozen = weights.from_diffusers(own, abstract)

    @reference.jit
    def run(params):
        def out(params):
            shown = [weights.merge(graph, p)(e) for p, e in zip(params, embeddings, strict=True)]
            images = together([shown[0], weighed(shown[1], 0.5)])
            return weights.merge(network, frozen)(xt, t, context, images=images)

        if control is XL:  # which takes a minute to compile backwards, and has no other layers
            return out(params), []
        made, pullback = jax.vjp(out, params)
        return made, pullback(jnp.asarray(cotangent))[0]

    made, gradients = run(params)
    assert reference.error(made, reference.from_torch(want)) <= 2e-5
    wanted = dict(torch_unet.named_parameters())
    processors = [n for n in torch_unet.attn_processors if n.endswith("attn2.processor")]
    assert len(processors) == len(config.widths)
    for i, each in enumerate(gradients):
        for name, gradient in weights.to_diffusers(each).items():
            part, _, rest = name.partition(".")
            if part == "ip_adapter":
                number, leaf = rest.split(".")[:2]
                theirs = wanted[f"{processors[int(number)]}.{leaf}.{i}.weight"]
            else:
                rest = rest.replace("proj.", "image_embeds.")
                theirs = wanted[f"encoder_hid_proj.image_projection_layers.{i}.{rest}"]
            assert reference.error(gradient, theirs.grad.numpy()) <= 2e-5, name


RENAMED = {
    "norm1": "ln0", "norm2": "ln1", "to_q": "attn.to_q", "to_k": "attn.to_k", "to_v": "attn.to_v",
    "to_out": "attn.to_out.0",
}  # fmt: skip


def test_tokens_of_a_resampler_and_every_gradient_equal_diffusers(reference):
    """IP-Adapter Plus, whose weights diffusers renames as it loads them."""
    unet = SD1.unet
    config = config_of(unet, tokens=5, resampler_layers=4, resampler_width=128)
    params = random_params(config, 0)
    tensors = weights.to_diffusers(params)
    own = loaded_unet(reference, unet, [tensors]).encoder_hid_proj.image_projection_layers[0]
    patches = reference.normal(7, 2, 9, 12)
    want = own(reference.to_torch(patches))
    cotangent = reference.normal(8, *want.shape)
    (want * reference.to_torch(cotangent)).sum().backward()
    graph, _ = weights.abstract(IPAdapter, config)

    @reference.jit
    def run(params):
        out, pullback = jax.vjp(lambda p: weights.merge(graph, p).image_proj(patches), params)
        return out, pullback(jnp.asarray(cotangent))[0]

    made, gradients = run(params)
    assert reference.error(made, want.detach().numpy()) <= 2e-5
    theirs = dict(own.named_parameters())
    found = {
        n.removeprefix("image_proj."): v for n, v in weights.to_diffusers(gradients).items()
        if n.startswith("image_proj.")
    }  # fmt: skip
    for name in [n for n in found if "to_kv" in n]:
        stem = name.removesuffix("to_kv.weight")
        keys, values = np.split(found.pop(name), 2)
        found |= {f"{stem}to_k.weight": keys, f"{stem}to_v.weight": values}
    for name, gradient in found.items():
        match = re.fullmatch(r"layers\.(\d)\.([01])\.(.*)", name)
        if match:
            rest = match[3]
            for old, new in RENAMED.items():
                rest = re.sub(f"^{old}\\.", f"{new}.", rest)
            if match[2] == "1":
                number, leaf = match[3].split(".")
                rest = {"0": "ff.0", "1": "ff.1.net.0.proj", "3": "ff.1.net.2"}[number] + f".{leaf}"
            name = f"layers.{match[1]}.{rest}"
        assert reference.error(gradient, theirs.pop(name).grad.numpy()) <= 2e-5, name
    assert not theirs


@pytest.mark.parametrize("case", PUBLISHED)
def test_parameters_of_published_networks_are_as_many_as_theirs(case):
    """finetuning.md, section 8: ip-adapter_sd15 and ip-adapter_sdxl."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    unet, dim, layers, count = PUBLISHED[case]
    config = config_of(unet, dim)
    assert len(config.widths) == layers
    shapes = weights.tensor_shapes(weights.abstract(IPAdapter, config)[1])
    assert sum(map(math.prod, shapes.values())) == count
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(unet.to_json())
    names = [n for n in theirs.attn_processors if n.endswith("attn2.processor")]
    wide = [theirs.get_submodule(n.removesuffix(".processor")).inner_dim for n in names]
    assert wide == list(config.widths)
    assert [f"{path}.processor" for path, _ in crossings(unet)] == names


def test_a_published_resampler_has_as_many_parameters_as_that_of_diffusers():
    """ip-adapter-plus_sd15 and ip-adapter-plus_sdxl_vit-h."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    for out, width in ((768, 768), (2048, 1280)):
        config = IPAdapterConfig(1280, out, 16, (8,), resampler_layers=4, resampler_width=width)
        _, abstract = weights.abstract(IPAdapter, config)
        shapes = weights.tensor_shapes(abstract)
        ours = sum(math.prod(v) for n, v in shapes.items() if n.startswith("image_proj."))
        with torch.device("meta"):
            theirs = IPAdapterPlusImageProjection(1280, out, width, 4, 64, width // 64, 16)
        assert ours == sum(p.numel() for p in theirs.parameters())


def test_sd2_has_the_layers_of_its_unet():
    assert widths_of(sd.UNET_SD2) == widths_of(UNetConfig())


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"resampler_layers": 4, "resampler_width": 96}, "a multiple of 64"),
     ({"resampler_width": 64}, "and 0 without"), ({"tokens": 0}, "1 to 4,096"),
     ({"widths": ()}, "1 to 4,096 of them"),
     ({"widths": (320, 10**6)}, "1 to 32,768"), ({"embedding_dim": 0}, "1 to 65,536")],
)  # fmt: skip
def test_shapes_out_of_bounds_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        IPAdapterConfig(**changes)


def test_images_for_another_unet_are_refused(reference):
    (xt, t, context, _), _ = inputs(reference, SD1)
    network, abstract = weights.abstract(UNet, SD1.unet)
    pair = (jnp.zeros((2, 4, 16)),) * 2
    with pytest.raises(ValueError, match="1 images for 4 layers of cross-attention"):
        jax.eval_shape(
            lambda p: weights.merge(network, p)(xt, t, context, images=[(pair,)]), abstract
        )
