# SPDX-License-Identifier: Apache-2.0
"""Writes down, while vLLM compiles, what report.py shows.

A process may run several engines, one after another or side by side; each has a report of its own here. An engine compiles
one part or several (a model; a draft model beside it; each block of a vision encoder), each of them as many subgraphs, each
subgraph for one or several ranges of tokens. `RECORDER` sees every subgraph that vLLM hands to its compiler, notices when an
earlier artefact is reused or comes from disk, and carries the matches over.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .rank_report import Found, Missed, RankReport, Subgraph, module_of, modules_of

logger = logging.getLogger("vllm.fusion_plugin.report")

_FILE = "fusion_report.json"
NOT_LOADED = "fusions of layers are put in place when vLLM has loaded the model, which it has not done in this engine"


class EngineRecord:
    """One engine's report in this process, and what the plugin has decided about that engine."""

    def __init__(self, report: RankReport | None = None) -> None:
        self.report = report or RankReport()
        self.parts = 0
        self.inactive = ""
        """Why the plugin keeps out of this engine; "" if it does not."""
        self.key: str | None = None
        """What this engine's compile cache is keyed by, besides vLLM's own hash; None if by nothing of ours."""
        self.failed = False
        """Whether preparing this engine has raised, in which case the plugin keeps out of it for good."""
        self.mla_v_up_quant = False
        """Whether its MLA layers write FP8 in groups from the V up-projection."""
        self.experts_left = NOT_LOADED
        """Why its experts' SiLU·mul and quantiser are left to vLLM; "" if they are not."""
        self.mlps_left = NOT_LOADED
        """Likewise of its MLPs outside of compiled code."""
        self.norms_left = NOT_LOADED
        """Why its norms outside of compiled code are left to vLLM; "" if they are not."""
        self.unreported = 0
        """How often code came from disk with no report beside it."""

    def leave_layers(self, reason: str) -> None:
        """Leave to vLLM all that fuses in its layers."""
        self.mla_v_up_quant = False
        self.experts_left = self.mlps_left = self.norms_left = reason

    def note(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)


class Part:
    """One compiled part of a model: what one VllmBackend of vLLM's compiles.

    name: vLLM's, such as "backbone" or "draft_model". folder: where its compiled code is kept, None if nowhere.
    """

    def __init__(self, engine: EngineRecord, name: str, folder: str | None) -> None:
        self.engine, self.name, self.folder = engine, name, folder
        self.number = engine.parts
        engine.parts += 1
        self.positions: list[int] = []  # of its subgraphs in the engine's report
        kept = _read(folder, engine.report.rank) or RankReport()
        self.kept = {(s.index, s.compile_range): s for s in kept.subgraphs}
        self.kept_notes = kept.notes
        self.node_modules: dict[int, list[str]] = {}  # of the subgraph at a position, node by node
        self.by_artefact: dict[int, int] = {}  # id -> position
        self.artefacts: list[Any] = []  # keeps id() of an artefact from being handed out again

    def add(self, subgraph: Subgraph) -> int:
        """Append to the engine's report; the position there."""
        subgraph.model, subgraph.part = self.name, self.number
        self.positions.append(len(self.engine.report.subgraphs))
        self.engine.report.subgraphs.append(subgraph)
        return self.positions[-1]

    def save(self) -> None:
        """Keep what is known of this part beside its compiled code: a warm start runs no pass and could not tell."""
        if not self.folder or not self.positions:
            return
        report = self.engine.report
        mine = {position: i for i, position in enumerate(self.positions)}
        subgraphs = []
        for position in self.positions:
            subgraph = report.subgraphs[position]
            source = None if subgraph.reused_from is None else mine[subgraph.reused_from]
            subgraphs.append(subgraph.model_copy(update={"reused_from": source, "from_cache": False}))
        path = _path(self.folder, report.rank)
        try:
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(report.model_copy(update={"subgraphs": subgraphs}).model_dump_json())
            temporary.replace(path)
        except OSError as e:
            logger.warning("fusion report not kept for warm starts: %s", e)


def _path(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank_{rank}.{_FILE}"


def _read(folder: str | None, rank: int) -> RankReport | None:
    """What was kept of one part; None if nothing was, or nothing that can be read."""
    if not folder:
        return None
    try:
        return RankReport.model_validate_json(_path(folder, rank).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        logger.warning("fusion report beside the compile cache is unreadable: %s", e)
        return None


class Recorder:
    """What this process found so far. Passes, pass manager and compiler hooks write; worker methods read.

    An engine is known by an object that lives as long as it does and that all its configurations share, called `owner` here
    and held weakly (see `compat.engine_owner`). What comes without an owner goes to the engine that was last spoken
    of.
    """

    def __init__(self) -> None:
        self._engines: dict[int, tuple[weakref.ref[Any], EngineRecord]] = {}
        self._parts: weakref.WeakKeyDictionary[Any, Part] = weakref.WeakKeyDictionary()  # by pass manager
        self._record = EngineRecord()
        self._part: Part | None = None
        self._current: Subgraph | None = None
        self._nodes: list[str] = []  # their modules
        self._ran = False

    # -- engines --

    @property
    def report(self) -> RankReport:
        """Of the engine that was last spoken of. Setting it forgets all engines: for tests."""
        return self._record.report

    @report.setter
    def report(self, report: RankReport) -> None:
        self.__init__()  # type: ignore[misc]
        self._record.report = report

    def engine(self, owner: Any) -> EngineRecord:
        """The record of an engine; the one that is spoken of from now on."""
        known = self._engines.get(id(owner))
        if known is None:
            key = id(owner)
            known = weakref.ref(owner, lambda _: self._engines.pop(key, None)), EngineRecord()
            self._engines[key] = known
        self._record = known[1]
        return known[1]

    @property
    def record(self) -> EngineRecord:
        """The record of the engine that was last spoken of."""
        return self._record

    def engine_where(self, true_of: Callable[[Any], bool]) -> EngineRecord | None:
        """The record of the engine whose owner `true_of` is true of."""
        for owner, record in list(self._engines.values()):
            if (alive := owner()) is not None and true_of(alive):
                return record
        return None

    # -- parts --

    def begin_part(self, manager: Any, owner: Any, name: str, folder: str | None) -> None:
        """`manager` is about to run passes over a part of the engine; what it finds goes there."""
        self._part = self._parts[manager] = Part(self.engine(owner), name, folder)

    def leave_part(self) -> None:
        """What is compiled next is none of ours."""
        self._part = None

    def begin_load(self, owner: Any) -> tuple[EngineRecord, int]:
        """vLLM is about to look for a part's compiled code on disk; hand the result to `end_load` if it finds some."""
        record = self.engine(owner)
        return record, record.parts

    def end_load(self, begun: tuple[EngineRecord, int], name: str, folder: str | None) -> None:
        """A part was loaded. Unless its subgraphs went through the compiler hook one by one, what was kept beside its code
        is what there is to report."""
        record, parts = begun
        if record.parts > parts:
            return
        kept = _read(folder, record.report.rank)
        if kept is None or not kept.subgraphs:
            record.unreported += 1
            return
        part = Part(record, name or kept.subgraphs[0].model, None)
        first = len(record.report.subgraphs)
        for subgraph in kept.subgraphs:
            source = None if subgraph.reused_from is None else first + subgraph.reused_from
            part.add(subgraph.model_copy(update={"reused_from": source, "from_cache": True}))
        record.report.passes = kept.passes | record.report.passes
        for text in kept.notes:
            record.note(text)

    # -- compiler hook --

    def begin_subgraph(self, manager: Any, index: int, compile_range: Any, nodes: Sequence[Any]) -> None:
        """vLLM's compiler is handed a subgraph; `manager`: the pass manager that it hands on, None if unknown."""
        self._current = None
        if manager is not None:
            self._part = self._parts.get(manager, self._part)
        if self._part is None:
            return
        self._record = self._part.engine
        self._current = Subgraph(index=index, compile_range=str(compile_range), modules=modules_of(nodes))
        self._nodes = [module_of(node) for node in nodes]
        self._ran = False

    def end_subgraph(self, artefact: Any) -> None:
        """Called when vLLM's compiler returned; tells a compiled subgraph from a reused and from a cached one."""
        current, self._current = self._current, None
        part = self._part
        if current is None or part is None:
            return
        source = part.by_artefact.get(id(artefact))
        position = part.add(current)
        part.node_modules[position] = self._nodes
        if not self._ran:
            if source is None:
                current.from_cache = True
                kept = part.kept.get((current.index, current.compile_range))
                if kept is None:
                    part.engine.unreported += 1
                else:
                    current.found, current.missed = kept.found, kept.missed
                    for text in part.kept_notes:
                        part.engine.note(text)
            else:
                current.reused_from = source
                current.from_cache = part.engine.report.subgraphs[source].from_cache
                _carry_over(part, source, position)
        part.by_artefact.setdefault(id(artefact), position)
        part.artefacts.append(artefact)
        part.save()

    # -- passes --

    def begin_passes(self, manager: Any, compile_range: Any) -> None:
        if manager not in self._parts:
            return
        if self._current is None:  # a compiler that does not go through the hook: one anonymous subgraph a run
            part = self._part = self._parts[manager]
            self._record = part.engine
            part.add(Subgraph(index=len(part.positions), compile_range=str(compile_range)))
        self._ran = True

    @property
    def _target(self) -> Subgraph | None:
        if self._current is not None:
            return self._current
        return self.report.subgraphs[-1] if self.report.subgraphs else None

    def found(self, pass_name: str, pattern: str, module: str, reader: str = "", width: int = 0) -> None:
        """See rank_report.Found."""
        if self._target is not None:
            boundary = Found(pass_name=pass_name, pattern=pattern, module=module, reader=reader, width=width)
            self._target.found.append(boundary)

    def missed(self, pass_name: str, reason: str, module: str = "", reader: str = "", width: int = 0) -> None:
        """See rank_report.Missed."""
        if self._target is not None:
            boundary = Missed(pass_name=pass_name, reason=reason, module=module, reader=reader, width=width)
            self._target.missed.append(boundary)

    def mark(self) -> tuple[int, int]:
        """How much there is to tell of the subgraph at hand, for `take_back`."""
        return (len(self._target.found), len(self._target.missed)) if self._target is not None else (0, 0)

    def take_back(self, mark: tuple[int, int]) -> None:
        """Forget what was found and missed since `mark`: the graph is as it was then."""
        if self._target is not None:
            del self._target.found[mark[0] :], self._target.missed[mark[1] :]

    def note(self, text: str) -> None:
        self._record.note(text)


def _carry_over(part: Part, source_position: int, reuse_position: int) -> None:
    """Reused artefacts have the same graph, so nodes correspond by position. A match is often named by a module above those
    of its nodes: take it from the first one below."""
    source, reuse = (part.engine.report.subgraphs[position] for position in (source_position, reuse_position))
    pairs = list(zip(part.node_modules[source_position], part.node_modules[reuse_position], strict=False))

    def renamed(module: str) -> str:
        for mine, theirs in pairs:
            if mine == module or mine.startswith(f"{module}."):
                return ".".join(theirs.split(".")[: module.count(".") + 1])
        return ""

    def renamed_modules(boundary: Found | Missed) -> dict[str, str]:
        return {"module": renamed(boundary.module), "reader": boundary.reader and renamed(boundary.reader)}

    reuse.found = [f.model_copy(update=renamed_modules(f)) for f in source.found]
    reuse.missed = [m.model_copy(update=renamed_modules(m)) for m in source.missed]


RECORDER = Recorder()
