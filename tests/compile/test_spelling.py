# SPDX-License-Identifier: Apache-2.0
"""Models that compute the same and are written in another way: fused alike, and as they were where nothing is fused."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

pytestmark = pytest.mark.slow  # 5 minutes in all

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from run_graphs import inputs_of, run_on_cpu  # noqa: E402
from torch import fx, nn  # noqa: E402
from trace_module import check_graphs, make_config, our_ops, reasons, trace_branches  # noqa: E402
from vllm.compilation.passes.inductor_pass import pass_context  # noqa: E402
from vllm.config.utils import Range  # noqa: E402
from vllm.model_executor.layers.activation import SiluAndMul  # noqa: E402
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm, RMSNormGated  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402

from vllm_fusion_plugin import compat, plugin, report  # noqa: E402
from vllm_fusion_plugin.graph import same_shape, same_strides  # noqa: E402
from vllm_fusion_plugin.passes.base import FusionPass  # noqa: E402
from vllm_fusion_plugin.passes.normalise import Spelling  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import Recording  # noqa: E402

WIDTH = 512


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    plugin.register()
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())


# ---- modules ---------------------------------------------------------------------------------------------------------


class Group(nn.Module):
    def __init__(self, **layout: Any) -> None:
        super().__init__()
        layout = {"column_major_scales": False, "use_ue8m0": False} | layout
        self.quant = QuantFP8(
            static=False, group_shape=GroupShape(1, 128), **layout, **compat.uncompiled_layer(QuantFP8)
        )

    def forward(self, y):
        return self.quant(y)


class Static(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR, **compat.uncompiled_layer(QuantFP8))
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)

    def forward(self, y):
        return self.quant(y, self.scale)[0]


class Token(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN, **compat.uncompiled_layer(QuantFP8))

    def forward(self, y):
        return self.quant(y)


class Module(nn.Module):
    """`written` with the layers at hand, then `quant`."""

    def __init__(self, written: Callable[..., Any], quant: Callable[[], nn.Module] = Group) -> None:
        super().__init__()
        self.written = written
        self.act, self.norm, self.gemma = SiluAndMul(), RMSNorm(2 * WIDTH), GemmaRMSNorm(2 * WIDTH)
        self.gated = RMSNormGated(128, eps=1e-5, norm_before_gate=True)
        self.quant = quant()

    def forward(self, x, z):
        made = self.written(self, x, z)
        if not isinstance(made, tuple):
            return self.quant(made)
        value, *others = made  # what is returned besides
        return self.quant(value), others


def as_vllm(m, x, z):
    return m.act(x)


# SiLU·mul with gate and up taken in one way or another. What `custom_ops` say does not matter to these.
def halves_of(take):
    def written(m, x, z):
        gate, up = take(x)
        return F.silu(gate) * up

    return written


HALVES = {
    "slices": halves_of(lambda x: (x[..., :WIDTH], x[..., WIDTH:])),
    "slices from the end": halves_of(lambda x: (x[:, :-WIDTH], x[:, -WIDTH:])),
    "narrow": halves_of(lambda x: (x.narrow(-1, 0, WIDTH), x.narrow(-1, WIDTH, WIDTH))),
    "chunk": halves_of(lambda x: x.chunk(2, -1)),
    "split": halves_of(lambda x: x.split(WIDTH, dim=-1)),
    "split by sizes": halves_of(lambda x: x.split([WIDTH, WIDTH], dim=1)),
    "tensor_split": halves_of(lambda x: x.tensor_split(2, dim=-1)),
    "select": halves_of(lambda x: (x.view(-1, 2, WIDTH)[:, 0], x.view(-1, 2, WIDTH)[:, 1])),
    "unbind": halves_of(lambda x: x.view(-1, 2, WIDTH).unbind(1)),
    "chunk of rank 3": lambda m, x, z: HALVES["chunk"](m, x[None], z)[0],
    "split of rank 3": lambda m, x, z: HALVES["split"](m, x[None], z).reshape(-1, WIDTH),
    "up first": lambda m, x, z: x[..., WIDTH:] * F.silu(x[..., :WIDTH]),
    "halves with other readers": lambda m, x, z: (m.act.forward_native(x), x[..., :WIDTH] * 2, x[..., WIDTH:] + 1),
}
SHAPES = {
    "leading 1": lambda m, x, z: m.act(x[None])[0],
    "leading 1, select": lambda m, x, z: m.act(x[None]).select(0, 0),
    "leading 1, squeeze": lambda m, x, z: m.act(x.unsqueeze(0)).squeeze(0),
    "leading 1, reshape": lambda m, x, z: m.act(x.reshape(1, -1, 2 * WIDTH)).view(-1, WIDTH),
    "view": lambda m, x, z: (lambda y: y.view(-1, y.shape[-1]))(m.act(x)),
    "reshape": lambda m, x, z: (lambda y: y.reshape(*y.shape[:-1], -1))(m.act(x)),
    "to rank 3 and back": lambda m, x, z: m.act(x).view(1, -1, WIDTH).view(-1, WIDTH),
    "split rows and back": lambda m, x, z: m.act(x).view(x.shape[0], -1, 64).reshape(x.shape[0], WIDTH),
}
RANK_3 = {
    "rank 3": lambda m, x, z: m.act(x[None]),
    "rank 3, reshape": lambda m, x, z: m.act(x.view(1, x.shape[0], -1)),
}


def add_norm(m, x, z):
    y, total = m.norm(x[None].clone(), z[None].clone())
    return y[0], total


def two_norms(m, x, z):
    """Two layers of a residual stream: the second is not quantised."""
    y, total = m.norm(x[None].clone(), z[None].clone())
    other, total = m.norm(x[None] * 2, total)
    return y[0], other, total


NORMS = {
    "norm": lambda m, x, z: m.norm(x[None])[0],
    "gemma": lambda m, x, z: m.gemma(x[None]).view(-1, 2 * WIDTH),
    "norm, used elsewhere": lambda m, x, z: (lambda y: (y[0], y + 1))(m.norm(x[None])),
    "add": add_norm,
    "two norms": two_norms,
}
NORMS_RANK_3 = {"norm": lambda m, x, z: m.norm(x[None])}


def gated(m, x, z):
    heads = (t.view(t.shape[0], -1, 128) for t in (x, z))
    return m.gated(*heads).flatten(-2)


def gated_flat(m, x, z):
    heads = (t.reshape(-1, 128) for t in (x, z))
    return m.gated(*heads).reshape(x.shape)


def gated_leading(m, x, z):
    heads = (t.view(1, t.shape[0], -1, 128) for t in (x, z))
    return m.gated(*heads).flatten(-2)[0]


GATED = {"heads": gated, "rows": gated_flat, "leading 1": gated_leading}

FORMS = {
    "custom ops": ["none", "+silu_and_mul", "+quant_fp8"],
    "native+custom op": ["none", "+quant_fp8"],
    "custom op+native": ["none", "+silu_and_mul", "-quant_fp8"],
    "native": ["none", "-quant_fp8"],
}


def trace(
    makers: Sequence[Callable[[], nn.Module]],
    custom_ops: Sequence[str] = FORMS["native+custom op"],
    eliminate_noops: bool = True,
    precision_casts: bool = False,
    check: bool = True,
) -> Recording:
    config = make_config(list(custom_ops), fuse_act_quant=True, fuse_norm_quant=True, eliminate_noops=eliminate_noops)
    config.additional_config = {"fusion_plugin": {"lone_group_quant": False}}
    config.compilation_config.inductor_compile_config |= {"emulate_precision_casts": precision_casts}
    recording = trace_branches(makers, [(64, 2 * WIDTH)] * 2, config)
    if check:
        check_graphs(recording)  # shapes, dtypes and strides of what is returned
    assert not [note for note in report.RECORDER.report.notes if "left a graph" in note or "cannot be " in note]
    return recording


def makers(written: dict[str, Any], quant: Callable[[], nn.Module] = Group) -> list[Callable[[], nn.Module]]:
    return [functools.partial(Module, one, quant) for one in written.values()]


def text(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """All nodes, in order, with what they make."""
    return [(n.name, n.op, str(n.target), str(n.args), str(n.kwargs), str(n.meta.get("val"))) for n in graph.nodes]


# ---- fused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forms", "eliminate_noops"), [*((forms, True) for forms in FORMS), ("native+custom op", False), ("native", False)]
)
def test_silu_mul_is_fused(forms, eliminate_noops):
    written = {"as vLLM has it": as_vllm} | HALVES | SHAPES
    if forms.startswith("custom"):
        written = {
            "as vLLM has it": as_vllm
        } | SHAPES  # SiLU·mul in plain torch code rounds as itself, whatever else does
    recording = trace(makers(written), FORMS[forms], eliminate_noops)
    ops = our_ops(recording)
    assert [name for name, _ in ops] == ["silu_mul_group_fp8_quant"] * len(written), list(written)
    assert len({str(list(arguments.values())[1:]) for _, arguments in ops}) == 1
    assert not reasons()


READ_TWICE = {
    "rank 3": lambda m, x, z: (lambda y: (y[0], y))(m.act(x[None])),
    "chunks": lambda m, x, z: (lambda y: (y, y + 1))(HALVES["chunk"](m, x, z)),
    "several": lambda m, x, z: (lambda y: (y[0], m.gemma(y.reshape(-1, 2 * WIDTH))[None] * 2))(m.act(x[None])),
}


@pytest.mark.parametrize("forms", ["custom ops", "native+custom op", "custom op+native"])
def test_silu_mul_with_other_readers_is_fused(forms):
    written = {k: v for k, v in READ_TWICE.items() if not (k == "chunks" and forms == "custom op+native")}
    recording = trace(makers(written), FORMS[forms], eliminate_noops=False)
    assert [arguments["keep_act"] for _, arguments in our_ops(recording)] == [True] * len(written)
    assert not reasons()


@pytest.mark.parametrize("forms", FORMS)
def test_rank_3_is_fused_with_its_layout(forms):
    native = "native" in forms.partition("+")[2] or forms == "native"
    column = {"column_major_scales": True} | ({} if native else {"tma_aligned_scales": True})
    each = [*makers(RANK_3), *makers(RANK_3, functools.partial(Group, **column)), *makers(NORMS_RANK_3)]
    if native:  # vLLM's own op for one scale takes rank 2
        each += [*makers(RANK_3, Static), *makers(NORMS_RANK_3, Static)]  # with a scale a token, vLLM's layer fails
    recording = trace(each, FORMS[forms])
    assert len(our_ops(recording)) == len(each)
    assert not reasons()


@pytest.mark.parametrize("forms", ["native", "native+custom op"])
def test_norms_are_fused(forms):
    each = [maker for quant in (Group, Token, Static) for maker in makers(NORMS, quant)]
    native = forms == "native"
    recording = trace(each, FORMS[forms])
    # read rounded in one place and unrounded in the other, with a quantiser in plain torch code
    left = [reason for reason in reasons() if "other users" in reason]
    assert len(left) == (3 if native else 0)
    assert len(our_ops(recording)) == len(each) - len(left)
    assert len(reasons()) == len(left)


@pytest.mark.parametrize("forms", ["native", "native+custom op"])
def test_gated_norms_are_fused(forms):
    recording = trace(makers(GATED), FORMS[forms])
    assert [name for name, _ in our_ops(recording)] == ["gated_rms_norm_group_fp8_quant"] * len(GATED)


# ---- left, and left as it was ----------------------------------------------------------------------------------------


LEFT = {
    "leading 2": lambda m, x, z: m.act(torch.stack([x, z])),
    "leading rows": lambda m, x, z: m.act(x[:, None]),
    "up and gate": halves_of(lambda x: x.chunk(2, -1)[::-1]),
    "unequal": halves_of(lambda x: x.split([256, 512, 256], -1)[::2]),
    "overlapping": halves_of(lambda x: (x[..., :WIDTH], x[..., WIDTH // 2 : 3 * WIDTH // 2])),
    "gate from the middle": halves_of(lambda x: (x[..., WIDTH // 2 : 3 * WIDTH // 2], x[..., WIDTH:])),
    "a quarter": halves_of(lambda x: (x[..., :256], x[..., 256:512])),
    "other tensor": lambda m, x, z: F.silu(x[..., :WIDTH]) * z[..., WIDTH:],
    "select of the other dimension": halves_of(lambda x: x.view(-1, WIDTH, 2).unbind(2)),
    "sigmoid": lambda m, x, z: (lambda gate: gate * torch.sigmoid(gate) * x[..., WIDTH:])(x[..., :WIDTH]),
}


@contextlib.contextmanager
def compared_passes():
    """Graphs as text, before and after each run of a pass of ours, with the number of matches."""
    runs = []
    call = FusionPass.__call__

    def compared(self, graph):
        before = text(graph)
        call(self, graph)
        runs.append((self.name, self.matched_count, before, text(graph)))

    with mock.patch.object(FusionPass, "__call__", compared):
        yield runs


@pytest.mark.parametrize("forms", FORMS)
def test_is_left_node_for_node(forms):
    left = {k: v for k, v in LEFT.items() if not (k == "leading rows" and forms == "custom ops")}
    if forms == "native":
        left |= READ_TWICE
    with compared_passes() as runs:
        recording = trace(makers(left), FORMS[forms], eliminate_noops=False)
    assert not our_ops(recording)
    assert len(runs) >= 2
    for name, matches, before, after in runs:
        assert (matches, after) == (0, before), name


def test_says_why_sigmoid_is_left():
    trace(makers({"sigmoid": LEFT["sigmoid"]}))
    (reason,) = reasons()
    assert "x * sigmoid(x)" in reason


def reading_both(written):
    """A graph has no input for a tensor that nothing reads, and then they could not be told apart."""

    def with_inputs(m, x, z):
        made = written(m, x, z)
        return (*(made if isinstance(made, tuple) else (made,)), x * 2, z * 2)

    return with_inputs


def test_what_is_left_beside_fusions_is_as_it_was():
    """Nodes of branches that are not fused, beside some that are."""
    fused = {"chunk": HALVES["chunk"], "leading 1": SHAPES["leading 1"], "norm": NORMS["two norms"]}
    with compared_passes() as runs:
        recording = trace(
            makers({name: reading_both(one) for name, one in (LEFT | fused).items()}), eliminate_noops=False
        )
    assert len(our_ops(recording)) == len(fused)
    (subgraph,) = recording.subgraphs
    alone = _of_inputs(subgraph.before, 2 * len(LEFT))
    assert len(alone) > 50
    for _, _, before, after in runs:
        kept = [node for node in before if node[0] in alone]
        assert [node for node in after if node[0] in alone] == kept


def _of_inputs(graph: fx.Graph, count: int) -> set[str]:
    """Names of the nodes that are made of the first `count` tensors [tokens, width] that a graph is given."""
    wide = [n for n in graph.find_nodes(op="placeholder") if getattr(n.meta["val"], "ndim", 0) == 2][:count]
    others = set(graph.find_nodes(op="placeholder")) - set(wide)
    found: dict[fx.Node, None] = dict.fromkeys(wide)
    for node in graph.nodes:
        if node.op == "call_function" and any(n in found for n in node.all_input_nodes):
            found[node] = None
    return {n.name for n in found if n not in others}


@pytest.mark.parametrize("forms", ["native", "custom ops"])
def test_writing_it_another_way_and_back_changes_nothing(forms):
    everything = {**HALVES, **SHAPES, **RANK_3, **NORMS, **NORMS_RANK_3, **GATED}
    recording = trace(makers(everything), FORMS[forms], eliminate_noops=False)
    (subgraph,) = recording.subgraphs
    graph = subgraph.before
    before = text(graph)
    spelling = Spelling(graph)
    assert spelling.unify()
    assert text(graph) != before
    spelling.restore()
    assert text(graph) == before


# ---- bytes -----------------------------------------------------------------------------------------------------------


def lowered(recording: Recording) -> fx.Graph:
    """The graph without our passes, with vLLM's norms in torch's operations."""
    (subgraph,) = recording.subgraphs
    graph = fx.GraphModule(nn.Module(), copy.deepcopy(subgraph.before)).graph
    with pass_context(Range(*subgraph.compile_range)):
        recording.pass_manager.ir_lowering(graph)
    return graph


@pytest.mark.parametrize("forms", ["custom ops", "native+custom op"])
def test_bytes_are_those_without_passes(forms):
    written = HALVES | SHAPES | {"rank 3": RANK_3["rank 3"]} | NORMS | GATED
    recording = trace(makers(written), FORMS[forms], precision_casts=True)
    assert len(our_ops(recording)) >= len(written) - 1
    (subgraph,) = recording.subgraphs
    without = lowered(recording)
    for kind in ("normal", "special"):
        inputs = inputs_of(subgraph.before, 5, seed=5, kind=kind)
        after, before = run_on_cpu(subgraph.after, inputs), run_on_cpu(without, inputs)
        for number, (one, other) in enumerate(zip(after, before, strict=True)):
            assert one.dtype == other.dtype and one.shape == other.shape
            a, b = one.float(), other.float()
            assert bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all()), (kind, number)


# ---- symbols that nothing may be asked of ----------------------------------------------------------------------------


class Unbacked(Module):
    """On a number of rows that is found in a tensor: u0."""

    def forward(self, x, z):
        rows = (x[0, 0] > 0).to(torch.int64).item() + 2
        torch._check(rows >= 2)  # vLLM's own layers compare it with 1
        torch._check(rows <= x.shape[0])
        return super().forward(x[:rows], z[:rows])


SYMBOLIC = {"as vLLM has it": as_vllm, "chunk": HALVES["chunk"], **SHAPES, **NORMS, **GATED}


@pytest.mark.parametrize("forms", ["native", "native+custom op"])
def test_unbacked_rows(forms):
    left = ["norm, used elsewhere"] if forms == "native" else []  # see test_norms_are_fused
    written = {k: v for k, v in SYMBOLIC.items() if k not in left}
    recording = trace([functools.partial(Unbacked, one) for one in written.values()], FORMS[forms], check=False)
    (subgraph,) = recording.subgraphs
    for one, other in zip(_returned(subgraph.after), _returned(subgraph.before), strict=True):
        # of a dimension of 1 torch itself gives the stride once as 1024 * u0 and once as 1024 * max(1, u0)
        assert one.dtype == other.dtype and same_shape(one, other) and same_strides(one, other)
    symbols = {str(s) for n in subgraph.before.nodes if (s := _rows(n)) is not None}
    assert any("u" in s for s in symbols)
    assert sum("group_fp8_quant" in str(node.target) for node in subgraph.after.nodes) == len(written)
    assert not reasons()


def _returned(graph: fx.Graph) -> list[torch.Tensor]:
    (results,) = next(n for n in graph.nodes if n.op == "output").args
    return [n.meta["val"] for n in results if isinstance(n.meta["val"], torch.Tensor)]


def _rows(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else None


@pytest.mark.parametrize("forms", ["native", "native+custom op"])
def test_backed_size_oblivious(forms):
    left = ["norm, used elsewhere"] if forms == "native" else []
    written = {k: v for k, v in SYMBOLIC.items() if k not in left}
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        recording = trace(makers(written), FORMS[forms])
    assert len(our_ops(recording)) == len(written)
    assert not reasons()
