# SPDX-License-Identifier: Apache-2.0
"""RMSNorm, then quantise: what runs before the first GEMM of attention and of an MLP, mostly with the residual's addition.

    s = x, or x + residual; each of the two may itself be a sum
    y = s * rsqrt(mean(s²) + epsilon) * w          w = weight, or weight + 1 in fp32 (`gemma_weight`)

vLLM has more than one RMSNorm and they round differently; `norm_rounding` says which one a fused op stands in for:

`native`
    The torch code of `vllm_ir.rms_norm` and `vllm_ir.fused_add_rms_norm` as Inductor compiles it (vLLM's default): fp32
    throughout. residual_out is s rounded to x's dtype, but s itself goes on unrounded. y is rounded to x's dtype where
    Inductor stores it: before an opaque quantiser (`quant_rounding="custom_op"`), and not before a native quantiser, which
    Inductor puts into the same loop. But what takes more than four tensors to compute and is used twice, as a group or
    token quantiser uses y, it stores as well: y of three addends and a weight. A token's scale, in the loop that stores y,
    is still that of y unrounded.
`eager`
    The same code run eagerly, or by Inductor under `emulate_precision_casts`: s * rsqrt(...) is rounded to weight's dtype,
    its product with weight too, and y to x's dtype. (With `gemma_weight`, w is fp32 and only y is rounded.)
`custom_op`
    vLLM's CUDA ops `rms_norm` and `fused_add_rms_norm`: s is rounded to x's dtype before anything else, y once at the end.
    They take weights of x's dtype only.

How exact: given the sum of squares, every rounding has the bits of what it stands in for, and so have residual_out, the
scales and the codes. The sum depends on the order of additions. Here that order is a function of the width alone, so that
a row's bytes do not depend on the batch it is in.

- native: Inductor's order, chunk by chunk and thread by thread. It has one up to 2048 columns and before a native group
  quantiser. Otherwise Inductor times two or three kernels that add in different orders and keeps the fastest:
  `kernels/row_order.row_tile` says which is assumed. On an H200 that was the one chosen at 4096 columns, compilation
  after compilation; at 7168 each of the three was chosen once. Exceptions are known, for which there is `sum_columns`: a
  norm that Inductor puts into the kernel of an embedding, its `deterministic`, which times nothing (2048), and kernels with
  many loads (1024; what 0 takes where both x and residual are sums).
- eager: torch's own reduction has yet another order.
- custom_op: the CUDA ops add in one order below 256 tokens and in another from there on, and cannot both be met.

Where the orders differ, rsqrt(...) can be an ulp of fp32 off, and y another 16-bit number where it was next to a rounding
boundary. Over 6e8 random numbers a mode, on an H200 and an H100 (docs/results.md): native, none to 4
of a million codes differ, custom_op and eager 0.2 to 0.5, by one step. With UE8M0 a scale next to a power of two can then be
another one, which moves its group's codes by 8 steps: one group of 5 million after custom_op, none after native.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..kernels.fp8 import FORMATS, OCP
from .quant import (
    FP8,
    GROUP_ROUNDINGS,
    INPUT_DTYPES,
    MAX_WIDTH,
    ROUNDINGS,
    SCALES,
    TOKEN_ROUNDINGS,
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

ROW_ARGUMENTS = ("x", "residual", "x_addend", "residual_addend")
NORM_ROUNDINGS = ("native", "eager", "custom_op")
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SUM_COLUMNS = (0, 1024, 2048)
# Inductor's `config.realize_reads_threshold`: what reads more tensors and is used more than once, it stores.
MOST_READS = 4

# NormInputs in a schema, in front of what the quantiser needs.
NORM = (
    "Tensor x, Tensor? weight, float epsilon, Tensor? residual, bool gemma_weight, bool keep_norm, str norm_rounding, "
    "Tensor? x_addend, float x_addend_scale, Tensor? residual_addend, bool keep_sum, int sum_columns, bool fp32_sum"
)


class NormInputs(NamedTuple):
    """What a norm is computed from, and what of it is returned. The ops' schemas have the fields one after another (NORM).

    x: [M, H] bf16 or fp16; rows may be strided, columns not. M may be 0; H is at most 32768.
    weight: [H] bf16, fp16 or fp32, contiguous; None for none. x's dtype with norm_rounding custom_op.
    epsilon: added to the mean of squares.
    residual: [M, H] in x's dtype or, with norm_rounding native, fp32; rows may be strided. Added to x first; not changed.
    gemma_weight: multiply by weight + 1, in fp32. Not with norm_rounding custom_op.
    keep_norm: return y too. Not with quant_rounding native.
    norm_rounding: which of vLLM's norms to reproduce; see the module's docstring.
    x_addend, x_addend_scale, residual_addend: [M, H] in x's dtype (residual_addend or in fp32), rows may be strided, and a
        number. With norm_rounding native only: x + x_addend * x_addend_scale and residual + residual_addend take the places
        of x and residual, unrounded, as where Inductor compiles these additions together with the norm.
    keep_sum: return residual_out, if residual is given.
    sum_columns: how many columns of a row of more than 2048 have their squares added up at a time, 1024 (also of more than
        1024), 2048 or, as 0, the order of Inductor's usual kernel. See docs/notes/inductor-norms.md.
    fp32_sum: residual_out is s as it is. With norm_rounding native only.
    """

    x: torch.Tensor
    weight: torch.Tensor | None
    epsilon: float = 1e-6
    residual: torch.Tensor | None = None
    gemma_weight: bool = False
    keep_norm: bool = False
    norm_rounding: str = "native"
    x_addend: torch.Tensor | None = None
    x_addend_scale: float = 1.0
    residual_addend: torch.Tensor | None = None
    keep_sum: bool = True
    sum_columns: int = 0
    fp32_sum: bool = False

    def check(self, quant_rounding: str, quant_roundings: tuple[str, ...] = ROUNDINGS) -> None:
        """Raises ValueError on what no kernel takes."""
        x, residual, rounding = self.x, self.residual, self.norm_rounding
        check_rows("x", x)
        check_choice("norm_rounding", rounding, NORM_ROUNDINGS)
        check_choice("quant_rounding", quant_rounding, quant_roundings)
        if self.weight is not None:
            check_weight("weight", self.weight, x, rounding)
        if self.gemma_weight and self.weight is None:
            raise ValueError("gemma_weight=True needs a weight, to which 1 is added; allowed without: False")
        if self.gemma_weight and rounding == "custom_op":
            raise ValueError(
                "gemma_weight=True with norm_rounding='custom_op', which has no such weight; allowed: native, eager"
            )
        if self.keep_norm and is_native(quant_rounding):
            allowed = ", ".join(name for name in quant_roundings if not is_native(name))
            raise ValueError(f"keep_norm=True with {quant_rounding=}, which rounds nothing to keep; allowed: {allowed}")
        if residual is not None:
            _check_like_x("residual", residual, x, fp32=rounding == "native")
        self._check_addends()
        if self.sum_columns not in SUM_COLUMNS:
            raise ValueError(f"sum_columns={self.sum_columns}; allowed: {', '.join(map(str, SUM_COLUMNS))}")
        if self.fp32_sum and rounding != "native":
            raise ValueError(f"fp32_sum=True with norm_rounding={rounding!r}, which rounds each sum; allowed: native")
        if self.fp32_sum and (residual is None or not self.keep_sum):
            raise ValueError("fp32_sum=True without a sum to return; allowed: with residual and keep_sum")

    def _check_addends(self) -> None:
        for name in ("x_addend", "residual_addend"):
            if (t := getattr(self, name)) is None:
                continue
            if (rounding := self.norm_rounding) != "native":
                raise ValueError(
                    f"{name} is given with norm_rounding={rounding!r}, which rounds each sum; allowed: native"
                )
            _check_like_x(name, t, self.x, fp32=name == "residual_addend")
        if self.residual_addend is not None and self.residual is None:
            raise ValueError("residual_addend is given without a residual to add it to; allowed: with residual")
        if self.x_addend is None and self.x_addend_scale != 1.0:
            raise ValueError(f"x_addend_scale={self.x_addend_scale} without x_addend; allowed: 1.0")

    @property
    def stored(self) -> bool:
        """Whether Inductor stores y, rounded, before a native quantiser that uses it twice, a group's or a token's. What it
        counts are addends, the weight and the sum of squares."""
        read = (self.x, self.residual, self.x_addend, self.residual_addend, self.weight)
        return self.norm_rounding == "native" and sum(t is not None for t in read) + 1 > MOST_READS

    def empty_codes(self, fp8: str = OCP) -> torch.Tensor:
        return self.x.new_empty(self.x.shape, dtype=FORMATS[fp8].dtype)

    def empty_extras(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Uninitialised normed and residual_out [M, H], None where they are not returned."""
        normed = self.x.new_empty(self.x.shape) if self.keep_norm else None
        if self.residual is None or not self.keep_sum:
            return normed, None
        return normed, self.x.new_empty(self.x.shape, dtype=torch.float32 if self.fp32_sum else self.x.dtype)


def _given(*outputs: torch.Tensor | None) -> list[torch.Tensor]:
    return [output for output in outputs if output is not None]


def check_rows(name: str, x: torch.Tensor) -> tuple[int, int]:
    """Rows and width of x [M, H]; ValueError on what no kernel takes."""
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
    if x.dim() != 2:
        raise ValueError(f"{name} has {x.dim()} dimensions, shape {tuple(x.shape)}; allowed: 2, [tokens, width]")
    rows, width = x.shape
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"{name} has {width} columns; allowed: 1 to {MAX_WIDTH}")
    if x.stride(1) != 1:
        raise ValueError(
            f"{name} has stride {x.stride(1)} along its columns; allowed: 1 (rows themselves may be strided)"
        )
    return rows, width


def check_weight(name: str, weight: torch.Tensor, x: torch.Tensor, norm_rounding: str) -> None:
    """Raises ValueError on a weight that does not fit its input x [M, H]."""
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} has dtype {weight.dtype}; allowed: {', '.join(map(str, WEIGHT_DTYPES))}")
    if weight.dim() != 1 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; allowed: ({x.shape[1]},), a number for each column")
    if weight.stride(0) != 1:
        raise ValueError(f"{name} has stride {weight.stride(0)}; allowed: 1")
    if weight.device != x.device:
        raise ValueError(f"{name} is on {weight.device}; allowed: the input's device, {x.device}")
    if norm_rounding == "custom_op" and weight.dtype != x.dtype:
        raise ValueError(
            f"{name} has dtype {weight.dtype}; allowed with norm_rounding='custom_op': the input's, {x.dtype}"
        )


def _check_like_x(name: str, t: torch.Tensor, x: torch.Tensor, fp32: bool = False) -> None:
    if t.dtype != x.dtype and not (fp32 and t.dtype == torch.float32):
        raise ValueError(f"{name} has dtype {t.dtype}; allowed: x's dtype, {x.dtype}{', or fp32' if fp32 else ''}")
    if t.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; allowed: x's shape, {tuple(x.shape)}")
    if t.stride(1) != 1:
        raise ValueError(f"{name} has stride {t.stride(1)} along its columns; allowed: 1")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}; allowed: x's device, {x.device}")


# ---- references ------------------------------------------------------------------------------------------------------


@stands_for_an_op
def rms_norm_reference(norm: NormInputs, *, rounded: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y of x [M, H] in plain torch, in x's dtype or in fp32 if `rounded` is False, and residual_out if residual is given."""
    s, residual_out = add_residual(norm)
    # a tensor as divisor: on CUDA, torch multiplies by the reciprocal of a Python number instead of dividing
    mean = s.square().sum(dim=-1, keepdim=True) / s.new_full((), s.shape[-1])
    y = scale_rows(norm, s, torch.rsqrt(mean + norm.epsilon))
    return y.to(norm.x.dtype) if rounded else y, residual_out


def add_residual(norm: NormInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """s in fp32, and what is stored of it."""
    s = norm.x.float()
    if norm.x_addend is not None:
        # in double, where the product is exact: the GPU multiplies and adds in one instruction, which rounds once
        s = (s.double() + norm.x_addend.double() * norm.x_addend_scale).float()
    if norm.residual is None:
        return s, None
    r = norm.residual.float()
    if norm.residual_addend is not None:
        r = r + norm.residual_addend.float()
    s = s + r
    stored = s if norm.fp32_sum else s.to(norm.x.dtype)
    return stored.float() if norm.norm_rounding == "custom_op" else s, stored


def scale_rows(norm: NormInputs, s: torch.Tensor, inverse_rms: torch.Tensor) -> torch.Tensor:
    """y in fp32 of s [M, H] and inverse_rms [M, 1], rounded where norm_rounding has it before the end."""
    y = s * inverse_rms
    if norm.weight is None:
        return y
    if norm.gemma_weight:
        return y * (norm.weight.float() + 1.0)
    if norm.norm_rounding == "eager":
        return (y.to(norm.weight.dtype) * norm.weight).float()
    return y * norm.weight.float()


def _apart(arguments: tuple[Any, ...], count: int) -> tuple[NormInputs, tuple[Any, ...], str]:
    """An op's arguments: the norm's, the quantiser's, of which there are `count`, and the format of the codes."""
    end = len(NormInputs._fields)
    (fp8,) = arguments[end + count :] or (OCP,)  # torch leaves out what is the schema's default
    return NormInputs(*arguments[:end]), arguments[end : end + count], fp8


def _norm(norm: NormInputs, quant_rounding: str, stored: bool = False) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What is quantised, and the outputs after codes and scales; stored: y is rounded before a native quantiser too."""
    rounded = norm.norm_rounding != "native" or not is_native(quant_rounding) or stored
    y, residual_out = rms_norm_reference(norm, rounded=rounded)
    return y, _given(y if norm.keep_norm else None, residual_out if norm.keep_sum else None)


# ---- group FP8 -------------------------------------------------------------------------------------------------------


def rms_norm_group_fp8_quant_reference(
    norm: NormInputs, scales: GroupScales = GroupScales(), *, quant_rounding: str = "custom_op", fp8: str = OCP
) -> list[torch.Tensor]:
    """`rms_norm_group_fp8_quant` in plain torch, on any device."""
    _of_group((*norm, *scales, quant_rounding, fp8))
    y, extras = _norm(norm, quant_rounding, norm.stored)
    return [*group_fp8_quant_reference(y, scales, quant_rounding, fp8), *extras]


def _of_group(arguments: tuple[Any, ...]) -> tuple[NormInputs, GroupScales, str, str]:
    """The op's arguments, checked."""
    norm, (*scales, quant_rounding), fp8 = _apart(arguments, 4)
    how = GroupScales(*scales)
    norm.check(quant_rounding, GROUP_ROUNDINGS)
    how.check(norm.x.shape[1])
    check_group_rounding(quant_rounding, norm.x.dtype, how, fp8)
    return norm, how, quant_rounding, fp8


def _group_fake(*arguments: Any) -> list[torch.Tensor]:
    norm, how, _, fp8 = _of_group(arguments)
    return [norm.empty_codes(fp8), how.empty(norm.x, *norm.x.shape), *_given(*norm.empty_extras())]


def _group_cuda(*arguments: Any) -> list[torch.Tensor]:
    from ..kernels.rms_norm_quant import rms_norm_group_fp8_quant as launch

    norm, how, quant_rounding, fp8 = _of_group(arguments)
    codes, scales, extras = norm.empty_codes(fp8), how.empty(norm.x, *norm.x.shape), norm.empty_extras()
    launch(norm, codes, scales, *extras, how.group_size, how.ue8m0, quant_rounding, fp8=fp8)
    return [codes, scales, *_given(*extras)]


def _group_cpu(*arguments: Any) -> list[torch.Tensor]:
    norm, how, quant_rounding, fp8 = _of_group(arguments)
    return rms_norm_group_fp8_quant_reference(norm, how, quant_rounding=quant_rounding, fp8=fp8)


_GROUP = register(
    f"rms_norm_group_fp8_quant({NORM}, {SCALES}, str quant_rounding, {FP8}) -> Tensor[]",
    fake=_group_fake,
    cuda=_group_cuda,
    cpu=_group_cpu,
    per_row=ROW_ARGUMENTS,
)


def rms_norm_group_fp8_quant(
    norm: NormInputs, scales: GroupScales = GroupScales(), *, quant_rounding: str = "custom_op", fp8: str = OCP
) -> list[torch.Tensor]:
    """RMSNorm of x or of x + residual, quantised to FP8 in groups along each row, in one kernel.

    Args:
        norm: see `NormInputs`.
        scales: size of the groups, 64 or 128, which divides H; layout of the scales; whether they are powers of two.
        quant_rounding: which of vLLM's quantisers to reproduce; see ops/quant.py.
        fp8: format of the codes; see kernels/fp8.py.

    Returns:
        [codes, scales], then normed if keep_norm, then residual_out if residual is given and keep_sum: codes [M, H]
        in that format, scales [M, H / group_size] fp32 in the layout asked for, normed and residual_out (s, rounded unless
        fp32_sum) [M, H] in x's dtype. All are new tensors; all but the scales are contiguous.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `rms_norm` or `fused_add_rms_norm` followed by `per_token_group_fp8_quant`.
    """
    return _GROUP(*norm, *scales, quant_rounding, fp8)


# ---- FP8 by token ----------------------------------------------------------------------------------------------------


def _of_token(arguments: tuple[Any, ...]) -> tuple[NormInputs, torch.Tensor | None, str, str]:
    """The op's arguments, checked."""
    norm, (scale_ub, quant_rounding), fp8 = _apart(arguments, 2)
    norm.check(quant_rounding, TOKEN_ROUNDINGS)
    check_token_rounding(quant_rounding, scale_ub, fp8)
    if scale_ub is not None:
        check_number("scale_ub", scale_ub, norm.x)
    return norm, scale_ub, quant_rounding, fp8


def rms_norm_token_fp8_quant_reference(
    norm: NormInputs, scale_ub: torch.Tensor | None = None, *, quant_rounding: str = "custom_op", fp8: str = OCP
) -> list[torch.Tensor]:
    """`rms_norm_token_fp8_quant` in plain torch, on any device."""
    _of_token((*norm, scale_ub, quant_rounding, fp8))
    y, extras = _norm(norm, quant_rounding)
    codes_of = y.to(norm.x.dtype) if norm.stored else y
    return [*token_fp8_quant_reference(y, scale_ub, quant_rounding, fp8, codes_of=codes_of), *extras]


def _token_fake(*arguments: Any) -> list[torch.Tensor]:
    norm, _, _, fp8 = _of_token(arguments)
    return [norm.empty_codes(fp8), empty_token_scales(norm.x), *_given(*norm.empty_extras())]


def _token_cuda(*arguments: Any) -> list[torch.Tensor]:
    from ..kernels.rms_norm_quant import rms_norm_token_fp8_quant as launch

    norm, scale_ub, quant_rounding, fp8 = _of_token(arguments)
    codes, scales, extras = norm.empty_codes(fp8), empty_token_scales(norm.x), norm.empty_extras()
    launch(norm, scale_ub, codes, scales, *extras, quant_rounding, fp8=fp8)
    return [codes, scales, *_given(*extras)]


def _token_cpu(*arguments: Any) -> list[torch.Tensor]:
    norm, scale_ub, quant_rounding, fp8 = _of_token(arguments)
    return rms_norm_token_fp8_quant_reference(norm, scale_ub, quant_rounding=quant_rounding, fp8=fp8)


_TOKEN = register(
    f"rms_norm_token_fp8_quant({NORM}, Tensor? scale_ub, str quant_rounding, {FP8}) -> Tensor[]",
    fake=_token_fake,
    cuda=_token_cuda,
    cpu=_token_cpu,
    per_row=ROW_ARGUMENTS,
)


def rms_norm_token_fp8_quant(
    norm: NormInputs, scale_ub: torch.Tensor | None = None, *, quant_rounding: str = "custom_op", fp8: str = OCP
) -> list[torch.Tensor]:
    """RMSNorm of x or of x + residual, quantised to FP8 with one scale a row, in one kernel.

    Args:
        norm: see `NormInputs`; H is any number from 1 on.
        scale_ub: one float32 value on x's device that limits a row's maximum; None for no limit.
        quant_rounding: which of vLLM's quantisers to reproduce; see ops/quant.py.
        fp8: format of the codes; see kernels/fp8.py.

    Returns:
        [codes, scales], then normed if keep_norm, then residual_out if residual is given and keep_sum: codes [M, H]
        in that format, scales [M, 1] fp32, normed and residual_out (s, rounded unless fp32_sum) [M, H] in x's dtype, all new
        and contiguous.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `rms_norm` or `fused_add_rms_norm` followed by `dynamic_per_token_scaled_fp8_quant`.
    """
    return _TOKEN(*norm, scale_ub, quant_rounding, fp8)


# ---- static FP8 ------------------------------------------------------------------------------------------------------


def _of_static(arguments: tuple[Any, ...]) -> tuple[NormInputs, torch.Tensor, str, str]:
    """The op's arguments, checked."""
    norm, (scale, quant_rounding), fp8 = _apart(arguments, 2)
    norm.check(quant_rounding)
    check_fp8(fp8)
    check_number("scale", scale, norm.x)
    return norm, scale, quant_rounding, fp8


def rms_norm_static_fp8_quant_reference(
    norm: NormInputs, scale: torch.Tensor, *, quant_rounding: str = "custom_op", fp8: str = OCP
) -> list[torch.Tensor]:
    """`rms_norm_static_fp8_quant` in plain torch, on any device."""
    _of_static((*norm, scale, quant_rounding, fp8))
    y, extras = _norm(norm, quant_rounding)
    return [static_fp8_quant_reference(y, scale, quant_rounding, fp8), *extras]


def _static_fake(*arguments: Any) -> list[torch.Tensor]:
    norm, _, _, fp8 = _of_static(arguments)
    return [norm.empty_codes(fp8), *_given(*norm.empty_extras())]


def _static_cuda(*arguments: Any) -> list[torch.Tensor]:
    from ..kernels.rms_norm_quant import rms_norm_static_fp8_quant as launch

    norm, scale, quant_rounding, fp8 = _of_static(arguments)
    codes, extras = norm.empty_codes(fp8), norm.empty_extras()
    launch(norm, scale, codes, *extras, quant_rounding, fp8=fp8)
    return [codes, *_given(*extras)]


def _static_cpu(*arguments: Any) -> list[torch.Tensor]:
    norm, scale, quant_rounding, fp8 = _of_static(arguments)
    return rms_norm_static_fp8_quant_reference(norm, scale, quant_rounding=quant_rounding, fp8=fp8)


_STATIC = register(
    f"rms_norm_static_fp8_quant({NORM}, Tensor scale, str quant_rounding, {FP8}) -> Tensor[]",
    fake=_static_fake,
    cuda=_static_cuda,
    cpu=_static_cpu,
    per_row=ROW_ARGUMENTS,
)


def rms_norm_static_fp8_quant(
    norm: NormInputs, scale: torch.Tensor, *, quant_rounding: str = "custom_op", fp8: str = OCP
) -> list[torch.Tensor]:
    """RMSNorm of x or of x + residual, quantised to FP8 with one given scale, in one kernel.

    Args:
        norm: see `NormInputs`; H is any number from 1 on.
        scale: one float32 value on x's device; codes are y / scale, by way of the rounded reciprocal as in vLLM.
        quant_rounding: which of vLLM's quantisers to reproduce; see ops/quant.py.
        fp8: format of the codes; see kernels/fp8.py.

    Returns:
        [codes], then normed if keep_norm, then residual_out if residual is given and keep_sum: codes [M, H]
        in that format, normed and residual_out (s, rounded unless fp32_sum) [M, H] in x's dtype, all new and contiguous.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `rms_norm` or `fused_add_rms_norm` followed by `static_scaled_fp8_quant`.
    """
    return _STATIC(*norm, scale, quant_rounding, fp8)
