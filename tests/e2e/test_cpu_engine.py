# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU engine generates the same tokens with our fusions as without, and the fusions are where they should be."""

from __future__ import annotations

from itertools import chain

import pytest

from vllm_fusion_plugin.demo_checkpoint import CONFIG
from vllm_fusion_plugin.report import FusionReport, sum_match_tables

pytestmark = pytest.mark.slow

PASS = "activation_quant_fusion_pass"
LAYERS = CONFIG["num_hidden_layers"]
MLPS = {f"layers.{i}.mlp" for i in range(LAYERS)}


def matched_modules(report: FusionReport) -> list[set[str]]:
    """The modules in which something fused, one set a rank."""
    return [{f.module for s in rank.subgraphs for f in s.found} for rank in report.ranks]


def test_same_tokens_as_vllm_without_the_plugin(with_plugin, switched_off):
    assert switched_off.result.match_tables == [{}]
    assert with_plugin.result.tokens == switched_off.result.tokens
    fused, unfused = (list(chain(*run.result.logprobs)) for run in (with_plugin, switched_off))
    assert fused == pytest.approx(unfused, abs=1e-5)


def test_every_layer_fuses(with_plugin):
    assert with_plugin.result.compilation_mode == "VLLM_COMPILE"
    assert with_plugin.result.match_tables == [{PASS: LAYERS}]
    report = FusionReport.from_ranks(with_plugin.result.reports)
    assert report.layer_table() == {PASS: LAYERS}
    assert matched_modules(report) == [MLPS]
    assert report.missed_rows() == []


def test_same_tokens_on_two_ranks(two_ranks, two_ranks_unfused):
    assert sum(sum_match_tables(two_ranks_unfused.result.match_tables).values()) == 0
    assert two_ranks.result.tokens == two_ranks_unfused.result.tokens


def test_every_layer_fuses_on_every_rank(two_ranks):
    assert two_ranks.result.match_tables == [{PASS: LAYERS}] * 2
    assert sum_match_tables(two_ranks.result.match_tables) == {PASS: 2 * LAYERS}
    report = FusionReport.from_ranks(two_ranks.result.reports)
    assert [rank.rank for rank in report.ranks] == [0, 1]
    assert matched_modules(report) == [MLPS, MLPS]
    assert report.match_table() == {PASS: 2 * LAYERS}


def test_a_wrong_op_changes_the_tokens(with_plugin, broken):
    """Without this, equal tokens could mean that the layers do not matter or that the fused op never runs."""
    changed = [a != b for a, b in zip(with_plugin.result.tokens, broken.result.tokens, strict=True)]
    assert all(changed), f"prompts whose tokens changed: {changed}"
