# SPDX-License-Identifier: Apache-2.0
"""Objects of vLLM's class TritonExperts, and calls of their `apply` as vLLM's modular kernel makes them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.utils import fp8_utils

from vllm_fusion_plugin import report
from vllm_fusion_plugin.layers import experts_silu_mul_quant as layer
from vllm_fusion_plugin.ops.quant import FP8_DTYPE

PACKAGE = "vllm.model_executor.layers.fused_moe"
try:
    module: Any = importlib.import_module(f"{PACKAGE}.experts.triton_moe")
except ImportError:  # 0.20
    module = importlib.import_module(f"{PACKAGE}.fused_moe")
TritonExperts = module.TritonExperts
CLAMPS = "gemm1_clamp_limit" in inspect.signature(moe_config.fp8_w8a8_moe_quant_config).parameters
CONFIG = dict(
    in_dtype=torch.bfloat16,
    moe_parallel_config=moe_config.FusedMoEParallelConfig.make_no_parallel(),
)


class Shape(NamedTuple):
    width: int
    """Columns between the two GEMMs."""
    topk: int
    experts: int = 4
    hidden: int = 256


class Weights(NamedTuple):
    w1: torch.Tensor
    w2: torch.Tensor
    w1_scale: torch.Tensor
    w2_scale: torch.Tensor


def make_weights(shape: Shape, block: int, device: str = "cpu") -> Weights:
    generator = torch.Generator().manual_seed(1)

    def codes(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, FP8_DTYPE)

    def scales(*size: int) -> torch.Tensor:
        return (torch.rand(size, generator=generator) + 0.5).to(device) / 16

    experts, width, hidden = shape.experts, shape.width, shape.hidden
    return Weights(
        codes(experts, 2 * width, hidden),
        codes(experts, hidden, width),
        scales(experts, 2 * width // block, hidden // block),
        scales(experts, hidden // block, width // block),
    )


def make_experts(
    shape: Shape, weights: Weights, block: int | None = 128, of: type = TritonExperts, **quant: Any
) -> Any:
    given = CONFIG | {
        "num_experts": shape.experts,
        "num_local_experts": shape.experts,
        "num_logical_experts": shape.experts,
        "hidden_dim": shape.hidden,
        "experts_per_token": shape.topk,
        "intermediate_size": shape.width,
        "intermediate_size_per_partition": shape.width,
        "activation": MoEActivation.SILU,
        "device": weights.w1.device,
        "routing_method": moe_config.RoutingMethodType.TopK,
    }
    fields = {field.name for field in dataclasses.fields(moe_config.FusedMoEConfig) if field.init}
    block_shape = None if block is None else [block, block]
    return of(
        moe_config.FusedMoEConfig(**{name: value for name, value in given.items() if name in fields}),
        moe_config.fp8_w8a8_moe_quant_config(
            w1_scale=weights.w1_scale, w2_scale=weights.w2_scale, block_shape=block_shape, **quant
        ),
    )


class Inputs(NamedTuple):
    rows: torch.Tensor
    scales: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


def make_inputs(shape: Shape, tokens: int, block: int, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randn(tokens, shape.hidden, generator=generator).to(device, FP8_DTYPE)
    scales = torch.rand(tokens, shape.hidden // block, generator=generator) + 0.5
    ids = torch.stack([torch.randperm(shape.experts, generator=generator)[: shape.topk] for _ in range(tokens)])
    topk_weights = torch.rand(tokens, shape.topk, generator=generator)
    return Inputs(rows, scales.to(device), topk_weights.to(device), ids.to(device, torch.int32))


def apply(experts: Any, shape: Shape, weights: Weights, inputs: Inputs, activation=MoEActivation.SILU) -> torch.Tensor:
    """The experts' output, in the model's dtype."""
    tokens, device = len(inputs.rows), inputs.rows.device
    numbers = tokens * shape.topk * max(2 * shape.width, shape.hidden)
    output = torch.zeros(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
    experts.apply(
        output=output,
        hidden_states=inputs.rows,
        w1=weights.w1,
        w2=weights.w2,
        topk_weights=inputs.topk_weights,
        topk_ids=inputs.topk_ids,
        activation=activation,
        global_num_experts=shape.experts,
        expert_map=None,
        a1q_scale=inputs.scales,
        a2_scale=None,
        workspace13=torch.zeros(numbers, dtype=torch.bfloat16, device=device),
        workspace2=torch.zeros(numbers, dtype=torch.bfloat16, device=device),
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    return output


def use_ue8m0(monkeypatch: Any, on: bool) -> None:
    """As vLLM decides for the whole process."""
    monkeypatch.setattr(fp8_utils, "is_deep_gemm_e8m0_used", lambda: on)
    if hasattr(module, "is_deep_gemm_e8m0_used"):
        monkeypatch.setattr(module, "is_deep_gemm_e8m0_used", lambda: on)


@contextlib.contextmanager
def left_to_vllm() -> Iterator[None]:
    layer._problem, was = "left to vLLM by a test", layer._problem
    try:
        yield
    finally:
        layer._problem = was


def hook(monkeypatch: Any) -> None:
    """Put the fusion in place, as the plugin does, and take it out after the test."""
    monkeypatch.setattr(TritonExperts, "apply", TritonExperts.apply)
    monkeypatch.setattr(TritonExperts, "activation", TritonExperts.activation)
    monkeypatch.setattr(module, layer.QUANTISER, getattr(module, layer.QUANTISER))
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())
    monkeypatch.setattr(layer, "_problem", "")
    layer.install()
    assert not layer._problem, layer._problem
    assert hasattr(TritonExperts.apply, "_fusion_plugin")
