# SPDX-License-Identifier: Apache-2.0
"""What one rank reports of one engine: plain data, which recorder.py fills in and report.py shows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, Field

# In the place of a pass's name: fused without a pass of ours, by vLLM's model code or a pass of vLLM's. Not in match tables.
MODEL_CODE, VLLMS_PASS = "vLLM's model code", "vLLM's own pass"
UNFORESEEN = "no pattern fits the variant that they have in this graph"
# "L['self'].layers.0.mlp.act_fn" -> "layers.0.mlp.act_fn"
_ROOT = re.compile(r"^L\['self'\]\.?")
# Dynamo's way to a module that a layer reaches by one of its bound methods, as Qwen3-Next's linear attention.
_BOUND_METHOD = re.compile(r"\.\w+\.__self__(?=\.)")


class Boundary(BaseModel):
    """A quantiser, and what has made its input."""

    pass_name: str
    module: str = ""
    reader: str = ""
    """The module that reads what is quantised, such as a linear layer; "" if unknown."""
    width: int = 0
    """Numbers in a row of what is quantised; 0 if unknown."""


class Found(Boundary):
    """A match of one pattern in one compiled graph."""

    pattern: str

    @property
    def by_a_pass(self) -> bool:
        """Whether a pass of ours has matched it, or a layer's method of ours fuses it."""
        return self.pass_name not in (MODEL_CODE, VLLMS_PASS)


class Missed(Boundary):
    """A boundary that a pass looks for and did not fuse."""

    reason: str

    @property
    def is_unforeseen(self) -> bool:
        """Whether nothing that is known kept a pass from fusing it."""
        return UNFORESEEN in self.reason


class Subgraph(BaseModel):
    """One subgraph of one compiled model part, in the order in which vLLM compiled it."""

    index: int
    compile_range: str
    model: str = ""
    """vLLM's name for what was compiled: "backbone", or "draft_model", "eagle_head", ... beside it."""
    part: int = 0
    """Which of the engine's compiled parts this is of. Modules are named from their part's root, so equal names in two parts
    are two modules."""
    modules: list[str] = Field(default_factory=list)
    reused_from: int | None = None
    """Position in `RankReport.subgraphs` of the subgraph whose artefact this one runs; None if it has its own."""
    from_cache: bool = False
    """The artefact came from disk: our passes did not run in this process (their findings are read back if kept)."""
    found: list[Found] = Field(default_factory=list)
    missed: list[Missed] = Field(default_factory=list)

    @property
    def is_new_graph(self) -> bool:
        """Whether it is a compiled graph, and no other subgraph runs the same."""
        return self.index >= 0 and self.reused_from is None


class Verified(BaseModel):
    """How the bytes of an op's first calls at one place compare with those of what it replaces (setting `verify`)."""

    op: str
    place: str
    """The layer, or which of the op's calls in a forward pass."""
    calls: int
    numbers: int
    differing: int
    problem: str = ""
    """Why nothing more was compared; "" if nothing stood in the way."""
    vllms_ops: list[str] = Field(default_factory=list)
    """Those of vLLM's that ran beside it; plain torch stood for the rest."""


class RankReport(BaseModel):
    rank: int = 0
    fingerprint: str = ""
    manager: str = ""
    """The state of the plugin in this engine: "active", which some layers can be alone, or why none of its passes ran."""
    passes: dict[str, str] = Field(default_factory=dict)
    """Stock's pass name -> "ours", or why stock's own runs."""
    linear_kernels: dict[str, int] = Field(default_factory=dict)
    """Kernel class of the quantised linear layers -> number of layers; it decides what there is to fuse."""
    kernels: str = ""
    """Which fused ops have CUDA's kernels run on a GPU that has both, and if none, why; "" elsewhere."""
    subgraphs: list[Subgraph] = Field(default_factory=list)
    outside: list[Subgraph] = Field(default_factory=list)
    """What layers fuse, or leave, inside of vLLM's ops and so outside of compiled graphs: one entry a model, index -1."""
    notes: list[str] = Field(default_factory=list)
    verified: list[Verified] = Field(default_factory=list)
    from_file: bool = False
    """All of it was read back from beside the compiled code: no pass ran in this process."""

    @property
    def everything(self) -> list[Subgraph]:
        """Compiled graphs, and what lies outside of them."""
        return [*self.subgraphs, *self.outside]

    def match_table(self) -> Counter[str]:
        """Matches by pass in distinct compiled graphs: what vLLM's own match table counts."""
        return Counter(f.pass_name for s in self.subgraphs if s.reused_from is None for f in s.found if f.by_a_pass)

    def layer_table(self) -> Counter[str]:
        """Matches by pass, or by what fuses layers, over all layers: reuses counted, and each place once, for however many
        ranges it is compiled."""
        places = count_places(
            ((s.part, f.module, f.pass_name), s.compile_range) for s in self.everything for f in s.found if f.by_a_pass
        )
        table: Counter[str] = Counter()
        for (_, _, pass_name), count in places.items():
            table[pass_name] += count
        return table


def count_places(seen: Iterable[tuple[Any, str]]) -> Counter[Any]:
    """How many places each key stands for, from (key, compile range) of everything seen. The same graph compiled for another
    range is no new place; two matches of one key in one range, such as both norms of a layer, are two."""
    by_range = Counter(seen)
    places: Counter[Any] = Counter()
    for (key, _), count in by_range.items():
        places[key] = max(places[key], count)
    return places


def module_of(node: Any) -> str:
    """Path of the innermost module that made an fx node, for example "layers.3.mlp.act_fn"; "" if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    return _BOUND_METHOD.sub("", _ROOT.sub("", paths[-1])) if paths else ""


def modules_of(nodes: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(filter(None, map(module_of, nodes))))
