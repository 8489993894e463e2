# SPDX-License-Identifier: Apache-2.0
"""Gated RMSNorm of heads + FP8 group quantiser against vLLM's separate ops and Inductor; H is heads times 128.

python benchmarks/bench_gated_rms_norm_quant.py            # the grid, to results/gated_rms_norm_quant.json
python benchmarks/bench_gated_rms_norm_quant.py --tune     # tiles by shape, best first
"""

from __future__ import annotations

import itertools

import grid
import torch
import torch.nn.functional as F
from producer import Producer, named, random_rows, random_weight
from quantisers import Group

from vllm_fusion_plugin.kernels import gated_rms_norm_quant as kernels
from vllm_fusion_plugin.ops import gated_rms_norm_quant as ops

HEAD_DIM = 128
WIDTHS = tuple(heads * HEAD_DIM for heads in (32, 16, 8))
EPSILON = 1e-6


class GatedRMSNormGroup(grid.Workload):
    op = "gated_rms_norm_group_fp8_quant"
    modes = ("column", "row", "tma,ue8m0", "group64")

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.quant = Group.of(mode)

    def inputs(self, rows: int, width: int, dtype: torch.dtype) -> grid.Tensors:
        x, z = torch.randn(2, rows, width // HEAD_DIM, HEAD_DIM, device="cuda", dtype=dtype)
        weight = torch.randn(HEAD_DIM, device="cuda", dtype=dtype)
        return x, z, weight, *self.quant.outputs(x, rows, width)

    def moved_bytes(self, rows: int, width: int) -> int:
        return 4 * rows * width + 2 * HEAD_DIM + self.quant.moved_bytes(rows, width)

    def others(self) -> dict[str, grid.Launch]:
        from vllm.third_party.flash_linear_attention.ops.layernorm_guard import rmsnorm_fn

        quant = self.quant

        def unfused(x, z, weight, codes, scales):
            y = rmsnorm_fn(x, weight, None, z=z, eps=EPSILON, norm_before_gate=True, activation="silu")
            quant.custom_op(y.view(codes.shape), codes, scales)

        def gated_rms_norm(x, z, weight):
            y, z = x.float(), z.float()
            y = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + EPSILON) * weight.float() * F.silu(z)
            return y.to(x.dtype).view(x.shape[0], -1)

        norm = grid.compiled(gated_rms_norm)

        def inductor_norm(x, z, weight, codes, scales):
            quant.custom_op(norm(x, z, weight), codes, scales)

        native = grid.compiled(lambda x, z, weight: quant.plain(gated_rms_norm(x, z, weight)))

        def inductor(x, z, weight, codes, scales):
            native(x, z, weight)

        return {"unfused": unfused, "inductor_norm": inductor_norm, "inductor": inductor}

    def tiles(self, rows, width):
        for parts, heads, tile_rows, rows_first in itertools.product(
            (1, 2, 4), (2, 4, 8, 16, 32), (1, 2, 4, 8), (False, True)
        ):
            # several parts: a thread's numbers are of one group, and still in registers
            if parts > 1 and (2 * parts > heads or parts * tile_rows > 8 or self.quant.group_size != HEAD_DIM):
                continue
            if heads * HEAD_DIM < 2 * width and tile_rows <= rows:
                yield kernels.Tile(tile_rows, heads, parts, rows_first)

    def tile(self, rows, width):
        return kernels.head_tile(rows, width // HEAD_DIM, HEAD_DIM)

    def ours(self, tile, x, z, weight, codes, scales):
        kernels.gated_rms_norm_group_fp8_quant(
            x,
            z,
            weight,
            codes,
            scales,
            EPSILON,
            x.shape[1],
            True,
            "silu",
            self.quant.group_size,
            self.quant.ue8m0,
            "native",
            self.quant.rounding(),
            tile,
        )


class GatedRMSNorm(Producer):
    """What exactness.py compares."""

    stem = "gated_rms_norm"
    forms = (("native", "custom_op"), ("native", "native"), ("eager", "custom_op"))
    widths = WIDTHS

    def inputs(self, rows, width, dtype, generator):
        shape = (rows, width // HEAD_DIM, HEAD_DIM)
        x, z = (random_rows(rows, width, dtype, generator).view(shape) for _ in range(2))
        return x, z, random_weight(HEAD_DIM, generator).to(dtype)

    def native(self, x, z, weight):
        from vllm.model_executor.layers.layernorm import RMSNormGated

        y = RMSNormGated.forward_static(x, z, weight, EPSILON, x.dtype, None, True, "silu")
        return y.reshape(x.shape[0], -1), {}

    def ours(self, kind, inputs, form, **quant):
        op = ops.gated_rms_norm_group_fp8_quant
        return named(op(*inputs, EPSILON, inputs[0].shape[1], norm_rounding=form, **quant))


if __name__ == "__main__":
    grid.main(__doc__, [GatedRMSNormGroup], widths=WIDTHS)
