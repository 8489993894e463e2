# SPDX-License-Identifier: Apache-2.0
"""Nobody's vLLM changes unasked: what each of the two switches leaves alone, and what asking twice does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_fusion_plugin.demo import compare

pytestmark = pytest.mark.slow

SWITCHES = ("VLLM_FUSION_PLUGIN", "VLLM_FUSION_PLUGIN_CPU", "VLLM_FUSION_PLUGIN_SETTINGS", "VLLM_CPU_CI_ENV")


CASES = (
    "hash_never_raises",
    "user_folders_are_kept_apart",
    "kernels_that_triton_could_not_compile",
    "one_engine_has_one_owner",
    "worker_methods",
    "switched_off",
    "cpu_not_asked_for",
    "cpu_asked_for_twice",
    "eager_stays_eager",
    "cpu_switch_misspelt",
    "pass_left_to_stock",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    result = tmp_path_factory.mktemp("opt-in") / "result.json"
    process = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "opt_in_child.py"), str(result)],
        env={k: v for k, v in os.environ.items() if k not in SWITCHES} | {"VLLM_PLUGINS": compare.PLUGIN},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    outcomes = json.loads(result.read_text())
    assert tuple(outcomes) == CASES
    return outcomes


@pytest.mark.parametrize("case", CASES)
def test_switches(outcomes, case):
    assert not outcomes[case], outcomes[case]
