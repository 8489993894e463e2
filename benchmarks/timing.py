# SPDX-License-Identifier: Apache-2.0
"""How every benchmark here measures and writes down."""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vllm_fusion_plugin.kernels.block_gemm import gpu_name

RESULTS = pathlib.Path(__file__).parent / "results"
REPLAYS = 9
SMALL_SETS = 8  # of inputs, of those that L2 holds


def results_folder() -> pathlib.Path:
    """results/<gpu>/<vllm>, where a benchmark writes if nobody names a file: results/h200/0.32.0."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no-gpu"
    return RESULTS / gpu_name(gpu) / (_version("vllm") or "no-vllm")


def graph_us(launch: Callable[..., Any], input_sets: Sequence[tuple[Any, ...]], launches: int | None = None) -> float:
    """Median µs of one launch, from replays of a CUDA graph that goes round the input sets.

    A graph takes Python and the driver out of the number, as serving does; going round several sets keeps a kernel from
    finding in L2 what it wrote itself a moment ago.
    """
    count = launches or max(len(input_sets), 24)
    for inputs in input_sets:
        launch(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            launch(*input_sets[i % len(input_sets)])
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def set_count(bytes_per_set: int) -> int:
    """How many input sets to go round. Large ones exceed the L2 four times over, so that every byte comes from memory; of
    those under 2 MiB, which the GEMM before has just written and left in L2 when served, there are SMALL_SETS."""
    return SMALL_SETS if bytes_per_set < 2 * 2**20 else max(4, -(-256 * 2**20 // bytes_per_set))


def copy_bandwidth() -> tuple[float, dict[str, float]]:
    """Bytes per µs, read and written, of the best copy found, and of each tried.

    Also tried, and not the ceiling, as it is no copy: reading four bytes for each one written, which is nearly the mix of
    SiLU·mul + quantise. It goes 4 % faster than any copy.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, tl.load(x_ptr + i))

    @triton.jit
    def reduce_copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = tl.load(x_ptr + i) ^ tl.load(x_ptr + n + i) ^ tl.load(x_ptr + 2 * n + i) ^ tl.load(x_ptr + 3 * n + i)
        tl.store(y_ptr + i, total)

    found = {}
    for megabytes in (128, 256, 512):
        n = megabytes * 2**20 // 4
        numbers = torch.randint(0, 2**31 - 1, (4, n), dtype=torch.int32, device="cuda")
        sets = [(numbers[0], numbers[1]), (numbers[2], numbers[3])]
        found[f"torch {megabytes} MiB"] = 8 * n / graph_us(lambda x, y: y.copy_(x), sets, 4)
        for block, warps in ((1024, 4), (2048, 4), (4096, 8)):
            launch = lambda x, y: copy[(n // block,)](x, y, BLOCK=block, num_warps=warps)  # noqa: B023, E731
            found[f"triton {megabytes} MiB, {block}/{warps}"] = 8 * n / graph_us(launch, sets, 4)
        m = n // 4
        for block, warps in ((512, 4), (1024, 4), (1024, 8)):
            launch = lambda x, y: reduce_copy[(m // block,)](x, y, m, BLOCK=block, num_warps=warps)  # noqa: B023, E731
            found[f"no copy, 4:1, {megabytes} MiB, {block}/{warps}"] = 20 * m / graph_us(launch, sets, 4)
    return max(v for k, v in found.items() if not k.startswith("no copy")), found


def _commit() -> str:
    """The commit measured; "-dirty" if the package or the benchmark differs from it. A copy of the tree without .git may
    carry it in a file."""
    root = pathlib.Path(__file__).parent.parent
    carried = root / ".commit"
    if carried.exists():
        return carried.read_text().strip()
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _command() -> str:
    """The command line, without where its results went."""
    arguments = list(sys.argv[1:])
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    return " ".join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *arguments])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write(path: pathlib.Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write `rows` with everything needed to measure them again."""
    record = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "vllm": _version("vllm"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "command": _command(),
        **more,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # A row a line: a diff of two results reads like a table.
    head = json.dumps({k: v for k, v in record.items() if k != "rows"}, indent=1)[:-2]
    path.write_text(head + ',\n "rows": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n")
