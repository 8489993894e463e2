# SPDX-License-Identifier: Apache-2.0
"""How far two engines agree, measured by what two equal engines differ by on this machine.

An order of sums moves a rounding here and there, that moves an FP8 code, and that the logprobs of all later tokens. Which
order it is depends on the CPU's vectors, and on whether Inductor or torch adds up. So a model with fusions differs from
itself without them, as it differs from itself on another CPU. That is the control: fusions off, compiled for other vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vllm_fusion_plugin.demo.engine import EngineResult

# How often as far as the control: few codes move, and which is luck.
FACTOR = 4
# And what part of what a wrong op changes, for machines whose control is the same to the last bit.
PART = 1 / 10


def other_vectors() -> dict[str, str]:
    """Environment in which torch and Inductor use other vectors than they would."""
    wide = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return {"ATEN_CPU_CAPABILITY": "avx2" if wide else "default"}


def distance(tokens: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]], other: EngineResult) -> float:
    """Root mean square of the differences of the tokens' logprobs, each prompt up to the first token that differs: what
    comes after it that continues another text. It counts with the least that could have made it differ, half of what it was
    better by than the next best."""
    differences = []
    for i, (prompt, values) in enumerate(zip(tokens, logprobs, strict=True)):
        for j, (token, value) in enumerate(zip(prompt, values, strict=True)):
            if token != other.tokens[i][j]:
                differences.append(other.margins[i][j] / 2)
                break
            differences.append(value - other.logprobs[i][j])
    return math.sqrt(sum(d * d for d in differences) / len(differences))


def wrong_distances(fused: EngineResult, unfused: EngineResult, wrong_ops: int) -> list[float]:
    """Of the first later generations of `fused`, each of which had one wrong op."""
    later = list(zip(fused.later_tokens, fused.later_logprobs, strict=True))[:wrong_ops]
    assert len(later) == wrong_ops
    return [distance(*generation, unfused) for generation in later]


def bound(wrong: Sequence[float], unfused: EngineResult, control: EngineResult) -> float:
    """How far a right engine may be from `unfused`. Any wrong op has to be farther."""
    allowed = max(FACTOR * distance(control.tokens, control.logprobs, unfused), PART * min(wrong))
    print(f"wrong ops {wrong}, control {distance(control.tokens, control.logprobs, unfused)}, allowed {allowed}")
    return allowed


def check_agreement(fused: EngineResult, unfused: EngineResult, control: EngineResult, wrong_ops: int) -> None:
    """wrong_ops: how many of `fused`'s later generations, the first ones, had a wrong op."""
    wrong = wrong_distances(fused, unfused, wrong_ops)
    allowed = bound(wrong, unfused, control)
    assert distance(fused.tokens, fused.logprobs, unfused) <= allowed
    assert min(wrong) > allowed, "a wrong op passes for a right one"
