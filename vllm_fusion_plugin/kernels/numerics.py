# SPDX-License-Identifier: Apache-2.0
"""Roundings of vLLM's ops, rebuilt from cheaper instructions.

vLLM's CUDA ops divide twice an element (SiLU, quantiser) with IEEE division: about ten instructions each, enough to turn a
memory-bound kernel into a compute-bound one (H200, M=8192, width 12288: 153 µs with them, 119 without). Every shortcut
here was compared with what it replaces over all its inputs; tests/kernels repeat that on the GPU at hand.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import rounding
from .backend import BACKEND, INTERPRETED

# Triton's interpreter runs neither inline PTX nor libdevice; there the plain operations stand in.
HAS_PTX = tl.constexpr(BACKEND == "cuda")
IS_HIP = tl.constexpr(BACKEND == "hip")
HAS_LIBDEVICE = tl.constexpr(not INTERPRETED)


@triton.jit
def exp(x):
    """expf of CUDA's library; Triton's own exp multiplies by log2(e) first and loses bits for large |x|."""
    if HAS_LIBDEVICE:
        return libdevice.exp(x)
    return tl.exp(x)


@triton.jit
def widen(x):
    """x in fp32. Two bf16 numbers unpack in two instructions, where Triton's own conversion takes three."""
    if HAS_PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    return x.to(tl.float32)


@triton.jit
def rounded(y, dtype: tl.constexpr):
    """fp32 y rounded to dtype, as fp32. Two at a time, as above; one at a time takes the slow conversion unit."""
    if HAS_PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,r,r",
            [y],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return y.to(dtype).to(tl.float32)


@triton.jit
def rounded_pairs(even, odd):
    """Two fp32 numbers rounded to bf16: both in 32 bits, and each as fp32. Needs PTX."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
        "=&r,=&r,=r,r,r",
        [even, odd],
        dtype=(tl.int32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def exp_of_negative_in_parts(x):
    """p and 2**n, whose product is expf(-x) of CUDA's library: its own instructions but the last, with the sign in the
    constants and the clamp in the first fma. Needs PTX.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 exponent, shifted, fraction;
        .reg .b32 power;
        fma.rn.ftz.sat.f32 exponent, $2, 0fBBBB989D, 0f3F000000;
        fma.rm.ftz.f32 shifted, exponent, 0f437C0000, 0f4B400001;
        add.f32 exponent, shifted, 0fCB40007F;
        neg.f32 exponent, exponent;
        fma.rn.ftz.f32 fraction, $2, 0fBFB8AA3B, exponent;
        fma.rn.ftz.f32 fraction, $2, 0fB2A57060, fraction;
        mov.b32 power, shifted;
        shl.b32 power, power, 23;
        mov.b32 $1, power;
        ex2.approx.ftz.f32 $0, fraction;
        }""",
        "=&r,=&r,r",
        [x],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def exp_of_negative(x):
    """expf(-x) of CUDA's library."""
    if HAS_PTX:
        p, power = exp_of_negative_in_parts(x)
        return p * power
    return exp(-x)


@triton.jit
def one_plus_exp_of_negative(x):
    """1 + expf(-x). p * 2**n is exact, or infinite, or far too small to count, so one fma has the bits of both steps."""
    if HAS_PTX:
        p, power = exp_of_negative_in_parts(x)
        return tl.fma(p, power, 1.0)
    return 1.0 + exp(-x)


@triton.jit
def reciprocal(x):
    """1 / x within 1 ulp, one instruction; on NVIDIA GPUs it flushes to zero above 2**126."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    if IS_HIP:
        return libdevice.fast_dividef(1.0, x)  # v_rcp_f32
    return 1.0 / x


@triton.jit
def rounded_reciprocal(x):
    """IEEE 1 / x for positive x, normal and up to 2**126, or infinite: one Newton step, as CUDA's own rcp.rn takes it."""
    if HAS_PTX or IS_HIP:
        near = reciprocal(x)
        finite = tl.where(x == float("inf"), 0.0, x)
        return tl.fma(tl.fma(finite * -1.0, near, 1.0), near, near)
    return 1.0 / x


@triton.jit
def flashinfer_factor_and_scale(top):
    """448 / top and its reciprocal as nvcc's fast math divides, 1 and 1 for 0; top is a bf16 number from 0 on. Subnormals
    count as 0 in a division, hence give infinity; above 2**126 the factor is 0, and the scale of such a factor as well."""
    if HAS_PTX:
        factor = tl.inline_asm_elementwise(
            "div.approx.ftz.f32 $0, 0f43E00000, $1;", "=r,r", [top], dtype=tl.float32, is_pure=True, pack=1
        )
        factor = tl.where(top == 0.0, 1.0, factor)
        scale = reciprocal(factor)
    else:
        mantissa = (top.to(tl.int32, bitcast=True) >> 16) & 0x7F
        factor = _nudged(448.0 / tl.where(top < 2.0**-126, 0.0, top), mantissa, _FAST_448_OVER)
        factor = tl.where(top == 0.0, 1.0, tl.where(top > 2.0**126, 0.0, factor))
        scale = tl.where(top == 0.0, 1.0, _nudged(1.0 / factor, mantissa, _FAST_RECIPROCAL))
        scale = tl.where(factor > 2.0**126, 0.0, scale)
    return factor, scale


def _as_int32(tables: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """The words as int32 has them."""
    return tuple(tuple(word - (word >> 31 << 32) for word in words) for words in tables)


_FAST_448_OVER = tl.constexpr(_as_int32(rounding.FAST_448_OVER))
_FAST_RECIPROCAL = tl.constexpr(_as_int32(rounding.FAST_RECIPROCAL))


@triton.jit
def _nudged(x, mantissa, OFF: tl.constexpr):
    """x one unit in the last place up or down, as the tables in rounding.py have it for `mantissa`."""
    steps = _bit(OFF[0], mantissa) - _bit(OFF[1], mantissa)
    nudged = (x.to(tl.int32, bitcast=True) + steps).to(tl.float32, bitcast=True)
    return tl.where((x == 0.0) | (x == float("inf")), x, nudged)


@triton.jit
def _bit(WORDS: tl.constexpr, at):
    """Bit at % 32 of word at // 32."""
    bit = at & 31
    low = tl.where(at < 32, (WORDS[0] >> bit) & 1, (WORDS[1] >> bit) & 1)
    high = tl.where(at < 96, (WORDS[2] >> bit) & 1, (WORDS[3] >> bit) & 1)
    return tl.where(at < 64, low, high)


@triton.jit
def flushing_product(x, y):
    """x * y with subnormal factors and products taken for 0, as fast math multiplies."""
    if HAS_PTX:
        x, y = tl.broadcast(x, y)
        return tl.inline_asm_elementwise(
            "mul.ftz.f32 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.where(tl.abs(x) < 2.0**-126, x * 0.0, x) * y


@triton.jit
def silu(gate, EXACT: tl.constexpr):
    """gate / (1 + exp(-gate)) for fp32 values of bf16 or fp16 numbers.

    EXACT=False: the bits of Inductor's kernel (`div.full.f32`) for all bf16 and fp16 gates; rounded to bf16 these are also
    the bits of IEEE division. EXACT=True: IEEE division's bits after rounding to fp16 (one fp16 gate needs it).
    """
    # A quarter of the denominator, so that 4 / (1 + exp(88.7)) does not underflow and flush: fma rounds once, hence
    # this is the denominator's bits with another exponent.
    quarter = tl.fma(exp_of_negative(gate), 0.25, 0.25)
    if EXACT:
        # One Newton step on the quotient. exp(-gate) is infinite below -88.7, where 0 * inf would be NaN; fp16 rounds
        # the quotient to -0 long before.
        quarter = tl.minimum(quarter, 1e38)
        inverse = reciprocal(quarter)
        quotient = (gate * 0.25) * inverse
        # quotient minus residual, because quotient plus residual would turn -0 into +0; minus by way of a product, because
        # Triton's unary minus is 0 - x, which knows no -0.
        residual = tl.fma(quotient, quarter, gate * -0.25)
        corrected = tl.fma(residual, inverse * -1.0, quotient)
        return tl.where(gate == float("inf"), gate, corrected)
    # The gate, not the quotient, gets the other quarter: a quotient of 2**126 and more would overflow first. Exact for
    # subnormal gates too, whose low bits are zero.
    return (gate * 0.25) * reciprocal(quarter)


@triton.jit
def divide_by_maximum(x, MAX: tl.constexpr):
    """IEEE x / MAX for x >= 0, MAX being 448, 240 or 224."""
    inverse: tl.constexpr = 1.0 / MAX
    quotient = x * inverse
    residual = tl.fma(-quotient, MAX, x)
    # inf - inf is NaN in the residual
    return tl.where(x == float("inf"), x, tl.fma(residual, inverse, quotient))


@triton.jit
def times_reciprocal_of_maximum(x, MAX: tl.constexpr):
    """What Inductor makes of x / 448.0: on a GPU it multiplies by the rounded reciprocal of a constant divisor."""
    if HAS_PTX or IS_HIP:
        return x * (1.0 / MAX)
    return divide_by_maximum(x, MAX)


@triton.jit
def round_up_to_power_of_two(x):
    """exp2(ceil(log2(x))) for x >= 0 that is 0, normal or infinite, by carrying the mantissa into the exponent."""
    bits = (x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def exp2_ceil_log2(x):
    """exp2(ceil(log2(x))) as Inductor computes it: the next few numbers above a power of two are not rounded up, because
    their log2 rounds to its exponent. Of maxima of 16-bit numbers none is there, of fp32 ones 2 in a million."""
    if HAS_LIBDEVICE:
        return libdevice.exp2(libdevice.ceil(libdevice.log2(x)))
    return tl.exp2(tl.ceil(tl.log2(x)))


@triton.jit
def divide(x, scale):
    """x / scale close enough to IEEE division that e4m3 codes are the same for every bf16 or fp16 x and its group's scale.

    A product with the reciprocal is not: x / scale is often within an ulp of halfway between two codes. A reciprocal in two
    parts is, at two instructions an x (checked as above; between a quotient h / (1 + e) for h halfway, e the rounding of
    scale, and where IEEE division would round the other way there are at least 2**-36 of it). scale is positive, maybe
    infinite (then ±0, and NaN for x infinite).
    """
    inverse = reciprocal(scale)
    finite = tl.where(scale == float("inf"), 0.0, scale)
    high = inverse * (1.0 - 2.0**-22)  # certainly too small: low must not be negative, lest -0 become +0
    low = tl.fma(finite * -1.0, high, 1.0) * inverse
    return tl.fma(x, high, x * low)
