# SPDX-License-Identifier: Apache-2.0
"""Kernels are compiled and launched for every number of tokens before vLLM serves.

Triton compiles a kernel when it is first launched with something new, half a second in the middle of a request. What is new
about a number of tokens is the tile that it chooses; everything else is the call's own. vLLM runs every graph that it has
compiled at least once before it serves, which tells the calls (ops/calls.py); here each is repeated with zeros, at the
smallest number of tokens that chooses each of its tiles.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import compat, seams
from .ops import calls, registry
from .report import RECORDER, rank_line

logger = logging.getLogger("vllm.fusion_plugin")

META = torch.device("meta")


class WarmUp(NamedTuple):
    """What a warm-up did."""

    calls: int
    launches: int
    seconds: float
    failed: tuple[str, ...] = ()
    """Op and error of each call that could not be repeated."""

    def __str__(self) -> str:
        done = f"{self.launches} launches of {self.calls} calls of fused ops, {self.seconds:.1f} s"
        return f"{done}; failed: {'; '.join(self.failed)}" if self.failed else done


_most_tokens = 1
_first: list[Callable[[], None]] = []


def first(do: Callable[[], None]) -> None:
    """Have `do` called before kernels are warmed up: it may call ops, which then are. May be called again with the same."""
    if do not in _first:
        _first.append(do)


def install(config: Any) -> None:
    """Have the kernels warmed up before this process serves with `config`, a VllmConfig. Never raises; to be called for each
    engine, before its worker runs the model."""
    global _most_tokens
    try:
        _most_tokens = max(_most_tokens, compat.most_tokens(config))  # a second engine may have fewer
        reason = seams.hook_warm_up(before_serving)
    except Exception as e:  # must never stop vLLM
        reason = f"{type(e).__name__}: {e}"
    if reason:
        logger.warning("vllm-fusion-plugin: kernels are compiled when they are first needed: %s", reason)
        RECORDER.note(f"kernels are compiled when they are first needed: {reason}")
    calls.record(not reason)


def before_serving() -> None:
    """What vLLM's worker calls when it has warmed up everything else. Never raises."""
    try:
        for do in _first:
            do()
        done = warm_up(_most_tokens)
        if done.calls:
            logger.log(logging.WARNING if done.failed else logging.INFO, "vllm-fusion-plugin: warm-up: %s", done)
            RECORDER.note(f"warm-up: {done}")
    except Exception as e:
        logger.warning("vllm-fusion-plugin: kernels are not all warmed up: %s: %s", type(e).__name__, e)
        RECORDER.note(f"warm-up failed: {type(e).__name__}: {e}")
    finally:
        calls.record(False)
    with contextlib.suppress(Exception):  # a report must never stop vLLM
        logger.info("vllm-fusion-plugin: %s", rank_line(RECORDER.report))


def unless_done() -> None:
    """What is called when a worker has warmed up: for engines in which vLLM watches for no compilation, and so has not
    called `before_serving` (enforce_eager, since 0.32)."""
    if calls.recording():
        before_serving()


def warm_up(most: int) -> WarmUp:
    """Repeat every call that was remembered, for up to `most` tokens or as many as it was made with, on its device."""
    start = time.perf_counter()
    launches, failed = 0, []
    remembered = dict(calls.CALLS)
    with torch.inference_mode():
        for call, made_with in remembered.items():
            try:
                for tokens in token_counts(call, max(most, made_with)):
                    registry.CUDA_IMPLEMENTATIONS[call.op](*call.at(tokens))
                    launches += 1
            except Exception as e:  # out of memory, for example: the other calls still can
                failed.append(f"{call.op}: {type(e).__name__}: {e}")
        if launches and torch.cuda.is_available():
            torch.cuda.synchronize()
    return WarmUp(len(remembered), launches, time.perf_counter() - start, tuple(failed))


def token_counts(call: calls.Call, most: int) -> list[int]:
    """Numbers of tokens from 1 to `most` that need each compilation that `call` can need with as many: the smallest for each
    tile, and 1 and 2, because the stride of one row is none.
    """
    from .kernels.launch import planning

    with planning() as plan:
        registry.CUDA_IMPLEMENTATIONS[call.op](*call.at(1, META))
    first: dict[Any, int] = {}
    for tokens in range(1, most + 1):
        first.setdefault(tuple(choice(tokens) for choice in plan.choices), tokens)
    return sorted({1, min(2, most), *first.values()})
