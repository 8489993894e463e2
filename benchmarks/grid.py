# SPDX-License-Identifier: Apache-2.0
"""What every benchmark of an op shares: the grid of shapes, the result file, where ours is slower, and `--tune`.

A benchmark has a `Workload` for each op and calls `main`. For exactness.py it also has a `Producer` (producer.py).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import timing
import torch

WIDTHS = (512, 1536, 2048, 4096, 7168, 12288, 14336, 18432)
ROWS = tuple(2**i for i in range(15))

Tensors = tuple[torch.Tensor | None, ...]
Launch = Callable[..., object]


class Workload(ABC):
    """One op in one mode: what it works on, what it has to move, and the implementations to time."""

    op: ClassVar[str]
    modes: ClassVar[tuple[str, ...]]
    """All modes; the first is what runs if none is asked for."""

    @classmethod
    def of(cls, mode: str) -> list[Workload]:
        """What one run times: one workload a mode, or several that differ in more than rows and width."""
        return [cls(mode)]

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.words = mode.split(",")

    @property
    def form(self) -> str:
        """What comes before the quantiser rounds as vLLM's native layer does (if the mode has the word) or as its CUDA op
        does. Only for ops that have both."""
        return "native" if "native" in self.words else "custom_op"

    def widths(self, asked: Sequence[int]) -> Sequence[int]:
        """Those of the widths asked for that it has."""
        return asked

    def fields(self) -> dict[str, Any]:
        """What its rows say besides op, rows, width, dtype and mode."""
        return {}

    def compared(self, sets: list[Tensors]) -> dict[str, Any]:
        """How the bytes of ours and of what it replaces compare, where this is no matter of exactness.py: fields of a row
        of ours."""
        return {}

    @abstractmethod
    def inputs(self, rows: int, width: int, dtype: torch.dtype) -> Tensors:
        """What an implementation is called with, outputs to write to included."""

    @abstractmethod
    def moved_bytes(self, rows: int, width: int) -> int:
        """Least traffic: every input read once, every output written once."""

    @abstractmethod
    def ours(self, tile: Any, *inputs: torch.Tensor | None) -> None:
        """Our kernel on `inputs`, with the tile given, or, None, with the one that it chooses."""

    @abstractmethod
    def others(self) -> dict[str, Launch]:
        """What ours is compared with: name -> function of `inputs`."""

    def tiles(self, rows: int, width: int) -> Iterator[Any]:
        """Tiles for --tune to try, a NamedTuple each; none if there is nothing to choose."""
        return iter(())

    def tile(self, rows: int, width: int) -> Any:
        """The tile that our kernel chooses."""
        return None

    def input_sets(self, rows: int, width: int, dtype: torch.dtype) -> list[Tensors]:
        return [self.inputs(rows, width, dtype) for _ in range(timing.set_count(self.moved_bytes(rows, width)))]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled as vLLM compiles: one kernel a width, for any number of rows but 1, which torch always compiles on
    its own. Rows are the first dimension of every tensor with more than one."""
    # Otherwise from its second width on, torch would compile it for any.
    torch._dynamo.config.automatic_dynamic_shapes = False
    run = torch.compile(function)

    def call(*tensors: torch.Tensor | None) -> Any:
        for t in tensors:
            if t is not None and t.dim() > 1 and t.shape[0] > 1:
                torch._dynamo.mark_dynamic(t, 0)
        return run(*tensors)

    return call


def measure(args: argparse.Namespace, workloads: Sequence[Workload]) -> None:
    import vllm._custom_ops  # noqa: F401  registers torch.ops._C

    bandwidth, found = timing.copy_bandwidth()
    copies = {"copy_tb_per_s": {name: round(speed / 1e6, 3) for name, speed in found.items()}}
    print(f"best copy {bandwidth / 1e6:.3f} TB/s")
    results: list[dict[str, Any]] = []
    for workload, dtype in itertools.product(workloads, args.dtypes):
        # A compiled function that meets many widths; none of them may fall back to eager.
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = torch._dynamo.config.cache_size_limit = 64
        impls = {"ours": functools.partial(workload.ours, None), **workload.others()}
        impls = {name: launch for name, launch in impls.items() if not args.impls or name in args.impls}
        for width in workload.widths(args.widths):
            timing.write(args.out, results, **copies)  # what is there by now survives a run cut short
            for rows in args.rows:
                sets = workload.input_sets(rows, width, dtype)
                floor = workload.moved_bytes(rows, width) / bandwidth
                at = {
                    "op": workload.op,
                    "M": rows,
                    "H": width,
                    "dtype": str(dtype).removeprefix("torch."),
                    "mode": workload.mode,
                    **workload.fields(),
                }
                compared = {"ours": workload.compared(sets)} if "ours" in impls else {}
                times = {impl: timing.graph_us(launch, sets) for impl, launch in impls.items()}
                results += [
                    at | {"impl": impl, "us": round(us, 3), "floor_us": round(floor, 3)} | compared.get(impl, {})
                    for impl, us in times.items()
                ]
                if args.verbose:
                    listed = ", ".join(f"{impl} {us:.2f}" for impl, us in times.items())
                    where = " ".join(f"{k}={v}" for k, v in {"M": rows, "H": width, **workload.fields()}.items())
                    listed += "".join(f", {k} {v}" for k, v in compared.get("ours", {}).items())
                    print(f"{workload.op} {workload.mode} {where} floor {floor:.2f}: {listed}", flush=True)
                del sets
    timing.write(args.out, results, **copies)
    verdict(results)


def verdict(rows: list[dict[str, Any]]) -> None:
    """Where ours is slower than another implementation, and how near the floor the large shapes are."""
    widest = max((r["H"] for r in rows), default=0)
    by_shape: dict[tuple[Any, ...], dict[str, float]] = {}
    for r in rows:
        h = f"{r['H']} N={r['N']}" if "N" in r else r["H"]
        shape = (r["op"], r["mode"], r["dtype"], r["M"], h, r["floor_us"])
        by_shape.setdefault(shape, {})[r["impl"]] = r["us"]
    for (op, mode, dtype, m, h, floor), us in by_shape.items():
        if "ours" not in us:
            continue
        slower = {k: v for k, v in us.items() if v < us["ours"]}
        if slower:
            print(f"SLOWER {op} {mode} {dtype} M={m} H={h}: ours {us['ours']:.2f}, {slower}")
        if m == 8192 or (m in (1, 16) and h == widest):
            times = ", ".join(f"{k} {v:.2f}" for k, v in us.items())
            print(f"{op} {mode} {dtype} M={m} H={h}: {times}; floor {floor:.2f} = {floor / us['ours']:.1%}")


def tune(args: argparse.Namespace, workloads: Sequence[Workload]) -> None:
    """Time tiles by shape, and write them fastest first."""
    table = []
    for workload, width, rows in itertools.product(workloads, args.widths, args.rows):
        sets = workload.input_sets(rows, width, torch.bfloat16)
        count = 12 if rows > 512 else None
        found = []
        for tile in workload.tiles(rows, width):
            launches = [(tile, *inputs) for inputs in sets]
            found.append((timing.graph_us(workload.ours, launches, count), tile))
        if not found:
            continue
        found.sort()
        tiles = [(round(us, 3), *tile) for us, tile in found]
        table.append({"op": workload.op, "mode": workload.mode, "M": rows, "H": width, "tiles": tiles})
        now = workload.tile(rows, width)
        rank = next((f"{us:.2f}" for us, tile in found if tile == now), "not tried")
        best = "  ".join(f"{us:.2f} {tuple(tile)}" for us, tile in found[:4])
        print(f"{workload.op} {workload.mode} M={rows} H={width}: {best} | now {tuple(now)} {rank}")
        del sets
    timing.write(args.out.with_suffix(".tiles.json"), table)


def main(
    doc: str | None,
    kinds: Sequence[type[Workload]],
    widths: tuple[int, ...] = WIDTHS,
    rows: tuple[int, ...] = ROWS,
) -> None:
    """The command line of a benchmark of these ops."""
    name = pathlib.Path(sys.argv[0]).stem.removeprefix("bench_")
    by_op = {kind.op: kind for kind in kinds}
    modes = list(dict.fromkeys(mode for kind in kinds for mode in kind.modes))
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time tiles instead of implementations")
    parser.add_argument("--ops", nargs="*", default=list(by_op), choices=list(by_op))
    parser.add_argument("--modes", nargs="*", choices=modes, help="those that an op has; default: its first")
    parser.add_argument("--widths", nargs="*", type=int, default=widths)
    parser.add_argument("--rows", nargs="*", type=int, default=rows)
    parser.add_argument("--impls", nargs="*", help="default: all")
    parser.add_argument("--fp16", action="store_true", help="fp16 as well as bf16")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=timing.results_folder() / f"{name}.json")
    args = parser.parse_args()
    args.dtypes = (torch.bfloat16, torch.float16) if args.fp16 else (torch.bfloat16,)
    chosen = [by_op[op] for op in args.ops]
    modes_of = {kind: [mode for mode in kind.modes if mode in (args.modes or kind.modes[:1])] for kind in chosen}
    workloads = [workload for kind, modes in modes_of.items() for mode in modes for workload in kind.of(mode)]
    if not workloads:
        parser.error(f"no op of {', '.join(args.ops)} has a mode of {', '.join(args.modes)}")
    (tune if args.tune else measure)(args, workloads)
