# SPDX-License-Identifier: Apache-2.0
"""The two norms of latent attention, which RMSNormQuantFusionPass makes one op: small modules, fake CUDA tensors."""

from __future__ import annotations

import functools
import itertools

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from rms_norm_modules import EPSILON, LAYOUTS, PASS, group, holds, trace  # noqa: E402
from torch import nn  # noqa: E402
from trace_module import group_rounding, make_config, our_ops, reasons, trace_branches  # noqa: E402
from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass  # noqa: E402
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm  # noqa: E402

from vllm_fusion_plugin import report  # noqa: E402
from vllm_fusion_plugin.passes import mla_dual_rms_norm_quant  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import count_ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")

DUAL = "mla_dual_rms_norm_fusion_pass"
Q, KV, ROPE = 256, 128, 128
FUSED = (Q + KV + ROPE,)


class Latents(nn.Module):
    """What DeepSeek's attention does with its first GEMM's output; slices are cut where they are used."""

    def __init__(self, quant=None, kv_first=False, other=None):
        super().__init__()
        self.q_norm, self.kv_norm = RMSNorm(Q, 1e-5), RMSNorm(KV, 1e-6)
        self.quant = (quant or group())()
        self.kv_first = kv_first

    def q(self, fused):
        return self.quant(self.q_norm(fused.split([Q, KV + ROPE], dim=-1)[0]))

    def kv(self, fused):
        return self.kv_norm(fused.split([Q, KV + ROPE], dim=-1)[1].split([KV, ROPE], dim=-1)[0])

    def forward(self, fused):
        if self.kv_first:
            normed = self.kv(fused)
            return *self.q(fused), normed, torch.relu(normed)
        codes, scales = self.q(fused)
        return codes, scales, torch.relu(self.kv(fused)), codes.float()


class GemmaLatent(Latents):
    def __init__(self):
        super().__init__()
        self.kv_norm = GemmaRMSNorm(KV, 1e-6)


class ThreeLatents(Latents):
    def forward(self, fused):
        return *super().forward(fused), self.kv_norm(fused[:, :KV])


class LateWeight(Latents):
    """The second norm's weight is made from the first one's result."""

    def forward(self, fused):
        codes, scales = self.q(fused)
        weight = self.kv_norm.weight * scales.sum().bfloat16()
        return codes, scales, torch.ops.vllm_ir.rms_norm.default(fused[:, Q : Q + KV], weight, EPSILON)


class NoSlice(Latents):
    """Both norms read all of one tensor."""

    def __init__(self):
        super().__init__()
        self.q_norm, self.kv_norm = RMSNorm(*FUSED), RMSNorm(*FUSED)

    def forward(self, fused):
        return *self.quant(self.q_norm(fused)), torch.relu(self.kv_norm(fused))


def latents(*makers):
    return trace(*makers, shapes=((64, *FUSED),))


def test_both_norms_of_latent_attention_are_one_op():
    layouts = [group(128, layout, ue8m0) for layout in LAYOUTS for ue8m0 in (False, True)]
    makers = [functools.partial(Latents, quant, kv_first=i % 2 == 1) for i, quant in enumerate(layouts)]
    recording = latents(*makers)
    found = our_ops(recording)
    assert [op for op, _ in found] == ["mla_dual_rms_norm_group_fp8_quant"] * len(makers)
    for (_, arguments), (layout, ue8m0) in zip(found, itertools.product(LAYOUTS, (False, True)), strict=True):
        expected = dict(q_epsilon=1e-5, kv_epsilon=1e-6, group_size=128, use_ue8m0=ue8m0, scale_layout=layout)
        assert holds(arguments, expected | dict(norm_rounding="native", quant_rounding=group_rounding("custom_op")))
        assert [arguments[name].meta["val"].shape[1] for name in ("q", "kv")] == [Q, KV]
    (subgraph,) = recording.subgraphs
    assert not {"vllm_ir.rms_norm.default", "aten.pow.Tensor_Scalar"} & count_ops(subgraph.after).keys()
    patterns = [f.pattern for s in report.RECORDER.report.subgraphs for f in s.found if f.pass_name == DUAL]
    assert patterns.count("mla_dual_rms_norm+group128[custom_op,column]") == 1 and len(patterns) == len(makers)
    assert report.RECORDER.report.match_table()[PASS] == len(makers)


@pytest.mark.skipif(not hasattr(torch._inductor.config, "deterministic"), reason="this torch cannot")
def test_both_norms_are_one_op_where_inductor_times_nothing():
    """The first norm is told the order of its sum then; there is only one for so few columns."""
    (found,) = our_ops(trace(Latents, shapes=((64, *FUSED),), inductor={"deterministic": True}))
    assert found[0] == "mla_dual_rms_norm_group_fp8_quant"


def test_a_pass_that_fails_leaves_the_graph_as_it_was(monkeypatch, caplog):
    def fail(graph):
        for node in reversed(list(graph.nodes)):  # half-way through a change
            if not node.users and node.op == "call_function":
                graph.erase_node(node)
        raise KeyError("no such thing")

    monkeypatch.setattr(mla_dual_rms_norm_quant, "merge", fail)
    table = dict(VllmPatternMatcherPass.match_table)
    config = make_config(["none", "+quant_fp8"], fuse_norm_quant=False, fuse_act_quant=False)
    config.additional_config = {"fusion_plugin": {"lone_group_quant": False}}
    without, failed = trace_branches([Latents], ((64, *FUSED),), config), latents(Latents)
    ops = [count_ops(recording.subgraphs[0].after) for recording in (without, failed)]
    assert ops[0] == ops[1]
    assert {k: v for k, v in VllmPatternMatcherPass.match_table.items() if v} == {k: v for k, v in table.items() if v}
    assert not any(s.found for s in report.RECORDER.report.subgraphs)
    what = f"{PASS} left a graph as it was, because it failed: KeyError: 'no such thing'"
    assert what in report.RECORDER.report.notes and what in caplog.text


def test_pairs_of_norms_that_are_left_are_explained():
    recording = latents(GemmaLatent, ThreeLatents, LateWeight, NoSlice)
    assert {op for op, _ in our_ops(recording)} == {"rms_norm_group_fp8_quant"}
    said = reasons()
    for reason in ("second norm's weight is Gemma's", "2 more norms read", "made between the two"):
        assert sum(reason in r for r in said) == 1, said
    assert len(said) == 3, said
