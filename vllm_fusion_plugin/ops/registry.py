# SPDX-License-Identifier: Apache-2.0
"""How an op is registered: one line an op instead of torch.library.custom_op.

`custom_op` wraps every call in autograd and version-counter bookkeeping, tens of µs that eager prefill pays on the CPU;
inference needs none of it. What remains is what the compiler needs: a schema, a fake and one kernel a backend.

For CUDA tensors that is the implementation in Python, which launches Triton's kernels, or the op of the same name in the
library of CUDA kernels, where there is one. The library's is called by torch's dispatcher without Python, and goes on to the
one in Python for what it does not do itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..kernels import cuda_library
from . import calls, repeats

NAMESPACE = "vllm_fusion_plugin"

CPU_IMPLEMENTATIONS: dict[str, Callable[..., object]] = {}
"""Of each op by its name."""

CUDA_IMPLEMENTATIONS: dict[str, Callable[..., object]] = {}
"""Likewise: of those that launch Triton's kernels. They take meta tensors, too, and launch nothing then
(kernels/launch.py)."""

REFERENCES: dict[str, Callable[..., object]] = {}
"""Likewise: in plain torch, on any device."""

OF_OTHERS: set[str] = set()
"""Those whose kernels are others', and add up in another order than the reference."""

SIGNATURES: dict[str, calls.Signature] = {}
"""Likewise."""

# Held for the life of the process: the registrations go away with the object.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

# Of each op what runs it for CUDA tensors: the library of CUDA kernels and its binding, or None and torch's registration of
# the implementation in Python.
_bindings: dict[str, tuple[cuda_library.Library | None, Any]] = {}
_fallbacks = torch.library.Library(cuda_library.FALLBACK, "FRAGMENT")


def register(
    schema: str,
    *,
    fake: Callable[..., object],
    cuda: Callable[..., object],
    cpu: Callable[..., object],
    per_row: tuple[str, ...] = ("x",),
    rows_by: str | None = None,
    kernels_of_others: bool = False,
) -> torch._ops.OpOverload:
    """Define the op of `schema` ("name(Tensor x, ...) -> ...") once a process and return its overload.

    Ops that patterns put into a graph are functional (nothing is mutated), so the compiler may reorder, share and drop them,
    and a pattern's replacement is one node with no buffers to hand around. An op that runs inside one of vLLM's opaque ops
    gets its buffers from there: its schema marks what it writes ("Tensor(a!) codes"), and it returns nothing.

    per_row: arguments whose first dimension goes along tokens; rows_by: the argument that says how many rows a token has
    in those of two dimensions. kernels_of_others: whether its bytes are those of another library's kernels, instead of the
    reference's.
    """
    name = schema.partition("(")[0]
    CPU_IMPLEMENTATIONS[name] = REFERENCES[name] = cpu
    if kernels_of_others:
        OF_OTHERS.add(name)
    CUDA_IMPLEMENTATIONS[name] = cuda
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        SIGNATURES[name] = _signature(name, per_row, rows_by)
        _bind(name, cuda_library.chosen())
        LIBRARY.impl(name, cpu, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return _overload(name)


def _overload(name: str, namespace: str = NAMESPACE) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, namespace), name).default


def _tensors(name: str) -> tuple[int, ...]:
    """Positions of the arguments that are tensors or None."""
    arguments = _overload(name)._schema.arguments
    return tuple(i for i, argument in enumerate(arguments) if str(argument.type) in ("Tensor", "Optional[Tensor]"))


def is_repeated(name: str) -> bool:
    """Whether a call like an earlier one launches its kernels at once (repeats.py). Not of ops that other packages have
    registered: nothing tells whether these do more than allocate and launch."""
    own = CUDA_IMPLEMENTATIONS[name].__module__.partition(".")[0] == __name__.partition(".")[0]
    return own and name not in OF_OTHERS


def bind_all() -> frozenset[str]:
    """Let the kernels that are chosen now (cuda_library.py) run all ops; those that have one in CUDA, and it runs them."""
    for name in list(_bindings):
        _bind(name, cuda_library.chosen())
    return frozenset(name for name, (library, _) in _bindings.items() if library is not None)


def cuda_implementation(name: str) -> Callable[..., Any]:
    """What runs an op for CUDA tensors, by other ways than its name."""
    if _bindings[name][0] is not None:
        return _overload(name, cuda_library.NAMESPACE)
    return CUDA_IMPLEMENTATIONS[name]


def _bind(name: str, library: cuda_library.Library | None) -> None:
    library = library if library is not None and name in library.ops else None
    before, binding = _bindings.get(name, (None, None))
    if binding is not None and before is library:
        return
    # First away with the one before: torch warns of every registration that overrides another.
    if before is not None:
        before.unbind(binding)
    elif binding is not None:
        binding._destroy()
    launching = CUDA_IMPLEMENTATIONS[name]
    if is_repeated(name):
        launching = repeats.repeating(launching, _tensors(name))
    run = calls.remembering(SIGNATURES[name], launching)
    if library is None:
        registration = torch.library.Library(NAMESPACE, "IMPL")
        registration.impl(name, run, "CUDA")
        _bindings[name] = (None, registration)
        return
    if not hasattr(getattr(torch.ops, cuda_library.FALLBACK), name):
        schema = str(_overload(name)._schema).partition("::")[2]
        _fallbacks.define(schema)
        _fallbacks.impl(name, _telling(run, library), "CUDA")
    _bindings[name] = (library, library.bind(NAMESPACE, name))


def _telling(run: Callable[..., Any], library: cuda_library.Library) -> Callable[..., Any]:
    """`run`, whose errors become those of the library's op, and which warns where the library has no code."""

    def fall_back(*arguments: Any) -> Any:
        try:
            if arguments[0].is_cuda:
                cuda_library.tell_of_missing_code(library, arguments[0].device.index)
            return run(*arguments)
        except Exception as e:
            library.set_error(e)
            raise

    return fall_back


def _signature(name: str, per_row: tuple[str, ...], rows_by: str | None) -> calls.Signature:
    arguments = _overload(name)._schema.arguments
    at = {argument.name: position for position, argument in enumerate(arguments)}
    written = frozenset(at[a.name] for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return calls.Signature(name, frozenset(at[n] for n in per_row), written, at[rows_by] if rows_by else None)
