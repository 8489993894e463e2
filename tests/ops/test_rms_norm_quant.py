# SPDX-License-Identifier: Apache-2.0
"""RMSNorm + FP8 ops: which outputs there are, what torch.compile makes of them, what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import ALLOWED_OF_GROUPS, TMA
from tests.kernels.checks import assert_same_outputs, check_deterministic
from tests.kernels.norm_checks import BF16, EPSILON, exact_input, inputs, zeros
from vllm_fusion_plugin.ops import quant
from vllm_fusion_plugin.ops.rms_norm_quant import (
    NormInputs,
    rms_norm_group_fp8_quant,
    rms_norm_group_fp8_quant_reference,
    rms_norm_reference,
    rms_norm_static_fp8_quant,
    rms_norm_static_fp8_quant_reference,
    rms_norm_token_fp8_quant,
    rms_norm_token_fp8_quant_reference,
)

OPS = torch.ops.vllm_fusion_plugin

# ---- the ops themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual_given", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("keep_norm", [False, True], ids=["", "keep_norm"])
def test_outputs(keep_norm: bool, residual_given: bool, device: torch.device) -> None:
    """Which outputs there are, in which order, and that they are the kernel's."""
    x, residual = exact_input(5, 256, BF16, device, seed=14)
    residual = residual if residual_given else None
    weight, scale = BF16.make_weight(256, device), torch.tensor([0.03], device=device)
    norm = NormInputs(x, weight, EPSILON, residual, keep_norm=keep_norm)
    normed, residual_out = rms_norm_reference(norm)
    extras = [normed] * keep_norm + [residual_out] * residual_given
    group = rms_norm_group_fp8_quant(norm, TMA)
    token = rms_norm_token_fp8_quant(norm)
    static = rms_norm_static_fp8_quant(norm, scale)
    assert group[1].stride() == (1, 8)
    for actual, expected in (
        (group, [*quant.group_fp8_quant_reference(normed, TMA, "custom_op"), *extras]),
        (token, [*quant.token_fp8_quant_reference(normed, None, "custom_op"), *extras]),
        (static, [quant.static_fp8_quant_reference(normed, scale, "custom_op"), *extras]),
    ):
        assert len(actual) == len(expected)
        assert_same_outputs(actual, expected)


def group_arguments(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> dict[str, tuple]:
    return {
        "residual": (*NormInputs(x, weight, residual=residual, keep_norm=True), 128, "row", False, "custom_op"),
        "gemma-tma-ue8m0-native": (
            *NormInputs(x, weight, gemma_weight=True, norm_rounding="eager"), 64, "tma", True, "native"
        ),
        "addends": (
            *NormInputs(x, None, residual=residual, x_addend=x, x_addend_scale=2.5, residual_addend=residual, fp32_sum=True),
            *(128, "column", False, "reciprocal"),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["residual", "gemma-tma-ue8m0-native", "addends"])
def test_group_opcheck(kind: str, device: torch.device) -> None:
    x, residual = inputs(5, 256, BF16, device, seed=15)
    weight = BF16.make_weight(256, device)
    torch.library.opcheck(OPS.rms_norm_group_fp8_quant.default, group_arguments(x, residual, weight)[kind])


def test_token_and_static_opcheck(device: torch.device) -> None:
    x, residual = inputs(5, 200, BF16, device, seed=16)
    bound = torch.tensor([0.5], device=device)
    for scale_ub in (None, bound):
        norm = NormInputs(x, None, residual=residual, keep_norm=True)
        torch.library.opcheck(OPS.rms_norm_token_fp8_quant.default, (*norm, scale_ub, "custom_op"))
    norm = NormInputs(x, None, norm_rounding="custom_op")
    torch.library.opcheck(OPS.rms_norm_static_fp8_quant.default, (*norm, bound, "native"))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_ops_with_dynamic_tokens(device: torch.device) -> None:
    weight, scale = BF16.make_weight(256, device), torch.tensor([0.03], device=device)

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x: torch.Tensor, residual: torch.Tensor):
        kept, plain, added = norms(x, residual)
        return (
            *OPS.rms_norm_group_fp8_quant(*kept, 128, "tma", False, "custom_op"),
            *OPS.rms_norm_token_fp8_quant(*plain, None, "custom_op"),
            *OPS.rms_norm_static_fp8_quant(*added, scale, "custom_op"),
        )

    def norms(x: torch.Tensor, residual: torch.Tensor) -> tuple[NormInputs, NormInputs, NormInputs]:
        kept = NormInputs(x, weight, residual=residual, keep_norm=True)
        return kept, NormInputs(x, weight), kept._replace(keep_norm=False)

    for rows in (5, 2, 33):
        x, residual = inputs(rows, 256, BF16, device, seed=rows)
        kept, plain, added = norms(x, residual)
        expected = [
            *rms_norm_group_fp8_quant(kept, TMA),
            *rms_norm_token_fp8_quant(plain),
            *rms_norm_static_fp8_quant(added, scale),
        ]
        assert_same_outputs(compiled(x, residual), expected)


def test_ops_are_deterministic_and_leave_their_input(device: torch.device) -> None:
    x, residual = inputs(5, 384, BF16, device, seed=17, kind="special")
    weight = BF16.make_weight(384, device)
    check_deterministic(lambda x, r, w: rms_norm_group_fp8_quant(NormInputs(x, w, residual=r)), x, residual, weight)


# ---- what is refused -------------------------------------------------------------------------------------------------

GROUP_CALLS = (rms_norm_group_fp8_quant, rms_norm_group_fp8_quant_reference)
TOKEN_CALLS = (rms_norm_token_fp8_quant, rms_norm_token_fp8_quant_reference)
STATIC_CALLS = (rms_norm_static_fp8_quant, rms_norm_static_fp8_quant_reference)


BAD_X = {
    "fp32": (lambda x: x.float(), r"x has dtype torch\.float32; allowed: torch\.bfloat16, torch\.float16"),
    "1-D": (lambda x: x[0], r"x has 1 dimensions, shape \(256,\); allowed: 2"),
    "3-D": (lambda x: x[None], r"x has 3 dimensions, shape \(1, 2, 256\); allowed: 2"),
    "no width": (lambda x: x[:, :0], rf"x has 0 columns; allowed: 1 to {quant.MAX_WIDTH}"),
    "wide": (
        lambda x: x.new_zeros(1, quant.MAX_WIDTH + 128),
        rf"x has {quant.MAX_WIDTH + 128} columns; allowed: 1 to {quant.MAX_WIDTH}",
    ),
    "strided columns": (lambda x: x[:, ::2], r"x has stride 2 along its columns; allowed: 1"),
}


@pytest.mark.parametrize("bad", BAD_X)
def test_bad_x_is_refused(bad: str, device: torch.device) -> None:
    make, message = BAD_X[bad]
    x, scale = make(zeros(device, 2, 256)), torch.ones(1, device=device)
    for call in (*GROUP_CALLS, *TOKEN_CALLS):
        with pytest.raises(ValueError, match=message):
            call(NormInputs(x, None))
    for call in STATIC_CALLS:
        with pytest.raises(ValueError, match=message):
            call(NormInputs(x, None), scale)


BAD_ARGUMENTS = {
    "weight fp64": (
        {"weight": (256,), "dtype": torch.float64},
        r"weight has dtype torch\.float64; allowed: torch\.bfl",
    ),
    "weight long": ({"weight": (257,)}, r"weight has shape \(257,\); allowed: \(256,\)"),
    "weight 2-D": ({"weight": (1, 256)}, r"weight has shape \(1, 256\); allowed: \(256,\)"),
    "weight, custom_op": (
        {"weight": (256,), "dtype": torch.float32, "norm_rounding": "custom_op"},
        r"weight has dtype torch\.float32; allowed with norm_rounding='custom_op': the input's, torch\.bfloat16",
    ),
    "gemma without": ({"gemma_weight": True}, r"gemma_weight=True needs a weight"),
    "gemma, custom_op": (
        {"weight": (256,), "gemma_weight": True, "norm_rounding": "custom_op"},
        r"gemma_weight=True with norm_rounding='custom_op'.*allowed: native, eager",
    ),
    "keep_norm, native": (
        {"keep_norm": True, "quant_rounding": "native"},
        r"keep_norm=True with quant_rounding='native'.*allowed: custom_op",
    ),
    "residual fp16": (
        {"residual": (2, 256), "dtype": torch.float16},
        r"residual has dtype torch\.float16; allowed: x's",
    ),
    "residual rows": ({"residual": (3, 256)}, r"residual has shape \(3, 256\); allowed: x's shape, \(2, 256\)"),
    "norm_rounding": ({"norm_rounding": "exact"}, r"norm_rounding='exact' .*allowed: native, eager, custom_op"),
    "quant_rounding": (
        {"quant_rounding": "eager"},
        rf"quant_rounding='eager' .*({ALLOWED_OF_GROUPS}|allowed: custom_op, native)",
    ),
}


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_norm_argument_is_refused(bad: str, device: torch.device) -> None:
    arguments, message = BAD_ARGUMENTS[bad]
    arguments = dict(arguments)
    dtype = arguments.pop("dtype", torch.bfloat16)
    tensors = {n: zeros(device, *arguments.pop(n), dtype=dtype) for n in ("weight", "residual") if n in arguments}
    quant = {name: arguments.pop(name) for name in ("quant_rounding",) if name in arguments}
    norm = NormInputs(zeros(device, 2, 256), **({"weight": None} | tensors | arguments))
    for call in (*GROUP_CALLS, *TOKEN_CALLS):
        with pytest.raises(ValueError, match=message):
            call(norm, **quant)
    for call in STATIC_CALLS:
        with pytest.raises(ValueError, match=message):
            call(norm, torch.ones(1, device=device), **quant)


def test_strides_and_devices_are_checked(device: torch.device) -> None:
    x = zeros(device, 2, 256)
    for tensors, message in (
        ({"weight": zeros(device, 512)[::2]}, r"weight has stride 2; allowed: 1"),
        ({"residual": zeros(device, 256, 2).T}, r"residual has stride 2 along its columns; allowed: 1"),
        ({"weight": zeros(torch.device("meta"), 256)}, r"weight is on meta; allowed: the input's device, (cpu|cuda)"),
        ({"residual": zeros(torch.device("meta"), 2, 256)}, r"residual is on meta; allowed: x's device, (cpu|cuda)"),
    ):
        with pytest.raises(ValueError, match=message):
            rms_norm_group_fp8_quant_reference(NormInputs(x, **({"weight": None} | tensors)))


@pytest.mark.parametrize(
    "scales, message",
    [
        (quant.GroupScales(32), r"group_size=32 .*allowed: 64, 128"),
        (quant.GroupScales(layout="rows"), r"scale_layout='rows' is not known; allowed: row, column, tma"),
    ],
    ids=["group_size", "layout"],
)
def test_bad_scales_are_refused(scales: quant.GroupScales, message: str, device: torch.device) -> None:
    for call in GROUP_CALLS:
        with pytest.raises(ValueError, match=message):
            call(NormInputs(zeros(device, 2, 256), None), scales)


def test_width_that_no_group_divides_is_refused(device: torch.device) -> None:
    x = zeros(device, 2, 192)
    with pytest.raises(ValueError, match=r"output width 192 is not a multiple of group_size=128"):
        rms_norm_group_fp8_quant(NormInputs(x, None))
    assert rms_norm_group_fp8_quant(NormInputs(x, None), quant.GroupScales(64))[1].shape == (2, 3)


@pytest.mark.parametrize("name", ["scale", "scale_ub"])
@pytest.mark.parametrize(
    "scale, message",
    [
        (torch.ones(1, dtype=torch.bfloat16), r"is torch\.bfloat16 of shape \(1,\); allowed: one float32 value"),
        (torch.ones(2), r"is torch\.float32 of shape \(2,\); allowed: one float32 value"),
        (torch.ones(1, device="meta"), r"is on meta; allowed: x's device, (cpu|cuda)"),
    ],
    ids=["bf16", "two", "meta"],
)
def test_bad_scale_is_refused(scale: torch.Tensor, message: str, name: str, device: torch.device) -> None:
    scale, x = scale if scale.is_meta else scale.to(device), zeros(device, 2, 256)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        if name == "scale":
            rms_norm_static_fp8_quant_reference(NormInputs(x, None), scale)
        else:
            rms_norm_token_fp8_quant_reference(NormInputs(x, None), scale)


def test_bad_arguments_are_refused_while_compiling(device: torch.device) -> None:
    def call(x: torch.Tensor):
        return OPS.rms_norm_group_fp8_quant(*NormInputs(x, None), 96, "row", False, "custom_op")

    with pytest.raises(Exception, match=r"group_size=96 .*allowed: 64, 128"):
        torch.compile(call, fullgraph=True)(zeros(device, 2, 256))
