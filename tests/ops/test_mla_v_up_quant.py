# SPDX-License-Identifier: Apache-2.0
"""The op of MLA's up-projection + FP8: that it is its kernel, what torch.compile makes of it, what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import TMA
from tests.kernels.checks import POISON, as_bits, assert_same_bytes
from tests.kernels.test_mla_v_up_quant import (
    Mode,
    _bf16_dot,  # noqa: F401  (a fixture for all tests here)
    exact_inputs,
    outputs,
    run,
)
from vllm_fusion_plugin.ops.mla_v_up_quant import (
    mla_v_up_group_fp8_quant,
    mla_v_up_group_fp8_quant_reference,
    scale_padding,
)
from vllm_fusion_plugin.ops.quant import FP8_DTYPE

OP = torch.ops.vllm_fusion_plugin.mla_v_up_group_fp8_quant

# ---- the op itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_op_is_its_kernel(tokens: int, device: torch.device) -> None:
    x, w = exact_inputs(tokens, 3, 64, 128, torch.bfloat16, device, seed=6)
    before = as_bits(x).clone(), as_bits(w).clone()
    codes, scales = outputs(x, w, Mode())
    assert mla_v_up_group_fp8_quant(x, w, codes, scales) is None
    expected_codes, expected_scales = run(x, w, Mode(), None)
    assert_same_bytes(codes, expected_codes.tensor, "codes")
    assert_same_bytes(scales, expected_scales.tensor, "scales")
    assert torch.equal(as_bits(x), before[0])
    assert torch.equal(as_bits(w), before[1])


def test_op_writes_into_rows_of_larger_buffers(device: torch.device) -> None:
    """The first tokens of a batch, as when others are prefilled: nothing else is touched."""
    x, w = exact_inputs(5, 2, 64, 128, torch.bfloat16, device, seed=7)
    expected_codes, expected_scales = outputs(x, w, Mode())
    mla_v_up_group_fp8_quant(x, w, expected_codes, expected_scales)
    codes = torch.full((12, 300), POISON, dtype=torch.uint8, device=device)
    for scales in (torch.full((12, 2), 7.0, device=device), torch.full((2, 12), 7.0, device=device).t()):
        mla_v_up_group_fp8_quant(x, w, codes.view(FP8_DTYPE)[:5, :256], scales[:5])
        assert_same_bytes(codes.view(FP8_DTYPE)[:5, :256], expected_codes, "codes")
        assert_same_bytes(scales[:5].contiguous(), expected_scales.contiguous(), "scales")
        assert bool((scales[5:] == 7.0).all())
        assert bool((codes[:, 256:] == POISON).all())
        assert bool((codes[5:] == POISON).all())


def test_padding_ends_with_the_storage() -> None:
    """What is zeroed of TMA-aligned scales: all columns' padding in our allocation, all but the last one's in vLLM's, which
    ends there; nothing in other layouts."""
    x = torch.empty(0)
    assert scale_padding(TMA.empty(x, 5, 3 * 128)) == (8, 3)
    assert scale_padding(torch.empty_strided((5, 3), (1, 8))) == (8, 2)
    assert scale_padding(torch.empty_strided((5, 1), (1, 8))) == (8, 0)
    assert scale_padding(torch.empty_strided((8, 3), (1, 8))) == (8, 0)
    assert scale_padding(torch.empty_strided((5, 3), (1, 12))) == (5, 0)
    assert scale_padding(torch.empty(5, 3)) == (5, 0)
    assert scale_padding(torch.empty(5, 8)) == (5, 0)
    assert scale_padding(torch.empty(5, 1)) == (5, 0)
    assert scale_padding(torch.empty(25).as_strided((5, 3), (1, 8), 4)) == (8, 2)


@pytest.mark.parametrize("op", [mla_v_up_group_fp8_quant, mla_v_up_group_fp8_quant_reference])
def test_padding_of_an_allocation_like_vllms(op, device: torch.device) -> None:
    x, w = exact_inputs(5, 3, 64, 128, torch.bfloat16, device, seed=8)
    storage = torch.full((2 * 8 + 5,), 7.0, device=device)
    op(x, w, outputs(x, w, Mode())[0], storage.as_strided((5, 3), (1, 8)))
    assert bool((storage[5:8] == 0).all() and (storage[13:16] == 0).all())
    assert bool((storage[16:] != 7.0).all())


@pytest.mark.parametrize("arguments", [(128, False, "custom_op"), (64, True, "reciprocal")], ids=["128", "64-ue8m0"])
def test_opcheck(arguments: tuple, device: torch.device) -> None:
    x, w = exact_inputs(5, 2, 32, 128, torch.bfloat16, device, seed=9)
    codes, scales = (t.zero_() for t in outputs(x, w, Mode(group_size=arguments[0], scale_layout="column")))
    # Not test_schema: it compares what was written by arithmetic that torch has not for FP8. The tests here do that.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP.default, (x, w, codes, scales, *arguments), test_utils=tests)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_with_dynamic_tokens(device: torch.device) -> None:
    """The compiler sees what is written: codes that are read before and after the op are not confused."""

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(x: torch.Tensor, w: torch.Tensor):
        codes = torch.zeros(x.shape[0], 256, dtype=FP8_DTYPE, device=x.device)
        scales = torch.zeros(x.shape[0], 2, device=x.device)
        before = scales + 1.0
        OP(x, w, codes, scales, 128, False, "custom_op")
        return before, codes, scales

    for tokens in (5, 2, 33):
        x, w = exact_inputs(tokens, 2, 64, 128, torch.bfloat16, device, seed=tokens)
        before, codes, scales = compiled(x, w)
        expected_codes, expected_scales = outputs(x, w, Mode(scale_layout="row"))
        mla_v_up_group_fp8_quant(x, w, expected_codes, expected_scales)
        assert bool((before == 1.0).all())
        assert_same_bytes(codes, expected_codes, "codes")
        assert_same_bytes(scales, expected_scales, "scales")


# ---- what is refused -------------------------------------------------------------------------------------------------


def arguments(**changed: object) -> dict[str, object]:
    good = {
        "attn_out": torch.zeros(2, 4, 32, dtype=torch.bfloat16),
        "w_uv": torch.zeros(4, 32, 128, dtype=torch.bfloat16),
        "codes": torch.zeros(2, 512, dtype=FP8_DTYPE),
        "scales": torch.zeros(2, 4),
        "group_size": 128,
    }
    return good | changed


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


FP8 = FP8_DTYPE
BAD = {
    "fp32": ({"attn_out": zeros(2, 4, 32, dtype=torch.float32)}, r"attn_out has dtype torch\.float32; allowed: torch\.bf"),
    "weights fp16": ({"w_uv": zeros(4, 32, 128, dtype=torch.float16)}, r"w_uv has dtype torch\.float16; allowed: attn_out"),
    "2-D": ({"attn_out": zeros(2, 128)}, r"attn_out has 2 dimensions, shape \(2, 128\); allowed: 3, \[tokens, heads, L\]"),
    "2-D weights": ({"w_uv": zeros(32, 128)}, r"w_uv has shape \(32, 128\); allowed: \[heads, L, V\] with .* \[4, 32\]"),
    "other heads": ({"w_uv": zeros(5, 32, 128)}, r"w_uv has shape \(5, 32, 128\); allowed: .* \[4, 32\]"),
    "other depth": ({"w_uv": zeros(4, 48, 128)}, r"w_uv has shape \(4, 48, 128\); allowed: .* \[4, 32\]"),
    "no heads": (
        {"attn_out": zeros(2, 0, 32), "w_uv": zeros(0, 32, 128), "codes": zeros(2, 0, dtype=FP8)},
        r"attn_out has 0 heads; allowed: 1 or more",
    ),
    "odd depth": ({"attn_out": zeros(2, 4, 24), "w_uv": zeros(4, 24, 128)}, r"w_uv has L=24; allowed: multiples of 16"),
    "no depth": ({"attn_out": zeros(2, 4, 0), "w_uv": zeros(4, 0, 128)}, r"w_uv has L=0; allowed: multiples of 16"),
    "odd width": ({"w_uv": zeros(4, 32, 72)}, r"w_uv has V=72; allowed: multiples of 16"),
    "no width": ({"w_uv": zeros(4, 32, 0)}, r"w_uv has V=0; allowed: multiples of 16"),
    "width between groups": ({"w_uv": zeros(4, 32, 192)}, r"w_uv has V=192; allowed: multiples of group_size=128"),
    "group size": ({"group_size": 32}, r"group_size=32 is not supported; allowed: 64, 128"),
    "codes int8": ({"codes": zeros(2, 512, dtype=torch.int8)}, r"codes has dtype torch\.int8; allowed: torch\.float8"),
    "codes of a head": ({"codes": zeros(2, 128, dtype=FP8)}, r"codes has shape \(2, 128\); allowed: \(2, 512\)"),
    "codes of more tokens": ({"codes": zeros(3, 512, dtype=FP8)}, r"codes has shape \(3, 512\); allowed: \(2, 512\)"),
    "codes 3-D": ({"codes": zeros(2, 4, 128, dtype=FP8)}, r"codes has shape \(2, 4, 128\); allowed: \(2, 512\)"),
    "codes strided": ({"codes": zeros(2, 1024, dtype=FP8)[:, ::2]}, r"codes has stride 2 along its columns; allowed: 1"),
    "scales bf16": ({"scales": zeros(2, 4)}, r"scales has dtype torch\.bfloat16; allowed: torch\.float32"),
    "scales of groups of 64": (
        {"scales": zeros(2, 8, dtype=torch.float32)},
        r"scales has shape \(2, 8\); allowed: \(2, 4\)",
    ),
    "scales of more tokens": (
        {"scales": zeros(4, 4, dtype=torch.float32)},
        r"scales has shape \(4, 4\); allowed: \(2, 4\)",
    ),
    "elsewhere": (
        {"scales": torch.zeros(2, 4, device="meta")},
        r"scales is on meta; allowed: attn_out's device, (cpu|cuda)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused(bad: str, device: torch.device) -> None:
    changed, message = BAD[bad]
    on_device = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in arguments(**changed).items()
    }
    if bad == "codes strided":  # a copy to another device would make it contiguous
        on_device["codes"] = torch.zeros(2, 1024, dtype=FP8, device=device)[:, ::2]
    for call in (mla_v_up_group_fp8_quant, mla_v_up_group_fp8_quant_reference):
        with pytest.raises(ValueError, match=message):
            call(**on_device)


def test_bad_arguments_are_refused_while_compiling(device: torch.device) -> None:
    good = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in arguments().items()}

    @torch.compile(fullgraph=True)
    def compiled(attn_out, w_uv, codes, scales, group_size):
        OP(attn_out, w_uv, codes, scales, 96, False, "custom_op")

    with pytest.raises(Exception, match=r"group_size=96 .*allowed: 64, 128"):
        compiled(**good)
