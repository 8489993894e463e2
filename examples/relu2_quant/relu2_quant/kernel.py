# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_fusion_plugin.kernels.launch import launch
from vllm_fusion_plugin.kernels.quant import static_codes, static_inverse

BLOCK = 1024
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


# `numel` changes with the number of tokens, for which Triton is not to compile anew.
@triton.jit(do_not_specialize=["numel"])
def _relu2_static_kernel(x_ptr, scale_ptr, codes_ptr, numel, BLOCK: tl.constexpr, MAX: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    positive = tl.where(x > 0.0, x, 0.0)
    y = (positive * positive).to(x_ptr.dtype.element_ty).to(tl.float32)
    codes = static_codes(y, static_inverse(tl.load(scale_ptr), False), False, MAX)
    tl.store(codes_ptr + at, codes, mask=at < numel)


def relu2_static_fp8_quant(x: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> None:
    """Write codes [M, K] of x [M, K]; arguments as the op checked them."""
    numel = x.numel()
    if numel:
        grid = (triton.cdiv(numel, BLOCK),)
        launch(_relu2_static_kernel, grid, x.device, x, scale, codes, numel, BLOCK=BLOCK, MAX=FP8_MAX)
