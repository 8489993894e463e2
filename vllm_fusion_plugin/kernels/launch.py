# SPDX-License-Identifier: Apache-2.0
"""How kernels are launched, and how it can be asked which launches there will be.

Triton compiles a kernel anew for each set of compile-time arguments (compile_keys.py), half a second that no request may
wait for. So what a launch takes from the number of rows comes from a table of few tiles, and which of these there are can
be asked without a GPU: launched on "meta" tensors, which have no data, kernels do not run but are written down.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl

from . import watch
from .backend import INTERPRETED, warp_size


def rows_with_padding(scales: torch.Tensor, rows: int) -> int:
    """Rows of scales in memory: TMA-aligned ones, packed or not, have longer columns than there are rows."""
    return scales.stride(1) if scales.stride(0) == 1 else rows


def row_stride(x: torch.Tensor | None) -> int:
    """x's stride from row to row, for a kernel. Of one row it means nothing and may be anything, which Triton would compile
    for: then, and without x, it is 0."""
    return x.stride(0) if x is not None and x.shape[0] > 1 else 0


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever device its arguments are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


# ---- compile-time constants ------------------------------------------------------------------------------------------


class Constants:
    """A named tuple as a compile-time constant whose fields are constexprs. Inside of a kernel, Triton up to 3.7 takes the
    fields of a named tuple itself for plain numbers, which tensors cannot be multiplied by."""

    def __init__(self, values: Any) -> None:
        for name, value in zip(values._fields, values, strict=True):
            setattr(self, name, tl.constexpr(value))
        self._values, self._hash, self._repr = values, hash(values), repr(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self._values == other._values

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:  # a part of Triton's cache keys
        return self._repr


_constants = functools.cache(Constants)


# ---- what is launched ------------------------------------------------------------------------------------------------

Choice = TypeVar("Choice")


class Plan(NamedTuple):
    """What launches on meta tensors would have been."""

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]
    """Kernel, arguments by position and by name."""
    choices: list[Callable[[int], Any]]
    """For each launch that takes something from the number of rows: what, of any number of rows."""


_plan: Plan | None = None


@contextlib.contextmanager
def planning() -> Iterator[Plan]:
    """Write down what launches on meta tensors are, meanwhile."""
    global _plan
    before, _plan = _plan, Plan([], [])
    try:
        yield _plan
    finally:
        _plan = before


def choose(table: Callable[..., Choice], rows: int, *shape: Any) -> Choice:
    """table(rows, *shape): everything that a launch takes from the number of its rows, at compile time."""
    if _plan is not None:
        _plan.choices.append(lambda rows: table(rows, *shape))
    return table(rows, *shape)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, /, *args: Any, **kwargs: Any) -> None:
    """Run `kernel` on `device`; on "meta", only write it down. num_warps: of 32 threads each."""
    if "num_warps" in kwargs:
        kwargs["num_warps"] = max(1, kwargs["num_warps"] * 32 // warp_size())
    if device.type != "meta":
        if not INTERPRETED:
            kwargs = {name: _constants(v) if isinstance(v, tuple) else v for name, v in kwargs.items()}
        with on_device(device):
            compiled = kernel[grid](*args, **kwargs)
        watch.note(kernel, compiled, grid, args, kwargs)
    elif _plan is not None:
        _plan.launches.append((kernel, args, kwargs))
