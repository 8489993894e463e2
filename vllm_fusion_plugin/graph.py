# SPDX-License-Identifier: Apache-2.0
"""What is asked of fx nodes everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .rank_report import module_of


def called_op(node: fx.Node) -> str:
    """ "namespace.name" of the op that a node calls, looking through auto_functionalized; the target's name otherwise."""
    target: Any = node.target
    if "auto_functionalized" in str(target) and node.args:
        target = node.args[0]
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.replace("::", ".")
    return str(getattr(target, "__name__", target))


def triton_kernel_name(node: fx.Node) -> str:
    """The function of a `triton_kernel_wrapper` node, which has its number in torch's table of kernels."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    index: Any = node.kwargs["kernel_idx"]
    kernel: Any = kernel_side_table.get_kernel(index)
    while not hasattr(kernel, "__name__") and hasattr(kernel, "fn"):  # autotuners and heuristics hold the function
        kernel = kernel.fn
    return str(getattr(kernel, "__name__", "unknown"))


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shapes agree for every value of the symbols in them."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return a.dim() == b.dim() and all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether strides agree for every value of the symbols in them; strides of dimensions of size 1 do not count."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(
        statically_known_true(x == y) or statically_known_true(size == 1)
        for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op's node by their names in its schema, defaults included."""
    target: Any = node.target
    schema = target._schema.arguments
    defaults = [argument.default_value for argument in schema[len(node.args) :]]
    return dict(zip((argument.name for argument in schema), [*node.args, *defaults], strict=True)) | dict(node.kwargs)


def set_arguments(node: fx.Node, **values: Any) -> None:
    """Give an op's node these arguments, by their names in its schema, instead of those it has."""
    node.args, node.kwargs = in_schemas_order(node.target, arguments_of(node) | values), {}


def in_schemas_order(op: Any, values: dict[str, Any]) -> tuple[Any, ...]:
    """An op's arguments as a graph has them: those at the end that are the schema's defaults are left out."""
    schema = list(op._schema.arguments)
    while schema and schema[-1].has_default_value() and values[schema[-1].name] == schema[-1].default_value:
        schema.pop()
    return tuple(values[argument.name] for argument in schema)


FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


class OpIndex(dict[str, list[fx.Node]]):
    """The nodes of a graph by the op that they call, "namespace.name", auto_functionalized ops by their own name."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        for node in graph.nodes:
            if node.op == "call_function":
                self.setdefault(called_op(node), []).append(node)


def quantised(results: Iterable[Any]) -> tuple[str, int]:
    """Of nodes among which one has quantised numbers: the module that reads them, and how many a row has; ("", 0) if none
    has. FP4 lies two to a byte, beside scales that are FP8."""
    values = [(node, node.meta.get("val")) for node in results if isinstance(node, fx.Node)]
    for dtypes, numbers in (((torch.uint8,), 2), (FP8_DTYPES, 1)):
        for node, value in values:
            if isinstance(value, torch.Tensor) and value.dtype in dtypes and value.dim():
                return _reader(node), numbers * int(value.shape[-1])
    return "", 0


def _reader(node: fx.Node) -> str:
    """The module of what reads a node, looking through nodes that know none."""
    for user in node.users:
        if module := module_of(user) or _reader(user):
            return module
    return ""


def innermost_common(nodes: list[fx.Node]) -> str:
    """The module that a match belongs to: what the paths of its nodes have in common."""
    paths = [path.split(".") for path in map(module_of, nodes) if path]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


# ---- RMS norm --------------------------------------------------------------------------------------------------------

ADD = torch.ops.aten.add.Tensor
CONVERT = torch.ops.prims.convert_element_type.default


def is_sum(x: Any) -> bool:
    return isinstance(x, fx.Node) and x.target is ADD and all(isinstance(a, fx.Node) for a in x.args)
