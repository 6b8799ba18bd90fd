"""The options of a command line about drawing, for every verb that draws."""

from __future__ import annotations

import argparse
from typing import Any

from sdjax.errors import UserError

# Those of sdjax.diffusion.samplers, written out so that --help need not import JAX.
SAMPLER_NAMES = (
    "ddpm", "ddim", "pndm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc", "lcm",
    "flow_euler",
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
        "--image_guidance", type=float,
        help="guidance towards the picture that is edited, of models for that (InstructPix2Pix); "
        f"{own}, or 1.5",
    )  # fmt: skip
    group.add_argument(
        "--guidance_rescale", type=float,
        help=f"0 to 1, Lin et al. 2023, section 3.4; {own}",
    )  # fmt: skip
    group.add_argument("--negative_prompt", help="what guidance steers away from")
    group.add_argument(
        "--embedding", action="append", default=[], metavar="FILE[:WORD]",
        help="SD1, SD2 and SDXL: a word that was learnt (textual inversion), for prompts to use, "
        "or the workdir that learned it; WORD is by default the file's own, or else its name; may "
        "be given again",
    )  # fmt: skip
    group.add_argument(
        "--embedded_guidance", type=float,
        help="the guidance that FLUX.1-dev, and models distilled to few steps, read as a number; "
        f"{own}, or 3.5 for FLUX.1 and 8.5 for the others",
    )  # fmt: skip
    group.add_argument(
        "--skip_layers", type=int, nargs="*", metavar="BLOCK",
        help="skip-layer guidance of SD3: leads away from the picture without these blocks while 1 "
        f"to 20 %% of the steps are done; 7 8 9 for SD3.5-medium; {own}",
    )  # fmt: skip
    group.add_argument("--skip_scale", type=float, help=f"its scale; {own}, or 2.8")
    group.add_argument(
        "--max_sequence_length", type=int,
        help=f"tokens of T5, for SD3 and FLUX.1, which do not mask padding; {own}, or 256 for SD3 "
        "and 512 for FLUX.1",
    )  # fmt: skip


def add_run_options(group: argparse.ArgumentParser | argparse._ArgumentGroup, *, own: str) -> None:
    """Add the options of how pictures are computed, whatever they show.

    Args:
        own: see `add_drawing_options`.
    """
    group.add_argument("--seed", type=int, default=0, help="of the initial noise (%(default)s)")
    group.add_argument("--height", type=int, help=f"in pixels; {own}")
    group.add_argument("--width", type=int, help=f"in pixels; {own}")
    group.add_argument(
        "--batch_size", type=int, default=16,
        help="pictures at once; sdjax.evaluate spreads them over all devices, rounded up to a "
        "multiple of these (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--weights", default="ema",
        help="of a workdir: 'ema', 'raw', or the name of an average, as '0.9999' (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the computation (%(default)s)",
    )  # fmt: skip


def check_run(args: argparse.Namespace) -> None:
    """Check the options of `add_run_options`.

    Raises:
        UserError: one is out of its range.
    """
    for name, least in (("seed", 0), ("batch_size", 1), ("height", 1), ("width", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value}; expected {least} or more")


def add_model_options(p: argparse.ArgumentParser) -> None:
    """Add the options of models."""
    p.add_argument(
        "--model", required=True, action="append",
        help="workdir of sdjax, or a diffusers folder; given again, the mean of the predictions of "
        "models of one family, schedule, prediction type and latent space",
    )  # fmt: skip
    add_lora_option(p)
    add_expert_option(p)
    p.add_argument(
        "--refiner", metavar="DIR",
        help="SDXL: the model that takes the last steps, as SDXL's refiner",
    )  # fmt: skip
    p.add_argument(
        "--refiner_start", type=float,
        help="share of the way from noise to picture after which it does (0.8)",
    )  # fmt: skip


def add_expert_option(p: argparse.ArgumentParser) -> None:
    """Add the option of experts by noise level."""
    p.add_argument(
        "--expert", action="append", default=[], metavar="DIR[:FROM:TO]",
        help="an expert for some noise levels, which predicts there in place of --model: a workdir "
        "that was trained on an interval of the timesteps (objective.timestep_min and "
        "timestep_max), or any model with its interval from 0 (a picture) to 1 (noise); given "
        "again until the intervals cover 0 to 1, without a gap and without a level that two have",
    )  # fmt: skip


def add_lora_option(
    p: argparse.ArgumentParser | argparse._ArgumentGroup, purpose: str = "for --model"
) -> None:
    """Add the option of adapters that a model is given.

    Args:
        purpose: what is done with them.
    """
    p.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT][:lbw=W,W,...]",
        help=f"an adapter (LoRA, DoRA, LoHa, LoKr) {purpose}: a file of kohya's or diffusers' "
        "layout, its folder, or the workdir of a run that trained one; the weight is 1 where none "
        "is given; lbw: weights of the blocks of SD1 and SD2 (17 or 26), SDXL (12 or 20) or FLUX.1 "
        "(58 or 61), as in sd-webui-lora-block-weight; may be given again",
    )  # fmt: skip


def add_prompt_options(p: argparse.ArgumentParser) -> None:
    """Add the options of prompts."""
    p.add_argument(
        "--prompts", nargs="+", action="extend", default=[], metavar="PROMPT",
        help="a prompt, or several; may be given again",
    )  # fmt: skip
    p.add_argument("--prompts_file", metavar="FILE", help="text file with one prompt a line")
    add_syntax_option(p)


def add_syntax_option(p: argparse.ArgumentParser) -> None:
    """Add the option of how prompts are read."""
    p.add_argument(
        "--prompt_syntax", choices=("plain", "a1111"), default="plain",
        help="a1111: (word:1.3), ((word)) and [word] are weights, BREAK ends a chunk, and prompts "
        "may be long, as in the web UI of AUTOMATIC1111; for SD1, SD2 and SDXL (%(default)s)",
    )  # fmt: skip


def add_picture_options(p: argparse._ArgumentGroup) -> None:
    """Add the options of pictures to begin with."""
    p.add_argument(
        "--init_image", action="append", default=[], metavar="FILE",
        help="picture to begin with instead of noise (img2img), or to be edited by a model for "
        "that (InstructPix2Pix, FLUX.1-Kontext), resized to --height and --width; once for all "
        "prompts, or once for each",
    )  # fmt: skip
    p.add_argument(
        "--strength", type=float,
        help="share of the steps that are taken from it, above 0 to 1: 0 keeps the picture (0.8; "
        "with --mask_image 1, which begins with noise alone)",
    )  # fmt: skip
    p.add_argument(
        "--mask_image", action="append", default=[], metavar="FILE",
        help="of --init_image, what is white is drawn anew and what is black stays (inpainting); "
        "resized likewise; once for all prompts, or once for each",
    )  # fmt: skip


def add_network_options(p: argparse._ArgumentGroup) -> None:
    """Add the options of networks that steer a model."""
    p.add_argument(
        "--controlnet", "--t2i_adapter", action="append", default=[],
        metavar="DIR[:WEIGHT[:START:END]]",
        help="a ControlNet or a T2I-Adapter that steers the pictures: a folder of diffusers, whose "
        "config.json says which, a .safetensors file of a ControlNet, or a workdir of the method "
        "control or t2i_adapter; times WEIGHT (1), between these shares of the steps (0 and 1); "
        "given again, what they say is added up",
    )  # fmt: skip
    p.add_argument(
        "--ip_adapter", action="append", default=[], metavar="FILE[:WEIGHT[:START:END]]",
        help="an IP-Adapter that shows a picture to the model: a .safetensors or .bin file, or a "
        "workdir of the method ip_adapter; may be given again",
    )  # fmt: skip
    p.add_argument(
        "--image_encoder", default="", metavar="DIR",
        help="the CLIP image tower that --ip_adapter was trained with, a folder of transformers",
    )  # fmt: skip
    p.add_argument(
        "--guess_mode", action="store_true",
        help="ControlNets steer the prompts' half of guidance alone, coarse maps more than fine "
        "ones; for pictures without prompts, with --guidance 3 to 5",
    )  # fmt: skip


def add_condition_options(p: argparse._ArgumentGroup) -> None:
    """Add the options of the pictures that networks steer by."""
    p.add_argument(
        "--control_image", action="append", default=[], metavar="FILE",
        help="the condition of each --controlnet, resized to --height and --width: once for each "
        "of them, or once for each of them and prompt; without one, of a model that reads a "
        "condition itself (FLUX.1-Canny-dev, the method condition), once or once for each prompt",
    )  # fmt: skip
    p.add_argument(
        "--ip_image", action="append", default=[], metavar="FILE",
        help="the picture of each --ip_adapter: once for each of them, or once for each of them "
        "and prompt",
    )  # fmt: skip


def add_explaining_options(p: argparse._ArgumentGroup) -> None:
    """Add the options that show why pictures are as they are."""
    p.add_argument(
        "--explain", action="store_true",
        help="heat maps of the attention to each word (DAAM): NNNNN-words.png over the picture, "
        "NNNNN-words.npz as numbers",
    )  # fmt: skip
    p.add_argument(
        "--explain_layers", nargs="+", choices=("down", "mid", "up", "all"),
        help="parts of the UNet whose attention counts (down up, as in the paper)",
    )  # fmt: skip
    p.add_argument(
        "--explain_steps", metavar="FIRST:LAST",
        help="steps that count, as fractions of the way from noise to picture (0:1)",
    )  # fmt: skip
    p.add_argument(
        "--trajectory", nargs="?", type=int, const=0, metavar="N",
        help="NNNNN-steps.png and an animation: what the network takes the picture for at N steps, "
        "the last frame being the picture (8 where there are as many)",
    )  # fmt: skip
    p.add_argument(
        "--interpolate", type=int, metavar="K",
        help="K pictures on the way from each prompt to the next: NNNNN-between-KK.png, all in a "
        "row in NNNNN-way.png, and an animation",
    )  # fmt: skip
    p.add_argument(
        "--interpolate_seeds", type=int, metavar="SEED2",
        help="interpolate each prompt from --seed to this seed, and not from prompt to prompt",
    )  # fmt: skip
    p.add_argument(
        "--animation", choices=("webp", "png"), default="webp",
        help="format of animations, without loss in either (%(default)s)",
    )  # fmt: skip


def check_together(args: argparse.Namespace) -> None:
    """Check that the options of `sdjax.sample` go together.

    Raises:
        UserError: some do not.
    """
    interpolates = args.interpolate is not None
    if args.prompt_syntax != "plain" and (args.explain or interpolates):
        other = "--explain" if args.explain else "--interpolate"
        raise UserError(
            f"--prompt_syntax={args.prompt_syntax} does not go with {other}, which reads words as "
            "they stand; leave out one of them"
        )
    options = {
        "--init_image": args.init_image,
        "--refiner": args.refiner,
        "--expert": args.expert,
        "a second --model": args.model[1:],
        "--controlnet": args.controlnet,
        "--control_image": args.control_image,
        "--ip_adapter": args.ip_adapter,
    }
    for option, given in options.items():
        if given and interpolates:
            raise UserError(f"--interpolate does not go with {option}; leave out one of them")
    if args.explain and (args.model[1:] or args.expert):
        raise UserError(
            "--explain shows the attention of one model; give one --model, and no --expert"
        )
    if args.expert and (args.model[1:] or args.refiner):
        other = "--refiner" if args.refiner else "a second --model"
        raise UserError(f"--expert does not go with {other}; leave out one of them")
    if args.refiner_start is not None and args.refiner is None:
        raise UserError("--refiner_start is for --refiner=DIR; give that too, or leave it out")
    if args.same_noise and args.latents:
        raise UserError("--same_noise and --latents both say what to start from; give one of them")
    needed = {
        "explain_layers": "explain", "explain_steps": "explain", "interpolate_seeds": "interpolate",
    }  # fmt: skip
    for option, other in needed.items():
        given = getattr(args, other) is not None and getattr(args, other) is not False
        if getattr(args, option) is not None and not given:
            raise UserError(f"--{option} says how to --{other}; give that too, or leave it out")


def sampler_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `SamplerConfig` that the options change."""
    given = {"name": args.sampler, "steps": args.steps, "karras": args.karras, "eta": args.eta}
    return {name: value for name, value in given.items() if value is not None}


def guidance_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options change of guidance, for `sampling.generate.drawing_of`."""
    names = ("guidance", "image_guidance", "guidance_rescale", "embedded_guidance",
             "skip_layers", "skip_scale")  # fmt: skip
    given = {name: getattr(args, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}
