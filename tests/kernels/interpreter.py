# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, made to round as an NVIDIA GPU does.

It runs a kernel with numpy, one program after the other, which is enough to check indices, masks and special values. Its
arithmetic is not the hardware's, though, and these tests compare bytes:

- fp32 → bf16 and → FP8 truncate, and FP8 does not saturate; `cvt.rn.satfinite` rounds to nearest even and saturates.
- fma rounds the product first (Triton before 3.9); the hardware's fma rounds once.
- maximum and minimum hand on NaN (Triton before 3.9), where fmaxf and fminf ignore it.
- fp16 → fp32 keeps a signalling NaN, which the C library's fmaxf hands on, as numpy does or not, by the CPU's instructions;
  the hardware's conversion makes it quiet.
- exp is numpy's; the references call torch.exp, which differs from it in the last bit. Neither is CUDA's expf: that one
  is compared on the GPU only.
"""

from __future__ import annotations

import os

import numpy as np
import torch


def use_interpreter() -> None:
    """Have every kernel that is decorated from now on run in the interpreter. Triton must not have been imported yet."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.runtime.interpreter as interpreter

    interpreter._convert_float = _convert_float
    builder = interpreter.InterpreterBuilder
    builder.create_fma = _create_fma
    builder.create_exp = _create_exp
    builder.create_fp_ext = _create_fp_ext
    builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)


_FP8_MAX = {"fp8e4nv": 448.0, "fp8e4b8": 240.0}


def _torch_dtype(dtype) -> torch.dtype:
    names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8e4nv": "float8_e4m3fn"}
    names["fp8e4b8"] = "float8_e4m3fnuz"
    return getattr(torch, names[dtype.name])


def _convert_float(data: np.ndarray, source, target, rounding_mode) -> np.ndarray:
    """The bits of `data` (numbers of type `source`) as numbers of type `target`, rounded to nearest even."""
    values = torch.from_numpy(np.ascontiguousarray(data).view(f"i{source.primitive_bitwidth // 8}"))
    values = values.view(_torch_dtype(source)).float()
    if target.name in _FP8_MAX:
        values = values.clamp(-_FP8_MAX[target.name], _FP8_MAX[target.name])  # keeps NaN
    # the hardware writes one NaN per format, torch keeps the sign
    values = torch.where(values.isnan(), float("nan"), values)
    bits = values.to(_torch_dtype(target)).view(getattr(torch, f"int{target.primitive_bitwidth}"))
    return bits.numpy().view(f"u{target.primitive_bitwidth // 8}").reshape(data.shape)


def _create_fma(builder, x, y, z):
    from triton.runtime.interpreter import TensorHandle

    assert z.data.dtype == np.float32
    # The product of two fp32 numbers is exact in fp64, the sum is not: round it to odd, so that the rounding to fp32
    # after it is the only one that counts (Boldo and Melquiond, 2008).
    with np.errstate(all="ignore"):
        product = x.data.astype(np.float64) * y.data.astype(np.float64)
        addend = z.data.astype(np.float64)
        total = product + addend
        other = total - product
        error = (product - (total - other)) + (addend - other)
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & (error != 0) & even
        total = np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
        return TensorHandle(total.astype(np.float32), z.dtype.scalar)


def _create_fp_ext(builder, source, target):
    wide = builder.cast_impl(source, target)
    wide.data[np.isnan(wide.data)] = np.nan
    return wide


def _create_exp(builder, arg):
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(torch.exp(torch.from_numpy(np.ascontiguousarray(arg.data))).numpy(), arg.dtype.scalar)
