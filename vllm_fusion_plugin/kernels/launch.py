# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch (PDL): a kernel is set up while the one before it still drains.

Safe at every place in a stream, because a kernel waits for its producer before its first load or store. Worth 0.25 µs a
kernel at decode sizes on an H200 (M=1, width 12288: 1.31 to 1.05 µs). Letting the next kernel start early as well
(`griddepcontrol.launch_dependents`) would look better still in a benchmark that launches one kernel over and over (1.00 µs),
but then correctness would rest on the wait in whatever kernel comes next, and those are not ours.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from .numerics import HAS_PTX, INTERPRETED

ENV = "FUSION_PLUGIN_PDL"  # set by the plugin from its setting `use_pdl`; kernels know no settings

_HAS_GDC = (
    not INTERPRETED
    and torch.version.cuda is not None
    and hasattr(tl.extra, "cuda")
    and hasattr(tl.extra.cuda, "gdc_wait")
)

if _HAS_GDC:
    from triton.language.extra.cuda import gdc_wait

    @triton.jit
    def wait_for_producer(PDL: tl.constexpr):
        if PDL:
            gdc_wait()
else:

    @triton.jit
    def wait_for_producer(PDL: tl.constexpr):
        pass


@triton.jit
def prefetch(ptr, BYTES: tl.constexpr, WARPS: tl.constexpr):
    """Ask L2 for BYTES bytes, a multiple of 16 for each of the WARPS warps, from `ptr` on, itself such a multiple.

    May come before the wait for the producer, whoever that is: nothing is read, and L2 is where later writes go too. By one
    program: hundreds that ask for the same lines at once take turns.
    """
    if HAS_PTX:
        # One address a warp, because the instruction takes only one: lanes with different ones would take turns.
        warp = tl.arange(0, 32 * WARPS) // 32
        size: tl.constexpr = BYTES // WARPS
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
            "=r,l,r",
            [ptr.to(tl.int64) + warp * size, tl.full(warp.shape, size, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@functools.cache
def _supported(index: int, switch: str) -> bool:
    return _HAS_GDC and switch != "0" and torch.cuda.get_device_capability(index)[0] >= 9


def pdl_supported(device: torch.device) -> bool:
    """Whether kernels on `device` are launched with PDL: compute capability 9.0 or later, and a Triton that can."""
    if device.type != "cuda":
        return False
    return _supported(device.index or 0, os.environ.get(ENV, "1"))


def pdl_options(device: torch.device, pdl: bool | None) -> dict[str, bool]:
    """PDL for a kernel and for its launch; pdl None: where it is supported."""
    pdl = pdl_supported(device) if pdl is None else pdl
    return {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, like its next_power_of_2, is for kernels too and takes a microsecond on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is n, from 1 on, or more."""
    return 1 << (n - 1).bit_length()


class GroupTile(NamedTuple):
    """What a program has of rows of groups."""

    rows: int
    groups: int
    num_warps: int
    rows_first: bool = False  # neighbouring programs have neighbouring rows, not columns
    scales_from_all: bool = True  # see quant.store_scales

    def fitting(self, rows: int, groups: int) -> GroupTile:
        """For `rows` rows: more of them instead of groups that a row of `groups` has not."""
        fitting = min(self.groups, next_power_of_2(groups))
        tile_rows = self.rows * self.groups // fitting
        along_rows = self.rows_first or cdiv(rows, tile_rows) > MAX_GRID_1
        return GroupTile(tile_rows, fitting, self.num_warps, along_rows, self.scales_from_all)


# Axis 0 of a grid alone may be longer.
MAX_GRID_1 = 65535


def tile_grid(row_tiles: int, column_tiles: int, rows_first: bool) -> tuple[tuple[int, int], bool]:
    """The grid, and whether its axis 0 goes along rows: as asked for, or because it has to."""
    rows_first = rows_first or row_tiles > MAX_GRID_1
    return ((row_tiles, column_tiles) if rows_first else (column_tiles, row_tiles)), rows_first


def rows_with_padding(scales: torch.Tensor, rows: int) -> int:
    """Rows of the scales [rows, groups] in memory: TMA-aligned scales have longer columns than there are rows."""
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


# ---- what is launched ------------------------------------------------------------------------------------------------
#
# Triton compiles a kernel anew for each set of compile-time arguments (compile_keys.py), half a second that no request may
# wait for. So what a launch takes from the number of rows comes from a table of few tiles, and which of these there are can
# be asked without a GPU: launched on "meta" tensors, which have no data, kernels do not run but are written down.

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
    """Run `kernel` on `device`; on "meta", only write it down."""
    if device.type != "meta":
        with on_device(device):
            kernel[grid](*args, **kwargs)
    elif _plan is not None:
        _plan.launches.append((kernel, args, kwargs))
