"""Plans of GPUs: compiled by XLA for CUDA where its plugin is, estimated where it is not."""

import json
import subprocess
import sys

import pytest

from sdjax.errors import UserError
from sdjax.parallel import chips
from sdjax.planning import gpus

needs_compiler = pytest.mark.skipif(
    not gpus.compiler(), reason="JAX's plugin for CUDA is not installed"
)

RECIPE = """
from sdjax.config import default


def get_config():
    c = default()
    c.model.dtype = "bfloat16"
    c.model.unet.update(
        sample_size=16, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=2, norm_num_groups=4)
    c.model.vae.update(
        sample_size=16, block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), layers_per_block=1, norm_num_groups=4)
    c.model.text_encoder.update(
        hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=7)
    c.tokenizer.vocab_size = 320
    c.data.resolution = 16
    c.data.batch_size = 32
    return c
"""
# The verb as on a machine without the plugin.
WITHOUT = "import sys; from sdjax.planning import gpus; gpus.PLUGINS = (); from sdjax import plan; sys.exit(plan.main(sys.argv))"  # noqa: E501


def make(folder, *flags, start=("-m", "sdjax.plan"), topology="gpu:h100:8"):
    """A plan of RECIPE by the command line."""
    (folder / "tiny.py").write_text(RECIPE)
    command = [sys.executable, *start, f"--config={folder}/tiny.py", f"--topology={topology}",
               f"--cache={folder}/cache", "--format=json", *flags]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_every_gpu_is_described_to_the_compiler():
    assert gpus.TARGETS.keys() == {chip.name for chip in chips.GPUS}
    for chip in chips.GPUS:
        target = gpus.TARGETS[chip.name]
        found = next(c for c in chips.GPUS if target.kind.startswith(c.kinds))
        assert found is chip
        # Tensor cores do 1,024 (Ampere, Ada) to 8,192 (Blackwell) bfloat16 operations a clock and
        # multiprocessor, at a clock that is at most 40 % lower under load.
        a_clock = chip.flops / (target.cores * target.clock * 1e9)
        peak = {8: 2048 if target.capability == (8, 0) else 1024, 9: 4096, 10: 8192}
        assert 0.6 < a_clock / peak[target.capability[0]] <= 1.1


def test_cudnn_is_asked_about_the_gpu_that_is_compiled_for(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as asking

    before = asking.check_compute_capability
    with gpus.lowering(chips.find("a100-80")):
        assert asking.check_compute_capability("8.0")
        assert not asking.check_compute_capability("9.0")
        assert asking.is_cuda_compute_capability_equal("8.0")
        assert not asking.is_cuda_compute_capability_equal("10.3")
        assert asking.check_cudnn_version() >= 91000
    assert asking.check_compute_capability is before
    monkeypatch.delattr(asking, "check_cudnn_version")
    with pytest.raises(UserError, match="model.attention=dense"):
        with gpus.lowering(chips.find("h100")):
            pass


def test_where_there_is_no_compiler_the_plan_is_an_estimate(tmp_path):
    plan = make(tmp_path, start=("-c", WITHOUT))
    assert plan["basis"] == "estimate" and plan["chips"] == 8 and plan["fits"]
    assert any("'.[cuda12]'" in warning for warning in plan["warnings"])
    time = plan["time"]
    assert time["operations"] + time["kernels"] == pytest.approx(time["roofline"])
    assert plan["flops"] > plan["model_flops_per_image"] * 4  # images of a device
    assert plan["memory"]["limit"] == 60e9


# Attention, products and convolutions, forward and back. In a process without other devices.
EVERY = """
import jax, jax.numpy as jnp
from sdjax.models.kernels.choice import cudnn_attention
from sdjax.parallel import chips
from sdjax.parallel.activations import kernels_of
from sdjax.planning import gpus, topologies

def loss(q, w):
    x = cudnn_attention(q, q, q)
    x = jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.sum(x.astype(jnp.float32) ** 2)

for chip in chips.GPUS:
    device, _ = topologies.devices(topologies.parse(f"gpu:{chip.name}:2"))
    assert chips.peak_flops(device.device_kind) == chip.flops and kernels_of(device) == "cuda"
    sharding = jax.sharding.SingleDeviceSharding(device)
    q, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
            for shape in ((2, 64, 4, 32), (3, 3, 32, 32)))
    with gpus.lowering(chip):
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(q, w)
    compiled = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})
    text = compiled.as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text and "__cudnn$convBackwardFilter" in text
    assert compiled.memory_analysis().temp_size_in_bytes > 0
    print(chip.name)
"""


@needs_compiler
def test_the_compiler_takes_every_description():
    run = subprocess.run([sys.executable, "-c", EVERY], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == [chip.name for chip in chips.GPUS], run.stderr[-2000:]


@needs_compiler
def test_gradients_are_added_up_in_float32(tmp_path):
    """Those of convolutions too, which cuDNN rounds to 16 bits on each device."""
    plan = make(tmp_path)
    sums = [row for row in plan["collectives"] if row["kind"] == "all-reduce"]
    assert {row["group"] for row in sums} == {8}
    summed = sum(row["bytes"] for row in sums)
    assert summed == pytest.approx(plan["memory"]["classes"]["parameters"], rel=0.02)


@needs_compiler
def test_another_version_of_jax_may_plan_dense_attention(tmp_path):
    """One that asks about cuDNN in another way."""
    asking = "from jax._src.cudnn import fused_attention_stablehlo as asking"
    unlike = f"{asking}; del asking.check_cudnn_version; {WITHOUT}"
    start = ("-c", unlike.replace("gpus.PLUGINS = (); ", ""))
    (tmp_path / "tiny.py").write_text(RECIPE)
    command = [sys.executable, *start, f"--config={tmp_path}/tiny.py", "--topology=gpu:h100:8",
               f"--cache={tmp_path}/cache"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and "--config.model.attention=dense" in run.stderr
    plan = make(tmp_path, "--config.model.attention=dense", start=start)
    assert plan["fits"] and not plan["kernels"]


@needs_compiler
def test_a_small_step_compiled_for_gpus(tmp_path):
    """For two hosts of four H100; beside the estimate without their compiler."""
    quick = make(tmp_path, "--config.mesh.fsdp=4", "--quick", topology="gpu:h100:2x4")
    assert quick["basis"] == "scheduled, without machine code, for h100 by XLA for CUDA"
    plan = make(tmp_path, "--config.mesh.fsdp=4", topology="gpu:h100:2x4")
    assert plan["basis"] == "compiled for h100 by XLA for CUDA" and plan["fits"]
    # Nothing of machine code is in it, but it says of some collectives that they hide.
    for field in ("fits", "flops", "hbm_bytes", "kernels", "temporaries", "warnings"):
        assert quick[field] == plan[field], field
    assert quick["memory"]["total"] == pytest.approx(plan["memory"]["total"], abs=2**16)
    assert 1 <= quick["time"]["step"] / plan["time"]["step"] < 1.1
    assert plan["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert any(name.startswith("jax-cuda") for name in plan["versions"])
    calls = [kernel["name"] for kernel in plan["kernels"]]
    # Self- and cross-attention of one block down, one in the middle, two up, forward and back.
    assert calls.count("dot_product_attention_bwd") == 8 <= calls.count("dot_product_attention_fwd")
    assert len(set(calls)) == 2
    known, classes = make(tmp_path, "--config.mesh.fsdp=4", start=("-c", WITHOUT),
                          topology="gpu:h100:2x4"), plan["memory"]["classes"]  # fmt: skip
    for name in ("parameters", "optimizer", "EMA", "frozen networks", "batch"):
        assert classes[name] == known["memory"]["classes"][name] > 0, name
    # What XLA for CUDA multiplies is what the program says, counted without any compiler.
    assert plan["flops"] == pytest.approx(known["flops"], rel=0.1)
    assert plan["time"]["step"] > plan["time"]["roofline"] > 0
    inside, across = ({row["islands"] for row in plan["collectives"] if row["islands"] == n}
                      for n in (1, 2))  # fmt: skip
    assert inside and across  # gathers over NVLink, sums over the network
    assert plan["temporaries"]
