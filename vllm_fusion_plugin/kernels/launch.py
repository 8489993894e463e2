# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch (PDL): start a kernel's prologue while the kernel before it still drains.

Safe at every place in a stream: a kernel waits for its producer before its first load or store, and one that lets its
dependants start early has itself waited first. Worth it because decode is a chain of kernels of a few µs each.
"""

from __future__ import annotations

import contextlib
import functools
import os

import torch
import triton
import triton.language as tl

from .numerics import INTERPRETED

ENV = "VLLM_FUSION_PLUGIN_PDL"  # set by the plugin from its setting `use_pdl`; kernels know no settings

_HAS_GDC = (
    not INTERPRETED
    and torch.version.cuda is not None
    and hasattr(tl.extra, "cuda")
    and hasattr(tl.extra.cuda, "gdc_wait")
)

if _HAS_GDC:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit
    def wait_for_producer(PDL: tl.constexpr):
        if PDL:
            gdc_wait()
            if PDL == 2:
                gdc_launch_dependents()
else:

    @triton.jit
    def wait_for_producer(PDL: tl.constexpr):
        pass


@functools.cache
def _supported(index: int, switch: str) -> bool:
    return _HAS_GDC and switch != "0" and torch.cuda.get_device_capability(index)[0] >= 9


def pdl_supported(device: torch.device) -> bool:
    """Whether kernels on `device` are launched with PDL: compute capability 9.0 or later, and a Triton that can."""
    if device.type != "cuda":
        return False
    return _supported(device.index or 0, os.environ.get(ENV, "1")) and int(os.environ.get(ENV, "1"))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever device its arguments are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
