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
# # A LoRA from your own pictures
#
# This notebook teaches Stable Diffusion 1.5 a subject or a style from some 20 pictures, draws with it, and leaves two files: one for diffusers, one for A1111, Forge and ComfyUI.
# It takes a GPU of 16 GB or a TPU.
# It has not been run with SD 1.5 itself; a slow test runs it in small, on a tiny model.

# %% [markdown]
# ## Install, and say what to train on
#
# - `WHEEL`: sdjax has not been released yet: make a wheel in a clone (`python -m build --wheel`), upload it, and give its path as `SDJAX_WHEEL`.
# - `PICTURES`: a folder with pictures and captions side by side, `cat.png` and `cat.txt`; upload yours there.
#   Name what is new by a rare word, and say the rest in usual ones: "a photo of an ohwx cat on a sofa".
# - `MODEL`: a repository of the Hugging Face hub, a diffusers folder, a single file, or a workdir of sdjax.
# - `RECIPE`: goes with the model: `sd15_lora`, `sdxl_lora`, `sd35_lora`, `flux_lora`.

# %%
import os

WHEEL = os.environ.get("SDJAX_WHEEL", "sdjax")
RUNS = os.environ.get("SDJAX_NOTEBOOK_RUNS", "runs")
MODEL = os.environ.get("SDJAX_MODEL", "stable-diffusion-v1-5/stable-diffusion-v1-5")
RECIPE = os.environ.get("SDJAX_RECIPE", "sd15_lora")
PICTURES = os.environ.get("SDJAX_PICTURES", "pictures")
PROMPT = os.environ.get("SDJAX_PROMPT", "a photo of an ohwx cat in the snow")
SMALL = os.environ.get("SDJAX_NOTEBOOK_SMALL") == "1"  # a few steps, to try the notebook itself

# %%
# %pip install --quiet "{WHEEL}" huggingface_hub

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

if platform == "cpu" and not SMALL:
    raise RuntimeError(
        "JAX sees no accelerator: on Colab choose Runtime > Change runtime type, then install "
        "sdjax with the extra cuda12, cuda13 or tpu. On a CPU a step of SD 1.5 takes minutes"
    )

# %% [markdown]
# ## The model
#
# A repository of the hub is downloaded once, without the weights that are there a second time in other formats.

# %%
if not os.path.exists(MODEL):
    from huggingface_hub import snapshot_download

    MODEL = snapshot_download(
        MODEL,
        allow_patterns=["*.json", "*/*.json", "*/*.txt", "*/model.safetensors",
                        "*/diffusion_pytorch_model.safetensors"],
        ignore_patterns=["safety_checker/*"],
    )  # fmt: skip
print(MODEL)

# %% [markdown]
# ## The pictures

# %%
from pathlib import Path

from PIL import Image

kinds = {".png", ".jpg", ".jpeg", ".webp"}
pictures = sorted(file for file in Path(PICTURES).glob("*") if file.suffix.lower() in kinds)
without = [file.name for file in pictures if not file.with_suffix(".txt").exists()]
if not pictures or without:
    raise RuntimeError(
        f"{PICTURES} has {len(pictures)} pictures, {len(without)} of them without a caption "
        f"{without[:5]}; put NAME.png and NAME.txt there side by side"
    )
print(f"{len(pictures)} pictures; the first: {pictures[0].with_suffix('.txt').read_text().strip()}")
sheet = Image.new("RGB", (128 * min(len(pictures), 8), 128))
for i, file in enumerate(pictures[:8]):
    sheet.paste(Image.open(file).convert("RGB").resize((128, 128)), (128 * i, 0))
sheet

# %% [markdown]
# ## Train
#
# The base stays as it is: what is trained are two small factors beside each layer of attention, and `workdir` refers to the base by its path and digest.
# The same command again goes on from the last checkpoint.
#
# A T4 has no bfloat16: add `--config.model.dtype=float32`, and `--config.data.batch_size=1` if memory runs out.

# %%
few = (
    "--config.train.steps=2 --config.train.log_every=1 --config.train.sample_every=0 "
    "--config.data.batch_size=2 --config.data.eval_split=train --config.validation.examples=0 "
    "--config.sample.sampler.steps=2"
).split()
workdir = f"{RUNS}/lora"
run(
    "main", f"--config={RECIPE}", f"--workdir={workdir}", f"--config.init_from={MODEL}",
    f"--config.data.path={PICTURES}", f"--config.sample.prompts=({PROMPT!r},)",
    *(few if SMALL else []),
)  # fmt: skip

# %% [markdown]
# ## Draw, with the LoRA at three strengths
#
# At 0 it is the base; above 1 it often is too much.
# Too many steps show as pictures that repeat those trained on: take an earlier checkpoint, or a lower strength.

# %%
steps = ["--steps=2"] if SMALL else []
adapter = f"{workdir}/adapter/lora.safetensors"
drawn = []
for strength in (0.0, 0.7, 1.0):
    out = f"{RUNS}/lora_{strength}"
    run(
        "sample", f"--model={MODEL}", f"--lora={adapter}:{strength}", f"--output={out}",
        "--seed=1", f"--prompts={PROMPT}", *steps,
    )  # fmt: skip
    drawn.append(Image.open(f"{out}/00000.png"))

# %%
row = Image.new("RGB", (sum(image.width for image in drawn), drawn[0].height))
for i, image in enumerate(drawn):
    row.paste(image, (i * image.width, 0))
row

# %% [markdown]
# ## Take it away
#
# - `adapter/pytorch_lora_weights.safetensors` in the workdir is for diffusers: `pipeline.load_lora_weights("runs/lora/adapter")`.
# - `adapter/lora.safetensors` is for A1111, Forge (`models/Lora`) and ComfyUI (`models/loras`).

# %%
for file in sorted(Path(workdir, "adapter").iterdir()):
    print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
