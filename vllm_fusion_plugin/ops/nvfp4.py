# SPDX-License-Identifier: Apache-2.0
"""The NVFP4 quantiser that fused ops end in: layout of its block scales, and its reference in plain torch.

A block of 16 numbers along a row shares one scale. Codes are e2m1 (±0, 0.5, 1, 1.5, 2, 3, 4, 6), two to a byte, the first
in the low half. A block's scale is e4m3, relative to one fp32 `global_scale` of the whole tensor that brings the largest
block's scale near e4m3's maximum: number = code * scale / global_scale.

The scales lie as Blackwell's block-scaled tensor-core instructions read them (PTX ISA, tcgen05.mma, scale factor layout):
tiles of 128 rows × 4 blocks, 512 bytes each, row-major among themselves. In a tile, byte (row % 32) * 16 + (row // 32) * 4 +
block belongs to that row and block. Rows are padded to 128 and blocks to 4 with zeros, which the instructions read too.
"""

from __future__ import annotations

import torch

BLOCK = 16
TILE_ROWS = 128
TILE_BLOCKS = 4
E2M1_MAX = 6.0
E4M3_MAX = 448.0


def check_width(width: int) -> None:
    if width % BLOCK:
        raise ValueError(f"output width {width} is not a multiple of {BLOCK}, the size of an NVFP4 block")


def check_global_scale(global_scale: torch.Tensor, device: torch.device) -> None:
    if global_scale.numel() != 1 or global_scale.dtype != torch.float32:
        raise ValueError(
            f"global_scale is {global_scale.dtype} of shape {tuple(global_scale.shape)}; allowed: one float32 value"
        )
    if global_scale.device != device:
        raise ValueError(f"global_scale is on {global_scale.device}; allowed: x's device, {device}")


def empty_block_scales(x: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """Uninitialised swizzled scales of [rows, width] numbers: int32, four e4m3 a number, as vLLM's scaled_fp4_quant has it.

    Shape [rows rounded up to 128, blocks rounded up to 4, / 4]; `.view(torch.float8_e4m3fn)` is what its GEMMs take.
    """
    tiles = (-(-rows // TILE_ROWS), -(-(width // BLOCK) // TILE_BLOCKS))
    return x.new_empty((tiles[0] * TILE_ROWS, tiles[1]), dtype=torch.int32)


def swizzle_block_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales [rows, blocks] of one byte each -> swizzled int32, the padding zero."""
    rows, blocks = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -blocks % TILE_BLOCKS, 0, -rows % TILE_ROWS))
    tiles = padded.view(-1, 4, 32, padded.shape[1] // TILE_BLOCKS, TILE_BLOCKS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape).view(torch.int32)


def unswizzle_block_scales(swizzled: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """The inverse of `swizzle_block_scales`: e4m3 scales [rows, width / 16], without the padding."""
    tiles = swizzled.view(torch.uint8).view(swizzled.shape[0] // TILE_ROWS, -1, 32, 4, TILE_BLOCKS)
    linear = tiles.permute(0, 3, 2, 1, 4).reshape(swizzled.shape[0], -1)
    return linear[:rows, : width // BLOCK].contiguous().view(torch.float8_e4m3fn)


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> e2m1 codes 0 to 15 as uint8, rounded to nearest even and saturated; NaN becomes 6, as the hardware has it."""
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    # Halfway between two neighbours: to the even one, which is the lower one at every second boundary.
    for boundary, even_below in ((0.25, 1), (0.75, 0), (1.25, 1), (1.75, 0), (2.5, 1), (3.5, 0), (5.0, 1)):
        code += (magnitude > boundary) if even_below else (magnitude >= boundary)
    code += 8 * x.signbit()
    return torch.where(x.isnan(), 7, code)


def nvfp4_quant_reference(y: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, K] bf16 or fp16 -> packed codes [M, K / 2] uint8 and swizzled scales int32, in plain torch.

    Mirrors vLLM's `scaled_fp4_quant`, with exact reciprocals where the CUDA kernel has approximate ones.
    """
    rows, width = y.shape
    blocks = y.float().view(rows, width // BLOCK, BLOCK)
    global_scale = global_scale.reshape(())
    # The maximum ignores NaN, unless nothing else is there.
    all_nan = blocks.isnan().all(dim=-1)
    top = blocks.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dim=-1).masked_fill(all_nan, float("nan"))
    scale = (global_scale * (top * (1.0 / E2M1_MAX))).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    decoded = scale.float()
    multiplier = torch.where(decoded == 0, 0.0, (decoded * global_scale.reciprocal()).reciprocal())
    codes = e2m1(blocks * multiplier[..., None]).view(rows, width // 2, 2)
    return codes[..., 0] | (codes[..., 1] << 4), swizzle_block_scales(scale)
