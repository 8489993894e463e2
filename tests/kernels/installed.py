# SPDX-License-Identifier: Apache-2.0
"""Which of the known roundings the installed vLLM's group quantisers have, for tests that compare with vLLM itself."""

from __future__ import annotations

from typing import Any, TypeVar

from vllm_fusion_plugin import compat

# By version: parameters of tests are made before there is a GPU to ask. test_roundings_gpu.py asks, and compares.
_SINCE_0_33 = compat.group_quantiser_multiplies()
OPAQUE = "reciprocal" if _SINCE_0_33 else "custom_op"
NATIVE = "native_floored" if _SINCE_0_33 else "native"

Mode = TypeVar("Mode", bound=Any)


def installed(mode: Mode) -> Mode:
    """`mode` with the quantiser of its kind that the installed vLLM has."""
    return mode._replace(quant_rounding=NATIVE if mode.quant_rounding.startswith("native") else OPAQUE)
