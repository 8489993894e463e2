# SPDX-License-Identifier: Apache-2.0
"""Which thread of an AMD GPU has which columns of a norm's row, in this package's kernels and in one of Inductor's, as JSON.

    python tests/compile/amd_norms.py

The same threads with the same columns add up squares in the same order: a thread's own, then a warp's 64 threads, then the
warps, as Triton's compiler does it for either. Inductor's kernel has the form of what it generates, with the block and the
warps that its own heuristics choose where a warp has 64 threads. Nothing runs.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import amd_code  # before kernels are imported
import torch
import triton
import triton.language as tl
from amd_code import GPUS, VLLMS, meta
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.runtime.triton_heuristics import triton_config_reduction

from vllm_fusion_plugin.kernels.row_order import row_tile
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs
from vllm_fusion_plugin.tracing import fake_rocm

ARCH = "gfx942"
ROWS = (1, 700, 9000)
WIDTHS = (512, 1024, 1536, 2048, 4096, 7168, 16384, 18432)
MANY = 1 << 13


@triton.jit
def inductors_norm(x_ptr, residual_ptr, y_ptr, rows, WIDTH: tl.constexpr, XBLOCK: tl.constexpr, R0_BLOCK: tl.constexpr):
    row = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    columns = tl.arange(0, R0_BLOCK)[None, :]
    total = tl.full([XBLOCK, R0_BLOCK], 0, tl.float32)
    for first in tl.range(0, WIDTH, R0_BLOCK):
        mask = (first + columns < WIDTH) & (row < rows)
        at = first + columns + WIDTH * row
        s = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32) + tl.load(residual_ptr + at, mask, other=0.0).to(
            tl.float32
        )
        total = tl.where(mask, total + s * s, total)
    inverse = tl.rsqrt(tl.sum(total, 1)[:, None] / WIDTH + 1e-6)
    for first in tl.range(0, WIDTH, R0_BLOCK):
        mask = (first + columns < WIDTH) & (row < rows)
        at = first + columns + WIDTH * row
        s = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32) + tl.load(residual_ptr + at, mask, other=0.0).to(
            tl.float32
        )
        tl.store(y_ptr + at, s * inverse, mask)


def inductors_block(width: int) -> tuple[int, int, int]:
    """XBLOCK, R0_BLOCK and warps: of those in docs/notes/inductor-norms.md, the configuration that row_tile takes."""
    block = row_tile(width, native_quant=False).chunk
    rows = max(1, min(1024 // block, 8)) if block <= 1024 else 2 if width <= 2048 else 1
    config = triton_config_reduction(
        {"x": MANY, "r0_": triton.next_power_of_2(width)},
        rows,
        block,
        num_warps=1 if block <= 1024 else None,
        min_num_warps=1 if block <= 1024 else None,
        reduction_hint=ReductionHint.INNER,
        warp_size=64,
    )
    return config.kwargs["XBLOCK"], config.kwargs["R0_BLOCK"], config.num_warps


def threads(kernel: Any) -> list[list[int]]:
    """Of each sum along rows: how many columns a thread has at a time, how many threads and warps a row, and the columns."""
    code = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>$", code, re.MULTILINE))
    return [*_sums(code, layouts)]


def _sums(code: str, layouts: dict[str, str]) -> Iterator[list[int]]:
    for body, columns, layout in re.findall(
        r'"tt\.reduce"(.*?)\}\) : \(tensor<(?:\d+x)*(\d+)xf32, ([^)]*)>\)', code, re.DOTALL
    ):
        if "arith.addf" in body:
            numbers = re.findall(r"\[([\d, ]+)\]", layouts.get(layout, layout))
            yield [*(int(of_axes.split(",")[-1]) for of_axes in numbers[:3]), int(columns)]


def main() -> None:
    triton.runtime.driver.set_active(fake_rocm.driver(GPUS[ARCH]))
    found: dict[str, Any] = {}
    for width in WIDTHS:
        rows, block, warps = inductors_block(width)
        bf16 = torch.bfloat16
        inductors = inductors_norm.warmup(
            bf16, bf16, bf16, MANY, width, XBLOCK=rows, R0_BLOCK=block, num_warps=warps, grid=(1,)
        )
        ours = []
        for many in ROWS:
            norm = NormInputs(meta(many, width), meta(width), residual=meta(many, width))
            call = "rms_norm_group_fp8_quant", (*norm, 128, "row", False, "reciprocal", VLLMS[ARCH])
            ours.append(threads(amd_code.compiled(*call)))
        found[str(width)] = {"inductor": threads(inductors), "ours": ours}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
