# SPDX-License-Identifier: Apache-2.0
"""FP8 quantisers for the end of a kernel: scales and codes of values that are in registers.

MAX is the largest code, which also tells the format (fp8.py): 448 is e4m3fn's, 224 and 240 are e4m3fnuz's.

ROUNDING is a group or token quantiser's `quant_rounding`; NATIVE says that a static quantiser's is `native`. What they are
is in ops/quant.py. Values y are fp32, already rounded as by whatever computed them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import numerics
from .fp8 import FORMATS, OCP
from .launch import choose
from .rounding import of_rows

# Floor of a group's maximum in vLLM's op: the `eps` that its layers call it with.
EPS = 1e-10
UE8M0_MIN_SCALE = tl.constexpr(1e-10)


class QuantConstants(NamedTuple):
    """What a kernel is compiled for, of a quantiser; QUANT in kernels."""

    kind: str  # group, token or static
    rounding: str
    group_size: int = 0
    ue8m0: bool = False
    padded: bool = False  # scales may be TMA-aligned
    packed: bool = False  # scales are bytes: exponents
    aligned: int = 1  # codes that a thread stores at once, hence columns it has side by side
    native: bool = False  # of a static quantiser
    stored: bool = False  # of a token quantiser: codes are of rounded numbers, and the scale is not
    fp8_max: float = FORMATS[OCP].max  # the largest code; tells the format


def group_constants(
    scales: torch.Tensor, group_size: int, use_ue8m0: bool, quant_rounding: str, aligned: int = 1, fp8: str = OCP
) -> QuantConstants:
    rounding, ue8m0 = choose(of_rows, scales.shape[0], quant_rounding, use_ue8m0)
    packed = scales.dtype == torch.int32
    padded, maximum = scales.stride(0) == 1, FORMATS[fp8].max
    return QuantConstants("group", rounding, group_size, ue8m0, padded, packed, aligned, fp8_max=maximum)


@triton.jit
def codes_of(y, MAX: tl.constexpr):
    """FP8 codes of fp32 y. The conversion saturates at its format's own maximum, which 224 is not, and keeps NaN."""
    if MAX == 448.0:
        codes = y.to(tl.float8e4nv)
    elif MAX == 240.0:
        codes = y.to(tl.float8e4b8)
    else:
        y = tl.maximum(y, -MAX, propagate_nan=tl.PropagateNan.ALL)
        codes = tl.minimum(y, MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4b8)
    return codes


@triton.jit
def group(y, eps, QUANT: tl.constexpr):
    """Scale [rows, groups] and FP8 codes of each group of y [rows, groups, group_size]."""
    if QUANT.rounding == "flashinfer":
        scale, codes = _group_of_flashinfer(y)
    else:
        scale = group_scale(y, eps, QUANT.rounding, QUANT.ue8m0, QUANT.fp8_max)
        codes = codes_of(_quotients(y, scale, QUANT.rounding, QUANT.ue8m0, QUANT.fp8_max), QUANT.fp8_max)
    return scale, codes


@triton.jit
def _group_of_flashinfer(y):
    """As the quantiser inside of FlashInfer's block GEMM, in the instructions that its fast math compiles to."""
    top = tl.maximum(tl.max(tl.abs(y), axis=2), 0.0)  # of nothing but NaN: 0
    factor, scale = numerics.flashinfer_factor_and_scale(top)
    return scale, numerics.flushing_product(y, factor[:, :, None]).to(tl.float8e4nv)


@triton.jit
def group_scale(y, eps, ROUNDING: tl.constexpr, UE8M0: tl.constexpr, MAX: tl.constexpr):
    """Scale [rows, groups] of each group of y [rows, groups, group_size]."""
    top = tl.max(tl.abs(y), axis=2)  # ignores NaN, as fmaxf does
    if ROUNDING == "native" or ROUNDING == "native_floored":
        scale = numerics.times_reciprocal_of_maximum(top, MAX)
        if ROUNDING == "native_floored":
            scale = tl.maximum(scale, 1.0 / (MAX * 512.0))
        if UE8M0:
            scale = numerics.exp2_ceil_log2(scale)
        if ROUNDING == "native":
            scale = tl.maximum(scale, 1.0 / (MAX * 512.0))
        has_nan = tl.max((y != y).to(tl.int32), axis=2) > 0
        return tl.where(has_nan, float("nan"), scale)
    if ROUNDING == "aiter":
        return tl.maximum(top, eps) * (1.0 / MAX)
    return scale_of_maximum(top, eps, UE8M0, MAX)


@triton.jit
def scale_of_maximum(top, eps, UE8M0: tl.constexpr, MAX: tl.constexpr):
    """Scale of a group with the largest magnitude `top`, not native."""
    scale = numerics.divide_by_maximum(tl.maximum(top, eps), MAX)
    if UE8M0:
        scale = numerics.round_up_to_power_of_two(tl.maximum(scale, UE8M0_MIN_SCALE))
    return scale


@triton.jit
def _quotients(y, scale, ROUNDING: tl.constexpr, UE8M0: tl.constexpr, MAX: tl.constexpr):
    """What becomes FP8 codes of y [rows, groups, numbers of a group]."""
    if ROUNDING == "native" or ROUNDING == "native_floored":
        return y / scale[:, :, None]  # div.full.f32, as in Inductor's kernel
    if UE8M0:
        quotients = y * numerics.reciprocal(scale)[:, :, None]  # a power of two: exact
    elif ROUNDING == "reciprocal" or ROUNDING == "aiter":
        quotients = y * numerics.rounded_reciprocal(scale)[:, :, None]
    else:
        quotients = numerics.divide(y, scale[:, :, None])
    return tl.maximum(quotients, -MAX)  # NaN becomes -MAX, as in fmaxf and in AMD's v_med3_f32


@triton.jit
def _larger_pair(a, b):
    """Of each of two bf16 numbers in 32 bits the larger magnitude, with a sign of no meaning; ignores NaN."""
    return tl.inline_asm_elementwise(
        "max.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def group_of_bf16(y, eps, ROUNDING: tl.constexpr, UE8M0: tl.constexpr):
    """Scale and e4m3fn codes, not native, of fp32 y [rows, groups, group_size] rounded to bf16, two at a time. Needs PTX."""
    even, odd = tl.split(tl.reshape(y, (y.shape[0], y.shape[1], y.shape[2] // 2, 2)))
    pairs, even, odd = numerics.rounded_pairs(even, odd)
    top = tl.reduce(pairs, 2, _larger_pair)
    low, high = (top << 16).to(tl.float32, bitcast=True), (top & -65536).to(tl.float32, bitcast=True)
    scale = scale_of_maximum(tl.maximum(tl.abs(low), tl.abs(high)), eps, UE8M0, 448.0)
    # Joined only now: Triton would move the numbers, and not the scale, to where the other one is.
    even, odd = _quotients(even, scale, ROUNDING, UE8M0, 448.0), _quotients(odd, scale, ROUNDING, UE8M0, 448.0)
    codes = tl.join(even, odd)
    return scale, tl.reshape(codes, y.shape).to(tl.float8e4nv)


@triton.jit
def _store_from_all(ptrs, values, mask):
    """Write fp32 values from every thread that has them.

    All threads of a group have its scale. tl.store gives each scale to one thread, by way of shared memory and two barriers
    for each chunk of a row, or of shuffles; a warp's stores to one address are one.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred here; setp.ne.b32 here, $3, 0; @here st.global.b32 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r,r",
        [ptrs.to(tl.int64), values, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def scale_columns(scales_ptr, group, group_stride, QUANT: tl.constexpr):
    """Pointers [1, groups] to row 0 of the groups' scales; of packed ones to the bytes of an int32, with its stride."""
    group = group.to(tl.int64)
    if QUANT.packed:
        offset = group // 4 * group_stride * 4 + group % 4
        columns = scales_ptr.to(tl.pointer_type(tl.uint8)) + offset[None, :]
    else:
        columns = scales_ptr + group[None, :] * group_stride
    return columns


@triton.jit
def store_scales(columns, scale, row, rows, group_mask, row_stride, FROM_ALL: tl.constexpr, QUANT: tl.constexpr):
    """Write scale [rows of the tile, groups of the tile] to `scale_columns`.

    FROM_ALL is for short launches and for one group a thread: 18432 columns by one program take 4.0 µs instead of 4.2 on an
    H200, 8192 x 12288 after SiLU·mul 119.5 instead of 121.5. With several groups a thread, or rows that lie side by side in
    column-major scales, the detour joins stores: 8192 x 4096 by itself takes 24.8 µs with it and 25.4 without.
    """
    ptrs = columns + row.to(tl.int64)[:, None] * (row_stride * 4 if QUANT.packed else row_stride)
    mask = (row < rows)[:, None] & group_mask[None, :]
    if QUANT.packed:
        exponent = (scale.to(tl.uint32, bitcast=True) >> 23) & 0xFF
        tl.store(ptrs, exponent.to(tl.uint8), mask=mask)
    elif FROM_ALL and numerics.HAS_PTX:
        _store_from_all(ptrs, scale, mask)
    else:
        tl.store(ptrs, scale, mask=mask)


@triton.jit
def zero_scale_padding(columns, rows, padded_rows, group_mask, row_stride, QUANT: tl.constexpr):
    """Zero the rows between `rows` and `padded_rows`, 3 at most, of TMA-aligned scales; by the program of the last rows.

    Whether there are any is found out when it runs. A kernel compiled for each of the two would be compiled in a request.
    """
    pad = rows + tl.arange(0, 4)[:, None]
    ptrs = columns + pad.to(tl.int64) * (row_stride * 4 if QUANT.packed else row_stride)
    zeros = tl.zeros(ptrs.shape, ptrs.dtype.element_ty)
    tl.store(ptrs, zeros, mask=(pad < padded_rows) & group_mask[None, :])


@triton.jit
def static_inverse(scale, NATIVE: tl.constexpr):
    """1 / scale of a static quantiser."""
    if NATIVE:
        return 1.0 / scale  # div.full.f32, as in Inductor's kernel
    return tl.div_rn(1.0, scale)


@triton.jit
def static_codes(y, inverse, NATIVE: tl.constexpr, MAX: tl.constexpr):
    """FP8 codes of y under one scale."""
    code = y * inverse
    if not NATIVE:
        code = tl.minimum(code, MAX)  # NaN becomes MAX, as fminf does first in vLLM's op
    return codes_of(code, MAX)


@triton.jit
def running_max(top, magnitude, ROUNDING: tl.constexpr):
    """The larger of two, element by element; of NaN and a number the number, or NaN if native."""
    if ROUNDING == "native":
        return tl.maximum(top, magnitude, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(top, magnitude)


@triton.jit
def token_scale(top, bound_ptr, ROUNDING: tl.constexpr, MAX: tl.constexpr):
    """Scale [rows] of rows that have their largest magnitudes in `top` [rows, columns], NaN as running_max leaves it;
    bound_ptr is vLLM's `scale_ub` or None."""
    # Bits of magnitudes have the order of the magnitudes, NaN last; a warp finds the largest integer in one instruction.
    top = tl.max(top.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
    if bound_ptr is not None:
        bound = tl.load(bound_ptr)
        if ROUNDING == "native":
            top = tl.minimum(top, bound, propagate_nan=tl.PropagateNan.ALL)
        else:
            top = tl.minimum(top, bound)
    if ROUNDING == "native":
        scale = numerics.times_reciprocal_of_maximum(top, MAX)
        return tl.maximum(scale, 1.0 / (MAX * 512.0), propagate_nan=tl.PropagateNan.ALL)
    if ROUNDING == "aiter":
        return top * (1.0 / MAX)  # 0 for a row of zeros
    return tl.maximum(numerics.divide_by_maximum(top, MAX), 1.0 / (MAX * 512.0))


@triton.jit
def token_codes(y, scale, BOUNDED: tl.constexpr, ROUNDING: tl.constexpr, MAX: tl.constexpr):
    """FP8 codes of y with its row's scale. BOUNDED: the scale may be far too small for y."""
    if ROUNDING == "aiter":
        return codes_of(tl.maximum(y * numerics.reciprocal(scale), -MAX), MAX)  # NaN becomes -MAX; 0 / 0 is one
    if ROUNDING == "native":
        code = y * (1.0 / scale)  # div.full.f32, as in Inductor's kernel
    elif BOUNDED:
        code = tl.div_rn(y, scale)
    else:
        code = numerics.divide(y, scale)
    if ROUNDING != "native":
        code = tl.minimum(code, MAX)  # NaN becomes MAX, as fminf does first in vLLM's op
    return codes_of(code, MAX)
