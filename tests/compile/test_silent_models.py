# SPDX-License-Identifier: Apache-2.0
"""Models for which vLLM leaves its fusion flags off: what the report says of them, and with the flags set. Traced without a
GPU; see trace_model.py. Norms and quantisers are plain torch code there, so vLLM leaves fusing to Inductor.

A trace takes 20 to 30 s on two cores; the fixture makes each once.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

pytestmark = pytest.mark.slow

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)

ACT, NORM, NONE = "activation_quant_fusion_pass", "rmsnorm_quant_fusion_pass", "none"
KERNEL = "CutlassFP8ScaledMMLinearKernel"
SPLIT = "made outside this compiled graph: vLLM splits the model at attention"


def model_code_fuses() -> bool:
    """Whether LlamaMLP fuses SiLU·mul with a static quantiser itself: since 0.33."""
    return importlib.util.find_spec("vllm.model_executor.layers.fusion.fused_act_quant") is not None


@dataclasses.dataclass(frozen=True)
class Case:
    linears: int
    """Quantised linear layers."""
    layers: int
    norms: int
    """Norms with a quantiser after them."""
    inlined: int
    """Of these, how many Inductor has in one kernel with what computes their input."""
    activations: tuple[tuple[str, str, int], ...]
    """(pass, what stands before a quantiser, how many)."""
    shared: int = 0
    """Linear layers inside the MoE op."""
    experts: int = 0


CASES = {
    "llama31-8b-fp8-static": Case(
        16, 4, 8, 0, ((ACT, "SiLU·mul is followed by an FP8 quantiser with a static scale", 4),)
    ),
    "llama31-8b-fp8-dynamic": Case(
        16, 4, 8, 0, ((ACT, "SiLU·mul is followed by an FP8 quantiser with one scale a token", 4),)
    ),
    # the first norm reads embeddings times a number, the others what another norm has made
    "gemma3-fp8-dynamic": Case(24, 6, 12, 12, ((NONE, "no pass fuses GELU·mul (GeluAndMul)", 6),)),
    # one dense layer; shared experts are inside the MoE op
    "glm45-air-fp8-dynamic": Case(
        12, 3, 4, 0, ((ACT, "SiLU·mul is followed by an FP8 quantiser with one scale a token", 1),), shared=4, experts=2
    ),
}


def lines(trace: dict, kind: str) -> list[dict]:
    return [line for sub in trace["plugin"]["subgraphs"] for line in sub[kind]]


def count(trace: dict, pass_name: str, *words: str) -> int:
    return sum(m["pass_name"] == pass_name and all(w in m["reason"] for w in words) for m in lines(trace, "missed"))


@pytest.mark.parametrize("model", ["llama31-8b-fp8-static", "glm45-air-fp8-dynamic"])
def test_flags_left_to_vllm(model, trace_model):
    case, trace = CASES[model], trace_model(model, plugin=True, env={"VLLM_FUSION_PLUGIN_SETTINGS": '{"fuse": "vllm"}'})
    plugin = trace["plugin"]
    assert plugin["linear_kernels"] == {KERNEL: case.linears}
    for name in ("RMSNormQuantFusionPass", "ActivationQuantFusionPass"):
        assert plugin["passes"][name].startswith("off, as by vLLM's default (-O2): neither custom op ")
        assert "quant_fp8 is enabled" in plugin["passes"][name]

    together = "Inductor compiles this quantiser together with what stands before it"
    assert count(trace, NORM, "Norm is followed by", "RMSNormQuantFusionPass is off", together) == case.norms
    assert count(trace, NONE, SPLIT) == case.layers
    by_model_code = [f for f in lines(trace, "found") if f["pass_name"] == "vLLM's model code"]
    if model == "llama31-8b-fp8-static" and model_code_fuses():
        assert [f["module"] for f in by_model_code] == [f"layers.{i}.mlp" for i in range(case.layers)]
    else:
        assert not by_model_code
        for pass_name, words, number in case.activations:
            assert count(trace, pass_name, words, together) == number
    assert count(trace, NONE, "opaque MoE op") == case.experts
    # each quantiser once: one a linear layer, and one line for the experts of a layer
    assert len(lines(trace, "missed")) + len(by_model_code) == case.linears - case.shared + case.experts
    assert lines(trace, "found") == by_model_code


@pytest.mark.parametrize("model", CASES)
def test_nothing_set(model, trace_model):
    case, trace = CASES[model], trace_model(model, plugin=True)
    assert any('turned on by this package (fuse="auto")' in note for note in trace["plugin"]["notes"])
    assert not [graph["not_lowered"] for graph in trace["graphs"] if graph["not_lowered"]]
    assert trace["matches_by_layer"][NORM] == case.norms - case.inlined
    assert count(trace, NORM) == count(trace, NORM, "Inductor compiles", "into one kernel") == case.inlined
    assert count(trace, NONE, SPLIT) == case.layers
    found = [f["pass_name"] for f in lines(trace, "found")]
    if model == "gemma3-fp8-dynamic":
        assert count(trace, NONE, "no pass fuses GELU·mul (GeluAndMul)") == case.layers
    elif model == "llama31-8b-fp8-static" and model_code_fuses():
        assert found.count("vLLM's model code") == case.layers
    else:
        ((_, _, activations),) = case.activations
        assert found.count(ACT) == activations
    assert not count(trace, ACT)
    assert count(trace, NONE, "MoE op") == case.experts
    assert len(found) + len(lines(trace, "missed")) == case.linears - case.shared + case.experts
