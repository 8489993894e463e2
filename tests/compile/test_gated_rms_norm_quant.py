# SPDX-License-Identifier: Apache-2.0
"""Gated norms, head by head, which RMSNormQuantFusionPass fuses with a quantiser: small modules, fake CUDA tensors."""

from __future__ import annotations

import functools

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from rms_norm_modules import EPSILON, LAYOUTS, PASS, group, holds, token, trace  # noqa: E402
from torch import nn  # noqa: E402
from trace_module import group_rounding, our_ops, reasons  # noqa: E402
from vllm.model_executor.layers.layernorm import RMSNormGated  # noqa: E402

from vllm_fusion_plugin.tracing.subgraphs import count_ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")


class Gated(nn.Module):
    """RMSNormGated head by head, then quantised side by side: what follows linear attention."""

    def __init__(self, quant=None, flattens=False, head=128, dtype=None, **norm):
        super().__init__()
        self.norm = RMSNormGated(head, eps=EPSILON, **{"norm_before_gate": True} | norm, dtype=dtype)
        self.quant = (quant or group())()
        self.flattens, self.head = flattens, head

    def forward(self, x, z):
        shape = x.shape
        x, z = (t.reshape(shape[0], -1, self.head) for t in (x, z))
        heads = x.shape
        if self.flattens:
            x, z = (t.reshape(-1, self.head) for t in (x, z))
        return self.quant(self.norm(x, z).reshape(heads).flatten(-2))


def gated(*makers, inductor=None):
    return trace(*makers, shapes=((64, 4, 128), (64, 4, 128)), inductor=inductor)


@pytest.mark.parametrize("native", [False, True])
def test_gated_norms_are_fused(native):
    kinds = [
        dict(flattens=flattens, activation=activation, norm_before_gate=norm_before_gate, head=head, dtype=dtype)
        for activation, norm_before_gate, dtype in (
            ("swish", True, None),
            ("sigmoid", True, torch.float32),
            ("silu", False, None),
        )
        for flattens, head in ((False, 128), (False, 256), (True, 128), (True, 256))
        if activation == "swish" or flattens == (head == 256)  # a trace takes a second a kind
    ]
    recording = gated(*(functools.partial(Gated, group(128, native=native), **kind) for kind in kinds))
    assert recording.matches_by_graph()[PASS] == len(kinds)
    (subgraph,) = recording.subgraphs
    assert not {"aten.rsqrt.default", "aten.exp.default", "aten.sigmoid.default"} & count_ops(subgraph.after).keys()
    for (op, arguments), kind in zip(our_ops(recording), kinds, strict=True):
        assert op == "gated_rms_norm_group_fp8_quant"
        head = kind["head"]
        expected = dict(
            epsilon=EPSILON,
            num_heads=512 // head,
            norm_before_gate=kind["norm_before_gate"],
            activation="sigmoid" if kind["activation"] == "sigmoid" else "silu",
            norm_rounding="native",
            quant_rounding=group_rounding("native" if native else "custom_op"),
            scale_layout="column",
        )
        assert holds(arguments, expected), kind
        assert [arguments[name].meta["val"].shape[-1] for name in ("x", "z", "weight")] == [head] * 3


def test_gated_norms_with_every_layout():
    quants = [group(size, layout, ue8m0) for size in (64, 128) for layout in LAYOUTS for ue8m0 in (False, True)]
    recording = gated(
        *(functools.partial(Gated, quant) for quant in quants), inductor={"emulate_precision_casts": True}
    )
    scales = [(a["group_size"], a["scale_layout"], a["use_ue8m0"]) for _, a in our_ops(recording)]
    assert scales == [(size, layout, ue8m0) for size in (64, 128) for layout in LAYOUTS for ue8m0 in (False, True)]
    assert {arguments["norm_rounding"] for _, arguments in our_ops(recording)} == {"eager"}


class Ungated(Gated):
    def forward(self, x, z):
        return super().forward(x, None) if z is None else self.quant(self.norm(x).flatten(-2))


def test_gated_norms_that_are_left_are_explained():
    recording = gated(
        functools.partial(Gated, head=64),  # heads are no whole groups
        functools.partial(Gated, token()),
        Ungated,
    )
    assert not our_ops(recording)
    said = reasons()
    for reason in ("heads of 64", "_C.dynamic_per_token_scaled_fp8_quant"):
        assert sum(reason in r for r in said) == 1, said
