# SPDX-License-Identifier: Apache-2.0
"""benchmarks/tune_block_gemm.py: what it makes of times."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def tune():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import tune_block_gemm
    finally:
        sys.path.remove(str(BENCHMARKS))
    return tune_block_gemm


@pytest.mark.parametrize(
    ("deepgemm", "change"),
    [
        (lambda rows: 12 if rows < 8 else 8, 8),
        (lambda rows: 8, 1),
        (lambda rows: 12, 32),
        (lambda rows: 9.9, 32),  # one part in a hundred is no reason
        (lambda rows: 12 if rows == 16 else 9, 1),
    ],
    ids=["from 8", "always", "never", "hardly", "nearly always"],
)
def test_deepgemm_runs_from_where_all_rows_together_take_least(tune, deepgemm, change) -> None:
    rows = [
        {"N": 64, "H": 128, "M": m, "impl": f"peer:{name}", "us": us(m)}
        for m in tune.ROWS
        for name, us in (("flashinfer", lambda rows: 10), ("deepgemm", deepgemm))
    ]
    assert tune.table_of(rows) == {(64, 128): change}


def test_the_table_keeps_other_gpus_and_shapes(tune, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(
        tune.block_gemm_table, "DEEPGEMM_FROM", {"h200": {(64, 128): 8}, "h100": {(64, 128): 4, (8, 128): 1}}
    )
    tune.write_table(tmp_path / "table.py", "h100", {(128, 256): 16, (64, 128): 32})
    written = runpy.run_path(str(tmp_path / "table.py"))["DEEPGEMM_FROM"]
    assert written == {"h100": {(8, 128): 1, (64, 128): 32, (128, 256): 16}, "h200": {(64, 128): 8}}
