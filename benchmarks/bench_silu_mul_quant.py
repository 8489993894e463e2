# SPDX-License-Identifier: Apache-2.0
"""SiLU·mul + FP8 quantiser against vLLM's fused op, vLLM's two separate ops and Inductor.

python benchmarks/bench_silu_mul_quant.py                  # the grid, to results/silu_mul_quant.json
python benchmarks/bench_silu_mul_quant.py --tune           # tiles by shape, best first
"""

from __future__ import annotations

import itertools

import grid
import torch
import torch.nn.functional as F
from producer import Producer, named, random_rows
from quantisers import Group

from vllm_fusion_plugin.kernels import silu_mul_quant as kernels
from vllm_fusion_plugin.ops import silu_mul_quant as ops


def silu_and_mul(y: torch.Tensor, x: torch.Tensor) -> None:
    """vLLM's CUDA op, which writes y."""
    torch.ops._C.silu_and_mul(y, x)


class SiluMulGroup(grid.Workload):
    op = "silu_mul_group_fp8_quant"
    modes = ("column,native", "row", "column", "tma,ue8m0", "packed,ue8m0", "group64")

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.quant = Group.of(mode)
        self.how = (self.quant.group_size, self.quant.ue8m0, self.form, self.quant.rounding())

    def inputs(self, rows: int, width: int, dtype: torch.dtype) -> grid.Tensors:
        x = torch.randn(rows, 2 * width, device="cuda", dtype=dtype)
        return x, x.new_empty((rows, width)), *self.quant.outputs(x, rows, width)

    def moved_bytes(self, rows: int, width: int) -> int:
        return 4 * rows * width + self.quant.moved_bytes(rows, width)

    def ours(self, tile, x, y, codes, scales):
        kernels.silu_mul_group_fp8_quant(x, codes, scales, *self.how, tile)

    def others(self) -> dict[str, grid.Launch]:
        quant = self.quant

        def unfused(x, y, codes, scales):
            silu_and_mul(y, x)
            quant.custom_op(y, codes, scales)

        def stock_fused(x, y, codes, scales):
            group = (quant.group_size, None, quant.column_major)
            torch.ops._C.silu_and_mul_per_block_quant(codes, x, scales, *group)

        def silu_mul(x):
            half = x.shape[-1] // 2
            return F.silu(x[:, :half]) * x[:, half:]

        native = grid.compiled(lambda x: quant.plain(silu_mul(x)))

        def inductor(x, y, codes, scales):
            native(x)

        impls = {"unfused": unfused, "inductor": inductor}
        if not quant.ue8m0:  # stock's op knows no UE8M0: it would write other scales
            impls["stock_fused"] = stock_fused
        return impls

    def tiles(self, rows, width):
        size = self.quant.group_size
        for tile_groups, tile_rows, warps, rows_first in itertools.product(
            (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (False, True)
        ):
            per_thread = tile_groups * tile_rows * size / (32 * warps)
            if 4 <= per_thread <= 32 and tile_groups * 2 <= 3 * (width // size) and tile_rows <= rows:
                yield kernels.Tile(tile_rows, tile_groups, warps, rows_first)

    def tile(self, rows, width):
        return kernels.group_tile(rows, width // self.quant.group_size, self.quant.group_size)


class SiluMul(Producer):
    """What exactness.py compares."""

    stem = "silu_mul"
    kinds = ("group", "static")

    def inputs(self, rows, width, dtype, generator):
        return (random_rows(rows, 2 * width, dtype, generator),)

    def native(self, x):
        from vllm.model_executor.layers.activation import SiluAndMul

        return SiluAndMul.forward_native(x), {}

    def custom_op(self, x):
        y = x.new_empty((x.shape[0], x.shape[1] // 2))
        silu_and_mul(y, x)
        return y, {}

    def ours(self, kind, inputs, form, **quant):
        return named(getattr(ops, self.op(kind))(*inputs, act_rounding=form, **quant))


if __name__ == "__main__":
    grid.main(__doc__, [SiluMulGroup])
