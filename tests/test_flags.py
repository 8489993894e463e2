# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's fusion flags the package turns on, in which engines, and how they go back."""

from __future__ import annotations

import copy
import pickle
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import CompilationConfig, PassConfig
from vllm.config.vllm import OPTIMIZATION_LEVEL_TO_CONFIG, OptimizationLevel

from vllm_fusion_plugin import flags, plugin, seams, settings
from vllm_fusion_plugin.rank_report import RankReport

NORM, ACT = flags.NORM_AND_ACT


@pytest.fixture
def cuda(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(plugin, "_off", "")
    monkeypatch.setattr(plugin, "_why_kernels_cannot_run", lambda: "")
    monkeypatch.delenv(settings.ENV_SWITCH, raising=False)
    monkeypatch.delenv(settings.ENV_SETTINGS, raising=False)


@pytest.fixture
def defaults(monkeypatch):
    """vLLM's table of defaults, a copy for the test, wrapped."""
    table = copy.deepcopy(OPTIMIZATION_LEVEL_TO_CONFIG)
    monkeypatch.setattr("vllm.config.vllm.OPTIMIZATION_LEVEL_TO_CONFIG", table)
    for _ in range(2):  # plugins load more than once
        seams.wrap_flag_defaults(flags.NORM_AND_ACT, plugin.turn_on_flag)
    return lambda level: table[level]["compilation_config"]["pass_config"]


def engine(quantization="compressed-tensors", custom_ops=("none",), **chosen):
    return SimpleNamespace(
        model_config=SimpleNamespace(quantization=quantization, is_nvfp4_quantized=lambda: False),
        compilation_config=CompilationConfig(custom_ops=list(custom_ops)),
        kernel_config=SimpleNamespace(
            ir_op_priority=SimpleNamespace(rms_norm=["native"], fused_add_rms_norm=["native"])
        ),
        additional_config={settings.ADDITIONAL_CONFIG_KEY: chosen},
    )


def test_turns_on_what_vllm_leaves_off(cuda, defaults):
    config = engine()
    level = defaults(OptimizationLevel.O2)
    assert level[NORM](config) is True and level[ACT](config) is True
    assert flags.turned_on(config) == (NORM, ACT)
    assert level["fuse_attn_quant"] is False, "a default that is a value stays"


def test_what_is_on_by_vllms_default_is_not_marked(cuda, defaults):
    config = engine(custom_ops=["none", "+quant_fp8"])
    assert defaults(OptimizationLevel.O2)[NORM](config) is True
    assert flags.turned_on(config) == ()


@pytest.mark.parametrize(
    "config",
    [
        engine(quantization=None),
        engine(fuse="vllm"),
        engine(enabled=False),
        engine(no_such_setting=1),
        engine(stock_passes=["RMSNormQuantFusionPass"]),
    ],
    ids=["not quantised", "setting", "off", "bad settings", "its pass is vLLM's"],
)
def test_leaves_a_flag_off(config, cuda, defaults):
    assert defaults(OptimizationLevel.O2)[NORM](config) is False
    assert flags.turned_on(config) == ()


@pytest.mark.parametrize("state", [None, "off: VLLM_FUSION_PLUGIN=0", "inactive: its pass manager cannot be made"])
def test_leaves_flags_off_where_the_plugin_is_out(state, cuda, defaults, monkeypatch):
    monkeypatch.setattr(plugin, "_off", state)
    assert defaults(OptimizationLevel.O2)[NORM](engine()) is False


def test_without_optimization_flags_stay_off(cuda, defaults):
    assert defaults(OptimizationLevel.O0)[NORM] is False


def test_an_error_of_ours_gives_vllms_default(cuda, monkeypatch):
    table = copy.deepcopy(OPTIMIZATION_LEVEL_TO_CONFIG)
    monkeypatch.setattr("vllm.config.vllm.OPTIMIZATION_LEVEL_TO_CONFIG", table)
    seams.wrap_flag_defaults(flags.NORM_AND_ACT, lambda config, flag: 1 / 0)
    assert table[OptimizationLevel.O2]["compilation_config"]["pass_config"][NORM](engine()) is False


def test_the_mark_reaches_workers_and_is_not_hashed():
    marked, plain = engine(), engine()
    for config in (marked, plain):
        config.compilation_config.pass_config = PassConfig(fuse_norm_quant=True)
    flags.mark(marked, NORM)
    sent = pickle.loads(pickle.dumps(marked.compilation_config))
    assert flags.turned_on(SimpleNamespace(compilation_config=sent)) == (NORM,)
    assert marked.compilation_config.pass_config.compute_hash() == plain.compilation_config.pass_config.compute_hash()


def test_left_to_vllm():
    config = engine()
    pass_config = config.compilation_config.pass_config = PassConfig(fuse_norm_quant=True, fuse_act_quant=True)
    flags.mark(config, NORM)
    with pytest.raises(RuntimeError), flags.left_to_vllm(config):
        assert (pass_config.fuse_norm_quant, pass_config.fuse_act_quant) == (False, True)
        raise RuntimeError
    assert pass_config.fuse_norm_quant is True


def test_a_pass_manager_that_cannot_be_made_leaves_vllms_flags(monkeypatch):
    config, seen = engine(), []
    config.compilation_config.pass_config = PassConfig(fuse_norm_quant=True)
    flags.mark(config, NORM)

    class Stock:
        def configure(self, config):
            seen.append(config.compilation_config.pass_config.fuse_norm_quant)

    monkeypatch.setattr(seams, "stock_pass_manager", Stock)
    monkeypatch.setattr(plugin, "_off", "")
    monkeypatch.setattr(plugin.RECORDER, "report", RankReport())
    monkeypatch.setitem(sys.modules, "vllm_fusion_plugin.passes.pass_manager", None)
    plugin.make_pass_manager().configure(config)
    assert seen == [False]


@pytest.mark.parametrize(("ours", "built"), [(True, "nothing"), (False, "stock")])
def test_a_pass_that_cannot_be_made_is_vllms_only_where_vllm_wanted_one(ours, built, monkeypatch):
    pass_manager = pytest.importorskip("vllm_fusion_plugin.passes.pass_manager")
    config = engine()
    config.compilation_config.pass_config = PassConfig(fuse_norm_quant=True)
    if ours:
        flags.mark(config, NORM)

    def broken(name):
        raise RuntimeError("another vLLM")

    monkeypatch.setattr(pass_manager, "our_pass", broken)
    monkeypatch.setattr(plugin.RECORDER, "report", RankReport())
    made = pass_manager._build("RMSNormQuantFusionPass", lambda config: "stock", config)
    assert ("stock" if made == "stock" else "nothing") == built
    assert "another vLLM" in plugin.RECORDER.report.passes["RMSNormQuantFusionPass"]
