# SPDX-License-Identifier: Apache-2.0
"""The ops of SiLU·mul + FP8: that they are their kernels, what torch.compile makes of them, what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import (
    ALLOWED_OF_GROUPS,
    TMA,
    StaticMode,
    TokenMode,
    random_input,
    zeros_laid_out_as,
)
from tests.kernels.checks import (
    assert_same_bytes,
    assert_same_outputs,
    check_deterministic,
    check_tma_outputs,
)
from tests.kernels.test_silu_mul_quant import DEEPSEEK, run_group, run_static, run_token
from vllm_fusion_plugin.ops.quant import MAX_WIDTH, GroupScales
from vllm_fusion_plugin.ops.silu_mul_quant import (
    silu_mul_group_fp8_quant,
    silu_mul_group_fp8_quant_reference,
    silu_mul_reference,
    silu_mul_static_fp8_quant,
    silu_mul_static_fp8_quant_reference,
    silu_mul_token_fp8_quant,
    silu_mul_token_fp8_quant_reference,
)

OPS = torch.ops.vllm_fusion_plugin

# ---- the ops themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_group_op_is_its_kernel(rows: int, device: torch.device) -> None:
    x = random_input(rows, 384, torch.bfloat16, device, seed=7)
    outputs = silu_mul_group_fp8_quant(x, TMA)
    check_tma_outputs(outputs, run_group(x, DEEPSEEK))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_token_op_is_its_kernel(rows: int, device: torch.device) -> None:
    x, scale_ub = random_input(rows, 300, torch.float16, device, seed=8), torch.tensor([0.5], device=device)
    mode = TokenMode(torch.float16, "custom_op", "custom_op")
    assert_same_outputs(silu_mul_token_fp8_quant(x), run_token(x, None, mode))
    assert_same_outputs(silu_mul_token_fp8_quant(x, scale_ub), run_token(x, scale_ub, mode))


def test_static_op_is_its_kernel(device: torch.device) -> None:
    x, scale = random_input(5, 96, torch.float16, device, seed=8), torch.tensor([0.02], device=device)
    expected = run_static(x, scale, StaticMode(torch.float16, "custom_op", "custom_op"))
    assert_same_bytes(silu_mul_static_fp8_quant(x, scale), expected, "codes")


def test_ops_that_keep_act(device: torch.device) -> None:
    """Codes and scales are as without, and the rows are what they are of."""
    x, scale_ub = random_input(5, 384, torch.bfloat16, device, seed=12), torch.tensor([0.5], device=device)
    for act_rounding, quant_rounding in (("custom_op", "native"), ("native", "custom_op"), ("eager", "custom_op")):
        how = {"act_rounding": act_rounding, "quant_rounding": quant_rounding}
        *group, act = silu_mul_group_fp8_quant(x, TMA, **how, keep_act=True)
        assert_same_outputs(group, silu_mul_group_fp8_quant(x, TMA, **how))
        *token, same = silu_mul_token_fp8_quant(x, scale_ub, **how, keep_act=True)
        assert_same_outputs(token, silu_mul_token_fp8_quant(x, scale_ub, **how))
        assert_same_outputs([act, act], [same, silu_mul_reference(x, act_rounding)])


GROUP_ARGUMENTS = [
    (128, "row", False, "custom_op", "custom_op"),
    (64, "tma", True, "native", "native"),
    (128, "tma", True, "native", "custom_op", True),
]


@pytest.mark.parametrize("arguments", GROUP_ARGUMENTS, ids=["row-major", "tma-ue8m0-native", "keep_act"])
def test_group_opcheck(arguments: tuple, device: torch.device) -> None:
    x = random_input(5, 256, torch.bfloat16, device, seed=9)
    torch.library.opcheck(OPS.silu_mul_group_fp8_quant.default, (x, *arguments))


@pytest.mark.parametrize("bounded", [False, True])
def test_token_opcheck(bounded: bool, device: torch.device) -> None:
    x = random_input(5, 100, torch.bfloat16, device, seed=10)
    scale_ub = torch.tensor([0.1], device=device) if bounded else None
    how = ("native", "custom_op", True) if bounded else ("native", "native")
    torch.library.opcheck(OPS.silu_mul_token_fp8_quant.default, (x, scale_ub, *how))


def test_static_opcheck(device: torch.device) -> None:
    x = random_input(5, 256, torch.float16, device, seed=10)
    scale = torch.tensor([0.1], device=device)
    torch.library.opcheck(OPS.silu_mul_static_fp8_quant.default, (x, scale, "custom_op", "native"))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_ops_with_dynamic_tokens(device: torch.device) -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x: torch.Tensor, scale: torch.Tensor):
        group = OPS.silu_mul_group_fp8_quant(x, 128, "tma", False, "custom_op", "custom_op")
        token = OPS.silu_mul_token_fp8_quant(x, scale, "custom_op", "custom_op")
        return *group, *token, OPS.silu_mul_static_fp8_quant(x, scale, "custom_op", "custom_op")

    scale = torch.tensor([0.03], device=device)
    for rows in (5, 2, 33):
        x = random_input(rows, 256, torch.bfloat16, device, seed=rows)
        expected = (*silu_mul_group_fp8_quant(x, TMA), *silu_mul_token_fp8_quant(x, scale))
        assert_same_outputs(compiled(x, scale), (*expected, silu_mul_static_fp8_quant(x, scale)))


def test_ops_are_deterministic_and_leave_their_input(device: torch.device) -> None:
    for op in (silu_mul_group_fp8_quant, silu_mul_token_fp8_quant):
        check_deterministic(op, random_input(5, 384, torch.bfloat16, device, seed=11, kind="special"))


# ---- what is refused -------------------------------------------------------------------------------------------------

X = torch.zeros(2, 512, dtype=torch.bfloat16)

BAD_INPUTS = {
    "int": (X.to(torch.int32), r"x has dtype torch\.int32; allowed: torch\.bfloat16, torch\.float16"),
    "fp32": (X.float(), r"x has dtype torch\.float32; allowed: torch\.bfloat16, torch\.float16"),
    "1-D": (X[0], r"x has 1 dimensions, shape \(512,\); allowed: 2"),
    "3-D": (X[None], r"x has 3 dimensions, shape \(1, 2, 512\); allowed: 2"),
    "odd width": (X[:, :511], r"x has 511 columns; allowed: an even number above 0"),
    "no width": (X[:, :0], r"x has 0 columns; allowed: an even number above 0"),
    "strided columns": (X[:, ::2], r"x has stride 2 along its columns; allowed: 1"),
    "transposed": (X.T.contiguous().T, r"x has stride 2 along its columns; allowed: 1"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_refused(bad: str, device: torch.device) -> None:
    x, message = BAD_INPUTS[bad]
    x = zeros_laid_out_as(x, device)
    scale = torch.ones(1, device=device)
    for call in (
        lambda: silu_mul_group_fp8_quant(x),
        lambda: silu_mul_group_fp8_quant_reference(x),
        lambda: silu_mul_token_fp8_quant(x),
        lambda: silu_mul_token_fp8_quant_reference(x),
        lambda: silu_mul_static_fp8_quant(x, scale),
        lambda: silu_mul_static_fp8_quant_reference(x, scale),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scales": GroupScales(32)}, r"group_size=32 .*allowed: 64, 128"),
        ({"scales": GroupScales(0)}, r"group_size=0 .*allowed: 64, 128"),
        ({"scales": GroupScales(layout="rows")}, r"scale_layout='rows' is not known; allowed: row, column, tma"),
        ({"act_rounding": "exact"}, r"act_rounding='exact' .*allowed: custom_op, eager, native"),
        (
            {"quant_rounding": ""},
            rf"quant_rounding='' .*{ALLOWED_OF_GROUPS}",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_group_argument_is_refused(arguments: dict, message: str, device: torch.device) -> None:
    for call in (silu_mul_group_fp8_quant, silu_mul_group_fp8_quant_reference):
        with pytest.raises(ValueError, match=message):
            call(X.to(device), **arguments)


def test_width_that_no_group_divides_is_refused(device: torch.device) -> None:
    x = torch.zeros(2, 2 * 192, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=r"output width 192 is not a multiple of group_size=128"):
        silu_mul_group_fp8_quant(x, GroupScales(128))
    assert silu_mul_group_fp8_quant(x, GroupScales(64))[1].shape == (2, 3)


@pytest.mark.parametrize(
    "scale, message",
    [
        (torch.ones(1, dtype=torch.bfloat16), r"scale is torch\.bfloat16 of shape \(1,\); allowed: one float32 value"),
        (torch.ones(2), r"scale is torch\.float32 of shape \(2,\); allowed: one float32 value"),
        (torch.ones(0), r"scale is torch\.float32 of shape \(0,\); allowed: one float32 value"),
        (torch.ones(1, device="meta"), r"scale is on meta; allowed: x's device, (cpu|cuda)"),
    ],
    ids=["bf16", "two", "none", "meta"],
)
def test_bad_scale_is_refused(scale: torch.Tensor, message: str, device: torch.device) -> None:
    scale = scale if scale.is_meta else scale.to(device)
    for call in (silu_mul_static_fp8_quant, silu_mul_static_fp8_quant_reference):
        with pytest.raises(ValueError, match=message):
            call(X.to(device), scale)
    for call in (silu_mul_token_fp8_quant, silu_mul_token_fp8_quant_reference):
        with pytest.raises(ValueError, match=message.replace("scale", "scale_ub", 1)):
            call(X.to(device), scale)


def test_bad_forms_are_refused(device: torch.device) -> None:
    scale = torch.ones(1, device=device)
    for name, allowed in (("act_rounding", "custom_op, eager, native"), ("quant_rounding", "custom_op, native")):
        for op in (silu_mul_static_fp8_quant, silu_mul_token_fp8_quant):
            with pytest.raises(ValueError, match=rf"{name}='inductor' .*allowed: {allowed}"):
                op(X.to(device), scale, **{name: "inductor"})


def test_keeping_what_is_not_rounded_is_refused(device: torch.device) -> None:
    how = {"act_rounding": "native", "quant_rounding": "native", "keep_act": True}
    for call in (
        lambda: silu_mul_group_fp8_quant(X.to(device), **how),
        lambda: silu_mul_group_fp8_quant_reference(X.to(device), **how),
        lambda: silu_mul_token_fp8_quant(X.to(device), **how),
        lambda: silu_mul_token_fp8_quant_reference(X.to(device), **how),
    ):
        with pytest.raises(ValueError, match=r"keep_act=True with act_rounding='native' and quant_rounding='native'"):
            call()


def test_a_row_that_does_not_fit_into_registers_is_refused(device: torch.device) -> None:
    x = torch.zeros(1, 2 * MAX_WIDTH + 2, dtype=torch.bfloat16, device=device)
    for call in (silu_mul_token_fp8_quant, silu_mul_token_fp8_quant_reference):
        with pytest.raises(ValueError, match=r"x has 65538 columns; allowed: 2 to 65536"):
            call(x)


def test_bad_arguments_are_refused_while_compiling(device: torch.device) -> None:
    compiled = torch.compile(
        lambda x: OPS.silu_mul_group_fp8_quant(x, 96, "row", False, "custom_op", "custom_op"),
        fullgraph=True,
    )
    with pytest.raises(Exception, match=r"group_size=96 .*allowed: 64, 128"):
        compiled(X.to(device))
