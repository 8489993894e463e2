# SPDX-License-Identifier: Apache-2.0
"""Pretend to be one GPU on a machine that has none, far enough for vLLM to build and compile the GPU's real graphs.

NVIDIA's; what an AMD GPU answers instead is in fake_rocm.py.

Fake tensors carry device, dtype, shape and strides but no data, so a whole model fits in no memory and every graph pass
runs as on the GPU. What is missing is the driver below them: vLLM's extensions want to link it, and vLLM, Dynamo, Inductor
and Triton ask it questions. `install()` answers these, one function below for each of those who ask. Nothing is
executed and no code is generated: this is for what graphs look like and what matches in them, never for numbers or speed.

    from vllm_fusion_plugin.tracing import fake_gpu
    fake_gpu.install()       # before anything imports vLLM: vLLM's modules copy their platform at import

There is no way back within a process, for the same reason.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from . import fake_rocm


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What decides about kernels and passes: vLLM selects by capability, and by name and SM count in tuned tables."""

    name: str
    capability: tuple[int, int]
    memory: int
    sms: int
    arch: str = ""
    """Of an AMD GPU, what its compiler calls it."""


H200 = Gpu("NVIDIA H200", (9, 0), 139 << 30, 132)
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79 << 30, 132),
    "h200": H200,
    "b200": Gpu("NVIDIA B200", (10, 0), 178 << 30, 148),
    "mi300x": Gpu("AMD Instinct MI300X", (9, 4), 192 << 30, 304, "gfx942"),
    "mi355x": Gpu("AMD Instinct MI355X", (9, 5), 288 << 30, 256, "gfx950"),
}

_installed: Gpu | None = None


@functools.cache
def unavailable() -> str | None:
    """Why this machine cannot pretend to have a GPU; None if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    import torch

    if torch.version.cuda is None:
        return f"vLLM's CUDA build is not installed (torch {torch.__version__} has no CUDA)"
    if _driver_is_there():
        return None
    if missing := [tool for tool in ("nm", "gcc") if shutil.which(tool) is None]:
        return f"no GPU driver, and no {' and no '.join(missing)} to build a stand-in for it"
    return None


def install(gpu: Gpu = H200) -> None:
    """Make this process believe that it has `gpu`, unless it has a real one. Call it before anything imports vLLM."""
    import torch

    global _installed
    # Not over a real GPU: other tests in this process may be there to use it. Hide it (CUDA_VISIBLE_DEVICES=) to pretend.
    if _installed == gpu or torch.cuda.is_available():
        return
    if _installed is not None:
        raise RuntimeError(f"this process already pretends to have {_installed}, it cannot become {gpu}")
    if reason := unavailable():
        raise RuntimeError(reason)
    platforms = sys.modules.get("vllm.platforms")
    if platforms is not None and platforms._current_platform is not None:
        raise RuntimeError(
            f"vLLM has already settled on {type(platforms._current_platform).__name__}: "
            "call fake_gpu.install() before importing anything that imports vLLM"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or vLLM would put a placeholder in the place of a Triton without a driver
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # as vLLM does, but Inductor is imported before vLLM here
    os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"  # or importing vLLM 0.33 starts two processes that build kernels
    if gpu.arch:
        fake_rocm.hide_others()
        fake_rocm.stand_in_for_packages()
    else:
        # or FlashInfer asks the GPU that is not there
        os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "{}.{}a".format(*gpu.capability))
    _load_driver()
    _answer_for_torch_cuda(gpu)
    _answer_for_triton(gpu)
    _keep_constant_folding_off_the_gpu()
    _answer_for_vllm(gpu)
    _installed = gpu


# ---- driver: vLLM's extensions are linked against libcuda.so.1, without it their op schemas do not register -----------


def _driver_is_there() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _load_driver() -> None:
    if not _driver_is_there():
        # The dynamic linker takes a library that is already loaded under the same soname for every later request.
        ctypes.CDLL(str(_stub_driver()), mode=ctypes.RTLD_GLOBAL)


def _stub_driver() -> Path:
    """A libcuda.so.1 with every driver function that this vLLM names, each answering CUDA_ERROR_NO_DEVICE (100)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "vllm_fusion_plugin" / f"stub-driver-vllm-{metadata.version('vllm')}"
    stub = folder / "libcuda.so.1"
    if stub.exists():
        return stub
    [package] = importlib.util.find_spec("vllm").submodule_search_locations  # type: ignore[union-attr,misc]
    extensions = [str(path) for path in Path(package).rglob("*.so")]
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", *extensions], capture_output=True, text=True, check=True
    ).stdout
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", symbols)))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as building:
        built = Path(building) / stub.name
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{stub.name}", "-x", "c", "-", "-o", str(built)],
            input="".join(f"int {name}(void) {{ return 100; }}\n" for name in names),
            text=True,
            check=True,
        )
        built.replace(stub)  # in one step, so that a process beside us never loads half a library
    return stub


# ---- torch.cuda: asked for the GPU's properties by vLLM, Dynamo and Inductor ------------------------------------------


class _Idle:
    """A stream or an event: whatever it is told to do, nothing happens."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _answer_for_torch_cuda(gpu: Gpu) -> None:
    import torch

    properties = SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory,
        multi_processor_count=gpu.sms,
        is_integrated=False,
        warp_size=64 if gpu.arch else 32,
        **({"gcnArchName": f"{gpu.arch}:sramecc+:xnack-"} if gpu.arch else {}),
    )
    answers = {
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_name": lambda device=None: gpu.name,
        "current_device": lambda: 0,
        "graph_pool_handle": lambda: (0, 0),
        # Layers with work to overlap (MoE's shared experts) make streams when they are built.
        "Stream": _Idle,
        "Event": _Idle,
        "current_stream": lambda device=None: _Idle(),
    }
    # torch.cuda.is_available() stays False: Dynamo would go on to ask for the state of the GPU's random numbers.
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)

    from torch._dynamo.device_interface import CudaInterface

    # Dynamo keeps references of its own, taken when it was imported.
    for name in ("current_device", "current_stream", "get_device_properties"):
        setattr(CudaInterface, name, staticmethod(answers[name]))  # type: ignore[arg-type]


# ---- Triton: kernels called in a model's forward are traced, and their mutated arguments found by compiling to TTIR ---


def _answer_for_triton(gpu: Gpu) -> None:
    import torch
    import triton
    from torch.utils._triton import has_triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            pass  # CudaDriver's own loads the driver library

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", gpu.capability[0] * 10 + gpu.capability[1], 32)

        def get_current_device(self) -> int:
            return 0

    triton.runtime.driver.set_active(fake_rocm.driver(gpu) if gpu.arch else Driver())
    # has_triton() remembers its first answer. Many torch modules hold the function itself, so replacing it is no use.
    has_triton.cache_clear()
    with mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1):
        assert has_triton(), "torch finds no Triton even with a GPU"


# ---- Inductor: the one graph pass that computes with real tensors on the nodes' device --------------------------------


def _keep_constant_folding_off_the_gpu() -> None:
    import torch
    from torch._inductor.fx_passes import joint_graph
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    def on_cpu(kwargs: dict[str, Any] | None) -> dict[str, Any]:
        return {k: "cpu" if isinstance(v, torch.device) else v for k, v in (kwargs or {}).items()}

    class OnCpu(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **on_cpu(kwargs))

    class FromPythonOnCpu(TorchFunctionMode):
        """For torch.full and the like, which start CUDA before they dispatch."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **on_cpu(kwargs))

    class Folder(joint_graph.UniformValueConstantFolder):
        def __init__(self, *args, **kwargs) -> None:
            with OnCpu(), FromPythonOnCpu():
                super().__init__(*args, **kwargs)

        def run(self, *args, **kwargs):
            with OnCpu():
                return super().run(*args, **kwargs)

    joint_graph.UniformValueConstantFolder = Folder  # type: ignore[misc]


# ---- vLLM -------------------------------------------------------------------------------------------------------------


def _answer_for_vllm(gpu: Gpu) -> None:
    from vllm import platforms

    platforms._current_platform = fake_rocm.platform(gpu) if gpu.arch else _cuda_platform()

    from vllm.model_executor.models import registry

    # vLLM looks at a model's class in a second process, to keep CUDA out of the first. It would know none of our answers,
    # and takes as long to start as this one.
    registry._run_in_subprocess = lambda look: look()  # type: ignore[assignment]


def _cuda_platform() -> Any:
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    # The platform for CUDA without NVML (Jetson) asks torch.cuda, which answers for us, and nothing else.
    class FakeGpuPlatform(NonNvmlCudaPlatform):
        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return True  # the GPUs of an H200 host are, through NVLink

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            # Without NCCL, and without custom all-reduce: both want streams and peers.
            return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"

    return FakeGpuPlatform()
