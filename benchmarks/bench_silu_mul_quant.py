# SPDX-License-Identifier: Apache-2.0
"""SiLU·mul + FP8 quantiser against vLLM's fused op, vLLM's two separate ops and Inductor.

python benchmarks/bench_silu_mul_quant.py                  # the grid, to results/silu_mul_quant.json
python benchmarks/bench_silu_mul_quant.py --tune           # tiles by shape, best first
python benchmarks/bench_silu_mul_quant.py --modes row,ue8m0,experts --widths 512 768 1536 2048 --rows 1 32 128 1024 8192
                                                           # between the GEMMs of experts; rows are tokens

Words of a mode, besides the quantiser's: `native` (what Inductor makes of vLLM's SiLU·mul; without it vLLM's op), `experts`
(rows are tokens, each of several experts) and, where there are no groups, `native_quant` (the quantiser in plain torch code,
too).
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import grid
import timing
import torch
import torch.nn.functional as F
from producer import Producer, named, random_rows
from quantisers import Group, Static, Token

from vllm_fusion_plugin.kernels import cuda_library
from vllm_fusion_plugin.kernels import silu_mul_quant as kernels
from vllm_fusion_plugin.ops import silu_mul_quant as ops


def silu_and_mul(y: torch.Tensor, x: torch.Tensor) -> None:
    """vLLM's CUDA op, which writes y."""
    torch.ops._C.silu_and_mul(y, x)


# Width of an expert -> experts a token: Qwen3-Next, Qwen3-30B-A3B, Qwen3-235B-A22B, DeepSeek-V3. Mode `experts` has these.
EXPERTS = {512: 10, 768: 8, 1536: 8, 2048: 8}


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """As vLLM's native layer computes it."""
    half = x.shape[-1] // 2
    return F.silu(x[:, :half]) * x[:, half:]


class SiluMulWorkload(grid.Workload):
    """Common to all: SiLU·mul, then one of the quantisers."""

    quantiser: ClassVar[Any]

    @classmethod
    def of(cls, mode: str) -> list[grid.Workload]:
        if "experts" not in mode.split(","):
            return [cls(mode)]
        return [cls(mode, experts) for experts in sorted(set(EXPERTS.values()))]

    def __init__(self, mode: str, experts: int = 1) -> None:
        super().__init__(mode)
        self.quant = self.quantiser.of(mode)
        self.experts = experts
        """How many rows of the op a row of the grid, which is a token, has."""

    def widths(self, asked: Sequence[int]) -> Sequence[int]:
        return [w for w in asked if EXPERTS.get(w) == self.experts] if "experts" in self.words else asked

    def fields(self) -> dict[str, Any]:
        return {"experts": self.experts} if "experts" in self.words else {}

    def inputs(self, rows: int, width: int, dtype: torch.dtype) -> grid.Tensors:
        rows *= self.experts
        x = torch.randn(rows, 2 * width, device="cuda", dtype=dtype)
        return x, x.new_empty((rows, width)), *self.quant.outputs(x, rows, width)

    def moved_bytes(self, rows: int, width: int) -> int:
        rows *= self.experts
        return 4 * rows * width + self.quant.moved_bytes(rows, width)

    def others(self) -> dict[str, grid.Launch]:
        def unfused(x, y, codes, scales):
            silu_and_mul(y, x)
            self.quant.custom_op(y, codes, scales)

        native = grid.compiled(lambda x, scale: self.quant.plain(silu_mul(x), scale))
        given = isinstance(self.quant, Static)

        def inductor(x, y, codes, scales):
            native(x, scales if given else None)

        return {"unfused": unfused, "inductor": inductor}


class SiluMulGroup(SiluMulWorkload):
    op = "silu_mul_group_fp8_quant"
    modes = ("column,native", "row", "column", "tma,ue8m0", "packed,ue8m0", "group64", "row,ue8m0,experts")
    quantiser = Group

    def __init__(self, mode: str, experts: int = 1) -> None:
        super().__init__(mode, experts)
        self.how = (self.quant.group_size, self.quant.ue8m0, self.form, self.quant.rounding())

    def ours(self, tile, x, y, codes, scales):
        kernels.silu_mul_group_fp8_quant(x, codes, scales, *self.how, tile)

    def others(self) -> dict[str, grid.Launch]:
        quant = self.quant

        def stock_fused(x, y, codes, scales):
            group = (quant.group_size, None, quant.column_major)
            torch.ops._C.silu_and_mul_per_block_quant(codes, x, scales, *group)

        library = cuda_library.load()
        written: collections.deque[list[torch.Tensor]] = collections.deque(maxlen=timing.SMALL_SETS)

        def ours_cuda(x, y, codes, scales):
            # The op allocates its outputs: those of so many calls are kept, to go round as many as the others do.
            written.append(in_cuda(x, *quant.scales, self.form, quant.rounding()))

        cuda = {}
        if library is not None and self.op in library.ops:
            in_cuda = getattr(getattr(torch.ops, cuda_library.NAMESPACE), self.op).default
            cuda = {"ours_cuda": ours_cuda}

        # Stock's op knows no UE8M0: it writes other scales, which is what vLLM's experts do where UE8M0 is off.
        other_scales = quant.ue8m0 and "experts" not in self.words
        return super().others() | cuda | ({} if other_scales else {"stock_fused": stock_fused})

    def tiles(self, rows, width):
        rows *= self.experts
        size = self.quant.group_size
        for tile_groups, tile_rows, warps, rows_first in itertools.product(
            (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (False, True)
        ):
            per_thread = tile_groups * tile_rows * size / (32 * warps)
            if 4 <= per_thread <= 32 and tile_groups * 2 <= 3 * (width // size) and tile_rows <= rows:
                yield kernels.Tile(tile_rows, tile_groups, warps, rows_first)

    def tile(self, rows, width):
        return kernels.group_tile(rows * self.experts, width // self.quant.group_size, self.quant.group_size)


class SiluMulOneScale(SiluMulWorkload):
    """With one scale a token or tensor."""

    modes = ("native,native_quant", "native", "custom_op")

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.how = (self.form, "native" if "native_quant" in self.words else "custom_op")


class SiluMulToken(SiluMulOneScale):
    op = "silu_mul_token_fp8_quant"
    quantiser = Token

    def ours(self, tile, x, y, codes, scales):
        kernels.silu_mul_token_fp8_quant(x, None, codes, scales, *self.how, tile)

    def tiles(self, rows, width):
        for warps, columns in itertools.product((1, 2, 4, 8, 16, 32), (4, 8, 16)):
            chunk = 32 * warps * columns
            if 8 <= width / (32 * warps) <= 128 and chunk < 2 * width:
                yield kernels.RowTile(chunk, warps)

    def tile(self, rows, width):
        return kernels.row_tile(rows, width)


class SiluMulStatic(SiluMulOneScale):
    op = "silu_mul_static_fp8_quant"
    quantiser = Static

    def ours(self, tile, x, y, codes, scale):
        kernels.silu_mul_static_fp8_quant(x, scale, codes, *self.how)

    def others(self) -> dict[str, grid.Launch]:
        def stock_fused(x, y, codes, scale):
            torch.ops._C.silu_and_mul_quant(codes, x, scale)

        return super().others() | {"stock_fused": stock_fused}


class SiluMul(Producer):
    """What exactness.py compares."""

    stem = "silu_mul"
    kinds = ("group", "token", "static")

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
    grid.main(__doc__, [SiluMulGroup, SiluMulToken, SiluMulStatic])
