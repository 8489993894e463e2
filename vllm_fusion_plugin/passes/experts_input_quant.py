# SPDX-License-Identifier: Apache-2.0
"""SplitExpertsPass: vLLM's MoE op that quantises its input becomes a quantiser and an MoE op that takes codes.

Runs before all fusion passes, so that the norm before the experts fuses with their quantiser. What nothing has fused keeps
this package's quantiser; with `lone_group_quant=false` it becomes vLLM's op again. layers/experts_input_quant.py has the op,
and says which experts take codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx
from vllm.config import VllmConfig

from .. import compat, roundings
from ..graph import arguments_of, called_op
from ..layers import experts_input_quant as layer
from ..ops import group_quant  # noqa: F401  (registers the op)
from ..ops.quant import INPUT_DTYPES, GroupScales
from . import quantisers, splits
from .base import FusionPass

ops = torch.ops.vllm_fusion_plugin
VLLMS_OP = f"vllm.{layer.OP}"


class SplitExpertsPass(FusionPass):
    """Splits vLLM's MoE op of models with shared experts. Takes a VllmConfig; raises NotImplementedError where experts of
    this vLLM cannot be given codes."""

    name: ClassVar[str] = "split_experts_pass"

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        layer.install()
        if layer.problem:
            raise NotImplementedError(layer.problem)
        self.layers = compat.moe_layers(config) if compat.experts_quantise(config) else {}

    def _run(self, graph: fx.Graph) -> None:
        self.refused.clear()
        self.seen_in_refused.clear()
        calls = [node for node in graph.nodes if called_op(node) == VLLMS_OP] if self.layers else []
        for node in calls:
            scales = self._scales(node, len(calls))
            if isinstance(scales, str):
                self.refused[node] = scales
                self.seen_in_refused[node] = node
            else:
                split(graph, node, scales)

    def _scales(self, node: fx.Node, calls: int) -> GroupScales | str:
        """How the experts that a node may run quantise their input, or why it is left to them."""
        x = arguments_of(node)["hidden_states"].meta["val"]
        if x.dtype not in INPUT_DTYPES or x.dim() != 2:
            return (
                f"experts read {x.dtype} of {x.dim()} dimensions; fused for rows of {', '.join(map(str, INPUT_DTYPES))}"
            )
        reason = roundings.of(roundings.GROUP_QUANT).reason
        if reason and self.settings.inexact == "leave":
            return f"{reason}, and the setting inexact is 'leave'"
        found = {layer.scales_of(one, int(x.shape[-1])) for one in self._layers_of(node, calls)}
        if len(found) != 1:
            return (
                "no MoE layer of this name is known" if not found else "MoE layers that share this code quantise unlike"
            )
        return found.pop()

    def _layers_of(self, node: fx.Node, calls: int) -> list[Any]:
        """The MoE layers that the code compiled for a node may run."""
        return compat.layers_by(arguments_of(node)["layer_name"], calls, self.layers)


def split(graph: fx.Graph, node: fx.Node, scales: GroupScales) -> None:
    """Replace vLLM's op by a quantiser of its hidden states and the op that takes codes."""
    given = arguments_of(node)
    x = given["hidden_states"]
    arguments = (x, *scales, roundings.of(roundings.GROUP_QUANT).name)
    values = ops.group_fp8_quant.default(x.meta["val"], *arguments[1:])
    results = splits.insert_quantiser(node, arguments, values, quantisers.EXPERTS)
    op: Any = getattr(ops, layer.OP).default
    splits.replace(node, op, (*results, *given.values()), _traced(node, lambda traced: (*values, *traced)))


def join(graph: fx.Graph) -> None:
    """Put vLLM's op back where nothing has fused the quantiser that was split off."""
    whole: Any = getattr(torch.ops.vllm, layer.OP, None)

    def put_back(x: fx.Node, node: fx.Node) -> None:
        splits.replace(node, whole.default, node.args[2:], _traced(node, lambda traced: traced[2:]))

    splits.join(graph, quantisers.EXPERTS, put_back)


def _traced(node: fx.Node, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> dict[str, Any]:
    """The arguments that a node was traced with, as an op with others has to have them."""
    if splits.EAGER_INPUTS not in node.meta:
        return {}
    args, kwargs = node.meta[splits.EAGER_INPUTS]
    return {splits.EAGER_INPUTS: (change(args), kwargs)}
