# SPDX-License-Identifier: Apache-2.0
"""Check wheels with CUDA kernels: what the library asks of torch, its size, and that it loads and binds with a torch.

python csrc/check_wheel.py dist/*.whl                                      # symbols and size
python csrc/check_wheel.py dist/*.whl --python .venv-2.11/bin/python ...   # and with the torch of each of these
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBRARY = "vllm_fusion_plugin/_C.so"
MOST = 24 * 2**20  # bytes
NEWEST_LIBC = (2, 28)  # that of manylinux_2_28, as torch's own wheels

LOADING = """
import sys
import torch
from vllm_fusion_plugin.kernels import cuda_library
from vllm_fusion_plugin.ops import group_quant, registry, silu_mul_quant
bound = sorted(registry.bind_all())
sys.exit(cuda_library.why_not()) if not bound else print(f"torch {torch.__version__}: {', '.join(bound)}")
"""


def problems_of(library: Path) -> list[str]:
    """What a library must not ask for."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in listed.splitlines() if line.split()[0] != "w"]
    allowed = re.compile(
        r"(aoti_)?torch_\w+$|(__)?cuda[A-Z]\w+@libcudart\.so\.\d+$|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$"
    )
    found = [f"{s}: neither torch's stable ABI nor the C, C++ or CUDA runtime" for s in symbols if not allowed.match(s)]
    newest = max((tuple(map(int, v.split("."))) for v in re.findall(r"@GLIBC_([\d.]+)", listed)), default=(0,))
    if newest > NEWEST_LIBC:
        found.append(f"needs glibc {'.'.join(map(str, newest))}; allowed: up to {'.'.join(map(str, NEWEST_LIBC))}")
    return found


def check(wheel: Path, pythons: list[str]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        if LIBRARY not in archive.namelist():
            return [f"no {LIBRARY}"]
        archive.extractall(folder)
        library = Path(folder) / LIBRARY
        found = problems_of(library)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, the library {library.stat().st_size / 2**20:.1f}")
        if library.stat().st_size > MOST:
            found.append(f"{LIBRARY} has {library.stat().st_size} bytes; allowed: {MOST}")
        for python in pythons:
            run = subprocess.run([python, "-c", LOADING], cwd=folder, capture_output=True, text=True)
            print(run.stdout, end="")
            if run.returncode:
                found.append(f"with {python}: {run.stderr[-500:]}")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--python", nargs="*", default=[], help="interpreters with a torch")
    args = parser.parse_args()
    problems = [f"{wheel.name}: {problem}" for wheel in args.wheels for problem in check(wheel, args.python)]
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()
