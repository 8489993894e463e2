# SPDX-License-Identifier: Apache-2.0
"""MLA's two norms on a GPU: the bytes of vLLM's own unfused ops, and of the kernel that Inductor makes of its torch code.

The tests with `sanitizer` in their names are few small launches, for
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m pytest tests/kernels -k sanitizer
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vllm_fusion_plugin.ops.mla_dual_rms_norm_quant import (
    mla_dual_rms_norm_group_fp8_quant,
    mla_dual_rms_norm_group_fp8_quant_reference,
)

from .cases import DTYPES, short
from .checks import EDGE, ENDS, Wait, assert_same_bytes, check_columns, check_cuda_graph, check_ends
from .installed import OPAQUE
from .norm_checks import BF16, DEEPSEEK, EPSILON, Layout, Norm, inputs
from .test_mla_dual_rms_norm_quant import projection, weights
from .test_rms_norm_quant_gpu import ROWS, Ops, assert_nearly_same, compiled, ops, torch_norm

pytestmark = pytest.mark.gpu

__all__ = ["ops"]  # a fixture

WIDTHS = ((1536, 512), (2048, 512), (768, 256), (128, 64))  # DeepSeek-V3, and narrower and wider ones
ROTARY = 64


def random_projection(
    rows: int, q_width: int, kv_width: int, mode: Norm, device: torch.device, seed: int
) -> torch.Tensor:
    return inputs(rows, q_width + kv_width + ROTARY, mode, device, seed)[0]


def split(x: torch.Tensor, q_width: int, kv_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x[:, :q_width], x[:, q_width : q_width + kv_width]


def fused(
    q: torch.Tensor, kv: torch.Tensor, q_weight: torch.Tensor, kv_weight: torch.Tensor, mode: Norm, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return mla_dual_rms_norm_group_fp8_quant(
        q,
        kv,
        q_weight,
        kv_weight,
        EPSILON,
        EPSILON,
        layout.scales,
        norm_rounding=mode.norm_rounding,
        quant_rounding=OPAQUE,
    )


@pytest.mark.parametrize("q_width, kv_width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_native_norms_are_inductors(
    dtype: torch.dtype,
    q_width: int,
    kv_width: int,
    ops: Ops,
    device: torch.device,
    record_property: Callable[[str, object], None],
) -> None:
    """vLLM has Inductor put independent kernels into one (`combo_kernels`) where that is faster; here always."""
    mode = Norm(dtype, residual=False)
    x = random_projection(ROWS, q_width, kv_width, mode, device, seed=1)
    q, kv = split(x, q_width, kv_width)
    q_weight, kv_weight = weights(q, kv, mode)

    def norms(x: torch.Tensor, _: None, q_weight: torch.Tensor, kv_weight: torch.Tensor) -> tuple:
        q, kv = split(x, q_width, kv_width)
        return torch_norm(q, q_weight, None)[0], torch_norm(kv, kv_weight, None)[0]

    codes, scales, kv_normed = fused(q, kv, q_weight, kv_weight, mode, DEEPSEEK)
    expected_q, expected_kv = compiled(
        norms, x, None, q_weight, kv_weight, combo_kernels=True, benchmark_combo_kernel=False
    )
    if (q_width, kv_width) == (1536, 512):
        assert_same_bytes(kv_normed, expected_kv, "kv")
    else:
        assert_nearly_same(kv_normed, expected_kv, record_property, "kv")
    if q_width in (1536, 2048):
        expected_codes, expected_scales = ops.group(expected_q, DEEPSEEK)
        assert_same_bytes(codes, expected_codes, "q's codes")
        assert_same_bytes(scales, expected_scales, "q's scales")
    apart = compiled(norms, x, None, q_weight, kv_weight, combo_kernels=False)
    assert_nearly_same(kv_normed, apart[1], record_property, "kv in a kernel of its own")


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 127, 1000])
@pytest.mark.parametrize("q_width, kv_width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_custom_op_norms_are_vllms(
    dtype: torch.dtype,
    q_width: int,
    kv_width: int,
    rows: int,
    ops: Ops,
    device: torch.device,
) -> None:
    """Sums that are exact in any order."""
    mode = Norm(dtype, residual=False, norm_rounding="custom_op")
    q, kv = projection(rows, q_width, kv_width, mode, device, seed=rows)
    q_weight, kv_weight = weights(q, kv, mode)
    for layout in (DEEPSEEK, Layout(64)):
        codes, scales, kv_normed = fused(q, kv, q_weight, kv_weight, mode, layout)
        expected_codes, expected_scales = ops.group(ops.norm(q, q_weight, None)[0], layout)
        assert scales.stride() == expected_scales.stride()
        assert_same_bytes(codes, expected_codes, "q's codes")
        assert_same_bytes(scales, expected_scales, "q's scales")
        assert_same_bytes(kv_normed, ops.norm(kv, kv_weight, None)[0], "kv")


def test_rows_have_the_same_bytes_in_every_batch(device: torch.device) -> None:
    mode = BF16._replace(residual=False)
    q, kv = split(random_projection(6000, 1536, 512, mode, device, seed=2), 1536, 512)
    both = weights(q, kv, mode)
    every = fused(q, kv, *both, mode, Layout())
    for rows in (slice(0, 1), slice(3, 19), slice(700, 1800)):
        for part, whole in zip(fused(q[rows], kv[rows], *both, mode, Layout()), every, strict=True):
            assert_same_bytes(part, whole[rows], f"rows {rows.start} to {rows.stop}")


def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    """Of q, and of the projection; 14 GB. Both ends are compared with themselves alone."""
    mode = BF16._replace(residual=False)
    x = torch.zeros(2**31 // 1536 + EDGE, 1536 + 512 + ROTARY, dtype=torch.bfloat16, device=device)
    for end, seed in zip(ENDS, (3, 4), strict=True):
        x[end] = random_projection(EDGE, 1536, 512, mode, device, seed=seed)
    q, kv = split(x, 1536, 512)
    both = weights(q, kv, mode)
    alone = [fused(q[end], kv[end], *both, mode, DEEPSEEK) for end in ENDS]
    check_ends(fused(q, kv, *both, mode, DEEPSEEK), alone, either_zero=True)


def test_chain_in_a_cuda_graph(device: torch.device) -> None:
    mode = BF16._replace(residual=False)
    x = torch.empty(64, 1536 + 512 + ROTARY, dtype=torch.bfloat16, device=device)
    source = torch.empty_like(x)
    q_weight, kv_weight = weights(*split(x, 1536, 512), mode)

    def chain(wait: Wait) -> list[torch.Tensor]:
        outputs = []
        x.copy_(source)
        wait()
        q, kv = split(x, 1536, 512)
        for _ in range(3):
            codes, scales, kv = fused(q, kv, q_weight, kv_weight, mode, DEEPSEEK)
            wait()
            outputs += [codes, scales, kv]
            q = torch.cat([kv, kv, kv], dim=1)
            wait()
        return outputs

    def fill(seed: int) -> None:
        source.copy_(random_projection(64, 1536, 512, mode, device, seed=seed))

    check_cuda_graph(chain, fill, first_seed=5)


@pytest.mark.parametrize("q_width, kv_width", [(1536, 512), (384, 200), (2176, 2048)])
@pytest.mark.parametrize("rows", [1, 5])
def test_sanitizer_dual(rows: int, q_width: int, kv_width: int, device: torch.device) -> None:
    """The op's own allocations, unlike the guarded ones of the other tests: an access past their end is out of bounds."""
    mode = BF16._replace(residual=False, norm_rounding="custom_op")
    q, kv = projection(rows, q_width, kv_width, mode, device, seed=7)
    both = weights(q, kv, mode)
    codes, scales, kv_normed = fused(q, kv, *both, mode, DEEPSEEK)
    expected = mla_dual_rms_norm_group_fp8_quant_reference(
        q, kv, *both, EPSILON, EPSILON, DEEPSEEK.scales, norm_rounding="custom_op", quant_rounding=OPAQUE
    )
    check_columns(scales, expected[1], DEEPSEEK.scale_layout == "tma")
    for one, other in zip((codes, scales, kv_normed), expected, strict=True):
        assert_same_bytes(one.cpu().contiguous(), other.cpu().contiguous(), "output")
