"""The options of `sdjax.convert` that only some inputs, or outputs, have."""

from __future__ import annotations

import argparse

from sdjax.sampling.options import add_lora_option

# {option: the only kind of input that it is for}.
INPUT_OPTIONS = {
    "variant": "diffusers",
    "step": "workdir",
    "ema_length": "workdir",
    "tokenizer": "single_file",
    "config_from": "single_file",
    "prediction_type": "single_file",
    "zero_terminal_snr": "single_file",
    "scaling_factor": "single_file",
    "shift_factor": "single_file",
}


def add_file_options(p: argparse.ArgumentParser) -> None:
    """Add the options that belong to one kind of input or output."""
    p.add_argument("--step", type=int, help="of a workdir: which checkpoint; the newest by default")
    p.add_argument(
        "--variant", default="",
        help="of a diffusers folder to read: which of its weights, as 'fp16' or 'non_ema'",
    )  # fmt: skip
    p.add_argument(
        "--max_shard_size",
        help="of a file of weights in a diffusers folder to write, as 5GB or 500MB; a network that "
        "is larger is spread over several (10GB, and 5GB of a text encoder)",
    )
    single = p.add_argument_group("of a single file to read, which does not say everything")
    single.add_argument(
        "--tokenizer", default="",
        help="folder with CLIP's vocab.json and merges.txt, as the tokenizer/ of a pipeline",
    )  # fmt: skip
    single.add_argument(
        "--config_from", default="",
        help="diffusers folder or workdir whose configs, schedule and tokenizers are also those of "
        "the file, for models of another shape than the releases; its weights are not read",
    )  # fmt: skip
    single.add_argument(
        "--prediction_type", choices=("epsilon", "v_prediction"), default="",
        help="what the UNet predicts, for Stable Diffusion 2 and fine-tuned others",
    )  # fmt: skip
    single.add_argument(
        "--zero_terminal_snr", action="store_true", default=None,
        help="its noise schedule ends in pure noise, as the mark ztsnr says",
    )  # fmt: skip
    latents = "of the latents of an autoencoder that is alone"
    single.add_argument("--scaling_factor", type=float, help=f"{latents}, as a release has it")
    single.add_argument("--shift_factor", type=float, help=f"{latents}; by default the release's")


def add_average_options(p: argparse.ArgumentParser) -> None:
    """Add the options that make one model of several."""
    group = p.add_argument_group("a mean in place of one model")
    group.add_argument(
        "--average", nargs="+", metavar="STEP|last:N|DIR",
        help="mean of the weights of several models: steps of checkpoints of --input, as 8000 9000 "
        "10000, or its newest, as last:5; or, without --input, anything that --input can be",
    )  # fmt: skip
    group.add_argument(
        "--average_weights", nargs="+", type=float, metavar="W",
        help="how much each of them counts, as 1 1 2; equal by default",
    )  # fmt: skip
    group.add_argument(
        "--ema_length", type=float, metavar="WIDTH",
        help="of a workdir with EMA snapshots (ema.snapshot_every): the average of this relative "
        "width, as 0.07, at its newest snapshot or at --step; `sdjax.evaluate --ema_lengths` finds "
        "the best",
    )  # fmt: skip


def add_adapter_options(p: argparse.ArgumentParser) -> None:
    """Add the options of adapters: LoRA, DoRA, LoHa, LoKr."""
    group = p.add_argument_group("adapters, as LoRA, DoRA, LoHa and LoKr")
    add_lora_option(group, "that is merged into what is written")
    group.add_argument(
        "--format", choices=("kohya", "diffusers"), default="",
        help="write an adapter, as A1111 and ComfyUI or as diffusers read it; --input is one, or "
        "the workdir of a run that trained one",
    )  # fmt: skip
    group.add_argument(
        "--base", default="", metavar="MODEL",
        help="model that the adapter of --input changes, where its names and shapes are those of "
        "no release; with --extract_lora, the model that --input was made of",
    )  # fmt: skip
    group.add_argument(
        "--extract_lora", type=int, metavar="RANK",
        help="write the difference between --input and --base as a LoRA of this rank",
    )  # fmt: skip
    group.add_argument(
        "--lora_rank", type=int, metavar="RANK",
        help="with --format: bring the adapter to this rank by its largest singular values",
    )  # fmt: skip
    group.add_argument(
        "--lora_dynamic", default="", metavar="RULE:NUMBER",
        help="with --format: a rank of its own for each module, up to --lora_rank, as kohya's "
        "resize_lora.py: sv_fro:0.9 keeps this share of the norm, sv_cumulative:0.9 of the sum of "
        "singular values, sv_ratio:10 those above a tenth of the largest",
    )  # fmt: skip
