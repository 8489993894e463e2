# SPDX-License-Identifier: Apache-2.0
"""What is fused in whole models, layer by layer, by vLLM's passes and by ours. Traced without a GPU; see trace_model.py.

The numbers of the stock runs are those that vLLM 0.32.0 reports on an H200: they are what makes the others credible.

A trace takes half a minute on two cores when nothing else runs, and there are eight: four models and settings, each with
and without the plugin. So a new question should be put to one of these traces; the fixture makes each once.
"""

from __future__ import annotations

import dataclasses

import pytest

pytestmark = pytest.mark.slow

ACT = "activation_quant_fusion_pass"
NORM = "RMSNormQuantFusionPass"
FUSED_OP = "vllm_fusion_plugin.silu_mul_group_fp8_quant.default"


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    linear_kernel: str
    act_graphs: int
    """Distinct compiled graphs with a SiLU·mul + quant: what vLLM's match table counts."""
    act_layers: int
    norm_layers: int
    env: tuple[tuple[str, str], ...] = ()


# The GEMM decides what there is to fuse. By default vLLM takes FlashInfer's or DeepGEMM's; CUTLASS's is next in its list,
# and like DeepGEMM's it takes input that is quantised already.
CUTLASS = (("VLLM_USE_DEEP_GEMM", "0"), ("VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER", "0"))

CASES = {
    # 8 equal layers. vLLM compiles two pieces with an MLP: that between two attentions, and the last.
    "qwen3": Case("qwen3-8b-8layers", "CutlassFp8BlockScaledMMKernel", 2, 8, 16, CUTLASS),
    # 1 dense layer; in the 4 MoE layers experts and shared expert are inside one op.
    "deepseek-v3": Case("deepseek-v3-5layers", "CutlassFp8BlockScaledMMKernel", 1, 1, 11, CUTLASS),
    # As installed: this GEMM quantises inside.
    "deepseek-v3-defaults": Case("deepseek-v3-5layers", "FlashInferFp8DeepGEMMDynamicBlockScaledKernel", 0, 0, 0),
    # All MLPs inside the MoE op; norms with weight + 1 in float32, which stock's norm fusion does not take.
    "qwen3-next": Case("qwen3-next-8layers", "CutlassFp8BlockScaledMMKernel", 0, 0, 0, CUTLASS),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def by_layer(trace: dict, ops: str, op: str) -> int:
    return sum(graph[ops].get(op, 0) * graph["reuses"] for graph in trace["graphs"])


def act_pass(trace: dict) -> str:
    [path] = [path for path in trace["passes"] if path.endswith(".ActivationQuantFusionPass")]
    return path


def test_stock(case, trace_model):
    trace = trace_model(case.model, plugin=False, env=dict(case.env))
    assert set(trace["linear_kernels"]) == {case.linear_kernel}
    assert act_pass(trace).startswith("vllm.compilation.")
    assert trace["matches_by_graph"][ACT] == trace["match_table"][ACT] == case.act_graphs
    assert trace["matches_by_layer"][ACT] == case.act_layers
    assert trace["matches_by_layer"][NORM] == case.norm_layers


def test_plugin_fuses_what_stock_fuses(case, trace_model):
    stock = trace_model(case.model, plugin=False, env=dict(case.env))
    trace = trace_model(case.model, plugin=True, env=dict(case.env))
    assert trace["pass_manager"] == "vllm_fusion_plugin.pass_manager.FusionPassManager"
    assert act_pass(trace).startswith("vllm_fusion_plugin.passes.")
    assert trace["matches_by_graph"][ACT] == trace["match_table"][ACT] == case.act_graphs
    assert trace["matches_by_layer"][ACT] == by_layer(trace, "ops_after", FUSED_OP) == case.act_layers
    # The other passes, and the order of all, are as they were.
    assert [p.rpartition(".")[2] for p in trace["passes"]] == [p.rpartition(".")[2] for p in stock["passes"]]
    assert trace["linear_kernels"] == stock["linear_kernels"]


def test_plugin_meets_the_graph_that_stock_meets(case, trace_model):
    stock = trace_model(case.model, plugin=False, env=dict(case.env))
    trace = trace_model(case.model, plugin=True, env=dict(case.env))
    assert [(g["range"], g["reuses"], g["ops_before"]) for g in trace["graphs"]] == [
        (g["range"], g["reuses"], g["ops_before"]) for g in stock["graphs"]
    ]


def test_report_counts_graphs_and_layers(case, trace_model):
    from vllm_fusion_plugin.report import RankReport

    trace = trace_model(case.model, plugin=True, env=dict(case.env))
    report = RankReport.model_validate(trace["plugin"])
    assert report.match_table()[ACT] == case.act_graphs
    assert report.layer_table()[ACT] == case.act_layers
    assert report.passes["ActivationQuantFusionPass"] == "ours"


def test_report_names_the_layers(trace_model):
    trace = trace_model("qwen3-8b-8layers", plugin=True, env=dict(CUTLASS))
    found = [found for sub in trace["plugin"]["subgraphs"] for found in sub["found"] if found["pass_name"] == ACT]
    # For six of them vLLM compiled nothing: they run what it compiled for the first.
    assert [".".join(f["module"].split(".")[:3]) for f in found] == [f"layers.{i}.mlp" for i in range(8)]


def test_report_says_why_nothing_was_fused(trace_model):
    case = CASES["deepseek-v3-defaults"]
    trace = trace_model(case.model, plugin=True)
    missed = [missed for sub in trace["plugin"]["subgraphs"] for missed in sub["missed"] if missed["pass_name"] == ACT]
    # The dense layer is the only one whose SiLU·mul is in the graph; the other four have theirs inside the MoE op.
    [dense] = [m for m in missed if "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER=0" in m["reason"]]
    assert dense["module"] == "layers.0.mlp.act_fn"
    assert sum("MoE op" in m["reason"] for m in missed) == 4
    assert len(missed) == 5
