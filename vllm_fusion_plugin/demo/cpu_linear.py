# SPDX-License-Identifier: Apache-2.0
"""Matmul of FP8 values with block scales, in plain torch: what CPU runs where a GPU has its block-scaled GEMM.

Dequantised and multiplied in fp32. An op of its own, because it then is as opaque to Inductor as a GPU's GEMM: codes and
scales stay values of the graph, and the quantiser that made them stays one that our patterns know.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("vllm_fusion_plugin::cpu_block_scaled_mm", mutates_args=(), device_types="cpu")
def cpu_block_scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    block_n: int,
    block_k: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """a (M, K) fp8 with scales (M, K/block_k), b (N, K) fp8 with scales (N/block_n, K/block_k) -> a @ b.T (M, N)."""
    n, k = b.shape
    a_full = a.float() * a_scales.repeat_interleave(block_k, 1)[:, :k]
    b_full = b.float() * b_scales.repeat_interleave(block_n, 0)[:n].repeat_interleave(block_k, 1)[:, :k]
    return (a_full @ b_full.t()).to(out_dtype)


@cpu_block_scaled_mm.register_fake
def _(a, b, a_scales, b_scales, block_n, block_k, out_dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
