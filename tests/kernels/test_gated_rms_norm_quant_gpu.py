# SPDX-License-Identifier: Apache-2.0
"""Gated RMSNorm + FP8 on a GPU: the bytes of Inductor's kernels for vLLM's layer, followed by vLLM's quantiser.

Inductor times several tiles and keeps one, and with the tile changes the order in which a head's squares are added. Here its
kernels are therefore written out, with the tile whose order the op has; one test compiles vLLM's layer and takes what comes.

VFP_EXHAUSTIVE_ELEMENTS sets how many elements each mode gets at random (default 2**30). The tests with `sanitizer` in their
names are few small launches, for
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m pytest tests/kernels -k sanitizer
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from vllm_fusion_plugin.kernels import gated_rms_norm_quant as kernels
from vllm_fusion_plugin.kernels import numerics
from vllm_fusion_plugin.kernels.rounding import is_native
from vllm_fusion_plugin.ops.gated_rms_norm_quant import gated_rms_norm_group_fp8_quant
from vllm_fusion_plugin.ops.quant import group_fp8_quant_reference

from .cases import DTYPES, all_values, random_input, short
from .checks import (
    EDGE,
    ENDS,
    assert_same_bytes,
    assert_same_outputs,
    check_columns,
    check_cuda_graph_of_group_op,
    check_ends,
    check_pdl_switch,
    code_steps,
    count_differing,
    native_quantiser,
    one_nan,
    vllms_group_quant,
)
from .installed import installed
from .test_gated_rms_norm_quant import (
    EPSILON,
    LAYOUTS,
    QWEN3_NEXT,
    Input,
    Mode,
    exact_input,
    heads_input,
    norm,
    norm_modes,
    quant_modes,
    views,
)
from .test_numerics import run

pytestmark = pytest.mark.gpu

ELEMENTS = int(os.environ.get("VFP_EXHAUSTIVE_ELEMENTS", 2**30))
HEADS, HEAD_DIM = 32, 128  # Qwen3-Next's
ROWS = 8192


# ---- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _inductor_gate(z, SIGMOID: tl.constexpr):
    if SIGMOID:
        return tl.sigmoid(z)
    return z / (libdevice.exp(-z) + 1.0)


@triton.jit
def _inductor_gate_kernel(z_ptr, out_ptr, SIGMOID: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, _inductor_gate(tl.load(z_ptr + at).to(tl.float32), SIGMOID))


@triton.jit
def _gate_kernel(z_ptr, out_ptr, SIGMOID: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, kernels.gate(numerics.widen(tl.load(z_ptr + at)), SIGMOID))


@triton.jit
def _widen_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, numerics.widen(tl.load(x_ptr + at)))


@triton.jit
def _round_to_bf16_kernel(y_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, numerics.rounded(tl.load(y_ptr + at), tl.bfloat16))


@triton.jit
def _exp_kernel(x_ptr, out_ptr, OURS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, numerics.exp_of_negative(x) if OURS else libdevice.exp(-x))


@pytest.mark.parametrize("sigmoid", [False, True], ids=["silu", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_gate_has_inductors_bits(dtype: torch.dtype, sigmoid: bool, device: torch.device) -> None:
    z = all_values(dtype, device)
    actual, expected = run(_gate_kernel, z, SIGMOID=sigmoid), run(_inductor_gate_kernel, z, SIGMOID=sigmoid)
    assert_same_bytes(one_nan(actual), one_nan(expected), "gate in fp32")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_widen(dtype: torch.dtype, device: torch.device) -> None:
    x = all_values(dtype, device)
    assert_same_bytes(one_nan(run(_widen_kernel, x)), one_nan(x.float()), "x in fp32")


def test_rounding_and_exp_over_all_floats(device: torch.device) -> None:
    chunk = 2**27
    for start in range(-(2**31), 2**31, chunk):
        x = torch.arange(start, start + chunk, device=device).to(torch.int32).view(torch.float32)
        rounded = run(_round_to_bf16_kernel, x)
        assert_same_bytes(one_nan(rounded), one_nan(x.to(torch.bfloat16).float()), f"bf16 of floats from {start}")
        ours, cuda = run(_exp_kernel, x, OURS=True), run(_exp_kernel, x, OURS=False)
        assert_same_bytes(one_nan(ours), one_nan(cuda), f"exp of floats from {start}")


# ---- what Inductor and vLLM compute ----------------------------------------------------------------------------------


@triton.jit
def _inductor_sums_kernel(
    x_ptr,
    z_ptr,
    out_ptr,
    rows,
    HEAD_DIM: tl.constexpr,
    XBLOCK: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    row = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    column = tl.arange(0, HEAD_DIM)[None, :]
    y = tl.load(x_ptr + column + HEAD_DIM * row, row < rows, other=0.0).to(tl.float32)
    if GATE_FIRST:
        y = y * _inductor_gate(tl.load(z_ptr + column + HEAD_DIM * row, row < rows, other=0.0).to(tl.float32), SIGMOID)
    squares = tl.where(row < rows, tl.broadcast_to(y * y, [XBLOCK, HEAD_DIM]), 0)
    tl.store(out_ptr + row, tl.sum(squares, 1)[:, None], row < rows)


@triton.jit
def _inductor_norm_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    sums_ptr,
    out_ptr,
    epsilon,
    HEAD_DIM: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    SIGMOID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + at).to(tl.float32)
    gate = _inductor_gate(tl.load(z_ptr + at).to(tl.float32), SIGMOID)
    if GATE_FIRST:
        y = y * gate
    y = y * libdevice.rsqrt(tl.load(sums_ptr + at // HEAD_DIM) / HEAD_DIM + epsilon)
    y = y * tl.load(weight_ptr + at % HEAD_DIM).to(tl.float32)
    if not GATE_FIRST:
        y = y * gate
    tl.store(out_ptr + at, y)


def inductors_norm(data: Input, mode: Mode) -> torch.Tensor:
    """y [rows, heads * head size] of a power of two up to 256, in x's dtype or, before a native quantiser, in fp32."""
    x, z, weight = data
    rows, heads, head_dim = x.shape
    forms = {"GATE_FIRST": not mode.norm_before_gate, "SIGMOID": mode.activation == "sigmoid"}
    # As Inductor launches them: for heads of 256 one warp, with 4 elements of 16 bytes each.
    xblock, warps = (8, 2) if head_dim < 256 else (4, 1)
    sums = torch.empty(rows * heads, dtype=torch.float32, device=x.device)
    _inductor_sums_kernel[triton.cdiv(rows * heads, xblock),](
        x, z, sums, rows * heads, HEAD_DIM=head_dim, XBLOCK=xblock, **forms, num_warps=warps, enable_fp_fusion=True
    )
    y = torch.empty((rows, heads * head_dim), dtype=x.dtype if mode.rounded else torch.float32, device=x.device)
    block = 1024 if y.numel() % 1024 == 0 else head_dim
    _inductor_norm_kernel[y.numel() // block,](
        x, z, weight, sums, y, EPSILON, HEAD_DIM=head_dim, BLOCK=block, **forms, enable_fp_fusion=True
    )
    return y


class Unfused:
    """Inductor's kernels for the norm, then vLLM's quantiser: its own op, or Inductor's kernel for the native one."""

    def __init__(self) -> None:
        import vllm._custom_ops  # noqa: F401  (loads the extension that defines torch.ops._C)

        self.native: dict[tuple, Callable] = {}

    def compiled_quantiser(self, mode: Mode) -> Callable:
        from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

        key = (mode.group_size, mode.use_ue8m0)
        if key not in self.native:
            quantise = native_quantiser(static=False, group_shape=GroupShape(1, key[0]), use_ue8m0=key[1])
            self.native[key] = torch.compile(quantise, dynamic=True)
        return self.native[key]

    def quantise(self, y: torch.Tensor, mode: Mode) -> tuple[torch.Tensor, torch.Tensor]:
        if not is_native(mode.quant_rounding):
            return vllms_group_quant(y, mode)
        # dtypes, and one row or more: beyond the limit it would run eagerly, which divides exactly
        with torch._dynamo.config.patch(recompile_limit=64):
            codes, found = self.compiled_quantiser(mode)(y)
        scales = mode.scales.empty(y, *y.shape)
        return codes, scales.copy_(found)

    def __call__(self, data: Input, mode: Mode) -> tuple[torch.Tensor, torch.Tensor]:
        return self.quantise(inductors_norm(data, mode), mode)


@pytest.fixture(scope="module")
def unfused() -> Unfused:
    pytest.importorskip("vllm")
    return Unfused()


def op(data: Input, mode: Mode) -> tuple[torch.Tensor, torch.Tensor]:
    return gated_rms_norm_group_fp8_quant(*data, EPSILON, data.heads, **installed(mode).arguments())


def check(data: Input, mode: Mode, unfused: Unfused, what: str) -> None:
    codes, scales = op(data, mode)
    expected_codes, expected_scales = unfused(data, mode)
    assert scales.stride() == expected_scales.stride()
    assert_same_bytes(one_nan(codes), one_nan(expected_codes), f"{what}: codes")
    assert_same_bytes(one_nan(scales), one_nan(expected_scales), f"{what}: scales")


# ---- all gates, and many random inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", norm_modes(), ids=str)
def test_all_gates(mode: Mode, unfused: Unfused, device: torch.device) -> None:
    """Every z, in three arrangements, since a group's codes tell little next to one huge element: in the order of the bit
    patterns a group has one exponent, every 512th pattern has all exponents, and shuffled it has anything."""
    values = all_values(mode.dtype, device)
    for seed in range(8):
        generator = torch.Generator(device=device).manual_seed(seed)
        shuffled = values[torch.randperm(65536, generator=generator, device=device)]
        z = torch.cat([values, values.view(128, 512).t().reshape(-1), shuffled]).view(-1, HEADS, HEAD_DIM)
        data = heads_input(len(z), HEADS, HEAD_DIM, mode.dtype, device, seed=seed, kind="special" if seed else "normal")
        check(data._replace(z=z), mode, unfused, f"seed {seed}")


@pytest.mark.parametrize("mode", [*norm_modes(), *quant_modes()], ids=str)
def test_random(mode: Mode, unfused: Unfused, device: torch.device) -> None:
    done, number = 0, 0
    while done < ELEMENTS:
        kind = "bits" if number % 8 == 7 else "special" if number % 8 == 3 else "normal"
        data = heads_input(ROWS, HEADS, HEAD_DIM, mode.dtype, device, seed=number, kind=kind)
        check(data, mode, unfused, f"chunk {number}")
        done, number = done + data.x.numel(), number + 1


# Qwen3-Next's heads, whole and sharded by 2, 4 and 8, and heads that no tile divides.
@pytest.mark.parametrize("heads", [32, 16, 8, 4, 1, 3, 5, 31])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 64, 127, 1000, 8192])
def test_model_shapes(rows: int, heads: int, unfused: Unfused, device: torch.device) -> None:
    data = heads_input(rows, heads, HEAD_DIM, torch.bfloat16, device, seed=rows)
    check(data, QWEN3_NEXT, unfused, "tma")
    check(data, QWEN3_NEXT._replace(scale_layout="column", group_size=64), unfused, "column, groups of 64")
    expected = op(data, QWEN3_NEXT)
    for layout in LAYOUTS:
        strided = data._replace(x=views(data.x, layout), z=views(data.z, layout))
        assert_same_outputs(op(strided, QWEN3_NEXT), expected, layout)


@pytest.mark.parametrize("head_dim, group_size", [(64, 64), (128, 64), (256, 128), (256, 64)])
@pytest.mark.parametrize("rows", [1, 33, 2000])
def test_head_sizes(rows: int, head_dim: int, group_size: int, unfused: Unfused, device: torch.device) -> None:
    for mode in norm_modes():
        mode = mode._replace(group_size=group_size)
        data = heads_input(rows, 16, head_dim, mode.dtype, device, seed=rows)
        check(data, mode, unfused, str(mode))


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256, 512, 1024, 8192])
@pytest.mark.parametrize("heads", [1, 4, 32])
def test_rows_do_not_depend_on_their_batch(heads: int, head_dim: int, device: torch.device) -> None:
    mode = QWEN3_NEXT._replace(group_size=64, scale_layout="row")
    data = heads_input(2048, heads, head_dim, mode.dtype, device, seed=1)
    codes, scales = op(data, mode)
    for rows in (1, 3, 16, 100, 700):
        for first in (0, 1111):
            part = slice(first, first + rows)
            some = op(data._replace(x=data.x[part], z=data.z[part]), mode)
            assert_same_bytes(some[0], codes[part], f"{rows} rows from {first}: codes")
            assert_same_bytes(some[1], scales[part], f"{rows} rows from {first}: scales")


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "as it comes"])
@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["norm first", "gate first"])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_against_the_compiled_layer(
    activation: str,
    norm_before_gate: bool,
    deterministic: bool,
    unfused: Unfused,
    record_property: Callable,
    device: torch.device,
) -> None:
    """vLLM's layer as Inductor compiles it here: with the tile that it finds fastest, or with the one that it takes when it
    may not go by time, whose order is the op's."""
    from vllm.model_executor.layers.layernorm import RMSNormGated

    if not hasattr(RMSNormGated, "forward_static"):
        pytest.skip("this vLLM has no RMSNormGated.forward_static")

    @torch.compile(dynamic=True, fullgraph=True, options={"deterministic": deterministic})
    def layer(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = RMSNormGated.forward_static(
            x.reshape(-1, HEAD_DIM),
            z.reshape(-1, HEAD_DIM),
            weight,
            EPSILON,
            x.dtype,
            norm_before_gate=norm_before_gate,
            activation=activation,
        )
        return y.reshape(x.shape[0], -1)

    mode = QWEN3_NEXT._replace(norm_before_gate=norm_before_gate, activation=activation)
    for rows in (ROWS, 16):  # Inductor chooses its tile at the first call
        data = heads_input(rows, HEADS, HEAD_DIM, mode.dtype, device, seed=rows)
        codes, scales = op(data, mode)
        expected_codes, expected_scales = unfused.quantise(layer(*data), mode)
        if deterministic:
            assert_same_bytes(codes, expected_codes, f"{rows} rows: codes")
            assert_same_bytes(scales, expected_scales, f"{rows} rows: scales")
            continue
        differing = count_differing(codes, expected_codes)
        record_property(f"codes that differ at {rows} rows", f"{differing} of {codes.numel()}")
        torch.testing.assert_close(scales, expected_scales, rtol=torch.finfo(mode.dtype).eps, atol=0)
        assert int(code_steps(codes, expected_codes).max()) <= 1
        assert differing <= codes.numel() * 1e-4


# ---- sizes, streams and graphs ---------------------------------------------------------------------------------------


def test_more_than_two_to_the_31_elements(unfused: Unfused, device: torch.device) -> None:
    """11 GB, twice of it head by head."""
    rows = 2**31 // (HEADS * HEAD_DIM) + EDGE
    x, z = (torch.zeros(rows, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device) for _ in range(2))
    for seed, end in enumerate(ENDS):
        some = heads_input(EDGE, HEADS, HEAD_DIM, x.dtype, device, seed=seed)
        x[end], z[end] = some.x, some.z
    for mode in (QWEN3_NEXT, QWEN3_NEXT._replace(scale_layout="row")):
        for layout in (x, views(x, "head by head")):
            expected = [unfused(Input(x[end], z[end], some.weight), mode) for end in ENDS]
            check_ends(op(Input(layout, z, some.weight), mode), expected, either_zero=True)


def test_more_rows_than_a_grid_has_in_its_second_axis(unfused: Unfused, device: torch.device) -> None:
    data = heads_input(140_000, 1, HEAD_DIM, torch.bfloat16, device, seed=2)
    check(data, QWEN3_NEXT, unfused, "140000 rows")


def test_chain_in_a_cuda_graph(device: torch.device) -> None:
    weight = torch.randn(HEAD_DIM, dtype=torch.bfloat16, device=device)

    def of_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = rows.view(512, -1, HEAD_DIM)
        return op(Input(x, x, weight), QWEN3_NEXT)

    check_cuda_graph_of_group_op(
        of_rows,
        lambda seed: heads_input(512, HEADS, HEAD_DIM, torch.bfloat16, device, seed=seed).x,
        links=4,
        first_seed=3,
    )


def test_pdl_switch_changes_no_byte(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    data = heads_input(33, HEADS, HEAD_DIM, torch.bfloat16, device, seed=24)
    check_pdl_switch(lambda: op(data, QWEN3_NEXT), data.x.device, monkeypatch)


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [QWEN3_NEXT, QWEN3_NEXT._replace(scale_layout="column", group_size=64)], ids=str)
@pytest.mark.parametrize("head_dim", [128, 192])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_sanitizer_op(rows: int, head_dim: int, mode: Mode, device: torch.device) -> None:
    """The op's own allocations, unlike the guarded ones of the other tests: an access past their end is out of bounds."""
    mode = mode._replace(group_size=64) if head_dim == 192 else mode
    data = exact_input(rows, 3, head_dim, mode, device, seed=25)
    codes, scales = op(data, mode)
    expected_codes, expected_scales = group_fp8_quant_reference(
        norm(data, mode), mode.scales, installed(mode).quant_rounding
    )
    assert_same_bytes(codes.cpu(), expected_codes.cpu(), "codes")
    check_columns(scales, expected_scales, mode.scale_layout in ("tma", "packed"))


def test_sanitizer_strided(device: torch.device) -> None:
    """Heads that end with their storage, so that reading on is out of bounds."""
    data = exact_input(5, 3, 128, QWEN3_NEXT, device, seed=26)
    wide = random_input(5, 3 * 128, torch.bfloat16, device, seed=27).view(5, 3, 256)
    x = wide[:, :, 128:]
    x.copy_(data.x)
    assert_same_outputs(op(data._replace(x=x), QWEN3_NEXT), op(data, QWEN3_NEXT))
