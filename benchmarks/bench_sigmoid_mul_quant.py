# SPDX-License-Identifier: Apache-2.0
"""Attention's sigmoid gate + FP8 group quantiser against Inductor's product with vLLM's op after it, and Inductor alone.

python benchmarks/bench_sigmoid_mul_quant.py               # the grid, to results/sigmoid_mul_quant.json
"""

from __future__ import annotations

import grid
import torch
from producer import Producer, named, random_rows
from quantisers import Group

from vllm_fusion_plugin.kernels import sigmoid_mul_quant as kernels
from vllm_fusion_plugin.kernels import silu_mul_quant
from vllm_fusion_plugin.ops import sigmoid_mul_quant as ops


def product(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(gate)


class SigmoidMul(grid.Workload):
    op = "sigmoid_mul_group_fp8_quant"
    modes = ("tma,ue8m0", "column", "row", "packed,ue8m0")

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.quant = Group.of(mode)
        self.how = (self.quant.group_size, self.quant.ue8m0, self.quant.rounding())

    def inputs(self, rows: int, width: int, dtype: torch.dtype) -> grid.Tensors:
        x, gate = (torch.randn(rows, width, device="cuda", dtype=dtype) for _ in range(2))
        return x, gate, *self.quant.outputs(x, rows, width)

    def moved_bytes(self, rows: int, width: int) -> int:
        return 4 * rows * width + self.quant.moved_bytes(rows, width)

    def ours(self, tile, x, gate, codes, scales):
        kernels.sigmoid_mul_group_fp8_quant(x, gate, codes, scales, *self.how, tile)

    def others(self) -> dict[str, grid.Launch]:
        gated = grid.compiled(product)
        native = grid.compiled(lambda x, gate: self.quant.plain(product(x, gate)))

        def unfused(x, gate, codes, scales):
            self.quant.custom_op(gated(x, gate), codes, scales)

        def inductor(x, gate, codes, scales):
            native(x, gate)

        return {"unfused": unfused, "inductor": inductor}

    def tile(self, rows, width):
        return silu_mul_quant.group_tile(rows, width // self.quant.group_size, self.quant.group_size)


class SigmoidGate(Producer):
    """What exactness.py compares."""

    stem = "sigmoid_mul"
    forms = (("native", "custom_op"), ("native", "native"))
    widths = (2048, 4096, 8192)

    def inputs(self, rows, width, dtype, generator):
        return random_rows(rows, width, dtype, generator), random_rows(rows, width, dtype, generator)

    def native(self, x, gate):
        return product(x, gate), {}

    def ours(self, kind, inputs, form, **quant):
        return named(ops.sigmoid_mul_group_fp8_quant(*inputs, **quant))


if __name__ == "__main__":
    grid.main(__doc__, [SigmoidMul])
