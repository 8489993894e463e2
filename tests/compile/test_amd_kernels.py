# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiled for AMD's gfx942 (MI300) and gfx950 (MI350), down to hsaco: what its machine code shows of it.

Nothing runs. docs/rocm.md has the figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LDS = {"gfx942": 64 << 10, "gfx950": 160 << 10}


@pytest.fixture(scope="module", params=LDS)
def compiled(request, tmp_path_factory) -> tuple[str, dict[str, dict]]:
    """An architecture and its kernels. In a process of its own: here, kernels are NVIDIA's or the interpreter's."""
    output = tmp_path_factory.mktemp("amd") / "kernels.json"
    process = subprocess.run(
        [sys.executable, str(HERE / "amd_code.py"), request.param, f"--output={output}"],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return request.param, json.loads(output.read_text())["kernels"]


def test_registers_and_memory_suffice(compiled):
    arch, kernels = compiled
    assert len(kernels) > 35
    assert {name: k for name, k in kernels.items() if k["spills"]} == {}
    assert {name: k for name, k in kernels.items() if k["lds"] > LDS[arch]} == {}
    assert {name: k for name, k in kernels.items() if not 64 <= k["threads"] <= 1024} == {}


def test_codes_are_made_by_the_hardware(compiled):
    """And end at the format's maximum, which is what kernels/quant.py takes from the conversion."""
    _, kernels = compiled
    assert {name: k for name, k in kernels.items() if not (k["fp8_conversions"] and k["saturates"])} == {}


def test_codes_are_stored_together(compiled):
    _, kernels = compiled
    assert {name: k for name, k in kernels.items() if k["byte_stores"]} == {}


def test_norms_add_up_in_the_order_of_inductors_kernel():
    """Each thread has the columns that it has there, whatever the number of rows."""
    process = subprocess.run([sys.executable, str(HERE / "amd_norms.py")], capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, process.stderr[-4000:]
    found = json.loads(process.stdout)
    for width, kernels in found.items():
        (inductors,) = kernels["inductor"]
        assert inductors[1] == 64 and kernels["ours"] == [[inductors]] * 3, width
    per_thread = {width: kernels["inductor"][0][0] for width, kernels in found.items()}
    assert per_thread == dict.fromkeys(found, 8) | {"18432": 4}, "not read from Triton's layouts"


def test_nothing_of_nvidias(compiled):
    """gfx942 says compute capability (9, 4): above 9.0, from which on NVIDIA's GPUs have PDL and TMA."""
    _, kernels = compiled
    assert not any(k["waits_for_pdl"] for k in kernels.values())
