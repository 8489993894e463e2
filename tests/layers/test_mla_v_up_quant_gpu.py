# SPDX-License-Identifier: Apache-2.0
"""vLLM's MLAAttention.forward_impl on a GPU, with the V up-projection that quantises and without: vLLM's own quantiser on
rows of larger buffers, and CUDA graphs. More on what is done with which rows in test_mla_v_up_quant.py; the op by itself in
tests/kernels/test_mla_v_up_quant_gpu.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from vllm_fusion_plugin import report, roundings

pytestmark = pytest.mark.gpu

LAYOUTS = ("row", "column", "tma")
BATCHES = ("decode", "one-token", "prefill", "mixed", "decode-padded", "prefill-padded", "mixed-padded")


@pytest.fixture(scope="module")
def shared():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import vllm._custom_ops  # noqa: F401

    roundings.known()  # asked before the tests forbid to wait for the GPU

    from . import mla_layer  # not before a GPU is known to be there: it imports vLLM

    return mla_layer


@pytest.fixture(autouse=True)
def hooked(shared, monkeypatch):
    shared.hook(monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_bytes_of_vllm_and_zeros_behind(batch, layout, shared):
    _, actual, decoded = shared.BATCHES[batch]
    for dtype, group_size, ue8m0 in itertools.product((torch.bfloat16, torch.float16), (64, 128), (False, True)):
        layer = shared.make_layer(dtype, device="cuda")
        want_codes, want_scales = shared.by_vllm(layer, batch, group_size, layout, ue8m0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            codes, scales = shared.run(layer, batch, group_size, layout, ue8m0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(codes[:actual], want_codes[:actual])
        assert torch.equal(scales[:actual], want_scales[:actual])
        assert not codes[actual:].any()
        assert not scales[actual:].any()
        assert (shared.everything(scales) >= 0).all()
    noted = ["MLA's V up-projection quantises decode rows"] if decoded else []
    assert report.RECORDER.report.notes == noted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", ["decode", "mixed-padded"])
def test_cuda_graph(batch, layout, shared):
    """Captured once, replayed on other values."""
    layer = shared.make_layer(device="cuda")
    codes, scales = shared.buffers(shared.BATCHES[batch][0], 128, layout, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernel, as vLLM's warm-up does
        shared.attend(layer, batch, codes, scales, layout=layout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shared.attend(layer, batch, codes, scales, layout=layout)

    layer.impl.latent.copy_(layer.impl.latent.flip(0) * 2)
    layer.impl.prefilled.mul_(-3)
    codes.view(torch.uint8).fill_(0x7F)
    shared.everything(scales).fill_(-1)
    graph.replay()
    want_codes, want_scales = shared.run(layer, batch, layout=layout)
    assert torch.equal(codes.view(torch.uint8), want_codes)
    assert torch.equal(shared.everything(scales), shared.everything(want_scales))
