# SPDX-License-Identifier: Apache-2.0
"""vLLM's default block GEMM, split, on a GPU: the bytes of FlashInfer's own quantiser, and of vLLM's whole op.

Needs a Hopper GPU, and FlashInfer with what it takes to compile its GEMM, once for two minutes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_fusion_plugin.ops.block_gemm import block_fp8_gemm
from vllm_fusion_plugin.ops.group_quant import group_fp8_quant
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, GroupScales, group_fp8_quant_reference
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs, rms_norm_group_fp8_quant
from vllm_fusion_plugin.ops.silu_mul_quant import silu_mul_group_fp8_quant

from .cases import TMA, random_input
from .checks import assert_same_bytes, one_nan
from .installed import OPAQUE
from .test_group_quant import activations
from .test_group_quant_gpu import all_maxima

pytestmark = pytest.mark.gpu

SPLIT = f"{OPAQUE}_or_flashinfer"
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def vllm_gemm(device: torch.device) -> Any:
    """vLLM's op, where it would run FlashInfer's kernel."""
    pytest.importorskip("vllm._custom_ops")
    from vllm.utils.flashinfer import is_flashinfer_fp8_blockscale_gemm_supported

    if not is_flashinfer_fp8_blockscale_gemm_supported():
        pytest.skip("vLLM has no FlashInfer block GEMM here")
    import vllm.model_executor.kernels.linear.scaled_mm.flashinfer  # noqa: F401  (registers the op)

    return torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm


@pytest.fixture(scope="module")
def runner(vllm_gemm: Any) -> Any:
    from flashinfer.gemm.gemm_base import get_fp8_blockscale_gemm_runner_sm90

    return get_fp8_blockscale_gemm_runner_sm90()


def flashinfers(runner: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What FlashInfer's own quantiser writes for x [M, K]."""
    codes = torch.empty_like(x, dtype=FP8_DTYPE)
    scales = TMA.empty(x, *x.shape)
    runner.fp8_quantize_1x128(x, codes, scales, False)
    return codes, scales


def check_quantiser(runner: Any, x: torch.Tensor, what: str) -> None:
    codes, scales = group_fp8_quant(x, TMA, quant_rounding="flashinfer")
    expected_codes, expected_scales = flashinfers(runner, x)
    assert_same_bytes(one_nan(scales), one_nan(expected_scales), f"{what}: scales")
    assert_same_bytes(one_nan(codes), one_nan(expected_codes), f"{what}: codes")


@pytest.mark.parametrize("seed", range(4))
def test_quantiser_for_all_maxima(seed: int, runner: Any, device: torch.device) -> None:
    check_quantiser(runner, all_maxima(BF16, device, seed), f"seed {seed}")


@pytest.mark.parametrize("kind", ["normal", "special", "bits"])
def test_quantiser_for_random_numbers(kind: str, runner: Any, device: torch.device) -> None:
    for rows, width in ((1, 4096), (31, 12288), (4096, 4096)):
        check_quantiser(runner, activations(rows, width, BF16, device, seed=rows, kind=kind), f"{kind}, {rows} rows")


def test_reference_is_what_the_gpu_computes(device: torch.device) -> None:
    """For all maxima: the tables of fast division in kernels/rounding.py are this GPU's."""
    x = all_maxima(BF16, device, 9)
    codes, scales = group_fp8_quant(x, TMA, quant_rounding="flashinfer")
    expected_codes, expected_scales = group_fp8_quant_reference(x, TMA, "flashinfer")
    assert_same_bytes(one_nan(scales), one_nan(expected_scales), "scales")
    assert_same_bytes(one_nan(codes), one_nan(expected_codes), "codes")


@pytest.mark.parametrize("rows", [1, 31, 32, 100])
def test_fused_ops_quantise_as_the_lone_one(rows: int, device: torch.device) -> None:
    """SiLU·mul and the norm, by number of rows: the lone quantiser on what vLLM's own ops write."""
    pytest.importorskip("vllm._custom_ops")
    x = random_input(rows, 4096, BF16, device, seed=rows)
    scales = GroupScales(128, "tma", ue8m0=True)
    y = torch.empty_like(x[:, :4096])
    torch.ops._C.silu_and_mul(y, x)
    pairs = [(silu_mul_group_fp8_quant(x, scales, act_rounding="custom_op", quant_rounding=SPLIT), y)]
    weight, x = torch.randn(4096, device=device).to(BF16), x[:, :4096].contiguous()
    y = torch.empty_like(x)
    torch.ops._C.rms_norm(y, x, weight, 1e-6)
    norm = NormInputs(x, weight, 1e-6, keep_norm=True, norm_rounding="custom_op")
    codes, norm_scales, normed, *_ = rms_norm_group_fp8_quant(norm, scales, quant_rounding=SPLIT)
    pairs.append(((codes, norm_scales), normed))
    for outputs, y in pairs:
        for found, expected in zip(outputs, group_fp8_quant(y, scales, quant_rounding=SPLIT), strict=True):
            assert_same_bytes(found, expected, f"{rows} rows")


def block_weight(columns: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random e4m3 weight [columns, width], and its scales, powers of two."""
    generator = torch.Generator(device=device).manual_seed(columns + width)
    weight = torch.randn(columns, width, generator=generator, device=device).mul_(50).to(FP8_DTYPE)
    shape = (-(-columns // 128), width // 128)
    exponents = torch.randint(-14, -8, shape, generator=generator, device=device)
    return weight, torch.exp2(exponents.float())


# Qwen3-8B's qkv, o, gate_up and down; a width that is no multiple of 128
@pytest.mark.parametrize(
    ("columns", "width"), [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (576, 7168)], ids=str
)
@pytest.mark.parametrize("ue8m0", [True, False], ids=["ue8m0", "fp32"])
def test_gemm_for_every_number_of_rows(
    columns: int, width: int, ue8m0: bool, vllm_gemm: Any, device: torch.device
) -> None:
    weight, weight_scales = block_weight(columns, width, device)
    for rows in (*range(1, 65), 66, 127, 128, 300, 1023, 2048):
        x = activations(rows, width, BF16, device, seed=rows)
        codes, scales = group_fp8_quant(x, GroupScales(128, "tma", ue8m0), quant_rounding=SPLIT)
        found = block_fp8_gemm(codes, scales, weight, weight_scales, use_ue8m0=ue8m0)
        assert_same_bytes(found, vllm_gemm(x, weight, weight_scales, 128, ue8m0), f"{rows} rows")


def test_gemm_in_a_cuda_graph(vllm_gemm: Any, device: torch.device) -> None:
    """Below 32 rows and above: captured once, the replay follows its input."""
    weight, weight_scales = block_weight(4096, 4096, device)
    for rows in (8, 64):
        x = activations(rows, 4096, BF16, device, seed=1)

        def step(x: torch.Tensor = x) -> torch.Tensor:
            codes, scales = group_fp8_quant(x, GroupScales(128, "tma", True), quant_rounding=SPLIT)
            return block_fp8_gemm(codes, scales, weight, weight_scales)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        x.copy_(activations(rows, 4096, BF16, device, seed=2))
        graph.replay()
        assert_same_bytes(found, vllm_gemm(x, weight, weight_scales, 128, True), f"{rows} rows")


def test_no_rows(device: torch.device) -> None:
    weight, weight_scales = block_weight(128, 256, device)
    codes, scales = group_fp8_quant(torch.empty(0, 256, dtype=BF16, device=device), TMA, quant_rounding=SPLIT)
    assert block_fp8_gemm(codes, scales, weight, weight_scales).shape == (0, 128)
