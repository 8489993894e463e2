# SPDX-License-Identifier: Apache-2.0
"""MLA's two RMSNorms and q's quantiser: what multi-head latent attention runs between its first projection and q's second.

The first projection gives q's latent vector, kv's, and the part of k that gets a rotary embedding, side by side in a row. q
is normed and quantised for a GEMM; kv is normed and goes to the cache as it is. Each is a few KiB a token, so that at decode
sizes two kernels are two launches and little else.

Roundings are those of `ops/rms_norm_quant.py`, and so is the order in which q's squares are added; kv's are spread over as
many threads as q's, which is what Inductor does when it compiles the two norms into one kernel. What is stored of kv is
rounded to its dtype in every form.

On an H200, of 3e8 random numbers a mode (docs/results.md), no byte differs for
native norms before vLLM's quantiser, its default; 0.2 to 0.5 of a million codes do, by one step, for custom_op and eager
norms. Before Inductor's own quantiser scales are an ulp off in one group of eight, and 17 codes of a million one step (0.2
with UE8M0): there Inductor makes other kernels of the two norms.
"""

from __future__ import annotations

import torch

from .quant import (
    FP8_DTYPE,
    GROUP_FORMS,
    check_form,
    check_group_layout,
    empty_group_scales,
    group_fp8_quant_reference,
    is_native,
)
from .registry import register
from .rms_norm_quant import NORM_FORMS, check_rows, check_weight, rms_norm_reference

# kv waits in registers while q is worked on.
MAX_KV_WIDTH = 2048


def mla_dual_rms_norm_group_fp8_quant_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    q_epsilon: float = 1e-6,
    kv_epsilon: float = 1e-6,
    group_size: int = 128,
    column_major_scales: bool = False,
    tma_aligned_scales: bool = False,
    use_ue8m0: bool = False,
    eps: float = 1e-10,
    norm_form: str = "native",
    quant_form: str = "custom_op",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mla_dual_rms_norm_group_fp8_quant` in plain torch, on any device."""
    layout = (group_size, column_major_scales, tma_aligned_scales)
    _check(q, kv, q_weight, kv_weight, *layout, norm_form, quant_form)
    rounded = norm_form != "native" or not is_native(quant_form)
    y, _ = rms_norm_reference(q, q_weight, q_epsilon, norm_form=norm_form, rounded=rounded)
    kv_normed, _ = rms_norm_reference(kv, kv_weight, kv_epsilon, norm_form=norm_form)
    return *group_fp8_quant_reference(y, *layout, use_ue8m0, eps, quant_form), kv_normed


def _check(
    q: torch.Tensor,
    kv: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    group_size: int,
    column_major: bool,
    tma_aligned: bool,
    norm_form: str,
    quant_form: str,
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
    check_form("norm_form", norm_form, NORM_FORMS)
    check_form("quant_form", quant_form, GROUP_FORMS)
    check_weight("q_weight", q_weight, q, norm_form)
    check_weight("kv_weight", kv_weight, kv, norm_form)
    check_group_layout(width, group_size, column_major, tma_aligned)
    return rows, width


def _fake(
    q, kv, q_weight, kv_weight, q_epsilon, kv_epsilon, group_size, column_major_scales, tma_aligned_scales, use_ue8m0,
    eps, norm_form, quant_form,
):  # fmt: skip
    layout = (group_size, column_major_scales, tma_aligned_scales)
    rows, width = _check(q, kv, q_weight, kv_weight, *layout, norm_form, quant_form)
    scales = empty_group_scales(q, rows, width // group_size, column_major_scales, tma_aligned_scales)
    return q.new_empty((rows, width), dtype=FP8_DTYPE), scales, kv.new_empty(kv.shape)


def _cuda(
    q, kv, q_weight, kv_weight, q_epsilon, kv_epsilon, group_size, column_major_scales, tma_aligned_scales, use_ue8m0,
    eps, norm_form, quant_form,
):  # fmt: skip
    from ..kernels.mla_dual_rms_norm_quant import mla_dual_rms_norm_group_fp8_quant as launch

    codes, scales, kv_normed = _fake(
        q, kv, q_weight, kv_weight, q_epsilon, kv_epsilon, group_size, column_major_scales, tma_aligned_scales,
        use_ue8m0, eps, norm_form, quant_form,
    )  # fmt: skip
    launch(
        q, kv, q_weight, kv_weight, codes, scales, kv_normed, q_epsilon, kv_epsilon, group_size, use_ue8m0, eps,
        norm_form, quant_form,
    )  # fmt: skip
    return codes, scales, kv_normed


_DUAL = register(
    "mla_dual_rms_norm_group_fp8_quant(Tensor q, Tensor kv, Tensor q_weight, Tensor kv_weight, float q_epsilon, "
    "float kv_epsilon, int group_size, bool column_major_scales, bool tma_aligned_scales, bool use_ue8m0, float eps, "
    "str norm_form, str quant_form) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    cuda=_cuda,
    cpu=mla_dual_rms_norm_group_fp8_quant_reference,
    per_row=("q", "kv"),
)


def mla_dual_rms_norm_group_fp8_quant(
    q: torch.Tensor,
    kv: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    q_epsilon: float = 1e-6,
    kv_epsilon: float = 1e-6,
    *,
    group_size: int = 128,
    column_major_scales: bool = False,
    tma_aligned_scales: bool = False,
    use_ue8m0: bool = False,
    eps: float = 1e-10,
    norm_form: str = "native",
    quant_form: str = "custom_op",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm of q, quantised to FP8 in groups of `group_size` along each row, and RMSNorm of kv, in one kernel.

    Args:
        q: [M, Hq] bf16 or fp16; rows may be strided, columns not. M may be 0; Hq is at most 32768.
        kv: [M, Hkv] in q's dtype, Hkv at most 2048; rows may be strided, columns not. q and kv may be views of one tensor.
        q_weight, kv_weight: [Hq] and [Hkv] bf16, fp16 or fp32, contiguous. q's dtype with norm_form custom_op.
        q_epsilon, kv_epsilon: added to the mean of squares.
        group_size: 64 or 128; divides Hq.
        column_major_scales: scales with strides (1, M) instead of (Hq / group_size, 1).
        tma_aligned_scales: with column_major_scales, strides (1, M rounded up to 4); the padding is zero.
        use_ue8m0: round each scale up to a power of two.
        eps: floor of a group's maximum (quant_form custom_op and reciprocal).
        norm_form, quant_form: which of vLLM's roundings to reproduce; see `ops/rms_norm_quant.py`.

    Returns:
        q_codes [M, Hq] float8_e4m3fn, q_scales [M, Hq / group_size] fp32 in the layout asked for, and kv_normed [M, Hkv] in
        kv's dtype. All are new tensors; all but the scales are contiguous.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `rms_norm` followed by `per_token_group_fp8_quant` for q, and its `rms_norm` for kv.
    """
    return _DUAL(
        q, kv, q_weight, kv_weight, q_epsilon, kv_epsilon, group_size, column_major_scales, tma_aligned_scales,
        use_ue8m0, eps, norm_form, quant_form,
    )  # fmt: skip
