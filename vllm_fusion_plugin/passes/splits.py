# SPDX-License-Identifier: Apache-2.0
"""A quantiser that was inside an op of vLLM's: put in front of it, and taken back where nothing has fused it.

block_gemm.py and experts_input_quant.py say which ops, and what stands for them meanwhile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import quantisers

# Of a node whose op needs exact strides: its arguments when it was traced, to which Inductor holds them.
EAGER_INPUTS = "eager_input_vals"


def insert_quantiser(node: fx.Node, arguments: tuple[Any, ...], values: Any, variant: str) -> tuple[fx.Node, fx.Node]:
    """Put this package's quantiser in front of an op of vLLM's; codes and scales.

    arguments: the quantiser's. values: what it writes, as fake tensors. variant: that of `quantisers.GroupQuant`."""
    graph, meta = node.graph, {name: value for name, value in node.meta.items() if name != EAGER_INPUTS}
    with graph.inserting_before(node):
        both = graph.call_function(torch.ops.vllm_fusion_plugin.group_fp8_quant.default, arguments)
        both.meta = meta | {"val": values, quantisers.SPLIT: variant}
        codes, scales = (graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
    for result, value in zip((codes, scales), values, strict=True):
        result.meta = meta | {"val": value}
    return codes, scales


def replace(node: fx.Node, target: Any, arguments: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Let a call of another op stand for a node; meta: what differs in that from the node's."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, arguments)
    new.meta = node.meta | meta
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def join(graph: fx.Graph, variant: str, put_back: Callable[[fx.Node, fx.Node], None]) -> None:
    """Take away the quantisers of that variant that nothing has fused.

    put_back: called with the quantiser's input and each op that reads codes and scales; lets vLLM's op stand for it."""
    for quantiser in quantisers.split_quantisers(graph, variant):
        (x, *_), results = quantiser.args, list(quantiser.users)
        # each once: an op reads both codes and scales
        for node in dict.fromkeys(user for result in results for user in result.users):
            put_back(x, node)  # type: ignore[arg-type]
        for result in results:
            graph.erase_node(result)
        graph.erase_node(quantiser)
