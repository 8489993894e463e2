# SPDX-License-Identifier: Apache-2.0
"""ActivationQuantFusionPass on small modules: vLLM's own layers and op schemas, vLLM's own compiler, fake CUDA tensors."""

from __future__ import annotations

import functools
import itertools

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from trace_module import (  # noqa: E402
    check_graphs,
    group_rounding,
    make_config,
    our_ops,
    reasons,
    trace_branches,
)
from vllm.model_executor.layers.activation import SiluAndMul  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from tests.forked import in_a_fork  # noqa: E402
from vllm_fusion_plugin import compat, plugin, report  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import Recording, count_ops  # noqa: E402

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


def trace(
    *makers,
    custom_ops=("none", "+quant_fp8"),
    dtype=torch.bfloat16,
    settings=None,
    inductor=None,
    keep_passes=True,
    **pass_config,
):
    """`makers` are functions that make modules, which are traced side by side."""
    config = make_config(
        list(custom_ops), dtype=dtype, **{"fuse_act_quant": True, "fuse_norm_quant": False} | pass_config
    )
    config.additional_config = {"fusion_plugin": {"lone_group_quant": False} | (settings or {})}
    config.compilation_config.inductor_compile_config |= inductor or {}
    recording: Recording = trace_branches(makers, [(64, 2 * WIDTH)], config, keep_passes)
    check_graphs(recording)
    return recording


# How vLLM's own SiLU·mul op rounds: that of 0.20 does as eager does.
ROUNDING = {"native": "native", "custom_op": "custom_op" if compat.silu_and_mul_adds_zero() else "eager"}
VARIANTS = {
    "native+custom_op": ("none", "+quant_fp8"),
    "custom_op+custom_op": ("none", "+silu_and_mul", "+quant_fp8"),
    "native+native": ("none", "-quant_fp8"),
    "custom_op+native": ("none", "+silu_and_mul", "-quant_fp8"),
}
LAYOUTS = {"row": {}, "column": {"column_major": True}, "tma": {"column_major": True, "tma_aligned": True}}


def layouts(quant_rounding):
    """Scale layouts that a quantiser of that form can be asked for, with each group size and kind of scales."""
    for layout, (size, ue8m0) in itertools.product(LAYOUTS, ((64, False), (128, False), (128, True))):
        # forward_native knows no TMA alignment: it makes the column-major graph
        if quant_rounding == "custom_op" or layout != "tma":
            yield layout, size, ue8m0


@pytest.mark.parametrize("variant", VARIANTS)
def test_group_quant_is_fused(variant):
    act_rounding, quant_rounding = variant.split("+")
    cases = list(layouts(quant_rounding))
    makers = [functools.partial(GroupQuantMLP, size, ue8m0=ue8m0, **LAYOUTS[layout]) for layout, size, ue8m0 in cases]
    recording = trace(*makers, custom_ops=VARIANTS[variant])

    assert recording.matches_by_graph()[PASS] == len(cases)
    (subgraph,) = recording.subgraphs
    ops = count_ops(subgraph.after)
    assert ops[OURS.format("group")] == len(cases)
    assert not {op for op in ops if op.startswith(("_C.", "aten.exp", "aten.div"))}
    for (_, arguments), (layout, size, ue8m0) in zip(our_ops(recording), cases, strict=True):
        roundings = [ROUNDING[act_rounding], group_rounding(quant_rounding)]
        assert list(arguments.values())[1:] == [size, layout, ue8m0, *roundings, False]


@pytest.mark.parametrize("variant", VARIANTS)
def test_static_quant_is_fused(variant):
    act_rounding, quant_rounding = variant.split("+")
    recording = trace(StaticQuantMLP, custom_ops=VARIANTS[variant])
    assert recording.matches_by_graph()[PASS] == 1
    ((_, arguments),) = our_ops(recording)
    assert list(arguments.values())[2:] == [ROUNDING[act_rounding], quant_rounding]


class TokenQuantMLP(torch.nn.Module):
    def __init__(self, bounded=False, between=None):
        super().__init__()
        self.act = SiluAndMul()
        self.quant = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN, **compat.uncompiled_layer(QuantFP8))
        self.bound = torch.nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False) if bounded else None
        self.between = between or (lambda y: y)

    def forward(self, x):
        return self.quant(self.between(self.act(x)), scale_ub=self.bound)


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_quant_is_fused(variant):
    act_rounding, quant_rounding = variant.split("+")
    makers = [
        TokenQuantMLP,
        functools.partial(TokenQuantMLP, bounded=True),
        functools.partial(TokenQuantMLP, between=lambda y: y.view(-1, y.shape[-1])),
    ]
    recording = trace(*makers, custom_ops=VARIANTS[variant])
    assert recording.matches_by_graph()[PASS] == len(makers)
    (subgraph,) = recording.subgraphs
    assert not {op for op in count_ops(subgraph.after) if op.startswith(("_C.", "aten.exp", "aten.amax", "aten.max"))}
    for (op, arguments), bounded in zip(our_ops(recording), (False, True, False), strict=True):
        assert op == "silu_mul_token_fp8_quant"
        assert (arguments["scale_ub"] is not None) == bounded
        assert list(arguments.values())[2:] == [ROUNDING[act_rounding], quant_rounding, False]


class GroupQuantAndReader(GroupQuantMLP):
    def forward(self, x):
        y = self.act(x)
        return *self.quant(y), y


class TokenQuantAndReader(TokenQuantMLP):
    def forward(self, x):
        y = self.act(x)
        return *self.quant(self.between(y), scale_ub=self.bound), torch.relu(y)


WITH_READERS = {
    "group": (GroupQuantAndReader, functools.partial(GroupQuantAndReader, **LAYOUTS["tma"])),
    "token": (
        TokenQuantAndReader,
        functools.partial(TokenQuantAndReader, bounded=True),
        functools.partial(TokenQuantAndReader, between=lambda y: y.view(-1, y.shape[-1])),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_reader_gets_the_rows(variant):
    makers = [maker for makers in WITH_READERS.values() for maker in makers]
    recording = trace(*makers, GroupQuantMLP, custom_ops=VARIANTS[variant])
    if variant == "native+native":  # which rounds what the other reader gets, and not what is quantised
        assert recording.matches_by_graph()[PASS] == 1
        assert sum("other users too, which read it rounded" in reason for reason in reasons()) == len(makers)
        return
    assert recording.matches_by_graph()[PASS] == len(makers) + 1
    assert [arguments["keep_act"] for _, arguments in our_ops(recording)] == [True] * len(makers) + [False]
    (subgraph,) = recording.subgraphs
    assert not {op for op in count_ops(subgraph.after) if op.startswith(("_C.", "aten.exp", "aten.div"))}
    found = [f.pattern for s in report.RECORDER.report.subgraphs for f in s.found]
    assert sum(pattern.endswith("+act") for pattern in found) == len(makers)


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
@pytest.mark.parametrize("act_rounding", ["native", "custom_op"])
def test_nvfp4_quant_is_fused(act_rounding, kernel):
    custom_ops = ["none"] if act_rounding == "native" else ["none", "+silu_and_mul"]
    recording = trace(Nvfp4MLP, custom_ops=custom_ops, settings={"nvfp4_kernel": kernel})
    assert recording.matches_by_graph()[PASS] == 1
    (subgraph,) = recording.subgraphs
    ours = "vllm_fusion_plugin.silu_mul_nvfp4_quant.default"
    assert count_ops(subgraph.after)[ours if kernel == "ours" else "_C.silu_and_mul_nvfp4_quant.default"] == 1


@pytest.mark.parametrize("eliminate_noops", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_reshape_between_is_looked_through(variant, eliminate_noops):
    make = lambda: GroupQuantMLP(between=lambda y: y.view(-1, y.shape[-1]))  # noqa: E731
    recording = trace(make, custom_ops=VARIANTS[variant], eliminate_noops=eliminate_noops)
    assert recording.matches_by_graph()[PASS] == 1


def test_fp16_model():
    recording = trace(GroupQuantMLP, dtype=torch.float16)
    assert recording.matches_by_graph()[PASS] == 1


def test_precision_casts_round_as_the_custom_op_does():
    recording = trace(GroupQuantMLP, inductor={"emulate_precision_casts": True})
    ((_, arguments),) = our_ops(recording)
    assert (arguments["act_rounding"], arguments["quant_rounding"]) == ("eager", group_rounding("custom_op"))


# ---- what must not match ---------------------------------------------------------------------------------------------


class StaticQuantAndReader(StaticQuantMLP):
    def forward(self, x):
        y = self.act(x)
        return self.quant(y, self.scale)[0], y


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


LEFT_ALONE = {
    StaticQuantAndReader: "has other readers",
    WrongLayout: "strides",
    IntegerQuant: "torch.int8",
    OtherRange: "'fp8_max': 240.0",
    functools.partial(GroupQuantMLP, group_size=32): "'group_size': 32",
    Unquantised: "leaves the compiled graph",
}


@pytest.mark.parametrize("act", ["-silu_and_mul", "+silu_and_mul"])
def test_is_left_alone_and_explained(act):
    recording = trace(*LEFT_ALONE, custom_ops=("none", "+quant_fp8", act))
    assert recording.matches_by_graph()[PASS] == 0
    assert not our_ops(recording)
    said = reasons()
    assert len(said) == len(LEFT_ALONE), said
    for reason in LEFT_ALONE.values():
        assert sum(reason in r for r in said) == 1, (reason, said)
    left = len(LEFT_ALONE) - 1  # Unquantised
    summary = report.FusionReport(ranks=[report.RECORDER.report]).summary()
    assert summary == f"none of {left} quantisers fused; {left} left, see below"


def test_flag_off_leaves_everything():
    recording = trace(GroupQuantMLP, fuse_act_quant=False)
    assert recording.matches_by_graph()[PASS] == 0
    assert not our_ops(recording)
    assert report.RECORDER.report.passes["ActivationQuantFusionPass"].startswith("off")


# ---- the pass and its manager ----------------------------------------------------------------------------------------


ONLY_ACT = {"fuse_act_quant": True, "fuse_norm_quant": False}  # vLLM traces its norm patterns at once, for seconds


def make_pass(config):
    from vllm_fusion_plugin.passes.silu_mul_quant import ActivationQuantFusionPass

    return ActivationQuantFusionPass(config)


def test_stands_where_stock_stood():
    from vllm.compilation.passes.pass_manager import PostGradPassManager

    from vllm_fusion_plugin.passes.pass_manager import FusionPassManager

    flags = {"fuse_act_quant": True, "fuse_norm_quant": True, "fuse_attn_quant": False}
    config = make_config(["none", "+quant_fp8"], **flags)
    stock, ours = PostGradPassManager(), FusionPassManager()
    stock.configure(config)
    ours.configure(config)
    first, *others = [type(p).__name__ for p in stock.passes]
    assert first == "NoOpEliminationPass"
    assert [type(p).__name__ for p in ours.passes] == [
        first,
        "SplitExpertsPass",
        "SplitBlockGemmPass",
        *others,
        "GroupQuantPass",
        "Leftovers",
    ]
    modules = {type(p).__name__: type(p).__module__ for p in ours.passes}
    assert modules["ActivationQuantFusionPass"] == "vllm_fusion_plugin.passes.silu_mul_quant"
    assert modules["RMSNormQuantFusionPass"] == "vllm_fusion_plugin.passes.rms_norm_quant"
    assert modules["NoOpEliminationPass"].startswith("vllm.")
    # stock's own module is as it was
    from vllm.compilation.passes import pass_manager

    assert pass_manager.ActivationQuantFusionPass.__module__.startswith("vllm.compilation")


def test_a_pass_that_cannot_be_built_leaves_stock(monkeypatch):
    from vllm_fusion_plugin.passes import pass_manager

    def broken(name):
        raise ImportError("no kernels here")

    monkeypatch.setattr(pass_manager, "our_pass", broken)
    manager = pass_manager.FusionPassManager()
    manager.configure(make_config(["none", "+quant_fp8"], **ONLY_ACT))
    (act,) = (p for p in manager.passes if type(p).__name__ == "ActivationQuantFusionPass")
    assert type(act).__module__.startswith("vllm.compilation")
    assert "no kernels here" in report.RECORDER.report.passes["ActivationQuantFusionPass"]


@in_a_fork  # vLLM remembers what it asked this platform
def test_another_platform_leaves_stock(monkeypatch):
    from vllm_fusion_plugin.passes.pass_manager import FusionPassManager

    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: False)
    manager = FusionPassManager()
    manager.configure(make_config(["none", "+quant_fp8"], **ONLY_ACT))
    ours = [type(p).__name__ for p in manager.passes if type(p).__module__.startswith("vllm_fusion_plugin")]
    assert ours == ["Leftovers"]  # which tells what is left, on any platform
    passes = report.RECORDER.report.passes
    assert all("ROCm and CPU" in passes[name] for name in ("ActivationQuantFusionPass", "GroupQuantPass"))


@in_a_fork  # the plugin is off in this process afterwards
def test_a_manager_that_cannot_be_made_leaves_stock(monkeypatch):
    from vllm.compilation.passes.pass_manager import PostGradPassManager

    from vllm_fusion_plugin.passes import pass_manager

    def broken(self):
        raise AttributeError("this vLLM's pass manager is another one")

    assert type(plugin.make_pass_manager()) is pass_manager.FusionPassManager
    monkeypatch.setattr(pass_manager.FusionPassManager, "__init__", broken)
    assert type(plugin.make_pass_manager()) is PostGradPassManager
    assert "this vLLM's pass manager is another one" in report.RECORDER.report.manager


@pytest.mark.parametrize("mine", [{"enabled": False}, {"no_such_setting": 1}])
def test_a_manager_made_too_early_is_stocks(mine):
    """vLLM makes it before it hashes the config, where the plugin takes itself out."""
    from vllm_fusion_plugin.passes.pass_manager import FusionPassManager

    config = make_config(["none", "+quant_fp8"], **ONLY_ACT)
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
    recording = trace(GroupQuantMLP, keep_passes=False)
    assert recording.matches_by_graph()[PASS] == 0
    (note,) = report.RECORDER.report.notes
    assert "this vLLM's layer is another one" in note


def test_settings_leave_a_pass_to_stock():
    from vllm_fusion_plugin.passes.pass_manager import FusionPassManager

    config = make_config(["none", "+quant_fp8"], **ONLY_ACT)
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
    from vllm_fusion_plugin.passes.pattern import DuplicatePatternError

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
    trace_branches([GroupQuantMLP], [(64, 2 * WIDTH)], config)
    (dump,) = tmp_path.rglob("patterns.activation_quant_fusion_pass.*.py")
    assert "per_token_group_fp8_quant" in dump.read_text()
