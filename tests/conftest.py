"""What several rooms' tests need: a tiny Stable Diffusion of torch, with random weights."""

import atexit
import functools
import gc
import os
import platform
import re
import shutil
import signal
import tempfile
from pathlib import Path

import jax
import pytest
from absl import logging

from tests import torchvision_names

torchvision_names.prepare()

# Most of the time goes into compiling programs that run a few times. Without LLVM's optimisations
# it takes a fifth less; with fusions emitted in the older way, and a program compiled in one part,
# half of the rest. Without fused multiply-adds, which AVX does not have, two programs with the same
# arithmetic have the same bits, however their operations are fused: some tests compare them.
XLA_FLAGS = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # XLA ends the process at a flag that it no longer knows
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if platform.machine() in ("x86_64", "AMD64"):
        XLA_FLAGS += " --xla_cpu_max_isa=AVX"
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)

# A program is compiled once in a run of the tests, by whichever of its processes needs it first.
# The next run reads it back from SDJAX_TEST_CACHE. Where that is "", as in .ci/run, the folder is
# made for this run and goes with it: all is compiled anew. (xdist's workers inherit its name.)
if not os.environ.get("SDJAX_TEST_CACHE"):
    os.environ["SDJAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="sdjax_xla_")
    atexit.register(shutil.rmtree, os.environ["SDJAX_TEST_CACHE"], ignore_errors=True)
CACHE = os.environ["SDJAX_TEST_CACHE"]
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # of processes that tests start
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # as a run has it
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# A shell ignores Ctrl-C in what it starts in the background, and whoever that starts does too: the
# tests that send it need the usual answer.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The costliest, by `-p tests.cpu_seconds`: begun last, they would leave a core idle at the end.
FIRST = ("train/test_hosts.py", "train/test_mesh.py", "train/test_loop.py", "models/test_unet.py",
         "train/test_validation.py", "launch/test_launch.py", "planning/test_plan.py",
         "train/test_sdxl.py", "train/test_reshape.py", "train/test_adapters.py",
         "train/test_references.py", "methods/test_phases.py", "methods/test_control.py",
         "sampling/test_control.py", "train/test_dit.py", "train/test_stages.py",
         "train/test_rollback.py", "methods/test_embedding.py", "encoding/test_encoded_images.py",
         "train/test_frozen_dtypes.py", "encoding/test_encoded.py",
         "train/test_buckets.py", "methods/test_frozen_int8.py", "methods/test_dmd.py",
         "methods/test_autoencoder_run.py", "methods/test_dpo_adapters.py",
         "methods/test_flux_pictures.py", "methods/test_consistency.py",
         "methods/test_autoencoder.py")  # fmt: skip


# The files of `make check`: they compile no network, start no process, and take a few seconds.
UNIT = frozenset(f"{name}.py" for name in """
benchmarks/test_muon benchmarks/test_startup checkpoints/test_hostile_models
checkpoints/test_networks data/test_batches data/test_buckets data/test_caption_choice
data/test_duplicates data/test_folder
data/test_image_files data/test_mixture data/test_original_size data/test_raw data/test_splits
data/test_stored data/test_tar data/test_transforms models/test_config
models/test_config_bounds models/test_kernels optim/test_ema parallel/test_hosts parallel/test_xla
planning/test_hlo_gpu
sampling/test_strips sweeps/test_sweep_space system/test_array_files system/test_collector
system/test_paths system/test_progress system/test_yaml_files test_command test_config test_docs
test_private_jax test_style train/test_agreement train/test_changes train/test_frozen
web/test_report_metrics web/test_report_parts
""".split())  # fmt: skip
REFERENCES = re.compile(r"\b(torch|diffusers|transformers|torch_pipeline|torch_xl_pipeline)\b")


@functools.cache
def cost(path):
    """The marker of a test file: "unit", "parity" (with torch and its libraries) or "run"."""
    if path.relative_to(Path(__file__).parent).as_posix() in UNIT:
        return "unit"
    return "parity" if REFERENCES.search(path.read_text()) else "run"


def pytest_collection_modifyitems(items):
    """Mark tests by their cost, and begin with the longest files, each in its own order.

    The rest, and a file alone, stay as they are.
    """
    place = {Path(__file__).parent / name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(FIRST)))
    for item in items:
        item.add_marker(cost(item.path))


def pytest_collection_finish():
    """Leave the libraries' millions of objects out of every later search for garbage.

    And search more seldom: 8 % of a tiny run's processor time went into it (`perf record`).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True)
def own_logging():
    """Verbs that a test calls say how much is logged; the next test shall know nothing of it."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def torch_pipeline(tmp_path_factory):
    """`StableDiffusionPipeline` small enough for tests, all parameters random. Do not change it."""
    pytest.importorskip("torch")
    import diffusers
    import transformers

    from sdjax.data.text.tokenizer import Tokenizer

    words = ["a red circle", "a blue square", "a green star and a small red circle"]
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer.train(words * 4, 560, context_length=16)
    tokenizer.save(folder)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=24,
        attention_head_dim=2,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        norm_num_groups=4,
        sample_size=16,
    )
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        )
    )
    for seed, model in enumerate((unet, vae, text_encoder)):
        randomise(model, seed)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(str(folder)),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def pipeline_folder(torch_pipeline, tmp_path_factory):
    """The folder that diffusers writes of `torch_pipeline`. Do not write into it."""
    folder = tmp_path_factory.mktemp("pipeline") / "diffusers"
    torch_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def torch_xl_pipeline(torch_pipeline, tmp_path_factory):
    """`StableDiffusionXLPipeline`, likewise: its shape, with three levels and two encoders."""
    import diffusers
    import transformers

    from sdjax.data.text.tokenizer import Tokenizer

    first = torch_pipeline.tokenizer
    folder = tmp_path_factory.mktemp("tokenizer_2")
    first.save_pretrained(folder)
    # OpenCLIP pads with the first token.
    Tokenizer.load(folder, context_length=16, pad_token="!").save(folder)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=56,
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )
    words = {
        "vocab_size": len(first),
        "max_position_embeddings": 16,
        "bos_token_id": first.bos_token_id,
        "eos_token_id": first.eos_token_id,
        "num_attention_heads": 2,
    }
    second = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=3, hidden_act="gelu",
        projection_dim=20, pad_token_id=0, **words,
    )  # fmt: skip
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, pad_token_id=1, **words
        )
    )
    text_encoder_2 = transformers.CLIPTextModelWithProjection(second)
    for seed, model in enumerate((unet, text_encoder, text_encoder_2)):
        randomise(model, 10 + seed)
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=torch_pipeline.vae,
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=first,
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(str(folder)),
        unet=unet.eval(),
        scheduler=torch_pipeline.scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def xl_folder(torch_xl_pipeline, tmp_path_factory):
    """The folder that diffusers writes of `torch_xl_pipeline`. Do not write into it."""
    folder = tmp_path_factory.mktemp("xl_pipeline") / "diffusers"
    torch_xl_pipeline.save_pretrained(folder)
    return folder


def randomise(model, seed):
    """Biases and norm scales too: at their defaults they hide mistakes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                one = "norm" in name and name.endswith("weight")
                parameter.copy_(float(one) + 0.1 * noise)
            elif "embedding" in name and parameter.ndim == 2 and "linear" not in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """A diffusers folder of a VAE with random weights: 16 px pictures, 8x8x4 latents."""
    import jax
    import numpy as np

    from sdjax.families.family import Model
    from sdjax.families.sd import SD
    from sdjax.formats.diffusers_folder import write_diffusers
    from sdjax.models import weights
    from sdjax.models.vae import VAE, VAEConfig

    config = VAEConfig(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )
    params = weights.init(VAE, config, jax.random.key(1))
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    write_diffusers(
        folder,
        Model(SD, {"vae": config}, params={f"vae.{p}": np.asarray(v) for p, v in params.items()}),
    )
    return folder


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """Where the tests' small captioned_shapes is prepared, once."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def tiny_config(tiny_vae, shapes_dir):
    """A text-to-image recipe that takes a step in milliseconds: change it, then `resolve` it."""
    return make_tiny_config(tiny_vae, shapes_dir)


def make_tiny_config(tiny_vae, shapes_dir):
    """For fixtures of a wider scope than `tiny_config`."""
    from sdjax.config import default

    c = default()
    c.vae_from = str(tiny_vae)
    c.data.update(
        data_dir=str(shapes_dir),
        resolution=16,
        batch_size=8,
        shapes_train=40,
        shapes_test=8,
        threads=1,
    )
    c.model.text_encoder.update(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
    )
    c.model.unet.update(  # attention in the middle alone: half as many arrays to trace and compile
        sample_size=8,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    c.tokenizer.vocab_size = 560
    c.optim.learning_rate = 1e-3
    c.ema.profiles = ("warmup-0.9",)
    c.train.update(steps=6, log_every=1, checkpoint_every=3, sample_every=0, export=False,
                   report=False)  # fmt: skip
    c.validation.examples = 0
    c.sample.count = 2
    c.sample.sampler.steps = 2
    return c


def small_autoencoder(config):
    """Make of it a run of the other task, whose step compiles in a few seconds."""
    config.update(method={"name": "autoencoder"}, vae_from="")
    config.model.vae.update(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=16,
    )
