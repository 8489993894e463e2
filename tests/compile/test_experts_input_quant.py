# SPDX-License-Identifier: Apache-2.0
"""SplitExpertsPass on vLLM's MoE op, in a small graph; the layers that it asks about their experts are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
import vllm.model_executor.layers.fused_moe.layer  # noqa: E402, F401  (registers vLLM's op)
from torch import nn  # noqa: E402
from trace_model import why_not_lowered  # noqa: E402
from trace_module import check_graphs, make_config, our_ops, reasons, trace_branches  # noqa: E402
from vllm.model_executor.layers.fused_moe.prepare_finalize import no_dp_ep  # noqa: E402
from vllm.model_executor.layers.layernorm import RMSNorm  # noqa: E402

from vllm_fusion_plugin import compat, plugin, report  # noqa: E402
from vllm_fusion_plugin.layers import experts_input_quant as layer  # noqa: E402
from vllm_fusion_plugin.ops.quant import FP8_DTYPE  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import count_ops  # noqa: E402

WIDTH = 256
OP = getattr(torch.ops.vllm, layer.OP).default
ARGUMENTS = tuple(argument.name for argument in OP._schema.arguments)
VLLMS, OURS = f"vllm.{layer.OP}.default", f"vllm_fusion_plugin.{layer.OP}.default"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    plugin.register()
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())


class Experts(nn.Module):
    """A MoE layer, as far as it is asked about its experts."""

    def __init__(self, prepare=layer.PREPARE, block=128, quant_dtype=FP8_DTYPE):
        super().__init__()
        config = SimpleNamespace(
            quant_dtype=quant_dtype, use_fp8_w8a8=True, block_shape=[block, block], per_act_token_quant=False
        )
        experts = SimpleNamespace(quant_config=config)
        made = getattr(no_dp_ep, prepare)() if hasattr(no_dp_ep, prepare) else SimpleNamespace()
        self.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=experts, prepare_finalize=made))


class Block(nn.Module):
    """The sum of a residual, a norm, experts."""

    normed = True

    def __init__(self):
        super().__init__()
        self.norm = RMSNorm(WIDTH, 1e-6)
        self.router, self.matrix = (nn.Parameter(torch.empty(WIDTH, n)) for n in (8, WIDTH))

    def forward(self, x):
        y, total = self.norm(x, x @ self.matrix) if self.normed else (x @ self.matrix, x)
        given = {"hidden_states": y, "router_logits": y @ self.router, "hidden_dim_unpadded": 0}
        given |= {
            "shared_experts_input": None,
            "input_ids": None,
            "layer_name": compat.encode_layer_name("mlp.experts"),
        }
        return *OP(*[given[name] for name in ARGUMENTS]), total


class NotNormed(Block):
    normed = False


def trace(module=Block, experts=(Experts,), **settings):
    config = make_config(["none", "+quant_fp8"], fuse_norm_quant=True, fuse_act_quant=False)
    config.additional_config = {"fusion_plugin": settings}
    for i, make in enumerate(experts):
        name = "mlp.experts" if i == 0 else f"mlp.experts.{i}"
        config.compilation_config.static_forward_context[name] = make()
        config.compilation_config.static_all_moe_layers.append(name)
    recording = trace_branches([module], ((64, WIDTH),), config, False)
    check_graphs(recording)
    (subgraph,) = recording.subgraphs
    return count_ops(subgraph.after), [name for name, _ in our_ops(recording)], recording


def test_experts_input_fuses_with_the_norm():
    ops, _, recording = trace()
    assert (ops[OURS], ops[VLLMS]) == (1, 0)
    ((name, arguments),) = [(n, a) for n, a in our_ops(recording) if n.startswith("rms_norm")]
    assert name == "rms_norm_group_fp8_quant"
    assert (arguments["group_size"], arguments["scale_layout"], arguments["keep_norm"]) == (128, "row", True)
    (found,) = [f for s in report.RECORDER.report.subgraphs for f in s.found]
    assert "fused_add_rms_norm" in found.pattern and "+group128[experts,row" in found.pattern
    assert report.pattern_words(found.pattern).startswith("residual add + RMS norm")
    assert any("shared experts quantise their input inside" in r for r in reasons())


@pytest.mark.parametrize("settings", [{}, {"lone_group_quant": False}], ids=str)
@pytest.mark.parametrize("module", [Block, NotNormed])
def test_inductor_takes_the_graph(module, settings):
    """It holds the op's inputs to the strides that vLLM's op had been traced with, one by one."""
    *_, recording = trace(module, **settings)
    (subgraph,) = recording.subgraphs
    assert not why_not_lowered(subgraph.after)


def test_what_nothing_fuses_runs_this_packages_quantiser_or_is_vllms_again():
    ops, ours, _ = trace(NotNormed)
    assert ours == ["group_fp8_quant", layer.OP] and (ops[OURS], ops[VLLMS]) == (1, 0)
    ops, ours, _ = trace(NotNormed, lone_group_quant=False)
    assert not ours and (ops[OURS], ops[VLLMS]) == (0, 1)


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        ((lambda: Experts(prepare="AllToAll"),), "SimpleNamespace hands rows to other ranks"),
        ((lambda: Experts(block=32),), "experts quantise groups of 32"),
        ((lambda: Experts(quant_dtype=torch.int8),), "experts quantise their input to torch.int8"),
        ((Experts, lambda: Experts(block=64)), "MoE layers that share this code quantise unlike"),
    ],
    ids=["all to all", "groups of 32", "int8", "unlike"],
)
def test_others_are_left_to_vllm(experts, reason):
    if len(experts) > 1 and not compat.layer_names_are_inputs():
        pytest.skip("this vLLM compiles each layer by itself")
    ops, ours, _ = trace(experts=experts)
    assert not ours and (ops[OURS], ops[VLLMS]) == (0, 1)
    (said,) = [r for r in reasons() if "MoE op" in r]
    assert reason in said


def test_it_can_be_switched_off_and_an_unknown_vllm_switches_it_off(monkeypatch):
    ops, ours, _ = trace(experts_input_quant=False)
    assert not ours and (ops[OURS], ops[VLLMS]) == (0, 1)
    assert report.RECORDER.report.passes["SplitExpertsPass"] == "off: experts_input_quant=false"
    monkeypatch.setattr(layer, "install", lambda: None)
    monkeypatch.setattr(layer, "problem", "another function")
    ops, ours, _ = trace()
    assert not ours and (ops[OURS], ops[VLLMS]) == (0, 1)
    assert "another function" in report.RECORDER.report.passes["SplitExpertsPass"]
