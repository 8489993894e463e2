# SPDX-License-Identifier: Apache-2.0
"""AttnQuantFusionPass on small modules: vLLM's own attention layers and op schemas, its own compiler, fake CUDA tensors."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from vllm_fusion_plugin.graph import called_op
from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from trace_module import make_config, on_device, trace_module  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import (  # noqa: E402
    GroupShape,
    kFp8StaticTensorSym,
    kNvfp4Dynamic,
)
from vllm.utils import torch_utils  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402

from tests.forked import in_a_fork  # noqa: E402
from vllm_fusion_plugin import compat, plugin, report  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import Recording, count_ops  # noqa: E402

PASS = "attn_quant_fusion"
OP = "vllm.unified_attention_with_output"
HEADS, HEAD_SIZE = 4, 64
WIDTH = HEADS * HEAD_SIZE


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    plugin.register()
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())


class StaticQuant(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.quant = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR, **compat.uncompiled_layer(QuantFP8))
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)

    def forward(self, y):
        return self.quant(y, self.scale)[0]


class GroupQuant(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.quant = QuantFP8(static=False, group_shape=GroupShape(1, 128), **compat.uncompiled_layer(QuantFP8))

    def forward(self, y):
        return self.quant(y)[0]


class Nvfp4Quant(StaticQuant):
    def forward(self, y):
        codes = torch.empty(y.shape[0], y.shape[1] // 2, dtype=torch.uint8, device=y.device)
        rows = -(y.shape[0] // -128) * 128
        scales = torch.empty(rows, y.shape[1] // 64, dtype=torch.int32, device=y.device)
        torch.ops._C.scaled_fp4_quant.out(y, self.scale, True, output=codes, output_scale=scales)
        return codes, scales.view(torch.float8_e4m3fn)


class Layers(torch.nn.Module):
    """Attention layers and a quantiser after each; `able` says what each layer's backend can write."""

    def __init__(self, config, *able, quant=StaticQuant, backend="TRITON_ATTN", **attention):
        super().__init__()
        self.attention = torch.nn.ModuleList()
        for i, keys in enumerate(able):
            layer = Attention(
                HEADS,
                HEAD_SIZE,
                1.0,
                num_kv_heads=HEADS,
                prefix=f"model.layers.{i}.self_attn.attn",
                cache_config=config.cache_config,
                attn_backend=AttentionBackendEnum[backend].get_class(),
                **attention,
            )
            if keys is not None:
                layer.impl.fused_output_quant_supported = lambda key, keys=keys: key in keys
            self.attention.append(layer)
        self.quants = torch.nn.ModuleList(quant() for _ in able)

    def quantise(self, quant, y):
        return quant(y)

    def forward(self, q, k, v):
        return [self.quantise(quant, layer(q, k, v)) for layer, quant in zip(self.attention, self.quants, strict=True)]


STATIC, NVFP4 = (kFp8StaticTensorSym,), (kNvfp4Dynamic,)
BACKENDS_OWN = None


def trace(*able, make=Layers, custom_ops=("none", "+quant_fp8"), dtype=torch.bfloat16, **kwargs) -> Recording:
    config = make_config(
        list(custom_ops), dtype=dtype, fuse_attn_quant=True, fuse_norm_quant=False, fuse_act_quant=False
    )
    config.compilation_config.splitting_ops = []  # as vLLM does when it is asked for this fusion
    with set_current_vllm_config(config), on_device("cuda"):
        module = make(config, *able, **kwargs)
        inputs = tuple(torch.empty(64, WIDTH, dtype=dtype) for _ in range(3))
        return trace_module(module, inputs, config)


def the_graph(recording: Recording) -> torch.fx.Graph:
    (subgraph,) = recording.subgraphs
    return subgraph.after


def attention_calls(recording: Recording) -> list[torch.fx.Node]:
    return [n for n in the_graph(recording).nodes if called_op(n) == OP]


def given(node: torch.fx.Node) -> list[str]:
    return [name for name in ("output_scale", "output_block_scale") if node.kwargs[name] is not None]


def outputs(graph):
    (result,) = next(n for n in graph.nodes if n.op == "output").args
    return [(n.meta["val"].shape, n.meta["val"].dtype, n.meta["val"].stride()) for n in result]


def reasons() -> list[tuple[str, str]]:
    return [(m.module, m.reason) for s in report.RECORDER.report.subgraphs for m in s.missed if m.pass_name == PASS]


VARIANTS = {"custom_op": ("none", "+quant_fp8"), "native": ("none", "-quant_fp8")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_static_quant_is_fused(variant, dtype):
    recording = trace(BACKENDS_OWN, custom_ops=VARIANTS[variant], dtype=dtype)  # Triton attention says that it can
    assert recording.matches_by_graph()[PASS] == 1
    (node,) = attention_calls(recording)
    assert given(node) == ["output_scale"]
    assert node.kwargs["output"].meta["val"].shape[1:] == (HEADS, HEAD_SIZE)
    assert node.kwargs["output"].meta["val"].dtype == torch.float8_e4m3fn
    (subgraph,) = recording.subgraphs
    assert not {op for op in count_ops(subgraph.after) if op.startswith(("_C.", "prims.convert_element_type"))}
    assert outputs(subgraph.after) == outputs(subgraph.before)
    (found,) = report.RECORDER.report.subgraphs[0].found
    assert found.pattern == f"attention+static[{variant}]"


def test_nvfp4_quant_is_fused():
    recording = trace(NVFP4, quant=Nvfp4Quant)
    assert recording.matches_by_graph()[PASS] == 1
    (node,) = attention_calls(recording)
    assert given(node) == ["output_scale", "output_block_scale"]
    assert node.kwargs["output"].meta["val"].shape[1:] == (HEADS, HEAD_SIZE // 2)
    assert node.kwargs["output_block_scale"].meta["val"].dtype == torch.float8_e4m3fn
    (subgraph,) = recording.subgraphs
    assert not {op for op in count_ops(subgraph.after) if op.startswith("_C.")}


def test_layers_are_asked_one_by_one():
    recording = trace(STATIC, (), STATIC, NVFP4)
    assert recording.matches_by_graph()[PASS] == 2
    assert [given(node) for node in attention_calls(recording)] == [["output_scale"], [], ["output_scale"], []]
    assert {module for module, _ in reasons()} == {"quants.1.quant", "quants.3.quant"}
    assert {reason for _, reason in reasons()} == {
        "attention+static[custom_op]: TRITON_ATTN cannot write FP8 with one static scale"
    }


class InParts(Layers):
    """One of several layers; the code compiled for it may serve the others."""

    def forward(self, q, k, v):
        return [self.quants[0](self.attention[0](q, k, v))]


@pytest.mark.parametrize(("other", "matches"), [(STATIC, 1), ((), 0)])
def test_a_part_of_the_model_counts_for_all_layers(other, matches):
    recording = trace(STATIC, other, make=InParts)
    assert recording.matches_by_graph()[PASS] == matches


@in_a_fork  # registers ops
def test_layer_names_as_strings(monkeypatch):
    """With VLLM_USE_LAYERNAME=0 names are strings in the graph, and a pattern matches one layer. vLLM reads that when it is
    imported, so here its ops are replaced by ones of their schema that take strings."""
    library = torch.library.Library("test_attn_quant", "FRAGMENT")
    for name in ("unified_attention_with_output", "unified_kv_cache_update"):
        schema = str(getattr(torch.ops.vllm, name).default._schema).removeprefix("vllm::")
        library.define(re.sub(r"\w+ layer_name", "str layer_name", schema))
        fake = (lambda key, *_: key.new_empty(0)) if name == "unified_kv_cache_update" else lambda *_, **__: None
        torch.library.register_fake(f"test_attn_quant::{name}", fake, lib=library)
        monkeypatch.setattr(torch.ops.vllm, name, getattr(torch.ops.test_attn_quant, name))
    monkeypatch.setattr(torch_utils, "_USE_LAYERNAME", False)

    recording = trace(STATIC, (), STATIC)
    assert recording.matches_by_graph()[PASS] == 2
    calls = [n for n in the_graph(recording).nodes if called_op(n).startswith("test_attn_quant.unified_attention")]
    assert [given(node) for node in calls] == [["output_scale"], [], ["output_scale"]]
    assert [node.kwargs["layer_name"] for node in calls] == [f"model.layers.{i}.self_attn.attn" for i in range(3)]
    found = {f.pattern for s in report.RECORDER.report.subgraphs for f in s.found}
    assert found == {f"attention[model.layers.{i}.self_attn.attn]+static[custom_op]" for i in (0, 2)}


class WithoutCacheUpdate(Layers):
    """As where a layer shares another one's KV cache, or its backend updates the cache inside."""

    def forward(self, q, k, v):
        for layer in self.attention:
            layer.kv_sharing_target_layer_name = "another"
        return super().forward(q, k, v)


def test_without_cache_update():
    recording = trace(STATIC, make=WithoutCacheUpdate)
    (node,) = attention_calls(recording)
    assert node.kwargs["kv_cache_dummy_dep"] is None
    assert recording.matches_by_graph()[PASS] == 1


# ---- what must not match ---------------------------------------------------------------------------------------------


class UsedTwice(Layers):
    def quantise(self, quant, y):
        return quant(y), y


class Gated(Layers):
    """As in Qwen3-Next."""

    def quantise(self, quant, y):
        return quant(y * torch.sigmoid(y))


class Unquantised(Layers):
    def quantise(self, quant, y):
        return y


class ScalePerColumn(StaticQuant):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1, WIDTH, dtype=torch.float32), requires_grad=False)
        self.more = compat.static_quant_extra_arguments()

    def forward(self, y):
        codes = torch.empty(y.shape, dtype=torch.float8_e4m3fn, device=y.device)
        torch.ops._C.static_scaled_fp8_quant(codes, y, self.scale, **self.more)
        return codes


CAN = "FP8 with one static scale and NVFP4"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"make": UsedTwice},
            "has other readers besides an FP8 quantiser with a static scale (_C.static_scaled_fp8_quant): output;",
        ),
        ({"make": Gated}, f"attention (TRITON_ATTN) is followed by aten.mul, aten.sigmoid; fused are {CAN}"),
        ({"make": Unquantised}, "leaves the compiled graph here, unquantised"),
        ({"quant": ScalePerColumn}, f"{WIDTH} scales; fused for one scale a tensor"),
        (
            {"quant": GroupQuant},
            "attention (TRITON_ATTN) is followed by an FP8 quantiser in groups of 128 (_C.per_token_group_fp8_quant); with",
        ),
        (
            {"quant": GroupQuant, "custom_ops": VARIANTS["native"]},
            "attention (TRITON_ATTN) is followed by an FP8 quantiser in groups of 128 (in plain torch code); with",
        ),
        ({"quant": Nvfp4Quant}, "attention+nvfp4: TRITON_ATTN cannot write NVFP4"),
    ],
)
def test_is_left_alone_and_explained(changes, reason):
    recording = trace(STATIC, **changes)
    assert recording.matches_by_graph()[PASS] == 0
    (node,) = attention_calls(recording)
    assert given(node) == []
    ((_, explained),) = reasons()
    assert reason in explained
    left = "none of 1 quantisers fused; 1 left, see below"
    expected = "no quantiser seen in what was compiled" if changes.get("make") is Unquantised else left
    assert report.FusionReport(ranks=[report.RECORDER.report]).summary() == expected


def test_a_layer_that_vllm_does_not_know(monkeypatch):
    monkeypatch.setattr(compat, "attention_layers", lambda config, kind: {})
    recording = trace(STATIC)
    assert recording.matches_by_graph()[PASS] == 0
    ((_, explained),) = reasons()
    assert "no layer 'model.layers.0.self_attn.attn'" in explained


# ---- the pass --------------------------------------------------------------------------------------------------------


def make_pass(*able):
    from vllm_fusion_plugin.passes.attn_quant import AttnQuantFusionPass

    config = make_config(["none"], fuse_attn_quant=True)
    with set_current_vllm_config(config), on_device("cuda"):
        layers = Layers(config, *able)  # held: the config has them by reference
    return AttnQuantFusionPass(config), layers


def test_uuid_follows_what_backends_can_write():
    assert make_pass(STATIC, ())[0].uuid() == make_pass(STATIC, ())[0].uuid()
    assert make_pass(STATIC, ())[0].uuid() != make_pass(STATIC, STATIC)[0].uuid()
    assert make_pass(STATIC, ())[0].uuid() != make_pass((), STATIC)[0].uuid()


def test_patterns_differ():
    """Two that look for the same graph would be an error."""
    fusion, _ = make_pass(STATIC)
    fusion.trace_patterns()
    assert set(fusion.patterns) == {f"attention+{quant}" for quant in ("static[native]", "static[custom_op]", "nvfp4")}


def test_rocm_is_left_to_stock(monkeypatch):
    from vllm_fusion_plugin.passes import attn_quant

    monkeypatch.setattr(attn_quant, "current_platform", SimpleNamespace(is_rocm=lambda: True))
    with pytest.raises(NotImplementedError, match="CUDA forms only"):
        make_pass(STATIC)
