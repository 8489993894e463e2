# SPDX-License-Identifier: Apache-2.0
"""What is fused in whole models, layer by layer, by vLLM's passes and by ours. Traced without a GPU; see trace_model.py.

The numbers of the stock runs are those that vLLM 0.32.0 reports on an H200: they are what makes the others credible.

A trace takes half a minute on two cores when nothing else runs, and there are ten: five models and settings, each with
and without the plugin. So a new question should be put to one of these traces; the fixture makes each once in a process, and
a test has the case whose traces it asks as its parameter.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
from tracer import MODELS

pytestmark = pytest.mark.slow

ACT = "activation_quant_fusion_pass"
STOCK_NORM = "RMSNormQuantFusionPass"  # vLLM's pass has no name of its own and is not in its match table
NORM = "rmsnorm_quant_fusion_pass"
DUAL = "mla_dual_rms_norm_fusion_pass"
LONE = "group_quant_pass"
OP = "vllm_fusion_plugin.{}.default"
DYNAMIC_GEMM = "vllm.dynamic_flashinfer_deepgemm_blockscale_gemm.default"


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    linear_kernel: str
    act_graphs: int
    """Distinct compiled graphs with a SiLU·mul or sigmoid gate + quant: what vLLM's match table counts."""
    act_layers: int
    stock_norms: int
    norms: int
    """Norms fused with a quantiser, over all layers."""
    gated: int = 0
    """Gated norms, of linear attention."""
    dual: int = 0
    """Norms that went into the op of another one."""
    lone: int = 0
    """Quantisers that are fused with nothing: after attention."""
    gemms: int = 0
    """Ops of vLLM's that quantise inside, which the plugin splits."""
    env: tuple[tuple[str, str], ...] = ()

    @property
    def stock_act(self) -> tuple[int, int]:
        """What stock fuses of SiLU·mul, as `act_graphs` and `act_layers`."""
        return (0, 0) if self.gemms else (self.act_graphs, self.act_layers)


# The GEMM decides what there is to fuse. By default vLLM takes FlashInfer's or DeepGEMM's in one op that quantises inside:
# stock fuses nothing, and the plugin splits that op. CUTLASS's takes input that is quantised already.
CUTLASS = (("VLLM_USE_DEEP_GEMM", "0"), ("VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER", "0"))
CUTLASS_KERNEL, DEFAULT_KERNEL = "CutlassFp8BlockScaledMMKernel", "FlashInferFp8DeepGEMMDynamicBlockScaledKernel"

CASES = {
    # 8 equal layers. vLLM compiles two pieces with an MLP: that between two attentions, and the last.
    "qwen3": Case("qwen3-8b-8layers", CUTLASS_KERNEL, 2, 8, 16, 16, lone=8, env=CUTLASS),
    "qwen3-defaults": Case("qwen3-8b-8layers", DEFAULT_KERNEL, 2, 8, 0, 16, lone=8, gemms=32),
    # 1 dense layer; in the 4 MoE layers experts and shared expert are inside one op, which gets the experts' quantised input
    # from the norm before it. In each layer input norm and q's norm, whose op also does that of k and v.
    "deepseek-v3": Case("deepseek-v3-5layers", CUTLASS_KERNEL, 1, 1, 11, 15, dual=5, lone=5, env=CUTLASS),
    "deepseek-v3-defaults": Case("deepseek-v3-5layers", DEFAULT_KERNEL, 1, 1, 0, 15, dual=5, lone=5, gemms=17),
    # All MLPs inside the MoE op. Norms with weight + 1 in float32 and results that another GEMM reads as well, which stock's
    # fusion does not take. 6 of 8 layers have linear attention.
    "qwen3-next-defaults": Case("qwen3-next-8layers", DEFAULT_KERNEL, 2, 2, 0, 16, gated=6, gemms=16),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def by_layer(trace: dict, ops: str, op: str) -> int:
    return sum(graph[ops].get(op, 0) * graph["reuses"] for graph in trace["graphs"])


def pass_path(trace: dict, name: str) -> str:
    [path] = [path for path in trace["passes"] if path.endswith(f".{name}")]
    return path


def found(trace: dict, pass_name: str) -> list[dict]:
    return [found for sub in trace["plugin"]["subgraphs"] for found in sub["found"] if found["pass_name"] == pass_name]


def missed(trace: dict, pass_name: str) -> list[dict]:
    return [m for sub in trace["plugin"]["subgraphs"] for m in sub["missed"] if m["pass_name"] == pass_name]


def test_stock(case, trace_model):
    trace = trace_model(case.model, plugin=False, env=dict(case.env))
    assert set(trace["linear_kernels"]) == {case.linear_kernel}
    assert pass_path(trace, "ActivationQuantFusionPass").startswith("vllm.compilation.")
    act_graphs, act_layers = case.stock_act
    assert trace["matches_by_graph"][ACT] == trace["match_table"][ACT] == act_graphs
    assert trace["matches_by_layer"][ACT] == act_layers
    assert trace["matches_by_layer"][STOCK_NORM] == case.stock_norms


def test_plugin_fuses_what_stock_fuses(case, trace_model):
    stock = trace_model(case.model, plugin=False, env=dict(case.env))
    trace = trace_model(case.model, plugin=True, env=dict(case.env))
    assert trace["pass_manager"] == "vllm_fusion_plugin.passes.pass_manager.FusionPassManager"
    for name in ("ActivationQuantFusionPass", "RMSNormQuantFusionPass"):
        assert pass_path(trace, name).startswith("vllm_fusion_plugin.passes.")
    assert trace["matches_by_graph"][ACT] == trace["match_table"][ACT] == case.act_graphs
    assert (
        trace["matches_by_layer"][ACT]
        == by_layer(trace, "ops_after", OP.format("silu_mul_group_fp8_quant"))
        + by_layer(trace, "ops_after", OP.format("sigmoid_mul_group_fp8_quant"))
        == case.act_layers
    )
    # The other passes, and the order of all, are as they were.
    first, *names = [p.rpartition(".")[2] for p in stock["passes"]]
    ours = [p.rpartition(".")[2] for p in trace["passes"]]
    assert ours == [first, "SplitExpertsPass", "SplitBlockGemmPass", *names, "GroupQuantPass", "Leftovers"]
    assert trace["linear_kernels"] == stock["linear_kernels"]
    assert not [graph["not_lowered"] for graph in trace["graphs"] if graph["not_lowered"]]


def test_plugin_fuses_norms(case, trace_model):
    trace = trace_model(case.model, plugin=True, env=dict(case.env))
    assert case.norms >= case.stock_norms
    assert trace["matches_by_layer"][NORM] == case.norms + case.gated
    assert trace["matches_by_layer"][LONE] == case.lone
    ops = {
        "rms_norm_group_fp8_quant": case.norms - case.dual,
        "mla_dual_rms_norm_group_fp8_quant": case.dual,
        "gated_rms_norm_group_fp8_quant": case.gated,
        "group_fp8_quant": case.lone,
    }
    assert {op: by_layer(trace, "ops_after", OP.format(op)) for op in ops} == ops
    # Whatever quantiser vLLM's graph had is in one of our ops now.
    assert by_layer(trace, "ops_after", "_C.per_token_group_fp8_quant.default") == 0
    assert by_layer(trace, "ops_before", DYNAMIC_GEMM) == case.gemms
    assert by_layer(trace, "ops_after", DYNAMIC_GEMM) == 0
    assert by_layer(trace, "ops_after", OP.format("block_fp8_gemm")) == case.gemms


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
    assert report.layer_table()[NORM] == case.norms + case.gated
    assert report.layer_table()[DUAL] == case.dual
    assert report.layer_table()[LONE] == case.lone
    # as in vLLM's own table, where passes without a match are too
    assert report.match_table() == {name: count for name, count in trace["match_table"].items() if count}
    for name in ("SplitBlockGemmPass", "ActivationQuantFusionPass", "RMSNormQuantFusionPass", "GroupQuantPass"):
        assert report.passes[name] == "ours"


@pytest.mark.parametrize("case", ["qwen3", "qwen3-defaults"], indirect=True)
def test_report_names_the_layers(case, trace_model):
    trace = trace_model(case.model, plugin=True, env=dict(case.env))
    # For six of them vLLM compiled nothing: they run what it compiled for the first.
    assert [module(f, 3) for f in found(trace, ACT)] == [f"layers.{i}.mlp" for i in range(8)]
    # post-attention norm and the next input norm, whose quantiser belongs to the next module
    assert {module(f, 2) for f in found(trace, NORM)} == {f"layers.{i}" for i in range(8)}


def module(found: dict, depth: int) -> str:
    return ".".join(found["module"].split(".")[:depth])


@pytest.mark.parametrize("case", ["qwen3-next-defaults"], indirect=True)
def test_report_names_gated_norms(case, trace_model):
    trace = trace_model(case.model, plugin=True, env=dict(case.env))
    gated = [f for f in found(trace, NORM) if f["pattern"].startswith("gated_rms_norm[silu,norm first]")]
    assert [module(f, 2) for f in gated] == [f"layers.{i}" for i in (0, 1, 2, 4, 5, 6)]
    # A GEMM in the model's dtype reads input norms of linear attention too, and norms before experts: the router.
    patterns = [f["pattern"].partition("+")[::2] for f in found(trace, NORM) if f not in gated]
    assert {norm for norm, _ in patterns} == {"rms_norm[gemma]", "fused_add_rms_norm[gemma]"}
    assert sum("+norm" in rest for _, rest in patterns) == 6 + 8
    assert sum("[experts,row,ue8m0]" in rest for _, rest in patterns) == 8


@pytest.mark.parametrize("case", ["deepseek-v3", "deepseek-v3-defaults"], indirect=True)
def test_report_names_both_norms_of_latent_attention(case, trace_model):
    trace = trace_model(case.model, plugin=True, env=dict(case.env))
    assert [module(f, 3) for f in found(trace, DUAL)] == [f"layers.{i}.self_attn" for i in range(5)]


@pytest.mark.parametrize("case", ["qwen3-defaults"], indirect=True)
def test_transformers_backend(case, trace_model):
    """Tensors there are [1, tokens, width]."""
    trace = trace_model(case.model, plugin=True, env=dict(case.env), engine_args={"model_impl": "transformers"})
    ops = {
        "silu_mul_group_fp8_quant": case.act_layers,
        "rms_norm_group_fp8_quant": case.norms,
        "group_fp8_quant": case.lone,
    }
    assert {op: by_layer(trace, "ops_after", OP.format(op)) for op in ops} == ops
    assert [module(f, 3) for f in found(trace, ACT)] == [f"layers.{i}.mlp" for i in range(8)]
    assert by_layer(trace, "ops_after", "_C.per_token_group_fp8_quant.default") == 0


@pytest.mark.parametrize("case", ["deepseek-v3-defaults"], indirect=True)
def test_report_says_what_is_left(case, trace_model):
    trace = trace_model(case.model, plugin=True, env=dict(case.env))
    lines = [m for sub in trace["plugin"]["subgraphs"] for m in sub["missed"]]
    # One layer is dense; the others have their shared experts inside the MoE op.
    experts = [
        m for m in lines if "shared experts quantise their input inside" in m["reason"] and "MoE op" in m["reason"]
    ]
    assert len(experts) == 4 and not missed(trace, ACT)
    (outside,) = trace["plugin"]["outside"]
    # They are tried out when a model is loaded.
    assert [(f["module"], f["pattern"]) for f in outside["found"]] == [
        (f"layers.{i}.mlp.shared_experts", "silu_mul[native]+group128[reciprocal_or_flashinfer,tma,ue8m0]")
        for i in range(1, 5)
    ]
    # And these when they first run, but here nothing does.
    assert [(m["module"], m["reason"]) for m in outside["missed"]] == [
        (f"layers.{i}.mlp.experts", "TritonExperts has not run yet") for i in range(1, 5)
    ]
    after_attention = [m for m in lines if m["pass_name"] == "none" and m not in experts]
    assert [module(m, 5) for m in after_attention] == [f"layers.{i}.self_attn.mla_attn.o_proj" for i in range(5)]
    for m in after_attention:
        assert "vLLM splits the model at attention" in m["reason"]
        assert "it runs this package's kernel, by itself" in m["reason"]
    assert len(lines) == 4 + case.lone and not missed(trace, NORM) and not missed(trace, DUAL)


@pytest.mark.parametrize("case", ["qwen3-defaults", "deepseek-v3-defaults"], indirect=True)
def test_explain_counts_what_the_report_counts(case, trace_model):
    """It traces the layers that differ, and counts the others by them."""
    from typer.testing import CliRunner

    from vllm_fusion_plugin import cli
    from vllm_fusion_plugin.explain.explanation import Explanation
    from vllm_fusion_plugin.report import RankReport

    result = CliRunner().invoke(cli.app, ["explain", str(MODELS / case.model), "--gpu", "h200", "--json"])
    assert result.exit_code == 0, result.output
    e = Explanation(**json.loads(result.stdout))
    trace = trace_model(case.model, plugin=True, env=dict(case.env))
    report = RankReport.model_validate(trace["plugin"] | {"outside": []})  # it tells of graphs
    boundaries = [b for kind in e.kinds for b in kind.boundaries]
    fused, left = (
        sum(report.layer_table().values()) - case.dual - case.lone,
        sum(len(s.missed) for s in report.subgraphs),
    )
    assert (e.fused, e.left) == (fused, left)
    ops = {b.op: 0 for b in boundaries if b.fused}
    for b in boundaries:
        if b.fused:
            ops[b.op] += b.places
    # the op of both latent norms has taken the place of the first one's
    assert {op: by_layer(trace, "ops_after", OP.format(op)) for op in ops} == ops | (
        {"rms_norm_group_fp8_quant": case.norms - case.dual}
    )
    assert [s.launches for s in e.saves] == [sum(ops.values())] * 2
    assert sum(kind.layers for kind in e.kinds) == int(case.model.rpartition("-")[2].removesuffix("layers"))


@pytest.mark.parametrize(
    ("gpu", "folder", "layers", "fused", "left", "linear_kernel"),
    [
        # DeepGEMM takes packed scales, and vLLM's GEMM no rows that it would quantise.
        ("b200", "qwen3-8b-fp8", 36, 3, {"o_proj": 1}, "DeepGemmFp8BlockScaledMMKernel"),
        # Several of AMD's GPUs share it; experts quantise inside.
        ("mi300x", "qwen3-235b-a22b-fp8", 94, 1, {"o_proj": 1, "experts": 1}, "TritonFp8BlockScaledMMKernel"),
    ],
)
def test_models_are_as_documented(gpu, folder, layers, fused, left, linear_kernel):
    """docs/models.md has what `explain` says now."""
    from typer.testing import CliRunner

    from vllm_fusion_plugin import cli
    from vllm_fusion_plugin.explain import matrix
    from vllm_fusion_plugin.explain.explanation import Explanation

    ((path, served),) = (m for m in matrix.models(MODELS / "served") if m[0].name == folder)
    gpus = str(served.tensor_parallel_size)
    result = CliRunner().invoke(cli.app, ["explain", str(path), "--gpu", gpu, "--tp", gpus, "--json"])
    assert result.exit_code == 0, result.output
    e = Explanation(**json.loads(result.stdout))
    boundaries = [b for kind in e.kinds for b in kind.boundaries]
    unfused = {b.reader.rpartition(".")[2]: b.places // layers for b in boundaries if not b.fused}
    assert (e.fused, unfused) == (fused * layers, left)
    assert set(e.linear_kernels) == {linear_kernel}
    column = matrix.Column.model_validate_json((MODELS.parents[1] / f"docs/models/{gpu}.json").read_text())
    (shown,) = (row for row in column.rows if row.model == served.name)
    assert shown == matrix.row(served.name, served.tensor_parallel_size, e), "run nox -s models"
