# SPDX-License-Identifier: Apache-2.0
"""Gated RMSNorm + FP8 kernel against plain torch, byte for byte; here on a GPU, or in Triton's interpreter.

The comparison with what Inductor and vLLM compute is in test_gated_rms_norm_quant_gpu.py.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from vllm_fusion_plugin.kernels import gated_rms_norm_quant as kernels
from vllm_fusion_plugin.kernels.quant import QuantConstants
from vllm_fusion_plugin.kernels.rounding import is_native
from vllm_fusion_plugin.ops.gated_rms_norm_quant import (
    gated_rms_norm_group_fp8_quant_reference,
    gated_rms_norm_reference,
)
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, GroupScales, group_fp8_quant_reference

from .cases import (
    DTYPES,
    GROUP_ROUNDINGS,
    GROUP_SIZES,
    ROUNDINGS,
    all_values,
    allowed,
    random_input,
    scales_name,
    short,
    special_values,
    told_apart,
)
from .cases import (
    LAYOUTS as SCALE_LAYOUTS,
)
from .checks import (
    Guarded,
    check_guarded,
    code_steps,
    guarded_scales,
)
from .test_numerics import run

EPSILON = 1e-6


class Mode(NamedTuple):
    """One combination of what `gated_rms_norm_group_fp8_quant` can be asked for."""

    dtype: torch.dtype = torch.bfloat16
    norm_before_gate: bool = True
    activation: str = "silu"
    group_size: int = 128
    scale_layout: str = "tma"
    use_ue8m0: bool = False
    norm_rounding: str = "native"
    quant_rounding: str = "custom_op"

    def __str__(self) -> str:
        order = "norm_first" if self.norm_before_gate else "gate_first"
        forms = f"norm_{self.norm_rounding}-quant_{self.quant_rounding}"
        return f"{short(self.dtype)}-{order}-{self.activation}-{scales_name(self)}-{forms}"

    @property
    def scales(self) -> GroupScales:
        return GroupScales(self.group_size, self.scale_layout, self.use_ue8m0)

    def arguments(self) -> dict[str, object]:
        names = ("norm_before_gate", "activation", "norm_rounding", "quant_rounding")
        return {"scales": self.scales, **{name: getattr(self, name) for name in names}}

    @property
    def rounded(self) -> bool:
        return self.norm_rounding != "native" or not is_native(self.quant_rounding)


QWEN3_NEXT = Mode()


def norm_modes() -> list[Mode]:
    """Everything before the quantiser, with every form of it."""
    choices = itertools.product(DTYPES, (True, False), ("silu", "sigmoid"), ("native", "eager"), ROUNDINGS)
    return [
        QWEN3_NEXT._replace(
            dtype=dtype, norm_before_gate=order, activation=act, norm_rounding=norm, quant_rounding=quant
        )
        for dtype, order, act, norm, quant in choices
    ]


def quant_modes() -> list[Mode]:
    """Everything in the quantiser, but for what `norm_modes` has."""
    switch = (False, True)
    modes = [
        QWEN3_NEXT._replace(group_size=size, scale_layout=layout, use_ue8m0=ue8m0, quant_rounding=quant)
        for size, layout, ue8m0, quant in itertools.product(
            GROUP_SIZES, (*SCALE_LAYOUTS, "packed"), switch, GROUP_ROUNDINGS
        )
    ]
    return [mode for mode in modes if mode not in norm_modes() and allowed(mode) and told_apart(mode)]


class Input(NamedTuple):
    x: torch.Tensor
    z: torch.Tensor
    weight: torch.Tensor

    @property
    def heads(self) -> int:
        return self.x.shape[1]


def heads_input(
    rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, seed: int, kind: str = "normal"
) -> Input:
    """x and z [rows, heads, head_dim] as activations have them, and weight [head_dim]."""
    width = heads * head_dim
    both = random_input(rows, width, dtype, device, seed, kind)
    weight = random_input(1, head_dim, dtype, device, seed + 1)[0, :head_dim].clamp(-4, 4)
    x, z = (half.reshape(rows, heads, head_dim).contiguous() for half in both.chunk(2, dim=-1))
    return Input(x, z, weight)


def exact_input(
    rows: int, heads: int, head_dim: int, mode: Mode, device: torch.device, seed: int, special: bool = False
) -> Input:
    """As `heads_input`, but a head's sum of squares is exact, so that it has the same bits in any order.

    x has small integers times a power of two. Where x is first multiplied by the gate, z is such that the gate is a small
    integer too. special: NaN, infinities and zeros in x, and in z if that does not come into the sum.
    """
    dtype = mode.dtype
    _, z, weight = heads_input(rows, heads, head_dim, dtype, device, seed, "special" if special else "normal")
    generator = torch.Generator(device=device).manual_seed(seed + 2)
    options = {"generator": generator, "device": device}
    x = torch.randint(-7, 8, z.shape, **options) * torch.exp2(torch.randint(-4, 5, (rows, heads, 1), **options).float())
    x = x.to(dtype)
    if special:
        table = special_values(dtype).to(device)
        chosen = table[torch.randint(len(table), z.shape, **options)]
        x = torch.where(torch.rand(z.shape, **options) < 1 / head_dim, chosen, x)
    if not mode.norm_before_gate:
        # silu: 32, 20, 0 and -0; sigmoid: 1, 1, 1/2 and 0
        exact = torch.tensor([32.0, 20.0, 0.0, -200.0], dtype=dtype, device=device)
        z = exact[torch.randint(len(exact), z.shape, **options)]
    return Input(x, z, weight)


# ---- what is expected ------------------------------------------------------------------------------------------------


@triton.jit
def _gate_kernel(z_ptr, out_ptr, SIGMOID: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, kernels.gate(tl.load(z_ptr + at).to(tl.float32), SIGMOID))


@triton.jit
def _rsqrt_kernel(sum_ptr, out_ptr, epsilon, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, kernels.rsqrt(tl.load(sum_ptr + at) / HEAD_DIM + epsilon))


@functools.cache
def gate_table(dtype: torch.dtype, device: torch.device, activation: str) -> torch.Tensor:
    return run(_gate_kernel, all_values(dtype, device), SIGMOID=activation == "sigmoid")


def gates(z: torch.Tensor, activation: str) -> torch.Tensor:
    """The gate with the kernel's bits, which are those of Inductor's approximate division and not of torch's: by z's bit
    pattern, from the kernel's own function. The tests on the GPU compare that one with Inductor's for every z."""
    return gate_table(z.dtype, z.device, activation)[z.contiguous().view(torch.int16).int() & 0xFFFF]


def norm(data: Input, mode: Mode) -> torch.Tensor:
    """y [rows, heads * head_dim], if the sums of squares are exact."""
    x, z, weight = data
    gate, y = gates(z, mode.activation), x.float()
    if not mode.norm_before_gate:
        y = y * gate
    sums = y.pow(2).sum(dim=-1).flatten()
    padded = torch.nn.functional.pad(sums, (0, 1024 - sums.numel() % 1024), value=1.0)
    inverse = run(_rsqrt_kernel, padded, epsilon=EPSILON, HEAD_DIM=x.shape[-1])[: sums.numel()]
    y = y * inverse.view(*x.shape[:2], 1) * weight.float()
    if mode.norm_before_gate:
        y = y * gate
    return (y.to(x.dtype) if mode.rounded else y).flatten(1)


def run_kernel(data: Input, mode: Mode, **launch: object) -> tuple[Guarded, Guarded]:
    x, z, weight = data
    rows, heads, head_dim = x.shape
    codes = Guarded(x.new_empty((rows, heads * head_dim), dtype=FP8_DTYPE))
    scales = guarded_scales(x[:rows], mode.scales, heads * head_dim)
    kernels.gated_rms_norm_group_fp8_quant(
        x,
        z,
        weight,
        codes.tensor,
        scales.tensor,
        EPSILON,
        heads,
        mode.norm_before_gate,
        mode.activation,
        mode.group_size,
        mode.use_ue8m0,
        mode.norm_rounding,
        mode.quant_rounding,
        **launch,
    )
    codes.check()
    scales.check()
    return codes, scales


def check(data: Input, mode: Mode, **launch: object) -> None:
    expected = group_fp8_quant_reference(norm(data, mode), mode.scales, mode.quant_rounding)
    check_guarded(*run_kernel(data, mode, **launch), *expected, mode.quant_rounding)


# ---- the kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*norm_modes(), *quant_modes()], ids=str)
def test_modes(mode: Mode, device: torch.device) -> None:
    """Every mode. 5 rows: one short of TMA's alignment by 3; 3 heads: no power of two."""
    check(exact_input(5, 3, 128, mode, device, seed=1, special=True), mode, tile=kernels.Tile(4, 2))


SHAPES = [  # heads, head size, group size
    (1, 64, 64),
    (3, 64, 64),
    (32, 64, 64),
    (1, 128, 128),
    (4, 128, 64),
    (5, 128, 128),
    (32, 128, 128),
    (5, 192, 64),
    (2, 256, 128),
    (7, 256, 64),
    (1, 384, 128),
    (3, 512, 128),
    (1, 8192, 128),
]


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], rows: int, device: torch.device) -> None:
    heads, head_dim, group_size = shape
    mode = QWEN3_NEXT._replace(group_size=group_size)
    check(exact_input(rows, heads, head_dim, mode, device, seed=rows), mode)


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("tile", [(1, 2), (2, 8), (4, 4), (8, 2), (1, 32), (2, 4, 2), (1, 8, 4)], ids=str)
def test_tiles(tile: tuple[int, ...], rows_first: bool, device: torch.device) -> None:
    """On rows and heads that they do not divide."""
    data = exact_input(9, 5, 128, QWEN3_NEXT, device, seed=3)
    check(data, QWEN3_NEXT, tile=kernels.Tile(*tile)._replace(rows_first=rows_first))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_weight_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> None:
    mode = QWEN3_NEXT._replace(dtype=dtype)
    data = exact_input(3, 4, 128, mode, device, seed=4)
    weight = torch.randn(128, generator=torch.Generator().manual_seed(5)).to(weight_dtype).to(device)
    check(data._replace(weight=weight), mode)


def views(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x's numbers in another layout, NaN between them."""
    rows, heads, head_dim = x.shape
    if layout == "heads of a wider row":
        wide = x.new_full((rows, heads, 3 * head_dim), float("nan"))
        return wide[:, :, head_dim : 2 * head_dim].copy_(x)
    if layout == "rows of a wider matrix":
        wide = x.new_full((rows, heads * head_dim + 64), float("nan"))
        return wide[:, :-64].view(rows, heads, head_dim).copy_(x)
    assert layout == "head by head"
    return x.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = ("heads of a wider row", "rows of a wider matrix", "head by head")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided(layout: str, device: torch.device) -> None:
    data = exact_input(5, 6, 128, QWEN3_NEXT, device, seed=6)
    check(data._replace(x=views(data.x, layout)), QWEN3_NEXT)
    check(data._replace(z=views(data.z, layout)), QWEN3_NEXT)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_all_gates(dtype: torch.dtype, activation: str, device: torch.device) -> None:
    """Every z: in the order of the bit patterns (a group's gates are then of one exponent), and shuffled."""
    mode = QWEN3_NEXT._replace(dtype=dtype, activation=activation)
    values = all_values(dtype, device)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(7)).to(device)
    z = torch.cat([values, values[order]]).view(32, 32, 128)
    data = exact_input(32, 32, 128, mode, device, seed=8)._replace(z=z)
    # the interpreter's costs are by program
    check(data, mode, tile=kernels.Tile(32, 8) if device.type == "cpu" else None)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_gate_is_the_activation(dtype: torch.dtype, activation: str, device: torch.device) -> None:
    """That `gates`, from the kernel, is right to begin with. exp(-z) is infinite in fp32 from -88.8 on."""
    z = all_values(dtype, device)
    expected = getattr(torch.nn.functional, activation)(z.double())
    torch.testing.assert_close(gates(z, activation).double(), expected, rtol=2e-5, atol=3e-37, equal_nan=True)


def assert_near(
    codes: torch.Tensor, scales: torch.Tensor, expected_codes: torch.Tensor, expected_scales: torch.Tensor, mode: Mode
) -> None:
    steps = code_steps(codes, expected_codes)
    assert int(steps.max()) <= 1
    assert int(steps.count_nonzero()) <= steps.numel() // 500
    torch.testing.assert_close(scales, expected_scales, rtol=torch.finfo(mode.dtype).eps, atol=0)


@pytest.mark.parametrize("mode", [mode for mode in norm_modes() if mode.activation == "silu"], ids=str)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_against_op_reference(mode: Mode, head_dim: int, device: torch.device) -> None:
    """Sums that are not exact. The op's reference adds in another order, and on a GPU it divides exactly: one code apart
    where that moves a rounding, which the seeds here never make more than 1 code in 500."""
    data = heads_input(8, 4, head_dim, mode.dtype, device, seed=9)
    codes, scales = run_kernel(data, mode, tile=kernels.Tile(8, 4))
    expected_codes, expected_scales = gated_rms_norm_group_fp8_quant_reference(
        *data, EPSILON, data.heads, **mode.arguments()
    )
    assert_near(codes.tensor, scales.tensor, expected_codes, expected_scales, mode)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_reference_is_the_formula(activation: str, norm_before_gate: bool, device: torch.device) -> None:
    x, z, weight = heads_input(6, 4, 128, torch.bfloat16, device, seed=10)
    act = getattr(torch.nn.functional, activation)
    s = x.double() if norm_before_gate else x.double() * act(z.double())
    expected = torch.nn.functional.rms_norm(s, (128,), weight.double(), EPSILON)
    if norm_before_gate:
        expected = expected * act(z.double())
    actual = gated_rms_norm_reference(x, z, weight, EPSILON, norm_before_gate, activation, rounded=False)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=1e-30)


# ---- the order of the sum --------------------------------------------------------------------------------------------


def print_sums() -> None:
    """For each tile that can be chosen: the layout of the sum of squares, and how wide x is loaded. Compiles for an H200,
    which needs neither one nor a driver; in a process of its own, since the interpreter's kernels cannot be compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {
        "x_ptr": "*bf16",
        "z_ptr": "*bf16",
        "weight_ptr": "*bf16",
        "codes_ptr": "*fp8e4nv",
        "scales_ptr": "*fp32",
    }
    found = []
    for head_dim, heads in ((64, 32), (128, 32), (192, 5)):
        tiles = {kernels.head_tile(rows, heads, head_dim) for rows in (1, 100, 8192)}
        if head_dim == 128:
            tiles |= {kernels.Tile(2, 8), kernels.Tile(4, 4, 2), kernels.Tile(2, 8, 4)}
        for tile in sorted(tile if head_dim != 192 else tile._replace(parts=1) for tile in tiles):
            block = triton.next_power_of_2(head_dim)
            constants = {
                "NORM": kernels.GatedConstants(head_dim, gate_first=False, sigmoid=False, keep_fp32=False),
                "TILE": kernels.HeadTileConstants(
                    tile.rows, tile.heads, block, tile.parts, rows_first=False, even=False, scales_from_all=False
                ),
                "QUANT": QuantConstants("group", "custom_op", block if tile.parts > 1 else 64),
                "PDL": False,
            }
            signature, fixed, attributes = {}, {}, {}
            for at, name in enumerate(kernels._group_kernel.arg_names):
                if name in constants:
                    signature[name], fixed[(at,)] = "constexpr", constants[name]
                    continue
                signature[name] = pointers.get(name, "fp32" if name in ("epsilon", "eps") else "i32")
                if name in pointers or name.startswith(("x_", "z_")):
                    attributes[(at,)] = [["tt.divisibility", 16]]
            source = ASTSource(kernels._group_kernel, signature, fixed, attributes)
            options = {"num_warps": tile.heads * block // (kernels.WARP * tile.parts)}
            code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
            layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked.*)$", code["ttgir"], re.MULTILINE))
            squares = re.search(r'"tt\.reduce"(?:.|\n)*?\}\) : \(tensor<[^<>]*?, (#\w+)>\)', code["ttgir"]).group(1)
            found.append(
                {
                    "head_dim": head_dim,
                    "tile": tile,
                    **{key: json.loads(value) for key, value in re.findall(r"(\w+) = (\[.*?\])", layouts[squares])},
                    "wide_loads": len(re.findall(r"ld\.global\.v4\.b32", code["ptx"])),
                    "local": len(re.findall(r"(?:ld|st)\.local", code["ptx"])),
                }
            )
    print(json.dumps(found))


def test_every_tile_adds_in_the_same_order() -> None:
    """8 elements of a head's part to a thread, and the part in neighbouring threads of one warp: see `kernels.Tile`.

    Triton chooses layouts, and a row's bytes would depend on the batch if it chose one for a tile and another for the next.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"from {__name__} import print_sums; print_sums()"]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 5
    for sums in found:
        rows, _, parts, *_ = sums["tile"]
        threads = min(triton.next_power_of_2(sums["head_dim"]) // 8 // parts, 32)
        assert sums["sizePerThread"] in ([1, 1, 1, 8], [1, 1, 1, 1, 8]), sums
        assert math.prod(sums["threadsPerWarp"][3:]) == threads, sums
        assert math.prod(sums["warpsPerCTA"][3:]) == 1, sums
        assert sums["threadsPerWarp"][0] == sums["warpsPerCTA"][0] == 1, sums  # parts
        assert sums["wide_loads"] == (2 * rows + 1) * parts, sums  # x and z by the row, and weight
        assert sums["local"] == 0, sums
