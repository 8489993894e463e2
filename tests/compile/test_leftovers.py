# SPDX-License-Identifier: Apache-2.0
"""Every quantiser that is left in a graph is in the report once, with a true reason, whatever stands before it.

Small modules side by side in one graph: a trace takes seconds. vLLM's own layers and ops, fake CUDA tensors.
"""

from __future__ import annotations

import functools

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import nn  # noqa: E402
from trace_module import check_graphs, make_config, trace_branches  # noqa: E402
from vllm.model_executor.layers import activation  # noqa: E402
from vllm.model_executor.layers.activation import GeluAndMul, MulAndSilu, ReLUSquaredActivation, SiluAndMul  # noqa: E402
from vllm.model_executor.layers.layernorm import RMSNorm  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402

from vllm_fusion_plugin import compat, fusions, plugin, report  # noqa: E402

WIDTH = 512
ACT, NORM, NONE = "activation_quant_fusion_pass", "rmsnorm_quant_fusion_pass", "none"
ON = {"fuse_act_quant": True, "fuse_norm_quant": True}
OFF = dict.fromkeys(ON, False)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    plugin.register()
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())


def quantiser(group_shape: GroupShape, static: bool = False) -> QuantFP8:
    return QuantFP8(static=static, group_shape=group_shape, **compat.uncompiled_layer(QuantFP8))


class Before(nn.Module):
    """Something, and a quantiser after it: FP8 in groups of `size`, 0 for one scale a token, None for one a tensor."""

    def __init__(self, make=lambda: nn.Identity(), size=128, static=False, between=lambda y: y):
        super().__init__()
        self.make, self.between = make(), between
        whole = static or size is None
        shape = GroupShape.PER_TENSOR if whole else GroupShape(1, size) if size else GroupShape.PER_TOKEN
        self.quant = quantiser(shape, static)
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)

    def forward(self, x):
        y = self.between(self.make(x))
        return self.quant(y, self.scale) if self.quant.static else self.quant(y)


class Twice(Before):
    """A second reader of what a static quantiser reads."""

    def forward(self, x):
        y = self.make(x)
        return self.quant(y, self.scale)[0], torch.relu(y)


class TwoQuantisers(Before):
    def __init__(self, make):
        super().__init__(make)
        self.other = quantiser(GroupShape.PER_TOKEN)

    def forward(self, x):
        y = self.make(x)
        return *self.quant(y), *self.other(y)


@triton.jit
def per_token_group_quant_kernel(x, codes, scales, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + offsets).to(tl.float32)
    scale = tl.max(tl.abs(values), axis=0) / 448.0
    tl.store(codes + offsets, (values / scale).to(codes.dtype.element_ty))
    tl.store(scales + tl.program_id(0), scale)


class InTriton(Before):
    def forward(self, x):
        y = self.make(x)
        codes = torch.empty(y.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(y.shape[0], y.shape[1] // 128, dtype=torch.float32)
        per_token_group_quant_kernel[(y.shape[0] * (y.shape[1] // 128),)](y, codes, scales, BLOCK=128)
        return codes, scales


class Nvfp4(Before):
    def forward(self, x):
        y = self.make(x)
        codes = torch.empty(y.shape[0], y.shape[1] // 2, dtype=torch.uint8)
        scales = torch.empty(-(y.shape[0] // -128) * 128, y.shape[1] // 64, dtype=torch.int32)
        torch.ops._C.scaled_fp4_quant.out(y, self.scale, True, output=codes, output_scale=scales)
        return codes, scales


class Int8(Before):
    def forward(self, x):
        y = self.make(x)
        codes, scales = torch.empty(y.shape, dtype=torch.int8), torch.empty(y.shape[0], 1, dtype=torch.float32)
        torch.ops._C.dynamic_scaled_int8_quant(codes, y, scales, None)
        return codes, scales


def clamped():
    return activation.SiluAndMulWithClamp(7.0, **compat.uncompiled_layer(activation.SiluAndMulWithClamp))


def clamped_by_hand():
    class Clamped(nn.Module):
        def forward(self, x):
            gate, up = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
            return nn.functional.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0)

    return Clamped()


def situ():
    return activation.SituAndMul(**compat.uncompiled_layer(activation.SituAndMul))


ACTIVATIONS = {
    functools.partial(GeluAndMul, approximate="tanh"): "GELU·mul",
    ReLUSquaredActivation: "relu2",
    MulAndSilu: "mul·SiLU, up first",
    clamped_by_hand: "clamped SwiGLU",
    **({clamped: "clamped SwiGLU"} if hasattr(activation, "SiluAndMulWithClamp") else {}),
    **({situ: "SiTU·mul"} if hasattr(activation, "SituAndMul") else {}),
}


def norm():
    return RMSNorm(2 * WIDTH, 1e-6)


def pad(y):
    return nn.functional.pad(y, (0, 128))


def trace(*makers, custom_ops=("none", "+quant_fp8"), lone=False, flags=ON):
    config = make_config(list(custom_ops), **flags)
    config.additional_config = {"fusion_plugin": {"lone_group_quant": lone}}
    recording = trace_branches(makers, [(64, 2 * WIDTH)], config)
    check_graphs(recording)
    return recording


def missed() -> list[tuple[str, str]]:
    return [(m.pass_name, m.reason) for s in report.RECORDER.report.subgraphs for m in s.missed]


def assert_missed(*expected: tuple[str, str, str]) -> None:
    """The report has one line for each of these (pass, what stands before, why), and no other."""
    lines = missed()
    for pass_name, before, why in expected:
        found = [line for line in lines if line[0] == pass_name and before in line[1] and why in line[1]]
        assert len(found) == sum(e == (pass_name, before, why) for e in expected), ((pass_name, before, why), lines)
    assert len(lines) == len(expected), lines


VARIANTS = {"op": ("none", "+quant_fp8"), "native": ("none", "-quant_fp8")}


@pytest.mark.parametrize("act_op", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_that_no_pass_fuses(variant, act_op):
    ops = [*VARIANTS[variant]]
    if act_op:
        ops += [
            f"+{name}" for name in ("gelu_and_mul", "relu2", "mul_and_silu", "silu_and_mul_with_clamp", "situ_and_mul")
        ]
    trace(*(functools.partial(Before, make) for make in ACTIVATIONS), custom_ops=ops)
    assert_missed(
        *((NONE, f"no pass fuses {words}", "FP8 quantiser in groups of 128") for words in ACTIVATIONS.values())
    )
    together = sum("Inductor compiles this quantiser together" in reason for _, reason in missed())
    if variant == "op":
        assert together == 0
    elif not act_op:
        assert together == len(ACTIVATIONS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantisers_that_a_pass_does_not_fuse(variant):
    trace(
        functools.partial(Before, SiluAndMul, size=None),
        functools.partial(Before, norm, size=32),
        functools.partial(Before, SiluAndMul, size=32),
        functools.partial(Before, SiluAndMul, between=pad),
        functools.partial(Twice, SiluAndMul, static=True),
        custom_ops=VARIANTS[variant],
    )
    assert_missed(
        (
            ACT,
            "SiLU·mul is followed by an FP8 quantiser with one dynamic scale a tensor",
            "fused: group, packed, token, static",
        ),
        (NORM, "RMSNorm is followed by an FP8 quantiser in groups of 32", "fused for group sizes (64, 128)"),
        (ACT, "SiLU·mul is followed by an FP8 quantiser in groups of 32", "fused for group sizes (64, 128)"),
        (ACT, "a pad is between SiLU·mul and an FP8 quantiser", "fused where they touch"),
        (ACT, "SiLU·mul has other readers besides an FP8 quantiser", ": aten.relu; fused where"),
    )


def test_quantisers_of_every_kind():
    trace(
        functools.partial(InTriton, SiluAndMul),
        functools.partial(Nvfp4, norm),
        functools.partial(Int8, norm),
        functools.partial(Before, functools.partial(GeluAndMul, approximate="tanh"), static=True),
    )
    assert_missed(
        (ACT, "SiLU·mul", "in a Triton kernel, per_token_group_quant_kernel"),
        (NORM, "RMSNorm is followed by an NVFP4 quantiser", "fused: group, packed, token, static"),
        (
            NORM,
            "RMSNorm is followed by a quantiser (_C.dynamic_scaled_int8_quant)",
            "fused: group, packed, token, static",
        ),
        (NONE, "no pass fuses GELU·mul", "an FP8 quantiser with a static scale"),
    )


def test_a_second_quantiser():
    recording = trace(*(functools.partial(TwoQuantisers, make) for make in (SiluAndMul, norm)))
    assert recording.matches_by_graph()[ACT] == 1
    also = "is fused with one quantiser already; its result is also read by an FP8 quantiser in groups of 128"
    assert_missed((ACT, "SiLU·mul", also), (NORM, "the norm", also))


class Product(nn.Module):
    def forward(self, x):
        return x @ x.mT @ x


def test_a_lone_quantiser_that_runs_our_kernel():
    recording = trace(functools.partial(Before, Product), functools.partial(Before, MulAndSilu), lone=True)
    assert recording.matches_by_graph()["group_quant_pass"] == 2
    ours = "it runs this package's kernel, by itself"
    assert_missed((NONE, "no pass fuses a matrix product", ours), (NONE, "no pass fuses mul·SiLU, up first", ours))


@pytest.mark.parametrize("variant", VARIANTS)
def test_flags_that_are_off(variant):
    makers = [functools.partial(Before, make) for make in (SiluAndMul, norm, MulAndSilu)]
    trace(*makers, custom_ops=VARIANTS[variant], flags=OFF)
    off = {"op": "=false was asked for", "native": "neither custom op"}[variant]
    assert_missed(
        (ACT, "SiLU·mul is followed by", "ActivationQuantFusionPass is off"),
        (NORM, "RMSNorm is followed by", "RMSNormQuantFusionPass is off"),
        (NONE, "no pass fuses mul·SiLU", "FP8 quantiser"),
    )
    assert sum(off in reason for _, reason in missed()) == 2


def test_one_native_quantiser_is_one_reader():
    """It reads a value twice, for its maximum and for its codes."""
    trace(functools.partial(Before, SiluAndMul, size=0), custom_ops=VARIANTS["native"], flags=OFF)
    ((_, reason),) = missed()
    assert "SiLU·mul is followed by an FP8 quantiser with one scale a token (in plain torch code)" in reason
    assert "readers" not in reason and "users" not in reason


class ModelCode(nn.Module):
    """What LlamaMLP calls with static FP8 (since 0.33)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)

    def forward(self, x):
        codes = torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.float8_e4m3fn)
        torch.ops._C.silu_and_mul_quant(codes, x, self.scale)
        return codes


@pytest.mark.parametrize("flags", [ON, OFF])
def test_what_model_code_fuses(flags):
    trace(ModelCode, flags=flags)
    (found,) = (f for s in report.RECORDER.report.subgraphs for f in s.found)
    assert (found.pass_name, found.pattern) == ("vLLM's model code", "silu_mul+static[_C.silu_and_mul_quant]")
    assert not missed()
    # vLLM's table counts passes' matches only
    assert not report.RECORDER.report.match_table() and not report.RECORDER.report.layer_table()


def test_a_pass_that_fails_is_the_reason(monkeypatch):
    from vllm_fusion_plugin.passes import silu_mul_quant

    def broken(self, graph):
        raise KeyError("no such thing")

    monkeypatch.setattr(silu_mul_quant.ActivationQuantFusionPass, "prepare", broken)
    trace(functools.partial(Before, SiluAndMul))
    assert_missed((ACT, "activation_quant_fusion_pass left a graph as it was", "no such thing"))


def test_a_report_that_fails_stops_nothing(monkeypatch):
    from vllm_fusion_plugin.passes import leftovers

    def broken(value):
        raise KeyError("no such thing")

    monkeypatch.setattr(leftovers.producers, "of", broken)
    trace(functools.partial(Before, MulAndSilu))
    assert not missed()
    assert any("no such thing" in note for note in report.RECORDER.report.notes)


def test_kinds_are_those_that_passes_have_patterns_for():
    """The report says what each pass fuses: that of which the pass has patterns."""
    from vllm_fusion_plugin.passes import producers, quantisers, rms_norm_quant, silu_mul_quant

    kinds = {
        quantisers.GroupQuant: "group",
        quantisers.TokenQuant: "token",
        quantisers.StaticQuant: "static",
        quantisers.Nvfp4Quant: "nvfp4",
    }

    def kind(pattern):
        packed = getattr(getattr(pattern.quant, "scales", None), "layout", "") == "packed"
        return "packed" if packed else kinds[type(pattern.quant)]

    config = make_config(["none"], **ON)
    act = silu_mul_quant.ActivationQuantFusionPass(config).patterns.values()
    assert {kind(p) for p in act} == set(producers.FUSED["silu_mul"][1])
    patterns = rms_norm_quant.RMSNormQuantFusionPass(config).patterns.values()
    norms = [p for p in patterns if isinstance(p, rms_norm_quant.RMSNormQuant)]
    assert {kind(p) for p in norms} == set(producers.FUSED["norm"][1])
    assert {kind(p) for p in patterns if p not in norms} == set(producers.FUSED["gated_norm"][1])


def test_every_pattern_has_words():
    """In the report's tables, alone and as what a refused match's reason begins with."""
    from vllm_fusion_plugin.passes import pass_manager

    config = make_config(["none"], **ON)
    keys = [
        key
        for fusion in fusions.FUSIONS
        if fusion.enters != "layer"
        for key in pass_manager.our_pass(fusion.name)(config).patterns
    ]
    assert len(keys) > 600
    for key in keys:
        words = report.pattern_words(key)
        assert "quantiser" in words and not set("[]_") & set(words), (key, words)
        assert report._KEY.fullmatch(key), key
