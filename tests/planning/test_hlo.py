"""Reading compiled programs, on excerpts of what libtpu 0.0.42 and XLA on CPU print."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from sdjax.config import default, resolve
from sdjax.planning import estimate, hlo, topologies
from sdjax.planning.hlo_text import parse_arrays, replica_group
from sdjax.train.monitoring.model_flops import (
    count_flops,
    denoiser_flops,
    gradient_flops,
    train_flops,
)

# A matrix product whose operand goes around a ring: a loop from 0 to 4 in steps of 2, the step
# carried along as a constant of the state.
WINDOWED = """HloModule jit_f, is_scheduled=true, num_partitions=8

%fused (p0: bf16[1024,4096], p1: bf16[1024,4096]) -> bf16[1024,1024] {
  %p0 = bf16[1024,4096]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.7 = bf16[1024,1024]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_oi->bf
}

%body (param: (bf16[1024,4096], u32[], u32[])) -> (bf16[1024,4096], u32[], u32[]) {
  %param = (bf16[1024,4096]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}, /*index=2*/u32[]{:T(128)}) parameter(0)
  %gte.0 = bf16[1024,4096]{1,0:T(8,128)(2,1)} get-tuple-element(%param), index=0
  %gte.1 = u32[]{:T(128)} get-tuple-element(%param), index=1
  %gte.2 = u32[]{:T(128)} get-tuple-element(%param), index=2
  %add.33 = u32[]{:T(128)S(6)} add(%gte.1, %gte.2)
  %collective-permute-start = (bf16[1024,4096]{1,0:T(8,128)(2,1)}, bf16[1024,4096]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%gte.0), channel_id=3, source_target_pairs={{0,7},{1,0}}
  %fusion.22 = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%gte.0, %gte.0), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/dot_general"}, backend_config={"window_config":{"estimated_cycles":"76212","cost_model_type":"CLASSIC"}}
  %collective-permute-done = bf16[1024,4096]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start)
  ROOT %tuple.32 = (bf16[1024,4096]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%collective-permute-done, %add.33, %gte.2)
}

%cond (param.5: (bf16[1024,4096], u32[], u32[])) -> pred[] {
  %constant.44 = u32[]{:T(128)} constant(4)
  %param.5 = (bf16[1024,4096]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %gte.83 = u32[]{:T(128)} get-tuple-element(%param.5), index=1
  ROOT %compare.3 = pred[]{:T(512)} compare(%gte.83, %constant.44), direction=LT
}

ENTRY %main.0_spmd (param.2: bf16[1024,4096]) -> bf16[1024,4096] {
  %constant.19 = u32[]{:T(128)} constant(0)
  %constant.42 = u32[]{:T(128)} constant(2)
  %param.2 = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[8,1]<=[8]}
  %copy.15 = u32[]{:T(128)S(6)} copy(%constant.19)
  %tuple.33 = (bf16[1024,4096]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%param.2, %copy.15, %constant.42)
  %while.3 = (bf16[1024,4096]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}, u32[]{:T(128)}) while(%tuple.33), condition=%cond, body=%body
  %get-tuple-element.11 = bf16[1024,4096]{1,0:T(8,128)(2,1)} get-tuple-element(%while.3), index=0
  %copy.20 = f32[100,40]{1,0:T(8,128)} copy(%get-tuple-element.11), metadata={op_name="jit(f)/scores"}
  ROOT %all-reduce = bf16[1024,4096]{1,0:T(8,128)(2,1)} all-reduce(%get-tuple-element.11), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%region_0.0.clone
}
"""  # noqa: E501

# One all-gather that TPU spreads over two fusions, then a reduce-scatter and a gradient sum.
FUSED = """HloModule jit_g, is_scheduled=true

%start (p: bf16[2048,1024]) -> (bf16[2048,1024], bf16[2048,8192]) {
  %p = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.16 = bf16[2048,8192]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={1}
  ROOT %custom-call.9 = (bf16[2048,1024]{1,0:T(8,128)(2,1)}, bf16[2048,8192]{1,0:T(8,128)(2,1)}) custom-call(%all-gather.16), custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[2048,8192]) -> bf16[2048,8192] {
  %p = bf16[2048,8192]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.20 = bf16[2048,8192]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={1}
  ROOT %custom-call.11 = bf16[2048,8192]{1,0:T(8,128)(2,1)} custom-call(%all-gather.20), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p: f32[8192,128]) -> f32[1024,128] {
  %p = f32[8192,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.4 = f32[8192,128]{1,0:T(8,128)} all-reduce(%p), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %index = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.2 = f32[1024,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.4, %index, %index), dynamic_slice_sizes={1024,128}
}

ENTRY %main (a: bf16[2048,1024], b: f32[8192,128]) -> f32[1024,128] {
  %a = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[8192,128]{1,0:T(8,128)} parameter(1)
  %fusion.1 = (bf16[2048,1024]{1,0:T(8,128)(2,1)}, bf16[2048,8192]{1,0:T(8,128)(2,1)}) fusion(%a), kind=kCustom, calls=%start
  %fusion.2 = bf16[2048,8192]{1,0:T(8,128)(2,1)} fusion(%fusion.1), kind=kCustom, calls=%done
  %reduce-scatter.9 = f32[1024,128]{1,0:T(8,128)} reduce-scatter(%b), channel_id=6, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
  %all-reduce-start.1 = (f32[320]{0:T(512)}, f32[10]{0:T(128)}) all-reduce-start(%b, %b), replica_groups={}, to_apply=%add
  %all-reduce-done.1 = (f32[320]{0:T(512)}, f32[10]{0:T(128)}) all-reduce-done(%all-reduce-start.1)
  ROOT %fusion.3 = f32[1024,128]{1,0:T(8,128)} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_arrays_take_the_room_their_tiles_do():
    tiled, scalar, on_chip = parse_arrays(
        "(bf16[2,100,40]{2,1,0:T(8,128)(2,1)}, u32[]{:T(128)}, f32[16,256]{1,0:T(8,128)S(1)})"
    )
    assert tiled.bytes == 2 * 104 * 128 * 2
    assert tiled.dense_bytes == 2 * 100 * 40 * 2
    assert scalar.dims == () and not scalar.on_chip
    assert on_chip.on_chip and on_chip.bytes == 16 * 256 * 4
    (turned,) = parse_arrays("f32[40,100]{0,1:T(8,128)}")  # the first dimension is the minor one
    assert turned.bytes == 104 * 128 * 4


@pytest.mark.parametrize(
    "text, members",
    [
        ("replica_groups={{0,4},{1,5}}", [0, 4]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("source_target_pairs={{0,7},{1,0}}", [0, 7]),
        ("replica_groups={}, to_apply=%add", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_groups_in_every_notation(text, members):
    assert replica_group(f"channel_id=7, {text}, use_global_device_ids=true", 8) == members


def test_a_loop_counts_as_often_as_it_runs():
    schedule = hlo.read(WINDOWED, 8, island=4)
    permute, reduce = schedule.collectives
    assert (permute.kind, permute.times, permute.in_loop) == ("collective-permute", 2, True)
    assert permute.bytes == 1024 * 4096 * 2 and permute.asynchronous and permute.islands == 2
    assert (reduce.kind, reduce.group, reduce.times) == ("all-reduce", 4, 1)
    assert not reduce.asynchronous and reduce.islands == 1
    (product,) = [work for work in schedule.operations if work.matrix]
    assert (product.cycles, product.times) == (76212, 2)
    assert product.bytes == 2 * 1024 * 4096 * 2  # its operands; the result stays on the chip
    assert schedule.unknown_loops == 0
    assert estimate.loop_factor(schedule) == 2


def as_elements(text):
    """The text as jax 0.12 prints schedules: `%name#1`, and no get-tuple-element."""
    found = re.findall(r"^  %(\S+) = .* get-tuple-element\(%(\S+)\), index=(\d+).*\n", text, re.M)
    text = re.sub(r"^  %\S+ = .* get-tuple-element\(.*\n", "", text, flags=re.M)
    for name, whole, index in reversed(found):
        text = re.sub(rf"%{re.escape(name)}(?![\w.\-])", f"%{whole}#{index}", text)
    return text


@pytest.mark.parametrize("nested", [False, True])
def test_elements_of_results_are_read_in_both_notations(nested):
    text = WINDOWED.replace("S(1)}, u32[]{:T(128)}, /*", "}, u32[]{:T(128)}, /*")
    if nested:  # the loop's end in another tuple, of which an element is an element's
        shape = "(bf16[1024,4096]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}, u32[]{:T(128)})"
        text = text.replace(
            "  %get-tuple-element.11 = ",
            f"  %both = (u32[]{{:T(128)}}, {shape}) tuple(%copy.15, %while.3)\n"
            f"  %one = {shape} get-tuple-element(%both), index=1\n  %get-tuple-element.11 = ",
        ).replace("get-tuple-element(%while.3), index=0", "get-tuple-element(%one), index=0")
    elements = as_elements(text)
    assert "get-tuple-element" not in elements and "%param#2)" in elements
    assert ("%both#1#0)" if nested else "%while.3#0)") in elements
    assert hlo.read(elements, 8) == hlo.read(text, 8)
    assert hlo.read(elements, 8).unknown_loops == 0


def test_a_loop_of_unknown_length_is_told_of():
    schedule = hlo.read(WINDOWED.replace("direction=LT", "direction=NE"), 8)
    assert schedule.unknown_loops == 1
    notes = estimate_notes(schedule)
    assert "lower bounds" in notes


def test_known_trip_counts_are_believed():
    text = WINDOWED.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert hlo.read(text, 8).collectives[0].times == 7


def test_temporaries_are_padded_and_without_outputs():
    buffers = {b.shape: b for b in hlo.read(WINDOWED, 8).buffers}
    assert buffers["f32[100,40]"].bytes == 104 * 128 * 4
    assert buffers["f32[100,40]"].op_name == "jit(f)/scores"
    sizes = [b.bytes for b in hlo.read(WINDOWED, 8).buffers]
    assert sizes == sorted(sizes, reverse=True)


def test_collectives_in_fusions_count_once():
    found = hlo.read(FUSED, 8).collectives
    assert [(c.kind, c.group, c.asynchronous) for c in found] == [
        ("all-gather", 8, True),
        ("reduce-scatter", 8, False),
        ("all-reduce", 8, True),
        ("reduce-scatter", 8, False),
    ]
    assert [c.bytes for c in found] == [2048 * 8192 * 2, 8192 * 128 * 4, 330 * 4, 8192 * 128 * 4]


BESIDE = """HloModule jit_f, is_scheduled=true

%start (a: f32[8,128]) -> (f32[8,128], f32[8,128]) {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %sum.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%a), channel_id=3, to_apply=%add
  ROOT %call.1 = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) custom-call(%a, %sum.1), custom_call_target="AsyncCollectiveStart"
}

%middle (b: f32[8,128]) -> f32[8,128] {
  %b = f32[8,128]{1,0:T(8,128)} parameter(0)
  %sum.2 = f32[8,128]{1,0:T(8,128)} all-reduce(%b), channel_id=3, to_apply=%add
  ROOT %product = f32[8,128]{1,0:T(8,128)} convolution(%b, %sum.2), dim_labels=bf_io->bf
}

%end (c: f32[8,128]) -> f32[8,128] {
  %c = f32[8,128]{1,0:T(8,128)} parameter(0)
  %sum.3 = f32[8,128]{1,0:T(8,128)} all-reduce(%c), channel_id=3, to_apply=%add
  ROOT %call.2 = f32[8,128]{1,0:T(8,128)} custom-call(%c, %sum.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %gather.1 = (f32[8,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) all-gather-start(%p), channel_id=1, dimensions={0}
  %before = f32[8,128]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%none
  %gather.2 = f32[64,128]{1,0:T(8,128)} all-gather-done(%gather.1)
  %async-collective-start = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) fusion(%before), kind=kCustom, calls=%start
  %got = f32[8,128]{1,0:T(8,128)} get-tuple-element(%async-collective-start), index=0
  %fusion.7 = f32[8,128]{1,0:T(8,128)} fusion(%got), kind=kOutput, calls=%middle, backend_config={"window_config":{},"estimated_cycles":"15000"}
  %async-collective-done = f32[8,128]{1,0:T(8,128)} fusion(%fusion.7), kind=kCustom, calls=%end
  ROOT %after = f32[8,128]{1,0:T(8,128)} fusion(%async-collective-done), kind=kLoop, calls=%none
}
"""  # noqa: E501


def test_the_start_of_a_sum_is_read_with_and_without_its_operands():
    results = "(f32[320]{0:T(512)}, f32[10]{0:T(128)})"
    start = f"{results} all-reduce-start"
    assert start in FUSED
    with_operands = FUSED.replace(start, f"({results}, {results}) all-reduce-start")
    assert hlo.read(with_operands, 8).collectives == hlo.read(FUSED, 8).collectives
    one = FUSED.replace(f"{start}(%b, %b)", "f32[320]{0:T(512)} all-reduce-start(%b)")
    both = one.replace("f32[320]{0:T(512)} all", "((f32[320]{0:T(512)}), f32[320]{0:T(512)}) all")
    assert hlo.read(both, 8).collectives == hlo.read(one, 8).collectives
    assert sum(c.bytes == 4 * 320 for c in hlo.read(both, 8).collectives) == 1


def test_of_asynchronous_collectives_only_what_is_scheduled_beside_them_hides():
    schedule = hlo.read(BESIDE, 8)
    gather, reduce = schedule.collectives
    assert gather.asynchronous and reduce.asynchronous
    assert [one.bytes for one in gather.beside] == [2 * 8 * 128 * 4]
    assert [(one.cycles, one.matrix) for one in reduce.beside] == [(15000, True)]
    assert len(schedule.operations) == 3  # what starts and ends a collective is no work of its own
    topology = topologies.parse("v5e:2x4")
    took = estimate.step_time(schedule, topology, 0.0)
    alone = (
        64 * 128 * 4 * 7 / 8 / 100e9 - 2 * 8 * 128 * 4 / 819e9
    )  # the other takes less than 10 us
    assert took.exposed == pytest.approx(alone)


def test_transfers_between_slices_are_collectives():
    text = """ENTRY %main (p: f32[1,4,128]) -> f32[1,4,128] {
  %p = f32[1,4,128]{2,1,0:T(4,128)} parameter(0)
  %after-all.7 = token[] after-all()
  %send.7 = (f32[1,4,128]{2,1,0:T(4,128)}, u32[], token[]) send(%p, %after-all.7), channel_id=15, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.7 = token[] send-done(%send.7), channel_id=15, is_host_transfer=true
  %recv.7 = (f32[1,4,128]{2,1,0:T(4,128)}, u32[], token[]) recv(%after-all.7), channel_id=16
  %recv-done.7 = (f32[1,4,128]{2,1,0:T(4,128)}, token[]) recv-done(%recv.7), channel_id=16
  ROOT %out = f32[1,4,128]{2,1,0:T(4,128)} get-tuple-element(%recv-done.7), index=0
}
"""
    schedule = hlo.read(text, devices=16, island=8)
    (found,) = schedule.collectives
    assert (found.kind, found.bytes, found.group, found.islands) == ("all-reduce", 2048, 2, 2)
    assert found.asynchronous and not schedule.operations
    seconds = estimate.collective_seconds(found, topologies.parse("2*v5e:2x4"))
    assert seconds == pytest.approx(2 * 2048 / 2 / 3.1e9)


# A copy of a part into VMEM as it is printed before machine code is made; after that it is
# `%slice-start = (...) slice-start(%p), slice={[0:2]}`.
COPIED = """ENTRY %main (p: f32[8,128]) -> f32[2,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %part = ((f32[8,128]{1,0:T(8,128)}), f32[2,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) async-start(%p), calls=%async
  ROOT %done = f32[2,128]{1,0:T(8,128)S(1)} async-done(%part)
}

%async (q: f32[8,128]) -> f32[2,128] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %slice.1 = f32[2,128]{1,0:T(8,128)S(1)} slice(%q), slice={[0:2], [0:128]}
}
"""  # noqa: E501


def test_copies_into_the_chip_run_beside_the_rest_however_they_are_printed():
    assert not hlo.read(COPIED, 1).operations
    assert hlo.read(
        COPIED.replace("ROOT %slice.1 =", "%a = f32[] add(%q, %q)\n  ROOT %b ="), 1
    ).operations


def test_what_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("module @jit_f {}", 8)


def test_the_text_of_this_version_on_cpu():
    def f(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.tanh(y @ y), x)

    text = jax.jit(f).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().as_text()
    schedule = hlo.read(text, 1)
    assert max(work.times for work in schedule.operations) == 5
    assert schedule.unknown_loops == 0


# ---- kernels -----------------------------------------------------------------------------------

KERNEL = """HloModule jit_k, is_scheduled=true

ENTRY %main (x: f32[256,256]) -> f32[256,256] {
  %x = f32[256,256]{1,0:T(8,128)} parameter(0)
  %square.1 = f32[256,256]{1,0:T(8,128)S(1)} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUz=","cost_estimate":{"flops":"33554432","transcendentals":"7","bytes_accessed":"786432"},"needs_layout_passes":true}}
  ROOT %other.2 = f32[256,256]{1,0:T(8,128)} custom-call(%square.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUz="}}
}
"""  # noqa: E501


def test_kernels_count_by_the_cost_they_declare():
    schedule = hlo.read(KERNEL, 1)
    assert [(k.name, k.flops, k.bytes, k.declared) for k in schedule.kernels] == [
        ("square", 33554432.0, 786432.0, True),
        ("other", None, None, False),
    ]
    took = estimate.step_time(schedule, topologies.parse("v5e:2x2"), 0.0)
    assert took.kernels == pytest.approx(786432 / 819e9)


FLASH = """HloModule jit_k, is_scheduled=true

ENTRY %main (x: bf16[2,4,1024,40]) -> bf16[2,4,1024,40] {
  %x = bf16[2,4,1024,40]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %splash_mha_fwd_residuals.8 = bf16[2,4,1024,40]{3,2,1,0:T(8,128)(2,1)} custom-call(%x, %x, %x), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1,1]{2,1,0}, bf16[2,4,1024,40]{3,2,1,0}, bf16[2,4,1024,40]{3,2,1,0}, bf16[2,4,1024,40]{3,2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="jit(f)/splash"}, backend_config={"custom_call_config":{"body":"TUz="}}
  %after.1 = bf16[2,4,1024,40]{3,2,1,0:T(8,128)(2,1)} copy(%x)
  ROOT %last = bf16[2,4,1024,40]{3,2,1,0:T(8,128)(2,1)} all-reduce(%after.1), replica_groups={{0,1}}
}
"""  # noqa: E501


def test_the_flash_kernels_count_by_the_shapes_they_take():
    schedule = hlo.read(FLASH, 2)
    (kernel,) = schedule.kernels
    assert len(schedule.collectives) == 1  # the kernel's lines do not end the program
    assert kernel.name == "splash_mha_fwd_residuals" and not kernel.declared
    # Two products, in which the head dimension of 40 fills 128 lanes, and the vector units' part:
    # 6,657 bundles for 1,024 x 1,024 scores are 6.5 a tile, of which a product takes 2.
    product = 2 * 2 * 4 * 1024 * 1024 * 128
    assert kernel.flops / product == pytest.approx(6657 / 1024 / 2, rel=0.02)
    assert kernel.bytes and "LACKS" not in estimate_notes(hlo.read(FLASH, 1))
    # Of one example the compiler drops the first axis; the table keeps its three.
    one = FLASH.replace("[2,4,1024,40]{3,2,1,0", "[4,1024,40]{2,1,0").replace("[2,4", "[4")
    assert hlo.read(one, 2).kernels[0].flops == kernel.flops / 2


def test_a_kernel_without_a_cost_is_shouted_about():
    notes = estimate_notes(hlo.read(KERNEL, 1))
    assert "LACKS THE TIME OF 1 KERNEL(S): other" in notes
    assert "CostEstimate" in notes and "square" in notes


def estimate_notes(schedule):
    from sdjax.planning.planner import warnings

    return "\n".join(warnings(schedule, topologies.parse("v5e:2x2"), "tpu", quick=False))


# ---- FLOPs -------------------------------------------------------------------------------------


def convolution(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=names, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_strides": (2, 2), "padding": ((0, 1), (0, 1))},
        {"rhs_dilation": (2, 3), "padding": "VALID"},
        {"lhs_dilation": (2, 2), "padding": ((2, 2), (1, 2))},
        {"feature_group_count": 3},
    ],
    ids=str,
)
def test_flops_of_products_in_the_text_are_those_that_xla_counts(options):
    """Forward and both gradients, which XLA makes convolutions of other windows and dilations."""
    x = jnp.ones((2, 9, 8, 6))
    kernel = jnp.ones((3, 3, 6 // options.get("feature_group_count", 1), 12))
    out, pullback = jax.vjp(lambda x, k: convolution(x, k, **options), x, kernel)
    for function, argument in [
        (lambda x: convolution(x, kernel, **options), x),
        (lambda dy: pullback(dy)[0], out),
        (lambda dy: pullback(dy)[1], out),
        (lambda x: jnp.einsum("bhwc,bhwd->bcd", x, x), x),
    ]:
        lowered = jax.jit(function).lower(argument)
        text = lowered.as_text(dialect="hlo").replace("main.1 {", "main.1 () -> f32[] {")
        found = hlo.read(text, 1)
        flops = sum(work.flops for work in found.operations)
        assert flops > 0 and flops == lowered.cost_analysis()["flops"]


def test_flops_of_products_convolutions_loops_and_kernels():
    a, b = jnp.ones((4, 8, 16)), jnp.ones((4, 16, 32))
    assert count_flops(jnp.matmul, a, b) == 2 * 4 * 8 * 16 * 32
    scanned = jax.lax.scan
    assert (
        count_flops(lambda x: scanned(lambda c, _: (c @ c, None), x, None, length=3), jnp.eye(4))
        == 3 * 2 * 4**3
    )

    def strided(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).sum()

    x, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 6, 10))
    forward = 2 * (2 * 4 * 4 * 10) * 9 * 6
    assert count_flops(strided, x, kernel) == forward
    # Each gradient costs what the forward does (bar the borders).
    both = count_flops(jax.grad(strided, argnums=(0, 1)), x, kernel)
    assert both == pytest.approx(3 * forward, rel=0.35)

    def copy(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    cost = pl.CostEstimate(flops=1234, transcendentals=0, bytes_accessed=1)
    kernel_call = pl.pallas_call(copy, out_shape=x, cost_estimate=cost)
    assert count_flops(kernel_call, x) == 1234


def test_gradients_cost_a_product_for_each_side_and_nothing_that_is_computed_again():
    x, product = jnp.eye(4), 2 * 4**3

    def twice(w, x):  # the first product has no gradient on its left, the second on both sides
        return ((x @ w) @ w).sum()

    def carried(w, x):  # from the second pass on, both sides of a product have a gradient
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=3)[0].sum()

    @jax.custom_vjp
    def again(a, b):
        return a @ b

    again.defvjp(
        lambda a, b: (a @ b, (a, b)),
        lambda saved, d: ((saved[0] @ saved[1]) @ d, (saved[0] @ saved[1]) @ d),
    )
    assert gradient_flops(twice, x, x) == 5 * product
    assert gradient_flops(jax.checkpoint(twice), x, x) == 5 * product
    assert gradient_flops(carried, x, x) == 9 * product
    assert gradient_flops(lambda w, x: again(w, x).sum(), x, x) == 2 * product
    assert gradient_flops(lambda w, x: again(w, w).sum(), x, x) == 3 * product
    either = lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: w @ x, lambda: w @ w).sum()  # noqa: E731
    assert gradient_flops(either, x, x) == 3 * product
    assert gradient_flops(lambda w, x: (jax.lax.stop_gradient(w) @ x).sum(), x, x) == product


@pytest.mark.parametrize(
    "preset, side, teraflops",
    # MLPerf's 2.413 TFLOP an image of SD2 is three times the forward
    [
        ("SD1", 32, 0.180),
        ("SD1", 64, 0.803),
        ("SD1", 96, 2.148),
        ("SD1", 128, 4.674),
        ("SD2", 32, 0.181),
        ("SD2", 64, 2.413 / 3),
        ("SD2", 96, 2.149),
        ("SD2", 128, 4.675),
        ("SDXL", 32, 0.428),
        ("SDXL", 64, 1.589),
        ("SDXL", 96, 3.641),
        ("SDXL", 128, 6.761),
    ],
)
def test_flops_of_the_unets(preset, side, teraflops):
    presets = {"SD2": {"preset": "sd2"}, "SDXL": {"family": "sdxl"}}
    c = default(**presets.get(preset, {}))
    counted = denoiser_flops(resolve_without_data(c), (side, side, 4))
    assert counted / 1e12 == pytest.approx(teraflops, abs=6e-4)


def test_training_costs_three_times_the_forward_whatever_is_recomputed(tiny_config):
    """The text encoder and the UNet train; the VAE, frozen, adds its encoder once."""
    tiny_config.vae_from = ""
    tiny_config.model.vae.update(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    plain = train_flops(resolve(tiny_config))
    tiny_config.model.remat = "block"
    assert train_flops(resolve(tiny_config)) == plain
    forward = denoiser_flops(resolve(tiny_config), (16, 16, 4))
    assert 3 * forward * 0.9 < plain < 3 * forward * 2


def resolve_without_data(c):
    c.data.path = "unused"
    return resolve(c)


# A loop's fusion that puts one block's results into stacks of eight, one of them by a bitcast.
STACKED = """HloModule jit_f, is_scheduled=true

%fused (p0: f32[8,128,128], p1: f32[128,128], p2: s32[], p3: bf16[8,128,128]) -> (f32[8,128,128], bf16[8,128,128]) {
  %p0 = f32[8,128,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[128,128]{1,0:T(8,128)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %p3 = bf16[8,128,128]{2,1,0:T(8,128)(2,1)} parameter(3)
  %one = f32[1,128,128]{2,1,0:T(8,128)} bitcast(%p1)
  %zero = s32[]{:T(128)} constant(0)
  %half = bf16[1,128,128]{2,1,0:T(8,128)(2,1)} convert(%one)
  %first = f32[8,128,128]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %one, %p2, %zero, %zero)
  %second = bf16[8,128,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p3, %half, %p2, %zero, %zero)
  %same = bf16[8,128,128]{2,1,0:T(8,128)(2,1)} bitcast(%second)
  ROOT %both = (f32[8,128,128]{2,1,0:T(8,128)}, bf16[8,128,128]{2,1,0:T(8,128)(2,1)}) tuple(%first, %same)
}

ENTRY %main (a: f32[8,128,128], b: f32[128,128], i: s32[], c: bf16[8,128,128]) -> (f32[8,128,128], bf16[8,128,128]) {
  %a = f32[8,128,128]{2,1,0:T(8,128)} parameter(0)
  %b = f32[128,128]{1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %c = bf16[8,128,128]{2,1,0:T(8,128)(2,1)} parameter(3)
  ROOT %fusion.1 = (f32[8,128,128]{2,1,0:T(8,128)}, bf16[8,128,128]{2,1,0:T(8,128)(2,1)}) fusion(%a, %b, %i, %c), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
}
"""  # noqa: E501


def test_slices_put_into_several_arrays_count_alone():
    (operation,) = hlo.read(STACKED, 1).operations
    block = 128 * 128
    assert operation.bytes == 4 * block + 4 * block + 2 * block  # read, and written to each stack
