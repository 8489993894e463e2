# SPDX-License-Identifier: Apache-2.0
"""Random modules with the passes and without: the same bytes, and every quantiser fused or explained.

vLLM's compiler traces them for a fake GPU, with norms and activations that round where the graph says so
(`emulate_precision_casts`); both graphs then run on the CPU op by op.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest

from vllm_fusion_plugin.graph import called_op
from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("hypothesis")
fake_gpu.install()

import torch  # noqa: E402
from hypothesis import event, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from random_modules import WIDTH, Program, Step, programs  # noqa: E402
from run_graphs import inputs_of, run_on_cpu  # noqa: E402
from torch import fx  # noqa: E402
from trace_module import check_graphs, make_config, trace_branches  # noqa: E402
from vllm.compilation.passes.inductor_pass import pass_context  # noqa: E402
from vllm.config.utils import Range  # noqa: E402

from tests.fuzz_profiles import examples  # noqa: E402
from vllm_fusion_plugin import compat, plugin, report  # noqa: E402
from vllm_fusion_plugin.passes import pass_manager, quantisers  # noqa: E402
from vllm_fusion_plugin.passes.base import FusionPass  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import Recording  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def passes_are_built_once():
    """They keep the patterns that they have traced, as they do for all graphs of a model: most of a trace's time."""
    build, built = pass_manager._build, {}

    def build_once(name: str, stock: Any, config: Any) -> Any:
        key = (name, config.model_config.dtype)
        if key not in built:
            built[key] = build(name, stock, config)
        report.RECORDER.report.passes[name] = "ours"
        return built[key]

    with mock.patch.object(pass_manager, "_build", build_once):
        yield


def trace(steps: list[tuple[Step, ...]], dtype: torch.dtype, lone: bool, eliminate_noops: bool) -> Recording:
    config = make_config(
        ["none", "+silu_and_mul", "+quant_fp8"],
        dtype=dtype,
        fuse_norm_quant=True,
        fuse_act_quant=True,
        eliminate_noops=eliminate_noops,
    )
    config.additional_config = {"fusion_plugin": {"lone_group_quant": lone}}
    config.compilation_config.inductor_compile_config |= {"emulate_precision_casts": True}
    plugin.register()
    report.RECORDER.report = report.RankReport()
    return trace_branches([functools.partial(Program, one) for one in steps], [(64, WIDTH)] * 2, config)


def lowered(recording: Recording) -> fx.Graph:
    """The graph without our passes, but with vLLM's norms in torch's operations."""
    (subgraph,) = recording.subgraphs
    graph = fx.GraphModule(torch.nn.Module(), subgraph.before).graph
    with pass_context(Range(*subgraph.compile_range)):
        recording.pass_manager.ir_lowering(graph)
    return graph


@given(
    steps=st.lists(
        programs(), min_size=1, max_size=6
    ),  # side by side: most of a trace's time is the same for one and six
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    lone=st.booleans(),
    eliminate_noops=st.booleans(),
    rows=st.sampled_from([1, 5, 8, 40]),  # vLLM's block GEMM quantises fewer than 32 otherwise
    kind=st.sampled_from(["normal", "special"]),
)
@examples(8)
def test_same_bytes_and_every_quantiser_fused_or_explained(steps, dtype, lone, eliminate_noops, rows, kind) -> None:
    recording = trace(steps, dtype, lone, eliminate_noops)
    check_bytes(recording, rows, kind)
    (subgraph,) = recording.subgraphs
    event(f"fused: {len(fused(subgraph.after))}")
    event(f"block GEMMs split: {sum(called_op(n).endswith('.block_fp8_gemm') for n in subgraph.after.nodes)}")


@pytest.mark.parametrize("lone", [False, True])
def test_same_bytes_after_a_block_gemm(lone) -> None:
    """Each layer before it, both kinds of scales, and both of the quantisers that it chooses from by its rows."""
    layers = {"norm": (), "gemma_norm": (), "add_norm": (), "silu_mul": (True,), "double": ()}
    steps = [
        (
            Step(layer, 0, WIDTH, 1, options),
            Step("gemm_quant", 2, WIDTH // (1 + (layer == "silu_mul")), 0, (False, ue8m0)),
        )
        for layer, options in layers.items()
        for ue8m0 in (False, True)
    ]
    recording = trace(steps, torch.bfloat16, lone, True)
    for rows in (5, 40):
        check_bytes(recording, rows, "normal")
    (subgraph,) = recording.subgraphs
    ops = [called_op(node).partition(".")[2] for node in subgraph.after.nodes]
    assert ops.count("block_fp8_gemm") == len(steps) - (0 if lone else 2)


# ---- what is checked -------------------------------------------------------------------------------------------------


def check_bytes(recording: Recording, rows: int, kind: str) -> None:
    check_graphs(recording)
    check_report(recording)
    (subgraph,) = recording.subgraphs
    inputs = inputs_of(subgraph.before, rows, seed=rows, kind=kind)
    after, before = run_on_cpu(subgraph.after, inputs), run_on_cpu(lowered(recording), inputs)
    for number, (one, other) in enumerate(zip(after, before, strict=True)):
        assert_same(one, other, number)


def check_report(recording: Recording) -> None:
    """Nothing failed on the way, and what was not fused has a reason."""
    (subgraph,) = recording.subgraphs
    seen = report.RECORDER.report
    assert all(isinstance(p, FusionPass) for p in recording.pass_manager.passes if hasattr(p, "matched_count"))
    assert not [note for note in seen.notes if "cannot be " in note]
    missed = [missed.reason for part in seen.subgraphs for missed in part.missed]
    assert not [reason for reason in missed if "Error" in reason]
    left = [node for node in subgraph.after.nodes if is_quantiser(node)]
    assert len(missed) >= len(left), (missed, left)


def fused(graph: fx.Graph) -> list[fx.Node]:
    """Ops of ours that do more than quantise."""
    ours = [node for node in graph.nodes if str(node.target).startswith("vllm_fusion_plugin.")]
    return [node for node in ours if node.target is not torch.ops.vllm_fusion_plugin.group_fp8_quant.default]


def is_quantiser(node: fx.Node) -> bool:
    if called_op(node) in (*quantisers.OPAQUE_QUANT_OPS, *compat.OPAQUE_QUANTISERS):
        return True
    return node.target is torch.ops.prims.convert_element_type.default and node.args[1] == torch.float8_e4m3fn


def assert_same(actual: torch.Tensor, expected: torch.Tensor, number: int) -> None:
    """The bytes, whatever their NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    a, b = actual.float(), expected.float()
    same = (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())
    if not bool(same.all()):
        at = (~same).nonzero()
        first = [(tuple(i), a[tuple(i)].item(), b[tuple(i)].item()) for i in at[:4].tolist()]
        raise AssertionError(f"output {number}, {actual.dtype}: {len(at)} of {a.numel()} differ: {first}")
