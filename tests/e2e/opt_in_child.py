# SPDX-License-Identifier: Apache-2.0
"""`opt_in_child.py RESULT`: what the plugin's switches change in a process of vLLM's, one case a forked process.

Forked, because what is patched stays patched, and importing vLLM takes 15 s. Writes {case: traceback, or "" if it held}.
"""

import dataclasses
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import vllm.model_executor.kernels.linear as linear
import vllm.plugins
from vllm.compilation.passes import pass_manager
from vllm.config import CompilationConfig, CompilationMode, PassConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum


def seams() -> dict[str, object]:
    """Every place of vLLM's that the plugin may change on CPU."""
    platform = type(current_platform)
    return {
        "check_config": platform.check_and_update_config.__func__,
        "pass_manager": current_platform.get_pass_manager_cls(),
        "config_hash": VllmConfig.compute_hash,
        "fix_functionalization": pass_manager.FixFunctionalizationPass,
        "block_fp8_kernels": tuple(linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]),
    }


STOCK = seams()


def changed() -> set[str]:
    return {name for name, value in seams().items() if value != STOCK[name]}


def load_plugins() -> None:
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()


def compiled(additional_config: dict[str, object] | None = None, **passes: bool) -> CompilationConfig:
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, pass_config=PassConfig(**passes))
    return VllmConfig(compilation_config=config, additional_config=additional_config or {}).compilation_config


def switched_off() -> None:
    os.environ |= {"VLLM_FUSION_PLUGIN": "0", "VLLM_FUSION_PLUGIN_CPU": "1"}
    load_plugins()
    assert changed() == set(), changed()
    assert not hasattr(torch.ops.vllm_fusion_plugin, "silu_mul_group_fp8_quant")
    assert compiled().mode == CompilationMode.DYNAMO_TRACE_ONCE


def cpu_not_asked_for() -> None:
    load_plugins()
    assert changed() == {"pass_manager", "config_hash"}, changed()
    assert compiled().mode == CompilationMode.DYNAMO_TRACE_ONCE


def cpu_asked_for_twice() -> None:
    os.environ["VLLM_FUSION_PLUGIN_CPU"] = "1"
    load_plugins()
    load_plugins()
    from vllm_fusion_plugin.demo import cpu

    assert changed() == set(STOCK), changed()
    assert seams()["check_config"].__wrapped__ is STOCK["check_config"]
    assert seams()["block_fp8_kernels"] == (*STOCK["block_fp8_kernels"], cpu.CPUReferenceFp8BlockScaledMM)
    compilation = compiled(fuse_act_quant=True, fuse_norm_quant=True, fuse_attn_quant=True)
    assert (compilation.mode, compilation.backend) == (CompilationMode.VLLM_COMPILE, "inductor")
    assert compilation.compile_sizes == []
    assert compilation.ir_enable_torch_wrap  # norms reach the passes as one op each
    passes = compilation.pass_config
    on = {f.name for f in dataclasses.fields(passes) if getattr(passes, f.name) is True}
    assert on == {"fuse_act_quant", "fuse_norm_quant", "eliminate_noops"}, on


def eager_stays_eager() -> None:
    os.environ["VLLM_FUSION_PLUGIN_CPU"] = "1"
    load_plugins()
    eager = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE)).compilation_config
    assert eager.mode == CompilationMode.NONE
    os.environ["VLLM_CPU_CI_ENV"] = "1"
    assert (compiled().mode, compiled().backend) == (CompilationMode.DYNAMO_TRACE_ONCE, "eager")


def cpu_switch_misspelt() -> None:
    os.environ["VLLM_FUSION_PLUGIN_CPU"] = "yes"
    load_plugins()  # must not raise: vLLM would not start
    from vllm_fusion_plugin import report

    assert "check_config" not in changed()
    assert "VLLM_FUSION_PLUGIN_CPU='yes'" in report.RECORDER.report.manager
    assert "allowed: 1 (on), 0 (off, the default)" in report.RECORDER.report.manager


def pass_left_to_stock() -> None:
    """Stock has no such pass on CPU: with the flag left set, its pass manager would fail on the name."""
    os.environ["VLLM_FUSION_PLUGIN_CPU"] = "1"
    load_plugins()
    cases = [
        ({"enabled": False}, set()),
        ({"stock_passes": ["ActivationQuantFusionPass"]}, {"fuse_norm_quant"}),
        ({"stock_passes": ["RMSNormQuantFusionPass"]}, {"fuse_act_quant"}),
        ({"no_such_setting": 1}, set()),
    ]
    for left, kept in cases:
        compilation = compiled({"fusion_plugin": left}, fuse_act_quant=True, fuse_norm_quant=True)
        assert compilation.mode == CompilationMode.VLLM_COMPILE, left
        assert {
            flag for flag in ("fuse_act_quant", "fuse_norm_quant") if getattr(compilation.pass_config, flag)
        } == kept


def hash_never_raises() -> None:
    """Whatever goes wrong while hashing, vLLM gets a hash that is its own combined with something never seen again."""
    load_plugins()
    from vllm_fusion_plugin import compat, fingerprint, plugin, report

    stock = STOCK["config_hash"]
    config = VllmConfig()
    first = config.compute_hash()
    assert first == config.compute_hash() == VllmConfig().compute_hash() != stock(config)

    def failing(*args: object) -> str:
        raise OSError("the disk is gone")

    plugin._register_ops, kept = failing, plugin._register_ops
    broken = [VllmConfig(), VllmConfig()]
    hashes = [c.compute_hash() for c in broken]
    assert len({*hashes, first, stock(config)}) == 4
    plugin._register_ops = kept
    assert [c.compute_hash() for c in broken] == hashes  # the plugin keeps out of these engines for good
    record = report.RECORDER.engine(compat.engine_owner(broken[0]))
    assert record.inactive == "inactive: OSError: the disk is gone"
    assert config.compute_hash() == first

    plugin.RECORDER = None  # and what not even configure_engine is prepared for
    assert len({config.compute_hash(), config.compute_hash(), first, stock(config)}) == 4
    plugin.RECORDER = report.RECORDER
    assert config.compute_hash() == first

    fingerprint.code_hash = failing
    fingerprint._state.cache_clear()
    unknown = config.compute_hash()
    assert unknown == config.compute_hash() and unknown not in (first, stock(config))
    fingerprint._state.cache_clear()  # as another process
    assert config.compute_hash() != unknown
    record = report.RECORDER.engine(compat.engine_owner(config))
    assert any("the disk is gone" in note for note in record.report.notes)


def user_folders_are_kept_apart() -> None:
    load_plugins()
    config = VllmConfig(compilation_config=CompilationConfig(cache_dir="/users"))
    config.compute_hash()
    first = config.compilation_config.cache_dir
    assert first.startswith("/users/vllm_fusion_plugin-")
    config.compute_hash()
    assert config.compilation_config.cache_dir == first


def kernels_that_triton_could_not_compile() -> None:
    """On a GPU, an installation without sources leaves vLLM alone; CPU needs no kernels."""
    load_plugins()
    from vllm_fusion_plugin import compat, fingerprint, report

    fingerprint.kernels_without_source = lambda: "no source"
    assert VllmConfig().compute_hash() != STOCK["config_hash"](VllmConfig())
    config = VllmConfig()
    type(current_platform).is_cpu = lambda self: False
    assert config.compute_hash() == STOCK["config_hash"](config)
    record = report.RECORDER.engine(compat.engine_owner(config))
    assert record.inactive == "inactive: no source"


def one_engine_has_one_owner() -> None:
    """A draft model's config is made with parts of the target's; an equal one is another engine."""
    from vllm_fusion_plugin import compat

    target = VllmConfig()
    draft = VllmConfig(compilation_config=target.compilation_config, parallel_config=target.parallel_config)
    assert draft is not target
    assert compat.engine_owner(draft) is compat.engine_owner(target)
    assert compat.engine_owner(VllmConfig()) is not compat.engine_owner(target)


def worker_methods() -> None:
    """Attached at registration, whatever the state, and without importing vLLM's workers for it."""
    os.environ["VLLM_FUSION_PLUGIN"] = "0"
    workers = "vllm.v1.worker.worker_base"
    assert workers not in sys.modules
    load_plugins()
    assert workers not in sys.modules
    from vllm.v1.worker.worker_base import WorkerBase

    vllm.plugins.load_general_plugins()  # as every worker does before it is made
    assert not hasattr(WorkerBase, "get_fusion_report")  # or an extension class that has it could not be used

    class Extension:
        def get_compilation_match_table(self) -> str:
            return "the extension's"

    class Worker(WorkerBase):
        def __init__(self, config: VllmConfig) -> None:
            self.vllm_config, self.model_runner = config, None

    for name in dir(Extension):
        assert name.startswith("__") or not hasattr(Worker, name)
    Worker.__bases__ += (Extension,)
    config = VllmConfig()
    worker = Worker(config)
    assert worker.get_fusion_report()["manager"] == "off: VLLM_FUSION_PLUGIN=0"
    assert worker.get_compilation_match_table() == "the extension's"
    assert not hasattr(worker, "no_such_method")

    os.environ.pop("VLLM_FUSION_PLUGIN")
    load_plugins()
    nothing_yet = "installed, nothing compiled yet"
    modes = {
        CompilationMode.NONE: "eager: vLLM compiles nothing, so no pass runs",
        CompilationMode.DYNAMO_TRACE_ONCE: "not compiled by vLLM: mode DYNAMO_TRACE_ONCE runs no pass",
        CompilationMode.VLLM_COMPILE: nothing_yet,
    }
    for mode, state in modes.items():
        config.compilation_config.mode = mode
        assert worker.get_fusion_report()["manager"] == state
    config.compilation_config.backend = "eager"
    assert worker.get_fusion_report()["manager"] == "not compiled: backend 'eager' runs no pass"
    config.compilation_config.mode = CompilationMode.NONE
    from vllm.compilation import breakable_cudagraph

    breakable_cudagraph.is_breakable_cudagraph_enabled = lambda: True
    assert worker.get_fusion_report()["manager"].startswith("breakable CUDA graphs: vLLM compiles nothing")
    config.additional_config = {"fusion_plugin": {"no_such_setting": 1}}
    assert "no_such_setting=1" in worker.get_fusion_report()["manager"]


CASES = (
    hash_never_raises,
    user_folders_are_kept_apart,
    kernels_that_triton_could_not_compile,
    one_engine_has_one_owner,
    worker_methods,
    switched_off,
    cpu_not_asked_for,
    cpu_asked_for_twice,
    eager_stays_eager,
    cpu_switch_misspelt,
    pass_left_to_stock,
)


def run_forked(case) -> str:
    with tempfile.NamedTemporaryFile("r") as file:
        pid = os.fork()
        if pid == 0:
            try:
                case()
                outcome = ""
            except BaseException:
                outcome = traceback.format_exc()
            Path(file.name).write_text(outcome)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        return file.read() or ("" if status == 0 else f"ended with status {status}")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({case.__name__: run_forked(case) for case in CASES}, indent=1))
