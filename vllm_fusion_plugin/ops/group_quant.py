# SPDX-License-Identifier: Apache-2.0
"""The FP8 group quantiser by itself, for activations whose producer cannot quantise them.

Exact on NVIDIA GPUs: codes and scales are the bytes of vLLM's `per_token_group_fp8_quant` (`quant_form="custom_op"` or
`reciprocal`, by version) or of Inductor's kernel for `QuantFP8.forward_native` (`native` or `native_floored`). The forms are
in ops/quant.py.
"""

from __future__ import annotations

import torch

from .quant import (
    FP8_DTYPE,
    GROUP_FORMS,
    INPUT_DTYPES,
    check_form,
    check_group_layout,
    empty_group_scales,
    group_fp8_quant_reference,
)
from .registry import register


def _check(x: torch.Tensor, group_size: int, column_major: bool, tma_aligned: bool, quant_form: str) -> tuple[int, int]:
    """Rows and width of x [M, K]; ValueError on what no kernel takes."""
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
    if x.dim() != 2:
        raise ValueError(f"x has {x.dim()} dimensions, shape {tuple(x.shape)}; allowed: 2, [tokens, width]")
    rows, width = x.shape
    if width == 0:
        raise ValueError("x has 0 columns; allowed: a multiple of group_size above 0")
    if x.stride(1) != 1:
        raise ValueError(f"x has stride {x.stride(1)} along its columns; allowed: 1 (rows themselves may be strided)")
    check_group_layout(width, group_size, column_major, tma_aligned)
    check_form("quant_form", quant_form, GROUP_FORMS)
    return rows, width


def _fake(x, group_size, column_major_scales, tma_aligned_scales, use_ue8m0, eps, quant_form):
    rows, width = _check(x, group_size, column_major_scales, tma_aligned_scales, quant_form)
    scales = empty_group_scales(x, rows, width // group_size, column_major_scales, tma_aligned_scales)
    return x.new_empty((rows, width), dtype=FP8_DTYPE), scales


def _cuda(x, group_size, column_major_scales, tma_aligned_scales, use_ue8m0, eps, quant_form):
    from ..kernels.group_quant import group_fp8_quant as launch

    codes, scales = _fake(x, group_size, column_major_scales, tma_aligned_scales, use_ue8m0, eps, quant_form)
    launch(x, codes, scales, group_size, use_ue8m0, eps, quant_form)
    return codes, scales


def _cpu(x, group_size, column_major_scales, tma_aligned_scales, use_ue8m0, eps, quant_form):
    _check(x, group_size, column_major_scales, tma_aligned_scales, quant_form)
    return group_fp8_quant_reference(x, group_size, column_major_scales, tma_aligned_scales, use_ue8m0, eps, quant_form)


_OP = register(
    "group_fp8_quant(Tensor x, int group_size, bool column_major_scales, bool tma_aligned_scales, bool use_ue8m0, "
    "float eps, str quant_form) -> (Tensor, Tensor)",
    fake=_fake,
    cuda=_cuda,
    cpu=_cpu,
)


def group_fp8_quant(
    x: torch.Tensor,
    group_size: int = 128,
    *,
    column_major_scales: bool = False,
    tma_aligned_scales: bool = False,
    use_ue8m0: bool = False,
    eps: float = 1e-10,
    quant_form: str = "custom_op",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, quantised to FP8 in groups of `group_size` along each row.

    Args:
        x: [M, K] bf16 or fp16; rows may be strided, columns not. M may be 0.
        group_size: 64 or 128; divides K.
        column_major_scales: scales with strides (1, M) instead of (K / group_size, 1).
        tma_aligned_scales: with column_major_scales, strides (1, M rounded up to 4); the padding is zero.
        use_ue8m0: round each scale up to a power of two.
        eps: floor of a group's maximum (quant_form custom_op and reciprocal).
        quant_form: which of vLLM's quantisers to reproduce; see ops/quant.py.

    Returns:
        codes [M, K] float8_e4m3fn, contiguous, and scales [M, K / group_size] fp32 in the layout asked for.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `per_token_group_fp8_quant`, which takes contiguous rows only.
    """
    return _OP(x, group_size, column_major_scales, tma_aligned_scales, use_ue8m0, eps, quant_form)
