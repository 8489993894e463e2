# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (a fixture is imported, and an argument)
"""Codes and scales after norms, on a GPU: what vLLM's ops make of the normed rows, or Inductor of its native code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vllm_fusion_plugin.ops.quant import GroupScales
from vllm_fusion_plugin.ops.rms_norm_quant import (
    rms_norm_group_fp8_quant,
    rms_norm_static_fp8_quant,
    rms_norm_token_fp8_quant,
)

from .cases import DTYPES, all_values, short, strided
from .checks import (
    SUMS_ARE_SELDOM_OFF,
    assert_inductors_scales,
    assert_same_bytes,
    assert_same_outputs,
    code_steps,
    native_quantiser,
)
from .installed import installed
from .norm_checks import BF16, DEEPSEEK, EPSILON, PACKED, Layout, Norm, inputs, layouts
from .test_rms_norm_quant_gpu import (
    ELEMENTS,
    ROWS,
    STATIC_SCALES,
    WIDTHS,
    Ops,
    compiled,
    ops,  # noqa: F401  (a fixture)
    torch_norm,
)

pytestmark = pytest.mark.gpu

# ---- quantisers ------------------------------------------------------------------------------------------------------


def check_quantisers(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mode: Norm,
    ops: Ops,
    some_layouts: list[Layout],
    scale: float,
    epsilon: float = EPSILON,
) -> torch.Tensor:
    """Codes and scales are what vLLM's ops make of normed, which is returned."""
    norm, rounding = mode.inputs(x, weight, residual, epsilon, keep_norm=True), mode.quant_rounding
    for layout in some_layouts:
        quant_rounding = installed(mode).quant_rounding
        codes, scales, normed, *_ = rms_norm_group_fp8_quant(norm, layout.scales, quant_rounding=quant_rounding)
        assert_same_outputs((codes, scales), ops.group(normed, layout), str(layout))
    for bound in (None, 0.8, 1e-9):
        scale_ub = None if bound is None else torch.tensor([bound], device=x.device)
        codes, scales, normed, *_ = rms_norm_token_fp8_quant(norm, scale_ub, quant_rounding=rounding)
        expected_codes, expected_scales = ops.token(normed, scale_ub)
        assert_same_bytes(codes, expected_codes, f"token, scale_ub {bound}: codes")
        assert_same_bytes(scales, expected_scales, f"token, scale_ub {bound}: scales")
    static_scale = torch.tensor([scale], device=x.device)
    codes, normed, *_ = rms_norm_static_fp8_quant(norm, static_scale, quant_rounding=rounding)
    assert_same_bytes(codes, ops.static(normed, static_scale), f"static, scale {scale}: codes")
    return normed


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_quantisers_all_values(dtype: torch.dtype, ops: Ops, device: torch.device) -> None:
    """Every number as y, in three arrangements: s = 1 and epsilon = 0 leave the weight.

    In the order of the bit patterns a group of 128 bf16 numbers has one exponent and all its mantissas; every 512th
    pattern, all exponents; shuffled, anything.
    """
    values = all_values(dtype, device)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(21)).to(device)
    mode = Norm(dtype, "same", False)
    for arrangement in (values, values.view(128, 512).t().reshape(-1), values[order]):
        for width in (1024, 2048, 8192):
            x = torch.ones(1, width, dtype=dtype, device=device)
            for number, weight in enumerate(arrangement.view(-1, width)):
                scale = STATIC_SCALES[number % len(STATIC_SCALES)]
                normed = check_quantisers(x, None, weight, mode, ops, [Layout(64), DEEPSEEK], scale, epsilon=0.0)
                numbers = ~weight.isnan()
                assert_same_bytes(normed[0][numbers], weight[numbers], "y")


def chunks(
    mode: Norm, width: int, device: torch.device, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """At least ELEMENTS elements; every fourth chunk has special values, the others are of activations' sizes."""
    for number in range(-(-ELEMENTS // (4096 * width))):
        yield inputs(4096, width, mode, device, 1000 * seed + number, "special" if number % 4 == 3 else "normal")


@pytest.mark.parametrize("norm_rounding", ["native", "eager", "custom_op"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_quantisers_random(dtype: torch.dtype, norm_rounding: str, ops: Ops, device: torch.device) -> None:
    mode = Norm(dtype, "same", True, norm_rounding)
    weight = mode.make_weight(7168, device)
    for number, (x, residual) in enumerate(chunks(mode, 7168, device, seed=22)):
        every = [*layouts(), *PACKED]
        some = [every[number % len(every)], DEEPSEEK]
        check_quantisers(x, residual, weight, mode, ops, some, STATIC_SCALES[number % len(STATIC_SCALES)])


@pytest.mark.parametrize("width", [128, 384, *WIDTHS, 18432])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 127, 1000])
def test_quantisers_model_shapes(rows: int, width: int, ops: Ops, device: torch.device) -> None:
    x, residual = inputs(rows, width, BF16, device, seed=rows)
    weight = BF16.make_weight(width, device)
    normed = check_quantisers(x, residual, weight, BF16, ops, [DEEPSEEK], 0.0123)
    of_strided = check_quantisers(strided(x), strided(residual), weight, BF16, ops, [DEEPSEEK], 0.0123)
    assert_same_bytes(of_strided, normed, "normed of strided rows")


@pytest.mark.parametrize("width", [1, 7, 200, 1100, 2500])
def test_quantisers_odd_widths(width: int, ops: Ops, device: torch.device) -> None:
    """What has no groups has no alignment either."""
    for rows in (1, 5, 300):
        x, residual = inputs(rows, width, BF16, device, seed=rows)
        check_quantisers(x, residual, BF16.make_weight(width, device), BF16, ops, [], 0.0123)


# ---- native quantisers -----------------------------------------------------------------------------------------------


def assert_native_codes(codes: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    if exact:
        assert_same_bytes(codes, expected, "codes")
        return
    steps = code_steps(codes, expected)
    assert int(steps.max()) <= 1
    assert int(steps.count_nonzero()) <= steps.numel() * 1e-3


@pytest.mark.parametrize("use_ue8m0", [False, True], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("residual_given", [False, True], ids=["", "add"])
@pytest.mark.parametrize("width", WIDTHS)
def test_group_native_quant_is_inductors(
    width: int, residual_given: bool, use_ue8m0: bool, device: torch.device
) -> None:
    """One order of additions in Inductor, whatever it times."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    quantise = native_quantiser(static=False, group_shape=GroupShape(1, 128), use_ue8m0=use_ue8m0)
    mode = BF16._replace(residual=residual_given, quant_rounding="native")
    x, residual = inputs(ROWS, width, mode, device, seed=23)
    weight = mode.make_weight(width, device)

    def native(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> tuple:
        y, total = torch_norm(x, weight, residual)
        return *quantise(y), *([] if total is None else [total])

    expected = compiled(native, x, residual, weight)
    norm = mode.inputs(x, weight, residual)
    actual = rms_norm_group_fp8_quant(norm, GroupScales(ue8m0=use_ue8m0), quant_rounding=mode.quant_rounding)
    assert_inductors_scales(actual[1], expected[1].contiguous(), "scales")
    assert_native_codes(actual[0], expected[0], exact=width <= 8192 or not SUMS_ARE_SELDOM_OFF)
    for one, other in zip(actual[2:], expected[2:], strict=True):
        assert_same_bytes(one, other, "residual_out")


@pytest.mark.parametrize("residual_given", [False, True], ids=["", "add"])
@pytest.mark.parametrize("static", [False, True], ids=["token", "static"])
@pytest.mark.parametrize("width", WIDTHS)
def test_token_and_static_native_quant(width: int, static: bool, residual_given: bool, device: torch.device) -> None:
    """Byte for byte where Inductor has one order of additions, at most a step off where it times several."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    shape = GroupShape.PER_TENSOR if static else GroupShape.PER_TOKEN
    quantise = native_quantiser(static=static, group_shape=shape)
    mode = BF16._replace(residual=residual_given, quant_rounding="native")
    x, residual = inputs(ROWS, width, mode, device, seed=24)
    weight, scale = mode.make_weight(width, device), torch.tensor([0.0123], device=device)

    def native(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, scale: torch.Tensor) -> tuple:
        y, total = torch_norm(x, weight, residual)
        codes, scales = quantise(y, scale) if static else quantise(y)
        return codes, scales, *([] if total is None else [total])

    expected = compiled(native, x, residual, weight, scale)
    norm, rounding = mode.inputs(x, weight, residual), mode.quant_rounding
    if static:
        codes, *totals = rms_norm_static_fp8_quant(norm, scale, quant_rounding=rounding)
        exact = width <= 2048
    else:
        codes, scales, *totals = rms_norm_token_fp8_quant(norm, quant_rounding=rounding)
        exact = width <= 1024 or (residual_given and width in (4096, 5120, 8192))
        # a sum, its root and two products: 1.3 ulps apart measured, 2 allowed
        exact = exact and (width <= 1024 or not SUMS_ARE_SELDOM_OFF)
        torch.testing.assert_close(scales, expected[1], rtol=0 if exact else 2**-21, atol=0)
    assert_native_codes(codes, expected[0], exact)
    for one, other in zip(totals, expected[2:], strict=True):
        assert_same_bytes(one, other, "residual_out")
