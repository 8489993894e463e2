# SPDX-License-Identifier: Apache-2.0
"""Whether a change of the kernels' source changes the machine code: a hash of the PTX of every variant, without a GPU.

    python tests/compile/machine_code.py before.json            # 720 launches, 364 kernels for sm_90, 10 minutes
    python tests/compile/machine_code.py after.json before.json # and names the launches that have other code

Equal PTX means equal bytes and equal speed. Names of kernels, line numbers and labels do not count.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from vllm_fusion_plugin.tracing import fake_gpu

if __name__ == "__main__":
    if reason := fake_gpu.unavailable():
        sys.exit(reason)
    fake_gpu.install()

import torch
import triton

from vllm_fusion_plugin.kernels import mla_v_up_quant, pdl
from vllm_fusion_plugin.kernels.compile_keys import compile_key
from vllm_fusion_plugin.kernels.launch import planning
from vllm_fusion_plugin.kernels.rounding import OPAQUE
from vllm_fusion_plugin.ops import registry
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, LAYOUTS, GroupScales
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs
from vllm_fusion_plugin.plugin import _register_ops as register_ops

ROWS = (1, 5, 700, 9000)
WIDTHS = (512, 2048, 4096, 7168, 18432)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def number() -> torch.Tensor:
    return meta(1, dtype=torch.float32)


def norms(rows: int, width: int) -> Iterator[tuple[NormInputs, str]]:
    """Norms, each with the rounding of a group quantiser after it."""
    x, weight = meta(rows, width), meta(width)
    added = NormInputs(x, weight, residual=x)
    yield NormInputs(x, weight), "custom_op"
    yield NormInputs(x, weight, norm_rounding="eager"), "custom_op"
    yield added._replace(keep_norm=True), "reciprocal"
    yield added._replace(gemma_weight=True), "native"
    yield added._replace(norm_rounding="custom_op"), "custom_op"
    yield added._replace(keep_norm=True, x_addend=x, x_addend_scale=2.5, residual_addend=x), "custom_op"


def launches() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Ops and their arguments."""
    for rows, layout in itertools.product(ROWS, LAYOUTS):
        packed = layout == "packed"  # takes scales of powers of two, and none of native quantisers
        for act, quantiser, ue8m0 in (
            ("native", "reciprocal", False),
            ("custom_op", "custom_op", True),
            ("eager", "native", False),
            ("native", "native_floored", True),
        ):
            if packed and (quantiser not in OPAQUE or not ue8m0):
                continue
            for dtype in (torch.bfloat16, torch.float16):
                x = meta(rows, 8192, dtype=dtype)
                yield "silu_mul_group_fp8_quant", (x, 128, layout, ue8m0, act, quantiser)
        for quantiser in OPAQUE if packed else ("custom_op", "native", "reciprocal"):
            yield "group_fp8_quant", (meta(rows, 7168), 128, layout, packed, quantiser)
        for quantiser, activation, norm_first in (("custom_op", "silu", True), ("native", "sigmoid", False)):
            if packed and quantiser not in OPAQUE:
                continue
            heads = meta(rows, 32, 128)
            gated = (
                heads,
                heads,
                meta(128),
                1e-6,
                32,
                norm_first,
                activation,
                128,
                layout,
                packed,
                "native",
                quantiser,
            )
            yield "gated_rms_norm_group_fp8_quant", gated
        row = meta(rows + 1, 2112)[:rows]
        q, kv = row[:, :1536], row[:, 1536:2048]
        both = (q, kv, meta(1536), meta(512), 1e-6, 1e-6, 128, layout, packed, "native", "custom_op")
        yield "mla_dual_rms_norm_group_fp8_quant", both
    for rows, act, quantiser in itertools.product(ROWS, ("native", "custom_op"), ("native", "custom_op")):
        yield "silu_mul_static_fp8_quant", (meta(rows, 8192), number(), act, quantiser)
        for width, bound in ((4096, number()), (14336, None), (28672, None)):
            yield "silu_mul_token_fp8_quant", (meta(rows, 2 * width), bound, act, quantiser)
    for rows, width in itertools.product(ROWS, WIDTHS):
        for norm, quantiser in norms(rows, width):
            for layout in ("row", "tma"):
                yield "rms_norm_group_fp8_quant", (*norm, 128, layout, layout == "tma", quantiser)
            other = "native" if quantiser == "native" else "custom_op"
            yield "rms_norm_token_fp8_quant", (*norm, number() if width == 2048 else None, other)
            yield "rms_norm_static_fp8_quant", (*norm, number(), other)
    for tokens, columns_first in itertools.product((1, 16, 200, 2000), (False, True)):
        w = meta(16, 128, 512).transpose(1, 2) if columns_first else meta(16, 512, 128)
        codes, attn = meta(tokens, 2048, dtype=FP8_DTYPE), meta(tokens, 16, 512)
        scales = GroupScales(128, "tma").empty(attn, tokens, 2048)
        yield "mla_v_up_group_fp8_quant", (attn, w, codes, scales, 128, True, "custom_op")


def shown(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{list(value.stride())}"
    return value


def code_of(ptx: str) -> str:
    """A hash of what a GPU would run."""
    ptx = ptx.partition(".section")[0]
    left = (line for line in ptx.splitlines() if not re.match(r"\s*(\.loc|\.file|//|\$L__(tmp|func)\w*:)", line))
    text = re.sub(r"\b\w*kernel(?=_param|\b)", "kernel", re.sub(r"//.*", "", "\n".join(left)))
    return hashlib.sha256(re.sub(r"\$L__\w+", "label", text).encode()).hexdigest()[:16]


def main(out: str, earlier: str | None = None) -> None:
    register_ops()
    type(triton.runtime.driver.active).get_current_stream = lambda *_: 0
    pdl.pdl_supported = lambda device: True
    mla_v_up_quant._gpu = lambda device: mla_v_up_quant._Device(132, 232448, True)
    codes: dict[str, str] = {}
    compiled: dict[Any, str] = {}
    for op, arguments in launches():
        with planning() as plan:
            registry.CUDA_IMPLEMENTATIONS[op](*arguments)
        ((kernel, args, kwargs),) = plan.launches
        key = compile_key(kernel, args, kwargs)
        if key not in compiled:
            options = {name: value for name, value in kwargs.items() if name != "launch_pdl"}
            compiled[key] = code_of(kernel.warmup(*args, grid=(1,), **options).asm["ptx"])
        codes[f"{op} {json.dumps([shown(a) for a in arguments])}"] = compiled[key]
    pathlib.Path(out).write_text(json.dumps(codes, indent=0))
    print(f"{len(codes)} launches, {len(compiled)} kernels")
    if earlier is not None:
        before = json.loads(pathlib.Path(earlier).read_text())
        other = [name for name, code in codes.items() if before.get(name, code) != code]
        print(f"{len(other)} with other machine code, {len(codes.keys() - before.keys())} that were not asked before")
        print(*other, sep="\n")
        sys.exit(bool(other))


if __name__ == "__main__":
    main(*sys.argv[1:])
