# SPDX-License-Identifier: Apache-2.0
"""The FP8 group quantiser by itself against vLLM's op and Inductor.

python benchmarks/bench_group_quant.py                     # the grid, to results/group_quant.json
python benchmarks/bench_group_quant.py --tune              # tiles by shape, best first
"""

from __future__ import annotations

import itertools

import grid
import torch
from producer import Producer, named, random_rows
from quantisers import Group

from vllm_fusion_plugin.kernels import group_quant as kernels
from vllm_fusion_plugin.ops import group_quant as ops


class GroupQuant(grid.Workload):
    op = "group_fp8_quant"
    modes = ("column", "row", "tma,ue8m0", "packed,ue8m0", "group64")

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.quant = Group.of(mode)
        self.how = (self.quant.group_size, self.quant.ue8m0, self.quant.rounding())

    def inputs(self, rows: int, width: int, dtype: torch.dtype) -> grid.Tensors:
        x = torch.randn(rows, width, device="cuda", dtype=dtype)
        return x, *self.quant.outputs(x, rows, width)

    def moved_bytes(self, rows: int, width: int) -> int:
        return 2 * rows * width + self.quant.moved_bytes(rows, width)

    def ours(self, tile, x, codes, scales):
        kernels.group_fp8_quant(x, codes, scales, *self.how, tile)

    def others(self) -> dict[str, grid.Launch]:
        native = grid.compiled(self.quant.plain)

        def inductor(x, codes, scales):
            native(x)

        return {"unfused": self.quant.custom_op, "inductor": inductor}

    def tiles(self, rows, width):
        size = self.quant.group_size
        for tile_groups, tile_rows, warps, rows_first in itertools.product(
            (1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4, 8, 16), (False, True)
        ):
            per_thread = tile_groups * tile_rows * size / (32 * warps)
            if 4 <= per_thread <= 64 and tile_groups * 2 <= 3 * (width // size) and tile_rows <= rows:
                yield kernels.Tile(tile_rows, tile_groups, warps, rows_first)

    def tile(self, rows, width):
        return kernels.group_tile(rows, width // self.quant.group_size, self.quant.group_size)


class Nothing(Producer):
    """What exactness.py compares: nothing comes before the quantiser."""

    forms = (("", "custom_op"), ("", "native"))

    def op(self, kind: str) -> str:
        return f"{kind}_fp8_quant"

    def inputs(self, rows, width, dtype, generator):
        return (random_rows(rows, width, dtype, generator),)

    def native(self, x):
        return x, {}

    def ours(self, kind, inputs, form, **quant):
        return named(ops.group_fp8_quant(*inputs, **quant))


if __name__ == "__main__":
    grid.main(__doc__, [GroupQuant])
