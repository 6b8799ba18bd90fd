"""The options of `sdjax.evaluate`, apart from the model's and the output's."""

from __future__ import annotations

import argparse

from sdjax.sampling.options import add_drawing_options, add_network_options, add_run_options


def add_data_options(p: argparse.ArgumentParser) -> None:
    """Add the options of the dataset."""
    group = p.add_argument_group("the dataset")
    group.add_argument(
        "--dataset", default="",
        help="captions to draw and pictures to compare with: captioned_shapes, a TFDS name, or the "
        "path of a folder of pictures with captions, of tar shards, parquet files or what "
        "sdjax.prepare wrote; a run's own by default, which has to be `own` where the run's "
        "config.json names a folder for it: a model of somebody else may name any",
    )  # fmt: skip
    group.add_argument("--split", default="", help="of it; the recipe's data.eval_split by default")
    group.add_argument("--data_dir", default="", help="where prepared datasets lie")
    group.add_argument(
        "--reference", default="", metavar="FILE.npz|DIR",
        help="statistics of the pictures to compare with, as sdjax.evaluate or pytorch-fid wrote "
        "them; or the folder to keep them in and find them again "
        "(WORKDIR/evaluations/references, or OUTPUT/references)",
    )  # fmt: skip
    group.add_argument(
        "--reference_samples", type=int, help="how many pictures to compare with; all by default"
    )
    group.add_argument(
        "--train_samples", type=int, default=10_000,
        help="how many training pictures to look for copies of; 0 for none (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--validation_examples", type=int,
        help="of validation_loss, by default as many as in training (validation.examples); and of "
        "example_loss, by default all of the split",
    )  # fmt: skip


def add_judging_options(p: argparse.ArgumentParser) -> None:
    """Add the options of networks that judge."""
    group = p.add_argument_group("networks that judge; nothing is downloaded unless you say so")
    group.add_argument(
        "--inception", default="", metavar="FILE",
        help="pytorch-fid's weights, pt_inception-2015-12-05-6726825d.pth, from "
        "https://github.com/mseitzer/pytorch-fid/releases",
    )  # fmt: skip
    group.add_argument(
        "--clip", default="", metavar="DIR",
        help="folder of a CLIP as transformers saves it, such as "
        "https://huggingface.co/openai/clip-vit-large-patch14",
    )  # fmt: skip
    group.add_argument(
        "--lpips", default="", metavar="FILE",
        help="weights of VGG16, as torchvision's vgg16-397923af.pth, for autoencoders",
    )  # fmt: skip
    group.add_argument(
        "--download", action="store_true",
        help="fetch those that a metric needs and that are not there, into --inception and --clip, "
        "or ~/.cache/sdjax/towers (95 MB and 1.7 GB)",
    )  # fmt: skip
    group.add_argument(
        "--features", choices=("inception", "clip", "pixels"), default="",
        help="which features precision, recall, density, coverage, diversity and memorised go by; "
        "the first of inception and clip that is there, and pixels (16x16 averages, which see near "
        "copies and little else) for memorised alone",
    )  # fmt: skip


def add_picture_options(p: argparse.ArgumentParser) -> None:
    """Add the options of the pictures that are drawn."""
    own = "the run's, or the model's, own by default"
    group = p.add_argument_group("drawing")
    group.add_argument(
        "--num_samples", type=int,
        help="how many pictures; by default one for each caption of the split, at most 1000. FID "
        "wants thousands, and can be compared only with that of as many",
    )  # fmt: skip
    group.add_argument("--per_prompt", type=int, default=1, help="of each prompt (%(default)s)")
    group.add_argument("--step", type=int, help="of a workdir: which checkpoint; the newest")
    add_drawing_options(group, own=own)
    add_run_options(group, own=own)


def add_reading_options(p: argparse.ArgumentParser) -> None:
    """Add the options of what a model reads besides prompts."""
    group = p.add_argument_group(
        "what a model reads besides prompts", "the pictures of the examples whose captions are "
        "drawn (docs/evaluation.md)"
    )  # fmt: skip
    add_network_options(group)
    group.add_argument(
        "--named_image", action="append", default=[], metavar="NAME=KEY:KIND",
        help="where the dataset has a picture that the model reads, as control=edge:condition, "
        "control=canny:made (of the picture itself), before=source:picture or mask=matte:mask; by "
        "default where the run's own data.images says, or under its name; may be given again",
    )  # fmt: skip
