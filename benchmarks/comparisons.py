# SPDX-License-Identifier: Apache-2.0
"""What end_to_end.py concludes: medians of times, differences of configurations with intervals, agreement of tokens."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Sequence
from typing import Any

from configurations import CONFIGS, PAIRS

# (phase, batch, clock) -> configuration -> milliseconds of each round
Times = dict[tuple[str, int, str], dict[str, list[float]]]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval that the median of what `values` are drawn from lies in with at least that confidence.

    From order statistics: how many of n values lie below the median is a matter of n coins, however they are distributed.

    Raises:
        ValueError: too few values: 5 and fewer hold no median with 95 %.
    """
    ordered, n = sorted(values), len(values)
    # Values left out at each end: as many as keep the chance that the median is beyond the ones that stay small enough.
    outside, left_out = 2 * 0.5**n, 0
    if outside > 1 - confidence:
        raise ValueError(f"{n} values hold no median with {confidence:.0%} confidence")
    while (more := outside + 2 * math.comb(n, left_out + 1) * 0.5**n) <= 1 - confidence:
        outside, left_out = more, left_out + 1
    return ordered[left_out], ordered[n - 1 - left_out]


def summaries(model: str, times: Times) -> list[dict[str, Any]]:
    """A row a phase, batch and configuration: the median of each clock over the rounds."""
    rows: dict[tuple[str, int, str], dict[str, Any]] = {}
    for (phase, batch, clock), by_config in times.items():
        for config, ms in sorted(by_config.items(), key=lambda item: list(CONFIGS).index(item[0])):
            row = rows.setdefault(
                (phase, batch, config), {"model": model, "phase": phase, "batch": batch, "config": config}
            )
            row[clock] = round(statistics.median(ms), 4)
    return list(rows.values())


def paired(times: Times) -> list[dict[str, Any]]:
    """For each pair of configurations the difference of the first to the second, round by round: its median and the
    interval that the median lies in with 95 % confidence. 0 outside of it: one is faster."""
    found = []
    for (phase, batch, clock), by_config in times.items():
        for a, b in PAIRS:
            if a not in by_config or b not in by_config:
                continue
            differences = [x - y for x, y in zip(by_config[a], by_config[b], strict=True)]
            low, high = median_interval(differences)
            middle = statistics.median(differences)
            found.append({
                "phase": phase, "batch": batch, "clock": clock, "pair": f"{a} - {b}", "median_ms": round(middle, 4),
                "low_ms": round(low, 4), "high_ms": round(high, 4),
                "percent": round(100 * middle / statistics.median(by_config[b]), 2),
            })  # fmt: skip
    return found


def compare(asked: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """For each pair of configurations, and each asked again: do tokens agree, do logprobs to the last bit?"""
    pairs = [(f"{a} and {b}", asked[a], asked[b]) for a, b in PAIRS if a in asked and b in asked]
    pairs += [(f"{name} twice", asked[name], again[name]) for name in asked]
    return {name: agreement(one, other) for name, one, other in pairs}


def agreement(one: list[Any], other: list[Any]) -> dict[str, Any]:
    """How many tokens and logprobs agree; `equal_logprobs_first`: for how many tokens of each prompt, from the first on."""
    tokens = [(x, y) for (t, _), (u, _) in zip(one, other, strict=True) for x, y in zip(t, u, strict=True)]
    logprobs = [list(map(operator.eq, p, q)) for (_, p), (_, q) in zip(one, other, strict=True)]
    return {
        "tokens": len(tokens),
        "equal_tokens": sum(x == y for x, y in tokens),
        "equal_logprobs": all(map(all, logprobs)),
        "equal_logprobs_first": [[*equal, False].index(False) for equal in logprobs],
    }
