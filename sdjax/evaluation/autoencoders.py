"""An autoencoder judged by what it makes of held-out pictures, and by its latents.

    session = open_autoencoder(request, load(request.model), folder)
    results = session.run(folder)

Pictures are encoded to the means of their latents, decoded, and rounded to whole numbers, as files
have them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.data.pictures import SplitPictures, has_pictures, open_split, stretches
from sdjax.errors import UserError
from sdjax.evaluation import evaluation_output
from sdjax.evaluation.choice import AUTOENCODER_METRICS, check_names
from sdjax.evaluation.evaluation import FEW, Inputs, Results
from sdjax.evaluation.loading import Loaded, choose_data
from sdjax.evaluation.metrics import bootstrap, frechet, reconstruction
from sdjax.evaluation.reference import PixelTower, Tower
from sdjax.evaluation.request import Request, dataset_name, open_towers
from sdjax.families.beside.critics import LPIPS_NETWORK, with_critics
from sdjax.families.bind import bind
from sdjax.formats.vgg16 import read_lpips
from sdjax.models.lpips.network import LEAST_SIDE, LPIPSConfig
from sdjax.models.vae import VAEConfig
from sdjax.parallel.batches import batch_sharding
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.parallel.sharding import to_host
from sdjax.sampling.generate import check_finite
from sdjax.sampling.grids import grid, save_png
from sdjax.system import paths, progress

SHOWN = 18  # pairs of grid.png
_DIGITS = 5  # of the factors that latents imply


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """The moments of latents over pictures and positions, float64 [C]; of samples, not of means."""

    mean: np.ndarray
    std: np.ndarray

    def about(self, config: VAEConfig) -> dict[str, Any]:
        """Return the fields of metrics.json, with the factors that make them 0 and 1.

        `scaling_factor` is 1 / deviation over all channels (LDM, appendix G); with `shift_factor`,
        the mean, it is that of SD3 and FLUX.1.
        """
        shift = float(self.mean.mean())
        # The deviation over all channels: within each, and of their means.
        spread = float(np.sqrt(np.mean(self.std**2 + (self.mean - shift) ** 2)))
        return {
            "mean": [float(x) for x in self.mean],
            "std": [float(x) for x in self.std],
            "scaling_factor": float(f"{1 / spread:.{_DIGITS}g}"),
            "shift_factor": float(f"{shift:.{_DIGITS}g}"),
            "own": {"scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor},
        }


@dataclasses.dataclass(frozen=True, eq=False)
class AutoencoderSession:
    """An evaluation that is ready to run.

    names, left_out: metrics, and what is not computed and why.
    pictures: those that are reconstructed.
    tower: makes the features of rfid; None without it.
    """

    request: Request
    loaded: Loaded
    mesh: Mesh
    names: list[str]
    left_out: list[str]
    pictures: SplitPictures
    tower: Tower | None
    dataset: str
    split: str
    note: str = ""

    def run(self, folder: paths.PathLike) -> Results:
        """Evaluate, and write what was found into a folder.

        Raises:
            FloatingPointError: a picture has NaN pixels.
        """
        folder, request = paths.to_path(folder), self.request
        values: dict[str, list[np.ndarray]] = {}
        features: dict[str, list[np.ndarray]] = {"real": [], "made": []}
        shown: list[np.ndarray] = []
        for real, made, each in self._reconstructed():
            for name, value in each.items():
                values.setdefault(name, []).append(value)
            if self.tower is not None:
                features["real"].append(self.tower(real))
                features["made"].append(self.tower(made))
            if len(shown) < SHOWN:
                shown += [np.concatenate(pair, axis=1) for pair in zip(real, made, strict=True)]
        joined = {name: np.concatenate(parts) for name, parts in values.items()}
        resamples, seed = request.resamples, request.seed
        metrics = {}
        for name in (one for one in self.names if one in joined):
            better = AUTOENCODER_METRICS[name]
            metrics[name] = bootstrap.mean(
                joined[name], higher_is_better=better, resamples=resamples, seed=seed
            )
        if self.tower is not None:
            made, real = (np.concatenate(features[kind]) for kind in ("made", "real"))
            moments = frechet.moments(real)
            found = frechet.frechet(made, moments, resamples=resamples, seed=seed)
            metrics["rfid"] = dataclasses.replace(found, details={"features": self.tower.name})
        latents = _latents(joined["sum"], joined["squares"])
        described = self._about(latents)
        results = Results(
            metrics, {}, (*self._warnings(), *self.left_out), tables=(_table(described["latents"]),)
        )
        if jax.process_index() == 0:
            paths.make_folder(folder)
            evaluation_output.write(folder, described, Inputs(), results)
            save_png(folder / "grid.png", grid(np.stack(shown[:SHOWN]), [], columns=3))
        return results

    def _reconstructed(
        self,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
        """Stretches of pictures, what becomes of them, and numbers of each picture."""
        run, sharding = self._program(), batch_sharding(self.mesh)
        size = _whole(self.request.batch_size, self.mesh)
        with progress.work("reconstructing", len(self.pictures), unit="pictures") as work:
            for images in stretches(self.pictures):
                found: dict[str, list[np.ndarray]] = {}
                for start in range(0, len(images), size):
                    batch = images[start : start + size]
                    padding = [batch[-1:]] * (size - len(batch))
                    whole = np.concatenate([batch, *padding])
                    placed = jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
                    for name, value in run(placed).items():
                        found.setdefault(name, []).append(to_host(value)[: len(batch)])
                    work.advance(len(batch))
                joined = {name: np.concatenate(parts) for name, parts in found.items()}
                made = joined.pop("made")
                check_finite(made)
                yield images, made.astype(np.uint8), joined

    def _program(self) -> Callable[[jax.Array], dict[str, jax.Array]]:
        """Pictures, uint8 [B, H, W, 3] -> {name: [B, ...]}, with "made" in float32."""
        judged = "lpips" in self.names
        model = with_critics(
            self.loaded.found, lpips=LPIPSConfig() if judged else None, critic=None
        )
        networks = bind(model, ("vae", LPIPS_NETWORK), dtype=self.request.dtype)
        params = dict(self.loaded.found.params)
        if judged:
            params |= read_lpips(LPIPS_NETWORK, paths.to_path(self.request.lpips))
        whole = NamedSharding(self.mesh, P())
        placed = {
            path: jax.make_array_from_callback(value.shape, whole, value.__getitem__)
            for path, value in params.items()
            if path in networks.abstract
        }

        @jax.jit
        def run(params: Mapping[str, jax.Array], images: jax.Array) -> dict[str, jax.Array]:
            real = images.astype(jnp.float32)
            vae = networks.module("vae", params)
            mean, logvar = jnp.split(vae.encode(real / 127.5 - 1), 2, axis=-1)
            exact = (vae.decode(mean) + 1) * 127.5
            made = jnp.round(jnp.clip(exact, 0, 255))
            found = {"made": jnp.where(jnp.isfinite(exact), made, jnp.nan)}
            found["psnr"] = reconstruction.psnr(real, made)
            found["ssim"] = reconstruction.ssim(real, made)
            if judged:
                lpips = networks.module(LPIPS_NETWORK, params)
                found["lpips"] = lpips(made / 127.5 - 1, real / 127.5 - 1)
            found["sum"] = jnp.mean(mean, axis=(1, 2))  # [B, C]
            found["squares"] = jnp.mean(jnp.square(mean) + jnp.exp(logvar), axis=(1, 2))
            return found

        return lambda images: run(placed, images)

    def _about(self, latents: Latents) -> dict[str, Any]:
        """The first fields of metrics.json."""
        request, loaded = self.request, self.loaded
        return {
            "model": request.model,
            "step": loaded.step,
            "weights": request.weights if loaded.workdir is not None else None,
            "dataset": self.dataset,
            "split": self.split,
            "num_samples": len(self.pictures),
            "size": list(self.pictures.size),
            "latents": latents.about(loaded.found.vae),
            "settings": {
                "batch_size": request.batch_size,
                "resamples": request.resamples,
                "dtype": request.dtype,
                "lpips": request.lpips if "lpips" in self.names else None,
            },
        }

    def _warnings(self) -> list[str]:
        count = len(self.pictures)
        if self.tower is None or count >= FEW:
            return []
        return [
            f"rFID of {count} pictures is biased: compare it with that of as many of the same "
            f"pictures alone; {FEW} or more are wanted"
        ]


def _latents(sums: np.ndarray, squares: np.ndarray) -> Latents:
    """The moments of latents from each picture's means of them and of their squares, [N, C]."""
    mean = sums.astype(np.float64).mean(0)
    return Latents(mean, np.sqrt(squares.astype(np.float64).mean(0) - mean**2))


def _table(latents: Mapping[str, Any]) -> Any:
    """A table of rich: each channel, and what all imply."""
    from rich.table import Table

    number = evaluation_output.number
    implied = f"scaling_factor {latents['scaling_factor']}, shift_factor {latents['shift_factor']}"
    own = latents["own"]
    view = Table(
        title=f"latents: they imply {implied}; the model has {own['scaling_factor']:.5g} and "
        f"{own['shift_factor']:.5g}",
        title_justify="left",
    )
    for heading in ("channel", "mean", "deviation"):
        view.add_column(heading, justify="right")
    for i, (mean, std) in enumerate(zip(latents["mean"], latents["std"], strict=True)):
        view.add_row(str(i), number(mean), number(std))
    return view


def _whole(batch_size: int, mesh: Mesh) -> int:
    """The batch size, rounded up to a multiple of the devices."""
    return -(-batch_size // mesh.size) * mesh.size


def open_autoencoder(request: Request, loaded: Loaded) -> AutoencoderSession:
    """Make everything ready.

    Raises:
        UserError and its kin: naming the option, file or field that is wrong.
    """
    _check(request)
    data = choose_data(loaded.data, request.dataset, data_dir=request.data_dir)
    if data is None or not has_pictures(data):
        raise UserError(
            f"--model={request.model} needs pictures to make again; give --dataset=PATH of a "
            "folder of pictures, or the name of a dataset"
        )
    split = request.split or data.eval_split
    size = _size(request, loaded)
    pictures = open_split(data, split, size=size, count=request.num_samples)
    if len(pictures) < 2:
        raise UserError(f"{len(pictures)} pictures to judge; expected 2 or more: see --num_samples")
    mesh = make_mesh(MeshConfig())
    tower = _tower(request, mesh)
    names, left_out = _choose(request, tower)
    least = LEAST_SIDE if "lpips" in names else reconstruction.WINDOW
    if min(size) < least:
        raise UserError(f"pictures of {size[0]} x {size[1]} pixels; expected {least} or more")
    return AutoencoderSession(
        request=request, loaded=loaded, mesh=mesh, names=names, left_out=left_out,
        pictures=pictures, tower=tower if "rfid" in names else None, dataset=dataset_name(data),
        split=split,
    )  # fmt: skip


def _check(request: Request) -> None:
    """Raise a UserError if an option is for models that draw, or a metric is."""
    drawing = {
        "--images": request.images, "--audit": request.audit, "--lora": request.lora,
        "--negative_prompt": request.negative_prompt, "--embedding": request.embeddings,
        "--sampler, --steps or the like": request.sampler, "--guidance": request.guidance,
    }  # fmt: skip
    given = [name for name, value in drawing.items() if value]
    if given:
        raise UserError(
            f"{given[0]} is for a model that draws from prompts; --model={request.model} is an "
            "autoencoder"
        )
    check_names(request.metrics, tuple(AUTOENCODER_METRICS))


def _size(request: Request, loaded: Loaded) -> tuple[int, int]:
    """(height, width) of pictures: as asked, as trained, or as the VAE's config says."""
    config = loaded.found.vae
    if request.size is not None:
        size = request.size
    elif loaded.data is not None:
        size = (loaded.data.resolution, loaded.data.resolution)
    else:
        side = config.sample_size
        size = (side, side) if isinstance(side, int) else (side[0], side[1])
    if any(side % config.downscale for side in size):
        raise UserError(
            f"--height={size[0]} --width={size[1]}: the autoencoder halves pictures; expected "
            f"multiples of {config.downscale}"
        )
    return size


def _tower(request: Request, mesh: Mesh) -> Tower | None:
    """The network of rfid's features: as --features says, or Inception where it is given."""
    if request.features == "pixels":
        return PixelTower()
    if request.metrics and "rfid" not in request.metrics:
        return None
    # The metrics of models that draw, which take the same networks.
    like = "cmmd" if request.features == "clip" else "fid"
    found = open_towers(dataclasses.replace(request, metrics=(like,)), mesh)
    return found["clip"].images if "clip" in found else found.get("inception")


def _choose(request: Request, tower: Tower | None) -> tuple[list[str], list[str]]:
    """The metrics to compute, and lines about those left out and why."""
    needs = {}
    if not request.lpips:
        needs["lpips"] = (
            "the weights of VGG16: give --lpips=FILE, as torchvision's vgg16-397923af.pth"
        )
    if tower is None:
        needs["rfid"] = (
            "a network that makes features: give --inception=FILE, --download, --features=clip "
            "with --clip=DIR, or --features=pixels, which sees colours and little else"
        )
    asked: Sequence[str] = request.metrics or tuple(AUTOENCODER_METRICS)
    for name in request.metrics:
        if name in needs:
            raise UserError(f"--metrics={name}: this takes {needs[name]}")
    names = [name for name in asked if name not in needs]
    return names, [f"left out, {name}: takes {why}" for name, why in needs.items() if name in asked]
