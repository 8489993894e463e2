# SPDX-License-Identifier: Apache-2.0
"""Small modules as on an MI300X with AITER: what is fused, what is left, and what is not looked for there at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

GROUP, TOKEN = "vllm.rocm_aiter_group_fp8_quant.default", "vllm.rocm_aiter_per_token_quant.default"
VLLMS = "_C.per_token_group_fp8_quant.default"


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict[str, Any]:
    if reason := fake_gpu.unavailable():
        pytest.skip(reason)
    output = tmp_path_factory.mktemp("rocm") / "modules.json"
    script = Path(__file__).parent / "rocm_modules.py"
    environment = os.environ | {"VLLM_ROCM_USE_AITER": "1"}
    process = subprocess.run(
        [sys.executable, str(script), str(output)], capture_output=True, text=True, timeout=1800, env=environment
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(output.read_text())


def ours(result: dict[str, Any], name: str) -> list[str]:
    return [op for op, _ in result["modules"][name]["ours"]]


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("gated", "gated_rms_norm_group_fp8_quant"),
        ("gated, heads of two groups", "gated_rms_norm_group_fp8_quant"),
        ("SiLU·mul", "silu_mul_group_fp8_quant"),
        ("SiLU·mul, one scale a token", "silu_mul_token_fp8_quant"),
        ("norm, one scale a token", "rms_norm_token_fp8_quant"),
        ("norm read by two quantisers", "rms_norm_group_fp8_quant"),
        ("norm read by two quantisers, one by a view", "rms_norm_group_fp8_quant"),
    ],
)
def test_aiters_quantiser_is_fused(result, name, op):
    assert ours(result, name) == [op]
    ((_, words),) = result["modules"][name]["ours"]
    assert (words["quant_rounding"], words["fp8"]) == ("aiter", "e4m3fnuz_240")
    assert result["modules"][name]["left"] == []


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("gated, groups of 64", GROUP),
        ("gated, transposed scales", GROUP),
        ("gated, one scale a token", TOKEN),
        ("SiLU·mul, integers", TOKEN),
        ("SiLU·mul, vLLM's op, 240", VLLMS),
    ],
)
def test_another_quantiser_is_left(result, name, left):
    assert ours(result, name) == []
    assert result["modules"][name]["left"] == [left]
    assert result["modules"][name]["reasons"]


def test_vllms_quantiser_goes_to_224(result):
    ((op, words),) = result["modules"]["SiLU·mul, vLLM's op, 224"]["ours"]
    assert (op, words["fp8"]) == ("silu_mul_group_fp8_quant", "e4m3fnuz")


def test_nothing_of_nvidias_by_the_compute_capability(result):
    platform = result["platform"]
    assert platform["capability"] == [9, 4]
    assert not platform["pdl"] and not platform["tma"]
    assert platform["nvidias"] == []


def test_what_keeps_aiters_kernels_away_is_said(result):
    gates, module = result["gates"], "aiter.ops.triton.quant"
    assert gates == {
        "as it is": "",
        "off": "AITER is off here: VLLM_ROCM_USE_AITER=1 switches it on, on CDNA 3 and later",
        "missing": "AITER is not installed",
        "too old": f"this AITER has no {module}.fused_rms_gated_fp8_group_quant",
        "broken": f"AITER's {module} cannot be imported: ImportError: no HIP",
        "vLLM too old": "this vLLM has no op rocm_aiter_fused_rms_gated_fp8_group_quant",
    }


def test_nothing_of_rocms_elsewhere():
    """Our passes neither import AITER nor ask for it on another platform."""
    code = (
        "import sys; from vllm_fusion_plugin.tracing import fake_gpu; fake_gpu.install(); "
        "from vllm_fusion_plugin import compat, plugin; plugin.register(); "
        "from vllm_fusion_plugin.passes import pass_manager as p; "
        "[p.our_pass(name) for name in p.STAND_INS]; "
        "assert not compat.aiter_is_on() and not any('Rocm' in name for name in p.STAND_INS), p.STAND_INS; "
        "loaded = [m for m in sys.modules if m.split('.')[0] == 'aiter' or 'rocm_aiter' in m and 'plugin' in m]; "
        "assert not loaded, loaded"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
