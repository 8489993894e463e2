# SPDX-License-Identifier: Apache-2.0
"""ActivationQuantFusionPass: SiLU·mul and the quantiser after it become one op. Stands in for vLLM's pass of that name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.pattern_matcher import Match
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul

from .. import report, roundings
from ..graph import OpIndex, called_op
from ..ops import silu_mul_quant  # noqa: F401  (registers the ops)
from ..ops.quant import GROUP_SIZES
from . import producers, quantisers, sigmoid_mul_quant
from .base import FusionPass
from .pattern import PatternReplacement, empty, functionalized, has_op

ROWS, GROUPS = 5, 4  # example sizes: unlike each other and unlike 1, so that no two dimensions are mistaken

aten = torch.ops.aten

# ---- SiLU·mul --------------------------------------------------------------------------------------------------------


def silu_mul_custom_op(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    return functionalized(torch.ops._C.silu_and_mul.default, result=out, input=x)[1]


# An op that a graph with the variant has in any case.
SILU_MUL_OPS = {"native": "aten.exp", "custom_op": "_C.silu_and_mul"}


def silu_mul_variants() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Variant -> function of x [M, 2 * K]."""
    variants: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"native": SiluAndMul.forward_native}
    if has_op("silu_and_mul"):
        variants["custom_op"] = silu_mul_custom_op
    return variants


def _rounding(variant: str, precision_casts: bool) -> str:
    """act_rounding to hand to the op: the roundings that the graph's SiLU·mul would have made."""
    if variant == "custom_op":
        return roundings.of(roundings.SILU_MUL).name
    return "eager" if precision_casts else "native"


class SiluMulQuant(PatternReplacement):
    """Common to all: x [M, 2 * K] -> SiLU·mul in one of its variants -> a quantiser.

    Outputs are the quantiser's, then SiLU·mul's result if something else reads it (`keep_act`).
    """

    def __init__(
        self, variant: str, quant: Any, dtype: torch.dtype, precision_casts: bool, keep_act: bool = False
    ) -> None:
        self.variant = variant
        self.keep_act = keep_act
        self.silu_mul = silu_mul_variants()[variant]
        self.quant = quant
        self.dtype = dtype
        self.roundings = {
            "act_rounding": _rounding(variant, precision_casts),
            "quant_rounding": quant.rounding,
        }
        self.inexactness = quant.inexactness or (
            roundings.of(roundings.SILU_MUL).reason if variant == "custom_op" else ""
        )

    def possible(self, ops: OpIndex) -> bool:
        if SILU_MUL_OPS[self.variant] not in ops or not self.quant.possible(ops):
            return False
        return not self.keep_act or any(len(y.users) > self.quant.readers for y in silu_mul_outputs(ops, self.variant))

    def key(self) -> str:
        rounding = "" if self.roundings["act_rounding"] == self.variant else f",{self.roundings['act_rounding']}"
        return f"silu_mul[{self.variant}{rounding}]+{self.quant}" + ("+act" if self.keep_act else "")

    def quantised(self, x: torch.Tensor, *inputs: torch.Tensor) -> Any:
        """The outputs of a dynamic quantiser after SiLU·mul of x, and the latter if it is kept."""
        y = self.silu_mul(x)
        return (*self.quant(y, *inputs), *([y] if self.keep_act else []))

    def refuse(self, match: Match) -> str | None:
        x = match.kwargs["arg0"].meta["val"]
        if x.dim() != 2:
            return f"input has {x.dim()} dimensions; fused where there are 2"
        if x.dtype not in (torch.bfloat16, torch.float16):
            return f"input is {x.dtype}; fused for bfloat16 and float16"
        if x.stride(-1) != 1:
            return "input's columns are strided"
        if self.keep_act and self.variant == self.quant.variant == "native":
            return (
                "SiLU·mul's result has other users too, which read it rounded, and a quantiser in plain torch code does "
                "not; fused with vLLM's quantiser op"
            )
        return None


class SiluMulGroupQuant(SiluMulQuant):
    quant: quantisers.GroupQuant

    def inputs(self) -> list[torch.Tensor]:
        width = GROUPS * self.quant.scales.group_size
        return [empty(ROWS, 2 * width, dtype=self.dtype), *self.quant.inputs(ROWS, width)]

    def pattern(self, x: torch.Tensor, *buffers: torch.Tensor) -> Any:
        return self.quantised(x, *buffers)

    def replacement(self, x: torch.Tensor, *buffers: torch.Tensor) -> Any:
        how = (*self.quant.scales, *self.roundings.values(), self.keep_act, *self.quant.fp8)
        return torch.ops.vllm_fusion_plugin.silu_mul_group_fp8_quant.default(x, *how)

    def refuse(self, match: Match) -> str | None:
        if reason := super().refuse(match):
            return reason
        if not self.quant.has_buffers:
            return None
        return self.quant.refuse(*(match.kwargs[f"arg{i}"].meta["val"] for i in (1, 2)))


class SiluMulTokenQuant(SiluMulQuant):
    quant: quantisers.TokenQuant

    def inputs(self) -> list[torch.Tensor]:
        width = GROUPS * 16
        return [empty(ROWS, 2 * width, dtype=self.dtype), *self.quant.inputs(ROWS, width)]

    def pattern(self, x: torch.Tensor, *inputs: torch.Tensor) -> Any:
        return self.quantised(x, *inputs)

    def replacement(self, x: torch.Tensor, *inputs: torch.Tensor) -> Any:
        how = (self.quant.bound_of(inputs), *self.roundings.values(), self.keep_act, *self.quant.fp8)
        return torch.ops.vllm_fusion_plugin.silu_mul_token_fp8_quant.default(x, *how)

    def refuse(self, match: Match) -> str | None:
        values = [match.kwargs[f"arg{1 + i}"].meta["val"] for i in range(self.quant.input_count)]
        return super().refuse(match) or self.quant.refuse(*values)


class SiluMulStaticQuant(SiluMulQuant):
    quant: quantisers.StaticQuant

    def inputs(self) -> list[torch.Tensor]:
        width = GROUPS * 16
        x = empty(ROWS, 2 * width, dtype=self.dtype)
        return [x, empty(1, dtype=torch.float32), *self.quant.inputs(ROWS, width)]

    def pattern(self, x: torch.Tensor, scale: torch.Tensor, *buffers: torch.Tensor) -> Any:
        return self.quant(self.silu_mul(x), scale, *buffers)

    def replacement(self, x: torch.Tensor, scale: torch.Tensor, *buffers: torch.Tensor) -> Any:
        return torch.ops.vllm_fusion_plugin.silu_mul_static_fp8_quant.default(
            x, scale, self.roundings["act_rounding"], self.roundings["quant_rounding"], *self.quant.fp8
        )

    def refuse(self, match: Match) -> str | None:
        if reason := super().refuse(match):
            return reason
        scale = match.kwargs["arg1"].meta["val"]
        return None if scale.numel() == 1 else f"{scale.numel()} scales; fused for one scale a tensor"


class SiluMulNvfp4Quant(SiluMulQuant):
    quant: quantisers.Nvfp4Quant

    def __init__(self, variant: str, quant: Any, dtype: torch.dtype, precision_casts: bool, kernel: str) -> None:
        super().__init__(variant, quant, dtype, precision_casts)
        self.kernel = kernel if has_op("silu_and_mul_nvfp4_quant") else "ours"

    def key(self) -> str:
        return f"{super().key()}[{self.kernel}]"

    def inputs(self) -> list[torch.Tensor]:
        width = GROUPS * 16
        x = empty(ROWS, 2 * width, dtype=self.dtype)
        return [x, empty(1, dtype=torch.float32), *self.quant.inputs(ROWS, width)]

    def pattern(self, x: torch.Tensor, global_scale: torch.Tensor, *buffers: torch.Tensor) -> Any:
        return self.quant(self.silu_mul(x), global_scale, *buffers)

    def replacement(self, x: torch.Tensor, global_scale: torch.Tensor, *buffers: torch.Tensor) -> Any:
        if self.kernel == "ours":
            return torch.ops.vllm_fusion_plugin.silu_mul_nvfp4_quant.default(
                x, global_scale, self.roundings["act_rounding"]
            )
        codes, scales = buffers
        return auto_functionalized(
            torch.ops._C.silu_and_mul_nvfp4_quant.default,
            result=codes,
            result_block_scale=scales,
            input=x,
            input_global_scale=global_scale,
        )[1:]

    def refuse(self, match: Match) -> str | None:
        if reason := super().refuse(match):
            return reason
        scale = match.kwargs["arg1"].meta["val"]
        return None if scale.numel() == 1 else f"{scale.numel()} global scales; fused for one a tensor"


class ActivationQuantFusionPass(FusionPass):
    """Fuses SiLU·mul with the FP8 (group, token or static) or NVFP4 quantiser after it, and attention's sigmoid gate
    with the FP8 group quantiser after it.

    Both SiLU·mul and the quantiser may be vLLM's custom ops or decomposed to aten. Takes a VllmConfig, as stock does.
    """

    name: ClassVar[str] = "activation_quant_fusion_pass"

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        dtype, precision_casts = self.rows_dtype, self.precision_casts
        for keep_act in (False, True):  # the other way round, nothing would be left for False
            for variant in silu_mul_variants():
                for group_quant in quantisers.group_quants(GROUP_SIZES):
                    self.register(SiluMulGroupQuant(variant, group_quant, dtype, precision_casts, keep_act))
                for token_quant in quantisers.token_quants():
                    self.register(SiluMulTokenQuant(variant, token_quant, dtype, precision_casts, keep_act))
        for variant in silu_mul_variants():
            for static_quant in quantisers.static_quants():
                self.register(SiluMulStaticQuant(variant, static_quant, dtype, precision_casts))
            for nvfp4_quant in quantisers.nvfp4_quants():
                kernel = self.settings.nvfp4_kernel
                self.register(SiluMulNvfp4Quant(variant, nvfp4_quant, dtype, precision_casts, kernel))
        for gate in sigmoid_mul_quant.patterns(dtype, precision_casts):
            self.register(gate)
        self.dump(config)

    def explain(self, graph: fx.Graph) -> None:
        """Of what no quantiser follows: what one follows is leftovers.py's."""
        quantised = producers.before_quantisers(graph)
        ops = OpIndex(graph)
        for node in (y for variant in SILU_MUL_OPS for y in silu_mul_outputs(ops, variant)):
            if node not in self.seen_in_refused and node not in quantised:
                report.RECORDER.missed(self.name, _why(node), report.module_of(node))


def silu_mul_outputs(ops: OpIndex, variant: str) -> list[fx.Node]:
    """Results of SiLU·mul of that variant in a graph with these ops."""
    nodes = ops.get(SILU_MUL_OPS[variant], [])
    if variant == "native":
        return [product for node in nodes if (product := _native_product(node)) is not None]
    users = (user for node in nodes for user in node.users)
    return [user for user in users if user.target is operator.getitem and user.args[1] == 1]


def _native_product(exp: fx.Node) -> fx.Node | None:
    """From the exp of x / (1 + exp(-x)) down to its product with up."""
    node = exp
    for targets in (
        (aten.add.Tensor,),
        (aten.div.Tensor,),
        (torch.ops.prims.convert_element_type.default, aten.mul.Tensor),
    ):
        users = [user for user in node.users if user.target in targets]
        if len(users) != 1:
            return None
        node = users[0]
    if node.target is aten.mul.Tensor:
        return node
    products = [user for user in node.users if user.target is aten.mul.Tensor]
    return products[0] if len(products) == 1 else None


def _why(product: fx.Node) -> str:
    """What becomes of a SiLU·mul that no quantiser follows."""
    users = list(product.users)
    while len(users) == 1 and users[0].target is aten.reshape.default:
        users = list(users[0].users)
    if all(user.op == "output" for user in users):
        return "SiLU·mul's result leaves the compiled graph here, unquantised"
    names = sorted({called_op(user) if user.op == "call_function" else user.op for user in users})
    return f"SiLU·mul is followed by {', '.join(names)}; no quantiser"
