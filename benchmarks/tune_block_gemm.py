# SPDX-License-Identifier: Apache-2.0
"""From how many rows on DeepGEMM beats FlashInfer, for weights of the shapes that people serve: `block_gemm="fastest"`.

    python benchmarks/tune_block_gemm.py

Times both kernels for FP8 input in CUDA graphs, with weights that come from memory. Writes the times to a result and, for
this GPU, the number of rows from which DeepGEMM runs to vllm_fusion_plugin/kernels/block_gemm_table.py, which
has those of other GPUs already. vLLM itself changes at 32 rows, whatever the shape; so a shape that gains nothing by
another number has 32.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pathlib
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import timing
import torch
from bench_block_gemm import BlockGemm

from vllm_fusion_plugin.kernels import block_gemm, block_gemm_table
from vllm_fusion_plugin.kernels.rounding import FLASHINFER_ROWS
from vllm_fusion_plugin.ops.block_gemm import SCALES
from vllm_fusion_plugin.ops.quant import FP8_DTYPE

# Rows and width of weights (N, K): qkv, o, gate_up and down of one rank.
SHAPES = (
    # Qwen3-8B, Llama-3.1-8B (TP 1 and 2); Qwen3-4B; Qwen3-14B; Qwen3-32B (TP 1, 2, 4)
    (6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (28672, 4096), (4096, 14336),
    (3072, 4096), (4096, 2048), (12288, 4096), (4096, 6144), (14336, 4096), (4096, 7168),
    (6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728),
    (7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408),
    (10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600), (5120, 4096), (25600, 5120), (5120, 12800),
    (2560, 5120), (5120, 2048), (12800, 5120), (5120, 6400),
    # Qwen3-30B-A3B, Qwen3-Next, Qwen3-235B-A22B (TP 4)
    (5120, 2048), (2048, 4096), (12288, 2048), (9216, 2048), (1024, 2048), (2048, 512), (2304, 4096), (4096, 2048),
    # DeepSeek-V3 (TP 1 and 8)
    (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048), (36864, 7168), (7168, 18432),
    (3072, 1536), (4096, 512), (512, 7168), (7168, 256), (4608, 7168), (7168, 2304),
)  # fmt: skip
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 31)
KERNELS = {"flashinfer": FLASHINFER_ROWS, "deepgemm": 0}
WORTH = 0.02
"""The least part of the time, of the rows that change, for which a shape leaves vLLM's number: two runs differ by one in a
hundred."""


def compile_kernels(shape: tuple[int, int]) -> None:
    """Run DeepGEMM's kernel for each number of rows: it is compiled for a shape when it first runs, and kept on disk."""
    columns, width = shape
    weight = torch.zeros(columns, width, dtype=FP8_DTYPE, device="cuda")
    weight_scales = torch.ones(-(-columns // 128), width // 128, device="cuda")
    for rows in ROWS:
        codes = torch.zeros(rows, width, dtype=FP8_DTYPE, device="cuda")
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
        scales = SCALES.empty(codes, rows, width).fill_(1)
        block_gemm.block_gemm(codes, scales, weight, weight_scales, out, True, KERNELS["deepgemm"])
    torch.cuda.synchronize()


def times_of(columns: int, width: int) -> list[dict[str, Any]]:
    """A row of the result for each kernel and number of rows."""
    workload = BlockGemm("gemm", columns)
    found = []
    for rows in ROWS:
        sets = workload.input_sets(rows, width, torch.bfloat16)
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
        for name, flashinfer_rows in KERNELS.items():

            def launch(codes, scales, weight, weight_scales, out=out, flashinfer_rows=flashinfer_rows):
                block_gemm.block_gemm(codes, scales, weight, weight_scales, out, True, flashinfer_rows)

            us = round(timing.graph_us(launch, sets), 3)
            at = {"op": workload.op, "M": rows, "H": width, "N": columns, "dtype": "bfloat16", "mode": "gemm"}
            found.append(at | {"impl": f"peer:{name}", "us": us})
        del sets
    return found


def best_change(us: dict[tuple[str, int], float]) -> int:
    """The number of rows from which DeepGEMM should run. us: by kernel and rows, for all ROWS."""

    def total(change: int) -> float:
        # Relative: one request counts as much as thirty.
        return sum(
            us["flashinfer" if rows < change else "deepgemm", rows] / us["flashinfer", rows] for rows in ROWS
        )  # fmt: skip

    best = min((*ROWS, FLASHINFER_ROWS), key=total)
    changed = sum(rows >= best for rows in ROWS)
    return best if total(FLASHINFER_ROWS) - total(best) > WORTH * changed else FLASHINFER_ROWS


def table_of(rows: list[dict[str, Any]]) -> dict[tuple[int, int], int]:
    """By rows and width of the weight, what `best_change` says of the rows of a result."""
    by_shape: dict[tuple[int, int], dict[tuple[str, int], float]] = {}
    for row in rows:
        us = by_shape.setdefault((row["N"], row["H"]), {})
        us[row["impl"].removeprefix("peer:"), row["M"]] = row["us"]
    return {shape: best_change(us) for shape, us in by_shape.items()}


def write_table(path: pathlib.Path, gpu: str, table: dict[tuple[int, int], int]) -> None:
    """Write the table of all GPUs and shapes, with what is new of this one."""
    known = block_gemm_table.DEEPGEMM_FROM
    new = dict(sorted((known.get(gpu, {}) | table).items()))
    tables = dict(sorted((known | {gpu: new}).items()))
    lines = [f"    {name!r}: {{\n{entries(shapes)}    }},\n".replace("'", '"') for name, shapes in tables.items()]
    path.write_text(
        "# SPDX-License-Identifier: Apache-2.0\n"
        '"""From how many rows on DeepGEMM beats FlashInfer, by GPU, then by rows and width of the weight (N, K); 32 where\n'
        'vLLM\'s own number is as good. Written by benchmarks/tune_block_gemm.py."""\n\n'
        "from __future__ import annotations\n\n"
        f"DEEPGEMM_FROM: dict[str, dict[tuple[int, int], int]] = {{\n{''.join(lines)}}}\n"
    )


def entries(table: dict[tuple[int, int], int]) -> str:
    return "".join(f"        {shape}: {change},\n" for shape, change in table.items())


def shape(text: str) -> tuple[int, int]:
    columns, width = text.split("x")
    return int(columns), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="*", type=shape, help="those of the weights to time, as 4096x12288; default: all"
    )
    parser.add_argument("--out", type=pathlib.Path, default=timing.results_folder() / "block_gemm.fastest.json")
    parser.add_argument("--table", type=pathlib.Path, default=pathlib.Path(block_gemm_table.__file__))
    args = parser.parse_args()
    shapes = args.shapes or list(dict.fromkeys(SHAPES))
    gpu = block_gemm.gpu_name(torch.cuda.get_device_name())
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_kernels, shapes))
    results: list[dict[str, Any]] = []
    for columns, width in shapes:
        found = times_of(columns, width)
        results += found
        print(f"N={columns} K={width}: from {table_of(found)[columns, width]} rows", flush=True)
        timing.write(args.out, results)  # what is there by now survives a run cut short
        write_table(args.table, gpu, table_of(results))


if __name__ == "__main__":
    main()
