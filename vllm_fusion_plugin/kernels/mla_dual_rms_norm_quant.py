# SPDX-License-Identifier: Apache-2.0
"""MLA's two RMSNorms in one kernel: q quantised to FP8 in groups, kv left in its dtype. One program for both."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import numerics, quant
from .backend import BACKEND, HIDDEN_ALIGNMENT
from .fp8 import OCP
from .launch import choose, launch, row_stride, rows_with_padding
from .pdl import wait_for_producer
from .rms_norm_quant import quantise_groups
from .rounding import is_native
from .row_norm import (
    begin,
    inverse_rms,
    load_rows,
    load_weight,
    load_weights,
    norm_constants,
    prefetch_weight,
    times_weight,
)
from .row_order import LARGE, Tile, row_tile
from .tiles import cdiv, next_power_of_2


@triton.jit
def kv_sums(squares, FOLD: tl.constexpr):
    """Sums [rows] of squares [rows, columns] in the order of 8 warps, run by one in FOLD (1, or 2 for 512 columns).

    In Inductor's kernel a thread of 8 warps has 2 of 512 columns; here, of 4 warps, 4. So the last halving across threads is
    between a thread's own two pairs here, and the last one across warps is within a warp.
    """
    if FOLD == 2:
        ROWS: tl.constexpr = squares.shape[0]
        pairs = tl.sum(tl.reshape(squares, (ROWS, 8, 16, 2, 2)), axis=4)
        warps = tl.reshape(tl.sum(tl.sum(pairs, axis=2), axis=2), (ROWS, 4, 2))
        total = tl.sum(tl.sum(warps, axis=1), axis=1)
    else:
        total = tl.sum(squares, axis=1)
    return total


@triton.jit(
    do_not_specialize=["rows", "padded_rows", "scale_group_stride"], do_not_specialize_on_alignment=HIDDEN_ALIGNMENT
)
def _dual_kernel(
    q_ptr,
    kv_ptr,
    q_weight_ptr,
    kv_weight_ptr,
    codes_ptr,
    scales_ptr,
    kv_normed_ptr,
    rows,
    padded_rows,
    q_stride,
    kv_stride,
    scale_row_stride,
    scale_group_stride,
    q_epsilon,
    kv_epsilon,
    eps,
    NORM: tl.constexpr,  # q's
    KV_NORM: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    QUANT: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    WARPS: tl.constexpr,
):
    prefetch_weight(q_weight_ptr, NORM.width, PREFETCH, WARPS)
    prefetch_weight(kv_weight_ptr, KV_NORM.width, PREFETCH, WARPS)
    wait_for_producer(PDL)
    # kv is loaded before q and computed with after it, so that both are on their way at once
    row = tl.program_id(0) * TILE.rows + tl.arange(0, TILE.rows)
    row64 = row.to(tl.int64)[:, None]
    column = tl.arange(0, KV_BLOCK)[None, :]
    mask = (row < rows)[:, None] & (column < KV_NORM.width)
    kv = tl.load(kv_ptr + row64 * kv_stride + column, mask=mask, other=0.0)
    weight = load_weight(kv_weight_ptr, column, KV_NORM.width, KV_NORM.width == KV_BLOCK)

    weights = load_weights(q_weight_ptr, NORM.width, TILE)
    chunks, total = load_rows(q_ptr, None, None, row, rows, q_stride, 0, None, None, 0, 0, NORM, TILE)
    inverse = inverse_rms(total, q_epsilon, NORM.width, NORM.custom_op)
    quantise_groups(
        chunks, weights, inverse, q_weight_ptr, codes_ptr, scales_ptr, None, row, rows, padded_rows,
        scale_row_stride, scale_group_stride, eps, kv.dtype, NORM, TILE, QUANT,
    )  # fmt: skip
    s = numerics.widen(kv)
    inverse = inverse_rms(kv_sums(s * s, TILE.fold), kv_epsilon, KV_NORM.width, NORM.custom_op)
    y = times_weight(s * inverse[:, None], weight, kv.dtype, KV_NORM)
    tl.store(kv_normed_ptr + row64 * KV_NORM.width + column, y.to(kv.dtype), mask=mask)


def dual_tile(width: int, kv_width: int, native_quant: bool) -> Tile:
    """Tile for rows of `width` and, kv's, `kv_width`, in Inductor's order; 4 warps, where they can, are faster than 8."""
    if 1024 < width <= 2048 and kv_width == 512 and BACKEND != "hip":  # see row_order.folded
        return Tile(1, 2048, 4, 8)
    return row_tile(width, native_quant)


def tile_of(rows: int, width: int, kv_width: int, native_quant: bool) -> Tile:
    """`dual_tile`, and whether weights are loaded early, for `rows` rows."""
    return dual_tile(width, kv_width, native_quant)._replace(early=rows * width < LARGE)


def mla_dual_rms_norm_group_fp8_quant(
    q: torch.Tensor,
    kv: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    q_codes: torch.Tensor,
    q_scales: torch.Tensor,
    kv_normed: torch.Tensor,
    q_epsilon: float,
    kv_epsilon: float,
    group_size: int,
    use_ue8m0: bool,
    norm_rounding: str,
    quant_rounding: str,
    tile: Tile | None = None,
    pdl: bool | None = None,
    fp8: str = OCP,
) -> None:
    """Write q_codes [M, Hq], q_scales [M, Hq / group_size] and kv_normed [M, Hkv]; arguments as the op checked them.

    q's tile gives kv its warps too, hence the order in which kv's squares are added: it is that of Inductor, which makes one
    kernel of the two norms as well (a "combo kernel", as vLLM configures it).
    """
    rows, width = q.shape
    if rows == 0:
        return
    native = is_native(quant_rounding)
    tile = tile or choose(tile_of, rows, width, kv.shape[1], native)
    launch(
        _dual_kernel,
        (cdiv(rows, tile.rows),),
        q.device,
        q,
        kv,
        q_weight,
        kv_weight,
        q_codes,
        q_scales,
        kv_normed,
        rows,
        rows_with_padding(q_scales, rows),
        row_stride(q),
        row_stride(kv),
        q_scales.stride(0),
        q_scales.stride(1),
        q_epsilon,
        kv_epsilon,
        quant.EPS,
        NORM=norm_constants(width, q_weight, norm_rounding, keep_fp32=norm_rounding == "native" and native),
        KV_NORM=norm_constants(kv.shape[1], kv_weight, norm_rounding, keep_fp32=False),
        KV_BLOCK=max(next_power_of_2(kv.shape[1]), 64 * tile.num_warps),  # two numbers a thread: see numerics.widen
        TILE=tile.constants(),
        QUANT=quant.group_constants(q_scales, group_size, use_ue8m0, quant_rounding, math.gcd(width, 8), fp8),
        WARPS=tile.num_warps,
        **begin(q, [q_weight, kv_weight], tile.num_warps, pdl),
    )
