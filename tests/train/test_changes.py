"""Differences between the configuration of a saved run and the one at hand."""

import dataclasses
import fnmatch

import pytest

from sdjax.config import Config, to_dict
from sdjax.config_changes import BREAKING, MISSING, compare_configs
from sdjax.data.config import DataConfig
from sdjax.data.mixture import Part
from sdjax.families.registry import FAMILIES
from sdjax.families.sd import SDConfig
from sdjax.families.sdxl import SDXLConfig
from sdjax.methods.autoencoding.config import AutoencoderConfig
from sdjax.methods.registry import METHODS

# What a run may change half-way, and why that is no break.
HARMLESS = (
    "stages",  # those that have begun are checked by themselves
    "validation.*",
    # The weight of a loss, and what pictures are told: the state means the same.
    "objective.timestep_*", "objective.stratified", "objective.logit_*", "objective.mode_scale",
    "objective.weighting", "objective.min_snr_gamma", "objective.p2_*", "objective.sigma_data",
    "objective.loss", "objective.huber_*", "objective.offset_noise",
    "objective.input_perturbation", "objective.caption_dropout",
    "objective.unmasked_*", "objective.normalize_masked_area",
    "objective.encoder_dropout", "method.loss", "method.kl_weight", "method.beta",
    "method.reduction", "method.logvar", "method.lpips_weight", "method.critic_weight",
    "method.critic_*loss*", "method.critic_rate", "method.critic_start", "method.equivariance*",
    "method.smaller_pictures",
    "method.guidance", "method.huber_c", "method.weighting",
    "method.teacher_guidance", "method.fake_*", "method.gan_weight", "method.head_weight",
    "method.whole", "method.boxes", "method.ellipses", "method.polygons", "method.strokes",
    "method.*dropout", "method.max_norm", "method.block_rates", "method.words_end",
    "method.factors_begin", "method.std_power", "method.templates",
    "method.init", "method.initializer",  # of what is there already
    "model.aesthetic_score", "model.negative_aesthetic_score",
    # How it is computed, and where.
    "model.dtype", "model.remat", "model.attention", "model.frozen_dtype", "mesh.*",
    "compilation_cache",
    "train.xla_options",
    "train.accumulation", "data.data_dir", "data.workers", "data.threads", "data.prefetch",
    # How an example is shown, not which one stands where.
    "data.crop", "data.flip", "data.captions.main_share", "data.captions.templates",
    "data.captions.separator", "data.captions.shuffle_tags", "data.captions.keep_tags",
    "data.captions.tag_dropout", "data.captions.quality_*", "data.captions.swap_sides",
    "data.augment.*",
    # Other rules for raw data import it anew, under a name that the state of the data refuses.
    "data.max_pixels", "data.min_side", "data.max_aspect", "data.max_bad_examples",
    "data.outside_links",
    "data.weight_key",  # the weight of a loss
    # Numbers of the update; those that change the structure of the state are refused there.
    "optim.learning_rate", "optim.b1", "optim.b2", "optim.eps", "optim.weight_decay",
    "optim.momentum", "optim.schedule", "optim.warmup_steps", "optim.end_value", "optim.power",
    "optim.rsqrt_steps", "optim.boundaries", "optim.scales", "optim.cycle_steps",
    "optim.clip_norm", "optim.groups",
    # How long, how often, and what is looked at.
    "train.steps", "train.*_every", "train.keep_last", "train.timestep_buckets",
    "train.max_nonfinite", "train.spike_factor", "train.rollbacks", "train.export",
    "train.report", "train.bundle_frozen", "ema.snapshot_*", "sample.*",
    "data.eval_split",
)  # fmt: skip
EVERY = Config(model=SDXLConfig(), method=AutoencoderConfig())


def test_differences_of_configurations():
    saved = {
        "seed": 1,
        "model": {"unet": {"channels": [32, 64]}, "dtype": "float32"},
        "optim": {"name": "adamw", "learning_rate": 1e-4},
        "train": {"steps": 100},
        "gone": 1,
    }
    current = {
        "seed": 1,
        "model": {"unet": {"channels": (32, 128)}, "dtype": "bfloat16"},
        "optim": {"name": "lion", "learning_rate": 1e-4},
        "train": {"steps": 200, "log_every": 5},
    }
    found = compare_configs(saved, current)
    assert [(d.field, d.breaks) for d in found] == [
        ("gone", False),
        ("model.dtype", False),
        ("model.unet.channels", True),
        ("optim.name", True),
        ("train.log_every", False),
        ("train.steps", False),
    ]
    assert (found[2].saved, found[2].current) == ([32, 64], [32, 128])
    assert found[4].saved == MISSING
    assert str(found[3]) == "optim.name: was 'adamw', is 'lion'"
    assert [d.breaks for d in compare_configs(saved, current, ("train.*",))][-2:] == [True] * 2


def test_every_field_either_breaks_a_run_or_is_known_not_to():
    """Whoever adds a field has to decide."""
    groups = [{"model": family.config()} for family in FAMILIES.values()]
    groups += [{"method": kind.config()} for kind in METHODS.values()]
    every = [dataclasses.replace(EVERY, **group) for group in groups]
    changed = [d for config in every for d in compare_configs({}, to_dict(config))]
    assert len({d.field for d in changed}) > 150
    for difference in changed:
        harmless = any(fnmatch.fnmatchcase(difference.field, pattern) for pattern in HARMLESS)
        assert difference.breaks != harmless, f"{difference.field}: breaks, harmless or neither?"
    for pattern in (*BREAKING, *HARMLESS):
        assert any(fnmatch.fnmatchcase(d.field, pattern) for d in changed), pattern


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"model": SDConfig()}, "model.family"),
        ({"model": dataclasses.replace(EVERY.model, text_encoder=None)}, "model.text_encoder"),
        ({"data": DataConfig(mixture=(Part(), Part(start=5)))}, "data.mixture"),
    ],
)
def test_groups_that_come_or_go_break_a_run(changes, field):
    """One that is None, or a tuple of groups, is a single field, and not one for each part."""
    other = dataclasses.replace(EVERY, **changes)
    for saved, current in ((EVERY, other), (other, EVERY)):
        found = compare_configs(to_dict(saved), to_dict(current))
        assert found and all(d.breaks for d in found if "aesthetic" not in d.field)
        assert field in [d.field for d in found] or found[0].field.startswith(field)


def test_each_field_of_a_part_of_a_mixture_breaks_a_run():
    values = {"str": "other", "int": 7, "float": 2.0, "float | None": 0.5}
    for part in dataclasses.fields(Part):
        changed = dataclasses.replace(Part(start=1), **{part.name: values[part.type]})
        saved, current = ({"data": {"mixture": to_dict((Part(start=1), p))}}
                          for p in (Part(start=1), changed))  # fmt: skip
        assert [d.breaks for d in compare_configs(saved, current)] == [True], part.name


def test_tuples_and_lists_are_the_same():
    assert compare_configs({"a": {"b": [1, [2]]}}, {"a": {"b": (1, (2,))}}) == []
