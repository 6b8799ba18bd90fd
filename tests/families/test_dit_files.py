"""Single files of SD3 and FLUX.1: shapes of releases, there and back, against diffusers."""

import dataclasses

import diffusers
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import save_workdir
from sdjax.config import default, resolve
from sdjax.families import flux, sd3, sdxl
from sdjax.families.dit_files import CLIP_G, CLIP_L, T5, TRANSFORMER
from sdjax.formats.diffusers_folder import read_diffusers, write_diffusers
from sdjax.formats.folders import ModelError
from sdjax.formats.scheduler_json import scheduler_from_diffusers
from sdjax.formats.single_file import Hints
from sdjax.formats.single_file_layout import find_layout
from sdjax.formats.single_file_writer import write_single_file
from sdjax.models import weights
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.config import ConfigError
from sdjax.models.t5 import T5Config
from sdjax.system import paths
from tests.families import torch_transformers

FILE = paths.to_path("m.safetensors")
# release: (family, its layout, transformer, tensors of the transformer).
RELEASES = {
    "dev": (flux.FLUX, "dev", flux.DEV, 780),
    "schnell": (flux.FLUX, "schnell", flux.SCHNELL, 776),
    "fill": (flux.FLUX, "dev", flux.FILL, 780),
    "control": (flux.FLUX, "dev", flux.CONTROL, 780),
    "sd3-medium": (sd3.SD3, "sd3", sd3.SD3_MEDIUM, 491),
    "sd3.5-medium": (sd3.SD3, "sd3", sd3.SD35_MEDIUM, 665),
    "sd3.5-large": (sd3.SD3, "sd3", sd3.SD35_LARGE, 923),
}


def shapes_in_file(family, layout, name, config):
    """{name in a file, without prefix: shape} of a network of any size, without memory."""
    record = next(f for f in family.single_files if f.name == layout).networks[name]
    places, found = record.places(config), {}
    _, abstract = weights.abstract(family.parts[name].network, config)
    for own, shape in weights.tensor_shapes(abstract).items():
        place = places(own)
        if place.default is not None:
            continue
        if len(shape) == 2 and "attn_1." in place.name:
            shape = (*shape, 1, 1)
        rows = found.get(place.name, (0,))[0] if place.part is not None else 0
        found[place.name] = (rows + shape[0], *shape[1:])
    return found


# ---- shapes of releases --------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", TRANSFORMER])
@pytest.mark.parametrize("release", RELEASES)
def test_a_release_is_recognised_by_its_shapes(release, prefix):
    family, layout, config, count = RELEASES[release]
    shapes = shapes_in_file(family, layout, "transformer", config)
    assert len(shapes) == count
    found = find_layout(FILE, {prefix + name: shape for name, shape in shapes.items()})
    assert (found.family.name, found.layout.name, found.sure) == (family.name, layout, True)
    assert found.prefixes == {"transformer": prefix}
    read = found.network("transformer").configure(shapes, "flow")
    assert read == config


@pytest.mark.parametrize(
    "family, layout, name, config",
    [
        (sd3.SD3, "sd3", "text_encoder", sd3.CLIP_L),
        (sd3.SD3, "sd3", "text_encoder_2", sdxl.CLIP_BIGG),
        (sd3.SD3, "sd3", "text_encoder_3", T5Config()),
        (sd3.SD3, "sd3", "vae", sd3.VAE_SD3),
        (flux.FLUX, "dev", "text_encoder", CLIPTextConfig()),
        (flux.FLUX, "schnell", "text_encoder_2", T5Config()),
        (flux.FLUX, "dev", "vae", flux.VAE_FLUX),
    ],
)
def test_encoders_are_recognised_by_their_shapes(family, layout, name, config):
    shapes = shapes_in_file(family, layout, name, config)
    record = next(f for f in family.single_files if f.name == layout).networks[name]
    own = {record.spelling(key): shape for key, shape in shapes.items()}
    assert record.configure(own, "flow") == config


@pytest.mark.parametrize("family", [sd3.SD3, flux.FLUX])
def test_the_scheduler_of_a_layout_says_what_the_layout_does(family):
    for layout in family.single_files:
        changes = family.scheduler_changes(family.pipelines[0])
        read = scheduler_from_diffusers(layout.scheduler, changes=changes)
        assert (read.schedule, read.prediction_type) == layout.objective({})
        assert bool(read.sampler.flow.dynamic) == (layout.name == "dev")
        assert not read.unsupported


@pytest.mark.parametrize(
    "drop, change, message",
    [
        ("pos_embed", {}, "no pos_embed among the weights"),
        ("", {"pos_embed": (1, 4)}, r"pos_embed has the shape \[1, 4\]"),
        ("", {"final_layer.linear.weight": (63, 1536)}, "63 rows are not 4 equal parts"),
        ("", {"x_embedder.proj.weight": (1500, 16, 2, 2)}, "caption_projection_dim = 1500"),
    ],
)
def test_odd_shapes_of_sd3_are_named(drop, change, message):
    shapes = shapes_in_file(sd3.SD3, "sd3", "transformer", sd3.SD3_MEDIUM) | change
    shapes.pop(drop, None)
    with pytest.raises(ConfigError, match=message):
        sd3.SD3.single_files[0].networks["transformer"].configure(shapes, "flow")


def test_flux_with_other_heads_is_asked_for_its_axes():
    config = dataclasses.replace(flux.DEV, attention_head_dim=12, axes_dims_rope=(4, 4, 4))
    shapes = shapes_in_file(flux.FLUX, "dev", "transformer", config)
    with pytest.raises(ConfigError, match="the heads have 12 channels.*--config_from"):
        flux.FLUX.single_files[0].networks["transformer"].configure(shapes, "flow")


# ---- there and back ------------------------------------------------------------------------------


def square_sd3(first, folder, **options):
    """A pipeline of SD3 whose CLIP-L has the projection that programs assume."""
    pipeline = torch_transformers.sd3(first, folder, **options)
    encoder = torch_transformers.clip(first, 6, 6)
    torch_transformers.randomise(encoder.eval(), 50)
    encoder.text_projection.weight.data = torch.eye(6)
    pipeline.register_modules(text_encoder=encoder)
    return pipeline


CASES = {
    "sd3": square_sd3,
    "sd3 with a projection": torch_transformers.sd3,
    "sd3 without T5": lambda *args: square_sd3(*args, with_t5=False),
    "flux dev": torch_transformers.flux,
    "flux schnell": lambda *args: torch_transformers.flux(*args, dev=False),
}


@pytest.fixture(scope="module")
def folders(torch_pipeline, tmp_path_factory):
    """`folders(case)` is the folder of a pipeline."""
    made = {}

    def folder(case):
        if case not in made:
            place = tmp_path_factory.mktemp("pipeline")
            pipeline = CASES[case](torch_pipeline.tokenizer, place / "t5")
            pipeline.save_pretrained(place / "folder")
            made[case] = place / "folder"
        return made[case]

    return folder


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and np.array_equal(ours[name], value), name


@pytest.mark.parametrize("case", CASES)
def test_folder_to_file_to_workdir_to_folder_gives_the_same_bits(case, folders, tmp_path):
    model = read_diffusers(folders(case))
    file = tmp_path / "m.safetensors"
    notes = write_single_file(file, model)
    assert any("projection.weight is not the one" in n for n in notes) == ("with a" in case)
    read = read_any(file, hints=Hints(tokenizer=str(folders(case))))
    assert read.networks == model.networks and "max_sequence_length" in read.settings
    assert (read.schedule, read.sampler) == (model.schedule, model.sampler)
    assert read.scheduler == model.scheduler and read.prediction_type == "flow"
    save_workdir(tmp_path / "workdir", read)
    write_diffusers(tmp_path / "folder", read_any(tmp_path / "workdir"))
    again = read_diffusers(tmp_path / "folder")
    assert_same_bits(again.params, dict(model.params))
    for field, tokenizer in model.tokenizers.items():
        ours, theirs = (t.encode(["a red circle"]) for t in (again.tokenizers[field], tokenizer))
        np.testing.assert_array_equal(ours[:, :4], theirs[:, :4])


@pytest.mark.parametrize("case", ["sd3", "flux dev"])
def test_files_without_encoders_are_read_and_written(case, folders, tmp_path):
    model = read_diffusers(folders(case), components=("transformer", "vae"))
    assert not model.tokenizers
    write_single_file(tmp_path / "m.safetensors", model)
    read = read_any(tmp_path / "m.safetensors")
    assert list(read.networks) == ["transformer", "vae"] and not read.tokenizers
    assert read.schedule == model.schedule
    assert_same_bits(read.params, dict(model.params))
    with pytest.raises(ModelError, match="text_encoder, tokenizer missing"):
        save_workdir(tmp_path / "workdir", read)


@pytest.mark.parametrize("case", ["sd3", "flux dev", "flux schnell"])
def test_a_transformer_alone_has_no_prefix(case, folders, tmp_path):
    model = read_diffusers(folders(case), components=("transformer",))
    write_single_file(tmp_path / "m.safetensors", model)
    names = weights.read_header(tmp_path / "m.safetensors")[0]
    assert "final_layer.linear.weight" in names
    read = read_any(tmp_path / "m.safetensors")
    assert_same_bits(read.params, dict(model.params))
    assert read.schedule == model.schedule and list(read.networks) == ["transformer"]


@pytest.mark.parametrize("case", ["flux dev", "sd3"])
def test_a_run_begins_from_a_file_with_the_encoders_of_a_folder(case, folders, tmp_path):
    folder = folders(case)
    parts = ("transformer",) if case == "flux dev" else ("transformer", "vae")
    write_single_file(tmp_path / "m.safetensors", read_diffusers(folder, components=parts))
    recipe = default(family=case.split()[0])
    recipe.init_from = str(tmp_path / "m.safetensors")
    recipe.text_encoder_from = recipe.vae_from = str(folder)
    whole = read_diffusers(folder)
    assembled = assemble(resolve(recipe))
    assert_same_bits(assembled.params, dict(whole.params))
    assert assembled.config.model.networks == whole.networks
    assert assembled.config.schedule == whole.schedule
    assert assembled.tokenizers.keys() == whole.tokenizers.keys()


# ---- against diffusers ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sd3", "sd3 without T5"])
def test_diffusers_reads_a_pipeline_of_sd3(case, folders, tmp_path):
    folder = folders(case)
    file = tmp_path / "m.safetensors"
    write_single_file(file, read_diffusers(folder))
    # The loader wants T5's embedding under both of its names, and with accelerate keeps both apart.
    tensors = load_file(file)
    shared = {k: v.clone() for k, v in tensors.items() if k == f"{T5}shared.weight"}
    tied = {k.replace("shared", "encoder.embed_tokens"): v for k, v in shared.items()}
    save_file({**tensors, **tied}, file)
    absent = {} if case == "sd3" else dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    kind = diffusers.StableDiffusion3Pipeline
    ours = kind.from_single_file(file, config=str(folder), local_files_only=True, **absent)
    theirs = kind.from_pretrained(folder, **absent)
    assert_same_parts(ours, theirs)


@pytest.mark.parametrize("case", ["flux dev", "flux schnell"])
def test_diffusers_reads_a_pipeline_of_flux(case, folders, tmp_path, monkeypatch):
    folder = folders(case)
    file = tmp_path / "m.safetensors"
    write_single_file(file, read_diffusers(folder))
    split = torch.split

    def scaled(tensor, sizes, dim):  # the converter has the sizes of the releases
        return split(tensor, [size * 32 // 3072 for size in sizes], dim)

    monkeypatch.setattr(torch, "split", scaled)
    transformer = diffusers.FluxTransformer2DModel.from_single_file(
        file, config=str(folder), subfolder="transformer", local_files_only=True
    )
    monkeypatch.undo()
    vae = diffusers.AutoencoderKL.from_single_file(
        file, config=str(folder), subfolder="vae", local_files_only=True
    )
    theirs = diffusers.FluxPipeline.from_pretrained(folder)
    for ours, part in ((transformer, theirs.transformer), (vae, theirs.vae)):
        assert_same_module(ours, part)


def assert_same_parts(ours, theirs):
    modules = [n for n, part in theirs.components.items() if isinstance(part, torch.nn.Module)]
    assert "text_encoder_2" in modules
    for name in modules:
        assert_same_module(getattr(ours, name), getattr(theirs, name))


def assert_same_module(ours, theirs):
    found = dict(ours.named_parameters())
    if (tied := found.pop("encoder.embed_tokens.weight", None)) is not None:
        assert torch.equal(tied, found["shared.weight"])
    assert found.keys() == dict(theirs.named_parameters()).keys()
    for key, value in theirs.named_parameters():
        assert torch.equal(found[key], value), key


# ---- files of other programs ---------------------------------------------------------------------


@pytest.fixture
def foreign(folders, tmp_path):
    """`foreign(case, change)` is a file without a header, with changed tensors; and its model."""

    def made(case, change=lambda tensors: tensors):
        model = read_diffusers(folders(case))
        file = tmp_path / "foreign.safetensors"
        write_single_file(file, model, overwrite=True)
        save_file(change(load_file(file)), file)
        return file, Hints(like=model, tokenizer=str(folders(case))), model

    return made


def test_projection_that_no_program_reads_is_left_out(foreign):
    head = f"{CLIP_L}text_projection.weight"

    def with_projection(tensors):
        assert head not in tensors
        return {**tensors, head: torch.full((6, 6), 0.5)}

    file, hints, model = foreign("sd3", with_projection)
    read = read_any(file, hints=hints)
    assert head in read.ignored
    assert_same_bits(read.params, dict(model.params))


def test_what_comfyui_leaves_beside_encoders_of_flux_is_listed(foreign):
    extra = {
        f"{CLIP_L}text_projection.weight": torch.eye(12),
        "text_encoders.clip_l.logit_scale": torch.ones(()),
        f"{T5}encoder.embed_tokens.weight": None,
    }

    def change(tensors):
        tied = {f"{T5}encoder.embed_tokens.weight": tensors[f"{T5}shared.weight"].clone()}
        return {**tensors, **extra, **tied}

    file, hints, model = foreign("flux dev", change)
    read = read_any(file, hints=hints)
    assert {f"{CLIP_L}text_projection.weight", "text_encoders.clip_l.logit_scale"} <= set(
        read.ignored
    )
    assert_same_bits(read.params, dict(model.params))


def test_open_clip_pads_with_zeros_and_names_are_those_of_comfyui(foreign):
    file, hints, _ = foreign("sd3")
    names = weights.read_header(file)[0]
    for name in (
        f"{TRANSFORMER}joint_blocks.0.x_block.attn2.qkv.weight", f"{TRANSFORMER}pos_embed",
        f"{CLIP_L}text_model.embeddings.position_embedding.weight",
        f"{CLIP_G}text_projection.weight", "first_stage_model.encoder.mid.attn_1.q.weight",
        f"{T5}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ):  # fmt: skip
        assert name in names
    assert not any("quant_conv" in name for name in names)
    like = dataclasses.replace(hints.like, tokenizers={})
    read = read_any(file, hints=Hints(like=like, tokenizer=hints.tokenizer))
    assert read.tokenizers["tokens_2"].encode(["a red circle"])[0, -1] == 0


def test_float8_is_read_and_scaled_float8_refused(foreign):
    name = f"{TRANSFORMER}final_layer.linear.weight"

    def small(tensors):
        return {**tensors, name: tensors[name].to(torch.float8_e4m3fn)}

    file, hints, model = foreign("flux dev", small)
    read = read_any(file, hints=hints)
    path = "transformer.proj_out.kernel"
    rounded = model.params[path].astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(read.params[path], rounded)
    scale = {f"{TRANSFORMER}double_blocks.0.img_mlp.0.scale_weight": torch.ones(())}
    file, hints, _ = foreign("flux dev", lambda tensors: {**small(tensors), **scale})
    with pytest.raises(ModelError, match="quantised.*scale_weight"):
        read_any(file, hints=hints)


def test_misfits_are_named_with_the_file(foreign):
    name = f"{TRANSFORMER}joint_blocks.1.x_block.attn.qkv.bias"
    odd = f"{TRANSFORMER}joint_blocks.1.odd"
    change = {name: torch.ones(3), odd: torch.ones(1)}
    gone = f"{TRANSFORMER}x_embedder.proj.bias"

    def changed(tensors):
        return {k: v for k, v in {**tensors, **change}.items() if k != gone}

    file, hints, _ = foreign("sd3", changed)
    with pytest.raises(ModelError) as caught:
        read_any(file, hints=hints)
    message = str(caught.value)
    assert f"{file}: transformer: " in message
    assert all(word in message for word in (name, odd, gone))
    file, hints, _ = foreign("sd3", lambda tensors: {**tensors, "clip_vision.x": torch.ones(1)})
    with pytest.raises(ModelError, match=r"does not know clip_vision\.x"):
        read_any(file, hints=hints)


def test_the_scale_of_an_autoencoder_alone_brings_its_shift(folders, tmp_path):
    model = read_diffusers(folders("flux dev"), components=("vae",))
    file = tmp_path / "ae.safetensors"
    write_single_file(file, model)
    tensors = load_file(file)
    assert "encoder.conv_in.weight" in tensors
    save_file(tensors, file)
    with pytest.raises(ModelError, match="1.5305 for SD3 and SD3.5, 0.3611 for FLUX.1"):
        read_any(file, components=("vae",))
    shapes = {name: value.shape for name, value in tensors.items()}
    for factor, shift, given in ((0.3611, 0.1159, None), (1.5305, 0.0609, None), (2.0, 0.5, 0.5)):
        config = vae_config_of(file, shapes, Hints(scaling_factor=factor, shift_factor=given))
        assert (config.scaling_factor, config.shift_factor) == (factor, shift)


def vae_config_of(file, shapes, hints):
    """The config that is read; its groups are those of releases, which do not divide 16."""
    wide = {
        name: tuple(side * 8 if side == 16 else side for side in shape)
        for name, shape in shapes.items()
    }
    tensors = {name: torch.zeros(shape) for name, shape in wide.items()}
    save_file(tensors, file)
    return read_any(file, components=("vae",), hints=hints).vae
