# SPDX-License-Identifier: Apache-2.0
"""SiLU·mul, then quantise: what runs between the two GEMMs of a gated MLP.

y = silu(gate) * up, where gate and up are the halves of x along its last dimension. vLLM has more than one SiLU·mul and they
round differently; `act_rounding` says which one a fused op stands in for:

`custom_op`
    vLLM's CUDA op `silu_and_mul`: silu(gate) is rounded to x's dtype, and so is the product. The op adds 0.0 to up (its
    argument `beta`), which turns an up of -0 into +0.
`eager`
    The same roundings without that addition: eager torch, Inductor under `emulate_precision_casts`, and vLLM's op before it
    had a `beta` (0.20).
`native`
    `SiluAndMul.forward_native` as Inductor compiles it (vLLM's default): fp32 up to the product, which is rounded to x's
    dtype where Inductor stores it, that is before an opaque quantiser (`quant_rounding="custom_op"`), and not at all before
    a native quantiser, which Inductor puts into the same loop.

Exact on NVIDIA GPUs: codes and scales are the bytes that vLLM's own ops write, for all gates times a grid of ups and over
1e9 random elements a mode (tests/kernels, tests with `gpu`). A native quantiser's division is approximate (`div.full.f32`,
2 ulp); the fused op uses the same instruction on the same values.
"""

from __future__ import annotations

import torch

from ..kernels.fp8 import FORMATS, OCP
from .nvfp4 import check_global_scale, check_width, empty_block_scales, nvfp4_quant_reference
from .quant import (
    FP8,
    INPUT_DTYPES,
    MAX_WIDTH,
    SCALES,
    GroupScales,
    check_choice,
    check_fp8,
    check_group_rounding,
    check_number,
    check_token_rounding,
    empty_token_scales,
    group_fp8_quant_reference,
    is_native,
    static_fp8_quant_reference,
    token_fp8_quant_reference,
)
from .registry import register
from .replaced import stands_for_an_op


def _check_input(x: torch.Tensor) -> tuple[int, int]:
    """Rows and output width of x [M, 2 * width]; ValueError on what no kernel takes."""
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
    if x.dim() != 2:
        raise ValueError(f"x has {x.dim()} dimensions, shape {tuple(x.shape)}; allowed: 2, [tokens, 2 * width]")
    rows, both = x.shape
    if both % 2 or both == 0:
        raise ValueError(f"x has {both} columns; allowed: an even number above 0 (gate and up halves)")
    if x.stride(1) != 1:
        raise ValueError(f"x has stride {x.stride(1)} along its columns; allowed: 1 (rows themselves may be strided)")
    return rows, both // 2


ACT_ROUNDINGS = ("custom_op", "eager", "native")
# How a schema ends, of an op that can return SiLU·mul's rows too.
ROUNDINGS_AND_KEEP = f"str act_rounding, str quant_rounding, bool keep_act=False, {FP8}"


@stands_for_an_op
def silu_mul_reference(x: torch.Tensor, act_rounding: str = "custom_op", *, rounded: bool = True) -> torch.Tensor:
    """silu(gate) * up of x [..., 2 * width] in plain torch: in x's dtype, or in fp32 if `rounded` is False."""
    gate, up = x.float().chunk(2, dim=-1)
    silu = gate / (1.0 + torch.exp(-gate))
    if act_rounding != "native":
        silu = silu.to(x.dtype).float()
    if act_rounding == "custom_op":
        up = up + 0.0
    y = silu * up
    return y.to(x.dtype) if rounded else y


def _is_rounded(act_rounding: str, quant_rounding: str) -> bool:
    """Whether the product is a number of x's dtype."""
    return act_rounding != "native" or not is_native(quant_rounding)


def _activation(x: torch.Tensor, act_rounding: str, quant_rounding: str) -> torch.Tensor:
    return silu_mul_reference(x, act_rounding, rounded=_is_rounded(act_rounding, quant_rounding))


def _check_keep_act(keep_act: bool, act_rounding: str, quant_rounding: str) -> None:
    if keep_act and not _is_rounded(act_rounding, quant_rounding):
        raise ValueError(
            f"keep_act=True with {act_rounding=} and {quant_rounding=}, which round nothing to keep; allowed: another of "
            "the two"
        )


def _empty_act(x: torch.Tensor, keep_act: bool) -> list[torch.Tensor]:
    """Uninitialised rows of SiLU·mul, if they are returned."""
    return [x.new_empty((x.shape[0], x.shape[1] // 2))] if keep_act else []


# ---- group FP8 -------------------------------------------------------------------------------------------------------


def silu_mul_group_fp8_quant_reference(
    x: torch.Tensor,
    scales: GroupScales = GroupScales(),
    *,
    act_rounding: str = "custom_op",
    quant_rounding: str = "custom_op",
    keep_act: bool = False,
    fp8: str = OCP,
) -> list[torch.Tensor]:
    """`silu_mul_group_fp8_quant` in plain torch, on any device."""
    _check_group(x, scales, act_rounding, quant_rounding, keep_act, fp8)
    y = _activation(x, act_rounding, quant_rounding)
    return [*group_fp8_quant_reference(y, scales, quant_rounding, fp8), *[y] * keep_act]


def _check_group(
    x: torch.Tensor, how: GroupScales, act_rounding: str, quant_rounding: str, keep_act: bool, fp8: str
) -> tuple[int, int]:
    rows, width = _check_input(x)
    how.check(width)
    check_choice("act_rounding", act_rounding, ACT_ROUNDINGS)
    check_group_rounding(quant_rounding, x.dtype, how, fp8)
    _check_keep_act(keep_act, act_rounding, quant_rounding)
    return rows, width


def _group_fake(x, group_size, scale_layout, use_ue8m0, act_rounding, quant_rounding, keep_act=False, fp8=OCP):
    how = GroupScales(group_size, scale_layout, use_ue8m0)
    rows, width = _check_group(x, how, act_rounding, quant_rounding, keep_act, fp8)
    return [x.new_empty((rows, width), dtype=FORMATS[fp8].dtype), how.empty(x, rows, width), *_empty_act(x, keep_act)]


def _group_cuda(x, group_size, scale_layout, use_ue8m0, act_rounding, quant_rounding, keep_act=False, fp8=OCP):
    from ..kernels.silu_mul_quant import silu_mul_group_fp8_quant as launch

    outputs = _group_fake(x, group_size, scale_layout, use_ue8m0, act_rounding, quant_rounding, keep_act, fp8)
    codes, scales, *act = outputs
    kept = act[0] if keep_act else None
    launch(x, codes, scales, group_size, use_ue8m0, act_rounding, quant_rounding, act=kept, fp8=fp8)
    return outputs


def _group_cpu(x, group_size, scale_layout, use_ue8m0, act_rounding, quant_rounding, keep_act=False, fp8=OCP):
    rounding = {"act_rounding": act_rounding, "quant_rounding": quant_rounding}
    how = GroupScales(group_size, scale_layout, use_ue8m0)
    return silu_mul_group_fp8_quant_reference(x, how, **rounding, keep_act=keep_act, fp8=fp8)


_GROUP = register(
    f"silu_mul_group_fp8_quant(Tensor x, {SCALES}, {ROUNDINGS_AND_KEEP}) -> Tensor[]",
    fake=_group_fake,
    cuda=_group_cuda,
    cpu=_group_cpu,
)


def silu_mul_group_fp8_quant(
    x: torch.Tensor,
    scales: GroupScales = GroupScales(),
    *,
    act_rounding: str = "custom_op",
    quant_rounding: str = "custom_op",
    keep_act: bool = False,
    fp8: str = OCP,
) -> list[torch.Tensor]:
    """silu(gate) * up, quantised to FP8 in groups along each row, in one kernel.

    Args:
        x: [M, 2 * K] bf16 or fp16, gate then up; rows may be strided, columns not. M may be 0.
        scales: size of the groups, 64 or 128, which divides K; layout of the scales; whether they are powers of two.
        act_rounding, quant_rounding: which of vLLM's roundings to reproduce; see the module's docstring.
        keep_act: return silu(gate) * up too. Not where both roundings are native ones, which never round it.
        fp8: format of the codes; see kernels/fp8.py.

    Returns:
        [codes, scales], then act if keep_act: codes [M, K] in that format, contiguous, scales [M, K / group_size] fp32 in
        the layout asked for, act [M, K] in x's dtype, contiguous.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `silu_and_mul` followed by `per_token_group_fp8_quant` (DeepSeek-V3's 1 × 128 activation quantiser,
    arXiv:2412.19437, section 3.3).
    """
    return _GROUP(x, *scales, act_rounding, quant_rounding, keep_act, fp8)


# ---- FP8 by token ----------------------------------------------------------------------------------------------------


def silu_mul_token_fp8_quant_reference(
    x: torch.Tensor,
    scale_ub: torch.Tensor | None = None,
    act_rounding: str = "custom_op",
    quant_rounding: str = "custom_op",
    keep_act: bool = False,
    fp8: str = OCP,
) -> list[torch.Tensor]:
    """`silu_mul_token_fp8_quant` in plain torch, on any device."""
    _check_token(x, scale_ub, act_rounding, quant_rounding, keep_act, fp8)
    y = _activation(x, act_rounding, quant_rounding)
    return [*token_fp8_quant_reference(y, scale_ub, quant_rounding, fp8), *[y] * keep_act]


def _check_token(
    x: torch.Tensor, scale_ub: torch.Tensor | None, act_rounding: str, quant_rounding: str, keep_act: bool, fp8: str
) -> tuple[int, int]:
    rows, width = _check_input(x)
    if width > MAX_WIDTH:
        raise ValueError(f"x has {2 * width} columns; allowed: 2 to {2 * MAX_WIDTH}")
    if scale_ub is not None:
        check_number("scale_ub", scale_ub, x)
    check_choice("act_rounding", act_rounding, ACT_ROUNDINGS)
    check_token_rounding(quant_rounding, scale_ub, fp8)
    _check_keep_act(keep_act, act_rounding, quant_rounding)
    return rows, width


def _token_fake(x, scale_ub, act_rounding, quant_rounding, keep_act=False, fp8=OCP):
    rows, width = _check_token(x, scale_ub, act_rounding, quant_rounding, keep_act, fp8)
    return [x.new_empty((rows, width), dtype=FORMATS[fp8].dtype), empty_token_scales(x), *_empty_act(x, keep_act)]


def _token_cuda(x, scale_ub, act_rounding, quant_rounding, keep_act=False, fp8=OCP):
    from ..kernels.silu_mul_quant import silu_mul_token_fp8_quant as launch

    outputs = _token_fake(x, scale_ub, act_rounding, quant_rounding, keep_act, fp8)
    codes, scales, *act = outputs
    launch(x, scale_ub, codes, scales, act_rounding, quant_rounding, act=act[0] if keep_act else None, fp8=fp8)
    return outputs


_TOKEN = register(
    f"silu_mul_token_fp8_quant(Tensor x, Tensor? scale_ub, {ROUNDINGS_AND_KEEP}) -> Tensor[]",
    fake=_token_fake,
    cuda=_token_cuda,
    cpu=silu_mul_token_fp8_quant_reference,
)


def silu_mul_token_fp8_quant(
    x: torch.Tensor,
    scale_ub: torch.Tensor | None = None,
    *,
    act_rounding: str = "custom_op",
    quant_rounding: str = "custom_op",
    keep_act: bool = False,
    fp8: str = OCP,
) -> list[torch.Tensor]:
    """silu(gate) * up, quantised to FP8 with one scale a row, in one kernel.

    Args:
        x: [M, 2 * K] bf16 or fp16, gate then up; rows may be strided, columns not. M may be 0; K is 1 to 32768.
        scale_ub: one float32 value on x's device that limits a row's maximum; None for no limit.
        act_rounding, quant_rounding, keep_act, fp8: as for groups.

    Returns:
        [codes, scales], then act if keep_act: codes [M, K] in that format, scales [M, 1] fp32, act [M, K] in x's dtype, all
        contiguous.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `silu_and_mul` followed by `dynamic_per_token_scaled_fp8_quant`.
    """
    return _TOKEN(x, scale_ub, act_rounding, quant_rounding, keep_act, fp8)


# ---- static FP8 ------------------------------------------------------------------------------------------------------


def silu_mul_static_fp8_quant_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    act_rounding: str = "custom_op",
    quant_rounding: str = "custom_op",
    fp8: str = OCP,
) -> torch.Tensor:
    """`silu_mul_static_fp8_quant` in plain torch, on any device."""
    _check_static(x, scale, act_rounding, quant_rounding, fp8)
    return static_fp8_quant_reference(_activation(x, act_rounding, quant_rounding), scale, quant_rounding, fp8)


def _check_static(
    x: torch.Tensor, scale: torch.Tensor, act_rounding: str, quant_rounding: str, fp8: str
) -> tuple[int, int]:
    rows, width = _check_input(x)
    check_number("scale", scale, x)
    check_choice("act_rounding", act_rounding, ACT_ROUNDINGS)
    check_choice("quant_rounding", quant_rounding)
    check_fp8(fp8)
    return rows, width


def _static_fake(x, scale, act_rounding, quant_rounding, fp8=OCP):
    rows, width = _check_static(x, scale, act_rounding, quant_rounding, fp8)
    return x.new_empty((rows, width), dtype=FORMATS[fp8].dtype)


def _static_cuda(x, scale, act_rounding, quant_rounding, fp8=OCP):
    from ..kernels.silu_mul_quant import silu_mul_static_fp8_quant as launch

    codes = _static_fake(x, scale, act_rounding, quant_rounding, fp8)
    launch(x, scale, codes, act_rounding, quant_rounding, fp8)
    return codes


_STATIC = register(
    f"silu_mul_static_fp8_quant(Tensor x, Tensor scale, str act_rounding, str quant_rounding, {FP8}) -> Tensor",
    fake=_static_fake,
    cuda=_static_cuda,
    cpu=silu_mul_static_fp8_quant_reference,
)


def silu_mul_static_fp8_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    act_rounding: str = "custom_op",
    quant_rounding: str = "custom_op",
    fp8: str = OCP,
) -> torch.Tensor:
    """silu(gate) * up, quantised to FP8 with one given scale, in one kernel.

    Args:
        x: [M, 2 * K] bf16 or fp16, gate then up; rows may be strided, columns not. M may be 0.
        scale: one float32 value on x's device; codes are y / scale, by way of the rounded reciprocal as in vLLM.
        act_rounding, quant_rounding: which of vLLM's roundings to reproduce; see the module's docstring.
        fp8: format of the codes; see kernels/fp8.py.

    Returns:
        codes [M, K] in that format, contiguous.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `silu_and_mul` followed by `static_scaled_fp8_quant`.
    """
    return _STATIC(x, scale, act_rounding, quant_rounding, fp8)


# ---- NVFP4 -----------------------------------------------------------------------------------------------------------


def silu_mul_nvfp4_quant_reference(
    x: torch.Tensor, global_scale: torch.Tensor, act_rounding: str = "custom_op"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_mul_nvfp4_quant` in plain torch, on any device."""
    _check_nvfp4(x, global_scale, act_rounding)
    return nvfp4_quant_reference(silu_mul_reference(x, act_rounding), global_scale)


def _check_nvfp4(x: torch.Tensor, global_scale: torch.Tensor, act_rounding: str) -> tuple[int, int]:
    rows, width = _check_input(x)
    check_width(width)
    check_global_scale(global_scale, x.device)
    check_choice("act_rounding", act_rounding, ACT_ROUNDINGS)
    return rows, width


def _nvfp4_fake(x, global_scale, act_rounding):
    rows, width = _check_nvfp4(x, global_scale, act_rounding)
    return x.new_empty((rows, width // 2), dtype=torch.uint8), empty_block_scales(x, rows, width)


def _nvfp4_cuda(x, global_scale, act_rounding):
    from ..kernels.silu_mul_quant import silu_mul_nvfp4_quant as launch

    codes, scales = _nvfp4_fake(x, global_scale, act_rounding)
    launch(x, global_scale, codes, scales, act_rounding)
    return codes, scales


_NVFP4 = register(
    "silu_mul_nvfp4_quant(Tensor x, Tensor global_scale, str act_rounding) -> (Tensor, Tensor)",
    fake=_nvfp4_fake,
    cuda=_nvfp4_cuda,
    cpu=silu_mul_nvfp4_quant_reference,
)


def silu_mul_nvfp4_quant(
    x: torch.Tensor, global_scale: torch.Tensor, *, act_rounding: str = "custom_op"
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up, quantised to NVFP4 in blocks of 16 along each row, in one kernel.

    Args:
        x: [M, 2 * K] bf16 or fp16, gate then up, K a multiple of 16; rows may be strided, columns not. M may be 0.
        global_scale: one float32 value on x's device, what block scales are multiplied by before they become e4m3.
        act_rounding: which of vLLM's roundings of SiLU·mul to reproduce; see the module's docstring. The product is rounded
            to x's dtype in both, because vLLM's NVFP4 quantiser is opaque to Inductor.

    Returns:
        codes [M, K / 2] uint8, two e2m1 codes a byte, and swizzled block scales as int32, [M rounded up to 128,
        (K / 16 rounded up to 4) / 4], the padding zero; `.view(torch.float8_e4m3fn)` is what GEMMs take. See ops/nvfp4.py.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `silu_and_mul` followed by `scaled_fp4_quant`. vLLM's kernel runs on compute capability 10.0 and later
    only, where this op has not been compared with it; this one runs on any, and is compared with the reference here and
    with vLLM's emulation in torch. Both kernels take reciprocals approximately (`rcp.approx.ftz.f32`) and the references
    exactly: a code can be one step off them where a number falls on a rounding boundary.
    """
    return _NVFP4(x, global_scale, act_rounding)
