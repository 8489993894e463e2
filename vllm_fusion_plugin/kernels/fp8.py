# SPDX-License-Identifier: Apache-2.0
"""The FP8 formats of codes, by name, for ops and kernels alike. No Triton here.

    e4m3fn         OCP: NVIDIA's GPUs, and AMD's from gfx950 (MI350) on
    e4m3fnuz       AMD's gfx942 (MI300), as vLLM quantises: no number above 224, although the format goes to 240
    e4m3fnuz_240   the same codes up to the format's own maximum, as AITER's kernels quantise

"fnuz" has no -0 and no infinities; its one NaN is 0x80, and a code means half of what it means in e4m3fn. Scales are made
from the maximum, so both are one choice, which whoever makes the call takes from platform and path.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Fp8Format(NamedTuple):
    dtype: torch.dtype
    max: float
    """The largest code that a quantiser makes; -max is the smallest."""

    @property
    def min_scale(self) -> float:
        """Floor of a native or token quantiser's scale, as vLLM has it, so that zeros are divided by something."""
        return 1.0 / (self.max * 512.0)


OCP = "e4m3fn"
FORMATS = {
    OCP: Fp8Format(torch.float8_e4m3fn, 448.0),
    "e4m3fnuz": Fp8Format(torch.float8_e4m3fnuz, 224.0),
    "e4m3fnuz_240": Fp8Format(torch.float8_e4m3fnuz, 240.0),
}
DTYPES = tuple(dict.fromkeys(fp8.dtype for fp8 in FORMATS.values()))
