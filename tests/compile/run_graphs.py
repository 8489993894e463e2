# SPDX-License-Identifier: Apache-2.0
"""Graphs that were traced for a GPU, run on the CPU op by op.

vLLM's ops, which have no kernel there, run as the plain torch that this package has for each; its own ops do so anyway. The
rest is torch's, and rounds where the graph says so: what `emulate_precision_casts` asks of Inductor.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import fx

from vllm_fusion_plugin import compat, roundings
from vllm_fusion_plugin.ops import quant
from vllm_fusion_plugin.ops.block_gemm import block_fp8_gemm_reference
from vllm_fusion_plugin.ops.silu_mul_quant import silu_mul_reference


@functools.cache
def vllms_ops_on_cpu() -> torch.library.Library:
    """Give the ops of `torch.ops._C` that graphs here have a CPU kernel. The library has to be kept."""
    compat.load_custom_ops()
    library = torch.library.Library("_C", "IMPL")
    for function in (
        silu_and_mul,
        per_token_group_fp8_quant,
        dynamic_per_token_scaled_fp8_quant,
        static_scaled_fp8_quant,
    ):
        library.impl(function.__name__, function, "CPU")
    return library


@functools.cache
def vllms_gemm_on_cpu() -> torch.library.Library:
    """Likewise the GEMM that quantises inside."""
    from vllm.model_executor.kernels.linear.scaled_mm import flashinfer  # noqa: F401  (defines it)

    library = torch.library.Library("vllm", "IMPL")
    library.impl(
        dynamic_flashinfer_deepgemm_blockscale_gemm.__name__, dynamic_flashinfer_deepgemm_blockscale_gemm, "CPU"
    )
    return library


def dynamic_flashinfer_deepgemm_blockscale_gemm(
    input, weight, weight_scale, group_size, use_deep_gemm_e8m0
) -> torch.Tensor:
    few = input.shape[0] < 32
    rounding = "flashinfer" if few else roundings.of(roundings.GROUP_QUANT).name
    how = quant.GroupScales(group_size, "tma", ue8m0=use_deep_gemm_e8m0 and not few)
    codes, scales = quant.group_fp8_quant_reference(input, how, rounding)
    return block_fp8_gemm_reference(codes, scales, weight, weight_scale)


def silu_and_mul(result: torch.Tensor, input: torch.Tensor) -> None:
    result.copy_(silu_mul_reference(input, roundings.of(roundings.SILU_MUL).name))


def per_token_group_fp8_quant(
    input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0, column_major, tma_aligned
) -> None:
    rounding = roundings.of(roundings.GROUP_QUANT).name
    rows = input.reshape(-1, input.shape[-1])
    codes, scales = quant.group_fp8_quant_reference(rows, quant.GroupScales(group_size, ue8m0=scale_ue8m0), rounding)
    output_q.copy_(codes.view(output_q.shape))
    output_s.copy_(scales.view(output_s.shape))


def dynamic_per_token_scaled_fp8_quant(result, input, scale, scale_ub) -> None:
    codes, scales = quant.token_fp8_quant_reference(input, scale_ub, roundings.of(roundings.TOKEN_QUANT).name)
    result.copy_(codes)
    scale.copy_(scales)


def static_scaled_fp8_quant(result, input, scale, group_shape=None) -> None:
    result.copy_(quant.static_fp8_quant_reference(input, scale, roundings.of(roundings.STATIC_QUANT).name))


def inputs_of(graph: fx.Graph, rows: int, seed: int, kind: str) -> list[Any]:
    """What the graph is called with, where a call has `rows` tokens. kind: "normal", or "special" for infinities, NaN, zeros
    and tiny numbers among the activations."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            inputs.append(_number(value, rows))
            continue
        shape = [_number(size, rows) for size in value.shape]
        drawn = torch.randn(shape, generator=generator)
        if value.dim() == 1 and value.shape[0] == 1:
            drawn = drawn.abs() * 0.02 + 0.01  # a scale, or the upper bound of one
        elif value.dim() > 1:
            drawn *= torch.exp2(torch.randint(-3, 4, (*shape[:-1], 1), generator=generator).float())
            if kind == "special" and value.dtype in quant.INPUT_DTYPES:  # not a GEMM's weight
                table = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-30, 6e4, -6e4])
                chosen = table[torch.randint(len(table), shape, generator=generator)]
                drawn = torch.where(torch.rand(shape, generator=generator) < 0.02, chosen, drawn)
        inputs.append(drawn.to(value.dtype))
    return inputs


def _number(size: Any, rows: int) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.expr.subs({symbol: rows for symbol in size.node.expr.free_symbols}))


class _OnCpu(fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.higher_order.triton_kernel_wrapper_functional:
            results = _group_quant_in_triton(**kwargs["kwargs"])
            return {name: results[name] for name in kwargs["tensors_to_clone"]}
        return super().call_function(target, args, kwargs)


def _group_quant_in_triton(y_ptr, y_q_ptr, y_s_ptr, **_: Any) -> dict[str, torch.Tensor]:
    """vLLM's kernel for rows that are not contiguous. None of our passes touches it: what matters here is that what it
    returns is a function of what it is given."""
    codes, scales = torch.empty_like(y_q_ptr), torch.empty_like(y_s_ptr)
    group_size = y_ptr.numel() // y_s_ptr.numel()
    per_token_group_fp8_quant(y_ptr, codes, scales, group_size, 1e-10, -448.0, 448.0, False, False, False)
    return {"y_q_ptr": codes, "y_s_ptr": scales}


def run_on_cpu(graph: fx.Graph, inputs: list[Any]) -> list[torch.Tensor]:
    """What the graph returns. `graph` is left as it is."""
    vllms_ops_on_cpu(), vllms_gemm_on_cpu()
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device("cpu"))
    inputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]
    with torch.no_grad():
        results = _OnCpu(fx.GraphModule(torch.nn.Module(), graph)).run(*inputs)
    return [result for result in results if isinstance(result, torch.Tensor)]
