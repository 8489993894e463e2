# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU engine compiled the way its GPU engines are, so that our passes run where there is no GPU.

Opt-in: the plugin calls enable() only when VLLM_FUSION_PLUGIN_CPU=1 (settings.ENV_CPU), so nobody's CPU compile mode changes
silently. This is for demonstration and tests: real engine, real graphs, real matching and replacement, but reference
implementations of the ops, and no claim of speed.

Every change to vLLM for CPU is made in this file and says what, why, since which vLLM, and when it can go. All of them are
idempotent: vLLM may load plugins more than once in a process.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import torch
import vllm.model_executor.kernels.linear as linear_kernels
from vllm.compilation.passes import pass_manager as stock_pass_manager
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.kernels.linear import Fp8BlockScaledMMLinearKernel
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum

from .. import fusions, settings
from .cpu_linear import cpu_block_scaled_mm

logger = logging.getLogger("vllm.fusion_plugin")

# The passes that the plugin's pass manager provides on CPU, with the PassConfig flags that ask for them.
PASS_FLAGS = {fusion.name: fusion.switch for fusion in fusions.entering("pass") if fusion.on_cpu}
FUSION_FLAG_PREFIXES = ("fuse_", "enable_")


def enable() -> None:
    """Make VLLM_COMPILE mean on CPU what it means on a GPU."""
    if not current_platform.is_cpu():
        raise RuntimeError(f"cpu.enable() needs vLLM's CPU platform, this is {type(current_platform).__name__}")
    _keep_vllm_compile(type(current_platform))
    _leave_functionalized()
    _add_block_fp8_linear()


# --- compile mode ----------------------------------------------------------------------------------------------------


def _keep_vllm_compile(platform: Any) -> None:
    """What: after the platform has checked the config, put back the mode that vLLM had chosen for it.

    Why: CpuPlatform.check_and_update_config turns VLLM_COMPILE into DYNAMO_TRACE_ONCE, and then nobody asks for a pass
    manager. Since: read in 0.32.0. Until: vLLM lets its CPU backend keep VLLM_COMPILE.
    """
    stock_check = platform.check_and_update_config.__func__
    if hasattr(stock_check, "_fusion_plugin"):
        return

    @functools.wraps(stock_check)
    def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        compilation = vllm_config.compilation_config
        asked, ir_ops = compilation.mode, compilation.ir_enable_torch_wrap
        stock_check(cls, vllm_config)
        # Where stock chose something else than its CPU default it has the last word: LoRA turns compilation off,
        # VLLM_CPU_CI_ENV asks for the eager backend.
        if (
            asked == CompilationMode.VLLM_COMPILE
            and compilation.mode == CompilationMode.DYNAMO_TRACE_ONCE
            and compilation.backend == "inductor"
        ):
            _restore(vllm_config, ir_ops)

    check_and_update_config._fusion_plugin = True  # type: ignore[attr-defined]
    platform.check_and_update_config = classmethod(check_and_update_config)


def _restore(vllm_config: VllmConfig, ir_ops: bool) -> None:
    compilation = vllm_config.compilation_config
    compilation.mode = CompilationMode.VLLM_COMPILE
    # Whether norms stay one op each until the passes have seen them. Stock clears it along with the mode, since nothing
    # would lower these ops then.
    compilation.ir_enable_torch_wrap = ir_ops
    # vLLM does this on its way to CUDA graphs, which CPU does not take; without it compile_sizes stays None, or a word.
    compilation.post_init_cudagraph_sizes()
    # Stock builds none of its fusion passes on CPU: a flag left set would fail on a name that is not there.
    passes, provided = compilation.pass_config, _provided_flags(vllm_config)
    cleared = [
        field.name
        for field in dataclasses.fields(passes)
        if field.name.startswith(FUSION_FLAG_PREFIXES) and field.name not in provided and getattr(passes, field.name)
    ]
    for name in cleared:
        setattr(passes, name, False)
    if cleared:
        logger.info("cleared for CPU, where no pass provides them: %s", ", ".join(cleared))


def _provided_flags(vllm_config: VllmConfig) -> set[str]:
    chosen, _, _ = settings.read(vllm_config.additional_config)  # plugin.py reports what is wrong with them
    ours = set(PASS_FLAGS) - set(chosen.stock_passes) if chosen.enabled else set()
    return {flag for name, flag in PASS_FLAGS.items() if name in ours or hasattr(stock_pass_manager, name)}


# --- functionalised graphs -------------------------------------------------------------------------------------------


class LeaveFunctionalized(InductorPass):
    """What: stands where stock's FixFunctionalizationPass would, and leaves the graph as it is.

    Why: stock's pass looks up torch.ops._C operators that the CPU build does not have, and fails on the first. It only
    saves copies: Inductor itself turns what is still functionalised back into mutating calls.
    Since: read in 0.32.0. Until: stock's pass skips operators that are not there.
    """

    def __init__(self, config: VllmConfig) -> None: ...

    def __call__(self, graph: torch.fx.Graph) -> None: ...


def _leave_functionalized() -> None:
    stock_pass_manager.FixFunctionalizationPass = LeaveFunctionalized  # type: ignore[assignment, misc]


# --- block-scaled FP8 linear -----------------------------------------------------------------------------------------


class CPUReferenceFp8BlockScaledMM(Fp8BlockScaledMMLinearKernel):
    """What: a linear kernel for checkpoints with FP8 weights in 128x128 blocks, last in vLLM's list for CPU.

    Why: stock's two CPU kernels need AMX, and neither leaves the activation quantiser in the graph.
    Since: read in 0.32.0. Until: vLLM has a CPU block FP8 kernel with a separate quantiser.
    """

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return (True, None) if current_platform.is_cpu() else (False, "runs on CPU only")

    def apply_block_scaled_mm(
        self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
    ) -> torch.Tensor:
        group = self.weight_group_shape
        return cpu_block_scaled_mm(A, B, As, Bs, group.row, group.col, self.config.out_dtype)


def _add_block_fp8_linear() -> None:
    kernels = linear_kernels._POSSIBLE_FP8_BLOCK_KERNELS.setdefault(PlatformEnum.CPU, [])
    if CPUReferenceFp8BlockScaledMM not in kernels:
        kernels.append(CPUReferenceFp8BlockScaledMM)
