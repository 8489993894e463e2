# SPDX-License-Identifier: Apache-2.0
"""SplitBlockGemmPass: vLLM's block GEMM that quantises inside becomes a quantiser and a GEMM, for other passes to fuse.

On Hopper, where FlashInfer is usable, vLLM's linear layers call `dynamic_flashinfer_deepgemm_blockscale_gemm` with bf16
rows, which are quantised in there, where no pass sees it. This pass runs before all fusion passes. What none of them has
fused keeps this package's quantiser; with `lone_group_quant=false` it becomes vLLM's op again.
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import fx
from vllm.config import VllmConfig

from .. import compat, report, roundings
from ..graph import arguments_of, called_op, quantised
from ..kernels.rounding import FLASHINFER_ROWS
from ..ops import block_gemm, group_quant  # noqa: F401  (registers the ops)
from . import quantisers
from .base import FusionPass

ops = torch.ops.vllm_fusion_plugin


class SplitBlockGemmPass(FusionPass):
    """Splits vLLM's dynamic block GEMM. Takes a VllmConfig; raises NotImplementedError where this vLLM's is another."""

    name: ClassVar[str] = "split_block_gemm_pass"

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        if reason := compat.why_dynamic_gemm_is_unknown(FLASHINFER_ROWS):
            raise NotImplementedError(reason)

    def _run(self, graph: fx.Graph) -> None:
        quantised: dict[Any, tuple[fx.Node, fx.Node]] = {}
        self.refused.clear()
        self.seen_in_refused.clear()
        for node in list(graph.nodes):
            if called_op(node) != compat.DYNAMIC_BLOCK_GEMM:
                continue
            if reason := self._inexact() or _refuse(node):
                self.refused[node] = reason
                self.seen_in_refused[node] = node
            else:
                split(graph, node, quantised)

    def _inexact(self) -> str:
        """Why the split would not have the bytes of vLLM's op, if the settings want it left alone then."""
        reason = roundings.of(roundings.GROUP_QUANT).reason
        if reason and self.settings.inexact == "leave":
            return f"{reason}, and the setting inexact is 'leave'"
        return ""


def _refuse(gemm: fx.Node) -> str | None:
    given = arguments_of(gemm)
    x = given["input"].meta["val"]
    if x.dtype != torch.bfloat16:
        return f"the block GEMM's input is {x.dtype}; split for torch.bfloat16"
    if given["group_size"] != block_gemm.GROUP_SIZE:
        return f"the block GEMM quantises groups of {given['group_size']}; split for {block_gemm.GROUP_SIZE}"
    try:
        _values(given)
    except ValueError as e:
        return f"the block GEMM is not split: {e}"
    return None


def _values(given: dict[str, Any]) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What quantiser and GEMM write, as fake tensors. Raises ValueError on what they do not take."""
    x, weight, weight_scales = (given[name].meta["val"] for name in ("input", "weight", "weight_scale"))
    codes, scales = ops.group_fp8_quant.default(x, *_quantiser(given))
    return (codes, scales), ops.block_fp8_gemm.default(codes, scales, weight, weight_scales, *_gemm(given))


def _quantiser(given: dict[str, Any]) -> tuple[Any, ...]:
    scales = block_gemm.SCALES._replace(ue8m0=given["use_deep_gemm_e8m0"])
    return *scales, quantisers.split_rounding()


def _gemm(given: dict[str, Any]) -> tuple[Any, ...]:
    return given["use_deep_gemm_e8m0"], 0 if compat.batch_invariant() else FLASHINFER_ROWS


def split(graph: fx.Graph, gemm: fx.Node, quantised: dict[Any, tuple[fx.Node, fx.Node]]) -> None:
    """Replace vLLM's op by a quantiser, or by the one that is in `quantised` for the same input, and a GEMM."""
    given = arguments_of(gemm)
    (codes, scales), product = _values(given)
    key = (given["input"], given["use_deep_gemm_e8m0"])
    with graph.inserting_before(gemm):
        if key not in quantised:
            both = graph.call_function(ops.group_fp8_quant.default, (given["input"], *_quantiser(given)))
            both.meta = gemm.meta | {"val": (codes, scales), quantisers.SPLIT: quantisers.SPLIT_GEMM}
            results = [graph.call_function(operator.getitem, (both, i)) for i in (0, 1)]
            for result, value in zip(results, (codes, scales), strict=True):
                result.meta = gemm.meta | {"val": value}
            quantised[key] = results[0], results[1]
        new = graph.call_function(
            ops.block_fp8_gemm.default, (*quantised[key], given["weight"], given["weight_scale"], *_gemm(given))
        )
        new.meta = gemm.meta | {"val": product}
    gemm.replace_all_uses_with(new)
    graph.erase_node(gemm)


def join(graph: fx.Graph) -> None:
    """Put vLLM's op back where nothing has fused the quantiser that was split off."""
    whole_gemm: Any = compat.dynamic_block_gemm()
    for quantiser in quantisers.split_quantisers(graph, quantisers.SPLIT_GEMM):
        # each once: a GEMM reads both codes and scales
        for gemm in dict.fromkeys(user for result in quantiser.users for user in result.users):
            given = arguments_of(gemm)
            with graph.inserting_before(gemm):
                arguments = (given["weight"], given["weight_scales"], block_gemm.GROUP_SIZE, given["use_ue8m0"])
                whole = graph.call_function(whole_gemm, (quantiser.args[0], *arguments))
                whole.meta = gemm.meta | {quantisers.SPLIT: True}
            gemm.replace_all_uses_with(whole)
            graph.erase_node(gemm)
        for result in list(quantiser.users):
            graph.erase_node(result)
        graph.erase_node(quantiser)


def report_alone(graph: fx.Graph, pass_name: str) -> int:
    """Report the quantisers that were split off and run by themselves; how many there are."""
    alone = 0
    for variant in (quantisers.SPLIT_GEMM, quantisers.EXPERTS):
        for node, scales in quantisers.split_quantisers(graph, variant).items():
            key = str(quantisers.GroupQuant(variant, scales))
            report.RECORDER.found(pass_name, key, report.module_of(node), *quantised(node.users))
            alone += 1
    return alone
