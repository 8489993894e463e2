# SPDX-License-Identifier: Apache-2.0
"""The warm-up of kernels: what it launches, when vLLM calls it, and that its keys are Triton's."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
fake_gpu.install()

import torch  # noqa: E402
import triton  # noqa: E402
from triton.runtime import jit  # noqa: E402

from tests.forked import in_a_fork  # noqa: E402
from vllm_fusion_plugin import report, seams, warmup  # noqa: E402
from vllm_fusion_plugin.kernels import mla_v_up_quant  # noqa: E402
from vllm_fusion_plugin.kernels.compile_keys import compile_key, keys_of  # noqa: E402
from vllm_fusion_plugin.kernels.launch import planning  # noqa: E402
from vllm_fusion_plugin.ops import calls, registry  # noqa: E402
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, LAYOUTS, GroupScales  # noqa: E402
from vllm_fusion_plugin.ops.rms_norm_quant import NormInputs  # noqa: E402
from vllm_fusion_plugin.plugin import _register_ops as register_ops  # noqa: E402

register_ops()
SILU_MUL = "silu_mul_group_fp8_quant"
GROUP = "group_fp8_quant"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(calls, "CALLS", {})
    monkeypatch.setattr(calls, "_recording", False)
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())
    monkeypatch.setattr(mla_v_up_quant, "_gpu", lambda device: mla_v_up_quant._Device(132, 232448, True))


@pytest.fixture
def launched(monkeypatch):
    """Keys of the launches on CPU tensors, which stand for the GPU's here, in order; nothing runs."""
    keys = []

    def launcher(kernel, grid):
        return lambda *args, **kwargs: keys.append(compile_key(kernel, args, kwargs))

    monkeypatch.setattr(jit.JITFunction, "__getitem__", launcher)
    return keys


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def make(op: str, *arguments) -> None:
    """Call an op as the dispatcher would with CUDA tensors."""
    calls.remembering(registry.SIGNATURES[op], registry.CUDA_IMPLEMENTATIONS[op])(*arguments)


def silu_mul(rows: int, width: int = 1024) -> tuple:
    return zeros(rows, 2 * width), 128, "tma", True, "native", "custom_op"


# ---- what is remembered and repeated ---------------------------------------------------------------------------------


def test_calls_that_differ_in_tokens_alone_are_one(launched):
    calls.record()
    for rows in (300, 5, 1):
        make(SILU_MUL, *silu_mul(rows))
    assert list(calls.CALLS.values()) == [300]
    make(SILU_MUL, *silu_mul(5, width=2048))
    assert len(calls.CALLS) == 2
    calls.record(False)
    make(SILU_MUL, *silu_mul(5, width=4096))
    assert len(calls.CALLS) == 2


def test_every_number_of_tokens_is_compiled(launched):
    calls.record()
    make(SILU_MUL, *silu_mul(300))
    x = zeros(300, 4096)
    make("rms_norm_group_fp8_quant", *NormInputs(x, zeros(4096), residual=x), 128, "tma", False, "custom_op")
    launched.clear()
    done = warmup.warm_up(2500)
    assert (done.calls, done.failed) == (2, ())
    assert done.launches == len(launched) < 20
    warm = set(launched)
    for tokens in (1, 2, 3, 4, 16, 17, 79, 80, 429, 430, 511, 513, 2047, 2048, 2049, 2500):
        make(SILU_MUL, *silu_mul(tokens))
    assert set(launched) == warm


def test_both_roundings_before_a_block_gemm_are_compiled(launched):
    """That of few tokens, and that of many, for every tile of theirs."""
    calls.record()
    rounding = "reciprocal_or_flashinfer"
    x = zeros(300, 1024)
    make(SILU_MUL, *silu_mul(300)[:-1], rounding)
    make(GROUP, x, 128, "tma", True, rounding)
    make("rms_norm_group_fp8_quant", *NormInputs(x, zeros(1024), residual=x), 128, "tma", True, rounding)
    launched.clear()
    assert warmup.warm_up(600).failed == ()
    warm = set(launched)
    for tokens in (1, 2, 5, 16, 31, 32, 33, 64, 300, 600):
        x = zeros(tokens, 1024)
        make(SILU_MUL, *silu_mul(tokens)[:-1], rounding)
        make(GROUP, x, 128, "tma", True, rounding)
        make("rms_norm_group_fp8_quant", *NormInputs(x, zeros(1024), residual=x), 128, "tma", True, rounding)
    assert set(launched) == warm


def test_as_many_tokens_as_a_call_had(launched):
    """More than the model's, where an op's rows are not tokens."""
    calls.record()
    make(SILU_MUL, *silu_mul(9000))
    launched.clear()
    warmup.warm_up(10)
    few = set(launched)
    make(SILU_MUL, *silu_mul(9000))
    assert set(launched) == few


def test_a_call_that_fails_does_not_stop_the_others(launched, monkeypatch, caplog):
    calls.record()
    make(SILU_MUL, *silu_mul(3))
    make(GROUP, zeros(3, 1024), 128, "row", False, "native")

    def fail(*arguments):
        if arguments[0].device.type != "meta":
            raise torch.OutOfMemoryError("no room")
        return implementation(*arguments)

    implementation = registry.CUDA_IMPLEMENTATIONS[SILU_MUL]
    monkeypatch.setitem(registry.CUDA_IMPLEMENTATIONS, SILU_MUL, fail)
    launched.clear()
    with caplog.at_level(logging.WARNING):
        warmup.before_serving()
    assert {key[0].rpartition(".")[2] for key in launched} == {"group_quant"}
    assert f"{SILU_MUL}: OutOfMemoryError: no room" in caplog.text
    assert any("OutOfMemoryError" in note for note in report.RECORDER.report.notes)
    assert not calls.recording()


# ---- when ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def monitor(monkeypatch):
    """vLLM's JIT monitor, that only notes what happens; restored afterwards."""
    module = pytest.importorskip("vllm.utils.jit_monitor", reason="this vLLM has no JIT monitor")
    order = []

    def activate(*, mode="warn", verbose=False):
        order.append(f"monitor: {mode}")

    monkeypatch.setattr(module, "activate", activate)
    return order


@in_a_fork  # the warm-up stays installed
def test_before_the_monitor(monitor, launched):
    from vllm.v1.worker import gpu_worker

    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=600),
        kernel_config=SimpleNamespace(enable_jit_warmup=True),
    )
    warmup.install(config)
    warmup.install(config)  # for a second engine
    assert calls.recording()
    make(SILU_MUL, *silu_mul(3))
    launched.clear()
    worker = SimpleNamespace(
        vllm_config=config,
        observability_config=SimpleNamespace(jit_monitor_mode="error", jit_monitor_verbose=False),
    )
    launch = jit.JITFunction.__getitem__

    def noted(kernel, grid):
        monitor.append("launch")
        return launch(kernel, grid)

    jit.JITFunction.__getitem__ = noted  # restored with `launched`
    gpu_worker.Worker._maybe_activate_jit_monitor(worker)
    assert monitor == ["launch"] * len(launched) + ["monitor: error"]
    assert launched and not calls.recording()
    [note] = report.RECORDER.report.notes
    assert note.startswith(f"warm-up: {len(launched)} launches of 1 calls of fused ops, ")


def test_the_worker_arms_its_monitor_last():
    """What `hook_warm_up` relies on."""
    import inspect

    from vllm.v1.worker import gpu_worker

    source = inspect.getsource(gpu_worker.Worker)
    assert source.count("from vllm.utils.jit_monitor import activate") == 1
    arming = "self._maybe_activate_jit_monitor()"
    warming = source[: source.index(arming if arming in source else "jit_monitor import activate")]
    assert "kernel_warmup(self)" in warming
    assert "self.model_runner.capture_model()" in warming


@in_a_fork  # as above
def test_what_fails_is_told_and_vllm_goes_on(monitor, monkeypatch, caplog):
    from vllm.utils import jit_monitor

    monkeypatch.setattr(warmup, "warm_up", lambda most: 1 / 0)
    warmup.install(SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=8)))
    with caplog.at_level(logging.WARNING):
        jit_monitor.activate(mode="error")
    assert monitor == ["monitor: error"]
    assert "ZeroDivisionError" in caplog.text


@in_a_fork  # as above
def test_a_vllm_without_a_seam_is_told(monkeypatch, caplog):
    monkeypatch.setattr(seams, "hook_warm_up", lambda before_serving: "this vLLM has no such thing")
    with caplog.at_level(logging.WARNING):
        warmup.install(SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=8)))
    assert "this vLLM has no such thing" in caplog.text
    assert not calls.recording()


# ---- keys ------------------------------------------------------------------------------------------------------------


def triton_key(kernel, args, kwargs) -> str:
    _, key_cache, *_, binder = kernel.device_caches[0]
    _, specialization, options = binder(*args, **kwargs)
    return jit.compute_cache_key(key_cache, specialization, options)


def test_keys_are_tritons():
    """Two launches have one key of ours if and only if they have one of Triton's."""
    assert triton.runtime.driver.active.get_current_target().arch == 90
    launches = []
    with planning() as plan:
        for tokens in (1, 2, 3, 5, 16, 64, 513, 1030, 4096, 9000):
            for width in (512, 640, 4096):
                x, weight = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta"), None
                strided = torch.empty(tokens, width + 8, dtype=torch.float16, device="meta")[:, 8:]
                for rows in (x, strided):
                    for layout in LAYOUTS:
                        by_rows = ["custom_op_or_flashinfer"] if rows is x and layout != "packed" else []
                        for rounding in ("custom_op", *by_rows):
                            registry.CUDA_IMPLEMENTATIONS[GROUP](rows, 128, layout, layout == "packed", rounding)
                    for residual in (None, rows):
                        norm = NormInputs(rows, weight, residual=residual)
                        scale = torch.empty(1, device="meta")
                        registry.CUDA_IMPLEMENTATIONS["rms_norm_static_fp8_quant"](*norm, scale, "native")
            attn = torch.empty(tokens, 16, 512, dtype=torch.bfloat16, device="meta")
            w = torch.empty(16, 512, 128, dtype=torch.bfloat16, device="meta")
            for tma in (True, False):
                codes, scales = (
                    attn.new_empty(tokens, 2048, dtype=FP8_DTYPE),
                    GroupScales(128, "tma" if tma else "row").empty(attn, tokens, 2048),
                )
                weights = w if tma else w.transpose(1, 2).contiguous().transpose(1, 2)
                registry.CUDA_IMPLEMENTATIONS["mla_v_up_group_fp8_quant"](
                    attn, weights, codes, scales, 128, True, "custom_op"
                )
        launches = plan.launches
    pairs = {
        (compile_key(kernel, args, kwargs), (kernel.fn.__module__, triton_key(kernel, args, dict(kwargs))))
        for kernel, args, kwargs in launches
    }
    assert len(pairs) > 40
    assert len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs}) == len(pairs)


def test_one_kernel_a_call():
    made, _ = calls.describe(registry.SIGNATURES[SILU_MUL], silu_mul(7))
    assert len(keys_of(lambda: registry.CUDA_IMPLEMENTATIONS[SILU_MUL](*made.at(7, warmup.META)))) == 1
