"""The training step of sdjax against torch diffusers: same UNet, weights, batch and optimizer.

    python benchmarks/vs_torch.py                           # small, float32, torch eager
    python benchmarks/vs_torch.py --compile                 # and torch.compile
    python benchmarks/vs_torch.py --size=sd21 --batch=32    # on a GPU: bfloat16, torch.compile too

The peer is diffusers' `UNet2DConditionModel`, trained as its train_text_to_image.py does,
parameters in float32, on a GPU computed under bfloat16 autocast, scaled-dot-product attention,
gradients clipped to norm 1, AdamW. It gets what makes it faster beyond that: fused AdamW, and on a
GPU channels_last, TF32, cuDNN's choice of algorithms, and torch.compile beside eager. sdjax runs
the step of its training loop, which also computes norms per module and guards against NaN; neither
keeps an average.

The loss is the squared error of the predicted noise, on one batch with its noise, timesteps and
text features drawn beforehand. First the losses and gradient norms of the first steps are compared,
and if they differ the script ends there with exit code 1. Then the steps are timed in turn, and the
ratio is taken round by round. All are told to use every core, or --threads of them.

torch's threads wait for one another without sleeping. Where other programs want the cores too, that
made it up to forty times slower: set OMP_WAIT_POLICY=passive there, and believe the ratio less.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from sizes import SIZES

from sdjax.system.allocator import use_large_pages

if TYPE_CHECKING:
    from torch_peer import Torch

CHECKED_STEPS = 3
# Relative, of loss and gradient norm. TF32 and bfloat16 keep 11 and 8 bits of a number.
TOLERANCES = {"exact": 1e-4, "tf32": 5e-3, "bfloat16": 2e-2}
OURS, EAGER, COMPILED = "sdjax", "torch eager", "torch compile"


class Sdjax:
    """The jitted, donated train step of sdjax, on the first device."""

    def __init__(self, args: argparse.Namespace, batch: dict[str, np.ndarray]):
        import jax
        import jax.numpy as jnp
        from torch_peer import CLIP_NORM, LEARNING_RATE, WEIGHT_DECAY

        from sdjax.methods.method import Phase
        from sdjax.models import placement, weights
        from sdjax.models.params import component, prefixed
        from sdjax.models.unet import UNet
        from sdjax.optim.optimizers import OptimConfig, make_optimizer
        from sdjax.parallel.activations import Activations
        from sdjax.parallel.mesh import MeshConfig, make_mesh
        from sdjax.train.state import Optimization
        from sdjax.train.step import make_train_step

        config = SIZES[args.size].unet
        graph, abstract = weights.abstract(UNet, config, dtype=jnp.dtype(args.dtype))
        self._abstract = prefixed(abstract, "unet")
        optim = OptimConfig(
            learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM
        )

        def loss(params, frozen, averages, batch, draw):
            context: Any = batch["context"]
            if "pooled" in batch:
                context = {name: batch[name] for name in ("context", "pooled")}
                context["numbers"] = batch["time_ids"]
            unet = weights.merge(graph, component(params, "unet"))
            errors = jnp.square(unet(batch["xt"], batch["timesteps"], context) - batch["eps"])
            per_example = errors.mean((1, 2, 3))
            return per_example, {"loss": per_example, "timesteps": batch["timesteps"]}

        phase = Phase("main", loss, lambda path: True)
        optimizer = make_optimizer(optim, 1000, self._abstract)
        self._optimizations = (Optimization(phase, optimizer, frozenset(self._abstract)),)
        step = make_train_step(
            self._optimizations,
            positions=np.arange(args.batch, dtype=np.int32),
            seed=0,
            accumulation=1,
            buckets=4,
            num_timesteps=1000,
        )
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        activations = Activations(mesh, jax.devices()[0].platform)

        def on_mesh(state, frozen, batch):
            with placement.placed(activations):
                return step(state, frozen, batch)

        self._batch = {name: jnp.asarray(value) for name, value in batch.items()}
        begin = time.perf_counter()
        shapes = jax.eval_shape(self._fresh, self._abstract)
        lowered = jax.jit(on_mesh, donate_argnums=0).lower(shapes, {}, self._batch)
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin

    def _fresh(self, params: dict[str, Any]) -> dict[str, Any]:
        from sdjax.optim.ema import EMAConfig
        from sdjax.train.state import init_state

        return init_state(params, self._optimizations, EMAConfig(profiles=()))

    def restart(self, tensors: dict[str, np.ndarray]) -> None:
        """Begin with these weights, which are torch's."""
        import jax

        from sdjax.models import weights
        from sdjax.models.params import component, prefixed

        params = weights.from_diffusers(tensors, component(self._abstract, "unet"))
        self._state = jax.jit(self._fresh)(prefixed(params, "unet"))

    def step(self) -> tuple[Any, Any]:
        """One optimizer step: (loss, gradient norm), perhaps still to be computed."""
        self._state, metrics = self._step(self._state, {}, self._batch)
        return metrics["loss"], metrics["grad_norm"]

    def wait(self) -> None:
        """Until all steps are done."""
        import jax

        jax.block_until_ready(self._state)


def make_batch(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Latents with noise and the noise [B, H, W, C], timesteps [B], text features [B, L, D]; ..."""
    from sdjax.diffusion.prediction import add_noise
    from sdjax.diffusion.schedules import ScheduleConfig, make_schedule, schedule_at

    size, rng = SIZES[args.size], np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((args.batch, *shape), np.float32)

    latents = (args.latents, args.latents, size.unet.in_channels)
    x0, eps = draw(*latents), draw(*latents)
    t = rng.integers(0, 1000, args.batch).astype(np.float32)
    alpha, sigma = schedule_at(make_schedule(ScheduleConfig()), t)
    batch = {
        "xt": np.asarray(add_noise(x0, eps, alpha, sigma)),
        "eps": eps,
        "timesteps": t,
        "context": draw(size.tokens, size.unet.cross_attention_dim),
    }
    if size.pooled:
        side = float(args.latents * 8)
        ids = np.array([side, side, 0, 0, side, side], np.float32)
        batch |= {"pooled": draw(size.pooled), "time_ids": np.tile(ids, (args.batch, 1))}
    return batch


def first_steps(contender: Sdjax | Torch, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Losses and gradient norms from these weights on, and the seconds of the first step."""
    contender.restart(tensors)
    begin = time.perf_counter()
    taken = [tuple(float(x) for x in contender.step())]
    first = time.perf_counter() - begin
    taken += [tuple(float(x) for x in contender.step()) for _ in range(CHECKED_STEPS - 1)]
    loss, norm = zip(*taken, strict=True)
    return {"loss": loss, "grad_norm": norm, "first_step_seconds": first}


def compare(found: dict[str, dict[str, Any]], tolerance: float) -> float:
    """The largest relative difference of any loss or gradient norm from sdjax's.

    Raises:
        SystemExit: it is above the tolerance, or not a number.
    """
    worst = 0.0
    for name, theirs in found.items():
        for what in ("loss", "grad_norm"):
            ours, other = np.array(found[OURS][what]), np.array(theirs[what])
            difference = np.abs(ours - other) / np.abs(other)
            if not (difference <= tolerance).all():
                raise SystemExit(
                    f"error: {what} of the first steps is {list(ours)} with sdjax and "
                    f"{list(other)} with {name}, relative differences {difference.max():.2g} where "
                    f"at most {tolerance} was expected; nothing was timed"
                )
            worst = max(worst, float(difference.max()))
    return worst


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="small",
        help="UNet of benchmarks/sizes.py; small is SD1.5 at a fifth of its width (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=2, help="images a step (%(default)s)")
    parser.add_argument(
        "--latents", type=int, help="side of the latents; by default the size's own"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="of matrix products and convolutions; by default bfloat16 on a GPU, else float32",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true", default=None,
        help="time torch.compile too; on a GPU it always is",
    )  # fmt: skip
    parser.add_argument(
        "--channels_last", action=argparse.BooleanOptionalAction,
        help="memory format of torch's model; by default channels_last on a GPU alone",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="cores that both may use; by default all")
    parser.add_argument("--blocks", type=int, default=7, help="rounds of timing (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of each block of a round (%(default)s)"
    )
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args(argv)
    for name in ("batch", "blocks", "threads", "latents"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value}: expected at least 1")
    args.latents = args.latents or SIZES[args.size].unet.sample_size
    return args


def limit_threads(count: int | None) -> int:
    """Keep this process to so many cores, before torch and JAX count them; returns how many."""
    if count and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if count > len(cores):
            raise SystemExit(f"error: --threads={count}: expected at most {len(cores)}, the cores")
        os.sched_setaffinity(0, cores[:count])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Compare, then time; the result as it goes to the file."""
    import torch
    from measure import environment, in_turn
    from torch_peer import Torch, make_model, torch_device

    torch.set_num_threads(threads)
    on_gpu = torch_device() == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.compile = on_gpu if args.compile is None else args.compile
    args.channels_last = on_gpu if args.channels_last is None else args.channels_last
    model, batch = make_model(args), make_batch(args)
    tensors = {name: t.detach().cpu().numpy().copy() for name, t in model.state_dict().items()}
    contenders: dict[str, Sdjax | Torch] = {
        EAGER: Torch(args, batch, model, compiled=False),
        **({COMPILED: Torch(args, batch, model, compiled=True)} if args.compile else {}),
        OURS: Sdjax(args, batch),
    }
    found = {name: first_steps(each, tensors) for name, each in contenders.items()}
    exactness = args.dtype if args.dtype == "bfloat16" else "tf32" if on_gpu else "exact"
    difference = compare(found, TOLERANCES[exactness])
    if os.getloadavg()[0] > threads and "OMP_WAIT_POLICY" not in os.environ:
        print("note: other programs run here; see above about OMP_WAIT_POLICY (--help)\n")
    print(
        f"The first {CHECKED_STEPS} losses and gradient norms agree: they differ by "
        f"{difference:.1e} at most, relative; {TOLERANCES[exactness]:.0e} is allowed.\n"
    )
    steps = 10 if on_gpu else 1  # a call waits for its last step, which costs a GPU time

    def call(contender: Sdjax | Torch) -> None:
        for _ in range(steps):
            contender.step()
        contender.wait()

    blocks = in_turn(
        {name: lambda each=each: call(each) for name, each in contenders.items()},
        blocks=args.blocks,
        seconds=args.seconds,
    )
    for name in found:
        found[name]["seconds"] = {
            key: [x / steps for x in v] if key == "blocks" else v / steps
            for key, v in blocks[name].json().items()
        }
        found[name]["over_sdjax"] = blocks[name].over(blocks[OURS]).json()
    found[OURS]["compile_seconds"] = contenders[OURS].compile_seconds  # type: ignore[union-attr]
    return {
        "size": args.size,
        "parameters": sum(v.size for v in tensors.values()),
        "batch": args.batch,
        "latents": args.latents,
        "dtype": args.dtype,
        "threads": threads,
        "torch_threads": torch.get_num_threads(),
        "channels_last": args.channels_last,
        "difference": difference,
        "tolerance": TOLERANCES[exactness],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "contenders": found,
        "environment": environment("torch", "diffusers"),
    }


def show(result: dict[str, Any]) -> str:
    """The tables of a result."""
    from measure import Blocks, table

    found = result["contenders"]
    first = table(
        ["step", *(f"{what}, {name}" for what in ("loss", "norm") for name in found)],
        [
            [i + 1]
            + [f"{found[name][what][i]:.6f}" for what in ("loss", "grad_norm") for name in found]
            for i in range(CHECKED_STEPS)
        ],
    )
    rows = []
    for name, of in found.items():
        seconds, ratio = Blocks(tuple(of["seconds"]["blocks"])), of["over_sdjax"]["blocks"]
        rows.append(
            [
                name,
                seconds.text(),
                f"{result['batch'] / seconds.median:.3g}",
                "1" if name == OURS else Blocks(tuple(ratio)).text(),
                f"{of.get('compile_seconds', of['first_step_seconds']):.1f}",
            ]
        )
    where = result["environment"]
    heading = (
        f"{result['size']}: {result['parameters']:,} parameters, batch {result['batch']}, latents "
        f"{result['latents']} x {result['latents']}, {result['dtype']}; {result['threads']} cores, "
        f"{result['torch_threads']} threads of torch, channels_last: {result['channels_last']}\n"
        f"{', '.join(where['devices'])}; {where['processor']}, load {where['load']:.1f}; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    )
    header = ["", "s a step", "images/s", "time over sdjax's", "compilation or first step, s"]
    return f"{first}\n\n{heading}\n\n{table(header, rows)}"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    threads = limit_threads(args.threads)
    # JAX would take three quarters of a GPU's memory, and torch needs as much.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            "error: the peer is torch with diffusers, and torch is not installed; "
            "pip install torch diffusers accelerate"
        ) from error
    from measure import write_json

    result = measure(args, threads)
    print(show(result))
    write_json(args.json, result)


if __name__ == "__main__":
    use_large_pages()  # as the trainer does
    main()
