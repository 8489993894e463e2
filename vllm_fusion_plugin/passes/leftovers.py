# SPDX-License-Identifier: Apache-2.0
"""What is left in a graph when all passes have run: every quantiser there, once, with what made its input and why the two
were not fused. And the boundaries that vLLM's own code has fused. Reports, and changes nothing.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import VllmConfig

from .. import compat, report
from ..graph import called_op, quantised
from ..ops.quant import EPS, GROUP_SIZES, INPUT_DTYPES
from ..rank_report import UNFORESEEN
from . import producers, quantisers
from .attn_quant import AttentionQuantPass
from .base import FusionPass
from .producers import Producer
from .quantiser_nodes import VIEWS, Fused, Quantiser, find
from .quantisers import FP8

logger = logging.getLogger("vllm.fusion_plugin")

NO_PASS = "none"
"""In the place of a pass's name, where no pass fuses what made a quantiser's input."""
LONE, SPLIT = "GroupQuantPass", "SplitBlockGemmPass"

# What became of a quantiser that a pass of ours has seen, and that is fused with nothing.
_ALONE = {
    "ours": "; it runs this package's kernel, by itself",
    "joined": "; vLLM's GEMM quantises inside again (lone_group_quant=false)",
}


class Leftovers(InductorPass):
    """The last pass."""

    def __init__(self, passes: Sequence[Any], config: VllmConfig) -> None:
        """passes: those before it, the list that more may be added to."""
        self.passes = passes
        self.splits = bool(config.compilation_config.splitting_ops)
        self.config = config
        self._before: set[str] = set()
        self._quantisers: list[Quantiser] = []

    def uuid(self) -> str:
        return "vllm_fusion_plugin.leftovers"  # changes no graph, so no artefact depends on it

    def begin(self, graph: fx.Graph) -> None:
        """Called before the first pass: what is fused by now is fused by vLLM's model code."""
        try:
            self._before = {fused.node.name for fused in find(graph)[1]}
        except Exception as e:  # a report must never stop a model from compiling
            self._before = set()
            logger.warning("vllm-fusion-plugin: what vLLM's model code has fused cannot be found out: %r", e)

    def __call__(self, graph: fx.Graph) -> None:
        mark = report.RECORDER.mark()
        try:
            self._report(graph)
        except Exception as e:  # a report must never stop a model from compiling
            report.RECORDER.take_back(mark)
            what = f"what is left in a graph cannot be reported: {type(e).__name__}: {e}"
            logger.warning("vllm-fusion-plugin: %s", what, exc_info=True)
            report.RECORDER.note(what)

    def _report(self, graph: fx.Graph) -> None:
        self._quantisers, fused = find(graph)
        for boundary in fused:
            self._report_fused(boundary)
        reported: set[tuple[int, fx.Node]] = set()
        for quantiser in self._quantisers:
            if called_op(quantiser.node) in compat.OPAQUE_MLPS and not compat.experts_quantise(self.config):
                continue
            producer = self._made(quantiser.value)
            pass_name, reason = self._why(quantiser, producer, reported)
            module = _module(quantiser, producer)
            report.RECORDER.missed(pass_name, reason, module, module, _width(quantiser))
        self._report_refused(graph, reported)

    def _report_fused(self, boundary: Fused) -> None:
        by = report.MODEL_CODE if boundary.node.name in self._before else report.VLLMS_PASS
        if by == report.VLLMS_PASS and report.RECORDER.report.passes.get(boundary.owner) == "ours":
            return  # put there by our pass, which has reported it
        pattern = f"{boundary.pattern}[{called_op(boundary.node)}]"
        results = quantised([boundary.node, *boundary.node.users])
        report.RECORDER.found(by, pattern, report.module_of(boundary.node), *results)

    def _report_refused(self, graph: fx.Graph, reported: set[tuple[int, fx.Node]]) -> None:
        """Matches that were refused where this module sees no quantiser."""
        here = set(graph.nodes)
        for p in self._ours():
            for place, reason in p.refused.items():
                if place in here and (id(p), place) not in reported:
                    report.RECORDER.missed(p.pass_name, reason, report.module_of(place))

    def _ours(self) -> list[FusionPass]:
        return [p for p in self.passes if isinstance(p, FusionPass)]

    def _pass(self, name: str) -> FusionPass | None:
        return next((p for p in self._ours() if type(p).__name__ == name), None)

    def _made(self, value: fx.Node) -> Producer:
        """What has made a value; attention with the backends of the layers that it may be."""
        made = producers.of(value)
        p = self._pass(producers.FUSED[made.kind][0]) if made.kind in ("attention", "mla") else None
        if isinstance(p, AttentionQuantPass):
            made.words += f" ({p.attention.backends(made.node)})"
        return made

    # -- reasons --

    def _why(self, q: Quantiser, made: Producer, reported: set[tuple[int, fx.Node]]) -> tuple[str, str]:
        """The pass that a leftover concerns, and why it is left."""
        owner, _ = producers.FUSED.get(made.kind, (NO_PASS, ()))
        pass_name = PASS_NAMES.get(owner, NO_PASS)
        if name := next((n for n in (called_op(q.node),) if n in compat.OPAQUE_MLPS), None):
            refused = self._refused(q, made, reported)
            return NO_PASS, compat.OPAQUE_MLPS[name] + (f": {refused[1]}" if refused else "")
        if q.variant == "inside":
            return pass_name, f"{self._inside(q, made, reported)}; before it: {made.words}"
        alone = _ALONE.get(q.variant, "")
        if refused := self._refused(q, made, reported):
            return refused[0], refused[1] + alone
        reason = self._structure(q, made)
        if reason is None:
            state = self._state(owner) or UNFORESEEN
            reason = f"{made.words} is followed by {q}, and {state}"
        return pass_name, reason + (alone or self._by_itself(q, made))

    def _inside(self, q: Quantiser, made: Producer, reported: set[tuple[int, fx.Node]]) -> str:
        """Which op quantises inside, and why it was not split if it is one that can be."""
        what = compat.OPAQUE_QUANTISERS[called_op(q.node)]
        if called_op(q.node) != compat.DYNAMIC_BLOCK_GEMM:
            return what
        if refused := self._refused(q, made, reported):
            return f"{what}: {refused[1]}"
        return f"{what}: {self._state(SPLIT) or f'{SPLIT} has not split it'}"

    def _refused(self, q: Quantiser, made: Producer, reported: set[tuple[int, fx.Node]]) -> tuple[str, str] | None:
        """The first pass that has found a pattern here and refused it, and why."""
        # Where another op has replaced the quantiser, what made its value is still there.
        nodes = [q.value, *made.chain, made.node] if q.variant in _ALONE else [q.node]
        found = None
        for p in self._ours():
            for node in nodes:
                place = p.seen_in_refused.get(node)
                if place in p.refused:
                    reported.add((id(p), place))
                    found = found or (p.pass_name, p.refused[place])
        return found

    def _structure(self, q: Quantiser, made: Producer) -> str | None:
        """What in a graph keeps the two from being fused, whatever the flags are; None if nothing that is known."""
        if made.node.op != "call_function":
            return f"it quantises {made.words}" + (
                ": vLLM splits the model at attention and compiles each part by itself" if self.splits else ""
            )
        kinds = producers.FUSED.get(made.kind, (NO_PASS, ()))[1]
        if not kinds:
            return f"no pass fuses {made.words} with {q}"
        if (name := called_op(made.node)) in compat.ALLREDUCE_NORMS:
            return (
                "vLLM made one op of the norm and the all-reduce before it (fuse_allreduce_rms); the quantiser runs by "
                "itself"
            )
        if name.startswith("vllm_fusion_plugin."):
            what = "SiLU·mul" if made.kind == "silu_mul" else "the norm"
            return f"{what} is fused with one quantiser already; its result is also read by {q}"
        fused = f"with {made.words} are fused: {', '.join(kinds)}"
        if q.kind not in kinds:
            return f"{made.words} is followed by {q}; {fused}"
        if q.variant == "triton":
            return f"{made.words} is followed by {q}; fused are vLLM's ops and plain torch code"
        if q.kind in ("group", "packed") and (reason := _unlike(q)):
            return f"{made.words} is followed by {q}, {reason}"
        if made.kind == "mla" and q.kind == "group" and q.variant == "native":
            return f"{made.words} is followed by {q}; fused is vLLM's op (custom_ops +quant_fp8)"
        if made.between:
            return f"{' and '.join(reversed(made.between))} is between {made.words} and {q}; fused where they touch"
        dtype = q.value.meta["val"].dtype
        if q.variant == "op" and dtype not in INPUT_DTYPES:
            return f"{made.words} gives {dtype}; fused for {', '.join(map(str, INPUT_DTYPES))}"
        if q.kind not in _KEPT.get(made.kind, ()) and (others := _other_readers(q, made, self._quantisers)):
            readers = ", ".join(others)
            return f"{made.words} has other readers besides {q}: {readers}; fused where the quantiser is the only one"
        return None

    def _state(self, owner: str) -> str | None:
        """What keeps a pass from having looked."""
        state = report.RECORDER.report.passes.get(owner)
        if state is None:
            return f"{owner} does not run"
        if state != "ours":
            return f"{owner} is {state}"
        p = self._pass(owner)
        return p.failed or None if p is not None else f"{owner} does not run"

    def _by_itself(self, q: Quantiser, made: Producer) -> str:
        """What becomes of a quantiser that nothing of ours has replaced."""
        if q.variant == "native":
            if made.compiled:
                return "; Inductor compiles this quantiser together with what stands before it"
            return "; Inductor compiles this quantiser by itself"
        if called_op(q.node) in (compat.AITER_GROUP_QUANT, compat.AITER_TOKEN_QUANT):
            return "; AITER's kernel runs by itself"
        if q.variant == "op" and q.kind in ("group", "packed"):
            lone = report.RECORDER.report.passes.get(LONE, "off")
            if lone != "ours":
                return f"; vLLM's kernel runs by itself ({LONE} is {lone})"
            return f"; vLLM's kernel runs by itself, called with {_numbers(q.node)}"
        return ""


# What may have other readers besides a quantiser, and of which kind that is then.
_KEPT = {"norm": producers.FUSED["norm"][1], "silu_mul": ("group", "packed", "token")}

PASS_NAMES = {
    "ActivationQuantFusionPass": "activation_quant_fusion_pass",
    "RMSNormQuantFusionPass": "rmsnorm_quant_fusion_pass",
    "AttnQuantFusionPass": "attn_quant_fusion",
    "MLAAttnQuantFusionPass": "mla_attn_quant_fusion",
}


def _module(q: Quantiser, made: Producer) -> str:
    # nodes that another pass has put there may know no module
    return next(iter(report.modules_of([q.node, *q.node.users, q.value, made.node])), "")


def _width(q: Quantiser) -> int:
    """Numbers in a row of what is quantised; 0 if that is no tensor of rows."""
    value = q.value.meta.get("val")
    return int(value.shape[-1]) if isinstance(value, torch.Tensor) and value.dim() else 0


def _numbers(node: fx.Node) -> dict[str, Any]:
    return {name: value for name, value in node.kwargs.items() if not isinstance(value, fx.Node)}


def _unlike(q: Quantiser) -> str | None:
    """What a group quantiser has that none of the fused ones has."""
    if q.group_size not in GROUP_SIZES:
        return f"called with {_numbers(q.node) or {'group_size': q.group_size}}; fused for group sizes {GROUP_SIZES}"
    if q.variant != "op" or called_op(q.node) == compat.AITER_GROUP_QUANT:
        return None
    codes = q.node.kwargs.get("output_q")
    if isinstance(codes, fx.Node) and (reason := quantisers.refuse_codes(codes.meta["val"])):
        return reason
    numbers = _numbers(q.node)
    if (numbers.get("fp8_min"), numbers.get("fp8_max")) != (-FP8.max, FP8.max):
        return f"called with {numbers}; fused for all of {FP8.dtype}, from {-FP8.max} to {FP8.max}"
    if numbers.get("eps") != EPS:
        return f"called with {numbers}; fused for eps {EPS}"
    return None


def _other_readers(q: Quantiser, made: Producer, quantisers: Sequence[Quantiser]) -> list[str]:
    """Who reads a producer's result besides a quantiser."""
    way = [q.value, *made.chain]
    if not (made.chain and made.chain[-1].target is operator.getitem):  # else its other results are others' business
        way.append(made.node)
    others: dict[str, None] = {}
    for user in (user for node in way for user in _readers(node, way)):
        if not q.reads(user):
            other = next((other for other in quantisers if other.reads(user)), None)
            name = called_op(user) if user.op == "call_function" else user.op
            others[str(other) if other else name] = None
    return sorted(others)


def _readers(node: fx.Node, way: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """Who reads a node, through views, which may have several readers themselves."""
    for user in node.users:
        if user.target in VIEWS:
            yield from _readers(user, way)
        elif user not in way:
            yield user
