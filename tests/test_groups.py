# SPDX-License-Identifier: Apache-2.0
"""Which tests share a process of pytest-xdist: see conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import conftest


@pytest.mark.parametrize("name", [*conftest.GROUPS, *conftest.BY_PARAMETER])
def test_files_are_there(name):
    assert list(Path(__file__).parent.rglob(name))


def test_groups():
    engine = conftest.group_of("tests/e2e/test_cpu_engine.py::test_every_layer_fuses")
    assert engine == conftest.group_of("tests/e2e/test_compile_cache.py::test_each_state_runs_its_own_code[upgraded]")
    whole = "tests/compile/test_whole_models.py"
    one, other = (conftest.group_of(f"{whole}::test_{name}[qwen3]") for name in ("stock", "plugin_fuses_norms"))
    assert one == other != conftest.group_of(f"{whole}::test_stock[qwen3-next]")
    assert conftest.group_of("tests/test_report.py::test_shorten") == "tests/test_report.py"
    assert conftest.group_of("tests/kernels/test_a.py::test[x]") != conftest.group_of(
        "tests/compile/test_a.py::test[x]"
    )
