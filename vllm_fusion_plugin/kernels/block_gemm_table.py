# SPDX-License-Identifier: Apache-2.0
"""From how many rows on DeepGEMM beats FlashInfer, by GPU, then by rows and width of the weight (N, K); 32 where
vLLM's own number is as good. Written by benchmarks/tune_block_gemm.py."""

from __future__ import annotations

DEEPGEMM_FROM: dict[str, dict[tuple[int, int], int]] = {
    "h200": {
        (2560, 4096): 32,
        (2560, 9728): 6,
        (3072, 4096): 32,
        (4096, 2048): 32,
        (4096, 4096): 16,
        (4096, 6144): 6,
        (4096, 7168): 24,
        (4096, 12288): 6,
        (4096, 14336): 20,
        (5120, 5120): 32,
        (6144, 2560): 16,
        (6144, 4096): 20,
        (7168, 5120): 20,
        (12288, 4096): 32,
        (14336, 4096): 32,
        (19456, 2560): 20,
        (24576, 4096): 32,
        (28672, 4096): 32,
    },
}
