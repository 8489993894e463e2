# SPDX-License-Identifier: Apache-2.0
"""The command: asks, with a progress bar on standard error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .. import child, vllm_flags
from .explanation import Explanation, explain
from .traced import Request, Traced


def ask(
    model: str, flags: Sequence[str], gpu: str, tensor_parallel_size: int, flashinfer: bool, tokens: Sequence[int]
) -> Explanation:
    """model: a folder with a config.json, or an id in Hugging Face's cache. flags: as for `vllm serve`.

    Raises:
        child.UserError: naming what a user can set right.
        child.ChildError: the trace failed otherwise.
    """
    named, _ = vllm_flags.split_model(flags)
    if named:
        raise child.UserError(f"the model is {model}, and the flags name another: {named}")
    folder = vllm_flags.model_folder(model)
    _check(folder / "config.json")
    request = Request(
        model=str(folder),
        flags=list(flags),
        gpu=gpu,
        tensor_parallel_size=tensor_parallel_size,
        flashinfer=flashinfer,
    )
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)

        def show(told: tuple[float, str]) -> None:
            bar.update(task, completed=told[0], description=told[1])

        traced = Traced(**child.ask("vllm_fusion_plugin.explain.trace", request.model_dump(), show))
    return explain(traced, Path(model).name if Path(model).is_dir() else model, gpu, tensor_parallel_size, tokens)


def _check(config: Path) -> None:
    """What vLLM does not say clearly of a config.json."""
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise child.UserError(f"{config} cannot be read: {e}") from None
    if not isinstance(read, dict) or not read.get("architectures"):
        raise child.UserError(f"{config} has no key architectures, by which vLLM chooses what to build")
