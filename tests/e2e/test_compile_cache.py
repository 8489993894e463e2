# SPDX-License-Identifier: Apache-2.0
"""vLLM's compile caches never give us code that was compiled under another state of the plugin, and do give it back when
the state returns.

The engine tests go through four states over one cache folder: with the plugin, another version of it, switched off,
other settings; then back to the first.  vLLM's own configuration is the same in all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_fusion_plugin.demo import compare
from vllm_fusion_plugin.demo.engine import FUSED_OPS

pytestmark = pytest.mark.slow

STATES = ("with_plugin", "upgraded", "switched_off", "reconfigured")


@pytest.fixture
def run(request):
    return request.getfixturevalue(request.param)


def generated_code(artefact: Path) -> str:
    """What Inductor wrote for the model, of one AOT folder."""
    return "\n".join(path.read_text() for path in sorted((artefact / "inductor_cache").glob("*/*.py")))


@pytest.mark.parametrize("run", STATES, indirect=True)
def test_each_state_compiles_afresh(run, engine):
    (counters,) = run.result.counters
    assert (counters["num_aot_compiles"], counters["num_aot_artifacts_loaded"]) == (1, 0)
    assert counters["num_inductor_compiles"] > 0
    assert counters["num_compiled_artifacts_loaded"] == 0
    assert len(run.new_artefacts) == 1
    assert "Directly load" not in run.log


@pytest.mark.parametrize("run", STATES, indirect=True)
def test_each_state_runs_its_own_code(run, request, engine):
    (artefact,) = run.new_artefacts
    folder = engine.one_rank_cache / "torch_compile_cache" / "torch_aot_compile" / artefact
    fused = request.node.callspec.params["run"] != "switched_off"
    for op in FUSED_OPS:
        assert (op in generated_code(folder)) == fused
        assert (op.encode() in (folder / "rank_0_0" / "model").read_bytes()) == fused


def test_returning_to_a_state_reuses_its_code(with_plugin, back_again):
    (counters,) = back_again.result.counters
    assert (counters["num_aot_compiles"], counters["num_aot_artifacts_loaded"]) == (0, 1)
    assert counters["num_inductor_compiles"] == 0
    assert back_again.new_artefacts == frozenset()
    (artefact,) = with_plugin.new_artefacts
    assert f"torch_aot_compile/{artefact}/rank_0_0/model" in back_again.log
    assert back_again.result.tokens == with_plugin.result.tokens


def test_a_warm_start_still_reports_what_is_fused(with_plugin, back_again):
    """No pass runs in a process that loads its code; vLLM's own match table is empty there."""
    assert back_again.result.match_tables == [{}]
    kept, fresh = back_again.result.reports[0], with_plugin.result.reports[0]
    assert (kept["from_file"], fresh["from_file"]) == (True, False)
    assert kept["manager"].startswith("active, from file") and fresh["manager"] == "active"
    assert kept["subgraphs"] == [s | {"from_cache": True} for s in fresh["subgraphs"]]


def test_a_plugin_that_is_off_says_so(switched_off):
    (report,) = switched_off.result.reports
    assert report["manager"] == "off: VLLM_FUSION_PLUGIN=0"
    assert report["linear_kernels"] and not report["subgraphs"]


def test_inductors_own_cache(tmp_path):
    """Inductor's FX graph cache, which all models share, goes by the passes' identity alone: see inductor_child.py."""
    result = tmp_path / "result.json"
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "inductor_child.py"), str(result)],
            env=compare.engine_environment(1, tmp_path) | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=1800,
        )
    assert process.returncode == 0, log.read_text()[-3000:]
    steps = json.loads(result.read_text())
    assert [(s["state"], s["hits"], s["misses"], s["fused"]) for s in steps] == [
        ("with plugin", 0, 1, True),
        ("with plugin", 1, 0, True),
        ("upgraded", 0, 1, True),
        ("switched off", 0, 1, False),
        ("reconfigured", 0, 1, True),
        ("with plugin", 1, 0, True),
        ("switched off", 1, 0, False),
    ]
