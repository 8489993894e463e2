# SPDX-License-Identifier: Apache-2.0
"""MLPs of vLLM's model code on a GPU, by themselves, with vLLM's own GEMMs and ops, SiLU·mul and quantiser fused and
without: the same bytes, of each kernel that vLLM may choose. What is left to vLLM is in test_silu_mul_quant.py; the op by
itself in tests/kernels/test_silu_mul_quant_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_fusion_plugin import roundings, warmup
from vllm_fusion_plugin.ops import calls

pytestmark = pytest.mark.gpu

# Shared experts of Qwen3-Next and DeepSeek-V3, an MLP of Qwen3-8B: hidden size, columns between the GEMMs
SHAPES = {"512": (2048, 512), "2048": (7168, 2048), "12288": (4096, 12288)}
ROWS = (1, 31, 32, 33, 1000)
KERNELS = (
    "FlashInferFp8DeepGEMMDynamicBlockScaledKernel",
    "DeepGemmFp8BlockScaledMMKernel",
    "CutlassFp8BlockScaledMMKernel",
    "TritonFp8BlockScaledMMKernel",
)


@pytest.fixture(scope="module")
def shared():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import vllm._custom_ops  # noqa: F401

    roundings.known()

    from . import mlp_layer  # not before a GPU is known to be there: it imports vLLM

    yield mlp_layer
    mlp_layer.no_rank()


@pytest.fixture(autouse=True)
def clean(shared, monkeypatch):
    monkeypatch.setattr(shared.layer, "_problem", "")
    with torch.inference_mode():
        yield


@pytest.fixture
def choose(monkeypatch):
    """Have vLLM run one kernel."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import current_platform

    def chosen(name: str) -> None:
        kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS
        # FlashInfer's alone is in no list
        kind = next((k for k in kernels[current_platform._enum] if k.__name__ == name), None) or getattr(
            linear, name, None
        )
        if kind is None:
            pytest.skip(f"this vLLM has no {name}")
        monkeypatch.setitem(kernels, current_platform._enum, [kind])

    return chosen


@pytest.fixture
def fused_rows(shared, monkeypatch) -> list[int]:
    made: list[int] = []
    op = shared.layer.silu_mul_group_fp8_quant

    def counted(x, *args, **kwargs):
        made.append(len(x))
        return op(x, *args, **kwargs)

    monkeypatch.setattr(shared.layer, "silu_mul_group_fp8_quant", counted)
    return made


def make(shared: Any, shape: str = "512", name: str = "DeepseekV2MLP") -> Any:
    try:
        return shared.make(name, *SHAPES[shape])
    except ValueError as e:
        pytest.skip(f"vLLM cannot run it here: {e}")


def attach(shared: Any, config: Any, mlp: Any) -> None:
    shared.layer.attach(torch.nn.ModuleDict({"mlp": mlp}), config)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.view(torch.int16), want.view(torch.int16))


def check(shared: Any, config: Any, mlp: Any, fused_rows: list[int], act_rounding: str) -> None:
    hidden = mlp.gate_up_proj.input_size
    want = [mlp(shared.rows(count, hidden)) for count in ROWS]
    assert fused_rows == []
    attach(shared, config, mlp)
    for count, expected in zip(ROWS, want, strict=True):
        fused_rows.clear()
        got = mlp(shared.rows(count, hidden))
        assert fused_rows == [count], mlp.act_fn._forward_method.case
        assert same(got, expected), (count, mlp.act_fn._forward_method.case.pattern)
        assert got.isfinite().all() and got.any()
    assert mlp.act_fn._forward_method.case.act_rounding == act_rounding


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_bytes_of_vllm(kernel, shape, shared, choose, fused_rows):
    choose(kernel)
    with shared.engine() as config:
        check(shared, config, make(shared, shape), fused_rows, roundings.of(roundings.SILU_MUL).name)


@pytest.mark.parametrize("compiled", [False, True])
def test_native_activations(compiled, shared, fused_rows):
    """As torch runs them, and as Inductor compiles them for shared experts of models that vLLM compiles."""
    from vllm.config import CompilationMode

    mode = CompilationMode.VLLM_COMPILE if compiled else CompilationMode.NONE
    with shared.engine("none", "+quant_fp8", mode=mode) as config:
        check(shared, config, make(shared, name="Qwen2MoeMLP"), fused_rows, "native" if compiled else "eager")


def test_flashinfers_kernel_alone_is_left_to_vllm(shared, choose, fused_rows):
    choose("FlashInferFp8BlockScaledMMKernel")
    with shared.engine() as config:
        mlp = make(shared)
        want = mlp(shared.rows(4, 2048))
        attach(shared, config, mlp)
        assert same(mlp(shared.rows(4, 2048)), want)
    assert fused_rows == []
    assert "quantises inside of its GEMM" in mlp.act_fn._forward_method.case.reason


@pytest.mark.parametrize("rows", [8, 64])
def test_cuda_graph_on_another_stream(rows, shared):
    """Captured once, replayed on other values, as shared experts on vLLM's second stream."""
    with shared.engine() as config:
        mlp = make(shared)
        x = shared.rows(rows, 2048)
        attach(shared, config, mlp)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            mlp(x)  # compiles, as vLLM's warm-up does
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            output = mlp(x)
        x.copy_(shared.rows(rows + 1, 2048)[1:] * 3)
        graph.replay()
        torch.cuda.synchronize()
        with shared.left_to_vllm():
            assert same(output, mlp(x))


def test_no_more_memory_than_vllm(shared):
    with shared.engine() as config:
        mlp = make(shared, "2048")
        x = shared.rows(4096, 7168)
        attach(shared, config, mlp)

        def peak() -> int:
            mlp(x)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            mlp(x)
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
    with shared.engine() as config:
        mlp = make(shared)
        try:
            attach(shared, config, mlp)  # tells what will be called; no engine need run the model before it serves
            assert list(calls.CALLS.values()) == [32]
            assert not warmup.warm_up(1024).failed
        finally:
            calls.record(False)

        def count() -> int:
            return sum(len(caches[0]) for caches in _group_kernel.device_caches.values())

        compiled = count()
        for tokens in (1, 2, 3, 5, 16, 31, 32, 33, 100, 257, 999, 1024):
            mlp(shared.rows(tokens, 2048))
        assert count() == compiled
