# SPDX-License-Identifier: Apache-2.0
"""The two norms of multi-head latent attention: that of q's latent, whose result is quantised, and that of k's and v's,
whose result goes to the cache. Both read slices of one GEMM's output, so one op does both. A step of RMSNormQuantFusionPass.

No pattern: slices are cut by chains of views, which vLLM's graphs hold several times over. By now the first norm and its
quantiser are one op of ours, and what is left is to find the other norm.
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import fx
from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass
from vllm.config import VllmConfig

from .. import compat, report
from ..graph import arguments_of, in_schemas_order, innermost_common
from ..kernels.rounding import AITER, BY_ROWS, is_native
from ..ops import mla_dual_rms_norm_quant, rms_norm_quant  # noqa: F401  (registers the ops)
from ..ops.quant import GroupScales
from . import norms, quantisers
from .base import FusionPass

# As vLLM's pass with the same fusion for AITER's ops, in reports and match tables.
NAME = "mla_dual_rms_norm_fusion_pass"

aten = torch.ops.aten
ops = torch.ops.vllm_fusion_plugin

VIEWS: tuple[Any, ...] = (operator.getitem, aten.split_with_sizes.default, aten.split.Tensor, aten.slice.Tensor)


def merge(graph: fx.Graph) -> int:
    """Make one op of each pair of norms in the graph; how many there were. Pairs that are left are reported."""
    merged = 0
    for q in graph.find_nodes(op="call_function", target=ops.rms_norm_group_fp8_quant.default):
        norm = arguments_of(q)
        views = view_chain(norm["x"])
        if not views or norm["residual"] is not None or norm["gemma_weight"] or norm["keep_norm"]:
            continue  # no latent's norm
        source = views[0].args[0]
        others = [
            norm
            for norm in graph.find_nodes(op="call_function", target=torch.ops.vllm_ir.rms_norm.default)
            if (chain := view_chain(norm.args[0])) and chain[0].args[0] is source
        ]
        if not others:
            continue
        module = innermost_common([q, *others])
        if reason := _refuse(q, others):
            report.RECORDER.missed(NAME, reason, module)
            continue
        report.RECORDER.found(NAME, f"mla_dual_rms_norm+{_quantiser(q)}", module)
        _replace(graph, q, others[0])
        merged += 1
    return merged


class MLADualRMSNormFusionPass(FusionPass):
    """Stands in for vLLM's pass of that name, on ROCm: merges pairs of norms of which q's, with its quantiser, is an op of
    this package's. vLLM's own runs after it, for those whose norms are AITER's. Takes a VllmConfig."""

    name: ClassVar[str] = NAME

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)

    def finish(self, graph: fx.Graph) -> None:
        merged = merge(graph)
        self.matched_count += merged
        VllmPatternMatcherPass.match_table[self.pass_name] += merged


def view_chain(node: Any) -> list[fx.Node]:
    """The slicing that makes a tensor, from what it is a slice of (the first one's argument) down to itself; [] if none."""
    chain: list[fx.Node] = []
    while node.target in VIEWS and len(node.all_input_nodes) == 1:
        if node.target is operator.getitem and node.args[0].target not in VIEWS:
            break  # one of several results of an op
        chain.insert(0, node)
        node = node.args[0]
    return chain


def _quantiser(q: fx.Node) -> quantisers.GroupQuant:
    norm = arguments_of(q)
    rounding = norm["quant_rounding"]
    # as the graph had it, by which reports name it
    variant = "native" if is_native(rounding) else "split" if rounding in BY_ROWS else "custom_op"
    variant = "aiter" if rounding == AITER else variant
    scales = GroupScales(norm["group_size"], norm["scale_layout"], norm["use_ue8m0"])
    return quantisers.GroupQuant(variant, scales)


def _refuse(q: fx.Node, others: list[fx.Node]) -> str | None:
    if len(others) > 1:
        return f"{len(others)} more norms read the same GEMM's output; fused where there is one"
    (kv,) = others
    norm, kv_weight = arguments_of(q), norms.norm_weight(kv)
    if norms.adds_one(kv_weight):
        return "the second norm's weight is Gemma's (weight + 1); fused for plain weights"
    if not all(isinstance(weight, fx.Node) and weight < min(q, kv) for weight in (norm["weight"], kv_weight)):
        return "a norm has no weight, or one that is made between the two"
    provider = compat.ir_provider("rms_norm", fx.map_arg(kv.args, lambda node: node.meta["val"]))
    rounding = norm["norm_rounding"]
    if rounding not in {"native": ("native", "eager"), "vllm_c": ("custom_op",)}.get(provider, ()):
        return f"vLLM runs the second norm in a kernel of {provider}, which rounds unlike the first one ({rounding})"
    if norm["sum_columns"] and norm["x"].meta["val"].shape[-1] > 2048:
        return "the first norm adds up its squares 2048 columns at a time, which the op for both does not"
    try:
        _call(q, kv)
    except Exception as e:  # raised later, it would end the compilation
        return str(e)
    return None


def _arguments(q: fx.Node, kv: fx.Node) -> tuple[Any, ...]:
    """Of the op for both, from the two norms."""
    norm, of_kv = arguments_of(q), arguments_of(kv)
    both = {"q": norm["x"], "kv": of_kv["x"], "q_weight": norm["weight"], "kv_weight": of_kv["weight"]}
    both |= {"q_epsilon": norm["epsilon"], "kv_epsilon": of_kv["epsilon"]}
    return in_schemas_order(ops.mla_dual_rms_norm_group_fp8_quant.default, norm | both)


def _call(q: fx.Node, kv: fx.Node) -> tuple[torch.Tensor, ...]:
    """The op on fake tensors: shapes, dtypes and strides of its outputs. Raises ValueError on what the op does not take."""
    return ops.mla_dual_rms_norm_group_fp8_quant.default(*fx.map_arg(_arguments(q, kv), lambda node: node.meta["val"]))


def _replace(graph: fx.Graph, q: fx.Node, kv: fx.Node) -> None:
    # Users of either result may come before the other norm: the op goes where the first of the two is, and with it the
    # slicing that the second one reads.
    first, second = sorted((q, kv))
    with graph.inserting_before(first):
        copies: dict[Any, fx.Node] = {}
        for view in view_chain(second.args[0]):
            copies[view] = view if view < first else graph.node_copy(view, lambda node: copies.get(node, node))
        second.args = (copies[second.args[0]], *second.args[1:])
        both = graph.call_function(ops.mla_dual_rms_norm_group_fp8_quant.default, _arguments(q, kv))
        both.meta = q.meta | {"val": _call(q, kv)}
        kv_normed = graph.call_function(operator.getitem, (both, 2))
        kv_normed.meta = dict(kv.meta)
    for result in list(q.users):
        result.replace_input_with(q, both)
    kv.replace_all_uses_with(kv_normed)
    graph.erase_node(q)
    graph.erase_node(kv)
