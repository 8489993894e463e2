# SPDX-License-Identifier: Apache-2.0
"""vLLM's own ops beside ours in verify mode: called as this vLLM registers them, and where it has them. On fake CUDA
tensors; their bytes are compared by kernels/test_verify_gpu.py."""

from __future__ import annotations

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from vllm_fusion_plugin import roundings  # noqa: E402
from vllm_fusion_plugin.ops import group_quant, registry, replaced, silu_mul_quant  # noqa: E402, F401
from vllm_fusion_plugin.ops.gated_rms_norm_quant import gated_rms_norm_group_fp8_quant_reference  # noqa: E402
from vllm_fusion_plugin.ops.quant import GroupScales, group_fp8_quant_reference  # noqa: E402
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs  # noqa: E402

ACT, NORM, ADD_NORM = "silu_and_mul", "rms_norm", "fused_add_rms_norm"
GROUP, TOKEN, STATIC = (
    "per_token_group_fp8_quant",
    "dynamic_per_token_scaled_fp8_quant",
    "static_scaled_fp8_quant",
)


def run(op: str, *arguments) -> tuple[set[str], list[torch.Tensor]]:
    with replaced.vllms_ops() as ran:
        result = registry.REFERENCES[op](*arguments)
    return ran, [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.fixture
def x():
    with FakeTensorMode():
        yield torch.empty(40, 256, dtype=torch.bfloat16, device="cuda")


def test_ops_run_where_vllm_has_them(x):
    group, act = roundings.of(roundings.GROUP_QUANT).name, roundings.of(roundings.SILU_MUL).name
    scale, weight = x.new_empty(1, dtype=torch.float32), x.new_empty(256)
    for layout in ("row", "column", "tma"):
        ran, (codes, scales) = run("group_fp8_quant", x, 128, layout, False, group)
        assert ran == {GROUP} and codes.shape == (40, 256)
        assert scales.stride() == GroupScales(128, layout).empty(x, 40, 256).stride()
    ran, results = run("silu_mul_group_fp8_quant", x, 128, "row", False, act, group, True)
    assert ran == {ACT, GROUP} and [tuple(t.shape) for t in results] == [(40, 128), (40, 1), (40, 128)]
    assert run("silu_mul_token_fp8_quant", x, scale, act, "custom_op")[0] == {ACT, TOKEN}
    assert run("silu_mul_static_fp8_quant", x, scale, act, "custom_op")[0] == {ACT, STATIC}
    norm = NormInputs(x, weight, norm_rounding="custom_op")
    assert run("rms_norm_static_fp8_quant", *norm, scale, "custom_op")[0] == {NORM, STATIC}
    ran, results = run("rms_norm_token_fp8_quant", *norm._replace(residual=x, keep_norm=True), None, "custom_op")
    assert ran == {ADD_NORM, TOKEN} and len(results) == 4


def test_plain_torch_runs_where_it_has_none(x):
    group = roundings.of(roundings.GROUP_QUANT).name
    norm = NormInputs(x, x.new_empty(256))  # as Inductor compiles it
    assert run("rms_norm_group_fp8_quant", *norm, 128, "row", False, group)[0] == {GROUP}
    assert run("silu_mul_group_fp8_quant", x, 128, "row", False, "native", group)[0] == {GROUP}
    assert run("silu_mul_token_fp8_quant", x, None, "native", "native")[0] == set()
    other = next(rounding for rounding in ("custom_op", "reciprocal") if rounding != group)
    assert run("group_fp8_quant", x, 128, "row", False, other)[0] == set()
    assert run("group_fp8_quant", x, 128, "packed", True, group)[0] == set()
    heads, weight = x.view(40, 2, 128), x.new_empty(128)
    with replaced.vllms_ops() as ran:
        gated_rms_norm_group_fp8_quant_reference(heads, heads, weight, 1e-6, 2, GroupScales(128), quant_rounding=group)
    assert ran == {GROUP}


def test_references_are_plain_torch_otherwise():
    x = torch.randn(4, 128).bfloat16()
    expected = group_fp8_quant_reference(x, GroupScales(128), "custom_op")
    with replaced.vllms_ops() as ran:  # on a CPU
        found = group_fp8_quant_reference(x, GroupScales(128), "custom_op")
    assert not ran and all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))
