# SPDX-License-Identifier: Apache-2.0
"""Nothing is compiled while serving: vLLM's own monitor, told to end the engine if anything is."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).parent
# vLLM's default GEMM: FlashInfer's, then DeepGEMM's, whose scales are TMA-aligned, which would depend on the number of rows
# modulo 4. What is left out compiles for minutes, and is none of this package's.
QUICK = {"VLLM_DEEP_GEMM_WARMUP": "skip", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
# A quantiser's pattern by model, with FP8 in blocks, and with one scale a token, where vLLM leaves its fusion flags off.
MODELS = {"qwen3-8b-8layers": "tma", "llama31-8b-fp8-dynamic": "token[native]"}


# FlashInfer and DeepGEMM compile kernels of their own, which the monitor does not count: minutes, on a machine that tests
# keep busy.
@pytest.mark.timeout(1800)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("model", MODELS)
def test_prompts_of_every_length_compile_nothing(model: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("vllm.utils.jit_monitor", reason="this vLLM has no monitor of compilations")
    caches = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    log, out = tmp_path / "log", tmp_path / "answer"
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, str(HERE / "serving_child.py"), str(HERE / "models" / model), str(out)],
            env=os.environ | QUICK | caches,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    answer = json.loads(out.read_text())
    assert answer["served"] == answer["asked"]
    assert any("silu_mul" in pattern for pattern in answer["found"])
    assert any(MODELS[model] in pattern for pattern in answer["found"])
    assert any(note.startswith("warm-up: ") and "failed" not in note for note in answer["notes"])
