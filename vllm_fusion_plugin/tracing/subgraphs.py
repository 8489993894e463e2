# SPDX-License-Identifier: Apache-2.0
"""What vLLM's compiler did to each piece of a model, up to and including the post-grad passes. No code is generated.

    with record_subgraphs() as recording:
        compiled_model(*inputs)

Everything runs as in a server until the last pass has run: then the piece counts as compiled, and once all pieces are, the
call ends, which leaves the `with` block without an error.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass


@dataclasses.dataclass
class Subgraph:
    """A piece of the model as it was compiled."""

    compile_range: tuple[int, int]
    """Numbers of tokens that it was compiled for, both ends included."""
    before: fx.Graph
    after: fx.Graph
    matches: Counter[str]
    """By pass name; passes that matched nothing are there with 0."""
    pieces: list[int] = dataclasses.field(default_factory=list)
    """Positions in the model. vLLM compiles identical pieces, which most layers are, once: this is what matches by layer
    have to be multiplied by."""


@dataclasses.dataclass
class Recording:
    subgraphs: list[Subgraph] = dataclasses.field(default_factory=list)
    pass_manager: Any = None

    def matches_by_graph(self) -> Counter[str]:
        """What vLLM's own match table counts."""
        return _total(s.matches for s in self.subgraphs)

    def matches_by_layer(self) -> Counter[str]:
        return _total(s.matches for s in self.subgraphs for _ in s.pieces)


def _total(counters) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)  # unlike +, keeps passes with 0
    return total


def count_ops(graph: fx.Graph) -> Counter[str]:
    """Ops by name, looking through auto_functionalized: how often "_C.silu_and_mul.default" is called, for example."""

    def name(node: fx.Node) -> str:
        wrapped = "auto_functionalized" in str(node.target) and node.args
        return str(node.args[0] if wrapped else node.target)

    calls = (name(node) for node in graph.nodes if node.op == "call_function")
    return Counter(call for call in calls if "getitem" not in call)


class _Done(Exception):
    """Ends the compilation of one piece, or, when all are there, the call of the model."""


@contextlib.contextmanager
def record_subgraphs(progress: Callable[[int], None] = lambda piece: None) -> Iterator[Recording]:
    """Record what vLLM compiles inside the block; the call that compiles ends with its compilation.

    progress: called with the position of each piece that vLLM has compiled or has reused."""
    from vllm.compilation.backends import VllmBackend

    recording = Recording()
    configure = VllmBackend.configure_post_pass
    complete = False

    def configure_and_hook(backend: VllmBackend) -> None:
        configure(backend)
        _hook(backend, recording, progress)
        # vLLM saves when all pieces are compiled.
        backend.compiler_manager.save_to_file = end_of_compilation  # type: ignore[method-assign]

    def end_of_compilation() -> None:
        nonlocal complete
        complete = True
        raise _Done

    with mock.patch.object(VllmBackend, "configure_post_pass", configure_and_hook):
        try:
            yield recording
        except Exception:  # ours comes wrapped in Dynamo's
            if not complete:
                raise


def _hook(backend: Any, recording: Recording, progress: Callable[[int], None]) -> None:
    manager = recording.pass_manager = backend.pass_manager
    pieces = backend.compiler_manager
    compile_piece, compile_graph = pieces.compile, pieces.compiler.compile

    class RunPassesAndStop(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            before = copy.deepcopy(graph)
            manager(graph)
            recording.subgraphs.append(_describe(manager, before, copy.deepcopy(graph)))
            raise _Done

        def uuid(self) -> Any:
            return manager.uuid()

    def compile_until_stop(*args: Any, **kwargs: Any) -> Any:
        known = len(recording.subgraphs)
        try:
            return compile_graph(*args, **kwargs)
        except Exception:  # ours comes wrapped in Inductor's
            if len(recording.subgraphs) == known:
                raise
            return recording.subgraphs[-1], None

    def compile_and_count(*args: Any, graph_index: int = 0, **kwargs: Any) -> Any:
        # Our description stands for the compiled artefact, so vLLM hands it out again for an identical piece.
        subgraph = compile_piece(*args, graph_index=graph_index, **kwargs)
        subgraph.pieces.append(graph_index)
        progress(graph_index)
        return subgraph

    backend.inductor_config[backend.pass_key] = RunPassesAndStop()
    pieces.compiler.compile = compile_until_stop
    pieces.compile = compile_and_count


def _describe(manager: Any, before: fx.Graph, after: fx.Graph) -> Subgraph:
    from vllm.compilation.passes.inductor_pass import get_pass_context

    compile_range = get_pass_context().compile_range
    matches: Counter[str] = Counter()
    for p in manager.passes:
        if hasattr(p, "matched_count"):
            # A pass that does not apply to this range was not run: its count is from another graph.
            matches[p.pass_name] += p.matched_count if p.is_applicable_for_range(compile_range) else 0
    return Subgraph((compile_range.start, compile_range.end), before, after, matches)
