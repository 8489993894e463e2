# SPDX-License-Identifier: Apache-2.0
"""Gated RMSNorm + FP8 quantiser: one pass over x and z, one program a tile of whole heads.

For 5 bytes an element there is much to compute, and instructions are nearly as scarce as bandwidth: 29.0 an element (sm_90,
2 rows by 4 heads in 2 parts). Hence the inline PTX below, which has the bits of what it stands for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import numerics, quant
from .fp8 import OCP
from .launch import choose, launch, row_stride, rows_with_padding
from .pdl import pdl_options, wait_for_producer
from .rounding import is_native
from .tiles import MAX_GRID_1, cdiv, next_power_of_2, tile_grid


@triton.jit
def gate(z, SIGMOID: tl.constexpr, FIRST: tl.constexpr = True):
    """sigmoid(z) or silu(z) with the bits of Inductor's kernel, for fp32 values of bf16 or fp16 numbers.

    After the norm, FIRST=False, silu is -0 below -87.3, where the reciprocal flushes, instead of -2**-119 and less: times
    a normed number, at most sqrt(D) times the weight, that is far below the smallest scale.
    """
    if SIGMOID:
        return tl.sigmoid(z)  # what Inductor calls; its exp is Triton's own
    if FIRST:
        return numerics.silu(z, False)
    return z * numerics.reciprocal(numerics.one_plus_exp_of_negative(z))


@triton.jit
def sum_of_squares(y, PARTS: tl.constexpr):
    """Sums [rows, heads] over y [PARTS, rows, heads, columns], 8 by 8 and then by halves, parts being the first halves."""
    if PARTS == 1:
        return tl.sum(tl.sum(y * y, axis=3), axis=0)
    eights = tl.sum(tl.reshape(y * y, (PARTS, y.shape[1], y.shape[2], y.shape[3] // 8, 8)), axis=4)
    if PARTS == 4:
        eights = tl.sum(tl.reshape(eights, (2, 2, y.shape[1], y.shape[2], y.shape[3] // 8)), axis=0)
    return tl.sum(tl.sum(eights, axis=0), axis=2)


@triton.jit
def rsqrt(x):
    if numerics.HAS_LIBDEVICE:
        return libdevice.rsqrt(x)
    return tl.rsqrt(x)


class GatedConstants(NamedTuple):
    """What the kernel is compiled for, of the gated norm; NORM in it."""

    head_dim: int
    gate_first: bool
    sigmoid: bool
    keep_fp32: bool  # y is not rounded


class HeadTileConstants(NamedTuple):
    """What the kernel is compiled for, of a tile; TILE in it."""

    rows: int
    heads: int
    block: int  # columns of a head, with those that pad it to a power of two
    parts: int
    rows_first: bool
    even: bool  # every program has all its heads
    scales_from_all: bool


# What changes with the number of tokens is not specialised on: a server would meet a new specialisation, and half a second
# of compilation, in the middle of a request.
@triton.jit(do_not_specialize=["rows", "padded_rows", "scale_group_stride"])
def _group_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    heads,
    padded_rows,
    x_row_stride,
    x_head_stride,
    z_row_stride,
    z_head_stride,
    scale_row_stride,
    scale_group_stride,
    epsilon,
    eps,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
    QUANT: tl.constexpr,
    PDL: tl.constexpr,
):
    first_row = tl.program_id(0 if TILE.rows_first else 1) * TILE.rows
    first_head = tl.program_id(1 if TILE.rows_first else 0) * TILE.heads
    # [TILE.parts, rows, heads, columns of a part]; offsets in the tile have 32 bits, that of the tile 64
    PART: tl.constexpr = TILE.block // TILE.parts
    in_rows, in_heads = tl.arange(0, TILE.rows), tl.arange(0, TILE.heads)[None, None, :, None]
    row, in_rows = first_row + in_rows, in_rows[None, :, None, None]
    column = tl.arange(0, TILE.parts)[:, None, None, None] * PART + tl.arange(0, PART)[None, None, None, :]
    # Rows beyond the last are the last once more, down to the bytes they store: a mask costs two instructions a row.
    in_rows = tl.minimum(in_rows, rows - 1 - first_row)
    row64, head64 = first_row.to(tl.int64), first_head.to(tl.int64)
    x_ptrs = x_ptr + row64 * x_row_stride + head64 * x_head_stride
    x_ptrs += in_rows * x_row_stride + (in_heads * x_head_stride + column)
    z_ptrs = z_ptr + row64 * z_row_stride + head64 * z_head_stride
    z_ptrs += in_rows * z_row_stride + (in_heads * z_head_stride + column)
    # One row of the tile, and not one head: Triton would spread that one's layout to all that meets it.
    weight_ptrs = weight_ptr + tl.broadcast_to(column, (TILE.parts, 1, TILE.heads, PART))
    wait_for_producer(PDL)
    if NORM.head_dim == TILE.block and TILE.even:
        x, z, weight = tl.load(x_ptrs), tl.load(z_ptrs), tl.load(weight_ptrs)
    else:
        mask = (first_head + in_heads < heads) & (column < NORM.head_dim)
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        z = tl.load(z_ptrs, mask=mask, other=0.0)
        weight = tl.load(weight_ptrs, mask=column < NORM.head_dim, other=0.0)

    gates = gate(numerics.widen(z), NORM.sigmoid, NORM.gate_first)
    y = numerics.widen(x)
    if NORM.gate_first:
        y = y * gates
    mean = sum_of_squares(y, TILE.parts)[None, :, :, None] / NORM.head_dim
    y = y * rsqrt(mean + epsilon) * numerics.widen(weight)
    if not NORM.gate_first:
        y = y * gates

    BLOCK_GROUPS: tl.constexpr = TILE.block // QUANT.group_size
    HEAD_GROUPS: tl.constexpr = NORM.head_dim // QUANT.group_size
    GROUPS: tl.constexpr = TILE.heads * BLOCK_GROUPS
    # The parts of a thread side by side: where in a group a number is does not matter to the quantiser.
    y = tl.reshape(tl.permute(y, (1, 2, 0, 3)), (TILE.rows, GROUPS, QUANT.group_size))
    if (
        numerics.HAS_PTX
        and x.dtype == tl.bfloat16
        and (QUANT.rounding == "custom_op" or QUANT.rounding == "reciprocal")
    ):
        scale, codes = quant.group_of_bf16(y, eps, QUANT.rounding, QUANT.ue8m0)
    else:
        if not NORM.keep_fp32:
            y = numerics.rounded(y, x.dtype)
        scale, codes = quant.group(y, eps, QUANT)
    codes = tl.permute(tl.reshape(codes, (TILE.rows, TILE.heads, TILE.parts, PART)), (2, 0, 1, 3))
    codes_ptrs = codes_ptr + row64 * (heads * NORM.head_dim) + head64 * NORM.head_dim
    codes_ptrs += in_rows * (heads * NORM.head_dim) + (in_heads * NORM.head_dim + column)
    # See `Tile`: 16 codes would be one store, and Triton would then give 16 elements to a thread everywhere.
    codes_ptrs = tl.max_contiguous(codes_ptrs, (1, 1, 1, 8))
    if NORM.head_dim == TILE.block and TILE.even:
        tl.store(codes_ptrs, codes)
    else:
        tl.store(codes_ptrs, codes, mask=mask)

    in_tile = tl.arange(0, TILE.heads * BLOCK_GROUPS)
    group_head, in_head = first_head + in_tile // BLOCK_GROUPS, in_tile % BLOCK_GROUPS
    group_mask = (group_head < heads) & (in_head < HEAD_GROUPS)
    group = (group_head * HEAD_GROUPS + in_head).to(tl.int64)
    scale_columns = quant.scale_columns(scales_ptr, group, scale_group_stride, QUANT)
    quant.store_scales(scale_columns, scale, row, rows, group_mask, scale_row_stride, TILE.scales_from_all, QUANT)
    if QUANT.padded and ((padded_rows > rows) & (first_row + TILE.rows >= rows)):
        quant.zero_scale_padding(scale_columns, rows, padded_rows, group_mask, scale_row_stride, QUANT)


# From so many elements on memory is busy throughout.
LARGE = 2**23
# What a warp has of a row: a 16-byte load of 8 elements a thread.
WARP = 256
MAX_WARPS = 32


class Tile(NamedTuple):
    """Rows and heads of a program. A part of a tile's row is one load a thread; parts and rows come one after the other.

    So a thread has 8 neighbouring elements of a head in every tile, and a head's sum of squares is made in one order: 8 by
    8, then by halves, across the thread's parts first and then across the threads. It is also the order of Inductor's kernel
    (see ops/gated_rms_norm_quant.py). With 2 parts a thread has 16 elements of a head, and one step less across threads.
    """

    rows: int
    heads: int
    parts: int = 1  # more than one only where a head is one group and squares are exact
    rows_first: bool = False  # neighbouring programs have neighbouring rows, not heads
    scales_from_all: bool = True  # see quant.store_scales


def head_tile(rows: int, heads: int, head_dim: int) -> Tile:
    """Tile for `rows` rows of `heads` heads, tuned on an H200 with heads of 128 (--tune in its benchmark)."""
    block = next_power_of_2(head_dim)
    least = max(WARP // block, 1)
    most = max(min(next_power_of_2(heads), MAX_WARPS * WARP // block), least)
    elements = rows * heads * head_dim
    if elements < 2**19:
        return Tile(1, least)
    if elements < LARGE:
        return Tile(1, min(4 * least, most), rows_first=rows > MAX_GRID_1)
    fitting = min(2 * least, most)
    parts = 2 if fitting * block >= 2 * WARP else 1
    large = elements >= 2**25
    return Tile(2 if large else 1, fitting, parts, rows_first=large or rows > MAX_GRID_1, scales_from_all=False)


def _strides(x: torch.Tensor, heads: int) -> tuple[int, int]:
    """Strides of rows and heads, x being [rows * heads, D] or [rows, heads, D]."""
    return (row_stride(x), x.stride(1)) if x.dim() == 3 else (heads * row_stride(x), row_stride(x))


def gated_rms_norm_group_fp8_quant(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    epsilon: float,
    num_heads: int,
    norm_before_gate: bool,
    activation: str,
    group_size: int,
    use_ue8m0: bool,
    norm_rounding: str,
    quant_rounding: str,
    tile: Tile | None = None,
    pdl: bool | None = None,
    fp8: str = OCP,
) -> None:
    """Write codes [N, num_heads * D] and scales [N, num_heads * D / group_size]; arguments as the op checked them."""
    rows, head_dim = codes.shape[0], x.shape[-1]
    if rows == 0:
        return
    block = next_power_of_2(head_dim)
    tile = tile or choose(head_tile, rows, num_heads, head_dim)
    # the compiler contracts sums of inexact squares, those of gated numbers, in one way with parts and in another without
    parts = tile.parts if group_size == block and norm_before_gate else 1
    grid, rows_first = tile_grid(cdiv(rows, tile.rows), cdiv(num_heads, tile.heads), tile.rows_first)
    launch(
        _group_kernel,
        grid,
        x.device,
        x,
        z,
        weight,
        codes,
        scales,
        rows,
        num_heads,
        rows_with_padding(scales, rows),
        *_strides(x, num_heads),
        *_strides(z, num_heads),
        scales.stride(0),
        scales.stride(1),
        epsilon,
        quant.EPS,
        NORM=GatedConstants(
            head_dim,
            gate_first=not norm_before_gate,
            sigmoid=activation == "sigmoid",
            keep_fp32=norm_rounding == "native" and is_native(quant_rounding),
        ),
        TILE=HeadTileConstants(
            tile.rows, tile.heads, block, parts, rows_first, num_heads % tile.heads == 0, tile.scales_from_all
        ),
        QUANT=quant.group_constants(scales, group_size, use_ue8m0, quant_rounding, fp8=fp8),
        num_warps=max(min(tile.heads * block // (WARP * parts), MAX_WARPS), 1),
        enable_fp_fusion=True,  # squares are added by fma, as in Inductor's kernels; Triton's default will not last
        **pdl_options(x.device, pdl),
    )
