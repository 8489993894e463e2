# SPDX-License-Identifier: Apache-2.0
"""GroupQuantPass: group quantisers that no other pass has fused with anything run this package's kernel.

vLLM has no pass of this kind. The op has the bytes of the one that it replaces. `lone_group_quant=false` switches it off.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx
from torch._inductor.pattern_matcher import Match
from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass
from vllm.config import VllmConfig

from .. import report
from ..graph import OpIndex, quantised
from ..ops import group_quant  # noqa: F401  (registers the op)
from ..ops.quant import GROUP_SIZES
from . import quantisers
from .base import FusionPass
from .pattern import PatternReplacement, empty

ROWS, GROUPS = 5, 4  # example sizes: unlike each other and unlike 1, so that no two dimensions are mistaken


class LoneGroupQuant(PatternReplacement):
    """x [M, K] -> group quantiser, in its custom-op variant: a native one is Inductor's to fuse."""

    def __init__(self, quant: quantisers.GroupQuant, dtype: torch.dtype) -> None:
        self.quant = quant
        self.inexactness = quant.inexactness
        self.dtype = dtype

    def possible(self, ops: OpIndex) -> bool:
        return self.quant.possible(ops)

    def key(self) -> str:
        return str(self.quant)

    def inputs(self) -> list[torch.Tensor]:
        width = GROUPS * self.quant.scales.group_size
        return [empty(ROWS, width, dtype=self.dtype), *self.quant.inputs(ROWS, width)]

    def pattern(self, x: torch.Tensor, *buffers: torch.Tensor) -> Any:
        return self.quant(x, *buffers)

    def replacement(self, x: torch.Tensor, *buffers: torch.Tensor) -> Any:
        q = self.quant
        return torch.ops.vllm_fusion_plugin.group_fp8_quant.default(x, *q.scales, q.rounding, *q.fp8)

    def refuse(self, match: Match) -> str | None:
        return self.quant.refuse(*(match.kwargs[f"arg{i}"].meta["val"] for i in (1, 2)))


class GroupQuantPass(FusionPass):
    """Puts this package's group FP8 quantiser in the place of vLLM's, wherever one is left. Takes a VllmConfig. Runs after
    all fusion passes."""

    name: ClassVar[str] = "group_quant_pass"

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        for quant in quantisers.group_quants(GROUP_SIZES):
            if quant.variant == "custom_op":
                self.register(LoneGroupQuant(quant, self.rows_dtype))
        self.dump(config)

    def finish(self, graph: fx.Graph) -> None:
        # These have been this package's op since they were split off.
        alone = 0
        for variant in (quantisers.SPLIT_GEMM, quantisers.EXPERTS):
            for node, scales in quantisers.split_quantisers(graph, variant).items():
                key = str(quantisers.GroupQuant(variant, scales))
                report.RECORDER.found(self.pass_name, key, report.module_of(node), *quantised(node.users))
                alone += 1
        self.matched_count += alone
        VllmPatternMatcherPass.match_table[self.pass_name] += alone
