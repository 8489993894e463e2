# SPDX-License-Identifier: Apache-2.0
"""What the plugin does on AMD's GPUs with the vLLM that is installed, as JSON for docs/rocm-traces.md. No GPU is needed.

    python tests/compile/rocm_column.py docs/rocm/0.33.0.json

Traces models of tests/models as on an MI300X and an MI355X, with AITER and without, by vLLM alone and with the plugin, and
compiles every kernel for both. Exit status 1 if any of it failed; the JSON, which says what, is written all the same.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from tracer import TraceError, Tracer

from vllm_fusion_plugin.report import VLLMS_PASS
from vllm_fusion_plugin.tracing import fake_gpu

MODELS = ("qwen3-8b-8layers", "qwen3-next-8layers", "deepseek-v3-5layers")
GPUS = {name: gpu for name, gpu in fake_gpu.GPUS.items() if gpu.arch}


def main(output: Path) -> int:
    if reason := fake_gpu.unavailable():
        sys.exit(reason)
    column = {
        "versions": {name: metadata.version(name) for name in ("vllm", "torch", "triton")},
        "date": datetime.date.today().isoformat(),
        "traces": [row for gpu in GPUS for aiter in (False, True) for row in traces(gpu, aiter)],
        "kernels": {gpu.arch: kernels(gpu.arch) for gpu in GPUS.values()},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(column, indent=1) + "\n")
    return int('"failed"' in output.read_text())


def traces(gpu: str, aiter: bool) -> list[dict[str, Any]]:
    rows = []
    with Tracer(gpu, {"VLLM_ROCM_USE_AITER": str(int(aiter))}) as tracer:
        for model in MODELS:
            print(gpu, "AITER" if aiter else "", model, file=sys.stderr, flush=True)
            row = {"gpu": gpu, "aiter": aiter, "model": model, "stock": fusions(tracer, model, plugin=False)}
            row["exact"] = fusions(tracer, model, plugin=True)
            if aiter:
                settings = {"VLLM_FUSION_PLUGIN_SETTINGS": '{"rocm_kernels": "aiter"}'}
                row["aiter_kernels"] = fusions(tracer, model, plugin=True, env=settings)
            rows.append(row)
    return rows


def fusions(tracer: Tracer, model: str, **how: Any) -> dict[str, Any]:
    """Over all layers: fusions by pass, how many of them are vLLM's passes', and AITER's ops that ours have placed."""
    try:
        trace = tracer.trace(model, **how)
    except TraceError as e:
        print(e, file=sys.stderr)
        return {"failed": str(e).strip().splitlines()[-1]}
    result: dict[str, Any] = {
        "linear_kernels": sorted(trace["linear_kernels"]),
        "fusions": {name: count for name, count in sorted(trace["matches_by_layer"].items()) if count},
    }
    if trace["plugin"]:
        found = [found for sub in trace["plugin"]["subgraphs"] for found in sub["found"]]
        result["by_vllms_passes"] = sum(f["pass_name"] == VLLMS_PASS for f in found)
        result["aiters_ops"] = sum(f["pattern"].endswith("[aiter]") for f in found)
    return result


def kernels(arch: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernels.json"
        script = Path(__file__).parent / "amd_code.py"
        process = subprocess.run(
            [sys.executable, str(script), arch, f"--output={output}"], capture_output=True, text=True
        )
        if process.returncode:
            print(process.stderr, file=sys.stderr)
            return {"failed": process.stderr.strip().splitlines()[-1]}
        figures = json.loads(output.read_text())["kernels"]
    for kernel in figures.values():
        del kernel["seconds"]
    return figures


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
