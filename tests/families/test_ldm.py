"""Original names and layouts against the converters of diffusers, at the full size of releases."""

import functools

import numpy as np
import pytest

from sdjax.families import ldm_configs, sd, sdxl
from sdjax.families.ldm_names import open_clip_places, unet_places, vae_places
from sdjax.families.single_file import from_file, to_file
from sdjax.models import weights
from sdjax.models.clip import CLIPText, CLIPTextConfig
from sdjax.models.config import ConfigError
from sdjax.models.unet import UNet
from sdjax.models.unet_config import UNetConfig
from sdjax.models.vae import VAE, VAEConfig

single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")

UNETS = {
    "sd1": UNetConfig(),
    "sd2_v": sd.UNET_SD2_V,
    "sdxl": sdxl.UNET_SDXL,
    "refiner": sdxl.UNET_SDXL_REFINER,
}
TINY_CLIP = CLIPTextConfig(
    vocab_size=60,
    hidden_size=128,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    hidden_act="gelu",
    projection_dim=40,
)


@functools.cache
def shapes(cls, config):
    """{name: shape} of diffusers' and transformers' own network of any size, without memory."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if cls is CLIPText:
            module = getattr(transformers, config.architecture)(
                transformers.CLIPTextConfig(**config.to_json())
            )
        else:
            name = {UNet: "UNet2DConditionModel", VAE: "AutoencoderKL"}[cls]
            module = getattr(diffusers, name).from_config(config.to_json())
    return {n.removeprefix("text_model."): tuple(p.shape) for n, p in module.named_parameters()}


PLACES = {UNet: unet_places, VAE: vae_places, CLIPText: open_clip_places}


def ldm_shapes(cls, config):
    """The same under original names, without memory, and without what shares a tensor."""
    found = {}
    for name, shape in shapes(cls, config).items():
        place = PLACES[cls](config)(name)
        if place.part is None:
            found[place.name] = place.to_file(np.broadcast_to(np.float32(0), shape)).shape
    return found


def random_tensors(cls, config):
    """Weights under names of diffusers, every one random."""
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes(cls, config).items()}


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_maps_our_unet_names_back_to_its_own(name):
    config = UNETS[name]
    place = unet_places(config)
    ours = {f"model.diffusion_model.{place(n).name}": n for n in shapes(UNet, config)}
    assert len(ours) == len(shapes(UNet, config))
    back = single_file_utils.convert_ldm_unet_checkpoint(dict(ours), config.to_json())
    assert back == {n: n for n in shapes(UNet, config)}


@pytest.mark.parametrize("name", UNETS)
def test_the_unets_shape_is_found(name):
    config = UNETS[name]
    found = ldm_configs.unet_config(
        ldm_shapes(UNet, config), sample_size=config.sample_size, upcast=config.upcast_attention
    )
    assert found == config


def test_diffusers_maps_our_vae_back_to_its_own():
    import torch

    config = VAEConfig(block_out_channels=(8, 8, 16, 16), norm_num_groups=4)
    tensors = random_tensors(VAE, config)
    ours = to_file(tensors, vae_places(config))
    assert ours["encoder.mid.attn_1.proj_out.weight"].shape == (16, 16, 1, 1)
    back = single_file_utils.convert_ldm_vae_checkpoint(
        {f"first_stage_model.{n}": torch.from_numpy(v) for n, v in ours.items()}, config.to_json()
    )
    assert back.keys() == tensors.keys()
    for n, value in tensors.items():
        np.testing.assert_array_equal(back[n].numpy(), value, err_msg=n)
    assert_same(from_file(ours, shapes(VAE, config), vae_places(config)), tensors)


@pytest.mark.parametrize("config", [VAEConfig(), sdxl.VAE_SDXL])
def test_the_vaes_shape_is_found(config):
    found = ldm_configs.vae_config(
        ldm_shapes(VAE, config),
        scaling_factor=config.scaling_factor,
        sample_size=config.sample_size,
    )
    assert found == config


def test_diffusers_maps_our_open_clip_back_to_its_own():
    import torch
    import transformers

    prefix = "conditioner.embedders.1.model."
    tensors = random_tensors(CLIPText, TINY_CLIP)
    ours = to_file(tensors, open_clip_places(TINY_CLIP))
    assert ours["transformer.resblocks.1.attn.in_proj_weight"].shape == (384, 128)
    assert ours["text_projection"].shape == (128, 40)  # as open_clip/transformer.py applies it
    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**TINY_CLIP.to_json())
    )
    back = single_file_utils.convert_open_clip_checkpoint(
        theirs, {prefix + n: torch.from_numpy(v) for n, v in ours.items()}, prefix=prefix
    )
    back = {n.removeprefix("text_model."): value.numpy() for n, value in back.items()}
    assert_same(back, tensors)
    assert set(theirs.state_dict()) >= {"text_projection.weight"}
    own = shapes(CLIPText, TINY_CLIP)
    assert_same(from_file(ours, own, open_clip_places(TINY_CLIP)), tensors)


def test_the_encoders_shapes_are_found():
    found = ldm_configs.open_clip_config(ldm_shapes(CLIPText, sdxl.CLIP_BIGG), penultimate=False)
    assert found == sdxl.CLIP_BIGG
    h = ldm_shapes(CLIPText, sd.CLIP_H)
    assert ldm_configs.open_clip_config(h, penultimate=True) == sd.CLIP_H
    # Stability's own files have the layer that is not used, and the projection.
    last = {n.replace(".22.", ".23."): s for n, s in h.items() if ".22." in n}
    whole = {**h, **last, "text_projection": (1024, 1024)}
    assert ldm_configs.open_clip_config(whole, penultimate=True) == sd.CLIP_H
    assert ldm_configs.clip_config(shapes(CLIPText, CLIPTextConfig())) == CLIPTextConfig()


def test_shapes_that_are_no_unet_are_refused():
    whole = ldm_shapes(UNet, UNETS["sd1"])
    cut = {n: s for n, s in whole.items() if not n.startswith("input_blocks.11.")}
    with pytest.raises(ConfigError, match="levels differ"):
        ldm_configs.unet_config(cut, sample_size=64)
    with pytest.raises(ConfigError, match=r"no middle_block.1.proj_in.weight among the weights"):
        ldm_configs.unet_config({n: s for n, s in whole.items() if "middle" not in n},
                                sample_size=64)  # fmt: skip


def test_attention_as_matrices_and_unknown_names_pass_through():
    config = VAEConfig(
        block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    tensors = random_tensors(VAE, config)
    ours = to_file(tensors, vae_places(config))
    name = "decoder.mid.attn_1.k.weight"
    ours[name] = ours[name][:, :, 0, 0]
    found = from_file({**ours, "odd": np.ones(2)}, shapes(VAE, config), vae_places(config))
    assert found.pop("odd").shape == (2,)
    params = weights.from_diffusers(found, weights.abstract(VAE, config)[1])
    assert_same(weights.to_diffusers(params), tensors)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
