# SPDX-License-Identifier: Apache-2.0
"""The FP8 group quantiser against its pure-torch reference, byte for byte; here on a GPU, or in Triton's interpreter.

The comparison with vLLM's own op is in test_group_quant_gpu.py.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch

from vllm_fusion_plugin.kernels import group_quant as kernels
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, GroupScales, group_fp8_quant_reference

from .cases import (
    DTYPES,
    GROUP_ROUNDINGS,
    GROUP_SIZES,
    LAYOUTS,
    all_values,
    allowed,
    random_input,
    scales_name,
    short,
    strided,
    told_apart,
)
from .checks import Guarded, check_guarded, guarded_scales


class Mode(NamedTuple):
    """One combination of what `group_fp8_quant` can be asked for."""

    dtype: torch.dtype
    group_size: int
    scale_layout: str
    use_ue8m0: bool
    quant_rounding: str

    def __str__(self) -> str:
        return f"{short(self.dtype)}-{scales_name(self)}-{self.quant_rounding}"

    @property
    def scales(self) -> GroupScales:
        return GroupScales(self.group_size, self.scale_layout, self.use_ue8m0)

    def arguments(self) -> dict[str, object]:
        return {"scales": self.scales, "quant_rounding": self.quant_rounding}


def modes(quant_roundings: tuple[str, ...] | None = None) -> list[Mode]:
    switch = (False, True)
    roundings = quant_roundings or GROUP_ROUNDINGS
    every = itertools.starmap(Mode, itertools.product(DTYPES, GROUP_SIZES, (*LAYOUTS, "packed"), switch, roundings))
    return [mode for mode in every if allowed(mode) and (quant_roundings or told_apart(mode))]


DEEPSEEK = Mode(torch.bfloat16, 128, "tma", False, "custom_op")


def activations(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int, kind: str = "normal"
) -> torch.Tensor:
    """x [rows, width]."""
    return random_input(rows, width // 2, dtype, device, seed, kind)


def run(x: torch.Tensor, mode: Mode, **launch: object) -> tuple[Guarded, Guarded]:
    rows, width = x.shape
    codes = Guarded(x.new_empty((rows, width), dtype=FP8_DTYPE))
    scales = guarded_scales(x, mode.scales, width)
    kernels.group_fp8_quant(
        x, codes.tensor, scales.tensor, mode.group_size, mode.use_ue8m0, mode.quant_rounding, **launch
    )
    codes.check()
    scales.check()
    return codes, scales


def check(x: torch.Tensor, mode: Mode, **launch: object) -> None:
    quant_rounding = mode.quant_rounding
    check_guarded(*run(x, mode, **launch), *group_fp8_quant_reference(x, mode.scales, quant_rounding), quant_rounding)


# ---- the kernel ------------------------------------------------------------------------------------------------------


KINDS = ((3, "special"), (2, "normal"))


@pytest.mark.parametrize("mode", modes(), ids=str)
def test_modes(mode: Mode, device: torch.device) -> None:
    """Every mode. 5 rows: one short of TMA's alignment by 3; 3 groups: no power of two."""
    kinds = (activations(rows, 3 * mode.group_size, mode.dtype, device, 1, kind) for rows, kind in KINDS)
    check(torch.cat(list(kinds)), mode)


# rows x groups need no mode: tiles depend on both and on the group size alone
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("rows", [0, 1, 5, 16, 17, 33])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_shapes(group_size: int, rows: int, groups: int, device: torch.device) -> None:
    mode = DEEPSEEK._replace(group_size=group_size)
    check(activations(rows, groups * group_size, mode.dtype, device, seed=rows), mode)


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("tile", [(1, 4, 1), (2, 8, 2), (8, 1, 2), (2, 16, 4)], ids=str)
def test_tiles(tile: tuple[int, int, int], rows_first: bool, device: torch.device) -> None:
    """Each tile shape that `group_tile` has, on rows and groups that it does not divide."""
    x = activations(9, 5 * 128, torch.bfloat16, device, seed=3)
    check(x, DEEPSEEK, tile=kernels.Tile(*tile, rows_first))


def test_tiles_have_whole_groups_of_a_power_of_two() -> None:
    for rows, groups, group_size in itertools.product((1, 2, 16, 17, 300, 8192, 10**6), (1, 3, 16, 144), GROUP_SIZES):
        tile = kernels.group_tile(rows, groups, group_size)
        per_thread = tile.rows * tile.groups * group_size / (32 * tile.num_warps)
        assert 4 <= per_thread <= 32
        assert all(size & (size - 1) == 0 for size in tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("rows", [5, 33])
def test_strided_rows(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    x = strided(activations(rows, 3 * 128, dtype, device, seed=4))
    check(x, DEEPSEEK._replace(dtype=dtype))


@pytest.mark.parametrize("at", [0, 17, 63])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_signalling_nan(dtype: torch.dtype, at: int, device: torch.device) -> None:
    """Found by fuzzing: one group by itself is reduced by other instructions than many."""
    x = activations(1, 64, dtype, device, seed=5)
    x.view(torch.int16)[0, at] = 0x7F81 if dtype == torch.bfloat16 else 0x7C01
    check(x, DEEPSEEK._replace(dtype=dtype, group_size=64))


@pytest.mark.parametrize(
    ("dtype", "quant_rounding"),
    dict.fromkeys((mode.dtype, mode.quant_rounding) for mode in modes()),
    ids=lambda value: value if isinstance(value, str) else short(value),
)
def test_all_bit_patterns(dtype: torch.dtype, quant_rounding: str, device: torch.device) -> None:
    """In their order (a group is then of one exponent), every 512th (all exponents in a group), and shuffled."""
    values = all_values(dtype, device)
    # The interpreter's costs are by program. It also hands on fp16's signaling NaN, which hardware makes quiet and numpy's
    # maximum takes for a number.
    tile = kernels.Tile(16, 32, 1) if device.type == "cpu" else None
    values = torch.where(values.isnan(), torch.nan, values) if device.type == "cpu" else values
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(5)).to(device)
    x = torch.cat([values, values.view(128, 512).t().reshape(-1), values[order]]).view(48, -1)
    for use_ue8m0 in (False, True):
        check(x, DEEPSEEK._replace(dtype=dtype, use_ue8m0=use_ue8m0, quant_rounding=quant_rounding), tile=tile)


def test_floors(device: torch.device) -> None:
    """All-zero groups, and groups under eps: the scale is the form's floor, not zero and not NaN."""
    x = torch.zeros(4, 2 * 128, dtype=torch.bfloat16, device=device)
    x[1, 5], x[1, 128 + 5] = 1.0, 1e-30
    for mode in modes():
        if mode.dtype == x.dtype and mode.group_size == 128:
            check(x, mode)
            assert bool((run(x, mode)[1].tensor > 0).all())
