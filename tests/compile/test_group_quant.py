# SPDX-License-Identifier: Apache-2.0
"""GroupQuantPass on small modules: vLLM's own layers and op schemas, vLLM's own compiler, fake CUDA tensors."""

from __future__ import annotations

import functools
import itertools

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from trace_module import check_graphs, group_rounding, make_config, our_ops, reasons, trace_branches  # noqa: E402
from vllm.model_executor.layers.activation import SiluAndMul  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402

from vllm_fusion_plugin import compat, plugin, report  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import count_ops  # noqa: E402

PASS = "group_quant_pass"
VLLM_OP = "_C.per_token_group_fp8_quant.default"
WIDTH = 512
LAYOUTS = {
    "row": {},
    "column": {"column_major_scales": True},
    "tma": {"column_major_scales": True, "tma_aligned_scales": True},
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    plugin.register()
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())


def make(settings=None, **pass_config):
    config = make_config(["none", "+quant_fp8"], **{"fuse_norm_quant": False, "fuse_act_quant": False} | pass_config)
    config.additional_config = {"fusion_plugin": settings or {}}
    return config


def trace(*makers, settings=None, **pass_config):
    recording = trace_branches(makers, [(64, WIDTH)], make(settings, **pass_config))
    check_graphs(recording)
    return recording


class Lone(nn.Module):
    """A quantiser whose input comes from an op that nothing is fused with."""

    def __init__(self, size=128, layout="column", ue8m0=False):
        super().__init__()
        self.quant = QuantFP8(
            False,
            group_shape=GroupShape(1, size),
            use_ue8m0=ue8m0,
            **LAYOUTS[layout],
            **compat.uncompiled_layer(QuantFP8),
        )

    def forward(self, x):
        return self.quant(x @ x.mT @ x)


def test_every_layout_runs_our_kernel():
    cases = list(itertools.product((64, 128), LAYOUTS, (False, True)))
    recording = trace(*(functools.partial(Lone, *case) for case in cases))
    assert recording.matches_by_graph()[PASS] == len(cases)
    found = our_ops(recording)
    for (op, arguments), (size, layout, ue8m0) in zip(found, cases, strict=True):
        assert op == "group_fp8_quant"
        assert list(arguments.values())[1:] == [size, layout, ue8m0, group_rounding("custom_op")]
    (subgraph,) = recording.subgraphs
    assert VLLM_OP not in count_ops(subgraph.after)


class MLP(Lone):
    """One quantiser after SiLU·mul, one that is alone."""

    def forward(self, x):
        return *super().forward(x), *self.quant(SiluAndMul.forward_native(x))


def test_fusions_come_first():
    recording = trace(MLP, fuse_act_quant=True)
    assert {op for op, _ in our_ops(recording)} == {"group_fp8_quant", "silu_mul_group_fp8_quant"}


class Direct(nn.Module):
    """vLLM's op called as no layer of vLLM calls it, with row-major scales."""

    def __init__(self, codes=torch.float8_e4m3fn, limit=448.0, column_major=False, dimensions=2):
        super().__init__()
        self.codes, self.limit, self.column_major, self.dimensions = codes, limit, column_major, dimensions

    def forward(self, x):
        y = x @ x.mT @ x
        if self.dimensions == 3:
            y = torch.stack([y, y])  # a leading 1 is taken away
        codes = torch.empty(y.shape, dtype=self.codes)
        scales = torch.empty(*y.shape[:-1], y.shape[-1] // 128, dtype=torch.float32)
        torch.ops._C.per_token_group_fp8_quant(
            y, codes, scales, 128, 1e-10, -self.limit, self.limit, False, self.column_major, False
        )
        return codes, scales


LEFT_ALONE = {
    functools.partial(Direct, column_major=True): "strides",
    functools.partial(Direct, codes=torch.int8): "torch.int8",
    functools.partial(Direct, limit=240.0): "'fp8_max': 240.0",
    functools.partial(Direct, dimensions=3): "3 dimensions",
    functools.partial(Lone, 32): "'group_size': 32",
}


def test_is_left_alone_and_explained():
    recording = trace(*LEFT_ALONE)
    assert recording.matches_by_graph()[PASS] == 0
    assert not our_ops(recording)
    said = reasons()
    assert len(said) == len(LEFT_ALONE)
    for reason in LEFT_ALONE.values():
        assert sum(reason in r for r in said) == 1, (reason, said)


def test_setting_off_leaves_vllms_kernel():
    recording = trace(Lone, settings={"lone_group_quant": False})
    assert not our_ops(recording)
    assert report.RECORDER.report.passes["GroupQuantPass"] == "off: lone_group_quant=false"


def passes(config):
    from vllm_fusion_plugin.passes.pass_manager import FusionPassManager

    manager = FusionPassManager()
    manager.configure(config)
    return [type(p).__name__ for p in manager.passes]


def test_is_not_there_without_the_plugin():
    assert "GroupQuantPass" not in passes(make({"enabled": False}))


def test_a_pass_that_cannot_be_built_is_left_out(monkeypatch):
    from vllm_fusion_plugin.passes import group_quant

    def broken(self, config):
        raise ImportError("no kernels here")

    monkeypatch.setattr(group_quant.GroupQuantPass, "__init__", broken)
    assert "GroupQuantPass" not in passes(make())
    assert "no kernels here" in report.RECORDER.report.passes["GroupQuantPass"]
