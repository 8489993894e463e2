# SPDX-License-Identifier: Apache-2.0
"""AttnQuantFusionPass: attention and the quantiser after it become one attention op with quantised output.

Stands in for vLLM's pass of that name. There is no op of ours here: what replaces a match is vLLM's own attention op,
handed a quantised output buffer and the scale, for those layers whose backend says that it can write one. The codes are the
backend's: it quantises what it has in fp32, without the rounding to the model's dtype in between.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._inductor.pattern_matcher import Match
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from .. import compat, report
from ..graph import OpIndex, called_op
from ..ops.quant import FP8_DTYPE
from . import producers, quantisers
from .base import FusionPass
from .pattern import PatternReplacement, empty, functionalized

# Example sizes: unlike each other and unlike 1, so that no two dimensions are mistaken.
ROWS, HEADS, HEAD_SIZE = 5, 3, 64

aten = torch.ops.aten

# vLLM's names for the quantisers that an attention backend may support, and ours in reports.
QUANTISERS = {
    "kFp8StaticTensorSym": "FP8 with one static scale",
    "kNvfp4Dynamic": "NVFP4",
    "kFp8Dynamic64Sym": "FP8 in groups of 64",
    "kFp8Dynamic128Sym": "FP8 in groups of 128",
}


@dataclass(frozen=True)
class AttentionOp:
    """One of vLLM's attention ops, and the layers of the model that call it."""

    name: str
    op: torch._ops.OpOverload
    arguments: Mapping[str, tuple[int, ...]]
    """The op's tensors in a graph with unquantised output -> shapes for an example."""
    layers: Mapping[str, Any]

    @property
    def graph_name(self) -> str:
        return self.op._schema.name.replace("::", ".")

    def pattern_names(self) -> list[str | None]:
        """The layer names that patterns are made for: one for all layers where the name is an input, which a pattern takes
        for a wildcard, one for each where it is a string, which cannot be one."""
        return [None] if compat.layer_names_are_inputs() else list(self.layers)

    def layers_of(self, node: fx.Node) -> list[Any]:
        """The layers that the code compiled for a node may run."""
        alike = node.graph.find_nodes(op=node.op, target=node.target, sort=False)
        calls = sum(called_op(n) == self.graph_name for n in alike)
        return compat.layers_by(node.kwargs.get("layer_name"), calls, self.layers)

    def backends(self, node: fx.Node) -> str:
        return ", ".join(sorted(set(map(compat.attention_backend, self.layers_of(node))))) or "unknown backend"

    def why_not(self, node: fx.Node, quant_key: str) -> str | None:
        """Why a node's output cannot be written quantised; None if it can."""
        layers = self.layers_of(node)
        if not layers:
            return f"vLLM's config has no layer {compat.layer_name_of(node.kwargs['layer_name'])!r} to ask"
        unable = {compat.attention_backend(x) for x in layers if not compat.writes_quantised_output(x, quant_key)}
        return f"{', '.join(sorted(unable))} cannot write {QUANTISERS[quant_key]}" if unable else None


class AttentionQuant(PatternReplacement):
    """Common to all: attention -> a reshape to [tokens, width], where there is one -> a quantiser.

    Inputs are those of attention (its tensors, and its layer name if that is an input), then those of the quantiser.
    """

    def __init__(self, attention: AttentionOp, quant: Any, dtype: torch.dtype, layer_name: str | None) -> None:
        self.attention = attention
        self.quant = quant
        self.dtype = dtype
        self.layer_name = layer_name
        self.names = [*attention.arguments, *([] if layer_name else ["layer_name"])]

    @property
    def quant_key(self) -> str:
        """What vLLM's backends know the quantiser by."""
        raise NotImplementedError

    def key(self) -> str:
        layer = f"[{self.layer_name}]" if self.layer_name else ""
        return f"{self.attention.name}{layer}+{self.quant}"

    def possible(self, ops: OpIndex) -> bool:
        found = [compat.layer_name_of(n.kwargs.get("layer_name")) for n in ops.get(self.attention.graph_name, [])]
        return bool(found) and self.layer_name in (None, *found) and self.quant.possible(ops)

    def inputs(self) -> list[Any]:
        tensors = [empty(*shape, dtype=self.dtype) for shape in self.attention.arguments.values()]
        name = [] if self.layer_name else [compat.encode_layer_name("any")]
        rows, *width = self.attention.arguments["output"]
        return [*tensors, *name, *self.quant_inputs(rows, torch.Size(width).numel())]

    def quant_inputs(self, rows: int, width: int) -> list[torch.Tensor]:
        return [empty(1, dtype=torch.float32), *self.quant.inputs(rows, width)]

    def split(self, inputs: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """Attention's arguments by name, and the quantiser's inputs."""
        arguments = {"layer_name": self.layer_name, "output_scale": None, "output_block_scale": None}
        count = len(self.names)
        return arguments | dict(zip(self.names, inputs[:count], strict=True)), inputs[count:]

    def attend(self, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """Attention's output as [tokens, width], then its block scales if it is given any."""
        op = self.attention.op
        # In the order of the schema, as the graph has them: in another, Inductor's matcher takes them for another call.
        ordered = {a.name: arguments[a.name] for a in op._schema.arguments if a.name in arguments}
        _, output, *scales = functionalized(op, **ordered)
        return output.reshape(output.shape[0], output.shape[1:].numel()), *scales

    def pattern(self, *inputs: Any) -> Any:
        attention, quant = self.split(inputs)
        return self.quant(self.attend(attention)[0], *quant)

    def refuse(self, match: Match) -> str | None:
        (node,) = (n for n in match.nodes if called_op(n) == self.attention.graph_name)
        given = sorted(k for k, v in node.kwargs.items() if v is not None and k not in (*self.names, "layer_name"))
        if given:
            return f"attention is also given {', '.join(given)}"
        return self.attention.why_not(node, self.quant_key)

    def quant_input(self, match: Match, position: int) -> torch.Tensor:
        return match.kwargs[f"arg{len(self.names) + position}"].meta["val"]


class AttentionStaticQuant(AttentionQuant):
    quant: quantisers.StaticQuant
    quant_key = "kFp8StaticTensorSym"

    def replacement(self, *inputs: Any) -> Any:
        attention, (scale, *_) = self.split(inputs)
        return self.attend(attention | {"output": _empty_like(attention["output"], FP8_DTYPE), "output_scale": scale})[
            0
        ]

    def refuse(self, match: Match) -> str | None:
        count = self.quant_input(match, 0).numel()
        return super().refuse(match) if count == 1 else f"{count} scales; fused for one scale a tensor"


class AttentionNvfp4Quant(AttentionQuant):
    quant: quantisers.Nvfp4Quant
    quant_key = "kNvfp4Dynamic"

    def pattern(self, *inputs: Any) -> Any:
        codes, scales = super().pattern(*inputs)
        return codes, aten.view.dtype(scales, FP8_DTYPE)  # in the pattern because the op's buffer is such a view

    def replacement(self, *inputs: Any) -> Any:
        attention, (global_scale, _, scales) = self.split(inputs)
        return self.attend(
            attention
            | {
                "output": _empty_like(attention["output"], torch.uint8, codes_a_byte=2),
                "output_scale": global_scale,
                "output_block_scale": aten.view.dtype(scales, FP8_DTYPE),
            }
        )

    def refuse(self, match: Match) -> str | None:
        count = self.quant_input(match, 0).numel()
        return super().refuse(match) if count == 1 else f"{count} global scales; fused for one a tensor"


def _empty_like(output: torch.Tensor, dtype: torch.dtype, codes_a_byte: int = 1) -> torch.Tensor:
    *shape, last = output.shape
    return torch.empty([*shape, last // codes_a_byte], dtype=dtype, device=output.device)


class AttentionQuantPass(FusionPass):
    """Common to both passes; `attention` is the op that a pass looks for."""

    can: ClassVar[str]
    """What the op can write, where the backend can; for reports."""

    def __init__(self, config: VllmConfig, attention: AttentionOp) -> None:
        super().__init__(config)
        if current_platform.is_rocm():
            # FP8 is another type on some of its GPUs, and AITER has a static quantiser of its own.
            raise NotImplementedError("quantisers after attention are matched in their CUDA forms only")
        self.attention = attention
        for layer_name in attention.pattern_names():
            self.register_patterns(attention, self.rows_dtype, layer_name)
        self.dump(config)

    def register_patterns(self, attention: AttentionOp, dtype: torch.dtype, layer_name: str | None) -> None:
        for static_quant in quantisers.static_quants():
            self.register(AttentionStaticQuant(attention, static_quant, dtype, layer_name))
        for nvfp4_quant in quantisers.nvfp4_quants():
            self.register(AttentionNvfp4Quant(attention, nvfp4_quant, dtype, layer_name))

    def explain(self, graph: fx.Graph) -> None:
        """Of what no quantiser follows: what one follows is leftovers.py's."""
        quantised = producers.before_quantisers(graph)
        for node in graph.nodes:
            if called_op(node) != self.attention.graph_name or node in self.seen_in_refused or node in quantised:
                continue
            if node.kwargs.get("output_scale") is None and node.kwargs.get("output_block_scale") is None:
                report.RECORDER.missed(self.name, self._why(node), report.module_of(node))

    def _why(self, node: fx.Node) -> str:
        """What becomes of attention that no quantiser follows."""
        outputs = [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]
        users = [user for output in outputs for user in output.users]
        while len(users) == 1 and users[0].target is aten.reshape.default:
            users = list(users[0].users)
        if all(user.op == "output" for user in users):
            return "attention's result leaves the compiled graph here, unquantised"
        names = sorted({called_op(user) if user.op == "call_function" else user.op for user in users})
        return f"attention ({self.attention.backends(node)}) is followed by {', '.join(names)}; fused are {self.can}"

    def uuid(self) -> str:
        """Covers also what the layers' backends can write: it is not in the graph, and decides what becomes of it."""
        able = {
            name: [key for key in QUANTISERS if compat.writes_quantised_output(layer, key)]
            for name, layer in self.attention.layers.items()
        }
        return hashlib.sha256(f"{super().uuid()} {able}".encode()).hexdigest()


class AttnQuantFusionPass(AttentionQuantPass):
    """Fuses attention with the static FP8 or NVFP4 quantiser after it, layer by layer, where the layer's backend can write
    that. The static quantiser may be vLLM's custom op or decomposed to aten. Takes a VllmConfig, as stock does."""

    name: ClassVar[str] = "attn_quant_fusion"
    can = "FP8 with one static scale and NVFP4"

    def __init__(self, config: VllmConfig) -> None:
        heads = (ROWS, HEADS, HEAD_SIZE)
        attention = AttentionOp(
            "attention",
            torch.ops.vllm.unified_attention_with_output.default,
            {"query": heads, "key": heads, "value": heads, "output": heads, "kv_cache_dummy_dep": (0,)},
            compat.attention_layers(config, Attention),
        )
        super().__init__(config, attention)
