# SPDX-License-Identifier: Apache-2.0
"""MLPs that run outside of compiled graphs run SiLU·mul and the quantiser of their down projection as one kernel.

What: `_forward_method` of an MLP's activation, an object of vLLM's class SiluAndMul, is replaced on that object when the
model is loaded. It writes codes and scales, and the down projection takes them (quantised_input.py).

Why: no graph pass reaches shared experts, which run inside vLLM's MoE op, nor anything in a model that vLLM does not
compile. Compiled code sees nothing of this: MLPs inside of it are left alone, on the object.

Since: activation, linear layers and kernels have these parts in every version read (0.20.2, 0.26.0, 0.32.0, 0.33.0). Until:
vLLM's block kernels take its `QuantizedActivation`, which its MLPs then hand on themselves.

Same bytes: codes and scales are those of the two ops that run today, in whichever of their forms vLLM has chosen, and the
GEMM is the kernel's own. Kernels are launched on the current stream, as vLLM's, also on the one of shared experts.

Each MLP's case is decided when the model is loaded, and tried out then: what fails is left to vLLM, with the reason in the
report.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import logging
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .. import compat, report, roundings
from ..kernels.rounding import FLASHINFER, FLASHINFER_ROWS
from ..ops import verify
from ..ops.quant import INPUT_DTYPES
from ..ops.silu_mul_quant import silu_mul_group_fp8_quant
from . import quantised_input
from .quantised_input import Quantiser

logger = logging.getLogger("vllm.fusion_plugin")

NAME = "mlp_silu_mul_quant"
"""In the place of a pass's name."""
ACTIVATION, LINEAR = "SiluAndMul", "RowParallelLinear"
BY_VLLM = "maybe_fused_act_quant"
"""vLLM's function that calls an activation, or a fused kernel where the linear layer can be handed codes (since 0.33)."""

_problem = ""
"""Why all MLPs are left to vLLM: the op has failed."""


class Case(NamedTuple):
    """What is decided of an MLP."""

    reason: str
    """Why it is left to vLLM; "" if it is not."""
    known: tuple[torch.dtype, int] | None = None
    """Dtype and columns of what its activation reads, if it is not."""
    quantiser: Quantiser | None = None
    act_rounding: str = ""

    @property
    def pattern(self) -> str:
        return f"silu_mul[{self.act_rounding}]+{self.quantiser}"


class Mlp:
    """An MLP's activation and the layer that reads it; called in the activation's place."""

    def __init__(self, module: torch.nn.Module, activation: Any, reader: str) -> None:
        self.module = module
        self.reader = reader
        """The name that the module has for the linear layer."""
        self.linear: Any = module._modules[reader]
        self.by_vllm = activation._forward_method
        try:
            self.case = self.decide()
        except Exception as e:  # another vLLM's layers, which must still serve
            self.case = Case(f"{type(e).__name__}: {e}")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        case = self.case
        if case.reason or _problem or torch.compiler.is_compiling() or not self.is_as_decided(x):
            return self.by_vllm(x)
        try:
            return quantised_input.carry(*self.codes(case, x))
        except Exception as e:  # a Triton that cannot compile it, for example: vLLM's own way is still there
            _leave_all(f"{type(e).__name__}: {e}")
            return self.by_vllm(x)

    def is_as_decided(self, x: torch.Tensor) -> bool:
        same_rows = x.dim() == 2 and (x.dtype, x.shape[1]) == self.case.known
        return same_rows and self.module._modules.get(self.reader) is self.linear

    def codes(self, case: Case, x: torch.Tensor) -> list[torch.Tensor]:
        """Codes and scales."""
        assert case.quantiser is not None
        return silu_mul_group_fp8_quant(
            x, case.quantiser.scales, act_rounding=case.act_rounding, quant_rounding=case.quantiser.rounding
        )

    def decide(self) -> Case:
        if reason := why_not_linear(self.module, self.reader):
            return Case(reason)
        quantiser, act_rounding = quantised_input.quantiser_of(self.linear), self.act_rounding()
        if isinstance(quantiser, str):
            return Case(quantiser)
        if reason := why_not_rows(self.linear, quantiser):
            return Case(reason)
        if not act_rounding:
            return Case(f"{ACTIVATION} runs in a way that is not known")
        known = (self.linear.params_dtype, 2 * self.linear.input_size_per_partition)
        case = Case("", known, quantiser, act_rounding)
        self.try_out(case)
        quantised_input.open_to_codes(self.linear, quantiser)
        return case

    def act_rounding(self) -> str:
        """How the activation rounds that vLLM would run; "" if that is not known."""
        import torch._inductor.config as inductor

        how = compat.runs_as(self.by_vllm)
        if how == "compiled" and not inductor.emulate_precision_casts:
            return "native"
        return {"custom_op": roundings.of(roundings.SILU_MUL).name, "eager": "eager", "compiled": "eager"}.get(how, "")

    def try_out(self, case: Case) -> None:
        """Run the two kernels on one row, and on as many as another GEMM may multiply. Raises what they raise: once there
        are codes, nothing could bring the rows back. It also tells the warm-up what will be called, for an engine that
        compiles nothing need not run the model before it serves."""
        assert case.known is not None
        dtype, columns = case.known
        kernel, device = compat.linear_kernel(self.linear), self.linear.weight.device
        with torch.inference_mode(), verify.aside():
            for rows in (1, FLASHINFER_ROWS):
                x = torch.zeros(rows, columns, dtype=dtype, device=device)
                quantised_input.product(kernel, self.linear, *self.codes(case, x))


def _leave_all(reason: str) -> None:
    global _problem
    if reason != _problem:
        logger.warning("vllm-fusion-plugin: MLPs' SiLU·mul and quantiser are left to vLLM: %s", reason)
    _problem = reason


# ---- putting in place ------------------------------------------------------------------------------------------------


def attach(model: torch.nn.Module, config: Any) -> None:
    """Have the MLPs of a model that run outside of compiled code fuse. May be called again."""
    held_by = Counter(id(part) for module in model.modules() for part in module._modules.values())
    for _, module, activation in _activations(model, config):
        reader = reader_of(module, activation)
        held = module._modules[activation]
        if held_by[id(held)] > 1:
            continue
        if isinstance(reader, Reader) and not isinstance(held._forward_method, Mlp):  # type: ignore[union-attr]
            held._forward_method = Mlp(module, held, reader.name)  # type: ignore[union-attr, assignment]


def _activations(model: torch.nn.Module, config: Any) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Name and module of what may be an MLP with a quantised layer, and the name that it has for its activation."""
    for name, module in compat.eager_modules(model, config):
        named = [child for child, held in module.named_children() if type(held).__name__ == ACTIVATION]
        if len(named) == 1 and any(compat.is_quantised(_without_lora(child)) for child in module.children()):
            yield name, module, named[0]


def readers(model: torch.nn.Module, config: Any) -> set[int]:
    """Ids of the linear layers that `boundaries` tells of."""
    found = [(module, reader_of(module, activation)) for _, module, activation in _activations(model, config)]
    linears = [module._modules[reader.name] for module, reader in found if isinstance(reader, Reader)]
    return {id(_without_lora(linear)) for linear in linears if linear is not None}


def _without_lora(linear: torch.nn.Module) -> torch.nn.Module:
    return getattr(linear, "base_layer", linear)


# ---- reading model code ----------------------------------------------------------------------------------------------


class Reader(NamedTuple):
    """The one layer that reads what an activation returns."""

    name: str
    by_vllm: bool
    """Whether the activation is called by vLLM's function BY_VLLM."""


def reader_of(module: torch.nn.Module, activation: str) -> Reader | str:
    """Which layer of an MLP reads, alone, what its activation returns, or why that cannot be told, by its `forward`."""
    kind: Any = type(module)
    return _reader_of(kind, activation)


@functools.cache
def _reader_of(kind: Any, activation: str) -> Reader | str:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
    except (OSError, TypeError, AttributeError) as e:
        return f"{kind.__name__}.forward cannot be read: {e}"
    name = reader_in(source, activation)
    unknown = f"in {kind.__name__}.forward, more than a linear layer may read what {activation} returns"
    return Reader(name, f"{BY_VLLM}(" in source) if name else unknown


def reader_in(source: str, activation: str) -> str:
    """The X of `self.X(self.activation(...))`, or of `y = self.activation(...)` with `self.X(y)` in the next statement and
    nothing else that reads y, in the source of a method; "" if it has neither."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    acting = [call for call in calls if _acts(call, activation)]
    others = [n for n in ast.walk(tree) if ast.unparse(n) == f"self.{activation}" and isinstance(n, ast.Attribute)]
    if len(acting) != 1 or len(others) != 1:
        return ""
    (call,) = acting
    for outer in calls:
        if outer.args == [call] and not outer.keywords:
            return _layer(outer)
    for block in _blocks(tree):
        for statement, following in itertools.pairwise(block):
            if isinstance(statement, ast.Assign) and statement.value is call:
                return _read_alone(tree, statement, following)
    return ""


def _acts(call: ast.Call, activation: str) -> bool:
    named = ast.unparse(call.func)
    if named == BY_VLLM:
        return len(call.args) == 3 and ast.unparse(call.args[0]) == f"self.{activation}"
    return named == f"self.{activation}" and len(call.args) == 1 and not call.keywords


def _layer(call: ast.Call) -> str:
    """The X of `self.X(...)`; "" if a call is none."""
    named = call.func
    return named.attr if isinstance(named, ast.Attribute) and ast.unparse(named.value) == "self" else ""


def _read_alone(tree: ast.AST, written: ast.Assign, following: ast.stmt) -> str:
    if len(written.targets) != 1 or not isinstance(written.targets[0], ast.Name):
        return ""
    name = written.targets[0].id
    readers = [
        call
        for call in ast.walk(following)
        if isinstance(call, ast.Call) and [ast.unparse(argument) for argument in call.args] == [name]
    ]
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
    later = [node for node in names if isinstance(node.ctx, ast.Load) and node.lineno >= following.lineno]
    overwritten = any(isinstance(n.ctx, ast.Store) for n in ast.walk(following) if n in names)  # type: ignore[attr-defined]
    end = following.end_lineno or following.lineno
    if overwritten:
        later = [node for node in later if node.lineno <= end]
    if (
        len(readers) != 1
        or readers[0].keywords
        or len(later) != 1
        or not isinstance(following, (ast.Assign, ast.Return))
    ):
        return ""
    return _layer(readers[0])


def _blocks(tree: ast.AST) -> list[list[ast.stmt]]:
    fields = (getattr(node, name, None) for node in ast.walk(tree) for name in ("body", "orelse", "finalbody"))
    return [block for block in fields if isinstance(block, list)]


# ---- deciding --------------------------------------------------------------------------------------------------------


def why_not_linear(module: torch.nn.Module, reader: str) -> str:
    """Why a layer of an MLP is not one that hands what it reads to its kernel, and to nothing else; "" if it is."""
    linear: Any = module._modules.get(reader)
    kind = type(linear).__name__
    if "LoRA" in kind:
        return "LoRA reads what SiLU·mul writes, unquantised"
    if kind != LINEAR:
        return f"{reader} is {kind}; fused is {LINEAR}"
    if not linear.input_is_parallel:
        return f"{reader} takes its part of the rows"
    if linear._forward_pre_hooks or linear._forward_hooks or "forward" in vars(linear) or "forward" in vars(module):
        return f"{reader} has hooks"
    return ""


def why_not_rows(linear: Any, quantiser: Quantiser) -> str:
    """Why what a linear layer reads cannot be quantised by our op; "" if it can be."""
    width, dtype, size = linear.input_size_per_partition, linear.params_dtype, quantiser.scales.group_size
    if width % size:
        return f"groups of {size} in rows of {width}; fused are groups that divide a row"
    if dtype not in INPUT_DTYPES or (dtype != torch.bfloat16 and FLASHINFER in quantiser.rounding):
        return f"SiLU·mul reads {dtype}, which {quantiser} is not known for"
    return ""


# ---- reporting -------------------------------------------------------------------------------------------------------


def boundaries(
    model: torch.nn.Module, config: Any, record: report.EngineRecord
) -> tuple[list[report.Found], list[report.Missed]]:
    """What became of SiLU·mul and quantiser in each MLP of a model that runs outside of compiled code."""
    found: list[report.Found] = []
    missed: list[report.Missed] = []
    for name, module, activation in _activations(model, config):
        became = _became(module, activation, record)
        if isinstance(became, str):
            missed.append(report.Missed(pass_name=NAME, reason=became, module=name))
        else:
            found.append(became.model_copy(update={"module": name}))
    return found, missed


def _became(module: torch.nn.Module, activation: str, record: report.EngineRecord) -> report.Found | str:
    """What has been fused, or why nothing was."""
    reader = reader_of(module, activation)
    if isinstance(reader, str):
        return reader
    linear: Any = module._modules.get(reader.name)
    if reader.by_vllm and getattr(linear, "_input_quant_key", None) is not None:
        return report.Found(pass_name=report.MODEL_CODE, pattern=f"silu_mul+quantiser[{BY_VLLM}]")
    mlp = module._modules[activation]._forward_method  # type: ignore[union-attr]
    if reason := record.mlps_left or _problem:
        return reason
    if not isinstance(mlp, Mlp):
        return "its activation is others' too, or came into the model after this package had looked at it"
    return mlp.case.reason or report.Found(pass_name=NAME, pattern=mlp.case.pattern)
