# SPDX-License-Identifier: Apache-2.0
"""Graphs that mean the same, written the same way while patterns are looked for, and as they were afterwards.

A pattern knows one way to write a computation; models have several. Of a graph, `Spelling` changes

- chains of reshapes, which become one, and reshapes that change nothing, which go (as `pattern.trace` does with patterns);
- with `unify`: tensors with a leading dimension of 1 ([1, tokens, width], as vLLM's Transformers backend has them), which
  lose it; gate and up of SiLU·mul, which become two slices, however a model takes them; and the order of their product.

All of it is about views and shapes: no number is computed in another way. What no pass replaced is put back: the same nodes
with the same arguments in the same places.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph import CONVERT, called_op, same_shape

aten = torch.ops.aten

END = 2**63 - 1  # where `x[start:]` ends

_POINTWISE: set[Any] = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.exp.default),
    *(aten.abs.default, aten.reciprocal.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
    *(aten.minimum.default, aten.maximum.default, aten.log2.default, aten.ceil.default, aten.exp2.default),
    *(aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sigmoid.default, aten.clone.default, CONVERT),
}
_BUFFERS: set[Any] = {aten.empty.memory_format, aten.empty_strided.default}
_WITH_DIM: set[Any] = {aten.slice.Tensor, aten.max.dim, aten.unsqueeze.default, aten.squeeze.dim}
_WITH_DIMS: set[Any] = {aten.amax.default, aten.mean.dim}
_SPLITS: set[Any] = {aten.split.Tensor, aten.split_with_sizes.default}
# Ops that treat a tensor row by row, whatever its number of dimensions.
_BY_ROW = {
    *("vllm_ir.rms_norm", "vllm_ir.fused_add_rms_norm", "_C.fused_add_rms_norm", "_C.silu_and_mul"),
    *("_C.per_token_group_fp8_quant", "_C.static_scaled_fp8_quant", "_C.dynamic_per_token_scaled_fp8_quant"),
}
# What may leave a graph as soon as nothing reads it.
_FREE: set[Any] = {
    *(aten.reshape.default, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int),
    *(aten.select.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, operator.getitem),
}


def merge_reshapes(graph: fx.Graph, erase: Callable[[fx.Node], None] | None = None) -> None:
    """Make one of consecutive reshapes; drop those to the same shape, and identity permutations; give each size of a reshape
    as a number, or as -1 if it is the only one that is none. `erase` is called in place of `graph.erase_node`."""
    erase = erase or graph.erase_node
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if node.target is aten.reshape.default:
            if source.target is aten.reshape.default and len(source.users) == 1:
                node.update_arg(0, source.args[0])
                erase(source)
                source = node.args[0]
            if not same_shape(source.meta["val"], node.meta["val"]):
                continue
        elif node.target is not aten.permute.default or list(node.args[1]) != sorted(node.args[1]):
            continue
        node.replace_all_uses_with(source)
        erase(node)
    for node in graph.find_nodes(op="call_function", target=aten.reshape.default):
        size = [n if isinstance(n, int) else -1 for n in node.meta["val"].shape]
        if size.count(-1) <= 1:
            node.update_arg(1, size)


@dataclass(frozen=True)
class _Was:
    """A node as it was."""

    args: Any
    kwargs: Any
    meta: dict[str, Any]
    read: bool
    """Whether anything read it."""

    @classmethod
    def of(cls, node: fx.Node) -> _Was:
        return cls(node.args, node.kwargs, dict(node.meta), bool(node.users))


class Spelling:
    """How a graph is written while patterns are looked for. Changes the graph when it is made.

    `note` has to be called whenever patterns have been replaced, `restore` at the end."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._order = list(graph.nodes)
        self._places = {node: i for i, node in enumerate(self._order)}
        self._was = {node: _Was.of(node) for node in self._order}
        self._removed: set[fx.Node] = set()
        """Nodes that are gone, and that nothing replaced."""
        self._restored: dict[fx.Node, fx.Node] = {}
        """Of those the ones that came back."""
        self._replacement: dict[fx.Node, fx.Node] = {}
        """What nodes were replaced with."""
        self._flat: dict[fx.Node, fx.Node] = {}
        """Nodes with a leading 1 -> the node that has it no longer; the same node, if it was changed."""
        self._made: dict[fx.Node, None] = {}
        self._leading: dict[fx.Node, fx.Node] = {}
        merge_reshapes(graph, self._remove)
        self._look()

    def _remove(self, node: fx.Node) -> None:
        self.graph.erase_node(node)
        self._made.pop(node, None)
        if node in self._was:
            self._removed.add(node)

    def _look(self) -> None:
        self._seen = {node: (node.args, node.kwargs) for node in self.graph.nodes}

    def note(self) -> None:
        """See what has been replaced since the last look."""
        for node, before in self._seen.items():
            if node._erased:
                continue
            for old, new in zip(_read(before), _read((node.args, node.kwargs)), strict=False):
                if old is not new and old._erased:
                    self._replacement[old] = new
        self._look()

    # -- one way of writing --

    def unify(self) -> bool:
        """Take leading dimensions of 1 away, and write SiLU·mul one way; whether there was anything to do."""
        read_early = self._read_sizes_early()
        self._flatten()
        merge_reshapes(self.graph, self._remove)
        self._drop_unread()
        halved = [self._write_halves(silu) for silu in _silus(self.graph)]
        self._drop_unread()
        self._look()
        return read_early or bool(self._flat) or any(halved)

    def _read_sizes_early(self) -> bool:
        """Take sizes off the first tensor that has them: one taken off a producer's result makes a reader of it."""
        first: dict[Any, tuple[fx.Node, int]] = {}
        found = False
        for node in self._order:
            value = None if node._erased else node.meta.get("val")
            if node.target is aten.sym_size.int and isinstance(value, torch.SymInt):
                wanted = first.get(value.node.expr)
                if wanted is not None and wanted[0] is not node.args[0]:
                    node.args = wanted
                    found = True
            elif isinstance(value, torch.Tensor) and not self._leads(node):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        first.setdefault(size.node.expr, (node, dim))
        return found

    def _flatten(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_function" or not _values(self._value(node)):
                continue
            source: Any = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            if self._adds_leading(node):
                self._flat[node] = self._flat.get(source, source)
            elif source in self._flat and _drops_leading(node, self._value(source)):
                if any(source in user.all_input_nodes for user in node.users):
                    continue  # which is with the 1 in one place and without it in the other
                node.replace_all_uses_with(self._flat[source])
                self._remove(node)
            elif self._leads(node) and (arguments := self._without_leading(node, source)) is not None:
                node.args, node.kwargs = fx.map_arg(arguments, functools.partial(self._flat_input, user=node))
                node.meta = node.meta | {"val": _map_values(_drop, node.meta["val"])}
                self._flat[node] = node
            elif node.target is aten.reshape.default and source in self._flat:
                node.update_arg(0, self._flat[source])
        for node in [node for node, flat in self._flat.items() if node is flat and not _several(node)]:
            for user in list(node.users):
                reads = user in self._was and node in _read((self._was[user].args, self._was[user].kwargs))
                if reads and user.target is not aten.reshape.default and self._flat.get(user) is not user:
                    user.replace_input_with(node, self._with_leading(node, node))

    def _value(self, node: fx.Node) -> Any:
        """What a node made before anything was changed."""
        return (self._was[node].meta if node in self._was else node.meta).get("val")

    def _leads(self, node: fx.Node) -> bool:
        """Whether all that a node makes is [1, rows, ...]: for every value of the symbols in its shape."""
        values = _values(self._value(node))
        return bool(values) and all(value.dim() > 2 and _is_one(value.shape[0]) for value in values)

    def _adds_leading(self, node: fx.Node) -> bool:
        if node.target is not aten.unsqueeze.default or not self._leads(node):
            return False
        return node.args[1] in (0, -self._value(node).dim())

    def _without_leading(self, node: fx.Node, source: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with which a node's op makes the same without the leading 1, from inputs without it; None if that is
        not known."""
        args: list[Any] = list(node.args)
        leads = source is not None and self._leads(source)
        dims = self._value(source).dim() if leads and isinstance(self._value(source), torch.Tensor) else 0
        if node.target in _POINTWISE or called_op(node) in _BY_ROW:
            pass
        elif node.target is operator.getitem:
            if self._flat.get(source) is not source:
                return None
        elif node.target is aten.reshape.default:
            args[1] = list(args[1])[1:]
        elif node.target in _BUFFERS:
            args[:2] = [list(a)[1:] if isinstance(a, list | tuple) else a for a in args[:2]]
        elif not dims or len(args) < 2:
            return None
        elif node.target is aten.expand.default:
            if len(args[1]) != dims:
                return None
            args[1] = list(args[1])[1:]
        elif node.target is aten.permute.default:
            if args[1][0] not in (0, -dims):
                return None
            args[1] = [_without_first(d) for d in list(args[1])[1:]]
        elif node.target in _WITH_DIM:
            if args[1] in (0, -dims - (node.target is aten.unsqueeze.default)):
                return None
            args[1] = _without_first(args[1])
        elif node.target in _SPLITS:
            dim: Any = args[2] if len(args) > 2 else node.kwargs.get("dim", 0)
            if dim in (0, -dims):
                return None
            return (*args[:2], _without_first(dim)), {}
        elif node.target in _WITH_DIMS:
            if not args[1] or any(d in (0, -dims) for d in args[1]):
                return None
            args[1] = [_without_first(d) for d in args[1]]
        else:
            return None
        return tuple(args), dict(node.kwargs)

    def _flat_input(self, node: fx.Node, user: fx.Node) -> fx.Node:
        if node in self._flat:
            return self._flat[node]
        if user.target is aten.reshape.default or not self._leads(node):
            return node
        with self.graph.inserting_after(node):
            flat = self._make(aten.squeeze.dim, (node, 0), node, _drop(node.meta["val"]))
        self._flat[node] = flat
        return flat

    def _make(self, target: Any, args: tuple[Any, ...], like: fx.Node, value: torch.Tensor) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = like.meta | {"val": value}
        self._made[node] = None
        return node

    def _with_leading(self, node: fx.Node, origin: fx.Node) -> fx.Node:
        """`node`, which has lost it or stands for one that had, with a leading 1 and the strides of `origin`."""
        if node not in self._leading or self._leading[node]._erased:
            wanted = self._was[origin].meta["val"]
            value = node.meta["val"]
            at = node
            if value.dim() == 2 and not _same(value.unsqueeze(0), wanted):
                at, value = self._insert_after(at, aten.permute.default, [1, 0], value.t())
                at, value = self._insert_after(at, aten.unsqueeze.default, 0, value.unsqueeze(0))
                at, value = self._insert_after(at, aten.permute.default, [0, 2, 1], value.permute(0, 2, 1))
            else:
                at, value = self._insert_after(at, aten.unsqueeze.default, 0, value.unsqueeze(0))
            self._leading[node] = at
        return self._leading[node]

    def _insert_after(
        self, node: fx.Node, target: Any, argument: Any, value: torch.Tensor
    ) -> tuple[fx.Node, torch.Tensor]:
        with self.graph.inserting_after(node):
            return self._make(target, (node, argument), node, value), value

    def _write_halves(self, silu: _Silu) -> bool:
        gate, up = _part(silu.gate), _part(silu.up)
        if gate is None or up is None or gate.source is not up.source:
            return False
        source, half = gate.source, gate.stop
        width = source.meta["val"].shape[-1]
        if source.meta["val"].dim() != 2 or (gate.start, up.start, up.stop, 2 * half) != (0, half, width, width):
            return False
        with self.graph.inserting_before(silu.wide):
            wanted = (source, 1, 0, half)
            if not _is(silu.gate, wanted):
                first = self._make(aten.slice.Tensor, wanted, silu.gate, silu.gate.meta["val"])
                silu.wide.update_arg(0, first)
        wanted = (source, 1, half, END)
        if silu.product.args == (silu.silu, silu.up) and _is(silu.up, wanted):
            return silu.wide.args[0] is not silu.gate
        with self.graph.inserting_before(silu.product):
            second = silu.up
            if not _is(silu.up, wanted):
                second = self._make(aten.slice.Tensor, wanted, silu.up, silu.up.meta["val"])
            silu.product.args = (silu.silu, second)
        return True

    def _drop_unread(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node.users or node.target not in _FREE:
                continue
            if node in self._made or (node in self._was and self._was[node].read):
                self._remove(node)

    # -- as it was --

    def restore(self) -> None:
        """Write whatever no pass has replaced or changed as it was."""
        changed = {n for n, seen in self._seen.items() if not n._erased and (n.args, n.kwargs) != seen}
        kept = {n for n in changed if n in self._flat and self._flat[n] is n}
        for node in [node for node in kept if _several(node)]:
            kept |= {user for user in node.users if user.target is operator.getitem and user in self._flat}
        mine = [n for n in self._order if not n._erased and n not in changed and n not in kept]

        def now(node: fx.Node) -> fx.Node:
            if node in kept and not _several(node):
                return self._with_leading(node, node)
            if not node._erased:
                return node
            if node in self._restored:
                return self._restored[node]
            if node in self._removed:
                return self._view_of_replaced(node) or self._bring_back(node, now)
            new = self._replaced(node)
            if self._flat.get(node) is node and not _several(node):
                return self._with_leading(new, node)
            return new

        for node in mine:
            was = self._was[node]
            if node.target is aten.sym_size.int and was.args[0]._erased and not self._has_again(was.args[0]):
                continue  # what it was taken off is inside of an op
            node.args, node.kwargs = fx.map_arg((was.args, was.kwargs), now)
        here = {*mine, *self._restored.values()}
        for node, flat in list(self._flat.items()):
            if node is not flat or node._erased or node in kept:
                continue
            node.meta = dict(self._was[node].meta)
            if _several(node):
                continue
            readers = [user for user in node.users if user not in here]
            if node in self._leading:
                leading = self._leading.pop(node)
                readers = [user for user in readers if user is not leading]
                if not leading._erased:
                    leading.replace_all_uses_with(node)
                    readers += [user for user in node.users if user not in here and user is not leading]
            if readers:
                squeezed, _ = self._insert_after(node, aten.squeeze.dim, 0, _drop(node.meta["val"]))
                for user in readers:
                    user.replace_input_with(node, squeezed)
        for node in reversed(list(self.graph.nodes)):
            if node in self._made and not node.users:
                self.graph.erase_node(node)

    def _replaced(self, node: fx.Node) -> fx.Node:
        while node._erased:
            node = self._replacement[node]
        return node

    def _has_again(self, node: fx.Node) -> bool:
        """Whether there is a node for one that is not there."""
        while node._erased and node in self._removed:
            node = self._was[node].args[0]
        while node._erased and node in self._replacement:
            node = self._replacement[node]
        return not node._erased

    def _view_of_replaced(self, node: fx.Node) -> fx.Node | None:
        """What replaced a tensor that a reshape read, if it has the reshape's shape already."""
        source: Any = self._was[node].args[0]
        if node.target is not aten.reshape.default or not source._erased or source in self._removed:
            return None
        new = self._replaced(source)
        return new if same_shape(new.meta["val"], self._was[node].meta["val"]) else None

    def _bring_back(self, node: fx.Node, now: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Make a node that was removed once more, in its place."""
        was = self._was[node]
        args, kwargs = fx.map_arg((was.args, was.kwargs), now)
        followers = (self._restored.get(n, n) for n in self._order[self._places[node] + 1 :])
        with self.graph.inserting_before(next(n for n in followers if not n._erased)):
            again = self.graph.create_node(node.op, node.target, args, kwargs)
        again.name, again.meta = node.name, dict(was.meta)
        self._restored[node] = again
        return again


def _read(arguments: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.map_arg(arguments, nodes.append)
    return nodes


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether shapes and all strides agree for every value of the symbols in them."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return same_shape(one, other) and all(
        statically_known_true(a == b) for a, b in zip(one.stride(), other.stride(), strict=True)
    )


# ---- a leading dimension of 1 ----------------------------------------------------------------------------------------


def _values(value: Any) -> list[torch.Tensor]:
    return [one for one in (value if isinstance(value, tuple | list) else (value,)) if isinstance(one, torch.Tensor)]


def _several(node: fx.Node) -> bool:
    """Whether a node has several results, which are read through getitem."""
    return isinstance(node.meta["val"], tuple | list)


def _map_values(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(function(v) if isinstance(v, torch.Tensor) else v for v in value)
    return function(value)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _drop(value: torch.Tensor) -> torch.Tensor:
    return value.select(0, 0)


def _without_first(dim: int) -> int:
    """A dimension's number when the first one is gone."""
    return dim if dim < 0 else dim - 1


def _drops_leading(node: fx.Node, value: torch.Tensor) -> bool:
    """Whether a node is `value`, which it reads, without the leading 1."""
    first = (0, -value.dim()) if isinstance(value, torch.Tensor) else ()
    if node.target is aten.select.int:
        return node.args[1] in first and node.args[2] in (0, -1)
    if node.target is aten.squeeze.dim:
        return node.args[1] in first
    return node.target is aten.squeeze.dims and len(node.args[1]) == 1 and node.args[1][0] in first  # type: ignore


# ---- SiLU·mul --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Silu:
    """gate / (1 + exp(-gate)), in fp32, times up."""

    gate: fx.Node
    wide: fx.Node
    """The conversion of the gate to fp32."""
    silu: fx.Node
    """Converted back."""
    product: fx.Node
    up: fx.Node


def _silus(graph: fx.Graph) -> Iterator[_Silu]:
    for exp in list(graph.find_nodes(op="call_function", target=aten.exp.default)):
        found = _silu(exp)
        if found is not None:
            yield found


def _silu(exp: fx.Node) -> _Silu | None:
    neg: Any = exp.args[0]
    wide: Any = neg.args[0] if isinstance(neg, fx.Node) and neg.target is aten.neg.default else None
    if not isinstance(wide, fx.Node) or wide.target is not CONVERT:
        return None
    node = exp
    for target in (aten.add.Tensor, aten.div.Tensor, CONVERT, aten.mul.Tensor):
        if len(node.users) != 1:
            return None
        silu, node = node, next(iter(node.users))
        if node.target is not target:
            return None
    up = node.args[0] if node.args[1] is silu else node.args[1]
    gate: Any = wide.args[0]
    if set(wide.users) != {neg, silu.args[0]} or not isinstance(up, fx.Node) or up is silu:
        return None
    return _Silu(gate, wide, silu, node, up)


@dataclass(frozen=True)
class _Part:
    """Columns of a tensor."""

    source: fx.Node
    start: int
    stop: int


def _part(node: fx.Node) -> _Part | None:
    """What columns of what tensor a node is; None if it is none, or if their numbers are no numbers."""
    made: Any = node
    if made.target is aten.slice.Tensor:
        arguments = [*made.args, *(None, 0, None, None, 1)[len(made.args) :]]
        source, dim, start, stop, step = arguments
        width = source.meta["val"].shape[-1]
        if dim not in (-1, source.meta["val"].dim() - 1) or step != 1:
            return None
        start, stop = (0 if start is None else start), (END if stop is None else stop)
        if not all(isinstance(n, int) for n in (start, stop, width)):
            return None
        start, stop, _ = slice(start, stop).indices(width)
        return _Part(source, start, stop)
    if made.target is operator.getitem and made.args[0].target in _SPLITS:
        split, at = made.args
        source, sizes = split.args[:2]
        dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        width = source.meta["val"].shape[-1]
        if dim not in (-1, source.meta["val"].dim() - 1) or not isinstance(width, int):
            return None
        if isinstance(sizes, int):
            start, stop = at * sizes, min((at + 1) * sizes, width)
        else:
            start, stop = sum(sizes[:at]), sum(sizes[: at + 1])
        return _Part(source, start, stop)
    if made.target is aten.select.int or (made.target is operator.getitem and made.args[0].target is aten.unbind.int):
        rows, dim, at = made.args if made.target is aten.select.int else (*_unbound(made.args[0]), made.args[1])
        return _selected(rows, dim, at)
    return None


def _unbound(unbind: fx.Node) -> tuple[Any, Any]:
    return unbind.args[0], unbind.args[1] if len(unbind.args) > 1 else unbind.kwargs.get("dim", 0)


def _selected(rows: fx.Node, dim: int, at: int) -> _Part | None:
    """x.view(-1, parts, width)[:, at]."""
    if rows.target is not aten.reshape.default:
        return None
    source: Any = rows.args[0]
    value, before = rows.meta["val"], source.meta["val"]
    if value.dim() != 3 or before.dim() != 2 or dim % 3 != 1:
        return None
    parts, width = value.shape[1:]
    if not all(isinstance(n, int) for n in (parts, width, before.shape[1])) or before.shape[1] != parts * width:
        return None
    return _Part(source, at % parts * width, (at % parts + 1) * width)


def _is(node: fx.Node, arguments: tuple[Any, ...]) -> bool:
    """Whether a node is the slice that patterns have, for this one reader only."""
    return node.target is aten.slice.Tensor and node.args == arguments and len(node.users) == 1
