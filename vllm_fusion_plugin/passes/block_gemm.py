# SPDX-License-Identifier: Apache-2.0
"""SplitBlockGemmPass: vLLM's block GEMM that quantises inside becomes a quantiser and a GEMM, for other passes to fuse.

On Hopper, where FlashInfer is usable, vLLM's linear layers call `dynamic_flashinfer_deepgemm_blockscale_gemm` with bf16
rows, which are quantised in there, where no pass sees it. This pass runs before all fusion passes. What none of them has
fused keeps this package's quantiser; with `lone_group_quant=false` it becomes vLLM's op again.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx
from vllm.config import VllmConfig

from .. import compat, report, roundings
from ..graph import arguments_of, called_op
from ..kernels import block_gemm as kernels
from ..kernels.rounding import FLASHINFER_ROWS
from ..ops import block_gemm, group_quant  # noqa: F401  (registers the ops)
from . import quantisers, splits
from .base import FusionPass

ops = torch.ops.vllm_fusion_plugin


class SplitBlockGemmPass(FusionPass):
    """Splits vLLM's dynamic block GEMM. Takes a VllmConfig; raises NotImplementedError where this vLLM's is another."""

    name: ClassVar[str] = "split_block_gemm_pass"

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        if reason := compat.why_dynamic_gemm_is_unknown(FLASHINFER_ROWS):
            raise NotImplementedError(reason)

    def _run(self, graph: fx.Graph) -> None:
        quantised: dict[Any, tuple[fx.Node, fx.Node]] = {}
        self.refused.clear()
        self.seen_in_refused.clear()
        for node in list(graph.nodes):
            if called_op(node) != compat.DYNAMIC_BLOCK_GEMM:
                continue
            if reason := self._inexact() or _refuse(node):
                self.refused[node] = reason
                self.seen_in_refused[node] = node
            else:
                split(graph, node, quantised, self._flashinfer_rows(node))

    def _inexact(self) -> str:
        """Why the split would not have the bytes of vLLM's op, if the settings want it left alone then."""
        reason = roundings.of(roundings.GROUP_QUANT).reason
        if reason and self.settings.inexact == "leave":
            return f"{reason}, and the setting inexact is 'leave'"
        return ""

    def _flashinfer_rows(self, gemm: fx.Node) -> int:
        """For fewer rows than that FlashInfer's kernel runs: vLLM's number, or, where the setting block_gemm asks for the
        fastest and times are known, theirs, which is reported."""
        if compat.batch_invariant():
            return 0
        if self.settings.block_gemm == "vllm":
            return FLASHINFER_ROWS
        gpu, (columns, width) = compat.device_name(), arguments_of(gemm)["weight"].meta["val"].shape
        change = kernels.fastest_change(gpu, columns, width)
        what = f"block_gemm='fastest': weights of {columns} rows, {width} wide"
        if change is None:
            report.RECORDER.note(f"{what}, run vLLM's choice of kernel: not timed on {gpu}")
        elif change != FLASHINFER_ROWS:
            report.RECORDER.note(f"{what}, run DeepGEMM from {change} rows on; vLLM does from {FLASHINFER_ROWS}")
        return FLASHINFER_ROWS if change is None else change


def _refuse(gemm: fx.Node) -> str | None:
    given = arguments_of(gemm)
    x = given["input"].meta["val"]
    if x.dtype != torch.bfloat16:
        return f"the block GEMM's input is {x.dtype}; split for torch.bfloat16"
    if given["group_size"] != block_gemm.GROUP_SIZE:
        return f"the block GEMM quantises groups of {given['group_size']}; split for {block_gemm.GROUP_SIZE}"
    try:
        _values(given, FLASHINFER_ROWS)
    except ValueError as e:
        return f"the block GEMM is not split: {e}"
    return None


def _values(given: dict[str, Any], flashinfer_rows: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What quantiser and GEMM write, as fake tensors. Raises ValueError on what they do not take."""
    x, weight, weight_scales = (given[name].meta["val"] for name in ("input", "weight", "weight_scale"))
    codes, scales = ops.group_fp8_quant.default(x, *_quantiser(given))
    how = (given["use_deep_gemm_e8m0"], flashinfer_rows)
    return (codes, scales), ops.block_fp8_gemm.default(codes, scales, weight, weight_scales, *how)


def _quantiser(given: dict[str, Any]) -> tuple[Any, ...]:
    scales = block_gemm.SCALES._replace(ue8m0=given["use_deep_gemm_e8m0"])
    return *scales, quantisers.split_rounding()


def split(graph: fx.Graph, gemm: fx.Node, quantised: dict[Any, tuple[fx.Node, fx.Node]], flashinfer_rows: int) -> None:
    """Replace vLLM's op by a quantiser, or by the one that is in `quantised` for the same input, and a GEMM."""
    given = arguments_of(gemm)
    written, product = _values(given, flashinfer_rows)
    key = (given["input"], given["use_deep_gemm_e8m0"])
    if key not in quantised:
        arguments = (given["input"], *_quantiser(given))
        quantised[key] = splits.insert_quantiser(gemm, arguments, written, quantisers.SPLIT_GEMM)
    how = (given["use_deep_gemm_e8m0"], flashinfer_rows)
    arguments = (*quantised[key], given["weight"], given["weight_scale"], *how)
    splits.replace(gemm, ops.block_fp8_gemm.default, arguments, {"val": product})


def join(graph: fx.Graph) -> None:
    """Put vLLM's op back where nothing has fused the quantiser that was split off."""
    whole: Any = compat.dynamic_block_gemm()

    def put_back(x: fx.Node, gemm: fx.Node) -> None:
        given = arguments_of(gemm)
        arguments = (x, given["weight"], given["weight_scales"], block_gemm.GROUP_SIZE, given["use_ue8m0"])
        splits.replace(gemm, whole, arguments, {quantisers.SPLIT: True})

    splits.join(graph, quantisers.SPLIT_GEMM, put_back)
