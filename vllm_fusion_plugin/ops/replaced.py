# SPDX-License-Identifier: Apache-2.0
"""vLLM's own ops in the place of what stands for them in plain torch: what verify mode compares with.

A reference here is made of a few functions that each stand for one op of vLLM, and that are marked `stands_for_an_op`.
Within `with vllms_ops():` such a function runs the op, if the platform has it, on the GPU, and if its rounding is the one
asked for.
Where vLLM's model has plain torch code, which Inductor compiles, there is no op to run, and plain torch it stays.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..kernels.fp8 import FORMATS, OCP
from ..kernels.rounding import AITER, of_rows

if TYPE_CHECKING:
    from .quant import GroupScales
    from .rms_norm_quant import NormInputs

Reference = TypeVar("Reference", bound=Callable[..., Any])
HALVES = (torch.bfloat16, torch.float16)

_ran: set[str] | None = None
"""Names of ops that have run; None where references are to run."""


def stands_for_an_op(reference: Reference) -> Reference:
    """Mark a function that OPS has an op of vLLM's for, which takes the same arguments."""

    @functools.wraps(reference)
    def run(*arguments: Any, **named: Any) -> Any:
        result = OPS[reference.__name__](*arguments, **named) if _ran is not None else None
        return reference(*arguments, **named) if result is None else result

    return run  # type: ignore[return-value]


@contextlib.contextmanager
def vllms_ops() -> Iterator[set[str]]:
    """Meanwhile, vLLM's ops run. What is yielded has the names of those that have."""
    global _ran
    before, _ran = _ran, set()
    try:
        yield _ran
    finally:
        _ran = before


def _op(name: str, x: torch.Tensor, what: str = "", rounding: str = "") -> Any:
    """The op of that name, which takes x; None if there is none, or if it, `what` in roundings.py, rounds otherwise. The
    caller will run it."""
    if not x.is_cuda or x.dtype not in HALVES:
        return None
    from .. import compat, roundings

    if what and roundings.of(what).name != rounding:
        return None
    compat.load_custom_ops()
    op = getattr(torch.ops.vllm if name.startswith("rocm_aiter") else torch.ops._C, name, None)
    if op is not None and _ran is not None:
        _ran.add(name)
    return op


# Each returns None where vLLM has no such op.


def silu_mul(x: torch.Tensor, act_rounding: str = "custom_op", *, rounded: bool = True) -> Any:
    if not rounded or (op := _op("silu_and_mul", x, "SiLU·mul", act_rounding)) is None:
        return None
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    op(y, x.contiguous())
    return y


def rms_norm(norm: NormInputs, *, rounded: bool = True) -> Any:
    if norm.norm_rounding != "custom_op" or norm.weight is None or not rounded:
        return None
    if norm.residual is None:
        if (op := _op("rms_norm", norm.x)) is None:
            return None
        y = torch.empty_like(norm.x, memory_format=torch.contiguous_format)
        op(y, norm.x.contiguous(), norm.weight, norm.epsilon)
        return y, None
    if (op := _op("fused_add_rms_norm", norm.x)) is None:
        return None
    # it writes to both
    y, total = (t.clone(memory_format=torch.contiguous_format) for t in (norm.x, norm.residual))
    op(y, total, norm.weight, norm.epsilon)
    return y, total


def group_quant(y: torch.Tensor, how: GroupScales, quant_rounding: str, fp8: str = OCP) -> Any:
    rounding, use_ue8m0 = of_rows(len(y), quant_rounding, how.ue8m0)
    if how.layout == "packed":
        return None
    if rounding == AITER:
        op = _op("rocm_aiter_group_fp8_quant", y) if how.layout == "row" else None
        return op(y.contiguous(), how.group_size) if op is not None else None
    if (op := _op("per_token_group_fp8_quant", y, "group quantiser", rounding)) is None:
        return None
    from .quant import EPS, zero_scale_padding

    codes, scales, most = _codes(y, fp8), how.empty(y, *y.shape), FORMATS[fp8].max
    layout = how.layout != "row", how.layout == "tma"
    op(y.contiguous(), codes, scales, how.group_size, EPS, -most, most, use_ue8m0, *layout)
    zero_scale_padding(scales)
    return codes, scales


def token_quant(
    y: torch.Tensor,
    scale_ub: torch.Tensor | None,
    quant_rounding: str,
    fp8: str = OCP,
    *,
    codes_of: torch.Tensor | None = None,
) -> Any:
    if codes_of is not None and codes_of is not y:
        return None
    if (op := _op("dynamic_per_token_scaled_fp8_quant", y, "token quantiser", quant_rounding)) is None:
        return None
    codes, scales = _codes(y, fp8), y.new_empty((len(y), 1), dtype=torch.float32)
    op(codes, y.contiguous(), scales, scale_ub)
    return codes, scales


def static_quant(y: torch.Tensor, scale: torch.Tensor, quant_rounding: str, fp8: str = OCP) -> Any:
    if (op := _op("static_scaled_fp8_quant", y, "static quantiser", quant_rounding)) is None:
        return None
    from .. import compat

    codes = _codes(y, fp8)
    op(codes, y.contiguous(), scale, **compat.static_quant_extra_arguments())
    return codes


def _codes(y: torch.Tensor, fp8: str) -> torch.Tensor:
    return torch.empty_like(y, dtype=FORMATS[fp8].dtype, memory_format=torch.contiguous_format)


OPS: dict[str, Callable[..., Any]] = {
    "silu_mul_reference": silu_mul,
    "rms_norm_reference": rms_norm,
    "group_fp8_quant_reference": group_quant,
    "token_fp8_quant_reference": token_quant,
    "static_fp8_quant_reference": static_quant,
}
"""By the name of the reference."""
