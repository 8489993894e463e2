# SPDX-License-Identifier: Apache-2.0
"""MLA's two RMSNorms and q's quantiser: what multi-head latent attention runs between its first projection and q's second.

The first projection gives q's latent vector, kv's, and the part of k that gets a rotary embedding, side by side in a row. q
is normed and quantised for a GEMM; kv is normed and goes to the cache as it is. Each is a few KiB a token, so that at decode
sizes two kernels are two launches and little else.

Roundings are those of `ops/rms_norm_quant.py`, and so is the order in which q's squares are added; kv's are spread over as
many threads as q's, which is what Inductor does when it compiles the two norms into one kernel. What is stored of kv is
rounded to its dtype with every rounding.

On an H200, of 3e8 random numbers a mode (docs/results.md), no byte differs for
native norms before vLLM's quantiser, its default; 0.2 to 0.5 of a million codes do, by one step, for custom_op and eager
norms. Before Inductor's own quantiser scales are an ulp off in one group of eight, and 17 codes of a million one step (0.2
with UE8M0): there Inductor makes other kernels of the two norms.
"""

from __future__ import annotations

import torch

from ..kernels.fp8 import FORMATS, OCP
from .quant import (
    FP8,
    SCALES,
    GroupScales,
    check_choice,
    check_group_rounding,
    group_fp8_quant_reference,
    is_native,
)
from .registry import register
from .rms_norm_quant import NORM_ROUNDINGS, NormInputs, check_rows, check_weight, rms_norm_reference

# kv waits in registers while q is worked on.
MAX_KV_WIDTH = 2048


def mla_dual_rms_norm_group_fp8_quant_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    q_epsilon: float = 1e-6,
    kv_epsilon: float = 1e-6,
    scales: GroupScales = GroupScales(),
    *,
    norm_rounding: str = "native",
    quant_rounding: str = "custom_op",
    fp8: str = OCP,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mla_dual_rms_norm_group_fp8_quant` in plain torch, on any device."""
    _check(q, kv, q_weight, kv_weight, scales, norm_rounding, quant_rounding, fp8)
    rounded = norm_rounding != "native" or not is_native(quant_rounding)
    y, _ = rms_norm_reference(NormInputs(q, q_weight, q_epsilon, norm_rounding=norm_rounding), rounded=rounded)
    kv_normed, _ = rms_norm_reference(NormInputs(kv, kv_weight, kv_epsilon, norm_rounding=norm_rounding))
    return *group_fp8_quant_reference(y, scales, quant_rounding, fp8), kv_normed


def _check(
    q: torch.Tensor,
    kv: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    how: GroupScales,
    norm_rounding: str,
    quant_rounding: str,
    fp8: str,
) -> tuple[int, int]:
    rows, width = check_rows("q", q)
    kv_rows, kv_width = check_rows("kv", kv)
    if kv_rows != rows:
        raise ValueError(f"kv has {kv_rows} rows; allowed: as many as q, {rows}")
    if kv_width > MAX_KV_WIDTH:
        raise ValueError(f"kv has {kv_width} columns; allowed: 1 to {MAX_KV_WIDTH}")
    if kv.dtype != q.dtype:
        raise ValueError(f"kv has dtype {kv.dtype}; allowed: q's dtype, {q.dtype}")
    if kv.device != q.device:
        raise ValueError(f"kv is on {kv.device}; allowed: q's device, {q.device}")
    check_choice("norm_rounding", norm_rounding, NORM_ROUNDINGS)
    check_group_rounding(quant_rounding, q.dtype, how, fp8)
    check_weight("q_weight", q_weight, q, norm_rounding)
    check_weight("kv_weight", kv_weight, kv, norm_rounding)
    how.check(width)
    return rows, width


def _more(
    group_size: int, layout: str, ue8m0: bool, norm_rounding: str, quant_rounding: str, fp8: str = OCP
) -> tuple[GroupScales, str, str, str]:
    """The op's last arguments."""
    return GroupScales(group_size, layout, ue8m0), norm_rounding, quant_rounding, fp8


def _fake(q, kv, q_weight, kv_weight, q_epsilon, kv_epsilon, *more):
    how, norm_rounding, quant_rounding, fp8 = _more(*more)
    rows, width = _check(q, kv, q_weight, kv_weight, how, norm_rounding, quant_rounding, fp8)
    codes = q.new_empty((rows, width), dtype=FORMATS[fp8].dtype)
    return codes, how.empty(q, rows, width), kv.new_empty(kv.shape)


def _cuda(q, kv, q_weight, kv_weight, q_epsilon, kv_epsilon, *more):
    from ..kernels.mla_dual_rms_norm_quant import mla_dual_rms_norm_group_fp8_quant as launch

    codes, scales, kv_normed = _fake(q, kv, q_weight, kv_weight, q_epsilon, kv_epsilon, *more)
    how, norm_rounding, quant_rounding, fp8 = _more(*more)
    launch(
        q, kv, q_weight, kv_weight, codes, scales, kv_normed, q_epsilon, kv_epsilon, how.group_size, how.ue8m0,
        norm_rounding, quant_rounding, fp8=fp8,
    )  # fmt: skip
    return codes, scales, kv_normed


def _cpu(q, kv, q_weight, kv_weight, q_epsilon, kv_epsilon, *more):
    how, norm_rounding, quant_rounding, fp8 = _more(*more)
    roundings = {"norm_rounding": norm_rounding, "quant_rounding": quant_rounding}
    return mla_dual_rms_norm_group_fp8_quant_reference(
        q, kv, q_weight, kv_weight, q_epsilon, kv_epsilon, how, **roundings, fp8=fp8
    )


_DUAL = register(
    "mla_dual_rms_norm_group_fp8_quant(Tensor q, Tensor kv, Tensor q_weight, Tensor kv_weight, float q_epsilon, "
    f"float kv_epsilon, {SCALES}, str norm_rounding, str quant_rounding, {FP8}) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    cuda=_cuda,
    cpu=_cpu,
    per_row=("q", "kv"),
)


def mla_dual_rms_norm_group_fp8_quant(
    q: torch.Tensor,
    kv: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    q_epsilon: float = 1e-6,
    kv_epsilon: float = 1e-6,
    scales: GroupScales = GroupScales(),
    *,
    norm_rounding: str = "native",
    quant_rounding: str = "custom_op",
    fp8: str = OCP,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of q, quantised to FP8 in groups along each row, and RMSNorm of kv, in one kernel.

    Args:
        q: [M, Hq] bf16 or fp16; rows may be strided, columns not. M may be 0; Hq is at most 32768.
        kv: [M, Hkv] in q's dtype, Hkv at most 2048; rows may be strided, columns not. q and kv may be views of one tensor.
        q_weight, kv_weight: [Hq] and [Hkv] bf16, fp16 or fp32, contiguous. q's dtype with norm_rounding custom_op.
        q_epsilon, kv_epsilon: added to the mean of squares.
        scales: size of the groups, 64 or 128, which divides Hq; layout of the scales; whether they are powers of two.
        norm_rounding, quant_rounding: which of vLLM's roundings to reproduce; see `ops/rms_norm_quant.py`.
        fp8: format of the codes; see kernels/fp8.py.

    Returns:
        q_codes [M, Hq] in that format, q_scales [M, Hq / group_size] fp32 in the layout asked for, and kv_normed [M, Hkv] in
        kv's dtype. All are new tensors; all but the scales are contiguous.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `rms_norm` followed by `per_token_group_fp8_quant` for q, and its `rms_norm` for kv.
    """
    return _DUAL(
        q, kv, q_weight, kv_weight, q_epsilon, kv_epsilon, *scales, norm_rounding, quant_rounding, fp8
    )  # fmt: skip
