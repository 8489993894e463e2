# SPDX-License-Identifier: Apache-2.0
"""Whose compiler makes machine code of kernels. It alone decides about PTX, PDL, TMA and what stands for an instruction.

Not the compute capability: AMD's gfx942 says (9, 4), and has no more PDL than it has PTX.
"""

from __future__ import annotations

import torch
import triton


def _backend() -> str:
    if hasattr(triton, "knobs") and triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip is not None:
        return "hip"
    return "cuda" if torch.version.cuda is not None else "none"


BACKEND = _backend()
"""cuda, hip, interpreter (Triton's, without a GPU), or none: torch's CPU build, which only plans launches."""

INTERPRETED = BACKEND == "interpreter"
