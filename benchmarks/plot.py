# SPDX-License-Identifier: Apache-2.0
"""The README's figure, from a committed result:

python benchmarks/plot.py                            # docs/silu_mul_quant.png
"""

from __future__ import annotations

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
# impl -> (label, colour, marker); Okabe and Ito's colours, which colour-blind readers tell apart
STYLES = {
    "stock_fused": ("vLLM's fused op", "#D55E00", "s"),
    "inductor": ("torch.compile", "#CC79A7", "^"),
    "unfused": ("vLLM's two ops, unfused", "#0072B2", "D"),
    "ours": ("vllm-fusion-plugin", "#009E73", "o"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results/h200/0.32.0/silu_mul_quant.json")
    parser.add_argument("--width", type=int, default=12288)
    parser.add_argument("--out", type=pathlib.Path, default=HERE.parent / "docs" / "silu_mul_quant.png")
    args = parser.parse_args()
    record = json.loads(args.results.read_text())
    rows = [r for r in record["rows"] if r["H"] == args.width]

    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=144)
    for impl, (label, colour, marker) in STYLES.items():
        points = sorted((r["M"], r["us"]) for r in rows if r["impl"] == impl)
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4, linewidth=1.6)
    floor = sorted({(r["M"], r["floor_us"]) for r in rows if r["M"] >= 64})
    axes.plot(
        *zip(*floor, strict=True), label="bytes at the best copy's bandwidth", color="0.6", linestyle=":", zorder=0
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    tokens = sorted({r["M"] for r in rows})
    axes.set_xticks(tokens, [str(m) for m in tokens], fontsize=8)
    axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    axes.set_xlabel("tokens")
    axes.set_ylabel("µs (log)")
    axes.set_title(f"SiLU·mul + FP8 group quantisation, width {args.width}, {record['gpu']}", fontsize=11)
    axes.grid(True, which="major", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
