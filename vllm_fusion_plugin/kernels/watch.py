# SPDX-License-Identifier: Apache-2.0
"""What a thread launches while it is watched: what ops/repeats.py repeats."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple


class Launched(NamedTuple):
    compiled: Any
    """Triton's compiled kernel."""
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    """All of the kernel's, in its order."""


class Watch:
    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.all = True
        """Whether the launches are all that was done, but for allocating."""


class _Now(threading.local):
    watch: Watch | None = None


_now = _Now()


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Watch this thread meanwhile."""
    before, _now.watch = _now.watch, Watch()
    try:
        yield _now.watch
    finally:
        _now.watch = before


def note(kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A launch of `kernel`, Triton's function; does nothing unless this thread is watched."""
    if _now.watch is not None:
        by_name = (kwargs[name] for name in kernel.arg_names[len(args) :])
        _now.watch.launches.append(Launched(compiled, grid, (*args, *by_name)))


def note_other_work() -> None:
    """Something on the GPU that is no launch of ours, such as zeroing; does nothing unless this thread is watched."""
    if _now.watch is not None:
        _now.watch.all = False
