# SPDX-License-Identifier: Apache-2.0
"""MLA's value up-projection (512 to 128 numbers a head) + FP8 group quantiser against vLLM's bmm and quantiser; H is heads.

python benchmarks/bench_mla_v_up_quant.py                  # the grid, to results/mla_v_up_quant.json
python benchmarks/bench_mla_v_up_quant.py --tune           # tiles by shape, best first
"""

from __future__ import annotations

import itertools

import grid
import torch
from quantisers import Group

from vllm_fusion_plugin.kernels import mla_v_up_quant as kernels
from vllm_fusion_plugin.ops.mla_v_up_quant import scale_padding

HEADS = (128, 64, 32, 16, 8)  # DeepSeek-V3's, whole and sharded
L, P, V = 512, 128, 128
SHARED = 227 * 1024  # what a program can have on Hopper
# What exactness.py compares, for each of HEADS
EXACTNESS_MODES = ("column", "column,input_first", "group64")
EXACTNESS_TOKENS = (1, 2, 8, 16, 32, 64, 100, 128, 512, 2048, 8192)


class MLAVUp(grid.Workload):
    op = "mla_v_up_group_fp8_quant"
    # input_first: weights as vLLM has them if kv_b_proj runs on DeepGEMM; otherwise they lie output first
    modes = ("column", "tma,ue8m0,input_first", "column,input_first", "group64")

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.quant = Group.of(mode)

    def inputs(self, rows: int, width: int, dtype: torch.dtype) -> grid.Tensors:
        x = torch.randn(rows, width, L, device="cuda", dtype=dtype)
        if "input_first" in self.words:
            kv = torch.randn(L, width, P + V, device="cuda", dtype=dtype)
        else:
            kv = torch.randn(width, P + V, L, device="cuda", dtype=dtype).permute(2, 0, 1)
        return x, kv[:, :, P:].transpose(0, 1), x.new_empty(rows, width * V), *self.quant.outputs(x, rows, width * V)

    def moved_bytes(self, rows: int, width: int) -> int:
        return 2 * width * L * (rows + V) + self.quant.moved_bytes(rows, width * V)

    def input_sets(self, rows: int, width: int, dtype: torch.dtype) -> list[grid.Tensors]:
        # However small: in a model, all other layers come between two uses of a layer's weights, so L2 has none of them.
        count = max(4, -(-256 * 2**20 // self.moved_bytes(rows, width)))
        return [self.inputs(rows, width, dtype) for _ in range(count)]

    def others(self) -> dict[str, grid.Launch]:
        quant = self.quant

        def unfused(x, w, y, codes, scales):
            torch.bmm(x.transpose(0, 1), w, out=y.view(len(x), -1, V).transpose(0, 1))
            quant.custom_op(y, codes, scales)

        return {"unfused": unfused}

    def tiles(self, rows, width):
        for tokens in (16, 32, 64, 128, 256):
            if (tokens > 16 and tokens >= 2 * rows) or 16 * tokens < min(rows, 1024):
                continue
            few = tokens < 64
            for columns, swap, warps, depth, share, persistent in itertools.product(
                (64, 128) if self.quant.group_size == 64 and few else (128,),
                (False, True) if few else (False,),
                (4, 8) if few else (4,) if tokens == 64 else (8,),
                (64, 128, 256) if tokens == 16 else (64, 128) if tokens < 256 else (64,),
                (1,) if few or tokens == 256 else (1, 2),  # programs to a multiprocessor
                (False,) if few else (False, True),
            ):
                stages = (SHARED // share - 1024 - tokens * columns * persistent) // (2 * depth * (tokens + columns))
                stages = min(stages, L // depth + 1)
                if stages >= 2:
                    yield kernels.Tile(tokens, columns, depth, stages, warps, swap, True, persistent)

    def tile(self, rows, width):
        return kernels.group_tile(rows, width, V, self.quant.group_size)

    def ours(self, tile, x, w, y, codes, scales):
        quant = self.quant
        kernels.mla_v_up_group_fp8_quant(
            x, w, codes, scales, scale_padding(scales), quant.group_size, quant.ue8m0, quant.rounding(), tile
        )


if __name__ == "__main__":
    grid.main(__doc__, [MLAVUp], widths=HEADS)
