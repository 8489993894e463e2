# SPDX-License-Identifier: Apache-2.0
"""RMS norms that run outside of compiled graphs write the codes of the linear layers that read them, in the same kernel.

What: `_forward_method` of an object of vLLM's class RMSNorm is replaced on that object when the model is loaded. In its
first call it runs as before, and the linear layers that are handed its very result say so (quantised_input.py). From the
second on, or when vLLM serves, it writes normed rows, as before, and the codes and scales that these layers would make of
them.

Why: no graph pass reaches models that vLLM does not compile. Which layer reads which norm differs from model to model and by
parallelism; a look shows it, with nothing to know of model code. Whatever is not handed the very result (a view, a copy,
rows of other ranks) quantises by itself, and routers and indexers have the normed rows.

Since: norms are operations of `vllm.ir`, with an addition too, from 0.26 on. Until: vLLM's norms write codes for the linear
layers after them.

How exact: see ops/rms_norm_quant.py. vLLM's norm adds up a row's squares in another order than this package's kernel, so of
a million codes 0.2 to 0.5 are a step off, and a normed number is where it was next to a rounding boundary. The setting
inexact=leave leaves norms to vLLM.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .. import compat, report, warmup
from ..kernels.rounding import FLASHINFER, FLASHINFER_ROWS, is_native
from ..ops import calls, verify
from ..ops.quant import INPUT_DTYPES
from ..ops.rms_norm_quant import NormInputs, rms_norm_group_fp8_quant
from . import quantised_input
from .quantised_input import Given, OpenLinear, Quantiser

logger = logging.getLogger("vllm.fusion_plugin")

NAME = "eager_rms_norm_quant"
"""In the place of a pass's name."""
NORM = "RMSNorm"
ROUNDINGS = {"vllm_c": "custom_op", "native": "eager"}
"""Of vLLM's implementations of its norm."""
SAMPLE = 8
"""Rows that are compared, to see whether a norm's result is changed before it is read."""

_problem = ""
"""Why all norms are left to vLLM: the op has failed."""


class Case(NamedTuple):
    """What is decided of a norm."""

    reason: str
    """Why it is left to vLLM; "" if it is not."""
    quantiser: Quantiser | None = None
    norm_rounding: str = ""
    add: bool = False
    """Whether a residual was added when it was decided."""

    @property
    def pattern(self) -> str:
        return f"{'fused_add_' * self.add}rms_norm[{self.norm_rounding}]+{self.quantiser}+norm"


class Norm:
    """A norm; called in the place of what vLLM has chosen for it."""

    def __init__(self, module: Any) -> None:
        self.module, self.by_vllm = module, module._forward_method
        self.readers: dict[int, OpenLinear] = {}
        """That its first call has shown."""
        self.calls = 0
        self.add = False
        """Whether a residual was added in that call."""
        self.case: Case | None = None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if _problem or x.dim() != 2 or torch.compiler.is_compiling():
            return self.by_vllm(x, residual)
        if self.case is None:
            if self.calls == 0 or not self.readers or not len(x):
                return self.watched(x, residual)
            self.case = self.decided(x, residual)
        if self.case.reason or x.dtype != self.module.weight.dtype:
            return self.by_vllm(x, residual)
        try:
            codes, scales, normed, *total = self.quantised(self.case, x, residual)
        except Exception as e:  # a Triton that cannot compile it, for example: vLLM's own way is still there
            _leave_all(f"{type(e).__name__}: {e}")
            return self.by_vllm(x, residual)
        quantised_input.give(normed, _Kept(self.case.quantiser, codes, scales))
        return (normed, *total) if residual is not None else normed

    def quantised(self, case: Case, x: torch.Tensor, residual: torch.Tensor | None) -> list[torch.Tensor]:
        """Codes, scales, normed rows, and the sum if there is one."""
        assert case.quantiser is not None
        norm = NormInputs(
            x,
            self.module.weight.data,
            self.module.variance_epsilon,
            residual,
            keep_norm=True,
            norm_rounding=case.norm_rounding,
        )
        return rms_norm_group_fp8_quant(norm, case.quantiser.scales, quant_rounding=case.quantiser.rounding)

    def watched(self, x: torch.Tensor, residual: torch.Tensor | None) -> Any:
        """vLLM's result, whose readers say that they are."""
        result = self.by_vllm(x, residual)
        if len(x) and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.calls, self.add = self.calls + 1, residual is not None
            normed = result[0] if residual is not None else result
            quantised_input.give(normed, _Watched(self, normed[:SAMPLE].clone()))
        return result

    def decided(self, x: torch.Tensor, residual: torch.Tensor | None) -> Case:
        try:
            if not calls.recording():
                return Case("vLLM has run the model once before it serves, and kernels must not be compiled later")
            case = self.decide(x, residual)
            if not case.reason:
                self.try_out(case, x, residual)
            return case
        except Exception as e:  # another vLLM's layers, which must still serve
            return Case(f"{type(e).__name__}: {e}")

    def decide(self, x: torch.Tensor, residual: torch.Tensor | None) -> Case:
        found = {reader.quantiser for reader in self.readers.values()}
        if len(found) > 1:
            return Case(f"its readers quantise unlike: {' and '.join(sorted(map(str, found)))}")
        (quantiser,) = found
        if is_native(quantiser.rounding):
            return Case("its readers quantise in plain torch code")
        given = (x, self.module.weight.data, self.module.variance_epsilon, None)
        if residual is not None:
            provider = compat.ir_provider("fused_add_rms_norm", (x, residual, *given[1:]))
        else:
            provider = compat.ir_provider("rms_norm", given)
        if provider not in ROUNDINGS:
            return Case(f"{NORM} runs in {provider}, whose roundings are not known")
        if x.dtype not in INPUT_DTYPES or (x.dtype != torch.bfloat16 and FLASHINFER in quantiser.rounding):
            return Case(f"{NORM} reads {x.dtype}, which {quantiser} is not known for")
        return Case("", quantiser, ROUNDINGS[provider], residual is not None)

    def try_out(self, case: Case, x: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Run norm and GEMMs on one row, and on as many as another GEMM may multiply. Raises what they raise."""
        with torch.inference_mode(), verify.aside():
            for rows in (1, FLASHINFER_ROWS):
                zeros = x.new_zeros(rows, x.shape[1])
                codes, scales, *_ = self.quantised(case, zeros, None if residual is None else zeros)
                for reader in self.readers.values():
                    quantised_input.product(reader.kernel, reader.linear, codes, scales)


def decide_rest() -> None:
    """Decide the cases of norms that have run once: an engine that compiles nothing may run its model no more before it
    serves."""
    for norm in list(_norms_in_place):
        if norm.case is None and norm.readers:
            x = norm.module.weight.data.new_zeros(1, norm.module.weight.shape[0])
            norm.case = norm.decided(x, x if norm.add else None)


_norms_in_place: weakref.WeakSet[Norm] = weakref.WeakSet()


class _Watched(Given):
    """Of a result of vLLM's, in a norm's first call."""

    def __init__(self, norm: Norm, sample: torch.Tensor) -> None:
        self.norm, self.sample = norm, sample

    def for_(self, linear: OpenLinear, x: torch.Tensor) -> None:
        if torch.equal(x[: len(self.sample)], self.sample):
            self.norm.readers[id(linear.linear)] = linear
        else:
            self.norm.case = Case("its rows are changed before they are read")


class _Kept(Given):
    """Codes and scales of normed rows."""

    def __init__(self, quantiser: Quantiser | None, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self.quantiser, self.codes, self.scales = quantiser, codes, scales

    def for_(self, linear: OpenLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (self.codes, self.scales) if linear.quantiser == self.quantiser else None


def _leave_all(reason: str) -> None:
    global _problem
    if reason != _problem:
        logger.warning("vllm-fusion-plugin: norms outside of graphs and their quantisers are left to vLLM: %s", reason)
    _problem = reason


# ---- putting in place ------------------------------------------------------------------------------------------------


def attach(model: torch.nn.Module, config: Any) -> None:
    """Have the norms of a model that run outside of compiled code look for readers, and the linear layers there answer.
    May be called again."""
    norms = [module for _, module in _norms(model, config) if not why_not(module)]
    for norm in norms:
        if not isinstance(norm._forward_method, Norm):
            norm._forward_method = Norm(norm)
            _norms_in_place.add(norm._forward_method)
            warmup.first(decide_rest)
    for _, module in compat.eager_modules(model, config) if norms else ():
        if compat.is_quantised(module):
            quantiser = quantised_input.quantiser_of(module)
            if isinstance(quantiser, Quantiser):
                quantised_input.open_to_codes(module, quantiser)


def _norms(model: torch.nn.Module, config: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in compat.eager_modules(model, config) if type(module).__name__ == NORM)


def readers(model: torch.nn.Module, config: Any) -> set[int]:
    """Ids of the linear layers that `boundaries` tells of."""
    norms = [module._forward_method for _, module in _norms(model, config)]
    return {id(r.linear) for norm in norms if isinstance(norm, Norm) and norm.case for r in norm.readers.values()}


def why_not(module: Any) -> str:
    """Why a norm is left to vLLM whatever reads it; "" if it is not."""
    if isinstance(module._forward_method, Norm):
        return ""
    if compat.batch_invariant():
        return "VLLM_BATCH_INVARIANT asks for vLLM's own norm"
    if not compat.has_ir_op("fused_add_rms_norm"):
        return "this vLLM has no op for a norm with an addition"
    if compat.runs_as(module._forward_method) not in ("custom_op", "eager"):  # each asks vllm.ir for an implementation
        return f"{NORM} runs in a way that is not known"
    if module.variance_size_override is not None or not module.has_weight:
        return f"{NORM} has no weight, or another width"
    return ""


# ---- reporting -------------------------------------------------------------------------------------------------------


def boundaries(
    model: torch.nn.Module, config: Any, record: report.EngineRecord
) -> tuple[list[report.Found], list[report.Missed]]:
    """What became of the norms of a model that run outside of compiled code and that linear layers with FP8 weights in
    blocks read."""
    found: list[report.Found] = []
    missed: list[report.Missed] = []
    for name, module in _norms(model, config):
        norm = module._forward_method
        if not isinstance(norm, Norm) or norm.case is None:
            continue  # nothing is known to quantise what it writes
        reason = record.norms_left or _problem or norm.case.reason
        if reason:
            missed.append(report.Missed(pass_name=NAME, reason=reason, module=name))
        else:
            found.append(report.Found(pass_name=NAME, pattern=norm.case.pattern, module=name))
    return found, missed
