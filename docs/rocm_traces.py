# SPDX-License-Identifier: Apache-2.0
"""Make docs/rocm-traces.md from docs/rocm/*.json, each of which `nox -s rocm-0.33.0` writes for one vLLM.

python docs/rocm_traces.py            # write the tables
python docs/rocm_traces.py --check    # exit status 1 if they are others
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generated

FOLDER = Path(__file__).parent / "rocm"
PAGE = Path(__file__).parent / "rocm-traces.md"

HEAD = """\
# ROCm: traces and machine code

`docs/rocm_traces.py` makes these tables from [one file a version](rocm), which `nox -s rocm-0.33.0` writes. Nothing of it
ran on a GPU: [what that shows and what not](rocm.md).

## Fusions

Over all layers of the models of [tests/models](../tests/models): norms with their quantisers, SiLU·mul with theirs, pairs of
MLA's norms, quantisers in this package's kernel by themselves. vLLM's: how many of these its own passes made.

"""

MACHINE_CODE = """
## Machine code

Registers (vector, scalar), LDS in bytes, threads of a program, size of the hsaco. No kernel spills or stores single
bytes, and each converts to FP8 in hardware.

"""

KINDS = {
    "norms": (
        "rmsnorm_quant_fusion_pass", "RMSNormQuantFusionPass", "rocm_aiter_rms_norm_quant_fusion_pass",
        "RocmAiterRMSNormQuantFusionPass",
    ),
    "SiLU·mul": ("activation_quant_fusion_pass", "rocm_aiter_silu_mul_fp8_group_quant_fusion_pass"),
    "pairs": ("mla_dual_rms_norm_fusion_pass",),
    "alone": ("group_quant_pass",),
}  # fmt: skip


def load() -> list[dict[str, Any]]:
    """Columns, newest vLLM first."""
    columns = [json.loads(path.read_text()) for path in FOLDER.glob("*.json")]
    return sorted(
        columns, key=lambda column: [int(part) for part in column["versions"]["vllm"].split(".")], reverse=True
    )


def page(columns: list[dict[str, Any]]) -> str:
    text = HEAD
    for column in columns:
        text += f"### vLLM {column['versions']['vllm']}, {column['date']}\n\n"
        text += table(
            ["GPU", "AITER", "model", "vLLM alone", "with this package", "with `rocm_kernels=aiter`"],
            [
                [
                    row["gpu"],
                    "on" if row["aiter"] else "off",
                    row["model"],
                    *(cell(row.get(how)) for how in ("stock", "exact", "aiter_kernels")),
                ]
                for row in column["traces"]
            ],
        )
        text += "\n"
    text = text.rstrip("\n") + "\n" + MACHINE_CODE
    for column in columns[:1]:
        versions = column["versions"]
        text += f"vLLM {versions['vllm']}'s Triton, {versions['triton']}:\n\n"
        names = dict.fromkeys(name for kernels in column["kernels"].values() for name in kernels)
        rows = [[name, *(code(kernels.get(name)) for kernels in column["kernels"].values())] for name in names]
        text += table(["kernel", *column["kernels"]], rows)
    return text


def table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    if "failed" in result:
        return f"failed: {result['failed']}".replace("|", "\\|")
    counts = {kind: sum(result["fusions"].get(name, 0) for name in names) for kind, names in KINDS.items()}
    text = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "none"
    by_vllm, aiters = result.get("by_vllms_passes", 0), result.get("aiters_ops", 0)
    also = [*([f"{by_vllm} vLLM's"] if by_vllm else []), *([f"{aiters} in AITER's ops"] if aiters else [])]
    return text + (f" ({', '.join(also)})" if also else "")


def code(kernel: Any) -> str:
    if not isinstance(kernel, dict):
        return "–" if kernel is None else str(kernel)
    return f"{kernel['vgpr']}, {kernel['sgpr']}; {kernel['lds']}; {kernel['threads']}; {kernel['hsaco'] / 1024:.0f} KiB"


if __name__ == "__main__":
    generated.run(PAGE, lambda: page(load()), __file__)
