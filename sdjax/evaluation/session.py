"""An evaluation from the model to its numbers: draw, make features, compare, write.

    session = open_session(request, load(request.model), folder)
    results = session.run(folder)

What can be wrong is found by `open_session`, before the first picture is drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sdjax.data.pictures import Folder, stretches
from sdjax.diffusion.schedules import make_schedule
from sdjax.evaluation import audit_shares, evaluation_output, robustness
from sdjax.evaluation.audit import Audit, make_labeller
from sdjax.evaluation.conditions import (
    Conditions,
)
from sdjax.evaluation.evaluation import Inputs, Results, judge, tower_of
from sdjax.evaluation.features import digest
from sdjax.evaluation.loading import Loaded
from sdjax.evaluation.losses import FindExampleLosses
from sdjax.evaluation.reference import PixelTower
from sdjax.evaluation.request import (
    Request,
)
from sdjax.evaluation.robustness import Perturbation
from sdjax.families.sampler import choose_sampler, sampler_note
from sdjax.sampling.control_options import check_drawn
from sdjax.sampling.drawing import Artist, Prompts, draw_folder, make_artist, on_mesh
from sdjax.sampling.generate import Drawing, drawing_of, settings_of
from sdjax.system import paths, progress

Validate = Callable[[dict[str, Any]], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
    """An evaluation that is ready to run.

    inputs: what metrics are made of, but for the pictures.
    names, left_out: metrics, and what is not computed and why.
    prompts, count: what is drawn; None and 0 where pictures are given or none are needed.
    validate: parameters -> losses and timesteps, see `make_validate`; example_losses: likewise.
    dataset, split: what prompts and pictures to compare with are of.
    audit: of prompts of its own, if it was asked for.
    conditions: what the model reads besides prompts; None for nothing.
    """

    request: Request
    loaded: Loaded | None
    mesh: Mesh
    inputs: Inputs
    names: list[str]
    left_out: list[str]
    prompts: Prompts | None
    count: int
    size: tuple[int, int] | None
    validate: Validate | None
    dataset: str
    split: str
    audit: Audit | None = None
    example_losses: FindExampleLosses | None = None
    conditions: Conditions | None = None

    @property
    def draws(self) -> bool:
        """Whether pictures are drawn."""
        return self.loaded is not None and (self.prompts is not None or self.audit is not None)

    @property
    def note(self) -> str:
        """A line on what draws in place of the model's own sampler, or ""."""
        if not self.draws:
            return ""
        assert self.loaded is not None
        model = f"--model={self.request.model}"
        return sampler_note(self.loaded.found, self.drawing.sampler, model)

    @functools.cached_property
    def drawing(self) -> Drawing:
        """The model's own sampler and guidance, with the changes that were asked for."""
        request, loaded = self.request, self.loaded
        assert loaded is not None
        own = loaded.config.sample if loaded.config else settings_of(loaded.found)
        sampler = choose_sampler(loaded.found, request.sampler, f"--model={request.model}")
        return drawing_of(own, sampler, request.guidance)

    @property
    def negative_prompt(self) -> str:
        """The prompt that guidance leads away from."""
        if self.request.negative_prompt is not None:
            return self.request.negative_prompt
        config = self.loaded.config if self.loaded else None
        return config.sample.negative_prompt if config else ""

    @functools.cached_property
    def artist(self) -> Artist:
        """The model, ready to draw."""
        assert self.loaded is not None and self.size is not None
        found, controls = self.loaded.found, self.loaded.controls
        if controls:
            assert found.schedule is not None
            timesteps = self.drawing.plan(make_schedule(found.schedule)).timesteps
            check_drawn(controls, self.size, timesteps)
        return make_artist(
            found,
            drawing=self.drawing,
            mesh=self.mesh,
            negative_prompt=self.negative_prompt,
            size=self.size,
            dtype=self.request.dtype,
            controls=controls,
            others=self.loaded.others,
            bounds=self.loaded.bounds,
        )

    def _settings(self, params: Mapping[str, Any], prompts: Prompts) -> dict[str, Any]:
        """Whatever decides about a picture besides its number."""
        assert self.loaded is not None
        found = self.loaded.found
        texts = hashlib.sha256("\n".join(prompts.texts).encode()).hexdigest()[:16]
        return {
            "step": self.loaded.step,
            "weights": self.request.weights,
            "parameters": digest(params, found.networks, found.schedule, found.prediction_type),
            "dataset": self.dataset,
            "split": self.split,
            "prompts": texts,
            "per_prompt": prompts.per_prompt,
            **self._look(),
        }

    def _look(self) -> dict[str, Any]:
        assert self.loaded is not None
        drawing, bounds = dataclasses.asdict(self.drawing), self.loaded.bounds
        return {
            "sampler": drawing.pop("sampler"),
            **drawing,
            "negative_prompt": self.negative_prompt,
            "settings": dict(self.artist.model.settings),
            **({"embeddings": list(self.request.embeddings)} if self.request.embeddings else {}),
            "size": list(self.artist.size),
            "dtype": self.request.dtype,
            **({"conditions": self.conditions.about()} if self.conditions else {}),
            **({"experts_meet_at": list(bounds)} if bounds is not None else {}),
        }

    def draw(
        self,
        folder: paths.PathLike,
        prompts: Prompts,
        count: int,
        *,
        params: dict[str, Any] | None = None,
        turn: float = 0.0,
    ) -> Folder:
        """`count` pictures of prompts; those that are in the folder already stay.

        Args:
            params: in the place of the model's own.
            turn: see `Artist`.
        """
        assert self.loaded is not None
        artist, values = self.artist, params or self.loaded.found.params
        if params is not None:
            artist = dataclasses.replace(artist, params=on_mesh(params, self.mesh))
        if self.conditions is not None:
            artist = dataclasses.replace(artist, reads=self.conditions.bound(values))
        settings = self._settings(values, prompts)
        if turn:
            artist, settings = dataclasses.replace(artist, turn=turn), {**settings, "turn": turn}
        return draw_folder(
            artist,
            prompts,
            folder,
            count=count,
            seed=self.request.seed,
            batch_size=self.request.batch_size,
            settings=settings,
        )

    def run(
        self,
        folder: paths.PathLike,
        *,
        params: dict[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Results:
        """Evaluate, and write what was found into a folder; what is drawn already stays.

        Args:
            params: in the place of the model's own, for other averages of it.
            about: more fields of metrics.json.

        Raises:
            UserError: the folder was begun with other settings, or a metric cannot be computed.
            FloatingPointError: a picture has NaN pixels.
        """
        folder, request, inputs = paths.to_path(folder), self.request, self.inputs
        if self.prompts is not None:
            images = folder / "images"
            pictures = self.draw(images, self.prompts, self.count, params=params)
            inputs = dataclasses.replace(inputs, pictures=pictures)
        if self.loaded is not None:
            values = params if params is not None else dict(self.loaded.found.params)
            found: dict[str, Any] = {
                name: functools.partial(compute, values)
                for name in ("validate", "example_losses")
                if (compute := getattr(self, name)) is not None
            }
            inputs = dataclasses.replace(inputs, **found)
        results = judge(inputs, self.names, resamples=request.resamples, seed=request.seed)
        results = dataclasses.replace(results, warnings=(*results.warnings, *self.left_out))
        described = {**self.about(), **(about or {})}
        if "robustness" in self.names:
            results, described = self._drawn_again(inputs, results, described, folder, params)
        if self.audit is not None:
            results, described = self._audited(results, described, folder, params)
        if jax.process_index() == 0:
            paths.make_folder(folder)
            evaluation_output.write(folder, described, inputs, results)
        return results

    def _audited(
        self,
        results: Results,
        described: dict[str, Any],
        folder: paths.Path,
        params: dict[str, Any] | None,
    ) -> tuple[Results, dict[str, Any]]:
        """With what the audit found."""
        assert self.audit is not None
        audit, request = self.audit, self.request
        label = make_labeller(audit, self.inputs.clip)
        prompts = Prompts(audit.prompts, audit.pictures_per_prompt)
        pictures = self.draw(folder / "audit", prompts, len(audit.captions), params=params)
        parts, start = [], 0
        with progress.work("labelling", len(pictures), unit="pictures") as work:
            for images in stretches(pictures):
                parts.append(label(images, audit.captions[start : start + len(images)]))
                start += len(images)
                work.advance(len(images))
        codes = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        findings = audit_shares.count(audit, codes, resamples=request.resamples, seed=request.seed)
        metrics = {**results.metrics, **audit_shares.estimates(findings)}
        described = {**described, "audit": audit_shares.to_json(audit, findings)}
        tables = audit_shares.tables(findings)
        every = (*results.tables, *tables)
        return dataclasses.replace(results, metrics=metrics, tables=every), described

    def _drawn_again(
        self,
        inputs: Inputs,
        results: Results,
        described: dict[str, Any],
        folder: paths.Path,
        params: dict[str, Any] | None,
    ) -> tuple[Results, dict[str, Any]]:
        """With how far the pictures move, see `robustness`."""
        assert self.prompts is not None and inputs.pictures is not None
        prompts = self.prompts

        def draw(name: str, perturbation: Perturbation) -> Folder:
            place = folder / "robustness" / name
            changed, turn = perturbation.prompts(prompts), perturbation.turn
            return self.draw(place, changed, self.count, params=params, turn=turn)

        tower = tower_of(inputs) or PixelTower()
        found = robustness.find(
            inputs.pictures,
            inputs.captions or (),
            draw,
            tower=tower,
            clip=inputs.clip,
            resamples=self.request.resamples,
            seed=self.request.seed,
        )
        metrics = {**results.metrics, **robustness.metrics(found)}
        tables = (*results.tables, robustness.table(found))
        described = {**described, "robustness": robustness.to_json(found, tower)}
        return dataclasses.replace(results, metrics=metrics, tables=tables), described

    def about(self) -> dict[str, Any]:
        """The first fields of metrics.json."""
        request, inputs = self.request, self.inputs
        drawn = self.prompts is not None or self.audit is not None
        look = self._look() if drawn else {}
        made_of = {
            name: {"name": tower.name, "digest": tower.digest}
            for name, tower in (("inception", inputs.inception), ("clip", inputs.clip))
            if tower is not None
        }
        return {
            "model": request.model or request.images,
            "step": self.loaded.step if self.loaded else None,
            "weights": request.weights if request.model else None,
            "lora": list(request.lora),
            **({"averaged_with": list(request.others)} if request.others else {}),
            **({"experts": list(request.experts)} if request.experts else {}),
            **request.steering(),
            "dataset": self.dataset,
            "split": self.split,
            "num_samples": len(inputs.pictures) if inputs.pictures is not None else self.count,
            "seed": request.seed,
            "sampler": {**look.pop("sampler", {}), **look},
            "settings": {
                "per_prompt": request.per_prompt if drawn else None,
                "batch_size": request.batch_size if drawn else None,
                "resamples": request.resamples,
                "features": request.features,
                "towers": made_of,
                "reference": request.reference,
                "reference_samples": len(inputs.reference) if inputs.reference else None,
                "train_samples": len(inputs.train) if inputs.train else None,
            },
        }
