# SPDX-License-Identifier: Apache-2.0
"""RMSNorm + quantiser whose inputs are sums: added up in fp32, as Inductor does, and not rounded in between."""

from __future__ import annotations

import pytest
import torch

from vllm_fusion_plugin.kernels import rms_norm_quant as kernels
from vllm_fusion_plugin.kernels.row_order import row_tile
from vllm_fusion_plugin.ops import rms_norm_quant as ops
from vllm_fusion_plugin.ops.quant import GroupScales
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs

from .checks import (
    assert_inductors_rows,
    assert_inductors_scales,
    assert_same_bytes,
    assert_same_outputs,
    code_steps,
    native_quantiser,
)

EPSILON, GROUP = 1e-6, 128
ROWS = 3


def integers(
    seed: int, width: int, device: torch.device, top: int = 30, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Numbers of which sums, and sums of squares, are exact whatever their order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-top, top + 1, (ROWS, width), generator=generator).to(dtype).to(device)


def random(seed: int, width: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def launch(kind: str, x: torch.Tensor, residual: torch.Tensor | None, **more) -> list[torch.Tensor]:
    """Codes, scales if there are any, normed, residual_out."""
    given = {name: more.pop(name) for name in ("tile",) if name in more}
    norm = NormInputs(x, random(9, x.shape[1], x.device)[0], EPSILON, residual, keep_norm=True, **more)
    codes, extras = norm.empty_codes(), norm.empty_extras()
    if kind == "group":
        scales = GroupScales(GROUP).empty(x, *x.shape)
        kernels.rms_norm_group_fp8_quant(norm, codes, scales, *extras, GROUP, False, "custom_op", **given)
    elif kind == "token":
        scales = x.new_empty((ROWS, 1), dtype=torch.float32)
        kernels.rms_norm_token_fp8_quant(norm, None, codes, scales, *extras, "custom_op", **given)
    else:
        scales = x.new_full((1,), 0.01, dtype=torch.float32)
        kernels.rms_norm_static_fp8_quant(norm, scales, codes, *extras, "custom_op", **given)
    return [codes, scales, *(extra for extra in extras if extra is not None)]


@pytest.mark.parametrize("kind", ["group", "token", "static"])
@pytest.mark.parametrize("width", [256, 1536, 4096])  # a warp, a chunk with columns to spare, several chunks
def test_exact_sums_have_the_bytes_of_their_sum(kind: str, width: int, device: torch.device) -> None:
    x, addend, residual, more = (integers(seed, width, device) for seed in range(4))
    tile = row_tile(width, False, True)
    together = launch(kind, x + 2.5 * addend, residual + more, tile=tile)
    apart = launch(kind, x, residual, x_addend=addend, x_addend_scale=2.5, residual_addend=more)
    for name, got, want in zip(("codes", "scales", "normed", "sum"), apart, together, strict=True):
        assert_same_bytes(got, want, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", ["x_addend", "residual_addend", "both"])
def test_sums_are_rounded_once(given: str, dtype: torch.dtype, device: torch.device) -> None:
    width = 512
    x, addend, residual, more = (random(seed, width, device, dtype) for seed in range(4))
    addends = {} if given == "residual_addend" else {"x_addend": addend, "x_addend_scale": 2.5}
    addends |= {} if given == "x_addend" else {"residual_addend": more}
    *_, normed, total = launch("group", x, residual, **addends)
    want = x.double() + (2.5 * addend.double() if given != "residual_addend" else 0.0)
    # each sum in fp32: the first is one multiply-add
    want = want.float() + (residual.float() + (more.float() if given != "x_addend" else 0.0))
    assert_same_bytes(total, want.to(dtype), "sum")
    # ... which is not what comes of rounded sums
    rounded = (
        x + 2.5 * addend if given != "residual_addend" else x,
        residual + more if given != "x_addend" else residual,
    )
    assert not torch.equal(launch("group", *rounded)[-1], total)
    assert not torch.equal(launch("group", *rounded)[-2], normed)


def test_sum_is_not_stored_unless_wanted(device: torch.device) -> None:
    x, residual = (random(seed, 256, device) for seed in (0, 1))
    weight = random(9, 256, device)[0]
    with_sum = ops.rms_norm_group_fp8_quant(NormInputs(x, weight, residual=residual))
    without = ops.rms_norm_group_fp8_quant(NormInputs(x, weight, residual=residual, keep_sum=False))
    assert len(with_sum) == 3 and len(without) == 2
    for got, want in zip(without, with_sum[:2], strict=True):
        assert_same_bytes(got, want, "output")


@pytest.mark.parametrize("sum_columns", [1024, 2048])
@pytest.mark.parametrize("width", [256, 1536, 4096])
def test_an_fp32_sum_stands_for_its_addends(width: int, sum_columns: int, device: torch.device) -> None:
    """What one op returns in fp32, the next one reads, as residual or as its addend: the bytes of what adds it all up."""
    x, residual, x2, x3 = (random(seed, width, device) for seed in range(4))
    weight = random(9, width, device)[0]
    more = {"keep_norm": True, "sum_columns": sum_columns}
    *_, total = ops.rms_norm_group_fp8_quant(NormInputs(x, weight, residual=residual, fp32_sum=True))
    assert_same_bytes(total, x.float() + residual.float(), "sum")

    want = ops.rms_norm_group_fp8_quant(NormInputs(x2, weight, residual=x, residual_addend=residual, **more))
    got = ops.rms_norm_group_fp8_quant(NormInputs(x2, weight, residual=total, **more))
    for name, one, other in zip(("codes", "scales", "normed", "sum"), got, want, strict=True):
        assert_same_bytes(one, other, name)

    *_, sum_of_three = ops.rms_norm_group_fp8_quant(NormInputs(x2, weight, residual=total, fp32_sum=True))
    want = ops.rms_norm_group_fp8_quant(NormInputs(x3, weight, residual=sum_of_three, fp32_sum=True, **more))
    got = ops.rms_norm_group_fp8_quant(
        NormInputs(x3, weight, residual=x2, residual_addend=total, fp32_sum=True, **more)
    )
    for name, one, other in zip(("codes", "scales", "normed", "sum"), got, want, strict=True):
        assert_same_bytes(one, other, name)
    assert got[-1].dtype == torch.float32


@pytest.mark.parametrize("kind", ["group", "token", "static"])
def test_op_is_its_reference_with_addends(kind: str, device: torch.device) -> None:
    x, addend, residual, more = (integers(seed, 256, device) for seed in range(4))
    weight = random(9, 256, device)[0]
    rest = {"group": (GROUP, "row", False), "token": (None,), "static": (torch.full((1,), 0.01, device=device),)}[kind]
    norm = NormInputs(
        x, weight, EPSILON, residual, keep_norm=True, x_addend=addend, x_addend_scale=0.5, residual_addend=more.float(),
        sum_columns=1024, fp32_sum=True,
    )  # fmt: skip
    op = getattr(torch.ops.vllm_fusion_plugin, f"rms_norm_{kind}_fp8_quant").default
    got = op(*norm, *rest, "custom_op")
    reference = getattr(ops, f"rms_norm_{kind}_fp8_quant_reference")
    want = reference(norm, GroupScales(*rest) if kind == "group" else rest[0])
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert_same_bytes(a, b, "output")
    torch.library.opcheck(op, (*norm, *rest, "custom_op"))


@pytest.mark.parametrize("width", [256, 4096])
@pytest.mark.parametrize("kind", ["group", "token", "static"])
def test_three_addends_are_stored_before_native_quantisers(kind: str, width: int, device: torch.device) -> None:
    """Inductor rounds what takes more than four tensors and is used twice; but a token's scale is that of y unrounded."""
    x, residual, more = (integers(seed, width, device) for seed in range(3))
    norm = NormInputs(x, random(9, width, device)[0], EPSILON, residual, residual_addend=more, keep_sum=False)
    rest = {"group": (GROUP, "row", False), "token": (None,), "static": (torch.full((1,), 0.01, device=device),)}[kind]
    op = getattr(torch.ops.vllm_fusion_plugin, f"rms_norm_{kind}_fp8_quant").default
    reference = getattr(ops, f"rms_norm_{kind}_fp8_quant_reference")
    given = GroupScales(*rest) if kind == "group" else rest[0]
    got, want = op(*norm, *rest, "native"), reference(norm, given, quant_rounding="native")
    if device.type == "cpu":
        assert_same_outputs(got, want, kind)
    assert norm.stored and not norm._replace(weight=None).stored and not norm._replace(residual_addend=None).stored

    # the same sum, of two tensors: nothing is rounded
    exact = norm._replace(residual=(residual + more).float(), residual_addend=None)
    apart = op(*exact, *rest, "native")
    assert (kind == "static") == torch.equal(got[0].view(torch.uint8), apart[0].view(torch.uint8))
    if kind == "token":
        assert_same_bytes(got[1], apart[1], "scales")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_addend": "x", "norm_rounding": "eager"}, "x_addend is given with norm_rounding='eager'"),
        (
            {"residual": "x", "residual_addend": "x", "norm_rounding": "custom_op"},
            "residual_addend is given with norm_rounding=",
        ),
        ({"residual_addend": "x"}, "residual_addend is given without a residual"),
        ({"x_addend_scale": 2.5}, "x_addend_scale=2.5 without x_addend"),
        ({"sum_columns": 512}, "sum_columns=512; allowed: 0, 1024, 2048"),
        (
            {"fp32_sum": True, "residual": "x", "norm_rounding": "custom_op"},
            "fp32_sum=True with norm_rounding='custom_op'",
        ),
        ({"fp32_sum": True}, "fp32_sum=True without a sum to return"),
        ({"fp32_sum": True, "residual": "x", "keep_sum": False}, "fp32_sum=True without a sum to return"),
        (
            {"residual": "fp32", "norm_rounding": "eager"},
            "residual has dtype torch.float32; allowed: x's dtype, torch.bfloat16$",
        ),
        ({"x_addend": "fp32"}, "x_addend has dtype torch.float32; allowed: x's dtype, torch.bfloat16$"),
        ({"residual": "half"}, "residual has dtype torch.float16; allowed: x's dtype, torch.bfloat16, or fp32"),
        ({"x_addend": "wide"}, r"x_addend has shape \(3, 512\); allowed: x's shape"),
        ({"x_addend": "half"}, "x_addend has dtype torch.float16; allowed: x's dtype"),
    ],
    ids=str,
)
def test_bad_addends_are_refused(arguments: dict, message: str, device: torch.device) -> None:
    tensors = {
        "x": random(0, 256, device),
        "wide": random(0, 512, device),
        "half": random(0, 256, device, torch.float16),
        "fp32": random(0, 256, device, torch.float32),
    }
    given = {name: tensors.get(value, value) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        ops.rms_norm_group_fp8_quant(NormInputs(tensors["x"], random(9, 256, device)[0], **given))


# ---- Inductor's bytes ------------------------------------------------------------------------------------------------


@torch.library.custom_op("vfp_tests::feed_forward", mutates_args=())
def feed_forward(y: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """What lies between a layer's norms: Inductor cannot look into it, and what goes in and comes out is stored."""
    return result.clone()


@feed_forward.register_fake
def _(y: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(result)


def two_norms(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, x2: torch.Tensor, expert: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """vLLM's native code of the norms of a layer and of the one after it, with the addition of experts between."""

    def norm(total: torch.Tensor) -> torch.Tensor:
        y = total * torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + EPSILON)
        return (y.to(weight.dtype) * weight).to(x.dtype)

    total = x.float() + residual.float()
    y, residual = norm(total), total.to(x.dtype)
    x2 = feed_forward(y, x2)
    if expert is not None:
        x2 = x2 + expert * 2.5
    total = x2.float() + residual.float()
    return y, norm(total), total.to(x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [False, True], ids=["", "experts"])
@pytest.mark.parametrize("width", [2048, 4096, 7168])
def test_sums_are_inductors(width: int, experts: bool, device: torch.device) -> None:
    """Under Inductor's `deterministic`, which leaves it one order."""
    generator = torch.Generator(device=device).manual_seed(width)
    x, residual, x2, expert = (
        torch.randn(2048, width, generator=generator, device=device, dtype=torch.bfloat16) * size
        for size in (3, 6, 3, 1)
    )
    weight = 1 + 0.2 * torch.randn(width, generator=generator, device=device, dtype=torch.bfloat16)
    torch._dynamo.reset()
    for t in (x, residual, x2, expert):
        torch._dynamo.mark_dynamic(t, 0)
    with torch._inductor.config.patch(deterministic=True, force_disable_caches=True):
        expected = torch.compile(two_norms, fullgraph=True)(x, residual, weight, x2, expert if experts else None)
    added = {"x_addend": expert, "x_addend_scale": 2.5} if experts else {}
    options = {"keep_norm": True, "sum_columns": 2048}
    first = ops.rms_norm_group_fp8_quant(NormInputs(x, weight, EPSILON, residual=residual, keep_sum=False, **options))
    options |= {"sum_columns": 1024} if experts else {}  # four tensors to load, twice
    second = ops.rms_norm_group_fp8_quant(
        NormInputs(x2, weight, EPSILON, residual=x, residual_addend=residual, **added, **options)
    )
    for name, one, other in zip(("y", "y2"), (first[2], second[2]), expected[:2], strict=True):
        assert_inductors_rows(one, other, name)
    assert_same_bytes(second[3], expected[2], "sum")


def four_norms(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *more: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """As above, of norms one after the other in one graph."""
    normed = []
    for next_x in (*more, None):
        total = x.float() + residual.float()
        y = total * torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + EPSILON)
        normed.append((y.to(weight.dtype) * weight).to(weight.dtype))
        residual = total.to(weight.dtype)
        if next_x is not None:
            x = feed_forward(normed[-1], next_x)
    return *normed, residual


@pytest.mark.gpu
@pytest.mark.parametrize("width", [2048, 4096, 7168])
def test_sums_of_a_whole_model_are_inductors(width: int, device: torch.device) -> None:
    """Four and five tensors, never rounded: x, residual, and what comes between norms."""
    generator = torch.Generator(device=device).manual_seed(width)
    x, residual, *more = (
        torch.randn(2048, width, generator=generator, device=device, dtype=torch.bfloat16) * 3 for _ in range(5)
    )
    weight = 1 + 0.2 * torch.randn(width, generator=generator, device=device, dtype=torch.bfloat16)
    torch._dynamo.reset()
    for t in (x, residual, *more):
        torch._dynamo.mark_dynamic(t, 0)
    with torch._inductor.config.patch(deterministic=True, force_disable_caches=True):
        *expected, total = torch.compile(four_norms, fullgraph=True)(x, residual, weight, *more)
    for i, (one, want, sum_columns) in enumerate(zip((x, *more), expected, (2048, 2048, 1024, 2048), strict=True)):
        last = i == len(more)
        options = {"keep_norm": True, "sum_columns": sum_columns, "fp32_sum": not last}
        _, _, got, residual = ops.rms_norm_group_fp8_quant(
            NormInputs(one, weight, EPSILON, residual=residual, **options)
        )
        assert_inductors_rows(got, want, f"norm {i}")
    assert_same_bytes(residual, total, "sum")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [2048, 4096, 5120])
@pytest.mark.parametrize("kind", ["group", "token"])
def test_native_quantisers_of_sums_are_inductors(kind: str, width: int, device: torch.device) -> None:
    """The norm after an MLP, which adds up three tensors, and a quantiser that Inductor compiles with it: dynamic FP8."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    group = {"group_shape": GroupShape(1, GROUP), "use_ue8m0": False}
    quantise = native_quantiser(static=False, **(group if kind == "group" else {"group_shape": GroupShape.PER_TOKEN}))

    def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, x2: torch.Tensor) -> tuple:
        def quantised(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = total * torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + EPSILON)
            return quantise((y.to(weight.dtype) * weight).to(x.dtype))

        total = x.float() + residual.float()
        first, residual = quantised(total), total.to(x.dtype)
        x2 = feed_forward(first[0], x2)
        total = x2.float() + residual.float()
        return *first, *quantised(total), total.to(x.dtype)

    generator = torch.Generator(device=device).manual_seed(width)
    x, residual, x2 = (
        torch.randn(2048, width, generator=generator, device=device, dtype=torch.bfloat16) * size for size in (3, 6, 3)
    )
    weight = 1 + 0.2 * torch.randn(width, generator=generator, device=device, dtype=torch.bfloat16)
    torch._dynamo.reset()
    for t in (x, residual, x2):
        torch._dynamo.mark_dynamic(t, 0)
    with torch._inductor.config.patch(deterministic=True, force_disable_caches=True):
        expected = torch.compile(layer, fullgraph=True)(x, residual, weight, x2)
    norm = NormInputs(x2, weight, EPSILON, residual=x, residual_addend=residual, sum_columns=2048)
    op = getattr(ops, f"rms_norm_{kind}_fp8_quant")
    codes, scales, total = op(norm, quant_rounding="native")
    assert_inductors_scales(scales, expected[3].contiguous(), "scales")
    steps = code_steps(codes, expected[2])  # with y unrounded, 1 code in 60 differs
    assert int(steps.max()) <= 1
    assert int(steps.count_nonzero()) <= steps.numel() // 100_000
    assert_same_bytes(total, expected[4], "sum")
