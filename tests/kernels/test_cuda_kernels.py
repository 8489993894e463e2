# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/ on a CPU: by g++, with stand-ins for CUDA and for inline PTX, byte for byte against plain torch.

Rows, groups, tiles, layouts and roundings, but no approximate instruction: those are for test_cuda_kernels_gpu.py.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_fusion_plugin.ops.group_quant import _cpu as group_reference
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, GroupScales
from vllm_fusion_plugin.ops.silu_mul_quant import _group_cpu as silu_mul_reference

from .cases import DTYPES, random_input, short, strided
from .checks import Guarded, assert_same_bytes, check_guarded, code_steps, one_nan

CSRC = Path(__file__).parents[2] / "csrc"
STAND_INS = Path(__file__).with_name("emulated")
ROUNDINGS = ("custom_op", "reciprocal", "power", "flashinfer")  # as csrc/launch.h
ACTS = ("custom_op", "eager", "native")
CHOSEN = (0, 0, 0)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("emulated")
    for source in (*CSRC.glob("*.cu*"), *CSRC.glob("*.h"), *STAND_INS.iterdir()):
        shutil.copy(source, folder)  # the stand-ins last, over what they stand in for
    out = folder / "emulated.so"
    options = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w")
    subprocess.run([compiler, *options, str(folder / "emulated.cpp"), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def check(
    emulated: ctypes.CDLL,
    x: torch.Tensor,
    how: GroupScales,
    rounding: str,
    act: str | None = None,
    tile: tuple[int, int, int] = CHOSEN,
    keep: bool = False,
) -> None:
    """One kernel into poisoned outputs, which shows what it did not write, or wrote elsewhere."""
    rows, width = x.shape[0], x.shape[1] // (2 if act else 1)
    codes, scales = Guarded(x.new_empty((rows, width), dtype=FP8_DTYPE)), Guarded(how.empty(x, rows, width))
    kept = Guarded(x.new_empty((rows, width)))
    code = ROUNDINGS.index("power" if how.ue8m0 and rounding != "flashinfer" else rounding)
    padded = scales.tensor.stride(1) if how.layout in ("tma", "packed") else rows
    packed = how.layout == "packed"
    values = (
        x.stride(0),
        rows,
        width,
        how.group_size,
        x.dtype == torch.float16,
        code,
        *scales.tensor.stride(),
        padded,
        packed,
    )
    arguments = (ctypes.c_int64 * 13)(*map(int, (*values, *tile)))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, codes.tensor, scales.tensor, kept.tensor)]
    if act:
        run: Any = emulated.emulated_silu_mul
        last = pointers[3] if keep else None
        assert run(pointers[0], arguments, pointers[1], pointers[2], ACTS.index(act), last) == 0
        expected_codes, expected_scales, *expected_act = silu_mul_reference(x, *how, act, rounding, keep)
    else:
        assert emulated.emulated_group(pointers[0], arguments, pointers[1], pointers[2]) == 0
        expected_codes, expected_scales = group_reference(x, *how, rounding)
    if act or rounding == "flashinfer":
        # Without the approximate instructions SiLU and FlashInfer's scale are an ulp off here and there: ties go otherwise.
        steps = code_steps(codes.tensor, one_nan(expected_codes))
        assert int(steps.max()) <= 1 and int(steps.count_nonzero()) <= steps.numel() // 100
        expected_codes = codes.tensor
    if rounding == "flashinfer":
        torch.testing.assert_close(scales.tensor, expected_scales, rtol=2**-22, atol=0, equal_nan=True)
        expected_scales.copy_(scales.tensor)
    check_guarded(codes, scales, expected_codes, expected_scales, rounding)
    for guarded in (codes, scales, kept):
        guarded.check()
    if keep:
        assert_same_bytes(one_nan(kept.tensor), one_nan(expected_act[0]), "act")


def forms(dtype: torch.dtype) -> list[tuple[GroupScales, str]]:
    hows = [GroupScales(*how) for how in itertools.product((64, 128), ("row", "column", "tma"), (False, True))]
    plain = [(how, rounding) for how in hows for rounding in ("custom_op", "reciprocal")]
    flashinfer = [(how, "flashinfer") for how in hows if dtype == torch.bfloat16 and not how.ue8m0]
    return [*plain, *flashinfer, (GroupScales(128, "packed", True), "reciprocal")]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_forms(emulated: ctypes.CDLL, dtype: torch.dtype) -> None:
    for number, (how, rounding) in enumerate(forms(dtype)):
        for kind in ("normal", "special"):
            x = random_input(5, 512, dtype, CPU, seed=number, kind=kind)
            check(emulated, x[:, :512], how, rounding)
            for act in ACTS:
                check(emulated, x, how, rounding, act, keep=act == "eager")


@pytest.mark.parametrize("rows, width", [(1, 128), (1, 1664), (2, 384), (17, 128), (33, 1152), (150, 3072)])
def test_shapes(emulated: ctypes.CDLL, rows: int, width: int) -> None:
    x = strided(random_input(rows, width, torch.bfloat16, CPU, seed=rows))
    for how in (GroupScales(128, "tma"), GroupScales(64, "column")):
        check(emulated, x, how, "reciprocal", "native")
        check(emulated, x[:, :width], how, "reciprocal")


@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 2, 2), (8, 1, 4), (2, 8, 2), (1, 8, 1), (4, 4, 8), (16, 2, 4)])
def test_tiles(emulated: ctypes.CDLL, tile: tuple[int, int, int]) -> None:
    """Each tile shape forced rather than chosen, filled and not."""
    for rows, width in ((1, 128), (5, 384), (9, 1536)):
        x = random_input(rows, width, torch.bfloat16, CPU, seed=rows)
        check(emulated, x, GroupScales(128, "tma"), "reciprocal", "native", tile)
        check(emulated, x, GroupScales(128, "row"), "custom_op", None, tile)
