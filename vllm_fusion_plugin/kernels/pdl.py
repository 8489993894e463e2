# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch (PDL): a kernel is set up while the one before it still drains.

Safe at every place in a stream, because a kernel waits for its producer before its first load or store. Worth 0.25 µs a
kernel at decode sizes on an H200 (M=1, width 12288: 1.31 to 1.05 µs). Letting the next kernel start early as well
(`griddepcontrol.launch_dependents`) would look better still in a benchmark that launches one kernel over and over (1.00 µs),
but then correctness would rest on the wait in whatever kernel comes next, and those are not ours.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

from .backend import BACKEND
from .numerics import HAS_PTX

ENV = "FUSION_PLUGIN_PDL"  # set by the plugin from its setting `use_pdl`; kernels know no settings

_HAS_GDC = BACKEND == "cuda" and hasattr(tl.extra, "cuda") and hasattr(tl.extra.cuda, "gdc_wait")

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
    """Whether kernels on `device` are launched with PDL: NVIDIA's, compute capability 9.0 or later, a Triton that can."""
    if device.type != "cuda":
        return False
    return _supported(device.index or 0, os.environ.get(ENV, "1"))


def pdl_options(device: torch.device, pdl: bool | None) -> dict[str, bool]:
    """PDL for a kernel and for its launch; pdl None: where it is supported."""
    pdl = pdl_supported(device) if pdl is None else pdl
    return {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
