# SPDX-License-Identifier: Apache-2.0
"""The `vllm-fusion-plugin` command."""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from . import __version__, vllm_flags
from .child import ChildError, UserError
from .demo import compare
from .report import PASS_WORDS, FusionReport, sum_match_tables

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Fusion passes and fused kernels for vLLM.")

WHAT_THE_DEMO_IS = """\
vllm-fusion-plugin {version}, vLLM {vllm} on CPU
Model: a random 2-layer Qwen3 with FP8 weights in 128x128 blocks.
Real: vLLM's engine and compiler; our passes match and replace in its graphs.
Stand-ins: the fused ops and the block-scaled FP8 matmul run in plain torch; the
  matmul is this package's too, as vLLM's own needs AMX.
Rounding: both engines round where eager torch does (emulate_precision_casts);
  without it Inductor's own fusions move last bits, and then tokens.
Nothing here measures speed.
"""


class TensorParallel(enum.StrEnum):
    one = "1"
    two = "2"
    all = "all"

    @property
    def sizes(self) -> tuple[int, ...]:
        return (1, 2) if self is TensorParallel.all else (int(self.value),)


@app.callback()
def _root() -> None:
    pass  # so that a single command keeps its name


@app.command("demo")
def demo_command(
    tensor_parallel_size: Annotated[
        TensorParallel, typer.Option(help="Ranks a run has; 2 needs two CPU cores.")
    ] = TensorParallel.all,
    keep: Annotated[
        Path | None, typer.Option(help="Keep model, logs, results and compiled code in this folder.", file_okay=False)
    ] = None,
    break_op: Annotated[
        bool, typer.Option("--break-op", help="Make the fused ops wrong, to see the comparison fail.")
    ] = False,
) -> None:
    """Run vLLM's CPU engine with fusions on and off, compare the tokens, and show what fused.

    Exit status 0: the same tokens, and something fused on every rank. 1: not so. 2: the demo cannot run here.
    """
    console, errors = Console(), Console(stderr=True, soft_wrap=True)
    try:
        console.print(WHAT_THE_DEMO_IS.format(version=__version__, vllm=compare.cpu_vllm_version()), highlight=False)
        folder = keep.resolve() if keep else Path(tempfile.mkdtemp(prefix="vllm-fusion-plugin-demo-"))
        model = _write_checkpoint(folder / "model")
        comparisons: list[compare.Comparison] = []
        for size in tensor_parallel_size.sizes:
            comparisons.append(
                compare.compare(
                    size, model, folder, break_op=break_op, progress=lambda t: console.print(t, style="dim")
                )
            )
    except compare.DemoError as e:
        errors.print(f"error: {e}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    for table in _tables(comparisons):
        console.print(table)
    passed = all(c.passed for c in comparisons)
    console.print(*_verdict(comparisons, break_op), sep="\n", style="green" if passed else "red", highlight=False)
    if keep or not passed:
        console.print(f"Logs, results and compiled code: {folder}", soft_wrap=True, highlight=False)
    else:
        shutil.rmtree(folder)
    raise typer.Exit(0 if passed else 1)


# What the commands that ask vLLM have in common.
VllmFlags = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- FLAGS]", help="Flags as for `vllm serve`, after --.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


class Gpu(enum.StrEnum):
    h100 = "h100"
    h200 = "h200"
    b200 = "b200"
    mi300x = "mi300x"
    mi355x = "mi355x"


@app.command("doctor")
def doctor_command(
    flags: VllmFlags = None,
    gpu: Annotated[Gpu, typer.Option(help="The GPU to ask vLLM for, where there is none.")] = Gpu.h100,
    as_json: AsJson = False,
) -> None:
    """Say whether vLLM finds the plugin, which passes would be ours, which flags do nothing, and what to change.

    Exit status 0: the plugin would be at work. 1: something stands in its way. 2: vLLM could not be asked.
    """
    from .doctor import command

    with _told_to_the_user():
        diagnosis = command.diagnose(flags or [], gpu.value)
    if as_json:
        print(diagnosis.model_dump_json(indent=1))
    else:
        command.show(diagnosis, Console())
    raise typer.Exit(diagnosis.exit_status)


@app.command("explain")
def explain_command(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder with a config.json, or an id in Hugging Face's cache.", show_default=False),
    ] = None,
    flags: VllmFlags = None,
    matrix: Annotated[
        Path | None,
        typer.Option(help="Explain each model in this folder instead, and show a table.", show_default=False),
    ] = None,
    gpu: Annotated[Gpu, typer.Option(help="The GPU to explain for; none has to be here.")] = Gpu.h100,
    tp: Annotated[int, typer.Option("--tp", min=1, help="How many GPUs share the model.")] = 1,
    flashinfer: Annotated[bool, typer.Option(help="Whether FlashInfer is usable there.")] = True,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens in a forward pass, to say what it saves; repeatable.", show_default="1, 8192"),
    ] = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file instead.", dir_okay=False)] = None,
) -> None:
    """Say what fuses in a model, what does not and why, and what it saves. Needs vLLM's CUDA build, and no GPU.

    Exit status 0: explained. 1: explained, and the plugin or a flag does nothing. 2: it cannot be explained.
    """
    from .explain import command, page, terminal

    if matrix is not None:
        _explain_matrix(matrix, [*filter(None, [model]), *(flags or [])], gpu, flashinfer, as_json, html)
    with _told_to_the_user():
        if model is None:
            raise UserError("name a model, as a folder with a config.json or by its id on the hub, or --matrix FOLDER")
        if html is not None and not html.parent.is_dir():  # known now, and not after half a minute
            raise UserError(f"{html} cannot be written: there is no folder {html.parent}")
        explanation = command.ask(model, flags or [], gpu.value, tp, flashinfer, tokens or [1, 8192])
        if html is not None:
            _write(html, page.page(explanation))
    if as_json:
        print(explanation.model_dump_json(indent=1))
    elif html is not None:
        Console(stderr=True, soft_wrap=True).print(f"{explanation.summary}; page: {html}", highlight=False)
    else:
        Console().print(*terminal.renderables(explanation), sep="\n")
    raise typer.Exit(explanation.exit_status)


def _explain_matrix(
    folder: Path, flags: list[str], gpu: Gpu, flashinfer: bool, as_json: bool, html: Path | None
) -> NoReturn:
    from .explain import matrix

    with _told_to_the_user():
        if named := vllm_flags.split_model(flags)[0]:
            raise UserError(f"--matrix {folder} names models, and so does {named}; leave out one of the two")
        if html is not None:
            raise UserError("--html shows one model; --matrix prints a table, or JSON")
        errors = Console(stderr=True, soft_wrap=True)
        column = matrix.column(
            folder, flags, gpu.value, flashinfer, lambda name: errors.print(f"explaining {name}", style="dim")
        )
    if as_json:
        print(column.model_dump_json(indent=1))
    else:
        Console().print(*matrix.renderables(column), sep="\n")
    raise typer.Exit(int(any(row.problem for row in column.rows)))


@app.command("report")
def report_command(
    url: Annotated[
        str | None, typer.Option(help="A running server, such as http://localhost:8000; needs VLLM_SERVER_DEV_MODE=1.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of vLLM's compiled code.", show_default="vLLM's own", file_okay=False)
    ] = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file, too.", dir_okay=False)] = None,
) -> None:
    """Show what has fused: in a running server, or in what was last compiled on this machine.

    Exit status 0: the plugin was at work on every rank. 1: not so. 2: there is no report.
    """
    from . import served

    with _told_to_the_user():
        if url is not None and cache is not None:
            raise UserError("--url asks a running server, and --cache reads what one has kept: name one of them")
        report, where = (served.ask(url), url) if url else served.read(cache or served.cache_root())
        if as_json:
            print(report.to_json())
        else:
            console = Console()
            console.print(*report.tables(), sep="\n")
            console.print(f"\nfrom {where}", style="dim", soft_wrap=True, highlight=False)
        if html is not None:
            _write(html, _page(report))
    raise typer.Exit(0 if report.ranks and all(rank.manager.startswith("active") for rank in report.ranks) else 1)


def _page(report: FusionReport) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=120, file=nowhere)
        console.print(*report.tables(), sep="\n")
        return console.export_html(inline_styles=True)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}") from None


@contextlib.contextmanager
def _told_to_the_user() -> Iterator[None]:
    """An error in one line, exit status 2; Ctrl-C ends without a traceback, exit status 130."""
    try:
        yield
    except (UserError, ChildError) as e:
        Console(stderr=True, soft_wrap=True).print(f"error: {e}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _write_checkpoint(folder: Path) -> Path:
    from .demo.checkpoint import write_checkpoint  # imports torch: only once it is known that there is one

    return write_checkpoint(folder)


def _tables(comparisons: list[compare.Comparison]) -> list[RenderableType]:
    summary = Table(title="Fusions on against fusions off", box=box.SIMPLE, pad_edge=False)
    summary.add_column("TP", justify="right")
    summary.add_column("pass, by its flag", no_wrap=True)
    for column in ("matches", "same tokens", "max |Δlogp|"):
        summary.add_column(column, justify="right")
    shown: list[RenderableType] = [summary]
    for c in comparisons:
        for name, matches in sum_match_tables(c.on.match_tables).items() or [("none", 0)]:
            by_rank = " + ".join(str(table.get(name, 0)) for table in c.on.match_tables)
            summary.add_row(
                str(c.tensor_parallel_size),
                PASS_WORDS.get(name, name),
                str(matches) if by_rank == str(matches) else f"{by_rank} = {matches}",
                f"{c.tokens - c.tokens_differing} of {c.tokens}",
                f"{c.largest_logprob_difference:.6f}",
            )
        shown += [Text(f"\nFusions, TP {c.tensor_parallel_size}", style="bold"), *c.report.tables()]
    return shown


def _verdict(comparisons: list[compare.Comparison], break_op: bool) -> list[str]:
    lines = []
    for c in comparisons:
        where = f"TP {c.tensor_parallel_size}"
        if not c.fused_on_every_rank:
            lines.append(f"{where}: FAILED, a rank fused nothing")
        if c.tokens_differing:
            lines.append(f"{where}: FAILED, {c.tokens_differing} of {c.tokens} tokens differ")
        if c.passed:
            lines.append(f"{where}: passed, {c.tokens} tokens the same")
    if break_op:
        caught = all(c.tokens_differing for c in comparisons)
        lines.append(
            "The fused ops were wrong on purpose: "
            + ("the comparison noticed." if caught else "the comparison did NOT notice.")
        )
    return lines


if __name__ == "__main__":
    app()
