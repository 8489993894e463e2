# SPDX-License-Identifier: Apache-2.0
"""SiLU·mul + FP8 kernels against their pure-torch references, byte for byte; here on a GPU, or in Triton's interpreter.

The comparison with vLLM's own ops is in test_silu_mul_quant_gpu.py.
"""

from __future__ import annotations

import pytest
import torch

from vllm_fusion_plugin.kernels import silu_mul_quant as kernels
from vllm_fusion_plugin.kernels.rounding import is_native
from vllm_fusion_plugin.ops.quant import (
    FP8_MIN_SCALE,
    empty_token_scales,
    group_fp8_quant_reference,
    static_fp8_quant_reference,
    token_fp8_quant_reference,
)
from vllm_fusion_plugin.ops.silu_mul_quant import (
    silu_mul_group_fp8_quant_reference,
    silu_mul_reference,
    silu_mul_token_fp8_quant_reference,
)

from .cases import (
    DTYPES,
    GroupMode,
    StaticMode,
    TokenMode,
    all_values,
    group_modes,
    random_input,
    short,
    static_modes,
    strided,
)
from .checks import (
    Guarded,
    as_bits,
    assert_codes,
    assert_same_bytes,
    check_guarded,
    code_steps,
    guarded_codes,
    guarded_scales,
    one_nan,
)
from .test_numerics import _silu_kernel, run

DEEPSEEK = GroupMode(torch.bfloat16, 128, "tma", False, "custom_op", "custom_op")


# ---- what is expected ------------------------------------------------------------------------------------------------


def activation(x: torch.Tensor, act_rounding: str, quant_rounding: str) -> torch.Tensor:
    """silu(gate) * up with the bits that the kernel should have.

    custom_op rounds silu(gate) to x's dtype, where the kernel and IEEE division agree for every gate. native keeps fp32,
    where the kernel has the bits of Inductor's approximate division, not of torch's: up to 2 ulp in 2**24, which is seldom
    enough to change y's rounding to x's dtype, but not never. So silu(gate) comes from the kernel's own function there,
    by the gate's bit pattern; test_numerics.py compares that function with Inductor's division for every gate.
    """
    if act_rounding != "native":
        return silu_mul_reference(x, act_rounding)
    table = run(_silu_kernel, all_values(x.dtype, x.device), EXACT=False)
    gate, up = x.chunk(2, dim=-1)
    y = table[gate.contiguous().view(torch.int16).int() & 0xFFFF] * up.float()
    return y if is_native(quant_rounding) else y.to(x.dtype)


def rounded_act(mode: GroupMode | TokenMode) -> bool:
    """Whether what is quantised is rounded first."""
    return mode.act_rounding != "native" or not is_native(mode.quant_rounding)


def run_group(x: torch.Tensor, mode: GroupMode, act: Guarded | None = None) -> tuple[Guarded, Guarded]:
    codes = guarded_codes(x)
    scales = guarded_scales(x, mode.scales, x.shape[1] // 2)
    kernels.silu_mul_group_fp8_quant(
        x, codes.tensor, scales.tensor, mode.group_size, mode.use_ue8m0, mode.act_rounding, mode.quant_rounding,
        act=None if act is None else act.tensor,
    )  # fmt: skip
    codes.check()
    scales.check()
    return codes, scales


def guarded_act(x: torch.Tensor) -> Guarded:
    return Guarded(x.new_empty((x.shape[0], x.shape[1] // 2)))


def check_act(act: Guarded, y: torch.Tensor) -> None:
    """What the kernel wrote is what it quantised, no byte beside it."""
    act.check()
    assert_same_bytes(one_nan(act.tensor), one_nan(y), "act")


def check_group(x: torch.Tensor, mode: GroupMode, keep_act: bool = False) -> None:
    act_rounding, quant_rounding = mode.act_rounding, mode.quant_rounding
    y = activation(x, act_rounding, quant_rounding)
    act = guarded_act(x) if keep_act else None
    check_guarded(*run_group(x, mode, act), *group_fp8_quant_reference(y, mode.scales, quant_rounding), quant_rounding)
    if act is not None:
        check_act(act, y)


def run_token(
    x: torch.Tensor,
    scale_ub: torch.Tensor | None,
    mode: TokenMode,
    tile: kernels.RowTile | None = None,
    act: Guarded | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = guarded_codes(x), Guarded(empty_token_scales(x))
    rounding = (mode.act_rounding, mode.quant_rounding)
    kernels.silu_mul_token_fp8_quant(
        x, scale_ub, codes.tensor, scales.tensor, *rounding, tile, act=None if act is None else act.tensor
    )
    codes.check()
    scales.check()
    return codes.tensor, scales.tensor


def check_token(
    x: torch.Tensor,
    scale_ub: torch.Tensor | None,
    mode: TokenMode,
    tile: kernels.RowTile | None = None,
    keep_act: bool = False,
) -> None:
    act = guarded_act(x) if keep_act else None
    codes, scales = run_token(x, scale_ub, mode, tile, act)
    y = activation(x, mode.act_rounding, mode.quant_rounding)
    if act is not None:
        check_act(act, y)
    expected_codes, expected_scales = token_fp8_quant_reference(y, scale_ub, mode.quant_rounding)
    assert_codes(codes, expected_codes, mode.quant_rounding)
    assert_same_bytes(one_nan(scales), one_nan(expected_scales), "scales")


def run_static(x: torch.Tensor, scale: torch.Tensor, mode: StaticMode) -> torch.Tensor:
    codes = guarded_codes(x)
    kernels.silu_mul_static_fp8_quant(x, scale, codes.tensor, mode.act_rounding, mode.quant_rounding)
    codes.check()
    return codes.tensor


def check_static(x: torch.Tensor, scale: torch.Tensor, mode: StaticMode) -> None:
    expected = static_fp8_quant_reference(
        activation(x, mode.act_rounding, mode.quant_rounding), scale, mode.quant_rounding
    )
    assert_same_bytes(run_static(x, scale, mode), one_nan(expected), "codes")


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", group_modes(), ids=str)
def test_group_modes(mode: GroupMode, device: torch.device) -> None:
    """Every mode. 5 rows: one short of TMA's alignment by 3; 3 groups: no power of two."""
    check_group(random_input(5, 3 * mode.group_size, mode.dtype, device, seed=1, kind="special"), mode)
    check_group(random_input(5, 3 * mode.group_size, mode.dtype, device, seed=2), mode)


# rows x groups need no mode: tiles depend on both and on the group size alone
@pytest.mark.parametrize("groups", [1, 3, 7, 12, 16])
@pytest.mark.parametrize("rows", [0, 1, 5, 16, 17, 33])
@pytest.mark.parametrize("group_size", [64, 128])
def test_group_shapes(group_size: int, rows: int, groups: int, device: torch.device) -> None:
    mode = DEEPSEEK._replace(group_size=group_size)
    check_group(random_input(rows, groups * group_size, mode.dtype, device, seed=rows), mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("rows", [5, 33])
def test_group_strided_rows(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    x = strided(random_input(rows, 3 * 128, dtype, device, seed=3))
    check_group(x, DEEPSEEK._replace(dtype=dtype))


@pytest.mark.parametrize("quant_rounding", ["custom_op", "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_group_all_bit_patterns(dtype: torch.dtype, quant_rounding: str, device: torch.device) -> None:
    """Every gate once: in the order of the bit patterns (a group is then of one exponent), and shuffled."""
    gates = all_values(dtype, device)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(4)).to(device)
    x = torch.cat([torch.cat([gates, gates[order]]).view(32, -1), gates[order.flip(0)].repeat(2).view(32, -1)], dim=1)
    for act_rounding in ("custom_op", "native"):
        check_group(x, DEEPSEEK._replace(dtype=dtype, act_rounding=act_rounding, quant_rounding=quant_rounding))


def test_group_floors(device: torch.device) -> None:
    """All-zero groups, and groups under eps: the scale is the form's floor, not zero and not NaN."""
    x = torch.zeros(4, 2 * 128, dtype=torch.bfloat16, device=device)
    x[1, 5], x[1, 128 + 5] = 1.0, 1e-30
    for mode in group_modes():
        if mode.dtype == x.dtype and mode.group_size == 128:
            check_group(x, mode)
            assert bool((run_group(x, mode)[1].tensor > 0).all())


# Where all is native, nothing is rounded that could be kept.
KEEPING = [
    mode for mode in group_modes()
    if (mode.group_size, mode.use_ue8m0, mode.scale_layout) == (128, False, "tma") and rounded_act(mode)
]  # fmt: skip


@pytest.mark.parametrize("mode", KEEPING, ids=str)
def test_group_keeps_act(mode: GroupMode, device: torch.device) -> None:
    for rows, groups, kind in ((5, 3, "special"), (1, 1, "normal"), (33, 7, "normal")):
        x = random_input(rows, groups * mode.group_size, mode.dtype, device, seed=12, kind=kind)
        check_group(strided(x), mode, keep_act=True)


@pytest.mark.parametrize("mode", [mode for mode in static_modes() if rounded_act(mode)], ids=str)
def test_token_keeps_act(mode: TokenMode, device: torch.device) -> None:
    for rows, width, kind in ((5, 200, "special"), (0, 64, "normal"), (2, 1100, "bits")):
        x = random_input(rows, width, mode.dtype, device, seed=12, kind=kind)
        check_token(strided(x), None, mode, kernels.RowTile(256, 1), keep_act=True)


# the layout moves scales about and no more: test_group_modes has them all
@pytest.mark.parametrize("mode", [mode for mode in group_modes() if mode.scale_layout == "row"], ids=str)
def test_group_against_op_reference(mode: GroupMode, device: torch.device) -> None:
    """The op's own reference, whose SiLU divides exactly in both forms: equal bytes, or one code apart where the kernel's
    division is Inductor's (see `activation`), which the seeds here never make more than 1 code in 500."""
    x = random_input(5, 3 * mode.group_size, mode.dtype, device, seed=5)
    codes, scales = run_group(x, mode)
    expected_codes, expected_scales = silu_mul_group_fp8_quant_reference(x, **mode.arguments())
    if mode.act_rounding == "custom_op":
        assert_same_bytes(codes.tensor, expected_codes, "codes")
        assert_same_bytes(scales.tensor, expected_scales, "scales")
        return
    steps = code_steps(codes.tensor, expected_codes)
    assert int(steps.max()) <= 1
    assert int(steps.count_nonzero()) <= steps.numel() // 500
    torch.testing.assert_close(scales.tensor, expected_scales, rtol=torch.finfo(mode.dtype).eps, atol=0)


@pytest.mark.parametrize("quant_rounding", ["custom_op", "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_eager_keeps_the_sign_of_a_zero_up(dtype: torch.dtype, quant_rounding: str, device: torch.device) -> None:
    """All that distinguishes it from custom_op, whose + 0.0 turns -0 into +0."""
    eager = DEEPSEEK._replace(dtype=dtype, act_rounding="eager", quant_rounding=quant_rounding)
    x = random_input(5, 256, dtype, device, seed=8)
    x[:, 256::3] = -0.0
    check_group(x, eager)
    check_group(x, eager._replace(act_rounding="custom_op"))
    kept, lost = (run_group(x, eager._replace(act_rounding=form))[0].tensor for form in ("eager", "custom_op"))
    differ = as_bits(kept) != as_bits(lost)
    assert bool(differ.any())
    assert bool((as_bits(kept)[differ] & 0x7F == 0).all())


@pytest.mark.parametrize("bound", [None, 0.8, 1e-9])
@pytest.mark.parametrize("mode", static_modes(), ids=str)
def test_token_modes(mode: TokenMode, bound: float | None, device: torch.device) -> None:
    scale_ub = None if bound is None else torch.tensor([bound], device=device)
    for kind in ("special", "normal", "bits"):
        check_token(random_input(5, 200, mode.dtype, device, seed=6, kind=kind), scale_ub, mode)


# In one chunk, in two and more of which the last has all its columns or not; of any alignment
@pytest.mark.parametrize("width", [1, 7, 96, 512, 1100, 1280, 14336])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_token_shapes(rows: int, width: int, device: torch.device) -> None:
    for quant_rounding in ("custom_op", "native"):
        mode = TokenMode(torch.bfloat16, "native", quant_rounding)
        x = random_input(rows, width, mode.dtype, device, seed=rows)
        check_token(x, None, mode)
        check_token(strided(x), None, mode, kernels.RowTile(256, 1))


@pytest.mark.parametrize("quant_rounding", ["custom_op", "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_token_all_bit_patterns(dtype: torch.dtype, quant_rounding: str, device: torch.device) -> None:
    """Every gate once, rows of one exponent and of all, as for groups."""
    gates = all_values(dtype, device)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(4)).to(device)
    for gate in (gates, gates[order]):
        x = torch.cat([gate.view(512, 128), gates[order.flip(0)].view(512, 128)], dim=1)
        for act_rounding in ("custom_op", "native"):
            check_token(x[::8], None, TokenMode(dtype, act_rounding, quant_rounding))


@pytest.mark.parametrize("quant_rounding", ["custom_op", "native"])
def test_token_floor(quant_rounding: str, device: torch.device) -> None:
    """Rows of zeros, and of next to nothing: the scale is its floor."""
    x = torch.zeros(3, 2 * 128, dtype=torch.bfloat16, device=device)
    x[1, 5], x[1, 128 + 5] = 1.0, 1e-30
    mode = TokenMode(x.dtype, "custom_op", quant_rounding)
    check_token(x, None, mode)
    assert bool((run_token(x, None, mode)[1] == FP8_MIN_SCALE).all())


@pytest.mark.parametrize("act_rounding", ["custom_op", "eager"])
@pytest.mark.parametrize("bound", [None, 0.1])
def test_token_against_op_reference(bound: float | None, act_rounding: str, device: torch.device) -> None:
    x = random_input(5, 300, torch.bfloat16, device, seed=5)
    scale_ub = None if bound is None else torch.tensor([bound], device=device)
    codes, scales = run_token(x, scale_ub, mode := TokenMode(x.dtype, act_rounding, "custom_op"))
    expected_codes, expected_scales = silu_mul_token_fp8_quant_reference(x, scale_ub, *mode[1:])
    assert_same_bytes(codes, expected_codes, "codes")
    assert_same_bytes(scales, expected_scales, "scales")


@pytest.mark.parametrize("scale", [1.0, 0.0123, 3e-5, 700.0])
@pytest.mark.parametrize("mode", static_modes(), ids=str)
def test_static_modes(mode: StaticMode, scale: float, device: torch.device) -> None:
    scales = torch.tensor([scale], device=device)
    for kind in ("special", "normal"):
        check_static(random_input(5, 200, mode.dtype, device, seed=6, kind=kind), scales, mode)


@pytest.mark.parametrize("width", [1, 96, 512, 2048])
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_static_shapes(rows: int, width: int, device: torch.device) -> None:
    mode = StaticMode(torch.bfloat16, "custom_op", "custom_op")
    scale = torch.tensor(0.05, device=device)
    x = random_input(rows, width, mode.dtype, device, seed=rows)
    check_static(x, scale, mode)
    check_static(strided(x), scale, mode)
