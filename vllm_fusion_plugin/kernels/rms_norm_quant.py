# SPDX-License-Identifier: Apache-2.0
"""RMSNorm, maybe with a residual added first, + FP8 quantiser: one pass over the input, a row in registers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import numerics, quant
from .forms import is_native
from .launch import choose, launch, row_stride, rows_with_padding
from .pdl import pdl_options, prefetch, wait_for_producer
from .tiles import cdiv, next_power_of_2

# Up to here Inductor keeps a row in one warp and adds up its squares with fma; see row_tile.
WARP_WIDTH = tl.constexpr(1024)


@triton.jit
def prefetch_weight(weight_ptr, WIDTH: tl.constexpr, PREFETCH: tl.constexpr, WARPS: tl.constexpr):
    """Bring a weight into L2 while the kernel before still runs. It was last read a whole step ago and comes from memory; x
    comes from the L2 that its producer has just written."""
    if PREFETCH and weight_ptr is not None and tl.program_id(0) == 0:
        prefetch(weight_ptr, WIDTH * weight_ptr.dtype.element_ty.primitive_bitwidth // 8, WARPS)


@triton.jit
def row_sums(squares, SUM_WARPS: tl.constexpr, FOLD: tl.constexpr):
    """Sums [rows] of squares [rows, columns], in the order of SUM_WARPS warps with 8 columns a thread, run by one in FOLD.

    That is Inductor's order: a thread's columns one after the other, then by halves a warp's 32 threads, then the warps. A
    warp here holds what FOLD (1, 2 or 4) of Inductor's do; with few rows fewer warps are faster (H200, 16 rows of 4096:
    1.78 us with 4 and 2.07 with 16), and with many, if there is no residual. SUM_WARPS 0: as it comes.
    """
    if SUM_WARPS > 0:
        ROWS: tl.constexpr = squares.shape[0]
        TURNS: tl.constexpr = squares.shape[1] // (SUM_WARPS * 256)
        parts = tl.reshape(squares, (ROWS, TURNS, SUM_WARPS, 32, 8))
        parts = tl.reshape(tl.permute(parts, (0, 2, 3, 1, 4)), (ROWS, SUM_WARPS, 32, TURNS * 8))
        sums = tl.sum(tl.sum(parts, axis=3), axis=2)
        if FOLD >= 2:
            sums = tl.sum(tl.reshape(sums, (ROWS, 2, SUM_WARPS // 2)), axis=1)
        if FOLD >= 4:
            sums = tl.sum(tl.reshape(sums, (ROWS, 2, SUM_WARPS // 4)), axis=1)
        total = tl.sum(sums, axis=1)
    else:
        total = tl.sum(squares, axis=1)
    return total


@triton.jit
def inverse_rms(total, epsilon, WIDTH: tl.constexpr, CUSTOM_OP: tl.constexpr):
    """1 / sqrt(total / WIDTH + epsilon)."""
    if CUSTOM_OP:
        mean = tl.div_rn(total, WIDTH * 1.0)
    else:
        mean = total / WIDTH  # div.full.f32, as in Inductor's kernel
    return tl.rsqrt(mean + epsilon)


@triton.jit
def chunk_columns(row, rows, FIRST: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """The columns [1, CHUNK] from FIRST on, and the mask [rows, CHUNK] of what is there."""
    column = FIRST + tl.arange(0, CHUNK)[None, :]
    mask = (row < rows)[:, None]
    if FIRST + CHUNK > WIDTH:
        mask = mask & (column < WIDTH)
    return column, mask


@triton.jit
def load_rows(
    x_ptr,
    residual_ptr,
    residual_out_ptr,
    row,
    rows,
    x_stride,
    residual_stride,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROUND_SUM: tl.constexpr,
    SUM_WARPS: tl.constexpr = 0,
    FOLD: tl.constexpr = 1,
    x_addend_ptr=None,
    residual_addend_ptr=None,
    x_addend_stride=0,
    residual_addend_stride=0,
    X_ADDEND_SCALE: tl.constexpr = 1.0,
):
    """s = x + residual of each chunk of the rows, and the sum of s squared [rows]; s is stored too, if it is asked for."""
    row64 = row.to(tl.int64)[:, None]
    # Everything is asked for before anything is stored: no load may pass a store, whose memory it might read, and a row in
    # nine chunks would go to memory nine times, one after the other.
    xs, addends, residuals, residual_addends = (), (), (), ()
    for first in tl.static_range(0, WIDTH, CHUNK):
        column, mask = chunk_columns(row, rows, first, CHUNK, WIDTH)
        x = tl.load(x_ptr + row64 * x_stride + column, mask=mask, other=0.0)
        xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005  Triton has no unpacking
        if x_addend_ptr is not None:
            x = tl.load(x_addend_ptr + row64 * x_addend_stride + column, mask=mask, other=0.0)
            addends = addends + (x,)  # type: ignore[assignment]  # noqa: RUF005
        if residual_ptr is not None:
            x = tl.load(residual_ptr + row64 * residual_stride + column, mask=mask, other=0.0)
            residuals = residuals + (x,)  # type: ignore[assignment]  # noqa: RUF005
        if residual_addend_ptr is not None:
            x = tl.load(residual_addend_ptr + row64 * residual_addend_stride + column, mask=mask, other=0.0)
            residual_addends = residual_addends + (x,)  # type: ignore[assignment]  # noqa: RUF005
    chunks = ()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros([row.shape[0], CHUNK], tl.float32)
    for first in tl.static_range(0, WIDTH, CHUNK):
        column, mask = chunk_columns(row, rows, first, CHUNK, WIDTH)
        s = numerics.widen(xs[first // CHUNK])
        if x_addend_ptr is not None:
            addend = numerics.widen(addends[first // CHUNK])
            if X_ADDEND_SCALE == 1.0:
                s += addend
            else:
                s = tl.fma(addend, X_ADDEND_SCALE, s)  # what the compiler makes of Inductor's product and sum
        if residual_ptr is not None:
            r = numerics.widen(residuals[first // CHUNK])
            if residual_addend_ptr is not None:
                r += numerics.widen(residual_addends[first // CHUNK])
            s += r
            if residual_out_ptr is not None:
                total_ptrs = residual_out_ptr + row64 * WIDTH + column
                tl.store(total_ptrs, s.to(residual_out_ptr.dtype.element_ty), mask=mask)
            if ROUND_SUM:
                s = numerics.rounded(s, dtype)
        # As Inductor writes it, so that the compiler makes the same of it: fma where it makes one there.
        if WIDTH > WARP_WIDTH or CHUNK < WIDTH:
            total = tl.where(mask, total + s * s, total)
        else:
            total = tl.where(mask, s * s, 0.0)
        chunks = chunks + (s,)  # type: ignore[assignment]  # noqa: RUF005
    return chunks, row_sums(total, SUM_WARPS, FOLD)


@triton.jit
def load_weight(weight_ptr, column, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Weight of the columns, in its own dtype; EVEN: all of them are under WIDTH."""
    if weight_ptr is None:
        weight = tl.full(column.shape, 1.0, tl.float32)
    elif EVEN:
        weight = tl.load(weight_ptr + column)
    else:
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0)
    return weight


@triton.jit
def load_weights(weight_ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr):
    """Weight of each chunk if EARLY. With few rows, its way from memory is then the same time as x's; with many, another
    row's computation hides it, and registers count for more."""
    weights = ()
    if EARLY:
        for first in tl.static_range(0, WIDTH, CHUNK):
            column = first + tl.arange(0, CHUNK)[None, :]
            weight = load_weight(weight_ptr, column, WIDTH, first + CHUNK <= WIDTH)
            weights = weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
    return weights


@triton.jit
def times_weight(
    y, weight, dtype: tl.constexpr, GEMMA: tl.constexpr, ROUND_SCALED: tl.constexpr, KEEP_FP32: tl.constexpr
):
    """y * weight in fp32, after the roundings that the form asks for; y is s * inverse_rms."""
    if ROUND_SCALED:
        y = numerics.rounded(numerics.rounded(y, weight.dtype) * numerics.widen(weight), weight.dtype)
    elif GEMMA:
        y = y * (numerics.widen(weight) + 1.0)
    else:
        y = y * numerics.widen(weight)
    if not KEEP_FP32:
        y = numerics.rounded(y, dtype)
    return y


@triton.jit
def normed_chunk(
    chunks,
    weights,
    inverse,
    weight_ptr,
    column,
    dtype: tl.constexpr,
    FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    GEMMA: tl.constexpr,
    ROUND_SCALED: tl.constexpr,
    KEEP_FP32: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y [rows, CHUNK] of the chunk from FIRST on, whose weight has been loaded if EARLY."""
    if EARLY:
        weight = weights[FIRST // CHUNK]
    else:
        weight = load_weight(weight_ptr, column, WIDTH, FIRST + CHUNK <= WIDTH)
    y = chunks[FIRST // CHUNK] * inverse[:, None]
    return times_weight(y, weight, dtype, GEMMA, ROUND_SCALED, KEEP_FP32)


@triton.jit
def norm_and_quantise_groups(
    x_ptr,
    residual_ptr,
    weight_ptr,
    codes_ptr,
    scales_ptr,
    normed_ptr,
    residual_out_ptr,
    first_row,
    rows,
    padded_rows,
    x_stride,
    residual_stride,
    scale_row_stride,
    scale_group_stride,
    epsilon,
    eps,
    WIDTH: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_WARPS: tl.constexpr,
    FOLD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    UE8M0: tl.constexpr,
    GEMMA: tl.constexpr,
    CUSTOM_OP: tl.constexpr,
    ROUND_SCALED: tl.constexpr,
    KEEP_FP32: tl.constexpr,
    FORM: tl.constexpr,
    EARLY: tl.constexpr,
    x_addend_ptr=None,
    residual_addend_ptr=None,
    x_addend_stride=0,
    residual_addend_stride=0,
    X_ADDEND_SCALE: tl.constexpr = 1.0,
):
    row = first_row + tl.arange(0, TILE_ROWS)
    weights = load_weights(weight_ptr, WIDTH, CHUNK, EARLY)
    chunks, total = load_rows(
        x_ptr, residual_ptr, residual_out_ptr, row, rows, x_stride, residual_stride, WIDTH, CHUNK, CUSTOM_OP,
        SUM_WARPS, FOLD,
        x_addend_ptr, residual_addend_ptr, x_addend_stride, residual_addend_stride, X_ADDEND_SCALE,
    )  # fmt: skip
    inverse = inverse_rms(total, epsilon, WIDTH, CUSTOM_OP)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    GROUPS: tl.constexpr = CHUNK // GROUP_SIZE
    for first in tl.static_range(0, WIDTH, CHUNK):
        column, mask = chunk_columns(row, rows, first, CHUNK, WIDTH)
        offset = row.to(tl.int64)[:, None] * WIDTH + column
        y = normed_chunk(
            chunks, weights, inverse, weight_ptr, column, dtype, first, CHUNK, WIDTH, GEMMA, ROUND_SCALED, KEEP_FP32, EARLY
        )  # fmt: skip
        if normed_ptr is not None:
            tl.store(normed_ptr + offset, y.to(dtype), mask=mask)
        y = tl.reshape(y, (TILE_ROWS, GROUPS, GROUP_SIZE))
        scale = quant.group_scale(y, eps, FORM, UE8M0)
        codes = tl.reshape(quant.group_codes(y, scale, FORM, UE8M0), (TILE_ROWS, CHUNK))
        tl.store(tl.multiple_of(codes_ptr + offset, (1, ALIGNED)), codes, mask=mask)
        group = first // GROUP_SIZE + tl.arange(0, GROUPS)
        group_mask = group * GROUP_SIZE < WIDTH
        scale_columns = scales_ptr + group.to(tl.int64)[None, :] * scale_group_stride
        quant.store_scales(scale_columns, scale, row, rows, group_mask, scale_row_stride, EARLY or FOLD == 1)
        if PADDED and ((padded_rows > rows) & (first_row + TILE_ROWS >= rows)):
            quant.zero_scale_padding(scale_columns, rows, padded_rows, group_mask, scale_row_stride)


# What changes with the number of tokens is not specialised on: a server would meet a new specialisation, and half a second
# of compilation, in the middle of a request.
#
# codes_ptr is taken for unaligned and its use for aligned to 8: otherwise Triton would store 16 codes a thread, and for that
# load x in twos of 16 bytes with a gap between the threads.
@triton.jit(
    do_not_specialize=["rows", "padded_rows", "scale_group_stride"], do_not_specialize_on_alignment=["codes_ptr"]
)
def _group_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    codes_ptr,
    scales_ptr,
    normed_ptr,
    residual_out_ptr,
    rows,
    padded_rows,
    x_stride,
    residual_stride,
    scale_row_stride,
    scale_group_stride,
    epsilon,
    eps,
    WIDTH: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_WARPS: tl.constexpr,
    FOLD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    UE8M0: tl.constexpr,
    GEMMA: tl.constexpr,
    CUSTOM_OP: tl.constexpr,
    ROUND_SCALED: tl.constexpr,
    KEEP_FP32: tl.constexpr,
    FORM: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    WARPS: tl.constexpr,
    x_addend_ptr=None,
    residual_addend_ptr=None,
    x_addend_stride=0,
    residual_addend_stride=0,
    X_ADDEND_SCALE: tl.constexpr = 1.0,
):
    first_row = tl.program_id(0) * TILE_ROWS
    prefetch_weight(weight_ptr, WIDTH, PREFETCH, WARPS)
    wait_for_producer(PDL)
    norm_and_quantise_groups(
        x_ptr, residual_ptr, weight_ptr, codes_ptr, scales_ptr, normed_ptr, residual_out_ptr, first_row, rows,
        padded_rows, x_stride, residual_stride, scale_row_stride, scale_group_stride, epsilon, eps, WIDTH, GROUP_SIZE,
        TILE_ROWS, CHUNK, SUM_WARPS, FOLD, ALIGNED, PADDED, UE8M0, GEMMA, CUSTOM_OP, ROUND_SCALED, KEEP_FP32, FORM, EARLY,
        x_addend_ptr, residual_addend_ptr, x_addend_stride, residual_addend_stride, X_ADDEND_SCALE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["codes_ptr"])
def _token_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bound_ptr,
    codes_ptr,
    scales_ptr,
    normed_ptr,
    residual_out_ptr,
    rows,
    x_stride,
    residual_stride,
    epsilon,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_WARPS: tl.constexpr,
    FOLD: tl.constexpr,
    ALIGNED: tl.constexpr,
    GEMMA: tl.constexpr,
    CUSTOM_OP: tl.constexpr,
    ROUND_SCALED: tl.constexpr,
    KEEP_FP32: tl.constexpr,
    NATIVE: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    WARPS: tl.constexpr,
    x_addend_ptr=None,
    residual_addend_ptr=None,
    x_addend_stride=0,
    residual_addend_stride=0,
    X_ADDEND_SCALE: tl.constexpr = 1.0,
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    prefetch_weight(weight_ptr, WIDTH, PREFETCH, WARPS)
    wait_for_producer(PDL)
    weights = load_weights(weight_ptr, WIDTH, CHUNK, EARLY)
    chunks, total = load_rows(
        x_ptr, residual_ptr, residual_out_ptr, row, rows, x_stride, residual_stride, WIDTH, CHUNK, CUSTOM_OP,
        SUM_WARPS, FOLD,
        x_addend_ptr, residual_addend_ptr, x_addend_stride, residual_addend_stride, X_ADDEND_SCALE,
    )  # fmt: skip
    inverse = inverse_rms(total, epsilon, WIDTH, CUSTOM_OP)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    normed = ()
    top = tl.zeros([TILE_ROWS, CHUNK], tl.float32)
    for first in tl.static_range(0, WIDTH, CHUNK):
        column, mask = chunk_columns(row, rows, first, CHUNK, WIDTH)
        y = normed_chunk(
            chunks, weights, inverse, weight_ptr, column, dtype, first, CHUNK, WIDTH, GEMMA, ROUND_SCALED, KEEP_FP32, EARLY
        )  # fmt: skip
        if normed_ptr is not None:
            tl.store(normed_ptr + row.to(tl.int64)[:, None] * WIDTH + column, y.to(dtype), mask=mask)
        top = quant.running_max(top, tl.abs(y), NATIVE)  # beyond WIDTH y is 0, or NaN as in all of the row
        normed = normed + (y,)  # type: ignore[assignment]  # noqa: RUF005
    scale = quant.token_scale(top, bound_ptr, NATIVE)
    tl.store(scales_ptr + row, scale, mask=row < rows)
    for first in tl.static_range(0, WIDTH, CHUNK):
        column, mask = chunk_columns(row, rows, first, CHUNK, WIDTH)
        codes = quant.token_codes(normed[first // CHUNK], scale[:, None], bound_ptr is not None, NATIVE)
        offset = row.to(tl.int64)[:, None] * WIDTH + column
        tl.store(tl.multiple_of(codes_ptr + offset, (1, ALIGNED)), codes, mask=mask)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["codes_ptr"])
def _static_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    scale_ptr,
    codes_ptr,
    normed_ptr,
    residual_out_ptr,
    rows,
    x_stride,
    residual_stride,
    epsilon,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_WARPS: tl.constexpr,
    FOLD: tl.constexpr,
    ALIGNED: tl.constexpr,
    GEMMA: tl.constexpr,
    CUSTOM_OP: tl.constexpr,
    ROUND_SCALED: tl.constexpr,
    KEEP_FP32: tl.constexpr,
    NATIVE: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    WARPS: tl.constexpr,
    x_addend_ptr=None,
    residual_addend_ptr=None,
    x_addend_stride=0,
    residual_addend_stride=0,
    X_ADDEND_SCALE: tl.constexpr = 1.0,
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    prefetch_weight(weight_ptr, WIDTH, PREFETCH, WARPS)
    wait_for_producer(PDL)
    scale_inverse = quant.static_inverse(tl.load(scale_ptr), NATIVE)
    weights = load_weights(weight_ptr, WIDTH, CHUNK, EARLY)
    chunks, total = load_rows(
        x_ptr, residual_ptr, residual_out_ptr, row, rows, x_stride, residual_stride, WIDTH, CHUNK, CUSTOM_OP,
        SUM_WARPS, FOLD,
        x_addend_ptr, residual_addend_ptr, x_addend_stride, residual_addend_stride, X_ADDEND_SCALE,
    )  # fmt: skip
    inverse = inverse_rms(total, epsilon, WIDTH, CUSTOM_OP)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    for first in tl.static_range(0, WIDTH, CHUNK):
        column, mask = chunk_columns(row, rows, first, CHUNK, WIDTH)
        offset = row.to(tl.int64)[:, None] * WIDTH + column
        y = normed_chunk(
            chunks, weights, inverse, weight_ptr, column, dtype, first, CHUNK, WIDTH, GEMMA, ROUND_SCALED, KEEP_FP32, EARLY
        )  # fmt: skip
        if normed_ptr is not None:
            tl.store(normed_ptr + offset, y.to(dtype), mask=mask)
        codes = quant.static_codes(y, scale_inverse, NATIVE)
        tl.store(tl.multiple_of(codes_ptr + offset, (1, ALIGNED)), codes, mask=mask)


# From so many elements on memory is busy throughout, whatever comes first.
LARGE = 2**23


class Tile(NamedTuple):
    rows: int
    chunk: int
    num_warps: int
    sum_warps: int = 0  # see row_sums; a multiple of num_warps, up to 4 times that
    early: bool = True  # see load_weights

    def constants(self) -> dict[str, int | bool]:
        """What kernels are told of it."""
        return {
            "TILE_ROWS": self.rows,
            "CHUNK": self.chunk,
            "SUM_WARPS": self.sum_warps,
            "FOLD": max(1, self.sum_warps // self.num_warps),
            "EARLY": self.early,
        }


def row_tile(width: int, native_quant: bool, crowded: bool = False, sum_columns: int = 0) -> Tile:
    """Tile for rows of `width`, never for a number of them: the order in which a row's squares are added, and with it the
    row's bytes, comes from chunk and num_warps. `folded` may run it with fewer.

    That order is Inductor's: 8 columns a thread, or as many as there are, chunks one onto the other, then within a thread, a
    warp, the block. Inductor has one order up to 2048 columns and before a native group quantiser. Otherwise it times two
    or three and takes the fastest, all with 16 warps (32 above 8192 columns): the whole row as one chunk, as here before
    vLLM's own quantisers; 2048 columns at a time, as here before native ones and always under Inductor's `deterministic`; or
    half a row. crowded: its kernel has 10 loads and reductions or more, and small chunks for want of registers. sum_columns:
    1024 for a crowded kernel, 2048 for one that is not and takes 2048 columns at a time, where more are the rule.
    """
    whole = max(256, next_power_of_2(width))
    if width <= WARP_WIDTH.value:
        return Tile(1, whole, 1)
    if crowded or sum_columns == 1024:
        return Tile(1, 1024, 4 if width <= 2048 else 8)
    if width <= 2048:
        return Tile(1, whole, 8)
    if native_quant or whole > 16384 or sum_columns == 2048:
        return Tile(1, 2048, 16)
    return Tile(1, whole, 16 if whole <= 8192 else 32)


def folded(tile: Tile, rows: int, add: bool, most: int = 4) -> Tile:
    """`tile` with fewer warps, up to `most` times, that add up in its order; for `rows` rows, with a residual or without.

    Tuned on an H200 (benchmarks/bench_rms_norm_quant.py --tune). Many rows with a residual keep memory busy anyhow.
    """
    warps = tile.num_warps
    if warps < 8 or tile.chunk < 256 * warps or (add and rows * tile.chunk >= LARGE):
        return tile
    few_wide = add and rows <= 16 and tile.chunk == 8192  # 2.33 µs with 8 warps, 2.38 with 4 or 16
    return Tile(tile.rows, tile.chunk, warps // min(most, 2 if warps == 8 or few_wide else 4), warps)


def tile_of(
    rows: int, width: int, native_quant: bool, crowded: bool, sum_columns: int, add: bool, most_fold: int
) -> Tile:
    """Tile for `rows` rows of `width`: `row_tile`, `folded`, and whether weights are loaded early."""
    tile = folded(row_tile(width, native_quant, crowded, sum_columns), rows, add, most_fold)
    return Tile(tile.rows, tile.chunk, tile.num_warps, tile.sum_warps, early=rows * width < LARGE)


def aligned(width: int, native_quant: bool) -> int:
    """Codes that a thread stores at once, hence columns it has side by side, if the quantiser is by token or static.

    Inductor makes one kernel of a narrow row and such a quantiser if that is native, with stores of 16 codes."""
    return math.gcd(width, 16 if native_quant and width <= WARP_WIDTH.value else 8)


def forms(
    x: torch.Tensor, weight: torch.Tensor | None, gemma: bool, norm_form: str, quant_form: str
) -> dict[str, bool]:
    return {
        "GEMMA": gemma,
        "CUSTOM_OP": norm_form == "custom_op",
        "ROUND_SCALED": norm_form == "eager" and weight is not None and weight.dtype.itemsize == 2 and not gemma,
        "KEEP_FP32": norm_form == "native" and is_native(quant_form),
    }


def start(
    x: torch.Tensor, weights: list[torch.Tensor | None], num_warps: int, pdl: bool | None
) -> dict[str, bool | int]:
    """How a kernel of num_warps warps on x begins."""
    given = pdl_options(x.device, pdl)
    known = [w for w in weights if w is not None]
    whole = all(w.data_ptr() % 16 == 0 and w.numel() * w.element_size() % (16 * num_warps) == 0 for w in known)
    return {
        "PREFETCH": given["PDL"] and whole,
        "WARPS": num_warps,
        "num_warps": num_warps,
        **given,
    }


def _launch(
    kernel: Any,
    quantiser: dict[str, Any],
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    codes: torch.Tensor,
    epsilon: float,
    gemma_weight: bool,
    norm_form: str,
    quant_form: str,
    normed: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    x_addend: torch.Tensor | None = None,
    x_addend_scale: float = 1.0,
    residual_addend: torch.Tensor | None = None,
    sum_columns: int = 0,
    tile: Tile | None = None,
    pdl: bool | None = None,
) -> None:
    """Run `kernel`. quantiser: the arguments that it alone has; `normed` and on: the `more` of the functions below."""
    rows, width = x.shape
    if rows == 0:
        return
    native, add = is_native(quant_form), residual is not None
    addends = x_addend is not None and residual_addend is not None
    if kernel is _token_kernel:
        crowded, most = add and (native or (addends and not sum_columns)), 2  # two: it has a row in registers twice
    else:
        crowded, most = addends and not native and not sum_columns, 4
    tile = tile or choose(tile_of, rows, width, native, crowded, sum_columns, add, most)
    launch(
        kernel,
        (cdiv(rows, tile.rows),),
        x.device,
        x_ptr=x,
        residual_ptr=residual,
        weight_ptr=weight,
        codes_ptr=codes,
        normed_ptr=normed,
        residual_out_ptr=residual_out,
        rows=rows,
        x_stride=row_stride(x),
        residual_stride=row_stride(residual),
        epsilon=epsilon,
        WIDTH=width,
        x_addend_ptr=x_addend,
        residual_addend_ptr=residual_addend,
        x_addend_stride=row_stride(x_addend),
        residual_addend_stride=row_stride(residual_addend),
        X_ADDEND_SCALE=x_addend_scale,
        **quantiser,
        **tile.constants(),
        **forms(x, weight, gemma_weight, norm_form, quant_form),
        **start(x, [weight], tile.num_warps, pdl),
    )


def rms_norm_group_fp8_quant(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    epsilon: float,
    gemma_weight: bool,
    group_size: int,
    use_ue8m0: bool,
    eps: float,
    norm_form: str,
    quant_form: str,
    **more: Any,
) -> None:
    """Write codes [M, H], scales [M, H / group_size] and, if given, normed and residual_out [M, H] of x [M, H]; arguments as
    the op checked them."""
    rows, width = x.shape
    quantiser = {
        "scales_ptr": scales,
        "padded_rows": rows_with_padding(scales, rows),
        "scale_row_stride": scales.stride(0),
        "scale_group_stride": scales.stride(1),
        "eps": eps,
        "GROUP_SIZE": group_size,
        "ALIGNED": math.gcd(width, 8),
        "PADDED": scales.stride(0) == 1,
        "UE8M0": use_ue8m0,
        "FORM": quant_form,
    }
    norm = (x, weight, residual, codes, epsilon, gemma_weight, norm_form, quant_form)
    _launch(_group_kernel, quantiser, *norm, **more)


def rms_norm_token_fp8_quant(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale_ub: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    epsilon: float,
    gemma_weight: bool,
    norm_form: str,
    quant_form: str,
    **more: Any,
) -> None:
    """Write codes [M, H], scales [M, 1] and, if given, normed and residual_out [M, H] of x [M, H]; arguments as the op
    checked them."""
    native = is_native(quant_form)
    quantiser = {"bound_ptr": scale_ub, "scales_ptr": scales, "ALIGNED": aligned(x.shape[1], native), "NATIVE": native}
    norm = (x, weight, residual, codes, epsilon, gemma_weight, norm_form, quant_form)
    _launch(_token_kernel, quantiser, *norm, **more)


def rms_norm_static_fp8_quant(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale: torch.Tensor,
    codes: torch.Tensor,
    epsilon: float,
    gemma_weight: bool,
    norm_form: str,
    quant_form: str,
    **more: Any,
) -> None:
    """Write codes [M, H] and, if given, normed and residual_out [M, H] of x [M, H]; arguments as the op checked them."""
    native = is_native(quant_form)
    quantiser = {"scale_ptr": scale, "ALIGNED": aligned(x.shape[1], native), "NATIVE": native}
    norm = (x, weight, residual, codes, epsilon, gemma_weight, norm_form, quant_form)
    _launch(_static_kernel, quantiser, *norm, **more)
