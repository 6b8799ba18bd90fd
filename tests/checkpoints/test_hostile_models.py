"""Models of strangers: folders, workdirs and files whose parts do not fit, or announce too much."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from sdjax import convert
from sdjax.checkpoints import saved_state
from sdjax.checkpoints.checkpoint import CheckpointError, all_steps, restore_params
from sdjax.checkpoints.reading import read_any
from sdjax.errors import UserError
from sdjax.formats.folders import ModelError
from sdjax.models.weights import save_file
from sdjax.system import paths
from sdjax.train.frozen import read_frozen
from sdjax.web.report.run import read_run
from tests.fuzz import targets_models
from tests.fuzz.targets_models import _good, _write


@pytest.fixture
def model(tmp_path):
    return _write("diffusers", tmp_path / "m")


@pytest.fixture
def workdir(tmp_path):
    return _write("workdir", tmp_path / "w")


def change(file, **fields):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | fields))


def test_good_models_of_the_fuzzing_are_read(tmp_path, model, workdir):
    for folder in (model, workdir):
        assert read_any(folder).missing() == []
    for name, target in targets_models.TARGETS:
        assert callable(target), name


def test_a_token_beyond_the_text_encoders_vocabulary_is_refused(model, workdir):
    for folder in (model / "tokenizer", workdir / "tokenizer"):
        change(folder / "vocab.json", far=100_000)
        with pytest.raises(ModelError, match="tokenizer: the tokenizer's ids go up to 100,000"):
            read_any(folder.parent, with_weights=False)


SETTINGS = {
    "model_index.json": [
        {"_class_name": ["StableDiffusionPipeline"]}, {"_class_name": 10**400},
        {"scheduler": ["diffusers", 3]}, {"scheduler": [3]}, {"scheduler": ["a", ["b"]]},
        {"x" * 10_000: ["a", "b"]}, {f"x{i}": ["a"] for i in range(1000)},
    ],
    "unet/config.json": [
        {"layers_per_block": 10**9}, {"layers_per_block": 10**6}, {"block_out_channels": 8},
        {"sample_size": "64"}, {"norm_eps": float("nan")}, {"norm_eps": 10**400},
    ],
    "scheduler/scheduler_config.json": [
        {"num_train_timesteps": 10**9}, {"num_train_timesteps": "1000"}, {"beta_start": [1]},
        {"beta_end": float("nan")}, {"beta_start": -1}, {"steps_offset": 10**400},
        {"trained_betas": [0.1] * 10**5}, {"prediction_type": ["epsilon"]}, {"clip_sample": "no"},
        {"timestep_spacing": 3}, {"beta_schedule": {"a": 1}}, {"thresholding": [[]] * 10**4},
        {"set_alpha_to_one": 10**400}, {"rescale_betas_zero_snr": "False"},
    ],
    "text_encoder/config.json": [
        {"num_hidden_layers": 10**6}, {"architectures": 3}, {"vocab_size": 10**12},
        {"hidden_act": ["gelu"]}, {"quantization_config": 10**400},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_another_type_or_size_are_refused_with_file_and_field(model, name):
    whole = (model / name).read_text()
    for fields in SETTINGS[name]:
        if name.startswith("scheduler"):  # else the pipeline sets two fields itself
            change(model / "model_index.json", _class_name="StableDiffusionXLPipeline")
        change(model / name, **fields)
        try:
            read = read_any(model, with_weights=False)
        except ModelError as error:
            assert str(model) in str(error) and len(str(error)) < 2500
            field = next(iter(fields))
            assert field[:50] in str(error) or name == "model_index.json", (fields, str(error))
        else:  # only how to draw is unclear
            assert read.unsupported_sampler, fields
        (model / name).write_text(whole)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{", "[]", "\0"])
def test_json_that_cannot_be_read_ends_convert_with_2_and_one_line(model, tmp_path, capsys, text):
    (model / "vae" / "config.json").write_text(text)
    code = convert.main([f"--input={model}", f"--output={tmp_path / 'out'}"])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "vae/config.json" in said and said.count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_announces_more_than_it_holds_is_refused(workdir, monkeypatch):
    assert restore_params(workdir)
    monkeypatch.setattr(saved_state, "_FREE", 0)
    monkeypatch.setattr(saved_state, "_MOST_RATIO", 0.1)
    with pytest.raises(CheckpointError, match="announces .* bytes of parameters, and its files"):
        restore_params(workdir)


def test_folders_that_only_look_like_steps_are_passed_over(workdir):
    for name in ("²", "٣", "1" * 200 + "x"):
        (workdir / "checkpoints" / name).mkdir()
    assert 0 in all_steps(workdir)
    assert read_any(workdir).missing() == []
    assert 0 in read_run(workdir).checkpoints


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("path", "../vae", "expected an absolute one"),
        ("path", 3, "vae.path is 3"),
        ("field", "train", "expected one of init_from"),
        ("digest", "sha256:", "expected sha256: and 64 digits"),
        ("step", "9" * 5000, "vae.step is"),
        ("more", 1, "vae.more is not a field"),
        ("path", "/dev/zero", "no such|is a file; expected"),
        ("path", "/\0", "no such folder"),
    ],
)
def test_references_that_are_none_are_refused(workdir, field, value, words):
    entry = {"field": "vae_from", "path": "/", "digest": "sha256:" + "0" * 64}
    (workdir / "frozen.json").write_text(json.dumps({"vae": {**entry, field: value}}))
    with pytest.raises(ModelError, match=words):
        read_any(workdir)


HEADERS = {
    "offsets of another type": {"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "a negative offset": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-500, 8]}},
    "an offset of 4,000 digits": {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [10**4000, 8]}
    },
    "an offset beyond the end": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [100, 108]}},
    "a shape of another type": {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
    "an entry of another type": {"a": 3},
    "a list": [1],
}


@pytest.mark.parametrize("name", HEADERS)
def test_frozen_weights_with_a_strange_header_are_refused(tmp_path, name):
    header = json.dumps(HEADERS[name]).encode()
    file = tmp_path / "frozen.safetensors"
    one = SingleDeviceSharding(jax.devices()[0])
    wanted = {"a": jax.ShapeDtypeStruct((2,), np.float32, sharding=one)}
    save_file({"a": np.ones(2, np.float32)}, file)
    assert read_frozen(paths.to_path(file), wanted)["a"].tolist() == [1, 1]
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="frozen.safetensors"):
        read_frozen(paths.to_path(file), wanted)


def test_single_files_whose_header_says_nonsense_are_refused(tmp_path):
    file = _write("single", tmp_path) / "model.safetensors"
    data = _good("single")["model.safetensors"]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    said = json.loads(header["__metadata__"]["sdjax"])
    for change in (
        "[" * 100_000, "3", "[]", '{"schedule": 3}', '{"schedule": {"kind": 3}}',
        json.dumps(said | {"schedule": said["schedule"] | {"num_train_timesteps": 10**9}}),
        json.dumps(said | {"schedule": said["schedule"] | {"shift": "1"}}),
        json.dumps(said | {"prediction_type": ["epsilon"]}),
        json.dumps(said | {"unet": [1]}), json.dumps(said | {"unet": {"layers_per_block": 10**9}}),
        json.dumps(said | {"scheduler": "DDIMScheduler"}), json.dumps(said | {"vae": 3}),
        json.dumps(said | {"settings": {"zero_empty_prompt": True}}),
        json.dumps(said | {"family": "sdxl", "settings": {"zero_empty_prompt": "no"}}),
        json.dumps(said | {"family": ["sd"]}), json.dumps(said | {"settings": 3}),
    ):  # fmt: skip
        header["__metadata__"]["sdjax"] = change
        new = json.dumps(header).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])
        with pytest.raises(ModelError, match="model.safetensors") as seen:
            read_any(file)
        assert "no tokenizer" not in str(seen.value) and len(str(seen.value)) < 1500
