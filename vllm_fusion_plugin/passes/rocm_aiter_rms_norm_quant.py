# SPDX-License-Identifier: Apache-2.0
"""RocmAiterRMSNormQuantFusionPass: an RMS norm and AITER's group or token quantiser after it become one op. Stands in for
vLLM's pass of that name, which runs after it on what is left.

Which op is the setting `rocm_kernels`: this package's, with the bytes of the two, or AITER's own for both. A token quantiser
after a norm of AITER's is left to vLLM's pass, which puts AITER's op there in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import fx
from torch._inductor.pattern_matcher import Match
from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass
from vllm.config import VllmConfig

from .. import compat, report
from . import gated_rms_norm_quant, mla_dual_rms_norm_quant, norms, quantisers
from .base import FusionPass
from .gated_rms_norm_quant import GatedRMSNormGroupQuant
from .rms_norm_quant import RMSNormGroupQuant, RMSNormTokenQuant

NORM_OP, ADD_NORM_OP = "rocm_aiter_rmsnorm_fp8_group_quant", "rocm_aiter_rmsnorm_with_add_fp8_group_quant"
GATED_OP = "rocm_aiter_fused_rms_gated_fp8_group_quant"


class AiterRMSNormGroupQuant(RMSNormGroupQuant):
    """AITER's op for the norm and its quantiser, whatever the epsilon."""

    def key(self) -> str:
        return f"{super().key()}[aiter]"

    def replacement(self, *inputs: Any) -> Any:
        x, weight, residual, _, epsilon = self.split(inputs)
        size = self.quant.scales.group_size
        if residual is None:
            return compat.aiter_op(NORM_OP)(x, weight, epsilon, size)
        codes, total, scales = compat.aiter_op(ADD_NORM_OP)(x, residual, weight, epsilon, size)
        return [codes, scales, *([total] if self.norm.sum_used else [])]

    def refuse(self, match: Match) -> str | None:
        x = match.kwargs["arg0"].meta["val"]
        return None if x.dim() == 2 else f"input has {x.dim()} dimensions; AITER's op takes 2"


class AiterGatedRMSNormGroupQuant(GatedRMSNormGroupQuant):
    """AITER's op for a gated norm and its quantiser, where a head is one group."""

    def key(self) -> str:
        return f"{super().key()}[aiter]"

    def replacement(self, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
        (epsilon,) = rest
        rows, width = self.shape(x, ())
        size = weight.shape[0]
        # Rows of heads, as vLLM hands them over.
        x, z = x.reshape(-1, size), z.reshape(-1, size)
        codes, scales = compat.aiter_op(GATED_OP)(
            x, weight, None, z, epsilon, self.norm_before_gate, self.activation, size
        )
        return codes.reshape(rows, width), scales.reshape(rows, width // size)

    def refuse(self, match: Match) -> str | None:
        weight = match.kwargs["arg2"].meta["val"]
        if (size := weight.shape[0]) != self.quant.scales.group_size:
            return f"heads of {size}; AITER's op takes heads of one group, {self.quant.scales.group_size}"
        return None


class RocmAiterRMSNormQuantFusionPass(FusionPass):
    """Fuses RMS norms, plain, with an addition before them or gated, with AITER's group quantiser. Takes a VllmConfig."""

    name: ClassVar[str] = "rocm_aiter_rms_norm_quant_fusion_pass"

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        dtype, precision_casts = self.rows_dtype, self.precision_casts
        quants = quantisers.aiter_group_quants()
        of_aiter = self.settings.rocm_kernels == "aiter" and can_be_had("norms", NORM_OP, ADD_NORM_OP)
        for keep_norm in (False, True):  # the other way round, nothing would be left for False
            for norm in norms.rms_norms():
                kind = AiterRMSNormGroupQuant if of_aiter and _takes(norm, keep_norm) else RMSNormGroupQuant
                for quant in quants:
                    self.register(kind(norm, keep_norm, quant, dtype, precision_casts))
                for token_quant in quantisers.aiter_token_quants():
                    self.register(RMSNormTokenQuant(norm, keep_norm, token_quant, dtype, precision_casts))
        of_aiter = self.settings.rocm_kernels == "aiter" and can_be_had("gated norms", GATED_OP)
        for pattern in self._gated(quants, of_aiter, dtype, precision_casts):
            self.register(pattern)
        self.dump(config)

    @staticmethod
    def _gated(
        quants: list[quantisers.GroupQuant], of_aiter: bool, dtype: torch.dtype, precision_casts: bool
    ) -> Iterator[GatedRMSNormGroupQuant]:
        for exact in gated_rms_norm_quant.patterns(dtype, precision_casts, quants):
            takes = exact.norm_before_gate and exact.activation == "silu"
            if of_aiter and takes:
                yield AiterGatedRMSNormGroupQuant(**vars_of(exact))
            else:
                yield exact

    def prepare(self, graph: fx.Graph) -> None:
        quantisers.share_equal_aiter_quantisers(graph)

    def finish(self, graph: fx.Graph) -> None:
        if merged := mla_dual_rms_norm_quant.merge(graph):
            VllmPatternMatcherPass.match_table[mla_dual_rms_norm_quant.NAME] += merged


def can_be_had(what: str, *aiters_ops: str) -> bool:
    """Whether AITER's ops for `what` can be had; if not, the report says why."""
    reason = next(filter(None, map(compat.why_no_aiter_kernel, aiters_ops)), "")
    if reason:
        report.RECORDER.note(f"{what} run this package's kernel, with rocm_kernels='aiter': {reason}")
    return not reason


def vars_of(pattern: GatedRMSNormGroupQuant) -> dict[str, Any]:
    """The arguments that such a pattern was made with."""
    return {
        "activation": pattern.activation,
        "norm_before_gate": pattern.norm_before_gate,
        "weight_dtype": pattern.weight_dtype,
        "quant": pattern.quant,
        "dtype": pattern.dtype,
        "precision_casts": pattern.norm_rounding == "eager",
        "flattens": pattern.flattens,
        "groups": pattern.groups,
    }


def _takes(norm: norms.RMSNorm, keep_norm: bool) -> bool:
    """Whether AITER's op is one for such a norm: with a weight as it is, and the norm's result for the quantiser alone."""
    return norm.variant == "ir" and not norm.gemma and not keep_norm
