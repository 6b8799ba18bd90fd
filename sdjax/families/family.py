"""The three records: a family, a model of it, and networks that are ready to be given parameters.

A `Family` is facts and a few pure functions, in a file of its own. Everything that belongs to one
family and to no other stands there. The rest of the house asks the record: which networks there
are, how words become features, what the denoiser gets, how the family's folders and files look.

A `Model` is what is read from a folder, what is written to one, and what a run trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from sdjax.diffusion.grids import SamplerConfig
from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.families.adapter_names import AdapterNames
from sdjax.families.single_file import SingleFile
from sdjax.models import weights
from sdjax.models.params import Params, component, prefixed

if TYPE_CHECKING:  # a step needs no tokenizer
    from sdjax.data.text.text_tokenizer import TextTokenizer

Context = jax.Array | dict[str, jax.Array]
Features = dict[str, jax.Array]
# The field of a batch with the strength of guidance, float32 [B], for denoisers that read it.
GUIDANCE = "guidance"
AUTOENCODER = "vae"  # in every family, and in files of its own
# What a denoiser does with a picture that it reads: it redraws what a mask shows, edits it as the
# words say, or follows it, as edges. These are the names of the methods that train such denoisers.
FILLS, EDITS, FOLLOWS = "inpaint", "edit", "condition"


@dataclasses.dataclass(frozen=True)
class Part:
    """A network of a family; its name is a folder of the diffusers layout.

    network: the nnx module.
    config: the dataclass of its config, with `from_json` and `to_json`; of a text encoder with
        `architecture`, `vocab_size`, `max_position_embeddings` (but see `length_setting`), the ids
        of special tokens that its kind has, and `inert`, fields that change nothing of what is
        encoded, outside of training.
    kind: the `_class_name` or `model_type` in its config.json.
    owns: whether a config.json of this kind is this part's, and not another family's.
    tokens, tokenizer: of a text encoder, the field of a batch that it reads and the folder of its
        tokenizer; "" for other networks.
    tokenizer_kind: of `sdjax.data.text.tokenizers`.
    length_setting: the family's setting that says how many tokens it reads; "" if its config does.
    prefix: of its weights in a file of transformers.
    tied: {another name that files have for a weight: its own}.
    surplus: (config, name of a weight in its file) -> a label for the log if the network does not
        read it, else "".
    fitted: (config, tokenizer) -> the config of the network that reads the tokenizer's tokens.
    filled: {field: value} for fields of config.json that pipelines of the family read as numbers,
        where it would have null.
    """

    network: type
    config: Any
    kind: str
    owns: Callable[[Mapping[str, Any]], bool] = lambda data: True
    tokens: str = ""
    tokenizer: str = ""
    tokenizer_kind: str = "clip"
    length_setting: str = ""
    prefix: str = ""
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    surplus: Callable[[Any, str], str] = lambda config, key: ""
    fitted: Callable[[Any, Any], Any] = lambda config, tokenizer: config
    filled: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def described(self, config: Any) -> dict[str, Any]:
        """Return the config.json of a network."""
        content = config.to_json()
        return content | {k: v for k, v in self.filled.items() if content.get(k) is None}


class Embed(Protocol):
    """Turns the tokens of captions into features, which may be kept for later."""

    def __call__(
        self,
        networks: Networks,
        params: Mapping[str, jax.Array],
        tokens: Mapping[str, jax.Array],
        *,
        empty: Callable[[], jax.Array],
        key: jax.Array | None,
    ) -> Features:
        """Return {"context": [B, L, D], ...} float32.

        Args:
            tokens: int32 [B, L] by the field of each text encoder.
            empty: gives bool [B], the captions that are "".
            key: of dropout in the encoders; None switches it off.
        """


class MakeContext(Protocol):
    """Turns features and numbers into what the denoiser reads besides the noisy latents."""

    def __call__(
        self,
        networks: Networks,
        features: Features,
        batch: Mapping[str, jax.Array],
        *,
        target: tuple[int, int],
        negative: bool,
    ) -> Context:
        """Return the denoiser's context.

        Args:
            batch: may have the family's `numbers`; those that are missing take defaults.
            target: height and width of the picture, in pixels.
            negative: whether guidance leads away from it.
        """


class MakeChannels(Protocol):
    """Makes what a denoiser reads of a picture from its latents."""

    def __call__(self, mask: jax.Array | None, latents: jax.Array) -> jax.Array:
        """Return float32 [N, h, w, K].

        Args:
            mask: of `FILLS`, [N, H, W, 1], 1 where redrawn.
            latents: [N, h, w, C], of `FILLS` those of the picture without what is redrawn.
        """


def the_latents(mask: jax.Array | None, latents: jax.Array) -> jax.Array:
    """Return the latents as they are; see `MakeChannels`."""
    return latents


@dataclasses.dataclass(frozen=True)
class Reading:
    """How denoisers of a family read a picture besides the noisy latents, for a task.

    count: (channels of a latent, pixels along its side) -> the channels that follow those of the
        noisy latents; 0 where the picture is read as further tokens.
    make: see `MakeChannels`.
    field: of the context that carries what is made; "" where it follows the noisy latents.
    setting: the family's setting that is True for such models, since their shape does not say it;
        they draw without a picture too. "" for none.
    scaled: whether latents are scaled as the noisy ones are.
    sampled: whether drawing takes a sample of the VAE's distribution, and not its mode.
    guided: whether drawing has a guidance of its own towards the picture, which training drops.
    """

    count: Callable[[int, int], int]
    make: MakeChannels = the_latents
    field: str = ""
    setting: str = ""
    scaled: bool = True
    sampled: bool = False
    guided: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    name: in recipes and in config.json.
    title: in messages.
    config: the dataclass of a recipe's group `model`, a `ModelConfig`.
    parts: its networks, in the order in which they are initialised.
    denoiser: the name of the one that predicts.
    fixed: the settings that a run cannot change half-way.
    encodes: those of the settings that change what `embed` makes.
    halvings: how often the denoiser halves latents, from the configs of the networks.
    check: raises a UserError, naming the fields, if the networks do not belong together.
    embed, context: see `Embed` and `MakeContext`.
    features: names of what `embed` makes; "context" [B, L, D] is one.
    numbers: {field of a batch: its shape for one example} that an example carries besides pictures
        and captions. "size" follows from the geometry of the picture, and others are number
        features of the dataset, see `sdjax.data.numbers`.
    pipelines: classes of diffusers whose folders are read, the plain one first.
    pipeline_class: the one that draws with a model.
    index: entries of model_index.json besides the class and the parts.
    settings_of_index: the family's settings that a model_index.json says.
    scheduler_changes: what a pipeline class changes in the scheduler file that it reads.
    single_files: layouts of single files, from the most to the least particular.
    single_file: the name of the layout that a model is written in.
    presets: published shapes by name; "base" is the one that a recipe begins with.
    latent_channels: channels of latents that the denoiser reads, from its config.
    reads_guidance: whether the denoiser reads the strength of guidance, from the networks' configs.
    skips_layers: whether the denoiser takes `skip_layers`, numbers of blocks to leave out.
    readings: {task, as `EDITS`: how a denoiser reads a picture for it}.
    widened: (config of a denoiser, count) -> the config of one that reads so many channels besides
        those of the noisy latents.
    adapters: names of its modules in files of adapters; None if they have those of diffusers alone.
    defaults: {field of a run: value} that a recipe begins with, as {"schedule.kind": "flow"}, where
        the family's are not everyone's.
    """

    name: str
    title: str
    config: type
    parts: Mapping[str, Part]
    denoiser: str
    fixed: tuple[str, ...]
    halvings: Callable[[Mapping[str, Any]], int]
    check: Callable[[Model], None]
    embed: Embed
    context: MakeContext
    features: tuple[str, ...]
    numbers: Mapping[str, tuple[int, ...]]
    pipelines: tuple[str, ...]
    pipeline_class: Callable[[Model], str]
    index: Callable[[Model], dict[str, Any]]
    settings_of_index: Callable[[Mapping[str, Any]], dict[str, Any]]
    scheduler_changes: Callable[[str], dict[str, Any]]
    single_files: tuple[SingleFile, ...]
    single_file: Callable[[Model], str]
    presets: Mapping[str, Any]
    latent_channels: Callable[[Any], int] = lambda denoiser: denoiser.in_channels
    reads_guidance: Callable[[Mapping[str, Any]], bool] = lambda networks: False
    skips_layers: bool = False
    readings: Mapping[str, Reading] = dataclasses.field(default_factory=dict)
    widened: Callable[[Any, int], Any] = lambda denoiser, count: dataclasses.replace(
        denoiser, in_channels=denoiser.in_channels + count
    )
    encodes: tuple[str, ...] = ()
    adapters: AdapterNames | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def text_length(self, name: str, config: Any, settings: Mapping[str, Any]) -> int:
        """Return how many tokens a text encoder reads."""
        if setting := self.parts[name].length_setting:
            return settings.get(setting, self.presets["base"].settings[setting])
        return config.max_position_embeddings

    @property
    def encoders(self) -> dict[str, Part]:
        """The text encoders among the parts."""
        return {name: part for name, part in self.parts.items() if part.tokens}


class Change(Protocol):
    """Gives a network parameters of its own besides those of its files: factors of adapters.

    It is hashable, and changes nothing of the parameters that the network has.
    """

    def __call__(self, name: str, network: Any, rngs: Any) -> None:
        """Change a network in place, just after it was made.

        Args:
            name: of the network, as "unet".
            network: the nnx module; its parameters may have no values.
            rngs: gives a key for each draw by `rngs.params()`.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Networks of a family and what they were trained with; what a folder lacks is not there.

    networks: {name: config}.
    settings: the family's own, as `ModelConfig.settings`; may lack some.
    schedule: None if there is no denoiser.
    sampler: how the folder says to sample; the nearest to it where `unsupported_sampler` says
        something.
    unsupported_sampler: the sampler that the folder asks for and sdjax does not have, or "".
    scheduler: the folder's scheduler_config.json, for a folder that is written of these.
    tokenizers: {field of a batch: the tokenizer that fills it}, one for each text encoder.
    params: {path: float32 array}, paths start with the network, as in `unet.conv_in.bias`.
    ignored: fields and parts of the folder that were not used, for the log.
    changes: made to every network that `bind` builds; none in what folders hold.
    """

    family: Family
    networks: Mapping[str, Any]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule: ScheduleConfig | None = None
    prediction_type: str = "epsilon"
    sampler: SamplerConfig | None = None
    unsupported_sampler: str = ""
    scheduler: Mapping[str, Any] | None = None
    tokenizers: Mapping[str, TextTokenizer] = dataclasses.field(default_factory=dict)
    params: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def denoiser(self) -> Any:
        """The config of the network that predicts."""
        return self.networks[self.family.denoiser]

    @property
    def vae(self) -> Any:
        """The config of the autoencoder."""
        return self.networks[AUTOENCODER]

    @property
    def is_autoencoder(self) -> bool:
        """Whether it is an autoencoder alone."""
        return list(self.networks) == [AUTOENCODER]

    @property
    def text_encoders(self) -> dict[str, Any]:
        """{name: config} of the text encoders that are there."""
        encoders = self.family.encoders
        return {name: config for name, config in self.networks.items() if name in encoders}

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the pictures that the denoiser was made for."""
        side = self.denoiser.sample_size
        rows, columns = side if isinstance(side, tuple) else (side, side)
        return rows * self.vae.downscale, columns * self.vae.downscale

    def component(self, name: str) -> dict[str, np.ndarray]:
        """The parameters of one network, without its prefix."""
        return component(self.params, name)

    def text_length(self, name: str) -> int:
        """Return how many tokens a text encoder reads."""
        return self.family.text_length(name, self.networks[name], self.settings)

    def missing(self) -> list[str]:
        """The parts of a pipeline that are not there: each encoder comes with its tokenizer."""
        every = self.family.encoders
        encoders = {name: every[name] for name in self.text_encoders}
        wanted = [self.family.denoiser, AUTOENCODER, *(encoders or [next(iter(every))])]
        absent = [name for name in wanted if name not in self.networks]
        absent += ["schedule"] if self.schedule is None else []
        for part in encoders.values() or [next(iter(every.values()))]:
            absent += [part.tokenizer] if part.tokens not in self.tokenizers else []
        return absent


def said_task(model: Model) -> str:
    """Return what a model's settings say that its denoiser does with a picture, or ""."""
    readings = model.family.readings
    return next((task for task, r in readings.items() if model.settings.get(r.setting)), "")


def with_task(model: Model, task: str) -> Model:
    """Return a model whose settings say a task; "" says none."""
    setting = model.family.readings[task].setting if task else ""
    return (
        dataclasses.replace(model, settings={**model.settings, setting: True}) if setting else model
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Networks:
    """Some networks of a model, ready to be given parameters.

    configs, makers, graphs: by name; a maker gives the network of (config, rngs=, ...).
    settings: the family's own.
    denoiser: the config of the model's denoiser, which need not be one of these; None if the model
        has none.
    abstract: {path: ShapeDtypeStruct} of all of them; paths start with the network's name.
    dtypes: {path: dtype} of those that are cast to it before any other use.
    """

    family: Family
    configs: Mapping[str, Any]
    makers: Mapping[str, Any]
    settings: Mapping[str, Any]
    denoiser: Any
    graphs: Mapping[str, Any]
    abstract: dict[str, jax.ShapeDtypeStruct]
    dtypes: dict[str, Any]

    def module(self, name: str, params: Mapping[str, Any]) -> Any:
        """Return a network with its parameters, which may be among those of others."""
        return weights.merge(self.graphs[name], component(params, name))

    def init(self, key: jax.Array) -> Params:
        """Return parameters drawn anew, {path: float32} (jittable)."""
        params: Params = {}
        for i, (name, config) in enumerate(self.configs.items()):
            own = weights.init(self.makers[name], config, jax.random.fold_in(key, i))
            params |= prefixed(own, name)
        return params
