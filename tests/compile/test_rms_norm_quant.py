# SPDX-License-Identifier: Apache-2.0
"""RMSNormQuantFusionPass on small modules: vLLM's own layers and op schemas, vLLM's own compiler, fake CUDA tensors.

A trace takes seconds, so one holds many norms side by side.
"""

from __future__ import annotations

import functools
import itertools

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from rms_norm_modules import (  # noqa: E402
    EPSILON,
    LAYOUTS,
    PASS,
    WIDTH,
    Norm,
    Quant,
    group,
    holds,
    static,
    token,
    trace,
)
from torch import nn  # noqa: E402
from trace_module import group_rounding, make_config, our_ops, reasons  # noqa: E402
from vllm.model_executor.layers.layernorm import RMSNorm  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from tests.forked import in_a_fork  # noqa: E402
from vllm_fusion_plugin import compat, report  # noqa: E402
from vllm_fusion_plugin.passes.rms_norm_quant import RMSNormQuantFusionPass  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import count_ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")


def quantisers(native):
    """Every quantiser, with the arguments of the op that fuses it."""
    variant = "native" if native else "custom_op"
    for size, layout, ue8m0 in itertools.product((64, 128), LAYOUTS, (False, True)):
        # forward_native knows no TMA alignment: it makes the column-major graph
        if native and layout == "tma":
            continue
        scales = dict(group_size=size, scale_layout=layout, use_ue8m0=ue8m0)
        yield group(size, layout, ue8m0, native), scales | dict(quant_rounding=group_rounding(variant))
    for bounded in (False, True):
        yield token(bounded, native), dict(quant_rounding=variant)
    yield static(native), dict(quant_rounding=variant)


NORMS = [
    dict(gemma=gemma, add=add, returns=returns)
    for gemma in (False, True)
    for add, returns in ((False, ()), (True, ("sum",)), (True, ()))
]


def norm_arguments(norm, norm_rounding="native"):
    """The op's arguments that describe the norm."""
    keep_norm = "norm" in norm.get("returns", ())
    return dict(gemma_weight=norm.get("gemma", False), keep_norm=keep_norm, norm_rounding=norm_rounding)


@pytest.mark.parametrize("native", [False, True])
def test_every_quantiser_is_fused(native):
    cases = list(zip(quantisers(native), itertools.cycle(NORMS), strict=False))
    recording = trace(*(functools.partial(Norm, quant, **norm) for (quant, _), norm in cases))
    assert recording.matches_by_graph()[PASS] == len(cases)
    for (op, arguments), ((_, expected), norm) in zip(our_ops(recording), cases, strict=True):
        kind = "group" if "group_size" in expected else "static" if "scale" in arguments else "token"
        assert op == f"rms_norm_{kind}_fp8_quant"
        assert holds(arguments, expected | norm_arguments(norm)), norm
        assert (arguments["residual"] is not None) == norm["add"]
    (subgraph,) = recording.subgraphs
    left = {op.partition(".default")[0] for op in count_ops(subgraph.after)}
    assert not {op for op in left if op.startswith(("_C.", "vllm_ir.", "aten.abs"))}
    assert not {"prims.convert_element_type", "aten.add.Tensor"} & left  # Gemma's weight + 1 is in the op


def test_every_norm_is_fused_whatever_else_uses_it():
    quants = itertools.cycle((group(), token(), static()))
    norms = [norm | {"returns": ("norm", *norm["returns"])} for norm in NORMS] + NORMS
    recording = trace(*(functools.partial(Norm, quant, **norm) for norm, quant in zip(norms, quants, strict=False)))
    assert recording.matches_by_graph()[PASS] == len(norms)
    for (_, arguments), norm in zip(our_ops(recording), norms, strict=True):
        assert holds(arguments, norm_arguments(norm)), norm
    patterns = [f.pattern for s in report.RECORDER.report.subgraphs for f in s.found]
    assert len(set(patterns)) == len(norms)


def test_epsilon_is_any_number():
    epsilons = (1e-5, 1e-6, 1e-12, 0.0123, 2.0)
    recording = trace(*(functools.partial(Norm, group(), epsilon=epsilon) for epsilon in epsilons))
    assert [arguments["epsilon"] for _, arguments in our_ops(recording)] == list(epsilons)


class Fp32Weight(Norm):
    def __init__(self, quant, **norm):
        super().__init__(quant, **norm)
        self.norm.weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float32))


def test_weight_in_float32_or_none():
    recording = trace(
        functools.partial(Fp32Weight, group()),
        functools.partial(Fp32Weight, group(), gemma=True),  # nothing to convert: the op takes weight + 1 as it is
        functools.partial(Norm, group(), has_weight=False),
    )
    weights = [arguments["weight"] for _, arguments in our_ops(recording)]
    assert [weight and weight.meta["val"].dtype for weight in weights] == [torch.float32, torch.float32, None]
    assert [arguments["gemma_weight"] for _, arguments in our_ops(recording)] == [False, False, False]


def test_fp16_model():
    recording = trace(*(functools.partial(Norm, group(), **norm) for norm in NORMS), dtype=torch.float16)
    assert recording.matches_by_graph()[PASS] == len(NORMS)


def test_precision_casts_round_as_eager_does():
    norms = NORMS[:4] if hasattr(torch.ops.vllm_ir, "fused_add_rms_norm") else NORMS[:3]
    recording = trace(
        *(functools.partial(Norm, group(), **norm) for norm in norms), inductor={"emulate_precision_casts": True}
    )
    assert {arguments["norm_rounding"] for _, arguments in our_ops(recording)} == {"eager"}
    assert len(our_ops(recording)) == len(norms)


def test_norm_form_follows_the_kernel_that_vllm_would_run(monkeypatch):
    from vllm.ir.op import IrOp

    for op in IrOp.registry.values():
        if "vllm_c" in op.impls:
            monkeypatch.setattr(op, "_priority_impls", [op.impls["vllm_c"], op.impls["native"]])
    norms = [dict(), dict(add=True, returns=("sum",)), dict(gemma=True)]
    recording = trace(*(functools.partial(Norm, group(), **norm) for norm in norms))
    adds = ["custom_op" if hasattr(torch.ops.vllm_ir, "fused_add_rms_norm") else "native"]
    # vLLM's kernel takes weights of x's dtype only, so Gemma's runs in torch code
    assert [arguments["norm_rounding"] for _, arguments in our_ops(recording)] == ["custom_op", *adds, "native"]


def test_an_unknown_kernel_is_left_alone(monkeypatch):
    monkeypatch.setattr(compat, "ir_provider", lambda op, arguments: "oink")
    recording = trace(functools.partial(Norm, group()))
    assert not our_ops(recording)
    assert any("kernel of oink" in r for r in reasons()), reasons()


# ---- the pass --------------------------------------------------------------------------------------------------------


def test_patterns_are_all_different():
    config = make_config(["none", "+quant_fp8"], fuse_norm_quant=True)
    one = RMSNormQuantFusionPass(config)
    # all norms with a quantiser of each form, and all quantisers with one norm: tracing all 600 takes a minute
    quants = ("+group128[custom_op,column]", "+group128[native,row]")
    wanted = [key for key in one.patterns if any(quant in key for quant in quants) or key.startswith("rms_norm+")]
    one.patterns = {key: one.patterns[key] for key in wanted}
    one.trace_patterns()  # raises DuplicatePatternError if two look for the same graph
    assert len(wanted) > 70


def test_what_is_registered_first_wins_whatever_is_traced_first():
    one = RMSNormQuantFusionPass(make_config(["none", "+quant_fp8"], fuse_norm_quant=True))
    for key in ("rms_norm+static[custom_op]", "rms_norm[gemma]+static[custom_op]"):  # the second was registered first
        one._trace_pattern(key, one.patterns[key])
    ((first, second),) = one.pm_pass.patterns.values()
    assert "aten.add.Tensor" in repr(first.pattern) and "aten.add.Tensor" not in repr(second.pattern)


class Nvfp4(nn.Module):
    def __init__(self, swizzled):
        super().__init__()
        self.norm = RMSNorm(WIDTH, EPSILON)
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)
        self.swizzled = swizzled

    def forward(self, x):
        y, total = self.norm(x, torch.relu(x))
        codes = torch.empty(y.shape[0], y.shape[1] // 2, dtype=torch.uint8)
        if self.swizzled:
            scales = torch.empty(-(y.shape[0] // -128) * 128, y.shape[1] // 64, dtype=torch.int32)
        else:
            scales = torch.empty(y.shape[0], y.shape[1] // 16, dtype=torch.uint8)
        torch.ops._C.scaled_fp4_quant.out(y, self.scale, self.swizzled, output=codes, output_scale=scales)
        return codes, scales, total


@in_a_fork  # vLLM remembers what it asked this platform
def test_nvfp4_runs_vllms_op(monkeypatch):
    from vllm.compilation.passes.fusion import rms_quant_fusion

    op = getattr(rms_quant_fusion, "_FLASHINFER_NVFP4_RMS_QUANT_OP", None)
    if op is None:
        pytest.skip("this vLLM has no fused norm + NVFP4 quantiser")
    monkeypatch.setattr(type(current_platform), "has_device_capability", classmethod(lambda cls, *arguments: True))
    recording = trace(functools.partial(Nvfp4, True), functools.partial(Nvfp4, False), keep_passes=False)
    assert recording.matches_by_graph()[PASS] == 2
    (subgraph,) = recording.subgraphs
    assert count_ops(subgraph.after)[str(op)] == 2


# ---- several users ---------------------------------------------------------------------------------------------------


class Several(nn.Module):
    """One norm, several quantisers."""

    def __init__(self, *quants):
        super().__init__()
        self.norm = RMSNorm(WIDTH, EPSILON)
        self.quants = nn.ModuleList(quant() for quant in quants)

    def forward(self, x):
        y = self.norm(x)
        return [quant(y) for quant in self.quants]


def test_equal_quantisers_are_computed_once():
    recording = trace(functools.partial(Several, group(), group(), group()))
    ((_, arguments),) = our_ops(recording)
    assert not arguments["keep_norm"]
    (note,) = report.RECORDER.report.notes
    assert "computed once" in note


def test_of_unlike_quantisers_one_is_fused():
    recording = trace(functools.partial(Several, group(), token()))
    ((_, arguments),) = our_ops(recording)
    assert arguments["keep_norm"]
    (reason,) = reasons()
    assert "fused with one quantiser already" in reason


# ---- what must not match ---------------------------------------------------------------------------------------------


class Direct(nn.Module):
    """vLLM's op called as no layer of vLLM calls it, with row-major scales."""

    def __init__(self, codes=torch.float8_e4m3fn, limit=448.0, told_column_major=False, size=128):
        super().__init__()
        self.norm = RMSNorm(WIDTH, EPSILON)
        self.codes, self.limit, self.told_column_major, self.size = codes, limit, told_column_major, size

    def forward(self, x):
        y = self.norm(x)
        codes = torch.empty(y.shape, dtype=self.codes)
        scales = torch.empty(*y.shape[:-1], y.shape[-1] // self.size, dtype=torch.float32)
        torch.ops._C.per_token_group_fp8_quant(
            y, codes, scales, self.size, 1e-10, -self.limit, self.limit, False, self.told_column_major, False
        )
        return codes, scales


class ThreeDimensions(Direct):
    def forward(self, x):
        return super().forward(torch.stack([x, x]))


class ThreeDimensionsStatic(Norm):
    def __init__(self):
        super().__init__(static(native=True))

    def forward(self, x):
        return super().forward(x.unsqueeze(1).expand(-1, 2, -1))


class OfAnotherNorm(Norm):
    """As in Gemma's layers: Inductor has both norms and the quantiser in one kernel."""

    def forward(self, x):
        return super().forward(torch.ops.vllm_ir.rms_norm.default(x, self.norm.weight, EPSILON))


class OfPointwiseCode(Norm):
    def forward(self, x):
        return super().forward(torch.relu(x) + x)


class PerTensor(Norm):
    """Dynamic, with one scale a tensor."""

    def __init__(self):
        super().__init__(functools.partial(Quant, group_shape=GroupShape.PER_TENSOR))


class ScaleFromTheNorm(Norm):
    """The scale cannot be known before the norm, and a fused op would need it."""

    def __init__(self):
        super().__init__(static())

    def forward(self, x):
        y = self.norm(x)
        return self.quant.layer(y, y.abs().amax().float().reshape(1))[0]


LEFT_ALONE = {
    functools.partial(Direct, told_column_major=True): "strides",
    functools.partial(Direct, codes=torch.int8): "torch.int8",
    functools.partial(Direct, limit=240.0): "'fp8_max': 240.0",
    functools.partial(Direct, size=32): "'group_size': 32",
    ThreeDimensions: "3 dimensions",
    ThreeDimensionsStatic: "3 dimensions",
    functools.partial(OfAnotherNorm, token(native=True)): "this norm and its quantiser into one kernel",
    functools.partial(OfPointwiseCode, group(native=True)): "this norm and its quantiser into one kernel",
    PerTensor: "_C.dynamic_scaled_fp8_quant",
    ScaleFromTheNorm: "made from its output",
    functools.partial(Norm, group(native=True), returns=("norm",)): "has other users",
    functools.partial(Norm, group(), var_hidden_size=256): "no pattern fits",
}


def test_is_left_alone_and_explained():
    recording = trace(*LEFT_ALONE)
    assert recording.matches_by_graph()[PASS] == 0
    assert not our_ops(recording)
    said = reasons()
    for reason in LEFT_ALONE.values():
        assert sum(reason in r for r in said) >= list(LEFT_ALONE.values()).count(reason), (reason, said)
    assert len(said) == len(LEFT_ALONE), said


def test_unquantised_norms_are_nobodys_business():
    class Unquantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RMSNorm(WIDTH, EPSILON)

        def forward(self, x):
            return torch.relu(self.norm(x))

    trace(Unquantised)
    assert not reasons()


class AllReduced(nn.Module):
    """What vLLM's AllReduceFusionPass leaves of an all-reduce, a norm and a quantiser."""

    def __init__(self, in_place):
        super().__init__()
        self.weight, self.quant, self.in_place = nn.Parameter(torch.empty(WIDTH)), group()(), in_place

    def forward(self, x, residual):
        x, residual = x + 1, residual + 1
        normed = None if self.in_place else torch.empty_like(x)
        torch.ops.vllm.flashinfer_trtllm_fused_allreduce_norm(
            x, residual, self.weight, EPSILON, 2, False, True, 1024, 0, norm_out=normed
        )
        return *self.quant(x if self.in_place else normed), residual


@in_a_fork  # registers vLLM's op
def test_norms_that_an_all_reduce_has_taken_are_explained():
    pytest.importorskip("flashinfer")
    import vllm.compilation.passes.fusion.allreduce_rms_fusion  # noqa: F401  (registers its op)

    makers = [functools.partial(AllReduced, in_place) for in_place in (True, False)]
    assert not our_ops(trace(*makers, shapes=((64, WIDTH),) * 2))
    assert [r for r in reasons() if "the all-reduce before it (fuse_allreduce_rms)" in r] == reasons()
    assert len(reasons()) == 2
