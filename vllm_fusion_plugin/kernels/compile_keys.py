# SPDX-License-Identifier: Apache-2.0
"""What Triton compiles a kernel for: one compilation a key, and two launches with equal keys share one.

A key has the values of constexpr arguments and launch options, the types of all others, and what Triton sees in their
values: pointers and integers that are multiples of 16, and integers that are 1, unless the kernel says that it must not look
(`do_not_specialize`). Triton's own keys need a driver; tests/compile/test_compile_keys.py compares them with these.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .launch import planning


class _Parameter(NamedTuple):
    name: str
    default: Any
    constant: bool  # a constexpr
    specialised: bool
    specialised_on_alignment: bool


@functools.cache
def _parameters(kernel: Any) -> tuple[_Parameter, ...]:
    """Of a function with @triton.jit, compiled or interpreted."""
    given = getattr(kernel, "kwargs", None) or vars(kernel)
    unspecialised = given.get("do_not_specialize") or ()
    unaligned = given.get("do_not_specialize_on_alignment") or ()
    return tuple(
        _Parameter(p.name, p.default, "constexpr" in str(p.annotation), p.name not in unspecialised, p.name not in unaligned)
        for p in inspect.signature(kernel.fn).parameters.values()
    )  # fmt: skip


def _of_argument(value: Any, parameter: _Parameter) -> Any:
    if parameter.constant or value is None:
        return value
    multiple = parameter.specialised and parameter.specialised_on_alignment
    if isinstance(value, torch.Tensor):
        return value.dtype, multiple and value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "float"
    if isinstance(value, int):
        bits = "i32" if -(2**31) <= value < 2**31 else "i64"
        return bits, parameter.specialised and value == 1, multiple and value % 16 == 0
    return value.base.dtype, tuple(value.block_shape)  # a tensor descriptor


def compile_key(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The key of kernel[grid](*args, **kwargs)."""
    parameters = _parameters(kernel)
    given = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
    values = tuple(_of_argument(given.pop(p.name, p.default), p) for p in parameters)
    return (kernel.fn.__module__, kernel.fn.__name__, values, tuple(sorted(given.items())))


def keys_of(call: Callable[[], object]) -> set[tuple[Any, ...]]:
    """The keys of everything that `call` launches on meta tensors."""
    with planning() as plan:
        call()
    return {compile_key(*launch) for launch in plan.launches}
