# SPDX-License-Identifier: Apache-2.0
"""MLPs of vLLM's model code with FP8 weights in blocks, as vLLM's engine has them when weights are loaded, and without an
engine."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.platforms import current_platform
from vllm.utils.network_utils import get_open_port

from vllm_fusion_plugin import report, roundings
from vllm_fusion_plugin.layers import silu_mul_quant as layer
from vllm_fusion_plugin.ops.quant import GroupScales, group_fp8_quant_reference

HIDDEN, WIDTH = 256, 384
CLASSES = {"LlamaMLP": "llama", "Qwen2MoeMLP": "qwen2_moe", "DeepseekV2MLP": "deepseek_v2"}


@functools.cache
def one_rank() -> None:
    """The process groups that linear layers ask for."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    address = f"tcp://127.0.0.1:{get_open_port()}"
    parallel_state.init_distributed_environment(1, 0, address, 0, backend)
    parallel_state.initialize_model_parallel()


def no_rank() -> None:
    """Take them down again, for other tests of this process."""
    if one_rank.cache_info().currsize:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        one_rank.cache_clear()


@contextlib.contextmanager
def engine(*custom_ops: str, mode: CompilationMode = CompilationMode.NONE) -> Iterator[VllmConfig]:
    """The configuration of an engine; by default one in which vLLM compiles nothing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compilation = CompilationConfig(mode=mode, custom_ops=list(custom_ops or ("all",)))
    config = VllmConfig(device_config=DeviceConfig(device=device), compilation_config=compilation)
    text = SimpleNamespace(model_type="qwen3")
    config.model_config = SimpleNamespace(dtype=torch.bfloat16, hf_text_config=text, is_moe=False)
    with set_current_vllm_config(config, check_compile=False):
        one_rank()
        yield config


def make(name: str, hidden: int = HIDDEN, width: int = WIDTH, of: type | None = None) -> Any:
    """An MLP of that class, in an `engine`, its weights as after loading."""
    of = of or getattr(importlib.import_module(f"vllm.model_executor.models.{CLASSES[name]}"), name)
    quant = Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            mlp = of(hidden, width, "silu", quant_config=quant, prefix="layers.0.mlp")
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(2)
    for linear in (mlp.gate_up_proj, mlp.down_proj):
        linear.weight.data.copy_(torch.randn(linear.weight.shape, generator=generator).to(linear.weight.dtype))
        scale = linear.weight_scale_inv
        scale.data.copy_((torch.rand(scale.shape, generator=generator) + 0.5) / 64)
        linear.quant_method.process_weights_after_loading(linear)
    return mlp


def multiply_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU, for which vLLM has no GEMM for FP8 weights in blocks, linear layers get the demo's."""
    if is_cpu():
        from vllm_fusion_plugin.demo import cpu

        kernels: Any = importlib.import_module("vllm.model_executor.kernels.linear")
        ours = [cpu.CPUReferenceFp8BlockScaledMM]
        monkeypatch.setitem(kernels._POSSIBLE_FP8_BLOCK_KERNELS, cpu.PlatformEnum.CPU, ours)


def rows(count: int, hidden: int = HIDDEN) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, hidden, generator=generator) * torch.randn(count, 1, generator=generator).exp()
    return x.to(device, torch.bfloat16)


def with_custom_quantisers(mlp: Any) -> Any:
    """On CPU, the MLP with stand-ins for vLLM's CUDA op that quantises, which CPU has not."""

    def forward_cuda(x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return group_fp8_quant_reference(x, GroupScales(), roundings.of(roundings.GROUP_QUANT).name)

    for linear in (mlp.gate_up_proj, mlp.down_proj) if is_cpu() else ():
        linear.quant_method.fp8_linear.quant_fp8._forward_method = forward_cuda
    return mlp


def record() -> report.EngineRecord:
    made = report.EngineRecord()
    made.mlps_left = ""
    return made


@contextlib.contextmanager
def left_to_vllm() -> Iterator[None]:
    layer._problem, was = "left to vLLM by a test", layer._problem
    try:
        yield
    finally:
        layer._problem = was


def is_cpu() -> bool:
    return current_platform.is_cpu()
