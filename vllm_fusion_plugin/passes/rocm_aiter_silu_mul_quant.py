# SPDX-License-Identifier: Apache-2.0
"""RocmAiterSiluMulFp8GroupQuantFusionPass: SiLU·mul and AITER's group or token quantiser after it become one op. Stands in
for vLLM's pass of that name, which runs after it on what is left.

Which op is the setting `rocm_kernels`: this package's, with the bytes of the two, or AITER's own for both.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig

from .. import compat
from . import quantisers
from .base import FusionPass
from .rocm_aiter_rms_norm_quant import can_be_had
from .silu_mul_quant import SiluMulGroupQuant, SiluMulTokenQuant, silu_mul_variants

OP = "rocm_aiter_act_mul_and_fp8_group_quant"


class AiterSiluMulGroupQuant(SiluMulGroupQuant):
    """AITER's op for SiLU·mul and its quantiser."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inexactness = ""  # asked for: rocm_kernels='aiter'

    def key(self) -> str:
        return f"{super().key()}[aiter]"

    def replacement(self, x: torch.Tensor, *buffers: torch.Tensor) -> Any:
        return compat.aiter_op(OP)(x, self.quant.scales.group_size)


class RocmAiterSiluMulFp8GroupQuantFusionPass(FusionPass):
    """Fuses SiLU·mul, vLLM's custom op or decomposed to aten, with AITER's group or token quantiser. Takes a VllmConfig."""

    name: ClassVar[str] = "rocm_aiter_silu_mul_fp8_group_quant_fusion_pass"

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        of_aiter = self.settings.rocm_kernels == "aiter" and can_be_had("SiLU·mul", OP)
        for keep_act in (False, True):  # the other way round, nothing would be left for False
            kind = AiterSiluMulGroupQuant if of_aiter and not keep_act else SiluMulGroupQuant
            for variant in silu_mul_variants():
                for quant in quantisers.aiter_group_quants():
                    self.register(kind(variant, quant, self.rows_dtype, self.precision_casts, keep_act))
                for token_quant in quantisers.aiter_token_quants():  # AITER has no op for both
                    self.register(
                        SiluMulTokenQuant(variant, token_quant, self.rows_dtype, self.precision_casts, keep_act)
                    )
        self.dump(config)
