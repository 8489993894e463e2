# SPDX-License-Identifier: Apache-2.0
"""MLA's value up-projection, then quantise: what runs between attention and the output projection when decoding.

Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) attends to latent vectors of L numbers, and each
head has a matrix that brings its result up to V values: y[m, n] = attn_out[m, n] @ w_uv[n], accumulated in fp32 and rounded
to attn_out's dtype, as a GEMM stores it. Then groups of y are quantised, as by vLLM's CUDA op with one of its roundings.

The op writes into the caller's buffers, since it is called where those are given: inside vLLM's attention op.

Two GEMMs have the same bits only if they add up in the same order. For L = 512 and V = 128 on Hopper they do: tensor cores
take 16 numbers of the contraction at a time, and cuBLAS there goes from the first to the last, as the kernel does. Codes and
scales are then the bytes of vLLM's `bmm` and `per_token_group_fp8_quant` (benchmarks/exactness.py). Another GPU, width or
cuBLAS may split the sum; then y now and then moves to a neighbour in its dtype and a code by a step, with an error no larger
than vLLM's, which the tests with `gpu` hold it to.
"""

from __future__ import annotations

import torch

from ..kernels.fp8 import FORMATS, OCP
from ..kernels.rounding import OPAQUE
from .quant import (
    FP8,
    GROUP_SIZES,
    INPUT_DTYPES,
    GroupScales,
    check_choice,
    check_fp8,
    group_fp8_quant_reference,
    padded_rows,
)
from .registry import register

# Rows of weights start at multiples of 32 bytes; tensor cores take 16 numbers of the contraction at a time.
MULTIPLE = 16


def _check(
    attn_out: torch.Tensor,
    w_uv: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    quant_rounding: str,
    fp8: str,
) -> None:
    """ValueError on what no kernel takes."""
    check_choice("quant_rounding", quant_rounding, OPAQUE)
    check_fp8(fp8)
    if attn_out.dtype not in INPUT_DTYPES:
        raise ValueError(f"attn_out has dtype {attn_out.dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
    if w_uv.dtype != attn_out.dtype:
        raise ValueError(f"w_uv has dtype {w_uv.dtype}; allowed: attn_out's, {attn_out.dtype}")
    if attn_out.dim() != 3:
        raise ValueError(
            f"attn_out has {attn_out.dim()} dimensions, shape {tuple(attn_out.shape)}; allowed: 3, [tokens, heads, L]"
        )
    tokens, heads, depth = attn_out.shape
    if w_uv.dim() != 3 or w_uv.shape[0] != heads or w_uv.shape[1] != depth:
        raise ValueError(
            f"w_uv has shape {tuple(w_uv.shape)}; allowed: [heads, L, V] with attn_out's [{heads}, {depth}]"
        )
    width = w_uv.shape[2]
    if heads == 0:
        raise ValueError("attn_out has 0 heads; allowed: 1 or more")
    for name, size in (("L", depth), ("V", width)):
        if size == 0 or size % MULTIPLE:
            raise ValueError(f"w_uv has {name}={size}; allowed: multiples of {MULTIPLE}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size={group_size} is not supported; allowed: {', '.join(map(str, GROUP_SIZES))}")
    if width % group_size:
        raise ValueError(
            f"w_uv has V={width}; allowed: multiples of group_size={group_size}, for groups do not span heads"
        )
    for name, t, dtype, columns in (
        ("codes", codes, FORMATS[fp8].dtype, heads * width),
        ("scales", scales, torch.float32, heads * width // group_size),
    ):
        if t.dtype != dtype:
            raise ValueError(f"{name} has dtype {t.dtype}; allowed: {dtype}")
        if t.dim() != 2 or t.shape[0] != tokens or t.shape[1] != columns:
            raise ValueError(f"{name} has shape {tuple(t.shape)}; allowed: {(tokens, columns)}")
    if codes.stride(1) != 1:
        raise ValueError(f"codes has stride {codes.stride(1)} along its columns; allowed: 1 (rows may be strided)")
    for name, t in (("w_uv", w_uv), ("codes", codes), ("scales", scales)):
        if t.device != attn_out.device:
            raise ValueError(f"{name} is on {t.device}; allowed: attn_out's device, {attn_out.device}")


def scale_padding(scales: torch.Tensor) -> tuple[int, int]:
    """Up to which row, and in how many of its columns, TMA-aligned scales are padded; (rows, 0) for other layouts.

    Columns: those whose padding the storage has. vLLM allocates with `empty_strided`, which ends with the last column's last
    row; `empty_group_scales` allocates all of it.
    """
    rows, columns = scales.shape
    stride = scales.stride(1)
    if scales.stride(0) != 1 or stride == rows or stride != padded_rows(rows):
        return rows, 0
    room = scales.untyped_storage().nbytes() // scales.element_size() - scales.storage_offset()
    return stride, min(columns, room // stride)


def mla_v_up_group_fp8_quant_reference(
    attn_out: torch.Tensor,
    w_uv: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int = 128,
    use_ue8m0: bool = False,
    quant_rounding: str = "custom_op",
    fp8: str = OCP,
) -> None:
    """`mla_v_up_group_fp8_quant` in plain torch, on any device."""
    _check(attn_out, w_uv, codes, scales, group_size, quant_rounding, fp8)
    if len(attn_out) == 0:
        return
    y = torch.bmm(attn_out.transpose(0, 1).float(), w_uv.float()).transpose(0, 1)
    y = y.reshape(codes.shape).to(attn_out.dtype)
    how = GroupScales(group_size, ue8m0=use_ue8m0)
    new_codes, new_scales = group_fp8_quant_reference(y, how, quant_rounding, fp8)
    codes.copy_(new_codes)
    scales.copy_(new_scales)
    rows, columns = scale_padding(scales)
    if columns:
        start = scales.storage_offset() + len(scales)
        scales.as_strided((rows - len(scales), columns), (1, rows), start).zero_()


def _fake(attn_out, w_uv, codes, scales, group_size, use_ue8m0, quant_rounding, fp8=OCP):
    _check(attn_out, w_uv, codes, scales, group_size, quant_rounding, fp8)


def _cuda(attn_out, w_uv, codes, scales, group_size, use_ue8m0, quant_rounding, fp8=OCP):
    from ..kernels.mla_v_up_quant import mla_v_up_group_fp8_quant as launch

    _check(attn_out, w_uv, codes, scales, group_size, quant_rounding, fp8)
    launch(attn_out, w_uv, codes, scales, scale_padding(scales), group_size, use_ue8m0, quant_rounding, fp8=fp8)


_OP = register(
    "mla_v_up_group_fp8_quant(Tensor attn_out, Tensor w_uv, Tensor(a!) codes, Tensor(b!) scales, int group_size, "
    f"bool use_ue8m0, str quant_rounding, {FP8}) -> ()",
    fake=_fake,
    cuda=_cuda,
    cpu=mla_v_up_group_fp8_quant_reference,
    per_row=("attn_out", "codes", "scales"),
)


def mla_v_up_group_fp8_quant(
    attn_out: torch.Tensor,
    w_uv: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int = 128,
    *,
    use_ue8m0: bool = False,
    quant_rounding: str = "custom_op",
    fp8: str = OCP,
) -> None:
    """attn_out @ w_uv for each head, quantised to FP8 in groups of `group_size` along each row, in one kernel.

    Args:
        attn_out: [M, N, L] bf16 or fp16, any strides: token-major, head-major, some of more heads. M may be 0. L is a
            multiple of 16.
        w_uv: [N, L, V] of the same dtype, any strides; V is a multiple of group_size. Fast if, as in vLLM, V or L is
            contiguous and everything else starts at multiples of 16 bytes; the same goes for attn_out and L.
        codes: [M, N * V] in the format `fp8`, written to; rows may be strided, columns not.
        scales: [M, N * V / group_size] fp32 of any strides, written to. If they are TMA-aligned, strides (1, M rounded up to
            4), the rows between M and there are set to zero, as far as the storage goes. So of a larger buffer, write the
            rows after these afterwards.
        group_size: 64 or 128.
        use_ue8m0: round each scale up to a power of two.
        quant_rounding: which of vLLM's quantisers to reproduce, custom_op or reciprocal; see ops/quant.py.
        fp8: format of the codes; see kernels/fp8.py.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `MLAAttention._v_up_proj` into a buffer, then `per_token_group_fp8_quant`; see the module's docstring for
    how closely.
    """
    _OP(attn_out, w_uv, codes, scales, group_size, use_ue8m0, quant_rounding, fp8)
