# SPDX-License-Identifier: Apache-2.0
"""The same for one AMD Instinct GPU: what differs from an NVIDIA GPU (fake_gpu.py), for vLLM as a ROCm platform.

vLLM's Python code for ROCm is in its CUDA build too, and decides by the platform. What a ROCm build has of its own has a
stand-in here: `aiter` and `flash_attn` can be imported, and whatever is called of them raises. AITER is on where vLLM would
have it on, by VLLM_ROCM_USE_AITER. The ops of `_C` are those of the CUDA build, some of which a ROCm build lacks; nothing of
vLLM's puts these into a graph on ROCm.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fake_gpu import Gpu


def hide_others() -> None:
    os.environ["HIP_VISIBLE_DEVICES"] = ""  # as CUDA_VISIBLE_DEVICES: vLLM keeps a Triton without a driver
    sys.modules["flashinfer"] = None  # type: ignore[assignment]  # NVIDIA's


# ---- AITER and flash-attention: imported by vLLM's ops when they run, and asked a few questions while a model is built ---


def _no_tuned_gemm(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], bool]:
    return {}, False


def _as_it_is(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


# A GEMM that MLA layers run for several sizes while weights are finished, to have it compiled (vLLM 0.32).
_GEMM = "batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant"

ANSWERS: dict[str, Callable[..., Any]] = {
    "aiter.ops.triton.utils.gemm_config_utils.get_gemm_config": _no_tuned_gemm,
    f"aiter.ops.triton.{_GEMM}.{_GEMM}": _as_it_is,
    "aiter.ops.shuffle.shuffle_weight": _as_it_is,
    "aiter.ops.shuffle.shuffle_scale": _as_it_is,
}


class _AnyModule(importlib.abc.Loader):
    """Makes modules that have every attribute: a function that refuses to be called, or one of ANSWERS."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []  # a package
        module.__getattr__ = lambda name: _attribute(spec.name, name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


def _attribute(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    path = f"{module}.{name}"

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{path} was called, and is not here: this process only pretends")

    return ANSWERS.get(path, refuse)


class _StandIns(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in ("aiter", "flash_attn"):
            return None
        return importlib.machinery.ModuleSpec(name, _AnyModule(), is_package=True)


def stand_in_for_packages() -> None:
    if not any(isinstance(finder, _StandIns) for finder in sys.meta_path):
        sys.meta_path.insert(0, _StandIns())


# ---- Triton -----------------------------------------------------------------------------------------------------------


def driver(gpu: Gpu) -> Any:
    """A driver of Triton's AMD backend that has no GPU to ask."""
    from triton.backends.amd.driver import HIPDriver
    from triton.backends.compiler import GPUTarget

    class Driver(HIPDriver):
        def __init__(self) -> None:
            pass  # HIPDriver's own loads ROCm's libraries

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("hip", gpu.arch, 64)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, *device: int) -> int:
            return 0

    return Driver()


# ---- vLLM -------------------------------------------------------------------------------------------------------------

# The extensions of the CUDA build, of which each version has some. A ROCm build calls its own by the same names.
EXTENSIONS = ("_C", "_C_stable_libtorch", "_moe_C", "_moe_C_stable_libtorch")


def platform(gpu: Gpu) -> Any:
    """vLLM's ROCm platform, where it would ask ROCm's libraries."""
    for name in EXTENSIONS:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"vllm.{name}")
    sys.modules.setdefault("vllm._rocm_C", types.ModuleType("vllm._rocm_C"))
    from vllm.platforms.rocm import RocmPlatform

    class FakeRocmPlatform(RocmPlatform):
        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return gpu.name

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return gpu.memory

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return True

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            # without RCCL, and without custom all-reduce: both want streams and peers
            return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"

    return FakeRocmPlatform()
