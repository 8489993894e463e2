# SPDX-License-Identifier: Apache-2.0
"""What AITER's fused ops compute, in plain torch: the setting `rocm_kernels="aiter"` puts these into a graph.

Read from AITER's source, and compared with its Triton kernels in Triton's interpreter (tests/kernels/test_aiter_ops.py).
Against the norm or SiLU·mul and the quantiser by themselves, they round nothing in between: y stays fp32, and so does the
sum with the residual. The norm's weight multiplies last, as everywhere.

Codes are in `fp8`, a name of kernels/fp8.py; scales are fp32, one for a group of 128 numbers.
"""

from __future__ import annotations

import torch

from vllm_fusion_plugin.kernels.fp8 import FORMATS

GROUP = 128


def silu_mul_group(x: torch.Tensor, fp8: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`rocm_aiter_act_mul_and_fp8_group_quant` of x [M, 2 * K]: codes [M, K] and scales [M, K / 128]."""
    gate, up = x.float().chunk(2, dim=-1)
    return _quantised(gate / (1.0 + torch.exp(-gate)) * up, fp8)


def rms_norm_group(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, fp8: str, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """`rocm_aiter_rmsnorm_fp8_group_quant` of x [M, H], or with a residual `..._with_add_...`: codes [M, H], scales
    [M, H / 128], and x + residual in x's dtype if that is given."""
    s = x.float() if residual is None else x.float() + residual.float()
    y = s * torch.rsqrt(s.square().mean(dim=-1, keepdim=True) + epsilon) * weight.float()
    return (*_quantised(y, fp8), *([] if residual is None else [s.to(x.dtype)]))


def gated_rms_norm_group(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, epsilon: float, fp8: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rocm_aiter_fused_rms_gated_fp8_group_quant` of heads x [M, 128] and their gates z: codes [M, 128], scales [M, 1].

    Another quantiser than the ungated ones': vLLM's floor of scales, a division, and vLLM's maximum, 224 in e4m3fnuz."""
    maximum, floor = FORMATS[fp8].max, FORMATS[fp8].min_scale
    s, gate = x.float(), z.float()
    y = s * torch.rsqrt(s.square().mean(dim=-1, keepdim=True) + epsilon) * weight.float()
    y = y * (gate * torch.sigmoid(gate))
    scales = (y.abs().amax(dim=-1, keepdim=True) / y.new_full((), maximum)).clamp(min=floor)
    return (y / scales).clamp(-maximum, maximum).to(FORMATS[fp8].dtype), scales


def _quantised(y: torch.Tensor, fp8: str) -> tuple[torch.Tensor, torch.Tensor]:
    maximum = FORMATS[fp8].max
    groups = y.view(len(y), -1, GROUP)
    scales = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / y.new_full((), maximum)
    codes = (groups * scales.reciprocal()).clamp(-maximum, maximum).to(FORMATS[fp8].dtype)
    return codes.view(y.shape), scales.squeeze(-1)
