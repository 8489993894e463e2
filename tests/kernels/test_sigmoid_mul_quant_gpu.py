# SPDX-License-Identifier: Apache-2.0
"""Sigmoid gate + FP8 group quantiser on a GPU: the bytes of Inductor's kernel and vLLM's quantiser after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vllm_fusion_plugin.ops.sigmoid_mul_quant import sigmoid_mul_group_fp8_quant

from .cases import DTYPES, all_values, short
from .checks import assert_same_outputs, vllms_group_quant
from .installed import OPAQUE
from .test_group_quant import Mode, modes
from .test_sigmoid_mul_quant import inputs

pytestmark = pytest.mark.gpu

MODES = modes(quant_roundings=(OPAQUE,))
X = (0.0, -0.0, 1.0, -1.0, 0.3, 1e-3, 17.0, -433.0, 3e-38, 6e4)


@pytest.fixture(scope="module")
def stock() -> Callable:
    pytest.importorskip("vllm._custom_ops")
    product = torch.compile(lambda x, gate: x * torch.sigmoid(gate), dynamic=True)
    return lambda x, gate, mode: vllms_group_quant(product(x, gate), mode)


def check(x: torch.Tensor, gate: torch.Tensor, mode: Mode, stock: Callable, what: str) -> None:
    assert_same_outputs(sigmoid_mul_group_fp8_quant(x, gate, **mode.arguments()), stock(x, gate, mode), what)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_all_gates(dtype: torch.dtype, stock: Callable, device: torch.device) -> None:
    """Each times a grid of x: in their order (a group is then of one exponent), and every 512th (all exponents in one)."""
    gates = all_values(dtype, device)
    gate = torch.cat([gates, gates.view(128, 512).t().reshape(-1)]).view(32, 4096)
    for value in X:
        x = torch.full_like(gate, value)
        for mode in (mode for mode in MODES if mode.dtype == dtype):
            check(x, gate, mode, stock, f"x {value}, {mode}")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_random(mode: Mode, stock: Callable, device: torch.device) -> None:
    for rows, width in ((1, 4096), (33, 2048), (700, 8192), (4096, 4096)):
        x, gate = inputs(rows, width, mode.dtype, device, seed=rows)
        check(x, gate, mode, stock, f"{rows} x {width}")
