# SPDX-License-Identifier: Apache-2.0
"""What hatchling runs for a wheel: the CUDA kernels go in where nvcc is, or else it is Triton's alone, and says so.

VLLM_FUSION_PLUGIN_BUILD_CUDA=0: without them although nvcc is there; =1: an error where it is not. An editable installation
has those that csrc/build.py has put into its tree.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SWITCH = "VLLM_FUSION_PLUGIN_BUILD_CUDA"


class CudaKernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        wanted = os.environ.get(SWITCH, "")
        if wanted not in ("", "0", "1"):
            raise ValueError(
                f"{SWITCH}={wanted!r}; allowed: 1 (with CUDA kernels), 0 (without), or unset (if nvcc is there)"
            )
        build = _csrc_build(Path(self.root))
        nvcc = build.find_nvcc()
        if wanted == "1" and nvcc is None:
            raise RuntimeError(f"{SWITCH}=1, and no nvcc in $CUDA_HOME/bin, on the path, or in /usr/local/cuda/bin")
        if wanted == "0" or nvcc is None:
            why = f"{SWITCH}=0" if wanted == "0" else "no nvcc"
            self.app.display_warning(f"{why}: without CUDA kernels, Triton's run")
            return
        library = Path(self.directory) / "_C.so"
        self.app.display_info(f"CUDA kernels by {nvcc}; {SWITCH}=0 goes without")
        archs = tuple(os.environ.get(f"{SWITCH}_ARCHS", "").split()) or build.ARCHS
        try:
            build.build(nvcc, library, archs)
        except (OSError, subprocess.CalledProcessError) as e:  # a CUDA before 13.0, no host compiler
            if wanted == "1":
                raise
            self.app.display_warning(f"{nvcc} cannot build the CUDA kernels, Triton's run: {e}")
            return
        build_data["force_include"][str(library)] = "vllm_fusion_plugin/_C.so"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"  # no Python ABI: it is no Python module

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        (Path(self.directory) / "_C.so").unlink(missing_ok=True)


def _csrc_build(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("csrc_build", root / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
