# SPDX-License-Identifier: Apache-2.0
"""Repeated calls on a GPU: the bytes of a call that is thought through, on other data, and in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_fusion_plugin.ops import registry, repeats

from .checks import assert_same_bytes
from .test_fuzz_arguments import right

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("tritons_kernels")]

OPS = [op for op in sorted(registry.CUDA_IMPLEMENTATIONS) if registry.is_repeated(op)]


def arguments(op: str, device: torch.device, seed: int) -> list[Any]:
    """Arguments of an op, floats among the tensors random."""
    generator = torch.Generator(device=device).manual_seed(seed)
    overload = getattr(torch.ops.vllm_fusion_plugin, op).default
    made = []
    for argument in overload._schema.arguments:
        value = right(argument.name, op)
        if isinstance(value, torch.Tensor):
            value = value.to(device)
            if value.dtype == torch.bfloat16:
                value = torch.randn(value.shape, generator=generator, device=device).to(value.dtype)
        made.append(value)
    return made


def outputs(op: str, result: Any, given: list[Any]) -> list[torch.Tensor]:
    """What a call wrote: its result, or, without one, the buffers that it was given."""
    if result is None:
        written = registry.SIGNATURES[op].written
        return [given[i] for i in sorted(written)]
    return [result] if isinstance(result, torch.Tensor) else list(result)


def same(op: str, found: Any, given: list[Any], what: str) -> None:
    again = [a.clone() if isinstance(a, torch.Tensor) else a for a in given]
    expected = registry.CUDA_IMPLEMENTATIONS[op](*again)
    pairs = zip(outputs(op, found, given), outputs(op, expected, again), strict=True)
    for i, (one, other) in enumerate(pairs):
        assert_same_bytes(one, other, f"{op}, {what}, output {i}")


@pytest.mark.parametrize("op", OPS)
def test_repeated_calls_have_the_bytes_of_the_first(op: str, device: torch.device) -> None:
    overload = getattr(torch.ops.vllm_fusion_plugin, op).default
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        call = repeats.Repeat.__call__
        patch.setattr(repeats.Repeat, "__call__", lambda self, given: (ran.append(op), call(self, given))[1])
        for seed in range(4):
            given = arguments(op, device, seed)
            same(op, overload(*given), given, f"call {seed}")
    # MLA's up-projection may read through descriptors, which hold addresses
    assert len(ran) == 3 or op.startswith("mla_v_up")
    assert not repeats.broken


@pytest.mark.parametrize("op", OPS)
def test_repeated_calls_in_a_graph(op: str, device: torch.device) -> None:
    overload = getattr(torch.ops.vllm_fusion_plugin, op).default
    given = arguments(op, device, 7)
    overload(*given)
    overload(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = overload(*given)
    for position, value in enumerate(arguments(op, device, 8)):
        if isinstance(value, torch.Tensor):
            given[position].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    same(op, result, given, "in a graph")
