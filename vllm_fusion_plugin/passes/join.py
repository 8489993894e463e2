# SPDX-License-Identifier: Apache-2.0
"""JoinPass: what was split so that it could fuse, and has fused with nothing, is vLLM's one op again.

It runs only with `lone_group_quant=false`; else the quantiser that is left runs this package's kernel.
"""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from . import block_gemm, experts_input_quant
from .base import FusionPass


class JoinPass(FusionPass):
    """Puts vLLM's dynamic block GEMM and its MoE op back together. Takes a VllmConfig."""

    name: ClassVar[str] = "join_pass"

    def _run(self, graph: fx.Graph) -> None:
        block_gemm.join(graph)
        experts_input_quant.join(graph)
