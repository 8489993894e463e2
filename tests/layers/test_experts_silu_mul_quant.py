# SPDX-License-Identifier: Apache-2.0
"""vLLM's own TritonExperts.apply on CPU tensors, with SiLU·mul and quantiser fused and without. What has no CPU
implementation, the GEMMs and vLLM's two ops, is stood in for on both sides alike."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_fusion_plugin import compat, plugin, report, roundings, settings
from vllm_fusion_plugin.layers import experts_silu_mul_quant as layer
from vllm_fusion_plugin.ops.quant import GroupScales, group_fp8_quant_reference
from vllm_fusion_plugin.ops.silu_mul_quant import silu_mul_reference

from . import experts_layer
from .experts_layer import MoEActivation, Shape, TritonExperts, apply, left_to_vllm, make_experts, make_inputs, module

SHAPE = Shape(width=256, topk=3)
GROUP_ROUNDING = roundings.of(roundings.GROUP_QUANT).name
ACT_ROUNDING = roundings.of(roundings.SILU_MUL).name


def vllm_group_quant(x, group_size, **kwargs):
    """vLLM's per_token_group_quant_fp8 by its CUDA op, in plain torch."""
    assert not any(kwargs.values()), kwargs
    ue8m0 = experts_layer.fp8_utils.is_deep_gemm_e8m0_used()
    return group_fp8_quant_reference(x, GroupScales(group_size, ue8m0=ue8m0), GROUP_ROUNDING)


class Gemm:
    """In the place of both GEMMs: the first writes rows of all kinds of numbers; the second keeps the codes and scales that
    it is handed, and writes sums of what they mean."""

    def __init__(self) -> None:
        self.handed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, A, B, C, A_scale, B_scale, *args, **kwargs):
        if C.shape[-1] == 2 * SHAPE.width:
            generator = torch.Generator().manual_seed(5)
            values = torch.randn(C.shape, generator=generator)
            values *= torch.randn(*C.shape[:-1], 1, generator=generator).exp()
            values.view(-1)[:5] = torch.tensor([0.0, -0.0, 3e4, -3e4, 1e-30])
            values.view(-1, C.shape[-1])[-1] = 0
            values.view(-1, C.shape[-1])[0, SHAPE.width :] = -0.0
            C.copy_(values)
            return
        self.handed.append((A.clone(), A_scale.clone()))
        group_size = A.shape[-1] // A_scale.shape[-1]
        rows = A.float().view(*A_scale.shape, group_size) * A_scale[..., None]
        C.copy_(rows.sum((-1, -2)).view(*C.shape[:-1], 1).expand_as(C))


@pytest.fixture(autouse=True)
def hooked(monkeypatch):
    def silu_and_mul(out, x):
        out.copy_(silu_mul_reference(x, ACT_ROUNDING))

    def moe_sum(rows, output, *args):
        output.copy_(rows.float().sum(1))

    monkeypatch.setattr(torch.ops._C, "silu_and_mul", silu_and_mul, raising=False)
    monkeypatch.setattr(sys.modules[f"{experts_layer.PACKAGE}.utils"], "per_token_group_quant_fp8", vllm_group_quant)
    monkeypatch.setattr(module, "try_get_optimal_moe_config", lambda *args, **kwargs: {"BLOCK_SIZE_M": 16})
    for name in ("_prepare_expert_assignment", "moe_align_block_size"):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (None, None, None), raising=False)
    monkeypatch.setattr(module.ops, "moe_sum", moe_sum)
    monkeypatch.setattr(module, "tl", SimpleNamespace(bfloat16="bf16"))  # empty where vLLM finds no GPU
    experts_layer.use_ue8m0(monkeypatch, True)
    experts_layer.hook(monkeypatch)


@pytest.fixture
def gemm(monkeypatch):
    made = Gemm()
    monkeypatch.setattr(module, "invoke_fused_moe_triton_kernel", made)
    return made


@pytest.fixture
def fused_calls(monkeypatch):
    """How many rows each call of our op has."""
    counts: list[int] = []
    op = layer.silu_mul_group_fp8_quant

    def counted(x, *args, **kwargs):
        counts.append(len(x))
        return op(x, *args, **kwargs)

    monkeypatch.setattr(layer, "silu_mul_group_fp8_quant", counted)
    return counts


def run(tokens=5, block=128, experts=None, activation=MoEActivation.SILU):
    weights = experts_layer.make_weights(SHAPE, block)
    experts = experts or make_experts(SHAPE, weights, block)
    return apply(experts, SHAPE, weights, make_inputs(SHAPE, tokens, block), activation)


def kept(experts) -> layer.Case:
    return vars(experts)[layer._KEPT]


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("tokens", [1, 5])
def test_bytes_of_vllm(tokens, block, ue8m0, gemm, fused_calls, monkeypatch):
    experts_layer.use_ue8m0(monkeypatch, ue8m0)
    if (
        block == 128
        and not ue8m0
        and layer.VLLMS_OP in layer.inspect.getsource(layer.inspect.unwrap(TritonExperts.apply))
    ):
        pytest.skip("vLLM runs its own fused op; see below")
    with left_to_vllm():
        want = run(tokens, block)
    assert fused_calls == []
    got = run(tokens, block)
    assert fused_calls == [tokens * SHAPE.topk]

    assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    (want_codes, want_scales), (codes, scales) = gemm.handed
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    assert torch.equal(scales.view(torch.int32), want_scales.view(torch.int32))
    assert scales.stride() == want_scales.stride()
    assert codes.view(torch.uint8).any()


def test_a_wrong_op_changes_the_output(gemm, monkeypatch):
    want = run()
    op = layer.silu_mul_group_fp8_quant
    monkeypatch.setattr(layer, "silu_mul_group_fp8_quant", lambda x, *args, **kwargs: op(x.flip(0), *args, **kwargs))
    assert not torch.equal(run(), want)


def test_vllms_own_fused_op_is_left_alone(gemm, fused_calls, monkeypatch):
    if layer.VLLMS_OP not in layer.inspect.getsource(layer.inspect.unwrap(TritonExperts.apply)):
        pytest.skip("this vLLM does not call it")
    experts_layer.use_ue8m0(monkeypatch, False)
    asked = []

    def fused(x, group_size, quant_dtype):
        asked.append(group_size)
        return group_fp8_quant_reference(silu_mul_reference(x), GroupScales(group_size), GROUP_ROUNDING)

    monkeypatch.setattr(module.ops, layer.VLLMS_OP, fused, raising=False)
    experts = make_experts(SHAPE, experts_layer.make_weights(SHAPE, 128))
    run(experts=experts)
    assert (asked, fused_calls) == ([128], [])
    (found,), missed = boundaries(experts)
    assert (found.pass_name, found.pattern) == (report.MODEL_CODE, "silu_mul+group[_C.silu_and_mul_per_block_quant]")
    assert not missed
    assert "SiLU·mul + FP8 quantiser" in report.pattern_words(found.pattern) or "group" in found.pattern


# ---- where it does nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dict(gemm1_clamp_limit=7.0), "clamped SwiGLU (limit 7.0)"),
        (dict(gemm1_alpha=1.7, gemm1_beta=1.0), "clamped SwiGLU (alpha 1.7, beta 1.0)"),
        (dict(block=None, per_act_token_quant=True), "one scale a token"),
        (dict(block=None), "one scale a tensor"),
        (dict(block=32), "groups of 32 in rows of 256"),
    ],
    ids=["clamp", "alpha", "token", "tensor", "group-size"],
)
def test_refused(make, reason):
    if any("gemm1" in name for name in make) and not experts_layer.CLAMPS:
        pytest.skip("this vLLM's FP8 experts have no clamp")
    experts = make_experts(SHAPE, experts_layer.make_weights(SHAPE, 128), **make)
    x = torch.zeros(3, 512, dtype=torch.bfloat16)
    assert reason in layer.why_not(experts, MoEActivation.SILU, x[:, :256], x)


def test_refused_by_how_it_is_called():
    experts = make_experts(SHAPE, experts_layer.make_weights(SHAPE, 128))
    x = torch.zeros(3, 512, dtype=torch.bfloat16)
    y = torch.zeros(3, 256, dtype=torch.bfloat16)
    assert layer.why_not(experts, MoEActivation.SILU, y, x) == ""
    assert "the activation is gelu" in layer.why_not(experts, MoEActivation.GELU, y, x)
    assert "rows of 192" in layer.why_not(experts, MoEActivation.SILU, y[:, :192], x[:, :384])
    assert "torch.float32" in layer.why_not(experts, MoEActivation.SILU, y.float(), x.float())
    experts._lora_context = object()
    assert "LoRA" in layer.why_not(experts, MoEActivation.SILU, y, x)
    experts._lora_context, experts.quantization_emulation = None, True
    assert "emulated" in layer.why_not(experts, MoEActivation.SILU, y, x)


def test_an_activation_of_its_own_is_run(gemm, fused_calls):
    class Doubling(TritonExperts):
        def activation(self, activation, output, input, **kwargs):
            super().activation(activation, output, input, **kwargs)
            output.mul_(2)

    weights = experts_layer.make_weights(SHAPE, 128)
    doubled = run(experts=make_experts(SHAPE, weights, of=Doubling))
    assert fused_calls == []
    assert torch.equal(doubled, 2 * run(experts=make_experts(SHAPE, weights)))
    assert fused_calls


def test_another_activation_and_back(gemm, fused_calls, monkeypatch):
    monkeypatch.setattr(torch.ops._C, "gelu_and_mul", lambda out, x: out.copy_(x[:, : out.shape[1]]), raising=False)
    experts = make_experts(SHAPE, experts_layer.make_weights(SHAPE, 128))
    run(experts=experts)
    run(experts=experts, activation=MoEActivation.GELU)
    assert len(fused_calls) == 1
    assert "gelu" in kept(experts).reason
    run(experts=experts)
    assert len(fused_calls) == 2


def test_methods_called_from_elsewhere_are_vllms(gemm, fused_calls):
    """By whoever does not go through `apply`, while other experts run and not."""
    experts = make_experts(SHAPE, experts_layer.make_weights(SHAPE, 128))
    x = torch.randn(3, 512).bfloat16()
    y = torch.empty(3, 256, dtype=torch.bfloat16)
    experts.activation(MoEActivation.SILU, y, x)
    assert torch.equal(y, silu_mul_reference(x, ACT_ROUNDING))
    codes, scales = getattr(module, layer.QUANTISER)(A=y, A_scale=None, quant_dtype=experts.quant_dtype,
                                                     per_act_token_quant=False, block_shape=[128, 128])  # fmt: skip
    assert (codes.shape, scales.shape) == ((3, 256), (3, 2))
    assert fused_calls == []


def test_a_quantiser_of_something_else_gets_the_activation_done_first(fused_calls):
    experts = make_experts(SHAPE, experts_layer.make_weights(SHAPE, 128))
    x = torch.randn(3, 512).bfloat16()
    y, other = torch.zeros(3, 256, dtype=torch.bfloat16), torch.randn(3, 256).bfloat16()
    layer._running.apply = layer._Apply(experts)
    try:
        experts.activation(MoEActivation.SILU, y, x)
        assert not y.any()
        codes, _ = getattr(module, layer.QUANTISER)(other, None, experts.quant_dtype, False, [128, 128])
    finally:
        layer._running.apply = None
    assert torch.equal(y, silu_mul_reference(x, ACT_ROUNDING))
    assert torch.equal(codes.view(torch.uint8), vllm_group_quant(other, 128)[0].view(torch.uint8))
    assert fused_calls == []


def test_an_op_that_fails_is_vllms_from_then_on(gemm, monkeypatch):
    with left_to_vllm():
        want = run()
    asked = []

    def broken(*args, **kwargs):
        asked.append(1)
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(layer, "silu_mul_group_fp8_quant", broken)
    experts = make_experts(SHAPE, experts_layer.make_weights(SHAPE, 128))
    for _ in range(2):
        assert torch.equal(run(experts=experts), want)
    assert asked == [1]
    assert [m.reason for m in boundaries(experts)[1]] == ["RuntimeError: no such instruction"]


def test_experts_that_are_not_what_they_were_are_vllms(gemm, monkeypatch):
    with left_to_vllm():
        want = run()

    def broken(*args):
        raise AttributeError("'TritonExperts' object has no attribute 'quant_dtype'")

    monkeypatch.setattr(layer, "why_not", broken)
    experts = make_experts(SHAPE, experts_layer.make_weights(SHAPE, 128))
    for _ in range(2):
        assert torch.equal(run(experts=experts), want)
    assert "AttributeError" in boundaries(experts)[1][0].reason


def test_threads_do_not_see_each_other(gemm, monkeypatch):
    """As with vLLM's dual batch overlap: all are between activation and quantiser at the same time."""
    want, got = run(), {}
    together, op = threading.Barrier(3), layer.silu_mul_group_fp8_quant

    def waiting(*args, **kwargs):
        together.wait(timeout=60)
        return op(*args, **kwargs)

    monkeypatch.setattr(layer, "silu_mul_group_fp8_quant", waiting)
    threads = [threading.Thread(target=lambda n=n: got.update({n: run()})) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert layer._problem == ""
    assert all(torch.equal(got[n], want) for n in range(3))


# ---- engines ---------------------------------------------------------------------------------------------------------


class Owner:
    """What an engine is known by."""


def test_each_engine_by_its_settings(gemm, fused_calls, monkeypatch):
    running = Owner(), Owner()
    monkeypatch.setattr(compat, "is_running", lambda owner: owner is running[current])
    on, off = (report.RECORDER.engine(owner) for owner in running)
    on.experts_left = plugin._why_left(settings.Settings(), "experts_silu_mul_quant")
    off.experts_left = plugin._why_left(settings.Settings(experts_silu_mul_quant=False), "experts_silu_mul_quant")
    made = [make_experts(SHAPE, experts_layer.make_weights(SHAPE, 128)) for _ in running]
    for current in (1, 0):
        run(experts=made[current])
        assert len(fused_calls) == 1 - current
    assert (kept(made[0]).reason, kept(made[1]).reason) == ("", "off: experts_silu_mul_quant=false")


def test_inexact_is_left_if_that_is_asked_for(monkeypatch):
    answers = roundings.known() | {roundings.GROUP_QUANT: roundings.Rounding("custom_op", differing=3, asked=True)}
    monkeypatch.setattr(roundings, "known", lambda: answers)
    assert plugin._why_left(settings.Settings(), "experts_silu_mul_quant") == ""
    reason = plugin._why_left(settings.Settings(inexact="leave"), "experts_silu_mul_quant")
    assert reason.startswith("group quantiser is not exact on this vLLM")


def test_the_engine_that_runs_is_known_by_its_layers(monkeypatch):
    forward_context = pytest.importorskip("vllm.forward_context")
    mine, other = SimpleNamespace(static_forward_context={}), SimpleNamespace(static_forward_context={})
    assert not compat.is_running(mine)
    context = SimpleNamespace(no_compile_layers=mine.static_forward_context)
    monkeypatch.setattr(forward_context, "_forward_context", context)
    assert compat.is_running(mine)
    assert not compat.is_running(other)


# ---- report ----------------------------------------------------------------------------------------------------------


class Fp8MoEMethod:
    def __init__(self, experts):
        self.moe_kernel = SimpleNamespace(fused_experts=experts) if experts is not None else None


class UnquantizedFusedMoEMethod(Fp8MoEMethod):
    pass


def make_model(*methods) -> torch.nn.Module:
    """Layers of a model of which `model` is compiled."""
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.do_not_compile = False
    model.model.layers = torch.nn.ModuleList()
    for method in methods:
        of = torch.nn.Module()
        of.experts = torch.nn.Module()
        of.experts.quant_method = method
        model.model.layers.append(of)
    return model


def boundaries(*experts):
    record = report.EngineRecord()
    record.experts_left = ""
    return layer.boundaries(make_model(*map(Fp8MoEMethod, experts)), record)


def test_every_layer_is_reported(gemm):
    weights = experts_layer.make_weights(SHAPE, 128)
    fused, waiting, left = (make_experts(SHAPE, weights) for _ in range(3))
    run(experts=fused)
    vars(left)[layer._KEPT] = layer.Case((), "a reason")

    class CutlassExperts:
        quant_config = fused.quant_config

    class WeightsOnly:
        quant_config = SimpleNamespace(quant_dtype=None)

    class DeepGemmOrTriton:
        quant_config = fused.quant_config
        experts, fallback_experts = CutlassExperts(), fused

    held = [fused, waiting, left, CutlassExperts(), WeightsOnly(), DeepGemmOrTriton()]
    methods = [*map(Fp8MoEMethod, held), UnquantizedFusedMoEMethod(fused), Fp8MoEMethod(None)]
    record = report.EngineRecord()
    record.experts_left = ""
    found, missed = layer.boundaries(make_model(*methods), record)
    key = f"silu_mul[{ACT_ROUNDING}]+group128[{GROUP_ROUNDING},row,ue8m0]"
    assert [(f.pass_name, f.pattern, f.module) for f in found] == [
        (layer.NAME, key, "layers.0.experts"),
        (layer.NAME, key, "layers.5.experts"),
    ]
    assert report.pattern_words(key) == "SiLU·mul + FP8 quantiser, groups of 128, UE8M0 scales"
    out_of_reach = "experts run in {}, which this package does not reach; fused are those of TritonExperts"
    assert [(m.module, m.reason) for m in missed] == [
        ("layers.1.experts", "TritonExperts has not run yet"),
        ("layers.2.experts", "a reason"),
        ("layers.3.experts", out_of_reach.format("CutlassExperts")),
        ("layers.7.experts", out_of_reach.format("Fp8MoEMethod")),
    ]


def test_the_workers_report_has_it_and_counts_it(gemm, monkeypatch):
    weights = experts_layer.make_weights(SHAPE, 128)
    target, draft = (make_experts(SHAPE, weights) for _ in range(2))
    run(experts=target)
    owner = Owner()
    record = report.RECORDER.engine(owner)
    record.experts_left = ""
    record.report.subgraphs = [report.Subgraph(index=0, compile_range="(1, 64)", model="backbone")]
    monkeypatch.setattr(plugin, "_off", "")
    monkeypatch.setattr(plugin, "_state", lambda *args: "active")
    monkeypatch.setattr(compat, "engine_owner", lambda config: owner)
    runner = SimpleNamespace(
        model=make_model(Fp8MoEMethod(target)), drafter=SimpleNamespace(model=make_model(Fp8MoEMethod(draft)))
    )
    config = SimpleNamespace(parallel_config=SimpleNamespace(rank=0), compilation_config=SimpleNamespace(mode=None))
    dumped = plugin._get_fusion_report(SimpleNamespace(vllm_config=config, model_runner=runner))

    shown = report.FusionReport.from_ranks([dumped])
    assert shown.summary() == "1 of 2 quantisers fused; 1 left, see below"
    assert shown.layer_table() == {layer.NAME: 1}
    assert shown.match_table() == {}  # which counts graphs
    (row,) = shown.rows()
    assert (row[0], row[3:]) == (layer.NAME, (0, 1, "0", "backbone: layers.0.experts"))
    ((name, reason, places, _),) = shown.missed_rows()
    assert (name, reason, places) == (layer.NAME, "TritonExperts has not run yet", 1)
    record.inactive = "inactive: for a test"
    assert plugin.outside_of_graphs(SimpleNamespace(model_runner=runner), record) == []


# ---- putting it in place ---------------------------------------------------------------------------------------------


def test_twice_is_once():
    methods = TritonExperts.apply, TritonExperts.activation, getattr(module, layer.QUANTISER)
    layer.install()
    assert methods == (TritonExperts.apply, TritonExperts.activation, getattr(module, layer.QUANTISER))


def test_not_before_vllm_has_experts(monkeypatch):
    monkeypatch.setattr(compat, "triton_experts_module", lambda: None)
    layer.install()
    assert layer._problem == ""


def test_an_unknown_signature_is_left(monkeypatch):
    class Experts:
        def activation(self, output, input):
            pass

        def apply(self):
            pass

    other = SimpleNamespace(TritonExperts=Experts, __name__="a_module", moe_kernel_quantize_input=layer._install)
    assert "activation(self, output, input); known: (self, activation, output, input, ...)" in layer._install(other)
    del other.moe_kernel_quantize_input
    assert layer._install(other) == "this vLLM's a_module has no moe_kernel_quantize_input"
    assert not hasattr(Experts.apply, "_fusion_plugin")
    monkeypatch.setattr(compat, "triton_experts_module", lambda: other)
    layer.install()
    assert "has no moe_kernel_quantize_input" in layer._problem


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("self.activation(a, y, x)\nz = None\nq, s = moe_kernel_quantize_input(y, 1)", ""),
        ("self.activation(a, y, x)\nq, s = moe_kernel_quantize_input(y, 1)\nself.apply_w2_lora(x=y)", ""),
        ("q, s = moe_kernel_quantize_input(y, 1)", "0 times, not once"),
        ("self.activation(a, y, x)\nself.activation(a, y, x)", "2 times, not once"),
        ("self.activation(a, y, x)\ny.add_(1)\nq, s = moe_kernel_quantize_input(y, 1)", "does not follow"),
        ("self.activation(a, y, x)\nq, s = moe_kernel_quantize_input(x, 1)", "more than"),
        ("self.activation(a, y, x)\nq, s = moe_kernel_quantize_input(y, 1)\nsave(y)", "more than"),
        ("self.activation(a, y)\nq, s = moe_kernel_quantize_input(y, 1)", "three arguments"),
    ],
)
def test_what_apply_may_look_like(body, reason):
    source = "def apply(self):\n" + "\n".join(f"    {line}" for line in body.splitlines())
    said = layer.why_apply_is_unknown(source)
    assert reason in said if reason else said == ""
