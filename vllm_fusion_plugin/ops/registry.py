# SPDX-License-Identifier: Apache-2.0
"""How an op is registered: one line an op instead of torch.library.custom_op.

`custom_op` wraps every call in autograd and version-counter bookkeeping, tens of µs that eager prefill pays on the CPU;
inference needs none of it. What remains is what the compiler needs: a schema, a fake and one kernel a backend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "vllm_fusion_plugin"

CPU_IMPLEMENTATIONS: dict[str, Callable[..., object]] = {}
"""Of each op by its name."""

# Held for the life of the process: the registrations go away with the object.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    schema: str, *, fake: Callable[..., object], cuda: Callable[..., object], cpu: Callable[..., object]
) -> torch._ops.OpOverload:
    """Define the op of `schema` ("name(Tensor x, ...) -> ...") once a process and return its overload.

    Ops that patterns put into a graph are functional (nothing is mutated), so the compiler may reorder, share and drop them,
    and a pattern's replacement is one node with no buffers to hand around. An op that runs inside one of vLLM's opaque ops
    gets its buffers from there: its schema marks what it writes ("Tensor(a!) codes"), and it returns nothing.
    """
    name = schema.partition("(")[0]
    CPU_IMPLEMENTATIONS[name] = cpu
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        _LIBRARY.impl(name, cuda, "CUDA")
        _LIBRARY.impl(name, cpu, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
