# SPDX-License-Identifier: Apache-2.0
"""Norms and quantisers as vLLM's layers make them, for tests of RMSNormQuantFusionPass, and the trace of many side by side.

Importing this imports vLLM: fake_gpu.install() comes first.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from trace_module import check_graphs, make_config, trace_branches
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

from vllm_fusion_plugin import compat

PASS = "rmsnorm_quant_fusion_pass"
WIDTH = 512
EPSILON = 1e-6


def trace(*makers, shapes=((64, WIDTH),), dtype=torch.bfloat16, inductor=None, keep_passes=True):
    config = make_config(["none", "+quant_fp8"], dtype=dtype, fuse_norm_quant=True, fuse_act_quant=False)
    config.additional_config = {"fusion_plugin": {"lone_group_quant": False}}
    config.compilation_config.inductor_compile_config |= inductor or {}
    recording = trace_branches(makers, shapes, config, keep_passes)
    check_graphs(recording)
    return recording


LAYOUTS = {
    "row": {},
    "column": {"column_major_scales": True},
    "tma": {"column_major_scales": True, "tma_aligned_scales": True},
}


class Quant(nn.Module):
    """vLLM's quantiser: a custom op, or plain torch code if `native`."""

    def __init__(self, native=False, static=False, bounded=False, **arguments):
        super().__init__()
        self.layer = QuantFP8(static, **arguments, **compat.uncompiled_layer(QuantFP8))
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)
        self.static, self.bounded, self.native = static, bounded, native

    def forward(self, y):
        call = self.layer.forward_native if self.native else self.layer
        results = call(y, self.scale if self.static else None, scale_ub=self.scale if self.bounded else None)
        return results[:1] if self.static else results


def group(size=128, layout="column", ue8m0=False, native=False):
    return functools.partial(Quant, native, group_shape=GroupShape(1, size), use_ue8m0=ue8m0, **LAYOUTS[layout])


def token(bounded=False, native=False):
    return functools.partial(Quant, native, bounded=bounded, group_shape=GroupShape.PER_TOKEN)


def static(native=False):
    return functools.partial(Quant, native, static=True, group_shape=GroupShape.PER_TENSOR)


class Norm(nn.Module):
    """x (+ residual) -> norm -> quantiser, and what `returns` names of the norm's result and the sum."""

    def __init__(self, quant, gemma=False, add=False, returns=(), epsilon=EPSILON, **norm):
        super().__init__()
        self.norm = GemmaRMSNorm(WIDTH, epsilon) if gemma else RMSNorm(WIDTH, epsilon, **norm)
        self.quant = quant()
        self.add, self.returns = add, returns
        self.matrix = nn.Parameter(torch.empty(WIDTH, WIDTH)) if add else None

    def forward(self, x):
        # a product of matrices is in memory, as what a layer adds up is
        normed, total = self.norm(x, x @ self.matrix) if self.add else (self.norm(x), None)
        results = {"norm": normed, "sum": total}
        return *self.quant(normed), *(results[name] for name in self.returns)


def holds(arguments, expected):
    return {name: arguments[name] for name in expected} == expected
