# SPDX-License-Identifier: Apache-2.0
"""The block GEMM for input that is quantised already: its reference, what torch.compile makes of it, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.cases import TMA
from tests.kernels.checks import assert_same_outputs
from tests.kernels.test_group_quant import activations
from vllm_fusion_plugin.kernels.rounding import of_rows
from vllm_fusion_plugin.ops.block_gemm import block_fp8_gemm, block_fp8_gemm_reference
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, GroupScales, group_fp8_quant_reference

OP = torch.ops.vllm_fusion_plugin.block_fp8_gemm.default
CPU = torch.device("cpu")


def operands(rows: int, columns: int = 192, width: int = 256, ue8m0: bool = True) -> list[torch.Tensor]:
    """codes, scales, weight, weight_scales on the CPU."""
    x = activations(rows, width, torch.bfloat16, CPU, seed=rows)
    codes, scales = group_fp8_quant_reference(x, GroupScales(128, "tma", ue8m0), "custom_op_or_flashinfer")
    weight = activations(columns, width, torch.bfloat16, CPU, seed=columns).to(FP8_DTYPE)
    weight_scales = torch.rand(-(-columns // 128), width // 128) + 0.5
    return [codes, scales, weight, weight_scales]


def test_reference_is_the_product_of_what_was_quantised() -> None:
    codes, scales, weight, weight_scales = operands(5)
    x = torch.stack([codes[:, i].float() * scales[:, i // 128] for i in range(256)], dim=1)
    w = torch.stack(
        [weight[:, i].float() * weight_scales[torch.arange(192) // 128, i // 128] for i in range(256)], dim=1
    )
    expected = (x.double() @ w.double().T).float()
    found = block_fp8_gemm_reference(codes, scales, weight, weight_scales)
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-3)
    assert torch.equal(block_fp8_gemm(codes, scales, weight, weight_scales), found)


def test_opcheck() -> None:
    # of the others, one multiplies FP8 inputs, which torch cannot, and one copies scales without their strides
    checks = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OP, (*operands(5), True, 32), test_utils=checks)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_op_with_dynamic_tokens() -> None:
    _, _, weight, weight_scales = operands(5)
    compiled = torch.compile(lambda c, s: OP(c, s, weight, weight_scales, True, 32), fullgraph=True, dynamic=True)
    for rows in (5, 33, 64):
        codes, scales, *_ = operands(rows)
        assert torch.equal(compiled(codes, scales), OP(codes, scales, weight, weight_scales, True, 32))


@pytest.mark.parametrize(
    ("quant_rounding", "rows", "expected"),
    [
        ("custom_op_or_flashinfer", 31, ("flashinfer", False)),
        ("custom_op_or_flashinfer", 32, ("custom_op", True)),
        ("reciprocal_or_flashinfer", 32, ("reciprocal", True)),
        ("flashinfer", 1000, ("flashinfer", False)),
        ("native", 1, ("native", True)),
    ],
)
def test_rounding_goes_by_rows(quant_rounding: str, rows: int, expected: tuple[str, bool]) -> None:
    assert of_rows(rows, quant_rounding, True) == expected


@pytest.mark.parametrize("rows", [31, 32])
def test_reference_quantiser_goes_by_rows(rows: int) -> None:
    x = activations(rows, 256, torch.bfloat16, CPU, seed=3)
    found = group_fp8_quant_reference(x, TMA._replace(ue8m0=True), "custom_op_or_flashinfer")
    other = group_fp8_quant_reference(x, TMA._replace(ue8m0=rows >= 32), "flashinfer" if rows < 32 else "custom_op")
    assert_same_outputs(found, other)


WRONG: list[tuple[int, Any, str]] = [
    (0, lambda t: t.float(), "codes has dtype torch.float32"),
    (0, lambda t: t[None], "codes has 3 dimensions"),
    (0, lambda t: t[:, :128], r"codes has strides \(256, 1\)"),
    (1, lambda t: t.contiguous(), r"scales have strides \(2, 1\); allowed: TMA-aligned, \(1, 8\)"),
    (2, lambda t: t.to("meta"), "weight is on meta; allowed: codes' device, cpu"),
    (0, lambda t: t[:, :128].contiguous(), r"weight has shape \(192, 256\); allowed: \[N, 128\]"),
    (1, lambda t: t.double(), "scales has dtype torch.float64"),
    (1, lambda t: t[:3], r"scales have shape \(3, 2\); allowed: \[5, 2\]"),
    (2, lambda t: t[:100], "weight has 100 rows; allowed: multiples of 64"),
    (2, lambda t: t.half(), "weight has dtype torch.float16"),
    (3, lambda t: t[:1], r"weight_scales have shape \(1, 2\) .*allowed: \(2, 2\)"),
]


@pytest.mark.parametrize(("position", "change", "message"), WRONG, ids=[w[2][:24] for w in WRONG])
def test_wrong_arguments_are_named(position: int, change: Any, message: str) -> None:
    given = operands(5)
    given[position] = change(given[position])
    with pytest.raises(ValueError, match=message):
        block_fp8_gemm(*given)


def test_wrong_threshold_is_named() -> None:
    with pytest.raises(ValueError, match="flashinfer_rows=33; allowed: 0 to 32"):
        block_fp8_gemm(*operands(5), flashinfer_rows=33)
