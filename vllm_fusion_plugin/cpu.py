# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU engine compiled the way its GPU engines are, so that our passes run where there is no GPU.

Opt-in: plugin.register() calls enable() only when VLLM_FUSION_PLUGIN_CPU=1, so nobody's CPU compile mode changes
silently.  This is for demonstration and tests: real engine, real graphs, real matching and replacement, but reference
implementations of the ops, and no claim of speed.

Every change to vLLM is made in this file and says what, why, since which vLLM, and when it can go.  All of them are
idempotent: vLLM may load plugins more than once in a process.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection

import torch
import vllm.model_executor.kernels.linear as linear_kernels
from vllm.compilation.passes import pass_manager as stock_pass_manager
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import CompilationMode, PassConfig, VllmConfig
from vllm.model_executor.kernels.linear import Fp8BlockScaledMMLinearKernel
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum

from .settings import SettingsError

logger = logging.getLogger("vllm.fusion_plugin")

ENV_CPU = "VLLM_FUSION_PLUGIN_CPU"
FUSION_FLAG_PREFIXES = ("fuse_", "enable_")


def enable_if_asked() -> None:
    """enable(), if VLLM_FUSION_PLUGIN_CPU=1."""
    value = os.environ.get(ENV_CPU, "").strip()
    if value not in ("", "0", "1"):
        raise SettingsError(f"{ENV_CPU}={value!r} is not understood; allowed: 1 (on), 0 (off, the default)")
    if value == "1":
        enable()


def enable(our_flags: Collection[str] = ("fuse_act_quant",)) -> None:
    """Make VLLM_COMPILE mean on CPU what it means on a GPU.

    our_flags: the PassConfig flags whose passes the plugin's pass manager provides on CPU.  Every other fusion flag is
    cleared, because stock builds none of its fusion passes on CPU and would fail on their names.
    """
    known = {field.name for field in dataclasses.fields(PassConfig)}
    if unknown := sorted(set(our_flags) - known):
        raise ValueError(f"our_flags={unknown} are no fields of vLLM's PassConfig; allowed: {sorted(known)}")
    if not current_platform.is_cpu():
        raise RuntimeError(f"cpu.enable() needs vLLM's CPU platform, this is {type(current_platform).__name__}")
    _keep_vllm_compile(type(current_platform), frozenset(our_flags))
    _leave_functionalized()
    _add_block_fp8_linear()


# --- compile mode ----------------------------------------------------------------------------------------------------


def _keep_vllm_compile(platform: type, our_flags: frozenset[str]) -> None:
    """What: after the platform has checked the config, put back the mode that vLLM had chosen for it.

    Why: CpuPlatform.check_and_update_config turns VLLM_COMPILE into DYNAMO_TRACE_ONCE, and then nobody asks
    for a pass manager.  Since: at least 0.20 (seen in 0.32.0).  Until: vLLM lets the CPU backend keep VLLM_COMPILE.
    """
    check = platform.check_and_update_config.__func__
    # A second call may bring other flags, so wrap the original again, not our own wrapper.
    stock_check = getattr(check, "stock_check", check)

    def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        compilation = vllm_config.compilation_config
        asked = compilation.mode
        stock_check(cls, vllm_config)
        # Stock has the last word wherever it chose something else than its CPU default: LoRA turns compilation off,
        # VLLM_CPU_CI_ENV asks for the eager backend.
        if (
            asked == CompilationMode.VLLM_COMPILE
            and compilation.mode == CompilationMode.DYNAMO_TRACE_ONCE
            and compilation.backend == "inductor"
        ):
            _restore(vllm_config, our_flags)

    check_and_update_config.stock_check = stock_check
    platform.check_and_update_config = classmethod(check_and_update_config)


def _restore(vllm_config: VllmConfig, our_flags: frozenset[str]) -> None:
    compilation = vllm_config.compilation_config
    compilation.mode = CompilationMode.VLLM_COMPILE
    # Stock resolves compile_sizes on its way to CUDA graphs, which CPU does not take; left at None it breaks
    # the piecewise backend's size look-up.
    compilation.post_init_cudagraph_sizes()
    passes = compilation.pass_config
    cleared = [
        field.name
        for field in dataclasses.fields(passes)
        if field.name.startswith(FUSION_FLAG_PREFIXES)
        and field.name not in our_flags
        and getattr(passes, field.name)
    ]
    for name in cleared:
        setattr(passes, name, False)
    if cleared:
        logger.info("Cleared for CPU, where no pass provides them: %s", ", ".join(cleared))


# --- functionalised graphs -------------------------------------------------------------------------------------------


class LeaveFunctionalized(InductorPass):
    """What: stands where stock's FixFunctionalizationPass would, and leaves the graph as it is.

    Why: stock's pass looks up torch.ops._C operators that the CPU build does not have, and fails on the first.  It only
    saves copies: Inductor itself turns what is still functionalised back into mutating calls.
    Since: 0.32.0.  Until: stock's pass skips operators that are not there.
    """

    def __init__(self, config: VllmConfig) -> None: ...

    def __call__(self, graph: torch.fx.Graph) -> None: ...


def _leave_functionalized() -> None:
    stock_pass_manager.FixFunctionalizationPass = LeaveFunctionalized


# --- block-scaled FP8 linear -----------------------------------------------------------------------------------------


@torch.library.custom_op("vllm_fusion_plugin::cpu_block_scaled_mm", mutates_args=(), device_types="cpu")
def cpu_block_scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    block_n: int,
    block_k: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """a (M, K) fp8 with scales (M, K/block_k), b (N, K) fp8 with scales (N/block_n, K/block_k) -> a @ b.T (M, N).

    Dequantised and multiplied in fp32.  An op of its own, so that the quantiser before it stays the form our patterns
    know: opaque to Inductor, it keeps the FP8 codes and scales as real values of the graph.
    """
    m, k = a.shape
    n = b.shape[0]
    a_full = a.float() * a_scales.repeat_interleave(block_k, 1)[:, :k]
    b_full = b.float() * b_scales.repeat_interleave(block_n, 0)[:n].repeat_interleave(block_k, 1)[:, :k]
    return (a_full @ b_full.t()).to(out_dtype)


@cpu_block_scaled_mm.register_fake
def _(a, b, a_scales, b_scales, block_n, block_k, out_dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


class CPUReferenceFp8BlockScaledMM(Fp8BlockScaledMMLinearKernel):
    """What: a linear kernel for checkpoints with FP8 weights in 128x128 blocks, last in vLLM's list for CPU.

    Why: stock's two CPU kernels need AMX, and neither leaves the activation quantiser in the graph.
    Since: 0.32.0.  Until: vLLM has a CPU block FP8 kernel with a separate quantiser.
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
