# SPDX-License-Identifier: Apache-2.0
"""Linear layers with FP8 weights in blocks take rows that are quantised already.

What: `apply_weights` of the kernel object of one layer (vLLM's Fp8BlockScaledMMLinearKernel) is wrapped, on the object and
not on its class, so that compiled code never sees it. Codes that `carry` their scales go to the kernel's GEMM without its
quantiser; all else goes vLLM's way.

Why: what has computed the rows can write codes in the same kernel. vLLM's layers and methods between hand on what they are
given (RowParallelLinear.forward, Fp8LinearMethod.apply, CompressedTensorsW8A8Fp8.apply_weights).

Since: kernels with this method are there in every version read (0.20.2, 0.26.0, 0.32.0, 0.33.0). Until: vLLM's block kernels
take its `QuantizedActivation`, as other kernels do since 0.33.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import compat, report, roundings
from ..kernels.rounding import FLASHINFER, FLASHINFER_ROWS
from ..ops import block_gemm
from ..ops.quant import GROUP_SIZES, GroupScales

DYNAMIC = "FlashInferFp8DeepGEMMDynamicBlockScaledKernel"
METHODS = ("Fp8LinearMethod", "CompressedTensorsLinearMethod")
"""vLLM's methods of linear layers that hand their input to the kernel as it is."""

_GIVEN = "_fusion_plugin_given"


class Quantiser(NamedTuple):
    """How a linear layer quantises its input."""

    scales: GroupScales
    rounding: str
    """A `quant_rounding`, see ops/quant.py."""

    def __str__(self) -> str:
        size, layout, ue8m0 = self.scales
        return f"group{size}[{self.rounding},{layout}{',ue8m0' if ue8m0 else ''}]"


# ---- handing on ------------------------------------------------------------------------------------------------------


class Given:
    """What a tensor has with it, for the linear layers that read it."""

    def for_(self, linear: OpenLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Codes and scales of x as a linear layer quantises it; None if it has to do so itself."""
        raise NotImplementedError


class OpenLinear(NamedTuple):
    """A linear layer that takes codes."""

    kernel: Any
    linear: Any
    quantiser: Quantiser
    ran: set[str]
    """Whether it has quantised "by itself"."""


class _Carried(Given):
    """The scales of codes that are handed on themselves."""

    def __init__(self, scales: torch.Tensor) -> None:
        self.scales = scales

    def for_(self, linear: OpenLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.scales


def give(x: torch.Tensor, given: Given) -> torch.Tensor:
    """x, with something for the linear layers that read it. It is lost where a view or a copy is handed on."""
    setattr(x, _GIVEN, given)
    return x


def carry(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """codes [M, K], which a linear layer that is `open_to_codes` multiplies by these scales."""
    return give(codes, _Carried(scales))


def open_to_codes(linear: torch.nn.Module, quantiser: Quantiser) -> OpenLinear:
    """Have a layer for which `quantiser_of` has this answer take codes. May be called again."""
    kernel = compat.linear_kernel(linear)
    apply, opened = kernel.apply_weights, OpenLinear(kernel, linear, quantiser, set())
    if hasattr(apply, "_fusion_plugin"):
        return apply._fusion_plugin

    def apply_weights(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        given = getattr(x, _GIVEN, None)
        quantised = given.for_(opened, x) if given is not None else None
        if quantised is None:
            opened.ran.add("by itself")
            return apply(layer, x, bias, **kwargs)
        codes, scales = quantised
        return product(kernel, layer, codes, scales, bias)

    apply_weights._fusion_plugin = opened  # type: ignore[attr-defined]
    kernel.apply_weights = apply_weights
    return opened


def product(
    kernel: Any, layer: Any, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What the kernel's `apply_weights` returns for rows that its quantiser would have made these codes and scales of."""
    weight, weight_scales = compat.block_weight(kernel, layer)
    if type(kernel).__name__ == DYNAMIC:
        out = block_gemm.block_fp8_gemm(codes, scales, weight, weight_scales, **_dynamic(kernel))
    else:
        out = kernel.apply_block_scaled_mm(A=codes, B=weight, As=scales, Bs=weight_scales)
    if bias is not None:
        out = out + bias
    return out.to(dtype=kernel.config.out_dtype)


def _dynamic(kernel: Any) -> dict[str, Any]:
    rows = 0 if compat.batch_invariant() else FLASHINFER_ROWS
    return {"use_ue8m0": kernel.fallback.use_deep_gemm_e8m0, "flashinfer_rows": rows}


def left(model: torch.nn.Module, config: Any, told: set[int]) -> list[report.Missed]:
    """Linear layers of a model that were looked at and have quantised by themselves, but those of these ids."""
    reason = "the linear layer quantises by itself what it reads: no norm and no SiLU·mul hands it on"
    missed = []
    for name, module in compat.eager_modules(model, config):
        opened = getattr(getattr(compat.linear_kernel(module), "apply_weights", None), "_fusion_plugin", None)
        if opened is not None and opened.ran and id(module) not in told:
            missed.append(report.Missed(pass_name="none", reason=reason, module=name))
    return missed


# ---- deciding --------------------------------------------------------------------------------------------------------


def quantiser_of(linear: torch.nn.Module) -> Quantiser | str:
    """How a linear layer quantises its input, or why it cannot be handed codes. To be asked when its weights are loaded."""
    kernel, base = compat.linear_kernel(linear), compat.block_kernel_class()
    kind = type(kernel).__name__
    if kernel is None:
        return f"{type(linear).__name__} has no quantised kernel"
    if base is None or not isinstance(kernel, base):
        return f"{kind} takes no rows quantised in groups"
    method = type(getattr(linear, "quant_method", None)).__name__
    if method not in METHODS:
        return f"{method} may read the rows itself"
    if type(kernel).apply_weights is not base.apply_weights:
        return f"{kind} quantises in a way of its own"
    if kind == DYNAMIC:
        return _of_dynamic(kernel, linear)
    if not kernel.apply_input_quant:
        return f"{kind} quantises inside of its GEMM"
    return _of_layer(kernel)


def _of_dynamic(kernel: Any, linear: torch.nn.Module) -> Quantiser | str:
    if reason := compat.why_dynamic_gemm_is_unknown(FLASHINFER_ROWS):
        return reason
    size = kernel.weight_group_shape.col
    if size != block_gemm.GROUP_SIZE:
        return f"{type(kernel).__name__} quantises groups of {size}; known are groups of {block_gemm.GROUP_SIZE}"
    weight, weight_scales = (tensor.to("meta") for tensor in compat.block_weight(kernel, linear))
    how = block_gemm.SCALES._replace(ue8m0=kernel.fallback.use_deep_gemm_e8m0)
    codes = weight.new_empty((1, weight.shape[1]))
    try:
        block_gemm.block_fp8_gemm(
            codes, how.empty(codes, 1, weight.shape[1]), weight, weight_scales, **_dynamic(kernel)
        )
    except ValueError as e:
        return f"the block GEMM: {e}"
    rounding = roundings.of(roundings.GROUP_QUANT).name
    return Quantiser(how, rounding if compat.batch_invariant() else f"{rounding}_or_{FLASHINFER}")


def _of_layer(kernel: Any) -> Quantiser | str:
    """Of a kernel with a layer of vLLM's class QuantFP8."""
    layer, kind = kernel.quant_fp8, type(kernel).__name__
    if type(layer).__name__ != "QuantFP8" or kernel.use_triton:
        return f"{kind} quantises with another op"
    if layer.static or not layer.is_group_quant or layer.group_size not in GROUP_SIZES:
        return f"{kind} does not quantise groups of {' or '.join(map(str, GROUP_SIZES))}"
    how = compat.runs_as(layer._forward_method)
    if how == "custom_op":
        rounding = roundings.of(roundings.GROUP_QUANT).name
    elif how == "eager" and not layer.use_ue8m0 and compat.runs_references():
        rounding = "native"
    else:
        return f"{kind} quantises in {getattr(layer._forward_method, '__name__', 'code')}; known is forward_cuda"
    layout = "row"
    if compat.packs_scales(layer):
        layout = "packed"
    elif layer.column_major_scales:
        layout = "tma" if layer.tma_aligned_scales and how == "custom_op" else "column"
    return Quantiser(GroupScales(layer.group_size, layout, layer.use_ue8m0), rounding)
