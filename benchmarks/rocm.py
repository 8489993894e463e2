# SPDX-License-Identifier: Apache-2.0
"""This package's kernels on an AMD GPU against the ops that they replace: bytes and times, one table.

    VLLM_ROCM_USE_AITER=1 python benchmarks/rocm.py            # on an MI300X or MI355X, with vLLM's ROCm build; 2 minutes
    python benchmarks/rocm.py --plain                           # anywhere: against plain torch on the CPU, without times

Please send what it prints. Numbers are random; of those that differ, the table has how many of a million.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import aiter_ops
import torch
from rich.console import Console
from rich.table import Table

from vllm_fusion_plugin import compat, roundings
from vllm_fusion_plugin.kernels.fp8 import FORMATS
from vllm_fusion_plugin.kernels.rounding import AITER
from vllm_fusion_plugin.ops.gated_rms_norm_quant import gated_rms_norm_group_fp8_quant, gated_rms_norm_reference
from vllm_fusion_plugin.ops.group_quant import group_fp8_quant
from vllm_fusion_plugin.ops.quant import (
    EPS,
    GroupScales,
    group_fp8_quant_reference,
    static_fp8_quant_reference,
    token_fp8_quant_reference,
)
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs, rms_norm_group_fp8_quant, rms_norm_reference
from vllm_fusion_plugin.ops.silu_mul_quant import (
    silu_mul_group_fp8_quant,
    silu_mul_reference,
    silu_mul_static_fp8_quant,
    silu_mul_token_fp8_quant,
)

GROUP = GroupScales(128)
EPSILON = 1e-6
Outputs = Callable[[], Any]


class Case(NamedTuple):
    name: str
    shape: str
    unfused: Outputs
    ours: Outputs
    aiters: Outputs | None = None
    """AITER's op for both."""


class Theirs:
    """vLLM's ops, or with `plain` what stands for them on a CPU."""

    def __init__(self, plain: bool) -> None:
        self.plain = plain
        self.fp8 = compat.fp8_format() if not plain else "e4m3fnuz"
        self.quant_rounding = "custom_op" if plain else roundings.of(roundings.GROUP_QUANT).name
        self.act_rounding = "custom_op" if plain else roundings.of(roundings.SILU_MUL).name

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        if self.plain:
            return silu_mul_reference(x, self.act_rounding)
        out = x.new_empty(x.shape[0], x.shape[1] // 2)
        torch.ops._C.silu_and_mul(out, x)
        return out

    def norm(self, norm: NormInputs) -> torch.Tensor:
        if self.plain:
            return rms_norm_reference(norm)[0]
        out = torch.empty_like(norm.x)
        torch.ops._C.rms_norm(out, norm.x, norm.weight, norm.epsilon)
        return out

    def group(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.plain:
            return group_fp8_quant_reference(y, GROUP, self.quant_rounding, self.fp8)
        codes, scales = self._codes(y), GROUP.empty(y, *y.shape)
        maximum = FORMATS[self.fp8].max
        torch.ops._C.per_token_group_fp8_quant(y, codes, scales, 128, EPS, -maximum, maximum, False, False, False)
        return codes, scales

    def token(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.plain:
            return token_fp8_quant_reference(y, None, "custom_op", self.fp8)
        codes, scales = self._codes(y), y.new_empty((len(y), 1), dtype=torch.float32)
        torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes, y, scales, None)
        return codes, scales

    def static(self, y: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
        if self.plain:
            return (static_fp8_quant_reference(y, scale, "custom_op", self.fp8),)
        codes = self._codes(y)
        torch.ops._C.static_scaled_fp8_quant(codes, y, scale, **compat.static_quant_extra_arguments())
        return (codes,)

    def _codes(self, y: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(y, dtype=FORMATS[self.fp8].dtype)


def cases(theirs: Theirs, rows: int, device: torch.device) -> Iterator[Case]:
    generator = torch.Generator(device=device).manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    width = 256 if theirs.plain else 4096
    x, gate_up, weight = random(rows, width), random(rows, 2 * width), random(width)
    scale, shape, fp8 = torch.tensor([0.0123], device=device), f"{rows} × {width}", theirs.fp8
    quant = {"quant_rounding": theirs.quant_rounding, "fp8": fp8}
    act = {"act_rounding": theirs.act_rounding, "fp8": fp8}
    norm = NormInputs(x, weight, EPSILON, norm_rounding="custom_op")
    yield Case("group quantiser", shape, lambda: theirs.group(x), lambda: group_fp8_quant(x, GROUP, **quant))
    yield Case(
        "SiLU·mul + group",
        shape,
        lambda: theirs.group(theirs.silu_mul(gate_up)),
        lambda: silu_mul_group_fp8_quant(gate_up, GROUP, **quant | act),
    )
    yield Case(
        "SiLU·mul + token",
        shape,
        lambda: theirs.token(theirs.silu_mul(gate_up)),
        lambda: silu_mul_token_fp8_quant(gate_up, **act),
    )
    yield Case(
        "SiLU·mul + static",
        shape,
        lambda: theirs.static(theirs.silu_mul(gate_up), scale),
        lambda: (silu_mul_static_fp8_quant(gate_up, scale, **act),),
    )
    yield Case(
        "RMS norm + group",
        shape,
        lambda: theirs.group(theirs.norm(norm)),
        lambda: rms_norm_group_fp8_quant(norm, GROUP, **quant),
    )
    if theirs.plain or compat.has_aiter_op(compat.AITER_GROUP_QUANT.rpartition(".")[2]):
        yield from _aiters_cases(theirs, x, gate_up, random)


def _aiters_cases(
    theirs: Theirs, x: torch.Tensor, gate_up: torch.Tensor, random: Callable[..., torch.Tensor]
) -> Iterator[Case]:
    """With AITER's group quantiser, and beside AITER's op for both."""
    rows, width = x.shape
    fp8 = "e4m3fnuz_240" if theirs.plain else compat.fp8_format_of_aiter()
    quant = {"quant_rounding": AITER, "fp8": fp8}
    heads, z, weight = random(rows, width // 128, 128), random(rows, width // 128, 128), random(128)

    def group(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if theirs.plain:
            return group_fp8_quant_reference(y, GROUP, AITER, fp8)
        return torch.ops.vllm.rocm_aiter_group_fp8_quant(y, 128)

    def aiters(name: str, plain: Outputs, *arguments: Any) -> Outputs:
        return plain if theirs.plain else lambda: compat.aiter_op(name)(*arguments)

    shape = f"{rows} × {width}"
    yield Case("AITER's group quantiser", shape, lambda: group(x), lambda: group_fp8_quant(x, GROUP, **quant))
    yield Case(
        "SiLU·mul + AITER's",
        shape,
        lambda: group(theirs.silu_mul(gate_up)),
        lambda: silu_mul_group_fp8_quant(gate_up, GROUP, act_rounding=theirs.act_rounding, **quant),
        aiters("rocm_aiter_act_mul_and_fp8_group_quant", lambda: aiter_ops.silu_mul_group(gate_up, fp8), gate_up, 128),
    )

    def token(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if theirs.plain:
            return token_fp8_quant_reference(y, None, AITER, fp8)
        return torch.ops.vllm.rocm_aiter_per_token_quant(y, FORMATS[fp8].dtype)

    yield Case(
        "SiLU·mul + AITER's token",
        shape,
        lambda: token(theirs.silu_mul(gate_up)),
        lambda: silu_mul_token_fp8_quant(gate_up, act_rounding=theirs.act_rounding, **quant),
    )

    def plain_gated() -> tuple[torch.Tensor, torch.Tensor]:
        return aiter_ops.gated_rms_norm_group(heads.view(-1, 128), z.view(-1, 128), weight, EPSILON, theirs.fp8)

    gated = (heads.view(-1, 128), weight, None, z.view(-1, 128), EPSILON, True, "silu", 128)
    yield Case(
        "gated RMS norm + AITER's",
        shape,
        lambda: group(gated_rms_norm_reference(heads, z, weight, EPSILON).view(rows, width)),
        lambda: gated_rms_norm_group_fp8_quant(
            heads, z, weight, EPSILON, width // 128, GROUP, norm_rounding="eager", **quant
        ),
        aiters("rocm_aiter_fused_rms_gated_fp8_group_quant", plain_gated, *gated),
    )


def differing(found: Any, expected: Any) -> list[int]:
    """Of a million codes, and of a million scales, how many bytes differ; NaN are equal."""
    counts = []
    for one, other in zip(found, expected, strict=False):
        one, other = one.float().reshape(-1), other.float().reshape(-1)
        different = (one != other) & ~(one.isnan() & other.isnan())
        counts.append(-(-int(different.sum()) * 1_000_000 // different.numel()))
    return counts


def row(case: Case, timed: bool) -> list[str]:
    expected = case.unfused()
    cells = [case.name, case.shape]
    for run in (case.unfused, case.ours, case.aiters):
        if run is None or not timed:
            cells.append("–")
            continue
        from timing import graph_us

        cells.append(f"{graph_us(run, [()], 24):.2f}")
    cells.append(", ".join(map(str, differing(case.ours(), expected))))
    cells.append(", ".join(map(str, differing(case.aiters(), expected))) if case.aiters else "–")
    return cells


def main(arguments: list[str] | None = None) -> None:
    """arguments: those of the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="plain torch on the CPU instead of vLLM's ops; no times")
    options = parser.parse_args(arguments)
    if not options.plain and (torch.version.hip is None or not torch.cuda.is_available()):
        parser.error("no AMD GPU with torch's ROCm build here; --plain runs anywhere")
    theirs = Theirs(options.plain)
    device = torch.device("cpu" if options.plain else "cuda")
    if not options.plain:
        compat.load_custom_ops()
    where = "plain torch on a CPU" if options.plain else f"{torch.cuda.get_device_name()}, ROCm {torch.version.hip}"
    versions = ", ".join(f"{name} {_version(name)}" for name in ("vllm", "torch", "triton", "aiter"))
    table = Table(title=f"{where}; {versions}; codes {theirs.fp8}", title_justify="left")
    for column in ("op", "rows × width"):
        table.add_column(column)
    for column in ("unfused, µs", "ours", "AITER's", "ours: codes, scales that differ of a million", "AITER's"):
        table.add_column(column, justify="right")
    for rows in (1, 5) if options.plain else (1, 64, 8192):
        for case in cases(theirs, rows, device):
            table.add_row(*row(case, timed=not options.plain))
    Console(width=140).print(table)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    main()
