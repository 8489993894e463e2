# SPDX-License-Identifier: Apache-2.0
"""A fusion pass: looks for its patterns, replaces, counts, and says why not."""

from __future__ import annotations

import hashlib
import logging
from typing import ClassVar

import torch
import torch._inductor.pattern_matcher as pm
from torch import fx
from torch._inductor.pattern_matcher import Match, PatternMatcherPass
from vllm.compilation.passes.inductor_pass import enable_fake_mode
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass, VllmPatternMatcherPass
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from .. import fingerprint, report, roundings, settings
from ..graph import OpIndex, innermost_common, quantised
from ..ops.quant import INPUT_DTYPES
from .normalise import Spelling
from .pattern import (
    DuplicatePatternError,
    PatternReplacement,
    bind,
    copy_nodes,
    no_match_on_error,
    trace,
)

logger = logging.getLogger("vllm.fusion_plugin")

aten = torch.ops.aten


class FusionPass(VllmPatternMatcherPass):
    """Base of our passes: registers patterns, replaces, counts, reports, and says who it is to the compile cache.

    A subclass sets `pass_name` (stock's name, where it stands in for a stock pass) and registers its patterns in
    `__init__(config)`.
    """

    name: ClassVar[str]

    def __init__(self, config: VllmConfig) -> None:
        if not (current_platform.is_cuda_alike() or current_platform.is_cpu()):
            raise NotImplementedError(f"its ops run on CUDA, ROCm and CPU, this is {current_platform.device_name}")
        super().__init__(config)
        self.pass_name = self.name
        self.rows_dtype = self.model_dtype if self.model_dtype in INPUT_DTYPES else torch.bfloat16
        """What patterns have rows of: the model's dtype, where ops take it."""
        self.precision_casts = bool(config.compilation_config.inductor_compile_config.get("emulate_precision_casts"))
        """Whether Inductor rounds where eager torch does."""
        self.matched_count = 0
        self.pm_pass = PatternMatcherPass(pass_name=self.name)
        self.patterns: dict[str, PatternReplacement] = {}
        self._traced: dict[str, str] = {}
        self._ranks: dict[int, int] = {}  # id of each entry of pm_pass -> position of its pattern in self.patterns
        self.refused: dict[fx.Node, str] = {}
        """First output of each place in the graph at hand where matches were refused and none was accepted, and why."""
        self.seen_in_refused: dict[fx.Node, fx.Node] = {}
        """All nodes of these matches -> their place, by which `refused` tells why."""
        self.failed = ""
        """What went wrong in the graph at hand, which then is as it was before the pass."""
        self._dumps: VllmConfig | None = None
        self.settings, _, _ = settings.read(config.additional_config)
        self._fingerprint = fingerprint.fingerprint(self.settings, {"roundings": roundings.key()})

    def register(self, replacement: PatternReplacement) -> None:
        """Look for one more pattern, traced when a graph first has the ops for it.

        Raises:
            DuplicatePatternError: a pattern of this key is registered already.
        """
        key = replacement.key()
        if key in self.patterns:
            raise DuplicatePatternError(f"{self.name}: pattern {key!r} is registered already; keys must differ")
        self.patterns[key] = replacement

    def trace_patterns(self) -> None:
        """Trace all patterns.

        Raises:
            DuplicatePatternError: two patterns look for the same graph: the second could never match.
        """
        for key in self.patterns.keys() - self._traced.keys():
            self._trace_pattern(key, self.patterns[key])

    def trace_possible_patterns(self, ops: OpIndex) -> None:
        """Trace the patterns that a graph with `ops` can hold. One that cannot be traced, because this vLLM's layer is not
        what it expects, is reported and left out: a model must compile all the same."""
        known = len(self._traced)
        for key, replacement in self.patterns.items():
            if key in self._traced or not replacement.possible(ops):
                continue
            try:
                self._trace_pattern(key, replacement)
            except Exception as e:
                self._traced[key] = f"{type(e).__name__}: {e}"
                logger.warning("vllm-fusion-plugin: %s looks for no %s: %s", self.name, key, self._traced[key])
                report.RECORDER.note(f"{self.name}: {key} cannot be traced: {self._traced[key]}")
        if self._dumps is not None and len(self._traced) > known:
            self.dump_patterns(self._dumps, self.pm_pass)

    @enable_fake_mode
    def _trace_pattern(self, key: str, replacement: PatternReplacement) -> None:
        inputs = replacement.inputs()
        search = bind(no_match_on_error(replacement.pattern), len(inputs) + len(replacement.scalars))
        traced = trace(search, [*inputs, *replacement.scalars])
        graph = "\n".join(f"{n.op} {n.target} {n.args} {n.kwargs}" for n in traced.graph.nodes)
        for other, text in self._traced.items():
            if text == graph:
                raise DuplicatePatternError(
                    f"{self.name}: pattern {key!r} looks for the same graph as {other!r}; drop one or make them differ"
                )
        pm.register_replacement(
            search,
            bind(replacement.replacement, len(inputs) + len(replacement.scalars)),
            inputs,
            trace,
            self.pm_pass,
            extra_check=lambda match: self._accept(replacement, match, len(inputs)),
            scalar_workaround={f"arg{len(inputs) + i}": value for i, value in enumerate(replacement.scalars)},
        )
        self._traced[key] = graph
        self._keep_order(list(self.patterns).index(key))

    def _keep_order(self, position: int) -> None:
        """Inductor tries patterns in the order in which they were traced, which depends on the graphs that came. What was
        registered first has to win, so the entries just made go where the pattern at `position` belongs."""
        for entries in self.pm_pass.patterns.values():
            for entry in entries:
                self._ranks.setdefault(id(entry), position)
            entries.sort(key=lambda entry: self._ranks[id(entry)])

    def dump(self, config: VllmConfig) -> None:
        """If vLLM dumps for debugging, write the patterns there too, whenever a graph has asked for new ones."""
        self._dumps = config if config.compile_debug_dump_path() else None

    def _accept(self, replacement: PatternReplacement, match: Match, arity: int) -> bool:
        place = match.output_node()
        try:
            reason = replacement.refuse(match) or _refuse_cycle(match) or _refused_by_op(replacement, match, arity)
            if reason is None and replacement.inexactness and self.settings.inexact == "leave":
                reason = f"{replacement.inexactness}, and the setting inexact is 'leave'"
        except Exception as e:  # a graph that `refuse` is not prepared for must not stop the model
            reason = f"{type(e).__name__}: {e}"
        if reason is not None:
            self.refused.setdefault(place, f"{replacement.key()}: {reason}")
            self.seen_in_refused.update(dict.fromkeys(match.nodes, place))
            return False
        if self.refused.pop(place, None):
            for node in match.nodes:
                self.seen_in_refused.pop(node, None)
        module = innermost_common(match.nodes)
        report.RECORDER.found(self.pass_name, replacement.key(), module, *quantised(match.output_nodes()))
        if replacement.inexactness:
            report.RECORDER.note(f"{self.name}: {replacement.key()} is {replacement.inexactness}")
        return True

    def prepare(self, graph: fx.Graph) -> None:
        """Change a graph before its patterns are looked for."""

    def finish(self, graph: fx.Graph) -> None:
        """Change a graph after its patterns have been replaced."""

    def explain(self, graph: fx.Graph) -> None:
        """Report what the pass would have liked to fuse in `graph` and could not; called after it ran."""

    @VllmInductorPass.time_and_log  # type: ignore[arg-type]  # typed for its own class only
    def __call__(self, graph: fx.Graph) -> None:
        table = VllmPatternMatcherPass.match_table
        before, found, matches = None, report.RECORDER.mark(), dict(table)
        self.failed = ""
        try:
            # Inductor hands over graphs whose nodes are not in order, and sorts when it has replaced something.
            pm.stable_topological_sort(graph)
            before = copy_nodes(graph, fx.Graph())
            self._run(graph)
        except Exception as e:  # must not stop the model from compiling
            if before is not None:
                copy_nodes(before, graph)
            report.RECORDER.take_back(found)
            table.clear()
            table.update(matches)
            self.matched_count = 0
            what = self.failed = f"{self.name} left a graph as it was, because it failed: {type(e).__name__}: {e}"
            logger.warning("vllm-fusion-plugin: %s", what, exc_info=True)
            report.RECORDER.note(what)

    def _run(self, graph: fx.Graph) -> None:
        self.refused.clear()
        self.seen_in_refused.clear()
        spelling = Spelling(graph)
        self.prepare(graph)
        self.matched_count = self._replace(graph)
        spelling.note()
        if spelling.unify():
            self.matched_count += self._replace(graph)
            spelling.note()
        VllmPatternMatcherPass.match_table[self.pass_name] += self.matched_count
        self.finish(graph)
        spelling.restore()
        try:
            self.explain(graph)
        except Exception as e:  # a report must never stop a model from compiling
            logger.warning("vllm-fusion-plugin: %s cannot say what it left: %r", self.name, e)

    def _replace(self, graph: fx.Graph) -> int:
        self.trace_possible_patterns(OpIndex(graph))
        return self.pm_pass.apply(graph)

    def uuid(self) -> str:
        """Changes with the pass, its patterns and their parameters, trace preprocessing, ops, kernels and settings: the
        fingerprint covers every source file of these, the keys cover what the configuration made of them."""
        return hashlib.sha256(
            repr([self._fingerprint, type(self).__qualname__, sorted(self.patterns)]).encode()
        ).hexdigest()


def _refused_by_op(replacement: PatternReplacement, match: Match, arity: int) -> str | None:
    """What the replacing op's own checks have against a match: raised later, they would end the compilation."""
    try:
        inputs = fx.map_arg([match.kwargs[f"arg{i}"] for i in range(arity)], lambda node: node.meta["val"])
        replacement.replacement(*inputs, *replacement.scalars)
    except ValueError as e:
        return str(e)
    except Exception:  # only this rehearsal is at fault: the trace that counts comes next
        logger.debug("vllm-fusion-plugin: %s could not be rehearsed", replacement.key(), exc_info=True)
    return None


def _refuse_cycle(match: Match) -> str | None:
    """A match with several outputs becomes one node, which computes them all at once: none of its inputs may be made from
    one of its outputs."""
    outputs = [node for node in match.output_nodes() if node is not None]
    if len(outputs) < 2:
        return None
    inside, earliest = set(match.nodes), min(outputs)
    todo = [value for value in match.kwargs.values() if isinstance(value, fx.Node)]
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in inside:
            return f"its input {node.name} is made from its output"
        if node not in seen and earliest < node:
            seen.add(node)
            todo += node.all_input_nodes
    return None
