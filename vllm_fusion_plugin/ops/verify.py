# SPDX-License-Identifier: Apache-2.0
"""The first calls of every op beside the ops that it replaces: how many of the numbers that they write differ.

Those are vLLM's own where it has them, and plain torch else: see replaced.py.

Compiled code calls ops by name, so what is called by that name is replaced in this process, and only where that is asked
for. A call is known by the op and by its place in the forward pass: the first, the second, ... of that op. Nothing is
verified while torch.compile traces or a CUDA graph is captured, and the replay of a captured graph calls no op.

A verified call runs these too, which takes some copies of its input in fp32, and keeps a count on the device, which
is read when it is asked for.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import registry, replaced

logger = logging.getLogger("vllm.fusion_plugin")


class Counted(NamedTuple):
    """Of one op at one place of the forward pass."""

    op: str
    place: int
    """From 0."""
    calls: int
    numbers: int
    """That these calls have written."""
    differing: int
    problem: str
    """Why a call could not be verified; "" if none."""
    vllms_ops: tuple[str, ...] = ()
    """Those of vLLM's that ran beside it; what they do not do, plain torch did."""


class _Count:
    def __init__(self, limit: int) -> None:
        self.calls, self.limit = 0, limit
        self.numbers = 0
        self.differing: torch.Tensor | int = 0
        self.problem = ""
        self.vllms_ops: set[str] = set()


class Verifier:
    """Of a process."""

    def __init__(self, calls: int, forward_pass: Callable[[], Any]) -> None:
        """calls: how many of each op at each place. forward_pass: an object that is another one in each forward pass."""
        self.calls, self.forward_pass = calls, forward_pass
        self._counts: dict[tuple[str, int], _Count] = {}
        self._pass: Any = None
        self._places: dict[str, int] = {}  # of the calls in this forward pass
        self.aside = False

    def run(self, op: str, implementation: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """What `implementation` returns for `arguments`, verified or not."""
        if self.aside or torch.compiler.is_compiling() or _is_capturing():
            return implementation(*arguments)
        count = self._count(op)
        if count.calls >= count.limit or count.problem:
            return implementation(*arguments)
        count.calls += 1
        written = registry.SIGNATURES[op].written
        kept = [a.clone() if i in written else a for i, a in enumerate(arguments)]
        result = implementation(*arguments)
        try:
            with replaced.vllms_ops() as ran:
                expected = registry.REFERENCES[op](*kept)
            count.vllms_ops |= ran
            pairs = [*zip(_tensors(result), _tensors(expected), strict=True)]
            pairs += [(arguments[i], kept[i]) for i in written]
            for actual, wanted in pairs:
                count.numbers += actual.numel()
                count.differing = count.differing + differing(actual, wanted)
        except Exception as e:  # out of memory, for example: the model has to go on
            count.problem = f"{type(e).__name__}: {e}"
            logger.warning("vllm-fusion-plugin: %s cannot be verified: %s", op, count.problem)
        return result

    def _count(self, op: str) -> _Count:
        current = self.forward_pass()
        if current is not self._pass or current is None:
            self._pass, self._places = current, {}
        place = self._places.get(op, 0)
        self._places[op] = place + 1
        return self._counts.setdefault((op, place), _Count(self.calls))

    def counted(self) -> list[Counted]:
        """What has been counted up to now. Waits for the device."""
        return [
            Counted(op, place, c.calls, c.numbers, int(c.differing), c.problem, tuple(sorted(c.vllms_ops)))
            for (op, place), c in sorted(self._counts.items())
        ]

    def begin_again(self) -> None:
        """Verify as many calls once more, and count on."""
        for count in self._counts.values():
            count.limit = count.calls + self.calls


def differing(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many numbers have other bits, as a tensor on their device; all of them if shape or dtype differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return torch.tensor(actual.numel(), device=actual.device)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.dtype.itemsize]
    return (actual.view(bits) != expected.view(bits)).sum()


def _tensors(result: Any) -> list[torch.Tensor]:
    return [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_VERIFIER: Verifier | None = None
_libraries: list[Any] = []  # a kernel goes away with its library


def start(calls: int, forward_pass: Callable[[], Any]) -> Verifier:
    """Verify the first calls of all ops that are registered in this process, from now on. Once a process."""
    global _VERIFIER
    if _VERIFIER is None:
        _VERIFIER = Verifier(calls, forward_pass)
        library = torch.library.Library(registry.NAMESPACE, "IMPL")
        for op in set(registry.REFERENCES) - registry.OF_OTHERS:
            for key, implementation in (
                ("CUDA", registry.cuda_implementation(op)),
                ("CPU", registry.CPU_IMPLEMENTATIONS[op]),
            ):
                library.impl(op, _verified(op, implementation, _VERIFIER), key, allow_override=True)
        _libraries.append(library)
    return _VERIFIER


def verifier() -> Verifier | None:
    """That of this process; None if nothing is verified."""
    return _VERIFIER


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Meanwhile, calls are none of the forward pass's, and not verified."""
    if _VERIFIER is None:
        yield
        return
    _VERIFIER.aside = True
    try:
        yield
    finally:
        _VERIFIER.aside = False


def _verified(op: str, implementation: Callable[..., Any], verifier: Verifier) -> Callable[..., Any]:
    from . import calls

    remembered = calls.remembering(registry.SIGNATURES[op], implementation)
    return lambda *arguments: verifier.run(op, remembered, arguments)
