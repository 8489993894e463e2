# SPDX-License-Identifier: Apache-2.0
"""Triton's experts run SiLU·mul and the group quantiser between their two GEMMs as one kernel.

What: `TritonExperts.apply` calls its method `activation` and, on what that has written, `moe_kernel_quantize_input`, a
global of its module. All three are wrapped. While `apply` runs, `activation` only keeps what it was called with, and the
quantiser then makes codes and scales from that in one call of `silu_mul_group_fp8_quant`.

Why: on Hopper they are two kernels by default, because vLLM's fused op, `silu_and_mul_per_block_quant`, knows no UE8M0
scales. No graph pass reaches them: experts run inside `vllm.moe_forward`, which is opaque to the compiler.

Since: in every version read (0.20.2, 0.26.0, 0.32.0, 0.33.0) `apply` calls the one right after the other. Until: vLLM's
fused op has UE8M0 scales.

Same bytes: codes and scales are those of `silu_and_mul` and `per_token_group_fp8_quant`, whose roundings roundings.py asks
for. Same memory: codes and scales are allocated, as by the quantiser; SiLU·mul's own buffer stays unwritten.

Each layer's case is decided when it first runs, and kept. With groups of 128 and without UE8M0, vLLM's fused op runs, and
nothing here does.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import textwrap
import threading
from typing import Any, NamedTuple

import torch

from .. import compat, report, roundings
from ..ops.quant import FP8_DTYPE, GROUP_SIZES, INPUT_DTYPES, GroupScales
from ..ops.silu_mul_quant import silu_mul_group_fp8_quant

logger = logging.getLogger("vllm.fusion_plugin")

NAME = "experts_silu_mul_quant"
"""In the place of a pass's name."""
QUANTISER = "moe_kernel_quantize_input"
VLLMS_OP = "silu_and_mul_per_block_quant"

_KEPT = "_fusion_plugin_silu_mul_quant"
_problem = ""
"""Why all experts are left to vLLM: the wrappers do not fit, or the op has failed."""
_running = threading.local()


class Case(NamedTuple):
    """What is decided of some experts."""

    known: tuple[Any, ...]
    """What it was decided for, of what may differ between calls."""
    reason: str
    """Why they are left to vLLM; "" if they are not."""
    scales: GroupScales = GroupScales()
    act_rounding: str = ""
    quant_rounding: str = ""

    @property
    def pattern(self) -> str:
        size, layout, ue8m0 = self.scales
        quantiser = f"group{size}[{self.quant_rounding},{layout}{',ue8m0' if ue8m0 else ''}]"
        return f"silu_mul[{self.act_rounding}]+{quantiser}"


class _Apply:
    """One run of `TritonExperts.apply`."""

    __slots__ = ("experts", "kept")

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.kept: tuple[Case, tuple[Any, torch.Tensor, torch.Tensor]] | None = None
        """What `activation` was called with and has not done."""


# ---- wrapping --------------------------------------------------------------------------------------------------------


def install() -> None:
    """Wrap vLLM's methods. Each engine's record says whether its experts are fused (`experts_left`). Re-entrant.

    Does nothing before the process has imported vLLM's Triton experts, as `install` of layers/mla_v_up_quant.py."""
    module = compat.triton_experts_module()
    if module is None:
        return
    try:
        reason = _install(module)
    except Exception as e:  # must never stop vLLM
        reason = f"{type(e).__name__}: {e}"
    if reason:
        _leave_all(reason)


def _leave_all(reason: str) -> None:
    global _problem
    if reason != _problem:
        logger.warning("vllm-fusion-plugin: experts' SiLU·mul and quantiser are left to vLLM: %s", reason)
    _problem = reason


def _install(module: Any) -> str:
    """Wrap, once; the reason if vLLM's methods are not what they are known to be."""
    experts, quantise = module.TritonExperts, getattr(module, QUANTISER, None)
    apply, activation = experts.apply, experts.activation
    if hasattr(apply, "_fusion_plugin"):
        return ""
    if quantise is None:
        return f"this vLLM's {module.__name__} has no {QUANTISER}"
    for function, known in (
        (activation, ["self", "activation", "output", "input"]),
        (quantise, ["A", "A_scale", "quant_dtype", "per_act_token_quant", "block_shape"]),
    ):
        signature = inspect.signature(function)
        if list(signature.parameters)[: len(known)] != known:
            return f"this vLLM has {function.__qualname__}{signature}; known: ({', '.join(known)}, ...)"
    if reason := why_apply_is_unknown(textwrap.dedent(inspect.getsource(apply))):
        return reason

    @functools.wraps(apply)
    def apply_fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _problem or torch.compiler.is_compiling():
            return apply(self, *args, **kwargs)
        outer, _running.apply = getattr(_running, "apply", None), _Apply(self)
        try:
            return apply(self, *args, **kwargs)
        finally:
            _running.apply = outer

    @functools.wraps(activation)
    def activation_later(self: Any, *args: Any, **kwargs: Any) -> Any:
        running = getattr(_running, "apply", None)
        if running is not None and running.experts is self and len(args) == 3 and not kwargs:
            try:
                case = _case(self, *args)
            except Exception as e:  # another vLLM's experts, which must still serve
                _leave_all(f"{type(e).__name__}: {e}")
                return activation(self, *args)
            if not case.reason:
                running.kept = case, args
                return None
        return activation(self, *args, **kwargs)

    @functools.wraps(quantise)
    def quantise_with_activation(*args: Any, **kwargs: Any) -> Any:
        running = getattr(_running, "apply", None)
        if running is None or running.kept is None:
            return quantise(*args, **kwargs)
        (case, called_with), running.kept = running.kept, None
        _, output, x = called_with
        if args and args[0] is output:
            try:
                return silu_mul_group_fp8_quant(
                    x, case.scales, act_rounding=case.act_rounding, quant_rounding=case.quant_rounding
                )
            except Exception as e:  # a Triton that cannot compile it, for example: vLLM's own way is still there
                _leave_all(f"{type(e).__name__}: {e}")
        activation(running.experts, *called_with)
        return quantise(*args, **kwargs)

    for wrapper in (apply_fused, activation_later, quantise_with_activation):
        wrapper._fusion_plugin = True  # type: ignore[attr-defined]
    experts.apply, experts.activation = apply_fused, activation_later
    setattr(module, QUANTISER, quantise_with_activation)
    return ""


def why_apply_is_unknown(source: str) -> str:
    """Why the source of a method `apply` is not one in which `self.activation(_, y, _)` is followed by the quantiser of y,
    and nothing else but LoRA reads y; "" if it is."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    count = sum(ast.unparse(call.func) == "self.activation" for call in calls)
    if count != 1:
        return f"this vLLM's TritonExperts.apply calls self.activation {count} times, not once"
    for block in _blocks(tree):
        for at, statement in enumerate(block):
            call = statement.value if isinstance(statement, ast.Expr) else None
            if not isinstance(call, ast.Call) or ast.unparse(call.func) != "self.activation" or len(call.args) != 3:
                continue
            rest = (s for s in block[at + 1 :] if not _assigns_a_constant(s))
            follower = getattr(next(rest, None), "value", None)
            written = ast.unparse(call.args[1])
            if not isinstance(follower, ast.Call) or ast.unparse(follower.func) != QUANTISER or not follower.args:
                return f"in this vLLM's TritonExperts.apply, {QUANTISER} does not follow self.activation"
            lora = [node for c in calls if ast.unparse(c.func) == "self.apply_w2_lora" for node in ast.walk(c)]
            reads = [
                n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id == written
            ]
            if ast.unparse(follower.args[0]) != written or len([n for n in reads if n not in lora]) != 2:
                return f"in this vLLM's TritonExperts.apply, more than {QUANTISER} reads what self.activation writes"
            return ""
    return "this vLLM's TritonExperts.apply does not call self.activation with three arguments"


def _blocks(tree: ast.AST) -> list[list[ast.stmt]]:
    fields = (getattr(node, name, None) for node in ast.walk(tree) for name in ("body", "orelse", "finalbody"))
    return [block for block in fields if isinstance(block, list)]


def _assigns_a_constant(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(statement.value, ast.Constant)


# ---- deciding --------------------------------------------------------------------------------------------------------


def _case(experts: Any, activation: Any, output: torch.Tensor, x: torch.Tensor) -> Case:
    """What is done with experts that are called so; decided again only if they are called in another way."""
    known = (activation, x.dtype, x.shape[-1], output.dtype, experts._lora_context is None)
    kept: Case | None = vars(experts).get(_KEPT)
    if kept is None or kept.known != known:
        kept = vars(experts)[_KEPT] = _decide(experts, known, activation, output, x)
    return kept


def _decide(experts: Any, known: tuple[Any, ...], activation: Any, output: torch.Tensor, x: torch.Tensor) -> Case:
    record = report.RECORDER.engine_where(compat.is_running)
    reason = (record.experts_left if record is not None else "") or why_not(experts, activation, output, x)
    if reason:
        return Case(known, reason)
    return Case(
        known,
        "",
        GroupScales(experts.block_shape[1], "row", compat.group_quantiser_uses_ue8m0()),
        roundings.of(roundings.SILU_MUL).name,
        roundings.of(roundings.GROUP_QUANT).name,
    )


def why_not(experts: Any, activation: Any, output: torch.Tensor, x: torch.Tensor) -> str:
    """Why experts called so are left to vLLM; "" if they are not."""
    kind = type(experts).__name__
    if not hasattr(type(experts).activation, "_fusion_plugin"):
        return f"{kind} has an activation of its own"
    if activation.value != "silu":
        return f"the activation is {activation.value}; fused is silu"
    if changed := compat.swiglu_parameters(experts):
        return f"clamped SwiGLU ({', '.join(f'{word} {value}' for word, value in changed.items())}); fused is plain SiLU·mul"
    if experts._lora_context is not None:
        return "LoRA reads what SiLU·mul writes, unquantised"
    if experts.quant_dtype != FP8_DTYPE or not experts.quant_config.use_fp8_w8a8:
        return f"{kind} quantises to {experts.quant_dtype}; fused are FP8 weights with {FP8_DTYPE} rows"
    if getattr(experts, "quantization_emulation", False):
        return "quantisation is emulated"
    if experts.block_shape is None:
        scales = "one scale a token" if experts.per_act_token_quant else "one scale a tensor"
        return f"the quantiser has {scales}; fused are groups of {' or '.join(map(str, GROUP_SIZES))}"
    group_size, width = experts.block_shape[1], x.shape[-1] // 2
    if group_size not in GROUP_SIZES or width % group_size:
        return f"groups of {group_size} in rows of {width}; fused are groups of {GROUP_SIZES} that divide a row"
    if x.dtype not in INPUT_DTYPES or output.dtype != x.dtype:
        return f"SiLU·mul reads {x.dtype} and writes {output.dtype}; fused for {', '.join(map(str, INPUT_DTYPES))}"
    return ""


# ---- reporting -------------------------------------------------------------------------------------------------------


def boundaries(model: torch.nn.Module, record: report.EngineRecord) -> tuple[list[report.Found], list[report.Missed]]:
    """What became of SiLU·mul and quantiser in each layer of a model that has quantised experts."""
    found: list[report.Found] = []
    missed: list[report.Missed] = []
    for module, held in compat.experts_by_layer(model):
        ran = [experts for experts in held if _KEPT in getattr(experts, "__dict__", {})]
        for experts in ran or held[:1]:
            became = _became(experts, record)
            if isinstance(became, str):
                missed.append(report.Missed(pass_name=NAME, reason=became, module=module))
            else:
                found.append(became.model_copy(update={"module": module}))
    return found, missed


def _became(experts: Any, record: report.EngineRecord) -> report.Found | str:
    """What has been fused, or why nothing was."""
    module, kind = compat.triton_experts_module(), type(experts).__name__
    case: Case | None = vars(experts).get(_KEPT)
    if module is None or not isinstance(experts, module.TritonExperts):
        return f"experts run in {kind}, which this package does not reach; fused are those of TritonExperts"
    if case is not None and not case.reason and not _problem:
        return report.Found(pass_name=NAME, pattern=case.pattern)
    if _runs_vllms_op(experts):
        return report.Found(pass_name=report.MODEL_CODE, pattern=f"silu_mul+group[_C.{VLLMS_OP}]")
    return record.experts_left or _problem or (case.reason if case is not None else f"{kind} has not run yet")


def _runs_vllms_op(experts: Any) -> bool:
    """Whether `TritonExperts.apply` takes its branch with vLLM's fused op (since 0.26), which calls no `activation`."""
    return (
        VLLMS_OP in inspect.getsource(inspect.unwrap(type(experts).apply))
        and experts.block_shape == [128, 128]
        and experts.quant_config.use_fp8_w8a8
        and experts.moe_config.activation.value == "silu"
        and not compat.swiglu_parameters(experts)
        and experts._lora_context is None
        and not compat.group_quantiser_uses_ue8m0()
    )
