# SPDX-License-Identifier: Apache-2.0
"""SiLU·mul + FP8 kernels against their pure-torch references, byte for byte; here on a GPU, or in Triton's interpreter.

The comparison with vLLM's own ops is in test_silu_mul_quant_gpu.py.
"""

from __future__ import annotations

import pytest
import torch

from vllm_fusion_plugin.kernels import silu_mul_quant as kernels
from vllm_fusion_plugin.kernels.rounding import is_native
from vllm_fusion_plugin.ops.quant import GroupScales, group_fp8_quant_reference, static_fp8_quant_reference
from vllm_fusion_plugin.ops.silu_mul_quant import (
    silu_mul_group_fp8_quant,
    silu_mul_group_fp8_quant_reference,
    silu_mul_reference,
    silu_mul_static_fp8_quant,
    silu_mul_static_fp8_quant_reference,
)

from .cases import (
    DTYPES,
    TMA,
    GroupMode,
    StaticMode,
    all_values,
    group_modes,
    random_input,
    short,
    static_modes,
    strided,
    zeros_laid_out_as,
)
from .checks import (
    Guarded,
    as_bits,
    assert_same_bytes,
    assert_same_outputs,
    check_deterministic,
    check_guarded,
    check_tma_outputs,
    code_steps,
    guarded_codes,
    guarded_scales,
    one_nan,
)
from .test_numerics import _silu_kernel, run

DEEPSEEK = GroupMode(torch.bfloat16, 128, "tma", False, "custom_op", "custom_op")
OPS = torch.ops.vllm_fusion_plugin


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


def run_group(x: torch.Tensor, mode: GroupMode) -> tuple[Guarded, Guarded]:
    codes = guarded_codes(x)
    scales = guarded_scales(x, mode.scales)
    kernels.silu_mul_group_fp8_quant(
        x, codes.tensor, scales.tensor, mode.group_size, mode.use_ue8m0, mode.act_rounding, mode.quant_rounding
    )
    codes.check()
    scales.check()
    return codes, scales


def check_group(x: torch.Tensor, mode: GroupMode) -> None:
    act_rounding, quant_rounding = mode.act_rounding, mode.quant_rounding
    y = activation(x, act_rounding, quant_rounding)
    check_guarded(*run_group(x, mode), *group_fp8_quant_reference(y, mode.scales, quant_rounding), quant_rounding)


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


# ---- the ops themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_group_op_is_its_kernel(rows: int, device: torch.device) -> None:
    x = random_input(rows, 384, torch.bfloat16, device, seed=7)
    outputs = silu_mul_group_fp8_quant(x, TMA)
    check_tma_outputs(outputs, run_group(x, DEEPSEEK))


def test_static_op_is_its_kernel(device: torch.device) -> None:
    x, scale = random_input(5, 96, torch.float16, device, seed=8), torch.tensor([0.02], device=device)
    expected = run_static(x, scale, StaticMode(torch.float16, "custom_op", "custom_op"))
    assert_same_bytes(silu_mul_static_fp8_quant(x, scale), expected, "codes")


GROUP_ARGUMENTS = [
    (128, "row", False, "custom_op", "custom_op"),
    (64, "tma", True, "native", "native"),
]


@pytest.mark.parametrize("arguments", GROUP_ARGUMENTS, ids=["row-major", "tma-ue8m0-native"])
def test_group_opcheck(arguments: tuple, device: torch.device) -> None:
    x = random_input(5, 256, torch.bfloat16, device, seed=9)
    torch.library.opcheck(OPS.silu_mul_group_fp8_quant.default, (x, *arguments))


def test_static_opcheck(device: torch.device) -> None:
    x = random_input(5, 256, torch.float16, device, seed=10)
    scale = torch.tensor([0.1], device=device)
    torch.library.opcheck(OPS.silu_mul_static_fp8_quant.default, (x, scale, "custom_op", "native"))


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_ops_with_dynamic_tokens(device: torch.device) -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x: torch.Tensor, scale: torch.Tensor):
        group = OPS.silu_mul_group_fp8_quant(x, 128, "tma", False, "custom_op", "custom_op")
        return *group, OPS.silu_mul_static_fp8_quant(x, scale, "custom_op", "custom_op")

    scale = torch.tensor([0.03], device=device)
    for rows in (5, 2, 33):
        x = random_input(rows, 256, torch.bfloat16, device, seed=rows)
        group = silu_mul_group_fp8_quant(x, TMA)
        assert_same_outputs(compiled(x, scale), (*group, silu_mul_static_fp8_quant(x, scale)))


def test_ops_are_deterministic_and_leave_their_input(device: torch.device) -> None:
    check_deterministic(silu_mul_group_fp8_quant, random_input(5, 384, torch.bfloat16, device, seed=11, kind="special"))


# ---- what is refused -------------------------------------------------------------------------------------------------

X = torch.zeros(2, 512, dtype=torch.bfloat16)

BAD_INPUTS = {
    "int": (X.to(torch.int32), r"x has dtype torch\.int32; allowed: torch\.bfloat16, torch\.float16"),
    "fp32": (X.float(), r"x has dtype torch\.float32; allowed: torch\.bfloat16, torch\.float16"),
    "1-D": (X[0], r"x has 1 dimensions, shape \(512,\); allowed: 2"),
    "3-D": (X[None], r"x has 3 dimensions, shape \(1, 2, 512\); allowed: 2"),
    "odd width": (X[:, :511], r"x has 511 columns; allowed: an even number above 0"),
    "no width": (X[:, :0], r"x has 0 columns; allowed: an even number above 0"),
    "strided columns": (X[:, ::2], r"x has stride 2 along its columns; allowed: 1"),
    "transposed": (X.T.contiguous().T, r"x has stride 2 along its columns; allowed: 1"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_refused(bad: str, device: torch.device) -> None:
    x, message = BAD_INPUTS[bad]
    x = zeros_laid_out_as(x, device)
    scale = torch.ones(1, device=device)
    for call in (
        lambda: silu_mul_group_fp8_quant(x),
        lambda: silu_mul_group_fp8_quant_reference(x),
        lambda: silu_mul_static_fp8_quant(x, scale),
        lambda: silu_mul_static_fp8_quant_reference(x, scale),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scales": GroupScales(32)}, r"group_size=32 .*allowed: 64, 128"),
        ({"scales": GroupScales(0)}, r"group_size=0 .*allowed: 64, 128"),
        ({"scales": GroupScales(layout="rows")}, r"scale_layout='rows' is not known; allowed: row, column, tma"),
        ({"act_rounding": "exact"}, r"act_rounding='exact' .*allowed: custom_op, eager, native"),
        ({"quant_rounding": ""}, r"quant_rounding='' .*allowed: custom_op, reciprocal, native"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_group_argument_is_refused(arguments: dict, message: str, device: torch.device) -> None:
    for call in (silu_mul_group_fp8_quant, silu_mul_group_fp8_quant_reference):
        with pytest.raises(ValueError, match=message):
            call(X.to(device), **arguments)


def test_width_that_no_group_divides_is_refused(device: torch.device) -> None:
    x = torch.zeros(2, 2 * 192, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=r"output width 192 is not a multiple of group_size=128"):
        silu_mul_group_fp8_quant(x, GroupScales(128))
    assert silu_mul_group_fp8_quant(x, GroupScales(64))[1].shape == (2, 3)


@pytest.mark.parametrize(
    "scale, message",
    [
        (torch.ones(1, dtype=torch.bfloat16), r"scale is torch\.bfloat16 of shape \(1,\); allowed: one float32 value"),
        (torch.ones(2), r"scale is torch\.float32 of shape \(2,\); allowed: one float32 value"),
        (torch.ones(0), r"scale is torch\.float32 of shape \(0,\); allowed: one float32 value"),
        (torch.ones(1, device="meta"), r"scale is on meta; allowed: x's device, (cpu|cuda)"),
    ],
    ids=["bf16", "two", "none", "meta"],
)
def test_bad_scale_is_refused(scale: torch.Tensor, message: str, device: torch.device) -> None:
    scale = scale if scale.is_meta else scale.to(device)
    for call in (silu_mul_static_fp8_quant, silu_mul_static_fp8_quant_reference):
        with pytest.raises(ValueError, match=message):
            call(X.to(device), scale)


def test_bad_static_forms_are_refused(device: torch.device) -> None:
    scale = torch.ones(1, device=device)
    for name, allowed in (("act_rounding", "custom_op, eager, native"), ("quant_rounding", "custom_op, native")):
        with pytest.raises(ValueError, match=rf"{name}='inductor' .*allowed: {allowed}"):
            silu_mul_static_fp8_quant(X.to(device), scale, **{name: "inductor"})


def test_bad_arguments_are_refused_while_compiling(device: torch.device) -> None:
    compiled = torch.compile(
        lambda x: OPS.silu_mul_group_fp8_quant(x, 96, "row", False, "custom_op", "custom_op"),
        fullgraph=True,
    )
    with pytest.raises(Exception, match=r"group_size=96 .*allowed: 64, 128"):
        compiled(X.to(device))
