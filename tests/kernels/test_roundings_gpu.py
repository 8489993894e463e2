# SPDX-License-Identifier: Apache-2.0
"""What vLLM's ops answer when they are asked how they round."""

from __future__ import annotations

import time

import pytest
import torch

from vllm_fusion_plugin import roundings
from vllm_fusion_plugin.ops import quant

from .installed import OPAQUE

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    pytest.importorskip("vllm._custom_ops")


def test_every_op_has_a_known_rounding(device: torch.device) -> None:
    answers = roundings.ask(device)
    assert {op: (answer.differing, answer.asked) for op, answer in answers.items()} == dict.fromkeys(answers, (0, True))
    assert answers[roundings.GROUP_QUANT].name == OPAQUE


def test_asking_takes_less_than_a_tenth_of_a_second(device: torch.device) -> None:
    """The first time loads kernels of torch's; what it takes then depends on the driver, and is not asked here."""
    roundings.ask(device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    roundings.ask(device)
    assert time.perf_counter() - start < 0.1


def test_the_numbers_tell_known_roundings_apart(device: torch.device) -> None:
    x = roundings._numbers(torch.bfloat16, 128).to(device)
    divided, multiplied = (
        quant.group_fp8_quant_reference(x, quant.GroupScales(), form)[0].view(torch.uint8) for form in quant.OPAQUE
    )
    assert int((divided != multiplied).sum()) >= 20


@pytest.mark.parametrize("op", ["per_token_group_fp8_quant", "silu_and_mul"])
def test_an_op_that_rounds_otherwise_is_not_exact(
    op: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """An op that is wrong in one number of a thousand: nearest is what it was, and the answer says how far away."""
    import vllm._custom_ops  # noqa: F401

    original = getattr(torch.ops._C, op)

    def wrong(*args: object) -> None:
        original(*args)
        written = args[0] if op == "silu_and_mul" else args[1]
        written.view(torch.uint8).flatten()[::1000] ^= 1  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.ops._C, op, wrong, raising=False)
    name = roundings.SILU_MUL if op == "silu_and_mul" else roundings.GROUP_QUANT
    answer, exact = roundings.ask(device)[name], roundings._by_version()[name]
    assert (answer.name, answer.asked) == (exact.name, True)
    assert 100 < answer.differing < 5000
    assert f"by up to {answer.differing} codes in a million" in answer.reason
