# SPDX-License-Identifier: Apache-2.0
"""Sums as Inductor would have made them: what it would not have rounded, and in which order. A step of
RMSNormQuantFusionPass.

What a norm adds up, x + residual, the next norm's residual is. Inductor compiles native norms together with the additions
before them, in fp32, and never rounds such a sum within a graph: it adds up again what is in memory, x2 + (x1 + residual)
for the second norm of a layer, or, of five tensors and more, stores the sum in fp32. Nor does it round a MoE layer's sum of
shared and routed experts. An op of ours is opaque to Inductor: what goes in has been stored, and were it stored in the
model's dtype, a quarter of the second sum's numbers would differ in the last bit. So the op takes addends and adds them up
as Inductor does, or it takes the fp32 sum of an op of ours before it. Addends move as many bytes: the first norm has no sum
to write. A graph that ends at attention has no longer sums; where Inductor splits the model (so that attention can be fused,
too), residuals go through all of it like this.

A norm that Inductor compiles, in front of a MoE layer for example, gets the additions back that it would have had: how many
tensors its kernel loads decides on the order of its sum of squares.

Squares of more than 2048 columns are added up in the order of Inductor's usual kernel, but where it is known to take
another: see ops/rms_norm_quant.py.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from .. import compat
from ..graph import arguments_of, called_op, is_sum, same_shape, set_arguments
from ..kernels.rounding import is_native
from ..ops.rms_norm_quant import MOST_READS, NormInputs
from .quantiser_nodes import VIEWS

aten = torch.ops.aten
ops = torch.ops.vllm_fusion_plugin

OURS = (
    ops.rms_norm_group_fp8_quant.default,
    ops.rms_norm_token_fp8_quant.default,
    ops.rms_norm_static_fp8_quant.default,
)
IR_ADD = "vllm_ir.fused_add_rms_norm"
LOOK_UPS = ("aten.embedding", "aten.index")
# Inductor's: up to how many loads and reductions a kernel is tried with whole rows, and from how many on it counts as short
# of registers (triton_heuristics).
FEW_LOADS, MANY_LOADS = 8, 10


def take(graph: fx.Graph, deterministic: bool = False) -> None:
    """Hand the native norms in a graph what they add up as Inductor would have it.

    deterministic: whether Inductor compiles without timing, which leaves it one order."""
    sums: dict[Any, _Sum] = {}  # by the node of what was added up, where only one norm reads it
    for norm in list(graph.nodes):
        if not _is_native(norm):
            continue
        total = _Sum.of(norm, sums)
        if total.ours:
            if total.before is not None:
                _take_residual(graph, norm, total.before)
            _take_x(graph, norm)
            set_arguments(norm, sum_columns=_sum_columns(total, _has_native_quantiser(norm), deterministic))
        elif total.before is not None and total.before.ours:
            norm.update_arg(1, _addition(graph, norm, total.before))
        if (node := _result(norm)) is not None and _is_residual(node):
            sums[node] = total
    for node, total in sums.items():
        if not node.users:
            _drop(graph, node, total)


@dataclasses.dataclass
class _Sum:
    """x + residual of a native norm, as the graph had them before `take`."""

    norm: fx.Node
    x: Any
    residual: Any
    before: _Sum | None
    """What the residual is, if an earlier norm has added it up."""
    tensors: int = 0
    """How many tensors of x's shape Inductor's kernel of this norm would load for it."""
    look_ups: int = 0
    """How many rows of a table it would look up for it."""

    @classmethod
    def of(cls, norm: fx.Node, sums: dict[Any, _Sum]) -> _Sum:
        x, residual = _inputs(norm)
        before = sums.get(residual) if residual is not None and len(residual.users) == 1 else None
        total = cls(norm, x, residual, before)
        total._count(x)
        if before is not None and not before.stored:
            total.tensors += before.tensors
            total.look_ups += before.look_ups
        elif residual is not None:
            total._count(residual)
        return total

    def _count(self, node: Any) -> None:
        if called_op(node) in LOOK_UPS:
            self.look_ups += 1
        else:
            self.tensors += 2 if is_sum(node) else 1

    @property
    def ours(self) -> bool:
        return self.norm.target in OURS

    @property
    def stored(self) -> bool:
        """Whether Inductor would store it for the norms that read it."""
        return self.tensors + 2 * self.look_ups > MOST_READS

    @property
    def loads_and_reductions(self) -> int:
        """As Inductor counts them: a kernel goes through a row twice, and the second time reads the sum if it is stored."""
        once = self.tensors + self.look_ups
        return (once + 1 if self.stored else once + self.tensors) + 2  # a weight, a sum of squares


def _has_native_quantiser(norm: fx.Node) -> bool:
    """Whether Inductor would have the quantiser of a norm of ours in the norm's kernel. What it stores, a group quantiser
    reads in a kernel of its own."""
    of_group = norm.target is ops.rms_norm_group_fp8_quant.default
    stored = of_group and NormInputs(*norm.args[: len(NormInputs._fields)]).stored  # type: ignore[arg-type]
    return is_native(arguments_of(norm)["quant_rounding"]) and not stored


def _sum_columns(total: _Sum, native_quant: bool, deterministic: bool) -> int:
    """The op's argument. A native quantiser would be in the same kernel, which is then another one."""
    if not native_quant and total.loads_and_reductions >= MANY_LOADS:
        return 1024
    # Inductor makes one kernel of a table's look-up and the norm of what is found there.
    looked_up = called_op(total.x) in LOOK_UPS
    many_loads = not native_quant and total.loads_and_reductions > FEW_LOADS
    return 2048 if deterministic or looked_up or many_loads else 0


def _is_native(norm: fx.Node) -> bool:
    """Whether a node is a native norm: one of ours, or one with an addition of vLLM's IR, which Inductor will compile."""
    if norm.target in OURS:
        return arguments_of(norm)["norm_rounding"] == "native"
    if called_op(norm) != IR_ADD:
        return False
    values = fx.map_arg(norm.args, lambda node: node.meta["val"])
    return compat.ir_provider(IR_ADD.partition(".")[2], values) == "native"


def _inputs(norm: fx.Node) -> Any:
    """x and residual of a native norm."""
    return (arguments_of(norm)["x"], arguments_of(norm)["residual"]) if norm.target in OURS else norm.args[:2]


def _result(norm: fx.Node) -> fx.Node | None:
    """The node of what a native norm has added up, if it returns that and something reads it."""
    ours = norm.target in OURS
    if ours and (arguments_of(norm)["residual"] is None or not arguments_of(norm)["keep_sum"]):
        return None
    place = len(norm.meta["val"]) - 1 if ours else 1
    return next((user for user in norm.users if user.target is operator.getitem and user.args[1] == place), None)


def _is_residual(node: fx.Node) -> bool:
    """Whether one native norm reads a sum, and nothing else. What has other readers is stored, with us or without."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    if not _is_native(user):
        return False
    x, residual = _inputs(user)
    return residual is node and x is not node


def _take_residual(graph: fx.Graph, norm: fx.Node, before: _Sum) -> None:
    """Give `norm`, one of ours, its residual unrounded."""
    if before.ours:
        added = arguments_of(before.norm)
        if added["x_addend"] is None and added["residual_addend"] is None:
            set_arguments(norm, residual=added["x"], residual_addend=added["residual"])
        else:
            set_arguments(norm, residual=_in_fp32(before))
        return
    if is_sum(before.x):
        return  # three addends: rounded
    earlier = before.before
    if earlier is None:
        set_arguments(norm, residual=before.x, residual_addend=before.residual)
    elif earlier.ours:
        set_arguments(norm, residual=before.x, residual_addend=_in_fp32(earlier))
    else:  # two norms of Inductor's in a row, which has to store what they have added up
        with graph.inserting_before(norm):
            widened = _call(graph, torch.ops.prims.convert_element_type.default, before.x, torch.float32)
            set_arguments(norm, residual=_call(graph, aten.add.Tensor, widened, before.residual))


def _in_fp32(total: _Sum) -> fx.Node:
    """What one of our norms has added up, from now on unrounded."""
    node = _result(total.norm)
    assert node is not None  # it is in `sums`, and what is there is dropped last
    if not arguments_of(total.norm)["fp32_sum"]:
        set_arguments(total.norm, fp32_sum=True)
        node.meta = node.meta | {"val": node.meta["val"].to(torch.float32)}
        total.norm.meta = total.norm.meta | {"val": [*total.norm.meta["val"][:-1], node.meta["val"]]}
    return node


def _addition(graph: fx.Graph, norm: fx.Node, total: _Sum) -> Any:
    """What one of our norms has added up, as Inductor would have had it in its kernel of `norm`."""
    if total.stored:
        return _in_fp32(total)
    residual = total.residual
    if total.before is not None and total.before.ours:
        residual = _addition(graph, norm, total.before)
    with graph.inserting_before(norm):
        if called_op(residual) in LOOK_UPS:
            residual = graph.node_copy(residual)  # it is looked up again, though our norm has it in memory
        x = total.x
        if arguments_of(total.norm)["x_addend"] is not None:
            x, addend, scale = (arguments_of(total.norm)[name] for name in ("x", "x_addend", "x_addend_scale"))
            x = _call(
                graph, aten.add.Tensor, x, addend if scale == 1.0 else _call(graph, aten.mul.Tensor, addend, scale)
            )
        return _call(graph, aten.add.Tensor, x, residual)


def _call(graph: fx.Graph, op: Any, first: Any, *more: Any) -> fx.Node:
    node = graph.call_function(op, (first, *more))
    node.meta = first.meta | {"val": op(*fx.map_arg(node.args, lambda n: n.meta["val"]))}
    return node


def _drop(graph: fx.Graph, node: fx.Node, total: _Sum) -> None:
    """Take away a sum that nothing reads any more."""
    graph.erase_node(node)
    if total.ours:
        set_arguments(total.norm, keep_sum=False, fp32_sum=False)
        total.norm.meta = total.norm.meta | {"val": total.norm.meta["val"][:-1]}


def _take_x(graph: fx.Graph, norm: fx.Node) -> None:
    total = arguments_of(norm)["x"]
    if not is_sum(total) or total.kwargs or len(total.users) > 1:
        return
    scale = 1.0
    x, addend = sorted(total.args, key=_is_stored, reverse=True)
    if not _is_stored(addend) and addend.target is aten.mul.Tensor and len(addend.users) == 1:
        addend, scale = addend.args
    if not (_is_stored(x) and _is_stored(addend) and isinstance(scale, int | float)):
        return
    values = [node.meta["val"] for node in (total, x, addend)]
    if all(value.dtype == values[0].dtype and same_shape(value, values[0]) for value in values):
        set_arguments(norm, x=x, x_addend=addend, x_addend_scale=float(scale))
        graph.erase_node(total)


def is_inlined(node: fx.Node) -> bool:
    """Whether Inductor would compute a norm's input in the norm's kernel, unrounded, and an op of ours could not."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    if _is_stored(node) or called_op(node) in LOOK_UPS:
        return False
    if is_sum(node):
        return not all(_is_addend(addend) for addend in node.args)
    if node.target is operator.getitem:  # of a norm's results, the sum is this file's affair
        return bool(node.args[1] == 0) and _is_norm_of_inductors(node.args[0])
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise or called_op(node).startswith("prims.") or _is_norm_of_inductors(node)


def _is_addend(node: Any) -> bool:
    """Whether an op of ours can add `node` up: what is in memory, or that times a number."""
    return _is_stored(node) or (node.target is aten.mul.Tensor and _is_stored(node.args[0]))


def _is_norm_of_inductors(node: Any) -> bool:
    name = called_op(node)
    if not name.startswith("vllm_ir."):
        return False
    values = fx.map_arg(node.args, lambda n: n.meta["val"])
    return compat.ir_provider(name.partition(".")[2], list(values)) == "native"


def _is_stored(node: Any) -> bool:
    """Whether a tensor is in memory in any case, because no code that Inductor generates makes it."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is operator.getitem:
        return _is_stored(node.args[0])
    generated = called_op(node).startswith(("aten.", "prims.", "vllm_ir.")) and node.target is not aten.mm.default
    return node.op == "placeholder" or not generated
