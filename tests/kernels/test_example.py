# SPDX-License-Identifier: Apache-2.0
"""The kernel of examples/relu2_quant against its reference, byte for byte."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from .cases import all_values, random_input

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "relu2_quant")
sys.path.insert(0, EXAMPLE)
try:
    from relu2_quant import kernel, op
finally:
    sys.path.remove(EXAMPLE)


def inputs(device: torch.device):
    for dtype in (torch.bfloat16, torch.float16):
        yield all_values(dtype, device).reshape(64, 1024)
        yield random_input(3, 1000, dtype, device, seed=1)
        yield torch.empty(0, 8, dtype=dtype, device=device)


def test_every_byte(device):
    for x in inputs(device):
        for number in (1.0, 0.37, 1e-3):
            scale = torch.tensor([number], device=device)
            codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
            kernel.relu2_static_fp8_quant(x, scale, codes)
            expected = op.relu2_static_fp8_quant_reference(x, scale)
            assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)), (x.dtype, tuple(x.shape), number)


def test_bad_input():
    with pytest.raises(ValueError, match=r"x is torch\.float32 of shape"):
        op.relu2_static_fp8_quant(torch.zeros(2, 4), torch.ones(1))
