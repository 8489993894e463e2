# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of csrc/, built for one GPU that is not here: what they need of torch and GPU, and how they are bound.
What they compute is for tests/kernels/test_cuda_kernels_gpu.py."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

from vllm_fusion_plugin.kernels import cuda_library
from vllm_fusion_plugin.ops import group_quant, registry, silu_mul_quant  # noqa: F401  registers the ops

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("cuda_library_child.py")
OPS = {"silu_mul_group_fp8_quant", "group_fp8_quant"}


def csrc(name: str) -> ModuleType:
    """A script of csrc/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"csrc_{name}", ROOT / "csrc" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = csrc("build").find_nvcc()
    if found is None:
        pytest.skip("no nvcc")
    return found


@pytest.fixture(scope="module")
def library(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Machine code for sm_90 alone: 15 s."""
    out = tmp_path_factory.mktemp("csrc") / "_C.so"
    csrc("build").build(nvcc, out, archs=("90",), ptx=None)
    return out


# ---- what it asks for ------------------------------------------------------------------------------------------------


def test_nothing_of_torch_but_its_stable_abi(library: Path) -> None:
    """Nor of a newer C library than torch's own wheels ask for."""
    assert csrc("check_wheel").problems_of(library) == []


def test_a_symbol_of_torch_outside_its_stable_abi_is_found(tmp_path: Path) -> None:
    source, out = tmp_path / "bad.cpp", tmp_path / "bad.so"
    source.write_text("namespace c10 { void f(); } void g() { c10::f(); }")
    compiler = shutil.which("g++") or pytest.skip("no g++")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-lm", "-o", str(out)], check=True)
    [problem] = csrc("check_wheel").problems_of(out)
    assert problem.startswith("_ZN3c101fEv: ")


def test_what_it_declares_of_torch_is_torchs(nvcc: str, tmp_path: Path) -> None:
    """A declaration that differs from torch's own would not compile beside it."""
    include = Path(torch.__file__).parent / "include"
    source = tmp_path / "both.cpp"
    source.write_text(
        f'#define USE_CUDA\n#include <torch/csrc/stable/c/shim.h>\n#include "{ROOT}/csrc/torch_abi.h"\n'
        "static_assert(TORCH_VERSION_2_11_0 == (uint64_t{2} << 56 | uint64_t{11} << 48));\n"
    )
    compiler = shutil.which("g++") or pytest.skip("no g++")
    cuda = Path(nvcc).resolve().parents[1] / "include"
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{cuda}", str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_kernels_spill_nothing(library: Path) -> None:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip(f"Triton has no {tool.name}")
    run = subprocess.run([tool, "--dump-resource-usage", library], capture_output=True, text=True, check=True)
    used = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run.stdout)
    # by what a thread loads, three of SiLU·mul and one without, roundings of bf16 and of fp16
    assert len(used) == 4 * (3 + 1) * (4 + 3)
    assert {(stack, local) for _, stack, local in used} == {("0", "0")}
    assert max(int(registers) for registers, _, _ in used) <= 96


# ---- binding ---------------------------------------------------------------------------------------------------------


def run_child(library: Path, *arguments: str, **environment: str) -> dict[str, object]:
    """What the child says: a process has one library, and here there is none."""
    command = [sys.executable, str(CHILD), *arguments]
    env = {**os.environ, cuda_library.ENV_PATH: str(library), "PYTHONPATH": str(ROOT), **environment}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1]) | {"stderr": run.stderr}


@pytest.fixture(scope="module")
def told(library: Path) -> dict[str, object]:
    return run_child(library)


def test_its_ops_have_the_schemas_of_pythons(told: dict[str, object]) -> None:
    assert set(told["schemas"]) == OPS
    for name, schema in told["schemas"].items():
        assert schema == str(getattr(torch.ops.vllm_fusion_plugin, name).default._schema).partition("::")[2]


def test_it_runs_cuda_tensors_where_it_is_chosen(told: dict[str, object]) -> None:
    assert told["bound"] == {"auto": sorted(OPS), "triton": [], "cuda": sorted(OPS)}
    # The dispatcher calls it itself: for CUDA its kernel is not one in Python.
    assert told["in_python"] == {"auto": False, "triton": True, "cuda": False}
    assert "Overriding" not in told["stderr"]


def test_what_it_does_not_do_goes_on_to_python(told: dict[str, object]) -> None:
    """All arguments arrive, and all results come back: there on CPU tensors, which it has no kernel for."""
    assert told["silu_mul"] == [True, True, True]
    assert told["group"] == [True, True]


def test_errors_are_those_of_python(told: dict[str, object]) -> None:
    [value_error, other] = told["errors"]
    assert value_error == ["ValueError", "group_size=7 is not supported; allowed: 64, 128"]
    assert other == ["RuntimeError", "KeyError: 'something else'"]


@pytest.mark.parametrize("content, reason", [(None, "csrc is not built"), (b"no library", "cannot be loaded")])
def test_without_a_library_kernels_are_tritons(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "_C.so"
    if content is not None:
        path.write_bytes(content)
    told = run_child(path, "without")
    assert told["bound"] == []
    assert told["in_python"] is True
    assert reason in told["why_not"]
    assert ("cannot be loaded" in told["stderr"]) == (content is not None)
