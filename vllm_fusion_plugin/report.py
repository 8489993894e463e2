# SPDX-License-Identifier: Apache-2.0
"""Who fused what, where, how often, and what was left and why: the reports of all ranks put together, and shown.

vLLM compiles identical pieces of a model once: its match table counts compiled graphs, not layers. This counts both. What is
shown is written down in recorder.py, one `RankReport` (rank_report.py) an engine and rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from .rank_report import (
    MODEL_CODE,
    VLLMS_PASS,
    Found,
    Missed,
    RankReport,
    Subgraph,
    count_places,
    module_of,
    modules_of,
)
from .recorder import RECORDER, EngineRecord, Recorder

__all__ = [
    "MODEL_CODE",
    "RECORDER",
    "VLLMS_PASS",
    "EngineRecord",
    "Found",
    "FusionReport",
    "Missed",
    "RankReport",
    "Recorder",
    "Subgraph",
    "get_fusion_report",
    "module_of",
    "modules_of",
    "shorten",
    "sum_match_tables",
]


def get_fusion_report() -> dict[str, Any]:
    """The report of the engine that this process last spoke of, as plain data. Workers answer
    `collective_rpc("get_fusion_report")` with that of their own engine: see plugin.py."""
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

    def _named(self, subgraph: Subgraph, module: str) -> str:
        """A module with the model that it is of, where engines have several."""
        several = len({s.model for rank in self.ranks for s in rank.subgraphs}) > 1
        return f"{subgraph.model}: {module}" if several else module

    def rows(self) -> list[tuple[str, str, str, int, int, str, str]]:
        """(pass, pattern, range, compiled graphs, layers, ranks, modules) by model, pass, pattern and range."""
        groups: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        for rank in self.ranks:
            for sub in rank.subgraphs:
                for f in sub.found:
                    g = groups.setdefault(
                        (sub.model, f.pass_name, f.pattern, sub.compile_range),
                        {"graphs": 0, "layers": 0, "ranks": {}, "modules": {}},
                    )
                    g["graphs"] += sub.reused_from is None
                    g["layers"] += 1
                    g["ranks"][rank.rank] = None
                    g["modules"][self._named(sub, f.module)] = None
        return [
            (*key[1:], g["graphs"], g["layers"], ",".join(map(str, g["ranks"])), shorten(g["modules"]))
            for key, g in sorted(groups.items())
        ]

    def missed_rows(self) -> list[tuple[str, str, int, str]]:
        """(pass, reason, places, modules), over all ranks."""
        places = count_places(
            ((m.pass_name, m.reason, self._named(sub, m.module), rank.rank, sub.part), sub.compile_range)
            for rank in self.ranks
            for sub in rank.subgraphs
            for m in sub.missed
        )
        groups: dict[tuple[str, str], dict[str, int]] = {}
        for (pass_name, reason, module, _, _), count in places.items():
            modules = groups.setdefault((pass_name, reason), {})
            modules[module] = modules.get(module, 0) + count
        return [(*key, sum(modules.values()), shorten(modules)) for key, modules in sorted(groups.items())]

    def rank_rows(self) -> list[tuple[str, str, str]]:
        """(ranks, state, kernels of the quantised linear layers): one row for all ranks that say the same."""
        groups: dict[tuple[str, str], list[str]] = {}
        for rank in self.ranks:
            kernels = ", ".join(f"{count} {name}" for name, count in rank.linear_kernels.items())
            groups.setdefault((rank.manager, kernels), []).append(str(rank.rank))
        return [(",".join(ranks), *key) for key, ranks in groups.items()]

    def note_rows(self) -> list[tuple[str, str]]:
        """(ranks, note)."""
        groups: dict[str, list[str]] = {}
        for rank in self.ranks:
            for note in rank.notes:
                groups.setdefault(note, []).append(str(rank.rank))
        return [(",".join(ranks), note) for note, ranks in groups.items()]

    def tables(self) -> list[Any]:
        """rich tables: the state of each rank, what fused, what did not and why, and what ranks note."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        def table(title: str, columns: str, rows: Iterable[tuple[Any, ...]], numbers: str = "") -> Table:
            made = Table(title=title, box=box.SIMPLE, show_edge=False, pad_edge=False)
            for column in columns.split():
                right = column in numbers.split()
                made.add_column(column, justify="right" if right else "left", overflow="fold")
            for row in rows:
                made.add_row(*(escape(str(cell)) for cell in row))  # a pattern's [parameters] are no markup
            return made

        tables = [
            table("State", "ranks state kernels", self.rank_rows()),
            table("Fused", "pass pattern range graphs layers ranks modules", self.rows(), "graphs layers"),
            table("Not fused", "pass why places modules", self.missed_rows(), "places"),
            table("Notes", "ranks note", self.note_rows()),
        ]
        return [t for t in tables if t.title == "Fused" or t.row_count]

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
