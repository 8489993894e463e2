# SPDX-License-Identifier: Apache-2.0
"""What is asked of a trace, and what it tells, as data: it is made in another process."""

from __future__ import annotations

from pydantic import BaseModel, Field

from ..rank_report import RankReport
from ..vllm_flags import NoEffect


class Layer(BaseModel):
    """A layer that is traced."""

    index: int
    """Its position in the model."""
    kind: str
    """What is in it, by vLLM's classes."""
    stands_for: int = 1
    """How many layers of the model are like it, itself included."""


class Request(BaseModel):
    model: str
    """A folder with a config.json."""
    flags: list[str] = Field(default_factory=list)
    """As for `vllm serve`."""
    gpu: str = "h100"
    """A key of fake_gpu.GPUS."""
    tensor_parallel_size: int = 1
    flashinfer: bool = True
    """Whether FlashInfer is to be usable."""


class Traced(BaseModel):
    vllm: str
    gpu: str
    flashinfer: bool
    """Whether vLLM took FlashInfer to be usable."""
    state: str = ""
    """Why no pass of the package runs; "" if they do. Then there is neither report nor layers."""
    do: str = ""
    itemsize: int = 2
    """Bytes of a number of the model's dtype."""
    report: RankReport = Field(default_factory=RankReport)
    layers: list[Layer] = Field(default_factory=list)
    """By their position in the model that was traced."""
    asked: dict[str, bool] = Field(default_factory=dict)
    """vLLM's fusion flags that were set."""
    no_effect: list[NoEffect] = Field(default_factory=list)
    ignored: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
