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
MODEL = HERE / "models" / "qwen3-8b-8layers"
# DeepGEMM, whose scales are TMA-aligned: what would depend on the number of rows modulo 4.
DEEP_GEMM = {
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
    "VLLM_USE_DEEP_GEMM": "1",
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


# DeepGEMM compiles kernels of its own, which the monitor does not count: over 5 minutes on a machine that tests keep busy.
@pytest.mark.timeout(1800)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_prompts_of_every_length_compile_nothing(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("vllm.utils.jit_monitor", reason="this vLLM has no monitor of compilations")
    caches = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    log = tmp_path / "log"
    with log.open("w") as stderr:
        done = subprocess.run(
            [sys.executable, str(HERE / "serving_child.py"), str(MODEL)],
            env=os.environ | DEEP_GEMM | caches,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["served"] == answer["asked"]
    assert any("silu_mul" in pattern for pattern in answer["found"])
    assert any("tma" in pattern for pattern in answer["found"])
    assert any(note.startswith("warm-up: ") and "failed" not in note for note in answer["notes"])
