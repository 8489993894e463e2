# SPDX-License-Identifier: Apache-2.0
"""The op of MLA's two norms: that it is its kernel, what torch.compile makes of it, what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import ALLOWED_OF_GROUPS, ROUNDINGS, TMA
from tests.kernels.checks import assert_same_outputs
from tests.kernels.norm_checks import BF16, zeros
from tests.kernels.test_mla_dual_rms_norm_quant import KV_EPSILON, Q_EPSILON, projection, run, weights
from vllm_fusion_plugin.ops import quant
from vllm_fusion_plugin.ops.mla_dual_rms_norm_quant import (
    mla_dual_rms_norm_group_fp8_quant,
    mla_dual_rms_norm_group_fp8_quant_reference,
)

OP = torch.ops.vllm_fusion_plugin.mla_dual_rms_norm_group_fp8_quant.default


@pytest.mark.parametrize("rows", [0, 5])
def test_op_is_its_kernel(rows: int, device: torch.device) -> None:
    mode = BF16._replace(residual=False)
    q, kv = projection(rows, 1536, 512, mode, device, seed=5)
    q_weight, kv_weight = weights(q, kv, mode)
    outputs = mla_dual_rms_norm_group_fp8_quant(q, kv, q_weight, kv_weight, Q_EPSILON, KV_EPSILON, scales=TMA)
    assert_same_outputs(outputs, [guarded.tensor for guarded in run(q, kv, q_weight, kv_weight, mode)])


@pytest.mark.parametrize("quant_rounding", ROUNDINGS)
def test_opcheck(quant_rounding: str, device: torch.device) -> None:
    q, kv = projection(5, 256, 512, BF16, device, seed=6)
    arguments = (Q_EPSILON, KV_EPSILON, 128, "tma", False, "native", quant_rounding)
    torch.library.opcheck(OP, (q, kv, *weights(q, kv, BF16), *arguments))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_op_with_dynamic_tokens(device: torch.device) -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x: torch.Tensor, q_weight: torch.Tensor, kv_weight: torch.Tensor):
        q, kv, _ = x.split([256, 512, 64], dim=1)
        arguments = (Q_EPSILON, KV_EPSILON, 128, "tma", False, "native", "custom_op")
        return OP(q, kv, q_weight, kv_weight, *arguments)

    for rows in (5, 2, 33):
        x = torch.cat([*projection(rows, 256, 512, BF16, device, seed=rows), zeros(device, rows, 64)], dim=1)
        q, kv, _ = x.split([256, 512, 64], dim=1)
        q_weight, kv_weight = weights(q, kv, BF16)
        expected = mla_dual_rms_norm_group_fp8_quant(q, kv, q_weight, kv_weight, Q_EPSILON, KV_EPSILON, scales=TMA)
        assert_same_outputs(compiled(x, q_weight, kv_weight), expected)


BAD = {
    "q fp32": ({"q": torch.zeros(2, 256)}, r"q has dtype torch\.float32; allowed: torch\.bfloat16, torch\.float16"),
    "q columns": ({"q": zeros(torch.device("cpu"), 2, 512)[:, ::2]}, r"q has stride 2 along its columns; allowed: 1"),
    "kv 1-D": ({"kv": zeros(torch.device("cpu"), 512)}, r"kv has 1 dimensions"),
    "kv rows": ({"kv": zeros(torch.device("cpu"), 3, 512)}, r"kv has 3 rows; allowed: as many as q, 2"),
    "kv wide": ({"kv": zeros(torch.device("cpu"), 2, 2049)}, r"kv has 2049 columns; allowed: 1 to 2048"),
    "kv fp16": ({"kv": zeros(torch.device("cpu"), 2, 512).half()}, r"kv has dtype torch\.float16; allowed: q's dtype"),
    "q_weight": ({"q_weight": zeros(torch.device("cpu"), 512)}, r"q_weight has shape \(512,\); allowed: \(256,\)"),
    "kv_weight": ({"kv_weight": zeros(torch.device("cpu"), 256)}, r"kv_weight has shape \(256,\); allowed: \(512,\)"),
    "custom_op": (
        {"kv_weight": torch.zeros(512), "norm_rounding": "custom_op"},
        r"kv_weight has dtype torch\.float32; allowed with norm_rounding='custom_op': the input's, torch\.bfloat16",
    ),
    "norm_rounding": ({"norm_rounding": "exact"}, r"norm_rounding='exact' .*allowed: native, eager, custom_op"),
    "quant_rounding": (
        {"quant_rounding": "eager"},
        rf"quant_rounding='eager' .*{ALLOWED_OF_GROUPS}",
    ),
    "group_size": ({"scales": quant.GroupScales(32)}, r"group_size=32 .*allowed: 64, 128"),
    "layout": (
        {"scales": quant.GroupScales(layout="rows")},
        r"scale_layout='rows' is not known; allowed: row, column, tma",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_argument_is_refused(bad: str) -> None:
    changed, message = BAD[bad]
    cpu = torch.device("cpu")
    arguments = {
        "q": zeros(cpu, 2, 256),
        "kv": zeros(cpu, 2, 512),
        "q_weight": zeros(cpu, 256),
        "kv_weight": zeros(cpu, 512),
    }
    for call in (mla_dual_rms_norm_group_fp8_quant, mla_dual_rms_norm_group_fp8_quant_reference):
        with pytest.raises(ValueError, match=message):
            call(**{**arguments, **changed})
