# SPDX-License-Identifier: Apache-2.0
"""How an op is registered: one line an op instead of torch.library.custom_op.

`custom_op` wraps every call in autograd and version-counter bookkeeping, tens of µs that eager prefill pays on the CPU;
inference needs none of it. What remains is what the compiler needs: a schema, a fake and one kernel a backend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import calls, repeats

NAMESPACE = "vllm_fusion_plugin"

CPU_IMPLEMENTATIONS: dict[str, Callable[..., object]] = {}
"""Of each op by its name."""

CUDA_IMPLEMENTATIONS: dict[str, Callable[..., object]] = {}
"""Likewise. They take meta tensors, too, and launch nothing then (kernels/launch.py)."""

REFERENCES: dict[str, Callable[..., object]] = {}
"""Likewise: in plain torch, on any device."""

OF_OTHERS: set[str] = set()
"""Those whose kernels are others', and add up in another order than the reference."""

SIGNATURES: dict[str, calls.Signature] = {}
"""Likewise."""

# Held for the life of the process: the registrations go away with the object.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


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
        launched = cuda if kernels_of_others else repeats.repeating(cuda, _tensors(name))
        LIBRARY.impl(name, calls.remembering(SIGNATURES[name], launched), "CUDA")
        LIBRARY.impl(name, cpu, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _tensors(name: str) -> tuple[int, ...]:
    """Positions of the arguments that are tensors or None."""
    arguments = getattr(getattr(torch.ops, NAMESPACE), name).default._schema.arguments
    return tuple(i for i, argument in enumerate(arguments) if str(argument.type) in ("Tensor", "Optional[Tensor]"))


def _signature(name: str, per_row: tuple[str, ...], rows_by: str | None) -> calls.Signature:
    arguments = getattr(getattr(torch.ops, NAMESPACE), name).default._schema.arguments
    at = {argument.name: position for position, argument in enumerate(arguments)}
    written = frozenset(at[a.name] for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return calls.Signature(name, frozenset(at[n] for n in per_row), written, at[rows_by] if rows_by else None)
