# SPDX-License-Identifier: Apache-2.0
"""The op of a sigmoid gate + quantiser: that it is its kernel, what torch.compile makes of it, what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import TMA, strided, zeros_laid_out_as
from tests.kernels.checks import assert_same_outputs, check_deterministic, one_nan
from tests.kernels.test_group_quant import DEEPSEEK
from tests.kernels.test_sigmoid_mul_quant import apart, inputs, run
from vllm_fusion_plugin.ops.quant import GroupScales
from vllm_fusion_plugin.ops.sigmoid_mul_quant import sigmoid_mul_group_fp8_quant

OP = torch.ops.vllm_fusion_plugin.sigmoid_mul_group_fp8_quant.default


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_op_is_its_kernel(rows: int, device: torch.device) -> None:
    """On CPU it is the reference: see tests/kernels/test_sigmoid_mul_quant.py."""
    x, gate = map(strided, inputs(rows, 384, torch.bfloat16, device, seed=6))
    for found, expected in zip(sigmoid_mul_group_fp8_quant(x, gate, TMA), run(x, gate, DEEPSEEK), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert apart(one_nan(found), one_nan(expected)) <= 2e-2


@pytest.mark.parametrize("arguments", [(128, "row", False, "custom_op"), (64, "tma", True, "native_floored")], ids=str)
def test_opcheck(arguments: tuple, device: torch.device) -> None:
    torch.library.opcheck(OP, (*inputs(5, 256, torch.bfloat16, device, seed=8), *arguments))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_op_with_dynamic_tokens(device: torch.device) -> None:
    compiled = torch.compile(lambda x, gate: OP(x, gate, 128, "tma", False, "custom_op"), fullgraph=True, dynamic=True)
    for rows in (5, 2, 33):
        given = inputs(rows, 256, torch.bfloat16, device, seed=rows)
        assert_same_outputs(compiled(*given), sigmoid_mul_group_fp8_quant(*given, TMA))


def test_op_is_deterministic_and_leaves_its_input(device: torch.device) -> None:
    x, gate = inputs(5, 384, torch.bfloat16, device, seed=9, kind="special")
    check_deterministic(lambda x: sigmoid_mul_group_fp8_quant(x, gate), x)


X = torch.zeros(2, 256, dtype=torch.bfloat16)

BAD_INPUTS = {
    "int": (X.int(), X.int(), r"x has dtype torch\.int32; allowed: torch\.bfloat16, torch\.float16"),
    "1-D": (X[0], X[0], r"x has 1 dimensions, shape \(256,\); allowed: 2"),
    "strided columns": (X, X.repeat(1, 2)[:, ::2], r"gate has stride 2 along its columns; allowed: 1"),
    "another shape": (X, X[:1], r"gate is torch\.bfloat16 of shape \(1, 256\).*allowed: as x.*\(2, 256\)"),
    "another dtype": (X, X.half(), r"gate is torch\.float16 of shape .*allowed: as x, torch\.bfloat16"),
    "no width": (X[:, :0], X[:, :0], r"x has 0 columns; allowed: a multiple of group_size above 0"),
    "part of a group": (X[:, :192], X[:, :192], r"output width 192 is not a multiple of group_size=128"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_refused(bad: str, device: torch.device) -> None:
    x, gate, message = BAD_INPUTS[bad]
    for where in (device, "meta"):
        with pytest.raises(ValueError, match=message):
            sigmoid_mul_group_fp8_quant(zeros_laid_out_as(x, where), zeros_laid_out_as(gate, where))


def test_bad_arguments_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"group_size=32 .*allowed: 64, 128"):
        sigmoid_mul_group_fp8_quant(X.to(device), X.to(device), GroupScales(32))
    with pytest.raises(ValueError, match=r"quant_rounding='eager'"):
        sigmoid_mul_group_fp8_quant(X.to(device), X.to(device), quant_rounding="eager")
