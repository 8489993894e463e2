# SPDX-License-Identifier: Apache-2.0
"""MLA's two RMSNorms + q's FP8 quantiser against vLLM's fused and unfused ops and Inductor; H is q's width, kv has 512.

python benchmarks/bench_mla_dual_rms_norm_quant.py         # the grid, to results/mla_dual_rms_norm_quant.json
python benchmarks/bench_mla_dual_rms_norm_quant.py --tune  # tiles by shape, best first
"""

from __future__ import annotations

import itertools

import grid
import torch
from bench_rms_norm_quant import EPSILON, rms_norm
from producer import Producer, named, native_op, random_rows, random_weight
from quantisers import Group

from vllm_fusion_plugin.kernels import mla_dual_rms_norm_quant as kernels
from vllm_fusion_plugin.ops import mla_dual_rms_norm_quant as ops

WIDTHS = (1536,)  # DeepSeek-V3's; larger models of its kind have the same
KV, ROPE = 512, 64


def q_and_kv(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One projection gives q, kv and the part of k with a rotary embedding, side by side."""
    q, kv, _ = row.split((row.shape[1] - KV - ROPE, KV, ROPE), dim=1)
    return q, kv


def custom_op_norms(y, kv_normed, q, kv, q_weight, kv_weight) -> None:
    """vLLM's CUDA ops, which write y and kv_normed."""
    torch.ops._C.rms_norm(y, q, q_weight, EPSILON)
    torch.ops._C.rms_norm(kv_normed, kv, kv_weight, EPSILON)


class MLADualRMSNormGroup(grid.Workload):
    op = "mla_dual_rms_norm_group_fp8_quant"
    modes = ("column,native", "column", "row", "tma,ue8m0,native", "tma,ue8m0", "group64")

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.quant = Group.of(mode)
        self.how = (EPSILON, EPSILON, self.quant.group_size, self.quant.ue8m0, self.form, self.quant.rounding())

    def inputs(self, rows: int, width: int, dtype: torch.dtype) -> grid.Tensors:
        q, kv = q_and_kv(torch.randn(rows, width + KV + ROPE, device="cuda", dtype=dtype))
        weights = (torch.randn(n, device="cuda", dtype=dtype) for n in (width, KV))
        outputs = (q.new_empty(rows, width), q.new_empty(rows, KV))
        return q, kv, *weights, *outputs, *self.quant.outputs(q, rows, width)

    def moved_bytes(self, rows: int, width: int) -> int:
        return 2 * (rows * width + width) + 2 * (2 * rows * KV + KV) + self.quant.moved_bytes(rows, width)

    def ours(self, tile, q, kv, q_weight, kv_weight, y, kv_normed, codes, scales):
        outputs = (codes, scales, kv_normed)
        kernels.mla_dual_rms_norm_group_fp8_quant(q, kv, q_weight, kv_weight, *outputs, *self.how, tile)

    def others(self) -> dict[str, grid.Launch]:
        quant = self.quant

        def unfused(q, kv, q_weight, kv_weight, y, kv_normed, codes, scales):
            custom_op_norms(y, kv_normed, q, kv, q_weight, kv_weight)
            quant.custom_op(y, codes, scales)

        def stock_fused(q, kv, q_weight, kv_weight, y, kv_normed, codes, scales):
            group = (quant.group_size, quant.column_major)
            torch.ops._C.rms_norm_per_block_quant(codes, q, q_weight, scales, EPSILON, None, None, *group)
            torch.ops._C.rms_norm(kv_normed, kv, kv_weight, EPSILON)

        def norms(q, kv, q_weight, kv_weight):
            return rms_norm(q, None, q_weight, False)[0], rms_norm(kv, None, kv_weight, False)[0]

        native_norms = grid.compiled(norms)

        def inductor_norm(q, kv, q_weight, kv_weight, y, kv_normed, codes, scales):
            quant.custom_op(native_norms(q, kv, q_weight, kv_weight)[0], codes, scales)

        def norms_quant(*inputs):
            y, kv_normed = norms(*inputs)
            return quant.plain(y), kv_normed

        native = grid.compiled(norms_quant)

        def inductor(q, kv, q_weight, kv_weight, y, kv_normed, codes, scales):
            native(q, kv, q_weight, kv_weight)

        impls = {"unfused": unfused, "inductor_norm": inductor_norm, "inductor": inductor}
        if not quant.ue8m0:  # stock's op knows no UE8M0: it would write other scales
            impls["stock_fused"] = stock_fused
        return impls

    def tiles(self, rows, width):
        # all with the bytes of Inductor's order
        for tile_rows, warps in itertools.product((1, 2, 4), (8, 4)):
            if tile_rows <= rows:
                yield kernels.Tile(tile_rows, 2048, warps, 8)

    def tile(self, rows, width):
        return kernels.dual_tile(width, KV, native_quant=False)


class MLADualRMSNorm(Producer):
    """What exactness.py compares."""

    stem = "mla_dual_rms_norm"
    widths = WIDTHS

    def inputs(self, rows, width, dtype, generator):
        q, kv = q_and_kv(random_rows(rows, width + KV + ROPE, dtype, generator))
        return q, kv, *(random_weight(n, generator).to(dtype) for n in (width, KV))

    def native(self, q, kv, q_weight, kv_weight):
        norm = native_op("rms_norm")
        return norm(q, q_weight, EPSILON), {"kv_normed": norm(kv, kv_weight, EPSILON)}

    def custom_op(self, q, kv, q_weight, kv_weight):
        y, kv_normed = (t.new_empty(t.shape) for t in (q, kv))
        custom_op_norms(y, kv_normed, q, kv, q_weight, kv_weight)
        return y, {"kv_normed": kv_normed}

    def ours(self, kind, inputs, form, **quant):
        op = ops.mla_dual_rms_norm_group_fp8_quant
        return named(op(*inputs, EPSILON, EPSILON, norm_rounding=form, **quant), "kv_normed")


if __name__ == "__main__":
    grid.main(__doc__, [MLADualRMSNormGroup], widths=WIDTHS)
