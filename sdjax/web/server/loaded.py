"""A model that is ready to draw pictures of any settings, in batches.

`sdjax.sample` compiles the whole way to a picture as one program. Here a program takes a few steps:
it serves any number of them, and after every call the host sees the pictures and may stop some.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data.numbers import of_geometry
from sdjax.diffusion.samplers import (
    check_schedule,
    estimate,
    first_carry,
    kind_of_step,
)
from sdjax.families.conditioning import encode_text
from sdjax.families.family import AUTOENCODER, EDITS, FILLS, FOLLOWS, Model
from sdjax.sampling.a1111 import PromptEmbedder
from sdjax.sampling.denoising import Drawing, of_member
from sdjax.sampling.generate import check_finite, latent_shape, randomness_of, to_uint8
from sdjax.sampling.pictures import PictureEncoder, begun_at, picture_of, vae_noise
from sdjax.sampling.start import initial_state, reading_of, reads_picture
from sdjax.web.server.adapters import Adapters, Weights
from sdjax.web.server.preview import Preview
from sdjax.web.server.program import MOST_STEPS, Program, make_program, rows_from
from sdjax.web.server.requests import InvalidRequest, PictureRequest

_DOES = {EDITS: "edits", FILLS: "fills in", FOLLOWS: "follows"}
PROGRAMS = 16  # kept compiled; each is of one size of pictures, size of a batch, kind of sampler

# (evaluation, estimates of x0 [B, h, w, C]) -> bool [B], the pictures that need no further step.
Watch = Callable[[int, np.ndarray], np.ndarray]


class _Calls:
    """How many steps of a picture are one call of its program.

    Args:
        which: the network of each step; a call has one.
        seconds: that a call may take, or one step, if that is more.
    """

    def __init__(self, which: Sequence[int], seconds: float):
        self._which, self._seconds = which, seconds
        self._seen, self._when = 0, time.monotonic()
        self._pace = float("inf")  # seconds a step

    def seen(self, done: int) -> None:
        """Take note that the result of so many steps is there."""
        now = time.monotonic()
        if done > self._seen:
            self._pace = (now - self._when) / (done - self._seen)
        self._seen, self._when = done, now

    def steps(self, done: int) -> int:
        """Return the number of steps to take after the first `done`."""
        most = min(MOST_STEPS, max(1, int(self._seconds / max(self._pace, 1e-6))))
        after = self._which[done : done + most]
        return next((i for i, each in enumerate(after) if each != after[0]), len(after))


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model on its device.

    model: without parameters, which would stay in the host's memory too.
    params: {path: array} of all networks.
    name: of the folder it was read from.
    own: how it is drawn where a client does not say.
    batch_size: the most pictures drawn at once; smaller batches have a power of two.
    bounds: the timesteps between experts, which predict in place of the model, and whose parameters
        are among `params`; see `sampling.ensemble`. None without experts.
    adapters: what they change is not among `params`.
    embedder: of prompts with weights; None where prompts are read as they stand.
    look_every: seconds after which the host wants to see the pictures; as many steps as take no
        longer are one call.
    """

    model: Model
    params: Mapping[str, jax.Array]
    name: str
    own: Drawing
    dtype: str = "float32"
    batch_size: int = 4
    bounds: tuple[float, ...] | None = None
    adapters: Adapters = dataclasses.field(default_factory=Adapters)
    embedder: PromptEmbedder | None = None
    preview: Preview = dataclasses.field(default_factory=Preview)
    look_every: float = 0.1
    _programs: collections.OrderedDict[Hashable, Program] = dataclasses.field(
        default_factory=collections.OrderedDict
    )

    def check(self, request: PictureRequest) -> None:
        """Check that the model can draw a picture.

        Raises:
            UserError: its size, sampler or picture is not for this model.
        """
        assert self.model.prediction_type is not None
        check_schedule(self._tables, self.model.prediction_type)
        self._drawing(request).plan(self._tables, self._shape(request)[:2])
        if self._needs_picture and request.image is None:
            raise InvalidRequest(f"{self.name} {_DOES[self._task]} a picture; send one")
        if self._reads_whole and request.mask is not None:
            raise InvalidRequest(f"{self.name} {_DOES[self._task]} a whole picture; send no mask")
        if self._task == FILLS and request.mask is None:
            raise InvalidRequest(f"{self.name} fills in what is white in a mask; send one")

    def draw(self, requests: Sequence[PictureRequest], watch: Watch) -> np.ndarray:
        """Return pictures, uint8 [N, H, W, 3].

        A picture that is to stop is what its last step takes it for.

        Args:
            requests: at most `batch_size`, all `alike`.
            watch: called after every call of the program, which is one step or a few.

        Raises:
            FloatingPointError: a picture has NaN pixels.
        """
        count = len(requests)
        padded = [*requests, *[requests[-1]] * (self._padded(count) - count)]
        drawing, shape = self._drawing(requests[0]), self._shape(requests[0])
        plan, program = drawing.plan(self._tables, shape[:2]), self._program(requests[0], padded)
        picture = self._picture(padded)
        noise, keys = randomness_of(np.array([r.seed for r in padded], np.uint32), shape)
        which = [self._expert(t) for t in plan.timesteps]
        networks = self._networks(set(which), requests[0].adapters)
        features = self._features(padded, {each: own[0] for each, own in networks.items()})
        contexts = {
            each: program.contexts(own[0], *self._words(padded, features[each]), picture)
            for each, own in networks.items()
        }
        scale = np.array([each.guidance for each in padded], np.float32).reshape(-1, 1, 1, 1)
        state, begun = initial_state(picture, noise, plan)
        carry = first_carry(plan, state, begun=begun)
        held = np.zeros(count, bool)
        estimates = np.zeros((count, *shape), np.float32)

        def stops(i: int, found: jax.Array) -> bool:
            nonlocal held, estimates
            estimates = np.where(held[:, None, None, None], estimates, np.asarray(found)[:count])
            held = held | watch(i, estimates)
            return bool(held.all())

        done, calls = 0, _Calls(which, self.look_every)
        while done < len(which):
            before, steps = estimate(carry), calls.steps(done)
            carry = program.steps(
                networks[which[done]][1], contexts[which[done]], carry, rows_from(plan, done),
                steps, scale, keys, picture, noise,
            )  # fmt: skip
            if done and stops(done - 1, before):  # while the device takes these steps
                break
            calls.seen(done)
            done += steps
        else:
            stops(done - 1, estimate(carry))
        x0 = np.array(carry[0][0])
        x0[:count] = np.where(held[:, None, None, None], estimates, x0[:count])
        images = np.asarray(program.decode(self._vae, x0))[:count]
        check_finite(images, texts=[each.prompt for each in requests])
        pictures = to_uint8(images)
        self.preview.learn(x0[:count], pictures)
        return pictures

    def warm_up(self, request: PictureRequest) -> None:
        """Compile what draws pictures like this one, for every size of a batch.

        A model that needs a picture is shown a grey one.
        """
        if self._needs_picture:
            side = request.height, request.width
            mask = np.ones((*side, 1), np.float32) if self._task == FILLS else None
            grey = np.full((*side, 3), 127, np.uint8)
            request = dataclasses.replace(request, image=grey, mask=mask)
        sizes = {self._padded(count) for count in range(1, self.batch_size + 1)}
        for size in sorted(sizes):
            self.draw([request] * size, lambda i, x0: np.full(len(x0), i > 0))

    def evaluations(self, request: PictureRequest) -> int:
        """Return how often the denoiser is evaluated for a picture."""
        return len(self._drawing(request).plan(self._tables, self._shape(request)[:2]).timesteps)

    @property
    def _task(self) -> str:
        """The denoiser's task with a picture that it reads; "" for none."""
        return reads_picture(self.model)

    @property
    def _reads_whole(self) -> bool:
        """Whether it reads a picture that drawing does not begin with."""
        return self._task in (EDITS, FOLLOWS)

    @property
    def _needs_picture(self) -> bool:
        """Whether it cannot draw from words alone."""
        reading = reading_of(self.model)
        return reading is not None and not reading.setting

    def _expert(self, timestep: float) -> int:
        """Return the number of the model that predicts at a timestep, 0 for this one itself."""
        if self.bounds is None:
            return 0
        return 1 + sum(bool(np.float32(timestep) >= np.float32(b)) for b in self.bounds)

    def _networks(
        self, numbers: Collection[int], weights: Weights | None
    ) -> dict[int, tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
        """Return text encoders and denoiser of models, see `_expert`, with adapters of weights.

        What a program does not read only takes time to hand over.
        """
        given = self.adapters.start if weights is None else weights
        params = {**self.params, **self.adapters.params(given)}
        encoders, denoiser = self.model.text_encoders, self.model.family.denoiser
        found = {}
        for number in numbers:
            own = of_member(number, params)
            found[number] = (
                {k: v for k, v in own.items() if k.partition(".")[0] in encoders},
                {k: v for k, v in own.items() if k.partition(".")[0] == denoiser},
            )
        return found

    @functools.cached_property
    def _vae(self) -> dict[str, jax.Array]:
        return {k: v for k, v in self.params.items() if k.partition(".")[0] == AUTOENCODER}

    @functools.cached_property
    def _tables(self) -> Any:
        from sdjax.diffusion.schedules import make_schedule

        assert self.model.schedule is not None
        return make_schedule(self.model.schedule)

    @functools.cached_property
    def _encoder(self) -> PictureEncoder:
        return PictureEncoder(self.model, self.params, self.dtype)

    def _padded(self, count: int) -> int:
        return min(self.batch_size, 1 << (count - 1).bit_length())

    def _shape(self, request: PictureRequest) -> tuple[int, int, int]:
        return latent_shape(self.model, request.height, request.width)

    def _features(
        self, requests: Sequence[PictureRequest], encoders: Mapping[int, dict[str, jax.Array]]
    ) -> dict[int, dict[str, np.ndarray]]:
        """Return tokens of the prompts and of the negative ones, or what text encoders make of
        them, of each model whose text encoders' parameters are given."""
        texts = [each.prompt for each in requests] + [each.negative_prompt for each in requests]
        if self.embedder is None:
            return dict.fromkeys(encoders, encode_text(self.model.tokenizers, texts))
        return {each: self.embedder.embed(own, texts) for each, own in encoders.items()}

    def _words(
        self, requests: Sequence[PictureRequest], tokens: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return what `Member.contexts` takes of prompts, and of the negative ones."""
        count, first = len(requests), requests[0]
        size = of_geometry(self.model.family.numbers, (first.height, first.width))
        prompts = {field: rows[:count] for field, rows in tokens.items()}
        prompts |= {field: np.tile(value, (count, 1)) for field, value in size.items()}
        return prompts, {field: rows[count:] for field, rows in tokens.items()}

    def _drawing(self, request: PictureRequest) -> Drawing:
        drawing = dataclasses.replace(self.own, sampler=request.sampler, guidance=request.guidance)
        if request.image is None or self._reads_whole:
            return drawing
        return begun_at(drawing, request.strength)

    def _program(self, first: PictureRequest, padded: Sequence[PictureRequest]) -> Program:
        """Return the program for a batch; those that were not used for longest are dropped."""
        drawing, shape = self._drawing(first), self._shape(first)
        plan = drawing.plan(self._tables, shape[:2])
        key = (
            kind_of_step(plan), shape, len(padded), first.guidance == 1.0, first.image is not None,
            first.mask is not None,
            first.sampler if drawing.skip.layers else None,  # whose steps are built in
        )  # fmt: skip
        if key not in self._programs:
            self._programs[key] = make_program(self.model, drawing, plan, shape[:2], self.dtype)
        self._programs.move_to_end(key)
        while len(self._programs) > PROGRAMS:
            self._programs.popitem(last=False)
        return self._programs[key]

    def _picture(self, requests: Sequence[PictureRequest]) -> dict[str, jax.Array]:
        """Return what the generator takes of the pictures to begin with; see `sampling.start`."""
        if requests[0].image is None:
            return {}
        images = np.stack([np.asarray(each.image, np.float32) / 255 * 2 - 1 for each in requests])
        shape, zero = self._shape(requests[0]), np.zeros(1, int)
        noise = np.concatenate([vae_noise(each.seed, zero, shape) for each in requests])
        if self._reads_whole:
            return {"channels": jnp.asarray(self._encoder.read(images, noise))}
        masks = [each.mask for each in requests if each.mask is not None]
        made = picture_of(
            self._encoder,
            images,
            np.stack(masks) if masks else None,
            noise,
            pure=bool(masks) and requests[0].strength == 1.0,
        )
        return {name: jnp.asarray(value) for name, value in made.items()}
