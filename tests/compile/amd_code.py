# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiled for one of AMD's GPUs, with no GPU and no ROCm: what its machine code needs, as JSON.

    python tests/compile/amd_code.py gfx942 --output gfx942.json

Triton's wheels have AMD's backend, down to hsaco. Takes a process of its own, because kernels are made for one backend.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from vllm_fusion_plugin.tracing import fake_gpu, fake_rocm

# before the kernels are imported: backend.py takes this torch for ROCm's
with mock.patch.object(torch.version, "hip", "none, but for the compiler"):
    from vllm_fusion_plugin.kernels import backend

from vllm_fusion_plugin.kernels import launch, mla_v_up_quant
from vllm_fusion_plugin.kernels.fp8 import FORMATS, OCP
from vllm_fusion_plugin.kernels.launch import planning
from vllm_fusion_plugin.ops import (  # noqa: F401  (registers the ops)
    gated_rms_norm_quant,
    group_quant,
    mla_dual_rms_norm_quant,
    registry,
    rms_norm_quant,
    silu_mul_quant,
)
from vllm_fusion_plugin.ops import mla_v_up_quant as mla_v_up_op  # noqa: F401
from vllm_fusion_plugin.ops.quant import GroupScales
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs

GPUS = {gpu.arch: gpu for gpu in fake_gpu.GPUS.values() if gpu.arch}
LDS = {"gfx942": 64 << 10, "gfx950": 160 << 10}
"""Bytes that a program may have."""
VLLMS = {"gfx942": "e4m3fnuz", "gfx950": OCP}
AITERS = {"gfx942": "e4m3fnuz_240", "gfx950": OCP}
WIDTHS = (512, 4096, 7168, 18432)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def number() -> torch.Tensor:
    return meta(1, dtype=torch.float32)


def calls(arch: str) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """A call's name, its op and the op's arguments."""
    vllms, aiters = VLLMS[arch], AITERS[arch]
    group = (128, "row", False)
    for rows in (1, 700, 9000):
        x = meta(rows, 8192)
        both = "silu_mul_group_fp8_quant"
        yield f"silu_mul group, {rows} rows", both, (x, *group, "native", "reciprocal", False, vllms)
        yield f"silu_mul group before AITER's GEMM, {rows} rows", both, (x, *group, "native", "aiter", False, aiters)
        yield f"group, {rows} rows", "group_fp8_quant", (meta(rows, 4096), *group, "reciprocal", vllms)
        yield f"silu_mul token, {rows} rows", "silu_mul_token_fp8_quant", (x, None, "native", "custom_op", False, vllms)
        before_aiters = (x, None, "native", "aiter", False, aiters)
        yield f"silu_mul token before AITER's GEMM, {rows} rows", "silu_mul_token_fp8_quant", before_aiters
        heads = meta(rows, 32, 128)
        gated = (heads, heads, meta(128), 1e-6, 32, True, "silu", *group, "native")
        yield f"gated_rms_norm, {rows} rows", "gated_rms_norm_group_fp8_quant", (*gated, "aiter", aiters)
    x = meta(700, 8192)
    yield (
        "silu_mul group, custom ops, UE8M0, column-major",
        "silu_mul_group_fp8_quant",
        (*(x, 128, "column", True, "custom_op", "custom_op", True, vllms),),
    )
    yield "silu_mul group, native quantiser", "silu_mul_group_fp8_quant", (x, *group, "eager", "native", False, vllms)
    yield "silu_mul static", "silu_mul_static_fp8_quant", (x, number(), "native", "custom_op", vllms)
    yield (
        "gated_rms_norm, gate first",
        "gated_rms_norm_group_fp8_quant",
        (*(heads, heads, meta(128), 1e-6, 32, False, "sigmoid", *group, "native", "native", vllms),),
    )
    for width in WIDTHS:
        x, weight = meta(700, width), meta(width)
        norm = NormInputs(x, weight, residual=x, keep_norm=True)
        yield f"rms_norm group, {width} wide", "rms_norm_group_fp8_quant", (*norm, *group, "reciprocal", vllms)
        yield f"rms_norm token, {width} wide", "rms_norm_token_fp8_quant", (*norm, None, "custom_op", vllms)
        yield f"rms_norm static, {width} wide", "rms_norm_static_fp8_quant", (*norm, number(), "custom_op", vllms)
    gemma = NormInputs(x, meta(width), residual=x, gemma_weight=True)
    yield "rms_norm group, Gemma's, before AITER's GEMM", "rms_norm_group_fp8_quant", (*gemma, *group, "aiter", aiters)
    row = meta(701, 2112)[:700]
    both = (row[:, :1536], row[:, 1536:2048], meta(1536), meta(512), 1e-6, 1e-6)
    yield "mla_dual_rms_norm", "mla_dual_rms_norm_group_fp8_quant", (*both, *group, "native", "aiter", aiters)
    for tokens, columns_first in ((1, False), (16, True), (200, False), (2000, True)):
        w = meta(16, 128, 512).transpose(1, 2) if columns_first else meta(16, 512, 128)
        codes, attn = meta(tokens, 2048, dtype=FORMATS[vllms].dtype), meta(tokens, 16, 512)
        scales = GroupScales(128).empty(attn, tokens, 2048)
        up = (attn, w, codes, scales, 128, False, "custom_op", vllms)
        yield f"mla_v_up, {tokens} tokens", "mla_v_up_group_fp8_quant", up


def describe(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]

    def of(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found, f"no {name} in the kernel's metadata"
        return int(found[1])

    def count(instruction: str) -> int:
        return len(re.findall(rf"^\s+{instruction}", code, re.MULTILINE))

    return {
        "vgpr": of("vgpr_count"),
        "sgpr": of("sgpr_count"),
        "spills": of("vgpr_spill_count") + of("sgpr_spill_count") + of("private_segment_fixed_size"),
        "lds": kernel.metadata.shared,
        "threads": kernel.metadata.num_warps * of("wavefront_size"),
        "byte_stores": count(r"(?:global|buffer|flat)_store_byte"),
        "fp8_conversions": count(r"v_cvt_(?:pk|scalef32_pk)_fp8_f32"),
        # a bit of the mode register: conversions to FP8 end at the format's maximum, instead of making NaN
        "saturates": "hwreg(HW_REG_MODE, 23, 1), 1" in code,
        "waits_for_pdl": "griddepcontrol" in code,
        "hsaco": len(kernel.asm["hsaco"]),
    }


def compiled(op: str, arguments: tuple[Any, ...]) -> Any:
    """The kernel of a call."""
    with planning() as plan:
        registry.CUDA_IMPLEMENTATIONS[op](*arguments)
    ((kernel, args, kwargs),) = plan.launches
    kwargs = {key: launch._constants(v) if isinstance(v, tuple) else v for key, v in kwargs.items()}
    return kernel.warmup(*args, grid=(1,), **kwargs)


def compile_all(arch: str, only: str = "") -> dict[str, Any]:
    assert backend.BACKEND == "hip"
    triton.runtime.driver.set_active(fake_rocm.driver(GPUS[arch]))
    gpu = mla_v_up_quant._Device(GPUS[arch].sms, LDS[arch], False)
    results = {}
    with mock.patch.object(mla_v_up_quant, "_gpu", lambda device: gpu):
        for name, op, arguments in calls(arch):
            if only not in name:
                continue
            start = time.monotonic()
            results[name] = describe(compiled(op, arguments))
            results[name]["seconds"] = round(time.monotonic() - start, 2)
    return {"arch": arch, "triton": triton.__version__, "kernels": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", choices=sorted(GPUS))
    parser.add_argument("--only", default="", help="a part of a kernel's name")
    parser.add_argument("--output", type=Path, help="file for the JSON, default standard output")
    options = parser.parse_args()
    text = json.dumps(compile_all(options.arch, options.only), indent=1)
    if options.output:
        options.output.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
