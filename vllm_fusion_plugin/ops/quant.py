# SPDX-License-Identifier: Apache-2.0
"""The quantisers that every fused op ends in: scale layouts, their checks, and pure-torch references.

FP8 is one of the formats in kernels/fp8.py, `fp8` in the ops' arguments; by default float8_e4m3fn, ±448. Below, ±448 stands
for the format's own maximum. vLLM has several variants of each quantiser, which round differently;
`quant_rounding` says which one a fused op stands in for. Which of them the installed vLLM has is found out by roundings.py.

`custom_op`
    vLLM's CUDA op (`per_token_group_fp8_quant`, `dynamic_per_token_scaled_fp8_quant`, `static_scaled_fp8_quant`). A group's
    numbers are divided by its scale. NaN behaves as fminf/fmaxf make it: ignored by a group's or row's maximum, then −448 as
    a code (token, static: +448).
`reciprocal`
    `per_token_group_fp8_quant` since vLLM 0.33: as custom_op, but multiplied by the scale's reciprocal, correctly rounded.
    Of a million codes with fp32 scales about 50 are a step off custom_op's; with UE8M0 none. Group quantisers only.
`native`
    `QuantFP8.forward_native` as torch runs it: NaN spreads to its group's scale and stays NaN in the codes.
`native_floored`
    The same since vLLM 0.33: a UE8M0 scale gets its floor before it is rounded up, not after. Group quantisers only.
`flashinfer`
    The quantiser inside of FlashInfer's block GEMM: factor 448 / maximum and scale 1 / factor in fast math, off IEEE by one
    unit in the last place for 37 and 9 of a maximum's 128 mantissas; never powers of two; factor 1 for a group of zeros. NaN
    is ignored by the maximum and stays NaN in the codes. Group quantisers and bf16 only.
`aiter`
    AITER's group quantiser (`rocm_aiter_group_fp8_quant`): the scale is a product with the maximum code's reciprocal, codes
    are products with the scale's, both correctly rounded; never powers of two. Its token quantiser
    (`rocm_aiter_per_token_quant`) does the same without a floor or a bound of scales, with a reciprocal within an ulp,
    which is correctly rounded in plain torch. NaN is ignored by the maximum, then −448 as a code, as v_med3_f32 makes it.
    Read from AITER's source, and not compared with AITER on a GPU yet. Group and token quantisers only.
`custom_op_or_flashinfer`, `reciprocal_or_flashinfer`
    flashinfer below 32 rows, the other from there on, as vLLM chooses its block GEMM. Group quantisers and bf16 only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels import watch
from ..kernels.fp8 import FORMATS, OCP
from ..kernels.rounding import (
    AITER,
    BY_ROWS,
    FAST_448_OVER,
    FAST_RECIPROCAL,
    FLASHINFER,
    NATIVE,
    OPAQUE,
    is_native,
    of_rows,
)
from .replaced import stands_for_an_op

FP8_DTYPE = FORMATS[OCP].dtype
FP8_MAX = FORMATS[OCP].max
FP8_MIN_SCALE = FORMATS[OCP].min_scale
# Floor under UE8M0 in vLLM's op, before the scale is rounded up to a power of two.
UE8M0_MIN_SCALE = 1e-10
# TMA reads 16-byte lines: a column of fp32 scales starts at multiples of 4 rows.
TMA_ALIGNMENT = 4

ROUNDINGS = ("custom_op", "native")
TOKEN_ROUNDINGS = (*ROUNDINGS, AITER)
GROUP_ROUNDINGS = (*OPAQUE, FLASHINFER, *BY_ROWS, *NATIVE, AITER)
GROUP_SIZES = (64, 128)
INPUT_DTYPES = (torch.bfloat16, torch.float16)
LAYOUTS = ("row", "column", "tma", "packed")
# Scales of powers of two that an int32 holds in the layout "packed", first the one in its lowest byte.
PACKED = 4
# GroupScales in a schema.
SCALES = "int group_size, str scale_layout, bool use_ue8m0"
# The format of the codes, where a schema ends.
FP8 = f'str fp8="{OCP}"'
# Floor of a group's maximum in vLLM's op: the `eps` that its layers call it with.
EPS = 1e-10
# Of a row that a kernel keeps in registers.
MAX_WIDTH = 32768
# Smaller fp32 numbers are subnormal: 0 to fast math.
FP32_TINY = 2.0**-126


def check_choice(name: str, value: str, allowed: tuple[str, ...] = ROUNDINGS) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(allowed)}")


def check_number(name: str, number: torch.Tensor, x: torch.Tensor) -> None:
    """Raises ValueError on what is no scale, or no bound of scales, for x."""
    if number.numel() != 1 or number.dtype != torch.float32:
        raise ValueError(f"{name} is {number.dtype} of shape {tuple(number.shape)}; allowed: one float32 value")
    if number.device != x.device:
        raise ValueError(f"{name} is on {number.device}; allowed: x's device, {x.device}")


def check_fp8(fp8: str) -> None:
    check_choice("fp8", fp8, tuple(FORMATS))


def check_token_rounding(quant_rounding: str, scale_ub: torch.Tensor | None, fp8: str) -> None:
    """Raises ValueError on what no token quantiser does."""
    check_choice("quant_rounding", quant_rounding, TOKEN_ROUNDINGS)
    check_fp8(fp8)
    if quant_rounding == AITER and scale_ub is not None:
        raise ValueError(f"scale_ub is given with {quant_rounding=}, which has no bound; allowed: None")


def check_group_rounding(quant_rounding: str, dtype: torch.dtype, how: GroupScales, fp8: str = OCP) -> None:
    """Raises ValueError on what no group quantiser does with numbers of `dtype`, or with such scales and codes."""
    check_choice("quant_rounding", quant_rounding, GROUP_ROUNDINGS)
    check_fp8(fp8)
    if fp8 != OCP and (quant_rounding == FLASHINFER or quant_rounding in BY_ROWS):
        raise ValueError(f"{fp8=} with {quant_rounding=}, which NVIDIA's GPUs alone have; allowed: {OCP}")
    if how.layout == "packed" and quant_rounding not in OPAQUE:
        raise ValueError(f"{quant_rounding=} with scale_layout='packed'; allowed: {', '.join(OPAQUE)}")
    if quant_rounding == AITER and how.ue8m0:
        raise ValueError(f"use_ue8m0=True with {quant_rounding=}; allowed: False")
    if dtype != torch.bfloat16 and (quant_rounding == FLASHINFER or quant_rounding in BY_ROWS):
        raise ValueError(f"{quant_rounding=} with {dtype}; allowed: torch.bfloat16")


class GroupScales(NamedTuple):
    """How a group quantiser makes and lays out its scales. The ops' schemas have the fields one after another (SCALES).

    layout of scales [rows, groups]:
        "row": strides (groups, 1).
        "column": strides (1, rows).
        "tma": strides (1, rows rounded up to 4). The padding between columns belongs to the storage, not to the tensor,
            and whoever fills the scales writes zeros there (`zero_scale_padding`): TMA loads it, and uninitialised memory
            would make runs differ.
        "packed": int32 [rows, groups / 4 rounded up], strides as of "tma". Group g has byte g % 4, from the lowest on, of
            number g / 4: the exponent of its scale, as fp32 has it. Bytes of no group are 0. For scales of powers of two of
            groups of 128; what DeepGEMM takes on GPUs of compute capability 10.0 and later.
    """

    group_size: int = 128
    layout: str = "row"
    ue8m0: bool = False
    """Each scale is rounded up to a power of two."""

    def check(self, width: int) -> None:
        """Raises ValueError on what no supported GEMM reads, in rows of `width`."""
        if self.group_size not in GROUP_SIZES:
            allowed = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"group_size={self.group_size} is not supported; allowed: {allowed}")
        if width % self.group_size:
            raise ValueError(f"output width {width} is not a multiple of group_size={self.group_size}")
        check_choice("scale_layout", self.layout, LAYOUTS)
        if self.layout == "packed" and not self.ue8m0:
            raise ValueError("use_ue8m0=False with scale_layout='packed'; allowed: True")
        if self.layout == "packed" and self.group_size != 128:
            raise ValueError(f"group_size={self.group_size} with scale_layout='packed'; allowed: 128")

    def empty(self, x: torch.Tensor, rows: int, width: int) -> torch.Tensor:
        """Uninitialised scales for rows of `width` numbers on x's device; zeros where not all bytes are a group's."""
        groups = width // self.group_size
        if self.layout == "row":
            return x.new_empty((rows, groups), dtype=torch.float32)
        if self.layout == "packed":
            # the other way in which vLLM rounds up: see `padded_rows`
            words, stride = -(-groups // PACKED), (rows + TMA_ALIGNMENT - 1) // TMA_ALIGNMENT * TMA_ALIGNMENT
            make = x.new_zeros if groups % PACKED else x.new_empty
            if groups % PACKED:
                watch.note_other_work()
            return make((words, stride), dtype=torch.int32).as_strided((rows, words), (1, stride))
        stride = padded_rows(rows) if self.layout == "tma" else rows
        storage = x.new_empty((groups, stride), dtype=torch.float32)
        # as_strided, not slicing: with one group or row, a slice's strides need not say where the next one would start
        return storage.as_strided((rows, groups), (1, stride))


def padded_rows(rows: int) -> int:
    # Rounded up in the way that vLLM does it: with a symbolic number of rows, torch cannot tell that (rows + 3) // 4 * 4
    # is the same, and would take the two strides for different ones.
    return -(rows // -TMA_ALIGNMENT) * TMA_ALIGNMENT


def zero_scale_padding(scales: torch.Tensor) -> None:
    """Zero the storage between the columns of TMA-aligned scales, packed or not."""
    rows, groups = scales.shape
    stride = scales.stride(1)
    if rows < stride == padded_rows(rows):
        scales.as_strided((stride - rows, groups), (1, stride), scales.storage_offset() + rows).zero_()


def ue8m0(scale: torch.Tensor) -> torch.Tensor:
    """Round positive fp32 scales up to powers of two (UE8M0's value set, kept in fp32)."""
    return torch.exp2(torch.ceil(torch.log2(scale)))


def packed_exponents(scale: torch.Tensor) -> torch.Tensor:
    """The exponents of fp32 scales [rows, groups], four in an int32, the first in the lowest byte: [rows, groups / 4]."""
    rows, groups = scale.shape
    exponents = torch.nn.functional.pad((scale.view(torch.int32) >> 23) & 0xFF, (0, -groups % PACKED))
    return exponents.to(torch.uint8).view(rows, -(-groups // PACKED), PACKED).view(torch.int32).squeeze(-1)


def _ignoring_nan_max(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), x.new_zeros(()), x).amax(dim=-1, keepdim=True)


def _nudged(x: torch.Tensor, top: torch.Tensor, off: tuple[tuple[int, ...], tuple[int, ...]]) -> torch.Tensor:
    """x one unit in the last place up or down, where fast math is so far off IEEE for a bf16 maximum `top`."""
    bits = [[(word >> bit) & 1 for word in words for bit in range(32)] for words in off]
    table = torch.tensor(bits[0], device=x.device, dtype=torch.int32) - torch.tensor(bits[1], device=x.device)
    steps = table[((top.view(torch.int32) >> 16) & 0x7F).long()].to(torch.int32)
    return torch.where(x.isfinite() & (x != 0), (x.view(torch.int32) + steps).view(torch.float32), x)


def _flashinfers_scale(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and scale of each group, with what fast math makes of subnormals and huge numbers: nothing."""
    top = _ignoring_nan_max(groups.abs())
    factor = _nudged(top.new_full((), FP8_MAX) / torch.where(top < FP32_TINY, 0.0, top), top, FAST_448_OVER)
    factor = torch.where(top == 0, 1.0, torch.where(top > 2.0**126, 0.0, factor))
    scale = torch.where(top == 0, 1.0, _nudged(factor.reciprocal(), top, FAST_RECIPROCAL))
    return factor, torch.where(factor > 2.0**126, 0.0, scale)


@stands_for_an_op
def group_fp8_quant_reference(
    y: torch.Tensor, how: GroupScales, quant_rounding: str, fp8: str = OCP
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, K] of any float dtype -> codes [M, K] in the format `fp8` and scales as `how` says, in plain torch.

    Mirrors vLLM's `per_token_group_fp8_quant` and `per_token_group_fp8_quant_packed` (custom_op, reciprocal) and
    `QuantFP8._quantize_group_native` (native, native_floored). The former's floor is that of a group's maximum, EPS; the
    latter's that of its scale, the format's `min_scale`.
    """
    rows, width = y.shape
    maximum, min_scale = FORMATS[fp8].max, FORMATS[fp8].min_scale
    groups = y.float().view(rows, width // how.group_size, how.group_size)
    rounding, use_ue8m0 = of_rows(rows, quant_rounding, how.ue8m0)
    if rounding == FLASHINFER:
        factor, scale = _flashinfers_scale(groups)
        codes = torch.where(groups.abs() < FP32_TINY, groups * 0.0, groups) * factor  # -0 stays -0
    elif rounding == AITER:
        scale = _ignoring_nan_max(groups.abs()).clamp(min=EPS) * groups.new_full((), 1.0 / maximum)
        codes = (groups * scale.reciprocal()).nan_to_num(nan=-maximum, posinf=maximum, neginf=-maximum)
    elif is_native(rounding):
        scale = groups.abs().amax(dim=-1, keepdim=True) / maximum  # on CUDA, as in Inductor, times the reciprocal
        if rounding == "native_floored":
            scale = scale.clamp(min=min_scale)
        if use_ue8m0:
            scale = ue8m0(scale)
        if rounding == "native":
            scale = scale.clamp(min=min_scale)
        codes = groups / scale
    else:
        # A tensor as divisor: on CUDA, torch multiplies by the reciprocal of a Python number instead of dividing.
        scale = _ignoring_nan_max(groups.abs()).clamp(min=EPS) / groups.new_full((), maximum)
        if use_ue8m0:
            scale = ue8m0(scale.clamp(min=UE8M0_MIN_SCALE))
        codes = groups * scale.reciprocal() if rounding == "reciprocal" else groups / scale
        codes = codes.nan_to_num(nan=-maximum, posinf=maximum, neginf=-maximum)
    codes = codes.clamp(-maximum, maximum).to(FORMATS[fp8].dtype).view(rows, width)
    scales = how.empty(y, rows, width)
    scales.copy_(packed_exponents(scale.squeeze(-1)) if how.layout == "packed" else scale.squeeze(-1))
    zero_scale_padding(scales)
    return codes, scales


@stands_for_an_op
def static_fp8_quant_reference(
    y: torch.Tensor, scale: torch.Tensor, quant_rounding: str, fp8: str = OCP
) -> torch.Tensor:
    """y [..., K] and one fp32 scale -> codes in the format `fp8`, in plain torch.

    Mirrors vLLM's `static_scaled_fp8_quant` (custom_op) and `QuantFP8.forward_native` (native): both multiply by the
    reciprocal, rounded once.
    """
    q, maximum = y.float() * scale.float().reshape(()).reciprocal(), FORMATS[fp8].max
    if quant_rounding == "custom_op":
        q = q.nan_to_num(nan=maximum, posinf=maximum, neginf=-maximum)
    return q.clamp(-maximum, maximum).to(FORMATS[fp8].dtype)


def empty_token_scales(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised fp32 scales [M, 1] of x [M, ...], on its device."""
    return x.new_empty((x.shape[0], 1), dtype=torch.float32)


@stands_for_an_op
def token_fp8_quant_reference(
    y: torch.Tensor,
    scale_ub: torch.Tensor | None,
    quant_rounding: str,
    fp8: str = OCP,
    *,
    codes_of: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, K] of any float dtype -> codes [M, K] in the format `fp8` and scales [M, 1] fp32, in plain torch.

    codes_of: [M, K], y as it is stored, if codes are made of that and only the scales of y.

    Mirrors vLLM's `dynamic_per_token_scaled_fp8_quant` (custom_op), which divides each number by its row's scale, and
    `QuantFP8.forward_native` (native), which multiplies by the scale's rounded reciprocal. In both, `scale_ub` limits a
    row's maximum and the format's `min_scale` is the scale's floor. NaN is ignored by custom_op's maximum and has
    +448 as a code.

    Mirrors AITER's `dynamic_per_token_scaled_quant` (aiter), without bound and floor: the scale is a product with the
    largest code's reciprocal, and codes are products with the scale's, which the GPU takes in one instruction to within an
    ulp. A row of zeros has 0 as its scale and the smallest code, as NaN has.
    """
    maximum, min_scale = FORMATS[fp8].max, FORMATS[fp8].min_scale
    magnitude = y.float().abs()
    numbers = (y if codes_of is None else codes_of).float()
    if quant_rounding == "custom_op":
        top = _ignoring_nan_max(magnitude)
        if scale_ub is not None:
            top = torch.fmin(top, scale_ub.reshape(()))
        # a tensor as divisor, as above
        scale = (top / top.new_full((), maximum)).clamp(min=min_scale)
        codes = (numbers / scale).nan_to_num(nan=maximum, posinf=maximum, neginf=-maximum)
    elif quant_rounding == AITER:
        scale = _ignoring_nan_max(magnitude) * magnitude.new_full((), 1.0 / maximum)
        codes = (numbers * scale.reciprocal()).nan_to_num(nan=-maximum, posinf=maximum, neginf=-maximum)
    else:
        top = magnitude.amax(dim=-1, keepdim=True)
        if scale_ub is not None:
            top = torch.minimum(top, scale_ub.reshape(()))
        scale = (top / maximum).clamp(min=min_scale)
        codes = numbers * scale.reciprocal()
    return codes.clamp(-maximum, maximum).to(FORMATS[fp8].dtype), scale
