# SPDX-License-Identifier: Apache-2.0
"""Who fused what, where, how often, and what was left and why: the reports of all ranks put together, and shown.

vLLM compiles identical pieces of a model once: its match table counts compiled graphs, not layers. This counts both. What is
shown is written down in recorder.py, one `RankReport` (rank_report.py) an engine and rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
    "PASS_WORDS",
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
    "pattern_words",
    "quantisers_by_fusion",
    "rank_line",
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


# ---- in words --------------------------------------------------------------------------------------------------------

LONE = "group_quant_pass"
DUAL = "mla_dual_rms_norm_fusion_pass"

# A pass's name in vLLM's match table -> the flag of vLLM's that asks for it; of a pass that vLLM lacks, our setting.
PASS_WORDS = {
    "activation_quant_fusion_pass": "fuse_act_quant",
    "rmsnorm_quant_fusion_pass": "fuse_norm_quant",
    DUAL: "fuse_norm_quant",
    "rocm_aiter_rms_norm_quant_fusion_pass": "fuse_norm_quant",
    "rocm_aiter_silu_mul_fp8_group_quant_fusion_pass": "fuse_act_quant",
    "attn_quant_fusion": "fuse_attn_quant",
    "mla_attn_quant_fusion": "fuse_attn_quant",
    LONE: "lone_group_quant",
    "none": "no pass",
}

# Parts of a pattern's key.
_PRODUCERS = {
    "silu_mul": "SiLU·mul",
    "sigmoid_mul": "attention's sigmoid gate",
    "situ_mul": "SiTU·mul",
    "relu2": "relu2",
    "rms_norm": "RMS norm",
    "fused_add_rms_norm": "residual add + RMS norm",
    "gated_rms_norm": "gated RMS norm",
    "mla_dual_rms_norm": "RMS norms of q and kv",
    "attention": "attention",
    "mla_attention": "latent attention (MLA)",
}
_QUANTISERS = {
    "group": "FP8 quantiser, groups",
    "token": "FP8 quantiser, one scale a token",
    "static": "FP8 quantiser, static scale",
    "nvfp4": "NVFP4 quantiser",
    "quantiser": "quantiser",
}
# Producers by their names in patterns -> the stem of the op that fuses them; see ops/. Attention's is vLLM's own op.
_STEMS = {"fused_add_rms_norm": "rms_norm", "attention": "", "mla_attention": ""}
_USES = ("norm", "sum", "act")  # that a norm's result, its sum or SiLU·mul's result is read elsewhere, too
# In reasons and notes.
_KEY = re.compile(
    r"(?:[a-z0-9_]+(?:\[[^\]]*\])?\+)?"  # a producer
    r"(?:(?:group\d+|token|static)\[[^\]]*\]|(?<=\+)nvfp4(?:\[\w+\])?)"  # a quantiser
    r"(?:\+(?:norm|sum|act))*(?:\[\w+\])?"
)
# Reasons for what no quantiser follows: `explain` of passes that look for what comes before one.
_NO_QUANTISER = re.compile(
    r", unquantised$|; no quantiser$|^attention \(.*\) is followed by (?!.*quantiser).*; fused are "
)


def pattern_words(key: str) -> str:
    """ "silu_mul[native]+group128[custom_op,tma,ue8m0]" -> "SiLU·mul + FP8 quantiser, groups of 128, UE8M0 scales"."""
    words: list[str] = []
    for part in re.split(r"\+(?![^\[]*\])", key):
        name, _, rest = part.partition("[")
        traits = rest.rstrip("]").split(",")
        group = re.fullmatch(r"group(\d+)", name)
        if name in _USES and words:
            continue
        word = _PRODUCERS.get(name) or _QUANTISERS.get(name) or name.replace("_", " ")
        if "gemma" in traits:
            word = word.replace("RMS norm", "Gemma RMS norm")
        if group:
            word = f"{_QUANTISERS['group']} of {group[1]}"
        words.append(word + (", UE8M0 scales" if "ue8m0" in traits else ""))
    return " + ".join(words) + (", in AITER's op" if key.endswith("][aiter]") or "+sum[aiter]" in key else "")


def split_pattern(pattern: str) -> tuple[str, str]:
    """A pattern's producer and the rest: at the first + that is in no brackets."""
    first, *rest = re.split(r"\+(?![^\[]*\])", pattern, maxsplit=1)
    return first, "".join(rest)


def op_name(found: Found) -> str:
    """The name of the op that a match has become, as in ops/, or vLLM's."""
    first, rest = split_pattern(found.pattern)
    if not found.by_a_pass:
        return rest.partition("[")[2].rstrip("]")
    if found.pass_name == LONE:
        return "group_fp8_quant"
    producer, quantiser = first.partition("[")[0], re.match(r"group|token|static|nvfp4", rest)
    stem = _STEMS.get(producer, producer)
    if not stem or quantiser is None:
        return "vLLM's op, with quantised output"
    return f"{stem}_{quantiser[0]}_quant" if quantiser[0] == "nvfp4" else f"{stem}_{quantiser[0]}_fp8_quant"


def places_of(op: str, report: RankReport) -> list[str]:
    """The modules in which an op was put, in the order of the layers."""
    first_range = {(sub.part, sub.index): sub.compile_range for sub in reversed(report.subgraphs)}
    found = (
        f.module
        for sub in report.subgraphs
        if sub.compile_range == first_range[sub.part, sub.index]
        for f in sub.found
        if f.by_a_pass and op_name(f) == op
    )
    return sorted(found, key=lambda module: [int(n) for n in re.findall(r"\d+", module)])


def alone(subgraph: Subgraph) -> list[Found]:
    """Quantisers in this package's kernel, fused with nothing, that no reason tells of."""
    if any("this package's kernel" in m.reason for m in subgraph.missed):
        return []
    return [f for f in subgraph.found if f.pass_name == LONE]


def reason_words(reason: str) -> str:
    """A reason or a note with its patterns' keys in words."""
    return _KEY.sub(lambda key: pattern_words(key[0]), reason)


def names_quantiser(reason: str) -> bool:
    """Whether a reason is of a quantiser, and not of something that none follows."""
    return not _NO_QUANTISER.search(reason)


def _fused(subgraph: Subgraph) -> Iterator[tuple[str, str, str]]:
    return ((f.pass_name, pattern_words(f.pattern), f.module) for f in subgraph.found if f.pass_name != LONE)


def _not_fused(subgraph: Subgraph) -> Iterator[tuple[str, str, str]]:
    for m in subgraph.missed:
        yield m.pass_name, reason_words(m.reason), m.module
    for f in alone(subgraph):
        yield LONE, f"{pattern_words(f.pattern)}, by itself in this package's kernel", f.module


def _state(rank: RankReport) -> list[tuple[str, str]]:
    return [(rank.manager, ", ".join(f"{count} {name}" for name, count in rank.linear_kernels.items()))]


def _kernels(rank: RankReport) -> list[tuple[str, str, str]]:
    return [("", rank.kernels, "")] if rank.kernels else []


def _notes(rank: RankReport) -> list[tuple[str]]:
    return [(reason_words(note),) for note in rank.notes]


def quantisers_by_fusion(rank: RankReport) -> dict[str, tuple[int, int]]:
    """(fused, left) of a rank's quantisers, by what fuses them or could: the flag or setting, as PASS_WORDS has it."""

    def count(ask: Callable[[Subgraph], Iterable[tuple[str, str, str]]]) -> Counter[str]:
        seen = (((sub.part, *line), sub.compile_range) for sub in rank.everything for line in ask(sub) if is_one(*line))
        counted: Counter[str] = Counter()
        for (_, pass_name, _, _), places in count_places(seen).items():
            counted[PASS_WORDS.get(pass_name, pass_name)] += places
        return counted

    def is_one(pass_name: str, words: str, module: str) -> bool:
        # The op of two norms has the one quantiser that is found after the first.
        return pass_name != DUAL and names_quantiser(words)

    fused, left = count(_fused), count(_not_fused)
    return {fusion: (fused[fusion], left[fusion]) for fusion in {**fused, **left}}


def _verified(rank: RankReport) -> list[tuple[str, str, str]]:
    """Of each op: its name, how many numbers differ and from what, and where."""
    told = []
    for op in {v.op: None for v in rank.verified}:
        of_op = [v for v in rank.verified if v.op == op]
        numbers, differing = sum(v.numbers for v in of_op), sum(v.differing for v in of_op)
        beside = sorted({f"vLLM's {op}" for v in of_op for op in v.vllms_ops}) or ["plain torch"]
        calls = sum(v.calls for v in of_op)
        words = f"{differing} of {_rounded(numbers)} numbers of {calls} calls differ from {' and '.join(beside)}"
        where = f"in {shorten(v.place for v in of_op if v.differing)}" if differing else ""
        problems = {v.problem: None for v in of_op if v.problem}
        told.append((op, words, "; ".join(filter(None, [where, *problems]))))
    return told


def _rounded(number: int) -> str:
    """ "1.3 · 10⁹"."""
    if number < 10**6:
        return str(number)
    digits, exponent = f"{number:.1e}".split("e+")
    return f"{digits} · 10{str(int(exponent)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _count_quantisers(rank: RankReport) -> tuple[int, int]:
    """(fused, left) of a rank's quantisers."""
    counts = quantisers_by_fusion(rank).values()
    return sum(fused for fused, _ in counts), sum(left for _, left in counts)


def _in_words(fused: int, left: int) -> str:
    if not fused + left:
        return "no quantiser seen in what was compiled"
    if not left:
        return f"all {fused} quantisers fused"
    return f"{fused or 'none'} of {fused + left} quantisers fused; {left} left, see below"


def rank_line(rank: RankReport) -> str:
    """What one rank logs when it is about to serve."""
    said = _in_words(*_count_quantisers(rank)).replace("see below", "see vllm-fusion-plugin report")
    return f"rank {rank.rank}: {said}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_spans(ranks)}"


def layer_name(module: str) -> str:
    """What has a name in the model: "layers.0.mlp.down_proj.quant_method.fp8_linear.quant_fp8" -> "...mlp.down_proj"."""
    return re.split(r"\.(?:quant_method|scheme)\b", module, maxsplit=1)[0]


def _tokens(compile_range: str) -> str:
    """ "(1, 4681)" -> "1-4681"."""
    return compile_range.strip("()").replace(", ", "-")


def _spans(numbers: Iterable[int], separator: str = ",") -> str:
    """0, 1, 2, 5 -> "0-2,5"."""
    spans: list[list[int]] = []
    for n in sorted(set(numbers)):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return separator.join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


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
        several = len({s.model for rank in self.ranks for s in rank.everything}) > 1
        return f"{subgraph.model}: {module}" if several else module

    def rows(self) -> list[tuple[str, str, str, int, int, str, str]]:
        """(pass, pattern, range, compiled graphs, layers, ranks, modules) by model, pass, pattern and range."""
        groups: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        for rank in self.ranks:
            for sub in rank.everything:
                for f in sub.found:
                    g = groups.setdefault(
                        (sub.model, f.pass_name, f.pattern, sub.compile_range),
                        {"graphs": 0, "layers": 0, "ranks": {}, "modules": {}},
                    )
                    g["graphs"] += sub.is_new_graph
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
            for sub in rank.everything
            for m in sub.missed
        )
        groups: dict[tuple[str, str], dict[str, int]] = {}
        for (pass_name, reason, module, _, _), count in places.items():
            modules = groups.setdefault((pass_name, reason), {})
            modules[module] = modules.get(module, 0) + count
        return [(*key, sum(modules.values()), shorten(modules)) for key, modules in sorted(groups.items())]

    def summary(self) -> str:
        """One line: how many quantisers are fused, of how many. Of each rank, where ranks differ."""
        counts: dict[tuple[int, int], list[int]] = {}
        for rank in self.ranks:
            counts.setdefault(_count_quantisers(rank), []).append(rank.rank)
        lines = [_in_words(fused, left) for fused, left in counts]
        if len(counts) > 1:
            return "; ".join(f"{_ranks(ranks)}: {line}" for line, ranks in zip(lines, counts.values(), strict=True))
        each = f" on each of {len(self.ranks)} ranks" if len(self.ranks) > 1 else ""
        return "".join(lines).replace(" fused", f" fused{each}", 1)

    def tables(self) -> list[Any]:
        """What rich prints, readable from 80 columns on: the summary, then tables of the state of each rank, what fused,
        what did not and why, and what ranks note.

        Passes are called by vLLM's flag for them, patterns by what they fuse; their keys are in `model_dump()`."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        def table(title: str, first: str, second: str, rows: Iterable[tuple[str, str, str, str]]) -> Table:
            """A number or ranks, and beside it what that is of, with a line below it: two columns, so that the words of the
            second, which are as long as names of vLLM's ops and variables, are whole in 80 characters."""
            made = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE, show_edge=False, pad_edge=False)
            made.add_column(first, justify="right", no_wrap=True)
            made.add_column(second, overflow="fold")
            for number, head, text, below in rows:
                cell = Text.assemble((f"{head}: ", "bold"), text) if head else Text(text)
                made.add_row(number, cell.append(f"\n{below}", "dim") if below else cell)
            return made

        states = [(ranks, "", state, kernels) for ranks, state, kernels in self._by_ranks(_state)]
        notes = [(ranks, "", note, "") for ranks, note in self._by_ranks(_notes)]
        tables = [
            table("State", "rank", "state, and kernels of the quantised linear layers", states),
            table("Kernels", "rank", "CUDA's or Triton's", self._by_ranks(_kernels)),
            table("Fused", "places", "what and where", self._places(_fused)),
            table("Not fused", "places", "why, and where", self._places(_not_fused)),
            table(
                "Verified",
                "rank",
                "first calls, against what the op replaces, and where they differ",
                self._by_ranks(_verified),
            ),
            table("Notes", "rank", "note", notes),
        ]
        return [Text(self.summary()), *(t for t in tables if t.row_count)]

    def _by_ranks(self, ask: Callable[[RankReport], Iterable[tuple[str, ...]]]) -> list[Any]:
        """(ranks, *what they say), one line for all that say the same."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for rank in self.ranks:
            for said in ask(rank):
                groups.setdefault(said, []).append(rank.rank)
        return [(_spans(ranks), *said) for said, ranks in groups.items()]

    def _places(self, ask: Callable[[Subgraph], Iterable[tuple[str, str, str]]]) -> list[tuple[str, str, str, str]]:
        """(places, pass, what, where) of what `ask` says of a subgraph: (pass, what, module). Places of one rank; what is
        not so on all ranks, or not for all numbers of tokens, says of which it is."""
        several = len({s.model for rank in self.ranks for s in rank.everything}) > 1
        rows: dict[tuple[tuple[str, str, str, str], tuple[tuple[str, int], ...]], list[int]] = {}
        for rank in self.ranks:
            compiled: dict[tuple[int, int], set[str]] = {}
            seen: dict[tuple[str, str, str], list[tuple[Subgraph, str]]] = {}
            for sub in rank.everything:
                compiled.setdefault((sub.part, sub.index), set()).add(sub.compile_range)
                for pass_name, what, module in ask(sub):
                    seen.setdefault((sub.model if several else "", pass_name, what), []).append((sub, module))
            for key, found in seen.items():
                places = count_places(((sub.part, module), sub.compile_range) for sub, module in found)
                modules: dict[str, int] = {}
                for (_, module), count in places.items():
                    modules[module] = modules.get(module, 0) + count
                ranges = {sub.compile_range: None for sub, _ in found}
                everywhere = all(compiled[sub.part, sub.index] <= ranges.keys() for sub, _ in found)
                tokens = "" if everywhere else ", ".join(_tokens(r) for r in ranges)
                rows.setdefault(((*key, tokens), tuple(modules.items())), []).append(rank.rank)
        return [
            (
                str(sum(count for _, count in modules)),
                PASS_WORDS.get(pass_name, pass_name),
                what + (f", for {tokens} tokens" if tokens else ""),
                "; ".join(
                    filter(
                        None, [model, shorten((layer_name(m) for m, _ in modules), spaced_from=60), self._only(ranks)]
                    )
                ),
            )
            for ((model, pass_name, what, tokens), modules), ranks in sorted(rows.items(), key=lambda row: row[0][0])
        ]

    def _only(self, ranks: list[int]) -> str:
        return f"only on {_ranks(ranks)}" if len(ranks) < len(self.ranks) else ""

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=1)


def shorten(modules: Iterable[str], spaced_from: int = 1000) -> str:
    """ "layers.0.mlp, layers.1.mlp, layers.2.mlp" -> "layers.0-2.mlp".

    spaced_from: the length from which on there is a space after each comma, where a line may end."""
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
        part = f"{head}.{_spans(numbers)}" + (f".{tail}" if tail else "")
        parts.append(part if len(part) < spaced_from else part.replace(",", ", "))
    return ", ".join(filter(None, parts))
