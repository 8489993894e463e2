# SPDX-License-Identifier: Apache-2.0
"""What AITER's fused ops compute: plain torch against the two ops that each replaces, and against AITER's own Triton kernels
in the interpreter, where AITER_SOURCE names a clone of ROCm/aiter (no GPU, no ROCm; 20 s)."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from vllm_fusion_plugin.kernels.fp8 import FORMATS, OCP
from vllm_fusion_plugin.ops.gated_rms_norm_quant import gated_rms_norm_reference
from vllm_fusion_plugin.ops.quant import GroupScales, group_fp8_quant_reference
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs, rms_norm_reference
from vllm_fusion_plugin.ops.silu_mul_quant import silu_mul_reference

from .checks import code_steps

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EPSILON, GROUP = 1e-6, GroupScales(128)
Outputs = tuple[torch.Tensor, ...]


@pytest.fixture(scope="module")
def aiter_ops() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aiter_ops", BENCHMARKS / "aiter_ops.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16()


def quantised(y: torch.Tensor, fp8: str, rounding: str = "aiter") -> Outputs:
    return group_fp8_quant_reference(y, GROUP, rounding, fp8)


@pytest.mark.parametrize("fp8", [OCP, "e4m3fnuz_240"])
def test_they_are_a_step_from_the_two_ops(aiter_ops, fp8):
    """docs/rocm.md has the numbers: of a million codes, how many are another one, and none by more than a step."""
    rows, x, residual, weight = 64, numbers(64, 4096), numbers(64, 4096, seed=2), numbers(4096, seed=3)
    heads = x.view(-1, 128)
    norm = NormInputs(x, weight, EPSILON, residual, norm_rounding="custom_op")
    normed, total = rms_norm_reference(norm)
    gated = gated_rms_norm_reference(
        x.view(rows, 32, 128), residual.view(rows, 32, 128), weight[:128], EPSILON, True, "silu"
    )
    vllms = "e4m3fnuz" if fp8 != OCP else OCP
    pairs: dict[str, tuple[Outputs, Outputs, int]] = {
        "silu": (aiter_ops.silu_mul_group(x, fp8), quantised(silu_mul_reference(x), fp8), 31_000),
        "norm": (aiter_ops.rms_norm_group(x, weight, EPSILON, fp8, residual), (*quantised(normed, fp8), total), 32_000),
        "gated": (
            aiter_ops.gated_rms_norm_group(heads, residual.view(-1, 128), weight[:128], EPSILON, vllms),
            quantised(gated.reshape(-1, 128), vllms, "native"),
            22_000,
        ),
    }
    for name, (aiters, exact, about) in pairs.items():
        steps = code_steps(aiters[0], exact[0])
        per_million = int((steps > 0).sum()) * 1_000_000 // steps.numel()
        assert abs(per_million - about) < 1000 and int(steps.max()) == 1, name
        torch.testing.assert_close(aiters[1], exact[1].view_as(aiters[1]), rtol=2**-7, atol=0.0)
        if len(exact) == 3:
            assert torch.equal(aiters[2], exact[2])


# ---- AITER's kernels -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels() -> Callable[[str], Any]:
    """A kernel of AITER's Triton sources by its name."""
    if not (source := os.environ.get("AITER_SOURCE")):
        pytest.skip("needs a clone of ROCm/aiter, in AITER_SOURCE")
    folder = Path(source) / "aiter/ops/triton/_triton_kernels"
    for package, path in (("aiters", folder), ("aiters.quant", folder / "quant")):
        module = ModuleType(package)  # without the package's own __init__, which wants ROCm
        module.__path__ = [str(path)]
        sys.modules[package] = module
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        modules = [importlib.import_module(f"aiters.{name}") for name in ("quant.fused_fp8_quant", "activation")]
    return lambda name: next(getattr(module, name) for module in modules if hasattr(module, name))


@pytest.mark.parametrize("fp8", [OCP, "e4m3fnuz_240"])
def test_kernels_are_these_ops(kernels, aiter_ops, fp8):
    form = FORMATS[fp8]
    x, residual, weight = numbers(4, 1024), numbers(4, 1024, seed=2), numbers(1024, seed=3)
    codes, scales, total = torch.empty(4, 1024, dtype=form.dtype), torch.empty(4, 8), torch.empty_like(x)
    arguments = {
        "inp1_ptr": x,
        "weight1_ptr": weight,
        "res1_ptr": residual,
        "out1_fp8_ptr": codes,
        "out1_bs_ptr": scales,
        "out_res1_ptr": total,
        "gate_ptr": x,
        "linear_bias_ptr": weight,
        "eps1": EPSILON,
        "n_rows": 4,
        "inp1_n_cols": 1024,
        "BLOCK_SIZE_N": 1024,
        "QUANT_BLOCK_SIZE": 128,
        "FIRST_INPUT_RES": True,
        "GATED_RMS_FP8": False,
    }
    _run(kernels("_fused_rms_fp8_group_quant_kernel"), (4,), arguments, form.max, row=1024, groups=8)
    expected = aiter_ops.rms_norm_group(x, weight, EPSILON, fp8, residual)
    _compare((codes, scales, total), expected)

    codes, scales = torch.empty(4, 512, dtype=form.dtype), torch.empty(4, 4)
    kernels("_act_mul_and_dynamic_fp8_group_quant_kernel")[(4, 4)](
        *(x, codes, scales, *x.stride(), *codes.stride(), *scales.stride()),
        N=512,
        ACTIVATION="silu",
        scaleN=4,
        BLOCK_SIZE_N=128,
        QUANT_BLOCK_SIZE=128,
        DTYPE_MAX=form.max,
        DTYPE_MIN=-form.max,
    )
    _compare((codes, scales), aiter_ops.silu_mul_group(x, fp8))


@pytest.mark.parametrize("fp8", [OCP, "e4m3fnuz"])
def test_the_gated_kernel_is_this_op(kernels, aiter_ops, fp8):
    form = FORMATS[fp8]
    x, z, weight = numbers(24, 128), numbers(24, 128, seed=2), numbers(128, seed=3)
    codes, scales = torch.empty(24, 128, dtype=form.dtype), torch.empty(24, 1)
    arguments = {
        "inp1_ptr": x,
        "weight1_ptr": weight,
        "res1_ptr": x,
        "out1_fp8_ptr": codes,
        "out1_bs_ptr": scales,
        "out_res1_ptr": x,
        "gate_ptr": z,
        "linear_bias_ptr": weight,
        "eps1": EPSILON,
        "n_rows": 24,
        "inp1_n_cols": 128,
        "BLOCK_SIZE_N": 128,
        "QUANT_BLOCK_SIZE": 128,
        "FIRST_INPUT_RES": False,
        "GATED_RMS_FP8": True,
    }
    _run(kernels("_fused_rms_fp8_group_quant_kernel"), (6,), arguments, form.max, row=128, groups=1)
    _compare((codes, scales), aiter_ops.gated_rms_norm_group(x, z, weight, EPSILON, fp8))


def _run(kernel: Any, grid: tuple[int], arguments: dict[str, Any], maximum: float, row: int, groups: int) -> None:
    """Launch it; what the call does not name is unused, or follows from `row` numbers and `groups` groups a row."""
    known = {
        "RMS_TILE": 128,
        "ROWS_PER_BLOCK": 4,
        "GROUP_SIZE_GATED": 128,
        "NUM_GROUPS_GATED": 1,
        "BLOCK_G": 128,
        "HAS_Z_GATED": True,
        "NORM_BEFORE_GATE": True,
        "FP8_MIN": -maximum,
        "FP8_MAX": maximum,
        "DTYPE_MAX": maximum,
        "DTYPE_MIN": -maximum,
        "FP8_MIN_SCALING_FACTOR": 1.0 / (maximum * 512.0),
        "ACTIVATION": "silu",
        "out1_bs_row_stride": groups,
        "stride_gate_row": row,
        "eps2": 0.0,
    }
    call = known | arguments
    for name in kernel.arg_names:
        if name not in call:
            unused = arguments["inp1_ptr"] if name.endswith("_ptr") else False if name.isupper() else 1
            call[name] = row if name.endswith("row_stride") else unused
    kernel[grid](**call)


def _compare(found: Outputs, expected: Outputs) -> None:
    """Equal but for the order of sums and another exp: a code in two thousand, by a step."""
    codes, scales, *total = found
    steps = code_steps(codes, expected[0])
    assert int((steps > 0).sum()) <= codes.numel() // 2000 and int(steps.max()) <= 1
    torch.testing.assert_close(scales, expected[1], rtol=2**-22, atol=0.0)
    assert all(torch.equal(a, b) for a, b in zip(total, expected[2:], strict=True))
