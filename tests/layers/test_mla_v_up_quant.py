# SPDX-License-Identifier: Apache-2.0
"""vLLM's own MLAAttention.forward_impl on CPU tensors, with the V up-projection that quantises and without."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_fusion_plugin import compat, report
from vllm_fusion_plugin.layers import mla_v_up_quant
from vllm_fusion_plugin.ops import calls, registry
from vllm_fusion_plugin.ops.quant import GroupScales, group_fp8_quant_reference

from . import mla_layer
from .mla_layer import (
    BATCHES,
    HEADS,
    LATENT,
    LAYOUTS,
    NOPE,
    ROPE,
    WIDTH,
    MLAAttention,
    V,
    attend,
    buffers,
    by_vllm,
    everything,
    make_layer,
    metadata,
    run,
)


def vllm_group_quant(x, codes, scales, group_size, eps, low, high, ue8m0, column_major, tma_aligned):
    """vLLM's CUDA op, which goes by the strides of its scales, in plain torch."""
    assert (eps, low, high) == (1e-10, -448.0, 448.0)
    if len(x) == 0:  # 0.20.2 asks even then
        return
    new_codes, new_scales = group_fp8_quant_reference(x, GroupScales(group_size, ue8m0=ue8m0), "custom_op")
    codes.copy_(new_codes)
    scales.copy_(new_scales)


@pytest.fixture(autouse=True)
def hooked(monkeypatch):
    monkeypatch.setattr(torch.ops._C, "per_token_group_fp8_quant", vllm_group_quant, raising=False)
    mla_layer.hook(monkeypatch)


class Owner:
    """What an engine is known by."""


def fused_rows(monkeypatch) -> list[int]:
    """How many rows each call of the op gets."""
    counts: list[int] = []
    op = mla_v_up_quant.mla_v_up_group_fp8_quant

    def counted(attn_out, *args, **kwargs):
        counts.append(len(attn_out))
        op(attn_out, *args, **kwargs)

    monkeypatch.setattr(mla_v_up_quant, "mla_v_up_group_fp8_quant", counted)
    return counts


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("batch", BATCHES)
def test_bytes_of_vllm_and_zeros_behind(batch, group_size, layout, ue8m0, monkeypatch):
    layer, (rows, actual, decoded) = make_layer(), BATCHES[batch]
    counts = fused_rows(monkeypatch)
    want_codes, want_scales = by_vllm(layer, batch, group_size, layout, ue8m0)
    assert counts == []
    codes, scales = run(layer, batch, group_size, layout, ue8m0)

    assert counts == [decoded] * (decoded > 0)
    assert torch.equal(codes[:actual], want_codes[:actual])
    assert torch.equal(scales[:actual], want_scales[:actual])
    assert not codes[actual:].any()
    assert not scales[actual:].any()
    assert (everything(scales) >= 0).all()  # padding between columns, where vLLM leaves what there was
    if rows > actual:
        assert want_codes[actual:].any()


def test_fp16():
    layer = make_layer(torch.float16)
    for got, want in zip(run(layer, "mixed"), by_vllm(layer, "mixed"), strict=True):
        assert torch.equal(got, want)


def test_a_wrong_op_changes_decode_rows_only(monkeypatch):
    layer = make_layer()
    right, _ = run(layer, "mixed")
    op = mla_v_up_quant.mla_v_up_group_fp8_quant
    monkeypatch.setattr(
        mla_v_up_quant, "mla_v_up_group_fp8_quant", lambda x, *args, **kwargs: op(x.flip(0), *args, **kwargs)
    )
    wrong, _ = run(layer, "mixed")
    assert (wrong != right).any(dim=1).tolist() == [True, False, True] + [False] * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_profile_run_gives_zeros(layout):
    layer, (rows, *_) = make_layer(), BATCHES["mixed"]
    codes, scales = buffers(rows, 128, layout)
    q = torch.zeros(rows, HEADS, NOPE + ROPE, dtype=torch.bfloat16)
    layer.forward_impl(q, q, q, q, None, output=codes, output_block_scale=scales, quant_group_size=128)
    assert not codes.view(torch.uint8).any()
    assert not everything(scales).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_profile_run_tells_the_warm_up_what_decoding_calls(layout, monkeypatch):
    monkeypatch.setattr(calls, "CALLS", {})
    monkeypatch.setattr(calls, "_recording", True)
    layer, (rows, *_) = make_layer(), BATCHES["mixed"]
    codes, scales = buffers(rows, 128, layout)
    q = torch.zeros(rows, HEADS, NOPE + ROPE, dtype=torch.bfloat16)
    layer.forward_impl(q, q, q, q, None, output=codes, output_block_scale=scales, quant_group_size=128)
    [made] = calls.CALLS

    called = []
    op = mla_v_up_quant.mla_v_up_group_fp8_quant

    def noted(*tensors, **kwargs):
        called.append(calls.describe(registry.SIGNATURES[made.op], (*tensors, *kwargs.values()))[0])
        op(*tensors, **kwargs)

    monkeypatch.setattr(mla_v_up_quant, "mla_v_up_group_fp8_quant", noted)
    for batch in ("one-token", "mixed"):
        run(layer, batch, layout=layout)
    assert len(called) == 2
    for decoded in called:
        assert decoded._replace(arguments=decoded.arguments[:3]) == made._replace(arguments=made.arguments[:3])
        assert decoded.arguments[4:] == made.arguments[4:]
        # column-major scales start as far apart as there are tokens, which no kernel is compiled for
        assert decoded.arguments[3].strides[0] == made.arguments[3].strides[0]


def test_decode_is_noted():
    run(make_layer(), "prefill")
    assert report.RECORDER.report.notes == []
    run(make_layer(), "decode")
    assert report.RECORDER.report.notes == ["MLA's V up-projection quantises decode rows"]


# ---- vLLM's own way --------------------------------------------------------------------------------------------------


def same_as_vllm(layer, batch="mixed-padded", **kwargs) -> bool:
    """Padding included: zeros there would be ours."""
    pairs = zip(run(layer, batch, **kwargs), by_vllm(layer, batch, **kwargs), strict=True)
    return all(torch.equal(got, want) for got, want in pairs)


def small_heads(layer):
    layer.num_heads, layer.v_head_dim = 2 * HEADS, V // 2  # groups of 128 span two heads each
    layer.W_UK_T, layer.W_UV = layer.W_UK_T.repeat(2, 1, 1), layer.W_UV.repeat(2, 1, 1)[..., : V // 2]
    layer.impl.latent = layer.impl.latent.repeat(1, 2, 1)


def quantising_prefill(layer):
    layer.prefill_backend = SimpleNamespace(supports_quant_output=lambda key: True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (small_heads, "groups of 128 in heads of 64"),
        (quantising_prefill, "the prefill backend quantises its own rows"),
        (lambda layer: setattr(layer.impl, "masked_mha_available", True), "Impl may take its prefill rows"),
        (lambda layer: setattr(layer, "kv_lora_rank", 2 * LATENT), "W_UV has shape"),
        (lambda layer: setattr(layer, "W_UV", layer.W_UV.float()), "W_UV is torch.float32 on cpu, q torch.bfloat16"),
        (lambda layer: delattr(layer, "W_UV"), "W_UV is None"),
        (lambda layer: setattr(layer, "use_pcp", True), "context parallelism"),
        (lambda layer: setattr(layer.impl, "dcp_world_size", 2), "context parallelism"),
        (lambda layer: setattr(layer, "is_amx_bmm_enabled", True), "another kernel (is_amx_bmm_enabled)"),
        (lambda layer: setattr(layer, "is_aiter_triton_fp8_bmm_enabled", True), "another kernel (is_aiter_triton_fp8"),
    ],
)
def test_what_it_is_not_made_for(change, reason):
    layer = make_layer()
    codes, scales = buffers(7, 128, "row")
    q = torch.zeros(7, HEADS, NOPE + ROPE, dtype=torch.bfloat16)
    assert mla_v_up_quant.why_not(make_layer(), q, codes, scales, 128) is None
    change(layer)
    assert reason in mla_v_up_quant.why_not(layer, q, codes, scales, 128)


def test_buffers_it_is_not_made_for():
    layer, (codes, scales) = make_layer(), buffers(7, 128, "row")
    q = torch.zeros(7, HEADS, NOPE + ROPE, dtype=torch.bfloat16)
    for codes_, scales_, reason in (
        (codes[:, :128], scales, "the output has shape (7, 128)"),
        (torch.cat([codes, codes], dim=1)[:, :WIDTH], scales, "strides (768, 1), not [tokens, 384] contiguous"),
        (codes, scales[:5], "the scales are torch.float32 of shape (5, 3)"),
        (codes, scales.int(), "the scales are torch.int32"),
    ):
        assert mla_v_up_quant.why_not(layer, q, codes, scales, 128) is None
        assert reason in mla_v_up_quant.why_not(layer, q, codes_, scales_, 128)


def test_other_weights_are_looked_at_again():
    layer, (codes, scales) = make_layer(), buffers(7, 128, "row")
    q = torch.zeros(7, HEADS, NOPE + ROPE, dtype=torch.bfloat16)
    for weight, reason in ((layer.W_UV, None), (layer.W_UV.half(), "torch.float16"), (layer.W_UV, None)):
        layer.W_UV = weight
        said = mla_v_up_quant.why_not(layer, q, codes, scales, 128)
        assert said is reason or reason in said
    assert "torch.float16" in mla_v_up_quant.why_not(layer, q.half(), codes, scales, 128)
    assert "groups of 96" in mla_v_up_quant.why_not(layer, q, codes, scales, 96)


def test_replaced_weights_are_freed_at_once():
    """They are 1 GB in all of DeepSeek-V3's layers when weights are loaded anew."""
    layer = make_layer()
    run(layer, "mixed")
    for _ in range(2):
        before = weakref.ref(layer.W_UV)
        layer.W_UV = layer.W_UV.clone()
        gc.collect()
        assert before() is None
        run(layer, "mixed")


def test_a_note_is_in_the_report_of_the_layers_engine(monkeypatch):
    recorder, mine, other = report.RECORDER, Owner(), Owner()
    layer = make_layer()
    layer.layer_name = "model.layers.0.self_attn.attn"
    mine.static_forward_context = {layer.layer_name: layer}
    other.static_forward_context = {layer.layer_name: make_layer()}
    record = recorder.engine(mine)
    record.mla_v_up_quant = True
    assert recorder.engine(other) is not record  # compiled last
    run(layer, "decode")
    assert record.report.notes == ["MLA's V up-projection quantises decode rows"]
    assert recorder.engine(other).report.notes == []


def test_context_parallelism_that_is_not_known_yet(monkeypatch):
    """-1 up to 0.26, before the first step."""
    from vllm.distributed import parallel_state

    codes, scales = buffers(7, 128, "row")
    q = torch.zeros(7, HEADS, NOPE + ROPE, dtype=torch.bfloat16)
    for size, reason in ((1, None), (2, "context parallelism puts the output together after it")):
        layer = make_layer()
        layer.impl.dcp_world_size = -1
        monkeypatch.setattr(parallel_state, "get_dcp_group", lambda size=size: SimpleNamespace(world_size=size))
        assert mla_v_up_quant.why_not(layer, q, codes, scales, 128) == reason


def test_batch_invariance_is_left_to_vllm(monkeypatch):
    monkeypatch.setattr(compat, "batch_invariant", lambda: True)
    counts = fused_rows(monkeypatch)
    assert same_as_vllm(make_layer())
    assert counts == []
    assert report.RECORDER.report.notes == [
        "MLA's V up-projection does not quantise: VLLM_BATCH_INVARIANT asks for vLLM's own matrix product"
    ]


def test_heads_that_groups_span_are_left_to_vllm(monkeypatch):
    layer, counts = make_layer(), fused_rows(monkeypatch)
    small_heads(layer)
    assert same_as_vllm(layer)
    assert counts == []


def test_an_op_that_fails_is_left_to_vllm(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(mla_v_up_quant, "mla_v_up_group_fp8_quant", broken)
    layer = make_layer()
    codes, scales = run(layer, "mixed")
    want_codes, want_scales = by_vllm(layer, "mixed")
    assert torch.equal(codes, want_codes)
    assert torch.equal(scales, want_scales)
    assert not mla_v_up_quant._enabled
    assert same_as_vllm(layer)
    assert [r.message for r in caplog.records if "out of shared memory" in r.message] == caplog.messages[-1:]
    assert report.RECORDER.report.notes == [
        "MLA's V up-projection does not quantise: RuntimeError: out of shared memory"
    ]


class Elsewhere(MLAAttention):
    """Puts the up-projection into a buffer of its own first."""

    def _v_up_proj(self, x, out):
        buffer = torch.empty_like(out)
        super()._v_up_proj(x, buffer)
        out.copy_(buffer)


def test_a_subclass_that_projects_in_another_way(monkeypatch):
    layer, counts = make_layer(of=Elsewhere), fused_rows(monkeypatch)
    codes, scales = run(layer, "mixed")
    want_codes, want_scales = by_vllm(layer, "mixed")
    assert counts == []
    assert torch.equal(codes, want_codes)
    assert torch.equal(scales, want_scales)
    assert "not called as it is known to be" in report.RECORDER.report.notes[0]


def test_projection_outside_of_attention():
    layer = make_layer()
    out = torch.empty(4, WIDTH, dtype=torch.bfloat16)
    layer._v_up_proj(layer.impl.latent[:4], out=out)
    want = torch.einsum("mnl,nlv->mnv", layer.impl.latent[:4].float(), layer.W_UV.float())
    assert torch.equal(out.float(), want.reshape(4, WIDTH))


def test_unquantised_output_is_vllms(monkeypatch):
    layer, counts = make_layer(), fused_rows(monkeypatch)
    q = torch.zeros(7, HEADS, NOPE + ROPE, dtype=torch.bfloat16)
    out = torch.empty(7, WIDTH, dtype=torch.bfloat16)
    layer.forward_impl(q, q[:, 0, :LATENT], q[:, :1, :ROPE], torch.zeros(0), metadata(7, 7), output=out)
    assert counts == []
    assert torch.equal(out, torch.einsum("mnl,nlv->mnv", layer.impl.latent[:7], layer.W_UV).reshape(7, WIDTH))


def test_an_unsupported_group_is_vllms_error():
    with pytest.raises(ValueError, match="group_size=32"):
        run(make_layer(), "mixed", group_size=32)


def test_two_kinds_of_scales_are_vllms_error():
    codes, scales = buffers(7, 128, "row")
    with pytest.raises(AssertionError):  # not an attempt to quantise with one scale
        attend(make_layer(), "mixed", codes, scales, output_scale=scales)


def test_nvfp4_output_is_vllms(monkeypatch):
    layer, counts = make_layer(), fused_rows(monkeypatch)
    q = torch.zeros(7, HEADS, NOPE + ROPE, dtype=torch.bfloat16)
    codes = torch.ones(7, WIDTH // 2, dtype=torch.uint8)
    scales = torch.ones(128, WIDTH // 16, dtype=torch.uint8)
    layer.forward_impl(q, q, q, q, None, output=codes, output_scale=torch.ones(1), output_block_scale=scales)
    assert counts == []
    assert not codes.any()
    assert scales.all()
    assert report.RECORDER.report.notes == []


def test_layers_on_two_threads(monkeypatch):
    counts = fused_rows(monkeypatch)
    layers = [make_layer(), make_layer()]
    layers[1].W_UV = layers[1].W_UV * 2
    want = [by_vllm(layer, "mixed") for layer in layers]
    inside, got = threading.Barrier(2), [None, None]

    def attend(i):
        forward_mqa = layers[i].impl.forward_mqa

        def together(*args):
            inside.wait(60)  # both are between the start of attention and its up-projection
            return forward_mqa(*args)

        layers[i].impl.forward_mqa = together
        got[i] = run(layers[i], "mixed")

    threads = [threading.Thread(target=attend, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [3, 3]
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


# ---- installing ------------------------------------------------------------------------------------------------------


def test_each_engine_has_its_own_switch(monkeypatch):
    counts = fused_rows(monkeypatch)
    record = report.EngineRecord()
    monkeypatch.setattr(mla_v_up_quant, "_record_of", lambda layer: record)
    run(make_layer(), "decode")
    assert counts == []
    record.mla_v_up_quant = True
    run(make_layer(), "decode")
    assert counts == [5]


def test_waits_for_vllms_layers(monkeypatch):
    monkeypatch.setattr(mla_v_up_quant, "MODULE", "a module that nobody has imported")
    mla_v_up_quant.install()
    assert not mla_v_up_quant._enabled
    assert report.RECORDER.report.notes == []


class WithoutGroups:
    def forward_impl(self, q, attn_metadata, output, output_scale=None, output_block_scale=None): ...
    def _v_up_proj(self, x, out): ...


class WithAnotherProjection(MLAAttention):
    def _v_up_proj(self, x): ...


class ThatProjectsTwice:
    def _v_up_proj(self, x, out): ...

    def forward_impl(
        self,
        attn_metadata,
        output,
        output_scale=None,
        output_block_scale=None,
        quant_group_size=None,
        quant_scale_ue8m0=None,
    ):
        self._v_up_proj(output, output)
        self._v_up_proj(output, output)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (WithoutGroups, "takes no quant_group_size, quant_scale_ue8m0"),
        (WithAnotherProjection, "is _v_up_proj(self, x), not"),
        (ThatProjectsTwice, "calls _v_up_proj 2 times"),
    ],
)
def test_a_layer_of_another_make_is_left_alone(layer, reason, monkeypatch):
    if layer is WithAnotherProjection:  # undo the hook: the class is to be looked at as if for the first time
        monkeypatch.setattr(layer, "forward_impl", layer.forward_impl.__wrapped__)
    before = dict(vars(layer))
    monkeypatch.setattr(sys.modules[mla_v_up_quant.MODULE], "MLAAttention", layer)
    mla_v_up_quant.install()
    assert not mla_v_up_quant._enabled
    assert dict(vars(layer)) == before
    (note,) = report.RECORDER.report.notes
    assert reason in note


def test_a_platform_that_traces_attention(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "opaque_attention_op", classmethod(lambda cls: False))
    monkeypatch.setattr(sys.modules[mla_v_up_quant.MODULE], "MLAAttention", WithoutGroups)
    mla_v_up_quant.install()
    assert not mla_v_up_quant._enabled
    assert "traced by the compiler" in report.RECORDER.report.notes[0]
