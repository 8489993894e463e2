# SPDX-License-Identifier: Apache-2.0
"""The op that hands experts their input quantised: vLLM's MoE op and its preparation of experts' input, around a layer that
keeps what its experts would get."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_fusion_plugin import compat, roundings
from vllm_fusion_plugin.layers import experts_input_quant as layer
from vllm_fusion_plugin.ops.group_quant import group_fp8_quant
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, GroupScales, group_fp8_quant_reference

from . import experts_layer
from .experts_layer import Shape

no_dp_ep: Any = importlib.import_module(f"{experts_layer.PACKAGE}.prepare_finalize.no_dp_ep")
runner: Any = importlib.import_module(f"{experts_layer.PACKAGE}.runner.moe_runner")
PREPARE = getattr(no_dp_ep, layer.PREPARE)()
SHAPE = Shape(width=256, topk=2)


def quant_config(block: int | None = 128, **more: Any) -> Any:
    weights = experts_layer.make_weights(SHAPE, block or 128)
    return experts_layer.make_experts(SHAPE, weights, block, **more).quant_config


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Layer:
    """In the place of one of vLLM's MoE layers."""

    def __init__(self, config: Any, rows: torch.Tensor | None = None) -> None:
        self.config, self.rows = config, rows
        self.got: list[Any] = []
        self.runner = self  # where 0.20 has what runs

    def _forward_impl(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # 0.20 hands the layer itself first
        hidden = next(a for a in arguments if isinstance(a, torch.Tensor))
        ids = torch.zeros(len(hidden), SHAPE.topk, dtype=torch.int32, device=hidden.device)
        given = hidden if self.rows is None else self.rows
        prepared = PREPARE.prepare(given, ids.float(), ids, SHAPE.experts, None, False, self.config)
        self.got.append(prepared[:2])
        return torch.empty_like(hidden), torch.empty_like(hidden)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(no_dp_ep, layer.QUANTISER, getattr(no_dp_ep, layer.QUANTISER))
    monkeypatch.setattr(layer, "problem", "")
    layer.install()
    assert not layer.problem


@pytest.fixture
def quantised(monkeypatch) -> list[torch.Tensor]:
    """What vLLM's own quantiser is called on; it returns nonsense."""
    called: list[torch.Tensor] = []

    def quantise(a1: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[str, str]:
        called.append(a1)
        return "vLLM's codes", "vLLM's scales"

    monkeypatch.setattr(no_dp_ep, "moe_kernel_quantize_input", quantise)
    return called


def call(monkeypatch, moe: Layer, hidden: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> Any:
    monkeypatch.setattr(runner, "get_layer_from_name", lambda name: moe)
    op = getattr(torch.ops.vllm_fusion_plugin, layer.OP).default
    vllms = getattr(torch.ops.vllm, layer.OP).default
    given = {"hidden_states": hidden, "router_logits": hidden[:, :4], "layer_name": compat.encode_layer_name("mlp")}
    others = {"shared_experts_input": None, "input_ids": None, "hidden_dim_unpadded": 0}
    return op(codes, scales, *((given | others)[a.name] for a in vllms._schema.arguments))


def rows_and_codes(
    device: torch.device, tokens: int = 5, scales: GroupScales = GroupScales()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, SHAPE.hidden, generator=generator).to(device, torch.bfloat16)
    return hidden, *group_fp8_quant_reference(hidden, scales, "custom_op")


def test_experts_get_the_codes(monkeypatch, quantised, device):
    hidden, codes, scales = rows_and_codes(device)
    moe = Layer(quant_config())
    shared, routed = call(monkeypatch, moe, hidden, codes, scales)
    assert shared.shape == routed.shape == hidden.shape
    ((got_codes, got_scales),) = moe.got
    assert got_codes.data_ptr() == codes.data_ptr() and got_scales.data_ptr() == scales.data_ptr()
    assert quantised == []


@pytest.mark.parametrize("rows", ["others", "a part", "in another dtype"])
def test_other_rows_are_quantised_by_vllm(rows, monkeypatch, quantised, device):
    hidden, codes, scales = rows_and_codes(device)
    given = {"others": hidden.clone(), "a part": hidden[:2], "in another dtype": hidden.float()}[rows]
    moe = Layer(quant_config(), given)
    call(monkeypatch, moe, hidden, codes, scales)
    assert moe.got == [("vLLM's codes", "vLLM's scales")] and quantised == [given]


def test_outside_of_the_op_everything_is_vllms(monkeypatch, quantised, device):
    hidden, codes, scales = rows_and_codes(device)

    class Fails(Layer):
        def _forward_impl(self, *arguments: Any) -> Any:
            raise RuntimeError("experts failed")

    with pytest.raises(RuntimeError, match="experts failed"):
        call(monkeypatch, Fails(quant_config()), hidden, codes, scales)
    getattr(no_dp_ep, layer.QUANTISER)(hidden, quant_config())
    assert quantised == [hidden]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, ""),
        ({"block": 64}, ""),
        ({"block": None}, "one scale a token or a tensor"),
        ({"block": None, "per_act_token_quant": True}, "one scale a token or a tensor"),
        ({"block": 32}, "groups of 32"),
    ],
    ids=str,
)
def test_which_quantisers_are_known(config, reason):
    why = layer.why_not_config(quant_config(**config))
    assert reason in why and bool(reason) == bool(why)


def test_quantiser_of_an_unknown_config_is_vllms(monkeypatch, quantised, device):
    hidden, codes, scales = rows_and_codes(device)
    moe = Layer(quant_config(block=None))
    call(monkeypatch, moe, hidden, codes, scales)
    assert quantised == [hidden]


def moe_layer(experts: Any, prepare: Any = PREPARE) -> torch.nn.Module:
    """A module that holds a kernel as vLLM's MoE layers do."""
    module = torch.nn.Module()
    module.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=experts, prepare_finalize=prepare))
    return module


def test_scales_of_a_layer(monkeypatch):
    experts = experts_layer.make_experts(SHAPE, experts_layer.make_weights(SHAPE, 128))
    for ue8m0 in (False, True):
        experts_layer.use_ue8m0(monkeypatch, ue8m0)
        assert layer.scales_of(moe_layer(experts), 256) == (128, "row", ue8m0)
    assert "rows of 192" in layer.scales_of(moe_layer(experts), 192)
    assert "hands rows to other ranks" in layer.scales_of(moe_layer(experts, SimpleNamespace()), 256)
    assert "no modular kernel" in layer.scales_of(torch.nn.Module(), 256)
    monkeypatch.setattr(type(experts), "expects_unquantized_inputs", True, raising=False)
    assert "quantises in its own kernel" in layer.scales_of(moe_layer(experts), 256)


def test_an_unknown_vllm_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(no_dp_ep, layer.QUANTISER, lambda a1, config, another_argument: None)
    with caplog.at_level("WARNING", "vllm.fusion_plugin"):
        layer.install()
        layer.install()
    assert "known: (a1, quant_config, defer_input_quant)" in layer.problem
    assert sum("experts quantise their input themselves" in r.message for r in caplog.records) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("block", [64, 128])
def test_bytes_of_vllm(block, ue8m0, monkeypatch, device):
    """What the op hands out is what vLLM's quantiser would have made."""
    experts_layer.use_ue8m0(monkeypatch, ue8m0)
    config = quant_config(block)
    for tokens in (1, 7, 64, 3000):
        scales = layer.scales_of(moe_layer(SimpleNamespace(quant_config=config)), SHAPE.hidden)
        hidden = torch.randn(tokens, SHAPE.hidden, device=device, dtype=torch.bfloat16) * 3
        want = getattr(no_dp_ep, layer.QUANTISER)(hidden, config)
        codes = group_fp8_quant(hidden, scales, quant_rounding=roundings.of(roundings.GROUP_QUANT).name)
        moe = Layer(config)
        call(monkeypatch, moe, hidden, *codes)
        for got, vllms in zip(moe.got[0], want, strict=True):
            assert got.dtype == vllms.dtype and got.stride() == vllms.stride()
            assert torch.equal(got.view(torch.uint8), vllms.view(torch.uint8))
        assert moe.got[0][0].dtype == FP8_DTYPE
