# SPDX-License-Identifier: Apache-2.0
"""MLAAttnQuantFusionPass on small modules: vLLM's own MLA layer and op schemas, its own compiler, fake CUDA tensors."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

from vllm_fusion_plugin.graph import called_op
from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from trace_module import make_config, on_device, trace_module  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.attention.mla_attention import MLAAttention, MLACommonImpl  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, kFp8Dynamic128Sym  # noqa: E402

from vllm_fusion_plugin import compat, plugin, report  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import Recording, count_ops  # noqa: E402

PASS = "mla_attn_quant_fusion"
OP = "vllm.unified_mla_attention_with_output"
HEADS, V, NOPE, ROPE, LATENT = 4, 128, 32, 16, 64
WIDTH = HEADS * V


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    plugin.register()
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())


class GroupQuant(torch.nn.Module):
    def __init__(self, group_size=128, column_major=False, tma_aligned=False, ue8m0=False):
        super().__init__()
        self.quant = QuantFP8(
            static=False,
            group_shape=GroupShape(1, group_size),
            column_major_scales=column_major,
            tma_aligned_scales=tma_aligned,
            use_ue8m0=ue8m0,
            **compat.uncompiled_layer(QuantFP8),
        )

    def forward(self, y):
        return self.quant(y)


class StaticQuant(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.quant = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR, **compat.uncompiled_layer(QuantFP8))
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)

    def forward(self, y):
        return self.quant(y, self.scale)[:1]


class Nvfp4Quant(StaticQuant):
    def forward(self, y):
        codes = torch.empty(y.shape[0], y.shape[1] // 2, dtype=torch.uint8, device=y.device)
        rows = -(y.shape[0] // -128) * 128
        scales = torch.empty(rows, y.shape[1] // 64, dtype=torch.int32, device=y.device)
        torch.ops._C.scaled_fp4_quant.out(y, self.scale, True, output=codes, output_scale=scales)
        return codes, scales.view(torch.float8_e4m3fn)


class Impl:
    """As vLLM's MLA backends, or one that can write `able` only."""

    def __init__(self, able=None):
        self.able = able

    def fused_output_quant_supported(self, key):
        return MLACommonImpl.fused_output_quant_supported(self, key) if self.able is None else key in self.able


class Layers(torch.nn.Module):
    """MLA layers, without what their forward does not need, and a quantiser after each."""

    def __init__(self, config, *able, quant=GroupQuant, quants=()):
        super().__init__()
        self.attention = torch.nn.ModuleList()
        for i, keys in enumerate(able):
            layer = MLAAttention.__new__(MLAAttention)
            torch.nn.Module.__init__(layer)
            layer.layer_name = f"model.layers.{i}.self_attn.attn"
            layer.impl, layer.attn_backend = Impl(keys), None
            layer.use_direct_call, layer.kv_cache_dtype = False, "auto"
            layer.calculate_kv_scales = False  # up to 0.26
            layer._k_scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)
            config.compilation_config.static_forward_context[layer.layer_name] = layer
            self.attention.append(layer)
        self.quants = torch.nn.ModuleList(make() for make in quants or [quant] * len(able))

    def attend(self, layer, q, kv_c, k_pe):
        return layer(q, kv_c, k_pe, output_shape=(q.shape[0], WIDTH))

    def quantise(self, quant, y):
        return quant(y)

    def forward(self, *inputs):
        results = []
        for layer, quant in zip(self.attention, self.quants, strict=True):
            results += self.quantise(quant, self.attend(layer, *inputs))
        return results


BACKENDS_OWN = None


def trace(*able, make=Layers, custom_ops=("none", "+quant_fp8"), dtype=torch.bfloat16, **kwargs) -> Recording:
    flags = {"fuse_attn_quant": True, "fuse_norm_quant": False, "fuse_act_quant": False}
    config = make_config(list(custom_ops), dtype=dtype, **flags)
    config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla = False  # asks layers for more than these have
    config.compilation_config.splitting_ops = []  # as vLLM does when it is asked for this fusion
    with set_current_vllm_config(config), on_device("cuda"):
        module = make(config, *able, **kwargs)
        shapes = ((64, HEADS, NOPE + ROPE), (64, LATENT), (64, 1, ROPE))
        return trace_module(module, tuple(torch.empty(shape, dtype=dtype) for shape in shapes), config)


def attention_calls(recording: Recording) -> list[torch.fx.Node]:
    (subgraph,) = recording.subgraphs
    return [n for n in subgraph.after.nodes if called_op(n) == OP]


def quantised(node: torch.fx.Node) -> dict:
    """What an attention call is told about its output, besides the buffers."""
    names = ("quant_group_size", "quant_scale_ue8m0", "quant_col_major", "quant_tma_aligned")
    return {name: node.kwargs.get(name) for name in names}


def outputs(graph):
    (result,) = next(n for n in graph.nodes if n.op == "output").args
    return [(n.meta["val"].shape, n.meta["val"].dtype, n.meta["val"].stride()) for n in result]


ALONE = "; it runs this package's kernel, by itself"


def reasons() -> list[tuple[str, str]]:
    return [(m.module, m.reason) for s in report.RECORDER.report.subgraphs for m in s.missed if m.pass_name == PASS]


VARIANTS = {"custom_op": ("none", "+quant_fp8"), "native": ("none", "-quant_fp8")}
LAYOUTS = {"row": {}, "column": {"column_major": True}, "tma": {"column_major": True, "tma_aligned": True}}


def test_group_quants_are_fused():
    """One graph with a layer for each: a trace of its own takes a second."""
    kinds = list(itertools.product(LAYOUTS, (64, 128), (False, True)))
    quants = [partial(GroupQuant, group_size, ue8m0=ue8m0, **LAYOUTS[layout]) for layout, group_size, ue8m0 in kinds]
    recording = trace(*[BACKENDS_OWN] * len(kinds), quants=quants)
    assert recording.matches_by_graph()[PASS] == len(kinds)
    (subgraph,) = recording.subgraphs
    assert not {op for op in count_ops(subgraph.after) if op.startswith("_C.")}
    assert outputs(subgraph.after) == outputs(subgraph.before)
    for node, (layout, group_size, ue8m0) in zip(attention_calls(recording), kinds, strict=True):
        assert quantised(node) == {
            "quant_group_size": group_size,
            "quant_scale_ue8m0": ue8m0,
            "quant_col_major": layout != "row",
            "quant_tma_aligned": layout == "tma",
        }
        assert node.kwargs["output"].meta["val"].dtype == torch.float8_e4m3fn
        assert node.kwargs["output_scale"] is None
        assert node.kwargs["output_block_scale"].meta["val"].shape[1] == WIDTH // group_size


def test_fp16_model():
    assert trace(BACKENDS_OWN, dtype=torch.float16).matches_by_graph()[PASS] == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_static_quant_is_fused(variant):
    recording = trace(BACKENDS_OWN, custom_ops=VARIANTS[variant], quant=StaticQuant)
    assert recording.matches_by_graph()[PASS] == 1
    (node,) = attention_calls(recording)
    assert node.kwargs["output_scale"] is not None
    assert node.kwargs["output_block_scale"] is None
    (subgraph,) = recording.subgraphs
    assert not {op for op in count_ops(subgraph.after) if op.startswith(("_C.", "prims.convert_element_type"))}
    assert outputs(subgraph.after) == outputs(subgraph.before)


def test_nvfp4_quant_is_fused():
    recording = trace(BACKENDS_OWN, quant=Nvfp4Quant)
    assert recording.matches_by_graph()[PASS] == 1
    (node,) = attention_calls(recording)
    assert node.kwargs["output_scale"] is not None
    assert node.kwargs["output_block_scale"].meta["val"].dtype == torch.float8_e4m3fn
    assert node.kwargs["output"].meta["val"].shape[1:] == (WIDTH // 2,)
    (subgraph,) = recording.subgraphs
    assert not {op for op in count_ops(subgraph.after) if op.startswith("_C.")}


def test_layers_are_asked_one_by_one():
    recording = trace(BACKENDS_OWN, (), (kFp8Dynamic128Sym,))
    assert recording.matches_by_graph()[PASS] == 2
    assert [quantised(node)["quant_group_size"] for node in attention_calls(recording)] == [128, None, 128]
    assert reasons() == [
        ("quants.1.quant", "mla_attention+group128[custom_op,row]: Impl cannot write FP8 in groups of 128" + ALONE)
    ]


class ReplicatedQuery(Layers):
    """As under decode context parallelism: queries of all ranks' heads besides this rank's."""

    def attend(self, layer, q, kv_c, k_pe):
        return layer(q, kv_c, k_pe, output_shape=(q.shape[0], WIDTH), q_dcp_replicated=q + 1)


def test_replicated_query_is_kept():
    if not compat.op_takes(torch.ops.vllm.unified_mla_attention_with_output.default, "q_dcp_replicated"):
        pytest.skip("this vLLM has none")
    recording = trace(BACKENDS_OWN, make=ReplicatedQuery)
    assert recording.matches_by_graph()[PASS] == 1
    (node,) = attention_calls(recording)
    assert node.kwargs["q_dcp_replicated"].target is torch.ops.aten.add.Tensor


# ---- what must not match ---------------------------------------------------------------------------------------------


class UsedTwice(Layers):
    def quantise(self, quant, y):
        return *quant(y), y


class CalledDirectly(torch.nn.Module):
    """vLLM's op called as no layer of vLLM calls it, with row-major scales."""

    limit, eps, told_column_major = 448.0, 1e-10, False

    def forward(self, y):
        codes = torch.empty(y.shape, dtype=torch.float8_e4m3fn, device=y.device)
        scales = torch.empty(y.shape[0], WIDTH // 128, dtype=torch.float32, device=y.device)
        torch.ops._C.per_token_group_fp8_quant(
            y, codes, scales, 128, self.eps, -self.limit, self.limit, False, self.told_column_major, False
        )
        return codes, scales


class WrongLayout(CalledDirectly):
    """Column-major by its flag, row-major by its strides."""

    told_column_major = True


class OtherEps(CalledDirectly):
    """The attention op has an epsilon of its own."""

    eps = 1e-6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"make": UsedTwice},
            "(Impl) has other readers besides an FP8 quantiser in groups of 128 (in this package's op): output;",
        ),
        (
            {"custom_ops": VARIANTS["native"]},
            "(Impl) is followed by an FP8 quantiser in groups of 128 (in plain torch code); fused is vLLM's op",
        ),
        ({"quant": partial(GroupQuant, 32)}, "called with {'group_size': 32"),
        ({"quant": WrongLayout}, "strides"),
        ({"quant": OtherEps}, "fused for eps 1e-10"),
    ],
)
def test_is_left_alone_and_explained(changes, reason):
    recording = trace(BACKENDS_OWN, **changes)
    assert recording.matches_by_graph()[PASS] == 0
    (node,) = attention_calls(recording)
    assert node.kwargs["output_block_scale"] is None
    ((_, explained),) = reasons()
    assert reason in explained


# ---- the pass --------------------------------------------------------------------------------------------------------


def make_pass():
    from vllm_fusion_plugin.passes.mla_attn_quant import MLAAttnQuantFusionPass

    return MLAAttnQuantFusionPass(make_config(["none"], fuse_attn_quant=True))


def test_an_op_without_group_arguments(monkeypatch):
    op_takes = compat.op_takes
    monkeypatch.setattr(compat, "op_takes", lambda op, *names: op_takes(op, *names) and "quant_group_size" not in names)
    assert not [key for key in make_pass().patterns if "group" in key]
    assert report.RECORDER.report.notes == ["mla_attn_quant_fusion: this vLLM's MLA op writes no FP8 in groups"]


def test_patterns():
    keys = set(make_pass().patterns)
    assert len(keys) == 2 + 1 + 2 * 3 * 2
    assert {"mla_attention+nvfp4", "mla_attention+static[native]", "mla_attention+group64[custom_op,tma,ue8m0]"} < keys


@pytest.mark.slow
def test_deepseek_v3(trace_model):
    """All layers, as with vLLM's own pass on an H200. The whole model is one graph, or attention would not be in any."""
    trace = trace_model(
        "deepseek-v3-5layers",
        plugin=True,
        env={"VLLM_USE_DEEP_GEMM": "0", "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0"},
        pass_config={"fuse_attn_quant": True},
        compilation_config={"use_inductor_graph_partition": True},
    )
    assert {"AttnQuantFusionPass", "MLAAttnQuantFusionPass"} <= {
        path.rpartition(".")[2] for path in trace["passes"] if path.startswith("vllm_fusion_plugin.passes.")
    }
    assert trace["matches_by_layer"][PASS] == trace["match_table"][PASS] == 5
    assert trace["matches_by_layer"]["attn_quant_fusion"] == trace["match_table"]["attn_quant_fusion"] == 0
    (subgraph,) = trace["plugin"]["subgraphs"]
    found = [f for f in subgraph["found"] if f["pass_name"] == PASS]
    assert {f["pattern"] for f in found} == {"mla_attention+group128[custom_op,column]"}
    assert sorted(f["module"] for f in found) == [f"layers.{i}.self_attn.mla_attn" for i in range(5)]
    assert not [m for m in subgraph["missed"] if m["pass_name"] == PASS]
    (graph,) = trace["graphs"]
    assert graph["ops_after"][f"{OP}.default"] == 5
