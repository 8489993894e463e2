# SPDX-License-Identifier: Apache-2.0
"""What `explain` says, as data: a model's quantisers by kind of layer, each with what becomes of it and what that saves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from ..rank_report import Found, Missed, RankReport, count_places
from ..report import (
    DUAL,
    LONE,
    PASS_WORDS,
    alone,
    layer_name,
    names_quantiser,
    op_name,
    pattern_words,
    reason_words,
    split_pattern,
)
from ..vllm_flags import NoEffect
from . import savings
from .traced import Traced

ELSEWHERE = "outside of the layers"
NOBODY = PASS_WORDS["none"]
_IN_LAYER = re.compile(r"^(?:.*?\.)?layers\.(\d+)(?:\.(.*))?$")


class Boundary(BaseModel):
    """A quantiser and what has made its input, in so many places of the model."""

    places: int = 1
    reader: str = ""
    """Who reads what is quantised, inside the layer: "mlp.down_proj"."""
    quantiser: bool = True
    """Whether it has one of its own: the op for both norms of latent attention has that of the first."""
    parts: list[str] = Field(default_factory=list)
    """What is done before that reads, in order: "SiLU·mul", "FP8 quantiser, groups of 128"."""
    fused: bool
    by: str = ""
    """Who fuses it, or could: vLLM's flag, or a setting; "" if nobody."""
    op: str = ""
    """The op that it is fused into."""
    why: str = ""
    """Why it is not fused."""
    tokens: str = ""
    """For how many tokens, if not for any number: "1-512"."""
    saves: savings.PerToken = Field(default_factory=savings.PerToken)
    """In each place."""


class Kind(BaseModel):
    """Layers that are alike."""

    name: str
    layers: int
    boundaries: list[Boundary]


class Explanation(BaseModel):
    model: str
    gpu: str
    """A name, with the number of GPUs."""
    vllm: str
    flashinfer: bool
    state: str = ""
    """Why the package does nothing; "" if it does."""
    do: str = ""
    linear_kernels: dict[str, int] = Field(default_factory=dict)
    """vLLM's GEMMs of the quantised linear layers; of those that were traced."""
    fused: int = 0
    left: int = 0
    kinds: list[Kind] = Field(default_factory=list)
    saves: list[savings.Saving] = Field(default_factory=list)
    no_effect: list[NoEffect] = Field(default_factory=list)
    ignored: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    @property
    def saves_something(self) -> bool:
        return any(saving.launches for saving in self.saves)

    @property
    def exit_status(self) -> int:
        """0, or 1 if the package does nothing or a flag does nothing."""
        return int(bool(self.state or self.no_effect))

    @property
    def summary(self) -> str:
        if self.state:
            return f"nothing fuses: {self.state}"
        if not self.fused + self.left:
            return "there is no quantiser in what vLLM compiles"
        if not self.left:
            return f"all {self.fused} quantisers fuse"
        return f"{self.fused or 'none'} of {self.fused + self.left} quantisers fuse"


def explain(traced: Traced, model: str, gpu: str, tensor_parallel_size: int, tokens: Sequence[int]) -> Explanation:
    """model: as the user calls it. gpu: a key of savings.BANDWIDTH."""
    kinds = _kinds(traced)
    boundaries = [b for kind in kinds for b in kind.boundaries]
    shards = f", of {tensor_parallel_size} that share the model" if tensor_parallel_size > 1 else ""
    return Explanation(
        model=model,
        gpu=f"one {traced.gpu}{shards}",
        vllm=traced.vllm,
        flashinfer=traced.flashinfer,
        state=traced.state,
        do=traced.do,
        linear_kernels=traced.report.linear_kernels,
        fused=sum(b.places for b in boundaries if b.fused and b.quantiser),
        left=sum(b.places for b in boundaries if not b.fused),
        kinds=kinds,
        saves=[savings.total(((b.places, b.saves) for b in boundaries), n, gpu) for n in tokens if not traced.state],
        no_effect=[*traced.no_effect, *_matched_nothing(traced)],
        ignored=traced.ignored,
        notes=[*traced.notes, *map(reason_words, traced.report.notes), *_of_inductor(traced)],
    )


# ---- boundaries ------------------------------------------------------------------------------------------------------


def _kinds(traced: Traced) -> list[Kind]:
    """Boundaries by kind of layer, in the order of the layers; those outside of layers at the end."""
    number_of: dict[str, int] = {}
    for layer in traced.layers:
        number_of[layer.kind] = number_of.get(layer.kind, 0) + layer.stands_for
    grouped: dict[str, dict[str, Boundary]] = {kind: {} for kind in [*number_of, ELSEWHERE]}
    for boundary, module in _boundaries(traced.report, traced.itemsize):
        position, inside = _place(module)
        within = traced.layers[position] if position is not None and position < len(traced.layers) else None
        boundary.reader = layer_name(inside if within else module)
        key = boundary.model_copy(update={"places": 0}).model_dump_json()
        boundary.places *= within.stands_for if within else 1
        known = grouped[within.kind if within else ELSEWHERE].setdefault(key, boundary)
        if known is not boundary:
            known.places += boundary.places
    order = _order(traced)
    kinds = []
    for kind, found in grouped.items():
        boundaries = sorted(found.values(), key=lambda b: order.get((kind, b.reader), 0))
        if boundaries:
            kinds.append(Kind(name=kind, layers=number_of.get(kind, 0), boundaries=boundaries))
    return kinds


def _order(traced: Traced) -> dict[tuple[str, str], int]:
    """(kind, module) -> where it comes in the graphs of such layers."""
    order: dict[tuple[str, str], int] = {}
    for module in (module for sub in traced.report.subgraphs for module in sub.modules):
        position, inside = _place(module)
        if position is not None and position < len(traced.layers):
            order.setdefault((traced.layers[position].kind, layer_name(inside)), len(order))
    return order


def _place(module: str) -> tuple[int | None, str]:
    """The layer that a module is in, and its name there."""
    m = _IN_LAYER.match(module)
    return (int(m[1]), m[2] or "") if m else (None, module)


def _boundaries(report: RankReport, itemsize: int) -> list[tuple[Boundary, str]]:
    """Each boundary with the module that it belongs to, and how often it is there; one that is not so for all numbers of
    tokens says for which."""
    compiled: dict[tuple[int, int], set[str]] = {}
    seen: list[tuple[tuple[int, int, str, str], str]] = []
    for sub in report.subgraphs:
        compiled.setdefault((sub.part, sub.index), set()).add(sub.compile_range)
        told: list[tuple[Boundary, str]] = []
        told += [(_found(f, itemsize), f.reader or f.module) for f in sub.found if f.pass_name != LONE]
        told += [(_missed(m), m.reader or m.module) for m in sub.missed if names_quantiser(m.reason)]
        told += [(_alone(f), f.reader or f.module) for f in alone(sub)]
        seen += [((sub.part, sub.index, b.model_dump_json(), module), sub.compile_range) for b, module in told]
    ranges: dict[Any, set[str]] = {}
    for key, compile_range in seen:
        ranges.setdefault(key, set()).add(compile_range)
    counted = []
    for key, places in count_places(seen).items():
        part, index, text, module = key
        everywhere = compiled[part, index] <= ranges[key]
        tokens = "" if everywhere else ", ".join(r.strip("()").replace(", ", "-") for r in sorted(ranges[key]))
        boundary = Boundary.model_validate_json(text)
        counted.append((boundary.model_copy(update={"places": places, "tokens": tokens}), module))
    return counted


def count_fused(report: RankReport) -> int:
    """How many quantisers `explain` would say fuse, of an engine's report."""
    return sum(b.places for b, _ in _boundaries(report, itemsize=2) if b.fused and b.quantiser)


def _found(found: Found, itemsize: int) -> Boundary:
    first, rest = split_pattern(found.pattern)
    return Boundary(
        parts=[pattern_words(part) for part in (first, rest if found.pass_name != DUAL else "") if part],
        fused=True,
        quantiser=found.pass_name != DUAL,
        by=PASS_WORDS.get(found.pass_name, found.pass_name),
        op=op_name(found),
        saves=savings.of(found, itemsize),
    )


def _missed(missed: Missed) -> Boundary:
    by = PASS_WORDS.get(missed.pass_name, missed.pass_name)
    return Boundary(fused=False, by="" if by == NOBODY else by, why=reason_words(missed.reason))


def _alone(found: Found) -> Boundary:
    words = pattern_words(found.pattern)
    return Boundary(parts=[words], fused=False, by=PASS_WORDS[LONE], why="it runs this package's kernel, by itself")


def _of_inductor(traced: Traced) -> list[str]:
    """A note if something fuses that Inductor would have fused as well."""
    found = (f for sub in traced.report.subgraphs for f in sub.found)
    if not any(savings.fused_by_inductor(f) for f in found):
        return []
    return [
        "where a quantiser is plain torch code, Inductor would make one kernel of it and what is before it, too: such "
        "fusions are counted as fused, and as saving nothing"
    ]


def _matched_nothing(traced: Traced) -> list[NoEffect]:
    """Flags that were set, and whose passes have found nothing to fuse in the model."""
    if traced.state:
        return []
    named = {n.flag for n in traced.no_effect}
    found: set[str | None] = set()
    reasons: dict[str, str] = {}
    for sub in traced.report.subgraphs:
        for f in sub.found:
            found.add(PASS_WORDS.get(f.pass_name))
            if not f.by_a_pass:
                flag = "fuse_norm_quant" if "norm" in split_pattern(f.pattern)[0] else "fuse_act_quant"
                reasons.setdefault(flag, f"{f.pass_name} has fused what it looks for")
        for m in sub.missed:
            reasons.setdefault(PASS_WORDS.get(m.pass_name, ""), reason_words(m.reason))
    return [
        NoEffect(
            flag=flag, why=f"it has fused nothing in this model; {reasons.get(flag, 'there is nothing for it to fuse')}"
        )
        for flag, value in traced.asked.items()
        if value and flag in PASS_WORDS.values() and flag not in found | named
    ]
