# SPDX-License-Identifier: Apache-2.0
"""A subgraph to look for, with what is put in its place: how both are written, and traced into one form."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch._inductor.pattern_matcher as pm
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.pattern_matcher import Match
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform

from .. import compat
from ..graph import OpIndex
from .normalise import merge_reshapes

aten = torch.ops.aten


class DuplicatePatternError(ValueError):
    """Two patterns of one pass look for the same graph: one of them could never match."""


class PatternReplacement(ABC):
    """A subgraph to look for, and what to put in its place.

    Both are traced from plain functions on `inputs()`, so that a pattern reads like the model code that it finds.
    Parameters (group size, layout, ...) belong to the instance and to its `key()`.
    """

    scalars: ClassVar[tuple[float, ...]] = ()
    """Numbers that a pattern takes as it finds them, a norm's epsilon for example; handed over after the inputs. What is
    here stands for them in the example trace, where the matcher knows them by value: no other number of the pattern may be
    equal to it."""

    inexactness: str = ""
    """In which way the replacement's bytes are not the pattern's, as far as is known; nothing if they are."""

    @abstractmethod
    def pattern(self, *inputs: Any) -> Any:
        """The computation as the model's graph holds it."""

    @abstractmethod
    def replacement(self, *inputs: Any) -> Any:
        """The same, fused; same inputs, outputs, shapes, dtypes and strides."""

    @abstractmethod
    def inputs(self) -> list[torch.Tensor]:
        """Example tensors, made under fake tensor mode; their values are never read."""

    @abstractmethod
    def key(self) -> str:
        """Name and parameters, unique within a pass; shown in reports, hashed into the compile cache."""

    def possible(self, ops: OpIndex) -> bool:
        """Whether a graph with these ops can hold the pattern at all. A cheap look that saves tracing: tracing a pattern
        takes 50 ms or so, and of the dozens that a pass knows a model has one or two."""
        return True

    def refuse(self, match: Match) -> str | None:
        """Why a match that fits by structure is not to be replaced, or None if it is."""
        return None


def copy_nodes(source: fx.Graph, target: fx.Graph) -> fx.Graph:
    """Give `target` the nodes of `source`, metadata included, instead of its own."""
    for node in reversed(list(target.nodes)):
        target.erase_node(node)
    copies: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        copies[node] = target.node_copy(node, copies.__getitem__)
    return target


def trace(*args: Any, **kwargs: Any) -> fx.GraphModule:
    gm = pm.fwd_only(*args, **kwargs)
    view_to_reshape(gm)
    merge_reshapes(gm.graph)
    return gm


def bind(function: Callable[..., Any], arity: int) -> Callable[..., Any]:
    """A plain function of `arity` named arguments: Inductor reads argument names off the signature."""
    names = ", ".join(f"arg{i}" for i in range(arity))
    return eval(f"lambda {names}: function({names})", {"function": function})


def no_match_on_error(pattern: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor traces a pattern again with the shapes of a place that it might fit, and takes a RuntimeError for a no; any
    other error would end the compilation."""

    def traced(*inputs: Any) -> Any:
        try:
            return pattern(*inputs)
        except RuntimeError:
            raise
        except Exception as e:
            raise RuntimeError(f"{type(e).__name__}: {e}") from e

    return traced


DEVICE = current_platform.device_type


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def functionalized(op: torch._ops.OpOverload, **arguments: Any) -> tuple[Any, ...]:
    """What the graph has for an op that writes to its arguments: its results, then the arguments written to."""
    return auto_functionalized(op, **arguments)


def has_op(name: str) -> bool:
    """Whether this build of vLLM has `torch.ops._C.<name>`."""
    compat.load_custom_ops()
    return hasattr(torch.ops._C, name)


@functools.cache
def _any_config() -> VllmConfig:
    return VllmConfig()  # once: it logs, and takes longer than the layers


def make_layer(layer: Callable[..., Any], **arguments: Any) -> Any:
    # Any config will do: vLLM's CustomOp layers only look up there which forward is theirs, and forward_native is called
    # by name. Patterns are traced while compiling, when vLLM has no current config set.
    with set_current_vllm_config(_any_config(), check_compile=False):
        return layer(**arguments)
