# SPDX-License-Identifier: Apache-2.0
"""What verify mode counts, of an op that is right, one that is wrong, one that writes to buffers and one that fails."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from vllm_fusion_plugin.ops import calls, mla_v_up_quant, registry, replaced, silu_mul_quant, verify  # noqa: F401

OP = "silu_mul_static_fp8_quant"


@pytest.fixture
def arguments() -> list:
    x = torch.randn(5, 2 * 64, dtype=torch.bfloat16)
    defaults = {"str": "custom_op", "bool": False}
    schema = getattr(torch.ops.vllm_fusion_plugin, OP).default._schema.arguments
    return [x, torch.tensor(0.5), *(defaults[str(a.type)] for a in schema[2:] if not a.has_default_value())]


def right(*arguments):
    return registry.REFERENCES[OP](*arguments)


def wrong(*arguments):
    """One code is another."""
    result = right(*arguments)
    codes = result if isinstance(result, torch.Tensor) else result[0]
    codes.view(torch.uint8)[3, 7] ^= 1
    return result


def test_the_first_calls_of_each_place_are_counted(arguments):
    passes = [object()]
    verifier = verify.Verifier(2, lambda: passes[-1])
    for forward in range(3):
        passes.append(object())
        for place in range(2):
            verifier.run(OP, wrong if (forward, place) == (1, 1) else right, arguments)
    first, second = verifier.counted()
    numbers = 2 * 5 * 64
    assert first == verify.Counted(OP, 0, 2, numbers, 0, "")
    assert second == verify.Counted(OP, 1, 2, numbers, 1, "")
    verifier.begin_again()
    for _ in range(3):
        passes.append(object())
        verifier.run(OP, wrong, arguments)
    assert verifier.counted()[0] == verify.Counted(OP, 0, 4, 2 * numbers, 2, "")


def test_what_an_op_returns_is_returned(arguments):
    results = [run(OP, wrong, arguments) for run in (verify.Verifier(1, object).run, lambda op, f, a: f(*a))]
    for verified, plain in zip(*map(verify._tensors, results), strict=True):
        assert torch.equal(verified.view(torch.uint8), plain.view(torch.uint8))


def test_ops_of_vllms_take_the_place_of_plain_torch(arguments, monkeypatch):
    """One that differs shows, and is named; where there is none, plain torch goes on."""
    plain = silu_mul_quant.static_fp8_quant_reference.__wrapped__

    def quantise(*arguments):
        replaced._ran.add("static_scaled_fp8_quant")
        codes = plain(*arguments)
        codes.view(torch.uint8)[2, 3] ^= 1
        return codes

    monkeypatch.setitem(replaced.OPS, "silu_mul_reference", lambda *arguments, **named: None)
    monkeypatch.setitem(replaced.OPS, "static_fp8_quant_reference", quantise)
    verifier = verify.Verifier(1, object)
    verifier.run(OP, right, arguments)
    assert verifier.counted() == [verify.Counted(OP, 0, 1, 5 * 64, 1, "", ("static_scaled_fp8_quant",))]


def test_buffers_that_are_written_are_compared():
    op, tokens = "mla_v_up_group_fp8_quant", 3
    out, weight = torch.randn(tokens, 2, 32).bfloat16(), torch.randn(2, 32, 128).bfloat16()
    codes, scales = torch.empty(tokens, 256, dtype=torch.float8_e4m3fn), torch.empty(tokens, 2)
    verifier = verify.Verifier(1, object)
    verifier.run(op, registry.REFERENCES[op], [out, weight, codes, scales, 128, False, "custom_op"])
    numbers = codes.numel() + scales.numel()
    assert verifier.counted() == [verify.Counted(op, 0, 1, numbers, 0, "")]
    verifier.begin_again()
    verifier.run(op, lambda *arguments: None, [out, weight, codes.zero_(), scales, 128, False, "custom_op"])
    (counted,) = verifier.counted()
    assert counted.numbers == 2 * numbers and counted.differing > codes.numel() / 2


def test_a_reference_that_fails_does_not_stop_the_model(arguments, monkeypatch):
    monkeypatch.setitem(registry.REFERENCES, OP, lambda *arguments: 1 / 0)
    verifier = verify.Verifier(2, object)
    for _ in range(2):
        assert verifier.run(OP, lambda *arguments: "result", arguments) == "result"
    (counted,) = verifier.counted()
    assert (counted.calls, counted.problem) == (1, "ZeroDivisionError: division by zero")


def test_nothing_is_verified_while_torch_compile_traces_or_a_graph_is_captured(arguments, monkeypatch):
    for module, name in ((torch.compiler, "is_compiling"), (verify, "_is_capturing")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: True)
            verifier = verify.Verifier(2, object)
            verifier.run(OP, right, arguments)
            assert not verifier.counted()


@pytest.mark.parametrize(
    ("actual", "expected", "count"),
    [
        ([float("nan"), 1.0], [float("nan"), 1.0], 0),
        ([0.0, 1.0], [-0.0, 1.0], 1),
        ([0.0, 1.0], [0.0], 2),
    ],
)
def test_bits_are_compared(actual, expected, count):
    assert int(verify.differing(torch.tensor(actual), torch.tensor(expected))) == count


def test_compiled_code_is_verified():
    """In a process of its own: ops stay replaced."""
    program = """
        import torch
        from vllm_fusion_plugin.ops import registry, silu_mul_quant, verify

        def f(x):
            return silu_mul_quant.silu_mul_group_fp8_quant(x)[0].float() + 1

        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 256, dtype=torch.bfloat16)
        compiled(x)
        right = registry.CPU_IMPLEMENTATIONS["silu_mul_group_fp8_quant"]

        def wrong(*arguments):
            codes, scales = right(*arguments)
            codes.view(torch.uint8)[0, 0] ^= 1
            return [codes, scales]

        registry.CPU_IMPLEMENTATIONS["silu_mul_group_fp8_quant"] = wrong
        verifier = verify.start(2, object)
        assert verify.start(7, object) is verifier
        for _ in range(3):
            compiled(x)
        print(*verifier.counted())
    """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stderr[-2000:]
    numbers = 2 * (4 * 128 + 4)
    assert f"place=0, calls=2, numbers={numbers}, differing=2, problem=''" in told.stdout
