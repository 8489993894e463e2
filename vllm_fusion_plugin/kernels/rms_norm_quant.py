# SPDX-License-Identifier: Apache-2.0
"""RMSNorm, maybe with a residual added first, + FP8 quantiser: one pass over the input, a row in registers.

One kernel with three ends, one for each kind of quantiser. The order of addition and the tiles are in row_order.py, the norm
itself in row_norm.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from . import numerics, quant
from .backend import HIDDEN_ALIGNMENT
from .fp8 import FORMATS, OCP
from .launch import choose, launch, row_stride, rows_with_padding
from .pdl import wait_for_producer
from .quant import QuantConstants
from .rounding import is_native
from .row_norm import (
    begin,
    chunk_columns,
    inverse_rms,
    load_rows,
    load_weights,
    norm_constants,
    normed_chunk,
    prefetch_weight,
)
from .row_order import WARP_WIDTH, Tile, tile_of
from .tiles import cdiv


@triton.jit
def quantise_groups(
    chunks,
    weights,
    inverse,
    weight_ptr,
    codes_ptr,
    scales_ptr,
    normed_ptr,
    row,
    rows,
    padded_rows,
    scale_row_stride,
    scale_group_stride,
    eps,
    dtype: tl.constexpr,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
    QUANT: tl.constexpr,
):
    """Norm, codes and scales, chunk by chunk."""
    WIDTH: tl.constexpr = NORM.width
    CHUNK: tl.constexpr = TILE.chunk
    GROUP_SIZE: tl.constexpr = QUANT.group_size
    GROUPS: tl.constexpr = CHUNK // GROUP_SIZE
    FROM_ALL: tl.constexpr = TILE.early or TILE.fold == 1
    for first in tl.static_range(0, WIDTH, CHUNK):
        column, mask = chunk_columns(row, rows, first, CHUNK, WIDTH)
        offset = row.to(tl.int64)[:, None] * WIDTH + column
        y = normed_chunk(chunks, weights, inverse, weight_ptr, column, dtype, first, NORM, TILE)
        if normed_ptr is not None:
            tl.store(normed_ptr + offset, y.to(dtype), mask=mask)
        y = tl.reshape(y, (TILE.rows, GROUPS, GROUP_SIZE))
        scale, codes = quant.group(y, eps, QUANT)
        codes = tl.reshape(codes, (TILE.rows, CHUNK))
        tl.store(tl.multiple_of(codes_ptr + offset, (1, QUANT.aligned)), codes, mask=mask)
        group = first // GROUP_SIZE + tl.arange(0, GROUPS)
        group_mask = group * GROUP_SIZE < WIDTH
        scale_columns = quant.scale_columns(scales_ptr, group, scale_group_stride, QUANT)
        quant.store_scales(scale_columns, scale, row, rows, group_mask, scale_row_stride, FROM_ALL, QUANT)
        if QUANT.padded and ((padded_rows > rows) & (tl.program_id(0) * TILE.rows + TILE.rows >= rows)):
            quant.zero_scale_padding(scale_columns, rows, padded_rows, group_mask, scale_row_stride, QUANT)


@triton.jit
def _quantise_rows(
    chunks,
    weights,
    inverse,
    weight_ptr,
    bound_ptr,
    codes_ptr,
    scales_ptr,
    normed_ptr,
    row,
    rows,
    dtype: tl.constexpr,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
    QUANT: tl.constexpr,
):
    """Norm of each chunk, the row's scale, codes of each chunk. A row's numbers stay in registers in between."""
    WIDTH: tl.constexpr = NORM.width
    CHUNK: tl.constexpr = TILE.chunk
    normed = ()
    top = tl.zeros([TILE.rows, CHUNK], tl.float32)
    for first in tl.static_range(0, WIDTH, CHUNK):
        column, mask = chunk_columns(row, rows, first, CHUNK, WIDTH)
        y = normed_chunk(chunks, weights, inverse, weight_ptr, column, dtype, first, NORM, TILE)
        if normed_ptr is not None:
            tl.store(normed_ptr + row.to(tl.int64)[:, None] * WIDTH + column, y.to(dtype), mask=mask)
        top = quant.running_max(top, tl.abs(y), QUANT.rounding)  # beyond WIDTH y is 0, or NaN as in all of the row
        if QUANT.stored:
            y = numerics.rounded(y, dtype)
        normed = normed + (y,)  # type: ignore[assignment]  # noqa: RUF005  Triton has no unpacking
    scale = quant.token_scale(top, bound_ptr, QUANT.rounding, QUANT.fp8_max)
    tl.store(scales_ptr + row, scale, mask=row < rows)
    for first in tl.static_range(0, WIDTH, CHUNK):
        column, mask = chunk_columns(row, rows, first, CHUNK, WIDTH)
        y = normed[first // CHUNK]
        codes = quant.token_codes(y, scale[:, None], bound_ptr is not None, QUANT.rounding, QUANT.fp8_max)
        offset = row.to(tl.int64)[:, None] * WIDTH + column
        tl.store(tl.multiple_of(codes_ptr + offset, (1, QUANT.aligned)), codes, mask=mask)


@triton.jit
def _quantise_statically(
    chunks,
    weights,
    inverse,
    weight_ptr,
    scale_inverse,
    codes_ptr,
    normed_ptr,
    row,
    rows,
    dtype: tl.constexpr,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
    QUANT: tl.constexpr,
):
    """Norm and codes, chunk by chunk."""
    WIDTH: tl.constexpr = NORM.width
    for first in tl.static_range(0, WIDTH, TILE.chunk):
        column, mask = chunk_columns(row, rows, first, TILE.chunk, WIDTH)
        offset = row.to(tl.int64)[:, None] * WIDTH + column
        y = normed_chunk(chunks, weights, inverse, weight_ptr, column, dtype, first, NORM, TILE)
        if normed_ptr is not None:
            tl.store(normed_ptr + offset, y.to(dtype), mask=mask)
        codes = quant.static_codes(y, scale_inverse, QUANT.native, QUANT.fp8_max)
        tl.store(tl.multiple_of(codes_ptr + offset, (1, QUANT.aligned)), codes, mask=mask)


# What changes with the number of tokens is not specialised on: a server would meet a new specialisation, and half a second
# of compilation, in the middle of a request.
@triton.jit(
    do_not_specialize=["rows", "padded_rows", "scale_group_stride"], do_not_specialize_on_alignment=HIDDEN_ALIGNMENT
)
def _kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    number_ptr,  # a static scale, or the bound of a row's maximum
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
    x_addend_ptr,
    residual_addend_ptr,
    x_addend_stride,
    residual_addend_stride,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
    QUANT: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    WARPS: tl.constexpr,
):
    row = tl.program_id(0) * TILE.rows + tl.arange(0, TILE.rows)
    prefetch_weight(weight_ptr, NORM.width, PREFETCH, WARPS)
    wait_for_producer(PDL)
    if QUANT.kind == "static":
        scale_inverse = quant.static_inverse(tl.load(number_ptr), QUANT.native)
    weights = load_weights(weight_ptr, NORM.width, TILE)
    chunks, total = load_rows(
        x_ptr, residual_ptr, residual_out_ptr, row, rows, x_stride, residual_stride,
        x_addend_ptr, residual_addend_ptr, x_addend_stride, residual_addend_stride, NORM, TILE,
    )  # fmt: skip
    inverse = inverse_rms(total, epsilon, NORM.width, NORM.custom_op)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if QUANT.kind == "group":
        quantise_groups(
            chunks, weights, inverse, weight_ptr, codes_ptr, scales_ptr, normed_ptr, row, rows, padded_rows,
            scale_row_stride, scale_group_stride, eps, dtype, NORM, TILE, QUANT,
        )  # fmt: skip
    elif QUANT.kind == "token":
        _quantise_rows(
            chunks, weights, inverse, weight_ptr, number_ptr, codes_ptr, scales_ptr, normed_ptr, row, rows,
            dtype, NORM, TILE, QUANT,
        )  # fmt: skip
    else:
        _quantise_statically(
            chunks, weights, inverse, weight_ptr, scale_inverse, codes_ptr, normed_ptr, row, rows,
            dtype, NORM, TILE, QUANT,
        )  # fmt: skip


def _of_one_number(kind: str, width: int, quant_rounding: str, fp8: str, stored: bool = False) -> QuantConstants:
    """Of a token or static quantiser in rows of `width`; stored: see `QuantConstants`.

    Inductor makes one kernel of a narrow row and such a quantiser if that is native, with stores of 16 codes."""
    native = is_native(quant_rounding)
    aligned = math.gcd(width, 16 if native and width <= WARP_WIDTH.value else 8)
    maximum = FORMATS[fp8].max
    return QuantConstants(kind, quant_rounding, aligned=aligned, native=native, stored=stored, fp8_max=maximum)


def _launch(
    norm: Any,
    quantiser: QuantConstants,
    codes: torch.Tensor,
    normed: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    tile: Tile | None,
    pdl: bool | None,
    **given: Any,
) -> None:
    """Run the kernel. norm: `ops.rms_norm_quant.NormInputs`; given: the arguments that a kind of quantiser has."""
    rows, width = norm.x.shape
    if rows == 0:
        return
    add = norm.residual is not None
    native = is_native(quantiser.rounding) and not (quantiser.kind == "group" and norm.stored)  # of y unrounded
    addends = norm.x_addend is not None and norm.residual_addend is not None
    if quantiser.kind == "token":
        # at most 2 of Inductor's warps in one: it has a row in registers twice
        many_loads, most = add and (native or (addends and not norm.sum_columns)), 2
    else:
        many_loads, most = addends and not native and not norm.sum_columns, 4
    tile = tile or choose(tile_of, rows, width, native, many_loads, norm.sum_columns, add, most)
    start = begin(norm.x, [norm.weight], tile.num_warps, pdl)
    launch(
        _kernel,
        (cdiv(rows, tile.rows),),
        norm.x.device,
        x_ptr=norm.x,
        residual_ptr=norm.residual,
        weight_ptr=norm.weight,
        codes_ptr=codes,
        normed_ptr=normed,
        residual_out_ptr=residual_out,
        rows=rows,
        x_stride=row_stride(norm.x),
        residual_stride=row_stride(norm.residual),
        epsilon=norm.epsilon,
        x_addend_ptr=norm.x_addend,
        residual_addend_ptr=norm.residual_addend,
        x_addend_stride=row_stride(norm.x_addend),
        residual_addend_stride=row_stride(norm.residual_addend),
        NORM=norm_constants(
            width,
            norm.weight,
            norm.norm_rounding,
            norm.norm_rounding == "native" and native,
            norm.gemma_weight,
            norm.x_addend_scale,
        ),
        TILE=tile.constants(),
        QUANT=quantiser,
        WARPS=tile.num_warps,
        **(_NOT_GIVEN | given),
        **start,
    )


_NOT_GIVEN = dict.fromkeys(("number_ptr", "scales_ptr", "padded_rows", "scale_row_stride", "scale_group_stride", "eps"))


def rms_norm_group_fp8_quant(
    norm: Any,
    codes: torch.Tensor,
    scales: torch.Tensor,
    normed: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    group_size: int,
    use_ue8m0: bool,
    quant_rounding: str,
    tile: Tile | None = None,
    pdl: bool | None = None,
    fp8: str = OCP,
) -> None:
    """Write codes [M, H], scales [M, H / group_size] and, if given, normed and residual_out [M, H] of norm.x [M, H];
    arguments as the op checked them, norm being its `NormInputs`."""
    rows, width = norm.x.shape
    aligned = math.gcd(width, 8)
    quantiser = quant.group_constants(scales, group_size, use_ue8m0, quant_rounding, aligned, fp8)
    _launch(
        norm, quantiser, codes, normed, residual_out, tile, pdl,
        scales_ptr=scales,
        padded_rows=rows_with_padding(scales, rows),
        scale_row_stride=scales.stride(0),
        scale_group_stride=scales.stride(1),
        eps=quant.EPS,
    )  # fmt: skip


def rms_norm_token_fp8_quant(
    norm: Any,
    scale_ub: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    normed: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    quant_rounding: str,
    tile: Tile | None = None,
    pdl: bool | None = None,
    fp8: str = OCP,
) -> None:
    """Write codes [M, H], scales [M, 1] and, if given, normed and residual_out [M, H] of norm.x [M, H]; arguments as for
    groups."""
    stored = norm.stored and is_native(quant_rounding)
    quantiser = _of_one_number("token", norm.x.shape[1], quant_rounding, fp8, stored)
    _launch(norm, quantiser, codes, normed, residual_out, tile, pdl, number_ptr=scale_ub, scales_ptr=scales)


def rms_norm_static_fp8_quant(
    norm: Any,
    scale: torch.Tensor,
    codes: torch.Tensor,
    normed: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    quant_rounding: str,
    tile: Tile | None = None,
    pdl: bool | None = None,
    fp8: str = OCP,
) -> None:
    """Write codes [M, H] and, if given, normed and residual_out [M, H] of norm.x [M, H]; arguments as for groups."""
    quantiser = _of_one_number("static", norm.x.shape[1], quant_rounding, fp8)
    _launch(norm, quantiser, codes, normed, residual_out, tile, pdl, number_ptr=scale)
