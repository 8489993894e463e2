# SPDX-License-Identifier: Apache-2.0
"""MLA's value up-projection + FP8 quantiser against its pure-torch reference; here on a GPU, or in Triton's interpreter.

Byte for byte, which a GEMM allows where no sum is ever rounded: numbers that are small integers times powers of two. The
comparison with vLLM's own ops, on numbers of every kind, is in test_mla_v_up_quant_gpu.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

from vllm_fusion_plugin.kernels import mla_v_up_quant as kernels
from vllm_fusion_plugin.ops.mla_v_up_quant import (
    mla_v_up_group_fp8_quant_reference,
    scale_padding,
)
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, GroupScales

from .cases import DTYPES, GROUP_SIZES, LAYOUTS, scales_name, short
from .checks import Guarded, assert_same_bytes, code_steps
from .conftest import INTERPRETED


@pytest.fixture(autouse=True)
def _bf16_dot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter keeps bf16 as its bits, which its dot would multiply as they are."""
    if INTERPRETED:
        import triton.language as tl
        import triton.runtime.interpreter as interpreter

        def numbers(t) -> np.ndarray:
            if t.dtype.scalar != tl.bfloat16:
                return t.data.astype(np.float32)
            return (t.data.astype(np.uint32) << 16).view(np.float32)

        def create_dot(builder, a, b, acc, input_precision, max_num_imprecise_acc):
            return interpreter.TensorHandle(np.matmul(numbers(a), numbers(b)) + acc.data, acc.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    yield


class Mode(NamedTuple):
    dtype: torch.dtype = torch.bfloat16
    group_size: int = 128
    scale_layout: str = "tma"
    use_ue8m0: bool = False
    quant_rounding: str = "custom_op"

    @property
    def scales(self) -> GroupScales:
        return GroupScales(self.group_size, self.scale_layout, self.use_ue8m0)

    def __str__(self) -> str:
        return f"{short(self.dtype)}-{scales_name(self)}" + "-reciprocal" * (self.quant_rounding == "reciprocal")


MODES = [Mode(*mode) for mode in itertools.product(DTYPES, GROUP_SIZES, LAYOUTS, (False, True))] + [
    Mode(dtype, quant_rounding="reciprocal") for dtype in DTYPES
]


# ---- inputs ----------------------------------------------------------------------------------------------------------


def exact_inputs(
    tokens: int, heads: int, depth: int, width: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """attn_out [M, N, L] and w_uv [N, L, V] whose products fp32 adds up without rounding, in whatever order.

    Integers up to 8 in size; each token of a head, and each column, has a power of two as a factor of its own, so that y is
    of many sizes and is rounded in each of them.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, device=device).float()

    x = integers(-8, 8, (tokens, heads, depth)) * torch.exp2(integers(-6, 0, (tokens, heads, 1)))
    w = integers(-8, 8, (heads, depth, width)) * torch.exp2(integers(-4, 2, (heads, 1, width)))
    return x.to(dtype), w.to(dtype)


def _strided(t: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> torch.Tensor:
    """t's numbers in storage of NaN, laid out so."""
    size = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
    storage = torch.full((size,), float("nan"), dtype=t.dtype, device=t.device)
    result = storage.as_strided(shape, stride, offset)
    return result[tuple(slice(n) for n in t.shape)].copy_(t)


def laid_out_attn(t: torch.Tensor, layout: str) -> torch.Tensor:
    m, n, d = t.shape
    return {
        "token-major": lambda: t,
        "head-major": lambda: _strided(t, (m, n, d), (d, m * d, 1)),
        "padded heads": lambda: _strided(t, (m, n + 2, d), ((n + 2) * d, d, 1)),
        "unaligned": lambda: _strided(t, (m, n, d), (n * d + 1, d, 1), 3),
        "every other number": lambda: _strided(t, (m, n, d), (2 * n * d, 2 * d, 2)),
    }[layout]()


def laid_out_weights(t: torch.Tensor, layout: str) -> torch.Tensor:
    """As vLLM lays them out: views of the heads' keys and values, dequantised to [N * (P + V), L] or to [L, N * (P + V)]."""
    n, d, v = t.shape
    both = 32 + v
    return {
        "contiguous": lambda: t,
        "output first": lambda: _strided(t, (n, d, v), (both * d, 1, d), 32 * d),
        "input first": lambda: _strided(t, (n, d, v), (both, n * both, 1), 32),
        "unaligned": lambda: _strided(t, (n, d, v), (d * v + 1, v, 1), 1),
        "every other number": lambda: _strided(t, (n, d, v), (2 * d * v, 2 * v, 2)),
    }[layout]()


ATTN_LAYOUTS = ("token-major", "head-major", "padded heads", "unaligned", "every other number")
WEIGHT_LAYOUTS = ("contiguous", "output first", "input first", "unaligned", "every other number")


# ---- what is expected ------------------------------------------------------------------------------------------------


def outputs(x: torch.Tensor, w: torch.Tensor, mode: Mode) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape[0], w.shape[0] * w.shape[2]
    return x.new_empty((rows, columns), dtype=FP8_DTYPE), mode.scales.empty(x, rows, columns)


def run(x: torch.Tensor, w: torch.Tensor, mode: Mode, tile: kernels.Tile | None) -> tuple[Guarded, Guarded]:
    likes = outputs(x, w, mode)
    codes, scales = map(Guarded, likes)
    arguments = (scale_padding(likes[1]), mode.group_size, mode.use_ue8m0, mode.quant_rounding)
    kernels.mla_v_up_group_fp8_quant(x, w, codes.tensor, scales.tensor, *arguments, tile=tile)
    codes.check()
    scales.check()
    return codes, scales


def check(x: torch.Tensor, w: torch.Tensor, mode: Mode, tile: kernels.Tile | None = None) -> None:
    codes, scales = run(x, w, mode, tile)
    expected_codes, expected_scales = outputs(x, w, mode)
    storage = torch.empty(0, device=x.device).set_(expected_scales.untyped_storage())
    mla_v_up_group_fp8_quant_reference(
        x, w, expected_codes, expected_scales, mode.group_size, mode.use_ue8m0, mode.quant_rounding
    )
    assert_same_bytes(codes.tensor, expected_codes, "codes")
    # Storage and not tensor: TMA-aligned scales have padding, which must be zero. The buffer was poisoned.
    assert_same_bytes(scales.storage().view(torch.float32), storage, "scales and padding")


# ---- kernel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_modes(mode: Mode, device: torch.device) -> None:
    """Every mode. 5 tokens: one short of TMA's alignment by 3; 3 heads: no power of two."""
    check(*exact_inputs(5, 3, 96, 128, mode.dtype, device, seed=1), mode)


@pytest.mark.parametrize("weights", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("attn", ATTN_LAYOUTS)
def test_layouts(attn: str, weights: str, device: torch.device) -> None:
    x, w = exact_inputs(5, 3, 64, 128, torch.bfloat16, device, seed=2)
    check(laid_out_attn(x, attn), laid_out_weights(w, weights), Mode())


@pytest.mark.parametrize("depth, width", [(16, 64), (48, 192), (80, 64), (128, 256), (512, 128)])
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 33])
def test_shapes(tokens: int, depth: int, width: int, device: torch.device) -> None:
    x, w = exact_inputs(tokens, 2, depth, width, torch.bfloat16, device, seed=tokens)
    check(x, w, Mode(group_size=64))
    if width % 128 == 0:
        check(x, w, Mode())


TILES = [
    kernels.Tile(tokens, columns, 32, 3, 4, swap=swap, tma=tma, persistent=persistent)
    for tokens, columns in ((16, 64), (64, 128))
    for swap, tma, persistent in itertools.product((False, True), repeat=3)
]


def name(tile: kernels.Tile) -> str:
    ways = [way for way in ("swap", "tma", "persistent") if getattr(tile, way)]
    return "-".join([f"{tile.tokens}x{tile.columns}", *ways])


@pytest.mark.parametrize("weights", ["output first", "input first"])
@pytest.mark.parametrize("tile", TILES, ids=name)
def test_tiles(tile: kernels.Tile, weights: str, device: torch.device) -> None:
    """Every way through the kernel, with more tiles than programs, the last of a head ragged or full."""
    for tokens in (tile.tokens + 3, 2 * tile.tokens):
        x, w = exact_inputs(tokens, 2, 64, 128, torch.float16, device, seed=tokens)
        check(x, laid_out_weights(w, weights), Mode(torch.float16, 64), tile)


def test_special_values(device: torch.device) -> None:
    """NaN, infinities and -0 in attention's output and in weights, and sums beyond fp16's range."""
    for dtype in DTYPES:
        x, w = exact_inputs(6, 2, 64, 128, dtype, device, seed=3)
        x[0, 0, 5], x[1, 1, 7], x[2, 0, 0] = float("nan"), float("inf"), -float("inf")
        w[1, 3, 9], w[1, 3, 70] = float("nan"), float("inf")
        x[3, 1], x[4, 0] = -0.0, 0.0
        x[5, 0] *= 2.0**12
        for group_size in GROUP_SIZES:
            check(x, w, Mode(dtype, group_size))
        assert bool((run(x, w, Mode(dtype), None)[1].tensor[3:5] > 0).all())  # the floor of all-zero groups


def test_rounded_before_it_is_quantised(device: torch.device) -> None:
    """The scale is that of y in attn_out's dtype: 257 becomes 256 in bf16."""
    x = torch.zeros(1, 1, 16, dtype=torch.bfloat16, device=device)
    w = torch.ones(1, 16, 128, dtype=torch.bfloat16, device=device)
    x[0, 0, 0], x[0, 0, 1] = 256.0, 1.0
    codes, scales = run(x, w, Mode(), None)
    assert scales.tensor.item() == torch.tensor(256.0).div(torch.tensor(448.0)).item()
    assert bool((codes.tensor.float() == 448.0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_sums_that_round(dtype: torch.dtype, device: torch.device) -> None:
    """Normally distributed numbers: sums are rounded, in another order than the reference's, and codes are at most one step
    off. Of 2^14 codes here, less than 1 in 200 is."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(16, 8, 512, generator=generator).to(device, dtype)
    w = (torch.randn(8, 512, 128, generator=generator) / 512**0.5).to(device, dtype)
    codes, scales = run(x, w, Mode(dtype), None)
    expected_codes, expected_scales = outputs(x, w, Mode(dtype))
    mla_v_up_group_fp8_quant_reference(x, w, expected_codes, expected_scales)
    steps = code_steps(codes.tensor, expected_codes)
    assert int(steps.max()) <= 1
    assert int(steps.count_nonzero()) <= steps.numel() // 200
    torch.testing.assert_close(scales.tensor, expected_scales, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the kernel would have been launched with."""
    options: dict[str, object] = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **more: options.update(more, grid=grid)

    monkeypatch.setattr(kernels, "_group_kernel", Kernel())
    return options


def test_stages_fit_the_device(
    launched: dict[str, object], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Fewer stages where a program has less shared memory."""
    x, w = exact_inputs(300, 2, 512, 128, torch.bfloat16, device, seed=5)
    codes, scales = outputs(x, w, Mode())
    for shared, tile, stages in (
        (232448, kernels.Tile(256, 128, 64, 4, 8, persistent=True), 4),
        (232448, kernels.Tile(128, 128, 64, 7, 8), 7),
        (232448, kernels.Tile(128, 128, 64, 7, 8, persistent=True), 6),
        (101376, kernels.Tile(128, 128, 64, 6, 8), 3),
        (101376, kernels.Tile(256, 128, 64, 4, 8), 2),
    ):
        monkeypatch.setattr(kernels, "_gpu", lambda _, shared=shared: kernels._Device(132, shared, True))
        kernels.mla_v_up_group_fp8_quant(x, w, codes, scales, scale_padding(scales), 128, False, "custom_op", tile=tile)
        assert launched["TILE"].stages == stages, (shared, tile)


@pytest.mark.parametrize("weights", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("attn", ATTN_LAYOUTS)
def test_vllms_layouts_go_the_fast_way(
    attn: str, weights: str, launched: dict[str, object], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Descriptors, and not for layouts that have none or on GPUs that do not gain by them."""
    x, w = exact_inputs(5, 3, 64, 128, torch.bfloat16, device, seed=5)
    codes, scales = outputs(x, w, Mode())
    x, w = laid_out_attn(x, attn), laid_out_weights(w, weights)
    for has_tma in (True, False):
        monkeypatch.setattr(kernels, "_gpu", lambda _, has_tma=has_tma: kernels._Device(132, 232448, has_tma))
        kernels.mla_v_up_group_fp8_quant(
            x,
            w,
            codes,
            scales,
            scale_padding(scales),
            128,
            False,
            "custom_op",
            kernels.Tile(16, 128, 64, 3, 4),
            pdl=True,
        )
        fit = weights in WEIGHT_LAYOUTS[:3]
        assert launched["TILE"].tma == (has_tma and fit and attn in ATTN_LAYOUTS[:3])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("heads", [1, 8, 16, 128])
def test_tile_choice(heads: int, group_size: int) -> None:
    """Whatever the shape: a tile holds whole groups, and a pipeline that a multiprocessor has room for."""
    for tokens, width in itertools.product((1, 7, 16, 17, 64, 100, 128, 129, 500, 512, 4096), (64, 128, 192, 512)):
        if width % group_size == 0:
            tile = kernels.group_tile(tokens, heads, width, group_size)
            assert width % tile.columns == 0
            assert tile.columns % group_size == 0
            assert 2 * tile.depth * (tile.tokens + tile.columns) * tile.stages <= 232448 - 1024
            assert tile.tokens < 2 * max(tokens, 16)
