# SPDX-License-Identifier: Apache-2.0
"""The FP8 group quantiser by itself, for activations whose producer cannot quantise them.

Exact on NVIDIA GPUs: codes and scales are the bytes of vLLM's `per_token_group_fp8_quant` (`quant_rounding="custom_op"` or
`reciprocal`, by version) or of Inductor's kernel for `QuantFP8.forward_native` (`native` or `native_floored`). What the
roundings are is in ops/quant.py.
"""

from __future__ import annotations

import torch

from ..kernels.fp8 import FORMATS, OCP
from .quant import (
    FP8,
    INPUT_DTYPES,
    SCALES,
    GroupScales,
    check_group_rounding,
    group_fp8_quant_reference,
)
from .registry import register


def _check(x: torch.Tensor, how: GroupScales, quant_rounding: str, fp8: str) -> tuple[int, int]:
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
    how.check(width)
    check_group_rounding(quant_rounding, x.dtype, how, fp8)
    return rows, width


def _fake(x, group_size, scale_layout, use_ue8m0, quant_rounding, fp8=OCP):
    how = GroupScales(group_size, scale_layout, use_ue8m0)
    rows, width = _check(x, how, quant_rounding, fp8)
    return x.new_empty((rows, width), dtype=FORMATS[fp8].dtype), how.empty(x, rows, width)


def _cuda(x, group_size, scale_layout, use_ue8m0, quant_rounding, fp8=OCP):
    from ..kernels.group_quant import group_fp8_quant as launch

    codes, scales = _fake(x, group_size, scale_layout, use_ue8m0, quant_rounding, fp8)
    launch(x, codes, scales, group_size, use_ue8m0, quant_rounding, fp8=fp8)
    return codes, scales


def _cpu(x, group_size, scale_layout, use_ue8m0, quant_rounding, fp8=OCP):
    how = GroupScales(group_size, scale_layout, use_ue8m0)
    _check(x, how, quant_rounding, fp8)
    return group_fp8_quant_reference(x, how, quant_rounding, fp8)


_OP = register(
    f"group_fp8_quant(Tensor x, {SCALES}, str quant_rounding, {FP8}) -> (Tensor, Tensor)",
    fake=_fake,
    cuda=_cuda,
    cpu=_cpu,
)


def group_fp8_quant(
    x: torch.Tensor, scales: GroupScales = GroupScales(), *, quant_rounding: str = "custom_op", fp8: str = OCP
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, quantised to FP8 in groups along each row, in one kernel.

    Args:
        x: [M, K] bf16 or fp16; rows may be strided, columns not. M may be 0.
        scales: size of the groups, 64 or 128, which divides K; layout of the scales; whether they are powers of two.
        quant_rounding: which of vLLM's quantisers to reproduce; see ops/quant.py.
        fp8: format of the codes; see kernels/fp8.py.

    Returns:
        codes [M, K] in the format asked for, contiguous, and scales [M, K / group_size] fp32 in the layout asked for.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `per_token_group_fp8_quant`.
    """
    return _OP(x, *scales, quant_rounding, fp8)
