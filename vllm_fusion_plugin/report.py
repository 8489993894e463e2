# SPDX-License-Identifier: Apache-2.0
"""Who fused what, where, how often, and what was left and why.

vLLM compiles identical pieces of a model once: its match table counts compiled graphs, not layers. `RECORDER` counts both:
it sees every subgraph that vLLM hands to its compiler, notices when an earlier artefact is reused, and carries the matches
over to the layers of the reusing subgraph. One process records one rank; `FusionReport.from_ranks` puts ranks together.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

logger = logging.getLogger("vllm.fusion_plugin.report")

_FILE = "fusion_report.json"

# In the place of a pass's name: fused without a pass of ours, by vLLM's model code or a pass of vLLM's. Not in match tables.
MODEL_CODE, VLLMS_PASS = "vLLM's model code", "vLLM's own pass"
# "L['self'].layers.0.mlp.act_fn" -> "layers.0.mlp.act_fn"
_ROOT = re.compile(r"^L\['self'\]\.?")


class Found(BaseModel):
    """A match of one pattern in one compiled graph."""

    pass_name: str
    pattern: str
    module: str = ""

    @property
    def by_a_pass(self) -> bool:
        """Whether a pass of ours has matched it."""
        return self.pass_name not in (MODEL_CODE, VLLMS_PASS)


class Missed(BaseModel):
    """A boundary that a pass looks for and did not fuse."""

    pass_name: str
    reason: str
    module: str = ""


class Subgraph(BaseModel):
    """One subgraph of one compiled model part, in the order in which vLLM compiled it."""

    index: int
    compile_range: str
    modules: list[str] = Field(default_factory=list)
    reused_from: int | None = None
    """Position in `RankReport.subgraphs` of the subgraph whose artefact this one runs; None if it has its own."""
    from_cache: bool = False
    """The artefact came from disk: our passes did not run in this process (their findings are read back if kept)."""
    found: list[Found] = Field(default_factory=list)
    missed: list[Missed] = Field(default_factory=list)


class RankReport(BaseModel):
    rank: int = 0
    fingerprint: str = ""
    manager: str = ""
    """What became of the plugin in this process: which passes are ours, or why none is."""
    passes: dict[str, str] = Field(default_factory=dict)
    """Stock's pass name -> "ours", or why stock's own runs."""
    linear_kernels: dict[str, int] = Field(default_factory=dict)
    """Kernel class behind the quantised linear layers -> number of layers; it decides what there is to fuse."""
    subgraphs: list[Subgraph] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    from_file: bool = False
    """Read back from beside the compiled artefact: this process compiled nothing."""

    def match_table(self) -> Counter[str]:
        """Matches by pass in distinct compiled graphs: what vLLM's own match table counts."""
        return Counter(f.pass_name for s in self.subgraphs if s.reused_from is None for f in s.found if f.by_a_pass)

    def layer_table(self) -> Counter[str]:
        """Matches by pass over all layers, reuses counted."""
        return Counter(f.pass_name for s in self.subgraphs for f in s.found if f.by_a_pass)


def module_of(node: Any) -> str:
    """Path of the innermost module that made an fx node, for example "layers.3.mlp.act_fn"; "" if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    return _ROOT.sub("", paths[-1]) if paths else ""


def modules_of(nodes: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(filter(None, map(module_of, nodes))))


class Recorder:
    """What this process found so far. Passes, pass manager and compiler hook write; worker methods read."""

    def __init__(self) -> None:
        self.report = RankReport()
        self._current: Subgraph | None = None
        self._ran = False
        self.folder: str | None = None  # where the report is kept for warm starts
        self._node_modules: list[list[str]] = []  # of each subgraph, node by node
        self._by_artefact: dict[int, int] = {}
        self._artefacts: list[Any] = []  # keeps id() of an artefact from being handed out again

    # -- compiler hook --

    def begin_subgraph(self, index: int, compile_range: Any, nodes: Sequence[Any]) -> None:
        self._current = Subgraph(index=index, compile_range=str(compile_range), modules=modules_of(nodes))
        self._node_modules.append([module_of(node) for node in nodes])
        self._ran = False

    def end_subgraph(self, artefact: Any) -> None:
        """Called when vLLM's compiler returned; tells a compiled subgraph from a reused and from a cached one."""
        current, self._current = self._current, None
        if current is None:
            return
        position = len(self.report.subgraphs)
        source = self._by_artefact.get(id(artefact))
        if not self._ran:
            if source is None:
                current.from_cache = True
            else:
                current.reused_from = source
                self._carry_over(source, current)
        self._by_artefact.setdefault(id(artefact), position)
        self._artefacts.append(artefact)
        self.report.subgraphs.append(current)
        self.save(self.folder)

    def _carry_over(self, source_position: int, reuse: Subgraph) -> None:
        source = self.report.subgraphs[source_position]
        # Reused artefacts have the same graph, so nodes correspond by position. A match is often named by a module above
        # those of its nodes: take it from the first one below.
        pairs = list(zip(self._node_modules[source_position], self._node_modules[-1], strict=False))

        def renamed(module: str) -> str:
            for mine, theirs in pairs:
                if mine == module or mine.startswith(f"{module}."):
                    return ".".join(theirs.split(".")[: module.count(".") + 1])
            return ""

        reuse.found = [f.model_copy(update={"module": renamed(f.module)}) for f in source.found]
        reuse.missed = [m.model_copy(update={"module": renamed(m.module)}) for m in source.missed]

    # -- passes --

    def begin_passes(self, compile_range: Any) -> None:
        if self._current is None:  # a compiler that does not go through the hook: one anonymous subgraph a run
            self.report.subgraphs.append(Subgraph(index=len(self.report.subgraphs), compile_range=str(compile_range)))
        self._ran = True

    @property
    def _target(self) -> Subgraph | None:
        if self._current is not None:
            return self._current
        return self.report.subgraphs[-1] if self.report.subgraphs else None

    def found(self, pass_name: str, pattern: str, module: str) -> None:
        if self._target is not None:
            self._target.found.append(Found(pass_name=pass_name, pattern=pattern, module=module))

    def missed(self, pass_name: str, reason: str, module: str = "") -> None:
        if self._target is not None:
            self._target.missed.append(Missed(pass_name=pass_name, reason=reason, module=module))

    def mark(self) -> tuple[int, int]:
        """How much there is to tell of the subgraph at hand, for `take_back`."""
        return (len(self._target.found), len(self._target.missed)) if self._target is not None else (0, 0)

    def take_back(self, mark: tuple[int, int]) -> None:
        """Forget what was found and missed since `mark`: the graph is as it was then."""
        if self._target is not None:
            del self._target.found[mark[0] :], self._target.missed[mark[1] :]

    def note(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)

    # -- the file beside the artefact --

    def save(self, folder: str | None) -> None:
        """Keep the report beside the compiled artefact: a warm start runs no pass and would have nothing to tell."""
        if not folder or not self.report.subgraphs:
            return
        path = Path(folder) / f"rank_{self.report.rank}.{_FILE}"
        try:
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(self.report.model_dump_json())
            temporary.replace(path)
        except OSError as e:
            logger.warning("fusion report not kept for warm starts: %s", e)

    def load(self, folder: str | None) -> None:
        """The kept report of this rank, where this process itself compiled nothing."""
        if not folder or any(not s.from_cache for s in self.report.subgraphs):
            return
        path = Path(folder) / f"rank_{self.report.rank}.{_FILE}"
        try:
            kept = RankReport.model_validate_json(path.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as e:
            logger.warning("fusion report beside the compile cache is unreadable: %s", e)
            return
        mine = self.report
        self.report = kept.model_copy(
            update={
                "from_file": True,
                "manager": mine.manager or kept.manager,
                "passes": mine.passes or kept.passes,
                "notes": list(dict.fromkeys([*kept.notes, *mine.notes])),
            }
        )


RECORDER = Recorder()


def get_fusion_report() -> dict[str, Any]:
    """This process's report as plain data; workers answer `collective_rpc("get_fusion_report")` with it."""
    return RECORDER.report.model_dump()


def sum_match_tables(tables: Iterable[dict[str, int]]) -> dict[str, int]:
    """One table from those of all ranks: every pass's counts added, passes without a match kept at 0."""
    total: dict[str, int] = {}
    for table in tables:
        for name, count in table.items():
            total[name] = total.get(name, 0) + count
    return total


class FusionReport(BaseModel):
    """The reports of all ranks."""

    ranks: list[RankReport]

    @classmethod
    def from_ranks(cls, reports: Iterable[dict[str, Any]]) -> FusionReport:
        return cls(ranks=[RankReport.model_validate(r) for r in reports])

    def match_table(self) -> dict[str, int]:
        return sum_match_tables(r.match_table() for r in self.ranks)

    def layer_table(self) -> dict[str, int]:
        return sum_match_tables(r.layer_table() for r in self.ranks)

    def rows(self) -> list[tuple[str, str, str, int, int, str, str]]:
        """(pass, pattern, range, compiled graphs, layers, ranks, modules) by pass, pattern and range."""
        groups: dict[tuple[str, str, str], dict[str, Any]] = {}
        for rank in self.ranks:
            for sub in rank.subgraphs:
                for f in sub.found:
                    g = groups.setdefault(
                        (f.pass_name, f.pattern, sub.compile_range),
                        {"graphs": 0, "layers": 0, "ranks": {}, "modules": {}},
                    )
                    g["graphs"] += sub.reused_from is None
                    g["layers"] += 1
                    g["ranks"][rank.rank] = None
                    g["modules"][f.module] = None
        return [
            (*key, g["graphs"], g["layers"], ",".join(map(str, g["ranks"])), shorten(g["modules"]))
            for key, g in sorted(groups.items())
        ]

    def missed_rows(self) -> list[tuple[str, str, int, str]]:
        """(pass, reason, places, modules), over all ranks."""
        groups: dict[tuple[str, str], list[str]] = {}
        for rank in self.ranks:
            for sub in rank.subgraphs:
                for m in sub.missed:
                    groups.setdefault((m.pass_name, m.reason), []).append(m.module)
        return [(*key, len(modules), shorten(dict.fromkeys(modules))) for key, modules in sorted(groups.items())]

    def tables(self) -> list[Any]:
        """rich tables: what fused, what did not and why, and what each rank notes."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        def table(title: str, columns: str, numbers: str) -> Table:
            made = Table(title=title, box=box.SIMPLE, show_edge=False, pad_edge=False)
            for column in columns.split():
                right = column in numbers.split()
                made.add_column(column, justify="right" if right else "left", overflow="fold")
            return made

        found = table("Fused", "pass pattern range graphs layers ranks modules", "graphs layers")
        for row in self.rows():
            found.add_row(*(escape(str(cell)) for cell in row))  # a pattern's [parameters] are no markup
        tables = [found]
        if missed_rows := self.missed_rows():
            missed = table("Not fused", "pass why places modules", "places")
            for missed_row in missed_rows:
                missed.add_row(*(escape(str(cell)) for cell in missed_row))
            tables.append(missed)
        return tables

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=1)


def shorten(modules: Iterable[str]) -> str:
    """ "layers.0.mlp, layers.1.mlp, layers.2.mlp" -> "layers.0-2.mlp"."""
    groups: dict[tuple[str, str], list[int]] = {}
    for module in modules:
        m = re.search(r"^(.*?)\.(\d+)(?:\.(.*))?$", module)
        key, number = ((m[1], m[3] or ""), int(m[2])) if m else ((module, ""), -1)
        groups.setdefault(key, []).append(number)
    parts = []
    for (head, tail), numbers in groups.items():
        if numbers == [-1]:
            parts.append(head)
            continue
        spans: list[list[int]] = []
        for n in sorted(set(numbers)):
            if spans and n == spans[-1][1] + 1:
                spans[-1][1] = n
            else:
                spans.append([n, n])
        text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
        parts.append(f"{head}.{text}" + (f".{tail}" if tail else ""))
    return ", ".join(filter(None, parts))
