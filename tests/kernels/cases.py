# SPDX-License-Identifier: Apache-2.0
"""What the tests and the benchmarks of SiLU·mul + quantise run on: modes of the op, and inputs.

The caller chooses rows and widths: those of real models are for the GPU, Triton's interpreter gets small ones.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from vllm_fusion_plugin.ops.quant import GroupScales

DTYPES = (torch.bfloat16, torch.float16)
GROUP_SIZES = (64, 128)
ROUNDINGS = ("custom_op", "native")
GROUP_ROUNDINGS = ("custom_op", "reciprocal", "flashinfer", "native", "native_floored")
# What an error says of `quant_rounding`, of a group quantiser.
ALLOWED_OF_GROUPS = (
    "allowed: custom_op, reciprocal, flashinfer, custom_op_or_flashinfer, reciprocal_or_flashinfer, "
    "native, native_floored, aiter"
)
LAYOUTS = ("row", "column", "tma")
PACKED = GroupScales(128, "packed", ue8m0=True)  # what DeepGEMM takes from compute capability 10.0 on
TMA = GroupScales(128, "tma")  # what DeepGEMM takes


class GroupMode(NamedTuple):
    """One combination of what `silu_mul_group_fp8_quant` can be asked for."""

    dtype: torch.dtype
    group_size: int
    scale_layout: str
    use_ue8m0: bool
    act_rounding: str
    quant_rounding: str

    def __str__(self) -> str:
        return f"{short(self.dtype)}-{scales_name(self)}-act_{self.act_rounding}-quant_{self.quant_rounding}"

    @property
    def scales(self) -> GroupScales:
        return GroupScales(self.group_size, self.scale_layout, self.use_ue8m0)

    def arguments(self) -> dict[str, object]:
        return {"scales": self.scales, "act_rounding": self.act_rounding, "quant_rounding": self.quant_rounding}


class StaticMode(NamedTuple):
    """Likewise of `silu_mul_static_fp8_quant`."""

    dtype: torch.dtype
    act_rounding: str
    quant_rounding: str

    def __str__(self) -> str:
        return f"{short(self.dtype)}-act_{self.act_rounding}-quant_{self.quant_rounding}"


TokenMode = StaticMode
"""Likewise of `silu_mul_token_fp8_quant`, which has the same choices."""


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def scales_name(mode: Any) -> str:
    """Of a mode of any group quantiser: its groups, and the layout and type of its scales."""
    return f"{mode.group_size}-{mode.scale_layout}-{'ue8m0' if mode.use_ue8m0 else 'fp32'}"


def allowed(mode: Any) -> bool:
    """Whether ops take such a mode of a group quantiser."""
    takes_packed = mode.use_ue8m0 and mode.group_size == 128 and mode.quant_rounding in ("custom_op", "reciprocal")
    return mode.scale_layout != "packed" or takes_packed


def told_apart(mode: Any) -> bool:
    """Whether a group quantiser's rounding is another than its namesake's: `reciprocal` multiplies where
    custom_op divides by an fp32 scale, and `native_floored` has a floor under a UE8M0 scale. `flashinfer` is for bf16 alone,
    and has no UE8M0 scales."""
    flashinfer = not mode.use_ue8m0 and mode.dtype == torch.bfloat16
    own = {"reciprocal": not mode.use_ue8m0, "native_floored": mode.use_ue8m0, "flashinfer": flashinfer}
    return own.get(mode.quant_rounding, True)


def group_modes(quant_roundings: tuple[str, ...] | None = None) -> list[GroupMode]:
    """quant_roundings None: all, where they differ."""
    switch = (False, True)
    modes = itertools.starmap(
        GroupMode,
        itertools.product(
            DTYPES, GROUP_SIZES, (*LAYOUTS, "packed"), switch, ROUNDINGS, quant_roundings or GROUP_ROUNDINGS
        ),
    )
    return [mode for mode in modes if allowed(mode) and (quant_roundings or told_apart(mode))]


def static_modes(quant_roundings: tuple[str, ...] = ROUNDINGS) -> list[StaticMode]:
    return list(itertools.starmap(StaticMode, itertools.product(DTYPES, ROUNDINGS, quant_roundings)))


def from_bits(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """16-bit patterns, given as integers of any type, as bf16 or fp16 numbers."""
    return bits.to(torch.int32).to(torch.int16).view(dtype)


def all_values(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """All 65536 bf16 or fp16 numbers, in the order of their bit patterns."""
    return from_bits(torch.arange(65536, device=device), dtype)


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """NaN, infinities, both zeros, ends of the subnormal and normal ranges, where exp(-x) overflows, and plain numbers."""
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    positive = [0.0, subnormal, info.smallest_normal, info.eps, 0.5, 1.0, 1.75, 11.0, 17.0, 87.0, 88.5, 104.0, 448.0]
    positive += [info.max, float("inf")]
    values = torch.tensor([*positive, *(-v for v in positive), float("nan")], dtype=torch.float64).to(dtype)
    negative_nan = (values[-1:].view(torch.int16) | -32768).view(dtype)
    return torch.cat([values, negative_nan])


def random_input(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int, kind: str = "normal"
) -> torch.Tensor:
    """x [rows, 2 * width], gate then up.

    kind: "normal", activations whose size varies from row to row and along a row; "bits", every bit pattern equally often;
    "special", a fifth from `special_values`, among numbers near 1.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    shape = (rows, 2 * width)
    if kind == "bits":
        return torch.randint(-32768, 32768, shape, dtype=torch.int16, **options).view(dtype)
    x = torch.randn(shape, dtype=dtype, **options)
    if kind == "special":
        table = special_values(dtype).to(device)
        chosen = table[torch.randint(len(table), shape, **options)]
        return torch.where(torch.rand(shape, **options) < 0.2, chosen, x)
    assert kind == "normal"
    # Powers of two leave every mantissa as likely as before; the range stays inside fp16's.
    exponents = torch.randint(-8, 5, (rows, 1), **options) + torch.randint(-2, 3, (1, 2 * width), **options)
    return x.mul_(torch.exp2(exponents.float()).to(dtype))


def strided(x: torch.Tensor) -> torch.Tensor:
    """x's numbers in rows that lie further apart than they are long, NaN between them."""
    rows, columns = x.shape
    wide = x.new_full((rows, columns + 16), float("nan"))
    wide[:, :columns] = x
    return wide[:, :columns]


def zeros_laid_out_as(t: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """On another device, where a copy of t would be contiguous, strided columns too."""
    return torch.zeros(1024, dtype=t.dtype, device=device).as_strided(t.shape, t.stride())
