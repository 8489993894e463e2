# SPDX-License-Identifier: Apache-2.0
"""The op of the FP8 group quantiser: that it is its kernel, what torch.compile makes of it, what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import (
    ALLOWED_OF_GROUPS,
    TMA,
    strided,
    zeros_laid_out_as,
)
from tests.kernels.checks import (
    assert_same_outputs,
    check_deterministic,
    check_tma_outputs,
    one_nan,
)
from tests.kernels.test_group_quant import DEEPSEEK, Mode, activations, modes, run
from vllm_fusion_plugin.ops.group_quant import group_fp8_quant
from vllm_fusion_plugin.ops.quant import GroupScales

OP = torch.ops.vllm_fusion_plugin.group_fp8_quant.default

# ---- the op itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_op_is_its_kernel(rows: int, device: torch.device) -> None:
    x = strided(activations(rows, 384, torch.bfloat16, device, seed=6))
    outputs = group_fp8_quant(x, TMA)
    check_tma_outputs(outputs, run(x, DEEPSEEK))


@pytest.mark.parametrize("mode", modes(), ids=str)
def test_op_has_the_layout_asked_for(mode: Mode, device: torch.device) -> None:
    x = activations(5, 384, mode.dtype, device, seed=7)
    codes, scales = run(x, mode)
    assert_same_outputs(group_fp8_quant(x, **mode.arguments()), (one_nan(codes.tensor), scales.tensor))


ARGUMENTS = [(128, "row", False, "custom_op"), (64, "tma", True, "native_floored")]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=["row-major", "tma-ue8m0-native"])
def test_opcheck(arguments: tuple, device: torch.device) -> None:
    x = strided(activations(5, 256, torch.bfloat16, device, seed=8))
    torch.library.opcheck(OP, (x, *arguments))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_op_with_dynamic_tokens(device: torch.device) -> None:
    compiled = torch.compile(lambda x: OP(x, 128, "tma", False, "custom_op"), fullgraph=True, dynamic=True)
    for rows in (5, 2, 33):
        x = activations(rows, 256, torch.bfloat16, device, seed=rows)
        assert_same_outputs(compiled(x), group_fp8_quant(x, TMA))


def test_op_is_deterministic_and_leaves_its_input(device: torch.device) -> None:
    check_deterministic(group_fp8_quant, activations(5, 384, torch.bfloat16, device, seed=9, kind="special"))


# ---- what is refused -------------------------------------------------------------------------------------------------

X = torch.zeros(2, 256, dtype=torch.bfloat16)

BAD_INPUTS = {
    "int": (X.to(torch.int32), r"x has dtype torch\.int32; allowed: torch\.bfloat16, torch\.float16"),
    "fp32": (X.float(), r"x has dtype torch\.float32; allowed: torch\.bfloat16, torch\.float16"),
    "1-D": (X[0], r"x has 1 dimensions, shape \(256,\); allowed: 2"),
    "3-D": (X[None], r"x has 3 dimensions, shape \(1, 2, 256\); allowed: 2"),
    "no width": (X[:, :0], r"x has 0 columns; allowed: a multiple of group_size above 0"),
    "strided columns": (X[:, ::2], r"x has stride 2 along its columns; allowed: 1"),
    "transposed": (X.T.contiguous().T, r"x has stride 2 along its columns; allowed: 1"),
    "part of a group": (X[:, :192], r"output width 192 is not a multiple of group_size=128"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_refused(bad: str, device: torch.device) -> None:
    x, message = BAD_INPUTS[bad]
    for where in (device, "meta"):
        with pytest.raises(ValueError, match=message):
            group_fp8_quant(zeros_laid_out_as(x, where))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scales": GroupScales(32)}, r"group_size=32 .*allowed: 64, 128"),
        ({"scales": GroupScales(0)}, r"group_size=0 .*allowed: 64, 128"),
        ({"scales": GroupScales(layout="rows")}, r"scale_layout='rows' is not known; allowed: row, column, tma"),
        (
            {"quant_rounding": "eager"},
            rf"quant_rounding='eager' .*{ALLOWED_OF_GROUPS}",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_argument_is_refused(arguments: dict, message: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=message):
        group_fp8_quant(X.to(device), **arguments)


def test_bad_arguments_are_refused_while_compiling(device: torch.device) -> None:
    compiled = torch.compile(lambda x: OP(x, 96, "row", False, "custom_op"), fullgraph=True)
    with pytest.raises(Exception, match=r"group_size=96 .*allowed: 64, 128"):
        compiled(X.to(device))
