# SPDX-License-Identifier: Apache-2.0
"""x * sigmoid(gate), the output gate of attention, and the quantiser after it become one op: patterns of
ActivationQuantFusionPass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import Match

from ..graph import OpIndex
from ..ops import sigmoid_mul_quant  # noqa: F401  (registers the op)
from ..ops.quant import GROUP_SIZES, INPUT_DTYPES
from . import quantisers
from .pattern import PatternReplacement, empty

ROWS, GROUPS = 5, 4  # example sizes, as in silu_mul_quant.py
SIGMOID = "aten.sigmoid"

aten = torch.ops.aten


class SigmoidMulGroupQuant(PatternReplacement):
    """x [M, K] * sigmoid(gate [M, K]) -> a quantiser in groups."""

    def __init__(self, quant: quantisers.GroupQuant, dtype: torch.dtype, gate_first: bool) -> None:
        self.quant, self.dtype, self.gate_first = quant, dtype, gate_first
        self.inexactness = quant.inexactness

    def possible(self, ops: OpIndex) -> bool:
        return SIGMOID in ops and self.quant.possible(ops)

    def key(self) -> str:
        return f"sigmoid_mul{'[gate first]' * self.gate_first}+{self.quant}"

    def inputs(self) -> list[torch.Tensor]:
        width = GROUPS * self.quant.scales.group_size
        both = [empty(ROWS, width, dtype=self.dtype) for _ in range(2)]
        return [*both, *self.quant.inputs(ROWS, width)]

    def pattern(self, x: torch.Tensor, gate: torch.Tensor, *buffers: torch.Tensor) -> Any:
        sigmoid = torch.sigmoid(gate)
        return self.quant(sigmoid * x if self.gate_first else x * sigmoid, *buffers)

    def replacement(self, x: torch.Tensor, gate: torch.Tensor, *buffers: torch.Tensor) -> Any:
        how = (*self.quant.scales, self.quant.rounding, *self.quant.fp8)
        return torch.ops.vllm_fusion_plugin.sigmoid_mul_group_fp8_quant.default(x, gate, *how)

    def refuse(self, match: Match) -> str | None:
        x, gate = (match.kwargs[f"arg{i}"].meta["val"] for i in range(2))
        if x.dtype not in INPUT_DTYPES or x.dtype != gate.dtype:
            return f"a sigmoid gate of {gate.dtype} times {x.dtype}; fused for bfloat16 and float16, both alike"
        if x.dim() != 2 or x.shape != gate.shape:
            return f"a sigmoid gate of shape {tuple(gate.shape)} times {tuple(x.shape)}; fused for rows, both alike"
        if x.stride(-1) != 1 or gate.stride(-1) != 1:
            return "the columns of a sigmoid gate, or of what it is multiplied with, are strided"
        if not self.quant.has_buffers:
            return None
        return self.quant.refuse(*(match.kwargs[f"arg{i}"].meta["val"] for i in (2, 3)))


def patterns(dtype: torch.dtype, precision_casts: bool) -> Iterator[SigmoidMulGroupQuant]:
    """None where Inductor rounds the sigmoid too, which the op does not."""
    if not precision_casts:
        for quant in quantisers.group_quants(GROUP_SIZES):
            for gate_first in (False, True):
                yield SigmoidMulGroupQuant(quant, dtype, gate_first)


def is_gate(product: fx.Node) -> bool:
    """Whether a node is such a product."""
    return product.target is aten.mul.Tensor and any(
        isinstance(factor, fx.Node) and factor.target is aten.sigmoid.default for factor in product.args
    )
