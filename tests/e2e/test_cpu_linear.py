# SPDX-License-Identifier: Apache-2.0
"""The reference linear kernel for FP8 blocks on CPU, against a matmul of the values that its inputs stand for."""

from __future__ import annotations

import pytest
import torch

from vllm_fusion_plugin.demo.cpu_linear import cpu_block_scaled_mm


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 128, 128), (5, 256, 384), (3, 200, 320), (0, 128, 256)])
def test_block_scaled_mm(m, n, k, out_dtype):
    generator = torch.Generator().manual_seed(m + n + k)
    a, b = (torch.randn(rows, k, generator=generator).mul(100).to(torch.float8_e4m3fn) for rows in (m, n))
    a_scales = torch.rand(m, -(-k // 128), generator=generator) + 0.5
    b_scales = torch.rand(-(-n // 128), -(-k // 128), generator=generator) + 0.5

    expected = torch.zeros(m, n, dtype=torch.float64)
    for j in range(n):
        for block in range(a_scales.shape[1]):
            columns = slice(block * 128, (block + 1) * 128)
            dot = a[:, columns].double() @ b[j, columns].double()
            expected[:, j] += dot * a_scales[:, block].double() * b_scales[j // 128, block].double()

    args = (a, b, a_scales, b_scales, 128, 128, out_dtype)
    out = cpu_block_scaled_mm(*args)
    assert out.dtype == out_dtype
    torch.testing.assert_close(out.double(), expected, rtol=2**-8 if out_dtype is torch.bfloat16 else 1e-4, atol=2.0)
    # The other checks compare inputs before and after, which torch cannot do in FP8.
    torch.library.opcheck(torch.ops.vllm_fusion_plugin.cpu_block_scaled_mm.default, args, test_utils="test_faketensor")
