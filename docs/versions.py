# SPDX-License-Identifier: Apache-2.0
"""Make docs/versions.md from docs/versions/*.json, each of which `nox -s versions-0.33.0` writes for one vLLM.

python docs/versions.py            # write the table
python docs/versions.py --check    # exit status 1 if the table is another
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generated

FOLDER = Path(__file__).parent / "versions"
TABLE = Path(__file__).parent / "versions.md"

HEAD = """\
# What works with which vLLM

`docs/versions.py` makes this table from [one file a version](versions), which `nox -s versions-0.33.0` writes. vLLM's
CUDA build compiles models of [tests/models](../tests/models) for an H200, without a GPU and with nothing set. Those with
FP8 in blocks take vLLM's default block GEMM, which quantises inside and is split. For Llama vLLM leaves its fusion flags
off, and this package turns them on. Numbers are fusions over all layers, by pass. Kernels are compiled for sm_90, in the
variants of `tests/compile/test_kernels.py`. –: none. `nox` itself tests with vLLM's CUDA build
0.33.0 and its CPU build 0.32.0.

"""

PASSES = {
    "activation_quant_fusion_pass": "SiLU·mul + quantiser",
    "rmsnorm_quant_fusion_pass": "norm + quantiser",
    "mla_dual_rms_norm_fusion_pass": "both latent norms + quantiser",
    "group_quant_pass": "quantiser alone",
}


def load() -> list[dict[str, Any]]:
    """Columns, oldest vLLM first."""
    columns = [json.loads(path.read_text()) for path in FOLDER.glob("*.json")]
    return sorted(columns, key=lambda column: [int(part) for part in column["versions"]["vllm"].split(".")])


def table(columns: list[dict[str, Any]]) -> str:
    rows = [["vLLM", *(column["versions"]["vllm"] for column in columns)], ["---", *["---:"] * len(columns)]]
    for name, package in (("torch", "torch"), ("Triton", "triton")):
        rows.append([name, *(column["versions"][package] for column in columns)])
    for model in {model: None for column in columns for model in column["models"]}:
        results = [column["models"].get(model, {}) for column in columns]
        rows += [[f"{model}: {label}", *cells] for label, cells in model_rows(results)]
    rows.append(["kernels compiled", *(kernels(column["kernels"]) for column in columns)])
    rows.append(["run on", *(column["date"] for column in columns)])
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def model_rows(results: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """A row for each pass that found something with any version."""
    found = {name for result in results for name, count in result.get("fusions", {}).items() if count}
    names = [*(name for name in PASSES if name in found), *sorted(found - PASSES.keys())]
    return [(PASSES.get(name, f"`{name}`"), [cell(result, name) for result in results]) for name in names or [""]]


def cell(result: dict[str, Any], name: str) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}".replace("|", "\\|")
    return str(result.get("fusions", {}).get(name) or "–")


def kernels(result: dict[str, Any]) -> str:
    failed = len(result["failed"])
    return f"{result['compiled']}, {failed} tests failed" if failed else str(result["compiled"])


if __name__ == "__main__":
    generated.run(TABLE, lambda: table(load()), __file__)
