# SPDX-License-Identifier: Apache-2.0
"""vLLM's TritonExperts on a GPU, with its own GEMMs and ops, SiLU·mul and quantiser fused and without: the same bytes. What
is refused, and engines, are in test_experts_silu_mul_quant.py; the op by itself in
tests/kernels/test_silu_mul_quant_gpu.py."""

from __future__ import annotations

import pytest
import torch

from vllm_fusion_plugin import roundings, warmup
from vllm_fusion_plugin.ops import calls

pytestmark = pytest.mark.gpu

# Qwen3-Next, Qwen3-235B-A22B, DeepSeek-V3: columns between the GEMMs, experts a token
SHAPES = {"512x10": (512, 10), "1536x8": (1536, 8), "2048x8": (2048, 8)}
TOKENS = (1, 7, 64, 1000)


@pytest.fixture(scope="module")
def shared():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import vllm._custom_ops  # noqa: F401

    roundings.known()

    from . import experts_layer  # not before a GPU is known to be there: it imports vLLM

    return experts_layer


@pytest.fixture(autouse=True)
def hooked(shared, monkeypatch):
    shared.use_ue8m0(monkeypatch, True)
    shared.hook(monkeypatch)


@pytest.fixture
def handed(shared, monkeypatch):
    """Codes and scales that the second GEMM is handed, call by call."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    gemm, count = shared.module.invoke_fused_moe_triton_kernel, [0]

    def keeping(A, B, C, A_scale, *args, **kwargs):
        count[0] += 1
        if count[0] % 2 == 0:
            kept.append((A.clone(), A_scale.clone()))
        return gemm(A, B, C, A_scale, *args, **kwargs)

    monkeypatch.setattr(shared.module, "invoke_fused_moe_triton_kernel", keeping)
    return kept


@pytest.fixture
def ops(shared, monkeypatch):
    """How often our op is called."""
    made: list[int] = []
    op = shared.layer.silu_mul_group_fp8_quant

    def counted(x, *args, **kwargs):
        made.append(len(x))
        return op(x, *args, **kwargs)

    monkeypatch.setattr(shared.layer, "silu_mul_group_fp8_quant", counted)
    return made


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def case(shared, name: str, block: int = 128):
    width, topk = SHAPES[name]
    shape = shared.Shape(width, topk, experts=16, hidden=1024)
    weights = shared.make_weights(shape, block, "cuda")
    return shape, weights, shared.make_experts(shape, weights, block)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("name", SHAPES)
def test_bytes_of_vllm(name, block, shared, handed, ops, monkeypatch):
    shape, weights, experts = case(shared, name, block)
    # Of groups of 128 without UE8M0, vLLM runs its own fused op.
    for ue8m0 in (True,) if block == 128 else (True, False):
        shared.use_ue8m0(monkeypatch, ue8m0)
        vars(experts).pop(shared.layer._KEPT, None)
        for tokens in TOKENS:
            inputs = shared.make_inputs(shape, tokens, block, "cuda")
            handed.clear()
            ops.clear()
            with shared.left_to_vllm():
                want = shared.apply(experts, shape, weights, inputs)
            assert ops == []
            got = shared.apply(experts, shape, weights, inputs)
            assert ops == [tokens * shape.topk]
            assert vars(experts)[shared.layer._KEPT].scales == (block, "row", ue8m0)
            (want_codes, want_scales), (codes, scales) = handed
            assert same(codes, want_codes) and same(scales, want_scales), (tokens, ue8m0)
            assert scales.stride() == want_scales.stride()
            assert same(got, want) and got.isfinite().all() and got.any()


@pytest.mark.parametrize("name", SHAPES)
def test_cuda_graph(name, shared, ops):
    """Captured once, replayed on other values."""
    shape, weights, experts = case(shared, name)
    inputs = shared.make_inputs(shape, 8, 128, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels and decides, as vLLM's profile run does
        shared.apply(experts, shape, weights, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = shared.apply(experts, shape, weights, inputs)
    assert len(ops) == 2

    inputs.scales.mul_(2.5)
    inputs.topk_ids.copy_(inputs.topk_ids.flip(0))
    graph.replay()
    with shared.left_to_vllm():
        want = shared.apply(experts, shape, weights, inputs)
    assert same(output, want)


def test_no_more_memory_than_vllm(shared):
    shape, weights, experts = case(shared, "2048x8")
    inputs = shared.make_inputs(shape, 1000, 128, "cuda")

    def peak() -> int:
        shared.apply(experts, shape, weights, inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        shared.apply(experts, shape, weights, inputs)
        return torch.cuda.max_memory_allocated() - before

    fused = peak()
    with shared.left_to_vllm():
        assert fused <= peak()


@pytest.mark.usefixtures("tritons_kernels")
def test_the_warm_up_has_every_kernel(shared, monkeypatch):
    """The profile run's call is repeated for every tile; then no number of tokens compiles anything."""
    from vllm_fusion_plugin.kernels.silu_mul_quant import _group_kernel

    monkeypatch.setattr(calls, "CALLS", {})
    calls.record()
    shape, weights, experts = case(shared, "512x10")
    try:
        shared.apply(experts, shape, weights, shared.make_inputs(shape, 1024, 128, "cuda"))
        assert list(calls.CALLS.values()) == [1024 * shape.topk]
        assert not warmup.warm_up(1024).failed
    finally:
        calls.record(False)

    def count() -> int:
        return sum(len(caches[0]) for caches in _group_kernel.device_caches.values())

    compiled = count()
    for tokens in (1, 2, 3, 5, 16, 33, 100, 257, 999, 1024):
        shared.apply(experts, shape, weights, shared.make_inputs(shape, tokens, 128, "cuda"))
    assert count() == compiled
