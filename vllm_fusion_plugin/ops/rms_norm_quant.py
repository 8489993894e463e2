# SPDX-License-Identifier: Apache-2.0
"""RMSNorm, then quantise: what runs before the first GEMM of attention and of an MLP, mostly with the residual's addition.

    s = x, or x + residual; each of the two may itself be a sum
    y = s * rsqrt(mean(s²) + epsilon) * w          w = weight, or weight + 1 in fp32 (`gemma_weight`)

vLLM has more than one RMSNorm and they round differently; `norm_form` says which one a fused op stands in for:

`native`
    The torch code of `vllm_ir.rms_norm` and `vllm_ir.fused_add_rms_norm` as Inductor compiles it (vLLM's default): fp32
    throughout. residual_out is s rounded to x's dtype, but s itself goes on unrounded. y is rounded to x's dtype where
    Inductor stores it, that is before an opaque quantiser (`quant_form="custom_op"`), and not at all before a native
    quantiser, which Inductor puts into the same loop.
`eager`
    The same code run eagerly, or by Inductor under `emulate_precision_casts`: s * rsqrt(...) is rounded to weight's dtype,
    its product with weight too, and y to x's dtype. (With `gemma_weight`, w is fp32 and only y is rounded.)
`custom_op`
    vLLM's CUDA ops `rms_norm` and `fused_add_rms_norm`: s is rounded to x's dtype before anything else, y once at the end.
    They take weights of x's dtype only.

How exact: given the sum of squares, every form has the bits of what it stands in for, and so have residual_out, the scales
and the codes. The sum depends on the order of additions. Here that order is a function of the width alone, so that a row's
bytes do not depend on the batch it is in.

- native: Inductor's order, chunk by chunk and thread by thread. It has one up to 2048 columns and before a native group
  quantiser. Otherwise Inductor times two or three kernels that add in different orders and keeps the fastest:
  `kernels/rms_norm_quant.row_tile` says which is assumed. On an H200 that was the one chosen at 4096 columns, compilation
  after compilation; at 7168 each of the three was chosen once. Exceptions are known, for which there is `sum_columns`: a
  norm that Inductor puts into the kernel of an embedding, its `deterministic`, which times nothing (2048), and kernels with
  many loads (1024; what 0 takes where both x and residual are sums).
- eager: torch's own reduction has yet another order.
- custom_op: the CUDA ops add in one order below 256 tokens and in another from there on, and cannot both be met.

Where the orders differ, rsqrt(...) can be an ulp of fp32 off, and y another 16-bit number where it was next to a rounding
boundary. On an H200, over 6e8 random numbers a mode (docs/results.md): native, 0.03 to 1.6
of a million codes differ, custom_op and eager 0.2 to 0.5, by one step. With UE8M0 a scale next to a power of two can then be
another one, which moves its group's codes by 8 steps: one group of 5 million before custom_op, none before native.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .quant import (
    FORMS,
    FP8_DTYPE,
    GROUP_FORMS,
    INPUT_DTYPES,
    check_form,
    check_group_layout,
    empty_group_scales,
    group_fp8_quant_reference,
    is_native,
    static_fp8_quant_reference,
    token_fp8_quant_reference,
)
from .registry import register

# The end of the ops' schemas; see Addends.
ADDENDS = "Tensor? x_addend=None, float x_addend_scale=1.0, Tensor? residual_addend=None"
ADDENDS += ", bool keep_sum=True, int sum_columns=0, bool fp32_sum=False"
ROW_ARGUMENTS = ("x", "residual", "x_addend", "residual_addend")
NORM_FORMS = ("native", "eager", "custom_op")
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SUM_COLUMNS = (0, 1024, 2048)
# A whole row is kept in registers.
MAX_WIDTH = 32768


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


def check_weight(name: str, weight: torch.Tensor, x: torch.Tensor, norm_form: str) -> None:
    """Raises ValueError on a weight that does not fit its input x [M, H]."""
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} has dtype {weight.dtype}; allowed: {', '.join(map(str, WEIGHT_DTYPES))}")
    if weight.dim() != 1 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; allowed: ({x.shape[1]},), a number for each column")
    if weight.stride(0) != 1:
        raise ValueError(f"{name} has stride {weight.stride(0)}; allowed: 1")
    if weight.device != x.device:
        raise ValueError(f"{name} is on {weight.device}; allowed: the input's device, {x.device}")
    if norm_form == "custom_op" and weight.dtype != x.dtype:
        raise ValueError(f"{name} has dtype {weight.dtype}; allowed with norm_form='custom_op': the input's, {x.dtype}")


def _check_like_x(name: str, t: torch.Tensor, x: torch.Tensor, fp32: bool = False) -> None:
    if t.dtype != x.dtype and not (fp32 and t.dtype == torch.float32):
        raise ValueError(f"{name} has dtype {t.dtype}; allowed: x's dtype, {x.dtype}{', or fp32' if fp32 else ''}")
    if t.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; allowed: x's shape, {tuple(x.shape)}")
    if t.stride(1) != 1:
        raise ValueError(f"{name} has stride {t.stride(1)} along its columns; allowed: 1")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}; allowed: x's device, {x.device}")


class Addends(NamedTuple):
    """The ops' last arguments: what else is added up, in which order squares are, and whether and how the sum is wanted."""

    x_addend: torch.Tensor | None = None
    x_addend_scale: float = 1.0
    residual_addend: torch.Tensor | None = None
    keep_sum: bool = True
    sum_columns: int = 0
    fp32_sum: bool = False

    def check(self, x: torch.Tensor, residual: torch.Tensor | None, norm_form: str) -> None:
        for name in ("x_addend", "residual_addend"):
            if (t := getattr(self, name)) is None:
                continue
            if norm_form != "native":
                raise ValueError(
                    f"{name} is given with norm_form={norm_form!r}, which rounds each sum; allowed: native"
                )
            _check_like_x(name, t, x, fp32=name == "residual_addend")
        if self.residual_addend is not None and residual is None:
            raise ValueError("residual_addend is given without a residual to add it to; allowed: with residual")
        if self.x_addend is None and self.x_addend_scale != 1.0:
            raise ValueError(f"x_addend_scale={self.x_addend_scale} without x_addend; allowed: 1.0")
        if self.sum_columns not in SUM_COLUMNS:
            raise ValueError(f"sum_columns={self.sum_columns}; allowed: {', '.join(map(str, SUM_COLUMNS))}")
        if self.fp32_sum and norm_form != "native":
            raise ValueError(f"fp32_sum=True with norm_form={norm_form!r}, which rounds each sum; allowed: native")
        if self.fp32_sum and (residual is None or not self.keep_sum):
            raise ValueError("fp32_sum=True without a sum to return; allowed: with residual and keep_sum")


NO_ADDENDS = Addends()


def _check_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    gemma_weight: bool,
    keep_norm: bool,
    norm_form: str,
    quant_form: str,
    addends: Addends,
    quant_forms: tuple[str, ...] = FORMS,
) -> tuple[int, int]:
    rows, width = check_rows("x", x)
    check_form("norm_form", norm_form, NORM_FORMS)
    check_form("quant_form", quant_form, quant_forms)
    if weight is not None:
        check_weight("weight", weight, x, norm_form)
    if gemma_weight and weight is None:
        raise ValueError("gemma_weight=True needs a weight, to which 1 is added; allowed without: False")
    if gemma_weight and norm_form == "custom_op":
        raise ValueError(
            "gemma_weight=True with norm_form='custom_op', which has no such weight; allowed: native, eager"
        )
    if keep_norm and is_native(quant_form):
        allowed = ", ".join(form for form in quant_forms if not is_native(form))
        raise ValueError(f"keep_norm=True with {quant_form=}, which rounds nothing to keep; allowed: {allowed}")
    if residual is not None:
        _check_like_x("residual", residual, x, fp32=norm_form == "native")
    addends.check(x, residual, norm_form)
    return rows, width


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    residual: torch.Tensor | None = None,
    gemma_weight: bool = False,
    norm_form: str = "native",
    addends: Addends = NO_ADDENDS,
    *,
    rounded: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y of x [M, H] in plain torch, in x's dtype or in fp32 if `rounded` is False, and residual_out if residual is given."""
    s, residual_out = add_residual(x, residual, norm_form, addends)
    # a tensor as divisor: on CUDA, torch multiplies by the reciprocal of a Python number instead of dividing
    mean = s.square().sum(dim=-1, keepdim=True) / s.new_full((), s.shape[-1])
    y = scale_rows(s, torch.rsqrt(mean + epsilon), weight, gemma_weight, norm_form)
    return y.to(x.dtype) if rounded else y, residual_out


def add_residual(
    x: torch.Tensor, residual: torch.Tensor | None, norm_form: str, addends: Addends = NO_ADDENDS
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """s in fp32, and what is stored of it."""
    s = x.float()
    if addends.x_addend is not None:
        # in double, where the product is exact: the GPU multiplies and adds in one instruction, which rounds once
        s = (s.double() + addends.x_addend.double() * addends.x_addend_scale).float()
    if residual is None:
        return s, None
    r = residual.float()
    if addends.residual_addend is not None:
        r = r + addends.residual_addend.float()
    s = s + r
    stored = s if addends.fp32_sum else s.to(x.dtype)
    return stored.float() if norm_form == "custom_op" else s, stored


def scale_rows(
    s: torch.Tensor, inverse_rms: torch.Tensor, weight: torch.Tensor | None, gemma_weight: bool, norm_form: str
) -> torch.Tensor:
    """y in fp32 of s [M, H] and inverse_rms [M, 1], rounded where the form rounds before its end."""
    y = s * inverse_rms
    if weight is None:
        return y
    if gemma_weight:
        return y * (weight.float() + 1.0)
    if norm_form == "eager":
        return (y.to(weight.dtype) * weight).float()
    return y * weight.float()


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    residual: torch.Tensor | None,
    gemma_weight: bool,
    keep_norm: bool,
    norm_form: str,
    quant_form: str,
    addends: Addends,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What is quantised, and the outputs behind codes and scales."""
    rounded = norm_form != "native" or not is_native(quant_form)
    y, residual_out = rms_norm_reference(
        x, weight, epsilon, residual, gemma_weight, norm_form, addends, rounded=rounded
    )
    return y, [y] * keep_norm + ([residual_out] if residual_out is not None and addends.keep_sum else [])


def _empty_extras(
    x: torch.Tensor, residual: torch.Tensor | None, keep_norm: bool, addends: Addends
) -> list[torch.Tensor]:
    total = torch.float32 if addends.fp32_sum else x.dtype
    wanted = [x.dtype] * keep_norm + [total] * (residual is not None and addends.keep_sum)
    return [x.new_empty(x.shape, dtype=dtype) for dtype in wanted]


def _named_extras(
    extras: list[torch.Tensor], residual: torch.Tensor | None, keep_norm: bool, addends: Addends
) -> dict[str, Any]:
    return {
        "normed": extras[0] if keep_norm else None,
        "residual_out": extras[-1] if residual is not None and addends.keep_sum else None,
        "x_addend": addends.x_addend,
        "x_addend_scale": addends.x_addend_scale,
        "residual_addend": addends.residual_addend,
        "sum_columns": addends.sum_columns,
    }


# ---- group FP8 -------------------------------------------------------------------------------------------------------


def rms_norm_group_fp8_quant_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float = 1e-6,
    residual: torch.Tensor | None = None,
    gemma_weight: bool = False,
    keep_norm: bool = False,
    group_size: int = 128,
    column_major_scales: bool = False,
    tma_aligned_scales: bool = False,
    use_ue8m0: bool = False,
    eps: float = 1e-10,
    norm_form: str = "native",
    quant_form: str = "custom_op",
    x_addend: torch.Tensor | None = None,
    x_addend_scale: float = 1.0,
    residual_addend: torch.Tensor | None = None,
    keep_sum: bool = True,
    sum_columns: int = 0,
    fp32_sum: bool = False,
) -> list[torch.Tensor]:
    """`rms_norm_group_fp8_quant` in plain torch, on any device."""
    addends = Addends(x_addend, x_addend_scale, residual_addend, keep_sum, sum_columns, fp32_sum)
    layout = (group_size, column_major_scales, tma_aligned_scales)
    _check_group(x, weight, residual, gemma_weight, keep_norm, *layout, norm_form, quant_form, addends)
    y, extras = _norm(x, weight, epsilon, residual, gemma_weight, keep_norm, norm_form, quant_form, addends)
    return [*group_fp8_quant_reference(y, *layout, use_ue8m0, eps, quant_form), *extras]


def _check_group(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    gemma_weight: bool,
    keep_norm: bool,
    group_size: int,
    column_major: bool,
    tma_aligned: bool,
    norm_form: str,
    quant_form: str,
    addends: Addends,
) -> tuple[int, int]:
    rows, width = _check_norm(x, weight, residual, gemma_weight, keep_norm, norm_form, quant_form, addends, GROUP_FORMS)
    check_group_layout(width, group_size, column_major, tma_aligned)
    return rows, width


def _group_fake(
    x, weight, epsilon, residual, gemma_weight, keep_norm, group_size, column_major_scales, tma_aligned_scales,
    use_ue8m0, eps, norm_form, quant_form, *addends,
):  # fmt: skip
    layout = (group_size, column_major_scales, tma_aligned_scales)
    rows, width = _check_group(
        x, weight, residual, gemma_weight, keep_norm, *layout, norm_form, quant_form, Addends(*addends)
    )
    scales = empty_group_scales(x, rows, width // group_size, column_major_scales, tma_aligned_scales)
    return [
        x.new_empty((rows, width), dtype=FP8_DTYPE),
        scales,
        *_empty_extras(x, residual, keep_norm, Addends(*addends)),
    ]


def _group_cuda(
    x, weight, epsilon, residual, gemma_weight, keep_norm, group_size, column_major_scales, tma_aligned_scales,
    use_ue8m0, eps, norm_form, quant_form, *addends,
):  # fmt: skip
    from ..kernels.rms_norm_quant import rms_norm_group_fp8_quant as launch

    codes, scales, *extras = outputs = _group_fake(
        x, weight, epsilon, residual, gemma_weight, keep_norm, group_size, column_major_scales, tma_aligned_scales,
        use_ue8m0, eps, norm_form, quant_form, *addends,
    )  # fmt: skip
    launch(
        x, weight, residual, codes, scales, epsilon, gemma_weight, group_size, use_ue8m0, eps, norm_form, quant_form,
        **_named_extras(extras, residual, keep_norm, Addends(*addends)),
    )  # fmt: skip
    return outputs


_GROUP = register(
    "rms_norm_group_fp8_quant(Tensor x, Tensor? weight, float epsilon, Tensor? residual, bool gemma_weight, "
    "bool keep_norm, int group_size, bool column_major_scales, bool tma_aligned_scales, bool use_ue8m0, float eps, "
    "str norm_form, str quant_form, " + ADDENDS + ") -> Tensor[]",
    fake=_group_fake,
    cuda=_group_cuda,
    cpu=rms_norm_group_fp8_quant_reference,
    per_row=ROW_ARGUMENTS,
)


def rms_norm_group_fp8_quant(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    gemma_weight: bool = False,
    keep_norm: bool = False,
    group_size: int = 128,
    column_major_scales: bool = False,
    tma_aligned_scales: bool = False,
    use_ue8m0: bool = False,
    eps: float = 1e-10,
    norm_form: str = "native",
    quant_form: str = "custom_op",
    x_addend: torch.Tensor | None = None,
    x_addend_scale: float = 1.0,
    residual_addend: torch.Tensor | None = None,
    keep_sum: bool = True,
    sum_columns: int = 0,
    fp32_sum: bool = False,
) -> list[torch.Tensor]:
    """RMSNorm of x or of x + residual, quantised to FP8 in groups of `group_size` along each row, in one kernel.

    Args:
        x: [M, H] bf16 or fp16; rows may be strided, columns not. M may be 0; H is at most 32768.
        weight: [H] bf16, fp16 or fp32, contiguous; None for none. x's dtype with norm_form custom_op.
        epsilon: added to the mean of squares.
        residual: [M, H] in x's dtype or, with norm_form native, fp32; rows may be strided. Added to x first; not changed.
        gemma_weight: multiply by weight + 1, in fp32. Not with norm_form custom_op.
        keep_norm: return y too. Not with quant_form native.
        x_addend, x_addend_scale, residual_addend: [M, H] in x's dtype (residual_addend or in fp32), rows may be strided, and
            a number. With norm_form native only: x + x_addend * x_addend_scale and residual + residual_addend take the
            places of x and residual, unrounded, as where Inductor compiles these additions together with the norm.
        keep_sum: return residual_out, if residual is given.
        sum_columns: how many columns of a row of more than 2048 have their squares added up at a time, 1024 (also of more
            than 1024), 2048 or, as 0, the order of Inductor's usual kernel. See the module's docstring.
        fp32_sum: residual_out is s as it is. With norm_form native only.
        group_size: 64 or 128; divides H.
        column_major_scales: scales with strides (1, M) instead of (H / group_size, 1).
        tma_aligned_scales: with column_major_scales, strides (1, M rounded up to 4); the padding is zero.
        use_ue8m0: round each scale up to a power of two.
        eps: floor of a group's maximum (quant_form custom_op and reciprocal).
        norm_form, quant_form: which of vLLM's roundings to reproduce; see the module's docstring.

    Returns:
        [codes, scales], then normed if keep_norm, then residual_out if residual is given and keep_sum: codes [M, H]
        float8_e4m3fn, scales [M, H / group_size] fp32 in the layout asked for, normed and residual_out (s, rounded unless
        fp32_sum) [M, H] in x's dtype. All are new tensors; all but the scales are contiguous.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `rms_norm` or `fused_add_rms_norm` followed by `per_token_group_fp8_quant`.
    """
    return _GROUP(
        x, weight, epsilon, residual, gemma_weight, keep_norm, group_size, column_major_scales, tma_aligned_scales,
        use_ue8m0, eps, norm_form, quant_form, x_addend, x_addend_scale, residual_addend, keep_sum, sum_columns, fp32_sum,
    )  # fmt: skip


# ---- FP8 by token ----------------------------------------------------------------------------------------------------


def rms_norm_token_fp8_quant_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float = 1e-6,
    residual: torch.Tensor | None = None,
    gemma_weight: bool = False,
    keep_norm: bool = False,
    scale_ub: torch.Tensor | None = None,
    norm_form: str = "native",
    quant_form: str = "custom_op",
    x_addend: torch.Tensor | None = None,
    x_addend_scale: float = 1.0,
    residual_addend: torch.Tensor | None = None,
    keep_sum: bool = True,
    sum_columns: int = 0,
    fp32_sum: bool = False,
) -> list[torch.Tensor]:
    """`rms_norm_token_fp8_quant` in plain torch, on any device."""
    addends = Addends(x_addend, x_addend_scale, residual_addend, keep_sum, sum_columns, fp32_sum)
    _check_token(x, weight, residual, gemma_weight, keep_norm, scale_ub, norm_form, quant_form, addends)
    y, extras = _norm(x, weight, epsilon, residual, gemma_weight, keep_norm, norm_form, quant_form, addends)
    return [*token_fp8_quant_reference(y, scale_ub, quant_form), *extras]


def _check_scale(name: str, scale: torch.Tensor, x: torch.Tensor) -> None:
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise ValueError(f"{name} is {scale.dtype} of shape {tuple(scale.shape)}; allowed: one float32 value")
    if scale.device != x.device:
        raise ValueError(f"{name} is on {scale.device}; allowed: x's device, {x.device}")


def _check_token(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    gemma_weight: bool,
    keep_norm: bool,
    scale_ub: torch.Tensor | None,
    norm_form: str,
    quant_form: str,
    addends: Addends,
) -> tuple[int, int]:
    rows, width = _check_norm(x, weight, residual, gemma_weight, keep_norm, norm_form, quant_form, addends)
    if scale_ub is not None:
        _check_scale("scale_ub", scale_ub, x)
    return rows, width


def _token_fake(x, weight, epsilon, residual, gemma_weight, keep_norm, scale_ub, norm_form, quant_form, *addends):
    rows, width = _check_token(
        x, weight, residual, gemma_weight, keep_norm, scale_ub, norm_form, quant_form, Addends(*addends)
    )
    scales = x.new_empty((rows, 1), dtype=torch.float32)
    return [
        x.new_empty((rows, width), dtype=FP8_DTYPE),
        scales,
        *_empty_extras(x, residual, keep_norm, Addends(*addends)),
    ]


def _token_cuda(x, weight, epsilon, residual, gemma_weight, keep_norm, scale_ub, norm_form, quant_form, *addends):
    from ..kernels.rms_norm_quant import rms_norm_token_fp8_quant as launch

    codes, scales, *extras = outputs = _token_fake(
        x, weight, epsilon, residual, gemma_weight, keep_norm, scale_ub, norm_form, quant_form, *addends
    )
    launch(
        x, weight, residual, scale_ub, codes, scales, epsilon, gemma_weight, norm_form, quant_form,
        **_named_extras(extras, residual, keep_norm, Addends(*addends)),
    )  # fmt: skip
    return outputs


_TOKEN = register(
    "rms_norm_token_fp8_quant(Tensor x, Tensor? weight, float epsilon, Tensor? residual, bool gemma_weight, "
    "bool keep_norm, Tensor? scale_ub, str norm_form, str quant_form, " + ADDENDS + ") -> Tensor[]",
    fake=_token_fake,
    cuda=_token_cuda,
    cpu=rms_norm_token_fp8_quant_reference,
    per_row=ROW_ARGUMENTS,
)


def rms_norm_token_fp8_quant(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    gemma_weight: bool = False,
    keep_norm: bool = False,
    scale_ub: torch.Tensor | None = None,
    norm_form: str = "native",
    quant_form: str = "custom_op",
    x_addend: torch.Tensor | None = None,
    x_addend_scale: float = 1.0,
    residual_addend: torch.Tensor | None = None,
    keep_sum: bool = True,
    sum_columns: int = 0,
    fp32_sum: bool = False,
) -> list[torch.Tensor]:
    """RMSNorm of x or of x + residual, quantised to FP8 with one scale a row, in one kernel.

    Args:
        x, weight, epsilon, residual, gemma_weight, keep_norm, norm_form, quant_form, x_addend, x_addend_scale,
            residual_addend, keep_sum, sum_columns, fp32_sum: as in `rms_norm_group_fp8_quant`; H is any number from 1 on.
        scale_ub: one float32 value on x's device that limits a row's maximum; None for no limit.

    Returns:
        [codes, scales], then normed if keep_norm, then residual_out if residual is given and keep_sum: codes [M, H]
        float8_e4m3fn, scales [M, 1] fp32, normed and residual_out (s, rounded) [M, H] in x's dtype, all new and contiguous.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `rms_norm` or `fused_add_rms_norm` followed by `dynamic_per_token_scaled_fp8_quant`.
    """
    return _TOKEN(
        x, weight, epsilon, residual, gemma_weight, keep_norm, scale_ub, norm_form, quant_form,
        x_addend, x_addend_scale, residual_addend, keep_sum, sum_columns, fp32_sum,
    )  # fmt: skip


# ---- static FP8 ------------------------------------------------------------------------------------------------------


def rms_norm_static_fp8_quant_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    residual: torch.Tensor | None,
    gemma_weight: bool,
    keep_norm: bool,
    scale: torch.Tensor,
    norm_form: str = "native",
    quant_form: str = "custom_op",
    x_addend: torch.Tensor | None = None,
    x_addend_scale: float = 1.0,
    residual_addend: torch.Tensor | None = None,
    keep_sum: bool = True,
    sum_columns: int = 0,
    fp32_sum: bool = False,
) -> list[torch.Tensor]:
    """`rms_norm_static_fp8_quant` in plain torch, on any device."""
    addends = Addends(x_addend, x_addend_scale, residual_addend, keep_sum, sum_columns, fp32_sum)
    _check_static(x, weight, residual, gemma_weight, keep_norm, scale, norm_form, quant_form, addends)
    y, extras = _norm(x, weight, epsilon, residual, gemma_weight, keep_norm, norm_form, quant_form, addends)
    return [static_fp8_quant_reference(y, scale, quant_form), *extras]


def _check_static(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    gemma_weight: bool,
    keep_norm: bool,
    scale: torch.Tensor,
    norm_form: str,
    quant_form: str,
    addends: Addends,
) -> tuple[int, int]:
    rows, width = _check_norm(x, weight, residual, gemma_weight, keep_norm, norm_form, quant_form, addends)
    _check_scale("scale", scale, x)
    return rows, width


def _static_fake(x, weight, epsilon, residual, gemma_weight, keep_norm, scale, norm_form, quant_form, *addends):
    rows, width = _check_static(
        x, weight, residual, gemma_weight, keep_norm, scale, norm_form, quant_form, Addends(*addends)
    )
    return [x.new_empty((rows, width), dtype=FP8_DTYPE), *_empty_extras(x, residual, keep_norm, Addends(*addends))]


def _static_cuda(x, weight, epsilon, residual, gemma_weight, keep_norm, scale, norm_form, quant_form, *addends):
    from ..kernels.rms_norm_quant import rms_norm_static_fp8_quant as launch

    codes, *extras = outputs = _static_fake(
        x, weight, epsilon, residual, gemma_weight, keep_norm, scale, norm_form, quant_form, *addends
    )
    launch(
        x, weight, residual, scale, codes, epsilon, gemma_weight, norm_form, quant_form,
        **_named_extras(extras, residual, keep_norm, Addends(*addends)),
    )  # fmt: skip
    return outputs


_STATIC = register(
    "rms_norm_static_fp8_quant(Tensor x, Tensor? weight, float epsilon, Tensor? residual, bool gemma_weight, "
    "bool keep_norm, Tensor scale, str norm_form, str quant_form, " + ADDENDS + ") -> Tensor[]",
    fake=_static_fake,
    cuda=_static_cuda,
    cpu=rms_norm_static_fp8_quant_reference,
    per_row=ROW_ARGUMENTS,
)


def rms_norm_static_fp8_quant(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    epsilon: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    gemma_weight: bool = False,
    keep_norm: bool = False,
    norm_form: str = "native",
    quant_form: str = "custom_op",
    x_addend: torch.Tensor | None = None,
    x_addend_scale: float = 1.0,
    residual_addend: torch.Tensor | None = None,
    keep_sum: bool = True,
    sum_columns: int = 0,
    fp32_sum: bool = False,
) -> list[torch.Tensor]:
    """RMSNorm of x or of x + residual, quantised to FP8 with one given scale, in one kernel.

    Args:
        x, weight, epsilon, residual, gemma_weight, keep_norm, norm_form, quant_form, x_addend, x_addend_scale,
            residual_addend, keep_sum, sum_columns, fp32_sum: as in `rms_norm_group_fp8_quant`; H is any number from 1 on.
        scale: one float32 value on x's device; codes are y / scale, by way of the rounded reciprocal as in vLLM.

    Returns:
        [codes], then normed if keep_norm, then residual_out if residual is given and keep_sum: codes [M, H]
        float8_e4m3fn, normed and residual_out (s, rounded) [M, H] in x's dtype, all new and contiguous.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `rms_norm` or `fused_add_rms_norm` followed by `static_scaled_fp8_quant`.
    """
    return _STATIC(
        x, weight, epsilon, residual, gemma_weight, keep_norm, scale, norm_form, quant_form,
        x_addend, x_addend_scale, residual_addend, keep_sum, sum_columns, fp32_sum,
    )  # fmt: skip
