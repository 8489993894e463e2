# SPDX-License-Identifier: Apache-2.0
"""Sigmoid gate + FP8 group quantiser: one pass over both inputs, one program a tile of whole groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import numerics, quant
from .fp8 import OCP
from .launch import choose, launch, row_stride, rows_with_padding
from .pdl import pdl_options, wait_for_producer
from .rounding import is_native
from .silu_mul_quant import group_tile
from .tiles import GroupTile as Tile


# What changes with the number of tokens is not specialised on: see kernels/silu_mul_quant.py.
@triton.jit(do_not_specialize=["rows", "padded_rows", "scale_group_stride"])
def _kernel(
    x_ptr,
    gate_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    width,
    padded_rows,
    x_stride,
    gate_stride,
    scale_row_stride,
    scale_group_stride,
    eps,
    ROUNDED: tl.constexpr,
    TILE: tl.constexpr,
    QUANT: tl.constexpr,
    PDL: tl.constexpr,
):
    first_row = tl.program_id(0 if TILE.rows_first else 1) * TILE.rows
    row = first_row + tl.arange(0, TILE.rows)
    group = tl.program_id(1 if TILE.rows_first else 0) * TILE.groups + tl.arange(0, TILE.groups)
    column = group[:, None] * QUANT.group_size + tl.arange(0, QUANT.group_size)[None, :]
    row64 = row.to(tl.int64)
    wait_for_producer(PDL)
    mask = (row < rows)[:, None, None]
    if not TILE.even:
        mask = mask & (column < width)[None, :, :]
    x = tl.load(x_ptr + row64[:, None, None] * x_stride + column[None, :, :], mask=mask, other=0.0)
    gate = tl.load(gate_ptr + row64[:, None, None] * gate_stride + column[None, :, :], mask=mask, other=0.0)

    # tl.sigmoid, because Inductor's kernel has it
    y = numerics.widen(x) * tl.sigmoid(numerics.widen(gate))
    if ROUNDED:
        y = numerics.rounded(y, x.dtype)
    scale, codes = quant.group(y, eps, QUANT)
    tl.store(codes_ptr + row64[:, None, None] * width + column[None, :, :], codes, mask=mask)
    group_mask = group * QUANT.group_size < width
    scale_columns = quant.scale_columns(scales_ptr, group, scale_group_stride, QUANT)
    quant.store_scales(scale_columns, scale, row, rows, group_mask, scale_row_stride, TILE.scales_from_all, QUANT)
    if QUANT.padded and ((padded_rows > rows) & (first_row + TILE.rows >= rows)):
        quant.zero_scale_padding(scale_columns, rows, padded_rows, group_mask, scale_row_stride, QUANT)


def sigmoid_mul_group_fp8_quant(
    x: torch.Tensor,
    gate: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    use_ue8m0: bool,
    quant_rounding: str,
    tile: Tile | None = None,
    pdl: bool | None = None,
    fp8: str = OCP,
) -> None:
    """Write codes [M, K] and scales [M, K / group_size] of x and gate [M, K]; arguments as the op checked them. Tiles are
    those of SiLU·mul, which loads as much."""
    rows, width = codes.shape
    if rows == 0:
        return
    groups = width // group_size
    tile = tile or choose(group_tile, rows, groups, group_size)
    grid, constants = tile.grid(rows, groups)
    launch(
        _kernel,
        grid,
        x.device,
        x,
        gate,
        codes,
        scales,
        rows,
        width,
        rows_with_padding(scales, rows),
        row_stride(x),
        row_stride(gate),
        scales.stride(0),
        scales.stride(1),
        quant.EPS,
        ROUNDED=not is_native(quant_rounding),
        TILE=constants,
        QUANT=quant.group_constants(scales, group_size, use_ue8m0, quant_rounding, fp8=fp8),
        num_warps=tile.num_warps,
        **pdl_options(x.device, pdl),
    )
