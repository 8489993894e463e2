# SPDX-License-Identifier: Apache-2.0
"""RMS norms as vLLM's graphs have them: the pieces that patterns are put together from."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import vllm.model_executor.layers.layernorm as norm_layers
from torch import fx

from ..graph import ADD, CONVERT, OpIndex, called_op, is_sum
from .pattern import functionalized, has_op


@dataclass(frozen=True)
class RMSNorm:
    """RMS norm of x, or of x + residual, in one of the variants that vLLM gives it.

    `ir`: an op of `vllm_ir`, which vLLM lowers to one of its kernels or to aten after all passes. The others are of versions
    that have no such op for a sum (until 0.20): `custom_op` is `torch.ops._C.fused_add_rms_norm`, `decomposed` the layer's
    native code as aten, `sum` an addition before the op.
    """

    variant: str
    add: bool = False
    gemma: bool = False
    """The graph adds 1 to the weight in fp32; a pattern has that inside and takes the weight as the model has it."""
    sum_used: bool = False
    """The sum goes on, as it does along a model's residual stream."""

    @property
    def op(self) -> str:
        """The op that a graph with this norm has in any case."""
        if self.variant in ("ir", "sum"):
            return "vllm_ir.fused_add_rms_norm" if self.add and self.variant == "ir" else "vllm_ir.rms_norm"
        return "_C.fused_add_rms_norm" if self.variant == "custom_op" else "aten.rsqrt"

    def __str__(self) -> str:
        traits = [*([self.variant] if self.variant != "ir" else []), *(["gemma"] if self.gemma else [])]
        name = "fused_add_rms_norm" if self.add else "rms_norm"
        return name + (f"[{','.join(traits)}]" if traits else "")

    def possible(self, ops: OpIndex, keep_norm: bool, readers: int) -> bool:
        """Whether there may be such a norm whose result has other users than the `readers` that a quantiser makes of it."""
        nodes = ops.get(self.op, [])
        return (
            bool(nodes) if self.variant == "decomposed" else any(self._fits(node, keep_norm, readers) for node in nodes)
        )

    def _fits(self, node: fx.Node, keep_norm: bool, readers: int) -> bool:
        if adds_one(norm_weight(node)) != self.gemma:
            return False
        results = norm_results(node)
        if self.variant == "sum":
            total: Any = node.args[0]
            if not is_sum(total):
                return False
            sum_used = len(total.users) > 1
        else:
            sum_used = any(total.users for total in results["sum"])
        users = sum(len(normed.users) for normed in results["norm"])
        return (sum_used, users > readers) == (self.sum_used, keep_norm)

    def __call__(
        self, x: torch.Tensor, residual: Any, weight: Any, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The norm, and the sum if there is one."""
        if self.gemma:
            weight = weight.float() + 1.0
        if self.variant == "custom_op":
            _, normed, total = functionalized(
                torch.ops._C.fused_add_rms_norm.default, input=x, residual=residual, weight=weight, epsilon=epsilon
            )
            return normed, total
        if self.variant == "decomposed":
            layer: Any = norm_layers.RMSNorm
            return layer.forward_static(x, epsilon, x.shape[-1], x.dtype, weight, residual)
        if self.add and self.variant == "ir":
            return torch.ops.vllm_ir.fused_add_rms_norm.default(x, residual, weight, epsilon)
        total = x + residual if self.add else None
        return torch.ops.vllm_ir.rms_norm.default(x if total is None else total, weight, epsilon), total


def rms_norms() -> list[RMSNorm]:
    """Every RMS norm that vLLM can put into a graph, those first that others are part of."""
    if hasattr(torch.ops.vllm_ir, "fused_add_rms_norm"):
        adds = [RMSNorm("ir", True, gemma) for gemma in (True, False)]
    else:
        adds = [RMSNorm("sum", True, gemma=True), RMSNorm("decomposed", True)]
        adds += [RMSNorm("custom_op", True)] if has_op("fused_add_rms_norm") else []
    return [
        *(replace(add, sum_used=used) for add in adds for used in (True, False)),
        *(RMSNorm("ir", gemma=gemma) for gemma in (True, False)),
    ]


NORM_OPS = ("vllm_ir.rms_norm", "vllm_ir.fused_add_rms_norm", "_C.fused_add_rms_norm")


def norm_weight(node: fx.Node) -> Any:
    """The weight of a norm, a call of one of NORM_OPS."""
    if "weight" in node.kwargs:
        return node.kwargs["weight"]
    return node.args[2 if called_op(node) == "vllm_ir.fused_add_rms_norm" else 1]


def norm_results(node: fx.Node) -> dict[str, list[fx.Node]]:
    """The nodes of a norm's result and of its sum."""
    if called_op(node) == "vllm_ir.rms_norm":
        return {"norm": [node], "sum": []}
    first = int(called_op(node) == "_C.fused_add_rms_norm")  # auto_functionalized: after what the op returns
    items = [user for user in node.users if user.target is operator.getitem]
    return {name: [i for i in items if i.args[1] == first + n] for n, name in enumerate(("norm", "sum"))}


def adds_one(weight: Any) -> bool:
    """Whether a norm's weight is a parameter to which the graph adds 1 in fp32, for this norm only."""
    if not (isinstance(weight, fx.Node) and weight.target is ADD and weight.args[1] == 1.0 and len(weight.users) == 1):
        return False
    source = weight.args[0]
    return isinstance(source, fx.Node) and source.target is CONVERT and len(source.users) == 1
