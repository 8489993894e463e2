# SPDX-License-Identifier: Apache-2.0
"""Small random modules of what fusion passes meet: norms, activations, reshapes, casts, slices, quantisers, and GEMMs that
quantise inside.

A module is a list of steps, each of which makes one more value of earlier ones or returns something; `programs` draws such
lists with hypothesis, so that a failing one is shrunk to the steps that matter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from vllm.model_executor.kernels.linear.scaled_mm import flashinfer  # noqa: F401  (registers the GEMM)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

from vllm_fusion_plugin import compat

WIDTH = 256


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a value: [times * tokens, width], with a dimension of 1 before it if `leading`."""

    width: int
    times: int = 1
    leading: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    kind: str
    source: int
    """Which value it reads, by position."""
    width: int
    """Of that value."""
    other: int = 0
    """Which value it reads too, if it is of those that read two."""
    options: tuple[Any, ...] = ()


INPUTS = (Shape(WIDTH), Shape(WIDTH))
NORMS = ("norm", "gemma_norm")
ADDING_NORMS = ("add_norm", "add_gemma_norm")
VIEWS = (
    *("view_minus_one", "view_rows", "view_last", "view_and_back", "halve_rows"),
    *("leading_one", "unsqueeze", "no_leading_one", "select"),
)
# How gate and up are taken, besides the two ways of vLLM's layer.
HALVES = ("chunk", "split", "sizes", "select", "up_first", "up_and_gate")
POINTWISE = ("gelu", "relu", "double", "through_fp32", "through_other")


@st.composite
def programs(draw: st.DrawFn, most_steps: int = 5) -> tuple[Step, ...]:
    """Steps, the last of which quantises."""
    shapes = list(INPUTS)
    before_gemms = draw(st.booleans())  # a GEMM quantises wherever it can
    steps: list[Step] = []

    def source() -> int:
        # Mostly what was made last: chains are what passes look for.
        return len(shapes) - 1 - draw(st.integers(0, min(2, len(shapes) - 1)))

    def quantise(at: int) -> None:
        shape = shapes[at]
        native = draw(st.booleans())
        kinds = ["group", "token", "static"]
        if shape.leading:  # what vLLM's layers take of such
            kinds = ["group", "static"] if native else ["group"]
        if before_gemms and shape.width % 128 == 0 and not shape.leading:
            kinds = ["gemm"]
        kind = draw(st.sampled_from(kinds))
        if kind == "group":
            sizes = [size for size in (128, 64, 32) if shape.width % size == 0]
            if native and not sizes:
                sizes = [128]
            if not sizes:
                kind, options = "keep", ()
            else:
                layouts = ("row", "column") if native else ("row",) if shape.leading else ("row", "column", "tma")
                options = (draw(st.sampled_from(sizes)), draw(st.sampled_from(layouts)), draw(st.booleans()))
        else:
            options = (draw(st.booleans()),) if kind in ("token", "gemm") else ()
        steps.append(Step("keep" if kind == "keep" else f"{kind}_quant", at, shape.width, options=(native, *options)))

    kinds = [*NORMS, *ADDING_NORMS, "silu_mul", "silu_mul", *POINTWISE, *VIEWS, "slice", "add", "quant", "keep"]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most_steps)):
        at = source()
        shape = shapes[at]
        equal = [i for i, other in enumerate(shapes) if other == shape]
        other, options = 0, ()
        if kind == "quant":
            quantise(at)
            continue
        if kind == "keep":
            steps.append(Step(kind, at, shape.width))
            continue
        if kind in (*ADDING_NORMS, "add"):
            other = draw(st.sampled_from(equal))
            made = [shape] * (2 if kind in ADDING_NORMS else 1)
        elif kind == "silu_mul":
            if shape.width < 128:
                continue
            options = (draw(st.sampled_from([True, False, *HALVES])),)
            made = [dataclasses.replace(shape, width=shape.width // 2)]
        elif kind == "halve_rows":
            if shape.leading or shape.width < 128:
                continue
            made = [Shape(shape.width // 2, shape.times * 2)]
        elif kind in ("leading_one", "unsqueeze"):
            made = [dataclasses.replace(shape, leading=True)]
        elif kind in ("no_leading_one", "select"):
            made = [dataclasses.replace(shape, leading=False)]
        elif kind == "slice":
            width = draw(st.sampled_from([w for w in (128, 64, 96) if w < shape.width] or [shape.width]))
            options = (draw(st.sampled_from([0, shape.width - width])), width)
            made = [dataclasses.replace(shape, width=width)]
        else:
            made = [shape]
        steps.append(Step(kind, at, shape.width, other, options))
        shapes.extend(made)
        if kind in (*NORMS, *ADDING_NORMS, "silu_mul") and draw(st.sampled_from([True, True, False])):
            quantise(len(shapes) - len(made))  # what passes fuse, more often than by chance
    if not (steps and steps[-1].kind.endswith("_quant")):
        quantise(len(shapes) - 1)
    return tuple(steps)


class Program(nn.Module):
    """Does what `steps` say with two tensors [tokens, WIDTH]."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList([_layer(step) for step in steps])
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        values, results = [x, y], []
        for step, layer in zip(self.steps, self.layers, strict=True):
            value = values[step.source]
            if step.kind == "keep":
                results.append(value)
            elif step.kind.endswith("_quant"):
                results += self.quantise(step, layer, value)
            elif step.kind in ADDING_NORMS:
                # vLLM's layer gives its arguments away, so it may have none that is read again
                values += layer(value.clone(), values[step.other].clone())
            elif step.kind == "add":
                values.append(value + values[step.other])
            elif step.kind in NORMS:
                values.append(layer(value))
            elif step.kind == "silu_mul":
                (way,) = step.options
                values.append(
                    _silu_mul(way, value) if way in HALVES else (layer if way else layer.forward_native)(value)
                )
            else:
                values.append(_plain(step, value))
        return results

    def quantise(self, step: Step, layer: Any, value: torch.Tensor) -> list[torch.Tensor]:
        if step.kind == "gemm_quant":
            return [layer(value)]
        native, *options = step.options
        call = layer.forward_native if native else layer
        if step.kind == "group_quant":
            return list(call(value))
        if step.kind == "static_quant":
            return [call(value, self.scale)[0]]
        return list(call(value, scale_ub=self.scale if options[0] else None))


class BlockGemm(nn.Module):
    """vLLM's block GEMM that quantises inside, as its linear kernel calls it."""

    def __init__(self, width: int, ue8m0: bool) -> None:
        super().__init__()
        columns = 192
        weight = torch.empty(columns, width, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-columns // 128), width // 128, dtype=torch.float32)
        self.weight, self.scales = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, scales))
        self.ue8m0 = ue8m0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm(x, self.weight, self.scales, 128, self.ue8m0)


def _layer(step: Step) -> nn.Module:
    if step.kind in ("norm", "add_norm"):
        return RMSNorm(step.width)
    if step.kind in ("gemma_norm", "add_gemma_norm"):
        return GemmaRMSNorm(step.width)
    if step.kind == "silu_mul":
        return SiluAndMul()
    if step.kind == "gemm_quant":
        return BlockGemm(step.width, ue8m0=step.options[1])
    uncompiled = compat.uncompiled_layer(QuantFP8)
    if step.kind == "group_quant":
        _, size, layout, ue8m0 = step.options
        return QuantFP8(
            static=False,
            group_shape=GroupShape(1, size),
            column_major_scales=layout != "row",
            tma_aligned_scales=layout == "tma",
            use_ue8m0=ue8m0,
            **uncompiled,
        )
    if step.kind == "token_quant":
        return QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN, **uncompiled)
    if step.kind == "static_quant":
        return QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR, **uncompiled)
    return nn.Identity()


def _silu_mul(way: str, value: torch.Tensor) -> torch.Tensor:
    half = value.shape[-1] // 2
    match way:
        case "chunk" | "up_and_gate":
            gate, up = value.chunk(2, dim=-1)
        case "split":
            gate, up = value.split(half, dim=-1)
        case "sizes":
            gate, up = value.split([half, half], dim=-1)
        case "select":
            gate, up = value.unflatten(-1, (2, half)).unbind(-2)
        case _:
            gate, up = value.narrow(-1, 0, half), value.narrow(-1, half, half)
    if way == "up_and_gate":
        return torch.nn.functional.silu(up) * gate
    if way == "up_first":
        return up * torch.nn.functional.silu(gate)
    return torch.nn.functional.silu(gate) * up


def _plain(step: Step, value: torch.Tensor) -> torch.Tensor:
    width = value.shape[-1]
    other = torch.float16 if value.dtype == torch.bfloat16 else torch.bfloat16
    if step.kind == "slice":
        start, size = step.options
        return value[..., start : start + size]
    match step.kind:
        case "gelu":
            return torch.nn.functional.gelu(value, approximate="tanh")
        case "relu":
            return torch.relu(value)
        case "double":
            return value * 2
        case "through_fp32":
            return value.float().to(value.dtype)
        case "through_other":
            return value.to(other).to(value.dtype)
        case "view_minus_one":
            return value.reshape(*value.shape[:-2], -1, width)
        case "view_rows":
            return value.reshape(value.shape)
        case "view_last":
            return value.reshape(*value.shape[:-1], -1)
        case "view_and_back":
            return value.reshape(*value.shape[:-1], 2, width // 2).reshape(value.shape)
        case "halve_rows":
            return value.reshape(-1, width // 2)
        case "leading_one":
            return value.reshape(1, -1, width)
        case "unsqueeze":
            return value.unsqueeze(0) if value.dim() == 2 else value
        case "no_leading_one":
            return value.reshape(-1, width)
        case "select":
            return value if value.dim() == 2 else value[0]
    raise AssertionError(step.kind)
