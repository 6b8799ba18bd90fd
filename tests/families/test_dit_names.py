"""Names of FLUX.1's and SD3's original files against the converters of diffusers."""

import numpy as np
import pytest

from sdjax.families.flux_names import flux_places
from sdjax.families.sd3_names import sd3_places
from sdjax.families.single_file import from_file, halves_swapped, to_file
from sdjax.models import weights
from sdjax.models.flux.network import Flux, FluxConfig
from sdjax.models.mmdit.network import MMDiT, MMDiTConfig

FLUX = dict(in_channels=16, num_layers=2, num_single_layers=3, joint_attention_dim=24,
            pooled_projection_dim=20, attention_head_dim=6, axes_dims_rope=(2, 2, 2))  # fmt: skip
SD3 = dict(sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
           num_attention_heads=3, joint_attention_dim=24, caption_projection_dim=24,
           pooled_projection_dim=20, pos_embed_max_size=6)  # fmt: skip
CASES = {
    "dev": (Flux, FluxConfig(**FLUX, num_attention_heads=2), flux_places),
    "schnell": (
        Flux, FluxConfig(**FLUX, num_attention_heads=1, guidance_embeds=False), flux_places,
    ),
    "sd3": (MMDiT, MMDiTConfig(**SD3), sd3_places),
    "sd3.5-large": (MMDiT, MMDiTConfig(**SD3, qk_norm="rms_norm"), sd3_places),
    "sd3.5-medium": (
        MMDiT, MMDiTConfig(**SD3, qk_norm="rms_norm", dual_attention_layers=(0, 1)), sd3_places,
    ),
}  # fmt: skip
LARGE = dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
RELEASES = {
    "dev": (Flux, FluxConfig(), flux_places, 780),
    "schnell": (Flux, FluxConfig(guidance_embeds=False), flux_places, 776),
    "sd3-medium": (MMDiT, MMDiTConfig(), sd3_places, 491),
    "sd3.5-medium": (
        MMDiT,
        MMDiTConfig(qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
                    pos_embed_max_size=384),
        sd3_places, 665,
    ),
    "sd3.5-large": (MMDiT, MMDiTConfig(**LARGE, qk_norm="rms_norm"), sd3_places, 923),
}  # fmt: skip


def tensors_of(network, config):
    """{name of diffusers: array} with every number different."""
    _, abstract = weights.abstract(network, config)
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return weights.to_diffusers({path: draw(value.shape) for path, value in abstract.items()})


@pytest.mark.parametrize("case", CASES)
def test_a_file_there_and_back_is_bit_equal(case):
    network, config, places = CASES[case]
    tensors = tensors_of(network, config)
    file = to_file(tensors, places(config))
    shapes = {name: value.shape for name, value in tensors.items()}
    again = from_file(file, shapes, places(config))
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    assert sum(value.size for value in file.values()) == sum(v.size for v in tensors.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_diffusers_reads_the_same_weights_from_a_file(case, prefix, monkeypatch):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    network, config, places = CASES[case]
    tensors = tensors_of(network, config)
    file = to_file(tensors, places(config))
    file = {prefix + name: torch.tensor(value) for name, value in file.items()}
    if network is Flux:
        split = torch.split
        width = config.width  # its sizes are those of the releases

        def scaled(tensor, sizes, dim):
            return split(tensor, [size * width // 3072 for size in sizes], dim)

        monkeypatch.setattr(torch, "split", scaled)
        found = utils.convert_flux_transformer_checkpoint_to_diffusers(dict(file))
    else:
        found = utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(file))
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name].numpy(), value, err_msg=name)


@pytest.mark.parametrize("release", RELEASES)
def test_files_of_releases_have_as_many_tensors(release):
    network, config, places, count = RELEASES[release]
    _, abstract = weights.abstract(network, config)
    place = places(config)
    assert len({place(name).name for name in weights.tensor_shapes(abstract)}) == count


def test_halves_swapped_twice_are_as_before():
    value = np.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(halves_swapped(value)[:, 0], [6, 8, 10, 0, 2, 4])
    np.testing.assert_array_equal(halves_swapped(halves_swapped(value)), value)
