# SPDX-License-Identifier: Apache-2.0
"""MLA's two norms in one kernel: q against the kernel that does q alone, kv against the pure-torch reference, byte for byte.

On a GPU, or in Triton's interpreter. Inputs have squares whose sum is exact in any order, see norm_checks.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from vllm_fusion_plugin.kernels import mla_dual_rms_norm_quant as kernels
from vllm_fusion_plugin.kernels.row_order import Tile
from vllm_fusion_plugin.ops import quant
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs, rms_norm_reference

from .cases import DTYPES, ROUNDINGS, random_input, special_values
from .checks import Guarded, as_bits, assert_same_bytes, guarded_scales, one_nan
from .norm_checks import BF16, DEEPSEEK, PACKED, Layout, Norm, exact_input, layouts, run_group

Q_EPSILON, KV_EPSILON = 1e-6, 1e-5


def projection(
    rows: int, q_width: int, kv_width: int, mode: Norm, device: torch.device, seed: int
) -> list[torch.Tensor]:
    """q and kv as the first projection gives them: views of its rows, with NaN for k's rotary part after them."""
    parts = [exact_input(rows, width, mode, device, seed + i)[0] for i, width in enumerate((q_width, kv_width))]
    rotary = torch.full((rows, 64), float("nan"), dtype=mode.dtype, device=device)
    return list(torch.cat([*parts, rotary], dim=1).split([q_width, kv_width, 64], dim=1)[:2])


def weights(q: torch.Tensor, kv: torch.Tensor, mode: Norm) -> list[torch.Tensor]:
    return [mode.make_weight(t.shape[1], t.device, seed) for seed, t in enumerate((q, kv))]


def run(
    q: torch.Tensor,
    kv: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    mode: Norm,
    layout: Layout = DEEPSEEK,
    tile: Tile | None = None,
) -> tuple[Guarded, Guarded, Guarded]:
    rows, width = q.shape
    codes = Guarded(q.new_empty((rows, width), dtype=quant.FP8_DTYPE))
    scales = guarded_scales(q, layout.scales, width)
    normed = Guarded(kv.new_empty(kv.shape))
    kernels.mla_dual_rms_norm_group_fp8_quant(
        q, kv, q_weight, kv_weight, codes.tensor, scales.tensor, normed.tensor, Q_EPSILON, KV_EPSILON,
        layout.group_size, layout.use_ue8m0, mode.norm_rounding, mode.quant_rounding, tile,
    )  # fmt: skip
    for out in (codes, scales, normed):
        out.check()
    return codes, scales, normed


def check(q: torch.Tensor, kv: torch.Tensor, mode: Norm, layout: Layout = DEEPSEEK, tile: Tile | None = None) -> None:
    q_weight, kv_weight = weights(q, kv, mode)
    codes, scales, normed = run(q, kv, q_weight, kv_weight, mode, layout, tile)
    alone_codes, alone_scales, _ = run_group(q, None, q_weight, mode, layout, tile, Q_EPSILON)
    assert_same_bytes(codes.tensor, alone_codes.tensor, "q's codes")
    assert_same_bytes(scales.storage(), alone_scales.storage(), "q's scales and padding")
    expected, _ = rms_norm_reference(mode.inputs(kv, kv_weight, epsilon=KV_EPSILON)._replace(gemma_weight=False))
    assert_same_bytes(one_nan(normed.tensor), one_nan(expected), "kv")


MODES = [
    *itertools.starmap(Norm, itertools.product(DTYPES, ("same", "fp32"), (False,), ("native", "eager"), ROUNDINGS)),
    *itertools.starmap(Norm, itertools.product(DTYPES, ("same",), (False,), ("custom_op",), ROUNDINGS)),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_modes(mode: Norm, device: torch.device) -> None:
    check(*projection(3, 384, 512, mode, device, seed=1), mode)


@pytest.mark.parametrize("layout", [*layouts(), *PACKED], ids=str)
def test_layouts(layout: Layout, device: torch.device) -> None:
    mode = BF16._replace(residual=False)
    check(*projection(5, 3 * layout.group_size, 256, mode, device, seed=2), mode, layout)


@pytest.mark.parametrize("tile", [Tile(2, 128, 1), Tile(4, 512, 4), Tile(8, 1024, 8)], ids=str)
def test_tiles(tile: Tile, device: torch.device) -> None:
    mode = BF16._replace(residual=False)
    check(*projection(5, 640, 256, mode, device, seed=3), mode, tile=tile)


# custom_op, whose division is exact for widths that are no powers of two as well; q's width decides how many warps there are
@pytest.mark.parametrize("kv_width", [1, 200, 512, 576, 2048])
@pytest.mark.parametrize("q_width", [128, 1536, 2176])
def test_shapes(q_width: int, kv_width: int, device: torch.device) -> None:
    mode = BF16._replace(residual=False, norm_rounding="custom_op")
    for rows in (0, 1, 3):
        check(*projection(rows, q_width, kv_width, mode, device, seed=rows), mode)


def test_special_values(device: torch.device) -> None:
    """What NaN, an infinity or an overflowing square does to its row of kv, and to no other row, nor to q."""
    for dtype in DTYPES:
        mode = Norm(dtype, residual=False)
        values = special_values(dtype).to(device)
        q, kv = projection(len(values) + 1, 1536, 512, mode, device, seed=3)
        kv[:-1, 300] = values
        check(q, kv, mode, tile=Tile(32, 2048, 8))


def test_random_kv(device: torch.device) -> None:
    """Sums that are not exact: the other order of additions may show in the last bit."""
    mode = BF16._replace(residual=False)
    q, _ = projection(9, 1536, 512, mode, device, seed=4)
    kv = random_input(9, 256, mode.dtype, device, seed=4)
    q_weight, kv_weight = weights(q, kv, mode)
    actual = run(q, kv, q_weight, kv_weight, mode)[2].tensor
    expected, _ = rms_norm_reference(NormInputs(kv, kv_weight, KV_EPSILON))
    steps = (as_bits(actual).int() - as_bits(expected).int()).abs()
    assert int(steps.max()) <= 1
    assert int(steps.count_nonzero()) <= steps.numel() // 500
