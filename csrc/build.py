# SPDX-License-Identifier: Apache-2.0
"""Build the library of CUDA kernels: needs nvcc (CUDA 13.0 or later) and its host compiler, and neither torch nor a GPU.

python csrc/build.py                                # for all GPUs, into vllm_fusion_plugin/_C.so
python csrc/build.py --archs 90 --out /tmp/_C.so    # for one
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "vllm_fusion_plugin" / "_C.so"
# Compute capabilities that get machine code; each runs on later ones of its major version, too. No kernel needs what is only
# in "90a" or "100a".
ARCHS = ("80", "89", "90", "100", "120")
PTX = "90"  # what the driver compiles for all other, later GPUs
# The CUDA runtime is torch's, which shares its state: a torch for another CUDA cannot load the library.
TORCH = ("torch_cpu", "torch_cuda")


def find_nvcc() -> str | None:
    """$CUDA_HOME's, or the one on the path, or where CUDA is installed by default."""
    home = os.environ.get("CUDA_HOME")
    for candidate in (f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


def code(archs: tuple[str, ...], ptx: str | None) -> list[str]:
    """nvcc's options for machine code, and for PTX."""
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return options + ([f"-gencode=arch=compute_{ptx},code=compute_{ptx}"] if ptx else [])


def compile_options() -> list[str]:
    return ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]


def build(nvcc: str, out: Path, archs: tuple[str, ...] = ARCHS, ptx: str | None = PTX) -> None:
    """Compile all sources, as many at once as there are cores; CalledProcessError with nvcc's words on standard error."""
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        jobs = []
        for source in sorted([*HERE.glob("*.cu"), *HERE.glob("*.cpp")]):
            objects.append(f"{folder}/{source.stem}.o")
            jobs.append([nvcc, *compile_options(), *code(archs, ptx), "-c", str(source), "-o", objects[-1]])
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(functools.partial(subprocess.run, check=True), jobs))
        # The loader finds torch's libraries in the process, by name; empty ones of these names stand in for them here.
        for name in TORCH:
            stand_in = ["-Xlinker", f"-soname=lib{name}.so", "-o", f"{folder}/lib{name}.so"]
            Path(f"{folder}/empty.cpp").touch()
            subprocess.run([nvcc, "-shared", "-cudart=none", *stand_in, f"{folder}/empty.cpp"], check=True)
        libraries = [f"-L{folder}", "-Xlinker=--no-as-needed", *(f"-l{name}" for name in TORCH)]
        out.parent.mkdir(parents=True, exist_ok=True)
        link = [nvcc, "-shared", "-cudart=shared", *code(archs, ptx), "-o", str(out), *objects, *libraries]
        subprocess.run(link, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--archs", nargs="*", default=ARCHS, help=f"compute capabilities; default: {' '.join(ARCHS)}")
    parser.add_argument("--no-ptx", action="store_true")
    args = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        parser.exit(1, "no nvcc: not in $CUDA_HOME/bin, on the path, or in /usr/local/cuda/bin\n")
    build(nvcc, args.out, tuple(args.archs), None if args.no_ptx else PTX)


if __name__ == "__main__":
    main()
