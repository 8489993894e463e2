# SPDX-License-Identifier: Apache-2.0
"""What a call costs on the host, outputs and launch included: our ops with CUDA's kernels, with Triton's, and vLLM's own.

python benchmarks/launches.py               # to results/<gpu>/<vllm>/launches.json
python benchmarks/launches.py --rows 1 600  # prompts
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import timing
import torch

from vllm_fusion_plugin.kernels import cuda_library
from vllm_fusion_plugin.ops import registry
from vllm_fusion_plugin.ops.quant import EPS, FP8_DTYPE, FP8_MAX, GroupScales
from vllm_fusion_plugin.plugin import _register_ops as register_ops

CALLS, REPEATS = 200, 25
SCALES = GroupScales(128, "tma")


def host_us(call: Callable[[], object]) -> float:
    """Median µs of a call. So few at a time that the GPU's queue is never full, which would be the GPU's time."""
    for _ in range(CALLS):
        call()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def vllms_quantiser(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = torch.empty_like(y, dtype=FP8_DTYPE), SCALES.empty(y, *y.shape)
    torch.ops._C.per_token_group_fp8_quant(y, codes, scales, 128, EPS, -FP8_MAX, FP8_MAX, False, True, True)
    return codes, scales


def vllms_silu_mul(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty((x.shape[0], x.shape[1] // 2))
    torch.ops._C.silu_and_mul(y, x)
    return vllms_quantiser(y)


# Of each op its arguments after x, and what it replaces.
OPS: dict[str, tuple[tuple[Any, ...], Callable[[torch.Tensor], object]]] = {
    "silu_mul_group_fp8_quant": ((*SCALES, "custom_op", "reciprocal"), vllms_silu_mul),
    "group_fp8_quant": ((*SCALES, "reciprocal"), vllms_quantiser),
}


def measured(rows: int, width: int) -> list[dict[str, Any]]:
    results = []
    for name, (arguments, unfused) in OPS.items():
        op = getattr(getattr(torch.ops, registry.NAMESPACE), name).default
        columns = 2 * width if name.startswith("silu_mul") else width
        x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        impls: dict[str, Callable[[], object]] = {"unfused": lambda x=x, unfused=unfused: unfused(x)}
        for kernels in ("triton", "cuda"):
            impls[f"ours_{kernels}"] = lambda op=op, x=x, arguments=arguments: op(x, *arguments)
        for impl, call in impls.items():
            os.environ[cuda_library.ENV] = impl.removeprefix("ours_")
            if impl == "ours_cuda" and name not in registry.bind_all():
                print(f"{name}: no kernel in CUDA: {cuda_library.why_not()}")
                continue
            registry.bind_all()
            us = host_us(call)
            results.append({"op": name, "M": rows, "H": width, "impl": impl, "host_us": round(us, 2)})
            print(f"{name} M={rows} H={width} {impl}: {us:.2f} µs", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", type=int, default=(1, 16))
    parser.add_argument("--widths", nargs="*", type=int, default=(4096,))
    parser.add_argument("--out", type=pathlib.Path, default=timing.results_folder() / "launches.json")
    args = parser.parse_args()
    import vllm._custom_ops  # noqa: F401  registers torch.ops._C

    register_ops()
    with torch.inference_mode():
        rows = [row for m in args.rows for h in args.widths for row in measured(m, h)]
    timing.write(args.out, rows)


if __name__ == "__main__":
    main()
