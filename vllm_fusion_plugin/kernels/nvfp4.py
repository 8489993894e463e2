# SPDX-License-Identifier: Apache-2.0
"""NVFP4 for Triton kernels: rounding to e2m1, block scales, and where a block's scale goes. ops/nvfp4.py has the format."""

from __future__ import annotations

import triton
import triton.language as tl

from . import numerics

BLOCK = tl.constexpr(16)
SIXTH = tl.constexpr(1.0 / 6.0)


@triton.jit
def e2m1(x):
    """fp32 -> e2m1 codes 0 to 15 in int32: nearest even, saturated, NaN to 6.

    By comparison, because the conversion instruction exists from compute capability 10.0 on.
    """
    magnitude = tl.abs(x)
    code = (magnitude > 0.25).to(tl.int32) + (magnitude >= 0.75).to(tl.int32) + (magnitude > 1.25).to(tl.int32)
    code += (magnitude >= 1.75).to(tl.int32) + (magnitude > 2.5).to(tl.int32) + (magnitude >= 3.5).to(tl.int32)
    code += (magnitude > 5.0).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(x == x, code | sign, 7)


@triton.jit
def _decoded(scale):
    """e4m3 scale, from 0 to 448, in fp32. By its bits: `scale.to(tl.float32)` was the code's number (28 for 0.09375) in the
    kernel for fp16 rows of Triton 3.8 on an H100. Its PTX was right, what ptxas made of it was not."""
    bits = (scale.to(tl.uint8, bitcast=True).to(tl.int32) & 0x7F) << 20
    return bits.to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def block_scale(y, global_scale):
    """y [rows, blocks, 16] -> e4m3 scale of each block, and what to multiply the block by before rounding to e2m1."""
    top = tl.max(tl.abs(y), axis=2)  # ignores NaN, as __hmax does
    scale = (global_scale * (top * SIXTH)).to(tl.float8e4nv)
    decoded = _decoded(scale)
    inverse_global = numerics.reciprocal(tl.zeros_like(decoded) + global_scale)
    # reciprocals of a reciprocal, approximate both, in vLLM's kernel too
    multiplier = numerics.reciprocal(decoded * inverse_global)
    return scale, tl.where(decoded == 0.0, 0.0, multiplier)


@triton.jit
def pack_codes(code, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Codes [ROWS, BLOCKS, 16] -> bytes [ROWS, BLOCKS * 8], the first of two in the low half."""
    low, high = tl.split(tl.reshape(code, (ROWS, BLOCKS * 8, 2)))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def pack_scales(scale, valid, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """e4m3 scales [ROWS, BLOCKS] -> int32 [ROWS, BLOCKS / 4], the first of four in the lowest byte; zero if not valid."""
    byte = tl.where(valid, scale.to(tl.uint8, bitcast=True).to(tl.int32), 0)
    byte = tl.reshape(byte, (ROWS, BLOCKS // 4, 4))
    return tl.sum(byte << (8 * tl.arange(0, 4))[None, None, :], axis=2)


@triton.jit
def scale_offset(row, quad, quads):
    """Offset, in int32, of the scales of four neighbouring blocks of a row; `quads` fours to a row."""
    tile = (row // 128).to(tl.int64)[:, None] * quads + quad[None, :]
    return tile * 128 + ((row % 32) * 4 + row % 128 // 32)[:, None]
