# SPDX-License-Identifier: Apache-2.0
"""Modes, inputs and expectations of the tests of norms.

A sum of squares depends on the order of additions, which the kernel and torch need not share. Two ways around that:
`expected_norm` takes rsqrt(mean + epsilon) from the kernels' own functions, and `exact_input` has squares whose sum is exact
in any order, so that the op's own reference must be met.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_fusion_plugin.kernels import rms_norm_quant as kernels
from vllm_fusion_plugin.kernels import row_norm
from vllm_fusion_plugin.kernels.rounding import is_native
from vllm_fusion_plugin.kernels.row_order import Tile, folded, row_tile
from vllm_fusion_plugin.ops import quant
from vllm_fusion_plugin.ops.quant import GroupScales
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs, add_residual, scale_rows

from .cases import DTYPES, LAYOUTS, ROUNDINGS, random_input, scales_name, short
from .checks import Guarded, as_bits, assert_codes, assert_same_bytes, guarded_scales, one_nan

EPSILON = 1e-6


class Norm(NamedTuple):
    """What the ops have in common. weight: "same" as x's dtype, "other" of the 16-bit ones, "fp32", "gemma" or "none"."""

    dtype: torch.dtype = torch.bfloat16
    weight: str = "same"
    residual: bool = True
    norm_rounding: str = "native"
    quant_rounding: str = "custom_op"

    def __str__(self) -> str:
        added = "add-" if self.residual else ""
        return f"{added}{short(self.dtype)}-weight_{self.weight}-norm_{self.norm_rounding}-quant_{self.quant_rounding}"

    def inputs(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        epsilon: float = EPSILON,
        **more: object,
    ) -> NormInputs:
        return NormInputs(
            x, weight, epsilon, residual, gemma_weight=self.weight == "gemma", norm_rounding=self.norm_rounding, **more
        )

    @property
    def keep_norm(self) -> bool:
        return not is_native(self.quant_rounding)

    def make_weight(self, width: int, device: torch.device, seed: int = 0) -> torch.Tensor | None:
        if self.weight == "none":
            return None
        dtypes = {"fp32": torch.float32, "other": DTYPES[self.dtype == DTYPES[0]]}
        weight = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        return weight.to(device, dtypes.get(self.weight, self.dtype))


class Layout(NamedTuple):
    group_size: int = 128
    scale_layout: str = "row"
    use_ue8m0: bool = False

    @property
    def scales(self) -> GroupScales:
        return GroupScales(self.group_size, self.scale_layout, self.use_ue8m0)

    def __str__(self) -> str:
        return scales_name(self)


def norm_modes(quant_roundings: tuple[str, ...] = ROUNDINGS) -> list[Norm]:
    """All but custom_op with weights that vLLM's CUDA ops do not take."""
    modes = [
        *itertools.starmap(
            Norm,
            itertools.product(
                DTYPES, ("same", "other", "fp32", "gemma"), (False, True), ("native", "eager"), quant_roundings
            ),
        ),
        *itertools.starmap(Norm, itertools.product(DTYPES, ("same",), (False, True), ("custom_op",), quant_roundings)),
        *itertools.starmap(
            Norm, itertools.product(DTYPES, ("none",), (True,), ("native", "eager", "custom_op"), quant_roundings)
        ),
    ]
    # the other 16-bit dtype rounds on its own in eager only
    return [mode for mode in modes if mode.weight != "other" or mode.norm_rounding == "eager"]


def layouts() -> list[Layout]:
    switch = (False, True)
    return list(itertools.starmap(Layout, itertools.product((64, 128), LAYOUTS, switch)))


BF16 = Norm()
DEEPSEEK = Layout(128, "tma")
PACKED = [Layout(128, "packed", True)]
# All rows of a test at once, for what does not depend on tiles: the interpreter's cost is by program.
ONE_PROGRAM = Tile(32, 512, 1)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def inputs(
    rows: int, width: int, mode: Norm, device: torch.device, seed: int, kind: str = "normal"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x and the residual [rows, width]."""
    both = random_input(rows, width, mode.dtype, device, seed, kind)
    x, residual = both[:, :width].contiguous(), both[:, width:].contiguous()
    if kind == "special":
        # Every other row without NaN, infinities and numbers whose squares overflow, which make all of y NaN or 0.
        plain = torch.arange(rows, device=device)[:, None] % 2 == 0
        x, residual = (torch.where(plain & ~(t.abs() <= 1000.0), 0.5, t) for t in (x, residual))
    return x, residual if mode.residual else None


def exact_input(
    rows: int, width: int, mode: Norm, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x and the residual [rows, width] such that all partial sums of the squares of s are exact in fp32, where that of a
    row is under 2**24 units.

    Even rows: numbers of -1 to 1 in eighths, s up to 2, its square a multiple of 1/64. Odd rows, with a residual: some
    numbers near 1 that have more bits than x's dtype, so that rounding s shows, and zeros.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(top: int) -> torch.Tensor:
        return torch.randint(-top, top + 1, (rows, width), generator=generator).double()

    x, residual = integers(8) / 8, integers(8) / 8
    assert width * 256 <= 2**24
    if mode.residual:
        odd = torch.arange(rows) % 2 == 1
        ulp = torch.finfo(mode.dtype).eps
        # 2 * 18 bits after the point of 32 squares, or 2 * 11 of two
        count, unit = (32, ulp / 4) if mode.dtype == torch.bfloat16 else (2, ulp / 2)
        near_one = torch.where(torch.arange(width) < count, 1.0, 0.0).double()
        x[odd], residual[odd] = near_one, near_one * (integers(3) * unit)[odd]
    power = torch.exp2(torch.arange(rows) % 7 - 3)[:, None].double()
    x, residual = ((t * power).to(device, mode.dtype) for t in (x, residual))
    return x, residual if mode.residual else None


# ---- what is expected ------------------------------------------------------------------------------------------------


@triton.jit
def _inverse_rms_kernel(
    x_ptr, residual_ptr, residual_out_ptr, out_ptr, rows, x_stride, residual_stride, epsilon,
    NORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE.rows + tl.arange(0, TILE.rows)
    _, total = row_norm.load_rows(
        x_ptr, residual_ptr, residual_out_ptr, row, rows, x_stride, residual_stride, None, None, 0, 0, NORM, TILE
    )
    tl.store(out_ptr + row, row_norm.inverse_rms(total, epsilon, NORM.width, NORM.custom_op), mask=row < rows)


def inverse_rms(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    mode: Norm,
    epsilon: float = EPSILON,
    tile: Tile | None = None,
) -> torch.Tensor:
    """rsqrt(mean + epsilon) [rows, 1] with the kernels' bits."""
    rows, width = x.shape
    tile = tile or folded(row_tile(width, is_native(mode.quant_rounding)), rows, residual is not None)
    out = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        _inverse_rms_kernel[(triton.cdiv(rows, tile.rows),)](
            x,
            residual,
            torch.empty_like(x) if residual is not None else None,
            out,
            rows,
            x.stride(0),
            residual.stride(0) if residual is not None else 0,
            epsilon,
            NORM=row_norm.norm_constants(width, None, mode.norm_rounding, keep_fp32=False),
            TILE=tile.constants(),
            num_warps=tile.num_warps,
        )
    return out


def expected_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mode: Norm,
    epsilon: float = EPSILON,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What is quantised, and the outputs after codes and scales, with the kernels' rsqrt."""
    norm = mode.inputs(x, weight, residual, epsilon)
    s, residual_out = add_residual(norm)
    inverse = inverse_rms(x, residual, mode, epsilon, tile)
    y = scale_rows(norm, s, inverse)
    if mode.norm_rounding != "native" or not is_native(mode.quant_rounding):
        y = y.to(x.dtype)
    return y, [y] * mode.keep_norm + ([residual_out] if residual is not None else [])


def assert_norms_bytes(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """The same bytes; on a GPU last bits may be others, seldom. There the reference adds up a row's squares in a kernel of
    its own, in which the compiler joins other products and sums than in the norm's. Tests with `gpu` compare with vLLM."""
    actual, expected = one_nan(actual), one_nan(expected)
    if not actual.is_cuda:
        assert_same_bytes(actual, expected, what)
        return
    steps = (as_bits(actual).long() - as_bits(expected).long()).abs()
    assert int((steps > (2 if actual.dtype == torch.float32 else 1)).sum()) == 0, what
    assert int(steps.count_nonzero()) <= max(2, steps.numel() // 1000), what


def assert_norms_codes(actual: torch.Tensor, expected: torch.Tensor, quant_rounding: str) -> None:
    """Likewise: a code is a step away where a last bit is, next to a tie."""
    assert_codes(actual, expected, "native" if actual.is_cuda else quant_rounding)


def assert_extras(actual: list[Guarded], expected: list[torch.Tensor]) -> None:
    for out, want in zip(actual, expected, strict=True):
        out.check()
        assert_norms_bytes(out.tensor, want, "normed or residual_out")


def guarded_extras(x: torch.Tensor, residual: torch.Tensor | None, mode: Norm) -> list[Guarded]:
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [Guarded(like) for wanted in (mode.keep_norm, residual is not None) if wanted]


def extra_arguments(extras: list[Guarded], residual: torch.Tensor | None, mode: Norm) -> list[torch.Tensor | None]:
    left = [extra.tensor for extra in extras]
    return [left.pop(0) if wanted else None for wanted in (mode.keep_norm, residual is not None)]


def run_group(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mode: Norm,
    layout: Layout,
    tile: Tile | None = None,
    epsilon: float = EPSILON,
) -> tuple[Guarded, Guarded, list[Guarded]]:
    rows, width = x.shape
    codes = Guarded(x.new_empty((rows, width), dtype=quant.FP8_DTYPE))
    scales = guarded_scales(x, layout.scales, width)
    extras = guarded_extras(x, residual, mode)
    kernels.rms_norm_group_fp8_quant(
        mode.inputs(x, weight, residual, epsilon), codes.tensor, scales.tensor, *extra_arguments(extras, residual, mode),
        layout.group_size, layout.use_ue8m0, mode.quant_rounding, tile=tile,
    )  # fmt: skip
    codes.check()
    scales.check()
    return codes, scales, extras


def check_group(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mode: Norm,
    layout: Layout = DEEPSEEK,
    tile: Tile | None = None,
    epsilon: float = EPSILON,
) -> None:
    codes, scales, extras = run_group(x, residual, weight, mode, layout, tile, epsilon)
    y, expected_extras = expected_norm(x, residual, weight, mode, epsilon, tile)
    expected_codes, expected_scales = quant.group_fp8_quant_reference(y, layout.scales, mode.quant_rounding)
    assert_extras(extras, expected_extras)
    assert scales.tensor.stride() == expected_scales.stride()
    assert_norms_codes(codes.tensor, expected_codes, mode.quant_rounding)
    # storage and not tensor: TMA-aligned scales have padding, which must be zero; the buffer was poisoned
    storage = torch.empty(0, device=x.device).set_(expected_scales.untyped_storage())
    assert_norms_bytes(scales.storage().view(torch.float32), storage, "scales and padding")


def check_token(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mode: Norm,
    scale_ub: torch.Tensor | None = None,
    tile: Tile | None = None,
    epsilon: float = EPSILON,
) -> None:
    rows, width = x.shape
    native = mode.quant_rounding == "native"
    add = residual is not None
    given, tile = tile, tile or folded(row_tile(width, native, native and add), rows, add, most=2)
    codes = Guarded(x.new_empty(x.shape, dtype=quant.FP8_DTYPE))
    scales = Guarded(x.new_empty((rows, 1), dtype=torch.float32))
    extras = guarded_extras(x, residual, mode)
    kernels.rms_norm_token_fp8_quant(
        mode.inputs(x, weight, residual, epsilon), scale_ub, codes.tensor, scales.tensor,
        *extra_arguments(extras, residual, mode), mode.quant_rounding, tile=given,
    )  # fmt: skip
    codes.check()
    scales.check()
    y, expected_extras = expected_norm(x, residual, weight, mode, epsilon, tile)
    expected_codes, expected_scales = quant.token_fp8_quant_reference(y, scale_ub, mode.quant_rounding)
    assert_extras(extras, expected_extras)
    assert_norms_codes(codes.tensor, expected_codes, mode.quant_rounding)
    assert_norms_bytes(scales.tensor, expected_scales, "scales")


def check_static(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mode: Norm,
    scale: torch.Tensor,
    tile: Tile | None = None,
) -> None:
    codes = Guarded(x.new_empty(x.shape, dtype=quant.FP8_DTYPE))
    extras = guarded_extras(x, residual, mode)
    kernels.rms_norm_static_fp8_quant(
        mode.inputs(x, weight, residual), scale, codes.tensor, *extra_arguments(extras, residual, mode),
        mode.quant_rounding, tile=tile,
    )  # fmt: skip
    codes.check()
    y, expected_extras = expected_norm(x, residual, weight, mode, tile=tile)
    assert_extras(extras, expected_extras)
    expected_codes = quant.static_fp8_quant_reference(y, scale, mode.quant_rounding)
    assert_norms_codes(codes.tensor, expected_codes, mode.quant_rounding)


def zeros(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)
