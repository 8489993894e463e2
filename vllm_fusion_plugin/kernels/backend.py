# SPDX-License-Identifier: Apache-2.0
"""Whose compiler makes machine code of kernels. It alone decides about PTX, PDL, TMA, hints of alignment and what stands for
an instruction.

Not the compute capability: AMD's gfx942 says (9, 4), and has no more PDL than it has PTX.
"""

from __future__ import annotations

import functools

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

HIDDEN_ALIGNMENT = [] if BACKEND == "hip" else ["codes_ptr"]
"""Of which pointers NVIDIA's compiler is not to see that they are aligned, where kernels say how their uses are: it would
store 16 codes a thread, and for that load x in twos of 16 bytes with a gap between the threads. AMD's would store bytes."""


@functools.cache
def warp_size() -> int:
    """Threads of a warp. Tiles count in warps of 32."""
    if BACKEND != "hip":
        return 32
    if not torch.cuda.is_available():
        return 64  # of the GPUs that vLLM's AITER kernels are for
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).warp_size)
