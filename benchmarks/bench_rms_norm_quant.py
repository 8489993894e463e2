# SPDX-License-Identifier: Apache-2.0
"""RMSNorm, with and without a residual added first, + FP8 quantiser against vLLM's fused and unfused ops and Inductor.

python benchmarks/bench_rms_norm_quant.py                  # the grid, to results/rms_norm_quant.json
python benchmarks/bench_rms_norm_quant.py --tune           # tiles by shape, best first

Words of a mode, besides the quantiser's: `native` (what Inductor makes of vLLM's norm; without it vLLM's op), `gemma` (fp32
weight, to which 1 is added), `keep_norm` (the normed rows are an output too), `add` (residual; the group op has it by name).
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from typing import Any, ClassVar

import grid
import torch
from producer import Producer, named, native_op, random_rows, random_weight
from quantisers import Group, Static, Token

from vllm_fusion_plugin.kernels import rms_norm_quant as kernels
from vllm_fusion_plugin.kernels.rounding import is_native
from vllm_fusion_plugin.kernels.row_order import Tile, folded, row_tile
from vllm_fusion_plugin.ops import rms_norm_quant as ops
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs

EPSILON = 1e-6
# vLLM's ops add to the residual in place, replay after replay. With x and weight so much smaller than the residual, that has
# not doubled by the end of a measurement.
SMALL = 2.0**-6


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normed rows and x + residual, as vLLM's native layer computes them: what the benchmarks let Inductor compile."""
    s = x.float() if residual is None else x.float() + residual.float()
    y = s * torch.rsqrt(s.pow(2).mean(dim=-1, keepdim=True) + EPSILON)
    if gemma:
        weight = weight.float() + 1.0
    return (y.to(weight.dtype) * weight).to(x.dtype), None if residual is None else s.to(x.dtype)


def custom_op_norm(
    y: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor
) -> torch.Tensor:
    """Normed rows, by vLLM's CUDA ops. Without a residual they are written to y. With one they are written to x, and
    the sum to the residual."""
    if residual is None:
        torch.ops._C.rms_norm(y, x, weight, EPSILON)
        return y
    torch.ops._C.fused_add_rms_norm(x, residual, weight, EPSILON)
    return x


class RMSNormWorkload(grid.Workload):
    """Common to all: a norm, then one of the quantisers."""

    quantiser: ClassVar[Any]

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.quant = self.quantiser.of(mode)
        self.add = self.op.startswith("add_") or "add" in self.words
        self.gemma = "gemma" in self.words
        self.keep_norm = "keep_norm" in self.words

    def inputs(self, rows: int, width: int, dtype: torch.dtype) -> grid.Tensors:
        residual = torch.randn(rows, width, device="cuda", dtype=dtype)
        x = torch.randn_like(residual) * SMALL
        weight = torch.randn(width, device="cuda", dtype=torch.float32 if self.gemma else dtype) * SMALL
        buffers = (torch.empty_like(x), torch.empty_like(x) if self.add else None)
        return x, residual if self.add else None, weight, *buffers, *self.quant.outputs(x, rows, width)

    def moved_bytes(self, rows: int, width: int) -> int:
        # x, the residual read and written, the normed rows; the weight
        each = 2 + (4 if self.add else 0) + (2 if self.keep_norm else 0)
        return each * rows * width + (4 if self.gemma else 2) * width + self.quant.moved_bytes(rows, width)

    def ours(self, tile, x, residual, weight, y, residual_out, codes, scales):
        norm = NormInputs(x, weight, EPSILON, residual, self.gemma, self.keep_norm, norm_rounding=self.form)
        self.launch(norm, codes, scales, (y if self.keep_norm else None, residual_out), tile)

    @abstractmethod
    def launch(self, norm: NormInputs, codes, scales, extras, tile) -> None:
        """Our kernel. extras: normed and residual_out, or None."""

    @abstractmethod
    def stock_fused(self, x, residual, weight, y, residual_out, codes, scales):
        """vLLM's fused op."""

    def others(self) -> dict[str, grid.Launch]:
        quant, gemma, keep_norm = self.quant, self.gemma, self.keep_norm

        def unfused(x, residual, weight, y, residual_out, codes, scales):
            quant.custom_op(custom_op_norm(y, x, residual, weight), codes, scales)

        norm = grid.compiled(lambda x, residual, weight: rms_norm(x, residual, weight, gemma))

        def inductor_norm(x, residual, weight, y, residual_out, codes, scales):
            quant.custom_op(norm(x, residual, weight)[0], codes, scales)

        def norm_quant(x, residual, weight, scales):
            y, s = rms_norm(x, residual, weight, gemma)
            return quant.plain(y, scales), s, y if keep_norm else None

        native = grid.compiled(norm_quant)

        def inductor(x, residual, weight, y, residual_out, codes, scales):
            native(x, residual, weight, scales if self.quantiser is Static else None)

        impls = {"inductor_norm": inductor_norm, "inductor": inductor}
        if not gemma:  # vLLM's ops take a weight of x's dtype only
            impls["unfused"] = unfused
            # nor do its fused ones keep the normed rows, or know UE8M0
            if not keep_norm and "ue8m0" not in self.words:
                impls["stock_fused"] = self.stock_fused
        return impls

    def tiles(self, rows, width):
        if width <= 1024:
            return
        # all with the bytes of Inductor's usual order
        whole = 2 ** (width - 1).bit_length()
        sum_warps = 8 if whole == 2048 else 16 if whole <= 8192 else 32
        for tile_rows, fold in itertools.product((1, 2, 4), (1, 2, 4)):
            warps = sum_warps // fold
            if tile_rows <= rows and tile_rows * whole <= 64 * 32 * warps:
                yield Tile(tile_rows, whole, warps, sum_warps)

    def tile(self, rows, width):
        return folded(row_tile(width, native_quant=False), rows, self.add)


class RMSNormGroup(RMSNormWorkload):
    op = "rms_norm_group_fp8_quant"
    modes = (
        "column,native",
        "column",
        "row",
        "tma,ue8m0,native",
        "tma,ue8m0",
        "group64",
        "column,native,gemma",
        "column,native,keep_norm",
        "column,native,gemma,keep_norm",
    )
    quantiser = Group

    def launch(self, norm, codes, scales, extras, tile):
        how = (self.quant.group_size, self.quant.ue8m0, self.quant.rounding())
        kernels.rms_norm_group_fp8_quant(norm, codes, scales, *extras, *how, tile)

    def stock_fused(self, x, residual, weight, y, residual_out, codes, scales):
        group = (self.quant.group_size, self.quant.column_major)
        torch.ops._C.rms_norm_per_block_quant(codes, x, weight, scales, EPSILON, None, residual, *group)


class AddRMSNormGroup(RMSNormGroup):
    op = "add_rms_norm_group_fp8_quant"


class RMSNormToken(RMSNormWorkload):
    op = "rms_norm_token_fp8_quant"
    modes = ("add,native", "native", "add,custom_op", "custom_op")
    quantiser = Token

    def launch(self, norm, codes, scales, extras, tile):
        kernels.rms_norm_token_fp8_quant(norm, None, codes, scales, *extras, "custom_op", tile)

    def stock_fused(self, x, residual, weight, y, residual_out, codes, scales):
        torch.ops._C.rms_norm_dynamic_per_token_quant(codes, x, weight, scales, EPSILON, None, residual)


class RMSNormStatic(RMSNormWorkload):
    op = "rms_norm_static_fp8_quant"
    modes = ("add,native", "native", "add,custom_op", "custom_op")
    quantiser = Static

    def launch(self, norm, codes, scale, extras, tile):
        kernels.rms_norm_static_fp8_quant(norm, scale, codes, *extras, "custom_op", tile)

    def stock_fused(self, x, residual, weight, y, residual_out, codes, scale):
        if residual is None:
            torch.ops._C.rms_norm_static_fp8_quant(codes, x, weight, scale, EPSILON)
        else:
            torch.ops._C.fused_add_rms_norm_static_fp8_quant(codes, x, residual, weight, scale, EPSILON)


class RMSNorm(Producer):
    """What exactness.py compares.

    gemma: fp32 weight, to which 1 is added. addend: the residual is a sum too, that of the layer's norm before. Inductor
    compiles the two norms together and does not round that sum.
    """

    kinds = ("group", "token", "static")

    def __init__(self, add: bool, *, gemma: bool = False, addend: bool = False) -> None:
        self.add, self.gemma, self.addend = add, gemma, addend
        self.stem = "add_rms_norm" if add else "rms_norm"
        self.words = ("gemma",) * gemma + ("addend",) * addend
        if self.words:  # vLLM's ops take a weight of x's dtype only, and round every sum
            self.forms = (("native", "custom_op"),)

    def inputs(self, rows, width, dtype, generator):
        weight = random_weight(width, generator)
        weight = weight - 1.0 if self.gemma else weight.to(dtype)
        x, *more = (random_rows(rows, width, dtype, generator) for _ in range(1 + self.add + self.addend))
        return x, weight, *more

    def native(self, x, weight, residual=None, addend=None):
        norm, add_norm = native_op("rms_norm"), native_op("fused_add_rms_norm")
        if self.gemma:
            weight = weight.float() + 1.0
        if residual is None:
            y = norm(x, weight, EPSILON)
            return y, {"normed": y}
        if addend is not None:
            _, residual = add_norm(addend, residual, weight, EPSILON)
        y, residual = add_norm(x, residual, weight, EPSILON)
        return y, {"normed": y, "residual": residual}

    def custom_op(self, x, weight, residual=None):
        if residual is None:
            y = custom_op_norm(torch.empty_like(x), x, None, weight)
            return y, {"normed": y}
        residual = residual.clone()
        y = custom_op_norm(torch.empty_like(x), x.clone(), residual, weight)
        return y, {"normed": y, "residual": residual}

    def ours(self, kind, inputs, form, **quant):
        x, weight, *more = inputs
        sums = dict(zip(("residual", "residual_addend"), more, strict=False))
        keep_norm = not is_native(quant["quant_rounding"])  # a native quantiser never rounds what would be kept
        norm = NormInputs(x, weight, EPSILON, gemma_weight=self.gemma, keep_norm=keep_norm, norm_rounding=form, **sums)
        outputs = getattr(ops, f"rms_norm_{kind}_fp8_quant")(norm, **quant)
        return named(outputs, *["normed"] * keep_norm, *["residual"] * self.add)


if __name__ == "__main__":
    grid.main(__doc__, [AddRMSNormGroup, RMSNormGroup, RMSNormToken, RMSNormStatic])
