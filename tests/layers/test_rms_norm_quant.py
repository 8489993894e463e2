# SPDX-License-Identifier: Apache-2.0
"""vLLM's RMSNorm before its MLPs, outside of compiled code, with the norm writing codes and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_fusion_plugin import compat, plugin, report, settings, warmup
from vllm_fusion_plugin.kernels.rounding import FLASHINFER_ROWS
from vllm_fusion_plugin.layers import quantised_input, silu_mul_quant
from vllm_fusion_plugin.layers import rms_norm_quant as layer
from vllm_fusion_plugin.ops import calls

from . import mlp_layer
from .mlp_layer import HIDDEN, make, rows

TRIED = [1, FLASHINFER_ROWS]


@pytest.fixture(scope="module", autouse=True)
def groups():
    yield
    mlp_layer.no_rank()


@pytest.fixture(autouse=True)
def config(monkeypatch):
    mlp_layer.multiply_on_cpu(monkeypatch)
    if not compat.has_ir_op("fused_add_rms_norm"):
        pytest.skip("this vLLM's norms are left to it")
    monkeypatch.setattr(layer, "_problem", "")
    monkeypatch.setattr(calls, "_recording", True)  # as before an engine serves
    with mlp_layer.engine() as made, torch.inference_mode():
        yield made


@pytest.fixture
def fused_rows(monkeypatch) -> list[int]:
    """Rows of each call of our op."""
    made: list[int] = []
    op = layer.rms_norm_group_fp8_quant

    def counted(norm, *args, **kwargs):
        made.append(len(norm.x))
        return op(norm, *args, **kwargs)

    monkeypatch.setattr(layer, "rms_norm_group_fp8_quant", counted)
    return made


class Decoder(torch.nn.Module):
    """Two norms, each read by an MLP, and the first by a router, too; between norm and MLP, `between`."""

    def __init__(self, between: Any = lambda y: y) -> None:
        super().__init__()
        self.first, self.second, self.unread = (norm() for _ in range(3))
        self.mlp, self.other = (mlp_layer.with_custom_quantisers(make(n)) for n in ("DeepseekV2MLP", "LlamaMLP"))
        self.between = between

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.first(x)
        routed = y.float().sum(-1)
        y, total = self.second(self.mlp(self.between(y)), x)
        return routed, self.unread(self.other(self.between(y))), total


def norm() -> RMSNorm:
    made = RMSNorm(HIDDEN, eps=1e-6, dtype=torch.bfloat16)
    made.weight.data = (rows(1)[0] / 8 + 1).to(rows(1).device)
    return made


def record() -> report.EngineRecord:
    made = report.EngineRecord()
    made.norms_left = ""
    return made


def run(decoder: Decoder, count: int) -> list[torch.Tensor]:
    return [out.clone() for out in decoder(rows(count).clone())]


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    """The same bytes; on a GPU, up to the order in which squares are added up."""
    if mlp_layer.is_cpu():
        return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    return all(torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05) for a, b in zip(got, want, strict=True))


def boundaries(config: Any, decoder: Decoder, of: report.EngineRecord | None = None) -> tuple[list[str], list[str]]:
    found, missed = layer.boundaries(decoder, config, of or record())
    return [f.module for f in found], [f"{m.module}: {m.reason}" for m in missed]


def test_rows_of_vllm_and_codes_for_who_reads_them(config, fused_rows):
    decoder = Decoder()
    counts = (3, 1, 33, 2)
    want = [run(decoder, count) for count in counts]
    layer.attach(decoder, config)
    for count, expected in zip(counts, want, strict=True):
        assert same(run(decoder, count), expected)
    assert fused_rows == [*TRIED, 1, *TRIED, 1, 33, 33, 2, 2]  # watched once, then tried out
    assert boundaries(config, decoder) == (["first", "second"], [])
    patterns = [f.pattern for f in layer.boundaries(decoder, config, record())[0]]
    assert [p.partition("[")[0] for p in patterns] == ["rms_norm", "fused_add_rms_norm"]
    assert all("+group128[" in p and p.endswith("+norm") for p in patterns)


def test_linear_layers_that_are_handed_nothing_are_told_of(config, monkeypatch):
    """Of a decoder in which only one MLP reads a norm's very result. A layer that does not run quantises nothing."""
    decoder = Decoder()
    decoder.idle = make("DeepseekV2MLP")
    decoder.other.forward = lambda y: type(decoder.other).forward(decoder.other, y.clone())
    layer.attach(decoder, config)
    silu_mul_quant.attach(decoder, config)
    for _ in range(3):
        run(decoder, 4)
    told = layer.readers(decoder, config) | silu_mul_quant.readers(decoder, config)
    missed = quantised_input.left(decoder, config, told)
    assert [(m.pass_name, m.module) for m in missed] == [("none", "other.gate_up_proj")]


def test_linear_layers_do_not_quantise(config, monkeypatch):
    decoder = Decoder()
    kernel = decoder.mlp.gate_up_proj.quant_method.fp8_linear
    if not kernel.apply_input_quant:
        pytest.skip("this machine's kernel quantises inside")
    layer.attach(decoder, config)
    for _ in range(2):
        run(decoder, 4)
    quantise, called = kernel.quant_fp8, []
    monkeypatch.setattr(kernel, "quant_fp8", lambda *args, **kwargs: called.append(args) or quantise(*args, **kwargs))
    run(decoder, 4)
    assert called == []


@pytest.mark.parametrize("between", [lambda y: y.clone(), lambda y: y.view_as(y), lambda y: y[:2]])
def test_what_is_not_the_norms_very_result_is_quantised(between, config, fused_rows):
    decoder = Decoder(between)
    if between(rows(4)).shape[0] == 2:
        decoder.second.forward = lambda y, total: (y, total)  # rows of another number
    want = run(decoder, 4)
    layer.attach(decoder, config)
    for _ in range(3):
        assert same(run(decoder, 4), want)
    assert fused_rows == []
    assert boundaries(config, decoder) == ([], [])


def test_rows_that_are_changed_before_they_are_read(config, fused_rows):
    decoder = Decoder(lambda y: y.mul_(2))
    want = run(decoder, 4)
    layer.attach(decoder, config)
    for _ in range(3):
        assert same(run(decoder, 4), want)
    assert fused_rows == []
    assert boundaries(config, decoder)[1] == [
        f"{n}: its rows are changed before they are read" for n in ("first", "second")
    ]


def test_readers_in_plain_torch_code(config, fused_rows):
    if not mlp_layer.is_cpu():
        pytest.skip("on a GPU vLLM has an op for it")
    decoder = Decoder()
    decoder.mlp = make("DeepseekV2MLP")
    layer.attach(decoder, config)
    for _ in range(2):
        run(decoder, 4)
    assert boundaries(config, decoder) == (["second"], ["first: its readers quantise in plain torch code"])


def test_readers_that_quantise_unlike(config, fused_rows):
    decoder = Decoder()
    want = run(decoder, 4)
    layer.attach(decoder, config)
    run(decoder, 4)
    linear = decoder.first._forward_method.readers.popitem()[1]
    scales = linear.quantiser.scales._replace(group_size=64)
    others = [linear, linear._replace(quantiser=linear.quantiser._replace(scales=scales))]
    decoder.first._forward_method.readers = dict(enumerate(others))
    assert same(run(decoder, 4), want)
    found, (missed,) = boundaries(config, decoder)
    assert found == ["second"] and missed.startswith("first: its readers quantise unlike: group128[")


def test_kernels_are_not_compiled_while_vllm_serves(config, monkeypatch, fused_rows):
    decoder = Decoder()
    want = run(decoder, 4)
    layer.attach(decoder, config)
    run(decoder, 4)
    monkeypatch.setattr(calls, "_recording", False)
    for _ in range(2):
        assert same(run(decoder, 4), want)
    assert fused_rows == []
    assert [m.partition(": ")[2].partition(",")[0] for m in boundaries(config, decoder)[1]] == [
        "vLLM has run the model once before it serves"
    ] * 2


def test_a_model_that_runs_once_before_vllm_serves(config, monkeypatch, fused_rows):
    decoder = Decoder()
    want = run(decoder, 4)
    layer.attach(decoder, config)
    run(decoder, 4)
    monkeypatch.setattr(warmup, "warm_up", lambda most: warmup.WarmUp(0, 0, 0.0))
    warmup.unless_done()
    assert not calls.recording() and fused_rows == TRIED * 2
    fused_rows.clear()
    assert same(run(decoder, 4), want)
    assert fused_rows == [4, 4] and boundaries(config, decoder) == (["first", "second"], [])


def test_a_gemm_that_fails_when_it_is_tried_out(config, monkeypatch):
    decoder = Decoder()
    want = run(decoder, 4)
    layer.attach(decoder, config)
    run(decoder, 4)

    def broken(*args):
        raise RuntimeError("no kernel")

    with monkeypatch.context() as patched:
        patched.setattr(quantised_input, "product", broken)
        assert same(run(decoder, 4), want)
    assert boundaries(config, decoder)[1] == ["first: RuntimeError: no kernel", "second: RuntimeError: no kernel"]


def test_an_op_that_fails_is_left_to_vllm(config, monkeypatch, caplog):
    decoder = Decoder()
    want = run(decoder, 4)
    layer.attach(decoder, config)
    for _ in range(2):
        run(decoder, 4)

    def broken(*args, **kwargs):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(layer, "rms_norm_group_fp8_quant", broken)
    assert same(run(decoder, 4), want)
    assert [m for m in caplog.messages if "out of shared memory" in m] == caplog.messages[-1:]
    assert boundaries(config, decoder)[1] == [f"{n}: RuntimeError: out of shared memory" for n in ("first", "second")]


def test_another_implementation_of_the_norm(config, monkeypatch, fused_rows):
    decoder = Decoder()
    want = run(decoder, 4)
    layer.attach(decoder, config)
    monkeypatch.setattr(compat, "ir_provider", lambda op, arguments: "oink")
    for _ in range(3):
        assert same(run(decoder, 4), want)
    assert fused_rows == []
    assert "first: RMSNorm runs in oink, whose roundings are not known" in boundaries(config, decoder)[1]


def test_norms_that_are_not_known(config, monkeypatch):
    made = norm()
    assert layer.why_not(made) == ""
    made.variance_size_override = 64
    assert "another width" in layer.why_not(made)
    monkeypatch.setattr(compat, "batch_invariant", lambda: True)
    assert "VLLM_BATCH_INVARIANT" in layer.why_not(norm())


def test_compiled_code_is_left_alone(config):
    decoder = Decoder()
    decoder.do_not_compile = False
    layer.attach(decoder, config)
    assert not isinstance(decoder.first._forward_method, layer.Norm)
    assert not hasattr(decoder.mlp.gate_up_proj.quant_method.fp8_linear.apply_weights, "_fusion_plugin")


def test_by_its_settings():
    on = settings.Settings(eager_rms_norm_quant=True)
    assert plugin._why_norms_left(on) == ""
    assert plugin._why_norms_left(settings.Settings()) == "off: eager_rms_norm_quant=false"
    assert "inexact=leave" in plugin._why_norms_left(on.model_copy(update={"inexact": "leave"}))
