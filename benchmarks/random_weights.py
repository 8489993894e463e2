# SPDX-License-Identifier: Apache-2.0
"""Scaled random weights for a model that vLLM loaded with `load_format="dummy"`.

vLLM's dummy weights are so small that layers hardly change the residual stream: tokens agree whatever a kernel computes.
Here every matrix keeps the size of its input, as trained ones do, so that a wrong code in any layer reaches the logits.
The values depend on the parameter's name and shape only: two engines of one model get the same weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch


class RandomWeights:
    """vLLM worker extension: `LLM(..., load_format="dummy", worker_extension_cls="random_weights.RandomWeights")`."""

    model_runner: Any

    @torch.inference_mode()
    def fill_random_weights(self) -> int:
        """Fill every parameter in place (CUDA graphs keep their addresses); number of parameters filled."""
        return fill(self.model_runner.model)


@torch.no_grad()
def fill(model: torch.nn.Module) -> int:
    """Fill every parameter in place; number of parameters filled."""
    count = 0
    for name, parameter in model.named_parameters():
        _fill(name, parameter.data)
        count += 1
    return count


def _fill(name: str, data: torch.Tensor) -> None:
    generator = torch.Generator(device=data.device).manual_seed(zlib.crc32(name.encode()))

    def randn(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=data.device)

    if data.dtype == torch.float8_e4m3fn:
        # Codes of unit variance; the scales below carry the 1 / sqrt(inputs).
        for part in _parts(data):
            part.copy_(randn(tuple(part.shape)).to(data.dtype))
    elif "scale" in name and data.dtype == torch.float32 and data.dim() >= 2:
        # The shorter side of a scale matrix says least about the inputs; 128 columns of weights a scale either way.
        data.fill_((128.0 * max(data.shape[-2:])) ** -0.5)
        data.mul_(1.0 + 0.1 * randn(tuple(data.shape)).clamp(-2, 2))
    elif "scale" in name or not data.is_floating_point():
        return
    elif data.dim() == 1:
        data.copy_(1.0 + 0.1 * randn(tuple(data.shape))) if "norm" in name else data.copy_(
            0.1 * randn(tuple(data.shape))
        )
    else:
        size = 1.0 if "embed" in name else data.shape[-1] ** -0.5
        for part in _parts(data):
            part.copy_(randn(tuple(part.shape)) * size)


def _parts(data: torch.Tensor) -> Iterator[torch.Tensor]:
    """Pieces of at most 4096 rows, so that random numbers in fp32 take little memory."""
    if data.is_contiguous():
        data = data.view(-1, data.shape[-1])
    for matrix in data if data.dim() > 2 else [data]:
        yield from matrix.split(4096)
