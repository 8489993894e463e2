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
from vllm_fusion_plugin.ops.group_quant import group_fp8_quant
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, GroupScales, group_fp8_quant_reference

from .cases import (
    DTYPES,
    GROUP_ROUNDINGS,
    GROUP_SIZES,
    LAYOUTS,
    TMA,
    all_values,
    random_input,
    scales_name,
    short,
    strided,
    told_apart,
    zeros_laid_out_as,
)
from .checks import Guarded, assert_same_outputs, check_deterministic, check_guarded, check_tma_outputs, one_nan

OP = torch.ops.vllm_fusion_plugin.group_fp8_quant.default


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
    every = itertools.starmap(Mode, itertools.product(DTYPES, GROUP_SIZES, LAYOUTS, switch, roundings))
    return [mode for mode in every if quant_roundings or told_apart(mode)]


DEEPSEEK = Mode(torch.bfloat16, 128, "tma", False, "custom_op")


def activations(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int, kind: str = "normal"
) -> torch.Tensor:
    """x [rows, width]."""
    return random_input(rows, width // 2, dtype, device, seed, kind)


def run(x: torch.Tensor, mode: Mode, **launch: object) -> tuple[Guarded, Guarded]:
    rows, width = x.shape
    codes = Guarded(x.new_empty((rows, width), dtype=FP8_DTYPE))
    scales = Guarded(mode.scales.empty(x, rows, width))
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


@pytest.mark.parametrize("quant_rounding", GROUP_ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
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
            r"quant_rounding='eager' .*allowed: custom_op, reciprocal, native, native_floored",
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
