# SPDX-License-Identifier: Apache-2.0
"""A gated RMS norm, head by head, and the group quantiser after it: what follows linear attention. The patterns are
RMSNormQuantFusionPass's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, ClassVar, NamedTuple

import torch
import vllm.model_executor.layers.layernorm as norm_layers
from torch import fx
from torch._inductor.pattern_matcher import Match

from ..graph import CONVERT, OpIndex
from ..ops import gated_rms_norm_quant  # noqa: F401  (registers the op)
from ..ops.quant import GROUP_SIZES
from . import quantisers
from .pattern import PatternReplacement, empty, make_layer

ROWS, HEADS, GROUPS = 5, 3, 4  # example sizes: unlike each other and unlike 1, so that no two dimensions are mistaken

aten = torch.ops.aten

# ---- gated RMS norm --------------------------------------------------------------------------------------------------

# An op that a graph with the gate has in any case.
GATE_OPS = {"silu": "aten.exp", "sigmoid": "aten.sigmoid"}


def gated_rms_norm(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, epsilon: float, norm_before_gate: bool, activation: str
) -> torch.Tensor:
    """RMSNormGated's native form along the last dimension of x, gated by z."""
    layer = make_layer(
        norm_layers.RMSNormGated,
        hidden_size=x.shape[-1],
        eps=epsilon,
        norm_before_gate=norm_before_gate,
        activation=activation,
    )
    del layer.weight
    layer.weight = weight  # a traced tensor, which a parameter cannot be
    return layer.forward_native(x, z)


class GatedRMSNormGroupQuant(PatternReplacement):
    """x and z [N, H, D] or [N * H, D] -> RMSNormGated -> [N, H * D] -> group quantiser.

    Inputs are x, z, weight, the quantiser's buffers, and epsilon. How many heads there are, and how wide, is seen where the
    pattern matches, so layers of several kinds can be in one model.
    """

    scalars: ClassVar[tuple[float, ...]] = (0.0123,)

    def __init__(
        self,
        activation: str,
        norm_before_gate: bool,
        weight_dtype: torch.dtype,
        quant: quantisers.GroupQuant,
        dtype: torch.dtype,
        precision_casts: bool,
        flattens: bool = False,
        groups: int = GROUPS,
    ) -> None:
        """`flattens`: the pattern begins with the reshape to [N * H, D]. `groups`: of the quantiser in a head."""
        self.activation = activation
        self.norm_before_gate = norm_before_gate
        self.weight_dtype = weight_dtype
        self.quant = quant
        self.inexactness = quant.inexactness
        self.dtype = dtype
        self.norm_rounding = "eager" if precision_casts else "native"
        self.flattens = flattens
        self.groups = groups

    def possible(self, ops: OpIndex) -> bool:
        kind = (self.norm_before_gate, self.weight_dtype == torch.float32)
        found = ((norm.before_gate, norm.weight.target is not CONVERT) for norm in norms(ops.get("aten.rsqrt", [])))
        return GATE_OPS[self.activation] in ops and self.quant.possible(ops) and kind in found

    def key(self) -> str:
        traits = [self.activation, "norm first" if self.norm_before_gate else "gate first"]
        traits += ["float32 weight"] if self.weight_dtype == torch.float32 else []
        traits += ["flattens"] if self.flattens else ["a group a head"] if self.groups == 1 else []
        return f"gated_rms_norm[{','.join(traits)}]+{self.quant}"

    def inputs(self) -> list[torch.Tensor]:
        width = self.groups * self.quant.scales.group_size
        x, z = (empty(ROWS, HEADS, width, dtype=self.dtype) for _ in range(2))
        return [x, z, empty(width, dtype=self.weight_dtype), *self.quant.inputs(ROWS, HEADS * width)]

    def heads(self, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x and z as the norm sees them."""
        return (x.reshape(-1, weight.shape[0]), z.reshape(-1, weight.shape[0])) if self.flattens else (x, z)

    @staticmethod
    def shape(x: torch.Tensor, buffers: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        """[N, H * D]: of the quantiser's buffer, because with x [N * H, D] nothing else knows how many heads there are."""
        return buffers[0].shape if buffers else (x.shape[0], x.shape[1:].numel())

    def pattern(self, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
        *buffers, epsilon = rest
        shape = self.shape(x, tuple(buffers))
        x, z = self.heads(x, z, weight)
        y = gated_rms_norm(x, z, weight, epsilon, self.norm_before_gate, self.activation)
        return self.quant(y.reshape(shape), *buffers)

    def replacement(self, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
        *buffers, epsilon = rest
        q, num_heads = self.quant, self.shape(x, tuple(buffers))[1] // weight.shape[0]
        x, z = self.heads(x, z, weight)
        return torch.ops.vllm_fusion_plugin.gated_rms_norm_group_fp8_quant.default(
            x,
            z,
            weight,
            epsilon,
            num_heads,
            self.norm_before_gate,
            self.activation,
            *q.scales,
            self.norm_rounding,
            q.rounding,
            *q.fp8,
        )

    def refuse(self, match: Match) -> str | None:
        if not self.quant.has_buffers:
            return None
        return self.quant.refuse(*(match.kwargs[f"arg{i}"].meta["val"] for i in (3, 4)))


def patterns(
    dtype: torch.dtype, precision_casts: bool, quants: list[quantisers.GroupQuant] | None = None
) -> Iterator[GatedRMSNormGroupQuant]:
    """quants: by default all of vLLM's."""
    quants = quantisers.group_quants(GROUP_SIZES) if quants is None else quants
    for activation, norm_before_gate, weight_dtype, quant in product(
        GATE_OPS, (True, False), (dtype, torch.float32), quants
    ):
        # An opaque quantiser has a reshape before it, and all there is to know in its buffers. A native one begins with a
        # reshape of its own, and two in a row become one, or none if that changes nothing. One without buffers does not tell
        # how many heads there are, so the pattern begins where they can be seen.
        variants: list[dict[str, Any]] = [{}]
        if quant.variant == "native":
            variants += [{"groups": 1}]
        if not quant.has_buffers:
            variants += [{"flattens": True}]
        for variant in variants:
            yield GatedRMSNormGroupQuant(
                activation, norm_before_gate, weight_dtype, quant, dtype, precision_casts, **variant
            )


class Norm(NamedTuple):
    """A norm in plain torch code that may be gated."""

    result: fx.Node
    weight: fx.Node
    before_gate: bool


def norms(rsqrts: Iterable[fx.Node]) -> Iterator[Norm]:
    """The gated norms that 1 / sqrt(...) at these nodes may belong to."""
    for node in rsqrts:
        chain = []
        while len(node.users) == 1:
            node = next(iter(node.users))
            if node.target is not aten.mul.Tensor:
                break
            chain.append(node)
        # x / rms, times weight, times gate if that comes last; then back to the model's dtype
        if len(chain) in (2, 3) and node.target is CONVERT:
            normed, scaled = chain[:2]
            weight = next((a for a in scaled.args if a is not normed), None)
            if isinstance(weight, fx.Node):
                yield Norm(node, weight, before_gate=len(chain) == 3)


def results(graph: fx.Graph) -> Iterator[fx.Node]:
    """Results of gated norms in the graph."""
    for norm in norms(graph.find_nodes(op="call_function", target=aten.rsqrt.default)):
        yield norm.result
