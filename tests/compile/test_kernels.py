# SPDX-License-Identifier: Apache-2.0
"""Kernels compile for Hopper, in the variants that Triton's interpreter does not have (TMA, PDL, inline PTX).

The interpreter runs Python: it takes what the compiler refuses, a constexpr assigned twice for example.
"""

from __future__ import annotations

import itertools

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
import triton  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from vllm_fusion_plugin.kernels import (  # noqa: E402
    gated_rms_norm_quant,
    group_quant,
    mla_dual_rms_norm_quant,
    mla_v_up_quant,
    rms_norm_quant,
    sigmoid_mul_quant,
    silu_mul_quant,
)
from vllm_fusion_plugin.ops.quant import GroupScales  # noqa: E402
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs  # noqa: E402

DTYPES = [torch.bfloat16, torch.float16]
EPSILON = 1e-6


@pytest.fixture
def compiled(monkeypatch, record_property):
    """Launches only compile, to what is in this list afterwards."""
    kernels = []

    def launcher(kernel, grid):
        def launch(*args, launch_pdl=False, **kwargs):
            kernels.append(JITFunction.run(kernel, *args, grid=grid, warmup=True, **kwargs))

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", launcher)
    monkeypatch.setattr(type(triton.runtime.driver.active), "get_current_stream", lambda *_: 0, raising=False)
    yield kernels
    record_property("kernels", len(kernels))  # for version_column.py


def check(compiled: list, count: int) -> None:
    assert len(compiled) == count
    for kernel in compiled:
        assert kernel.metadata.target.arch == 90
        assert kernel.asm["cubin"]
        assert "griddepcontrol.wait" in kernel.asm["ptx"]


def rows_of(width: int, dtype: torch.dtype, rows: int = 5) -> torch.Tensor:
    return torch.zeros(rows, width, dtype=dtype)


def outputs(x: torch.Tensor, width: int, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.shape[0]
    return torch.zeros(rows, width, dtype=torch.float8_e4m3fn), torch.zeros(width // group, rows).t()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(dtype, compiled):
    x = rows_of(4096, dtype)
    for act_rounding, quant_rounding, ue8m0 in (("native", "reciprocal", False), ("custom_op", "custom_op", True)):
        silu_mul_quant.silu_mul_group_fp8_quant(
            x, *outputs(x, 2048), 128, ue8m0, act_rounding, quant_rounding, pdl=True
        )
    act = torch.zeros(5, 2048, dtype=dtype)
    silu_mul_quant.silu_mul_group_fp8_quant(x, *outputs(x, 2048), 128, True, "native", "custom_op", pdl=True, act=act)
    check(compiled, 3)


@pytest.mark.parametrize("width", [1792, 14336, 28672])
def test_silu_mul_token(width, compiled):
    x = rows_of(2 * width, torch.bfloat16, rows=2)
    codes, scales = torch.zeros(2, width, dtype=torch.float8_e4m3fn), torch.zeros(2, 1)
    for rows, rounding in itertools.product((1, 9000), ("native", "custom_op")):
        tile = silu_mul_quant.row_tile(rows, width)
        bound, act = (torch.ones(1), None) if rounding == "native" else (None, torch.zeros_like(codes, dtype=x.dtype))
        silu_mul_quant.silu_mul_token_fp8_quant(x, bound, codes, scales, rounding, rounding, tile, pdl=True, act=act)
    check(compiled, 4)
    for kernel in compiled:
        assert kernel.asm["ptx"].count("bar.sync") <= 2  # those of the row's maximum
        assert "st.global.b8" not in kernel.asm["ptx"]  # codes leave a thread eight at a time


def test_token_of_one_column(compiled):
    x = rows_of(2, torch.bfloat16)
    codes, scales = torch.zeros(5, 1, dtype=torch.float8_e4m3fn), torch.zeros(5, 1)
    silu_mul_quant.silu_mul_token_fp8_quant(x, None, codes, scales, "native", "native", pdl=True)
    check(compiled, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group(dtype, compiled):
    x = rows_of(2048, dtype)
    for quant_rounding in ("custom_op", "native_floored"):
        group_quant.group_fp8_quant(x, *outputs(x, 2048), 128, True, quant_rounding, pdl=True)
    check(compiled, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_mul(dtype, compiled):
    x = rows_of(2048, dtype)
    for quant_rounding in ("custom_op", "native_floored"):
        sigmoid_mul_quant.sigmoid_mul_group_fp8_quant(x, x, *outputs(x, 2048), 128, True, quant_rounding, pdl=True)
    check(compiled, 2)


@pytest.mark.parametrize("addends", [False, True], ids=["", "addends"])
@pytest.mark.parametrize("width", [512, 2048, 4096, 7168, 18432])
def test_rms_norm(width, addends, compiled):
    x, weight = rows_of(width, torch.bfloat16), torch.zeros(width, dtype=torch.bfloat16)
    norm = NormInputs(x, weight, EPSILON, residual=x, keep_norm=True)
    if addends:
        norm = norm._replace(x_addend=x, x_addend_scale=2.5, residual_addend=x)
    codes, scales = outputs(x, width)
    more = (*norm.empty_extras(), "custom_op")
    rms_norm_quant.rms_norm_group_fp8_quant(norm, codes, scales, *more[:2], 128, False, "custom_op", pdl=True)
    rms_norm_quant.rms_norm_token_fp8_quant(norm, None, codes, torch.zeros(5, 1), *more, pdl=True)
    rms_norm_quant.rms_norm_static_fp8_quant(norm, torch.ones(1), codes, *more, pdl=True)
    check(compiled, 3)
    assert all("cp.async.bulk.prefetch" in kernel.asm["ptx"] for kernel in compiled)
    # those of the row's sum, however many chunks there are: scales need none on their way out
    assert compiled[0].asm["ptx"].count("bar.sync") <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 700, 9000])
def test_gated_rms_norm(rows, dtype, compiled):
    x = torch.zeros(rows, 32, 128, dtype=dtype)
    for norm_first, activation, quant_rounding in ((True, "silu", "custom_op"), (False, "sigmoid", "native")):
        gated_rms_norm_quant.gated_rms_norm_group_fp8_quant(
            x, x, torch.zeros(128, dtype=dtype), *outputs(x, 4096), EPSILON, 32, norm_first, activation, 128, False,
            "native", quant_rounding, pdl=True,
        )  # fmt: skip
    check(compiled, 2)


def test_mla_dual_rms_norm(compiled):
    q, kv, _ = rows_of(2112, torch.bfloat16).split((1536, 512, 64), dim=1)
    mla_dual_rms_norm_quant.mla_dual_rms_norm_group_fp8_quant(
        q, kv, torch.zeros(1536).bfloat16(), torch.zeros(512).bfloat16(), *outputs(q, 1536), torch.zeros(5, 512).bfloat16(),
        EPSILON, EPSILON, 128, False, "native", "custom_op", pdl=True,
    )  # fmt: skip
    check(compiled, 1)


def silu_mul(rows, rounding):
    x = rows_of(4096, torch.bfloat16, rows)
    silu_mul_quant.silu_mul_group_fp8_quant(x, *outputs(x, 2048), 128, True, "native", rounding, pdl=True)


def group(rows, rounding):
    x = rows_of(2048, torch.bfloat16, rows)
    group_quant.group_fp8_quant(x, *outputs(x, 2048), 128, True, rounding, pdl=True)


def rms_norm(rows, rounding):
    x = rows_of(2048, torch.bfloat16, rows)
    norm = NormInputs(x, torch.zeros(2048).bfloat16(), EPSILON, residual=x)
    extras = norm.empty_extras()
    rms_norm_quant.rms_norm_group_fp8_quant(norm, *outputs(x, 2048), *extras, 128, True, rounding, pdl=True)


def gated_rms_norm(rows, rounding):
    x = torch.zeros(rows, 32, 128, dtype=torch.bfloat16)
    gated_rms_norm_quant.gated_rms_norm_group_fp8_quant(
        x, x, torch.zeros(128).bfloat16(), *outputs(x, 4096), EPSILON, 32, True, "silu", 128, True, "native", rounding,
        pdl=True,
    )  # fmt: skip


def mla_dual_rms_norm(rows, rounding):
    q, kv, _ = rows_of(2112, torch.bfloat16, rows).split((1536, 512, 64), dim=1)
    mla_dual_rms_norm_quant.mla_dual_rms_norm_group_fp8_quant(
        q, kv, torch.zeros(1536).bfloat16(), torch.zeros(512).bfloat16(), *outputs(q, 1536),
        torch.zeros(rows, 512).bfloat16(), EPSILON, EPSILON, 128, True, "native", rounding, pdl=True,
    )  # fmt: skip


LAUNCHES = [silu_mul, group, rms_norm, gated_rms_norm, mla_dual_rms_norm]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_packed_scales(launch, compiled, monkeypatch):
    packed = GroupScales(128, "packed", ue8m0=True)

    def packed_outputs(x, width):
        return torch.zeros(x.shape[0], width, dtype=torch.float8_e4m3fn), packed.empty(x, x.shape[0], width)

    monkeypatch.setitem(globals(), "outputs", packed_outputs)
    launch(5, "reciprocal")
    check(compiled, 1)
    assert "st.global.b8" in compiled[0].asm["ptx"] or "st.global.v" in compiled[0].asm["ptx"]


# FlashInfer's quantiser divides and multiplies in fast math; nothing else here divides so, and none rounds scales up.
FAST_MATH = ("div.approx.ftz.f32", "mul.ftz.f32")


@pytest.mark.parametrize("launch", LAUNCHES)
def test_before_a_block_gemm(launch, compiled):
    """The number of rows chooses the rounding, as vLLM chooses its GEMM by it."""
    launch(8, "flashinfer")
    launch(8, "reciprocal_or_flashinfer")
    launch(64, "flashinfer")
    launch(64, "reciprocal_or_flashinfer")
    check(compiled, 4)
    *flashinfers, vllms = ([word in kernel.asm["ptx"] for word in FAST_MATH] for kernel in compiled)
    assert flashinfers == [[True, True]] * 3 and vllms == [False, False]
    assert compiled[0].hash == compiled[1].hash


@pytest.mark.parametrize("input_first", [False, True], ids=["", "input_first"])
@pytest.mark.parametrize("tokens", [1, 16, 200, 2000])
def test_mla_v_up(tokens, input_first, compiled):
    x = torch.zeros(tokens, 16, 512, dtype=torch.bfloat16)
    w = torch.zeros(16, 512, 128) if input_first else torch.zeros(16, 128, 512).transpose(1, 2)
    mla_v_up_quant.mla_v_up_group_fp8_quant(
        x, w.bfloat16(), *outputs(x, 16 * 128), (tokens, 0), 128, False, "custom_op", pdl=True
    )
    check(compiled, 1)
