# SPDX-License-Identifier: Apache-2.0
"""RMSNorm of rows that are held in registers: what norm kernels share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import numerics
from .pdl import pdl_options, prefetch
from .row_order import WARP_WIDTH, row_sums


class NormConstants(NamedTuple):
    """What a kernel is compiled for, of a norm; NORM in kernels."""

    width: int
    gemma: bool  # the weight is weight + 1
    custom_op: bool  # s is rounded first, the mean is an IEEE quotient
    round_scaled: bool  # s * inverse_rms is rounded to the weight's dtype, and so is its product with the weight
    keep_fp32: bool  # y is not rounded
    x_addend_scale: float


@triton.jit
def prefetch_weight(weight_ptr, WIDTH: tl.constexpr, PREFETCH: tl.constexpr, WARPS: tl.constexpr):
    """Bring a weight into L2 while the kernel before still runs. It was last read a whole step ago and comes from memory; x
    comes from the L2 that its producer has just written."""
    if PREFETCH and weight_ptr is not None and tl.program_id(0) == 0:
        prefetch(weight_ptr, WIDTH * weight_ptr.dtype.element_ty.primitive_bitwidth // 8, WARPS)


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
    x_addend_ptr,
    residual_addend_ptr,
    x_addend_stride,
    residual_addend_stride,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """s = x + residual of each chunk of the rows, and the sum of s squared [rows]; s is stored too, if it is asked for."""
    WIDTH: tl.constexpr = NORM.width
    CHUNK: tl.constexpr = TILE.chunk
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
            if NORM.x_addend_scale == 1.0:
                s += addend
            else:
                s = tl.fma(addend, NORM.x_addend_scale, s)  # what the compiler makes of Inductor's product and sum
        if residual_ptr is not None:
            r = numerics.widen(residuals[first // CHUNK])
            if residual_addend_ptr is not None:
                r += numerics.widen(residual_addends[first // CHUNK])
            s += r
            if residual_out_ptr is not None:
                total_ptrs = residual_out_ptr + row64 * WIDTH + column
                tl.store(total_ptrs, s.to(residual_out_ptr.dtype.element_ty), mask=mask)
            if NORM.custom_op:
                s = numerics.rounded(s, dtype)
        # As Inductor writes it, so that the compiler makes the same of it: fma where it makes one there.
        if WIDTH > WARP_WIDTH or CHUNK < WIDTH:
            total = tl.where(mask, total + s * s, total)
        else:
            total = tl.where(mask, s * s, 0.0)
        chunks = chunks + (s,)  # type: ignore[assignment]  # noqa: RUF005
    return chunks, row_sums(total, TILE.sum_warps, TILE.fold)


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
def load_weights(weight_ptr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Weight of each chunk if TILE.early. With few rows, its way from memory is then the same time as x's; with many,
    another row's computation hides it, and registers count for more."""
    weights = ()
    if TILE.early:
        for first in tl.static_range(0, WIDTH, TILE.chunk):
            column = first + tl.arange(0, TILE.chunk)[None, :]
            weight = load_weight(weight_ptr, column, WIDTH, first + TILE.chunk <= WIDTH)
            weights = weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
    return weights


@triton.jit
def times_weight(y, weight, dtype: tl.constexpr, NORM: tl.constexpr):
    """y * weight in fp32, after the roundings that are asked for; y is s * inverse_rms."""
    if NORM.round_scaled:
        y = numerics.rounded(numerics.rounded(y, weight.dtype) * numerics.widen(weight), weight.dtype)
    elif NORM.gemma:
        y = y * (numerics.widen(weight) + 1.0)
    else:
        y = y * numerics.widen(weight)
    if not NORM.keep_fp32:
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
    NORM: tl.constexpr,
    TILE: tl.constexpr,
):
    """y [rows, chunk] of the chunk from column FIRST on, whose weight has been loaded if TILE.early."""
    if TILE.early:
        weight = weights[FIRST // TILE.chunk]
    else:
        weight = load_weight(weight_ptr, column, NORM.width, FIRST + TILE.chunk <= NORM.width)
    y = chunks[FIRST // TILE.chunk] * inverse[:, None]
    return times_weight(y, weight, dtype, NORM)


def norm_constants(
    width: int,
    weight: torch.Tensor | None,
    norm_rounding: str,
    keep_fp32: bool,
    gemma: bool = False,
    x_addend_scale: float = 1.0,
) -> NormConstants:
    narrow = weight is not None and weight.dtype.itemsize == 2
    return NormConstants(
        width=width,
        gemma=gemma,
        custom_op=norm_rounding == "custom_op",
        round_scaled=norm_rounding == "eager" and narrow and not gemma,
        keep_fp32=keep_fp32,
        x_addend_scale=x_addend_scale,
    )


def begin(
    x: torch.Tensor, weights: list[torch.Tensor | None], num_warps: int, pdl: bool | None
) -> dict[str, bool | int]:
    """How a kernel of num_warps warps on x begins."""
    given = pdl_options(x.device, pdl)
    known = [w for w in weights if w is not None]
    whole = all(w.data_ptr() % 16 == 0 and w.numel() * w.element_size() % (16 * num_warps) == 0 for w in known)
    return {"PREFETCH": given["PDL"] and whole, "num_warps": num_warps, **given}
