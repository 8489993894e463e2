# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from rich.console import Console

from vllm_fusion_plugin.report import Found, FusionReport, Missed, RankReport, Subgraph, shorten, sum_match_tables

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


def test_tables_show_brackets():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in FusionReport.from_ranks(reports()).tables():
        console.print(table)
    text = console.export_text()
    assert FOUND.pattern in text
    assert "used [twice]" in text


def test_tables_show_states_kernels_and_notes():
    ranks = [RankReport(rank=r, manager="eager: none", linear_kernels={"K": 3}, notes=["why [so]"]) for r in (0, 1)]
    ranks[1].notes.append("alone")
    report = FusionReport(ranks=ranks)
    assert report.rank_rows() == [("0,1", "eager: none", "3 K")]
    assert report.note_rows() == [("0,1", "why [so]"), ("1", "alone")]
    assert [table.title for table in report.tables()] == ["State", "Fused", "Notes"]


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


def test_sum_keeps_passes_without_a_match():
    assert sum_match_tables([{"a": 1, "b": 0}, {"a": 2}]) == {"a": 3, "b": 0}


def test_shorten():
    assert shorten(["layers.0.mlp", "layers.1.mlp", "layers.3.mlp", "norm"]) == "layers.0-1,3.mlp, norm"
