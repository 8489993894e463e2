# SPDX-License-Identifier: Apache-2.0
"""vLLM's own pass after ours of the same name, on what ours has left: so it is on ROCm, where vLLM also fuses what no kernel
of this package has the bytes of. What it finds is in the report as vLLM's.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass

from .. import report
from ..graph import called_op, quantised
from .pattern import copy_nodes
from .quantiser_nodes import find

logger = logging.getLogger("vllm.fusion_plugin")


class Follower(InductorPass):
    """vLLM's pass, with a name, a count and a uuid as it has them."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.pass_name = getattr(stock, "pass_name", type(stock).__name__)

    @property
    def matched_count(self) -> int:
        return getattr(self.stock, "matched_count", 0)

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        return self.stock.is_applicable_for_range(compile_range)

    def uuid(self) -> str:
        return f"vllm_fusion_plugin.follower {self.stock.uuid()}"

    def __call__(self, graph: fx.Graph) -> None:
        before = copy_nodes(graph, fx.Graph())
        known = {boundary.node.name for boundary in find(graph)[1]}
        try:
            self.stock(graph)
        except Exception as e:  # without ours before it, it would have met another graph
            copy_nodes(before, graph)
            self.stock.matched_count = 0
            what = (
                f"vLLM's {type(self.stock).__name__} left a graph as it was, because it failed: {type(e).__name__}: {e}"
            )
            logger.warning("vllm-fusion-plugin: %s", what, exc_info=True)
            report.RECORDER.note(what)
            return
        for boundary in find(graph)[1]:
            if boundary.node.name not in known:
                pattern = f"{boundary.pattern}[{called_op(boundary.node)}]"
                results = quantised([boundary.node, *boundary.node.users])
                report.RECORDER.found(report.VLLMS_PASS, pattern, report.module_of(boundary.node), *results)
