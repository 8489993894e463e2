# SPDX-License-Identifier: Apache-2.0
"""Many models on one GPU: how many quantisers fuse in each, and why the others do not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich import box
from rich.table import Table
from rich.text import Text

from ..child import ChildError, UserError
from . import command
from .explanation import Explanation

SERVED = "serve.json"


class Served(BaseModel):
    """How a model is served: `serve.json` beside its config.json."""

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    """What people call it; its folder's name if empty."""
    tensor_parallel_size: int = Field(default=1, ge=1)


class Row(BaseModel):
    """A model."""

    model: str
    tensor_parallel_size: int
    layers: int = 0
    fused: int = 0
    left: int = 0
    why: dict[str, int] = Field(default_factory=dict)
    """Reasons, each with how many quantisers are left for it."""
    problem: str = ""
    """Why nothing is known, or the package does nothing."""


class Column(BaseModel):
    """All models of a folder on one GPU."""

    gpu: str
    vllm: str = ""
    rows: list[Row] = Field(default_factory=list)


def models(folder: Path) -> list[tuple[Path, Served]]:
    """The folders below `folder` that have a config.json, by name.

    Raises:
        UserError: there is none, or a serve.json is not understood.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}; --matrix takes one that has a folder with a config.json for each model"
        )
    found = sorted((path.parent for path in folder.glob("*/config.json")), key=lambda path: path.name.lower())
    if not found:
        raise UserError(f"{folder} has no folder with a config.json; --matrix takes one for each model")
    return [(path, _served(path)) for path in found]


def _served(folder: Path) -> Served:
    path = folder / SERVED
    if not path.is_file():
        return Served()
    try:
        return Served.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as e:
        said = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors())
        raise UserError(f"{path}: {said} (allowed: {', '.join(Served.model_fields)})") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None


def column(
    folder: Path, flags: Sequence[str], gpu: str, flashinfer: bool, told: Callable[[str], None] = lambda words: None
) -> Column:
    """Explain each model below `folder`, one after another: half a minute each.

    told: called with the name of each model before it is explained.

    Raises:
        UserError: see `models`.
    """
    made = Column(gpu=gpu)
    for path, served in models(folder):
        name, size = served.name or path.name, served.tensor_parallel_size
        told(name)
        try:
            explained = command.ask(str(path), flags, gpu, size, flashinfer, tokens=())
        except UserError as e:
            made.rows.append(Row(model=name, tensor_parallel_size=size, problem=str(e).replace(str(path), path.name)))
            continue
        except ChildError as e:
            problem = f"it cannot be traced: {str(e).partition('; what it wrote is in')[0].rstrip(':')}"
            made.rows.append(Row(model=name, tensor_parallel_size=size, problem=problem))
            continue
        made.vllm = explained.vllm
        made.rows.append(row(name, size, explained))
    return made


def row(name: str, tensor_parallel_size: int, explained: Explanation) -> Row:
    why: Counter[str] = Counter()
    for boundary in (b for kind in explained.kinds for b in kind.boundaries if not b.fused):
        why[boundary.why] += boundary.places
    return Row(
        model=name,
        tensor_parallel_size=tensor_parallel_size,
        layers=sum(kind.layers for kind in explained.kinds),
        fused=explained.fused,
        left=explained.left,
        why=dict(why.most_common()),
        problem=explained.state,
    )


def renderables(made: Column) -> list[Any]:
    """A column as rich prints it."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("fused", justify="right", no_wrap=True)
    table.add_column("model, and why the rest is left", overflow="fold")
    for r in made.rows:
        gpus = f" on {r.tensor_parallel_size} GPUs" if r.tensor_parallel_size > 1 else ""
        text = Text(f"{r.model}{gpus}", "bold")
        below = [r.problem] if r.problem else [f"{number}: {reason}" for reason, number in r.why.items()]
        text.append("".join(f"\n{line}" for line in below), "not bold dim")
        table.add_row(summary(r), text)
    return [Text(f"{made.gpu}, vLLM {made.vllm}\n"), table]


def summary(r: Row) -> str:
    """ "24 of 32"."""
    if r.problem:
        return "–"
    return f"{r.fused} of {r.fused + r.left}" if r.fused + r.left else "no quantiser"
