# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU engine generates the same text with our fusions as without, and the fusions are where they should be."""

from __future__ import annotations

import pytest

from vllm_fusion_plugin.demo.checkpoint import CONFIG
from vllm_fusion_plugin.demo.engine import FUSED_OPS
from vllm_fusion_plugin.report import FusionReport, sum_match_tables

from .agreement import bound, check_agreement, distance, wrong_distances

pytestmark = pytest.mark.slow

LAYERS = CONFIG["num_hidden_layers"]
# A layer quantises three times: before attention and before the MLP, after a norm, and in the MLP.
MATCHES = {"activation_quant_fusion_pass": LAYERS, "rmsnorm_quant_fusion_pass": 2 * LAYERS}
MODULES = {
    *(("activation_quant_fusion_pass", f"layers.{i}.mlp") for i in range(LAYERS)),
    *(("rmsnorm_quant_fusion_pass", f"layers.{i}") for i in range(LAYERS)),
}


def matches(tables: list[dict[str, int]]) -> list[dict[str, int]]:
    """Without the passes that matched nothing."""
    return [{name: count for name, count in table.items() if count} for table in tables]


def matched_modules(report: FusionReport) -> list[set[tuple[str, str]]]:
    """What fused in which module, one set a rank."""
    return [{(f.pass_name, f.module) for s in rank.subgraphs for f in s.found} for rank in report.ranks]


def test_same_text_as_vllm_without_the_plugin(with_plugin, switched_off, control):
    """Wrong ops do not pass: without this, agreement could mean that the layers do not matter or that no fused op runs."""
    assert switched_off.result.match_tables == control.result.match_tables == [{}]
    check_agreement(with_plugin.result, switched_off.result, control.result, len(FUSED_OPS))


def test_every_layer_fuses(with_plugin):
    assert with_plugin.result.compilation_mode == "VLLM_COMPILE"
    assert matches(with_plugin.result.match_tables) == [MATCHES]
    report = FusionReport.from_ranks(with_plugin.result.reports)
    assert report.layer_table() == MATCHES
    assert matched_modules(report) == [MODULES]
    # the quantiser after attention, where vLLM splits the model
    ((pass_name, reason, places, _),) = report.missed_rows()
    assert (pass_name, places) == ("none", LAYERS)
    assert "made outside this compiled graph: vLLM splits the model at attention" in reason


def test_same_text_on_two_ranks(two_ranks, two_ranks_unfused, with_plugin, switched_off, control):
    assert sum(sum_match_tables(two_ranks_unfused.result.match_tables).values()) == 0
    wrong = wrong_distances(with_plugin.result, switched_off.result, len(FUSED_OPS))
    allowed = bound(wrong, switched_off.result, control.result)
    assert distance(two_ranks.result.tokens, two_ranks.result.logprobs, two_ranks_unfused.result) <= allowed


def test_every_layer_fuses_on_every_rank(two_ranks):
    both = {name: 2 * count for name, count in MATCHES.items()}
    assert matches(two_ranks.result.match_tables) == [MATCHES] * 2
    assert matches([sum_match_tables(two_ranks.result.match_tables)]) == [both]
    report = FusionReport.from_ranks(two_ranks.result.reports)
    assert [rank.rank for rank in report.ranks] == [0, 1]
    assert matched_modules(report) == [MODULES] * 2
    assert report.match_table() == both


def test_generations_of_one_engine_know_nothing_of_each_other(with_plugin):
    assert with_plugin.result.later_tokens[-1] == with_plugin.result.tokens
