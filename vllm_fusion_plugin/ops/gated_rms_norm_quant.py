# SPDX-License-Identifier: Apache-2.0
"""Gated RMSNorm of each head, then group FP8: what runs between linear attention and its output projection.

    y = s / sqrt(mean(s ** 2) + epsilon) * weight * gate(z),  s = x             norm_before_gate
    y = s / sqrt(mean(s ** 2) + epsilon) * weight,            s = x * gate(z)   otherwise

gate is SiLU or sigmoid, the mean is over a head. vLLM's `RMSNormGated.forward_static` computes all of it in fp32 and rounds
once, to x's dtype; then heads are put side by side and quantised. `norm_rounding` says what the quantiser gets:

`native`
    What Inductor compiles (vLLM's default): y rounded to x's dtype before an opaque quantiser (`custom_op`, `reciprocal`),
    unrounded before a native quantiser, which Inductor puts into the same kernel.
`eager`
    y rounded to x's dtype in any case: eager torch, and Inductor with `emulate_precision_casts`.

Exact on NVIDIA GPUs but for one thing, the order in which Inductor adds up a head's squares. The op adds 8 by 8 and then by
halves, whatever the number of tokens. So does Inductor's kernel for heads of up to 256 if its tile has several of them;
which tile that is, Inductor finds out by timing (with `torch._inductor.config.deterministic` it is always such a one). With
one head at a time its order is another, which can move y by a rounding. Heads above 256 have an order of their own. The gate
is Inductor's too (`div.full.f32`, 2 ulp), and not eager torch's.

On an H200, of 3e8 random numbers a mode (docs/results.md), no byte differs for
native norms before vLLM's quantiser, its default; 0.4 to 0.6 of a million codes do, by one step, for eager norms, and up to
0.2 before Inductor's own quantiser, where scales of groups of 128 were an ulp off in one of seven.
"""

from __future__ import annotations

import torch

from ..kernels.fp8 import FORMATS, OCP
from .quant import (
    FP8,
    INPUT_DTYPES,
    SCALES,
    GroupScales,
    check_choice,
    check_group_rounding,
    group_fp8_quant_reference,
    is_native,
)
from .registry import register

ACTIVATIONS = ("silu", "sigmoid")
NORM_ROUNDINGS = ("native", "eager")
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A head is read at once: 1024 threads, 16 bytes each.
MAX_HEAD_DIM = 8192


def gated_rms_norm_reference(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    norm_before_gate: bool = True,
    activation: str = "silu",
    *,
    rounded: bool = True,
) -> torch.Tensor:
    """Gated RMSNorm along the last dimension in plain torch: in x's dtype, or in fp32 if `rounded` is False."""
    z = z.float()
    gate = (1.0 if activation == "sigmoid" else z) / (1.0 + torch.exp(-z))
    y = x.float()
    if not norm_before_gate:
        y = y * gate
    y = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + epsilon) * weight.float()
    if norm_before_gate:
        y = y * gate
    return y.to(x.dtype) if rounded else y


def _check(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    num_heads: int,
    activation: str,
    how: GroupScales,
    norm_rounding: str,
    quant_rounding: str,
    fp8: str,
) -> tuple[int, int]:
    """Tokens and output width; ValueError on what no kernel takes."""
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; allowed: {', '.join(map(str, INPUT_DTYPES))}")
    if x.dim() not in (2, 3):
        raise ValueError(
            f"x has {x.dim()} dimensions, shape {tuple(x.shape)}; "
            "allowed: 2, [tokens * heads, head size], or 3, [tokens, heads, head size]"
        )
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}; allowed: 1 or more")
    if x.dim() == 2 and x.shape[0] % num_heads:
        raise ValueError(f"x has {x.shape[0]} rows; allowed: a multiple of num_heads={num_heads}")
    if x.dim() == 3 and x.shape[1] != num_heads:
        raise ValueError(f"x has {x.shape[1]} heads, shape {tuple(x.shape)}; allowed: num_heads={num_heads}")
    head_dim = x.shape[-1]
    if z.dtype != x.dtype or z.shape != x.shape or z.device != x.device:
        raise ValueError(
            f"z is {z.dtype} of shape {tuple(z.shape)} on {z.device}; "
            f"allowed: as x, {x.dtype} of shape {tuple(x.shape)} on {x.device}"
        )
    for name, heads in (("x", x), ("z", z)):
        if heads.stride(-1) != 1:
            raise ValueError(
                f"{name} has stride {heads.stride(-1)} along a head; allowed: 1 (heads themselves may be strided)"
            )
    if weight.dtype not in WEIGHT_DTYPES or weight.shape != (head_dim,) or weight.stride(0) != 1:
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)} and strides {weight.stride()}; "
            f"allowed: contiguous, of shape ({head_dim},), {', '.join(map(str, WEIGHT_DTYPES))}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}; allowed: x's device, {x.device}")
    check_choice("activation", activation, ACTIVATIONS)
    how.check(num_heads * head_dim)
    group_size = how.group_size
    if head_dim % group_size or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"x has heads of {head_dim}; allowed: multiples of group_size={group_size} from {group_size} to {MAX_HEAD_DIM}"
        )
    check_choice("norm_rounding", norm_rounding, NORM_ROUNDINGS)
    check_group_rounding(quant_rounding, x.dtype, how, fp8)
    return x.shape[0] if x.dim() == 3 else x.shape[0] // num_heads, num_heads * head_dim


def gated_rms_norm_group_fp8_quant_reference(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    num_heads: int,
    scales: GroupScales = GroupScales(),
    *,
    norm_before_gate: bool = True,
    activation: str = "silu",
    norm_rounding: str = "native",
    quant_rounding: str = "custom_op",
    fp8: str = OCP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_rms_norm_group_fp8_quant` in plain torch, on any device."""
    shape = _check(x, z, weight, num_heads, activation, scales, norm_rounding, quant_rounding, fp8)
    rounded = norm_rounding != "native" or not is_native(quant_rounding)
    y = gated_rms_norm_reference(x, z, weight, epsilon, norm_before_gate, activation, rounded=rounded)
    return group_fp8_quant_reference(y.reshape(shape), scales, quant_rounding, fp8)


def _more(
    group_size: int, layout: str, ue8m0: bool, norm_rounding: str, quant_rounding: str, fp8: str = OCP
) -> tuple[GroupScales, str, str, str]:
    """The op's last arguments."""
    return GroupScales(group_size, layout, ue8m0), norm_rounding, quant_rounding, fp8


def _fake(x, z, weight, epsilon, num_heads, norm_before_gate, activation, *more):
    how, norm_rounding, quant_rounding, fp8 = _more(*more)
    rows, width = _check(x, z, weight, num_heads, activation, how, norm_rounding, quant_rounding, fp8)
    return x.new_empty((rows, width), dtype=FORMATS[fp8].dtype), how.empty(x, rows, width)


def _cuda(x, z, weight, epsilon, num_heads, norm_before_gate, activation, *more):
    from ..kernels.gated_rms_norm_quant import gated_rms_norm_group_fp8_quant as launch

    codes, scales = _fake(x, z, weight, epsilon, num_heads, norm_before_gate, activation, *more)
    how, norm_rounding, quant_rounding, fp8 = _more(*more)
    launch(
        x, z, weight, codes, scales, epsilon, num_heads, norm_before_gate, activation, how.group_size, how.ue8m0,
        norm_rounding, quant_rounding, fp8=fp8,
    )  # fmt: skip
    return codes, scales


def _cpu(x, z, weight, epsilon, num_heads, norm_before_gate, activation, *more):
    how, norm_rounding, quant_rounding, fp8 = _more(*more)
    return gated_rms_norm_group_fp8_quant_reference(
        x, z, weight, epsilon, num_heads, how, norm_before_gate=norm_before_gate,
        activation=activation, norm_rounding=norm_rounding, quant_rounding=quant_rounding, fp8=fp8,
    )  # fmt: skip


_OP = register(
    "gated_rms_norm_group_fp8_quant(Tensor x, Tensor z, Tensor weight, float epsilon, int num_heads, "
    f"bool norm_before_gate, str activation, {SCALES}, str norm_rounding, str quant_rounding, {FP8}) -> (Tensor, Tensor)",
    fake=_fake,
    cuda=_cuda,
    cpu=_cpu,
    per_row=("x", "z"),
    rows_by="num_heads",
)


def gated_rms_norm_group_fp8_quant(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    num_heads: int,
    scales: GroupScales = GroupScales(),
    *,
    norm_before_gate: bool = True,
    activation: str = "silu",
    norm_rounding: str = "native",
    quant_rounding: str = "custom_op",
    fp8: str = OCP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of each head of x, gated by z, quantised to FP8 in groups, in one kernel.

    Args:
        x: [N * num_heads, D] or [N, num_heads, D], bf16 or fp16, N tokens of num_heads heads; tokens and heads may be
            strided, a head's D numbers not. N may be 0.
        z: the gate before its activation; dtype and shape of x, strides of its own.
        weight: [D] bf16, fp16 or fp32, contiguous, on x's device.
        epsilon: added to the mean of the squares.
        num_heads: heads of a token.
        scales: size of the groups, 64 or 128, which divides D, at most 8192; layout of the scales; whether they are powers
            of two.
        norm_before_gate: norm(x) * gate(z) instead of norm(x * gate(z)).
        activation: gate is "silu" or "sigmoid".
        norm_rounding, quant_rounding: which of vLLM's roundings to reproduce; see the module's docstring and ops/quant.py.
        fp8: format of the codes; see kernels/fp8.py.

    Returns:
        codes [N, num_heads * D] in that format, contiguous, the heads of a token side by side, and
        scales [N, num_heads * D / group_size] fp32 in the layout asked for.

    Raises:
        ValueError: an argument is not one of the above; the message names it, its value and what is allowed.

    Mirrors vLLM's `RMSNormGated.forward_static` (one group a head), a reshape, and `per_token_group_fp8_quant`: the output
    of Qwen3-Next's gated delta net.
    """
    gate = (norm_before_gate, activation)
    return _OP(x, z, weight, epsilon, num_heads, *gate, *scales, norm_rounding, quant_rounding, fp8)
