# SPDX-License-Identifier: Apache-2.0
"""ActivationQuantFusionPass on attention's sigmoid gate: vLLM's own ops and compiler, fake CUDA tensors."""

from __future__ import annotations

import functools

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from trace_module import check_graphs, make_config, our_ops, reasons, trace_branches  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402

from vllm_fusion_plugin import plugin, report  # noqa: E402

WIDTH = 512
OP = "sigmoid_mul_group_fp8_quant"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    plugin.register()
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())


class Gate(nn.Module):
    """As at the end of Qwen3NextAttention: x of heads, the gate a part of another tensor."""

    def __init__(self, quant=True, order=0, **scales):
        super().__init__()
        self.order = order
        self.quant = QuantFP8(False, GroupShape(1, 128), **scales) if quant else nn.Identity()

    def gated(self, x, gate):
        x = x.view(-1, 4, WIDTH // 4).view(-1, WIDTH)
        return x * torch.sigmoid(gate) if self.order == 0 else torch.sigmoid(gate) * x

    def forward(self, x):
        x, gate, _ = x.split([WIDTH, WIDTH, 128], dim=-1)
        return self.quant(self.gated(x.contiguous(), gate))


class Read(Gate):
    """The product is read once more."""

    def forward(self, x):
        x, gate, _ = x.split([WIDTH, WIDTH, 128], dim=-1)
        y = self.gated(x.contiguous(), gate)
        return self.quant(y), y + 1


class Single(Gate):
    """One gate for a row."""

    def gated(self, x, gate):
        return x * torch.sigmoid(gate[:, :1])


def trace(*makers, custom_ops=("none", "+quant_fp8"), settings=None):
    config = make_config(list(custom_ops), fuse_act_quant=True)
    config.additional_config = {"fusion_plugin": settings or {}}
    recording = trace_branches(makers, [(64, 2 * WIDTH + 128)], config)
    check_graphs(recording)
    return recording


LAYOUTS = {
    "row": {},
    "column": {"column_major_scales": True},
    "tma": {"column_major_scales": True, "tma_aligned_scales": True},
}


@pytest.mark.parametrize("custom_ops", [("none", "+quant_fp8"), ("none", "-quant_fp8")], ids=["op", "native"])
def test_gate_and_quantiser_are_one_op(custom_ops):
    makers = [
        functools.partial(Gate, order=order, use_ue8m0=ue8m0, **LAYOUTS[layout])
        for order, ue8m0, layout in ((0, True, "tma"), (1, False, "row"), (0, False, "column"))
    ]
    ops = our_ops(trace(*makers, custom_ops=custom_ops))
    assert [op for op, _ in ops] == [OP] * 3
    # QuantFP8's torch code does not align columns
    assert [a["scale_layout"] for _, a in ops] == ["tma" if "+quant_fp8" in custom_ops else "column", "row", "column"]
    assert [a["use_ue8m0"] for _, a in ops] == [True, False, False]
    assert {a["quant_rounding"].startswith("native") for _, a in ops} == {"-quant_fp8" in custom_ops}
    found = [match.pattern for part in report.RECORDER.report.subgraphs for match in part.found]
    matched = sorted(pattern.partition("+")[0] for pattern in found)
    assert matched == ["sigmoid_mul", "sigmoid_mul", "sigmoid_mul[gate first]"]
    words = {report.pattern_words(pattern) for pattern in found}
    assert all(w.startswith("attention's sigmoid gate + FP8 quantiser, groups of 128") for w in words), words


def test_a_gate_that_is_read_again_or_no_tensor_of_rows_is_left():
    ops = our_ops(trace(Read, Single))
    assert OP not in [op for op, _ in ops]
    said = reasons()
    assert len(said) == 2 and all("sigmoid gate" in reason for reason in said), said
