# SPDX-License-Identifier: Apache-2.0
"""Comparison by bytes, and output buffers that show what a kernel did not write, or wrote outside of them."""

from __future__ import annotations

import torch

from vllm_fusion_plugin.ops.quant import FP8_DTYPE, empty_group_scales

POISON = 0xA5
GUARD = 4096  # bytes before and after a guarded tensor


def as_bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def one_nan(t: torch.Tensor) -> torch.Tensor:
    """t with every NaN replaced by the same one, since hardware conversions lose a NaN's sign and torch on a CPU does not.

    Only `quant_form="native"` leaves NaN in its outputs.
    """
    if t.dtype == FP8_DTYPE:
        bits = as_bits(t)
        return torch.where((bits & 0x7F) == 0x7F, torch.full_like(bits, 0x7F), bits).view(FP8_DTYPE)
    return torch.where(t.isnan(), torch.full_like(t, float("nan")), t)


def count_differing(actual: torch.Tensor, expected: torch.Tensor) -> int:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    return int(torch.count_nonzero(as_bits(actual) != as_bits(expected)))


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if count_differing(actual, expected) == 0:
        return
    where = (as_bits(actual) != as_bits(expected)).nonzero()
    first = "\n".join(
        f"  {tuple(at)}: {actual[tuple(at)].item()} for {expected[tuple(at)].item()}" for at in where[:8].tolist()
    )
    raise AssertionError(f"{what}: {len(where)} of {actual.numel()} differ, the first being\n{first}")


def code_steps(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many FP8 codes apart two tensors of codes are, element by element; -0 and +0 are the same code."""

    def rank(t: torch.Tensor) -> torch.Tensor:
        bits = as_bits(t).to(torch.int16)
        magnitude = bits & 0x7F
        return torch.where(bits >= 0x80, -magnitude, magnitude)

    return (rank(actual) - rank(expected)).abs()


class Guarded:
    """A poisoned allocation with room on both sides, for a kernel to write into.

    `tensor` is the output; `check` fails if anything outside its storage was written.
    """

    def __init__(self, like: torch.Tensor):
        self.size = like.untyped_storage().nbytes()
        self.bytes = torch.full((GUARD + self.size + GUARD,), POISON, dtype=torch.uint8, device=like.device)
        # the guards are a multiple of the alignment that kernels may assume, so the tensor is aligned as torch's own are
        typed = self.bytes[: GUARD + self.size].view(like.dtype)
        offset = GUARD // like.element_size()
        self.tensor = typed.as_strided(like.shape, like.stride(), offset)

    def storage(self) -> torch.Tensor:
        return self.bytes[GUARD : GUARD + self.size]

    def check(self) -> None:
        assert bool((self.bytes[:GUARD] == POISON).all()), "written before the tensor"
        assert bool((self.bytes[GUARD + self.size :] == POISON).all()), "written behind the tensor"


def guarded_codes(x: torch.Tensor) -> Guarded:
    return Guarded(x.new_empty((x.shape[0], x.shape[1] // 2), dtype=FP8_DTYPE))


def guarded_scales(x: torch.Tensor, group_size: int, column_major_scales: bool, tma_aligned_scales: bool) -> Guarded:
    groups = x.shape[1] // 2 // group_size
    return Guarded(empty_group_scales(x, x.shape[0], groups, column_major_scales, tma_aligned_scales))
