# SPDX-License-Identifier: Apache-2.0
"""What exactness.py compares: `Producer`, the base class of which each op has one beside its benchmark; random inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import grid
import torch

Tensors = tuple[torch.Tensor, ...]
# What is quantised, and the other outputs by name.
Produced = tuple[torch.Tensor, dict[str, torch.Tensor]]


class Producer(ABC):
    """A computation that comes before a quantiser: vLLM's code for it, and our op that replaces it and the quantiser.

    A `grid.Workload` gives a kernel outputs to write to, so that nothing but the kernel is timed. A producer calls ops as a
    compiled model does, and has outputs by name.
    """

    stem: str
    kinds: tuple[str, ...] = ("group",)
    """Kinds of quantisers that our ops fuse it with."""
    forms: tuple[tuple[str, str], ...] = (
        ("native", "custom_op"),
        ("custom_op", "custom_op"),
        ("native", "native"),
        ("eager", "custom_op"),
    )
    """Its form and the quantiser's: the combinations that vLLM can run."""
    widths: tuple[int, ...] = grid.WIDTHS
    words: tuple[str, ...] = ()
    """Words of the mode that distinguish it from other producers of the same op."""

    def op(self, kind: str) -> str:
        """Name of our op that fuses it with a quantiser of that kind."""
        return f"{self.stem}_{kind}_fp8_quant"

    @abstractmethod
    def inputs(self, rows: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Random inputs, on the generator's device."""

    @abstractmethod
    def native(self, *inputs: torch.Tensor) -> Produced:
        """vLLM's native layer. Compiled by Inductor it is form `native`; run as it is, form `eager`."""

    def custom_op(self, *inputs: torch.Tensor) -> Produced:
        """vLLM's CUDA op."""
        raise NotImplementedError(f"{self.stem} has no form custom_op")

    @abstractmethod
    def ours(self, kind: str, inputs: Tensors, form: str, **quant: Any) -> dict[str, torch.Tensor]:
        """Outputs of our op by name; `quant` are the op's arguments that describe the quantiser."""


def named(outputs: Any, *more: str) -> dict[str, torch.Tensor]:
    """An op's outputs by name: codes, scales unless the scale was given, and `more`."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    scales = ["scales"] if len(outputs) > 1 + len(more) else []
    return dict(zip(["codes", *scales, *more], outputs, strict=True))


def random_rows(rows: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers whose size varies from row to row and along a row, by powers of two: every mantissa stays as likely."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    exponents = torch.randint(-8, 5, (rows, 1), **options) + torch.randint(-2, 3, (1, width), **options)
    return torch.randn(rows, width, dtype=dtype, **options).mul_(torch.exp2(exponents.float()).to(dtype))


def random_weight(width: int, generator: torch.Generator) -> torch.Tensor:
    """A norm's weight, fp32: near 1, as trained ones are."""
    return 1.0 + 0.1 * torch.randn(width, generator=generator, device=generator.device)


def native_op(name: str) -> Callable[..., Any]:
    """The torch code of an op of vLLM's IR."""
    from vllm import ir

    return getattr(ir.ops, name).impls["native"].impl_fn
