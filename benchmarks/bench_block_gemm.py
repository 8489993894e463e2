# SPDX-License-Identifier: Apache-2.0
"""vLLM's default block GEMM on Hopper against this package's quantiser and the same GEMM for FP8 input; H is K.

python benchmarks/bench_block_gemm.py                          # both, to results/block_gemm.json
python benchmarks/bench_block_gemm.py --modes tma,ue8m0 gemm   # and the GEMM alone
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grid
import torch
from quantisers import Group

from vllm_fusion_plugin.ops import block_gemm, group_quant
from vllm_fusion_plugin.ops.quant import FP8_DTYPE

# Columns and width of the weights of Qwen3-8B, and of DeepSeek-V3's shared experts and dense layers (down).
SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (7168, 2048), (7168, 18432))
# FlashInfer's kernel runs up to 31 rows, DeepGEMM's from 32 on.
ROWS = (1, 2, 4, 8, 16, 31, 32, 64, 128, 512, 2048, 8192)
SIZE = block_gemm.GROUP_SIZE


class BlockGemm(grid.Workload):
    """For one number of columns. Both implementations allocate what they write, inside of the CUDA graph."""

    op = "block_fp8_gemm"
    # gemm: on codes and scales, which a fused op has written
    modes = ("tma,ue8m0", "gemm")

    @classmethod
    def of(cls, mode: str) -> list[grid.Workload]:
        return [cls(mode, columns) for columns in dict.fromkeys(columns for columns, _ in SHAPES)]

    def __init__(self, mode: str, columns: int) -> None:
        super().__init__(mode)
        self.columns = columns
        self.quant = Group.of(self.modes[0])
        self.rounding = self.quant.rounding("split")
        self.alone = mode == "gemm"

    def widths(self, asked: Sequence[int]) -> Sequence[int]:
        return [width for width in asked if (self.columns, width) in SHAPES]

    def fields(self) -> dict[str, Any]:
        return {"N": self.columns}

    def inputs(self, rows: int, width: int, dtype: torch.dtype) -> grid.Tensors:
        x = torch.randn(rows, width, device="cuda", dtype=dtype)
        weight = torch.randn(self.columns, width, device="cuda", dtype=torch.bfloat16).to(FP8_DTYPE)
        exponents = torch.randn(self.columns // SIZE, width // SIZE, device="cuda").round()
        quantised = self.quantised(x) if self.alone else (x,)
        return *quantised, weight, torch.exp2(exponents - 6)

    def moved_bytes(self, rows: int, width: int) -> int:
        weights = self.columns * width + self.columns // SIZE * (width // SIZE) * 4
        read = self.quant.moved_bytes(rows, width) if self.alone else 2 * rows * width
        return read + weights + 2 * rows * self.columns

    def quantised(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return group_quant.group_fp8_quant(x, self.quant.scales, quant_rounding=self.rounding)

    def product(self, *inputs: torch.Tensor) -> torch.Tensor:
        codes, scales, weight, weight_scales = inputs if self.alone else (*self.quantised(inputs[0]), *inputs[1:])
        return block_gemm.block_fp8_gemm(codes, scales, weight, weight_scales, use_ue8m0=self.quant.ue8m0)

    def ours(self, tile, *inputs):
        self.product(*inputs)

    def others(self) -> dict[str, grid.Launch]:
        return {} if self.alone else {"unfused": self.replaced}

    def replaced(self, x: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
        import vllm.model_executor.kernels.linear.scaled_mm.flashinfer  # noqa: F401  registers the op

        gemm = torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm
        return gemm(x, weight, weight_scales, SIZE, self.quant.ue8m0)

    def compared(self, sets: list[grid.Tensors]) -> dict[str, Any]:
        if self.alone:
            return {}
        elements = differ = 0
        for inputs in sets:
            one, other = self.product(*inputs).view(torch.int16), self.replaced(*inputs).view(torch.int16)
            elements += one.numel()
            differ += int((one != other).sum())
        return {"elements": elements, "elements_differ": differ}


if __name__ == "__main__":
    widths = tuple(dict.fromkeys(width for _, width in SHAPES))
    grid.main(__doc__, [BlockGemm], widths, ROWS)
