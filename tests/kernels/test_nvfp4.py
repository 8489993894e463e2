# SPDX-License-Identifier: Apache-2.0
"""SiLU·mul + NVFP4: the reference against vLLM's emulation, the kernel against the reference.

vLLM's own kernel needs compute capability 10.0; where there is such a GPU the bytes are compared with it too.
"""

from __future__ import annotations

import pytest
import torch

from vllm_fusion_plugin.kernels import silu_mul_quant as kernels
from vllm_fusion_plugin.ops.nvfp4 import (
    e2m1,
    empty_block_scales,
    nvfp4_quant_reference,
    swizzle_block_scales,
    unswizzle_block_scales,
)
from vllm_fusion_plugin.ops.silu_mul_quant import (
    silu_mul_nvfp4_quant,
    silu_mul_nvfp4_quant_reference,
    silu_mul_reference,
)

from .cases import DTYPES, ROUNDINGS, all_values, random_input, short, strided
from .checks import Guarded, assert_same_bytes
from .test_numerics import _silu_kernel, run

E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GLOBAL_SCALES = (1.0, 37.5, 0.011)


def decode(packed: torch.Tensor) -> torch.Tensor:
    """Packed codes [M, K / 2] -> numbers [M, K] before any scale."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
    values = E2M1_VALUES.to(packed.device)[codes & 7]
    return torch.where(codes >= 8, -values, values)


def rank(packed: torch.Tensor) -> torch.Tensor:
    """Packed codes -> where each number stands among the 15, so that neighbours differ by 1."""
    codes = torch.stack([packed & 15, packed >> 4]).to(torch.int16)
    return torch.where(codes >= 8, -(codes & 7), codes)


def activation(x: torch.Tensor, act_rounding: str) -> torch.Tensor:
    """As in test_silu_mul_quant.py: the native form's SiLU divides as Inductor does, which torch has no operation for."""
    if act_rounding != "native":
        return silu_mul_reference(x, act_rounding)
    table = run(_silu_kernel, all_values(x.dtype, x.device), EXACT=False)
    gate, up = x.chunk(2, dim=-1)
    return (table[gate.contiguous().view(torch.int16).int() & 0xFFFF] * up.float()).to(x.dtype)


# ---- reference -------------------------------------------------------------------------------------------------------


def test_e2m1_rounds_to_nearest_even() -> None:
    """Against a search: every 1/64 from -7 to 7, hence every number halfway between two codes."""
    x = torch.arange(-448, 449) / 64
    codes = torch.arange(16, dtype=torch.uint8)
    values = torch.where(codes >= 8, -E2M1_VALUES[(codes & 7).long()], E2M1_VALUES[(codes & 7).long()])
    distance = (x[:, None] - values).abs()
    nearest = distance == distance.amin(dim=1, keepdim=True)
    # of two nearest ones the even; of the two zeros, which are as near, the one with x's sign
    cost = (codes & 1).float() + 2.0 * (codes >= 8).ne(x.signbit()[:, None])
    expected = torch.where(nearest, cost, torch.inf).argmin(dim=1).to(torch.uint8)
    assert torch.equal(e2m1(x), expected)


def test_e2m1_of_special_values() -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40])
    assert e2m1(x).tolist() == [0, 8, 7, 15, 7, 0, 8]


@pytest.mark.parametrize("rows, blocks", [(1, 1), (128, 4), (129, 5), (300, 12)])
def test_swizzle(rows: int, blocks: int) -> None:
    """Byte by byte, from the layout's formula; and back."""
    scales = (torch.arange(rows * blocks) % 126).to(torch.uint8).view(rows, blocks)
    swizzled = swizzle_block_scales(scales)
    assert swizzled.shape == empty_block_scales(scales, rows, blocks * 16).shape
    expected = torch.zeros(swizzled.numel() * 4, dtype=torch.uint8)
    row, block = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    tile = row // 128 * ((blocks + 3) // 4) + block // 4
    expected[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4] = scales
    assert torch.equal(swizzled.view(torch.uint8).flatten(), expected)
    assert torch.equal(unswizzle_block_scales(swizzled, rows, blocks * 16).view(torch.uint8), scales)


@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_reference_is_vllms_emulation(dtype: torch.dtype, global_scale: float) -> None:
    emulation = pytest.importorskip("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")
    x = random_input(130, 5 * 16, dtype, torch.device("cpu"), seed=1)
    scale = torch.tensor([global_scale])
    codes, scales = silu_mul_nvfp4_quant_reference(x, scale)
    values, block_scales = emulation.ref_nvfp4_quant(silu_mul_reference(x), scale, 16)
    assert torch.equal(decode(codes), values)
    assert torch.equal(unswizzle_block_scales(scales, 130, 80).float(), block_scales)
    # its reader of the swizzled layout, padding included
    linear = emulation.convert_swizzled_to_linear(scales.view(torch.float8_e4m3fn), 130, 80, 16)
    assert torch.equal(linear[:, :5].float(), block_scales)


# ---- kernel ----------------------------------------------------------------------------------------------------------


def run_kernel(
    x: torch.Tensor, global_scale: torch.Tensor, act_rounding: str, tile: kernels.Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape[0], x.shape[1] // 2
    codes = Guarded(x.new_empty((rows, width // 2), dtype=torch.uint8))
    scales = Guarded(empty_block_scales(x, rows, width))
    kernels.silu_mul_nvfp4_quant(x, global_scale, codes.tensor, scales.tensor, act_rounding, tile)
    codes.check()
    scales.check()
    return codes.tensor, scales.tensor


def check(
    x: torch.Tensor, global_scale: float, act_rounding: str = "custom_op", tile: kernels.Tile | None = None
) -> None:
    scale = torch.tensor([global_scale], device=x.device)
    codes, scales = run_kernel(x, scale, act_rounding, tile)
    expected_codes, expected_scales = nvfp4_quant_reference(activation(x, act_rounding), scale)
    assert_same_bytes(scales, expected_scales, "scales and padding")
    if not x.is_cuda:  # the interpreter's reciprocals are exact
        assert_same_bytes(codes, expected_codes, "codes")
        return
    # Approximate reciprocals make less or more than a half of what is halfway between two codes, and no more than that.
    steps = (rank(codes) - rank(expected_codes)).abs()
    assert int(steps.max()) <= 1
    assert int(steps.count_nonzero()) <= steps.numel() / 100


@pytest.mark.parametrize("act_rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_modes(dtype: torch.dtype, act_rounding: str, device: torch.device) -> None:
    tile = kernels.Tile(64, 8, 4)  # few programs: the interpreter's cost
    for global_scale in GLOBAL_SCALES:
        check(random_input(3, 80, dtype, device, seed=2), global_scale, act_rounding, tile)
        check(random_input(3, 80, dtype, device, seed=3, kind="special"), global_scale, act_rounding, tile)


# blocks: padded to 4, more than a tile of 16; rows: padded to 128, more than one tile
@pytest.mark.parametrize("rows, blocks", [(0, 4), (1, 1), (5, 3), (5, 18), (128, 4), (130, 2)])
def test_shapes(rows: int, blocks: int, device: torch.device) -> None:
    x = random_input(rows, 16 * blocks, torch.bfloat16, device, seed=rows)
    if rows == 0:
        codes, scales = run_kernel(x, torch.ones(1, device=device), "custom_op")
        assert codes.shape == (0, 8 * blocks)
        assert scales.shape == (0, 1)
        return
    check(x, 8.0)
    if rows <= 5:
        check(strided(x), 8.0)


def test_all_gates(device: torch.device) -> None:
    gates = all_values(torch.bfloat16, device).view(16, 4096)
    check(torch.cat([gates, gates.flip(0)], dim=1), 1.0, tile=kernels.Tile(32, 32, 8))


def test_zero_infinite_and_nan_blocks(device: torch.device) -> None:
    x = torch.ones(4, 2 * 16, dtype=torch.bfloat16, device=device)
    x[0] = 0.0
    x[1, 3] = torch.inf
    x[2, :16] = torch.nan
    x[3, 16:] = -0.0
    check(x, 2.0)
    codes, scales = run_kernel(x, torch.tensor([2.0], device=device), "eager")  # keeps -0
    scales = unswizzle_block_scales(scales, 4, 16).float().flatten().tolist()
    assert scales[0] == scales[3] == 0.0
    assert scales[1] == 448.0  # saturated
    assert scales[2] != scales[2]
    assert codes[0].tolist() == [0] * 8
    assert codes[1, 1].item() >> 4 == 7
    assert codes[3].tolist() == [0x88] * 8


def test_padding_is_zero_whatever_the_global_scale(device: torch.device) -> None:
    x = random_input(3, 16, torch.bfloat16, device, seed=4)
    for value in (torch.inf, torch.nan):
        _, scales = run_kernel(x, torch.tensor([value], device=device), "custom_op")
        rest = scales.view(torch.uint8).view(32, 4, 4).clone()
        rest[:3, 0, 0] = 0
        assert not rest.any()


@pytest.mark.gpu
@pytest.mark.parametrize("act_rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_is_vllms_kernel_on_blackwell(dtype: torch.dtype, act_rounding: str, device: torch.device) -> None:
    if torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("vLLM's scaled_fp4_quant needs compute capability 10.0")
    from vllm import _custom_ops as ops

    x = random_input(300, 4096, dtype, device, seed=5)
    for value in GLOBAL_SCALES:
        scale = torch.tensor([value], device=device)
        expected_codes, expected_scales = ops.scaled_fp4_quant(activation(x, act_rounding), scale)
        codes, scales = silu_mul_nvfp4_quant(x, scale, act_rounding=act_rounding)
        assert_same_bytes(codes, expected_codes, "codes")
        assert_same_bytes(scales.view(torch.float8_e4m3fn), expected_scales, "scales")


@pytest.mark.gpu
@pytest.mark.parametrize("rows, blocks", [(1, 1), (5, 70), (130, 2)])
def test_sanitizer_nvfp4(rows: int, blocks: int, device: torch.device) -> None:
    """The op's own allocations; all bytes of both are read."""
    x = random_input(rows, 16 * blocks, torch.bfloat16, device, seed=6)
    scale = torch.tensor([3.0], device=device)
    _, scales = (t.cpu() for t in silu_mul_nvfp4_quant(x, scale))
    assert torch.equal(scales, silu_mul_nvfp4_quant_reference(x, scale)[1].cpu())
