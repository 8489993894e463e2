# SPDX-License-Identifier: Apache-2.0
"""What CI runs, cheap checks first: `nox`, or `nox -s tests` for the tests alone, or one session by name.

Two environments, because vLLM has two builds that exclude each other: its CPU build, which runs, and its CUDA build, whose
graphs we trace on a machine that need not have a GPU. Both live in .nox/ and are made once; `nox --reuse-venv=never` makes
them afresh.
"""

from __future__ import annotations

import os
import subprocess
import sys

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "types", "tests"]

PYTHON = "3.11"  # vLLM runs on later ones too; torch's CPU wheel comes from a folder that may hold one version's only
CODE = ["vllm_fusion_plugin", "benchmarks", "tests", "noxfile.py"]
VLLM = "0.32.0"
PYTEST = ["pytest>=8", "pytest-timeout>=2.3"]


def pip_settings_for_uv() -> dict[str, str]:
    """Where pip would look for packages, in uv's words: uv reads none of pip's settings, and vLLM's CPU build needs a torch
    that the main package index does not have."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    # "global.find-links='/wheels'" from a file, ":env:.find-links='/wheels'" from PIP_FIND_LINKS, which wins and comes first
    found: dict[str, str] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        found.setdefault(key.rpartition(".")[2], value.strip("'\""))
    return found
