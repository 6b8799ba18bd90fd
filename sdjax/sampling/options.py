"""The options of a command line about drawing, for every verb that draws."""

from __future__ import annotations

import argparse
from typing import Any

# Those of sdjax.diffusion.samplers, written out so that --help need not import JAX.
SAMPLER_NAMES = (
    "ddpm", "ddim", "pndm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc", "flow_euler",
)  # fmt: skip


def add_drawing_options(group: argparse._ArgumentGroup, *, own: str) -> None:
    """Add the options of the sampler and of its guidance.

    Args:
        own: whose values are taken where an option is not given, as "the model's own by default".
    """
    group.add_argument("--steps", type=int, help=f"sampler steps; {own}")
    group.add_argument("--sampler", choices=SAMPLER_NAMES, help=f"sampler; {own}")
    group.add_argument(
        "--karras", action=argparse.BooleanOptionalAction, default=None,
        help="noise levels of Karras et al. 2022",
    )  # fmt: skip
    group.add_argument("--eta", type=float, help="noise of ddim, 0 (none) to 1")
    group.add_argument(
        "--guidance", type=float,
        help=f"classifier-free guidance scale, 1 is none; {own}, which is 7.5 for SD1, SD2 and "
        "SDXL, 5 for SD3 and 1 for FLUX.1 if nothing says it",
    )  # fmt: skip
    group.add_argument(
        "--guidance_rescale", type=float,
        help=f"0 to 1, Lin et al. 2023, section 3.4; {own}",
    )  # fmt: skip
    group.add_argument("--negative_prompt", help="what guidance steers away from")
    group.add_argument(
        "--embedded_guidance", type=float,
        help=f"the guidance that FLUX.1-dev reads as a number; {own}, or 3.5",
    )  # fmt: skip
    group.add_argument(
        "--skip_layers", type=int, nargs="*", metavar="BLOCK",
        help="skip-layer guidance of SD3: leads away from the picture without these blocks while 1 "
        f"to 20 %% of the steps are done; 7 8 9 for SD3.5-medium; {own}",
    )  # fmt: skip
    group.add_argument("--skip_scale", type=float, help=f"its scale; {own}, or 2.8")


def sampler_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `SamplerConfig` that the options change."""
    given = {"name": args.sampler, "steps": args.steps, "karras": args.karras, "eta": args.eta}
    return {name: value for name, value in given.items() if value is not None}


def guidance_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options change of guidance, for `sampling.generate.drawing_of`."""
    names = ("guidance", "guidance_rescale", "embedded_guidance", "skip_layers", "skip_scale")
    given = {name: getattr(args, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}
