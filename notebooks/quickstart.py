# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A text-to-image model from nothing
#
# This notebook trains a small diffusion model on pictures of coloured shapes that it makes itself, draws with it, and shows where each word went.
# On two CPU cores the training takes 12 to 32 minutes; a GPU or TPU is used where there is one.
# It downloads nothing but packages.

# %% [markdown]
# ## Install
#
# sdjax has not been released yet: make a wheel in a clone (`python -m build --wheel`), upload it, and give its path as `SDJAX_WHEEL`.
# With a GPU, ask for the extra `cuda12` or `cuda13` (`{WHEEL}[cuda13]`).
# Restart the kernel if the installation changed a package that is already imported.

# %%
import os

WHEEL = os.environ.get("SDJAX_WHEEL", "sdjax")
RUNS = os.environ.get("SDJAX_NOTEBOOK_RUNS", "runs")
SMALL = os.environ.get("SDJAX_NOTEBOOK_SMALL") == "1"  # a few steps, to try the notebook itself

# %%
# %pip install --quiet "{WHEEL}"

# %% [markdown]
# ## What it runs on
#
# JAX falls back to the CPU without an error where it cannot use an accelerator, so look.
# A process of its own asks: a TPU belongs to one process at a time, and the training is another.

# %%
import shlex
import subprocess
import sys


def run(verb, *options):
    """Run `python -m sdjax.VERB`, and show its lines as they come."""
    print("$ python -m", shlex.join([f"sdjax.{verb}", *options]))
    command = [sys.executable, "-m", f"sdjax.{verb}", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="")
    if process.returncode:
        raise RuntimeError(f"sdjax.{verb} ended with {process.returncode}; its lines say why")


ASK = "import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind, sep='|')"
answer = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
platform, count, kind = answer.stdout.strip().splitlines()[-1].split("|")
print(f"{count} device(s): {platform}, {kind}")

# %% [markdown]
# ## Train
#
# `base` is a recipe that comes with sdjax: it generates 64 px pictures with captions, trains a CLIP-style text encoder and a UNet on the latents of a small VAE that is shipped, and reads its own pictures back to check them.
# Each `--config.FIELD=VALUE` changes a field of the recipe.
# The same command again goes on from the last checkpoint.

# %%
few = (
    "--config.data.shapes_train=64 --config.data.shapes_test=16 --config.data.batch_size=8 "
    "--config.model.unet.block_out_channels=(16,) --config.model.unet.norm_num_groups=4 "
    "--config.model.unet.down_block_types=('CrossAttnDownBlock2D',) --config.train.steps=4 "
    "--config.model.unet.up_block_types=('CrossAttnUpBlock2D',) "
    "--config.train.log_every=1 --config.train.sample_every=0 --config.validation.examples=0 "
    "--config.sample.fidelity=0 --config.sample.count=2 --config.sample.sampler.steps=2"
).split()
workdir = f"{RUNS}/base"
run("main", "--config=base", f"--workdir={workdir}", *(few if SMALL else []))

# %% [markdown]
# ## What it learned
#
# `metrics.jsonl` has a line for every 50 steps.
# The training loss is noisy, since each example is given a random amount of noise; the loss on held-out pictures is taken at fixed amounts.

# %%
import json

import matplotlib.pyplot as plt

rows = [json.loads(line) for line in open(f"{workdir}/metrics.jsonl")]
for name in ("train/loss", "validation/warmup-0.999/loss"):
    points = [(row["step"], float(row[name])) for row in rows if name in row]
    if points:
        plt.plot(*zip(*points, strict=True), label=name)
plt.xlabel("step")
plt.ylabel("loss")
plt.yscale("log")
plt.legend()
plt.show()

# %% [markdown]
# Pictures of the same prompts and the same noise, at each time that it drew some:

# %%
from pathlib import Path

from PIL import Image

Image.open(sorted(Path(workdir, "samples").glob("0*.png"))[-1])

# %% [markdown]
# ## Draw
#
# The words that it knows are those of its captions: sizes, colours, places, and the shapes circle, square, triangle and cross.
# The same seed gives the same picture again.

# %%
prompts = [
    "a large red circle above a small blue square",
    "a small green triangle to the left of a large yellow cross",
]
steps = ["--steps=2"] if SMALL else []
run(
    "sample", f"--model={workdir}", f"--output={RUNS}/drawn", "--seed=3", "--explain",
    "--prompts", *prompts, *steps,
)  # fmt: skip

# %%
Image.open(f"{RUNS}/drawn/00000.png").resize((256, 256), Image.NEAREST)

# %% [markdown]
# ## Where each word went
#
# `--explain` sums what each place of the picture attended to, over layers and steps (DAAM): one tile a word, dark red where it was looked at most.
# It shows where the network looked, not what it did there.

# %%
Image.open(f"{RUNS}/drawn/00000-words.png")

# %% [markdown]
# ## Next
#
# - `finetune_lora.ipynb` teaches a model your own pictures.
# - `tpu.ipynb` runs on a TPU of Colab or Kaggle.
# - In the workdir, `report.html` has curves, pictures and numbers on one page, and `diffusers` is a folder that `StableDiffusionPipeline` loads.
