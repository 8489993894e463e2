# SPDX-License-Identifier: Apache-2.0
"""examples/relu2_quant, as if installed: vLLM finds its entry point, and its fusion is found and reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "relu2_quant"
OP = "vllm_fusion_plugin.relu2_static_fp8_quant.default"


def install(folder: Path) -> Path:
    """What an installer would make of the example in `folder`."""
    shutil.copytree(EXAMPLE / "relu2_quant", folder / "relu2_quant")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = folder / "relu2_quant-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, entries),) = project["entry-points"].items()
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
    return folder


def traced(folder: Path) -> dict:
    result = folder / "result.json"
    path = os.pathsep.join([str(folder), str(HERE), str(HERE.parents[1])])
    process = subprocess.run(
        [sys.executable, str(HERE / "example_child.py"), str(result)],
        env=os.environ | {"PYTHONPATH": path, "VLLM_CACHE_ROOT": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    return traced(install(tmp_path_factory.mktemp("installed")))


def test_its_fusion_is_in_the_graph_and_in_the_report(told):
    on = told["on"]
    assert on["ops"][OP] == 1 and "_C.relu_squared.default" not in on["ops"]
    assert on["passes"]["ReLU2QuantPass"] == "added by relu2_quant"
    (found,) = on["found"]
    assert (found["pass_name"], found["pattern"]) == ("relu2_quant", "relu2[custom_op]+static[custom_op]")
    assert not on["missed"]


def test_a_setting_leaves_it_out(told):
    off = told["off"]
    assert OP not in off["ops"] and not off["found"] and off["missed"]
    assert off["passes"]["ReLU2QuantPass"] == "off: added_fusions=false"
