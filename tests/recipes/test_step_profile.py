from __future__ import annotations

import pytest

from hrm_text.recipes.step_profile import COMMUNICATION, IDLE, OTHER, PARTS, STEP, Kernel, part_of, sorted_by_part
from hrm_text.train.step import HEAD_AND_LOSS, OPTIMIZER


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("attention_forward", "attention forward"),
        ("attention_backward_keys", "attention backward"),
        (
            "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<traits<128>>",
            "attention backward",
        ),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention forward"),
        ("triton_tem_fused_flex_attention_backward_7", "attention backward"),
        ("triton_tem_fused_3", "attention forward"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matrix products"),
        ("rms_norm_backward", "elementwise and norms"),
        ("swiglu_forward", "elementwise and norms"),
        ("gate_backward", "elementwise and norms"),
        ("triton_poi_fused_add_mul_0", "elementwise and norms"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "elementwise and norms"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("cross_entropy_row", HEAD_AND_LOSS),
        ("adam_atan2_update", OPTIMIZER),
        ("void something::unheard_of()", OTHER),
    ],
)
def test_a_kernel_belongs_to_a_part_by_its_name(name: str, part: str) -> None:
    assert part_of(name) == part


def test_every_microsecond_of_the_step_is_in_one_part() -> None:
    profile = sorted_by_part(
        [
            Kernel("nvjet", 0, 1000),  # of the step before
            Kernel(STEP, 2000, 10_000),
            Kernel(HEAD_AND_LOSS, 4000, 5000),
            Kernel(OPTIMIZER, 9000, 10_000),
            Kernel("attention_forward", 2000, 3000),
            Kernel("nvjet", 3500, 4000),
            Kernel("nvjet", 4000, 5000),  # in the head
            Kernel("Memcpy HtoD", 4800, 5200),  # beside it, on another stream
            Kernel("attention_backward_keys", 5200, 8000),
            Kernel("unheard_of", 8000, 8600),
            Kernel("void at::native::" + 100 * "x", 8600, 9000),
            Kernel("multi_tensor_apply", 9000, 9200),
            Kernel("reduce_kernel", 9200, 10_000),
        ]
    )
    expected = {
        "attention forward": 1.0, "attention backward": 2.8, "matrix products": 0.5, HEAD_AND_LOSS: 1.0 + 0.2,
        OPTIMIZER: 1.0, OTHER: 1.0, IDLE: 0.5,
    }  # fmt: skip
    assert profile.ms_by_part == pytest.approx({**dict.fromkeys([*PARTS, OTHER, COMMUNICATION, IDLE], 0.0), **expected})
    assert sum(profile.ms_by_part.values()) == pytest.approx(8.0)
    assert profile.largest_others == ["unheard_of (0.60 ms)", "void at::native::" + 42 * "x" + "… (0.40 ms)"]


def test_communication_is_exposed_where_nothing_else_runs() -> None:
    profile = sorted_by_part(
        [
            Kernel(STEP, 0, 4000),  # of one stream: the range may end before the step does
            Kernel("nvjet", 0, 2000),
            Kernel("FSDP::all_gather (layers.0)", 0, 9000),
            Kernel("ncclDevKernel_AllGather", 1500, 2600),
            Kernel("nvjet", 2700, 5000),
            Kernel("ncclDevKernel_SendRecv", 3000, 4000),
            Kernel("ncclDevKernel_SendRecv", 4800, 5500),
        ]
    )
    assert profile.ms_by_part["matrix products"] == pytest.approx(4.3)
    assert profile.ms_by_part[COMMUNICATION] == pytest.approx(0.6 + 0.5)
    assert profile.hidden_communication_ms == pytest.approx(0.5 + 1.0 + 0.2)
    assert profile.ms_by_part[IDLE] == pytest.approx(0.1)
    assert profile.ms_by_part[OTHER] == 0
