# SPDX-License-Identifier: Apache-2.0
"""An engine whose fusions are not at work does not start, where the setting `strict` asks for that.

Asked when all workers of an engine have warmed up, and of all of them together: with pipeline parallelism, what one rank's
layers lack another's may have. A report is asked for, so compiled code from disk is judged by what was kept beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from . import fusions, settings, vllm_flags
from .rank_report import Found, RankReport
from .report import PASS_WORDS, reason_words, shorten

SERVE = "To serve all the same, leave out strict"


MAY_DIFFER = 1e-5
"""Share of an op's numbers that may differ from what it replaces: sums of a row are added up in another order on a GPU."""


class StrictError(RuntimeError):
    """Ends an engine's start. The message says what is not at work, why, and what to change."""


def check(engine_core: Any) -> None:
    """What vLLM's EngineCore calls when its workers are ready.

    Raises:
        StrictError: the setting is on, and something does not do what it is switched on for.
    """
    config = engine_core.vllm_config
    chosen, problem, out = settings.read(config.additional_config)
    if not chosen.strict or out:
        return
    if os.environ.get("VLLM_ELASTIC_EP_SCALE_UP_LAUNCH") == "1":  # joins a running engine, and compiles later
        return
    try:
        reports = engine_core.collective_rpc("get_fusion_report")
        found = [problem] if problem else problems([RankReport.model_validate(r) for r in reports], config)
    except Exception as e:
        found = [f"workers cannot be asked what has fused: {type(e).__name__}: {e}"]
    if found:
        raise StrictError("\n  ".join(("vllm-fusion-plugin, strict: this engine does not start.", *found, SERVE)))


def problems(ranks: Sequence[RankReport], config: Any) -> list[str]:
    """What is not at work in an engine, one line each: what, why, and what to do.

    config: its VllmConfig."""
    states: dict[str, list[int]] = {}
    for rank in ranks:
        if not rank.manager.startswith("active") or "no report was kept" in rank.manager:
            states.setdefault(rank.manager, []).append(rank.rank)
    if states:
        return [_state(state, of) for state, of in states.items()]
    return [
        *_failed_passes(ranks),
        *_without_match(ranks, config),
        *_unforeseen(ranks),
        *_fewer_than_expected(ranks, config),
        *_other_bytes(ranks),
    ]


def _state(state: str, ranks: Sequence[int]) -> str:
    where = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {state}"
    do = vllm_flags.what_compiles(state)
    if "no report was kept" in state:
        do = "VLLM_DISABLE_COMPILE_CACHE=1 compiles anew"
    return f"{where} → {do}" if do else where


def _failed_passes(ranks: Sequence[RankReport]) -> Iterator[str]:
    said = {f"{name}: {became}": None for rank in ranks for name, became in rank.passes.items() if "failed" in became}
    yield from said


def _without_match(ranks: Sequence[RankReport], config: Any) -> Iterator[str]:
    """Flags that are on, whoever has switched them on, and have fused nothing on any rank."""
    left_to_vllm = settings.read(config.additional_config)[0].stock_passes
    passes = config.compilation_config.pass_config
    fused = {fulfils(found) for rank in ranks for sub in rank.everything for found in sub.found}
    flags = {f.switch: None for f in fusions.entering("pass") if f.name not in left_to_vllm}
    for flag in flags:
        if flag not in fused and getattr(passes, flag, False):
            yield f"{flag} is on, and has fused nothing: {_why(flag, ranks, config)} → -cc.pass_config.{flag}=false"


def _unforeseen(ranks: Sequence[RankReport]) -> Iterator[str]:
    """Quantisers that a pass at work looks for, and has left although nothing that is known keeps it from fusing them: what
    `explain` gives no reason for."""
    places: dict[str, list[str]] = {}
    for missed in (m for rank in ranks for sub in rank.everything for m in sub.missed if m.is_unforeseen):
        places.setdefault(reason_words(missed.reason), []).append(missed.module)
    for reason, modules in places.items():
        yield f"{reason}: {shorten(modules)}"


def _fewer_than_expected(ranks: Sequence[RankReport], config: Any) -> Iterator[str]:
    from .explain.explanation import count_fused

    expected = settings.read(config.additional_config)[0].expect_fused
    if not expected:
        return
    gpus = config.parallel_config.tensor_parallel_size  # ranks beyond these have other layers of the model
    fused = sum(map(count_fused, ranks)) / gpus
    if fused < expected:
        left = {reason_words(m.reason): None for rank in ranks for sub in rank.subgraphs for m in sub.missed}
        yield f"{fused:g} quantisers are fused on each GPU, and expect_fused is {expected}; left: {'; '.join(left)}"


def _other_bytes(ranks: Sequence[RankReport]) -> Iterator[str]:
    """Ops that `verify` has found to write other numbers than what they replace, more than rounding explains."""
    for rank in ranks:
        for op in {v.op: None for v in rank.verified}:
            of_op = [v for v in rank.verified if v.op == op]
            numbers, differing = sum(v.numbers for v in of_op), sum(v.differing for v in of_op)
            if differing > MAY_DIFFER * numbers:
                where = shorten(v.place for v in of_op if v.differing)
                said = f"{op} writes other bytes than what it replaces: {differing} of {numbers}"
                yield f"rank {rank.rank}: {said}, in {where}"


def fulfils(found: Found) -> str:
    """The flag that asks for what has been fused, by whomever: SiLU·mul fused between experts' GEMMs, or by vLLM's model
    code, leaves nothing to ask for. "" if none does."""
    flag = PASS_WORDS.get(found.pass_name, "")
    if flag.startswith("fuse_"):
        return flag
    producer, followed, _ = found.pattern.partition("+")
    if not followed:
        return ""
    return "fuse_norm_quant" if "norm" in producer else "fuse_act_quant"


def _why(flag: str, ranks: Sequence[RankReport], config: Any) -> str:
    for nothing in vllm_flags.without_effect(config, {flag: True}):
        return nothing.why
    missed = (m for rank in ranks for sub in rank.everything for m in sub.missed)
    reasons = {reason_words(m.reason): None for m in missed if PASS_WORDS.get(m.pass_name) == flag}
    off = {became: None for f in fusions.entering("pass") if f.switch == flag for became in _became(f.name, ranks)}
    return "; ".join((*reasons, *off)) or "there is nothing for it to fuse in this model"


def _became(name: str, ranks: Sequence[RankReport]) -> list[str]:
    """What became of a pass that is not ours."""
    return [became for rank in ranks if (became := rank.passes.get(name, "ours")) != "ours"]
