# SPDX-License-Identifier: Apache-2.0
"""RMSNorm + FP8 kernels against their pure-torch references, byte for byte; here on a GPU, or in Triton's interpreter.

A sum of squares depends on the order of additions, which the kernel and torch need not share. Two ways around that:
`expected_norm` takes rsqrt(mean + epsilon) from the kernel's own function, and `exact_input` has squares whose sum is exact
in any order, so that the op's own reference must be met. vLLM's own ops are in test_rms_norm_quant_gpu.py.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from vllm_fusion_plugin.kernels import rms_norm_quant as kernels
from vllm_fusion_plugin.kernels.forms import is_native
from vllm_fusion_plugin.ops import quant
from vllm_fusion_plugin.ops.rms_norm_quant import (
    MAX_WIDTH,
    add_residual,
    rms_norm_group_fp8_quant,
    rms_norm_group_fp8_quant_reference,
    rms_norm_reference,
    rms_norm_static_fp8_quant,
    rms_norm_static_fp8_quant_reference,
    rms_norm_token_fp8_quant,
    rms_norm_token_fp8_quant_reference,
    scale_rows,
)

from .cases import (
    DTYPES,
    EPS,
    FORMS,
    GROUP_FORMS,
    all_values,
    random_input,
    scales_name,
    short,
    special_values,
    strided,
)
from .checks import Guarded, as_bits, assert_codes, assert_same_bytes, assert_same_outputs, check_deterministic, one_nan

EPSILON = 1e-6
OPS = torch.ops.vllm_fusion_plugin


class Norm(NamedTuple):
    """What the ops have in common. weight: "same" as x's dtype, "other" of the 16-bit ones, "fp32", "gemma" or "none"."""

    dtype: torch.dtype = torch.bfloat16
    weight: str = "same"
    residual: bool = True
    norm_form: str = "native"
    quant_form: str = "custom_op"

    def __str__(self) -> str:
        added = "add-" if self.residual else ""
        return f"{added}{short(self.dtype)}-weight_{self.weight}-norm_{self.norm_form}-quant_{self.quant_form}"

    def forms(self) -> dict[str, object]:
        return {"gemma_weight": self.weight == "gemma", "norm_form": self.norm_form, "quant_form": self.quant_form}

    @property
    def keep_norm(self) -> bool:
        return not is_native(self.quant_form)

    def make_weight(self, width: int, device: torch.device, seed: int = 0) -> torch.Tensor | None:
        if self.weight == "none":
            return None
        dtypes = {"fp32": torch.float32, "other": DTYPES[self.dtype == DTYPES[0]]}
        weight = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        return weight.to(device, dtypes.get(self.weight, self.dtype))


class Layout(NamedTuple):
    group_size: int = 128
    column_major_scales: bool = False
    tma_aligned_scales: bool = False
    use_ue8m0: bool = False

    def __str__(self) -> str:
        return scales_name(self)


def norm_modes(quant_forms: tuple[str, ...] = FORMS) -> list[Norm]:
    """All but custom_op with weights that vLLM's CUDA ops do not take."""
    modes = [
        *itertools.starmap(
            Norm,
            itertools.product(
                DTYPES, ("same", "other", "fp32", "gemma"), (False, True), ("native", "eager"), quant_forms
            ),
        ),
        *itertools.starmap(Norm, itertools.product(DTYPES, ("same",), (False, True), ("custom_op",), quant_forms)),
        *itertools.starmap(
            Norm, itertools.product(DTYPES, ("none",), (True,), ("native", "eager", "custom_op"), quant_forms)
        ),
    ]
    # the other 16-bit dtype rounds on its own in eager only
    return [mode for mode in modes if mode.weight != "other" or mode.norm_form == "eager"]


def layouts() -> list[Layout]:
    switch = (False, True)
    every = itertools.starmap(Layout, itertools.product((64, 128), switch, switch, switch))
    return [layout for layout in every if layout.column_major_scales or not layout.tma_aligned_scales]


BF16 = Norm()
DEEPSEEK = Layout(128, True, True)
# All rows of a test at once, for what does not depend on tiles: the interpreter's cost is by program.
ONE_PROGRAM = kernels.Tile(32, 512, 1)


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
        # 2 * 18 bits behind the point of 32 squares, or 2 * 11 of two
        count, unit = (32, ulp / 4) if mode.dtype == torch.bfloat16 else (2, ulp / 2)
        near_one = torch.where(torch.arange(width) < count, 1.0, 0.0).double()
        x[odd], residual[odd] = near_one, near_one * (integers(3) * unit)[odd]
    power = torch.exp2(torch.arange(rows) % 7 - 3)[:, None].double()
    x, residual = ((t * power).to(device, mode.dtype) for t in (x, residual))
    return x, residual if mode.residual else None


# ---- what is expected ------------------------------------------------------------------------------------------------


@triton.jit
def _inverse_rms_kernel(
    x_ptr,
    residual_ptr,
    residual_out_ptr,
    out_ptr,
    rows,
    x_stride,
    residual_stride,
    epsilon,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CUSTOM_OP: tl.constexpr,
    SUM_WARPS: tl.constexpr,
    FOLD: tl.constexpr,
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    _, total = kernels.load_rows(
        x_ptr,
        residual_ptr,
        residual_out_ptr,
        row,
        rows,
        x_stride,
        residual_stride,
        WIDTH,
        CHUNK,
        CUSTOM_OP,
        SUM_WARPS,
        FOLD,
    )
    tl.store(out_ptr + row, kernels.inverse_rms(total, epsilon, WIDTH, CUSTOM_OP), mask=row < rows)


def inverse_rms(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    mode: Norm,
    epsilon: float = EPSILON,
    tile: kernels.Tile | None = None,
) -> torch.Tensor:
    """rsqrt(mean + epsilon) [rows, 1] with the kernels' bits."""
    rows, width = x.shape
    tile = tile or kernels.folded(kernels.row_tile(width, is_native(mode.quant_form)), rows, residual is not None)
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
            WIDTH=width,
            TILE_ROWS=tile.rows,
            CHUNK=tile.chunk,
            SUM_WARPS=tile.sum_warps,
            FOLD=max(1, tile.sum_warps // tile.num_warps),
            CUSTOM_OP=mode.norm_form == "custom_op",
            num_warps=tile.num_warps,
        )
    return out


def expected_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mode: Norm,
    epsilon: float = EPSILON,
    tile: kernels.Tile | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What is quantised, and the outputs behind codes and scales, with the kernels' rsqrt."""
    s, residual_out = add_residual(x, residual, mode.norm_form)
    inverse = inverse_rms(x, residual, mode, epsilon, tile)
    y = scale_rows(s, inverse, weight, mode.weight == "gemma", mode.norm_form)
    if mode.norm_form != "native" or not is_native(mode.quant_form):
        y = y.to(x.dtype)
    return y, [y] * mode.keep_norm + ([residual_out] if residual is not None else [])


def assert_extras(actual: list[Guarded], expected: list[torch.Tensor]) -> None:
    for out, want in zip(actual, expected, strict=True):
        out.check()
        assert_same_bytes(one_nan(out.tensor), one_nan(want), "normed or residual_out")


def guarded_extras(x: torch.Tensor, residual: torch.Tensor | None, mode: Norm) -> list[Guarded]:
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [Guarded(like) for wanted in (mode.keep_norm, residual is not None) if wanted]


def extra_arguments(extras: list[Guarded], residual: torch.Tensor | None, mode: Norm) -> dict[str, torch.Tensor]:
    names = ["normed"] * mode.keep_norm + ["residual_out"] * (residual is not None)
    return {name: extra.tensor for name, extra in zip(names, extras, strict=True)}


def run_group(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mode: Norm,
    layout: Layout,
    tile: kernels.Tile | None = None,
    epsilon: float = EPSILON,
) -> tuple[Guarded, Guarded, list[Guarded]]:
    rows, width = x.shape
    codes = Guarded(x.new_empty((rows, width), dtype=quant.FP8_DTYPE))
    scales = Guarded(quant.empty_group_scales(x, rows, width // layout.group_size, *layout[1:3]))
    extras = guarded_extras(x, residual, mode)
    kernels.rms_norm_group_fp8_quant(
        x, weight, residual, codes.tensor, scales.tensor, epsilon, group_size=layout.group_size,
        use_ue8m0=layout.use_ue8m0, eps=EPS, tile=tile, **mode.forms(), **extra_arguments(extras, residual, mode),
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
    tile: kernels.Tile | None = None,
    epsilon: float = EPSILON,
) -> None:
    codes, scales, extras = run_group(x, residual, weight, mode, layout, tile, epsilon)
    y, expected_extras = expected_norm(x, residual, weight, mode, epsilon, tile)
    expected_codes, expected_scales = quant.group_fp8_quant_reference(y, *layout, EPS, mode.quant_form)
    assert_extras(extras, expected_extras)
    assert scales.tensor.stride() == expected_scales.stride()
    assert_codes(codes.tensor, expected_codes, mode.quant_form)
    # storage and not tensor: TMA-aligned scales have padding, which must be zero; the buffer was poisoned
    storage = torch.empty(0, device=x.device).set_(expected_scales.untyped_storage())
    assert_same_bytes(one_nan(scales.storage().view(torch.float32)), one_nan(storage), "scales and padding")


def check_token(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mode: Norm,
    scale_ub: torch.Tensor | None = None,
    tile: kernels.Tile | None = None,
    epsilon: float = EPSILON,
) -> None:
    rows, width = x.shape
    native = mode.quant_form == "native"
    add = residual is not None
    given, tile = tile, tile or kernels.folded(kernels.row_tile(width, native, native and add), rows, add, most=2)
    codes = Guarded(x.new_empty(x.shape, dtype=quant.FP8_DTYPE))
    scales = Guarded(x.new_empty((rows, 1), dtype=torch.float32))
    extras = guarded_extras(x, residual, mode)
    kernels.rms_norm_token_fp8_quant(
        x, weight, residual, scale_ub, codes.tensor, scales.tensor, epsilon, tile=given, **mode.forms(),
        **extra_arguments(extras, residual, mode),
    )  # fmt: skip
    codes.check()
    scales.check()
    y, expected_extras = expected_norm(x, residual, weight, mode, epsilon, tile)
    expected_codes, expected_scales = quant.token_fp8_quant_reference(y, scale_ub, mode.quant_form)
    assert_extras(extras, expected_extras)
    assert_codes(codes.tensor, expected_codes, mode.quant_form)
    assert_same_bytes(one_nan(scales.tensor), one_nan(expected_scales), "scales")


def check_static(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    mode: Norm,
    scale: torch.Tensor,
    tile: kernels.Tile | None = None,
) -> None:
    codes = Guarded(x.new_empty(x.shape, dtype=quant.FP8_DTYPE))
    extras = guarded_extras(x, residual, mode)
    kernels.rms_norm_static_fp8_quant(
        x, weight, residual, scale, codes.tensor, EPSILON, tile=tile, **mode.forms(),
        **extra_arguments(extras, residual, mode),
    )  # fmt: skip
    codes.check()
    y, expected_extras = expected_norm(x, residual, weight, mode, tile=tile)
    assert_extras(extras, expected_extras)
    assert_codes(codes.tensor, quant.static_fp8_quant_reference(y, scale, mode.quant_form), mode.quant_form)


# ---- the norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", norm_modes(), ids=str)
def test_norm_modes(mode: Norm, device: torch.device) -> None:
    """Every mode. 5 rows: one short of TMA's alignment by 3; 3 groups: no power of two."""
    x, residual = inputs(5, 384, mode, device, seed=1, kind="special")
    check_group(x, residual, mode.make_weight(384, device), mode, tile=ONE_PROGRAM)


@pytest.mark.parametrize("mode", norm_modes(quant_forms=("custom_op",)), ids=str)
def test_norm_is_its_reference(mode: Norm, device: torch.device) -> None:
    """normed and residual_out, the reference's own mean and rsqrt included.

    The width is a power of two, because the kernel's division by one is exact on a GPU too (see `inverse_rms`).
    """
    x, residual = exact_input(6, 512, mode, device, seed=2)
    weight = mode.make_weight(512, device)
    _, _, extras = run_group(x, residual, weight, mode, DEEPSEEK, ONE_PROGRAM)
    normed, residual_out = rms_norm_reference(
        x, weight, EPSILON, residual, mode.weight == "gemma", norm_form=mode.norm_form
    )
    assert_extras(extras, [normed, residual_out] if mode.residual else [normed])


def test_forms_differ(device: torch.device) -> None:
    """The inputs above tell the forms apart, or the tests above would show nothing."""
    x, residual = exact_input(6, 256, BF16, device, seed=2)
    weight = BF16.make_weight(256, device)
    normed = {
        form: rms_norm_reference(x, weight, EPSILON, residual, norm_form=form)[0]
        for form in ("native", "eager", "custom_op")
    }
    for one, other in itertools.combinations(normed.values(), 2):
        assert not torch.equal(as_bits(one), as_bits(other))


@pytest.mark.parametrize("quant_form", FORMS)
@pytest.mark.parametrize("norm_form", ["native", "custom_op"])
def test_inverse_rms(norm_form: str, quant_form: str, device: torch.device) -> None:
    """Within 4 ulp of the truth: a bound that a missing column, or one counted twice, exceeds by far."""
    mode = BF16._replace(norm_form=norm_form, quant_form=quant_form)
    for width in (64, 200, 2048, 6272):  # of 2048 columns at a time, the last is 3 whole chunks and a part
        x, residual = inputs(3, width, mode, device, seed=3)
        s, _ = add_residual(x, residual, norm_form)
        truth = (s.double().square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()
        torch.testing.assert_close(inverse_rms(x, residual, mode).double(), truth, rtol=4 * 2**-24, atol=0)


@pytest.mark.parametrize("norm_form", ["native", "custom_op"])
def test_inverse_rms_of_exact_sums(norm_form: str, device: torch.device) -> None:
    mode = BF16._replace(norm_form=norm_form)
    x, residual = exact_input(6, 512, mode, device, seed=4)
    mean = add_residual(x, residual, norm_form)[0].square().sum(dim=1, keepdim=True) / 512
    assert_same_bytes(inverse_rms(x, residual, mode), torch.rsqrt(mean + EPSILON), "rsqrt(mean + epsilon)")


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.5])
def test_epsilon(epsilon: float, device: torch.device) -> None:
    """Rows of zeros, where epsilon is all there is: 0 * rsqrt(epsilon), and NaN for 0."""
    x, residual = exact_input(4, 256, BF16, device, seed=4)
    x[:2], residual[:2] = 0.0, 0.0
    weight = BF16.make_weight(256, device)
    check_group(x, residual, weight, BF16, epsilon=epsilon)
    codes, _, (normed, _) = run_group(x, residual, weight, BF16, DEEPSEEK, epsilon=epsilon)
    assert bool(normed.tensor[:2].isnan().all()) == (epsilon == 0.0)
    assert bool((as_bits(codes.tensor[:2]) & 0x7F == 0).all()) == (epsilon != 0.0)


# ---- quantisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_form", GROUP_FORMS)
@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_group_layouts(layout: Layout, quant_form: str, device: torch.device) -> None:
    mode = BF16._replace(quant_form=quant_form)
    x, residual = inputs(5, 3 * layout.group_size, mode, device, seed=5, kind="special")
    check_group(x, residual, mode.make_weight(x.shape[1], device), mode, layout)


# 64 to 1024: a warp a row; to 2048: one block; beyond: chunks of 2048 with a native quantiser, all at once without
@pytest.mark.parametrize("quant_form", FORMS)
@pytest.mark.parametrize("width", [64, 128, 1088, 2112, 6272])
def test_group_shapes(width: int, quant_form: str, device: torch.device) -> None:
    mode = BF16._replace(quant_form=quant_form)
    for rows in (0, 1, 3):
        x, residual = inputs(rows, width, mode, device, seed=rows)
        check_group(x, residual, mode.make_weight(width, device), mode, DEEPSEEK._replace(group_size=64))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_strided_rows(dtype: torch.dtype, device: torch.device) -> None:
    mode = Norm(dtype)
    weight, scale = mode.make_weight(384, device), torch.tensor([0.05], device=device)
    x, residual = inputs(5, 384, mode, device, seed=6)
    for pair in ((strided(x), residual), (x, strided(residual))):
        check_group(*pair, weight, mode, tile=ONE_PROGRAM)
        check_token(*pair, weight, mode, tile=ONE_PROGRAM)
        check_static(*pair, weight, mode, scale, ONE_PROGRAM)


@pytest.mark.parametrize("quant_form", FORMS)
@pytest.mark.parametrize(
    ("tile", "width"),
    [((2, 128, 1), 640), ((4, 512, 2), 640), ((8, 1024, 16), 640), ((1, 2048, 4, 8), 1536), ((2, 4096, 4, 16), 2560)],
    ids=str,
)
def test_tiles(tile: tuple, width: int, quant_form: str, device: torch.device) -> None:
    """Rows that tiles do not fill, chunks that a row does not; with sums that are exact in any order."""
    tile, mode = kernels.Tile(*tile), BF16._replace(quant_form=quant_form)
    x, residual = exact_input(3, width, mode, device, seed=7)
    weight = mode.make_weight(width, device)
    check_group(x, residual, weight, mode, DEEPSEEK, tile)
    check_token(x, residual, weight, mode, None, tile)
    check_static(x, residual, weight, mode, torch.tensor([0.05], device=device), tile)


@pytest.mark.parametrize("width", [384, 2048, 2560])
def test_row_alone_has_its_bytes_of_the_batch(width: int, device: torch.device) -> None:
    x, residual = inputs(5, width, BF16, device, seed=8)
    weight = BF16.make_weight(width, device)
    batch = rms_norm_group_fp8_quant_with_kernel(x, residual, weight)
    for row in range(5):
        alone = rms_norm_group_fp8_quant_with_kernel(x[row : row + 1], residual[row : row + 1], weight)
        for one, many in zip(alone, batch, strict=True):
            assert_same_bytes(one, many[row : row + 1], f"row {row}")


def rms_norm_group_fp8_quant_with_kernel(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None
) -> list[torch.Tensor]:
    codes, scales, extras = run_group(x, residual, weight, BF16, Layout())
    return [codes.tensor, scales.tensor, *(extra.tensor for extra in extras)]


TOKEN_MODES = [Norm(*mode) for mode in itertools.product(DTYPES, ("same",), (True,), ("native", "custom_op"), FORMS)]


@pytest.mark.parametrize("bounded", [False, True], ids=["", "scale_ub"])
@pytest.mark.parametrize("mode", TOKEN_MODES, ids=str)
def test_token_modes(mode: Norm, bounded: bool, device: torch.device) -> None:
    weight = mode.make_weight(200, device)
    for kind, bound in (("special", 1.5), ("normal", 0.7), ("normal", 1e-9)):
        x, residual = inputs(6, 200, mode, device, seed=9, kind=kind)
        scale_ub = torch.tensor([bound], device=device) if bounded else None
        check_token(x, residual, weight, mode, scale_ub, ONE_PROGRAM)


@pytest.mark.parametrize("quant_form", FORMS)
@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_token_odd_bounds(bound: float, quant_form: str, device: torch.device) -> None:
    mode = BF16._replace(quant_form=quant_form)
    x, residual = inputs(6, 200, mode, device, seed=10, kind="special")
    # y / scale overflows, and its sign must outlive that
    weight = torch.full((200,), 2.0**120, dtype=torch.bfloat16, device=device)
    check_token(x, residual, weight, mode, torch.tensor(bound, device=device), ONE_PROGRAM)


@pytest.mark.parametrize("quant_form", FORMS)
@pytest.mark.parametrize("width", [1, 7, 96, 1100, 2500])
def test_token_and_static_shapes(width: int, quant_form: str, device: torch.device) -> None:
    mode = BF16._replace(quant_form=quant_form)
    scale = torch.tensor(0.05, device=device)
    for rows in (0, 1, 3):
        x, residual = inputs(rows, width, mode, device, seed=rows)
        weight = mode.make_weight(width, device)
        check_token(x, residual, weight, mode)
        check_static(x, residual, weight, mode, scale)


@pytest.mark.parametrize("scale", [1.0, 3e-5, 700.0])
@pytest.mark.parametrize("mode", TOKEN_MODES, ids=str)
def test_static_modes(mode: Norm, scale: float, device: torch.device) -> None:
    x, residual = inputs(6, 200, mode, device, seed=11, kind="special")
    check_static(x, residual, mode.make_weight(200, device), mode, torch.tensor([scale], device=device), ONE_PROGRAM)


@pytest.mark.parametrize("quant_form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_all_bit_patterns(dtype: torch.dtype, quant_form: str, device: torch.device) -> None:
    """Every number as y: s = 1 and epsilon = 0 leave the weight. In the order of the bit patterns, and shuffled."""
    mode = Norm(dtype, "same", False, "native", quant_form)
    values = all_values(dtype, device)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(12)).to(device)
    x = torch.ones(1, 8192, dtype=dtype, device=device)
    for weight in torch.cat([values, values[order]]).view(-1, 8192):
        check_group(x, None, weight, mode, epsilon=0.0)
        check_token(x, None, weight, mode, epsilon=0.0)
        y, _ = expected_norm(x, None, weight, mode, epsilon=0.0)
        assert_same_bytes(one_nan(y.to(dtype)), one_nan(weight[None]), "y")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_one_special_value_a_row(dtype: torch.dtype, device: torch.device) -> None:
    """What NaN, an infinity or an overflowing square does to its row, and only to its row."""
    values = special_values(dtype).to(device)
    for mode in (Norm(dtype), Norm(dtype, quant_form="native"), Norm(dtype, norm_form="custom_op")):
        x, residual = exact_input(len(values) + 1, 256, mode, device, seed=13)
        x[:-1, 17] = values
        weight = mode.make_weight(256, device)
        check_group(x, residual, weight, mode, tile=ONE_PROGRAM)
        check_token(x, residual, weight, mode, tile=ONE_PROGRAM)
        all_rows = run_group(x, residual, weight, mode, Layout(), ONE_PROGRAM)[0].tensor
        alone = run_group(x[-1:], residual[-1:], weight, mode, Layout(), ONE_PROGRAM)[0].tensor
        assert_same_bytes(all_rows[-1:], alone, "an ordinary row")


# ---- the ops themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual_given", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("keep_norm", [False, True], ids=["", "keep_norm"])
def test_outputs(keep_norm: bool, residual_given: bool, device: torch.device) -> None:
    """Which outputs there are, in which order, and that they are the kernel's."""
    x, residual = exact_input(5, 256, BF16, device, seed=14)
    residual = residual if residual_given else None
    weight, scale = BF16.make_weight(256, device), torch.tensor([0.03], device=device)
    normed, residual_out = rms_norm_reference(x, weight, EPSILON, residual)
    extras = [normed] * keep_norm + [residual_out] * residual_given
    options = {"residual": residual, "keep_norm": keep_norm}
    group = rms_norm_group_fp8_quant(x, weight, column_major_scales=True, tma_aligned_scales=True, **options)
    token = rms_norm_token_fp8_quant(x, weight, **options)
    static = rms_norm_static_fp8_quant(x, weight, scale, **options)
    assert group[1].stride() == (1, 8)
    for actual, expected in (
        (group, [*quant.group_fp8_quant_reference(normed, 128, True, True, False, EPS, "custom_op"), *extras]),
        (token, [*quant.token_fp8_quant_reference(normed, None, "custom_op"), *extras]),
        (static, [quant.static_fp8_quant_reference(normed, scale, "custom_op"), *extras]),
    ):
        assert len(actual) == len(expected)
        assert_same_outputs(actual, expected)


GROUP_ARGUMENTS = [
    (EPSILON, True, False, True, 128, False, False, False, EPS, "native", "custom_op"),
    (EPSILON, False, True, False, 64, True, True, True, EPS, "eager", "native"),
]


@pytest.mark.parametrize("arguments", GROUP_ARGUMENTS, ids=["residual", "gemma-tma-ue8m0-native"])
def test_group_opcheck(arguments: tuple, device: torch.device) -> None:
    x, residual = inputs(5, 256, BF16, device, seed=15)
    epsilon, residual_given, *rest = arguments
    weight = BF16.make_weight(256, device)
    residual = residual if residual_given else None
    torch.library.opcheck(OPS.rms_norm_group_fp8_quant.default, (x, weight, epsilon, residual, *rest))


def test_token_and_static_opcheck(device: torch.device) -> None:
    x, residual = inputs(5, 200, BF16, device, seed=16)
    bound = torch.tensor([0.5], device=device)
    for scale_ub in (None, bound):
        arguments = (x, None, EPSILON, residual, False, True, scale_ub, "native", "custom_op")
        torch.library.opcheck(OPS.rms_norm_token_fp8_quant.default, arguments)
    arguments = (x, None, EPSILON, None, False, False, bound, "custom_op", "native")
    torch.library.opcheck(OPS.rms_norm_static_fp8_quant.default, arguments)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_ops_with_dynamic_tokens(device: torch.device) -> None:
    weight, scale = BF16.make_weight(256, device), torch.tensor([0.03], device=device)
    group_arguments = (False, True, 128, True, True, False, EPS, "native", "custom_op")

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x: torch.Tensor, residual: torch.Tensor):
        return (
            *OPS.rms_norm_group_fp8_quant(x, weight, EPSILON, residual, *group_arguments),
            *OPS.rms_norm_token_fp8_quant(x, weight, EPSILON, None, False, False, None, "native", "custom_op"),
            *OPS.rms_norm_static_fp8_quant(x, weight, EPSILON, residual, False, False, scale, "native", "custom_op"),
        )

    for rows in (5, 2, 33):
        x, residual = inputs(rows, 256, BF16, device, seed=rows)
        expected = [
            *rms_norm_group_fp8_quant(
                x, weight, residual=residual, keep_norm=True, column_major_scales=True, tma_aligned_scales=True
            ),
            *rms_norm_token_fp8_quant(x, weight),
            *rms_norm_static_fp8_quant(x, weight, scale, residual=residual),
        ]
        assert_same_outputs(compiled(x, residual), expected)


def test_ops_are_deterministic_and_leave_their_input(device: torch.device) -> None:
    x, residual = inputs(5, 384, BF16, device, seed=17, kind="special")
    weight = BF16.make_weight(384, device)
    check_deterministic(lambda x, r, w: rms_norm_group_fp8_quant(x, w, residual=r), x, residual, weight)


# ---- what is refused -------------------------------------------------------------------------------------------------

GROUP_CALLS = (rms_norm_group_fp8_quant, rms_norm_group_fp8_quant_reference)
TOKEN_CALLS = (rms_norm_token_fp8_quant, rms_norm_token_fp8_quant_reference)


def zeros(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


BAD_X = {
    "fp32": (lambda x: x.float(), r"x has dtype torch\.float32; allowed: torch\.bfloat16, torch\.float16"),
    "1-D": (lambda x: x[0], r"x has 1 dimensions, shape \(256,\); allowed: 2"),
    "3-D": (lambda x: x[None], r"x has 3 dimensions, shape \(1, 2, 256\); allowed: 2"),
    "no width": (lambda x: x[:, :0], rf"x has 0 columns; allowed: 1 to {MAX_WIDTH}"),
    "wide": (lambda x: x.new_zeros(1, MAX_WIDTH + 128), rf"x has {MAX_WIDTH + 128} columns; allowed: 1 to {MAX_WIDTH}"),
    "strided columns": (lambda x: x[:, ::2], r"x has stride 2 along its columns; allowed: 1"),
}


@pytest.mark.parametrize("bad", BAD_X)
def test_bad_x_is_refused(bad: str, device: torch.device) -> None:
    make, message = BAD_X[bad]
    x, scale = make(zeros(device, 2, 256)), torch.ones(1, device=device)
    for call in (*GROUP_CALLS, *TOKEN_CALLS):
        with pytest.raises(ValueError, match=message):
            call(x, None)
    with pytest.raises(ValueError, match=message):
        rms_norm_static_fp8_quant(x, None, scale)
    with pytest.raises(ValueError, match=message):
        rms_norm_static_fp8_quant_reference(x, None, EPSILON, None, False, False, scale)


BAD_ARGUMENTS = {
    "weight fp64": (
        {"weight": (256,), "dtype": torch.float64},
        r"weight has dtype torch\.float64; allowed: torch\.bfl",
    ),
    "weight long": ({"weight": (257,)}, r"weight has shape \(257,\); allowed: \(256,\)"),
    "weight 2-D": ({"weight": (1, 256)}, r"weight has shape \(1, 256\); allowed: \(256,\)"),
    "weight, custom_op": (
        {"weight": (256,), "dtype": torch.float32, "norm_form": "custom_op"},
        r"weight has dtype torch\.float32; allowed with norm_form='custom_op': the input's, torch\.bfloat16",
    ),
    "gemma without": ({"gemma_weight": True}, r"gemma_weight=True needs a weight"),
    "gemma, custom_op": (
        {"weight": (256,), "gemma_weight": True, "norm_form": "custom_op"},
        r"gemma_weight=True with norm_form='custom_op'.*allowed: native, eager",
    ),
    "keep_norm, native": (
        {"keep_norm": True, "quant_form": "native"},
        r"keep_norm=True with quant_form='native'.*allowed: custom_op",
    ),
    "residual fp16": (
        {"residual": (2, 256), "dtype": torch.float16},
        r"residual has dtype torch\.float16; allowed: x's",
    ),
    "residual rows": ({"residual": (3, 256)}, r"residual has shape \(3, 256\); allowed: x's shape, \(2, 256\)"),
    "norm_form": ({"norm_form": "exact"}, r"norm_form='exact' .*allowed: native, eager, custom_op"),
    "quant_form": ({"quant_form": "eager"}, r"quant_form='eager' .*allowed: custom_op, (reciprocal, )?native"),
}


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_norm_argument_is_refused(bad: str, device: torch.device) -> None:
    arguments, message = BAD_ARGUMENTS[bad]
    arguments = dict(arguments)
    dtype = arguments.pop("dtype", torch.bfloat16)
    tensors = {n: zeros(device, *arguments.pop(n), dtype=dtype) for n in ("weight", "residual") if n in arguments}
    x, weight = zeros(device, 2, 256), tensors.pop("weight", None)
    for call in (*GROUP_CALLS, *TOKEN_CALLS):
        with pytest.raises(ValueError, match=message):
            call(x, weight, **tensors, **arguments)
    with pytest.raises(ValueError, match=message):
        rms_norm_static_fp8_quant(x, weight, torch.ones(1, device=device), **tensors, **arguments)


def test_strides_and_devices_are_checked(device: torch.device) -> None:
    x = zeros(device, 2, 256)
    for tensors, message in (
        ({"weight": zeros(device, 512)[::2]}, r"weight has stride 2; allowed: 1"),
        ({"residual": zeros(device, 256, 2).T}, r"residual has stride 2 along its columns; allowed: 1"),
        ({"weight": zeros(torch.device("meta"), 256)}, r"weight is on meta; allowed: the input's device, (cpu|cuda)"),
        ({"residual": zeros(torch.device("meta"), 2, 256)}, r"residual is on meta; allowed: x's device, (cpu|cuda)"),
    ):
        with pytest.raises(ValueError, match=message):
            rms_norm_group_fp8_quant_reference(x, tensors.get("weight"), residual=tensors.get("residual"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"group_size": 32}, r"group_size=32 .*allowed: 64, 128"),
        ({"tma_aligned_scales": True}, r"tma_aligned_scales=True needs column_major_scales=True"),
    ],
    ids=["group_size", "tma"],
)
def test_bad_group_argument_is_refused(arguments: dict, message: str, device: torch.device) -> None:
    for call in GROUP_CALLS:
        with pytest.raises(ValueError, match=message):
            call(zeros(device, 2, 256), None, **arguments)


def test_width_that_no_group_divides_is_refused(device: torch.device) -> None:
    x = zeros(device, 2, 192)
    with pytest.raises(ValueError, match=r"output width 192 is not a multiple of group_size=128"):
        rms_norm_group_fp8_quant(x, None)
    assert rms_norm_group_fp8_quant(x, None, group_size=64)[1].shape == (2, 3)


@pytest.mark.parametrize("name", ["scale", "scale_ub"])
@pytest.mark.parametrize(
    "scale, message",
    [
        (torch.ones(1, dtype=torch.bfloat16), r"is torch\.bfloat16 of shape \(1,\); allowed: one float32 value"),
        (torch.ones(2), r"is torch\.float32 of shape \(2,\); allowed: one float32 value"),
        (torch.ones(1, device="meta"), r"is on meta; allowed: x's device, (cpu|cuda)"),
    ],
    ids=["bf16", "two", "meta"],
)
def test_bad_scale_is_refused(scale: torch.Tensor, message: str, name: str, device: torch.device) -> None:
    scale, x = scale if scale.is_meta else scale.to(device), zeros(device, 2, 256)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        if name == "scale":
            rms_norm_static_fp8_quant_reference(x, None, EPSILON, None, False, False, scale)
        else:
            rms_norm_token_fp8_quant_reference(x, None, scale_ub=scale)


def test_bad_arguments_are_refused_while_compiling(device: torch.device) -> None:
    arguments = (EPSILON, None, False, False, 96, False, False, False, EPS, "native", "custom_op")
    compiled = torch.compile(lambda x: OPS.rms_norm_group_fp8_quant(x, None, *arguments), fullgraph=True)
    with pytest.raises(Exception, match=r"group_size=96 .*allowed: 64, 128"):
        compiled(zeros(device, 2, 256))
