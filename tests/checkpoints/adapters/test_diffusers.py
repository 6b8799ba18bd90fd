"""Files of adapters in diffusers' own loaders: the outputs are those of the merged weights."""

import copy

import numpy as np
import pytest
import torch

from sdjax.checkpoints.reading import read_any
from sdjax.families.registry import FAMILIES, model_of
from sdjax.formats.adapters.layers import lora_pair
from sdjax.formats.adapters.merging import merged
from sdjax.formats.adapters.writing import write_diffusers_adapter, write_kohya_adapter
from sdjax.models.weights import load_file, save_file
from tests.checkpoints.adapters import samples
from tests.families import torch_transformers

pytest.importorskip("peft")
TOLERANCE = 2e-5  # of outputs up to 3
CLIPS = {"sd": ("text_encoder",), "flux": ("text_encoder",)}


@pytest.fixture(scope="module")
def pipelines(torch_pipeline, torch_xl_pipeline, tmp_path_factory):
    """{family: (pipeline of torch, its model)}. Do not change them."""
    first, made = torch_pipeline.tokenizer, {}
    made["sd"], made["sdxl"] = torch_pipeline, torch_xl_pipeline
    for name in ("sd3", "flux"):
        make = getattr(torch_transformers, name)
        made[name] = make(first, tmp_path_factory.mktemp("t5"))
    found = {}
    for name, pipeline in made.items():
        folder = tmp_path_factory.mktemp(name) / "pipeline"
        pipeline.save_pretrained(folder)
        found[name] = (pipeline, read_any(folder))
    return found


def wanted(family):
    """Whether diffusers takes an adapter of a module: of the denoiser and CLIP, not of T5."""
    names = CLIPS.get(family, ("text_encoder", "text_encoder_2"))
    starts = tuple(f"{name}." for name in ("unet", "transformer", *names))
    return lambda path: path.startswith(starts)


def outputs(pipeline, name):
    """What one network makes of fixed inputs."""
    draw = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    network = getattr(pipeline, name)
    with torch.no_grad():
        if name.startswith("text_encoder"):
            return network(torch.arange(3, 19)[None], output_hidden_states=True)
        if name == "unet":
            options = {}
            if network.config.addition_embed_type:
                ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
                options["added_cond_kwargs"] = {"text_embeds": random(1, 20), "time_ids": ids}
            text = random(1, 5, network.config.cross_attention_dim)
            return network(random(1, 4, 8, 8), torch.tensor(500), text, **options)
        pooled, text = random(1, network.config.pooled_projection_dim), random(1, 5, 24)
        if "Flux" in type(network).__name__:
            ids = torch.tensor([[0.0, i, j] for i in range(2) for j in range(3)])
            return network(
                random(1, 6, 16), text, pooled, torch.tensor([0.5]), ids, torch.zeros(5, 3),
                guidance=torch.tensor([3.5]),
            )  # fmt: skip
        return network(random(1, 4, 8, 12), text, pooled, torch.tensor([500.0]))


def tensors_in(found):
    return found.hidden_states[-1:] + (found[0],) if "hidden_states" in found else (found[0],)


def assert_loads(pipelines, family, file, expected):
    """diffusers, with the file, makes what the networks of a model make."""
    pipeline, base = pipelines[family]
    loaded = copy.copy(pipeline)
    for name in base.networks:
        setattr(loaded, name, copy.deepcopy(getattr(pipeline, name)))
    loaded.load_lora_weights(str(file))
    changed = {path.partition(".")[0] for path, value in expected.params.items()
               if not np.array_equal(value, base.params[path])}  # fmt: skip
    for name in changed:
        ours = copy.copy(pipeline)
        setattr(ours, name, samples.with_weights(getattr(pipeline, name), expected, name))
        found, right = outputs(loaded, name), outputs(ours, name)
        plain = outputs(pipeline, name)
        for a, b, before in zip(*map(tensors_in, (found, right, plain)), strict=True):
            assert (b - before).abs().max() > 0.1, "the adapter hardly changes anything"
            assert (a - b).abs().max() < TOLERANCE, name
    return changed


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_a_diffusers_file_gives_the_merged_outputs(pipelines, family, kind, tmp_path):
    model = pipelines[family][1]
    make = samples.lora_adapter if kind == "lora" else samples.dora_adapter
    adapter = make(model, wanted=wanted(family))
    notes = write_diffusers_adapter(tmp_path, model, adapter)
    assert notes == []
    changed = assert_loads(pipelines, family, tmp_path, merged(model, [(adapter, 1.0)]))
    assert len(changed) == {"sd": 2, "sdxl": 3, "sd3": 3, "flux": 2}[family]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_kohya_file_gives_the_merged_outputs(pipelines, family, tmp_path):
    model = pipelines[family][1]
    adapter = samples.lora_adapter(model)
    write_kohya_adapter(tmp_path / "a.safetensors", model, adapter, {"ss_steps": 5})
    assert_loads(pipelines, family, tmp_path / "a.safetensors", merged(model, [(adapter, 1.0)]))


def test_metadata_is_not_needed_where_the_scale_is_folded(pipelines, tmp_path):
    """FT-02: readers from before the metadata took alpha for the rank."""
    model = pipelines["sd"][1]
    adapter = samples.lora_adapter(model, ranks=(4,), scales=(2.0,))
    write_diffusers_adapter(tmp_path / "a.safetensors", model, adapter)
    bare = tmp_path / "bare" / "pytorch_lora_weights.safetensors"
    bare.parent.mkdir()
    save_file(load_file(tmp_path / "a.safetensors"), bare)
    expected = merged(model, [(adapter, 1.0)])
    assert_loads(pipelines, "sd", tmp_path / "a.safetensors", expected)
    assert_loads(pipelines, "sd", bare.parent, expected)


def test_a_text_encoder_without_out_proj_loads_whole_from_a_diffusers_file(pipelines, tmp_path):
    """FT-21: from a file of kohya's, diffusers 0.42.1 drops q_proj here."""
    model = pipelines["sd"][1]
    adapter = samples.lora_adapter(
        model,
        ranks=(4,),
        wanted=lambda path: path.startswith("text_") and path.endswith(("q_proj", "fc1")),
    )
    write_diffusers_adapter(tmp_path, model, adapter)
    assert_loads(pipelines, "sd", tmp_path, merged(model, [(adapter, 1.0)]))


def test_biases_of_a_lora_are_loaded(pipelines, tmp_path):
    model = pipelines["flux"][1]
    adapter = samples.lora_adapter(
        model, wanted=lambda path: path.startswith("transformer.") and "attn" in path
    )
    first = next(iter(adapter))
    factors = adapter[first].factors
    bias = 0.5 * np.ones(len(factors["lora_up"]), np.float32)
    adapter[first] = type(adapter[first])("lora", {**factors, "diff_b": bias}, 0.5)
    write_diffusers_adapter(tmp_path / "a.safetensors", model, adapter)
    assert_loads(pipelines, "flux", tmp_path / "a.safetensors", merged(model, [(adapter, 1.0)]))


def test_half_precision_is_close(pipelines, tmp_path):
    """FT-25: a file in float16 of a trained adapter."""
    model = pipelines["sd"][1]
    adapter = samples.lora_adapter(model, wanted=lambda path: path.startswith("unet."))
    write_diffusers_adapter(tmp_path / "a.safetensors", model, adapter, dtype="float16")
    tensors = load_file(tmp_path / "a.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype("float16")}
    from sdjax.formats.adapters.reading import read_adapter

    found = merged(model, [(read_adapter(tmp_path / "a.safetensors", model), 1.0)])
    expected = merged(model, [(adapter, 1.0)])
    for path, value in expected.params.items():
        np.testing.assert_allclose(found.params[path], value, atol=1e-3)


# ---- FLUX.1 in kohya's names, at its full width, which is built into diffusers' converter --------


def test_diffusers_reads_the_fused_names_of_flux(tmp_path):
    from diffusers.loaders import FluxLoraLoaderMixin

    model = model_of(FAMILIES["flux"].presets["dev"])
    blocks = ("transformer.transformer_blocks.0.", "transformer.single_transformer_blocks.3.")
    adapter = samples.lora_adapter(
        model, ranks=(4, 2), scales=(1.0, 0.5), wanted=lambda path: path.startswith(blocks)
    )
    assert len(adapter) == 20
    write_kohya_adapter(tmp_path / "a.safetensors", model, adapter)
    tensors = {k: torch.tensor(v) for k, v in load_file(tmp_path / "a.safetensors").items()}
    found = FluxLoraLoaderMixin.lora_state_dict(tensors)
    found = found[0] if isinstance(found, tuple) else found
    names = {key.rsplit(".lora_", 1)[0] for key in found}
    assert names == set(adapter)
    for path, layer in adapter.items():
        down, up = (found[f"{path}.lora_{side}.weight"].numpy() for side in "AB")
        own_up, own_down = lora_pair(layer)
        for rows in (slice(8), slice(-8, None)):  # a whole product has 40 million numbers
            expected = np.float32(layer.scale) * own_up[rows] @ own_down
            np.testing.assert_allclose(up[rows] @ down, expected, atol=1e-6, err_msg=path)
