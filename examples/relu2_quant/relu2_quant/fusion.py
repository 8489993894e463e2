# SPDX-License-Identifier: Apache-2.0
"""The pass: what it looks for in vLLM's graphs, and what it puts in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.pattern_matcher import Match
from vllm.config import VllmConfig

from vllm_fusion_plugin.graph import OpIndex
from vllm_fusion_plugin.passes.base import FusionPass
from vllm_fusion_plugin.passes.pattern import PatternReplacement, empty, functionalized, has_op
from vllm_fusion_plugin.passes.quantisers import FP8, StaticQuant

from .op import relu2_static_fp8_quant

ROWS, WIDTH = 5, 16  # an example's


class ReLU2StaticQuant(PatternReplacement):
    """vLLM's op for ReLU², then its op for static FP8, each of which writes into a buffer."""

    quant = StaticQuant("custom_op")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def key(self) -> str:
        return f"relu2[custom_op]+{self.quant}"

    def possible(self, ops: OpIndex) -> bool:
        return "_C.relu_squared" in ops and self.quant.possible(ops)

    def inputs(self) -> list[torch.Tensor]:
        x, out = (empty(ROWS, WIDTH, dtype=self.dtype) for _ in range(2))
        return [x, empty(1, dtype=torch.float32), out, *self.quant.inputs(ROWS, WIDTH)]

    def pattern(self, x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, codes: torch.Tensor) -> Any:
        y = functionalized(torch.ops._C.relu_squared.default, out=out, input=x)[1]
        return self.quant(y, scale, codes)

    def replacement(self, x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, codes: torch.Tensor) -> Any:
        return relu2_static_fp8_quant(x, scale)

    def refuse(self, match: Match) -> str | None:
        scale = match.kwargs["arg1"].meta["val"]
        return None if scale.numel() == 1 else f"{scale.numel()} scales; fused for one scale a tensor"


class ReLU2QuantPass(FusionPass):
    """Takes a VllmConfig."""

    name = "relu2_quant"

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        known = FP8.dtype == torch.float8_e4m3fn  # some of AMD's GPUs have another format
        if known and has_op("relu_squared") and has_op("static_scaled_fp8_quant"):
            for dtype in (torch.bfloat16, torch.float16):
                if self.model_dtype in (dtype, None):
                    self.register(ReLU2StaticQuant(dtype))
        self.dump(config)
