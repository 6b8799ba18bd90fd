"""The contracts of a method: what is trained, by which loss, and how the result is looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from sdjax.data.config import DataConfig
from sdjax.diffusion.losses import ObjectiveConfig
from sdjax.families.conditioning import Conditioner
from sdjax.families.config import ModelConfig
from sdjax.families.family import Change, Family, Model
from sdjax.methods.memory import Memory
from sdjax.models.params import Params, is_buffer
from sdjax.optim.optimizers import OptimConfig
from sdjax.sampling.settings import SampleConfig
from sdjax.system import paths

if TYPE_CHECKING:  # a step needs no tokenizer
    from sdjax.data.text.text_tokenizer import TextTokenizer

Batch = Mapping[str, jax.Array]
# {EMA profile: averages of what is trained}, and the copy of `Method.copied_at` under COPY.
Averages = Mapping[str, Params]
COPY = "copy"
Aux = dict[str, jax.Array]
ALWAYS = (0.0, 1.0)  # the shares of a run's steps between which something is trained


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """The group `method` of a recipe; each method adds its own fields."""

    name: str = ""


class Draw(NamedTuple):
    """The randomness of a step, and which of its examples are at hand.

    key: the step's, the same for all of the batch.
    keys: [b], one for each example at hand.
    positions: int32 [b], their places in the global batch.
    batch_size: of the global batch.
    step: how many steps were done before this one, int32 scalar.
    copies: int32 [], how often the copy of `Method.copied_at` was taken.
    memory: {name: array} of `Phase.memory` before this step; empty without one.
    """

    key: jax.Array
    keys: jax.Array
    positions: jax.Array
    batch_size: int
    step: jax.Array | int = 0
    copies: jax.Array | int = 0
    memory: Mapping[str, jax.Array] = {}  # noqa: RUF012, a NamedTuple's default


class LossFn(Protocol):
    """The loss of one phase.

    The mean over the global batch is minimised, each example times its weight if it has one
    (data.weight_key).
    """

    def __call__(
        self, trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        """Return the loss of each example, float32 [b], and what is to be logged {name: [b]}.

        Args:
            trained: {path: array} of everything that the method trains; the gradient is taken with
                respect to what the phase trains.
            frozen: {path: array} of what no phase trains.
            averages: see `Averages`; empty without EMA.
            batch: of the examples at hand.
        """


class Project(Protocol):
    """Puts what a phase trains back where it is allowed to be, after an update."""

    def __call__(self, trained: Params, frozen: Params) -> Params:
        """Return the same paths.

        Args:
            trained: {path: array} of what the phase trains.
            frozen: see `LossFn`.
        """


class Pictures(Protocol):
    """Draws, or reconstructs, pictures to look at while training."""

    def __call__(
        self, params: Params, examples: Examples, seed: int, guided: bool = True
    ) -> np.ndarray:
        """Return uint8 [N, H, W, 3] from the parameters of every network.

        Raises:
            FloatingPointError: a picture has NaN pixels.
        """


class Adjust(Protocol):
    """Sets what follows from the trained weights, before they are written for others."""

    def __call__(
        self, group: ModelConfig, params: Params, images: Callable[[int], np.ndarray]
    ) -> ModelConfig:
        """Return the recipe's group `model` with, say, the factor that scales latents to 1.

        Args:
            params: of every network.
            images: count -> so many of the evaluation split, [N, H, W, 3] float32 in [-1, 1].
        """


class Export(Protocol):
    """Writes what a run has made, where that is no pipeline of diffusers."""

    def __call__(
        self, model: Model, trained: Mapping[str, np.ndarray], folder: paths.Path
    ) -> Mapping[str, paths.Path | str]:
        """Write into a workdir; return {label for the last screen: file, folder, or a remark}.

        Args:
            model: of the run, without parameters.
            trained: {path: float32 array} of what the method trains, the average if there is one.
        """


@dataclasses.dataclass(frozen=True)
class Examples:
    """Fixed examples to look at while training."""

    captions: tuple[str, ...]
    images: np.ndarray  # [N, H, W, 3] float32 in [-1, 1]
    # {field: [N, L] int32}, or what `Conditioner.embed` makes of these, {name: [N, ...]}
    tokens: Mapping[str, np.ndarray]
    # {name: [N, H, W, C] float32} of data.images, as batches have them; NAME_moments too
    named: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    # The negative prompt's features, {name: [...]}, where `tokens` are features.
    negative: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """One optimization among those of a method.

    name: in the state and, where there are several, in metrics.
    loss: see `LossFn`.
    trains: whether a path of `Method.abstract` is trained here; the phases share nothing.
    optim: the optimizer; None for the recipe's.
    every: the phase takes a step at each multiple of so many steps.
    first: its first step; before that, nothing of it is computed.
    rate: path -> multiplier of its learning rate, above 0, besides that of `optim.groups`.
    project: see `Project`; None for anywhere.
    during: path -> the shares of a run's steps at which its training begins and ends. It does not
        move before and after; its gradients and moments are those of all steps.
    memory: see `Memory`; the loss finds it in `Draw.memory`. None where nothing is remembered.
    """

    name: str
    loss: LossFn
    trains: Callable[[str], bool]
    optim: OptimConfig | None = None
    every: int = 1
    first: int = 0
    rate: Callable[[str], float] = lambda path: 1.0
    project: Project | None = None
    during: Callable[[str], tuple[float, float]] = lambda path: ALWAYS
    memory: Memory | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A method bound to the networks of a run.

    abstract: {path: ShapeDtypeStruct} of every network; paths start with the network's name.
    init: key -> parameters of every network, untrained (jittable).
    phases: in the order in which they follow one another within a step.
    example: {name: ShapeDtypeStruct} of one example of a batch, see `methods.fields`.
    numbers: {name: shape} of those fields that are numbers, see `sdjax.data.numbers`.
    validate: (params of every network, batch, keys [b], timesteps [n]) -> losses [b, n] float32, a
        column for each timestep, of the plain objective: nothing is dropped, weighed or perturbed,
        but a mask counts. An autoencoder has no timesteps, and one column.
    maxima: the same arguments -> {path: scalar}, the largest activations and attention logits of
        what is trained; None where that is not offered.
    predictions: the same arguments -> {prediction type: mean squared error, a scalar, of the output
        if it is taken for that}, of "epsilon" and "v_prediction"; None where it is neither.
    timesteps: n -> the middles of n equal parts of the range that is trained, float32 [n].
    pictures: see `Pictures`.
    reads_pictures: whether `pictures` takes those of the examples, where prompts are given too.
    adjust: see `Adjust`; None where nothing follows from the trained weights.
    export: see `Export`; None writes DIR/diffusers of all networks.
    start: {path: array} of what was loaded -> {path: float32 array} of what follows from it, such
        as the copy of a network; called once, at the start of a run.
    copies: {name: network} of what `start` copies whole and nothing trains; a workdir refers to the
        network as it was loaded instead of keeping the copy.
    brought: {name: (field of the recipe, folder or file)} of what `start` reads whole and nothing
        trains; a workdir refers to it. See `checkpoints.references.BROUGHT`.
    whole_batch: why the loss of a batch is not the mean of those of its parts, as the end of a
        sentence, where it is not: its gradients are not accumulated then.
    copied_at: the numbers of updates, rising, after which the state's copy of what is trained is
        taken anew: a teacher that was the student. The first copy is that of the start; with ()
        there is none. Losses find it in `averages[COPY]`, and in `Draw.copies` how often it was
        taken. A step that is skipped for a NaN is no update.
    conditioner: the text encoders where no loss runs them, since examples carry what they make of
        captions: parameters may then lack them and have `Conditioner.stored`. None where losses do.
    dtypes: {path: dtype} in which a parameter is kept on devices where it is not trained; float32
        for others. The method casts it to that before any other use (`Networks.dtypes`).
    """

    abstract: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[jax.Array], Params]
    phases: tuple[Phase, ...]
    example: dict[str, jax.ShapeDtypeStruct]
    validate: Callable[[Params, Batch, jax.Array, np.ndarray], jax.Array]
    maxima: Callable[[Params, Batch, jax.Array, np.ndarray], dict[str, jax.Array]] | None
    timesteps: Callable[[int], np.ndarray]
    pictures: Pictures
    reads_pictures: bool = False
    numbers: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    adjust: Adjust | None = None
    export: Export | None = None
    start: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = lambda loaded: {}
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    brought: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    predictions: Callable[[Params, Batch, jax.Array, np.ndarray], dict[str, jax.Array]] | None = (
        None
    )
    whole_batch: str = ""
    copied_at: tuple[int, ...] = ()
    conditioner: Conditioner | None = None
    dtypes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if sorted({0, *self.copied_at}) != [0, *self.copied_at]:
            raise ValueError(f"copied_at is {self.copied_at}; expected rising updates above 0")
        names = [phase.name for phase in self.phases]
        if not names or len(set(names)) < len(names) or not all(names):
            raise ValueError(f"the phases are called {names}; expected names that differ")
        if (every := self.phases[0].every) != 1 or self.phases[0].first:
            raise ValueError(
                f"the first phase, {names[0]!r}, takes a step every {every}, from step "
                f"{self.phases[0].first}; expected 1 and 0: the loss of every step is logged and "
                "watched"
            )
        for path in self.abstract:
            owners = [phase.name for phase in self.phases if phase.trains(path)]
            if len(owners) > 1:
                raise ValueError(f"{path} is trained by the phases {owners}; expected one at most")

    def trainable(self, path: str) -> bool:
        """Whether a phase may train a path; buffers of networks are never trained."""
        return not is_buffer(path) and any(phase.trains(path) for phase in self.phases)


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The parts of a run that a method is made of.

    config: the method's own group.
    model: with schedule, prediction type and tokenizers, or stand-ins where only shapes matter.
    dtype, remat: see `ModelConfig`.
    adopted: whether a folder decides networks, for hints in messages.
    """

    config: Any
    model: Model
    objective: ObjectiveConfig
    data: DataConfig
    sample: SampleConfig
    dtype: str
    remat: str
    adopted: bool


@dataclasses.dataclass(frozen=True)
class Kind:
    """An entry of METHODS.

    config: the dataclass of its group, a `MethodConfig`.
    make: binds the method to networks; raises a UserError if they do not suit it.
    networks: the names of the networks that it takes, of those that a model has.
    draws: whether what it trains draws pictures from prompts.
    used_by: the field of a recipe that takes what a run has made; "" for none.
    task: what the denoiser does with a picture that it reads, as `sdjax.families.family.EDITS`;
        one that reads latents alone is widened when it is loaded. "" reads none.
    guidance_width: its group -> the width in which the denoiser is to read the guidance scale; one
        that reads none is made to when it is loaded. None leaves it as it is.
    sample: options that `sdjax.sample` needs besides prompts, for the last screen.
    steers: {option of sdjax.sample: its value, "" for the workdir} by which what a run has made
        steers another model; empty where --model takes it.
    changes: (its group, the family) -> `Model.changes` of a run.
    folded: a run's model with its parameters -> the same one without changes, as others read it.
    tokenizers: (its group, {field: tokenizer}) -> those that the run reads captions with.
    data: (its group, data) -> the data as the method reads them.
    encodes: (its group, {name: kind} of data.images) -> the pictures that an encoding ahead keeps;
        raises a UserError where the method reads what cannot be known ahead.
    """

    config: type
    make: Callable[[Setup], Method]
    networks: Callable[[Mapping[str, Any]], tuple[str, ...]]
    draws: bool
    used_by: str = "init_from"
    task: str = ""
    guidance_width: Callable[[Any], int | None] = lambda config: None
    sample: str = ""
    steers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    changes: Callable[[Any, Family], tuple[Change, ...]] = lambda config, family: ()
    folded: Callable[[Model], Model] = lambda model: model
    tokenizers: Callable[[Any, Mapping[str, TextTokenizer]], Mapping[str, TextTokenizer]] = (
        lambda config, tokenizers: tokenizers
    )
    data: Callable[[Any, DataConfig], DataConfig] = lambda config, data: data
    encodes: Callable[[Any, Mapping[str, str]], Mapping[str, str]] = lambda config, kinds: kinds
