# SPDX-License-Identifier: Apache-2.0
"""SiLU·mul + FP8 quantiser against vLLM's fused op, vLLM's unfused pair and Inductor.

python benchmarks/silu_mul_quant.py                  # the grid, to results/silu_mul_quant.json
python benchmarks/silu_mul_quant.py --tune           # tiles by shape, best first
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
from collections.abc import Callable

import timing
import torch
import torch.nn.functional as F

from vllm_fusion_plugin.kernels import silu_mul_quant as kernels
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, FP8_MAX, empty_group_scales

WIDTHS = (512, 1536, 2048, 4096, 7168, 12288, 14336, 18432)
ROWS = tuple(2**i for i in range(15))
GROUP_SIZE = 128
EPS = 1e-10

# mode -> (group_size, column_major, tma_aligned, ue8m0, act_form)
MODES = {
    "row": (128, False, False, False, "custom_op"),
    "column": (128, True, False, False, "custom_op"),
    "column,native": (128, True, False, False, "native"),
    "tma,ue8m0": (128, True, True, True, "custom_op"),
    "group64": (64, False, False, False, "custom_op"),
}


def moved_bytes(rows: int, width: int, group_size: int) -> int:
    """Least traffic: gate and up read once, codes and scales written once."""
    return rows * width * 5 + rows * (width // group_size) * 4


def inductor_expression(x: torch.Tensor, group_size: int, column_major: bool, ue8m0: bool):
    """What a user would write, for torch.compile."""
    half = x.shape[-1] // 2
    y = F.silu(x[:, :half]) * x[:, half:]
    groups = y.view(x.shape[0], -1, group_size)
    scale = groups.abs().amax(dim=-1, keepdim=True).float() / FP8_MAX
    if ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.clamp(min=1.0 / (FP8_MAX * 512.0))
    codes = (groups / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE).view(x.shape[0], half)
    scale = scale.squeeze(-1)
    return codes, scale.t().contiguous().t() if column_major else scale


def implementations(mode: str, dtype: torch.dtype) -> dict[str, Callable[..., object]]:
    group_size, column, tma, ue8m0, act_form = MODES[mode]
    c = torch.ops._C

    def ours(x, y, codes, scales):
        kernels.silu_mul_group_fp8_quant(x, codes, scales, group_size, ue8m0, EPS, act_form, "custom_op")

    def unfused(x, y, codes, scales):
        c.silu_and_mul(y, x)
        c.per_token_group_fp8_quant(y, codes, scales, group_size, EPS, -FP8_MAX, FP8_MAX, ue8m0, column, tma)

    def stock_fused(x, y, codes, scales):
        c.silu_and_mul_per_block_quant(codes, x, scales, group_size, None, column)

    # One kernel a width, as vLLM compiles, for any number of rows but 1, which torch always compiles on its own.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.cache_size_limit = 64
    compiled = torch.compile(lambda x: inductor_expression(x, group_size, column, ue8m0))

    def inductor(x, y, codes, scales):
        if x.shape[0] > 1:
            torch._dynamo.mark_dynamic(x, 0)
        compiled(x)

    impls = {"ours": ours, "unfused": unfused, "inductor": inductor}
    if not ue8m0:  # stock's op knows no UE8M0: it would write other scales
        impls["stock_fused"] = stock_fused
    return impls


def input_sets(rows: int, width: int, dtype: torch.dtype, mode: str) -> list[tuple[torch.Tensor, ...]]:
    group_size, column, tma, _, _ = MODES[mode]
    count = timing.set_count(moved_bytes(rows, width, group_size))
    pool = torch.randn(count, rows, 2 * width, device="cuda", dtype=dtype)
    return [
        (
            x,
            x.new_empty((rows, width)),
            x.new_empty((rows, width), dtype=FP8_DTYPE),
            empty_group_scales(x, rows, width // group_size, column, tma),
        )
        for x in pool
    ]


def grid(args: argparse.Namespace) -> None:
    import vllm._custom_ops  # noqa: F401  registers torch.ops._C

    bandwidth, found = timing.copy_bandwidth()
    copies = {"copy_tb_per_s": {name: round(speed / 1e6, 3) for name, speed in found.items()}}
    print(f"best copy {bandwidth / 1e6:.3f} TB/s")
    rows_out = []
    for mode, dtype in itertools.product(
        args.modes, (torch.bfloat16, torch.float16) if args.fp16 else (torch.bfloat16,)
    ):
        impls = {k: v for k, v in implementations(mode, dtype).items() if k in args.impls}
        for width, rows in itertools.product(args.widths, args.rows):
            if rows == args.rows[0]:  # what is there by now survives a run cut short
                timing.write(args.out, rows_out, **copies)
            sets = input_sets(rows, width, dtype, mode)
            floor = moved_bytes(rows, width, MODES[mode][0]) / bandwidth
            line = []
            for impl, launch in impls.items():
                us = timing.graph_us(launch, sets)
                line.append(f"{impl} {us:.2f}")
                rows_out.append({
                    "op": "silu_mul_group_fp8_quant", "M": rows, "H": width, "dtype": str(dtype).removeprefix("torch."),
                    "mode": mode, "impl": impl, "us": round(us, 3), "floor_us": round(floor, 3),
                })  # fmt: skip
            if args.verbose:
                print(f"{mode} M={rows} H={width} floor {floor:.2f}: {', '.join(line)}")
            del sets
    timing.write(args.out, rows_out, **copies)
    verdict(rows_out)


def verdict(rows: list[dict]) -> None:
    """Where ours is slower than another implementation, and how near the floor the large shapes are."""
    by_shape: dict[tuple, dict[str, float]] = {}
    for r in rows:
        by_shape.setdefault((r["mode"], r["dtype"], r["M"], r["H"], r["floor_us"]), {})[r["impl"]] = r["us"]
    for (mode, dtype, m, h, floor), us in by_shape.items():
        slower = {k: v for k, v in us.items() if k != "ours" and v < us["ours"]}
        if slower:
            print(f"SLOWER {mode} {dtype} M={m} H={h}: ours {us['ours']:.2f}, {slower}")
        if m == 8192 or (m in (1, 16) and h == 12288):
            times = ", ".join(f"{k} {v:.2f}" for k, v in us.items())
            print(f"{mode} {dtype} M={m} H={h}: {times}; floor {floor:.2f} = {floor / us['ours']:.1%}")


def tune(args: argparse.Namespace) -> None:
    table = []
    for mode, width, rows in itertools.product(args.modes, args.widths, args.rows):
        group_size, _, _, ue8m0, act_form = MODES[mode]
        sets = input_sets(rows, width, torch.bfloat16, mode)
        groups = width // group_size
        found = []
        for tile_groups, tile_rows, warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4, 8, 16)):
            per_thread = tile_groups * tile_rows * group_size / (32 * warps)
            if not 4 <= per_thread <= 32 or tile_groups * 2 > 3 * groups or tile_rows > rows:
                continue
            tile = kernels.Tile(tile_rows, tile_groups, warps)

            forms = (group_size, ue8m0, EPS, act_form, "custom_op", tile)
            launches = [(x, codes, scales, *forms) for x, _, codes, scales in sets]
            us = timing.graph_us(kernels.silu_mul_group_fp8_quant, launches, 12 if rows > 512 else None)
            found.append((us, tile))
        found.sort()
        table.append({"mode": mode, "M": rows, "H": width, "tiles": [(round(us, 3), *tile) for us, tile in found]})
        now = kernels.group_tile(rows, groups, group_size)
        rank = next((f"{us:.2f}" for us, tile in found if tile == now), "not tried")
        best = "  ".join(f"{us:.2f} {tuple(tile)}" for us, tile in found[:4])
        print(f"{mode} M={rows} H={width}: {best} | now {tuple(now)} {rank}")
    timing.write(args.out.with_suffix(".tiles.json"), table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time tiles instead of implementations")
    parser.add_argument("--modes", nargs="*", default=["column,native"], choices=list(MODES))
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--impls", nargs="*", default=["ours", "unfused", "stock_fused", "inductor"])
    parser.add_argument("--fp16", action="store_true", help="fp16 as well as bf16")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=timing.RESULTS / "silu_mul_quant.json")
    args = parser.parse_args()
    (tune if args.tune else grid)(args)


if __name__ == "__main__":
    main()
