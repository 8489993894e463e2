# SPDX-License-Identifier: Apache-2.0
"""What kernels and ops have to agree on about quantisers without Triton: roundings, which ops/quant.py describes."""

from __future__ import annotations

OPAQUE = ("custom_op", "reciprocal")
"""vLLM's CUDA op, which Inductor cannot look into: what stands before it is rounded first."""
NATIVE = ("native", "native_floored")
"""Plain torch code, which Inductor compiles together with what stands before it."""


def is_native(quant_rounding: str) -> bool:
    return quant_rounding in NATIVE
