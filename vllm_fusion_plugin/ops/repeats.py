# SPDX-License-Identifier: Apache-2.0
"""A call like an earlier one launches its kernels at once.

A model calls an op once a layer, with tensors that differ in their addresses alone. What leads to a launch (checks, tiles,
constants, Triton's search for the compiled kernel) is the same in each, and takes several times as long as the launch: time
that prefills too long for a CUDA graph wait for. So the first call of a shape is watched: which compiled kernels it
launches, and where each pointer comes from. Later ones allocate their outputs and launch these.

Only for ops that do nothing else but allocate and launch (tests/ops/test_repeats.py).
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..kernels import watch

logger = logging.getLogger("vllm.fusion_plugin")

MOST = 4096
"""Calls that are kept of an op. A server's prefills have another number of rows each time, and need no earlier one's."""

PLAIN = (int, float, str, tuple, types.NoneType)
"""What is the same in every call of a kernel; anything else might hold an address."""

broken = ""
"""Why no call is repeated in this process any more; "" while they are."""


Allocate = Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor]


@functools.cache
def allocating(device_type: str) -> Allocate:
    """`torch.empty_strided` on the current device of a type; if it can be, as Inductor's code calls it, in half the time."""

    def empty_strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device_type)

    return getattr(torch._C._dynamo.guards, f"_empty_strided_{device_type}", empty_strided)


class Output(NamedTuple):
    """A tensor that a call allocates."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    elements: int
    """Of its storage, if that goes on after its last element; else 0."""

    def empty(self, allocate: Allocate) -> torch.Tensor:
        if self.elements:
            return allocate((self.elements,), (1,), self.dtype).as_strided(self.shape, self.strides)
        return allocate(self.shape, self.strides, self.dtype)


class Pointer(NamedTuple):
    """Where an argument of a kernel points."""

    argument: int
    tensor: int
    """A position in the call's arguments, followed by its outputs."""
    offset: int
    """Bytes from that tensor's first element."""


class Launch(NamedTuple):
    """A compiled kernel and what it is called with, all but addresses."""

    run: Callable[..., None]
    arguments: tuple[Any, ...]
    pointers: tuple[Pointer, ...]


class Repeat(NamedTuple):
    """What a call does, addresses aside."""

    device: int
    allocate: Allocate
    inputs: tuple[int, ...]
    """Positions of tensors in the arguments."""
    outputs: tuple[Output, ...]
    launches: tuple[Launch, ...]
    result: Callable[[list[torch.Tensor]], Any]

    def __call__(self, arguments: Sequence[Any]) -> Any:
        outputs = [output.empty(self.allocate) for output in self.outputs]
        addresses = {position: arguments[position].data_ptr() for position in self.inputs}
        for position, output in enumerate(outputs, len(arguments)):
            addresses[position] = output.data_ptr()
        for launch in self.launches:
            values = list(launch.arguments)
            for argument, tensor, offset in launch.pointers:
                values[argument] = addresses[tensor] + offset
            launch.run(*values)
        return self.result(outputs)


def key_of(arguments: Sequence[Any], tensors: Sequence[int]) -> tuple[Any, ...]:
    """Equal for calls that differ in addresses alone; Triton compiles for addresses that are multiples of 16.

    tensors: positions of arguments that are tensors or None."""
    values = list(arguments)
    for position in tensors:
        t = values[position]
        if t is not None:
            values[position] = (t.shape, t.stride(), t.dtype, t.data_ptr() % 16, t.get_device())
    return tuple(values)


def repeating(implementation: Callable[..., Any], tensors: Sequence[int]) -> Callable[..., Any]:
    """`implementation` of an op for CUDA, whose calls are repeated. tensors: as of `key_of`."""
    known: dict[tuple[Any, ...], Repeat | None] = {}

    def run(*arguments: Any) -> Any:
        if broken:
            return implementation(*arguments)
        key = key_of(arguments, tensors)
        repeat = known.get(key, ...)
        if repeat is ...:
            if len(known) >= MOST:
                known.clear()
            result, known[key] = watched(implementation, arguments)
            return result
        if repeat is None or torch.cuda.current_device() != repeat.device:
            return implementation(*arguments)
        try:
            return repeat(arguments)
        except Exception as e:
            give_up(e)
            return implementation(*arguments)

    return run


def give_up(reason: Exception) -> None:
    """Repeat nothing in this process any more. What was launched has written to buffers of its own, if to any."""
    global broken
    broken = f"{type(reason).__name__}: {reason}"
    logger.warning("vllm-fusion-plugin: launches are prepared anew at every call, which takes longer: %s", broken)


def watched(implementation: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, Repeat | None]:
    """The result of a call, and how to repeat it; None if that cannot be told."""
    with watch.watching() as seen:
        result = implementation(*arguments)
    try:
        return result, _repeat(arguments, result, seen.launches) if seen.all else None
    except Exception as e:  # the call itself has gone well
        give_up(e)
        return result, None


def _repeat(arguments: Sequence[Any], result: Any, launches: Sequence[watch.Launched]) -> Repeat | None:
    from ..kernels.launch import Constants  # needs Triton

    inputs = {i: a for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)}
    written = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    outputs = dict(enumerate(written, len(arguments)))
    storages = [t.untyped_storage().data_ptr() for t in written]
    of_inputs = {t.untyped_storage().data_ptr() for t in inputs.values()}
    if len(set(storages)) < len(storages) or of_inputs.intersection(storages):
        return None  # an output that is not a tensor of its own
    if any(t.storage_offset() for t in written):
        return None
    made = []
    for compiled, grid, values in launches:
        if not hasattr(compiled, "__getitem__"):
            return None
        pointers = _pointers(values, inputs | outputs)
        if pointers is None or not all(isinstance(value, (torch.Tensor, Constants, *PLAIN)) for value in values):
            return None
        fixed = tuple(None if isinstance(value, torch.Tensor) else value for value in values)
        made.append(Launch(compiled[(*grid, 1, 1)[:3]], fixed, tuple(pointers)))
    device = next(iter(inputs.values())).device
    outputs_of = tuple(map(_output, written))
    return Repeat(device.index, allocating(device.type), tuple(inputs), outputs_of, tuple(made), _result(result))


def _output(t: torch.Tensor) -> Output:
    elements = t.untyped_storage().nbytes() // t.dtype.itemsize
    end = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return Output(tuple(t.shape), t.stride(), t.dtype, elements if elements != end else 0)


def _pointers(values: Sequence[Any], tensors: dict[int, torch.Tensor]) -> list[Pointer] | None:
    """Where each tensor in `values` lies in one of `tensors`; None if that is not clear."""
    found = []
    for argument, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            continue
        sources = [i for i, t in tensors.items() if t is value]
        if not sources:
            storage = value.untyped_storage().data_ptr()
            sources = [i for i, t in tensors.items() if t.untyped_storage().data_ptr() == storage]
        if len(sources) != 1:
            return None  # memory of its own; or one tensor for two arguments, which are two in another call
        found.append(Pointer(argument, sources[0], value.data_ptr() - tensors[sources[0]].data_ptr()))
    return found


def _result(result: Any) -> Callable[[list[torch.Tensor]], Any]:
    """How outputs are returned: as `result` was."""
    if result is None:
        return lambda outputs: None
    if isinstance(result, torch.Tensor):
        return lambda outputs: outputs[0]
    return tuple if isinstance(result, tuple) else lambda outputs: outputs
