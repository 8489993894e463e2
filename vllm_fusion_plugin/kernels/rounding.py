# SPDX-License-Identifier: Apache-2.0
"""What kernels and ops have to agree on about quantisers without Triton: roundings, which ops/quant.py describes."""

from __future__ import annotations

OPAQUE = ("custom_op", "reciprocal")
"""vLLM's CUDA op, which Inductor cannot look into: what stands before it is rounded first."""
NATIVE = ("native", "native_floored")
"""Plain torch code, which Inductor compiles together with what stands before it."""
FLASHINFER = "flashinfer"
"""The quantiser inside of FlashInfer's block GEMM, opaque as well. Its scales are never powers of two."""
AITER = "aiter"
"""AITER's group and token quantisers on AMD's GPUs, opaque as well. Its scales are never powers of two."""
BY_ROWS = {f"{name}_or_{FLASHINFER}": name for name in OPAQUE}
"""Roundings of a quantiser before a block GEMM that is FlashInfer's below FLASHINFER_ROWS rows, and from there on."""
FLASHINFER_ROWS = 32


def is_native(quant_rounding: str) -> bool:
    return quant_rounding in NATIVE


def of_rows(rows: int, quant_rounding: str, use_ue8m0: bool) -> tuple[str, bool]:
    """The rounding of a group quantiser for `rows` rows, and whether its scales are powers of two."""
    if quant_rounding == FLASHINFER or (quant_rounding in BY_ROWS and rows < FLASHINFER_ROWS):
        return FLASHINFER, False
    return BY_ROWS.get(quant_rounding, quant_rounding), use_ue8m0


# NVIDIA's fast division, where it is not IEEE's: one unit in the last place up (first four words) or down, by the seven bits
# of a bf16 maximum's mantissa; bit m % 32 of word m // 32. Measured on an H100; test_block_gemm_gpu.py measures again.
FAST_448_OVER = ((0x00000400, 0x43020040, 0x80220007, 0x12DB6420), (0x08580010, 0x00000010, 0x00000010, 0x80248808))
"""Of 448 / maximum."""
FAST_RECIPROCAL = ((0x00000200, 0x00400000, 0x00800000, 0x10080200), (0x00000000, 0x00000000, 0x04010000, 0x00008000))
"""Of 1 / (448 / maximum), as above."""
