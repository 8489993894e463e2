# SPDX-License-Identifier: Apache-2.0
"""The order in which the squares of a row are added, which is Inductor's, and the tiles of norm kernels, which decide on it.

docs/notes/inductor-norms.md says what Inductor does.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .backend import BACKEND
from .tiles import next_power_of_2

# Up to here Inductor keeps a row in one warp and adds up its squares with fma; see row_tile.
WARP_WIDTH = tl.constexpr(1024)


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


# From so many elements on memory is busy throughout, whatever comes first.
LARGE = 2**23


class Tile(NamedTuple):
    """What a program of a norm kernel has of the rows, and in which order it adds up their squares."""

    rows: int
    chunk: int
    num_warps: int
    sum_warps: int = 0  # see row_sums; a multiple of num_warps, up to 4 times that
    early: bool = True  # weights are loaded before rows are: see row_norm.load_weights

    def constants(self) -> TileConstants:
        fold = max(1, self.sum_warps // self.num_warps)
        return TileConstants(self.rows, self.chunk, self.sum_warps, fold, self.early)


class TileConstants(NamedTuple):
    """What kernels are compiled for, of a tile; TILE in kernels. (Triton hands over a tuple's fields, and no properties.)"""

    rows: int
    chunk: int
    sum_warps: int
    fold: int  # how many of Inductor's warps one of the kernel's stands for
    early: bool


def row_tile(width: int, native_quant: bool, many_loads: bool = False, sum_columns: int = 0) -> Tile:
    """Tile for rows of `width`, never for a number of them: the order in which a row's squares are added, and with it the
    row's bytes, comes from chunk and num_warps. `folded` may run it with fewer.

    That order is Inductor's: 8 columns a thread, or as many as there are, chunks one onto the other, then within a thread, a
    warp, the block. Inductor has one order up to 2048 columns and before a native group quantiser. Otherwise it times two
    or three and takes the fastest, all with 16 warps (32 above 8192 columns): the whole row as one chunk, as here before
    vLLM's own quantisers; 2048 columns at a time, as here before native ones and always under Inductor's `deterministic`; or
    half a row. many_loads: its kernel has 10 loads and reductions or more, and small chunks for want of registers.
    sum_columns: 1024 for such a kernel, 2048 for another one that takes 2048 columns at a time, where more are the rule.
    """
    whole = max(256, next_power_of_2(width))
    if width <= WARP_WIDTH.value:
        return Tile(1, whole, 1)
    if many_loads or sum_columns == 1024:
        return Tile(1, 1024, 4 if width <= 2048 else 8)
    if width <= 2048:
        return Tile(1, whole, 8)
    if native_quant or whole > 16384 or sum_columns == 2048:
        return Tile(1, 2048, 16)
    return Tile(1, whole, 16 if whole <= 8192 else 32)


def folded(tile: Tile, rows: int, add: bool, most: int = 4) -> Tile:
    """`tile` with fewer warps, up to `most` times, that add up in its order; for `rows` rows, with a residual or without.

    Tuned on an H200 (benchmarks/bench_rms_norm_quant.py --tune). Many rows with a residual keep memory busy anyhow. With
    AMD's 64 threads a warp the order is that of Inductor's kernel as it comes, for the same threads have the same columns
    (tests/compile/test_amd_kernels.py): nothing is folded.
    """
    warps = tile.num_warps
    if BACKEND == "hip" or warps < 8 or tile.chunk < 256 * warps or (add and rows * tile.chunk >= LARGE):
        return tile
    few_wide = add and rows <= 16 and tile.chunk == 8192  # 2.33 µs with 8 warps, 2.38 with 4 or 16
    return Tile(tile.rows, tile.chunk, warps // min(most, 2 if warps == 8 or few_wide else 4), warps)


def tile_of(
    rows: int, width: int, native_quant: bool, many_loads: bool, sum_columns: int, add: bool, most_fold: int
) -> Tile:
    """Tile for `rows` rows of `width`: `row_tile`, `folded`, and whether weights are loaded early."""
    tile = folded(row_tile(width, native_quant, many_loads, sum_columns), rows, add, most_fold)
    return Tile(tile.rows, tile.chunk, tile.num_warps, tile.sum_warps, early=rows * width < LARGE)
