# SPDX-License-Identifier: Apache-2.0
"""Sigmoid gate + FP8 group quantiser against its pure-torch reference; here on a GPU, or in Triton's interpreter.

The sigmoid may be a last bit of fp32 off the reference's, by which a product seldom rounds to another number of its dtype:
one code in 500 may differ here. The comparison with Inductor's kernel, byte for byte, is in
test_sigmoid_mul_quant_gpu.py.
"""

from __future__ import annotations

import pytest
import torch

from vllm_fusion_plugin.kernels import sigmoid_mul_quant as kernels
from vllm_fusion_plugin.ops.quant import FP8_DTYPE
from vllm_fusion_plugin.ops.sigmoid_mul_quant import sigmoid_mul_group_fp8_quant_reference

from .cases import DTYPES, GROUP_SIZES, short, strided
from .checks import Guarded, guarded_scales, one_nan
from .test_group_quant import DEEPSEEK, Mode, activations, modes

ULPS = 4  # of the sigmoid, of the product, and of the scale's own division
Inputs = tuple[torch.Tensor, torch.Tensor]


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int, kind: str = "normal") -> Inputs:
    """x and gate [rows, width]."""
    x, gate = (activations(rows, width, dtype, device, seed + i, kind) for i in (0, 100))
    return x, gate


def run(x: torch.Tensor, gate: torch.Tensor, mode: Mode, **launch: object) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    codes = Guarded(x.new_empty((rows, width), dtype=FP8_DTYPE))
    scales = guarded_scales(x, mode.scales, width)
    kernels.sigmoid_mul_group_fp8_quant(
        x, gate, codes.tensor, scales.tensor, mode.group_size, mode.use_ue8m0, mode.quant_rounding, **launch
    )
    codes.check()
    scales.check()
    return codes.tensor, scales.tensor


def check(x: torch.Tensor, gate: torch.Tensor, mode: Mode, **launch: object) -> None:
    codes, scales = run(x, gate, mode, **launch)
    expected_codes, expected_scales = sigmoid_mul_group_fp8_quant_reference(
        x, gate, mode.scales, quant_rounding=mode.quant_rounding
    )
    assert apart(one_nan(codes), one_nan(expected_codes)) <= 2e-3
    assert scales.stride() == expected_scales.stride()
    if scales.dtype == torch.float32:
        torch.testing.assert_close(scales, expected_scales, rtol=ULPS * 2.0**-23, atol=0.0, equal_nan=True)
    else:
        assert torch.equal(scales, expected_scales)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Which part of the elements has other bytes."""
    size = found.element_size()
    integers = {1: torch.uint8, 4: torch.int32}[size]
    differ = (found.contiguous().view(integers) != expected.contiguous().view(integers)).sum()
    return int(differ) / max(found.numel(), 1)


# What a quantiser does with its rows is the lone one's, which has every mode tested.
MODES = [mode for mode in modes() if mode.group_size == 128 and mode.scale_layout in ("tma", "packed")]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_modes(mode: Mode, device: torch.device) -> None:
    """5 rows: one short of TMA's alignment by 3; 3 groups: no power of two."""
    kinds = [
        inputs(rows, 3 * mode.group_size, mode.dtype, device, 1, kind) for rows, kind in ((3, "special"), (2, "normal"))
    ]
    check(*(torch.cat(parts) for parts in zip(*kinds, strict=True)), mode)


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("rows", [0, 1, 5, 33])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_shapes(group_size: int, rows: int, groups: int, device: torch.device) -> None:
    mode = DEEPSEEK._replace(group_size=group_size)
    check(*inputs(rows, groups * group_size, mode.dtype, device, seed=rows), mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_strided_rows(dtype: torch.dtype, device: torch.device) -> None:
    """Each has a stride of its own: the gate is a part of what the projection before attention writes."""
    x, gate = inputs(5, 3 * 128, dtype, device, seed=4)
    mode = DEEPSEEK._replace(dtype=dtype)
    check(strided(x), gate, mode)
    check(x, strided(gate), mode)


def test_the_gate_gates(device: torch.device) -> None:
    """Gates of large numbers leave x as it is, or nothing of it."""
    x = activations(2, 256, torch.bfloat16, device, seed=5)
    gate = torch.full_like(x, 100.0)
    gate[1] = -200.0
    codes, _ = run(x, gate, DEEPSEEK)
    open_codes, _ = run(x, torch.full_like(x, 100.0), DEEPSEEK)
    assert torch.equal(codes[0].view(torch.uint8), open_codes[0].view(torch.uint8))
    assert not codes[1].float().any() and codes[0].float().any()
