# SPDX-License-Identifier: Apache-2.0
"""Every op on arguments of which some are wrong: a ValueError that names one of them, or what the op promises, and the same
whoever is asked: the op, its fake and its reference. Arguments are those of the schemas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import event, given
from hypothesis import strategies as st

from tests.fuzz_profiles import examples
from vllm_fusion_plugin.kernels.fp8 import FORMATS, OCP
from vllm_fusion_plugin.ops import gated_rms_norm_quant, registry, rms_norm_quant, silu_mul_quant
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, GROUP_ROUNDINGS, GROUP_SIZES, INPUT_DTYPES, LAYOUTS, GroupScales
from vllm_fusion_plugin.plugin import _register_ops as register_ops

register_ops()
OPS = sorted(registry.CPU_IMPLEMENTATIONS)

ROWS = 4
OF_GEMM = {
    "scales": GroupScales(128, "tma").empty(torch.empty(0), ROWS, 256).zero_(),
    "weight": torch.zeros(64, 256, dtype=FP8_DTYPE),
    "weight_scales": torch.zeros(1, 2),
    "flashinfer_rows": 32,
}


def right(name: str, op: str) -> Any:
    """A value of an argument that is right, if those of the others are."""
    if op == "block_fp8_gemm" and name in OF_GEMM:
        return OF_GEMM[name]
    shapes = {
        "x": (ROWS * 2, 128) if op.startswith("gated") else (ROWS, 256),
        "z": (ROWS * 2, 128),
        "gate": (ROWS, 256),
        "q": (ROWS, 256),
        "kv": (ROWS, 64),
        "weight": (128,) if op.startswith("gated") else (256,),
        "q_weight": (256,),
        "kv_weight": (64,),
        "residual": (ROWS, 256),
        "x_addend": (ROWS, 256),
        "residual_addend": (ROWS, 256),
        "attn_out": (ROWS, 2, 32),
        "w_uv": (2, 32, 128),
    }
    if name in shapes:
        return torch.ones(shapes[name], dtype=torch.bfloat16)
    if name in ("scale", "global_scale", "scale_ub"):
        return torch.ones(1)
    return {
        "codes": torch.zeros(ROWS, 256, dtype=FP8_DTYPE),
        "scales": torch.zeros(ROWS, 2),
        "epsilon": 1e-6,
        "num_heads": 2,
        "group_size": 128,
        "norm_rounding": "native",
        "quant_rounding": "custom_op",
        "act_rounding": "custom_op",
        "activation": "silu",
        "scale_layout": "row",
        "fp8": OCP,
        "x_addend_scale": 1.0,
        "keep_sum": True,
        "sum_columns": 0,
    }.get(name, False)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any rank up to 4, small, of many dtypes, some strided, some on another device."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 32, 64, 96, 128, 256]), max_size=4))
    while torch.Size(shape).numel() > 1 << 16:
        shape.pop()
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, FP8_DTYPE]))
    t = torch.zeros(shape, dtype=dtype)
    how = draw(st.sampled_from(["dense", "dense", "dense", "transposed", "strided", "expanded", "elsewhere"]))
    if how == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "strided" and t.dim():
        return t.repeat_interleave(2, dim=-1)[..., ::2]
    if how == "expanded" and t.dim() > 1:
        return t[:1].expand(shape) if shape[0] else t
    return t.to("meta") if how == "elsewhere" else t


INTEGERS = st.sampled_from([-128, -1, 0, 1, 2, 3, 32, 64, 96, 128, 256, 1024, 2**40])
FLOATS = st.sampled_from([0.0, 1.0, -1.0, 1e-6, float("inf"), float("nan")])
NAMES = st.sampled_from(
    [*GROUP_ROUNDINGS, *LAYOUTS, *FORMATS, "packed", "eager", "silu", "sigmoid", "", "NATIVE", "gelu"]
)


def anything(name: str, argument: Any, value: Any) -> st.SearchStrategy:
    """A value of the type that the schema gives an argument."""
    kind = str(argument.type)
    if "Tensor" in kind:
        like = value if isinstance(value, torch.Tensor) else torch.zeros(1)
        near = st.sampled_from([like, like.half(), like.float(), like[:1], like[..., :-1], like[..., ::2], like[None]])
        if name not in ("codes", "scales"):  # written to, which torch does not do to rows that are one
            near |= st.just(like[:1].expand_as(like))
        optional = [st.none()] if "Optional" in kind else []
        return st.one_of(tensors(), near, *optional)
    return {"bool": st.booleans(), "int": INTEGERS, "float": FLOATS, "str": NAMES}[kind]


def tried(call: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, Any]:
    """What came of it, and what it returned or said. No other error than ValueError is let pass."""
    try:
        return "returned", call(*arguments.values())
    except ValueError as e:
        return "refused", str(e)


def description(results: Any) -> list[tuple[Any, ...]]:
    if results is None:
        return []
    listed = [results] if isinstance(results, torch.Tensor) else results
    return [
        (t.dtype, tuple(t.shape), tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)) for t in listed
    ]


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@examples(250)
def test_wrong_arguments_are_refused_by_name(op: str, data: st.DataObject) -> None:
    function, reference = getattr(torch.ops.vllm_fusion_plugin, op).default, registry.CPU_IMPLEMENTATIONS[op]
    parameters = {argument.name: argument for argument in function._schema.arguments}
    optional = {name for name, argument in parameters.items() if "Optional" in str(argument.type) and name != "weight"}
    arguments = {name: None if name in optional else right(name, op) for name in parameters}
    changed = data.draw(st.lists(st.sampled_from(list(parameters)), min_size=1, max_size=3, unique=True))
    for name in changed:
        arguments[name] = data.draw(anything(name, parameters[name], right(name, op)), label=name)

    outcome, result = tried(reference, arguments)
    event(outcome)
    assert outcome == "refused" or not certainly_wrong(arguments)
    assert tried(function, arguments)[0] == outcome, result
    given_tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    if any(t.is_meta for t in given_tensors):
        assert outcome == "refused" or all(t.is_meta for t in given_tensors)
        return
    fake_outcome, fake = tried(function, elsewhere(arguments))
    if outcome == "refused":
        assert (fake_outcome, fake.replace("meta", "cpu")) == (outcome, result)
        assert any(name in result for name in parameters) or "output width" in result
    else:
        assert fake_outcome == outcome, fake
        assert description(fake) == description(result)


ALLOWED = {
    "act_rounding": silu_mul_quant.ACT_ROUNDINGS,
    "norm_rounding": rms_norm_quant.NORM_ROUNDINGS,
    "quant_rounding": GROUP_ROUNDINGS,
    "activation": gated_rms_norm_quant.ACTIVATIONS,
    "group_size": GROUP_SIZES,
    "scale_layout": (*LAYOUTS, "packed"),
    "sum_columns": rms_norm_quant.SUM_COLUMNS,
    "fp8": tuple(FORMATS),
}
INPUTS = ("x", "z", "q", "kv", "attn_out", "w_uv")


def certainly_wrong(arguments: dict[str, Any]) -> list[str]:
    """Arguments that no op takes, whatever the others are."""
    wrong = [name for name, value in arguments.items() if name in ALLOWED and value not in ALLOWED[name]]
    wrong += [name for name in INPUTS if name in arguments and arguments[name].dtype not in INPUT_DTYPES]
    for name in ("scale", "global_scale", "scale_ub"):
        if isinstance(scale := arguments.get(name), torch.Tensor) and (
            scale.numel() != 1 or scale.dtype != torch.float32
        ):
            wrong.append(name)
    return wrong


def elsewhere(arguments: dict[str, Any]) -> dict[str, Any]:
    """Tensors on the meta device, laid out as they were: `to` would make some contiguous."""
    return {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        if isinstance(t, torch.Tensor)
        else t
        for name, t in arguments.items()
    }
