# SPDX-License-Identifier: Apache-2.0
"""ActivationQuantFusionPass on small modules: vLLM's own layers and op schemas, vLLM's own compiler, fake CUDA tensors."""

from __future__ import annotations

import fake_gpu
import pytest

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from recorder import Recording, count_ops  # noqa: E402
from trace_module import make_config, on_device, trace_module  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.activation import SiluAndMul  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402

from vllm_fusion_plugin import compat, plugin, report  # noqa: E402

PASS = "activation_quant_fusion_pass"
OURS = "vllm_fusion_plugin.silu_mul_{}_fp8_quant.default"
WIDTH = 512


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    plugin.register()
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())


class GroupQuantMLP(torch.nn.Module):
    """SiLU·mul and a group quantiser, as between the GEMMs of a block-FP8 MLP; a `between` on the way."""

    def __init__(self, group_size=128, column_major=False, tma_aligned=False, ue8m0=False, between=None):
        super().__init__()
        self.act = SiluAndMul()
        self.quant = QuantFP8(
            static=False,
            group_shape=GroupShape(1, group_size),
            column_major_scales=column_major,
            tma_aligned_scales=tma_aligned,
            use_ue8m0=ue8m0,
            **compat.uncompiled_layer(QuantFP8),
        )
        self.between = between or (lambda y: y)

    def forward(self, x):
        return self.quant(self.between(self.act(x)))


class StaticQuantMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.act = SiluAndMul()
        self.quant = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR, **compat.uncompiled_layer(QuantFP8))
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)

    def forward(self, x):
        return self.quant(self.act(x), self.scale)[0]


def trace(module, custom_ops=("none", "+quant_fp8"), width=WIDTH, dtype=torch.bfloat16, **pass_config) -> Recording:
    """`module` is a function that makes one, because layers choose their form under the config that compiles them."""
    config = make_config(list(custom_ops), dtype=dtype, fuse_act_quant=True, **pass_config)
    with set_current_vllm_config(config), on_device("cuda"):
        return trace_module(module(), (torch.empty(64, 2 * width, dtype=dtype),), config)


def outputs(graph):
    (result,) = next(n for n in graph.nodes if n.op == "output").args
    return [(n.meta["val"].shape, n.meta["val"].dtype, n.meta["val"].stride()) for n in result if n is not None]


def the_op(recording: Recording, kind: str):
    (graph,) = (s.after for s in recording.subgraphs)
    (node,) = (n for n in graph.nodes if str(n.target) == OURS.format(kind))
    return node


# What the op is told of vLLM's own SiLU·mul op: 0.20's rounds as eager does.
ROUNDING = {"native": "native", "custom_op": "custom_op" if compat.silu_and_mul_adds_zero() else "eager"}
FORMS = {
    "native+custom_op": ("none", "+quant_fp8"),
    "custom_op+custom_op": ("none", "+silu_and_mul", "+quant_fp8"),
    "native+native": ("none", "-quant_fp8"),
    "custom_op+native": ("none", "+silu_and_mul", "-quant_fp8"),
}
LAYOUTS = {"row": {}, "column": {"column_major": True}, "tma": {"column_major": True, "tma_aligned": True}}


# a trace takes a second: each group size with one of the two kinds of scales
@pytest.mark.parametrize(("group_size", "ue8m0"), [(64, False), (128, False), (128, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("forms", FORMS)
def test_group_quant_is_fused(forms, layout, ue8m0, group_size):
    act_form, quant_form = forms.split("+")
    if quant_form == "native" and layout == "tma":
        pytest.skip("forward_native knows no TMA alignment; it makes the column-major graph")
    make = lambda: GroupQuantMLP(group_size, ue8m0=ue8m0, **LAYOUTS[layout])  # noqa: E731
    recording = trace(make, FORMS[forms])

    assert recording.matches_by_graph()[PASS] == 1
    (subgraph,) = recording.subgraphs
    ops = count_ops(subgraph.after)
    assert ops[OURS.format("group")] == 1
    assert not {op for op in ops if op.startswith(("_C.", "aten.exp", "aten.div"))}
    assert outputs(subgraph.after) == outputs(subgraph.before)
    assert the_op(recording, "group").args[1:] == (
        group_size,
        layout != "row",
        layout == "tma",
        ue8m0,
        1e-10,
        ROUNDING[act_form],
        quant_form,
    )


@pytest.mark.parametrize("forms", FORMS)
def test_static_quant_is_fused(forms):
    act_form, quant_form = forms.split("+")
    recording = trace(StaticQuantMLP, FORMS[forms])
    assert recording.matches_by_graph()[PASS] == 1
    assert the_op(recording, "static").args[2:] == (ROUNDING[act_form], quant_form)
    (subgraph,) = recording.subgraphs
    assert outputs(subgraph.after) == outputs(subgraph.before)


class Nvfp4MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.act = SiluAndMul()
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)

    def forward(self, x):
        y = self.act(x)
        codes = torch.empty(y.shape[0], y.shape[1] // 2, dtype=torch.uint8, device=y.device)
        rows = -(y.shape[0] // -128) * 128
        scales = torch.empty(rows, y.shape[1] // 64, dtype=torch.int32, device=y.device)
        torch.ops._C.scaled_fp4_quant.out(y, self.scale, True, output=codes, output_scale=scales)
        return codes, scales


@pytest.mark.parametrize("kernel", ["vllm", "ours"])
@pytest.mark.parametrize("act_form", ["native", "custom_op"])
def test_nvfp4_quant_is_fused(act_form, kernel):
    config = make_config(["none"] if act_form == "native" else ["none", "+silu_and_mul"], fuse_act_quant=True)
    config.additional_config = {"fusion_plugin": {"nvfp4_kernel": kernel}}
    with set_current_vllm_config(config), on_device("cuda"):
        recording = trace_module(Nvfp4MLP(), (torch.empty(64, 2 * WIDTH, dtype=torch.bfloat16),), config)
    assert recording.matches_by_graph()[PASS] == 1
    (subgraph,) = recording.subgraphs
    ours = "vllm_fusion_plugin.silu_mul_nvfp4_quant.default"
    assert count_ops(subgraph.after)[ours if kernel == "ours" else "_C.silu_and_mul_nvfp4_quant.default"] == 1
    assert outputs(subgraph.after) == outputs(subgraph.before)


@pytest.mark.parametrize("eliminate_noops", [True, False])
@pytest.mark.parametrize("forms", FORMS)
def test_reshape_between_is_looked_through(forms, eliminate_noops):
    make = lambda: GroupQuantMLP(between=lambda y: y.view(-1, y.shape[-1]))  # noqa: E731
    recording = trace(make, FORMS[forms], eliminate_noops=eliminate_noops)
    assert recording.matches_by_graph()[PASS] == 1


def test_fp16_model():
    recording = trace(GroupQuantMLP, dtype=torch.float16)
    assert recording.matches_by_graph()[PASS] == 1


def test_precision_casts_round_as_the_custom_op_does():
    config = make_config(["none", "+quant_fp8"], fuse_act_quant=True)
    config.compilation_config.inductor_compile_config["emulate_precision_casts"] = True
    with set_current_vllm_config(config), on_device("cuda"):
        recording = trace_module(GroupQuantMLP(), (torch.empty(64, 2 * WIDTH, dtype=torch.bfloat16),), config)
    assert the_op(recording, "group").args[-2:] == ("eager", "custom_op")


# ---- what must not match ---------------------------------------------------------------------------------------------


def reasons() -> list[str]:
    return [m.reason for s in report.RECORDER.report.subgraphs for m in s.missed]


class UsedTwice(GroupQuantMLP):
    def forward(self, x):
        y = self.act(x)
        return *self.quant(y), y


class CalledDirectly(GroupQuantMLP):
    """vLLM's op called as no layer of vLLM calls it, with row-major scales."""

    codes, limit, told_column_major = torch.float8_e4m3fn, 448.0, False

    def forward(self, x):
        y = self.act(x)
        codes = torch.empty(y.shape, dtype=self.codes, device=y.device)
        scales = torch.empty(y.shape[0], y.shape[1] // 128, dtype=torch.float32, device=y.device)
        torch.ops._C.per_token_group_fp8_quant(
            y, codes, scales, 128, 1e-10, -self.limit, self.limit, False, self.told_column_major, False
        )
        return codes, scales


class WrongLayout(CalledDirectly):
    """Column-major by its flag, row-major by its strides: what the op would write is not what the pattern means."""

    told_column_major = True


class IntegerQuant(CalledDirectly):
    codes = torch.int8


class OtherRange(CalledDirectly):
    """Clamped to a smaller range than float8_e4m3fn has."""

    limit = 240.0


class Unquantised(GroupQuantMLP):
    def forward(self, x):
        return self.act(x)


@pytest.mark.parametrize("act", ["none", "+silu_and_mul"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (UsedTwice, "has 2 users"),
        (WrongLayout, "strides"),
        (IntegerQuant, "torch.int8"),
        (OtherRange, "'fp8_max': 240.0"),
        (lambda: GroupQuantMLP(group_size=32), "'group_size': 32"),
        (Unquantised, "leaves the compiled graph"),
    ],
)
def test_is_left_alone_and_explained(make, reason, act):
    recording = trace(make, ("none", "+quant_fp8", *([act] if act != "none" else [])))
    assert recording.matches_by_graph()[PASS] == 0
    (subgraph,) = recording.subgraphs
    assert not any(op.startswith("vllm_fusion_plugin") for op in count_ops(subgraph.after))
    assert any(reason in r for r in reasons()), reasons()


def test_flag_off_leaves_everything():
    config = make_config(["none", "+quant_fp8"], fuse_act_quant=False, fuse_norm_quant=False)
    with set_current_vllm_config(config), on_device("cuda"):
        recording = trace_module(GroupQuantMLP(), (torch.empty(64, 2 * WIDTH, dtype=torch.bfloat16),), config)
    assert recording.matches_by_graph()[PASS] == 0
    assert report.RECORDER.report.passes["ActivationQuantFusionPass"].startswith("off")


# ---- the pass and its manager ----------------------------------------------------------------------------------------


def make_pass(config):
    from vllm_fusion_plugin.passes.silu_mul_quant import ActivationQuantFusionPass

    return ActivationQuantFusionPass(config)


def test_stands_where_stock_stood():
    from vllm.compilation.passes.pass_manager import PostGradPassManager

    from vllm_fusion_plugin.pass_manager import FusionPassManager

    flags = {"fuse_act_quant": True, "fuse_norm_quant": True, "fuse_attn_quant": False}
    config = make_config(["none", "+quant_fp8"], **flags)
    stock, ours = PostGradPassManager(), FusionPassManager()
    stock.configure(config)
    ours.configure(config)
    assert [type(p).__name__ for p in ours.passes] == [type(p).__name__ for p in stock.passes]
    modules = {type(p).__name__: type(p).__module__ for p in ours.passes}
    assert modules["ActivationQuantFusionPass"] == "vllm_fusion_plugin.passes.silu_mul_quant"
    assert modules["NoOpEliminationPass"].startswith("vllm.")
    # stock's own module is as it was
    from vllm.compilation.passes import pass_manager

    assert pass_manager.ActivationQuantFusionPass.__module__.startswith("vllm.compilation")


def test_a_pass_that_cannot_be_built_leaves_stock(monkeypatch):
    from vllm_fusion_plugin import pass_manager

    def broken(name):
        raise ImportError("no kernels here")

    monkeypatch.setattr(pass_manager, "our_pass", broken)
    manager = pass_manager.FusionPassManager()
    manager.configure(make_config(["none", "+quant_fp8"], fuse_act_quant=True))
    (act,) = (p for p in manager.passes if type(p).__name__ == "ActivationQuantFusionPass")
    assert type(act).__module__.startswith("vllm.compilation")
    assert "no kernels here" in report.RECORDER.report.passes["ActivationQuantFusionPass"]


def test_a_manager_that_cannot_be_made_leaves_stock(monkeypatch):
    from vllm.compilation.passes.pass_manager import PostGradPassManager

    from vllm_fusion_plugin import pass_manager

    def broken(self):
        raise AttributeError("this vLLM's pass manager is another one")

    assert type(plugin.make_pass_manager()) is pass_manager.FusionPassManager
    monkeypatch.setattr(pass_manager.FusionPassManager, "__init__", broken)
    assert type(plugin.make_pass_manager()) is PostGradPassManager
    assert "this vLLM's pass manager is another one" in report.RECORDER.report.manager


@pytest.mark.parametrize("mine", [{"enabled": False}, {"no_such_setting": 1}])
def test_a_manager_made_too_early_is_stocks(mine):
    """vLLM makes it before it hashes the config, where the plugin takes itself out."""
    from vllm_fusion_plugin.pass_manager import FusionPassManager

    config = make_config(["none", "+quant_fp8"], fuse_act_quant=True)
    config.additional_config = {"fusion_plugin": mine}
    manager = FusionPassManager()
    manager.configure(config)
    (act,) = (p for p in manager.passes if type(p).__name__ == "ActivationQuantFusionPass")
    assert type(act).__module__.startswith("vllm.compilation")


def test_a_pattern_that_cannot_be_traced_is_left_out(monkeypatch):
    from vllm_fusion_plugin.passes import silu_mul_quant

    def broken(self, *inputs):
        raise TypeError("this vLLM's layer is another one")

    monkeypatch.setattr(silu_mul_quant.SiluMulGroupQuant, "pattern", broken)
    recording = trace(GroupQuantMLP)
    assert recording.matches_by_graph()[PASS] == 0
    (note,) = report.RECORDER.report.notes
    assert "this vLLM's layer is another one" in note


def test_settings_leave_a_pass_to_stock():
    from vllm_fusion_plugin.pass_manager import FusionPassManager

    config = make_config(["none", "+quant_fp8"], fuse_act_quant=True)
    config.additional_config = {"fusion_plugin": {"stock_passes": ["ActivationQuantFusionPass"]}}
    manager = FusionPassManager()
    manager.configure(config)
    (act,) = (p for p in manager.passes if type(p).__name__ == "ActivationQuantFusionPass")
    assert type(act).__module__.startswith("vllm.compilation")


def test_uuid_follows_patterns_sources_and_settings(monkeypatch):
    from vllm_fusion_plugin import fingerprint

    config = make_config(["none", "+quant_fp8"], fuse_act_quant=True)
    first = make_pass(config)
    assert make_pass(config).uuid() == first.uuid()
    fewer = make_pass(config)
    fewer.patterns.popitem()
    assert fewer.uuid() != first.uuid()
    monkeypatch.setattr(fingerprint, "source_hash", lambda: "other kernels")
    assert make_pass(config).uuid() != first.uuid()
    monkeypatch.undo()
    config.additional_config = {"fusion_plugin": {"use_pdl": False}}
    assert make_pass(config).uuid() != first.uuid()


def test_patterns_are_all_different():
    config = make_config(["none", "+quant_fp8"], fuse_act_quant=True)
    one = make_pass(config)
    one.trace_patterns()  # raises DuplicatePatternError if two look for the same graph
    assert len(one.patterns) > 40


def test_duplicates_are_refused():
    from vllm_fusion_plugin.passes.base import DuplicatePatternError

    config = make_config(["none", "+quant_fp8"], fuse_act_quant=True)
    one = make_pass(config)
    key, pattern = next(iter(one.patterns.items()))
    with pytest.raises(DuplicatePatternError, match="registered already"):
        one.register(pattern)
    one.patterns[f"{key} again"] = pattern
    with pytest.raises(DuplicatePatternError, match="same graph"):
        one.trace_patterns()


def test_patterns_are_dumped_where_vllm_dumps(tmp_path):
    config = make_config(["none", "+quant_fp8"], fuse_act_quant=True)
    config.compilation_config.debug_dump_path = tmp_path
    make_pass(config)
    (dump,) = tmp_path.rglob("patterns.activation_quant_fusion_pass.*.py")
    assert "per_token_group_fp8_quant" in dump.read_text()
