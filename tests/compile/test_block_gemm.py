# SPDX-License-Identifier: Apache-2.0
"""vLLM's block GEMM that quantises inside, split for other passes to fuse: small modules, fake CUDA tensors."""

from __future__ import annotations

import functools
import io
from types import SimpleNamespace

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import nn  # noqa: E402
from trace_module import (  # noqa: E402
    check_graphs,
    group_rounding,
    make_config,
    our_ops,
    reasons,
    trace_branches,
)
from vllm.model_executor.kernels.linear.scaled_mm import flashinfer  # noqa: E402
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul  # noqa: E402
from vllm.model_executor.layers.layernorm import RMSNorm  # noqa: E402

from vllm_fusion_plugin import compat, report, roundings  # noqa: E402
from vllm_fusion_plugin.kernels import block_gemm as kernels  # noqa: E402
from vllm_fusion_plugin.kernels.rounding import FLASHINFER_ROWS  # noqa: E402
from vllm_fusion_plugin.passes import block_gemm  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import count_ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("registered")

ACT, NORM, LONE = "activation_quant_fusion_pass", "rmsnorm_quant_fusion_pass", "group_quant_pass"
ON = {"fuse_act_quant": True, "fuse_norm_quant": True}
VLLM_OP = "vllm.dynamic_flashinfer_deepgemm_blockscale_gemm.default"
GEMM = "vllm_fusion_plugin.block_fp8_gemm.default"
QUANT = "vllm_fusion_plugin.group_fp8_quant.default"
SILU_MUL = "vllm_fusion_plugin.silu_mul_group_fp8_quant.default"
RMS_NORM = "vllm_fusion_plugin.rms_norm_group_fp8_quant.default"
WIDTH, COLUMNS = 512, 192


class Gemm(nn.Module):
    """vLLM's op after a layer, called as its linear kernel calls it."""

    def __init__(self, make=nn.Identity, ue8m0=True, group_size=128, extra=0, times=1):
        super().__init__()
        self.layer, self.ue8m0, self.group_size, self.extra, self.times = make(), ue8m0, group_size, extra, times

    def before(self, x):
        return self.layer(x)

    def gemm(self, y, ue8m0=None):
        width = y.shape[-1] + self.extra
        weight = torch.empty(COLUMNS, width, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-COLUMNS // 128), width // 128, dtype=torch.float32)
        return torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm(
            y, weight, scales, self.group_size, self.ue8m0 if ue8m0 is None else ue8m0
        )

    def forward(self, x):
        y = self.before(x)
        return [self.gemm(y) for _ in range(self.times)]


class AddNorm(Gemm):
    """A residual stream: the sum is read again."""

    def forward(self, x):
        y, total = self.layer(x, torch.relu(x))
        return self.gemm(y), total


class Mixed(Gemm):
    """Two GEMMs of one input, of which one wants scales that are powers of two."""

    def forward(self, x):
        y = self.before(x)
        return self.gemm(y, True), self.gemm(y, False)


class Half(Gemm):
    def before(self, x):
        return x.to(torch.float16)


class Stacked(Gemm):
    def before(self, x):
        return torch.stack([x, x])


def norm():
    return RMSNorm(2 * WIDTH, 1e-6)


def trace(*makers, settings=None, keep_passes=True, custom_ops=("none", "+quant_fp8"), **flags):
    config = make_config(list(custom_ops), **ON | flags)
    config.additional_config = {"fusion_plugin": settings or {}}
    recording = trace_branches(makers, [(64, 2 * WIDTH)], config, keep_passes)
    check_graphs(recording)
    return recording


def ops_after(recording):
    (subgraph,) = recording.subgraphs
    return count_ops(subgraph.after)


def counts(recording, *ops):
    found = ops_after(recording)
    return [found[op] for op in ops]


def nodes(recording, op):
    (subgraph,) = recording.subgraphs
    return [node for node in subgraph.after.nodes if str(node.target) == op]


def rounding(batch_invariant=False):
    vllms = group_rounding("custom_op")
    return vllms if batch_invariant else f"{vllms}_or_flashinfer"


def found():
    return [(f.pass_name, f.pattern) for s in report.RECORDER.report.subgraphs for f in s.found]


SPLIT = [
    (functools.partial(Gemm, SiluAndMul), SILU_MUL, "silu_mul[native]+group128[split,tma{}]"),
    (functools.partial(Gemm, norm), RMS_NORM, "rms_norm+group128[split,tma{}]"),
    (functools.partial(AddNorm, norm), RMS_NORM, "fused_add_rms_norm+group128[split,tma{}]+sum"),
    (Gemm, QUANT, "group128[split,tma{}]"),
    (functools.partial(Gemm, functools.partial(GeluAndMul, approximate="tanh")), QUANT, "group128[split,tma{}]"),
    (functools.partial(Gemm, SiluAndMul, times=3), SILU_MUL, "silu_mul[native]+group128[split,tma{}]"),
]


def test_everything_before_the_gemm_is_fused():
    cases = [(make, op, pattern, ue8m0) for ue8m0 in (True, False) for make, op, pattern in SPLIT]
    recording = trace(*(functools.partial(make, ue8m0=ue8m0) for make, *_, ue8m0 in cases))
    # one quantiser however many GEMMs read it
    assert counts(recording, SILU_MUL, RMS_NORM, QUANT, GEMM) == [4, 4, 4, 16]
    assert not [op for op in ops_after(recording) if op.startswith(("vllm.", "_C.", "vllm_ir."))]
    fused = [(op, arguments) for op, arguments in our_ops(recording) if op != "block_fp8_gemm"]
    for (op, arguments), (_, expected, _, ue8m0) in zip(fused, cases, strict=True):
        assert f"vllm_fusion_plugin.{op}.default" == expected
        given = [arguments[n] for n in ("group_size", "scale_layout", "use_ue8m0", "quant_rounding")]
        assert given == [128, "tma", ue8m0, rounding()]
    assert sorted(pattern for _, pattern in found()) == sorted(
        pattern.format(",ue8m0" if ue8m0 else "") for *_, pattern, ue8m0 in cases
    )
    matches = recording.matches_by_graph()
    assert [matches[name] for name in (ACT, NORM, LONE)] == [4, 4, 4]
    table = report.RECORDER.report.match_table()
    assert [table[name] for name in (ACT, NORM, LONE)] == [4, 4, 4]


def test_what_the_gemm_is_given():
    recording = trace(*(functools.partial(Gemm, make, ue8m0) for make in (SiluAndMul, norm) for ue8m0 in (True, False)))
    gemms = nodes(recording, GEMM)
    assert len(gemms) == 4
    for node in gemms:
        codes, scales, weight, weight_scales, ue8m0, flashinfer_rows = node.args
        quantiser = codes.args[0]
        assert (codes.args, scales.args) == ((quantiser, 0), (quantiser, 1))
        assert block_gemm.arguments_of(quantiser)["use_ue8m0"] == ue8m0
        assert flashinfer_rows == FLASHINFER_ROWS == 32
        codes, scales, weight, weight_scales, product = (
            n.meta["val"] for n in (codes, scales, weight, weight_scales, node)
        )
        rows, width = codes.shape
        assert weight.shape == (COLUMNS, width) and weight_scales.shape == (2, width // 128)
        assert (codes.dtype, scales.dtype, product.dtype) == (torch.float8_e4m3fn, torch.float32, torch.bfloat16)
        assert scales.shape == (rows, width // 128) and product.shape == (rows, COLUMNS)
        assert (codes.stride(), product.stride()) == ((width, 1), (COLUMNS, 1))
        # TMA wants columns that begin at multiples of 16 bytes
        row_stride, column_stride = scales.stride()
        assert row_stride == 1 and [column_stride.node.expr.subs({rows.node.expr: n}) for n in (1, 4, 5)] == [4, 4, 8]


@pytest.mark.parametrize("eliminate_noops", [True, False])
def test_vllms_ops_before_the_gemm(eliminate_noops):
    ops = ("none", "+silu_and_mul", "+rms_norm", "+quant_fp8")
    makers = [functools.partial(Gemm, SiluAndMul), functools.partial(Gemm, norm), functools.partial(AddNorm, norm)]
    recording = trace(*makers, custom_ops=ops, eliminate_noops=eliminate_noops)
    assert counts(recording, SILU_MUL, RMS_NORM, QUANT, GEMM) == [1, 2, 0, 3]
    assert (ACT, "silu_mul[custom_op]+group128[split,tma,ue8m0]") in found()
    assert not [op for op in ops_after(recording) if op.startswith(("vllm.", "_C.", "vllm_ir."))]


def test_scales_of_both_kinds_are_two_quantisers():
    recording = trace(Mixed, functools.partial(Mixed, norm))
    assert counts(recording, VLLM_OP, GEMM) == [0, 4]
    quantisers = [arguments["use_ue8m0"] for op, arguments in our_ops(recording) if op == "group_fp8_quant"]
    assert sorted(quantisers[:2]) == [False, True]
    for node in nodes(recording, GEMM):
        assert block_gemm.arguments_of(node.args[0].args[0])["use_ue8m0"] == node.args[4]


def test_a_quantiser_that_is_alone_is_told():
    trace(Gemm, functools.partial(Gemm, functools.partial(GeluAndMul, approximate="tanh")))
    said = reasons()
    assert len(said) == 2 and all("it runs this package's kernel, by itself" in reason for reason in said)
    assert sum("no pass fuses GELU·mul" in reason for reason in said) == 1


def test_vllms_op_is_back_where_nothing_is_fused():
    recording = trace(
        *(make for make, *_ in SPLIT), functools.partial(Gemm, times=2), settings={"lone_group_quant": False}
    )
    assert counts(recording, SILU_MUL, RMS_NORM, QUANT, GEMM, VLLM_OP) == [2, 2, 0, 6, 4]
    for node in nodes(recording, VLLM_OP):
        x, weight, *rest = node.args
        assert x.meta["val"].dtype == torch.bfloat16 and x.meta["val"].shape[1] == weight.meta["val"].shape[1]
        assert rest[1:] == [128, True]
    assert report.RECORDER.report.passes["GroupQuantPass"] == "off: lone_group_quant=false"
    assert LONE not in report.RECORDER.report.match_table()
    said = reasons()
    assert len(said) == 4
    again = "; vLLM's GEMM quantises inside again (lone_group_quant=false)"
    assert all(reason.endswith(again) for reason in said)
    assert sum("no pass fuses GELU·mul" in reason for reason in said) == 1


def test_why_nothing_was_fused_is_told_of_the_gemm_that_is_back():
    """GEMMs of one input had one quantiser: they are no readers besides it."""
    off = dict.fromkeys(ON, False)
    makers = [functools.partial(Gemm, make, times=2) for make in (SiluAndMul, norm)]
    recording = trace(*makers, settings={"lone_group_quant": False}, **off)
    assert counts(recording, VLLM_OP, QUANT, GEMM) == [4, 0, 0]
    said = reasons()
    assert len(said) == 4
    for words, owner in (("SiLU·mul", "ActivationQuantFusionPass"), ("RMSNorm", "RMSNormQuantFusionPass")):
        start = f"{words} is followed by an FP8 quantiser in groups of 128 (inside {VLLM_OP.removesuffix('.default')})"
        assert sum(reason.startswith(f"{start}, and {owner} is off") for reason in said) == 2, said


def test_the_graph_is_vllms_again():
    """Joined, as if nothing had been split."""
    joined = trace(Gemm, functools.partial(Gemm, ue8m0=False), settings={"lone_group_quant": False})
    untouched = trace(Gemm, functools.partial(Gemm, ue8m0=False), settings={"split_block_gemm": False})
    assert ops_after(joined) == ops_after(untouched)
    assert [node.args[3:] for node in nodes(joined, VLLM_OP)] == [node.args[3:] for node in nodes(untouched, VLLM_OP)]
    assert [node.meta["val"].shape for node in nodes(joined, VLLM_OP)] == [
        node.meta["val"].shape for node in nodes(untouched, VLLM_OP)
    ]


def test_setting_off_splits_nothing():
    recording = trace(*(make for make, *_ in SPLIT), settings={"split_block_gemm": False})
    assert not our_ops(recording) and counts(recording, VLLM_OP) == [8]
    assert report.RECORDER.report.passes["SplitBlockGemmPass"] == "off: split_block_gemm=false"
    said = reasons()
    assert len(said) == 8
    for reason in said:
        assert "inside one opaque op" in reason and "SplitBlockGemmPass is off: split_block_gemm=false" in reason
        assert "VLLM_" not in reason
    assert sum("before it: SiLU·mul" in reason for reason in said) == 4


REFUSED = {
    Half: "the block GEMM's input is torch.float16; split for torch.bfloat16",
    functools.partial(Gemm, group_size=64): "quantises groups of 64; split for 128",
    functools.partial(Gemm, norm, extra=128): f"allowed: [N, {2 * WIDTH}]",
    Stacked: "3 dimensions",
}


def test_calls_that_are_left_are_explained():
    recording = trace(*REFUSED, functools.partial(Gemm, SiluAndMul))
    assert counts(recording, VLLM_OP, GEMM) == [len(REFUSED), 1]
    said = reasons()
    assert len(said) == len(REFUSED)
    for reason in REFUSED.values():
        assert sum(reason in r for r in said) == 1, (reason, said)
    assert all("VLLM_" not in reason and "inside one opaque op" in reason for reason in said)


@pytest.mark.parametrize(("inexact", "left"), [("leave", 1), ("fuse", 0)])
def test_a_quantiser_that_rounds_like_none(monkeypatch, inexact, left):
    """By the setting it is left, or fused with the nearest."""
    answers = roundings.known() | {roundings.GROUP_QUANT: roundings.Rounding("custom_op", 7, asked=True)}
    monkeypatch.setattr(roundings, "known", lambda: answers)
    recording = trace(functools.partial(Gemm, SiluAndMul), settings={"inexact": inexact}, keep_passes=False)
    assert counts(recording, VLLM_OP, GEMM) == [left, 1 - left]
    expected = "not exact on this vLLM, by up to 7 codes in a million, and the setting inexact is 'leave'"
    assert [expected in reason for reason in reasons()] == [True] * left


class FlashInfers(Gemm):
    """The one that takes FlashInfer's kernel for any number of rows, of which the plugin knows no second half."""

    def gemm(self, y, ue8m0=None):
        weight = torch.empty(COLUMNS, y.shape[-1], dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-COLUMNS // 128), y.shape[-1] // 128, dtype=torch.float32)
        return torch.ops.vllm.flashinfer_fp8_blockscale_gemm(y, weight, scales)


def test_flashinfers_own_gemm_is_not_split():
    recording = trace(functools.partial(FlashInfers, SiluAndMul))
    assert not our_ops(recording)
    (said,) = reasons()
    assert "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER=0" in said and said.endswith("before it: SiLU·mul")


def test_batch_invariant_runs_one_kernel(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    makers = [
        functools.partial(Gemm, make, ue8m0) for make in (SiluAndMul, norm, nn.Identity) for ue8m0 in (True, False)
    ]
    recording = trace(*makers, keep_passes=False)
    assert counts(recording, SILU_MUL, RMS_NORM, QUANT, GEMM, VLLM_OP) == [2, 2, 2, 6, 0]
    for op, arguments in our_ops(recording):
        if op == "block_fp8_gemm":
            assert arguments["flashinfer_rows"] == 0
        else:
            assert arguments["quant_rounding"] == rounding(batch_invariant=True)
    assert {"group128[split,tma,ue8m0]", "group128[split,tma]"} < {pattern for _, pattern in found()}


def test_fastest_goes_by_what_was_timed(monkeypatch):
    """A shape that was timed on this GPU changes to DeepGEMM where the table says; the quantisers stay as they are."""
    monkeypatch.setitem(kernels.DEEPGEMM_FROM, kernels.gpu_name(compat.device_name()), {(COLUMNS, WIDTH): 8})
    makers = [functools.partial(Gemm, make) for make in (SiluAndMul, norm)]
    recording = trace(*makers, settings={"block_gemm": "fastest"}, keep_passes=False)
    assert counts(recording, SILU_MUL, RMS_NORM, GEMM, VLLM_OP) == [1, 1, 2, 0]
    changes = {tuple(node.args[2].meta["val"].shape): node.args[5] for node in nodes(recording, GEMM)}
    assert changes == {(COLUMNS, WIDTH): 8, (COLUMNS, 2 * WIDTH): FLASHINFER_ROWS}
    assert {arguments.get("quant_rounding") for op, arguments in our_ops(recording) if op != "block_fp8_gemm"} == {
        rounding()
    }
    notes = [note for note in report.RECORDER.report.notes if "block_gemm" in note]
    assert len(notes) == 2
    assert sum(f"{COLUMNS} rows, {WIDTH} wide, run DeepGEMM from 8 rows on; vLLM does from 32" in n for n in notes) == 1
    assert sum(f"{2 * WIDTH} wide, run vLLM's choice of kernel: not timed on NVIDIA H" in n for n in notes) == 1


def test_a_pass_that_fails_is_the_reason(monkeypatch):
    def fail(*arguments):
        raise KeyError("no such thing")

    monkeypatch.setattr(block_gemm, "split", fail)
    recording = trace(functools.partial(Gemm, SiluAndMul))
    assert counts(recording, VLLM_OP, GEMM) == [1, 0]
    (said,) = reasons()
    assert "split_block_gemm_pass left a graph as it was" in said and "no such thing" in said


# ---- which vLLM ------------------------------------------------------------------------------------------------------


def test_a_vllm_that_is_not_known_keeps_its_op(monkeypatch):
    monkeypatch.setattr(compat, "why_dynamic_gemm_is_unknown", lambda flashinfer_rows: "it is another GEMM")
    recording = trace(functools.partial(Gemm, SiluAndMul), Gemm)
    assert counts(recording, VLLM_OP) == [2] and not our_ops(recording)
    state = "off: it failed: NotImplementedError: it is another GEMM"
    assert report.RECORDER.report.passes["SplitBlockGemmPass"] == state
    said = reasons()
    assert len(said) == 2 and all(f"SplitBlockGemmPass is {state}" in reason for reason in said)


def test_this_vllms_op_is_known():
    assert compat.why_dynamic_gemm_is_unknown(FLASHINFER_ROWS) is None


def test_a_vllm_without_the_op_has_nothing_to_know(monkeypatch):
    monkeypatch.setattr(torch.ops, "vllm", SimpleNamespace())
    assert compat.why_dynamic_gemm_is_unknown(FLASHINFER_ROWS) is None


def test_other_arguments_are_not_known(monkeypatch):
    names = ["input", "weight", "weight_scale", "group_size", "use_deep_gemm_e8m0", "bias"]
    op = SimpleNamespace(
        default=SimpleNamespace(_schema=SimpleNamespace(arguments=[SimpleNamespace(name=name) for name in names]))
    )
    monkeypatch.setattr(torch.ops, "vllm", SimpleNamespace(dynamic_flashinfer_deepgemm_blockscale_gemm=op))
    assert "use_deep_gemm_e8m0, bias; known: input, weight" in compat.why_dynamic_gemm_is_unknown(FLASHINFER_ROWS)


def test_another_number_of_rows_is_not_known(monkeypatch):
    assert "at 48 rows" in compat.why_dynamic_gemm_is_unknown(48)

    def from_64_rows_on(input, weight, weight_scale, group_size, use_deep_gemm_e8m0):
        return input.shape[0] < 64

    monkeypatch.setattr(flashinfer, "_dynamic_flashinfer_deepgemm_blockscale_gemm_impl", from_64_rows_on)
    assert "at 32 rows" in compat.why_dynamic_gemm_is_unknown(FLASHINFER_ROWS)
    monkeypatch.delattr(flashinfer, "_dynamic_flashinfer_deepgemm_blockscale_gemm_impl")
    assert "at 32 rows" in compat.why_dynamic_gemm_is_unknown(FLASHINFER_ROWS)


def pass_names(settings):
    from vllm_fusion_plugin.passes.pass_manager import FusionPassManager

    config = make_config(["none", "+quant_fp8"], **ON)
    config.additional_config = {"fusion_plugin": settings}
    manager = FusionPassManager()
    manager.configure(config)
    return [type(p).__name__ for p in manager.passes]


def test_splits_first_and_joins_last():
    splits = ["SplitExpertsPass", "SplitBlockGemmPass"]
    names = pass_names({"lone_group_quant": False})
    assert names[:3] == ["NoOpEliminationPass", *splits]
    assert names[-2:] == ["JoinPass", "Leftovers"]
    assert "JoinPass" not in pass_names({})
    off = {"split_block_gemm": False, "experts_input_quant": False, "lone_group_quant": False}
    assert not {*splits, "JoinPass"} & set(pass_names(off))
    assert not {*splits, "JoinPass"} & set(pass_names({"enabled": False}))


def test_words_say_what_is_fused_and_not_how():
    words = report.pattern_words("silu_mul[native]+group128[split,tma,ue8m0]")
    assert words == "SiLU·mul + FP8 quantiser, groups of 128, UE8M0 scales"
    trace(functools.partial(Gemm, SiluAndMul), functools.partial(AddNorm, norm), Gemm)
    made = report.FusionReport.from_ranks([report.RECORDER.report.model_dump()])
    console = Console(file=io.StringIO(), width=200)
    for table in made.tables():
        console.print(table)
    text = console.file.getvalue()
    assert "SiLU·mul + FP8 quantiser, groups of 128, UE8M0 scales" in text
    assert "all" not in text.split("\n")[0] and "2 of 3 quantisers fused; 1 left" in text
    assert not [word for word in ("split", "tma", "flashinfer", "_pass") if word in text.replace("vLLM splits", "")], (
        text
    )
