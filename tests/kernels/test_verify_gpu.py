# SPDX-License-Identifier: Apache-2.0
"""Verify mode on a GPU: fused ops beside vLLM's own."""

from __future__ import annotations

import pytest
import torch

from vllm_fusion_plugin import compat, roundings, strict
from vllm_fusion_plugin.ops import group_quant, registry, rms_norm_quant, silu_mul_quant, verify  # noqa: F401
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs

pytestmark = pytest.mark.gpu
GROUP = (128, "row", False)


@pytest.mark.parametrize("rows", [1, 40, 700])
def test_ops_beside_vllms(rows):
    x = torch.randn(rows, 4096, device="cuda").bfloat16()
    scale, fp8 = torch.tensor([0.0123], device="cuda"), compat.fp8_format()
    group, act = roundings.of(roundings.GROUP_QUANT).name, roundings.of(roundings.SILU_MUL).name
    norm = NormInputs(x, torch.randn(4096, device="cuda").bfloat16(), norm_rounding="custom_op")
    added = norm._replace(residual=torch.randn_like(x))
    calls = [
        ("group_fp8_quant", (x, *GROUP, group, fp8), 1),
        ("silu_mul_group_fp8_quant", (x, *GROUP, act, group, True, fp8), 2),
        ("silu_mul_token_fp8_quant", (x, scale * 100, act, "custom_op", False, fp8), 2),
        ("silu_mul_static_fp8_quant", (x, scale, act, "custom_op", fp8), 2),
        ("rms_norm_group_fp8_quant", (*norm, *GROUP, group, fp8), 2),
        ("rms_norm_token_fp8_quant", (*added, None, "custom_op", fp8), 2),
        ("rms_norm_static_fp8_quant", (*added, scale, "custom_op", fp8), 2),
    ]
    for op, arguments, ops_of_vllms in calls:
        verifier = verify.Verifier(1, object)
        verifier.run(op, registry.CUDA_IMPLEMENTATIONS[op], arguments)
        (counted,) = verifier.counted()
        assert not counted.problem and len(counted.vllms_ops) == ops_of_vllms, counted
        most = strict.MAY_DIFFER * counted.numbers + 1 if "norm" in op else 0
        assert counted.differing <= most, counted
