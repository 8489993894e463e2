# SPDX-License-Identifier: Apache-2.0
"""No number of tokens needs a kernel that the warm-up has not compiled. Nothing runs: launches are on meta tensors."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from vllm_fusion_plugin import warmup
from vllm_fusion_plugin.kernels import launch, mla_v_up_quant, pdl
from vllm_fusion_plugin.kernels.compile_keys import compile_key, keys_of
from vllm_fusion_plugin.ops import calls, registry
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, GroupScales
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs
from vllm_fusion_plugin.plugin import _register_ops as register_ops

register_ops()

MOST = 16384
LAYOUTS = ("row", "column", "tma")
# of models: DeepSeek-V3's latent, Qwen3-Next, Qwen3-8B, GLM-4.5, Qwen3-8B's MLP, DeepSeek-V3's, Llama-3.1-70B's
WIDTHS = [512, 1536, 2048, 4096, 5120, 7168, 12288, 18432, 28672]
# SiLU·mul of 12288 has as many. More would mean that something else comes from the number of tokens.
MOST_KEYS = 8
SPLIT = "reciprocal_or_flashinfer"


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched as on an H200."""
    monkeypatch.setattr(pdl, "pdl_supported", lambda device: True)
    monkeypatch.setattr(mla_v_up_quant, "_gpu", lambda device: mla_v_up_quant._Device(132, 232448, True))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def columns(wide: int, first: int, width: int) -> torch.Tensor:
    """Some columns of a wider tensor of 64 rows."""
    return meta(64, wide)[:, first : first + width]


def call(op: str, *arguments: Any) -> calls.Call:
    described, tokens = calls.describe(registry.SIGNATURES[op], arguments)
    assert tokens == 64
    return described


def silu_mul(width: int, layout: str, quant_rounding: str = "custom_op") -> calls.Call:
    x = meta(64, 2 * width)
    return call("silu_mul_group_fp8_quant", x, 128, layout, True, "native", quant_rounding)


def silu_mul_token(width: int, quant_rounding: str) -> calls.Call:
    return call("silu_mul_token_fp8_quant", meta(64, 2 * width), None, "native", quant_rounding)


def group(width: int, layout: str, quant_rounding: str = "custom_op") -> calls.Call:
    return call("group_fp8_quant", meta(64, width), 128, layout, layout == "packed", quant_rounding)


def gated(heads: int, layout: str, dims: int = 3, quant_rounding: str = "custom_op") -> calls.Call:
    shape = (64, heads, 128) if dims == 3 else (64 * heads, 128)
    how = (True, "silu", 128, layout, layout == "packed", "native", quant_rounding)
    return call("gated_rms_norm_group_fp8_quant", meta(*shape), meta(*shape), meta(128), 1e-6, heads, *how)


def dual(layout: str, quant_rounding: str = "custom_op") -> calls.Call:
    q, kv = columns(2112, 0, 1536), columns(2112, 1536, 512)
    how = (128, layout, layout == "packed", "native", quant_rounding)
    return call("mla_dual_rms_norm_group_fp8_quant", q, kv, meta(1536), meta(512), 1e-6, 1e-6, *how)


def norm(width: int, layout: str, add: bool, quant_rounding: str = "custom_op", addends: bool = False) -> calls.Call:
    x, residual = meta(64, width), meta(64, width) if add else None
    norm = NormInputs(x, meta(width), residual=residual, keep_norm=add and quant_rounding == "custom_op")
    if addends:
        norm = norm._replace(x_addend=meta(64, width), x_addend_scale=2.5, residual_addend=meta(64, width))
    return call("rms_norm_group_fp8_quant", *norm, 128, layout, layout == "packed", quant_rounding)


def other_norm(kind: str, width: int, add: bool, quant_rounding: str = "custom_op") -> calls.Call:
    given = None if kind == "token" else meta(1, dtype=torch.float32)
    residual = meta(64, width) if add else None
    norm = NormInputs(meta(64, width), meta(width), residual=residual)
    return call(f"rms_norm_{kind}_fp8_quant", *norm, given, quant_rounding)


def v_up(heads: int, layout: str, attn: str = "tokens", weights: str = "input_first") -> calls.Call:
    x = meta(64, heads, 512) if attn == "tokens" else meta(heads, 64, 512).transpose(0, 1)
    w = meta(heads, 512, 128) if weights == "input_first" else meta(heads, 128, 512).transpose(1, 2)
    scales = GroupScales(128, layout).empty(x, 64, heads * 128)
    return call(
        "mla_v_up_group_fp8_quant", x, w, meta(64, heads * 128, dtype=FP8_DTYPE), scales, 128, True, "custom_op"
    )


def keys_at(made: calls.Call, tokens: int) -> set[Any]:
    return keys_of(lambda: registry.CUDA_IMPLEMENTATIONS[made.op](*made.at(tokens, warmup.META)))


def check(made: calls.Call, numbers: range | list[int]) -> None:
    counts = warmup.token_counts(made, MOST)
    warm = set().union(*(keys_at(made, tokens) for tokens in counts))
    # the tile of 31 rows and of 32 has two roundings before vLLM's default block GEMM
    assert 1 <= len(warm) <= MOST_KEYS + (SPLIT in made.arguments)
    for tokens in numbers:
        (key,) = keys_at(made, tokens)
        assert key in warm, f"{tokens} tokens need what {counts} have not compiled"


# Each op in each layout, at widths that have the most tiles.
EVERY = {
    **{f"silu_mul-{layout}": silu_mul(12288, layout) for layout in LAYOUTS},
    **{f"group-{layout}": group(7168, layout) for layout in LAYOUTS},
    **{f"gated-{layout}": gated(32, layout) for layout in LAYOUTS},
    **{f"dual-{layout}": dual(layout) for layout in LAYOUTS},
    **{f"norm-{layout}": norm(7168, layout, add=False) for layout in LAYOUTS},
    **{f"add_norm-{layout}": norm(7168, layout, add=True) for layout in LAYOUTS},
    **{f"v_up-{layout}": v_up(128, layout) for layout in LAYOUTS},
    # before DeepGEMM's on compute capability 10.0
    "silu_mul-packed": silu_mul(12288, "packed"),
    "group-packed": group(7168, "packed"),
    "gated-packed": gated(32, "packed"),
    "dual-packed": dual("packed"),
    "add_norm-packed": norm(7168, "packed", add=True),
    # before vLLM's default block GEMM
    "silu_mul-split": silu_mul(12288, "tma", SPLIT),
    "group-split": group(7168, "tma", SPLIT),
    "gated-split": gated(32, "tma", quant_rounding=SPLIT),
    "dual-split": dual("tma", SPLIT),
    "add_norm-split": norm(7168, "tma", add=True, quant_rounding=SPLIT),
    "token": other_norm("token", 4096, add=True),
    "static": other_norm("static", 4096, add=True),
    "silu_mul-keep_act": call("silu_mul_group_fp8_quant", meta(64, 24576), 128, "tma", True, "native", SPLIT, True),
    "silu_mul_token": silu_mul_token(14336, "native"),
    "silu_mul_static": call(
        "silu_mul_static_fp8_quant", meta(64, 8192), meta(1, dtype=torch.float32), "native", "native"
    ),
    "silu_mul_nvfp4": call("silu_mul_nvfp4_quant", meta(64, 8192), meta(1, dtype=torch.float32), "custom_op"),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_number_of_tokens(name: str) -> None:
    check(EVERY[name], range(1, MOST + 1))


def _some_numbers() -> list[int]:
    """Numbers next to where something may change, and others."""
    steps = [2**n for n in range(15)] + [
        2**n // width for n in (16, 17, 18, 19, 22, 23, 24, 25, 26) for width in WIDTHS
    ]
    near = {step + offset for step in steps for offset in (-1, 0, 1, 2)}
    return sorted({n for n in near if 1 <= n <= MOST} | set(random.Random(7).sample(range(1, MOST + 1), 60)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, layout: str) -> None:
    numbers = _some_numbers()
    others = [silu_mul_token(width, "custom_op")] if layout == "row" else []
    for made in (silu_mul(width, layout, "native"), group(width, layout, "reciprocal"), *others):
        check(made, numbers)
    if width <= 18432:
        for quant_rounding, add, addends in (
            ("native", True, False),
            ("custom_op", False, False),
            ("custom_op", True, True),
        ):
            check(norm(width, layout, add, quant_rounding, addends), numbers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads(layout: str) -> None:
    numbers = _some_numbers()
    for heads in (4, 8, 16, 32):
        check(gated(heads, layout, dims=2, quant_rounding="native"), numbers)
    for heads in (8, 16, 32, 128):
        for attn in ("tokens", "heads"):
            check(v_up(heads, layout, attn, "columns_first"), numbers)


def test_strided_rows() -> None:
    """Rows of which the first starts 16 bytes apart from the next one's multiple of 16, and one row, whatever its stride."""
    x = columns(1032, 8, 1024)
    made = call("group_fp8_quant", x, 128, "tma", False, "custom_op")
    check(made, _some_numbers())
    one = meta(1, 1024).as_strided((1, 1024), (3, 1))
    arguments = (128, "tma", False, "custom_op")
    alike, tokens = calls.describe(registry.SIGNATURES["group_fp8_quant"], (one, *arguments))
    assert tokens == 1
    assert keys_of(lambda: registry.CUDA_IMPLEMENTATIONS["group_fp8_quant"](one, *arguments)) == keys_at(alike, 1)
    assert alike == call("group_fp8_quant", meta(64, 1024), *arguments)  # one row is like contiguous ones


def test_more_tokens_than_a_grid_has_rows() -> None:
    made = silu_mul(512, "row")
    counts = warmup.token_counts(made, 140_000)
    warm = set().union(*(keys_at(made, tokens) for tokens in counts))
    for tokens in (65535, 65536, 131070, 131071, 139_999):
        assert keys_at(made, tokens) <= warm


@pytest.mark.parametrize(
    "width", [192, 512, 768, 1536, 2048]
)  # of experts: Qwen3's, some of them on 8 GPUs; DeepSeek-V3's
def test_rows_of_experts(width: int) -> None:
    """Up to ten a token."""
    group_size = 128 if width % 128 == 0 else 64
    made = call("silu_mul_group_fp8_quant", meta(64, 2 * width), group_size, "row", True, "custom_op", "reciprocal")
    counts = warmup.token_counts(made, 10 * 8192)
    warm = set().union(*(keys_at(made, rows) for rows in counts))
    assert len(warm) <= MOST_KEYS
    for rows in {tokens * experts for tokens in _some_numbers() if tokens <= 8192 for experts in (1, 8, 10)}:
        assert keys_at(made, rows) <= warm, rows


def test_keys_tell_launches_apart() -> None:
    """What Triton compiles anew for has another key: constants, types, alignment, ones and multiples of 16, options."""
    kernel = EVERY["group-row"]
    with launch.planning() as plan:
        registry.CUDA_IMPLEMENTATIONS[kernel.op](*kernel.at(64, warmup.META))
    function, args, kwargs = plan.launches[0]
    names = list(launch_arguments(function))
    key = compile_key(function, args, kwargs)

    def changed(name: str, value: Any) -> bool:
        at = names.index(name)
        return compile_key(function, (*args[:at], value, *args[at + 1 :]), kwargs) != key

    assert not changed("rows", 1)
    assert not changed("rows", 48)
    assert not changed("scale_group_stride", 16)
    assert not changed("x_stride", 32)
    assert not changed("eps", 0.5)
    assert changed("x_stride", 1)
    assert changed("x_stride", 24)
    assert changed("x_stride", 2**40)
    assert changed("x_ptr", args[0].half())
    assert changed("x_ptr", torch.zeros(65, dtype=torch.bfloat16)[1:])
    assert compile_key(function, args, kwargs | {"num_warps": 32}) != key
    assert compile_key(function, args, kwargs | {"PADDED": True}) != key


def launch_arguments(function: Any) -> list[str]:
    return list(function.arg_names)
