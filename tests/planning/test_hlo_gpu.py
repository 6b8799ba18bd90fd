"""Reading programs compiled for GPUs, on excerpts of what XLA for CUDA (jax 0.10.2) prints."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sdjax.planning import estimate, hlo, topologies

# A convolution with a stride, forward and back; its result times a matrix by cuBLAS and by Triton;
# attention of 64 queries over 78 keys; slices of a sum over devices.
PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=8

%gemm (p.0: bf16[8192,64], p.1: bf16[64,128]) -> bf16[8192,128] {
  %p.0 = bf16[8192,64]{1,0} parameter(0)
  %p.1 = bf16[64,128]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8192,128]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, backend_config={"sizes":["16"]}
}

%cut (p.2: f32[1000]) -> f32[10] {
  %p.2 = f32[1000]{0} parameter(0)
  %bitcast.1 = f32[10,100]{1,0} bitcast(%p.2)
  %slice.1 = f32[1,10]{1,0} slice(%bitcast.1), slice={[1:2], [0:10]}
  ROOT %bitcast.2 = f32[10]{0} bitcast(%slice.1)
}

%put (p.3: f32[1000], p.4: f32[10], p.5: s32[]) -> f32[1000] {
  %p.3 = f32[1000]{0} parameter(0)
  %p.4 = f32[10]{0} parameter(1)
  %p.5 = s32[] parameter(2)
  ROOT %dynamic-update-slice.1 = f32[1000]{0} dynamic-update-slice(%p.3, %p.4, %p.5)
}

ENTRY %main (x: bf16[8,64,64,32], k: bf16[64,3,3,32], dy: bf16[8,32,32,64], m: bf16[64,128], q: bf16[8,64,4,32], kv: bf16[8,78,4,32], s: f32[1000], i: s32[]) -> f32[1000] {
  %x = bf16[8,64,64,32]{3,2,1,0} parameter(0)
  %k = bf16[64,3,3,32]{3,2,1,0} parameter(1)
  %dy = bf16[8,32,32,64]{3,2,1,0} parameter(2)
  %m = bf16[64,128]{1,0} parameter(3)
  %q = bf16[8,64,4,32]{3,2,1,0} parameter(4)
  %kv = bf16[8,78,4,32]{3,2,1,0} parameter(5)
  %s = f32[1000]{0} parameter(6)
  %i = s32[] parameter(7)
  %cudnn-conv.1 = (bf16[8,32,32,64]{3,2,1,0}, u8[4096]{0}) custom-call(%x, %k), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(f)/conv"}, backend_config={"cudnn_conv_backend_config":{"activation_mode":"kNone"}}
  %get-tuple-element.1 = bf16[8,32,32,64]{3,2,1,0} get-tuple-element(%cudnn-conv.1), index=0
  %cudnn-conv-bw-input.1 = (bf16[8,64,64,32]{3,2,1,0}, u8[0]{0}) custom-call(%dy, %k), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %cudnn-conv-bw-filter.1 = (bf16[64,3,3,32]{3,2,1,0}, u8[0]{0}) custom-call(%x, %dy), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %bitcast.3 = bf16[8192,64]{1,0} bitcast(%get-tuple-element.1)
  %custom-call.1 = (bf16[8192,128]{1,0}, s8[4194304]{0}) custom-call(%bitcast.3, %m), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %gemm_fusion_dot.1 = bf16[8192,128]{1,0} fusion(%bitcast.3, %m), kind=kCustom, calls=%gemm, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %dot_product_attention_fwd.5 = (bf16[8,4,64,32]{3,1,2,0}, f32[8,4,64]{2,1,0}, u8[0]{0}) custom-call(%q, %kv, %kv), custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[8,64,4,32]{3,2,1,0}, bf16[8,78,4,32]{3,2,1,0}, bf16[8,78,4,32]{3,2,1,0}}, backend_config={"cudnn_fmha_backend_config":{"fmha_scale":0.125}}
  %get-tuple-element.2 = f32[8,4,64]{2,1,0} get-tuple-element(%dot_product_attention_fwd.5), index=1
  %dot_product_attention_bwd.8 = (bf16[8,4,64,32]{3,1,2,0}, bf16[8,4,78,32]{3,1,2,0}, bf16[8,4,78,32]{3,1,2,0}, u8[0]{0}) custom-call(%q, %kv, %kv, %get-tuple-element.2, %q, /*index=5*/%q), custom_call_target="__cudnn$fmhaSoftmaxBackward", operand_layout_constraints={bf16[8,64,4,32]{3,2,1,0}, bf16[8,78,4,32]{3,2,1,0}, bf16[8,78,4,32]{3,2,1,0}, f32[8,4,64]{2,1,0}, bf16[8,64,4,32]{3,2,1,0}, bf16[8,64,4,32]{3,2,1,0}}, backend_config={"cudnn_fmha_backend_config":{"fmha_scale":0.125}}
  %wrapped_slice = f32[10]{0} fusion(%s), kind=kLoop, calls=%cut
  ROOT %put_fusion = f32[1000]{0} fusion(%s, %wrapped_slice, %i), kind=kLoop, calls=%put
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def work():
    return hlo.read(PROGRAM, 8).operations


def xla_flops(function, *arrays):
    """What XLA on CPU counts of a function."""
    return jax.jit(function).lower(*arrays).cost_analysis()["flops"]


def test_calls_of_libraries_have_the_flops_that_xla_counts_of_what_they_compute(work):
    def conv(x, k):
        return lax.conv_general_dilated(
            x, k, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "OHWI", "NHWC")
        )

    x, k = jnp.zeros((8, 64, 64, 32)), jnp.zeros((64, 3, 3, 32))
    product = xla_flops(jnp.matmul, jnp.zeros((8192, 64)), jnp.zeros((64, 128)))
    counted = [one.flops for one in work if one.matrix]
    # Each product of the forward pass has one going back, for the image and for the kernel.
    assert counted == [xla_flops(conv, x, k)] * 3 + [product] * 2
    assert [one.op_name for one in work][:1] == ["jit(f)/conv"]


def test_traffic_is_without_workspace_and_of_slices_alone(work):
    x, k, dy = 2 * 8 * 64 * 64 * 32, 2 * 64 * 9 * 32, 2 * 8 * 32 * 32 * 64
    left, right, out = 2 * 8192 * 64, 2 * 64 * 128, 2 * 8192 * 128
    product = left + right + out
    cut, put = 40 + 40, 40 + 4 + 40
    assert [one.bytes for one in work] == [x + k + dy] * 3 + [product] * 2 + [cut, put]


def test_results_of_libraries_are_temporaries():
    shapes = {buffer.shape for buffer in hlo.read(PROGRAM, 8).buffers}
    assert {"bf16[8,32,32,64]", "bf16[64,3,3,32]", "bf16[8192,128]"} <= shapes


def test_attention_of_cudnn_counts_by_the_shapes_it_takes():
    forward, backward = hlo.read(PROGRAM, 8).kernels
    scores = 8 * 4 * 64 * 78
    assert (forward.name, forward.flops) == ("dot_product_attention_fwd", 2 * 2 * scores * 32)
    assert (backward.name, backward.flops) == ("dot_product_attention_bwd", 5 * 2 * scores * 32)
    arrays = 2 * 8 * 4 * 32 * (64 + 78)  # q and the output are as long as k and v, together
    assert (forward.bytes, backward.bytes) == (2 * arrays, 4 * arrays)
    assert not forward.declared


def test_sums_of_one_channel_count_each():
    """As those of `jax.shard_map` are printed."""
    line = """  %all-reduce-start{} = f32[1000]{{0}} all-reduce-start(%s), channel_id=1, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add
  %all-reduce-done{} = f32[1000]{{0}} all-reduce-done(%all-reduce-start{})
"""  # noqa: E501
    both = line.format(*".1 .1 .1".split()) + line.format(*".2 .2 .2".split())
    text = PROGRAM.replace("  ROOT %put_fusion", both + "  ROOT %put_fusion")
    sums = hlo.read(text, 8).collectives
    assert [(one.kind, one.bytes, one.group) for one in sums] == [("all-reduce", 4000, 8)] * 2


def test_time_on_a_gpu_has_a_start_for_each_operation(work):
    gpus = topologies.parse("gpu:h100:8")
    rates = estimate.Rates.of(gpus)
    assert rates.launch == 1e-6 and estimate.Rates.of(topologies.parse("v5e:2x4")).launch == 0
    conv, last = work[0], work[-1]
    assert estimate.operation_seconds(conv, rates) == 1e-6 + max(
        conv.flops / (0.6 * 989e12), conv.bytes / 3350e9
    )
    assert estimate.operation_seconds(last, rates) == 1e-6 + last.bytes / 3350e9
    schedule = hlo.read(PROGRAM, 8)
    took = estimate.step_time(schedule, gpus, flops=0.0)
    assert took.operations == pytest.approx(sum(estimate.operation_seconds(w, rates) for w in work))
    assert took.kernels == pytest.approx(
        sum(1e-6 + max(k.flops / (0.4 * 989e12), k.bytes / 3350e9) for k in schedule.kernels)
    )
    # Of a program for other hardware the roofline is all there is.
    foreign = estimate.step_time(schedule, gpus, flops=989e9, foreign=True)
    assert foreign.operations + foreign.kernels == pytest.approx(1e-3) == foreign.roofline
