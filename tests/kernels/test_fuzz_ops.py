# SPDX-License-Identifier: Apache-2.0
"""Every op on random shapes, strides, dtypes, layouts, forms and values against its reference, byte for byte.

What is compared, and with which arithmetic, is each op's own test's: these draw what those list.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import assume, given
from hypothesis import strategies as st

from tests.fuzz_profiles import examples
from vllm_fusion_plugin.kernels.rounding import OPAQUE, is_native
from vllm_fusion_plugin.ops import rms_norm_quant
from vllm_fusion_plugin.ops.nvfp4 import BLOCK
from vllm_fusion_plugin.ops.rms_norm_quant import SUM_COLUMNS

from . import norm_checks as norms
from . import test_gated_rms_norm_quant as gated
from . import test_group_quant as group
from . import test_mla_dual_rms_norm_quant as dual
from . import test_mla_v_up_quant as v_up
from . import test_nvfp4 as nvfp4
from . import test_silu_mul_quant as silu
from .cases import (
    DTYPES,
    GROUP_ROUNDINGS,
    GROUP_SIZES,
    LAYOUTS,
    ROUNDINGS,
    GroupMode,
    StaticMode,
    TokenMode,
    random_input,
)
from .checks import assert_codes, assert_same_bytes, one_nan
from .test_mla_v_up_quant import _bf16_dot  # noqa: F401  (a fixture for all tests here)

ROWS = st.one_of(st.integers(0, 9), st.integers(0, 40))
SEEDS = st.integers(0, 1000)
KINDS = st.sampled_from(["normal", "bits", "special"])
SCALES = st.sampled_from([1.0, 0.0123, 3e-5, 700.0, 1e-38])
ACT_ROUNDINGS = st.sampled_from(["custom_op", "eager", "native"])
SCALE_LAYOUTS = st.sampled_from(LAYOUTS)
# these go together
PACKED_OR_NOT = st.sampled_from(
    [{}, {}, {}, {"group_size": 128, "scale_layout": "packed", "use_ue8m0": True, "quant_rounding": "custom_op"}]
)
SPREADS = st.tuples(st.integers(0, 9), st.integers(0, 17))


def spread(t: torch.Tensor, how: tuple[int, int]) -> torch.Tensor:
    """t's rows in storage of NaN, from number `how[0]` on, `how[1]` numbers apart: strided and unaligned."""
    offset, gap = how
    rows, width = t.shape
    storage = t.new_full((offset + rows * (width + gap),), float("nan"))
    return storage[offset:].view(rows, width + gap)[:, :width].copy_(t)


def quantisers(dtype: torch.dtype, roundings: tuple[str, ...] = GROUP_ROUNDINGS) -> st.SearchStrategy[str]:
    """Their roundings. FlashInfer's takes bf16 alone."""
    return st.sampled_from([name for name in roundings if name != "flashinfer" or dtype == torch.bfloat16])


# ---- SiLU·mul and the lone quantiser ---------------------------------------------------------------------------------


@st.composite
def group_modes(draw: st.DrawFn) -> GroupMode:
    return GroupMode(
        dtype := draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(GROUP_SIZES)),
        draw(SCALE_LAYOUTS),
        draw(st.booleans()),
        draw(ACT_ROUNDINGS),
        draw(quantisers(dtype)),
    )._replace(**draw(PACKED_OR_NOT))


@given(mode=group_modes(), rows=ROWS, groups=st.integers(1, 9), how=SPREADS, kind=KINDS, seed=SEEDS, keep=st.booleans())
@examples(30)
def test_silu_mul_group(mode, rows, groups, how, kind, seed, keep, device: torch.device) -> None:
    x = random_input(rows, groups * mode.group_size, mode.dtype, device, seed, kind)
    silu.check_group(spread(x, how), mode, keep and silu.rounded_act(mode))


@given(
    dtype=st.sampled_from(DTYPES),
    act_rounding=ACT_ROUNDINGS,
    quant_rounding=st.sampled_from(ROUNDINGS),
    rows=ROWS,
    width=st.one_of(st.integers(1, 700), st.sampled_from([1100, 4100])),
    how=SPREADS,
    kind=KINDS,
    bound=st.sampled_from([None, 0.5, 1e-9, 1e9]),
    seed=SEEDS,
    keep=st.booleans(),
)
@examples(20)
def test_silu_mul_token(dtype, act_rounding, quant_rounding, rows, width, how, kind, bound, seed, keep, device) -> None:
    x = random_input(rows, width, dtype, device, seed, kind)
    upper = None if bound is None else torch.tensor([bound], device=device)
    mode = TokenMode(dtype, act_rounding, quant_rounding)
    silu.check_token(spread(x, how), upper, mode, keep_act=keep and silu.rounded_act(mode))


@given(
    dtype=st.sampled_from(DTYPES),
    act_rounding=ACT_ROUNDINGS,
    quant_rounding=st.sampled_from(ROUNDINGS),
    rows=ROWS,
    width=st.integers(1, 700),
    how=SPREADS,
    kind=KINDS,
    scale=SCALES,
    seed=SEEDS,
)
@examples(30)
def test_silu_mul_static(dtype, act_rounding, quant_rounding, rows, width, how, kind, scale, seed, device) -> None:
    x = random_input(rows, width, dtype, device, seed, kind)
    silu.check_static(
        spread(x, how), torch.tensor([scale], device=device), StaticMode(dtype, act_rounding, quant_rounding)
    )


@given(
    dtype=st.sampled_from(DTYPES),
    act_rounding=ACT_ROUNDINGS,
    rows=st.integers(1, 9),
    blocks=st.integers(1, 20),
    how=SPREADS,
    kind=KINDS,
    scale=st.sampled_from([1.0, 37.5, 0.011, 2048.0]),
    seed=SEEDS,
)
@examples(10)
def test_silu_mul_nvfp4(dtype, act_rounding, rows, blocks, how, kind, scale, seed, device) -> None:
    x = random_input(rows, blocks * BLOCK, dtype, device, seed, kind)
    nvfp4.check(spread(x, how), scale, act_rounding)


@given(mode=group_modes(), rows=ROWS, groups=st.integers(1, 9), how=SPREADS, kind=KINDS, seed=SEEDS)
@examples(40)
def test_group_quant(mode, rows, groups, how, kind, seed, device: torch.device) -> None:
    x = random_input(rows, groups * mode.group_size // 2, mode.dtype, device, seed, kind)
    group.check(spread(x, how), group.Mode(*mode[:4], mode.quant_rounding))


# ---- norms -----------------------------------------------------------------------------------------------------------


@st.composite
def norm_modes(draw: st.DrawFn, quant_roundings: tuple[str, ...], residual: bool | None = None) -> norms.Norm:
    rounding = draw(st.sampled_from(["native", "eager", "custom_op"]))
    weights = ["same", "none"] if rounding == "custom_op" else ["same", "other", "fp32", "gemma", "none"]
    return norms.Norm(
        dtype := draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(weights)),
        draw(st.booleans()) if residual is None else residual,
        rounding,
        draw(quantisers(dtype, quant_roundings)),
    )


@st.composite
def norm_layouts(draw: st.DrawFn) -> norms.Layout:
    return norms.Layout(draw(st.sampled_from(GROUP_SIZES)), draw(SCALE_LAYOUTS), draw(st.booleans()))


def norm_inputs(mode: norms.Norm, rows: int, width: int, hows, kind: str, seed: int, device: torch.device):
    """x, residual and weight; kind "exact": squares whose sums are exact."""
    if kind == "exact":
        x, residual = norms.exact_input(rows, width, mode, device, seed)
    elif kind == "bits":
        # the mean of squares of any bits is mostly infinite or NaN: for one row in two, numbers of a size
        both = random_input(rows, width, mode.dtype, device, seed, kind)
        both[::2] = random_input(rows, width, mode.dtype, device, seed)[::2]
        x, residual = both[:, :width].contiguous(), both[:, width:].contiguous() if mode.residual else None
    else:
        x, residual = norms.inputs(rows, width, mode, device, seed, kind)
    weight = mode.make_weight(width, device, seed)
    return spread(x, hows[0]), None if residual is None else spread(residual, hows[1]), weight


NORM_KINDS = st.sampled_from(["normal", "special", "bits"])
EPSILONS = st.sampled_from([1e-6, 1e-5, 0.0, 0.5])
HOWS = st.tuples(SPREADS, SPREADS)


@given(
    mode=norm_modes(GROUP_ROUNDINGS),
    layout=norm_layouts(),
    rows=ROWS,
    groups=st.one_of(st.integers(1, 6), st.sampled_from([17, 33])),
    hows=HOWS,
    kind=NORM_KINDS,
    epsilon=EPSILONS,
    seed=SEEDS,
)
@examples(20)
def test_rms_norm_group(mode, layout, rows, groups, hows, kind, epsilon, seed, device) -> None:
    x, residual, weight = norm_inputs(mode, rows, groups * layout.group_size, hows, kind, seed, device)
    norms.check_group(x, residual, weight, mode, layout, epsilon=epsilon)


WIDTHS = st.one_of(st.integers(1, 300), st.sampled_from([1023, 1536, 2049, 4100]))


@given(
    mode=norm_modes(ROUNDINGS),
    rows=ROWS,
    width=WIDTHS,
    bound=st.sampled_from([None, 0.5, 1e-9, 1e9]),
    hows=HOWS,
    kind=NORM_KINDS,
    epsilon=EPSILONS,
    seed=SEEDS,
)
@examples(20)
def test_rms_norm_token(mode, rows, width, bound, hows, kind, epsilon, seed, device) -> None:
    x, residual, weight = norm_inputs(mode, rows, width, hows, kind, seed, device)
    upper = None if bound is None else torch.tensor([bound], device=device)
    norms.check_token(x, residual, weight, mode, upper, epsilon=epsilon)


@given(mode=norm_modes(ROUNDINGS), rows=ROWS, width=WIDTHS, scale=SCALES, hows=HOWS, kind=NORM_KINDS, seed=SEEDS)
@examples(20)
def test_rms_norm_static(mode, rows, width, scale, hows, kind, seed, device) -> None:
    x, residual, weight = norm_inputs(mode, rows, width, hows, kind, seed, device)
    norms.check_static(x, residual, weight, mode, torch.tensor([scale], device=device))


@st.composite
def addends(draw: st.DrawFn, mode: norms.Norm) -> tuple:
    """x_addend, x_addend_scale, residual_addend, keep_sum, sum_columns, fp32_sum; "same" or "fp32" for a tensor's dtype."""
    if mode.norm_rounding != "native":
        return None, 1.0, None, draw(st.booleans()), draw(st.sampled_from(SUM_COLUMNS)), False
    x_addend = draw(st.sampled_from([None, "same"]))
    scale = 1.0 if x_addend is None else draw(st.sampled_from([1.0, 2.0, -1.5, 0.5]))
    keep_sum = draw(st.booleans())
    return (
        x_addend,
        scale,
        draw(st.sampled_from([None, "same", "fp32"])) if mode.residual else None,
        keep_sum,
        draw(st.sampled_from(SUM_COLUMNS)),
        mode.residual and keep_sum and draw(st.booleans()),
    )


@given(data=st.data(), kind=st.sampled_from(["group", "token", "static"]), rows=ROWS, hows=HOWS, seed=SEEDS)
@examples(30)
def test_rms_norm_ops_on_exact_sums(data, kind, rows, hows, seed, device) -> None:
    """The op as the GPU runs it against its whole reference, addends included. Integers, so that all sums are exact, and
    widths that are powers of two, so that their division is."""
    mode = data.draw(norm_modes(GROUP_ROUNDINGS if kind == "group" else ROUNDINGS))
    width = data.draw(st.sampled_from([128, 256, 512, 1024]))
    more = data.draw(addends(mode))
    generator = torch.Generator().manual_seed(seed)

    def integers(dtype: torch.dtype, how: tuple[int, int]) -> torch.Tensor:
        return spread(torch.randint(-8, 9, (rows, width), generator=generator).to(device, dtype), how)

    dtypes = {"same": mode.dtype, "fp32": torch.float32}
    x = integers(mode.dtype, hows[0])
    residual = integers(dtypes[data.draw(residual_dtypes(mode))], hows[1]) if mode.residual else None
    given_addends = [integers(dtypes[t], hows[1]) if isinstance(t, str) else t for t in more]
    keep_norm = not is_native(mode.quant_rounding) and data.draw(st.booleans())
    scale = torch.tensor([data.draw(SCALES)], device=device)
    rest = {
        "group": lambda: data.draw(norm_layouts()),
        "token": lambda: (data.draw(st.sampled_from([None, scale])),),
        "static": lambda: (scale,),
    }[kind]()
    norm = rms_norm_quant.NormInputs(
        x, mode.make_weight(width, device, seed), data.draw(EPSILONS), residual, mode.weight == "gemma", keep_norm,
        mode.norm_rounding, *given_addends,
    )  # fmt: skip
    got = getattr(rms_norm_quant, f"_{kind}_cuda")(*norm, *rest, mode.quant_rounding)
    want = getattr(rms_norm_quant, f"_{kind}_cpu")(*norm, *rest, mode.quant_rounding)
    assert_codes(got[0], want[0], mode.quant_rounding)
    for number, (one, other) in enumerate(zip(got[1:], want[1:], strict=True)):
        assert one.stride() == other.stride()
        assert_same_bytes(one_nan(one), one_nan(other), f"output {number + 1}")


def residual_dtypes(mode: norms.Norm) -> st.SearchStrategy[str]:
    return st.sampled_from(["same", "fp32"] if mode.norm_rounding == "native" else ["same"])


@st.composite
def gated_modes(draw: st.DrawFn) -> gated.Mode:
    return gated.Mode(
        dtype := draw(st.sampled_from(DTYPES)),
        draw(st.booleans()),
        draw(st.sampled_from(["silu", "sigmoid"])),
        draw(st.sampled_from(GROUP_SIZES)),
        draw(SCALE_LAYOUTS),
        draw(st.booleans()),
        draw(st.sampled_from(["native", "eager"])),
        draw(quantisers(dtype)),
    )._replace(**draw(PACKED_OR_NOT))


@given(
    mode=gated_modes(),
    rows=st.integers(0, 12),
    heads=st.integers(1, 5),
    times=st.sampled_from([1, 2, 3, 5]),
    layouts=st.tuples(*[st.sampled_from(["dense", "spread", "head-major"])] * 2),
    special=st.booleans(),
    seed=SEEDS,
)
@examples(20)
def test_gated_rms_norm_group(mode, rows, heads, times, layouts, special, seed, device) -> None:
    data = gated.exact_input(rows, heads, times * mode.group_size, mode, device, seed, special)
    x, z = (laid_out_heads(t, layout) for t, layout in zip(data[:2], layouts, strict=True))
    gated.check(data._replace(x=x, z=z), mode)


def laid_out_heads(t: torch.Tensor, layout: str) -> torch.Tensor:
    """[tokens, heads, D] as it is, with room between heads and tokens, or the heads' tokens together."""
    tokens, heads, size = t.shape
    if layout == "spread":
        return t.new_full((tokens, heads + 1, size + 3), float("nan"))[:, 1:, 1 : size + 1].copy_(t)
    if layout == "head-major":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    return t


# ---- latent attention ------------------------------------------------------------------------------------------------


@given(
    mode=norm_modes(GROUP_ROUNDINGS, residual=False),
    layout=norm_layouts(),
    rows=st.integers(0, 20),
    groups=st.sampled_from([1, 2, 4, 8]),
    kv_width=st.sampled_from([1, 2, 64, 256, 512, 1024]),
    seed=SEEDS,
)
@examples(15)
def test_mla_dual_rms_norm(mode, layout, rows, groups, kv_width, seed, device) -> None:
    assume(mode.weight not in ("gemma", "none"))
    dual.check(*dual.projection(rows, groups * layout.group_size, kv_width, mode, device, seed), mode, layout)


@given(
    mode=st.builds(
        lambda dtype, size, layout, ue8m0, rounding: v_up.Mode(dtype, size, layout, ue8m0, rounding),
        st.sampled_from(DTYPES),
        st.sampled_from(GROUP_SIZES),
        SCALE_LAYOUTS,
        st.booleans(),
        st.sampled_from(OPAQUE),
    ),
    tokens=st.integers(0, 33),
    heads=st.integers(1, 4),
    depth=st.sampled_from([16, 32, 48, 96, 256]),
    times=st.integers(1, 3),
    attn=st.sampled_from(v_up.ATTN_LAYOUTS),
    weights=st.sampled_from(v_up.WEIGHT_LAYOUTS),
    seed=SEEDS,
)
@examples(20)
def test_mla_v_up(mode, tokens, heads, depth, times, attn, weights, seed, device) -> None:
    x, w = v_up.exact_inputs(tokens, heads, depth, times * mode.group_size, mode.dtype, device, seed)
    v_up.check(v_up.laid_out_attn(x, attn if tokens else "token-major"), v_up.laid_out_weights(w, weights), mode)
