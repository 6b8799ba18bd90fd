"""Stable Diffusion compiled for TPU slices and GPUs: the yardstick for work on their speed.

    python benchmarks/tpu_compile.py --quick          # all, one after the other, as schedules
    python benchmarks/tpu_compile.py sd15 v5e-8       # those whose name has both words in it
    python benchmarks/tpu_compile.py --table          # compile nothing, print the tables

Each plan is `python -m sdjax.plan` with the flags printed beside its result; the answer goes to
docs/plans/NAME.json, and what has changed since the answer that was there is printed as a table.
No TPU or GPU is needed, and the same program always gives the same numbers. A whole compilation
takes some 35 minutes of processor time for each of v5p, and 60 for v6e, and 13 to 18 GB of memory;
with --quick 6 minutes and 6 GB; of stacked blocks (SD3.5, FLUX.1) under a minute and 2 GB. One for
GPUs takes 4 minutes and 4 GB, and JAX's plugin for CUDA.
What was compiled before is taken from the cache.

The peers, in MLPerf Training's "stable_diffusion" (SD2-base at 512 px with cached latents, which
saves the VAE's encoder): MaxDiffusion on v5p, 86.4 images/s/chip on 8 chips and 79.4 on 64 (4.1);
NVIDIA NeMo on 8 H100, 137.3 images/s/GPU (4.1), HPE on 8 H200, 149.6 (5.0).
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

PLANS = Path(__file__).parents[1] / "docs" / "plans"


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe on a slice.

    rows: images a chip computes at once. cached: latents and text were encoded ahead of training.
    """

    recipe: str
    chip: str
    shape: str
    chips: int
    fsdp: int
    rows: int
    cached: bool = False

    @property
    def name(self) -> str:
        chip = self.chip.removeprefix("gpu:")
        return f"{self.recipe}{'_cached' if self.cached else ''}_{chip}-{self.chips}"

    @property
    def is_gpu(self) -> bool:
        return self.chip.startswith("gpu:")

    @property
    def flags(self) -> list[str]:
        """Of `sdjax.plan`. The recipes take their data from a folder, which plans do not read."""
        cached = ["--config.data.name=encoded", "--config.data.text_embeddings=True"]
        return [
            f"--config=configs/{self.recipe}.py",
            f"--topology={self.chip}:{self.shape}",
            f"--config.mesh.fsdp={self.fsdp}",
            f"--config.data.batch_size={self.rows * self.chips}",
            *(cached if self.cached else ()),
        ]


# Eight images a chip: 2,048 on 256 chips, the batch of the recipes. Parameters, two moments and the
# average take 14 GB, which the 16 GB of a v5e have to split, over a host's chips or a whole row of
# the torus (a part of one has half the bandwidth); v5p and v6e leave them whole.
SLICES = (
    ("v5e", "2x4", 8, 8, 8),
    ("v5e", "16x16", 256, 16, 8),
    ("v6e", "2x4", 8, 1, 8),
    ("v6e", "16x16", 256, 1, 8),
    ("v5p", "2x2x2", 8, 1, 8),
    ("v5p", "4x8x8", 256, 1, 8),
)
CASES = [Case(recipe, *slice_) for recipe in ("sd15", "sd21_base") for slice_ in SLICES]
# As MLPerf's runs on v5p have it, at the largest batch of theirs a chip.
CASES += [
    Case("sd21_base", "v5p", shape, chips, 1, 32, cached=True)
    for shape, chips in (("2x2x1", 4), ("4x8x8", 256))
]
CASES += [Case(recipe, "gpu:h100", "8", 8, 1, 8) for recipe in ("sd15", "sd21_base")]
CASES.append(Case("sd21_base", "gpu:a100-80", "8", 8, 1, 8))
CASES += [
    Case("sd21_base", chip, shape, chips, 1, 32, cached=True)
    for chip, shape, chips in (("gpu:h100", "8", 8), ("gpu:h100", "4x8", 32), ("gpu:h200", "8", 8))
]
# Fine-tunes at 1024 px, encoded ahead: what their states need is split over a host's chips, or over
# more of the slice where that does not do. SD3.5-large is 2,432 wide, no multiple of 256.
FINE_TUNES = {
    "flux_dev_finetune": (
        ("v5e", "2x4", 8, 8, 1),
        ("v5e", "16x16", 256, 256, 4),
        ("v6e", "2x4", 8, 8, 1),
        ("v6e", "16x16", 256, 16, 4),
        ("v5p", "2x2x2", 8, 8, 4),
        ("v5p", "4x8x8", 256, 8, 4),
        ("gpu:h100", "8", 8, 8, 2),
        ("gpu:h100", "32x8", 256, 8, 2),
        ("gpu:h200", "8", 8, 8, 8),
        ("gpu:h200", "32x8", 256, 8, 8),
    ),
    "sd35_large_finetune": (
        ("v5e", "2x4", 8, 8, 1),
        ("v5e", "16x16", 256, 128, 2),
        ("v6e", "2x4", 8, 8, 1),
        ("v6e", "16x16", 256, 16, 4),
        ("v5p", "2x2x2", 8, 8, 1),
        ("v5p", "4x8x8", 256, 8, 4),
        ("gpu:h100", "8", 8, 8, 4),
        ("gpu:h100", "32x8", 256, 8, 4),
        ("gpu:h200", "8", 8, 8, 8),
        ("gpu:h200", "32x8", 256, 8, 8),
    ),
    "sd35_medium_finetune": (
        ("v5e", "2x4", 8, 8, 1),
        ("v5e", "16x16", 256, 16, 4),
        ("v6e", "2x4", 8, 8, 4),
        ("v6e", "16x16", 256, 16, 4),
        ("v5p", "2x2x2", 8, 1, 4),
        ("v5p", "4x8x8", 256, 1, 4),
        ("gpu:h100", "8", 8, 8, 4),
        ("gpu:h100", "32x8", 256, 8, 4),
        ("gpu:h200", "8", 8, 8, 8),
        ("gpu:h200", "32x8", 256, 8, 8),
    ),
}
CASES += [Case(name, *slice_, cached=True) for name, rows in FINE_TUNES.items() for slice_ in rows]


def main(words: list[str]) -> int:
    """Exit code 1 if a plan could not be made, 2 for an unknown option; `not fits` is a result."""
    if options := {word for word in words if word.startswith("-")} - {"--quick", "--table"}:
        print(__doc__)
        return 0 if options <= {"-h", "--help"} else 2
    wanted = [word for word in words if not word.startswith("--")]
    chosen = [case for case in CASES if all(word in case.name for word in wanted)]
    failed = 0
    PLANS.mkdir(parents=True, exist_ok=True)
    for case in chosen if "--table" not in words else ():
        file = PLANS / f"{case.name}.json"
        before = json.loads(file.read_text()) if file.is_file() else None
        quick = ["--quick"] if "--quick" in words else []
        command = [sys.executable, "-m", "sdjax.plan", *case.flags, *quick, f"--output={file}"]
        print(f"== {case.name}: python -m sdjax.plan {' '.join(command[3:-1])}", flush=True)
        if subprocess.run(command, check=False).returncode not in (0, 1):
            failed += 1
            continue
        plan = json.loads(file.read_text()) | {"flags": case.flags}
        file.write_text(json.dumps(plan, indent=2) + "\n")
        if before:
            print(changes(before, plan), flush=True)
    groups = {(case.recipe, case.cached): None for case in CASES}
    for recipe, cached in groups:
        group = [c for c in CASES if (c.recipe, c.cached) == (recipe, cached)]
        side = 1024 if recipe in FINE_TUNES else 512
        print(f"\n{recipe}, {side} px{', encoded ahead' if cached else ''}:\n\n{table(group)}")
    return int(failed > 0)


def changes(before: dict, after: dict) -> str:
    """Markdown: what a plan says now beside what it said."""
    if not (before["fits"] and after["fits"]):
        return f"fits: {before['fits']} before, {after['fits']} now"
    lines = ["| | before | now | ratio |", "| --- | --- | --- | --- |"]
    for (name, old), new in zip(numbers(before).items(), numbers(after).values(), strict=True):
        lines.append(f"| {name} | {old:.4g} | {new:.4g} | {new / old if old else 1:.3f} |")
    return "\n".join(lines)


def numbers(plan: dict) -> dict[str, float]:
    """What is compared of a plan."""
    time, memory = plan["time"], plan["memory"]
    return {
        "step, ms": time["step"] * 1e3,
        "XLA's operations, ms": time["operations"] * 1e3,
        "kernels, ms": time["kernels"] * 1e3,
        "bare collectives, ms": time["exposed"] * 1e3,
        "TFLOP a chip": plan["flops"] / 1e12,
        "traffic to HBM, GB": plan["hbm_bytes"] / 1e9,
        "memory, GiB": memory["total"] / 2**30,
        "temporaries, GiB": memory["classes"]["temporaries"] / 2**30,
    }


def table(cases: list[Case]) -> str:
    """Markdown of the plans that there are."""
    lines = [
        "| slice | mesh (data x fsdp x tensor) | batch | GiB a chip | step | collectives (bare) | "
        "images/s/chip | MFU | by | flags |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        file = PLANS / f"{case.name}.json"
        if file.is_file():
            lines.append(row(json.loads(file.read_text()), case))
    return "\n".join(lines)


def row(plan: dict, case: Case) -> str:
    """One plan, with the flags that it was made with, which the case may have no longer."""
    memory, flags = plan["memory"], " ".join(plan["flags"][2:])
    by = "schedule" if "without machine code" in plan["basis"] else "machine code"
    by = "schedule, assumed rates" if case.is_gpu else by
    start = (
        f"| {case.chip}:{case.shape} ({case.chips}) | {' x '.join(map(str, plan['mesh'].values()))}"
        f" | {plan['batch']['global']} | "
    )
    limit = f"of {memory['limit'] / 2**30:.1f}"
    if not plan["fits"]:
        needed = memory["needed"] or memory["total"]
        size = f"{needed / 2**30:.1f}" if needed else "more"
        return f"{start}does not fit: {size} {limit} | | | | | | `{flags}` |"
    took, speed = plan["time"], plan["images_per_second_per_chip"]
    return (
        f"{start}{memory['total'] / 2**30:.1f} {limit} | {took['step'] * 1e3:.0f} ms | "
        f"{took['collectives'] * 1e3:.0f} ms ({took['exposed'] * 1e3:.0f}) | "
        f"{speed:.{1 if speed >= 10 else 2}f} | {plan['mfu']:.1%} | {by} | `{flags}` |"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
