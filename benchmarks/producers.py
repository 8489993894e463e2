# SPDX-License-Identifier: Apache-2.0
"""What stands before a quantiser, for exactness.py: vLLM's own code of it, and our op that replaces it and the quantiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import bench_mla_dual_rms_norm_quant as mla_dual
import grid
import torch
from bench_gated_rms_norm_quant import HEAD_DIM
from bench_rms_norm_quant import EPSILON

from vllm_fusion_plugin.kernels.rounding import is_native
from vllm_fusion_plugin.ops import (
    gated_rms_norm_quant,
    group_quant,
    mla_dual_rms_norm_quant,
    rms_norm_quant,
    silu_mul_quant,
)

Tensors = tuple[torch.Tensor, ...]
# What is quantised, and the other outputs by name.
Produced = tuple[torch.Tensor, dict[str, torch.Tensor]]


def random_rows(rows: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers whose size varies from row to row and along a row, by powers of two: every mantissa stays as likely."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    exponents = torch.randint(-8, 5, (rows, 1), **options) + torch.randint(-2, 3, (1, width), **options)
    return torch.randn(rows, width, dtype=dtype, **options).mul_(torch.exp2(exponents.float()).to(dtype))


def random_weight(width: int, generator: torch.Generator) -> torch.Tensor:
    return 1.0 + 0.1 * torch.randn(width, generator=generator, device=generator.device)


class Producer(ABC):
    """One computation in front of a quantiser."""

    stem: str
    kinds: tuple[str, ...] = ("group",)
    """Quantisers that our ops have behind it."""
    forms: tuple[tuple[str, str], ...]
    """Its form and the quantiser's: the combinations that vLLM can run."""
    widths: tuple[int, ...] = grid.WIDTHS
    words: tuple[str, ...] = ()
    """What tells it from others of the same op, for the mode."""

    def op(self, kind: str) -> str:
        return f"{self.stem}_{kind}_fp8_quant"

    @abstractmethod
    def inputs(self, rows: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensors: ...

    @abstractmethod
    def native(self, *inputs: torch.Tensor) -> Produced:
        """vLLM's native layer; compiled by Inductor it is form `native`, as it is `eager`."""

    def custom_op(self, *inputs: torch.Tensor) -> Produced:
        """vLLM's CUDA op."""
        raise NotImplementedError(f"{self.stem} has no form custom_op")

    @abstractmethod
    def ours(self, kind: str, inputs: Tensors, form: str, **quant: Any) -> dict[str, torch.Tensor]:
        """Our op; `quant` is how it is told of the quantiser."""


def named(outputs: Any, *more: str) -> dict[str, torch.Tensor]:
    """An op's outputs by name: codes, scales unless the scale was given, and `more`."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    scales = ["scales"] if len(outputs) > 1 + len(more) else []
    return dict(zip(["codes", *scales, *more], outputs, strict=True))


class SiluMul(Producer):
    stem = "silu_mul"
    kinds = ("group", "static")
    forms = (("native", "custom_op"), ("custom_op", "custom_op"), ("native", "native"), ("eager", "custom_op"))

    def inputs(self, rows, width, dtype, generator):
        return (random_rows(rows, 2 * width, dtype, generator),)

    def native(self, x):
        from vllm.model_executor.layers.activation import SiluAndMul

        return SiluAndMul.forward_native(x), {}

    def custom_op(self, x):
        y = x.new_empty((x.shape[0], x.shape[1] // 2))
        torch.ops._C.silu_and_mul(y, x)
        return y, {}

    def ours(self, kind, inputs, form, **quant):
        return named(getattr(silu_mul_quant, self.op(kind))(*inputs, act_rounding=form, **quant))


def native_op(name: str) -> Callable[..., Any]:
    """The torch code of an op of vLLM's IR."""
    from vllm import ir

    return getattr(ir.ops, name).impls["native"].impl_fn


class RMSNorm(Producer):
    """gemma: fp32 weight, to which 1 is added. addend: the residual is a sum too, the one of the layer's norm before, which
    Inductor compiles together with this one and does not round in between."""

    kinds = ("group", "token", "static")

    def __init__(self, add: bool, *, gemma: bool = False, addend: bool = False) -> None:
        self.add, self.gemma, self.addend = add, gemma, addend
        self.stem = "add_rms_norm" if add else "rms_norm"
        self.words = ("gemma",) * gemma + ("addend",) * addend
        self.forms = (("native", "custom_op"),)
        if not self.words:  # vLLM's ops take a weight of x's dtype only, and round every sum
            self.forms += (("custom_op", "custom_op"), ("native", "native"), ("eager", "custom_op"))

    def inputs(self, rows, width, dtype, generator):
        weight = random_weight(width, generator)
        weight = weight - 1.0 if self.gemma else weight.to(dtype)
        x, *more = (random_rows(rows, width, dtype, generator) for _ in range(1 + self.add + self.addend))
        return x, weight, *more

    def native(self, x, weight, residual=None, addend=None):
        norm, add_norm = native_op("rms_norm"), native_op("fused_add_rms_norm")
        if self.gemma:
            weight = weight.float() + 1.0
        if residual is None:
            y = norm(x, weight, EPSILON)
            return y, {"normed": y}
        if addend is not None:
            _, residual = add_norm(addend, residual, weight, EPSILON)
        y, residual = add_norm(x, residual, weight, EPSILON)
        return y, {"normed": y, "residual": residual}

    def custom_op(self, x, weight, residual=None):
        y = x.clone()
        if residual is None:
            torch.ops._C.rms_norm(y, x, weight, EPSILON)
            return y, {"normed": y}
        residual = residual.clone()
        torch.ops._C.fused_add_rms_norm(y, residual, weight, EPSILON)
        return y, {"normed": y, "residual": residual}

    def ours(self, kind, inputs, form, **quant):
        x, weight, *more = inputs
        sums = dict(zip(("residual", "residual_addend"), more, strict=False))
        keep_norm = not is_native(quant["quant_rounding"])  # a native quantiser never rounds what would be kept
        op = getattr(rms_norm_quant, f"rms_norm_{kind}_fp8_quant")
        norm = rms_norm_quant.NormInputs(
            x, weight, EPSILON, gemma_weight=self.gemma, keep_norm=keep_norm, norm_rounding=form, **sums
        )
        outputs = op(norm, **quant)
        return named(outputs, *["normed"] * keep_norm, *["residual"] * self.add)


class GatedRMSNorm(Producer):
    stem = "gated_rms_norm"
    forms = (("native", "custom_op"), ("native", "native"), ("eager", "custom_op"))
    widths = tuple(heads * HEAD_DIM for heads in (32, 16, 8))

    def inputs(self, rows, width, dtype, generator):
        shape = (rows, width // HEAD_DIM, HEAD_DIM)
        x, z = (random_rows(rows, width, dtype, generator).view(shape) for _ in range(2))
        return x, z, random_weight(HEAD_DIM, generator).to(dtype)

    def native(self, x, z, weight):
        from vllm.model_executor.layers.layernorm import RMSNormGated

        y = RMSNormGated.forward_static(x, z, weight, EPSILON, x.dtype, None, True, "silu")
        return y.reshape(x.shape[0], -1), {}

    def ours(self, kind, inputs, form, **quant):
        op = gated_rms_norm_quant.gated_rms_norm_group_fp8_quant
        return named(op(*inputs, EPSILON, inputs[0].shape[1], norm_rounding=form, **quant))


class MLADualRMSNorm(Producer):
    stem = "mla_dual_rms_norm"
    forms = (("native", "custom_op"), ("custom_op", "custom_op"), ("native", "native"), ("eager", "custom_op"))
    widths = mla_dual.WIDTHS

    def inputs(self, rows, width, dtype, generator):
        row = random_rows(rows, width + mla_dual.KV + mla_dual.ROPE, dtype, generator)
        q, kv, _ = row.split((width, mla_dual.KV, mla_dual.ROPE), dim=1)
        return q, kv, *(random_weight(n, generator).to(dtype) for n in (width, mla_dual.KV))

    def native(self, q, kv, q_weight, kv_weight):
        norm = native_op("rms_norm")
        return norm(q, q_weight, EPSILON), {"kv_normed": norm(kv, kv_weight, EPSILON)}

    def custom_op(self, q, kv, q_weight, kv_weight):
        y, kv_normed = (t.new_empty(t.shape) for t in (q, kv))
        torch.ops._C.rms_norm(y, q, q_weight, EPSILON)
        torch.ops._C.rms_norm(kv_normed, kv, kv_weight, EPSILON)
        return y, {"kv_normed": kv_normed}

    def ours(self, kind, inputs, form, **quant):
        op = mla_dual_rms_norm_quant.mla_dual_rms_norm_group_fp8_quant
        return named(op(*inputs, EPSILON, EPSILON, norm_rounding=form, **quant), "kv_normed")


class Nothing(Producer):
    """A quantiser by itself."""

    forms = (("", "custom_op"), ("", "native"))

    def op(self, kind: str) -> str:
        return f"{kind}_fp8_quant"

    def inputs(self, rows, width, dtype, generator):
        return (random_rows(rows, width, dtype, generator),)

    def native(self, x):
        return x, {}

    def ours(self, kind, inputs, form, **quant):
        return named(group_quant.group_fp8_quant(*inputs, **quant))


PRODUCERS = (
    SiluMul(),
    RMSNorm(add=True),
    RMSNorm(add=True, addend=True),
    RMSNorm(add=True, gemma=True),
    RMSNorm(add=False),
    RMSNorm(add=False, gemma=True),
    GatedRMSNorm(),
    MLADualRMSNorm(),
    Nothing(),
)
