# SPDX-License-Identifier: Apache-2.0
"""Experts take their input quantised, by whatever has computed it.

What: an op, `vllm_fusion_plugin::moe_forward_shared`: vLLM's op of that name with the codes and scales of its hidden states
in front. While it runs vLLM's op, `_quantize_input` of vLLM's no_dp_ep.py, a global of that module, hands out these codes
and scales where it is given these hidden states, and quantises as ever whatever else it is given.

Why: the quantiser lies inside an opaque op, so no graph pass reaches it, and the norm before the op is a kernel of its own.
passes/experts_input_quant.py puts a quantiser and this op in the place of vLLM's op; then the norm's pass fuses the two.

Since: op and function are there in every version read (0.20.2, 0.26.0, 0.32.0, 0.33.0). Until: vLLM's MoE op takes codes.

Same bytes: the quantiser is `per_token_group_quant_fp8` in both, with the same arguments. Only for experts that quantise
before they hand rows to other ranks or not at all (no data or expert parallelism with all-to-all); see `scales_of`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from .. import compat
from ..ops import registry
from ..ops.quant import FP8_DTYPE, GROUP_SIZES, GroupScales

logger = logging.getLogger("vllm.fusion_plugin")

OP = "moe_forward_shared"
QUANTISER = "_quantize_input"
PREPARE = "MoEPrepareAndFinalizeNoDPEPModular"

problem = ""
"""Why no experts take codes in this process: the op cannot be made, or vLLM's function is another."""
_given = threading.local()


# ---- wrapping --------------------------------------------------------------------------------------------------------


def install() -> None:
    """Register the op and wrap vLLM's function. Re-entrant. Does nothing before the process has imported vLLM's MoE layers,
    as `install` of layers/experts_silu_mul_quant.py."""
    global problem
    module = sys.modules.get("vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep")
    if module is None or not compat.has_vllm_op(OP):
        return
    try:
        reason = _wrap(module) or _register()
    except Exception as e:  # must never stop vLLM
        reason = f"{type(e).__name__}: {e}"
    if reason and reason != problem:
        logger.warning("vllm-fusion-plugin: experts quantise their input themselves: %s", reason)
    problem = reason


def _wrap(module: Any) -> str:
    """Wrap, once; the reason if vLLM's function is not what it is known to be."""
    quantise = getattr(module, QUANTISER, None)
    if hasattr(quantise, "_fusion_plugin"):
        return ""
    if quantise is None:
        return f"this vLLM's {module.__name__} has no {QUANTISER}"
    known = ["a1", "quant_config", "defer_input_quant"]
    if list(inspect.signature(quantise).parameters) != known:
        return f"this vLLM has {QUANTISER}{inspect.signature(quantise)}; known: ({', '.join(known)})"

    @functools.wraps(quantise)
    def quantised(a1: torch.Tensor, quant_config: Any, defer_input_quant: bool = False) -> Any:
        given = getattr(_given, "now", None)
        if given is not None and not defer_input_quant and _are(given, a1) and not why_not_config(quant_config):
            return given[1:]
        return quantise(a1, quant_config, defer_input_quant)

    quantised._fusion_plugin = True  # type: ignore[attr-defined]
    setattr(module, QUANTISER, quantised)
    return ""


def _are(given: tuple[torch.Tensor, torch.Tensor, torch.Tensor], a1: torch.Tensor) -> bool:
    """Whether a1 is the hidden states that codes were given of."""
    hidden = given[0]
    return a1.data_ptr() == hidden.data_ptr() and a1.shape == hidden.shape and a1.stride() == hidden.stride()


def _register() -> str:
    """Define the op, once a process; the reason if it cannot be."""
    if hasattr(torch.ops.vllm_fusion_plugin, OP):
        return ""
    vllms = getattr(torch.ops.vllm, OP).default
    function = compat.moe_forward_shared()
    if function is None:
        return f"this vLLM has no function _{OP} to read its op's schema from"
    signature = inspect.signature(function)
    first = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=torch.Tensor)
        for name in ("codes", "scales")
    ]

    def prototype(*arguments: Any) -> Any: ...

    prototype.__signature__ = signature.replace(parameters=[*first, *signature.parameters.values()])  # type: ignore[attr-defined]
    schema = torch.library.infer_schema(prototype, mutates_args=())
    library = registry.LIBRARY
    library.define(OP + schema, tags=tuple(vllms.tags))
    for backend in ("CUDA", "CPU"):
        library.impl(OP, _forward(vllms), backend)
    torch.library.register_fake(
        f"{registry.NAMESPACE}::{OP}", lambda codes, scales, *arguments: vllms(*arguments), lib=library
    )
    return ""


def _forward(vllms: Callable[..., Any]) -> Callable[..., Any]:
    def moe_forward_shared(codes: torch.Tensor, scales: torch.Tensor, hidden: torch.Tensor, *arguments: Any) -> Any:
        outer, _given.now = getattr(_given, "now", None), (hidden, codes, scales)
        try:
            return vllms(hidden, *arguments)
        finally:
            _given.now = outer

    return moe_forward_shared


# ---- deciding --------------------------------------------------------------------------------------------------------


def why_not_config(quant_config: Any) -> str:
    """Why experts with that quant config do not quantise their input in groups, row by row; "" if they do."""
    if quant_config.quant_dtype != FP8_DTYPE or not quant_config.use_fp8_w8a8:
        return f"experts quantise their input to {quant_config.quant_dtype}; fused is {FP8_DTYPE}"
    if quant_config.block_shape is None or quant_config.per_act_token_quant:
        return "experts quantise their input with one scale a token or a tensor; fused are groups"
    if quant_config.block_shape[1] not in GROUP_SIZES:
        return f"experts quantise groups of {quant_config.block_shape[1]}; fused are groups of {GROUP_SIZES}"
    if getattr(quant_config, "is_scale_transposed", False):
        return "experts take the scales of their input column by column; fused are rows"
    return ""


def scales_of(layer: torch.nn.Module, width: int) -> GroupScales | str:
    """How the experts of one of vLLM's MoE layers quantise rows of `width`, or why they cannot take them quantised."""
    kernels = compat.moe_kernels(layer)
    if not kernels:
        return "these experts have no modular kernel"
    found = set()
    for prepare, experts in kernels:
        if type(prepare).__name__ != PREPARE:
            return f"{type(prepare).__name__} hands rows to other ranks; fused is {PREPARE}"
        if getattr(experts, "expects_unquantized_inputs", False):
            return f"{type(experts).__name__} quantises in its own kernel"
        if reason := why_not_config(experts.quant_config):
            return reason
        found.add(experts.quant_config.block_shape[1])
    if len(found) > 1 or width % max(found):
        return f"groups of {' and '.join(map(str, sorted(found)))} in rows of {width}; fused is one size that divides a row"
    return GroupScales(found.pop(), "row", compat.group_quantiser_uses_ue8m0())
