# SPDX-License-Identifier: Apache-2.0
"""What a program of a kernel has of the rows, and the grid of all programs."""

from __future__ import annotations

from typing import NamedTuple


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, like its next_power_of_2, is for kernels too and takes a microsecond on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is n, from 1 on, or more."""
    return 1 << (n - 1).bit_length()


class GroupTile(NamedTuple):
    """What a program has of rows of groups."""

    rows: int
    groups: int
    num_warps: int
    rows_first: bool = False  # neighbouring programs have neighbouring rows, not columns
    scales_from_all: bool = True  # see quant.store_scales

    def fitting(self, rows: int, groups: int) -> GroupTile:
        """For `rows` rows: more of them instead of groups that a row of `groups` has not."""
        fitting = min(self.groups, next_power_of_2(groups))
        tile_rows = self.rows * self.groups // fitting
        along_rows = self.rows_first or cdiv(rows, tile_rows) > MAX_GRID_1
        return GroupTile(tile_rows, fitting, self.num_warps, along_rows, self.scales_from_all)

    def grid(self, rows: int, groups: int) -> tuple[tuple[int, int], GroupTileConstants]:
        """The grid over `rows` rows of `groups` groups, and what the kernel is compiled for."""
        grid, rows_first = tile_grid(cdiv(rows, self.rows), cdiv(groups, self.groups), self.rows_first)
        even = groups % self.groups == 0
        return grid, GroupTileConstants(self.rows, self.groups, rows_first, even, self.scales_from_all)


class GroupTileConstants(NamedTuple):
    """What kernels are compiled for, of a tile; TILE in kernels."""

    rows: int
    groups: int
    rows_first: bool
    even: bool  # every program has all its groups
    scales_from_all: bool


# Axis 0 of a grid alone may be longer.
MAX_GRID_1 = 65535


def tile_grid(row_tiles: int, column_tiles: int, rows_first: bool) -> tuple[tuple[int, int], bool]:
    """The grid, and whether its axis 0 goes along rows: as asked for, or because it has to."""
    rows_first = rows_first or row_tiles > MAX_GRID_1
    return ((row_tiles, column_tiles) if rows_first else (column_tiles, row_tiles)), rows_first
