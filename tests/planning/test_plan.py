"""The planner: chips, slices by name, arithmetic, memory, search, cache, one real compilation."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from sdjax import plan as verb
from sdjax.config import default, resolve
from sdjax.errors import UserError
from sdjax.parallel import chips
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.planning import estimate, plan_cache, plan_search, planner, topologies
from sdjax.planning.hlo import Collective, HloSchedule, Operation
from sdjax.train import compilation
from tests.odd_names import ODD

GIB = 2**30

# ---- chips and slices --------------------------------------------------------------------------


@pytest.mark.parametrize("chip", chips.TPUS + chips.GPUS, ids=lambda chip: chip.name)
def test_chips_are_told_apart_by_their_device_kind(chip):
    for kind in chip.kinds:
        assert chips.peak_flops(kind) == chip.flops / chip.devices
    # Peak over bandwidth: a slip of a unit would show here.
    assert 100 < chip.flops / chip.hbm_bandwidth < 700 or chip.name in ("v2", "v3")
    assert chip.network < chip.links < chip.hbm_bandwidth
    assert bool(chip.clock) == chip.is_tpu


@pytest.mark.parametrize(
    "text, name, count, devices, island",
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, 64, 64),
        ("v5litepod-256", "v5e:16x16", 256, 256, 256),
        ("v5p-8", "v5p:2x2x1", 4, 4, 4),  # counts cores
        ("v6e-8", "v6e:2x4", 8, 8, 8),
        ("2*v5e:16x16", "2*v5e:16x16", 512, 512, 256),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 4, 8, 8),
        ("gpu:h100:8", "gpu:h100:1x8", 8, 8, 8),
        ("gpu:a100-80:4x8", "gpu:a100-80:4x8", 32, 32, 8),
    ],
)
def test_names_of_slices_and_hosts(text, name, count, devices, island):
    topology = topologies.parse(text)
    assert (topology.name, topology.chips, topology.devices) == (name, count, devices)
    assert topology.island == island
    assert topologies.parse(topology.name) == topology


@pytest.mark.parametrize(
    "text, reason",
    [
        ("v9:2x2", "no chip is called 'v9'"),
        ("v5p:2x4", "3 dimensions, not 2"),
        ("v5litepod-7", "known are v5e-1, v5e-4"),
        ("v5p-7", "no such size"),
        ("tpu7x-8", "by its shape"),
        ("gpu:h900:8", "no GPU is called 'h900'"),
        ("gpu:h100:2x4x8", "neither GPUS nor HOSTSxGPUS"),
        ("gpu:v5e:2x4", "no GPU is called"),
        ("v5e:0x4", "'0x4' is not a shape"),
        ("0*v5e:2x4", "no slices"),
        ("eight", "not of the form"),
    ],
)
def test_names_that_mean_nothing(text, reason):
    with pytest.raises(UserError, match="--topology=") as error:
        topologies.parse(text)
    assert reason in str(error.value)
    assert "v5p" in str(error.value) and "h200" in str(error.value)  # what is known


def test_without_libtpu_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
        topologies.devices(topologies.parse("v5e:2x4"))


@pytest.mark.parametrize(
    "name, sizes",
    [("v5e:16x16", (8, 1)), ("v5p:4x4x4", (8, 1)), ("v5p:4x4x8", (8, 2)), ("2*v5e:16x16", (8, 1))],
)
def test_an_axis_may_be_a_part_of_a_dimension_of_the_slice(name, sizes):
    pytest.importorskip("libtpu")
    topology = topologies.parse(name)
    fsdp, tensor = sizes
    mesh = make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), topologies.devices(topology))
    assert mesh.devices.shape == (topology.devices // (fsdp * tensor), fsdp, tensor)
    assert len({device.id for device in mesh.devices.flat}) == topology.devices
    for group in mesh.devices.reshape(-1, fsdp * tensor):  # neighbours: a row, or a block
        assert len({getattr(device, "slice_index", 0) for device in group}) == 1
        lengths = np.ptp([device.coords for device in group], axis=0) + 1
        assert math.prod(lengths) == fsdp * tensor


# ---- time --------------------------------------------------------------------------------------


def collective(kind="all-reduce", size=10**9, group=8, islands=1, asynchronous=False):
    return Collective(kind, size, group, islands, 1, asynchronous, False)


def test_collectives_take_what_their_links_allow():
    torus, mesh = topologies.parse("v5p:4x4x4"), topologies.parse("v5p:2x2x2")
    seconds = estimate.collective_seconds
    assert seconds(collective(group=64), torus) == pytest.approx(2 * 1e9 * 63 / 64 / 600e9)
    assert seconds(collective(), mesh) == pytest.approx(2 * 1e9 * 7 / 8 / 300e9)  # no wrap-around
    assert seconds(collective("all-gather", group=4), torus) == pytest.approx(1e9 * 3 / 4 / 200e9)
    assert seconds(collective("reduce-scatter", group=4), torus) == seconds(
        collective("all-gather", group=4), torus
    )
    flat = topologies.parse("v5e:16x16")
    assert seconds(collective("all-gather", group=16), flat) == pytest.approx(1e9 * 15 / 16 / 100e9)
    assert seconds(collective("all-gather"), flat) == pytest.approx(1e9 * 7 / 8 / 50e9)  # of a ring
    assert seconds(collective("collective-permute", group=2), torus) == pytest.approx(1e9 / 200e9)
    assert seconds(collective(group=1), torus) == 0
    nodes = topologies.parse("gpu:h100:4x8")
    inside = 2 * 1e9 * 7 / 8 / 450e9
    between = 2 * 1e9 / 8 * 3 / 4 / 50e9
    assert seconds(collective(group=32, islands=4), nodes) == pytest.approx(inside + between)
    assert seconds(collective(group=4, islands=4), nodes) == pytest.approx(2 * 1e9 * 3 / 4 / 50e9)


def test_a_step_is_its_operations_and_the_collectives_that_nothing_hides():
    topology = topologies.parse("v5e:16x16")
    work = (
        Operation("fusion", "product", 1_500_000, 819_000, True, 2),  # cycles 1 ms, traffic 1 us
        Operation("fusion", "sum", 1_500_000, 81_900_000, False, 1),  # 1 ms, 0.1 ms
        Operation("fusion", "unsaid", 0, 819_000_000, False, 1),
    )
    hidden = collective(group=256, asynchronous=True, size=10**8)
    schedule = HloSchedule(work, (collective(group=256), hidden), (), (), 0)
    took = estimate.step_time(schedule, topology, flops=197e12 * 1e-3)
    assert took.operations == pytest.approx(2e-3 + 0.1e-3 + 1e-3)
    assert took.exposed == pytest.approx(2 * 1e9 * 255 / 256 / 200e9)
    assert took.collectives == pytest.approx(1.1 * took.exposed)
    assert took.step == pytest.approx(took.operations + took.exposed)
    assert took.roofline == pytest.approx(max(1e-3, (2 * 819e3 + 81.9e6 + 819e6) / 819e9))


def test_without_cycles_products_take_their_flops_at_the_chips_rate():
    topology = topologies.parse("v5e:16x16")
    slow = Operation("fusion", "product", 0, 819_000, True, 2, flops=197e9)
    thin = Operation("fusion", "thin product", 0, 819_000_000, True, 1, flops=197e6)
    took = estimate.step_time(HloSchedule((slow, thin), (), (), (), 0), topology, flops=0.0)
    assert topology.chip.products == 0.75
    assert took.operations == pytest.approx(2 * 1e-3 / 0.75 + 1e-3)


@pytest.mark.parametrize(
    "seconds, believed",
    [
        (0.24, True),
        (-28.99, False),
        (0.05, False),
        (float("nan"), False),
        (None, False),
        (9, False),
    ],
)
def test_the_compilers_own_estimate_is_not_believed_blindly(seconds, believed):
    assert estimate.plausible(seconds, roofline=0.125, peak_seconds=0.07) is believed


# ---- out of memory -----------------------------------------------------------------------------

LONG = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory \
space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.

Total hbm usage >= 20.75G:
    reserved        256.00M
    program          20.50G

Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_type="dot_general" op_name="jit(step)/bhlm/dot_general"
     Shape: f32[8,8,4096,4096]{3,2,1,0:T(8,128)}
     Unpadded size: 4.00G
     ==========================

  2. Size: 512.00M
     Shape: bf16[8,512,512,128]{3,2,1,0:T(8,128)(2,1)}
     ==========================
"""
SHORT = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(129.00G) exceeds available HBM (15.75G)."
)


def test_the_compilers_refusal_is_read():
    needed, arrays = planner.read_out_of_memory(LONG)
    assert needed == int(20.5 * GIB)
    assert arrays == [
        {"shape": "f32[8,8,4096,4096]", "op_name": "jit(step)/bhlm/dot_general",
         "bytes": 4 * GIB, "count": 1},
        {"shape": "bf16[8,512,512,128]", "op_name": "", "bytes": GIB // 2, "count": 1},
    ]  # fmt: skip
    assert planner.read_out_of_memory(SHORT) == (129 * GIB, [])
    assert planner.read_out_of_memory("out of memory, somehow") == (None, [])


VMEM = """RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:
Ran out of memory in memory space vmem while allocating on stack for %splash_mha_fwd.1"""


class Refusing:
    def __init__(self, message):
        self.message = message

    def compile(self, compiler_options):
        import jax

        raise jax.errors.JaxRuntimeError(self.message)


def test_only_running_out_of_hbm_is_an_answer():
    for message in (SHORT, LONG, "RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes."):
        assert compilation.compile_lowered(Refusing(message), {}).error == message
    for message in ("INTERNAL: a bug", VMEM):
        with pytest.raises(UserError, match="not for lack of HBM") as error:
            compilation.compile_lowered(Refusing(message), {})
        assert message in str(error.value)


def test_what_does_not_fit_comes_with_advice(tiny_config):
    config = resolve(tiny_config)
    topology = topologies.parse("v5e:2x4")
    known = {"parameters": 4 * GIB, "optimizer": 8 * GIB, "EMA": 4 * GIB}
    mesh = types.SimpleNamespace(
        shape={"data": 8, "fsdp": 1, "tensor": 1},
        devices=np.array([types.SimpleNamespace(platform="tpu")]),
    )
    program = types.SimpleNamespace(mesh=mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "memory_classes", lambda _: {**known, "gradients": GIB})
        plan = planner.make_plan(config, program, topology, compilation.Outcome(1.0, error=LONG))
    assert plan["fits"] is False and plan["memory"]["needed"] == int(20.5 * GIB)
    advice = "\n".join(plan["advice"])
    assert "config.model.remat=block" in advice
    assert "config.mesh.fsdp=8 splits parameters, optimizer and EMA, 16.0 GiB a device, to 2.0" in (
        advice
    )
    json.dumps(plan)


def test_advice_names_the_batch_where_a_device_holds_several(tiny_config):
    tiny_config.data.batch_size = 64
    plan = {"memory": {"limit": 16 * GIB}, "mesh": {"data": 1, "fsdp": 8, "tensor": 1}}
    known = dict.fromkeys(("parameters", "optimizer", "EMA"), GIB)
    advice = "\n".join(planner.advice(resolve(tiny_config), plan, known))
    assert "train.accumulation=2" in advice and "data.batch_size=32" in advice
    assert "mesh.fsdp" not in advice  # it is split already


# ---- search, on a compiler that is a formula ----------------------------------------------------


class FormulaPlanner:
    """State of 12 GiB split over fsdp, 1 GiB of temporaries an image; fsdp slows the step."""

    def __init__(self, topology, state=12.0, per_row=1.0):
        self.topology = topologies.parse(topology)
        self.state, self.per_row, self.asked = state, per_row, []

    def program(self, config):
        return config

    def plan(self, config):
        mesh = config.mesh
        ways = self.topology.devices // mesh.tensor
        rows = config.data.batch_size // ways
        self.asked.append((mesh.fsdp, mesh.tensor, rows))
        limit = planner.memory_limit(self.topology)
        total = int((self.state / (mesh.fsdp * mesh.tensor) + self.per_row * rows) * GIB)
        return {
            "fits": total <= limit,
            "memory": {"total": total, "limit": limit},
            "mesh": {"data": ways // mesh.fsdp, "fsdp": mesh.fsdp, "tensor": mesh.tensor},
            "batch": {"global": config.data.batch_size},
            "images_per_second_per_chip": rows / (rows + 1) * (0.9 if mesh.fsdp > 1 else 1.0),
            "mfu": 0.3,
        }

    def memory_classes(self, config):
        split = self.state / (config.mesh.fsdp * config.mesh.tensor)
        return {"parameters": int(split * GIB), "gradients": 1000 * GIB}


def run_search(planner, monkeypatch, config):
    monkeypatch.setattr(plan_search, "memory_classes", planner.memory_classes)
    said = []
    return plan_search.search(planner, config, said.append), said


def test_search_finds_the_largest_batch_and_the_best_mesh(tiny_config, monkeypatch):
    planner = FormulaPlanner("v5e:2x4")
    found, said = run_search(planner, monkeypatch, resolve(tiny_config))
    # fsdp=8: 1.5 GiB of state leave room for 14 images: 8 as a power of two. fsdp=1: for 3: 2.
    assert found.best["mesh"]["fsdp"] == 8 and found.best["batch"]["global"] == 64
    assert {rows for fsdp, _, rows in planner.asked if fsdp == 1} == {8, 4, 2}
    assert any("at most 10 compilations" in line for line in said)
    assert len(planner.asked) == len(set(planner.asked)) <= 10
    assert all(tensor == 1 for _, tensor, _ in planner.asked)


@pytest.mark.parametrize(
    "name, ways",
    [("v5e:2x4", [1, 8]), ("v5e:16x16", [1, 16, 256]), ("v5p:4x4x4", [1, 8, 64]),
     ("v5p:4x8x8", [1, 8, 256]), ("gpu:h100:16x8", [1, 8])],
)  # fmt: skip
def test_search_splits_over_a_host_or_a_whole_row(name, ways):
    found = plan_search.candidates(topologies.parse(name))
    assert [mesh.fsdp for mesh in found if mesh.tensor == 1] == ways


def test_search_follows_the_slope_of_memory(tiny_config, monkeypatch):
    planner = FormulaPlanner("v5p:2x2x2", per_row=0.2)
    found, _ = run_search(planner, monkeypatch, resolve(tiny_config))
    plain = [rows for fsdp, _, rows in planner.asked if fsdp == 1]
    assert plain == [8, 16, 256]  # 83.7 GiB of room at 0.2 an image: 418, no need to try 512
    assert found.best["mesh"]["fsdp"] == 1 and found.best["batch"]["global"] == 256 * 8


def test_search_splits_over_tensor_where_nothing_else_fits(tiny_config, monkeypatch):
    planner = FormulaPlanner("2*v5e:2x4", state=1000.0)
    with pytest.raises(UserError, match="fits no mesh"):
        run_search(planner, monkeypatch, resolve(tiny_config))
    assert planner.asked == []
    huge = [mesh for mesh in plan_search.candidates(planner.topology) if mesh.tensor > 1]
    assert huge == [MeshConfig(data=-1, fsdp=1, tensor=8, slices=2)]


def test_search_says_when_nothing_fits(tiny_config, monkeypatch):
    planner = FormulaPlanner("v5e:2x4", per_row=100.0)
    found, _ = run_search(planner, monkeypatch, resolve(tiny_config))
    assert found.best is None and found.tried[-1]["batch"]["global"] == 8


# ---- the cache ---------------------------------------------------------------------------------


def test_the_cache_keeps_values_and_survives_damage(tmp_path):
    def get(key, value):
        with plan_cache.entry(tmp_path / "plans", key) as kept:
            kept.value = kept.value or value
            return kept.value

    assert get("a", {"x": 1}) == {"x": 1}
    assert get("a", {"x": 2}) == {"x": 1}
    (file,) = (tmp_path / "plans").iterdir()
    file.write_bytes(file.read_bytes()[:10])
    assert get("a", {"x": 3}) == {"x": 3}
    with pytest.raises(KeyboardInterrupt):
        with plan_cache.entry(tmp_path / "plans", "b") as kept:
            kept.value = 1
            raise KeyboardInterrupt
    assert len(list((tmp_path / "plans").iterdir())) == 1


# ---- the verb ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--topology=v5e:2x4"], "--config is missing"),
        (["--config=configs/base.py"], "--topology is missing"),
        (["--config=configs/none.py", "--topology=v5e:2x4"], "no such file"),
        (["--config=configs/base.py", "--topology=v9:2x4"], "no chip is called"),
        (["--config=configs/base.py", "--topology=v5e:2x4", "--format=xml"], "format"),
        (["--config=configs/base.py", "--topology=v5e:2x4", "--workdir=x"], "workdir"),
        (["--config=configs/base.py", "--topology=v5e:2x4", "--output=no/where"], "no/where"),
        (["--config=configs/base.py", "--topology=v5e:2x4", "--cache="], "--cache is empty"),
        (["--config=configs/base.py", "--topology=v5e:2x4", "what"], "unexpected"),
    ],
)
def test_mistakes_of_the_command_line(arguments, reason, monkeypatch, capsys):
    argv = ["sdjax.plan", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    verb.FLAGS.unparse_flags()
    for flag in ("config", "topology", "output"):
        verb.FLAGS[flag].unparse()
    assert verb.main(argv) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("number", "reason"), [(9, "want of memory"), (11, "libtpu")])
def test_a_compiler_that_dies_is_an_error_with_a_reason(tmp_path, number, reason):
    """The configuration stands in for the compiler: reading it kills the process."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"import os\n\n\ndef get_config():\n    os.kill(os.getpid(), {number})\n")
    command = [sys.executable, "-m", "sdjax.plan", f"--config={recipe}", "--topology=v5e:2x4"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stderr
    assert "error: the plan was ended by SIG" in run.stderr and reason in run.stderr


def test_a_fault_of_the_planner_is_no_answer(tmp_path, monkeypatch, capsys):
    def fail():
        raise KeyError("a fault")

    monkeypatch.setattr(verb, "_run", fail)
    assert verb.main(["sdjax.plan"]) == 2  # 1 means that it does not fit
    assert "KeyError: 'a fault'" in capsys.readouterr().err


def test_the_vocabulary_is_that_of_the_tokenizer_to_come():
    c = default()
    c.data.name, c.tokenizer.vocab_size = "captioned_shapes", 600
    assert verb._config(c).model.text_encoder.vocab_size == 600
    c.optim.groups = ((r"^text_encoder\.", 0.0),)  # frozen, so loaded, with its own
    assert verb._config(c).model.text_encoder.vocab_size == 49408


RECIPE = """
from sdjax.config import default


def get_config():
    c = default()
    c.model.unet.update(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), layers_per_block=1, cross_attention_dim=8,
        attention_head_dim=1, norm_num_groups=4)
    c.model.vae.update(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), layers_per_block=1, norm_num_groups=4)
    c.model.text_encoder.update(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=8)
    c.tokenizer.vocab_size = 320
    c.data.resolution = 8
    c.data.batch_size = 16
    return c
"""


def make(folder, *flags, topology="v5e:2x4"):
    """A plan of RECIPE by the command line."""
    (folder / "tiny.py").write_text(RECIPE)
    command = [sys.executable, "-m", "sdjax.plan", f"--config={folder}/tiny.py",
               f"--topology={topology}", f"--cache={folder}/cache", "--format=json",
               *flags]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_small_step_compiled_for_a_slice(tmp_path):
    """Compiled by libtpu for eight TPU v5e, without one: as far as the schedule, then all of it."""
    pytest.importorskip("libtpu")
    tmp_path = tmp_path / ODD
    tmp_path.mkdir()
    quick = make(tmp_path, "--quick")
    assert quick.returncode == 0, quick.stderr[-2000:]
    assert os.listdir(tmp_path / "cache" / "scheduled") and not any(
        (tmp_path / "cache" / "compiled").glob("*")
    )
    run = make(tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    plan = json.loads(run.stdout)
    assert plan["fits"] and plan["chips"] == 8 and plan["basis"] == "compiled for v5e by libtpu"
    classes = plan["memory"]["classes"]
    assert classes["optimizer"] == pytest.approx(2 * classes["parameters"], abs=100)
    assert classes["temporaries"] > 0 and classes["program"] > 0
    assert plan["memory"]["total"] == sum(classes.values()) < plan["memory"]["limit"] == 15.75 * GIB
    # The sum of the gradients over the devices: equal ones (of biases that add up) are summed once.
    sums = [row for row in plan["collectives"] if row["kind"] == "all-reduce"]
    assert {row["group"] for row in sums} == {8}
    assert sum(row["bytes"] for row in sums) == pytest.approx(classes["parameters"], rel=0.02)
    assert plan["time"]["step"] >= plan["time"]["roofline"] > 0
    assert plan["images_per_second"] == pytest.approx(16 / plan["time"]["step"])
    assert plan["temporaries"] and plan["flops"] > 2 * plan["model_flops_per_image"] * 0.5
    assert len(os.listdir(tmp_path / "cache" / "compiled")) == 1
    same_but_for_machine_code(json.loads(quick.stdout), plan)
    # What was compiled already is not estimated.
    again = make(tmp_path, "--quick")
    assert json.loads(again.stdout) == plan


def same_but_for_machine_code(quick, plan):
    assert quick["basis"] == "scheduled, without machine code, for v5e by libtpu"
    assert "75% of the chip's FLOP/s" in quick["warnings"][0]
    for key in ("fits", "mesh", "batch", "collectives", "kernels", "temporaries"):
        assert quick[key] == plan[key], key
    known, classes = quick["memory"]["classes"], plan["memory"]["classes"]
    assert known["program"] == planner.CODE_BYTES
    for name in classes.keys() - {"program", "temporaries"}:
        assert known[name] == classes[name], name
    # Machine code keeps something of its own there.
    assert 0 <= classes["temporaries"] - known["temporaries"] < 2**26
    assert 0.7 * plan["flops"] < quick["flops"] < plan["flops"]  # products alone
    assert quick["hbm_bytes"] == pytest.approx(plan["hbm_bytes"], rel=0.01)
    assert quick["time"]["optimal_seconds"] is None


def test_a_quick_plan_passes_errors_on(tmp_path):
    pytest.importorskip("libtpu")
    for flag, topology, reason in [
        ("--config.data.batch_size=15", "v5e:2x4", "15"),
        ("--config.mesh.fsdp=1", "gpu:h100:8", "the plan is an estimate"),
    ]:
        run = make(tmp_path, "--quick", flag, topology=topology)
        assert run.returncode == 2 and reason in run.stderr, run.stderr[-2000:]
        assert "Traceback" not in run.stderr


@pytest.mark.slow  # a step that keeps the compiler busy has to be traced first
def test_a_quick_plan_that_is_stopped_leaves_nothing(tmp_path):
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "sdjax.plan", "--quick", "--config=configs/sd15.py",
               "--topology=v5e:2x4", f"--cache={tmp_path}/cache"]  # fmt: skip
    run = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, text=True,
                           stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("sdjax-plan-*/*")) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(processes(tmp_path)) >= 2
    run.terminate()
    assert run.wait(60) == 143 and "stopped by SIGTERM" in run.stderr.read()
    deadline = time.monotonic() + 30
    while processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not processes(tmp_path) and not list(tmp_path.glob("sdjax-plan-*"))


def processes(folder):
    """Those that have TMPDIR at `folder`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"TMPDIR={folder}".encode() in file.read_bytes().split(b"\0"):
                found.append(file.parent.name)
    return found


BUFFERS = """BufferAssignment:
allocation 0: size 512, output shape is |(f32[4], f32[4])|, maybe-live-out:
 value: <549 tuple.5{} @0> (size=512,offset=0): (f32[4]{0:T(128)}, f32[4]{0:T(128)})
allocation 1: size 2000, parameter 0, shape |f32[4]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 300, parameter 1, shape |f32[4]| at ShapeIndex {}:
allocation 3: size 40, maybe-live-out:
allocation 14: size 106561536, color 1, preallocated-temp:
allocation 15: size 5, preallocated-temp:
allocation 17: size 2, thread-local:
allocation 16: size 36, color 2, preallocated-temp:

Total bytes used: 1
"""


def test_buffers_of_a_schedule():
    assert compilation.read_buffers(BUFFERS) == {
        "argument": 2300, "output": 2552, "alias": 2000, "temp": 5,
    }  # fmt: skip


TPU = ("module_0.after_optimizations-buffer-assignment.txt",
       "module_0.after_optimizations_after_buffer_assignment.txt")  # fmt: skip
GPU = ("module_1.sm_9.0a_gpu_after_optimizations-buffer-assignment.txt",
       "module_1.sm_9.0a_gpu_after_optimizations.txt",
       "module_1.sm_9.0a_gpu_after_optimizations-buffer-assignment-values.txt")  # fmt: skip


class Printing:
    """A compiler that prints what it is told and then fails, or ends."""

    def __init__(self, text, error=None, names=TPU):
        self.text, self.error, self.names = text, error, names

    def compile(self, compiler_options):
        folder = Path(compiler_options["xla_dump_to"])
        for name, text in zip(self.names, (BUFFERS, self.text, "values"), strict=False):
            (folder / name).write_text(text)
        if self.error:
            raise self.error
        return types.SimpleNamespace(
            memory_analysis=lambda: None, cost_analysis=dict, as_text=lambda: "all of it"
        )


def test_a_schedule_is_taken_when_it_is_whole(tmp_path):
    whole = "HloModule jit_f\n\n%f () -> f32[] {\n}\n\nENTRY %main () -> f32[] {\n}\n\n"
    folders = (tmp_path / str(number) for number in range(9))

    def ask(compiler):
        folder = next(folders)
        folder.mkdir()
        return compilation.schedule_lowered(compiler, {}, folder, lambda: True)

    for names in (TPU, GPU):
        found = ask(Printing(whole, names=names))
        assert found.text == whole and found.quick and found.memory["temp"] == 5
    with pytest.raises(UserError, match="without --quick"):
        ask(Printing(whole, names=GPU[:2]))  # the buffers may be half there
    for end in (-3, whole.index("ENTRY")):
        with pytest.raises(UserError, match="without --quick"):
            ask(Printing(whole[:end]))
    import jax

    assert ask(Printing("", jax.errors.JaxRuntimeError(LONG))).error == LONG
    with pytest.raises(UserError, match="not for lack of HBM"):
        ask(Printing("", jax.errors.JaxRuntimeError("a bug")))
    missing = jax.errors.JaxRuntimeError("INTERNAL: libdevice not found at ./libdevice.10.bc")
    with pytest.raises(UserError, match="nvidia-cuda-nvcc-cu12.*cuda12"):
        ask(Printing("", missing))
