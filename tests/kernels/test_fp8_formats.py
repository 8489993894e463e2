# SPDX-License-Identifier: Apache-2.0
"""Every op, in every FP8 format: kernels have the bytes of the references, and codes end where the format is to end.

The formats of AMD's gfx942 run in Triton's interpreter alone: NVIDIA's GPUs have no instruction for them.
"""

from __future__ import annotations

import pytest
import torch

from vllm_fusion_plugin.kernels.fp8 import FORMATS, OCP
from vllm_fusion_plugin.ops import (  # noqa: F401  (registers the ops)
    gated_rms_norm_quant,
    group_quant,
    mla_dual_rms_norm_quant,
    mla_v_up_quant,
    registry,
    rms_norm_quant,
    silu_mul_quant,
)
from vllm_fusion_plugin.ops.quant import GroupScales, group_fp8_quant_reference
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs
from vllm_fusion_plugin.ops.silu_mul_quant import silu_mul_token_fp8_quant

from .cases import random_input
from .checks import assert_same_outputs
from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the formats of another vendor's GPUs need the interpreter")

ROWS, WIDTH = 5, 256
AMDS = [name for name in FORMATS if name != OCP]


def numbers(seed: int, width: int = WIDTH) -> torch.Tensor:
    """[ROWS, width] bf16 with NaN, infinities and both zeros among them, but in the first row."""
    x = random_input(ROWS, width, torch.bfloat16, torch.device("cpu"), seed, "special")[:, :width]
    x[0] = random_input(1, width, torch.bfloat16, torch.device("cpu"), seed)[0, :width]
    return x


def one_nan(t: torch.Tensor) -> torch.Tensor:
    return torch.where(t.isnan(), float("nan"), t) if t.dtype == torch.float32 else t


def calls(quantiser: str):
    """(op, arguments but the format)."""
    x, z, weight = numbers(1), numbers(2), torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16()
    scale, bound = torch.tensor([0.37]), torch.tensor([2.5])
    group = (128, "column", False, quantiser)
    yield "group_fp8_quant", (x, *group)
    yield "group_fp8_quant", (x, 64, "row", quantiser != "aiter", quantiser)
    both = torch.cat([x, z], dim=1)
    yield "silu_mul_group_fp8_quant", (both, *group[:3], "custom_op", quantiser, False)
    norm = NormInputs(x, weight, residual=z)
    yield "rms_norm_group_fp8_quant", (*norm, *group)
    heads = (x.view(ROWS, 2, 128), z.view(ROWS, 2, 128), weight[:128].contiguous(), 1e-6, 2, True, "silu")
    yield "gated_rms_norm_group_fp8_quant", (*heads, *group[:3], "eager", quantiser)
    yield "mla_dual_rms_norm_group_fp8_quant", (x, z, weight, weight, 1e-6, 1e-6, *group[:3], "eager", quantiser)
    if quantiser == "aiter":
        both[3] = 0.0
        yield "silu_mul_token_fp8_quant", (both, None, "custom_op", quantiser, False)
        yield "rms_norm_token_fp8_quant", (*norm, None, quantiser)
    if quantiser in ("custom_op", "native"):
        for ub in (None, bound):
            yield "silu_mul_token_fp8_quant", (both, ub, "custom_op", quantiser, False)
            yield "rms_norm_token_fp8_quant", (*norm, ub, quantiser)
        yield "silu_mul_static_fp8_quant", (both, scale, "custom_op", quantiser)
        yield "rms_norm_static_fp8_quant", (*norm, scale, quantiser)


@pytest.mark.parametrize("quantiser", ["custom_op", "reciprocal", "native", "native_floored", "aiter"])
@pytest.mark.parametrize("fp8", AMDS)
def test_kernels_are_the_references(fp8: str, quantiser: str) -> None:
    for op, arguments in calls(quantiser):
        kernel, reference = (
            implementations[op](*arguments, fp8)
            for implementations in (registry.CUDA_IMPLEMENTATIONS, registry.CPU_IMPLEMENTATIONS)
        )
        kernel, reference = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (kernel, reference))
        assert kernel[0].dtype == FORMATS[fp8].dtype
        assert_same_outputs(map(one_nan, kernel), map(one_nan, reference), f"{op} {arguments[-3:]}")


@pytest.mark.parametrize("fp8", AMDS)
def test_up_projection(fp8: str) -> None:
    generator = torch.Generator().manual_seed(4)
    # no sum is ever rounded, so that its order does not matter
    x, w = (torch.randint(-3, 4, shape, generator=generator).half() for shape in ((3, 2, 64), (2, 64, 128)))
    outputs = []
    for implementations in (registry.CUDA_IMPLEMENTATIONS, registry.CPU_IMPLEMENTATIONS):
        codes, scales = torch.zeros(3, 256, dtype=FORMATS[fp8].dtype), torch.zeros(3, 2)
        implementations["mla_v_up_group_fp8_quant"](x, w, codes, scales, 128, False, "custom_op", fp8)
        outputs.append((codes, scales))
    assert_same_outputs(*outputs)


@pytest.mark.parametrize("fp8", FORMATS)
def test_codes_end_at_the_formats_maximum(fp8: str) -> None:
    """Rounding up a scale's reciprocal can carry a group's largest number past the maximum, and 224 is not the end of its
    format: without both bounds it would become 240, and mean another number than vLLM's."""
    x = torch.linspace(-7.0, 7.0, 256).view(1, 256).bfloat16()
    maximum = FORMATS[fp8].max
    codes, _ = registry.CUDA_IMPLEMENTATIONS["group_fp8_quant"](x, 128, "row", False, "custom_op", fp8)
    assert (codes.float().min(), codes.float().max()) == (-maximum, maximum)
    scale = torch.tensor([0.01])
    codes = registry.CUDA_IMPLEMENTATIONS["silu_mul_static_fp8_quant"](
        torch.cat([x.abs(), x], dim=1), scale, "custom_op", "custom_op", fp8
    )
    assert (codes.float().min(), codes.float().max()) == (-maximum, maximum)


@pytest.mark.parametrize("fp8", AMDS)
def test_no_negative_zero(fp8: str) -> None:
    """In e4m3fnuz, 0x80 is NaN."""
    x = torch.full((1, 128), -0.0, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 1.0, -1e-6
    codes, _ = registry.CUDA_IMPLEMENTATIONS["group_fp8_quant"](x, 128, "row", False, "custom_op", fp8)
    assert not codes.float().isnan().any()
    assert (codes.view(torch.uint8)[0, 1:] == 0).all()


def test_a_codes_number_times_its_scale_is_the_number() -> None:
    """The formats' codes mean the same numbers: what differs is a scale."""
    x = numbers(5)[:1].float()
    for fp8 in FORMATS:
        codes, scale = group_fp8_quant_reference(x, GroupScales(128), "custom_op", fp8)
        back = (codes.float().view(2, 128) * scale.view(2, 1)).view(1, WIDTH)
        torch.testing.assert_close(back, x, rtol=2**-4, atol=float(scale.max()) * 2**-7)


@pytest.mark.parametrize("fp8", [OCP, "e4m3fnuz_240"])
def test_aiters_quantiser(fp8: str) -> None:
    """Its scales for every mantissa of a bf16 maximum, and codes next to where two of them meet."""
    tops = torch.arange(0x3E80, 0x3F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # 0.25 to below 1
    tops[:4] = torch.tensor([0.0, 1e-38, 3e-9, 3e38])
    x = torch.zeros(2, 128 * 128, dtype=torch.bfloat16)
    x.view(-1, 128)[:, 0] = tops
    x.view(-1, 128)[:, 1:] = tops[:, None].float() * torch.linspace(-1.0, 1.0, 127)[None, :]
    arguments = (x, 128, "row", False, "aiter", fp8)
    kernel, reference = (
        implementations["group_fp8_quant"](*arguments)
        for implementations in (registry.CUDA_IMPLEMENTATIONS, registry.CPU_IMPLEMENTATIONS)
    )
    assert_same_outputs(kernel, reference)
    # as it is written there: fp32 throughout, and no number's reciprocal is approximate
    scale = tops.float().clamp(min=1e-10) * torch.tensor(1.0 / FORMATS[fp8].max)
    assert torch.equal(kernel[1].view(-1), scale)


def test_aiters_token_quantiser_of_zeros() -> None:
    """Its scale has no floor: a row of zeros is divided by 0, and NaN is the smallest code there."""
    x = torch.zeros(2, 512, dtype=torch.bfloat16)
    x[1] = 1.0
    codes, scales = registry.CUDA_IMPLEMENTATIONS["silu_mul_token_fp8_quant"](x, None, "custom_op", "aiter", False, OCP)
    assert scales[0] == 0 and (codes[0].float() == -448).all()
    assert scales[1] > 0 and (codes[1].float() == 448).all()
    with pytest.raises(ValueError, match="scale_ub is given with quant_rounding='aiter', which has no bound"):
        silu_mul_token_fp8_quant(x, torch.tensor([1.0]), quant_rounding="aiter")


def test_wrong_formats() -> None:
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="fp8='e5m2' is not known; allowed: e4m3fn, e4m3fnuz, e4m3fnuz_240"):
        group_quant.group_fp8_quant(x, fp8="e5m2")
    with pytest.raises(ValueError, match="fp8='e4m3fnuz' with quant_rounding='flashinfer'"):
        group_quant.group_fp8_quant(x, quant_rounding="flashinfer", fp8="e4m3fnuz")
