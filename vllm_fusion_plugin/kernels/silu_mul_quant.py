# SPDX-License-Identifier: Apache-2.0
"""SiLU·mul + FP8 quantiser: one pass over the input, one program a tile of whole groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import numerics, nvfp4, quant
from .launch import choose, launch, row_stride, rows_with_padding
from .pdl import pdl_options, wait_for_producer
from .rounding import is_native
from .tiles import GroupTile as Tile
from .tiles import cdiv, next_power_of_2, tile_grid


@triton.jit
def _silu_mul(gate, up, TWICE: tl.constexpr, ADD_ZERO: tl.constexpr, EXACT: tl.constexpr, KEEP_FP32: tl.constexpr):
    """silu(gate) * up in fp32, after the roundings that are asked for."""
    dtype = gate.dtype
    silu = numerics.silu(numerics.widen(gate), EXACT)
    if TWICE:
        silu = numerics.rounded(silu, dtype)
    up = numerics.widen(up)
    if ADD_ZERO:
        up = up + 0.0  # -0 becomes +0; compilers keep this addition
    y = silu * up
    if not KEEP_FP32:
        y = numerics.rounded(y, dtype)
    return y


# What changes with the number of tokens is not specialised on: a server would meet a new specialisation, and half a second
# of compilation, in the middle of a request.
@triton.jit(do_not_specialize=["rows", "padded_rows", "scale_group_stride"])
def _group_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    width,
    padded_rows,
    x_stride,
    scale_row_stride,
    scale_group_stride,
    eps,
    GROUP_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    EVEN_GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    UE8M0: tl.constexpr,
    TWICE: tl.constexpr,
    ADD_ZERO: tl.constexpr,
    EXACT: tl.constexpr,
    KEEP_FP32: tl.constexpr,
    ROUNDING: tl.constexpr,
    SCALES_FROM_ALL: tl.constexpr,
    PDL: tl.constexpr,
):
    first_row = tl.program_id(0 if ROWS_FIRST else 1) * TILE_ROWS
    row = first_row + tl.arange(0, TILE_ROWS)
    group = tl.program_id(1 if ROWS_FIRST else 0) * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    column = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    row64 = row.to(tl.int64)
    x_ptrs = x_ptr + row64[:, None, None] * x_stride + column[None, :, :]
    wait_for_producer(PDL)
    mask = (row < rows)[:, None, None]
    if not EVEN_GROUPS:
        mask = mask & (column < width)[None, :, :]
    gate = tl.load(x_ptrs, mask=mask, other=0.0)
    up = tl.load(x_ptrs + width, mask=mask, other=0.0)

    y = _silu_mul(gate, up, TWICE, ADD_ZERO, EXACT, KEEP_FP32)
    scale = quant.group_scale(y, eps, ROUNDING, UE8M0)
    codes_ptrs = codes_ptr + row64[:, None, None] * width + column[None, :, :]
    tl.store(codes_ptrs, quant.group_codes(y, scale, ROUNDING, UE8M0), mask=mask)
    group_mask = group * GROUP_SIZE < width
    scale_columns = scales_ptr + group.to(tl.int64)[None, :] * scale_group_stride
    quant.store_scales(scale_columns, scale, row, rows, group_mask, scale_row_stride, SCALES_FROM_ALL)
    if PADDED and ((padded_rows > rows) & (first_row + TILE_ROWS >= rows)):
        quant.zero_scale_padding(scale_columns, rows, padded_rows, group_mask, scale_row_stride)


@triton.jit
def _static_kernel(
    x_ptr,
    scale_ptr,
    codes_ptr,
    width,
    x_stride,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    TWICE: tl.constexpr,
    ADD_ZERO: tl.constexpr,
    EXACT: tl.constexpr,
    KEEP_FP32: tl.constexpr,
    NATIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_ptrs = x_ptr + row * x_stride + column
    wait_for_producer(PDL)
    inverse = quant.static_inverse(tl.load(scale_ptr), NATIVE)
    if EVEN:
        gate = tl.load(x_ptrs)
        up = tl.load(x_ptrs + width)
    else:
        gate = tl.load(x_ptrs, mask=column < width, other=0.0)
        up = tl.load(x_ptrs + width, mask=column < width, other=0.0)
    code = quant.static_codes(_silu_mul(gate, up, TWICE, ADD_ZERO, EXACT, KEEP_FP32), inverse, NATIVE)
    if EVEN:
        tl.store(codes_ptr + row * width + column, code)
    else:
        tl.store(codes_ptr + row * width + column, code, mask=column < width)


def group_tile(rows: int, groups: int, group_size: int) -> Tile:
    """Tile for `rows` rows of `groups` groups, tuned on an H200 (benchmarks/bench_silu_mul_quant.py --tune).

    What counts is the number of elements: while there is too little work to fill the GPU, tiles are small and threads many;
    once there is enough, 1024 elements and 16 or 32 a thread keep the most loads in flight. More rows instead of
    groups that are not there.
    """
    per_128 = 128 // group_size
    elements = rows * groups * group_size
    if rows == 1:
        tile = Tile(1, per_128, 1)
    elif rows <= 16 or elements < 80_000:
        tile = Tile(2, (4 if elements > 150_000 else 2) * per_128, 4)
    elif elements < 440_000:
        tile = Tile(2, 4 * per_128, 8)
    elif elements < 2**22:
        tile = Tile(8, per_128, 4)
    elif elements < 2**23:
        tile = Tile(1, 4 * per_128, 1, scales_from_all=False)
    elif elements >= 2**26:
        tile = Tile(2, 4 * per_128, 1)
    elif groups % (8 * per_128) == 0:
        tile = Tile(1, 8 * per_128, 2, scales_from_all=False)
    else:
        tile = Tile(2, 4 * per_128, 2, scales_from_all=False)
    return tile.fitting(rows, groups)


def static_block(rows: int, width: int) -> int:
    """Columns of a program of the static quantiser's kernel."""
    return 2048 if width % 2048 == 0 and rows > 16 else 512


def _act_constants(x: torch.Tensor, act_rounding: str, quant_rounding: str) -> dict[str, bool]:
    twice = act_rounding != "native"
    return {
        "TWICE": twice,
        "ADD_ZERO": act_rounding == "custom_op",
        "EXACT": twice and x.dtype == torch.float16,
        "KEEP_FP32": not twice and is_native(quant_rounding),
    }


def silu_mul_group_fp8_quant(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    use_ue8m0: bool,
    act_rounding: str,
    quant_rounding: str,
    tile: Tile | None = None,
    pdl: bool | None = None,
) -> None:
    """Write codes [M, K] and scales [M, K / group_size] of x [M, 2 * K]; arguments as the op checked them."""
    rows, width = codes.shape
    if rows == 0:
        return
    groups = width // group_size
    tile = tile or choose(group_tile, rows, groups, group_size)
    grid, rows_first = tile_grid(cdiv(rows, tile.rows), cdiv(groups, tile.groups), tile.rows_first)
    launch(
        _group_kernel,
        grid,
        x.device,
        x,
        codes,
        scales,
        rows,
        width,
        rows_with_padding(scales, rows),
        row_stride(x),
        scales.stride(0),
        scales.stride(1),
        quant.EPS,
        GROUP_SIZE=group_size,
        TILE_ROWS=tile.rows,
        TILE_GROUPS=tile.groups,
        ROWS_FIRST=rows_first,
        EVEN_GROUPS=groups % tile.groups == 0,
        PADDED=scales.stride(0) == 1,
        UE8M0=use_ue8m0,
        SCALES_FROM_ALL=tile.scales_from_all,
        ROUNDING=quant_rounding,
        **_act_constants(x, act_rounding, quant_rounding),
        num_warps=tile.num_warps,
        **pdl_options(x.device, pdl),
    )


def silu_mul_static_fp8_quant(
    x: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, act_rounding: str, quant_rounding: str
) -> None:
    """Write codes [M, K] of x [M, 2 * K]; arguments as the op checked them."""
    rows, width = codes.shape
    if rows == 0:
        return
    block = choose(static_block, rows, width)
    launch(
        _static_kernel,
        (rows, cdiv(width, block)),
        x.device,
        x,
        scale,
        codes,
        width,
        row_stride(x),
        BLOCK=block,
        EVEN=width % block == 0,
        NATIVE=is_native(quant_rounding),
        **_act_constants(x, act_rounding, quant_rounding),
        num_warps=2 if block == 2048 else 1,
        **pdl_options(x.device, None),
    )


@triton.jit(do_not_specialize=["rows"])
def _nvfp4_kernel(
    x_ptr,
    global_scale_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    width,
    quads,
    x_stride,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    TWICE: tl.constexpr,
    ADD_ZERO: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    # Rows and blocks go on to the end of the scales' padding, where nothing is loaded and zeros are written.
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    block = tl.program_id(1) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    row64 = row.to(tl.int64)
    column = block[:, None] * nvfp4.BLOCK + tl.arange(0, nvfp4.BLOCK)[None, :]
    valid = (row[:, None] < rows) & (block * nvfp4.BLOCK < width)[None, :]
    x_ptrs = x_ptr + row64[:, None, None] * x_stride + column[None, :, :]
    wait_for_producer(PDL)
    gate = tl.load(x_ptrs, mask=valid[:, :, None], other=0.0)
    up = tl.load(x_ptrs + width, mask=valid[:, :, None], other=0.0)

    y = _silu_mul(gate, up, TWICE, ADD_ZERO, EXACT, False)
    scale, multiplier = nvfp4.block_scale(y, tl.load(global_scale_ptr))
    code = nvfp4.pack_codes(nvfp4.e2m1(y * multiplier[:, :, None]), TILE_ROWS, TILE_BLOCKS)

    byte = tl.program_id(1) * TILE_BLOCKS * 8 + tl.arange(0, TILE_BLOCKS * 8)
    codes_ptrs = codes_ptr + row64[:, None] * (width // 2) + byte[None, :]
    tl.store(codes_ptrs, code, mask=(row[:, None] < rows) & (byte[None, :] < width // 2))
    quad = tl.program_id(1) * (TILE_BLOCKS // 4) + tl.arange(0, TILE_BLOCKS // 4)
    tl.store(
        scales_ptr + nvfp4.scale_offset(row, quad, quads),
        nvfp4.pack_scales(scale, valid, TILE_ROWS, TILE_BLOCKS),
        mask=(quad < quads)[None, :],
    )


def silu_mul_nvfp4_quant(
    x: torch.Tensor,
    global_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    act_rounding: str,
    tile: Tile | None = None,
) -> None:
    """Write packed codes [M, K / 2] and swizzled scales of x [M, 2 * K]; arguments as the op checked them.

    tile.groups counts blocks of 16: a power of two from 4 on. tile.rows divides 128.
    """
    rows, width = codes.shape[0], 2 * codes.shape[1]
    if rows == 0:
        return
    padded_rows, quads = scales.shape
    # 1024 elements; untuned, for want of the GPUs that have FP4 GEMMs
    tile = tile or Tile(4, min(16, 4 * next_power_of_2(quads)), 2)
    act = _act_constants(x, act_rounding, "custom_op")
    launch(
        _nvfp4_kernel,
        (padded_rows // tile.rows, cdiv(4 * quads, tile.groups)),
        x.device,
        x,
        global_scale,
        codes,
        scales,
        rows,
        width,
        quads,
        row_stride(x),
        TILE_ROWS=tile.rows,
        TILE_BLOCKS=tile.groups,
        TWICE=act["TWICE"],
        ADD_ZERO=act["ADD_ZERO"],
        EXACT=act["EXACT"],
        num_warps=tile.num_warps,
        **pdl_options(x.device, None),
    )
