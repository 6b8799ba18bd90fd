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
# # Training on a TPU of Colab or Kaggle
#
# Choose a TPU runtime first: on Colab, Runtime > Change runtime type; on Kaggle, Settings > Accelerator.
# This notebook checks that JAX really sees it, trains the small model of `base` on all chips, and shows how fast that was.
# It has not been run on a TPU; a slow test runs it in small on CPUs.

# %% [markdown]
# ## Install
#
# A TPU runtime of Colab is a virtual machine with the chips attached; JAX finds them by itself with the extra `tpu`, and the old `jax.tools.colab_tpu` is no longer needed.
# TensorFlow is no longer preinstalled there; sdjax reads data with it, and pip installs it now.
# Restart the kernel if the installation changed a package that is already imported, and do not import jax here: a TPU belongs to one process, which is to be the training.
#
# sdjax has not been released yet: make a wheel in a clone (`python -m build --wheel`), upload it, and give its path as `SDJAX_WHEEL`.

# %%
import os

WHEEL = os.environ.get("SDJAX_WHEEL", "sdjax")
RUNS = os.environ.get("SDJAX_NOTEBOOK_RUNS", "runs")
ALLOW_CPU = os.environ.get("SDJAX_NOTEBOOK_ALLOW_CPU") == "1"  # to try the notebook itself
SMALL = os.environ.get("SDJAX_NOTEBOOK_SMALL") == "1"  # a few steps, to try the notebook itself

# %%
# %pip install --quiet "{WHEEL}[tpu]"

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

if platform != "tpu" and not ALLOW_CPU:
    raise RuntimeError(
        f"JAX sees {platform}, no TPU. Choose a TPU runtime, restart it, and run all cells again; "
        "without an error JAX would train on the CPU, a hundred times slower"
    )

# %% [markdown]
# ## Keep what comes out
#
# The disk of a notebook is gone with it.
# On Colab mount your Drive, and let `RUNS` be a folder there; `gs://BUCKET/FOLDER` works too, with the extra `gcs`.
#
#     from google.colab import drive
#     drive.mount("/content/drive")
#     RUNS = "/content/drive/MyDrive/runs"
#
# A runtime may be taken away at any time: the same command goes on from the last checkpoint.

# %% [markdown]
# ## Train on all chips
#
# The mesh is all devices by default, each with its share of the batch.
# Products are in bfloat16, which TPUs are made for; parameters, moments and averages stay in float32.
# The first step compiles, which takes a minute or two; the cache makes the next start short.

# %%
few = (
    "--config.data.shapes_train=64 --config.data.shapes_test=16 --config.data.batch_size=8 "
    "--config.model.unet.block_out_channels=(16,) --config.model.unet.norm_num_groups=4 "
    "--config.model.unet.down_block_types=('CrossAttnDownBlock2D',) --config.train.steps=4 "
    "--config.model.unet.up_block_types=('CrossAttnUpBlock2D',) "
    "--config.train.log_every=1 --config.train.sample_every=0 --config.validation.examples=0 "
    "--config.sample.fidelity=0 --config.sample.count=2 --config.sample.sampler.steps=2"
).split()
workdir = f"{RUNS}/tpu"
run(
    "main", "--config=base", f"--workdir={workdir}", "--config.model.dtype=bfloat16",
    *(few if SMALL else []),
)  # fmt: skip

# %% [markdown]
# ## How fast was it
#
# `images_per_second` leaves out compiling, checkpoints and pictures.
# `mfu` is the share of the chips' peak arithmetic: small here, since the model is; where it is low with a large model, look at `data_wait` first, the share of the time that went into waiting for data.

# %%
import json

rows = [json.loads(line) for line in open(f"{workdir}/metrics.jsonl")]
last = [row for row in rows if "train/images_per_second" in row][-1]
for name in ("train/images_per_second", "train/mfu", "train/data_wait", "device/memory_peak_gib"):
    if name in last:
        print(f"{name:26} {last[name]:.4g}")

# %% [markdown]
# ## Draw

# %%
from PIL import Image

steps = ["--steps=2"] if SMALL else []
run(
    "sample", f"--model={workdir}", f"--output={RUNS}/tpu_drawn", "--seed=3",
    "--prompts=a large red circle above a small blue square", *steps,
)  # fmt: skip
Image.open(f"{RUNS}/tpu_drawn/00000.png").resize((256, 256), Image.NEAREST)

# %% [markdown]
# ## Larger models
#
# `python -m sdjax.plan --quick --config=sd21_base --topology=v5e:2x4` says whether a recipe fits a TPU and how fast it should be, before you pay for one.
# [docs/scaling.md](../docs/scaling.md) goes on from one host to a slice.
