# SPDX-License-Identifier: Apache-2.0
"""The op: its checks, what it is to the compiler, and its reference in plain torch."""

from __future__ import annotations

import torch

from vllm_fusion_plugin.ops.quant import FP8_DTYPE, INPUT_DTYPES, check_number, static_fp8_quant_reference
from vllm_fusion_plugin.ops.registry import register


def relu2_static_fp8_quant_reference(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """relu(x)², rounded to x's dtype, then e4m3 codes under one scale; in plain torch, on any device.

    x: [M, K] bf16 or fp16, contiguous. scale: one fp32 number. NaN counts as 0.
    """
    _check(x, scale)
    positive = torch.where(x > 0, x.float(), 0.0)
    return static_fp8_quant_reference((positive * positive).to(x.dtype), scale, "custom_op")


def _check(x: torch.Tensor, scale: torch.Tensor) -> None:
    if x.dtype not in INPUT_DTYPES or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}; allowed: two contiguous dimensions of "
            f"{', '.join(map(str, INPUT_DTYPES))}"
        )
    check_number("scale", scale, x)


def _fake(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    _check(x, scale)
    return torch.empty_like(x, dtype=FP8_DTYPE)


def _cuda(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from .kernel import relu2_static_fp8_quant as launch

    codes = _fake(x, scale)
    launch(x, scale, codes)
    return codes


# In this package's namespace: torch.ops.vllm_fusion_plugin.relu2_static_fp8_quant. Its warm-up and its verify mode know it.
relu2_static_fp8_quant = register(
    "relu2_static_fp8_quant(Tensor x, Tensor scale) -> Tensor",
    fake=_fake,
    cuda=_cuda,
    cpu=relu2_static_fp8_quant_reference,
)
