# SPDX-License-Identifier: Apache-2.0
"""x * sigmoid(gate), then quantise: what comes between attention and its output projection in Qwen3-Next and its kin.

The rounding is Inductor's, which compiles the two operations into one kernel: fp32 up to the product, which is rounded to
x's dtype before an opaque quantiser, and not at all before a native one (`quant_rounding`, ops/quant.py).

Exact on NVIDIA GPUs: codes and scales are the bytes of Inductor's kernel and vLLM's quantiser, for all gates times a grid of
x (tests/kernels, tests with `gpu`).
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
    is_native,
)
from .registry import register


def _check(x: torch.Tensor, gate: torch.Tensor, how: GroupScales, quant_rounding: str, fp8: str) -> tuple[int, int]:
    """Rows and width of x [M, K]; ValueError on what no kernel takes."""
    for name, tensor in (("x", x), ("gate", gate)):
        if tensor.dtype not in INPUT_DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
        if tensor.dim() != 2:
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} has {tensor.dim()} dimensions, shape {shape}; allowed: 2, [tokens, width]")
        if tensor.stride(1) != 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(1)} along its columns; allowed: 1 (rows may be strided)"
            )
    if (gate.shape, gate.dtype, gate.device) != (x.shape, x.dtype, x.device):
        found = f"{gate.dtype} of shape {tuple(gate.shape)} on {gate.device}"
        raise ValueError(f"gate is {found}; allowed: as x, {x.dtype} of shape {tuple(x.shape)} on {x.device}")
    rows, width = x.shape
    if width == 0:
        raise ValueError("x has 0 columns; allowed: a multiple of group_size above 0")
    how.check(width)
    check_group_rounding(quant_rounding, x.dtype, how, fp8)
    return rows, width


def sigmoid_mul_reference(x: torch.Tensor, gate: torch.Tensor, *, rounded: bool = True) -> torch.Tensor:
    """x * sigmoid(gate) of tensors of one shape in plain torch: in x's dtype, or in fp32 if `rounded` is False."""
    y = x.float() * torch.sigmoid(gate.float())
    return y.to(x.dtype) if rounded else y


def sigmoid_mul_group_fp8_quant_reference(
    x: torch.Tensor,
    gate: torch.Tensor,
    scales: GroupScales = GroupScales(),
    *,
    quant_rounding: str = "custom_op",
    fp8: str = OCP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sigmoid_mul_group_fp8_quant` in plain torch, on any device."""
    _check(x, gate, scales, quant_rounding, fp8)
    y = sigmoid_mul_reference(x, gate, rounded=not is_native(quant_rounding))
    return group_fp8_quant_reference(y, scales, quant_rounding, fp8)


def _fake(x, gate, group_size, scale_layout, use_ue8m0, quant_rounding, fp8=OCP):
    how = GroupScales(group_size, scale_layout, use_ue8m0)
    rows, width = _check(x, gate, how, quant_rounding, fp8)
    return x.new_empty((rows, width), dtype=FORMATS[fp8].dtype), how.empty(x, rows, width)


def _cuda(x, gate, group_size, scale_layout, use_ue8m0, quant_rounding, fp8=OCP):
    from ..kernels.sigmoid_mul_quant import sigmoid_mul_group_fp8_quant as launch

    codes, scales = _fake(x, gate, group_size, scale_layout, use_ue8m0, quant_rounding, fp8)
    launch(x, gate, codes, scales, group_size, use_ue8m0, quant_rounding, fp8=fp8)
    return codes, scales


def _cpu(x, gate, group_size, scale_layout, use_ue8m0, quant_rounding, fp8=OCP):
    how = GroupScales(group_size, scale_layout, use_ue8m0)
    return sigmoid_mul_group_fp8_quant_reference(x, gate, how, quant_rounding=quant_rounding, fp8=fp8)


_OP = register(
    f"sigmoid_mul_group_fp8_quant(Tensor x, Tensor gate, {SCALES}, str quant_rounding, {FP8}) -> (Tensor, Tensor)",
    fake=_fake,
    cuda=_cuda,
    cpu=_cpu,
    per_row=("x", "gate"),
)


def sigmoid_mul_group_fp8_quant(
    x: torch.Tensor,
    gate: torch.Tensor,
    scales: GroupScales = GroupScales(),
    *,
    quant_rounding: str = "custom_op",
    fp8: str = OCP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * sigmoid(gate), quantised to FP8 in groups along each row, in one kernel.

    Args:
        x: [M, K] bf16 or fp16; rows may be strided, columns not. M may be 0.
        gate: as x.
        scales: size of the groups, 64 or 128, which divides K; layout of the scales; whether they are powers of two.
        quant_rounding: which of vLLM's quantisers to reproduce; see ops/quant.py.
        fp8: format of the codes; see kernels/fp8.py.

    Returns:
        codes [M, K] in the format asked for, contiguous, and scales [M, K / group_size] fp32 in the layout asked for.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors the output gate of vLLM's Qwen3NextAttention, compiled by Inductor, followed by `per_token_group_fp8_quant`.
    """
    return _OP(x, gate, *scales, quant_rounding, fp8)
