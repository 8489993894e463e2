# SPDX-License-Identifier: Apache-2.0
"""The FP8 group quantiser on a GPU: the bytes of vLLM's own op, for every maximum and over many random inputs.

VFP_EXHAUSTIVE_ELEMENTS sets how many elements each mode gets at random (default 2**30). The tests with `sanitizer` in their
names are few small launches, for
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m pytest tests/kernels -k sanitizer
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from vllm_fusion_plugin.kernels import group_quant as kernels
from vllm_fusion_plugin.ops.group_quant import group_fp8_quant
from vllm_fusion_plugin.ops.quant import group_fp8_quant_reference

from . import test_group_quant
from .cases import DTYPES, TMA, all_values, from_bits, short, strided
from .checks import (
    EDGE,
    ENDS,
    assert_same_bytes,
    assert_same_outputs,
    check_columns,
    check_cuda_graph_of_group_op,
    check_ends,
    check_pdl_switch,
    code_steps,
    count_differing,
    native_quantiser,
    one_nan,
    vllms_group_quant,
)
from .installed import NATIVE, OPAQUE, installed
from .test_group_quant import Mode, activations, modes

pytestmark = pytest.mark.gpu

ELEMENTS = int(os.environ.get("VFP_EXHAUSTIVE_ELEMENTS", 2**30))
CHUNK = (8192, 12288)
MODES = modes(quant_roundings=(OPAQUE,))
DEEPSEEK = installed(test_group_quant.DEEPSEEK)


@pytest.fixture(scope="module")
def stock() -> Callable[[torch.Tensor, Mode], tuple[torch.Tensor, torch.Tensor]]:
    pytest.importorskip("vllm._custom_ops")  # loads the extension that defines torch.ops._C
    return lambda x, mode: vllms_group_quant(x.contiguous(), mode)


def check(x: torch.Tensor, mode: Mode, stock: Callable, what: str) -> None:
    assert_same_outputs(group_fp8_quant(x, **mode.arguments()), stock(x, mode), what)


# ---- all inputs ------------------------------------------------------------------------------------------------------


def all_maxima(dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """65536 groups of 128, one for each number as the first of its group, the others no larger and of any sign.

    NaN as the first has the others of any size: it does not count for the maximum.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    first = torch.arange(65536, device=device)[:, None]
    size, sign = torch.randint(2**31, (2, 65536, 127), generator=generator, device=device)
    others = size % ((first & 0x7FFF) + 1) | (sign & 1) << 15
    return from_bits(torch.cat([first, others], dim=1), dtype).view(1024, 64 * 128)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_all_maxima(dtype: torch.dtype, stock: Callable, device: torch.device) -> None:
    for seed in range(8):
        x = all_maxima(dtype, device, seed)
        for mode in MODES:
            if mode.dtype == dtype:
                check(x, mode, stock, f"seed {seed}, {mode}")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_all_values(dtype: torch.dtype, stock: Callable, device: torch.device) -> None:
    """In their order (a group is then of one exponent), and every 512th (all exponents in a group)."""
    values = all_values(dtype, device)
    x = torch.cat([values, values.view(128, 512).t().reshape(-1)]).view(32, 4096)
    for mode in MODES:
        if mode.dtype == dtype:
            check(x, mode, stock, str(mode))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_random(mode: Mode, stock: Callable, device: torch.device) -> None:
    done, number = 0, 0
    while done < ELEMENTS:
        kind = "bits" if number % 4 == 3 else "normal"
        x = activations(*CHUNK, mode.dtype, device, seed=1000 * MODES.index(mode) + number, kind=kind)
        check(x, mode, stock, f"chunk {number}")
        done, number = done + x.numel(), number + 1


# Decode and prefill sizes, and widths of models: hidden sizes, attention outputs and latents, whole and sharded.
@pytest.mark.parametrize("width", [128, 512, 1536, 2048, 4096, 7168, 12288, 18432])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 64, 127, 1000])
def test_model_shapes(rows: int, width: int, stock: Callable, device: torch.device) -> None:
    x = activations(rows, width, torch.bfloat16, device, seed=rows)
    for mode in (DEEPSEEK, DEEPSEEK._replace(group_size=64, scale_layout="column")):
        check(x, mode, stock, str(mode))
        check(strided(x), mode, stock, f"strided, {mode}")


# ---- the native quantiser --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    # a compilation by Inductor each; its layouts are views, and its arithmetic has no group size
    [mode for mode in modes(quant_roundings=(NATIVE,)) if mode.scale_layout == "row" and mode.group_size == 128],
    ids=str,
)
def test_native(mode: Mode, device: torch.device) -> None:
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    quantise = native_quantiser(static=False, group_shape=GroupShape(1, mode.group_size), use_ue8m0=mode.use_ue8m0)
    compiled = torch.compile(quantise)
    for kind in ("normal", "special"):
        x = activations(1024, 4096, mode.dtype, device, seed=10, kind=kind)
        codes, scales = group_fp8_quant(x, **mode.arguments())
        expected_codes, expected_scales = compiled(x)
        codes, scales, expected_codes, expected_scales = map(one_nan, (codes, scales, expected_codes, expected_scales))
        assert_same_bytes(scales, expected_scales.contiguous(), f"{kind}: scales")
        # Inductor's division and the kernel's are the same instruction; an Inductor set to divide exactly
        # (TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING) may be a code away.
        if count_differing(codes, expected_codes):
            assert int(code_steps(codes, expected_codes).max()) <= 1
            assert count_differing(codes, expected_codes) <= codes.numel() * 1e-3


# ---- sizes, streams and graphs ---------------------------------------------------------------------------------------


def test_more_than_two_to_the_31_elements(stock: Callable, device: torch.device) -> None:
    """7 GB, and 13 GB in strided rows."""
    width = 12288
    for row_stride in (width, 2 * width):
        x = torch.zeros(2**31 // width + EDGE, row_stride, dtype=torch.bfloat16, device=device)[:, :width]
        for end, seed in zip(ENDS, (11, 12), strict=True):
            x[end] = activations(EDGE, width, x.dtype, device, seed)
        for mode in (DEEPSEEK, DEEPSEEK._replace(scale_layout="row")):
            check_ends(group_fp8_quant(x, **mode.arguments()), [stock(x[end], mode) for end in ENDS])
        del x


def test_more_rows_than_a_grid_has_in_its_second_axis(stock: Callable, device: torch.device) -> None:
    x = activations(70_000 * 8, 128, torch.bfloat16, device, seed=13)
    check(x, DEEPSEEK, stock, "560000 rows")


def test_chain_in_a_cuda_graph(device: torch.device) -> None:
    check_cuda_graph_of_group_op(
        lambda x: group_fp8_quant(x, **DEEPSEEK.arguments()),
        lambda seed: activations(512, 8192, torch.bfloat16, device, seed),
        links=4,
        first_seed=14,
    )


def test_pdl_switch_changes_no_byte(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    x = activations(33, 1536, torch.bfloat16, device, seed=35)
    check_pdl_switch(lambda: group_fp8_quant(x, **DEEPSEEK.arguments()), x.device, monkeypatch)


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [DEEPSEEK, DEEPSEEK._replace(scale_layout="column", group_size=64)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_sanitizer_op(rows: int, mode: Mode, device: torch.device) -> None:
    """The op's own allocations, unlike the guarded ones of the other tests: an access past their end is out of bounds."""
    x = strided(activations(rows, 3 * 128, mode.dtype, device, seed=36))
    codes, scales = group_fp8_quant(x, **mode.arguments())
    quant_rounding = mode.quant_rounding
    expected_codes, expected_scales = group_fp8_quant_reference(x, mode.scales, quant_rounding)
    assert_same_bytes(codes.cpu(), expected_codes.cpu(), "codes")
    check_columns(scales, expected_scales, mode.scale_layout in ("tma", "packed"))


def test_sanitizer_tiles(device: torch.device) -> None:
    """Tiles that rows and groups do not fill, each tile shape forced rather than chosen."""
    x = activations(5, 3 * 128, torch.bfloat16, device, seed=37)
    expected = group_fp8_quant_reference(x, TMA, "custom_op")
    for tile in (kernels.Tile(1, 4, 1), kernels.Tile(2, 2, 2), kernels.Tile(8, 1, 4), kernels.Tile(2, 8, 2)):
        codes = torch.empty_like(expected[0])
        scales = TMA.empty(x, 5, 3 * 128)
        kernels.group_fp8_quant(x, codes, scales, 128, False, "custom_op", tile=tile)
        assert_same_outputs((codes, scales), expected, str(tile))
