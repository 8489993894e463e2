# SPDX-License-Identifier: Apache-2.0
"""What the plugin does with the vLLM that is installed, as JSON for its column of docs/versions.md. No GPU is needed.

    python tests/compile/version_column.py docs/versions/0.33.0.json

Traces the models of tests/models with the plugin, and compiles every kernel. Exit status 1 if any of it failed; the JSON,
which says what, is written all the same.
"""

from __future__ import annotations

import datetime
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from tracer import TraceError, Tracer

from vllm_fusion_plugin.tracing import fake_gpu

MODELS = ("qwen3-8b-8layers", "qwen3-next-8layers", "deepseek-v3-5layers", "llama31-8b-fp8-dynamic")


def main(output: Path) -> int:
    if reason := fake_gpu.unavailable():
        sys.exit(reason)
    with Tracer() as tracer:
        models = {model: fusions(tracer, model) for model in MODELS}
    kernels = compile_kernels()
    column = {
        "versions": {name: metadata.version(name) for name in ("vllm", "torch", "triton")},
        "date": datetime.date.today().isoformat(),
        "models": models,
        "kernels": kernels,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(column, indent=1) + "\n")
    return int(any("failed" in model for model in models.values()) or bool(kernels["failed"]))


def fusions(tracer: Tracer, model: str) -> dict[str, Any]:
    """How many fusions each pass of ours made, over all layers; or what went wrong."""
    try:
        trace = tracer.trace(model, plugin=True)  # with nothing set
    except TraceError as e:
        print(e, file=sys.stderr)
        return {"failed": str(e).strip().splitlines()[-1]}
    if not trace["pass_manager"].startswith("vllm_fusion_plugin."):
        return {"failed": trace["plugin"]["manager"]}
    return {"linear_kernels": sorted(trace["linear_kernels"]), "fusions": layer_table(trace["plugin"])}


def layer_table(report: dict[str, Any]) -> dict[str, int]:
    from vllm_fusion_plugin.report import RankReport

    return dict(sorted(RankReport.model_validate(report).layer_table().items()))


class _Tally:
    """A pytest plugin: what test_kernels.py compiled."""

    def __init__(self) -> None:
        self.compiled = 0
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid.rpartition("::")[2])
        elif report.when == "teardown":
            self.compiled += dict(report.user_properties).get("kernels", 0)


def compile_kernels() -> dict[str, Any]:
    tally = _Tally()
    tests = Path(__file__).parent / "test_kernels.py"
    status = pytest.main([str(tests), "-q", "--timeout=900", "-p", "no:cacheprovider"], plugins=[tally])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        tally.failed.append(f"pytest ended with {status}")
    return {"compiled": tally.compiled, "failed": sorted(set(tally.failed))}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
