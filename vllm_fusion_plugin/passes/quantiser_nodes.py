# SPDX-License-Identifier: Apache-2.0
"""Quantisers in a graph, whatever they look like, and what each of them quantises.

A quantiser is what makes numbers of 8 bits or fewer from a tensor of the model's: an op of vLLM's, plain torch code that
ends in a conversion to FP8, a Triton kernel, or an op that has one inside. Of our ops only that is one which does nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import compat
from ..graph import CONVERT, FP8_DTYPES, called_op, triton_kernel_name
from .quantisers import OURS, SPLIT

aten = torch.ops.aten

MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

VIEWS: tuple[Any, ...] = (
    *(aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.expand.default, aten.alias.default),
)

# What a quantiser in plain torch code is made of, besides views and conversions.
_CLAMPS = ("aten.clamp", "aten.clamp_min", "aten.clamp_max", "aten.minimum", "aten.maximum")
_MAXIMA = ("aten.amax", "aten.max", "aten.maximum")
_MADE_OF = {
    *_CLAMPS,
    *_MAXIMA,
    *("getitem", "prims.convert_element_type"),
    *(f"aten.{op}" for op in ("mul", "div", "reciprocal", "abs", "log2", "ceil", "exp2", "pow", "reshape", "view")),
    *(f"aten.{op}" for op in ("unsqueeze", "squeeze", "expand", "permute", "clone", "slice", "constant_pad_nd")),
}

# Op -> what it is, in the words of `passes.owners`, and where it reads. Other ops are known by what they write.
_OPS = {
    "_C.per_token_group_fp8_quant": "group",
    "_C.per_token_group_fp8_quant_packed": "packed",
    "_C.dynamic_per_token_scaled_fp8_quant": "token",
    "_C.dynamic_scaled_fp8_quant": "tensor",
    "_C.static_scaled_fp8_quant": "static",
    "_C.scaled_fp4_quant": "nvfp4",
    compat.AITER_GROUP_QUANT: "group",
    compat.AITER_TOKEN_QUANT: "token",
    "vllm.rocm_aiter_per_tensor_quant": "static",
}

WORDS = {
    "group": "an FP8 quantiser in groups",
    "packed": "an FP8 quantiser with packed scales, in groups",
    "token": "an FP8 quantiser with one scale a token",
    "tensor": "an FP8 quantiser with one dynamic scale a tensor",
    "static": "an FP8 quantiser with a static scale",
    "nvfp4": "an NVFP4 quantiser",
    "cast": "a conversion to FP8 without a scale",
    "other": "a quantiser",
}


@dataclass(frozen=True, eq=False)
class Quantiser:
    node: fx.Node
    """Where the numbers are written."""
    value: fx.Node
    """What is quantised, before views of the quantiser's own."""
    kind: str
    """A key of WORDS."""
    variant: str
    """"op", "native" (plain torch code), "triton", "inside" (in another op), "joined" (likewise, after it was split off in
    vain), or "ours" (alone, in this package's op)."""
    group_size: int | None = None
    kernel: str = ""
    """A Triton kernel's name."""

    def __str__(self) -> str:
        size = f" of {self.group_size}" if self.kind in ("group", "packed") and self.group_size else ""
        how = {
            "native": "in plain torch code",
            "triton": f"in a Triton kernel, {self.kernel}",
            "ours": "in this package's op",
            "joined": f"inside {called_op(self.node)}",
        }.get(self.variant, called_op(self.node))
        return f"{WORDS[self.kind]}{size} ({how})"

    def reads(self, user: fx.Node) -> bool:
        """Whether a reader of `value` is part of this quantiser: itself, or what leads to it and nothing else does."""
        if user is self.node:
            return True
        if self.variant == "joined" and called_op(user) == called_op(self.node):
            return user.args[3:] == self.node.args[3:]  # GEMMs of one input had one quantiser
        if user.target in VIEWS or (self.variant == "native" and called_op(user) in _MADE_OF):
            return any(map(self.reads, user.users))
        return False


@dataclass(frozen=True)
class Fused:
    """One of vLLM's own ops with a quantiser in it."""

    node: fx.Node
    pattern: str
    owner: str
    """The pass of vLLM's that puts such ops into graphs."""


def find(graph: fx.Graph) -> tuple[list[Quantiser], list[Fused]]:
    """Quantisers of a graph that something reads, and vLLM's ops that have one inside already; in the graph's order."""
    quantisers, fused = [], []
    for node in _live(graph):
        found = _find(node)
        if isinstance(found, Quantiser):
            quantisers.append(found)
        elif found is not None:
            fused.append(found)
    return quantisers, fused


def _live(graph: fx.Graph) -> list[fx.Node]:
    """Nodes whose results count: passes leave some that nothing reads for vLLM to clean up."""
    live: dict[fx.Node, None] = {}
    for node in reversed(graph.nodes):
        writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        writes |= "triton_kernel_wrapper_mutation" in str(node.target)
        if node.op == "output" or writes or any(user in live for user in node.users):
            live[node] = None
    return [node for node in reversed(live) if node.op == "call_function"]


def _find(node: fx.Node) -> Quantiser | Fused | None:
    name = called_op(node)
    if "triton_kernel_wrapper" in str(node.target):
        return _triton(node)
    if name == "prims.convert_element_type":
        return _native(node) if node.args[1] in FP8_DTYPES else None
    if name == compat.DYNAMIC_BLOCK_GEMM and node.meta.get(SPLIT):
        return Quantiser(node, node.all_input_nodes[0], "group", "joined", 128)
    if name in compat.OPAQUE_QUANTISERS or name in compat.OPAQUE_MLPS:
        return Quantiser(node, node.all_input_nodes[0], "other", "inside")
    if name == OURS:
        size: Any = node.args[1]
        return Quantiser(node, node.args[0], "group", "ours", size)  # type: ignore[arg-type]
    if name in compat.FUSED_BY_VLLM:
        return Fused(node, *compat.FUSED_BY_VLLM[name])
    if name.startswith(("vllm_fusion_plugin.", "aten.", "prims.")) or "attention" in name:
        return None  # attention that writes FP8 has been fused with a quantiser
    return _op(node, name)


def _op(node: fx.Node, name: str) -> Quantiser | None:
    """An op that reads tensors of the model's dtype, and no others, and writes small numbers."""
    op = _overload(node)
    if op is None:
        return None
    arguments = _by_name(node, op)
    written = [arguments.get(a.name) for a in op._schema.arguments if a.is_write]
    read = [arguments.get(a.name) for a in op._schema.arguments if not a.is_write]
    outputs = [_value(w) for w in written] if written else _values(node)
    inputs = [n for n in read if isinstance(n, fx.Node) and isinstance(_value(n), torch.Tensor)]
    if name not in _OPS and not _quantises(name, [_value(n) for n in inputs], outputs):
        return None
    value = max(inputs, key=lambda n: _value(n).dim())
    size = arguments.get("group_size")
    return Quantiser(node, _before_views(value), _OPS.get(name, "other"), "op", size if isinstance(size, int) else None)


def _quantises(name: str, inputs: list[Any], outputs: list[Any]) -> bool:
    small = (*FP8_DTYPES, torch.int8, *([torch.uint8] if "quant" in name else []))
    return (
        any(getattr(value, "dtype", None) in small for value in outputs)
        and any(value.dtype in MODEL_DTYPES and value.dim() > 1 for value in inputs)
        and not any(value.dtype in (*FP8_DTYPES, torch.int8, torch.uint8) for value in inputs)
    )


def _overload(node: fx.Node) -> torch._ops.OpOverload | None:
    target: Any = node.target
    if "auto_functionalized" in str(target) and node.args:
        target = node.args[0]
    return target if isinstance(target, torch._ops.OpOverload) else None


def _by_name(node: fx.Node, op: torch._ops.OpOverload) -> dict[str, Any]:
    if node.target is op:
        return dict(zip((a.name for a in op._schema.arguments), node.args, strict=False)) | node.kwargs
    return dict(node.kwargs)


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _values(node: fx.Node) -> list[Any]:
    value = _value(node)
    return list(value) if isinstance(value, tuple | list) else [value]


def _before_views(node: fx.Node) -> fx.Node:
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


# ---- Triton kernels --------------------------------------------------------------------------------------------------


def _triton(node: fx.Node) -> Quantiser | Fused | None:
    arguments: Any = node.kwargs["kwargs"]
    tensors: dict[str, Any] = {k: v for k, v in arguments.items() if isinstance(_value(v), torch.Tensor)}
    # Without functionalisation, nothing in the graph tells what is written: a buffer that was made empty is.
    known: Any = node.kwargs.get("tensors_to_clone")
    written = known or [k for k, v in tensors.items() if called_op(v).startswith(("aten.empty", "aten.new_empty"))]
    codes = [k for k in written if k in tensors and _value(tensors[k]).dtype in FP8_DTYPES]
    read = [v for k, v in tensors.items() if k not in written]
    inputs = [v for v in read if _value(v).dtype in MODEL_DTYPES]
    if not codes or not inputs or any(_value(v).dtype in FP8_DTYPES for v in read):
        return None
    kernel = triton_kernel_name(node)
    for part, (pattern, owner) in compat.FUSED_IN_TRITON.items():
        if part in kernel:
            return Fused(node, pattern, owner)
    value = max(inputs, key=lambda v: _value(v).dim())
    kind = "group" if "group" in kernel else "other"
    return Quantiser(node, _before_views(value), kind, "triton", kernel=kernel)


# ---- plain torch code ------------------------------------------------------------------------------------------------


def _native(codes: fx.Node) -> Quantiser:
    scaled: Any = _before_conversions(codes.args[0])
    while called_op(scaled) in _CLAMPS:
        scaled = _before_conversions(scaled.args[0])
    if called_op(scaled) not in ("aten.mul", "aten.div"):
        return Quantiser(codes, scaled, "cast", "native")
    factors = [a for a in scaled.args if isinstance(a, fx.Node)]
    # The value is what has a number for each code; what has fewer is the scale.
    value = next((a for a in factors if _known(_value(a).numel() == _value(codes).numel())), factors[0])
    value = _before_conversions(value)
    kind, size = "static", None
    for maximum in _maxima(codes, value):
        kind, size = _reduced(maximum, value)
    return Quantiser(codes, value, kind, "native", size)


def _known(condition: Any) -> bool:
    """Whether a condition on sizes holds for every value of the symbols in them; asking must not add a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _before_conversions(node: Any) -> Any:
    """Before views, and the conversion to fp32 that a quantiser begins with."""
    while node.target in VIEWS or (node.target is CONVERT and node.args[1] == torch.float32):
        node = node.all_input_nodes[0]
    return node


def _maxima(codes: fx.Node, value: fx.Node) -> Iterator[fx.Node]:
    """The reductions between a value and its codes."""
    todo, seen = [codes], {value}
    while todo:
        node = todo.pop()
        for before in node.all_input_nodes:
            if before not in seen and called_op(before) in _MADE_OF:
                seen.add(before)
                todo.append(before)
                if called_op(before) in ("aten.amax", "aten.max"):
                    yield before


def _reduced(maximum: fx.Node, value: fx.Node) -> tuple[str, int | None]:
    """What a quantiser's maximum is of, and a group's size."""
    source: Any = maximum.all_input_nodes[0]
    before, after = _value(source), _values(maximum)[0]
    if _known(after.numel() == 1) or before.dim() < 2:
        return "tensor", None
    width = before.shape[-1]
    splits_rows = before.dim() > _value(value).dim() or not _known(width == _value(value).shape[-1])
    return ("group", width) if splits_rows and isinstance(width, int) else ("token", None)
