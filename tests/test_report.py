# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_fusion_plugin.report import (
    Found,
    FusionReport,
    Missed,
    RankReport,
    Subgraph,
    pattern_words,
    shorten,
    sum_match_tables,
)

ROOT = Path(__file__).parents[1]

FOUND = Found(pass_name="p", pattern="silu_mul[native]+group128[custom_op,row]", module="layers.0.mlp")


def reports() -> list[dict]:
    compiled = Subgraph(index=0, compile_range="(1, 8)", found=[FOUND])
    reused = Subgraph(
        index=1, compile_range="(1, 8)", reused_from=0, found=[FOUND.model_copy(update={"module": "layers.1.mlp"})]
    )
    missed = Subgraph(
        index=2, compile_range="(1, 8)", missed=[Missed(pass_name="p", reason="used [twice]", module="m")]
    )
    return [RankReport(rank=rank, subgraphs=[compiled, reused, missed]).model_dump() for rank in (0, 1)]


def test_counts_graphs_and_layers_over_ranks():
    report = FusionReport.from_ranks(reports())
    assert report.match_table() == {"p": 2}
    assert report.layer_table() == {"p": 4}
    assert report.rows() == [("p", FOUND.pattern, "(1, 8)", 2, 4, "0,1", "layers.0-1.mlp")]
    assert report.missed_rows() == [("p", "used [twice]", 2, "m")]


def render(report: FusionReport, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    for shown in report.tables():
        console.print(shown)
    return console.export_text()


def words_of(report: FusionReport) -> Counter[str]:
    """Of the summary, of titles and headers, and of all cells."""
    texts = []
    for shown in report.tables():
        if isinstance(shown, Table):
            cells = [cell.plain if isinstance(cell, Text) else cell for c in shown.columns for cell in c.cells]
            texts += [shown.title, *(c.header for c in shown.columns), *cells]
        else:
            texts.append(shown.plain)
    return Counter(word for text in texts for word in str(text).split())


def test_tables_say_it_in_words():
    text = render(FusionReport.from_ranks(reports()))
    assert "2 of 3 quantisers fused on each of 2 ranks; 1 left, see below" in text
    assert "2   p: SiLU·mul + FP8 quantiser, groups of 128" in text
    assert "layers.0-1.mlp" in text and "p: used [twice]" in text
    assert "silu_mul" not in text


def test_tables_show_states_kernels_and_notes():
    ranks = [RankReport(rank=r, manager="eager: none", linear_kernels={"K": 3}, notes=["why [so]"]) for r in (0, 1)]
    ranks[1].notes.append("alone")
    report = FusionReport(ranks=ranks)
    summary, *tables = report.tables()
    assert summary.plain == "no quantiser seen in what was compiled"
    assert [table.title.strip() for table in tables] == ["State", "Notes"]
    lines = [line.split() for line in render(report).splitlines()]
    for line in ("0-1 eager: none", "3 K", "0-1 why [so]", "1 alone"):
        assert line.split() in lines


def kept_reports() -> dict[str, FusionReport]:
    """Of real models: what benchmarks have kept, one a set of patterns, reasons and notes."""
    found = {}
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*.report.json")):
        report = FusionReport.from_ranks(json.loads(path.read_text()))
        found.setdefault(str(words_of(report)), (path.name, report))
    return dict(found.values())


# Keys of every kind of pattern, as passes register them or vLLM's own ops are called, and the words for them.
PATTERNS = {
    "silu_mul[native,eager]+group64[custom_op,tma,ue8m0]": "SiLU·mul + FP8 quantiser, groups of 64, UE8M0 scales",
    "silu_mul[custom_op]+static[native]": "SiLU·mul + FP8 quantiser, static scale",
    "silu_mul[native]+nvfp4[ours]": "SiLU·mul + NVFP4 quantiser",
    "silu_mul+static[_C.silu_and_mul_quant]": "SiLU·mul + FP8 quantiser, static scale",
    "relu2+static[_fused_relu_squared_static_fp8_quant]": "relu2 + FP8 quantiser, static scale",
    "rms_norm+token[native,bounded]": "RMS norm + FP8 quantiser, one scale a token",
    "rms_norm[custom_op,gemma]+static[custom_op]+norm": "Gemma RMS norm + FP8 quantiser, static scale",
    "fused_add_rms_norm[gemma]+group128[native,row]+norm+sum": (
        "residual add + Gemma RMS norm + FP8 quantiser, groups of 128"
    ),
    "fused_add_rms_norm+nvfp4[row]+sum[vllm]": "residual add + RMS norm + NVFP4 quantiser",
    "gated_rms_norm[silu,norm first,a group a head]+group128[custom_op,column]": (
        "gated RMS norm + FP8 quantiser, groups of 128"
    ),
    "mla_dual_rms_norm+group128[custom_op,column]": "RMS norms of q and kv + FP8 quantiser, groups of 128",
    "attention[model.layers.0.self_attn.attn]+static[custom_op]": "attention + FP8 quantiser, static scale",
    "mla_attention+group128[custom_op,column]": "latent attention (MLA) + FP8 quantiser, groups of 128",
    "attention+nvfp4": "attention + NVFP4 quantiser",
    "group128[custom_op,column]": "FP8 quantiser, groups of 128",
}
# Names as long as those of vLLM's ops, kernels and variables.
LONG_REASONS = (
    "RMSNorm is followed by an FP8 quantiser in groups of 128 (_C.per_token_group_fp8_quant_packed); with RMSNorm "
    "are fused: group, token, static; vLLM's kernel runs by itself (GroupQuantPass is off: lone_group_quant=false)",
    "SiLU·mul is followed by an FP8 quantiser in groups (in a Triton kernel, _silu_mul_per_token_group_quant_fp8_colmajor)",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER=0 selects a GEMM that takes quantised input",
    "vllm.dynamic_flashinfer_deepgemm_blockscale_gemm quantises inside",
)


def long_report() -> FusionReport:
    """Everything that is long at once: two models, eight ranks, layers that alternate, three ranges of tokens."""
    modules = [f"layers.{i}.self_attn.indexer.wq_b.quant_method.fp8_linear" for i in range(61) if i % 4 != 3]
    found = [
        Found(pass_name=name, pattern=pattern, module=module)
        for name in ("mla_dual_rms_norm_fusion_pass", "vLLM's model code")
        for pattern in PATTERNS
        for module in modules
    ]
    missed = [Missed(pass_name="none", reason=f"{PATTERN}: {why}", module=m) for why in LONG_REASONS for m in modules]
    subgraphs = [
        Subgraph(
            index=0, compile_range=r, found=found if r[1] == "1" else found[:9], missed=missed, model=model, part=i
        )
        for i, model in enumerate(("backbone", "draft_model"))
        for r in ("(1, 8)", "(9, 4681)", "(4682, 8192)")
    ]
    state = "inactive: fusion plugin settings: VLLM_FUSION_PLUGIN_SETTINGS='...' is not JSON"
    kernels = {"FlashInferFp8DeepGEMMDynamicBlockScaledKernel": 122, "CompressedTensorsW8A8Fp8MoEMethod": 58}
    notes = [f"RMSNormQuantFusionPass: {PATTERN} is not exact"]
    ranks = [RankReport(rank=r, manager=state, linear_kernels=kernels, notes=notes) for r in range(8)]
    ranks[3].subgraphs = subgraphs
    return FusionReport(ranks=ranks)


PATTERN = "gated_rms_norm[sigmoid,gate first,float32 weight,flattens]+group128[custom_op,tma,ue8m0]"
REPORTS = {"long": long_report()} | kept_reports()


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("name", REPORTS)
def test_words_are_whole(name, width):
    text = render(REPORTS[name], width)
    assert max(map(len, text.splitlines())) <= width
    missing = words_of(REPORTS[name]) - Counter(text.split())
    assert not missing, text


def test_there_are_kept_reports():
    assert len(REPORTS) > 5


@pytest.mark.parametrize("key", PATTERNS)
def test_patterns_in_words(key):
    assert pattern_words(key) == PATTERNS[key]
    assert pattern_words(PATTERN) == "gated RMS norm + FP8 quantiser, groups of 128, UE8M0 scales"


@pytest.mark.parametrize("key", PATTERNS)
def test_no_key_in_tables(key):
    """Not in reasons and notes either, where passes put them."""
    missed = Missed(pass_name="p", reason=f"{key}: the reason", module="m")
    sub = Subgraph(index=0, compile_range="(1, 8)", found=[Found(pass_name="p", pattern=key)], missed=[missed])
    report = FusionReport(ranks=[RankReport(subgraphs=[sub], notes=[f"a pass: {key} is not exact"])])
    text = render(report)
    words = PATTERNS[key]
    if not key.endswith("quant]"):  # vLLM's, which no pass of ours refuses
        assert f"p: {words}: the reason" in text and f"a pass: {words} is not exact" in text
        assert not set("[]") & set(text)
    assert any(line.rstrip().endswith(f"1   p: {words}") for line in text.splitlines())
    assert key in report.to_json()


def missed(pass_name: str, reason: str) -> Missed:
    return Missed(pass_name=pass_name, reason=reason, module="m")


NO_QUANTISER = [
    ("activation_quant_fusion_pass", "SiLU·mul's result leaves the compiled graph here, unquantised"),
    ("activation_quant_fusion_pass", "SiLU·mul is followed by aten.relu; no quantiser"),
    (
        "attn_quant_fusion",
        "attention (TRITON_ATTN) is followed by aten.mul; fused are FP8 with one static scale and NVFP4",
    ),
    ("mla_dual_rms_norm_fusion_pass", "2 more norms read the same GEMM's output; fused where there is one"),
]
A_QUANTISER = [
    ("none", "it quantises a tensor that is made outside this compiled graph"),
    (
        "attn_quant_fusion",
        "attention (X) is followed by an FP8 quantiser (in a Triton kernel, k); fused are vLLM's ops",
    ),
    ("group_quant_pass", "group128[custom_op,row]: the scales have 3 dimensions; fused where there are 2"),
]


def summary(*subgraphs: Subgraph) -> str:
    return FusionReport(ranks=[RankReport(subgraphs=list(subgraphs))]).summary()


def test_the_summary_counts_quantisers():
    def sub(found=(), missed_=()):
        return Subgraph(index=0, compile_range="(1, 8)", found=list(found), missed=[missed(*m) for m in missed_])

    assert summary() == "no quantiser seen in what was compiled"
    assert summary(sub([FOUND])) == "all 1 quantisers fused"
    assert summary(sub([FOUND], NO_QUANTISER)) == "all 1 quantisers fused"
    assert summary(sub([], A_QUANTISER)) == "none of 3 quantisers fused; 3 left, see below"
    dual = FOUND.model_copy(update={"pass_name": "mla_dual_rms_norm_fusion_pass"})  # no quantiser of its own
    assert summary(sub([FOUND, dual], A_QUANTISER)) == "1 of 4 quantisers fused; 3 left, see below"
    # alone in a kernel of ours: reported once, by its reason or, where there is none, by itself
    alone = Found(pass_name="group_quant_pass", pattern="group128[custom_op,row]", module="m")
    reason = ("none", "no pass fuses GELU·mul with a quantiser; it runs this package's kernel, by itself")
    for report in (sub([FOUND, alone]), sub([FOUND, alone], [reason])):
        assert summary(report) == "1 of 2 quantisers fused; 1 left, see below"
    assert "FP8 quantiser, groups of 128, by itself in this package's kernel" in render(
        FusionReport(ranks=[RankReport(subgraphs=[sub([alone])])])
    )


def test_ranks_that_differ_are_told_apart():
    subgraphs = [Subgraph(index=0, compile_range="(1, 8)", found=[FOUND])]
    report = FusionReport(ranks=[RankReport(rank=r, subgraphs=subgraphs if r < 3 else []) for r in range(4)])
    assert report.summary() == "ranks 0-2: all 1 quantisers fused; rank 3: no quantiser seen in what was compiled"
    assert "layers.0.mlp; only on ranks 0-2" in render(report)


def test_numbers_of_tokens_are_told_where_not_all_fuse():
    def sub(index, compile_range, found):
        return Subgraph(index=index, compile_range=compile_range, found=found)

    everywhere = [sub(0, "(1, 8)", [FOUND]), sub(0, "(9, 64)", [FOUND]), sub(1, "(1, 8)", [])]
    assert "tokens" not in render(FusionReport(ranks=[RankReport(subgraphs=everywhere)]))
    few = [sub(0, "(1, 8)", [FOUND]), sub(0, "(9, 64)", [])]
    assert "groups of 128, for 1-8 tokens" in render(FusionReport(ranks=[RankReport(subgraphs=few)]))


def test_a_place_compiled_for_two_ranges_is_one_place():
    def norm(module: str) -> Found:
        return Found(pass_name="norm", pattern="p", module=module)

    missed = Missed(pass_name="p", reason="r", module="layers.0")
    subgraphs = [
        Subgraph(index=i, compile_range=r, found=[norm(f"layers.{i}")] * 2, missed=[missed], part=part)
        for part in (0, 1)
        for i in (0, 1)
        for r in ("(1, 8)", "(9, 64)", "(65, 512)")
    ]
    report = FusionReport(ranks=[RankReport(subgraphs=subgraphs)])
    assert report.ranks[0].match_table() == {"norm": 24}
    assert report.layer_table() == {"norm": 8}  # two norms in each of two layers of two parts
    assert [row[2:5] for row in report.rows()] == [(r, 8, 8) for r in ("(1, 8)", "(65, 512)", "(9, 64)")]
    assert report.missed_rows() == [("p", "r", 4, "layers.0")]


def test_models_of_one_engine_are_told_apart():
    subgraphs = [
        Subgraph(index=0, compile_range="(1, 8)", found=[FOUND], model=model, part=part)
        for part, model in enumerate(("backbone", "draft_model"))
    ]
    report = FusionReport(ranks=[RankReport(subgraphs=subgraphs)])
    assert report.layer_table() == {"p": 2}
    assert [row[-1] for row in report.rows()] == ["backbone: layers.0.mlp", "draft_model: layers.0.mlp"]
    text = render(report)
    assert "backbone; layers.0.mlp" in text and "draft_model; layers.0.mlp" in text


def test_sum_keeps_passes_without_a_match():
    assert sum_match_tables([{"a": 1, "b": 0}, {"a": 2}]) == {"a": 3, "b": 0}


def test_shorten():
    assert shorten(["layers.0.mlp", "layers.1.mlp", "layers.3.mlp", "norm"]) == "layers.0-1,3.mlp, norm"
    assert shorten(["layers.0.mlp", "layers.2.mlp", "norm"], spaced_from=14) == "layers.0, 2.mlp, norm"
    assert shorten(["layers.0.mlp", "layers.2.mlp", "norm"], spaced_from=15) == "layers.0,2.mlp, norm"
