# SPDX-License-Identifier: Apache-2.0
"""vLLM's dynamic block GEMM for input that is quantised already.

vLLM's `dynamic_flashinfer_deepgemm_blockscale_gemm` takes bf16 rows, and quantises them inside. This op takes what such a
quantiser writes and runs the kernel that vLLM's op would have run for that many rows: FlashInfer's below 32, DeepGEMM's from
there on. With codes and scales of `quant_rounding="..._or_flashinfer"` (ops/quant.py) the result has the bytes of vLLM's op.
DeepGEMM's kernel may also run for fewer rows; the sums are then rounded in another order.
"""

from __future__ import annotations

import torch

from ..kernels import block_gemm as kernels
from ..kernels.rounding import FLASHINFER_ROWS
from . import repeats
from .quant import FP8_DTYPE, GroupScales, padded_rows
from .registry import register

GROUP_SIZE = 128
OUT_DTYPE = torch.bfloat16


def _check(
    codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, flashinfer_rows: int
) -> tuple[int, int]:
    """Rows and columns of the result; ValueError on what the kernels do not take."""
    for name, tensor in (("codes", codes), ("weight", weight)):
        if tensor.dtype != FP8_DTYPE:
            raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {FP8_DTYPE}")
        if tensor.dim() != 2:
            raise ValueError(f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}; allowed: 2")
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()} at shape {tuple(tensor.shape)}; allowed: contiguous"
            )
    for name, tensor in (("scales", scales), ("weight_scales", weight_scales)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: torch.float32")
    for name, tensor in (("scales", scales), ("weight", weight), ("weight_scales", weight_scales)):
        if tensor.device != codes.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: codes' device, {codes.device}")
    (rows, width), (columns, weight_width) = codes.shape, weight.shape
    if width != weight_width:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; allowed: [N, {width}], as codes are {width} wide")
    if width == 0 or width % GROUP_SIZE:
        raise ValueError(f"codes are {width} wide; allowed: multiples of {GROUP_SIZE} above 0")
    if columns % 64:
        raise ValueError(f"weight has {columns} rows; allowed: multiples of 64")
    groups = width // GROUP_SIZE
    if scales.dim() != 2 or scales.shape[0] != rows or scales.shape[1] != groups:
        raise ValueError(f"scales have shape {tuple(scales.shape)}; allowed: [{rows}, {groups}]")
    if scales.stride(0) != 1 or (groups > 1 and scales.stride(1) != padded_rows(rows)):
        raise ValueError(f"scales have strides {scales.stride()}; allowed: TMA-aligned, (1, {padded_rows(rows)})")
    blocks = (-(-columns // GROUP_SIZE), groups)
    if tuple(weight_scales.shape) != blocks or not weight_scales.is_contiguous():
        found = f"shape {tuple(weight_scales.shape)} and strides {weight_scales.stride()}"
        raise ValueError(f"weight_scales have {found}; allowed: {blocks}, contiguous")
    if not 0 <= flashinfer_rows <= FLASHINFER_ROWS:
        raise ValueError(f"flashinfer_rows={flashinfer_rows}; allowed: 0 to {FLASHINFER_ROWS}")
    return rows, columns


def block_fp8_gemm_reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    use_ue8m0: bool = False,
    flashinfer_rows: int = FLASHINFER_ROWS,
) -> torch.Tensor:
    """The product in plain torch, in fp32 and rounded to bf16 once. The kernels add up in other orders, so their bytes
    differ from this reference's: two kernels' results do from each other's."""
    _, columns = _check(codes, scales, weight, weight_scales, flashinfer_rows)
    x = codes.float() * scales.repeat_interleave(GROUP_SIZE, dim=1)
    of_rows = weight_scales.repeat_interleave(GROUP_SIZE, dim=0)[:columns].repeat_interleave(GROUP_SIZE, dim=1)
    return (x @ (weight.float() * of_rows).T).to(OUT_DTYPE)


_CHECKED: set[tuple[object, ...]] = set()
"""Calls that were checked: half the time of a call on the host."""


def _fake(codes, scales, weight, weight_scales, use_ue8m0, flashinfer_rows):
    rows, columns = _check(codes, scales, weight, weight_scales, flashinfer_rows)
    return codes.new_empty((rows, columns), dtype=OUT_DTYPE)


def _cuda(codes, scales, weight, weight_scales, use_ue8m0, flashinfer_rows):
    key = repeats.key_of((codes, scales, weight, weight_scales, flashinfer_rows), range(4))
    if key not in _CHECKED:
        _check(codes, scales, weight, weight_scales, flashinfer_rows)
        if len(_CHECKED) >= repeats.MOST:
            _CHECKED.clear()
        _CHECKED.add(key)
    out = codes.new_empty((codes.shape[0], weight.shape[0]), dtype=OUT_DTYPE)
    kernels.block_gemm(codes, scales, weight, weight_scales, out, use_ue8m0, flashinfer_rows)
    return out


_OP = register(
    "block_fp8_gemm(Tensor codes, Tensor scales, Tensor weight, Tensor weight_scales, bool use_ue8m0, int flashinfer_rows)"
    " -> Tensor",
    fake=_fake,
    cuda=_cuda,
    cpu=block_fp8_gemm_reference,
    per_row=(),  # its kernels are vLLM's to warm up
    kernels_of_others=True,
)


def block_fp8_gemm(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    *,
    use_ue8m0: bool = True,
    flashinfer_rows: int = FLASHINFER_ROWS,
) -> torch.Tensor:
    """codes * scales times the transpose of weight * weight_scales, by vLLM's choice of kernel for that many rows.

    Args:
        codes: [M, K] float8_e4m3fn, contiguous, K a multiple of 128. M may be 0.
        scales: [M, K / 128] fp32, TMA-aligned (`GroupScales(128, "tma")`).
        weight: [N, K] float8_e4m3fn, contiguous, N a multiple of 64.
        weight_scales: [N / 128 rounded up, K / 128] fp32.
        use_ue8m0: whether scales of 32 rows and more are powers of two.
        flashinfer_rows: FlashInfer's kernel runs for fewer rows: 32, vLLM's number, or less, if DeepGEMM's is the faster;
            0 as with VLLM_BATCH_INVARIANT.

    Returns:
        [M, N] bf16.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `dynamic_flashinfer_deepgemm_blockscale_gemm`, less its quantisers. Needs a GPU of compute capability 9.0.
    """
    return _OP(codes, scales, weight, weight_scales, use_ue8m0, flashinfer_rows)


SCALES = GroupScales(GROUP_SIZE, "tma")
"""What `scales` has to be, powers of two or not."""
