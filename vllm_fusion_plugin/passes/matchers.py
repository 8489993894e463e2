# SPDX-License-Identifier: Apache-2.0
"""How vLLM's layers look in its graphs: the pieces that patterns are put together from.

Each piece has the forms that vLLM gives it: a custom op of `torch.ops._C`, or the layer's `forward_native` decomposed to
aten. A form whose op this build of vLLM lacks is not available, and no pattern is made with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
from vllm.platforms import current_platform

from .. import compat
from ..ops.quant import FP8_DTYPE, FP8_MAX
from .base import OpIndex

DEVICE = current_platform.device_type


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def functionalized(op: torch._ops.OpOverload, **arguments: Any) -> tuple[Any, ...]:
    """What the graph has for an op that writes to its arguments: its results, then the arguments written to."""
    return auto_functionalized(op, **arguments)


def has_op(name: str) -> bool:
    """Whether this build of vLLM has `torch.ops._C.<name>`."""
    compat.load_custom_ops()
    return hasattr(torch.ops._C, name)


# ---- SiLU·mul --------------------------------------------------------------------------------------------------------


def silu_mul_custom_op(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    return functionalized(torch.ops._C.silu_and_mul.default, result=out, input=x)[1]


GROUP_QUANT_OPS = ("_C.per_token_group_fp8_quant",)

# An op that a graph with the form has in any case.
SILU_MUL_OPS = {"native": "aten.exp", "custom_op": "_C.silu_and_mul"}


def silu_mul_forms() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Form -> function of x [M, 2 * K]."""
    forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"native": SiluAndMul.forward_native}
    if has_op("silu_and_mul"):
        forms["custom_op"] = silu_mul_custom_op
    return forms


# ---- quantisers ------------------------------------------------------------------------------------------------------


def _converts_to_fp8(ops: OpIndex) -> bool:
    return any(node.args[1] == FP8_DTYPE for node in ops.get("prims.convert_element_type", []))


@dataclass(frozen=True)
class GroupQuant:
    """Dynamic FP8 quantiser with one scale a group along the row, in one of its layouts and forms."""

    form: str
    group_size: int
    column_major_scales: bool
    tma_aligned_scales: bool
    use_ue8m0: bool
    eps: float = 1e-10

    def possible(self, ops: OpIndex) -> bool:
        if self.form == "native":
            return _converts_to_fp8(ops) and "aten.max" in ops and ("aten.log2" in ops) == self.use_ue8m0
        wanted = {
            "group_size": self.group_size,
            "scale_ue8m0": self.use_ue8m0,
            "dummy_is_scale_transposed": self.column_major_scales,
            "dummy_is_tma_aligned": self.tma_aligned_scales,
        }
        nodes = ops.get("_C.per_token_group_fp8_quant", [])
        return any(all(node.kwargs.get(k) == v for k, v in wanted.items()) for node in nodes)

    def __str__(self) -> str:
        layout = "tma" if self.tma_aligned_scales else "column" if self.column_major_scales else "row"
        return f"group{self.group_size}[{self.form},{layout}{',ue8m0' if self.use_ue8m0 else ''}]"

    def inputs(self, rows: int, width: int) -> list[torch.Tensor]:
        if self.form == "native":
            return []
        return [
            empty(rows, width, dtype=FP8_DTYPE),
            empty(rows, width // self.group_size, dtype=torch.float32),
        ]

    def __call__(self, y: torch.Tensor, *buffers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.form == "native":
            layer = _quant_fp8(
                static=False,
                group_shape=GroupShape(1, self.group_size),
                column_major_scales=self.column_major_scales,
                use_ue8m0=self.use_ue8m0,
            )
            return layer.forward_native(y)
        _, codes, scales = functionalized(
            torch.ops._C.per_token_group_fp8_quant.default,
            input=y,
            output_q=buffers[0],
            output_s=buffers[1],
            group_size=self.group_size,
            eps=self.eps,
            fp8_min=-FP8_MAX,
            fp8_max=FP8_MAX,
            scale_ue8m0=self.use_ue8m0,
            dummy_is_scale_transposed=self.column_major_scales,
            dummy_is_tma_aligned=self.tma_aligned_scales,
        )
        return codes, scales


def group_quants(group_sizes: tuple[int, ...]) -> list[GroupQuant]:
    """Every group quantiser that vLLM can put into a graph."""
    forms = ["native"] + (["custom_op"] if has_op("per_token_group_fp8_quant") else [])
    return [
        GroupQuant(form, group_size, column_major, tma_aligned, ue8m0)
        for form in forms
        for group_size in group_sizes
        # Column-major first: in native form its graph is the row-major one and a transposition behind it, and Inductor
        # replaces what fits first.
        for column_major, tma_aligned in ((True, True), (True, False), (False, False))
        for ue8m0 in (False, True)
        # forward_native knows no TMA alignment: it returns plain column-major scales
        if not (form == "native" and tma_aligned)
    ]


def _quant_fp8(**arguments: Any) -> QuantFP8:
    # Any config will do: vLLM's CustomOp layers only look up there which forward is theirs, and forward_native is called
    # by name. Patterns are traced while compiling, when vLLM has no current config set.
    with set_current_vllm_config(VllmConfig(), check_compile=False):
        return QuantFP8(**arguments, **compat.uncompiled_layer(QuantFP8))


@dataclass(frozen=True)
class StaticQuant:
    """FP8 quantiser with one given scale."""

    form: str

    def possible(self, ops: OpIndex) -> bool:
        return _converts_to_fp8(ops) if self.form == "native" else "_C.static_scaled_fp8_quant" in ops

    def __str__(self) -> str:
        return f"static[{self.form}]"

    def inputs(self, rows: int, width: int) -> list[torch.Tensor]:
        return [] if self.form == "native" else [empty(rows, width, dtype=FP8_DTYPE)]

    def __call__(self, y: torch.Tensor, scale: torch.Tensor, *buffers: torch.Tensor) -> torch.Tensor:
        if self.form == "native":
            return _quant_fp8(static=True, group_shape=GroupShape.PER_TENSOR).forward_native(y, scale)[0]
        return functionalized(
            torch.ops._C.static_scaled_fp8_quant.default,
            result=buffers[0],
            input=y,
            scale=scale,
            **compat.static_quant_extra_arguments(),
        )[1]


def static_quants() -> list[StaticQuant]:
    return [StaticQuant("native")] + ([StaticQuant("custom_op")] if has_op("static_scaled_fp8_quant") else [])


@dataclass(frozen=True)
class Nvfp4Quant:
    """NVFP4 quantiser: two e2m1 codes a byte, an e4m3 scale for 16 of them in the swizzled layout, one global scale."""

    form: str = "custom_op"

    def possible(self, ops: OpIndex) -> bool:
        return "_C.scaled_fp4_quant" in ops

    def __str__(self) -> str:
        return "nvfp4"

    def inputs(self, rows: int, width: int) -> list[torch.Tensor]:
        scales = empty(-(-rows // 128) * 128, -(-width // 64), dtype=torch.int32)
        return [empty(rows, width // 2, dtype=torch.uint8), scales]

    def __call__(
        self, y: torch.Tensor, global_scale: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, codes, scales = functionalized(
            torch.ops._C.scaled_fp4_quant.out,
            input=y,
            input_scale=global_scale,
            is_sf_swizzled_layout=True,
            output=codes,
            output_scale=scales,
        )
        return codes, scales


def nvfp4_quants() -> list[Nvfp4Quant]:
    return [Nvfp4Quant()] if has_op("scaled_fp4_quant") else []
