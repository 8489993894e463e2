# SPDX-License-Identifier: Apache-2.0
"""What has made a value in a graph, in words that a user of vLLM knows, and which pass fuses that with a quantiser."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .. import compat
from ..graph import CONVERT, called_op
from . import gated_rms_norm_quant, norms, sigmoid_mul_quant
from .quantiser_nodes import VIEWS, find

aten = torch.ops.aten

# What a pass of ours fuses with which quantisers: a producer's kind -> (pass, kinds of quantisers.WORDS).
FUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "silu_mul": ("ActivationQuantFusionPass", ("group", "packed", "token", "static", "nvfp4")),
    "sigmoid_mul": ("ActivationQuantFusionPass", ("group", "packed")),
    "norm": ("RMSNormQuantFusionPass", ("group", "packed", "token", "static")),
    "gated_norm": ("RMSNormQuantFusionPass", ("group", "packed")),
    "attention": ("AttnQuantFusionPass", ("static", "nvfp4")),
    "mla": ("MLAAttnQuantFusionPass", ("static", "nvfp4", "group")),
}

_ATTENTION = {
    "unified_attention_with_output": ("attention", "attention"),
    "unified_mla_attention_with_output": ("mla", "latent attention (MLA)"),
}
# What ops of ours, by a part of their names, also return.
_OURS = {"rms_norm": "norm", "silu_mul": "silu_mul"}
_MATMULS = ("mm", "addmm", "bmm", "matmul", "linear", "gemm")

# Looked through besides views, and named: with one of these, the graph is not the one that a pass looks for.
_BETWEEN: dict[Any, str] = {
    aten.constant_pad_nd.default: "a pad",
    aten.slice.Tensor: "a slice",
    aten.permute.default: "a transposition",
    aten.clone.default: "a copy",
}


@dataclass
class Producer:
    node: fx.Node
    """The node that has made the value; a graph's input if the graph has not."""
    words: str
    kind: str = ""
    """A key of FUSED; "" if no pass fuses such a thing."""
    between: list[str] = field(default_factory=list)
    """What is done to the value on its way to its reader, besides views."""
    chain: list[fx.Node] = field(default_factory=list)
    """The nodes of that way, the last one first."""

    @property
    def compiled(self) -> bool:
        """Whether Inductor generates code for it."""
        name = called_op(self.node)
        if name.startswith("vllm_ir."):
            values = fx.map_arg(self.node.args, lambda n: n.meta["val"])
            return compat.ir_provider(name.partition(".")[2], list(values)) == "native"  # type: ignore[arg-type]
        return name.startswith(("aten.", "prims.")) and not _is_matmul(name)


def of(value: fx.Node) -> Producer:
    """What has made a value, looking through views, conversions, pads, slices and the like."""
    chain, between, node = [], [], value
    while node.op == "call_function":
        if node.target is CONVERT and _is_gated_norm(node):
            break
        if node.target in _BETWEEN:
            between.append(_BETWEEN[node.target])
        elif not (node.target in VIEWS or node.target is CONVERT or _is_view_of_result(node)):
            break
        chain.append(node)
        node = node.all_input_nodes[0]
    kind, words = _describe(node, chain)
    return Producer(node, words, kind, between, chain)


def before_quantisers(graph: fx.Graph) -> set[fx.Node]:
    """What a graph's quantisers quantise, and what has made that."""
    found: set[fx.Node] = set()
    for quantiser in find(graph)[0]:
        made = of(quantiser.value)
        found |= {quantiser.value, *made.chain, made.node}
    return found


def _is_view_of_result(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node)


def _is_matmul(name: str) -> bool:
    return any(part in name.rpartition(".")[2] for part in _MATMULS)


def _describe(node: fx.Node, chain: list[fx.Node]) -> tuple[str, str]:
    """A producer's kind, and its words."""
    name = called_op(node)
    layer = make_layer(node)
    if node.op != "call_function":
        return "", "a tensor that is made outside this compiled graph"
    for op, described in _ATTENTION.items():
        if name.endswith(f".{op}"):
            return described
    if name in norms.NORM_OPS:
        if chain and chain[-1] in norms.norm_results(node)["sum"]:
            return "", "the sum that an RMS norm adds up (the residual)"
        return "norm", layer if layer.endswith("Norm") else "an RMS norm"
    if name in compat.ALLREDUCE_NORMS:
        return "norm", "an RMS norm in one op with the all-reduce before it"
    if name.startswith("vllm_fusion_plugin."):
        kind = next((kind for part, kind in _OURS.items() if part in name), "")
        return kind, f"this package's {name.partition('.')[2]}"
    if name == "_C.silu_and_mul":
        return "silu_mul", "SiLU·mul"
    if name in compat.ACTIVATION_OPS:
        return "", compat.ACTIVATION_OPS[name]
    if node.target is aten.mul.Tensor and (halves := _silu_mul(node)):
        return halves
    if sigmoid_mul_quant.is_gate(node):
        return "sigmoid_mul", "attention's sigmoid gate" if "Attention" in layer else "a sigmoid gate"
    if node.target is CONVERT:
        return "gated_norm", "a gated RMS norm"
    if layer in _LAYERS:
        return "", _LAYERS[layer]
    if layer.endswith("Norm") and name.startswith(("aten.", "prims.")):
        return "norm", f"{layer} in plain torch code"
    if _is_matmul(name):
        return "", f"a matrix product ({name})"
    return "", f"{name}, in {layer}" if layer else name


# vLLM's activation layers in words, where their native form is in the graph.
_LAYERS = {
    "SiluAndMulWithClamp": "clamped SwiGLU (SiluAndMulWithClamp)",
    "SwigluOAIAndMul": "clamped SwiGLU (SwigluOAIAndMul)",
    "SwigluStepAndMul": "clamped SwiGLU (SwigluStepAndMul)",
    "MulAndSilu": "mul·SiLU, up first (MulAndSilu)",
    "SituAndMul": "SiTU·mul (SituAndMul)",
    "GeluAndMul": "GELU·mul (GeluAndMul)",
    "GeluAndMulSparse": "GELU·mul (GeluAndMulSparse)",
    "GELU": "GELU",
    "GELUTanh": "GELU (gelu_tanh)",
    "NewGELU": "GELU (NewGELU)",
    "FastGELU": "GELU (FastGELU)",
    "QuickGELU": "GELU (QuickGELU)",
    "ReLUSquaredActivation": "relu2 (ReLUSquaredActivation)",
    "FatreluAndMul": "FATReLU·mul (FatreluAndMul)",
    "XIELU": "xIELU",
}


def make_layer(node: fx.Node) -> str:
    """The class of the innermost layer that has made a node; "" if unknown."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    layer = stack[-1][1] if isinstance(stack[-1], tuple) else stack[-1]
    return layer.__name__ if isinstance(layer, type) else str(layer).rpartition(".")[2].strip("'>")


def _is_gated_norm(node: fx.Node) -> bool:
    """Whether a conversion back to the model's dtype ends a gated norm."""
    graph = node.graph
    return any(result is node for result in gated_rms_norm_quant.results(graph))


# ---- SiLU·mul in plain torch code ------------------------------------------------------------------------------------


def _silu_mul(product: fx.Node) -> tuple[str, str] | None:
    """Kind and words of a product that has the SiLU of something in it, by what gate and up are; None if it has not."""
    for silu, up in (product.args, reversed(product.args)):
        if isinstance(silu, fx.Node) and (gate := _silu_of(silu)) is not None:
            kind, words = _gated(gate, _before_conversions(up))
            if kind and _before_conversions(silu).target is aten.mul.Tensor:
                return "", "SiLU·mul by x * sigmoid(x), which rounds unlike the x / (1 + exp(-x)) of SiLU,"
            return kind, words
    return None


def _gated(gate: fx.Node, up: Any) -> tuple[str, str]:
    halves = [_half(gate), _half(up)]
    if _clamped(gate) or _clamped(up):
        return "", "clamped SwiGLU (SiLU·mul of clamped values)"
    if None in halves or halves[0][0] is not halves[1][0]:  # type: ignore[index]
        return "", "SiLU·mul of a gate and an up that are not the two halves of one tensor"
    first = [half[1] == 0 for half in halves]  # type: ignore[index]
    if first == [False, True]:
        return "", "mul·SiLU, up first (MulAndSilu)"
    return "silu_mul", "SiLU·mul"


def _silu_of(node: fx.Node) -> fx.Node | None:
    """What a node is the SiLU of: x / (1 + exp(-x)), or x * sigmoid(x)."""
    node = _before_conversions(node)
    if node.target is aten.div.Tensor:
        x, below = (_before_conversions(a) for a in node.args[:2])
        exp = below.args[0] if isinstance(below, fx.Node) and below.target is aten.add.Tensor else None
        exp = _before_conversions(exp)
        neg = _before_conversions(exp.args[0]) if isinstance(exp, fx.Node) and exp.target is aten.exp.default else None
        if isinstance(neg, fx.Node) and neg.target is aten.neg.default and _before_conversions(neg.args[0]) is x:
            return x
    if node.target is aten.mul.Tensor:
        for x, sigmoid in ((node.args), reversed(node.args)):
            x, sigmoid = _before_conversions(x), _before_conversions(sigmoid)
            is_sigmoid = isinstance(sigmoid, fx.Node) and sigmoid.target is aten.sigmoid.default
            if is_sigmoid and _before_conversions(sigmoid.args[0]) is x:
                return x
    return None


def _before_conversions(node: Any) -> Any:
    while isinstance(node, fx.Node) and (node.target is CONVERT or node.target in VIEWS):
        node = node.all_input_nodes[0]
    return node


def _clamped(node: Any) -> bool:
    return isinstance(node, fx.Node) and called_op(node).startswith(("aten.clamp", "aten.minimum"))


def _half(node: Any) -> tuple[fx.Node, int] | None:
    """Of what a node is a part along the last dimension, and where the part begins: 0 for the first."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.slice.Tensor:
        source, dim, start = (*node.args, 0, 0)[:3]
        last = source.meta["val"].dim() - 1  # type: ignore[union-attr]
        return (_before_conversions(source), start) if dim in (-1, last) else None  # type: ignore[return-value]
    if node.target is operator.getitem and called_op(node.args[0]).startswith("aten.split"):  # type: ignore[arg-type]
        return _before_conversions(node.args[0].args[0]), node.args[1]  # type: ignore[union-attr,return-value]
    return None
