# SPDX-License-Identifier: Apache-2.0
"""Sums between norms, which Inductor would not have rounded, reach our ops as addends: fake CUDA tensors."""

from __future__ import annotations

import pytest

from vllm_fusion_plugin.graph import called_op
from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from trace_module import check_graphs, make_config, our_ops, trace_branches  # noqa: E402
from vllm.model_executor.layers.layernorm import RMSNorm  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402

from vllm_fusion_plugin import compat, plugin, report  # noqa: E402

WIDTH = 256

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.vllm_ir, "fused_add_rms_norm"), reason="this vLLM has no IR op for add + norm"
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    plugin.register()
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())


def trace(module, tensors=3, inductor=None):
    config = make_config(["none", "+quant_fp8"], fuse_norm_quant=True, fuse_act_quant=False)
    config.compilation_config.inductor_compile_config |= inductor or {}
    recording = trace_branches([module], [(64, WIDTH)] * tensors, config)
    check_graphs(recording)
    (subgraph,) = recording.subgraphs
    return subgraph.after, [arguments for name, arguments in our_ops(recording) if name.startswith("rms_norm")]


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.quant = QuantFP8(
            False, group_shape=GroupShape(1, 128), column_major_scales=True, **compat.uncompiled_layer(QuantFP8)
        )


class Layer(Norms):
    """Two norms in a row, as around an MLP."""

    def forward(self, x, residual, x2):
        y, residual = self.first(x, residual)
        codes, scales = self.quant(y)
        y, residual = self.second(x2, residual)
        return codes, scales, *self.quant(y), residual


def placeholders(graph):
    """The activations, in the order of the module's inputs; tokens, a symbol, and weights are left out."""
    values = ((node, node.meta["val"]) for node in graph.nodes if node.op == "placeholder")
    return [node for node, value in values if isinstance(value, torch.Tensor) and value.dim() == 2]


def test_the_second_norm_adds_up_what_the_first_one_did():
    graph, (first, second) = trace(Layer)
    x, residual, x2 = placeholders(graph)
    assert (first["x"], first["residual"], first["residual_addend"], first["keep_sum"]) == (x, residual, None, False)
    assert (second["x"], second["residual"], second["residual_addend"]) == (x2, x, residual)
    assert second["keep_sum"]


def test_rounded_sums_stay_where_sums_are_rounded():
    graph, (first, second) = trace(Layer, inductor={"emulate_precision_casts": True})
    assert first["keep_sum"] and first["norm_rounding"] == "eager"
    assert second["residual_addend"] is None and second["residual"] not in placeholders(graph)


class SumUsedTwice(Norms):
    def forward(self, x, residual, x2):
        y, total = self.first(x, residual)
        codes, scales = self.quant(y)
        # not as the layer calls it, in place: that would forbid the second use
        norm = self.second
        y, residual = torch.ops.vllm_ir.fused_add_rms_norm.default(x2, total, norm.weight, norm.variance_epsilon)
        return codes, scales, *self.quant(y), residual, total


class ThreeNorms(Layer):
    def forward(self, x, residual, x2, x3):
        *results, residual = super().forward(x, residual, x2)
        y, residual = self.first(x3, residual)
        return *results, *self.quant(y), residual


def test_a_sum_that_leaves_the_graph_is_stored_and_read():
    _, (first, second) = trace(SumUsedTwice)
    assert first["keep_sum"] and second["residual_addend"] is None


def test_a_sum_of_three_is_stored_unrounded():
    _, (first, second, third) = trace(ThreeNorms, tensors=4)
    assert (first["keep_sum"], first["fp32_sum"]) == (False, False)
    assert (second["keep_sum"], second["fp32_sum"]) == (True, True)
    assert (third["keep_sum"], third["fp32_sum"]) == (True, False), "the graph's own output is rounded"
    assert second["residual_addend"] is not None and third["residual_addend"] is None
    assert third["residual"].meta["val"].dtype == torch.float32


class LastNormUnquantised(Layer):
    """As after a model's last layer."""

    def forward(self, x, residual, x2):
        y, residual = self.first(x, residual)
        codes, scales = self.quant(y)
        return codes, scales, self.second(x2, residual)[0]


def test_inductor_gets_back_the_sum_of_a_norm_of_its_own():
    graph, (first,) = trace(LastNormUnquantised)
    assert not first["keep_sum"]
    x, residual, _ = placeholders(graph)
    added = [set(node.args) for node in graph.nodes if node.target is torch.ops.aten.add.Tensor]
    assert {x, residual} in added


class Layers(Norms):
    """Two layers with experts: the norms in front of these are Inductor's. One graph, as where Inductor splits it."""

    experts = False

    def forward(self, x, residual, x2, x3, x4, x5, expert):
        results = []
        for first, second in ((x, x2), (x3, x4)):
            y, residual = self.first(first, residual)
            results += self.quant(y)
            y, residual = self.second(second, residual)
            results += [y]
        y, residual = self.first(x5 + 2.5 * expert if self.experts else x5, residual)
        return *results, *self.quant(y), residual


class Experts(Layers):
    experts = True


def loaded(node):
    """What Inductor would load for a sum: its addends, themselves sums or stored."""
    if node.target in (
        torch.ops.aten.add.Tensor,
        torch.ops.aten.mul.Tensor,
        torch.ops.prims.convert_element_type.default,
    ):
        return [addend for argument in node.all_input_nodes for addend in loaded(argument)]
    return [node]


def sums(graph):
    return [loaded(node) for node in graph.nodes if node.target is torch.ops.aten.add.Tensor]


@pytest.mark.parametrize("module", [Layers, Experts], ids=["", "experts"])
def test_sums_of_a_whole_model_are_never_rounded(module):
    """As Inductor has them: added up again, and stored in fp32 where they are of five tensors."""
    graph, (first, third, fifth) = trace(module, tensors=7)
    x, residual, x2, x3, x4, *last = placeholders(graph)
    assert (first["x"], first["residual"], first["residual_addend"], first["fp32_sum"]) == (x, residual, None, True)
    # x2 and what the first norm has added up: Inductor's norm between them adds up all of it once more
    assert (third["x"], third["residual"], third["fp32_sum"]) == (x3, x2, True)
    assert third["residual_addend"].meta["val"].dtype == torch.float32
    assert fifth["residual"] is x4
    assert {fifth["x"], fifth["x_addend"]} == (set(last) if module is Experts else {*last, None})
    assert fifth["residual_addend"].meta["val"].dtype == torch.float32
    assert fifth["keep_sum"] and not fifth["fp32_sum"]
    assert [x2, x, residual] in sums(graph)
    assert [x4, x3, x2, x, residual] in sums(graph)


class LookedUp(Norms):
    """A model's first layer: Inductor looks the embedding up in every norm's kernel."""

    def forward(self, table, ids, x, x2, x3):
        residual = torch.nn.functional.embedding(ids[:, 0].to(torch.int64), table)
        results = [*self.quant(self.first(residual))]
        for first in (x, x2):
            y, residual = self.first(first, residual)
            results += self.quant(y)
        y, residual = self.second(x3, residual)
        return *results, y, residual


def test_what_is_looked_up_is_looked_up_again():
    graph, (_, first, second) = trace(LookedUp, tensors=5)
    *_, x, x2, x3 = placeholders(graph)
    (added,) = (tensors for tensors in sums(graph) if x3 in tensors)
    assert added[:3] == [x3, x2, x]
    looked_up = added[3]
    assert called_op(looked_up) == "aten.embedding" and len(looked_up.users) == 1
    assert first["residual"] is not looked_up and first["residual"].target is looked_up.target
    assert (second["x"], second["residual"], second["residual_addend"]) == (x2, x, first["residual"])


class FirstNormUnquantised(Norms):
    """As in front of a MoE layer, whose two results are added before the next norm."""

    scale = 1.0

    def forward(self, x, residual, shared, routed):
        y, residual = self.first(x, residual)
        y2, residual = self.second(shared + routed * self.scale if self.scale != 1.0 else shared + routed, residual)
        return y, *self.quant(y2), residual


class Scaled(FirstNormUnquantised):
    scale = 2.5


class ScaledFirst(FirstNormUnquantised):
    def forward(self, x, residual, shared, routed):
        y, residual = self.first(x, residual)
        y2, residual = self.second(routed * 2.5 + shared, residual)
        return y, *self.quant(y2), residual


@pytest.mark.parametrize(("module", "scale"), [(FirstNormUnquantised, 1.0), (Scaled, 2.5), (ScaledFirst, 2.5)])
def test_experts_are_added_up_inside(module, scale):
    graph, (norm,) = trace(module, tensors=4)
    x, residual, *experts = placeholders(graph)
    assert (norm["residual"], norm["residual_addend"]) == (x, residual)
    assert {norm["x"], norm["x_addend"]} == set(experts)
    assert norm["x_addend_scale"] == scale
    if scale != 1.0:  # the product comes first, and so does its input
        assert norm["x_addend"] is experts[0]


class ComputedAddend(Norms):
    """What is added is computed by code that Inductor generates: an op of ours reads it rounded in any case."""

    def forward(self, x, residual, shared, routed):
        y, residual = self.second(torch.relu(shared) + routed, residual)
        return *self.quant(y), residual


def test_what_inductor_computes_is_left_to_it():
    _, (norm,) = trace(ComputedAddend, tensors=4)
    assert norm["x_addend"] is None


class Embedding(Norms):
    def forward(self, x, residual):
        ids = residual[:, 0].to(torch.int64)
        y = torch.nn.functional.embedding(ids, x)
        first, residual = self.quant(self.first(y)), y
        y, residual = self.second(x, residual)
        return *first, *self.quant(y), residual


def test_a_norm_of_what_is_looked_up_has_inductors_order():
    _, (first, second) = trace(Embedding, tensors=2)
    assert (first["sum_columns"], second["sum_columns"]) == (2048, 0)


@pytest.mark.skipif(not hasattr(torch._inductor.config, "deterministic"), reason="this torch cannot")
def test_an_inductor_that_times_nothing_has_one_order():
    _, norms = trace(Layer, inductor={"deterministic": True})
    assert [norm["sum_columns"] for norm in norms] == [2048, 2048]
