# SPDX-License-Identifier: Apache-2.0
"""SiLU·mul + FP8 quantiser: one pass over the input, one program a tile of whole groups, or a row if that has one scale."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import numerics, nvfp4, quant
from .backend import HIDDEN_ALIGNMENT
from .fp8 import FORMATS, OCP
from .launch import choose, launch, row_stride, rows_with_padding
from .pdl import pdl_options, wait_for_producer
from .rounding import is_native
from .tiles import GroupTile as Tile
from .tiles import cdiv, next_power_of_2


class ActConstants(NamedTuple):
    """What a kernel is compiled for, of SiLU·mul; ACT in kernels."""

    round_silu: bool  # silu(gate) is rounded, and then the product
    add_zero: bool  # to up
    exact: bool  # IEEE division in silu, where its rounding to fp16 would show another
    keep_fp32: bool  # the product is not rounded


@triton.jit
def _silu_mul(gate, up, ACT: tl.constexpr):
    """silu(gate) * up in fp32, after the roundings that are asked for."""
    dtype = gate.dtype
    silu = numerics.silu(numerics.widen(gate), ACT.exact)
    if ACT.round_silu:
        silu = numerics.rounded(silu, dtype)
    up = numerics.widen(up)
    if ACT.add_zero:
        up = up + 0.0  # -0 becomes +0; compilers keep this addition
    y = silu * up
    if not ACT.keep_fp32:
        y = numerics.rounded(y, dtype)
    return y


# What changes with the number of tokens is not specialised on: a server would meet a new specialisation, and half a second
# of compilation, in the middle of a request.
@triton.jit(do_not_specialize=["rows", "padded_rows", "scale_group_stride"])
def _group_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    act_ptr,
    rows,
    width,
    padded_rows,
    x_stride,
    scale_row_stride,
    scale_group_stride,
    eps,
    ACT: tl.constexpr,
    TILE: tl.constexpr,
    QUANT: tl.constexpr,
    PDL: tl.constexpr,
):
    first_row = tl.program_id(0 if TILE.rows_first else 1) * TILE.rows
    row = first_row + tl.arange(0, TILE.rows)
    group = tl.program_id(1 if TILE.rows_first else 0) * TILE.groups + tl.arange(0, TILE.groups)
    column = group[:, None] * QUANT.group_size + tl.arange(0, QUANT.group_size)[None, :]
    row64 = row.to(tl.int64)
    x_ptrs = x_ptr + row64[:, None, None] * x_stride + column[None, :, :]
    wait_for_producer(PDL)
    mask = (row < rows)[:, None, None]
    if not TILE.even:
        mask = mask & (column < width)[None, :, :]
    gate = tl.load(x_ptrs, mask=mask, other=0.0)
    up = tl.load(x_ptrs + width, mask=mask, other=0.0)

    y = _silu_mul(gate, up, ACT)
    scale, codes = quant.group(y, eps, QUANT)
    offset = row64[:, None, None] * width + column[None, :, :]
    tl.store(codes_ptr + offset, codes, mask=mask)
    if act_ptr is not None:
        tl.store(act_ptr + offset, y.to(act_ptr.dtype.element_ty), mask=mask)
    group_mask = group * QUANT.group_size < width
    scale_columns = quant.scale_columns(scales_ptr, group, scale_group_stride, QUANT)
    quant.store_scales(scale_columns, scale, row, rows, group_mask, scale_row_stride, TILE.scales_from_all, QUANT)
    if QUANT.padded and ((padded_rows > rows) & (first_row + TILE.rows >= rows)):
        quant.zero_scale_padding(scale_columns, rows, padded_rows, group_mask, scale_row_stride, QUANT)


@triton.jit
def _static_kernel(
    x_ptr,
    scale_ptr,
    codes_ptr,
    width,
    x_stride,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    ACT: tl.constexpr,
    NATIVE: tl.constexpr,
    MAX: tl.constexpr,
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
    code = quant.static_codes(_silu_mul(gate, up, ACT), inverse, NATIVE, MAX)
    if EVEN:
        tl.store(codes_ptr + row * width + column, code)
    else:
        tl.store(codes_ptr + row * width + column, code, mask=column < width)


@triton.jit(do_not_specialize_on_alignment=HIDDEN_ALIGNMENT)
def _token_kernel(
    x_ptr,
    bound_ptr,
    codes_ptr,
    scales_ptr,
    act_ptr,
    x_stride,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROUNDING: tl.constexpr,
    MAX: tl.constexpr,
    ACT: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wait_for_producer(PDL)
    # All of the row is asked for before anything waits for it.
    gates, ups = (), ()
    for first in tl.static_range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        x_ptrs = x_ptr + (row * x_stride + column)
        if first + CHUNK <= WIDTH:
            gate = tl.load(x_ptrs)
            up = tl.load(x_ptrs + WIDTH)
        else:
            gate = tl.load(x_ptrs, mask=column < WIDTH, other=0.0)
            up = tl.load(x_ptrs + WIDTH, mask=column < WIDTH, other=0.0)
        gates = gates + (gate,)  # type: ignore[assignment]  # noqa: RUF005  Triton has no unpacking
        ups = ups + (up,)  # type: ignore[assignment]  # noqa: RUF005
    products = ()
    top = tl.zeros([1, CHUNK], tl.float32)
    for first in tl.static_range(0, WIDTH, CHUNK):
        y = _silu_mul(gates[first // CHUNK], ups[first // CHUNK], ACT)
        if act_ptr is not None:
            column = first + tl.arange(0, CHUNK)[None, :]
            tl.store(act_ptr + (row * WIDTH + column), y.to(act_ptr.dtype.element_ty), mask=column < WIDTH)
        top = quant.running_max(top, tl.abs(y), ROUNDING)
        products = products + (y,)  # type: ignore[assignment]  # noqa: RUF005
    scale = quant.token_scale(top, bound_ptr, ROUNDING, MAX)
    tl.store(scales_ptr + row + tl.arange(0, 1), scale)
    for first in tl.static_range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        code = quant.token_codes(products[first // CHUNK], scale[:, None], bound_ptr is not None, ROUNDING, MAX)
        codes_ptrs = tl.multiple_of(codes_ptr + (row * WIDTH + column), (1, ALIGNED))
        if first + CHUNK <= WIDTH:
            tl.store(codes_ptrs, code)
        else:
            tl.store(codes_ptrs, code, mask=column < WIDTH)


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


class RowTile(NamedTuple):
    """How a program has a row: all of it in registers, `chunk` columns, a power of two, at a time."""

    chunk: int
    num_warps: int


# From so many elements on, more rows than the GPU works on at once.
MANY_ELEMENTS = 2**22


def row_tile(rows: int, width: int) -> RowTile:
    """Tile for `rows` rows of `width`. Not tuned yet: benchmarks/bench_silu_mul_quant.py --tune.

    A thread has 8 columns of each chunk, the most that it loads at once. While every row has a place on the GPU, the time is
    that of one row, and many threads share it. Beyond, fewer threads with up to 56 columns each leave room for a second row,
    which is loaded while the first waits for its maximum.
    """
    columns = 16 if rows * width < MANY_ELEMENTS else 56
    num_warps = min(32, next_power_of_2(cdiv(width, 32 * columns)))
    return RowTile(min(256 * num_warps, next_power_of_2(max(width, 2))), num_warps)


def static_block(rows: int, width: int) -> int:
    """Columns of a program of the static quantiser's kernel: with two warps 8 a thread, or 32 once there is enough to do."""
    return 2048 if width % 2048 == 0 and rows * width >= MANY_ELEMENTS else 512


def _act_constants(x: torch.Tensor, act_rounding: str, quant_rounding: str) -> ActConstants:
    round_silu = act_rounding != "native"
    return ActConstants(
        round_silu,
        add_zero=act_rounding == "custom_op",
        exact=round_silu and x.dtype == torch.float16,
        keep_fp32=not round_silu and is_native(quant_rounding),
    )


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
    act: torch.Tensor | None = None,
    fp8: str = OCP,
) -> None:
    """Write codes [M, K], scales [M, K / group_size] and, if given, act [M, K] of x [M, 2 * K]; arguments as the op checked
    them."""
    rows, width = codes.shape
    if rows == 0:
        return
    groups = width // group_size
    tile = tile or choose(group_tile, rows, groups, group_size)
    grid, constants = tile.grid(rows, groups)
    launch(
        _group_kernel,
        grid,
        x.device,
        x,
        codes,
        scales,
        act,
        rows,
        width,
        rows_with_padding(scales, rows),
        row_stride(x),
        scales.stride(0),
        scales.stride(1),
        quant.EPS,
        ACT=_act_constants(x, act_rounding, quant_rounding),
        TILE=constants,
        QUANT=quant.group_constants(scales, group_size, use_ue8m0, quant_rounding, fp8=fp8),
        num_warps=tile.num_warps,
        **pdl_options(x.device, pdl),
    )


def silu_mul_token_fp8_quant(
    x: torch.Tensor,
    scale_ub: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    act_rounding: str,
    quant_rounding: str,
    tile: RowTile | None = None,
    pdl: bool | None = None,
    act: torch.Tensor | None = None,
    fp8: str = OCP,
) -> None:
    """Write codes [M, K], scales [M, 1] and, if given, act [M, K] of x [M, 2 * K]; arguments as the op checked them."""
    rows, width = codes.shape
    if rows == 0:
        return
    tile = tile or choose(row_tile, rows, width)
    launch(
        _token_kernel,
        (rows,),
        x.device,
        x,
        scale_ub,
        codes,
        scales,
        act,
        row_stride(x),
        WIDTH=width,
        CHUNK=tile.chunk,
        ALIGNED=math.gcd(width, 8),
        ROUNDING=quant_rounding,
        MAX=FORMATS[fp8].max,
        ACT=_act_constants(x, act_rounding, quant_rounding),
        num_warps=tile.num_warps,
        **pdl_options(x.device, pdl),
    )


def silu_mul_static_fp8_quant(
    x: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, act_rounding: str, quant_rounding: str, fp8: str = OCP
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
        MAX=FORMATS[fp8].max,
        ACT=_act_constants(x, act_rounding, quant_rounding),
        num_warps=2,
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
    ACT: tl.constexpr,
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

    y = _silu_mul(gate, up, ACT)
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
        ACT=_act_constants(x, act_rounding, "custom_op"),
        num_warps=tile.num_warps,
        **pdl_options(x.device, None),
    )
