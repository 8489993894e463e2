# SPDX-License-Identifier: Apache-2.0
"""RMSNorm + FP8 kernels against their pure-torch references, byte for byte; here on a GPU, or in Triton's interpreter.

vLLM's own ops are in test_rms_norm_quant_gpu.py, the ops in tests/ops/test_rms_norm_quant.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from vllm_fusion_plugin.kernels.row_order import Tile
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs, add_residual, rms_norm_reference

from .cases import DTYPES, GROUP_ROUNDINGS, ROUNDINGS, all_values, short, special_values, strided
from .checks import as_bits, assert_same_bytes, one_nan
from .norm_checks import (
    BF16,
    DEEPSEEK,
    EPSILON,
    ONE_PROGRAM,
    PACKED,
    Layout,
    Norm,
    assert_extras,
    check_group,
    check_static,
    check_token,
    exact_input,
    expected_norm,
    inputs,
    inverse_rms,
    layouts,
    norm_modes,
    run_group,
)

# ---- the norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", norm_modes(), ids=str)
def test_norm_modes(mode: Norm, device: torch.device) -> None:
    """Every mode. 5 rows: one short of TMA's alignment by 3; 3 groups: no power of two."""
    x, residual = inputs(5, 384, mode, device, seed=1, kind="special")
    check_group(x, residual, mode.make_weight(384, device), mode, tile=ONE_PROGRAM)


@pytest.mark.parametrize("mode", norm_modes(quant_roundings=("custom_op",)), ids=str)
def test_norm_is_its_reference(mode: Norm, device: torch.device) -> None:
    """normed and residual_out, the reference's own mean and rsqrt included.

    The width is a power of two, because the kernel's division by one is exact on a GPU too (see `inverse_rms`).
    """
    x, residual = exact_input(6, 512, mode, device, seed=2)
    weight = mode.make_weight(512, device)
    _, _, extras = run_group(x, residual, weight, mode, DEEPSEEK, ONE_PROGRAM)
    normed, residual_out = rms_norm_reference(mode.inputs(x, weight, residual))
    assert_extras(extras, [normed, residual_out] if mode.residual else [normed])


def test_roundings_differ(device: torch.device) -> None:
    """The inputs above tell the roundings apart, or the tests above would show nothing."""
    x, residual = exact_input(6, 256, BF16, device, seed=2)
    weight = BF16.make_weight(256, device)
    normed = {
        rounding: rms_norm_reference(NormInputs(x, weight, EPSILON, residual, norm_rounding=rounding))[0]
        for rounding in ("native", "eager", "custom_op")
    }
    for one, other in itertools.combinations(normed.values(), 2):
        assert not torch.equal(as_bits(one), as_bits(other))


@pytest.mark.parametrize("quant_rounding", ROUNDINGS)
@pytest.mark.parametrize("norm_rounding", ["native", "custom_op"])
def test_inverse_rms(norm_rounding: str, quant_rounding: str, device: torch.device) -> None:
    """Within 4 ulp of the truth: a bound that a missing column, or one counted twice, exceeds by far."""
    mode = BF16._replace(norm_rounding=norm_rounding, quant_rounding=quant_rounding)
    for width in (64, 200, 2048, 6272):  # of 2048 columns at a time, the last is 3 whole chunks and a part
        x, residual = inputs(3, width, mode, device, seed=3)
        s, _ = add_residual(mode.inputs(x, None, residual))
        truth = (s.double().square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()
        torch.testing.assert_close(inverse_rms(x, residual, mode).double(), truth, rtol=4 * 2**-24, atol=0)


@pytest.mark.parametrize("norm_rounding", ["native", "custom_op"])
def test_inverse_rms_of_exact_sums(norm_rounding: str, device: torch.device) -> None:
    mode = BF16._replace(norm_rounding=norm_rounding)
    x, residual = exact_input(6, 512, mode, device, seed=4)
    mean = add_residual(mode.inputs(x, None, residual))[0].square().sum(dim=1, keepdim=True) / 512
    assert_same_bytes(inverse_rms(x, residual, mode), torch.rsqrt(mean + EPSILON), "rsqrt(mean + epsilon)")


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.5])
def test_epsilon(epsilon: float, device: torch.device) -> None:
    """Rows of zeros, where epsilon is all there is: 0 * rsqrt(epsilon), and NaN for 0."""
    x, residual = exact_input(4, 256, BF16, device, seed=4)
    x[:2], residual[:2] = 0.0, 0.0
    weight = BF16.make_weight(256, device)
    check_group(x, residual, weight, BF16, epsilon=epsilon)
    codes, _, (normed, _) = run_group(x, residual, weight, BF16, DEEPSEEK, epsilon=epsilon)
    assert bool(normed.tensor[:2].isnan().all()) == (epsilon == 0.0)
    assert bool((as_bits(codes.tensor[:2]) & 0x7F == 0).all()) == (epsilon != 0.0)


# ---- quantisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "quant_rounding"),
    [*itertools.product(layouts(), GROUP_ROUNDINGS), *((layout, "custom_op") for layout in PACKED)],
    ids=str,
)
def test_group_layouts(layout: Layout, quant_rounding: str, device: torch.device) -> None:
    mode = BF16._replace(quant_rounding=quant_rounding)
    x, residual = inputs(5, 3 * layout.group_size, mode, device, seed=5, kind="special")
    check_group(x, residual, mode.make_weight(x.shape[1], device), mode, layout)


# 64 to 1024: a warp a row; to 2048: one block; beyond: chunks of 2048 with a native quantiser, all at once without
@pytest.mark.parametrize("quant_rounding", ROUNDINGS)
@pytest.mark.parametrize("width", [64, 128, 1088, 2112, 6272])
def test_group_shapes(width: int, quant_rounding: str, device: torch.device) -> None:
    mode = BF16._replace(quant_rounding=quant_rounding)
    for rows in (0, 1, 3):
        x, residual = inputs(rows, width, mode, device, seed=rows)
        check_group(x, residual, mode.make_weight(width, device), mode, DEEPSEEK._replace(group_size=64))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_strided_rows(dtype: torch.dtype, device: torch.device) -> None:
    mode = Norm(dtype)
    weight, scale = mode.make_weight(384, device), torch.tensor([0.05], device=device)
    x, residual = inputs(5, 384, mode, device, seed=6)
    for pair in ((strided(x), residual), (x, strided(residual))):
        check_group(*pair, weight, mode, tile=ONE_PROGRAM)
        check_token(*pair, weight, mode, tile=ONE_PROGRAM)
        check_static(*pair, weight, mode, scale, ONE_PROGRAM)


@pytest.mark.parametrize("quant_rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("tile", "width"),
    [((2, 128, 1), 640), ((4, 512, 2), 640), ((8, 1024, 16), 640), ((1, 2048, 4, 8), 1536), ((2, 4096, 4, 16), 2560)],
    ids=str,
)
def test_tiles(tile: tuple, width: int, quant_rounding: str, device: torch.device) -> None:
    """Rows that tiles do not fill, chunks that a row does not; with sums that are exact in any order."""
    tile, mode = Tile(*tile), BF16._replace(quant_rounding=quant_rounding)
    x, residual = exact_input(3, width, mode, device, seed=7)
    weight = mode.make_weight(width, device)
    check_group(x, residual, weight, mode, DEEPSEEK, tile)
    check_token(x, residual, weight, mode, None, tile)
    check_static(x, residual, weight, mode, torch.tensor([0.05], device=device), tile)


@pytest.mark.parametrize("width", [384, 2048, 2560])
def test_row_alone_has_its_bytes_of_the_batch(width: int, device: torch.device) -> None:
    x, residual = inputs(5, width, BF16, device, seed=8)
    weight = BF16.make_weight(width, device)
    batch = rms_norm_group_fp8_quant_with_kernel(x, residual, weight)
    for row in range(5):
        alone = rms_norm_group_fp8_quant_with_kernel(x[row : row + 1], residual[row : row + 1], weight)
        for one, many in zip(alone, batch, strict=True):
            assert_same_bytes(one, many[row : row + 1], f"row {row}")


def rms_norm_group_fp8_quant_with_kernel(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None
) -> list[torch.Tensor]:
    codes, scales, extras = run_group(x, residual, weight, BF16, Layout())
    return [codes.tensor, scales.tensor, *(extra.tensor for extra in extras)]


TOKEN_MODES = [
    Norm(*mode) for mode in itertools.product(DTYPES, ("same",), (True,), ("native", "custom_op"), ROUNDINGS)
]


@pytest.mark.parametrize("bounded", [False, True], ids=["", "scale_ub"])
@pytest.mark.parametrize("mode", TOKEN_MODES, ids=str)
def test_token_modes(mode: Norm, bounded: bool, device: torch.device) -> None:
    weight = mode.make_weight(200, device)
    for kind, bound in (("special", 1.5), ("normal", 0.7), ("normal", 1e-9)):
        x, residual = inputs(6, 200, mode, device, seed=9, kind=kind)
        scale_ub = torch.tensor([bound], device=device) if bounded else None
        check_token(x, residual, weight, mode, scale_ub, ONE_PROGRAM)


@pytest.mark.parametrize("quant_rounding", ROUNDINGS)
@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_token_odd_bounds(bound: float, quant_rounding: str, device: torch.device) -> None:
    mode = BF16._replace(quant_rounding=quant_rounding)
    x, residual = inputs(6, 200, mode, device, seed=10, kind="special")
    # y / scale overflows, and its sign must outlive that
    weight = torch.full((200,), 2.0**120, dtype=torch.bfloat16, device=device)
    check_token(x, residual, weight, mode, torch.tensor(bound, device=device), ONE_PROGRAM)


@pytest.mark.parametrize("quant_rounding", ROUNDINGS)
@pytest.mark.parametrize("width", [1, 7, 96, 1100, 2500])
def test_token_and_static_shapes(width: int, quant_rounding: str, device: torch.device) -> None:
    mode = BF16._replace(quant_rounding=quant_rounding)
    scale = torch.tensor(0.05, device=device)
    for rows in (0, 1, 3):
        x, residual = inputs(rows, width, mode, device, seed=rows)
        weight = mode.make_weight(width, device)
        check_token(x, residual, weight, mode)
        check_static(x, residual, weight, mode, scale)


@pytest.mark.parametrize("scale", [1.0, 3e-5, 700.0])
@pytest.mark.parametrize("mode", TOKEN_MODES, ids=str)
def test_static_modes(mode: Norm, scale: float, device: torch.device) -> None:
    x, residual = inputs(6, 200, mode, device, seed=11, kind="special")
    check_static(x, residual, mode.make_weight(200, device), mode, torch.tensor([scale], device=device), ONE_PROGRAM)


@pytest.mark.parametrize("quant_rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_all_bit_patterns(dtype: torch.dtype, quant_rounding: str, device: torch.device) -> None:
    """Every number as y: s = 1 and epsilon = 0 leave the weight. In the order of the bit patterns, and shuffled."""
    mode = Norm(dtype, "same", False, "native", quant_rounding)
    values = all_values(dtype, device)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(12)).to(device)
    x = torch.ones(1, 8192, dtype=dtype, device=device)
    for weight in torch.cat([values, values[order]]).view(-1, 8192):
        check_group(x, None, weight, mode, epsilon=0.0)
        check_token(x, None, weight, mode, epsilon=0.0)
        y, _ = expected_norm(x, None, weight, mode, epsilon=0.0)
        assert_same_bytes(one_nan(y.to(dtype)), one_nan(weight[None]), "y")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_special_value_a_row(dtype: torch.dtype, device: torch.device) -> None:
    """What NaN, an infinity or an overflowing square does to its row, and only to its row."""
    values = special_values(dtype).to(device)
    for mode in (Norm(dtype), Norm(dtype, quant_rounding="native"), Norm(dtype, norm_rounding="custom_op")):
        x, residual = exact_input(len(values) + 1, 256, mode, device, seed=13)
        x[:-1, 17] = values
        weight = mode.make_weight(256, device)
        check_group(x, residual, weight, mode, tile=ONE_PROGRAM)
        check_token(x, residual, weight, mode, tile=ONE_PROGRAM)
        all_rows = run_group(x, residual, weight, mode, Layout(), ONE_PROGRAM)[0].tensor
        alone = run_group(x[-1:], residual[-1:], weight, mode, Layout(), ONE_PROGRAM)[0].tensor
        assert_same_bytes(all_rows[-1:], alone, "an ordinary row")
