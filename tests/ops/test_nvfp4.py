# SPDX-License-Identifier: Apache-2.0
"""The op of SiLU·mul + NVFP4: that it is its kernel, what torch.compile makes of it, what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import random_input
from tests.kernels.checks import assert_same_bytes
from vllm_fusion_plugin.ops.silu_mul_quant import (
    silu_mul_nvfp4_quant,
    silu_mul_nvfp4_quant_reference,
)

OP = torch.ops.vllm_fusion_plugin.silu_mul_nvfp4_quant

# ---- op --------------------------------------------------------------------------------------------------------------


def test_opcheck(device: torch.device) -> None:
    x = random_input(5, 48, torch.float16, device, seed=7)
    torch.library.opcheck(OP.default, (x, torch.tensor([2.0], device=device), "native"))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_op_with_dynamic_tokens(device: torch.device) -> None:
    compiled = torch.compile(lambda x, scale: OP(x, scale, "custom_op"), fullgraph=True, dynamic=True)
    scale = torch.tensor([2.0], device=device)
    for rows in (5, 2, 130):
        x = random_input(rows, 48, torch.bfloat16, device, seed=rows)
        for actual, expected in zip(compiled(x, scale), silu_mul_nvfp4_quant(x, scale), strict=True):
            assert_same_bytes(actual, expected, f"{rows} rows")


X = torch.zeros(2, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "x, global_scale, act_rounding, message",
    [
        (X.float(), torch.ones(1), "native", r"x has dtype torch\.float32; allowed: torch\.bfloat16, torch\.float16"),
        (X[0], torch.ones(1), "native", r"x has 1 dimensions, shape \(64,\); allowed: 2"),
        (X[:, :48], torch.ones(1), "native", r"output width 24 is not a multiple of 16"),
        (X, torch.ones(2), "native", r"global_scale is torch\.float32 of shape \(2,\); allowed: one float32 value"),
        (X, torch.ones(1).half(), "native", r"global_scale is torch\.float16 of shape \(1,\); allowed: one float32"),
        (X, torch.ones(1, device="meta"), "native", r"global_scale is on meta; allowed: x's device"),
        (X, torch.ones(1), "fast", r"act_rounding='fast' .*allowed: custom_op, eager, native"),
    ],
    ids=["dtype", "1-D", "width", "two scales", "scale dtype", "scale device", "form"],
)
def test_bad_argument_is_refused(
    x: torch.Tensor, global_scale: torch.Tensor, act_rounding: str, message: str, device: torch.device
) -> None:
    x = x.to(device)
    global_scale = global_scale if global_scale.is_meta else global_scale.to(device)
    for call in (silu_mul_nvfp4_quant, silu_mul_nvfp4_quant_reference):
        with pytest.raises(ValueError, match=message):
            call(x, global_scale, act_rounding=act_rounding)
