# SPDX-License-Identifier: Apache-2.0
"""What precedes a quantiser with packed scales, as DeepGEMM takes them from compute capability 10.0 on, fuses with it."""

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
from vllm.model_executor.layers.activation import SiluAndMul  # noqa: E402
from vllm.model_executor.layers.layernorm import RMSNorm, RMSNormGated  # noqa: E402
from vllm.model_executor.layers.quantization.utils.fp8_utils import (  # noqa: E402
    per_token_group_quant_fp8_packed_for_deepgemm as packed_quant,
)

from vllm_fusion_plugin import plugin, report  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import count_ops  # noqa: E402

WIDTH = 1536  # twice 6 groups: the second int32 of SiLU·mul's scales is half empty
VLLM_OP = "_C.per_token_group_fp8_quant_packed.default"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    plugin.register()
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())


class Quant(nn.Module):
    def forward(self, y):
        return packed_quant(y, 128, use_ue8m0=True)


class Activation(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.quant = SiluAndMul(), Quant()

    def forward(self, x):
        return self.quant(self.act(x))


class Norm(nn.Module):
    """Of x, or of x and a residual."""

    def __init__(self, add=False):
        super().__init__()
        self.norm, self.quant, self.add = RMSNorm(WIDTH, 1e-6), Quant(), add

    def forward(self, x):
        if not self.add:
            return self.quant(self.norm(x))
        normed, total = self.norm(x, torch.relu(x))
        return *self.quant(normed), total


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = RMSNormGated(128, eps=1e-6, norm_before_gate=True)

    def forward(self, x):
        heads = x.reshape(x.shape[0], -1, 128)
        return Quant()(self.norm(heads, torch.relu(heads)).flatten(-2))


class Alone(nn.Module):
    def forward(self, x):
        return Quant()(torch.relu(x))


class UnpaddedScales(nn.Module):
    """With strides that DeepGEMM would not take."""

    def forward(self, x):
        y = torch.relu(x)
        codes = torch.empty(y.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(y.shape[1] // 512, y.shape[0], dtype=torch.int32).T
        torch.ops._C.per_token_group_fp8_quant_packed(y, codes, scales, 128, 1e-10, -448.0, 448.0)
        return codes, scales


def trace(*makers):
    config = make_config(["none", "+quant_fp8"], fuse_norm_quant=True, fuse_act_quant=True)
    recording = trace_branches(makers, [(64, WIDTH)], config)
    check_graphs(recording)
    return recording


def test_every_fusion_has_packed_scales():
    makers = [Activation, Norm, functools.partial(Norm, add=True), Gated, Alone]
    recording = trace(*makers)
    found = {
        op: [arguments[name] for name in ("group_size", "scale_layout", "use_ue8m0")]
        for op, arguments in our_ops(recording)
    }
    assert [op for op, _ in our_ops(recording)] == [
        "silu_mul_group_fp8_quant",
        *["rms_norm_group_fp8_quant"] * 2,
        "gated_rms_norm_group_fp8_quant",
        "group_fp8_quant",
    ]
    assert all(scales == [128, "packed", True] for scales in found.values())
    assert VLLM_OP not in count_ops(recording.subgraphs[0].after)


def test_scales_that_deep_gemm_would_not_take_are_left():
    recording = trace(UnpaddedScales)
    assert count_ops(recording.subgraphs[0].after)[VLLM_OP] == 1
    assert any("the scales' strides" in reason for reason in reasons())
