# SPDX-License-Identifier: Apache-2.0
"""MLAAttnQuantFusionPass: latent attention (MLA) and the quantiser after it become one attention op with quantised output.

Stands in for vLLM's pass of that name, and puts vLLM's own op in place. That op quantises its output at its end, whatever
the backend: the codes are those of vLLM's quantiser over the output in the model's dtype. For FP8 in groups,
layers/mla_v_up_quant.py takes the quantiser into the V up-projection.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch._inductor.pattern_matcher import Match
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.mla_attention import MLAAttention

from .. import compat, report
from ..ops.quant import FP8_DTYPE, GROUP_SIZES
from . import quantisers
from .attn_quant import HEADS, ROWS, AttentionOp, AttentionQuant, AttentionQuantPass

LATENT, NOPE, ROPE, V = 48, 32, 16, 128  # example sizes, as in attn_quant

# How the op knows a group quantiser; it finds the group size in the scales' shape, too.
GROUP_ARGUMENTS = ("quant_group_size", "quant_scale_ue8m0", "quant_col_major", "quant_tma_aligned")


class MLAAttentionGroupQuant(AttentionQuant):
    """Only the custom-op variant of the quantiser: vLLM's attention op runs that one, and the native one's bytes differ."""

    quant: quantisers.GroupQuant

    @property
    def quant_key(self) -> str:
        return f"kFp8Dynamic{self.quant.scales.group_size}Sym"

    def quant_inputs(self, rows: int, width: int) -> list[torch.Tensor]:
        return self.quant.inputs(rows, width)

    def replacement(self, *inputs: Any) -> Any:
        attention, (_, scales) = self.split(inputs)
        output, q = attention["output"], self.quant
        codes = torch.empty(output.shape, dtype=FP8_DTYPE, device=output.device)
        size, layout, ue8m0 = q.scales
        values = (size, ue8m0, layout != "row", layout == "tma")
        return self.attend(
            attention
            | {"output": codes, "output_block_scale": scales}
            | dict(zip(GROUP_ARGUMENTS, values, strict=True))
        )

    def refuse(self, match: Match) -> str | None:
        return self.quant.refuse(self.quant_input(match, 0), self.quant_input(match, 1)) or super().refuse(match)


class MLAAttnQuantFusionPass(AttentionQuantPass):
    """Fuses MLA attention with the static FP8, NVFP4 or group FP8 quantiser after it, layer by layer.

    The static quantiser may be vLLM's custom op or decomposed to aten; groups are of 64 or 128, scales in any of the
    layouts. Takes a VllmConfig, as stock does.
    """

    name: ClassVar[str] = "mla_attn_quant_fusion"
    can = "FP8 with one static scale, NVFP4, and FP8 in groups of 64 or 128 by the custom op (custom_ops +quant_fp8)"

    def __init__(self, config: VllmConfig) -> None:
        op = torch.ops.vllm.unified_mla_attention_with_output.default
        query = (ROWS, HEADS, NOPE + ROPE)
        arguments = {
            "q": query,
            "kv_c_normed": (ROWS, LATENT),
            "k_pe": (ROWS, 1, ROPE),
            "output": (ROWS, HEADS * V),
            "kv_cache_dummy_dep": (0,),
        }
        if compat.op_takes(op, "q_dcp_replicated"):  # since 0.32; None in most graphs, which a wildcard takes as well
            arguments["q_dcp_replicated"] = query
        layers = compat.attention_layers(config, MLAAttention)
        super().__init__(config, AttentionOp("mla_attention", op, arguments, layers))

    def register_patterns(self, attention: AttentionOp, dtype: torch.dtype, layer_name: str | None) -> None:
        super().register_patterns(attention, dtype, layer_name)
        if not compat.op_takes(attention.op, *GROUP_ARGUMENTS):
            report.RECORDER.note(f"{self.name}: this vLLM's MLA op writes no FP8 in groups")
            return
        for group_quant in quantisers.group_quants(GROUP_SIZES):
            # vLLM's attention op knows no packed scales
            if group_quant.variant == "custom_op" and group_quant.scales.layout != "packed":
                self.register(MLAAttentionGroupQuant(attention, group_quant, dtype, layer_name))
