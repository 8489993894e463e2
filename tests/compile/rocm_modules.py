# SPDX-License-Identifier: Apache-2.0
"""Small modules as on an MI300X with AITER, each through vLLM's compiler: what became of it, as JSON.

    VLLM_ROCM_USE_AITER=1 python tests/compile/rocm_modules.py result.json

A process of its own: pretending to have a GPU cannot be undone. test_rocm_modules.py says what is expected.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from vllm_fusion_plugin.tracing import fake_gpu
from vllm_fusion_plugin.tracing import model as tracing

if __name__ == "__main__":
    CACHE = tempfile.TemporaryDirectory()
    tracing.prepare_environment(CACHE.name)
    fake_gpu.install(fake_gpu.GPUS["mi300x"])

import torch
from torch import nn
from trace_module import arguments_of, make_config, on_device, reasons, trace_module

FNUZ = torch.float8_e4m3fnuz
HEADS, WIDTH = 4, 512


def group(y: torch.Tensor, *more: Any) -> Any:
    return torch.ops.vllm.rocm_aiter_group_fp8_quant(y, *(more or (128,)))


def token(y: torch.Tensor) -> Any:
    """As vLLM's layer calls it."""
    from vllm._aiter_ops import rocm_aiter_ops

    return rocm_aiter_ops.per_token_quant(y, FNUZ)


def vllms_group(maximum: float) -> Callable[[torch.Tensor], Any]:
    """vLLM's own op, called with these bounds."""

    def quantise(y: torch.Tensor) -> Any:
        codes, scales = torch.empty_like(y, dtype=FNUZ), y.new_empty((y.shape[0], WIDTH // 128), dtype=torch.float32)
        torch.ops._C.per_token_group_fp8_quant(y, codes, scales, 128, 1e-10, -maximum, maximum, False, False, False)
        return codes, scales

    return quantise


class Gated(nn.Module):
    """RMSNormGated head by head, then side by side."""

    def __init__(self, quantise: Callable[..., Any], head: int = 128) -> None:
        from vllm.model_executor.layers.layernorm import RMSNormGated

        super().__init__()
        self.norm, self.quantise, self.head = RMSNormGated(head, eps=1e-6, norm_before_gate=True), quantise, head

    def forward(self, x: torch.Tensor) -> Any:
        heads = x.view(x.shape[0], -1, self.head)
        return self.quantise(self.norm(heads, heads.flip(1).contiguous()).reshape(x.shape))


class SiluMul(nn.Module):
    def __init__(self, quantise: Callable[..., Any]) -> None:
        from vllm.model_executor.layers.activation import SiluAndMul

        super().__init__()
        self.act, self.quantise = SiluAndMul(), quantise

    def forward(self, x: torch.Tensor) -> Any:
        return self.quantise(self.act(torch.cat([x, x + 1.0], dim=1)))


class Norm(nn.Module):
    """Gemma's: its weight is fp32, which AITER's norm does not take."""

    def __init__(self, *quantisers: Callable[..., Any]) -> None:
        from vllm.model_executor.layers.layernorm import GemmaRMSNorm

        super().__init__()
        self.norm, self.quantisers = GemmaRMSNorm(WIDTH), quantisers

    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(x)
        return [quantise(y) for quantise in self.quantisers]


CASES: dict[str, Callable[[], nn.Module]] = {
    "gated": lambda: Gated(group),
    "gated, heads of two groups": lambda: Gated(group, head=256),
    "gated, groups of 64": lambda: Gated(lambda y: group(y, 64)),
    "gated, one scale a token": lambda: Gated(lambda y: torch.ops.vllm.rocm_aiter_per_token_quant(y, FNUZ)),
    "gated, transposed scales": lambda: Gated(lambda y: group(y, 128, True)),
    "SiLU·mul": lambda: SiluMul(group),
    "SiLU·mul, one scale a token": lambda: SiluMul(token),
    "norm, one scale a token": lambda: Norm(token, token),
    "SiLU·mul, integers": lambda: SiluMul(lambda y: torch.ops.vllm.rocm_aiter_per_token_quant(y, torch.int8)),
    "SiLU·mul, vLLM's op, 224": lambda: SiluMul(vllms_group(224.0)),
    "SiLU·mul, vLLM's op, 240": lambda: SiluMul(vllms_group(240.0)),
    "norm read by two quantisers": lambda: Norm(group, group),
    "norm read by two quantisers, one by a view": lambda: Norm(group, lambda y: group(y.view(-1, WIDTH))),
}


def trace(make: Callable[[], nn.Module]) -> dict[str, Any]:
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_fusion_plugin import report
    from vllm_fusion_plugin.tracing.subgraphs import count_ops

    config = make_config(["none"], fuse_norm_quant=True, fuse_act_quant=True)
    report.RECORDER.report = report.RankReport()
    with set_current_vllm_config(config), on_device("cuda"), set_default_torch_dtype(torch.bfloat16):
        recording = trace_module(make(), (torch.empty(64, WIDTH),), config)
    (subgraph,) = recording.subgraphs
    return {
        "ours": [
            [node.target._opname, {k: v for k, v in arguments_of(node).items() if isinstance(v, str)}]
            for node in subgraph.after.nodes
            if str(node.target).startswith("vllm_fusion_plugin.")
        ],
        "left": sorted(op for op in count_ops(subgraph.after) if "quant" in op and "fusion_plugin" not in op),
        "reasons": reasons(),
    }


def platform() -> dict[str, Any]:
    """What kernels make of a compute capability of (9, 4), and what has been imported."""
    from vllm_fusion_plugin.kernels import mla_v_up_quant, pdl

    device = torch.device("cuda", 0)
    with mock.patch.object(pdl, "_HAS_GDC", False):  # torch here is CUDA's; with ROCm's it is so from the start
        pdl_on = pdl.pdl_supported(device)
    properties = torch.cuda.get_device_properties(device)
    properties.shared_memory_per_block = 64 << 10
    with mock.patch.object(mla_v_up_quant, "BACKEND", "hip"):
        tma = mla_v_up_quant._gpu(device).has_tma
    return {
        "capability": torch.cuda.get_device_capability(device),
        "pdl": pdl_on,
        "tma": tma,
        "nvidias": sorted(
            name for name in sys.modules if name.partition(".")[0] in ("flashinfer", "deep_gemm") and sys.modules[name]
        ),
    }


def gates() -> dict[str, str]:
    """What is said where AITER's kernels cannot be had."""
    import importlib
    import types

    from vllm._aiter_ops import rocm_aiter_ops

    from vllm_fusion_plugin import compat

    op = "rocm_aiter_fused_rms_gated_fp8_group_quant"
    said = {"as it is": compat.why_no_aiter() + compat.why_no_aiter_kernel(op)}
    with mock.patch.object(rocm_aiter_ops, "is_enabled", lambda: False):
        said["off"] = compat.why_no_aiter()
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
        said["missing"] = compat.why_no_aiter()
    with mock.patch.object(importlib, "import_module", lambda name: types.ModuleType(name)):
        said["too old"] = compat.why_no_aiter_kernel(op)
    with mock.patch.object(importlib, "import_module", mock.Mock(side_effect=ImportError("no HIP"))):
        said["broken"] = compat.why_no_aiter_kernel(op)
    with mock.patch.object(compat, "has_aiter_op", lambda name: False):
        said["vLLM too old"] = compat.why_no_aiter_kernel(op)
    return said


def main(output: Path) -> None:
    from vllm_fusion_plugin import plugin

    plugin.register()
    results: dict[str, Any] = {name: trace(make) for name, make in CASES.items()}
    output.write_text(json.dumps({"modules": results, "platform": platform(), "gates": gates()}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
