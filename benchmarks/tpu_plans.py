"""The tables of docs/scaling.md: Stable Diffusion planned for slices of 8 and 256 TPU chips.

    python benchmarks/tpu_plans.py                  # all twelve, one after the other
    python benchmarks/tpu_plans.py sd15 v5e-8       # those whose name has both words in it
    python benchmarks/tpu_plans.py --table          # compile nothing, print the tables

Each plan is `python -m sdjax.plan` with the flags printed beside its result; the answer goes to
docs/plans/NAME.json. The compiler takes some 20 minutes of processor time for each of v5p, and 48
for v6e, and 14 GB of memory. What it has compiled before it takes from its cache.

The peer: MaxDiffusion on v5p, 86.4 images/s/chip on 8 chips and 79.4 on 64 (MLPerf Training 4.1,
"stable_diffusion": SD2-base at 512 px with cached latents, which saves the VAE's encoder).
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
    """A recipe on a slice. rows: images a chip computes at once."""

    recipe: str
    chip: str
    shape: str
    chips: int
    fsdp: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.recipe}_{self.chip}-{self.chips}"

    @property
    def flags(self) -> list[str]:
        """Of `sdjax.plan`. The recipes take their data from a folder, which plans do not read."""
        return [
            f"--config=configs/{self.recipe}.py",
            f"--topology={self.chip}:{self.shape}",
            f"--config.mesh.fsdp={self.fsdp}",
            f"--config.data.batch_size={self.rows * self.chips}",
        ]


# Eight images a chip: 2,048 on 256 chips, the batch of the recipes. Parameters, two moments and the
# average take 14 GB, which the 16 GB of a v5e have to split; v5p and v6e leave them whole.
SLICES = (
    ("v5e", "2x4", 8, 8, 8),
    ("v5e", "16x16", 256, 8, 8),
    ("v6e", "2x4", 8, 1, 8),
    ("v6e", "16x16", 256, 1, 8),
    ("v5p", "2x2x2", 8, 1, 8),
    ("v5p", "4x8x8", 256, 1, 8),
)
CASES = [Case(recipe, *slice_) for recipe in ("sd15", "sd21_base") for slice_ in SLICES]


def main(words: list[str]) -> int:
    """Exit code 1 if a plan could not be made; what does not fit is a result."""
    wanted = [word for word in words if not word.startswith("--")]
    chosen = [case for case in CASES if all(word in case.name for word in wanted)]
    failed = 0
    PLANS.mkdir(parents=True, exist_ok=True)
    for case in chosen if "--table" not in words else ():
        command = [sys.executable, "-m", "sdjax.plan", *case.flags]
        command.append(f"--output={PLANS / case.name}.json")
        print(f"== {case.name}: python -m sdjax.plan {' '.join(case.flags)}", flush=True)
        failed += subprocess.run(command, check=False).returncode not in (0, 1)
    for recipe in dict.fromkeys(case.recipe for case in CASES):
        print(f"\n{recipe}, 512 px:\n\n{table([c for c in CASES if c.recipe == recipe])}")
    return int(failed > 0)


def table(cases: list[Case]) -> str:
    """Markdown of the plans that there are."""
    lines = [
        "| slice | mesh (data x fsdp x tensor) | batch | GiB a chip | step | collectives (bare) | "
        "images/s/chip | MFU | flags |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        file = PLANS / f"{case.name}.json"
        if file.is_file():
            lines.append(row(json.loads(file.read_text()), case))
    return "\n".join(lines)


def row(plan: dict, case: Case) -> str:
    """One plan."""
    memory, flags = plan["memory"], " ".join(case.flags[2:])
    start = (
        f"| {case.chip}:{case.shape} ({case.chips}) | {' x '.join(map(str, plan['mesh'].values()))}"
        f" | {plan['batch']['global']} | "
    )
    limit = f"of {memory['limit'] / 2**30:.1f}"
    if not plan["fits"]:
        needed = memory["needed"] or memory["total"]
        size = f"{needed / 2**30:.1f}" if needed else "more"
        return f"{start}does not fit: {size} {limit} | | | | | `{flags}` |"
    took = plan["time"]
    return (
        f"{start}{memory['total'] / 2**30:.1f} {limit} | {took['step'] * 1e3:.0f} ms | "
        f"{took['collectives'] * 1e3:.0f} ms ({took['exposed'] * 1e3:.0f}) | "
        f"{plan['images_per_second_per_chip']:.1f} | {plan['mfu']:.1%} | `{flags}` |"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
