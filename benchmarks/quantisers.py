# SPDX-License-Identifier: Apache-2.0
"""The quantisers that the benchmarked ops end in: output buffers, traffic, vLLM's op, and plain torch.

A mode is a word list such as "tma,ue8m0": scale layout (row, column, tma), `ue8m0`, `group64`; words for the rest of the op
are read by its benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_fusion_plugin.ops.quant import EPS, FP8_DTYPE, FP8_MAX, FP8_MIN_SCALE, LAYOUTS, GroupScales

STATIC_SCALE = 0.0123


def plain_codes(y: torch.Tensor) -> torch.Tensor:
    return y.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)


@dataclass(frozen=True)
class Group:
    """One scale for each `group_size` numbers of a row."""

    scales: GroupScales

    @classmethod
    def of(cls, mode: str) -> Group:
        words = mode.split(",")
        layout = next((word for word in words if word in LAYOUTS), "row")
        return cls(GroupScales(64 if "group64" in words else 128, layout, "ue8m0" in words))

    @property
    def group_size(self) -> int:
        return self.scales.group_size

    @property
    def ue8m0(self) -> bool:
        return self.scales.ue8m0

    @property
    def column_major(self) -> bool:
        return self.scales.layout != "row"

    def rounding(self, variant: str = "custom_op") -> str:
        """`quant_rounding` of the installed vLLM's quantiser in that variant, custom_op or native."""
        from vllm_fusion_plugin.passes.quantisers import GroupQuant

        return GroupQuant(variant, self.scales).rounding

    def outputs(self, x: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales to write to, on x's device; ValueError on a width that is not whole groups."""
        self.scales.check(width)
        return x.new_empty((rows, width), dtype=FP8_DTYPE), self.scales.empty(x, rows, width)

    def moved_bytes(self, rows: int, width: int) -> int:
        return rows * width + rows * (width // self.group_size) * (1 if self.scales.layout == "packed" else 4)

    def custom_op(self, y: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        if self.scales.layout == "packed":
            torch.ops._C.per_token_group_fp8_quant_packed(y, codes, scales, self.group_size, EPS, -FP8_MAX, FP8_MAX)
            return
        torch.ops._C.per_token_group_fp8_quant(
            y, codes, scales, self.group_size, EPS, -FP8_MAX, FP8_MAX, self.ue8m0,
            self.column_major, self.scales.layout == "tma",
        )  # fmt: skip

    def plain(self, y: torch.Tensor, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        groups = y.view(y.shape[0], -1, self.group_size)
        scale = groups.abs().amax(dim=-1, keepdim=True).float() / FP8_MAX
        if self.ue8m0:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        scale = scale.clamp(min=FP8_MIN_SCALE)
        codes = plain_codes(groups / scale).view(y.shape)
        scale = scale.squeeze(-1)
        return codes, scale.t().contiguous().t() if self.column_major else scale


@dataclass(frozen=True)
class Token:
    """One scale a row."""

    @classmethod
    def of(cls, mode: str) -> Token:
        return cls()

    def outputs(self, x: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty((rows, width), dtype=FP8_DTYPE), x.new_empty((rows, 1), dtype=torch.float32)

    def moved_bytes(self, rows: int, width: int) -> int:
        return rows * width + rows * 4

    def custom_op(self, y: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes, y, scales, None)

    def plain(self, y: torch.Tensor, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (y.abs().amax(dim=-1, keepdim=True).float() / FP8_MAX).clamp(min=FP8_MIN_SCALE)
        return plain_codes(y.float() * scale.reciprocal()), scale


@dataclass(frozen=True)
class Static:
    """One scale, given; the second output is that scale, to be read."""

    @classmethod
    def of(cls, mode: str) -> Static:
        return cls()

    def outputs(self, x: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty((rows, width), dtype=FP8_DTYPE), x.new_full((1,), STATIC_SCALE, dtype=torch.float32)

    def moved_bytes(self, rows: int, width: int) -> int:
        return rows * width + 4

    def custom_op(self, y: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
        torch.ops._C.static_scaled_fp8_quant(codes, y, scale)

    def plain(self, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return plain_codes(y.float() * scale.reciprocal())
