# SPDX-License-Identifier: Apache-2.0
"""What test_cuda_library.py asks of a process that has the library of CUDA kernels; one line of JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from vllm_fusion_plugin.kernels import cuda_library
from vllm_fusion_plugin.ops import group_quant, registry, silu_mul_quant

SILU_MUL, GROUP = "silu_mul_group_fp8_quant", "group_fp8_quant"


def runs_in_python() -> bool:
    """Whether what torch's dispatcher has for CUDA tensors was registered in Python."""
    table = torch._C._dispatch_dump(f"{registry.NAMESPACE}::{SILU_MUL}")
    [line] = [line for line in table.splitlines() if line.startswith("CUDA: ")]
    return ".py:" in line


def same(outputs: Any, expected: Any) -> list[bool]:
    return [
        torch.equal(a.float(), b.float()) and a.stride() == b.stride() for a, b in zip(outputs, expected, strict=True)
    ]


def error_of(call: Any) -> list[str]:
    try:
        call()
    except Exception as e:
        return [type(e).__name__, str(e)]
    raise AssertionError("no error")


def main() -> dict[str, Any]:
    if sys.argv[1:] == ["without"]:
        bound = sorted(registry.bind_all())
        return {"bound": bound, "in_python": runs_in_python(), "why_not": cuda_library.why_not()}
    library = cuda_library.load()
    assert library is not None, cuda_library.why_not()
    bound, in_python = {}, {}
    for choice in ("auto", "triton", "cuda"):
        os.environ[cuda_library.ENV] = choice
        bound[choice], in_python[choice] = sorted(registry.bind_all()), runs_in_python()
    ops = {name: getattr(getattr(torch.ops, cuda_library.NAMESPACE), name).default for name in library.ops}

    # CPU tensors stand in for CUDA's, as what the library leaves to Python.
    fallbacks = torch.library.Library(cuda_library.FALLBACK, "IMPL")
    for name in ops:
        run = registry.CPU_IMPLEMENTATIONS[name]
        fallbacks.impl(name, registry._telling(lambda *a, run=run: raising(*a) or run(*a), library), "CPU")
        library.bind(cuda_library.NAMESPACE, name, "CPU")
    x = torch.randn(5, 1024, dtype=torch.bfloat16)
    arguments = (128, "tma", True, "eager", "custom_op")
    in_groups = (64, "row", False, "custom_op")
    silu_mul, group = registry.REFERENCES[SILU_MUL], registry.REFERENCES[GROUP]
    return {
        "schemas": {name: str(op._schema).partition("::")[2] for name, op in ops.items()},
        "bound": bound,
        "in_python": in_python,
        "silu_mul": same(ops[SILU_MUL](x, *arguments, keep_act=True), silu_mul(x, *arguments, True)),
        "group": same(ops[GROUP](x, *in_groups), group(x, *in_groups)),
        "errors": [
            error_of(lambda: ops[GROUP](x, 7, "row", False, "custom_op")),
            error_of(lambda: ops[GROUP](x, 7, "something else", False, "custom_op")),
        ],
    }


def raising(*arguments: Any) -> None:
    if "something else" in arguments:
        raise KeyError("something else")


if __name__ == "__main__":
    assert group_quant and silu_mul_quant  # registered
    print(json.dumps(main()))
