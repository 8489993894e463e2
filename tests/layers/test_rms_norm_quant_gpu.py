# SPDX-License-Identifier: Apache-2.0
"""vLLM's RMSNorm and MLPs on a GPU, outside of compiled code, with its own ops and GEMMs, with the norm writing codes and
without: the same but for the order in which a row's squares are added up. The op by itself in
tests/kernels/test_rms_norm_quant_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_fusion_plugin import roundings, warmup
from vllm_fusion_plugin.ops import calls

pytestmark = pytest.mark.gpu

HIDDEN, WIDTH = 7168, 2048
ROWS = (1, 31, 32, 33, 1000)


@pytest.fixture(scope="module")
def shared():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import vllm._custom_ops  # noqa: F401

    roundings.known()

    from . import mlp_layer  # not before a GPU is known to be there: it imports vLLM

    yield mlp_layer
    mlp_layer.no_rank()


@pytest.fixture
def config(shared, monkeypatch):
    from vllm_fusion_plugin.layers import rms_norm_quant

    monkeypatch.setattr(rms_norm_quant, "_problem", "")
    monkeypatch.setattr(calls, "CALLS", {})
    monkeypatch.setattr(calls, "_recording", True)  # as before an engine serves
    with shared.engine() as made, torch.inference_mode():
        made.kernel_config.ir_op_priority.set_default()  # as a worker does
        yield made


class Layer(torch.nn.Module):
    def __init__(self, shared: Any) -> None:
        from vllm.model_executor.layers.layernorm import RMSNorm

        super().__init__()
        self.norm = RMSNorm(HIDDEN, eps=1e-6, dtype=torch.bfloat16).cuda()
        self.norm.weight.data = shared.rows(1, HIDDEN)[0] / 8 + 1
        self.mlp = shared.make("DeepseekV2MLP", HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed, total = self.norm(x, residual)
        return normed, self.mlp(normed), total


def inputs(shared: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    both = shared.rows(2 * count, HIDDEN)
    return both[:count].clone(), both[count:].clone()


def attached(config: Any, layer: Layer) -> Any:
    from vllm_fusion_plugin.layers import rms_norm_quant

    rms_norm_quant.attach(layer, config)
    return layer


def test_rows_that_are_the_same_give_the_same_bytes(shared, config):
    layer = Layer(shared)
    want = [[out.clone() for out in layer(*inputs(shared, count))] for count in ROWS]
    attached(config, layer)(*inputs(shared, 8))  # watched
    differing = total = 0
    for count, (normed, product, summed) in zip(ROWS, want, strict=True):
        got = layer(*inputs(shared, count))
        case = layer.norm._forward_method.case
        assert not case.reason and case.norm_rounding == "custom_op", case
        assert torch.equal(got[2].view(torch.int16), summed.view(torch.int16))
        off = got[0].view(torch.int16) != normed.view(torch.int16)
        differing, total = differing + int(off.sum()), total + off.numel()
        same = ~off.any(dim=1)
        assert torch.equal(got[1][same].view(torch.int16), product[same].view(torch.int16)), count
        torch.testing.assert_close(got[1].float(), product.float(), rtol=0.05, atol=0.05)
    # a row whose inverse is an ulp off has a few numbers off in 16 bits: ops/rms_norm_quant.py
    assert differing <= 1e-4 * total, (differing, total)


def test_cuda_graph(shared, config):
    layer = attached(config, Layer(shared))
    x, residual = inputs(shared, 8)
    for _ in range(2):
        layer(x.clone(), residual.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x, residual)
    others = inputs(shared, 9)
    x.copy_(others[0][1:])
    residual.copy_(others[1][1:])
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(out, layer(x.clone(), residual.clone()), strict=True):
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))


def test_the_warm_up_has_every_kernel(shared, config):
    from vllm_fusion_plugin.kernels import rms_norm_quant as kernels

    layer = attached(config, Layer(shared))
    for _ in range(2):
        layer(*inputs(shared, 64))
    assert list(calls.CALLS.values()) == [64]
    assert not warmup.warm_up(1024).failed
    calls.record(False)
    jit = [value for value in vars(kernels).values() if hasattr(value, "device_caches")]

    def count() -> int:
        return sum(len(caches[0]) for one in jit for caches in one.device_caches.values())

    compiled = count()
    for tokens in (1, 2, 3, 16, 31, 32, 33, 100, 257, 1024):
        layer(*inputs(shared, tokens))
    assert compiled and count() == compiled
