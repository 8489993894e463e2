# SPDX-License-Identifier: Apache-2.0
"""What is fused in whole models on AMD's GPUs, by vLLM's passes and by ours. Traced without a GPU; see trace_model.py.

Three of the processes that rocm_column.py has: AITER on and off, either FP8 format. docs/rocm.md has the whole table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tracer import TraceError, Tracer

from vllm_fusion_plugin import fusions
from vllm_fusion_plugin.tracing import fake_gpu

pytestmark = pytest.mark.slow

ACT, NORM, LONE = "activation_quant_fusion_pass", "rmsnorm_quant_fusion_pass", "group_quant_pass"
AITER_ACT = "rocm_aiter_silu_mul_fp8_group_quant_fusion_pass"
AITER_NORM, STOCK_AITER_NORM = "rocm_aiter_rms_norm_quant_fusion_pass", "RocmAiterRMSNormQuantFusionPass"
STOCK_NORM = "RMSNormQuantFusionPass"
DUAL = "mla_dual_rms_norm_fusion_pass"
QWEN, NEXT, DEEPSEEK = "qwen3-8b-8layers", "qwen3-next-8layers", "deepseek-v3-5layers"
OFF, ON = {"VLLM_ROCM_USE_AITER": "0"}, {"VLLM_ROCM_USE_AITER": "1"}
AITER_KERNELS = {"VLLM_FUSION_PLUGIN_SETTINGS": '{"rocm_kernels": "aiter"}'}

Trace = Callable[..., dict[str, Any]]


def tracer(gpu: str, env: dict[str, str]) -> Iterator[Trace]:
    if reason := fake_gpu.unavailable():
        pytest.skip(reason)
    with Tracer(gpu, env) as made:

        def trace(model: str, plugin: bool = True, **options: Any) -> dict[str, Any]:
            try:
                return made.trace(model, plugin=plugin, **options)
            except TraceError as e:
                pytest.fail(str(e), pytrace=False)

        yield trace


@pytest.fixture(scope="module")
def mi300x() -> Iterator[Trace]:
    yield from tracer("mi300x", OFF)


@pytest.fixture(scope="module")
def mi300x_aiter() -> Iterator[Trace]:
    yield from tracer("mi300x", ON)


@pytest.fixture(scope="module")
def mi355x_aiter() -> Iterator[Trace]:
    yield from tracer("mi355x", ON)


def counts(trace: dict[str, Any]) -> dict[str, int]:
    """Fusions over all layers, by pass; passes that found none are left out."""
    return {name: count for name, count in trace["matches_by_layer"].items() if count}


def patterns(trace: dict[str, Any]) -> Counter[str]:
    return Counter(found["pattern"] for sub in trace["plugin"]["subgraphs"] for found in sub["found"])


def ops(trace: dict[str, Any]) -> Counter[str]:
    """Of ours, how many calls there are over all layers."""
    total: Counter[str] = Counter()
    for graph in trace["graphs"]:
        for op, count in graph["ops_after"].items():
            if op.startswith("vllm_fusion_plugin."):
                total[op.split(".")[1]] += count * graph["reuses"]
    return total


def test_without_aiter(mi300x):
    """e4m3fnuz, ±224: vLLM's op writes these codes, and so do ours in its place."""
    assert counts(mi300x(QWEN, plugin=False)) == {STOCK_NORM: 16}
    trace = mi300x(QWEN)
    assert counts(trace) == {NORM: 16, ACT: 8, LONE: 8}
    assert ops(trace) == {"rms_norm_group_fp8_quant": 16, "silu_mul_group_fp8_quant": 8, "group_fp8_quant": 8}
    assert not any("per_token_group_fp8_quant" in op for graph in trace["graphs"] for op in graph["ops_after"])


def test_gated_norms_without_aiter(mi300x):
    trace = mi300x(NEXT)
    assert counts(trace)[NORM] == 14 and ops(trace)["gated_rms_norm_group_fp8_quant"] == 6


def test_passes_are_where_vllms_are(mi355x_aiter):
    stock, trace = (mi355x_aiter(QWEN, plugin=plugin) for plugin in (False, True))
    first, *names = [path.rpartition(".")[2] for path in stock["passes"]]
    of_no_other = {fusion.name for where in ("first", "last") for fusion in fusions.entering(where)} | {"Leftovers"}
    ours = [name for path in trace["passes"] if (name := path.rpartition(".")[2]) not in of_no_other]
    assert ours == [first, *(part for name in names for part in (name, "Follower"))]
    assert trace["linear_kernels"] == stock["linear_kernels"] == {"AiterFp8BlockScaledMMKernel": 32}
    before = [[graph["ops_before"] for graph in t["graphs"]] for t in (stock, trace)]
    assert before[0] == before[1]


def test_norms_of_aiter_are_left_to_vllms_pass(mi355x_aiter):
    """No kernel of ours has the bytes of AITER's norm."""
    assert counts(mi355x_aiter(QWEN, plugin=False)) == {STOCK_AITER_NORM: 16, AITER_ACT: 8}
    trace = mi355x_aiter(QWEN)
    assert counts(trace) == {STOCK_AITER_NORM: 16, AITER_ACT: 8}
    assert ops(trace) == {"silu_mul_group_fp8_quant": 8}
    assert sum(n for pattern, n in patterns(trace).items() if "rocm_aiter" in pattern) == 16
    left = {missed["reason"] for sub in trace["plugin"]["subgraphs"] for missed in sub["missed"]}
    assert len(left) == 1 and "AITER's kernel runs by itself" in left.pop()


def test_norms_in_plain_code_are_ours(mi355x_aiter):
    """Gated norms, and Gemma's, whose weights are fp32: AITER has no kernel for these, so vLLM's norm is torch code."""
    assert counts(mi355x_aiter(NEXT, plugin=False)) == {STOCK_AITER_NORM: 3}
    trace = mi355x_aiter(NEXT)
    assert counts(trace) == {AITER_NORM: 14}
    assert ops(trace) == {"gated_rms_norm_group_fp8_quant": 6, "rms_norm_group_fp8_quant": 8}


def test_latent_attention(mi355x_aiter):
    stock = {STOCK_AITER_NORM: 11, AITER_ACT: 1, DUAL: 5}
    assert counts(mi355x_aiter(DEEPSEEK, plugin=False)) == stock
    assert counts(mi355x_aiter(DEEPSEEK)) == stock


def test_aiters_kernels(mi300x_aiter):
    """Asked for, AITER's ops stand where vLLM puts them, and where vLLM's pass does not see that it could."""
    trace = mi300x_aiter(NEXT, env=AITER_KERNELS)
    assert counts(trace) == {AITER_NORM: 14}
    gated = sum(
        graph["ops_after"].get("vllm.rocm_aiter_fused_rms_gated_fp8_group_quant.default", 0) * graph["reuses"]
        for graph in trace["graphs"]
    )
    assert (gated, ops(trace)) == (6, {"rms_norm_group_fp8_quant": 8})
    assert sum(n for pattern, n in patterns(trace).items() if pattern.endswith("[aiter]")) == 6
    trace = mi300x_aiter(QWEN, env=AITER_KERNELS)
    assert counts(trace) == {AITER_NORM: 16, AITER_ACT: 8} and ops(trace) == {}
    assert sum(n for pattern, n in patterns(trace).items() if pattern.endswith("[aiter]")) == 24
