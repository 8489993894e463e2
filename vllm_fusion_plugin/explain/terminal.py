# SPDX-License-Identifier: Apache-2.0
"""An explanation as rich prints it, readable from 80 columns on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .explanation import Boundary, Explanation


def renderables(explanation: Explanation) -> Iterator[Any]:
    e = explanation
    yield Text(f"{e.model} on {e.gpu}, vLLM {e.vllm}, FlashInfer {'usable' if e.flashinfer else 'not usable'}")
    yield Text(e.summary, "bold green" if e.fused and not e.left else "bold")
    if e.do:
        yield Text(f"→ {e.do}", "bold")
    for kind in e.kinds:
        layers = f"{kind.layers} layers: " if kind.layers > 1 else "1 layer: " if kind.layers else ""
        yield _table(f"\n{layers}{kind.name}", [_row(b) for b in kind.boundaries])
    if e.saves_something:
        yield _savings(e)
    rest = [("no effect", "bold red", _said(n.flag, n.why, n.do)) for n in e.no_effect]
    if e.ignored:
        rest.append(("note", "yellow", Text(f"left out, no flags of the engine's: {' '.join(e.ignored)}")))
    rest += [("note", "yellow", Text(note)) for note in e.notes]
    if rest:
        yield _table("\nBesides", rest)


def _row(b: Boundary) -> tuple[str, str, Text]:
    text = Text.assemble((f"{b.reader}: " if b.reader else "", "bold"), " + ".join(b.parts) if b.fused else b.why)
    if b.tokens:
        text.append(f", for {b.tokens} tokens")
    below = [f"{b.op} ({b.by})" if b.op and b.by else b.op or b.by]
    if b.saves.launches:
        below.append(f"saves {saved(b)}")
    if any(below):
        text.append(f"\n{'; '.join(filter(None, below))}", "dim")
    return f"{b.places} {'fused' if b.fused else 'left'}", "green" if b.fused else "yellow", text


def saved(b: Boundary) -> str:
    """What one place saves."""
    launches = f"{b.saves.launches} launch{'es' if b.saves.launches > 1 else ''}"
    return f"{launches}, {size(b.saves.bytes)} a token" if b.saves.bytes else launches


def size(number: float) -> str:
    """Bytes in words: 48 KB, 24.2 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.3g} {unit}"


def duration(us: float) -> str:
    return f"{us:.3g} µs" if us < 1000 else f"{us / 1000:.3g} ms"


def _said(what: str, why: str, do: str) -> Text:
    text = Text.assemble((f"{what}: ", "bold"), why)
    return text.append(f"\n→ {do}", "bold") if do else text


def _table(title: str, rows: list[tuple[str, str, Text]]) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False, show_edge=False, pad_edge=False)
    made.add_column(justify="right", no_wrap=True)
    made.add_column(overflow="fold")
    for state, style, text in rows:
        made.add_row(Text(state, style), text)
    return made


def _savings(e: Explanation) -> Table:
    made = Table(title="\nA forward pass saves, on each GPU, estimated", title_justify="left", box=box.SIMPLE)
    made.show_edge = made.pad_edge = False
    for column in ("tokens", "launches", "bytes of memory traffic", "time"):
        made.add_column(column, justify="right")
    for saving in e.saves:
        made.add_row(str(saving.tokens), str(saving.launches), size(saving.bytes), duration(saving.us))
    return made
