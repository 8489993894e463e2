# SPDX-License-Identifier: Apache-2.0
"""`collective_rpc("get_fusion_report")` answers in every state of the plugin, for the engine that is asked and for no other.

One process, one engine after another: see states_child.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_fusion_plugin.demo import compare
from vllm_fusion_plugin.demo.checkpoint import write_checkpoint
from vllm_fusion_plugin.report import RankReport

pytestmark = pytest.mark.slow

LAYER = {"activation_quant_fusion_pass": 1, "rmsnorm_quant_fusion_pass": 2}
TWO_LAYERS = {name: 2 * count for name, count in LAYER.items()}
STATES = {
    "eager": ("active in layers alone; eager: vLLM compiles nothing, so no pass runs", {"mlp_silu_mul_quant": 2}),
    "2 layers": ("active", TWO_LAYERS),
    "1 layer": ("active", LAYER),
    "settings error": ("inactive: fusion plugin settings: no_such_setting=1", {}),
    "disabled": ("off: enabled=false in the settings", {}),
    "AOT artefacts": ("active, from file", LAYER),
    "2 layers, no AOT": ("active", TWO_LAYERS),
    "Inductor artefacts": ("active, from file", TWO_LAYERS),
    "bug": ("inactive: RuntimeError: a bug of ours", {}),
    "unknown code": ("active", LAYER),
}


@pytest.fixture(scope="module")
def child(tmp_path_factory) -> tuple[dict[str, RankReport], str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("states")
    result, log = folder / "result.json", folder / "log"
    command = [sys.executable, str(Path(__file__).parent / "states_child.py")]
    with log.open("w") as stream:
        process = subprocess.run(
            [*command, str(write_checkpoint(folder / "model")), str(result)],
            env=compare.engine_environment(1, folder / "cache"),
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=1800,
        )
    assert process.returncode == 0, log.read_text()[-3000:]
    told = json.loads(result.read_text())
    assert tuple(told["reports"]) == tuple(STATES)
    reports = {name: RankReport.model_validate(report) for name, report in told["reports"].items()}
    return reports, log.read_text(), told["refused"]


@pytest.mark.parametrize("name", STATES)
def test_state_and_layers(child, name):
    report, (state, layers) = child[0][name], STATES[name]
    assert report.manager.startswith(state)
    if state == "active":
        assert report.manager == state
    assert report.layer_table() == layers
    assert report.linear_kernels  # counted in any state
    assert report.from_file == ("from file" in state)
    fused_in = {f.module.split(".mlp")[0] for s in report.subgraphs for f in s.found}
    assert fused_in == {f"layers.{i}" for i in range(layers.get("activation_quant_fusion_pass", 0))}


def test_flags_that_do_nothing_are_named(child):
    for name, report in child[0].items():
        flags = {note.partition(" ")[0] for note in report.notes if "is on, and does nothing: eager" in note}
        assert flags == ({"fuse_act_quant", "fuse_norm_quant"} if name == "eager" else set())


def test_a_warm_start_reports_what_the_cold_one_did(child):
    reports = child[0]
    for cold, warm in (("1 layer", "AOT artefacts"), ("2 layers, no AOT", "Inductor artefacts")):
        for field in ("found", "missed", "modules", "compile_range", "reused_from", "model"):
            before, after = ([getattr(s, field) for s in reports[name].subgraphs] for name in (cold, warm))
            assert before == after
        assert reports[cold].passes == reports[warm].passes
        assert reports[cold].fingerprint == reports[warm].fingerprint


def test_what_is_not_known_is_told_and_never_found_again(child):
    reports, log, _ = child
    (note,) = (n for n in reports["unknown code"].notes if "not kept for other processes" in n)
    assert "no module no such module is found" in note
    assert log.count(note) == 1
    assert reports["unknown code"].fingerprint != reports["1 layer"].fingerprint
    assert not reports["unknown code"].from_file and not reports["bug"].subgraphs


def test_strict_ends_the_start_of_an_engine_whose_fusions_are_not_at_work(child):
    """One whose are has started: "AOT artefacts", with code and report from file."""
    refused = child[2]
    assert "fuse_norm_quant is on, and has fused nothing: eager: vLLM compiles nothing" in refused["eager"]
    assert "fuse_act_quant" not in refused["eager"]
    assert refused["unquantised"] == refused["unquantised, from file"]
    for flag in ("fuse_act_quant", "fuse_norm_quant"):
        assert f"{flag} is on, and has fused nothing: this model is not quantised" in refused["unquantised"]
    op, said = "rms_norm_group_fp8_quant", refused["other bytes, from file"]
    assert re.search(rf"rank 0: {op} writes other bytes than what it replaces: \d+ of \d+, in layers\.0-1\n", said)
    assert said.count("rank 0") == 1
