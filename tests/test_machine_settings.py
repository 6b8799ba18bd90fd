"""What a model's config.json may decide, and what is this machine's."""

import dataclasses
import json
import re
import types
import typing
from pathlib import Path

import pytest

from sdjax.config import VARIANTS, Config, Stage, TrainConfig, resolve, to_dict
from sdjax.data.config import DataConfig, DataError
from sdjax.data.mixture import Part
from sdjax.evaluation.loading import choose_data, load
from sdjax.machine_settings import MACHINE, asks_for, data_of_model, is_machine, of_model
from sdjax.parallel.mesh import MeshConfig
from sdjax.train.agreement import OWN

# Every other field, so that whoever adds one decides whose it is.
MODEL = """
method.(?!(controlnet|adapter|image_encoder|lpips)_from$)* seed tokenizer.vocab_size
model.unet.* model.vae.* model.text_encoder.* model.text_encoder_2.* model.family
model.transformer.* model.text_encoder_3.* model.max_sequence_length model.kontext data.images
model.zero_empty_prompt model.clip_skip
model.aesthetic_score model.negative_aesthetic_score model.dtype model.remat model.attention
model.frozen_dtype
schedule.kind schedule.beta_start schedule.beta_end schedule.num_train_timesteps
schedule.zero_terminal_snr schedule.snr_scale schedule.shift
objective.prediction_type objective.timestep_sampling objective.stratified objective.timestep_min
objective.timestep_max objective.logit_mean objective.logit_std objective.mode_scale
objective.weighting objective.min_snr_gamma objective.p2_k objective.p2_gamma objective.sigma_data
objective.loss objective.huber_c objective.huber_schedule objective.offset_noise
objective.input_perturbation objective.caption_dropout objective.encoder_dropout
objective.unmasked_weight objective.normalize_masked_area objective.unmasked_probability
data.split data.eval_split data.image_key data.text_key data.label_template data.validation_share
data.test_share data.fold data.split_key data.score_key data.min_score data.weight_key
data.captions.others_key
data.captions.main_share data.captions.templates data.captions.texts data.captions.separator
data.captions.shuffle_tags
data.captions.keep_tags data.captions.tag_dropout data.captions.swap_sides
data.captions.quality_tags data.captions.quality_first
data.augment.* data.captions.empty data.resolution data.crop
data.buckets.step data.buckets.max_aspect data.buckets.max_upscale data.flip data.batch_size
data.min_side data.max_aspect data.max_bad_examples data.shapes_train data.shapes_test
data.shapes_pairs data.shapes_colours
optim.name optim.learning_rate optim.b1 optim.b2 optim.eps optim.weight_decay optim.momentum
optim.schedule optim.warmup_steps optim.end_value optim.power optim.rsqrt_steps optim.boundaries
optim.scales optim.cycle_steps optim.clip_norm optim.groups optim.moments
ema.profiles ema.snapshot_every ema.snapshot_dtype
train.steps train.accumulation train.log_every train.checkpoint_every train.keep_last
train.keep_every train.sample_every train.timestep_buckets train.max_nonfinite train.spike_factor
train.rollbacks train.export train.report train.bundle_frozen
sample.image_guidance
sample.prompts sample.count sample.compare sample.guidance sample.guidance_rescale
sample.negative_prompt sample.sampler.name sample.sampler.steps sample.sampler.spacing
sample.sampler.steps_offset sample.sampler.eta sample.sampler.karras
sample.sampler.set_alpha_to_one sample.sampler.clip_sample sample.sampler.clip_sample_range
sample.sampler.original_steps sample.sampler.distilled sample.sampler.flow.*
sample.embedded_guidance sample.skip.*
validation.every validation.examples validation.train_examples validation.strata validation.rows
validation.metric validation.metrics validation.num_samples validation.mode validation.patience
validation.maxima_every
""".split()


def fields(cls=Config, prefix=""):
    """(dotted name, type) of every field of the configuration, and of those of optional groups."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        groups = [option for option in options if dataclasses.is_dataclass(option)]
        if groups:
            variants = VARIANTS[groups[0]][1].values() if groups[0] in VARIANTS else groups[:1]
            found = {own: kind for group in variants for own, kind in fields(group, f"{name}.")}
            yield from found.items()
        else:
            yield name, hint


def is_model(name):
    return any(re.fullmatch(p.replace(".", r"\.").replace("*", ".*"), name) for p in MODEL)


def test_every_field_is_either_the_models_or_the_machines():
    names = [name for name, _ in fields()]
    assert len(names) > 150
    neither = [name for name in names if not is_machine(name) and not is_model(name)]
    assert not neither, (
        f"add these to MACHINE in sdjax/machine_settings.py or MODEL here: {neither}"
    )
    assert not [name for name in names if is_machine(name) and is_model(name)]


def test_every_pattern_is_of_a_field():
    names = [name for name, _ in fields()]
    for pattern in (*MACHINE, *MODEL):
        expression = pattern.replace(".", r"\.").replace("*", ".*")
        assert any(re.fullmatch(expression, name) for name in names), pattern


def test_fields_that_sound_like_a_machine_are_one():
    sounds = re.compile("path|dir|folder|cache|_from|worker|thread|host|prefetch|xla|links|"
                        "slices|mesh|pixels|inception|clip$|features")  # fmt: skip
    for name, _ in fields():
        if name.startswith("model."):
            continue  # of networks: "in_features" is none
        if sounds.search(name):
            assert is_machine(name), name


def test_what_may_differ_between_hosts_is_the_machines():
    assert all(is_machine(name) for name in OWN)


def leaves(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def other(value):
    """Another value of the same type."""
    return {bool: lambda: not value, int: lambda: value + 1, float: lambda: value / 2 + 0.1,
            str: lambda: value + "/evil", tuple: lambda: ("x=1",)}[type(value)]()  # fmt: skip


def test_config_of_a_model_keeps_nothing_of_the_machine():
    """Of every field of the machine a value that is not the default, and what is left of it."""
    default = Config()
    config = dataclasses.replace(
        default,
        **{name: "evil" for name in ("init_from", "vae_from", "text_encoder_from")},
        init_prediction_type="epsilon", init_zero_terminal_snr=True,
        tokenizer=dataclasses.replace(default.tokenizer, path="evil", path_2="evil"),
        data=DataConfig(
            path="evil", data_dir="evil", workers=7, threads=7, prefetch=7, max_pixels=7,
            outside_links=True,
            name="encoded", text_embeddings=True, mixture=(Part(path="evil"),), resolution=32,
        ),
        train=TrainConfig(xla_options=("xla_dump_to=evil",), steps=7),
        validation=dataclasses.replace(
            default.validation, inception="evil", clip="evil", features="evil", examples=7
        ),
        mesh=MeshConfig(data=7, fsdp=7, tensor=7, slices=7, shard_optimizer=True),
        stages=(Stage(start=1, mixture=(Part(name="encoded", path="evil"),)),),
        compilation_cache="evil",
    )  # fmt: skip
    before, after = dict(leaves(to_dict(config))), dict(leaves(to_dict(of_model(config))))
    defaults = dict(leaves(to_dict(default)))
    untouched = {n for n in before if is_machine(n) and before[n] == defaults[n]}
    assert untouched == {"sample.fidelity"}  # which only another dataset has
    assert {n: v for n, v in after.items() if is_machine(n)} == {
        n: v for n, v in defaults.items() if is_machine(n)
    }
    assert {n: v for n, v in after.items() if not is_machine(n)} == {
        n: v for n, v in before.items() if not is_machine(n)
    }
    data = data_of_model(config)
    assert (data.path, data.mixture) == ("evil", config.data.mixture)
    assert (data.workers, data.threads, data.max_pixels) == (0, 4, DataConfig().max_pixels)
    assert "evil" not in json.dumps(to_dict(of_model(config)))


@pytest.mark.parametrize(
    "fields, said",
    [({}, ""), ({"name": "mnist"}, ""), ({"name": "mnist/config:3.0.1"}, ""),
     ({"name": "prepared", "path": "/data"}, "data.path = '/data'"),
     ({"data_dir": "/data"}, "data.data_dir = '/data'"),
     ({"name": "huggingface:evil"}, "data.name = 'huggingface:evil'"),
     ({"name": "kaggle:a/b:1.0.0"}, "data.name = 'kaggle:a/b:1.0.0'"),
     ({"name": "../evil"}, "data.name = '../evil'"),
     ({"mixture": (Part(), Part(name="prepared", path="gs://x/y"))},
      "data.mixture[1].path = 'gs://x/y'")],
)  # fmt: skip
def test_own_data_of_a_model_ask_for_folders_and_names(fields, said):
    data = DataConfig(**fields)
    assert asks_for(data) == said
    if not said:
        assert choose_data(data, "") == data
        return
    with pytest.raises(DataError, match=re.escape(said)) as error:
        choose_data(data, "")
    assert "--dataset=own opens it" in str(error.value)
    assert choose_data(data, "own") == data
    assert choose_data(data, "captioned_shapes").path == ""
    assert choose_data(data, "captioned_shapes").data_dir == ""


def test_data_dir_of_the_user_takes_the_place_of_the_models():
    assert choose_data(DataConfig(data_dir="/theirs"), "", data_dir="/mine").data_dir == "/mine"


def test_model_that_is_loaded_has_no_cache_of_its_own(monkeypatch, tmp_path, pipeline_folder):
    """Of a workdir, as `sdjax.evaluate` loads it."""
    from sdjax.checkpoints.reading import read_any
    from sdjax.checkpoints.workdir import save_workdir

    folder = tmp_path / "model"
    save_workdir(folder, read_any(pipeline_folder))
    config = json.loads((folder / "config.json").read_text())
    config["compilation_cache"] = str(tmp_path / "evil")
    config["data"].update(data_dir=str(tmp_path / "evil"), workers=64, resolution=16)
    (folder / "config.json").write_text(json.dumps(config))
    assert "evil" in resolve(config).compilation_cache  # it is read
    loaded = load(folder)
    assert "evil" not in json.dumps(to_dict(loaded.config))
    assert loaded.config.data.workers == 0 and loaded.config.data.resolution == 16
    assert asks_for(loaded.data) == f"data.data_dir = {str(tmp_path / 'evil')!r}"


def test_only_recipes_choose_the_cache():
    """`enable_compilation_cache` is given a recipe's field, or nothing."""
    found = {}
    for file in (Path(__file__).parents[1] / "sdjax").rglob("*.py"):
        for given in re.findall(r"(?<!def )enable_compilation_cache\(([^)]*)\)", file.read_text()):
            found.setdefault(given, set()).add(file.stem)
    runs = {"encode", "loop"}
    assert found == {'""': {"sample", "evaluate", "serve"}, "config.compilation_cache": runs}
