# SPDX-License-Identifier: Apache-2.0
"""From how many rows on DeepGEMM beats FlashInfer, by GPU, then by rows and width of the weight (N, K); 32 where
vLLM's own number is as good. Written by benchmarks/tune_block_gemm.py."""

from __future__ import annotations

DEEPGEMM_FROM: dict[str, dict[tuple[int, int], int]] = {}
