# SPDX-License-Identifier: Apache-2.0
"""Names of the roundings that a group quantiser can have; what they are is in ops/quant.py. Needs no Triton."""

from __future__ import annotations

OPAQUE = ("custom_op", "reciprocal")
"""vLLM's CUDA op, which Inductor cannot look into: what stands before it is rounded first."""
NATIVE = ("native", "native_floored")
"""Plain torch code, which Inductor compiles together with what stands before it."""


def is_native(quant_form: str) -> bool:
    return quant_form in NATIVE
