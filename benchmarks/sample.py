"""How long a picture takes: seconds for one at a time, and pictures a second in batches.

    python benchmarks/sample.py --model=DIR                # a workdir, diffusers folder or one file
    python benchmarks/sample.py --model=FOLDER --torch     # against the pipeline of diffusers
    python benchmarks/sample.py --size=sd21 --batches=1,8  # random weights of benchmarks/sizes.py

From the tokens of a prompt to uint8 pictures on the host: text encoder, 20 steps of DDIM with
guidance (two evaluations of the UNet a step, as one batch), VAE decoder, by
`sdjax.sampling.generate` as `sdjax.sample` uses it. Compilation, once for each batch size, is
timed apart.

The peer, on request, is the pipeline of torch diffusers on the same diffusers folder, from the same
noise: in float32 its pictures have to be the same, or the script ends with exit code 1. On a GPU
both compute in bfloat16, and its UNet runs channels_last and under torch.compile. Random weights of
tiny and small go with the VAE that comes with sdjax, of the others with Stable Diffusion's. On a
busy machine see benchmarks/vs_torch.py about OMP_WAIT_POLICY.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Blocks, environment, in_turn, table, write_json
from sizes import SIZES

from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.references import TINY_VAE
from sdjax.diffusion.samplers import SamplerConfig
from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.errors import UserError
from sdjax.families import sd, sdxl
from sdjax.families.bind import bind
from sdjax.families.conditioning import blank_tokenizers, encode_text
from sdjax.families.config import ModelConfig
from sdjax.families.family import Model
from sdjax.families.registry import model_of
from sdjax.formats.folders import folder_kind
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.vae import VAEConfig
from sdjax.sampling import generate
from sdjax.system.allocator import use_large_pages

PROMPT, GUIDANCE, SEED = "a red circle", 7.5, 0
TOLERANCE = 0.02  # largest difference from torch's pixels, of [0, 1], in float32
OURS, THEIRS = "sdjax", "torch diffusers"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that can draw; side: of its pictures, in pixels."""

    model: Model
    dtype: str
    params: dict[str, jax.Array]
    side: int


def random_subject(size: str, dtype: str, resolution: int | None) -> Subject:
    """Networks of a size with their random weights; what they draw is noise."""
    unet, tokens = SIZES[size].unet, SIZES[size].tokens
    clip = CLIPTextConfig()
    if unet.cross_attention_dim == sd.CLIP_H.hidden_size:
        clip = sd.CLIP_H
    elif unet.cross_attention_dim != clip.hidden_size and not SIZES[size].pooled:
        clip = dataclasses.replace(
            clip,
            hidden_size=unet.cross_attention_dim,
            intermediate_size=4 * unet.cross_attention_dim,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokens,
        )
    group: ModelConfig = sd.SDConfig(unet=unet, text_encoder=clip)
    if SIZES[size].pooled:
        group = sdxl.SDXLConfig(unet=unet, text_encoder=clip)
    if size in ("tiny", "small"):
        shipped = TINY_VAE / "config.json"
        vae, _ = VAEConfig.from_json(json.loads(shipped.read_text()))
        group = dataclasses.replace(group, vae=vae)
    model = model_of(group, schedule=ScheduleConfig())
    model = dataclasses.replace(model, tokenizers=blank_tokenizers(model))
    # It runs once: LLVM's optimisations take longer than they save.
    once = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    params = jax.jit(bind(model).init, compiler_options=once)(jax.random.key(SEED))
    return Subject(model, dtype, params, resolution or model.native_size[0])


def read_subject(folder: str, dtype: str, resolution: int | None) -> Subject:
    """The model of a folder or file."""
    model = read_any(folder)
    if model.missing():
        raise SystemExit(f"error: --model={folder} lacks {', '.join(model.missing())}")
    params = {path: jnp.asarray(value) for path, value in model.params.items()}
    return Subject(model, dtype, params, resolution or model.native_size[0])


def our_drawer(
    subject: Subject, steps: int, batch: int
) -> tuple[Callable[[], np.ndarray], float, tuple[int, int, int]]:
    """(a call that draws a batch, uint8; seconds to compile it; (h, w, C) of its latents)."""
    sampler = SamplerConfig(name="ddim", steps=steps)
    drawing = generate.Drawing(sampler, GUIDANCE)
    drawer = generate.make_generator(subject.model, drawing, dtype=subject.dtype)
    shape = generate.latent_shape(subject.model, subject.side, subject.side)
    prompts = encode_text(subject.model.tokenizers, [PROMPT] * batch)
    negative = {
        field: rows[0] for field, rows in encode_text(subject.model.tokenizers, [""]).items()
    }
    compiled: list[Any] = []
    seconds = 0.0

    def through(*arguments: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        nonlocal seconds
        if not compiled:
            begin = time.perf_counter()
            compiled.append(drawer.lower(*arguments).compile())  # type: ignore[attr-defined]
            seconds = time.perf_counter() - begin
        return compiled[0](*arguments)

    def call() -> np.ndarray:
        images, _ = generate.draw(
            through, subject.params, prompts, negative, shape=shape, seed=SEED, batch_size=batch
        )
        return images

    call()
    return call, seconds, shape


def torch_pipeline(folder: str, dtype: str) -> Any:
    """The pipeline of a diffusers folder with its DDIM, on the device of torch."""
    try:
        import torch
        from torch_peer import import_diffusers, torch_device

        diffusers = import_diffusers()
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, torch_dtype=getattr(torch, dtype)
        )
    except ImportError as error:
        raise SystemExit(
            f"error: the peer cannot be imported ({error}); install it with "
            "pip install torch diffusers transformers accelerate"
        ) from error
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(torch_device())
    if torch_device() == "cuda":
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.unet = torch.compile(pipeline.unet)
    else:
        torch.set_num_threads(cores())
    return pipeline


def their_drawer(
    pipeline: Any, subject: Subject, steps: int, batch: int, shape: tuple[int, int, int]
) -> Callable[[], np.ndarray]:
    """A call that draws the same batch, float in [0, 1]."""
    import torch

    noise = np.asarray(generate.initial_latents(SEED, jnp.arange(batch), shape))
    latents = torch.tensor(noise.transpose(0, 3, 1, 2)).to(pipeline.device, pipeline.unet.dtype)

    def call() -> np.ndarray:
        return pipeline(
            [PROMPT] * batch,
            negative_prompt=[""] * batch,
            height=subject.side,
            width=subject.side,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            latents=latents,
            output_type="np",
        ).images

    return call


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every batch size; the result as it goes to the file."""
    read = read_subject if args.model else random_subject
    subject = read(args.model or args.size, args.dtype, args.resolution)
    pipeline = torch_pipeline(args.model, args.dtype) if args.torch else None
    rows = []
    for batch in args.batches:
        ours, seconds, shape = our_drawer(subject, args.steps, batch)
        row: dict[str, Any] = {"batch": batch, "compile_seconds": seconds}
        calls = {OURS: ours}
        if pipeline:
            calls[THEIRS] = their_drawer(pipeline, subject, args.steps, batch, shape)
            difference = float(np.abs(calls[THEIRS]() - ours() / 255).max())
            if args.dtype == "float32" and not difference <= TOLERANCE:
                raise SystemExit(
                    f"error: pictures of a batch of {batch} differ by {difference:.3f} of a "
                    f"pixel's range; expected at most {TOLERANCE} in float32; nothing was timed"
                )
            row["difference"] = difference
        taken = in_turn(calls, blocks=args.blocks, seconds=args.seconds)
        row["seconds"] = {name: blocks.json() for name, blocks in taken.items()}
        if pipeline:
            row["over_sdjax"] = taken[THEIRS].over(taken[OURS]).json()
        rows.append(row)
    return {
        "model": args.model or f"random weights of {args.size}",
        "side": subject.side,
        "steps": args.steps,
        "dtype": args.dtype,
        "rows": rows,
        "environment": environment("torch", "diffusers"),
    }


def show(result: dict[str, Any]) -> str:
    """The table of a result."""
    names = list(result["rows"][0]["seconds"])
    rows = []
    for row in result["rows"]:
        taken = [Blocks(tuple(row["seconds"][name]["blocks"])) for name in names]
        cells = [cell for b in taken for cell in (b.text(), f"{row['batch'] / b.median:.3g}")]
        if "over_sdjax" in row:
            cells.append(Blocks(tuple(row["over_sdjax"]["blocks"])).text())
        rows.append([row["batch"], *cells, f"{row['compile_seconds']:.1f}"])
    header = ["batch", *(head for name in names for head in (f"{name}: s a batch", "pictures/s"))]
    header += ["torch's time over sdjax's"] if len(names) > 1 else []
    where = result["environment"]
    heading = (
        f"{result['model']}, {result['side']} px, {result['steps']} steps of DDIM with guidance, "
        f"{result['dtype']}; {', '.join(where['devices'])}, {where['processor']}, "
        f"{where['cores']} cores, load {where['load']:.1f}; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    )
    return f"{heading}\n\n{table([*header, 'compilation, s'], rows)}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="workdir, diffusers folder or single file to draw with")
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="small",
        help="without --model: random weights of this size (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--torch", action="store_true", help="against torch's pipeline of the same diffusers folder"
    )
    parser.add_argument("--batches", default="1,4", help="pictures at once (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM (%(default)s)")
    parser.add_argument("--resolution", type=int, help="of the pictures; by default the model's")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="of matrix products and convolutions; by default float32 on a CPU, else bfloat16",
    )  # fmt: skip
    parser.add_argument("--blocks", type=int, default=5, help="rounds of timing (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of each block of a round (%(default)s)"
    )
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args(argv)
    try:
        args.batches = [int(number) for number in args.batches.split(",")]
    except ValueError:
        parser.error(f"--batches={args.batches}: expected numbers with commas between, as 1,4")
    for name, value in [("batches", min(args.batches)), *vars(args).items()]:
        if name in ("batches", "steps", "blocks", "resolution") and isinstance(value, int):
            if value < 1:
                parser.error(f"--{name}={value}: expected at least 1")
    if args.torch and (not args.model or folder_kind(Path(args.model)) != "diffusers"):  # type: ignore[arg-type]
        parser.error(
            "--torch reads a diffusers folder: give one with --model; python -m sdjax.convert "
            "--input=WORKDIR --output=FOLDER writes it"
        )
    on_cpu = jax.default_backend() == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    return args


def main(argv: list[str] | None = None) -> None:
    # JAX would take three quarters of a GPU's memory, and torch needs as much.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    args = parse(argv)
    try:
        result = measure(args)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(show(result))
    write_json(args.json, result)


if __name__ == "__main__":
    use_large_pages()  # as the trainer does
    main()
