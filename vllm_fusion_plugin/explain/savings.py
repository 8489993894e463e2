# SPDX-License-Identifier: Apache-2.0
"""What a fusion saves, against the op and the quantiser by themselves: the tensor between the two, and a launch.

Estimates: bytes are counted, time is bytes at the GPU's bandwidth by its data sheet, and a launch is what the smallest
kernels take.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic import BaseModel

from ..rank_report import Found
from ..report import DUAL, LONE

LAUNCH_US = 1.0
"""What the smallest launches of this package take in a replayed CUDA graph on an H200: docs/results.md, 1 token of 512."""

BANDWIDTH = {"h100": 3.35e12, "h200": 4.8e12, "b200": 8.0e12, "mi300x": 5.3e12, "mi355x": 8.0e12}
"""Bytes a second, by NVIDIA's and AMD's data sheets."""

_NATIVE = re.compile(r"\+(?:group\d+|token|static)\[native\b")


class PerToken(BaseModel):
    """Of one place, in one forward pass."""

    bytes: int = 0
    """That are neither written nor read, for each token."""
    launches: int = 0


class Saving(BaseModel):
    """Of a forward pass of the model, on one GPU."""

    tokens: int
    bytes: int
    launches: int
    us: float


def of(found: Found, itemsize: int) -> PerToken:
    """itemsize: bytes of a number of the model's dtype."""
    if not found.by_a_pass or found.pass_name == LONE:
        return PerToken()
    if found.pass_name == DUAL:  # its quantiser is that of the first norm, which is found by itself
        return PerToken(launches=1)
    if fused_by_inductor(found):
        return PerToken()
    # Where something else reads the rows, they stay.
    passes = 1 if {"norm", "act"} & set(found.pattern.split("+")[2:]) else 2
    return PerToken(bytes=passes * found.width * itemsize, launches=1)


def fused_by_inductor(found: Found) -> bool:
    """Whether Inductor would make one kernel of the two as well."""
    return _NATIVE.search(found.pattern) is not None


def total(places: Iterable[tuple[int, PerToken]], tokens: int, gpu: str) -> Saving:
    """places: how many there are of each. gpu: a key of BANDWIDTH."""
    each = list(places)
    saved = tokens * sum(number * saving.bytes for number, saving in each)
    launches = sum(number * saving.launches for number, saving in each)
    us = saved / BANDWIDTH[gpu] * 1e6 + launches * LAUNCH_US
    return Saving(tokens=tokens, bytes=saved, launches=launches, us=round(us, 1))
