# SPDX-License-Identifier: Apache-2.0
"""Quantisers as vLLM's graphs have them: the pieces that patterns are put together from.

Each has the variants that vLLM gives it: a custom op of `torch.ops._C`, or the layer's `forward_native` decomposed to aten.
A variant whose op this build of vLLM lacks is not available, and no pattern is made with it.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

from .. import compat, roundings
from ..graph import OpIndex, arguments_of, called_op, same_strides
from ..kernels.fp8 import FORMATS, OCP
from ..kernels.rounding import FLASHINFER
from ..ops import block_gemm, group_quant  # noqa: F401  (registers the ops)
from ..ops.quant import EPS, GroupScales
from .pattern import empty, functionalized, has_op, make_layer

# In which vLLM's quantisers write codes on this platform: its name, which ops take, and what is behind it.
FP8_NAME = compat.fp8_format()
FP8 = FORMATS[FP8_NAME]
AITERS_FP8_NAME = compat.fp8_format_of_aiter()

# ---- quantisers ------------------------------------------------------------------------------------------------------

# Quantisers that take one tensor and write codes, with those of their arguments that decide what is written.
OPAQUE_QUANT_OPS = (
    "_C.per_token_group_fp8_quant",
    "_C.per_token_group_fp8_quant_packed",
    "_C.dynamic_per_token_scaled_fp8_quant",
    "_C.dynamic_scaled_fp8_quant",
    "_C.static_scaled_fp8_quant",
    "_C.scaled_fp4_quant",
)


def refuse_codes(codes: torch.Tensor) -> str | None:
    return None if codes.dtype == FP8.dtype else f"the quantiser writes {codes.dtype}; fused for {FP8.dtype}"


def share_equal_quantisers(graph: fx.Graph) -> list[fx.Node]:
    """Where a graph quantises one value twice in the same way, let it use the first result; the first calls of those.

    vLLM's layers quantise each for itself, and Inductor's common subexpressions do not reach into ops that write to
    buffers. A value's codes and scales are the same, however often they are made.
    """
    first: dict[Any, fx.Node] = {}
    shared = []
    for node in list(graph.nodes):
        if called_op(node) not in OPAQUE_QUANT_OPS or isinstance(node.target, torch._ops.OpOverload):
            continue  # no quantiser, or not functionalised
        same = first.setdefault(_what_is_quantised(node), node)
        if same is node:
            continue
        _take_results_of(same, node)
        shared.append(same)
    return shared


def share_equal_aiter_quantisers(graph: fx.Graph) -> None:
    """The same of AITER's, which write to no buffers: two layers that read one value quantise it twice."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if called_op(node) not in (compat.AITER_GROUP_QUANT, compat.AITER_TOKEN_QUANT):
            continue
        same = first.setdefault((node.target, node.args, tuple(node.kwargs.items())), node)
        if same is not node:
            _take_results_of(same, node)


def _take_results_of(same: fx.Node, node: fx.Node) -> None:
    """Let whoever reads a node's results read those of an equal one, and erase the node."""
    results = {user.args[1]: user for user in same.users if user.target is operator.getitem}
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] in results:
            user.replace_all_uses_with(results[user.args[1]])
            node.graph.erase_node(user)
    node.replace_all_uses_with(same)
    node.graph.erase_node(node)


def _what_is_quantised(node: fx.Node) -> Any:
    """Equal for two calls that write equal results: op, inputs, numbers, and what buffers look like."""
    op: Any = node.args[0]  # node.target is auto_functionalized
    written = {argument.name for argument in op._schema.arguments if argument.is_write}
    arguments = []
    value: Any
    for name, value in sorted(node.kwargs.items()):
        if name in written:
            buffer = value.meta["val"]
            value = (str(buffer.shape), buffer.dtype, str(buffer.stride()))
        arguments.append((name, value if isinstance(value, fx.Node) else repr(value)))
    return op, tuple(arguments)


def _converts_to_fp8(ops: OpIndex) -> bool:
    return any(node.args[1] == FP8.dtype for node in ops.get("prims.convert_element_type", []))


def _fp8_argument(name: str) -> tuple[str, ...]:
    return () if name == OCP else (name,)


class Fp8Quant:
    """What FP8 quantisers have in common: the rounding of a custom op is the installed vLLM's, of native code its own."""

    variant: str
    op: ClassVar[str]
    """Name of the custom op in roundings.py."""

    @property
    def rounding(self) -> str:
        """`quant_rounding` to hand to an op."""
        return self.variant if self.variant == "native" else roundings.of(self.op).name

    @property
    def fp8(self) -> tuple[str, ...]:
        """The format of its codes, to hand to an op as its last argument; none if it is the ops' default."""
        return _fp8_argument(FP8_NAME)

    @property
    def inexactness(self) -> str:
        """Why an op's bytes are not this quantiser's, or nothing if they are."""
        return "" if self.variant == "native" else roundings.of(self.op).reason


@dataclass(frozen=True)
class GroupQuant(Fp8Quant):
    """Dynamic FP8 quantiser with one scale a group along the row, in one of its layouts and variants.

    variant "split": this package's op, which block_gemm.py puts in front of a GEMM that quantised inside; "experts":
    likewise, which experts_input_quant.py puts in front of experts. "aiter": AITER's op, on ROCm.
    """

    variant: str
    scales: GroupScales
    op = roundings.GROUP_QUANT
    readers = 1  # nodes that read the value to quantise

    def possible(self, ops: OpIndex) -> bool:
        if self.variant == "native":
            maxima = (node.all_input_nodes[0].meta["val"].shape[-1] for node in ops.get("aten.max", []))
            rounds_up = "aten.log2" in ops or not self.scales.ue8m0
            return _converts_to_fp8(ops) and self.scales.group_size in maxima and rounds_up
        if self.variant in (SPLIT_GEMM, EXPERTS):
            return any(split_scales(node, self.variant) == self.scales for node in ops.get(OURS, []))
        if self.variant == "aiter":
            return any(node.args[1] == self.scales.group_size for node in ops.get(compat.AITER_GROUP_QUANT, []))
        wanted = {k: v for k, v in self._arguments().items() if k not in ("eps", "fp8_min", "fp8_max")}
        nodes = ops.get(f"_C.{self._op_name}", [])
        return any(all(node.kwargs.get(k) == v for k, v in wanted.items()) for node in nodes)

    @property
    def _op_name(self) -> str:
        packed = self.scales.layout == "packed"
        return "per_token_group_fp8_quant_packed" if packed else "per_token_group_fp8_quant"

    def _arguments(self) -> dict[str, Any]:
        """What vLLM's op is called with for such scales, in the order of its schema: the matcher compares that, too."""
        size, layout, ue8m0 = self.scales
        numbers = {"group_size": size, "eps": EPS, "fp8_min": -FP8.max, "fp8_max": FP8.max}
        if layout == "packed":
            return numbers
        return numbers | {
            "scale_ue8m0": ue8m0,
            "dummy_is_scale_transposed": layout != "row",
            "dummy_is_tma_aligned": layout == "tma",
        }

    def __str__(self) -> str:
        size, layout, ue8m0 = self.scales
        return f"group{size}[{self.variant},{layout}{',ue8m0' if ue8m0 else ''}]"

    @property
    def has_buffers(self) -> bool:
        """Whether a graph hands it the tensors that it writes to."""
        return self.variant == "custom_op"

    def inputs(self, rows: int, width: int) -> list[torch.Tensor]:
        if not self.has_buffers:
            return []
        return [empty(rows, width, dtype=FP8.dtype), self.scales.empty(empty(0, dtype=torch.float32), rows, width)]

    @property
    def fp8(self) -> tuple[str, ...]:
        return _fp8_argument(AITERS_FP8_NAME) if self.variant == "aiter" else super().fp8

    @property
    def inexactness(self) -> str:
        return roundings.of(roundings.AITER_GROUP_QUANT).reason if self.variant == "aiter" else super().inexactness

    @property
    def rounding(self) -> str:
        if self.variant == SPLIT_GEMM:
            return split_rounding()
        if self.variant == "aiter":
            return roundings.of(roundings.AITER_GROUP_QUANT).name
        floored = self.variant == "native" and _native_scale_is_floored_first()
        return "native_floored" if floored else super().rounding

    def refuse(self, codes: torch.Tensor, scales: torch.Tensor) -> str | None:
        """Why the tensors that a call of the custom op writes to do not fit its arguments, or None if they do."""
        if reason := refuse_codes(codes):
            return reason
        if scales.dim() != 2:
            return f"the scales have {scales.dim()} dimensions; fused where there are 2"
        want = self.scales.empty(scales, scales.shape[0], codes.shape[-1])
        if not same_strides(scales, want):
            return f"the scales' strides {tuple(scales.stride())} are not those of the layout in the call"
        return None

    def __call__(self, y: torch.Tensor, *buffers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.variant == "native":
            layer = _quant_fp8(
                static=False,
                group_shape=GroupShape(1, self.scales.group_size),
                column_major_scales=self.scales.layout != "row",
                use_ue8m0=self.scales.ue8m0,
            )
            return layer.forward_native(y)
        if self.variant in (SPLIT_GEMM, EXPERTS):
            return torch.ops.vllm_fusion_plugin.group_fp8_quant.default(y, *self.scales, self.rounding)
        if self.variant == "aiter":
            return torch.ops.vllm.rocm_aiter_group_fp8_quant.default(y, self.scales.group_size)
        output = "output_s_packed" if self.scales.layout == "packed" else "output_s"
        _, codes, scales = functionalized(
            getattr(torch.ops._C, self._op_name).default,
            input=y,
            output_q=buffers[0],
            **{output: buffers[1]},
            **self._arguments(),
        )
        return codes, scales


def group_quants(group_sizes: tuple[int, ...]) -> list[GroupQuant]:
    """Every group quantiser that vLLM can put into a graph."""
    variants = ["native"] + (["custom_op"] if has_op("per_token_group_fp8_quant") else [])
    packed = has_op("per_token_group_fp8_quant_packed")
    return [
        GroupQuant(variant, GroupScales(group_size, layout, ue8m0))
        for variant in variants
        for group_size in group_sizes
        # Columns first: the native one's graph is the row-major one and a transposition after it, and Inductor
        # replaces what fits first.
        for layout in ("tma", "column", "row")
        for ue8m0 in (False, True)
        # forward_native knows no TMA alignment: it returns plain column-major scales
        if not (variant == "native" and layout == "tma")
    ] + [
        *(GroupQuant(SPLIT_GEMM, block_gemm.SCALES._replace(ue8m0=ue8m0)) for ue8m0 in (False, True)),
        *(GroupQuant(EXPERTS, GroupScales(size, "row", ue8m0)) for size in group_sizes for ue8m0 in (False, True)),
        *(GroupQuant("custom_op", GroupScales(size, "packed", True)) for size in group_sizes if packed and size == 128),
    ]


def aiter_group_quants() -> list[GroupQuant]:
    """AITER's group quantiser, if it is on: in rows, not transposed."""
    has = compat.has_aiter_op(compat.AITER_GROUP_QUANT.rpartition(".")[2])
    return [GroupQuant("aiter", GroupScales(128))] if has else []


def split_rounding() -> str:
    """What the quantiser inside of vLLM's dynamic block GEMM does: FlashInfer's below 32 rows, vLLM's from there on, or for
    all with VLLM_BATCH_INVARIANT."""
    rounding = roundings.of(roundings.GROUP_QUANT).name
    return rounding if compat.batch_invariant() else f"{rounding}_or_{FLASHINFER}"


def split_scales(node: fx.Node, variant: str) -> GroupScales | None:
    """Of a quantiser that was split off a GEMM, or off experts; None of any other node."""
    if called_op(node) != OURS or node.meta.get(SPLIT) != variant:
        return None
    arguments = arguments_of(node)
    return GroupScales(*(arguments[name] for name in ("group_size", "scale_layout", "use_ue8m0")))


def split_quantisers(graph: fx.Graph, variant: str) -> dict[fx.Node, GroupScales]:
    """Quantisers that were split off so, and that nothing has fused, with their scales."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.vllm_fusion_plugin.group_fp8_quant.default)
    return {node: scales for node in nodes if (scales := split_scales(node, variant)) is not None}


OURS = "vllm_fusion_plugin.group_fp8_quant"
SPLIT = "vllm_fusion_plugin_split"
"""In the `meta` of such a quantiser, its variant; also of a GEMM that was split in vain and is vLLM's again."""
SPLIT_GEMM, EXPERTS = "split", "experts"


def _quant_fp8(**arguments: Any) -> QuantFP8:
    return make_layer(QuantFP8, **arguments, **compat.uncompiled_layer(QuantFP8))


@functools.cache
def _native_scale_is_floored_first() -> bool:
    """Whether `QuantFP8.forward_native` gives a UE8M0 scale its floor before it rounds it up (since 0.33). Asked of it: a
    scale that is rounded up last is a power of two, also that of a group of zeros."""
    with unset_fake_temporarily():
        layer = _quant_fp8(static=False, group_shape=GroupShape(1, 128), column_major_scales=False, use_ue8m0=True)
        scale = layer.forward_native(torch.zeros(1, 128, dtype=torch.bfloat16, device="cpu"))[1]
        return float(scale.view(torch.int32).bitwise_and(0x7FFFFF).max()) == 0


@dataclass(frozen=True)
class TokenQuant(Fp8Quant):
    """Dynamic FP8 quantiser with one scale a row; `bounded` if an upper bound of the scales is given. variant
    "aiter": AITER's op, on ROCm."""

    variant: str
    bounded: bool
    op = roundings.TOKEN_QUANT

    @property
    def readers(self) -> int:
        return 2 if self.variant == "native" else 1

    def possible(self, ops: OpIndex) -> bool:
        if self.variant == "native":
            has_maximum = "aten.amax" in ops or "aten.max" in ops  # the latter until 0.26
            return _converts_to_fp8(ops) and "aten.reciprocal" in ops and has_maximum
        if self.variant == "aiter":
            return any(node.args[1] == FP8.dtype for node in ops.get(compat.AITER_TOKEN_QUANT, []))
        nodes = ops.get("_C.dynamic_per_token_scaled_fp8_quant", [])
        return any(isinstance(node.kwargs.get("scale_ub"), fx.Node) == self.bounded for node in nodes)

    def __str__(self) -> str:
        return f"token[{self.variant}{',bounded' if self.bounded else ''}]"

    def inputs(self, rows: int, width: int) -> list[torch.Tensor]:
        """The upper bound, if there is one, and what the custom op writes to."""
        bound = [empty(1, dtype=torch.float32)] if self.bounded else []
        if self.variant != "custom_op":
            return bound
        return [*bound, empty(rows, width, dtype=FP8.dtype), empty(rows, 1, dtype=torch.float32)]

    @property
    def fp8(self) -> tuple[str, ...]:
        return _fp8_argument(AITERS_FP8_NAME) if self.variant == "aiter" else super().fp8

    @property
    def inexactness(self) -> str:
        return roundings.of(roundings.AITER_TOKEN_QUANT).reason if self.variant == "aiter" else super().inexactness

    @property
    def rounding(self) -> str:
        return roundings.of(roundings.AITER_TOKEN_QUANT).name if self.variant == "aiter" else super().rounding

    @property
    def input_count(self) -> int:
        return self.bounded + 2 * (self.variant == "custom_op")

    def bound_of(self, inputs: tuple[Any, ...]) -> Any:
        """The upper bound among such inputs, or None."""
        return inputs[0] if self.bounded else None

    def refuse(self, *inputs: torch.Tensor) -> str | None:
        """Why inputs of a graph's quantiser do not fit, or None if they do."""
        if self.bounded and (count := inputs[0].numel()) != 1:
            return f"{count} upper bounds of the scales; fused for one"
        return refuse_codes(inputs[self.bounded]) if self.variant == "custom_op" else None

    def __call__(self, y: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale_ub, buffers = self.bound_of(inputs), inputs[self.bounded :]
        if self.variant == "native":
            return _quant_fp8(static=False, group_shape=GroupShape.PER_TOKEN).forward_native(y, scale_ub=scale_ub)
        if self.variant == "aiter":
            return torch.ops.vllm.rocm_aiter_per_token_quant.default(y, FP8.dtype)
        _, codes, scales = functionalized(
            torch.ops._C.dynamic_per_token_scaled_fp8_quant.default,
            result=buffers[0],
            input=y,
            scale=buffers[1],
            scale_ub=scale_ub,
        )
        return codes, scales


def token_quants() -> list[TokenQuant]:
    variants = ["native"] + (["custom_op"] if has_op("dynamic_per_token_scaled_fp8_quant") else [])
    # Bounded first: an unbounded pattern's "no bound" is a wildcard until Inductor looks closer.
    return [TokenQuant(variant, bounded) for variant in variants for bounded in (True, False)]


def aiter_token_quants() -> list[TokenQuant]:
    """AITER's token quantiser, if it is on."""
    has = compat.has_aiter_op(compat.AITER_TOKEN_QUANT.rpartition(".")[2])
    return [TokenQuant("aiter", bounded=False)] if has else []


@dataclass(frozen=True)
class StaticQuant(Fp8Quant):
    """FP8 quantiser with one given scale."""

    variant: str
    op = roundings.STATIC_QUANT
    readers = 1

    def possible(self, ops: OpIndex) -> bool:
        return _converts_to_fp8(ops) if self.variant == "native" else "_C.static_scaled_fp8_quant" in ops

    def __str__(self) -> str:
        return f"static[{self.variant}]"

    def inputs(self, rows: int, width: int) -> list[torch.Tensor]:
        return [] if self.variant == "native" else [empty(rows, width, dtype=FP8.dtype)]

    def __call__(self, y: torch.Tensor, scale: torch.Tensor, *buffers: torch.Tensor) -> torch.Tensor:
        if self.variant == "native":
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
    """NVFP4 quantiser: two e2m1 codes a byte, an e4m3 scale for 16 of them, swizzled or row-major, one global scale."""

    variant: str = "custom_op"
    swizzled: bool = True
    readers = 1
    rounding = "custom_op"
    inexactness = ""

    def possible(self, ops: OpIndex) -> bool:
        return any(n.kwargs.get("is_sf_swizzled_layout") == self.swizzled for n in ops.get("_C.scaled_fp4_quant", []))

    def __str__(self) -> str:
        return "nvfp4" if self.swizzled else "nvfp4[row]"

    def inputs(self, rows: int, width: int) -> list[torch.Tensor]:
        if self.swizzled:
            scales = empty(-(-rows // 128) * 128, -(-width // 64), dtype=torch.int32)
        else:
            scales = empty(rows, width // 16, dtype=torch.uint8)
        return [empty(rows, width // 2, dtype=torch.uint8), scales]

    def __call__(
        self, y: torch.Tensor, global_scale: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, codes, scales = functionalized(
            torch.ops._C.scaled_fp4_quant.out,
            input=y,
            input_scale=global_scale,
            is_sf_swizzled_layout=self.swizzled,
            output=codes,
            output_scale=scales,
        )
        return codes, scales


def nvfp4_quants() -> list[Nvfp4Quant]:
    return [Nvfp4Quant()] if has_op("scaled_fp4_quant") else []
