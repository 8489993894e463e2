# SPDX-License-Identifier: Apache-2.0
"""Calls that are repeated: which ops may be, and that a repetition is the call, with a compiled kernel that needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from tests.kernels.test_fuzz_arguments import right
from vllm_fusion_plugin.kernels import watch
from vllm_fusion_plugin.ops import registry, repeats
from vllm_fusion_plugin.ops.quant import GroupScales

ALLOCATING = {
    "new_empty",
    "empty",
    "empty_strided",
    "as_strided",
    "view",
    "slice",
    "select",
    "detach",
    "alias",
    "reshape",
    "transpose",
}


class Ops(TorchDispatchMode):
    """Names of the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [op for op in sorted(registry.CUDA_IMPLEMENTATIONS) if registry.is_repeated(op)])
def test_an_op_that_is_repeated_only_allocates_and_launches(op: str) -> None:
    overload = getattr(torch.ops.vllm_fusion_plugin, op).default
    arguments = [right(a.name, op) for a in overload._schema.arguments]
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    with watch.watching() as seen, Ops() as ops:
        registry.CUDA_IMPLEMENTATIONS[op](*meta)
    assert ops.names <= ALLOCATING and seen.all


@pytest.mark.parametrize("op", sorted(registry.CUDA_IMPLEMENTATIONS.keys()))
def test_no_tensor_is_left_out_where_torch_leaves_out_defaults(op: str) -> None:
    arguments = getattr(torch.ops.vllm_fusion_plugin, op).default._schema.arguments
    tensors = [a for a in arguments if "Tensor" in str(a.type)]
    assert [arguments[i] for i in registry._tensors(op)] == tensors
    assert not any(a.has_default_value() for a in tensors)


@pytest.mark.parametrize("known", [True, False])
def test_allocating(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    t = repeats.allocating.__wrapped__("cpu")((3, 4), (1, 8), torch.bfloat16)
    assert (t.shape, t.stride(), t.dtype, t.device.type) == ((3, 4), (1, 8), torch.bfloat16, "cpu")


def test_scales_that_are_zeroed_are_not_repeated() -> None:
    for width, repeated in ((512, True), (640, False)):
        with watch.watching() as seen:
            GroupScales(128, "packed", True).empty(torch.empty(5, width), 5, width)
        assert seen.all == repeated


def test_ops_of_others_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.is_repeated("group_fp8_quant") and not registry.is_repeated("block_fp8_gemm")
    monkeypatch.setitem(registry.CUDA_IMPLEMENTATIONS, "group_fp8_quant", pytest.raises)
    assert not registry.is_repeated("group_fp8_quant")


# ---- repeating -------------------------------------------------------------------------------------------------------


class Compiled:
    """In the place of Triton's compiled kernel; writes down what it is run with."""

    def __init__(self) -> None:
        self.runs: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.runs.append((grid, arguments))


class Kernel:
    arg_names = ("x", "codes", "scales", "n", "TILE")


class Op:
    """An op whose CUDA implementation launches a kernel on the codes and scales that it allocates, and counts its calls."""

    def __init__(self, **changes: Any) -> None:
        self.calls, self.compiled, self.changes = 0, Compiled(), changes

    def __call__(self, x: torch.Tensor, n: float) -> Any:
        self.calls += 1
        codes = x.new_empty(x.shape, dtype=torch.uint8)
        scales = GroupScales(128, "tma").empty(x, *x.shape)
        given = {"x": x, "codes": codes, "scales": scales, "n": n} | {
            name: change(x, codes, scales) for name, change in self.changes.items() if name in Kernel.arg_names
        }
        watch.note(Kernel, self.compiled, (3,), tuple(given.values()), {"TILE": (1, 2)})
        if "result" in self.changes:
            return self.changes["result"](x, codes, scales)
        return [codes, scales]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(repeats, "broken", "")


def rows(count: int) -> torch.Tensor:
    return torch.ones(count, 256)


def test_a_call_of_the_same_shape_launches_at_once() -> None:
    op = Op()
    run = repeats.repeating(op, (0,))
    first, x = run(rows(5), 0.5), rows(5)
    codes, scales = run(x, 0.5)
    assert op.calls == 1
    assert [(t.shape, t.stride(), t.dtype) for t in (codes, scales)] == [(t.shape, t.stride(), t.dtype) for t in first]
    # the padding after the last column, which kernels write to, is there
    assert scales.untyped_storage().nbytes() == 2 * 8 * 4
    assert op.compiled.runs == [((3, 1, 1), (x.data_ptr(), codes.data_ptr(), scales.data_ptr(), 0.5, (1, 2)))]
    assert {codes.data_ptr(), scales.data_ptr()}.isdisjoint(t.data_ptr() for t in first)


@pytest.mark.parametrize(
    "other",
    [
        lambda: (rows(6), 0.5),
        lambda: (rows(5), 0.25),
        lambda: (rows(5).double(), 0.5),
        lambda: (torch.ones(5, 512)[:, :256], 0.5),
        lambda: (torch.ones(5 * 256 + 1)[1:].view(5, 256), 0.5),
    ],
    ids=["rows", "number", "dtype", "strides", "alignment"],
)
def test_another_call_is_thought_through(other: Any) -> None:
    op = Op()
    run = repeats.repeating(op, (0,))
    run(rows(5), 0.5)
    run(*other())
    assert op.calls == 2 and not op.compiled.runs


def test_part_of_an_argument_is_found_again() -> None:
    op = Op(x=lambda x, codes, scales: x[:, 64:])
    run = repeats.repeating(op, (0,))
    run(rows(5), 0.5)
    x = rows(5)
    run(x, 0.5)
    assert op.calls == 1 and op.compiled.runs[0][1][0] == x.data_ptr() + 64 * 4


NOT_CLEAR = {
    "memory of its own": {"x": lambda x, codes, scales: torch.ones(3)},
    "what may hold an address": {"n": lambda x, codes, scales: object()},
    "an input returned": {"result": lambda x, codes, scales: [codes, x]},
    "outputs that share memory": {"result": lambda x, codes, scales: [codes, codes[1:]]},
    "part of a buffer": {"result": lambda x, codes, scales: codes[1:]},
}


@pytest.mark.parametrize("changes", NOT_CLEAR.values(), ids=NOT_CLEAR)
def test_what_is_not_clear_is_not_repeated(changes: dict[str, Any]) -> None:
    op = Op(**changes)
    run = repeats.repeating(op, (0,))
    for _ in range(3):
        run(rows(5), 0.5)
    assert op.calls == 3 and not op.compiled.runs and not repeats.broken


def test_two_parts_of_one_buffer_are_not_mixed_up() -> None:
    """A kernel's argument in the same memory as two of the call's: it may be made of either."""

    def implementation(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        calls.append((q, kv))
        out = torch.empty(3)
        watch.note(Kernel, compiled, (1,), (q, kv[:, :1], out, 1.0), {"TILE": (1,)})
        return out

    calls, compiled = [], Compiled()
    run = repeats.repeating(implementation, (0, 1))
    for _ in range(2):
        both = torch.ones(4, 8)
        run(both[:, :4], both[:, 4:])
    assert len(calls) == 2


def test_one_tensor_for_two_arguments_is_not_taken_for_one_argument() -> None:
    def implementation(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        out = torch.empty(3)
        watch.note(Kernel, compiled, (1,), (x, residual, out, 1.0), {"TILE": (1,)})
        return out

    calls, compiled = [], Compiled()
    run = repeats.repeating(implementation, (0, 1))
    x, residual = rows(4), rows(4)
    run(x, x)
    run(x, residual)
    for _, arguments in compiled.runs:
        assert arguments[:2] == (x.data_ptr(), residual.data_ptr())
    assert len(calls) + len(compiled.runs) == 2


def test_a_launch_that_fails_ends_repeating(caplog: pytest.LogCaptureFixture) -> None:
    op = Op()
    run = repeats.repeating(op, (0,))
    run(rows(5), 0.5)

    def fail(self: Any, arguments: Any) -> None:
        raise TypeError("function takes 5 arguments")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats.Repeat, "__call__", fail)
        assert len(run(rows(5), 0.5)) == 2
    assert "function takes 5 arguments" in repeats.broken and "prepared anew" in caplog.text
    run(rows(5), 0.5)
    assert op.calls == 3


def test_no_more_calls_are_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "MOST", 2)
    op = Op()
    run = repeats.repeating(op, (0,))
    for count in (1, 2, 3, 3, 1):
        run(rows(count), 0.5)
    assert op.calls == 4
