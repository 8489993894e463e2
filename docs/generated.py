# SPDX-License-Identifier: Apache-2.0
"""The command line of the scripts beside this file, each of which makes a page from JSON files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def run(page: Path, text: Callable[[], str], script: str) -> None:
    """Write `text()` to `page`, or with `--check` exit with status 1 if the page is another. script: the file that runs."""

    def main(
        check: Annotated[
            bool, typer.Option("--check", help="Write nothing; fail if the page is not up to date.")
        ] = False,
    ) -> None:
        made = text()
        if not check:
            page.write_text(made)
        elif not page.exists() or page.read_text() != made:
            typer.echo(f"{page} is not what its JSON files give: run python {Path(script).name}", err=True)
            raise typer.Exit(1)

    typer.run(main)
