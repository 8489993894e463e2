# SPDX-License-Identifier: Apache-2.0
"""RMSNormQuantFusionPass: an RMS norm and the quantiser after it become one op. Stands in for vLLM's pass of that name.

What comes out of pointwise code that Inductor compiles, a native norm reads before it is rounded, and the fused op does so
where that is a sum (residual_sums.py). Other pointwise code it reads rounded, as vLLM's own fused ops do; before a native
quantiser, where Inductor has all of it in one kernel, the norm is left to Inductor.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.pattern_matcher import Match
from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass
from vllm.config import VllmConfig

from .. import compat, report
from ..graph import OpIndex, called_op
from ..ops import rms_norm_quant  # noqa: F401  (registers the ops)
from ..ops.quant import FP8_DTYPE, GROUP_SIZES
from ..ops.rms_norm_quant import NormInputs
from . import gated_rms_norm_quant, mla_dual_rms_norm_quant, norms, producers, quantisers, residual_sums
from .base import FusionPass
from .pattern import PatternReplacement, empty

ROWS, GROUPS = 5, 4  # example sizes: unlike each other and unlike 1, so that no two dimensions are mistaken

aten = torch.ops.aten
ops = torch.ops.vllm_fusion_plugin


class RMSNormQuant(PatternReplacement):
    """Common to all: x [M, H] (+ residual) -> RMS norm in one of its variants -> a quantiser.

    Inputs are x, weight, residual if there is one, those of the quantiser, and epsilon. Outputs are the quantiser's, then
    the norm's result if something else uses it, then the sum if that is used.
    """

    scalars: ClassVar[tuple[float, ...]] = (0.0123,)

    def __init__(
        self, norm: norms.RMSNorm, keep_norm: bool, quant: Any, dtype: torch.dtype, precision_casts: bool
    ) -> None:
        self.norm = norm
        self.keep_norm = keep_norm
        self.quant = quant
        self.inexactness = quant.inexactness
        self.dtype = dtype
        self.native_rounding = "eager" if precision_casts else "native"

    def possible(self, ops: OpIndex) -> bool:
        return self.norm.possible(ops, self.keep_norm, self.quant.readers) and self.quant.possible(ops)

    def key(self) -> str:
        uses = [*(["norm"] if self.keep_norm else []), *(["sum"] if self.norm.sum_used else [])]
        return f"{self.norm}+{self.quant}" + "".join(f"+{use}" for use in uses)

    def width(self) -> int:
        return GROUPS * 16

    def quant_inputs(self) -> list[torch.Tensor]:
        return self.quant.inputs(ROWS, self.width())

    def inputs(self) -> list[torch.Tensor]:
        rows = [empty(ROWS, self.width(), dtype=self.dtype) for _ in range(1 + self.norm.add)]
        return [rows[0], empty(self.width(), dtype=self.dtype), *rows[1:], *self.quant_inputs()]

    def split(self, inputs: tuple[Any, ...]) -> tuple[Any, Any, Any, tuple[Any, ...], float]:
        """x, weight, residual or None, the quantiser's inputs, epsilon."""
        x, weight, *rest, epsilon = inputs
        residual = rest.pop(0) if self.norm.add else None
        return x, weight, residual, tuple(rest), epsilon

    def quantise(self, normed: torch.Tensor, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        return self.quant(normed, *inputs)

    def pattern(self, *inputs: Any) -> Any:
        x, weight, residual, quant_inputs, epsilon = self.split(inputs)
        normed, total = self.norm(x, residual, weight, epsilon)
        quantised = self.quantise(normed, quant_inputs)
        return (*quantised, *([normed] if self.keep_norm else []), *([total] if self.norm.sum_used else []))

    def replacement(self, *inputs: Any) -> Any:
        x, weight, residual, quant_inputs, epsilon = self.split(inputs)
        # Only what a provider looks at: under which of the ops, and on which shapes and dtypes.
        seen = x.new_empty(weight.shape, dtype=torch.float32) if self.norm.gemma else weight
        rounding = self.norm_rounding(
            [x, residual, seen, epsilon] if self.norm.op.endswith("add_rms_norm") else [x, seen, epsilon]
        )
        norm = NormInputs(x, weight, epsilon, residual, self.norm.gemma, self.keep_norm, rounding)
        outputs = self.fused(norm, quant_inputs)
        return outputs if self.norm.sum_used or residual is None else outputs[:-1]

    def fused(self, norm: NormInputs, quant_inputs: tuple[Any, ...]) -> list[torch.Tensor]:
        """Our op on the norm's inputs and the quantiser's."""
        raise NotImplementedError

    def provider(self, arguments: list[Any]) -> str:
        """Whose norm it is that the graph holds."""
        if self.norm.variant in ("custom_op", "decomposed"):
            return {"custom_op": "vllm_c", "decomposed": "native"}[self.norm.variant]
        return compat.ir_provider(self.norm.op.rpartition(".")[2], arguments)

    def norm_rounding(self, arguments: list[Any]) -> str:
        """norm_rounding to hand to the op: the roundings that the graph's norm would have made."""
        return {"native": self.native_rounding, "vllm_c": "custom_op"}[self.provider(arguments)]

    def refuse(self, match: Match) -> str | None:
        if self.norm.variant == "decomposed":
            x, weight = (match.kwargs[f"arg{i}"].meta["val"] for i in (0, 1))
            if weight.dtype != x.dtype:
                return f"weight is {weight.dtype}, and the norm's result with it; fused where it is the input's dtype"
        if self.norm.variant in ("ir", "sum"):
            (node,) = (n for n in match.nodes if called_op(n) == self.norm.op)
            provider = self.provider(list(fx.map_arg(node.args, lambda n: n.meta["val"])))
            if provider not in ("native", "vllm_c"):
                return f"vLLM runs this norm in a kernel of {provider}, whose roundings the fused op does not know"
            if self.norm.variant == "sum" and (provider, self.native_rounding) == ("native", "eager"):
                return "the sum is rounded before the norm, which the fused op with these roundings does not do"
        if self.keep_norm and self.quant.variant == "native":
            return (
                "the norm's result has other users too, which read it rounded, and a quantiser in plain torch code does "
                "not; fused with vLLM's quantiser op"
            )
        if self.quant.variant == "native" and self.norm.variant in ("ir", "sum"):
            for node in (match.kwargs["arg0"], *([match.kwargs["arg2"]] if self.norm.add else [])):
                if residual_sums.is_inlined(node):
                    return (
                        f"Inductor compiles {producers.of(node).words}, this norm and its quantiser into one kernel; "
                        "fused where what the norm reads is in memory"
                    )
        return None

    def quant_value(self, match: Match, position: int) -> torch.Tensor:
        """The quantiser's input at `position`."""
        return match.kwargs[f"arg{2 + self.norm.add + position}"].meta["val"]


class RMSNormGroupQuant(RMSNormQuant):
    quant: quantisers.GroupQuant

    def width(self) -> int:
        return GROUPS * self.quant.scales.group_size

    def fused(self, norm, quant_inputs):
        return ops.rms_norm_group_fp8_quant.default(*norm, *self.quant.scales, self.quant.rounding, *self.quant.fp8)

    def refuse(self, match: Match) -> str | None:
        if reason := super().refuse(match):
            return reason
        if not self.quant.has_buffers:
            return None
        return self.quant.refuse(self.quant_value(match, 0), self.quant_value(match, 1))


class RMSNormTokenQuant(RMSNormQuant):
    quant: quantisers.TokenQuant

    def fused(self, norm, quant_inputs):
        bound = self.quant.bound_of(quant_inputs)
        return ops.rms_norm_token_fp8_quant.default(*norm, bound, self.quant.rounding, *self.quant.fp8)

    def refuse(self, match: Match) -> str | None:
        values = [self.quant_value(match, position) for position in range(self.quant.input_count)]
        return super().refuse(match) or self.quant.refuse(*values)


class RMSNormStaticQuant(RMSNormQuant):
    quant: quantisers.StaticQuant

    def quant_inputs(self) -> list[torch.Tensor]:
        return [empty(1, dtype=torch.float32), *super().quant_inputs()]

    def quantise(self, normed: torch.Tensor, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        return (self.quant(normed, *inputs),)

    def fused(self, norm, quant_inputs):
        return ops.rms_norm_static_fp8_quant.default(*norm, quant_inputs[0], self.quant.rounding, *self.quant.fp8)

    def refuse(self, match: Match) -> str | None:
        if reason := super().refuse(match):
            return reason
        scale = self.quant_value(match, 0)
        if scale.numel() != 1:
            return f"{scale.numel()} scales; fused for one scale a tensor"
        return quantisers.refuse_codes(self.quant_value(match, 1)) if self.quant.variant == "custom_op" else None


class RMSNormNvfp4Quant(RMSNormQuant):
    """What vLLM's own pass puts in this place, FlashInfer's op: this package has none."""

    quant: quantisers.Nvfp4Quant

    def __init__(self, *arguments: Any, op: torch._ops.OpOverload) -> None:
        super().__init__(*arguments)
        self.op = op

    def key(self) -> str:
        return f"{super().key()}[vllm]"

    def quant_inputs(self) -> list[torch.Tensor]:
        return [empty(1, dtype=torch.float32), *super().quant_inputs()]

    def replacement(self, *inputs: Any) -> Any:
        x, weight, residual, quant_inputs, epsilon = self.split(inputs)
        global_scale, codes, scales = quant_inputs
        rows, width = x.shape
        results = auto_functionalized(
            self.op,
            result=codes,
            result_block_scale=scales,
            residual=residual,
            input=x,
            weight=weight,
            input_global_scale=global_scale,
            # FlashInfer wants this buffer, of full size, though with one layout asked for it does not write to it.
            block_scale_unswizzled=torch.empty((rows, width // 16), dtype=FP8_DTYPE, device=x.device),
            is_sf_swizzled_layout=self.quant.swizzled,
            epsilon=epsilon,
        )
        return results[1:] if self.norm.sum_used else results[1:3]

    def refuse(self, match: Match) -> str | None:
        x, weight = (match.kwargs[f"arg{i}"].meta["val"] for i in (0, 1))
        if weight.dtype != x.dtype:
            return f"weight is {weight.dtype}; FlashInfer's op takes the input's dtype, {x.dtype}"
        return super().refuse(match)


class RMSNormQuantFusionPass(FusionPass):
    """Fuses RMS norms, with an addition before them or without, with the FP8 quantiser after them: group, token or static.

    The norm may have the model's weight or Gemma's (weight + 1), and its result and the sum may be used elsewhere too. The
    quantiser may be vLLM's custom op or decomposed to aten. Also in this pass: gated norms (gated_rms_norm_quant.py) and the
    pair of norms of latent attention (mla_dual_rms_norm_quant.py). Takes a VllmConfig, as stock does.
    """

    name: ClassVar[str] = "rmsnorm_quant_fusion_pass"

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        inductor_config = config.compilation_config.inductor_compile_config
        self.deterministic = compat.inductor_is_deterministic(inductor_config)
        self._fingerprint += f" deterministic={self.deterministic}"
        dtype, precision_casts = self.rows_dtype, self.precision_casts
        for keep_norm in (False, True):  # the other way round, nothing would be left for False
            for norm in norms.rms_norms():
                common = (dtype, precision_casts)
                for group_quant in quantisers.group_quants(GROUP_SIZES):
                    self.register(RMSNormGroupQuant(norm, keep_norm, group_quant, *common))
                for token_quant in quantisers.token_quants():
                    self.register(RMSNormTokenQuant(norm, keep_norm, token_quant, *common))
                for static_quant in quantisers.static_quants():
                    self.register(RMSNormStaticQuant(norm, keep_norm, static_quant, *common))
        self._register_nvfp4(dtype, precision_casts)
        for pattern in gated_rms_norm_quant.patterns(dtype, precision_casts):
            self.register(pattern)
        self.dump(config)

    def _register_nvfp4(self, dtype: torch.dtype, precision_casts: bool) -> None:
        if not quantisers.nvfp4_quants() or (op := compat.flashinfer_norm_nvfp4_op()) is None:
            return
        for norm in norms.rms_norms():
            if norm.variant == "ir" and norm.add and not norm.gemma:
                for swizzled in (True, False):
                    quant = quantisers.Nvfp4Quant(swizzled=swizzled)
                    self.register(RMSNormNvfp4Quant(norm, False, quant, dtype, precision_casts, op=op))

    def prepare(self, graph: fx.Graph) -> None:
        for node in quantisers.share_equal_quantisers(graph):
            module = report.module_of(node)
            report.RECORDER.note(f"{module}: several equal {called_op(node)} of one value are computed once")

    def finish(self, graph: fx.Graph) -> None:
        residual_sums.take(graph, self.deterministic)
        if merged := mla_dual_rms_norm_quant.merge(graph):
            VllmPatternMatcherPass.match_table[mla_dual_rms_norm_quant.NAME] += merged
