# SPDX-License-Identifier: Apache-2.0
"""The command: asks, and shows what was found."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__, child
from . import installation
from .diagnosis import Diagnosis, Engine, Finding, State

_STYLES: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "problem": ("problem", "bold red"),
    "note": ("note", "yellow"),
    "unknown": ("not asked", "yellow"),
}


def diagnose(flags: Sequence[str], gpu: str) -> Diagnosis:
    """flags: as for `vllm serve`. gpu: a key of fake_gpu.GPUS, for where there is none.

    Raises:
        child.UserError: vLLM does not accept the flags.
    """
    findings = [
        *installation.libraries(),
        installation.gpus(),
        installation.kernels(),
        *filter(None, [installation.command()]),
        *installation.plugin(),
    ]
    engine = None
    if any(f.about in ("vLLM", "torch") and f.state == "problem" for f in findings):
        findings.append(Finding(about="engine", state="unknown", said="vLLM cannot be asked as it is"))
    else:
        try:
            told = child.ask("vllm_fusion_plugin.doctor.probe", {"flags": list(flags), "gpu": gpu})
            findings += [Finding(**f) for f in told["findings"]]
            engine = Engine(**told["engine"]) if told["engine"] else None
        except child.ChildError as e:
            findings.append(Finding(about="vLLM", state="problem", said=str(e)))
    return Diagnosis(version=__version__, findings=findings, engine=engine)


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print it, readable from 80 columns on."""
    console.print(_table([(*_STYLES[f.state], f.about, f.said, f.do) for f in diagnosis.findings]))
    if engine := diagnosis.engine:
        console.print(Text(f"\nEngine: {engine.model}, {engine.gpu}"))
        rows = [("problem", "bold red", "engine", engine.state, engine.do)] if engine.state else []
        rows += [("no effect", "bold red", n.flag, n.why, n.do) for n in engine.no_effect]
        for p in engine.passes:
            state, style = ("ours", "green") if p.state == "ours" else ("not ours", "dim")
            rows.append((state, style, p.name, p.switch if p.state == "ours" else f"{p.switch}: {p.state}", p.do))
        rows += [("note", "yellow", "left out", f"no flags of the engine's: {' '.join(engine.ignored)}", "")] * bool(
            engine.ignored
        )
        if rows:
            console.print(_table(rows))
    console.print(_verdict(diagnosis))


def _table(rows: Sequence[tuple[str, str, str, str, str]]) -> Table:
    """Of (state, its style, what it is of, what is said, what to do)."""
    made = Table(box=box.SIMPLE, show_header=False, show_edge=False, pad_edge=False)
    made.add_column(no_wrap=True)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for state, style, about, said, do in rows:
        cell = Text(said)
        if do:
            cell.append(f"{chr(10) if said else ''}→ {do}", "bold")
        made.add_row(Text(state, style), about, cell)
    return made


def _verdict(diagnosis: Diagnosis) -> Text:
    problems = diagnosis.problems
    if problems:
        what = "1 thing stands" if len(problems) == 1 else f"{len(problems)} things stand"
        return Text(f"\n{what} in the way; see above", "red")
    if diagnosis.engine is None:
        return Text("\nThe installation is in order; what vLLM would do could not be asked here", "yellow")
    ours = sum(p.state == "ours" for p in diagnosis.engine.passes)
    return Text(
        f"\nThe plugin is found, and {ours} of {len(diagnosis.engine.passes)} passes are this package's", "green"
    )
