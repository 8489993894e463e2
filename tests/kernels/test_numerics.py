# SPDX-License-Identifier: Apache-2.0
"""The roundings of kernels/numerics.py against plain arithmetic, over all bf16 and fp16 inputs.

On a GPU that is every (maximum, value) pair of the quantiser's division; Triton's interpreter takes a sample of the maxima.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from vllm_fusion_plugin.kernels import numerics
from vllm_fusion_plugin.ops.quant import FP8_MIN_SCALE

from .cases import DTYPES, all_values, from_bits, short
from .checks import assert_same_bytes, one_nan

SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal


@triton.jit
def _silu_kernel(gate_ptr, out_ptr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, numerics.silu(tl.load(gate_ptr + at).to(tl.float32), EXACT))


@triton.jit
def _silu_ieee_kernel(gate_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at).to(tl.float32)
    tl.store(out_ptr + at, tl.div_rn(gate, 1.0 + numerics.exp(-gate)))


@triton.jit
def _silu_inductor_kernel(gate_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at).to(tl.float32)
    tl.store(out_ptr + at, gate / (1.0 + libdevice.exp(-gate)))


@triton.jit
def _divide_by_maximum_kernel(x_ptr, out_ptr, MAX: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, numerics.divide_by_maximum(tl.load(x_ptr + at), MAX))


@triton.jit
def _round_up_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, numerics.round_up_to_power_of_two(tl.load(x_ptr + at)))


@triton.jit
def _round_up_libdevice_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, libdevice.exp2(libdevice.ceil(libdevice.log2(tl.load(x_ptr + at)))))


@triton.jit
def _reciprocal_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, numerics.reciprocal(tl.load(x_ptr + at)))


@triton.jit
def _divide_kernel(
    top_ptr, scale_ptr, value_ptr, differing_ptr, UE8M0: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the values no larger than a group's maximum whose codes are not those of IEEE division by the group's scale."""
    top = tl.load(top_ptr + tl.program_id(0))
    value = tl.load(value_ptr + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    scale = tl.zeros([BLOCK], tl.float32) + tl.load(scale_ptr + tl.program_id(0))
    expected = tl.div_rn(value, scale)
    actual = value * numerics.reciprocal(scale) if UE8M0 else numerics.divide(value, scale)
    if not NATIVE:
        expected = tl.maximum(expected, -448.0)
        actual = tl.maximum(actual, -448.0)
    differs = actual.to(tl.float8e4nv).to(tl.uint8, bitcast=True) != expected.to(tl.float8e4nv).to(
        tl.uint8, bitcast=True
    )
    counts = tl.abs(value) <= top
    if not NATIVE:
        counts = counts | (value != value)  # NaN does not count for the maximum, so that a group may have both
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(differing_ptr + at, tl.sum((differs & counts).to(tl.int32)))


def run(kernel, x: torch.Tensor, **constants: object) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    assert x.numel() % 1024 == 0
    # the interpreter's cost is by program: the largest power of two that divides the size
    block = 1024 if x.is_cuda else x.numel() & -x.numel()
    kernel[x.numel() // block,](x, out, BLOCK=block, **constants)
    return out


def not_negative(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0 to infinity, as fp32; infinity also fills up to a whole number of blocks."""
    values = all_values(dtype, device)[:32768].float()
    return torch.where(values.isnan(), float("inf"), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_silu_rounds_as_ieee_division(dtype: torch.dtype, device: torch.device) -> None:
    gates = all_values(dtype, device)
    actual = run(_silu_kernel, gates, EXACT=dtype == torch.float16).to(dtype)
    expected = run(_silu_ieee_kernel, gates).to(dtype)
    assert_same_bytes(one_nan(actual), one_nan(expected), "silu(gate)")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_ieee_silu_is_torchs(dtype: torch.dtype, device: torch.device) -> None:
    """What the test above compares with is not our own: vLLM's and torch's SiLU divide by 1 + expf(-gate)."""
    gates = all_values(dtype, device)
    expected = torch.nn.functional.silu(gates)
    assert_same_bytes(one_nan(run(_silu_ieee_kernel, gates).to(dtype)), one_nan(expected), "silu(gate)")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_silu_has_inductors_bits(dtype: torch.dtype, device: torch.device) -> None:
    gates = all_values(dtype, device)
    actual, expected = run(_silu_kernel, gates, EXACT=False), run(_silu_inductor_kernel, gates)
    assert_same_bytes(one_nan(actual), one_nan(expected), "silu(gate) in fp32")


@pytest.mark.parametrize("maximum", [448.0, 240.0, 224.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_divide_by_maximum(dtype: torch.dtype, maximum: float, device: torch.device) -> None:
    tops = not_negative(dtype, device)
    # a divisor of its own, because torch multiplies by the reciprocal of a Python number on CUDA
    expected = tops / torch.full_like(tops, maximum)
    assert_same_bytes(run(_divide_by_maximum_kernel, tops, MAX=maximum), expected, f"a group's maximum / {maximum}")


def scales_of_maxima(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The scale of every maximum that a group can have."""
    scales = not_negative(dtype, device) / torch.tensor(448.0, device=device)
    scales = scales[(scales == 0) | (scales >= SMALLEST_NORMAL)]
    return torch.nn.functional.pad(scales, (0, -len(scales) % 1024))


def scales_to_round_up(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Scales of all maxima, every power of two from the floor on, and the numbers beside them."""
    powers = torch.exp2(torch.arange(-34, 128, device=device, dtype=torch.float64)).float()
    beside = [torch.nextafter(powers, powers * 0), torch.nextafter(powers, powers * 2)]
    scales = torch.cat([scales_of_maxima(dtype, device), powers, *beside])
    return torch.nn.functional.pad(scales, (0, -len(scales) % 1024))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_round_up_to_power_of_two(dtype: torch.dtype, device: torch.device) -> None:
    scales = scales_to_round_up(dtype, device)
    mantissa, exponent = torch.frexp(scales.double())
    exact = torch.where(mantissa == 0.5, scales.double(), torch.ldexp(torch.ones_like(mantissa), exponent)).float()
    expected = torch.where((scales == 0) | scales.isinf(), scales, exact)
    assert_same_bytes(run(_round_up_kernel, scales), expected, "2 ** ceil(log2(scale))")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_round_up_to_power_of_two_is_libdevices(dtype: torch.dtype, device: torch.device) -> None:
    # Not the numbers beside powers of two: libdevice's log2 takes 2**n * (1 + 2**-23) for 2**n. No maximum has such a scale.
    scales = scales_of_maxima(dtype, device)
    # under 2**-126 exp2's result, above 2**127 the input's next power of two is not finite: no scale comes near either
    assert_same_bytes(run(_round_up_kernel, scales), run(_round_up_libdevice_kernel, scales), "exp2(ceil(log2(scale)))")


def test_reciprocal_of_powers_of_two_is_exact(device: torch.device) -> None:
    """What UE8M0 relies on. A scale is at most 2**120, the one over fp32's largest number / 448; infinity gives 0."""
    exponents = torch.arange(-126, 127, device=device, dtype=torch.float64)
    exponents = torch.cat([exponents, torch.full((1024 - len(exponents),), float("inf"), device=device)])
    actual = run(_reciprocal_kernel, torch.exp2(exponents).float())
    assert_same_bytes(actual, torch.exp2(-exponents).float(), "1 / 2**n")


# A native scale's floor is no power of two: nothing divides by it as by one.
@pytest.mark.parametrize(
    ("ue8m0", "native"), [(False, False), (False, True), (True, False)], ids=["fp32-custom_op", "fp32-native", "ue8m0"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_divide_has_codes_of_ieee_division(dtype: torch.dtype, ue8m0: bool, native: bool, device: torch.device) -> None:
    infinity = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
    step = 1 if device.type == "cuda" else 1999
    bits = torch.cat([torch.arange(0, infinity, step, device=device), torch.tensor([infinity], device=device)])
    tops = from_bits(bits, dtype).float()
    by_448 = torch.tensor(448.0, device=device)
    scales = tops / by_448 if native else tops.clamp(min=1e-10) / by_448
    if ue8m0:
        padded = torch.nn.functional.pad(scales, (0, -len(scales) % 1024))
        scales = run(_round_up_kernel, padded)[: len(scales)]
    scales = scales.clamp(min=FP8_MIN_SCALE if native else 0.0)
    values = all_values(dtype, device)
    block = 1024 if device.type == "cuda" else len(values)
    differing = torch.full((len(tops), len(values) // block), -1, dtype=torch.int32, device=device)
    _divide_kernel[differing.shape](tops, scales, values, differing, UE8M0=ue8m0, NATIVE=native, BLOCK=block)
    assert int(differing.min()) >= 0
    assert int(differing.sum()) == 0
