# SPDX-License-Identifier: Apache-2.0
"""The op of gated RMSNorm + FP8: that it is its kernel, what torch.compile makes of it, what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import (
    ALLOWED_OF_GROUPS,
    zeros_laid_out_as,
)
from tests.kernels.checks import (
    assert_same_bytes,
    assert_same_outputs,
    check_deterministic,
    check_tma_outputs,
)
from tests.kernels.test_gated_rms_norm_quant import (
    EPSILON,
    QWEN3_NEXT,
    Input,
    Mode,
    assert_near,
    exact_input,
    heads_input,
    norm_modes,
    quant_modes,
    run_kernel,
    views,
)
from vllm_fusion_plugin.ops.gated_rms_norm_quant import (
    gated_rms_norm_group_fp8_quant,
    gated_rms_norm_group_fp8_quant_reference,
)
from vllm_fusion_plugin.ops.quant import GroupScales

OP = torch.ops.vllm_fusion_plugin.gated_rms_norm_group_fp8_quant.default

# ---- the op itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_op_is_its_kernel(rows: int, device: torch.device) -> None:
    data = exact_input(rows, 4, 128, QWEN3_NEXT, device, seed=11)
    expected = run_kernel(data, QWEN3_NEXT)
    flat = Input(data.x.reshape(-1, 128), data.z.reshape(-1, 128), data.weight)
    strided = data._replace(x=views(data.x, "head by head"), z=views(data.z, "heads of a wider row"))
    for form in (data, flat, strided):
        check_tma_outputs(gated_rms_norm_group_fp8_quant(*form, EPSILON, 4, **QWEN3_NEXT.arguments()), expected)


@pytest.mark.parametrize("mode", [*norm_modes(), *quant_modes()], ids=str)
def test_op_does_what_it_is_asked_for(mode: Mode, device: torch.device) -> None:
    data = exact_input(5, 2, 128, mode, device, seed=12)
    codes, scales = gated_rms_norm_group_fp8_quant(*data, EPSILON, 2, **mode.arguments())
    expected_codes, expected_scales = run_kernel(data, mode)
    assert scales.stride() == expected_scales.tensor.stride()
    if device.type == "cpu" and not mode.rounded:
        # what runs there is the reference, which divides in the gate where the kernel multiplies by a reciprocal
        assert_near(codes, scales, expected_codes.tensor, expected_scales.tensor, mode)
        return
    assert_same_bytes(codes, expected_codes.tensor, "codes")
    assert_same_bytes(scales, expected_scales.tensor, "scales")


ARGUMENTS = [
    (EPSILON, 2, True, "silu", 128, "row", False, "native", "custom_op"),
    (EPSILON, 2, False, "sigmoid", 64, "tma", True, "eager", "native"),
]


@pytest.mark.parametrize("flat", [False, True], ids=["3-D", "2-D"])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=["row-major", "tma-ue8m0-native"])
def test_opcheck(arguments: tuple, flat: bool, device: torch.device) -> None:
    x, z, weight = heads_input(5, 2, 128, torch.bfloat16, device, seed=13)
    if flat:
        x, z = x.reshape(-1, 128), z.reshape(-1, 128)
    torch.library.opcheck(OP, (x, z, weight, *arguments))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_op_with_dynamic_tokens(device: torch.device) -> None:
    arguments = (EPSILON, 4, True, "silu", 128, "tma", False, "native", "custom_op")

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor):
        flat = OP(x.reshape(-1, 128), z.reshape(-1, 128), weight, *arguments)
        return *OP(x, z, weight, *arguments), *flat

    for rows in (5, 2, 33):
        data = exact_input(rows, 4, 128, QWEN3_NEXT, device, seed=rows)
        expected = gated_rms_norm_group_fp8_quant(*data, EPSILON, 4, **QWEN3_NEXT.arguments())
        assert_same_outputs(compiled(*data), (*expected, *expected))


def test_op_is_deterministic_and_leaves_its_input(device: torch.device) -> None:
    data = heads_input(5, 3, 128, torch.bfloat16, device, seed=14, kind="special")
    check_deterministic(lambda *tensors: gated_rms_norm_group_fp8_quant(*tensors, EPSILON, 3), *data)


# ---- what is refused -------------------------------------------------------------------------------------------------

X = torch.zeros(6, 128, dtype=torch.bfloat16)
W = torch.ones(128, dtype=torch.bfloat16)

BAD_INPUTS = {
    "fp32": (X.float(), X.float(), W, 2, r"x has dtype torch\.float32; allowed: torch\.bfloat16, torch\.float16"),
    "1-D": (X[0], X[0], W, 1, r"x has 1 dimensions, shape \(128,\); allowed: 2, .* or 3"),
    "4-D": (X[None, None], X[None, None], W, 1, r"x has 4 dimensions, shape \(1, 1, 6, 128\); allowed: 2"),
    "no heads": (X, X, W, 0, r"num_heads=0; allowed: 1 or more"),
    "part of a token": (X, X, W, 4, r"x has 6 rows; allowed: a multiple of num_heads=4"),
    "other heads": (
        X.view(3, 2, 128),
        X.view(3, 2, 128),
        W,
        3,
        r"x has 2 heads, shape \(3, 2, 128\); allowed: num_heads=3",
    ),
    "z's dtype": (X, X.half(), W, 2, r"z is torch\.float16 of shape \(6, 128\) on .*; allowed: as x, torch\.bfloat16"),
    "z's shape": (X, X[:4], W, 2, r"z is torch\.bfloat16 of shape \(4, 128\) on .*; allowed: as x, .*\(6, 128\)"),
    "z's dimensions": (X, X.view(3, 2, 128), W, 2, r"z is torch\.bfloat16 of shape \(3, 2, 128\) .*as x, .*\(6, 128\)"),
    "strided x": (X[:, ::2], X[:, :64], W[:64], 2, r"x has stride 2 along a head; allowed: 1"),
    "strided z": (X[:, :64], X[:, ::2], W[:64], 2, r"z has stride 2 along a head; allowed: 1"),
    "weight's shape": (X, X, W[:64], 2, r"weight is torch\.bfloat16 of shape \(64,\) .*; allowed: .*shape \(128,\)"),
    "weight's dimensions": (X, X, W[None], 2, r"weight is torch\.bfloat16 of shape \(1, 128\) .*shape \(128,\)"),
    "weight's dtype": (
        X,
        X,
        W.double(),
        2,
        r"weight is torch\.float64 .*; allowed: .*torch\.bfloat16, .*torch\.float32",
    ),
    "strided weight": (X[:, :64], X[:, :64], W[::2], 2, r"weight is .* and strides \(2,\); allowed: contiguous"),
    "part of a group": (X[:, :96], X[:, :96], W[:96], 2, r"output width 192 is not a multiple of group_size=128"),
    "groups across heads": (
        X[:, :64],
        X[:, :64],
        W[:64],
        2,
        r"x has heads of 64; allowed: multiples of group_size=128",
    ),
    "no width": (X[:, :0], X[:, :0], W[:0], 2, r"x has heads of 0; allowed: multiples of group_size=128"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_refused(bad: str, device: torch.device) -> None:
    *tensors, heads, message = BAD_INPUTS[bad]
    for where in (device, torch.device("meta")):
        moved = [zeros_laid_out_as(t, where) for t in tensors]
        for call in (gated_rms_norm_group_fp8_quant, gated_rms_norm_group_fp8_quant_reference):
            with pytest.raises(ValueError, match=message):
                call(*moved, EPSILON, heads, **({"scales": GroupScales(64)} if bad.startswith("strided") else {}))


def test_tensors_on_other_devices_are_refused(device: torch.device) -> None:
    x, weight = X.to(device), W.to(device)
    with pytest.raises(ValueError, match=r"z is .* on meta; allowed: as x, .* on (cpu|cuda)"):
        gated_rms_norm_group_fp8_quant_reference(x, x.to("meta"), weight, EPSILON, 2)
    with pytest.raises(ValueError, match=r"weight is on meta; allowed: x's device, (cpu|cuda)"):
        gated_rms_norm_group_fp8_quant_reference(x, x, weight.to("meta"), EPSILON, 2)


def test_too_large_heads_are_refused(device: torch.device) -> None:
    x, weight = torch.zeros(2, 8320, dtype=torch.bfloat16, device=device), torch.ones(8320, device=device)
    with pytest.raises(ValueError, match=r"x has heads of 8320; allowed: multiples of group_size=128 from 128 to 8192"):
        gated_rms_norm_group_fp8_quant(x, x, weight, EPSILON, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scales": GroupScales(32)}, r"group_size=32 .*allowed: 64, 128"),
        ({"scales": GroupScales(layout="rows")}, r"scale_layout='rows' is not known; allowed: row, column, tma"),
        ({"activation": "swish"}, r"activation='swish' .*allowed: silu, sigmoid"),
        ({"norm_rounding": "custom_op"}, r"norm_rounding='custom_op' .*allowed: native, eager"),
        (
            {"quant_rounding": "eager"},
            rf"quant_rounding='eager' .*{ALLOWED_OF_GROUPS}",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_argument_is_refused(arguments: dict, message: str, device: torch.device) -> None:
    x, weight = X.to(device), W.to(device)
    for call in (gated_rms_norm_group_fp8_quant, gated_rms_norm_group_fp8_quant_reference):
        with pytest.raises(ValueError, match=message):
            call(x, x, weight, EPSILON, 2, **arguments)
