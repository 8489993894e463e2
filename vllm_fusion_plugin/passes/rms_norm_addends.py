# SPDX-License-Identifier: Apache-2.0
"""Sums as Inductor would have made them: what it would not have rounded, and in which order. A step of
RMSNormQuantFusionPass.

A decoder layer's two norms are in one piece of the model, and what the first one adds up is an input of the second. Inductor
compiles native norms together with the additions before them, in fp32: the second norm reads x2 + (x1 + residual), where
x1 + residual is never rounded, nor is a MoE layer's sum of shared and routed experts. An op of ours is opaque to Inductor:
what goes in has been stored, hence rounded, and a quarter of the second sum's numbers would differ in the last bit. So the
op takes the addends, and adds them up as Inductor does. It moves as many bytes: the first norm has no sum to write.

Squares of more than 2048 columns are added up in the order of Inductor's usual kernel, but for two places where it is known
to take another: see ops/rms_norm_quant.py.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .. import compat
from ..ops import rms_norm_quant  # noqa: F401  (registers the ops)
from . import matchers

aten = torch.ops.aten
ops = torch.ops.vllm_fusion_plugin

OURS = (
    ops.rms_norm_group_fp8_quant.default,
    ops.rms_norm_token_fp8_quant.default,
    ops.rms_norm_static_fp8_quant.default,
)
IR_ADD = "vllm_ir.fused_add_rms_norm"


def take(graph: fx.Graph, deterministic: bool = False) -> None:
    """Hand the native norms in a graph addends, where they were handed sums of addends that are in memory already.

    deterministic: whether Inductor compiles without timing, which leaves it one order."""
    for norm in list(graph.nodes):
        if norm.target in OURS and get(norm, "norm_form") == "native":
            _take_residual(graph, norm)
            _take_x(graph, norm)
            # Inductor makes one kernel of a table's look-up and the norm of what is found there.
            if deterministic or compat.called_op(get(norm, "x")) in ("aten.embedding", "aten.index"):
                _put(norm, sum_columns=2048)
        elif compat.called_op(norm) == IR_ADD and _is_native(norm):
            _give_back(graph, norm)


def get(node: fx.Node, name: str) -> Any:
    """An argument of an op's node by its name in the schema."""
    return _arguments(node)[name]


def _arguments(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    schema = target._schema.arguments
    defaults = [argument.default_value for argument in schema[len(node.args) :]]
    return dict(zip((argument.name for argument in schema), [*node.args, *defaults], strict=True))


def _put(node: fx.Node, **values: Any) -> None:
    node.args = tuple((_arguments(node) | values).values())


def _is_native(norm: fx.Node) -> bool:
    """Whether Inductor will compile a norm of vLLM's IR."""
    return (
        compat.ir_provider(IR_ADD.partition(".")[2], fx.map_arg(norm.args, lambda node: node.meta["val"])) == "native"
    )


def _sum_of_stored(total: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """If `total` is what an earlier native norm has added up of two tensors, for one reader only: that norm and the two.
    What has more readers is stored, with us or without."""
    if not isinstance(total, fx.Node) or total.target is not operator.getitem or len(total.users) > 1:
        return None
    norm: Any = total.args[0]
    if norm.target in OURS:
        added = _arguments(norm)
        is_sum = added["residual"] is not None and added["keep_sum"] and total.args[1] == len(norm.meta["val"]) - 1
        plain = added["x_addend"] is None and added["residual_addend"] is None and added["norm_form"] == "native"
        return (norm, added["x"], added["residual"]) if is_sum and plain else None
    if (
        compat.called_op(norm) == IR_ADD
        and total.args[1] == 1
        and not matchers.is_sum(norm.args[0])
        and _is_native(norm)
    ):
        return norm, norm.args[0], norm.args[1]
    return None


def _drop(graph: fx.Graph, total: fx.Node) -> None:
    """Take away a sum that nothing reads any more."""
    norm: Any = total.args[0]
    graph.erase_node(total)
    if norm.target in OURS:
        _put(norm, keep_sum=False)
        norm.meta = norm.meta | {"val": norm.meta["val"][:-1]}


def _take_residual(graph: fx.Graph, norm: fx.Node) -> None:
    total = get(norm, "residual")
    if found := _sum_of_stored(total):
        _put(norm, residual=found[1], residual_addend=found[2])
        _drop(graph, total)


def _give_back(graph: fx.Graph, norm: fx.Node) -> None:
    """A norm that Inductor compiles gets the sum of one of ours as an addition, which Inductor compiles with it."""
    total: Any = norm.args[1]
    found = _sum_of_stored(total)
    if found is None or found[0].target not in OURS:
        return
    with graph.inserting_before(norm):
        addition = graph.call_function(aten.add.Tensor, found[1:])
    addition.meta = dict(total.meta)
    norm.update_arg(1, addition)
    _drop(graph, total)


def _take_x(graph: fx.Graph, norm: fx.Node) -> None:
    total = get(norm, "x")
    if not matchers.is_sum(total) or total.kwargs or len(total.users) > 1:
        return
    scale = 1.0
    x, addend = sorted(total.args, key=_is_stored, reverse=True)
    if not _is_stored(addend) and addend.target is aten.mul.Tensor and len(addend.users) == 1:
        addend, scale = addend.args
    if not (_is_stored(x) and _is_stored(addend) and isinstance(scale, int | float)):
        return
    values = [node.meta["val"] for node in (total, x, addend)]
    if all(value.dtype == values[0].dtype and compat.same_shape(value, values[0]) for value in values):
        _put(norm, x=x, x_addend=addend, x_addend_scale=float(scale))
        graph.erase_node(total)


def _is_stored(node: Any) -> bool:
    """Whether a tensor is in memory in any case, because no code that Inductor generates makes it."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is operator.getitem:
        return _is_stored(node.args[0])
    generated = (
        compat.called_op(node).startswith(("aten.", "prims.", "vllm_ir.")) and node.target is not aten.mm.default
    )
    return node.op == "placeholder" or not generated
