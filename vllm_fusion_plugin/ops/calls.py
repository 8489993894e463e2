# SPDX-License-Identifier: Apache-2.0
"""Which calls of our ops a process makes, number of rows aside: what warmup.py repeats for every number there can be.

A call is remembered when it is made, with the strides and alignments that its tensors have then, which no graph tells as
surely. vLLM runs every graph at least once before it serves. Nothing is remembered after the warm-up: it costs 5 µs a call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("vllm.fusion_plugin")


class Signature(NamedTuple):
    """Which of an op's arguments have a row for each token."""

    name: str
    per_row: frozenset[int]
    written: frozenset[int]
    """Of these the ones that the op writes to."""
    rows_by: int | None
    """The argument that says how many rows of a tensor of two dimensions are one token's, if there is one."""


class Tensor(NamedTuple):
    """A tensor argument without its data."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    past: int
    """Bytes from the last multiple of 16 to its first element."""
    rows: int = 0
    """Its first dimension is so many times the number of tokens; 0: it does not depend on it."""

    def at(self, tokens: int, device: torch.device | None = None) -> torch.Tensor:
        """Such a tensor for `tokens` tokens, zeros; on "meta" without memory."""
        device = device or self.device
        shape = (tokens * self.rows, *self.shape[1:]) if self.rows else self.shape
        start = self.past // self.dtype.itemsize
        elements = start + 1 + sum((n - 1) * stride for n, stride in zip(shape, self.strides, strict=True))
        storage = torch.empty(elements, dtype=self.dtype, device=device)
        if device.type != "meta":
            storage.zero_()
        return storage.as_strided(shape, self.strides, start)


class Call(NamedTuple):
    """A call of an op, for any number of tokens."""

    op: str
    arguments: tuple[Any, ...]
    """As the op has them, tensors as `Tensor`."""

    def at(self, tokens: int, device: torch.device | None = None) -> list[Any]:
        """Its arguments for `tokens` tokens."""
        return [a.at(tokens, device) if isinstance(a, Tensor) else a for a in self.arguments]


CALLS: dict[Call, int] = {}
"""Each call that was remembered, and the most tokens that it was made with."""

_recording = False
_lock = threading.Lock()


def record(on: bool = True) -> None:
    """Remember calls from now on, or no longer."""
    global _recording
    _recording = on


def recording() -> bool:
    return _recording


def remember(signature: Signature, arguments: Sequence[Any]) -> None:
    """Remember a call that has at least one token. Never raises."""
    try:
        call, tokens = describe(signature, arguments)
        if tokens > CALLS.get(call, 0):
            with _lock:
                CALLS[call] = max(tokens, CALLS.get(call, 0))
    except Exception as e:  # the call itself has to go on
        logger.warning("vllm-fusion-plugin: %s will not be warmed up: %s: %s", signature.name, type(e).__name__, e)


def describe(signature: Signature, arguments: Sequence[Any]) -> tuple[Call, int]:
    """A call for any number of tokens, and the number that it is made with."""
    tokens, described = 0, []
    for position, value in enumerate(arguments):
        if not isinstance(value, torch.Tensor):
            described.append(tuple(value) if isinstance(value, list) else value)
            continue
        shape, strides, rows = tuple(value.shape), value.stride(), 0
        if position in signature.per_row:
            rows = arguments[signature.rows_by] if signature.rows_by is not None and len(shape) == 2 else 1
            tokens = shape[0] // rows
            if shape[0] == 1 and position not in signature.written:  # its stride from row to row means nothing
                strides = (max(n * s for n, s in zip(shape[1:], strides[1:], strict=True)), *strides[1:])
            shape = (0, *shape[1:])
        described.append(Tensor(value.dtype, value.device, shape, strides, value.data_ptr() % 16, rows))
    return Call(signature.name, tuple(described)), tokens


def remembering(signature: Signature, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """`implementation`, whose calls are remembered while that is wanted."""

    def run(*arguments: Any) -> Any:
        if _recording:
            remember(signature, arguments)
        return implementation(*arguments)

    return run
