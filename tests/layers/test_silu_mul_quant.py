# SPDX-License-Identifier: Apache-2.0
"""MLPs of vLLM's model code, outside of compiled code, with SiLU·mul and quantiser fused and without: real linear layers,
methods and activations, and on CPU the demo's GEMM for FP8 weights in blocks."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.platforms import current_platform

from vllm_fusion_plugin import compat, plugin, report, seams, settings
from vllm_fusion_plugin.kernels.rounding import FLASHINFER_ROWS
from vllm_fusion_plugin.layers import quantised_input
from vllm_fusion_plugin.layers import silu_mul_quant as layer
from vllm_fusion_plugin.ops import block_gemm
from vllm_fusion_plugin.ops.quant import GroupScales, group_fp8_quant_reference

from . import mlp_layer
from .mlp_layer import CLASSES, HIDDEN, WIDTH, make, record, rows


@pytest.fixture(scope="module", autouse=True)
def groups():
    yield
    mlp_layer.no_rank()


@pytest.fixture(autouse=True)
def config(monkeypatch):
    mlp_layer.multiply_on_cpu(monkeypatch)
    monkeypatch.setattr(layer, "_problem", "")
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())
    with mlp_layer.engine() as made, torch.inference_mode():
        yield made


@pytest.fixture
def fused_rows(monkeypatch) -> list[int]:
    """Rows of each call of our op."""
    made: list[int] = []
    op = layer.silu_mul_group_fp8_quant

    def counted(x, *args, **kwargs):
        made.append(len(x))
        return op(x, *args, **kwargs)

    monkeypatch.setattr(layer, "silu_mul_group_fp8_quant", counted)
    return made


def attached(config: Any, mlp: Any) -> Any:
    layer.attach(model_of(mlp), config)
    return mlp


def model_of(mlp: Any) -> torch.nn.Module:
    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": mlp})])})


def reasons(config: Any, mlp: Any, of: report.EngineRecord | None = None) -> list[str]:
    found, missed = layer.boundaries(model_of(mlp), config, of or record())
    assert not found
    return [m.reason for m in missed]


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.view(torch.int16), want.view(torch.int16))


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_bytes_of_vllm(name, config, fused_rows):
    mlp = make(name)
    counts = (1, 2, FLASHINFER_ROWS - 1, FLASHINFER_ROWS, 33)
    want = [mlp(rows(count)) for count in counts]
    assert fused_rows == []
    attached(config, mlp)
    assert fused_rows == [1, FLASHINFER_ROWS]  # tried out
    fused_rows.clear()
    for count, expected in zip(counts, want, strict=True):
        assert same(mlp(rows(count)), expected)
    assert fused_rows == [*counts]
    (found,), missed = layer.boundaries(model_of(mlp), config, record())
    assert not missed
    assert (found.pass_name, found.module) == (layer.NAME, "layers.0.mlp")
    assert found.pattern.startswith("silu_mul[") and "+group128[" in found.pattern


def test_bytes_of_vllms_quantising_op(config, fused_rows):
    """On CPU stood in for, on both sides alike."""
    mlp = mlp_layer.with_custom_quantisers(make("DeepseekV2MLP"))
    want = mlp(rows(5))
    attached(config, mlp)
    assert same(mlp(rows(5)), want)
    assert fused_rows[-1] == 5
    assert "native" not in mlp.act_fn._forward_method.case.quantiser.rounding


def test_vllms_quantiser_is_not_called(config, monkeypatch):
    mlp = attached(config, make("DeepseekV2MLP"))
    kernel = mlp.down_proj.quant_method.fp8_linear
    if not kernel.apply_input_quant:
        pytest.skip("this machine's kernel quantises inside")
    quantise, called = kernel.quant_fp8, []
    monkeypatch.setattr(kernel, "quant_fp8", lambda *args, **kwargs: called.append(args) or quantise(*args, **kwargs))
    mlp(rows(3))
    assert called == []
    with mlp_layer.left_to_vllm():
        mlp(rows(3))
    assert len(called) == 1


def test_codes_are_multiplied_by_the_scales_they_carry(config, monkeypatch):
    mlp = make("Qwen2MoeMLP")
    want = mlp(rows(4))
    op = layer.silu_mul_group_fp8_quant

    def doubled(*args: Any, **kwargs: Any) -> Any:  # in place: a copy of one row of aligned scales has other strides
        return [part.mul_(2) if part.dtype == torch.float32 else part for part in op(*args, **kwargs)]

    monkeypatch.setattr(layer, "silu_mul_group_fp8_quant", doubled)
    assert same(attached(config, mlp)(rows(4)), want * 2)


def test_a_bias_is_added(config):
    mlp = make("DeepseekV2MLP")
    mlp.down_proj.bias = torch.nn.Parameter(rows(1)[0], requires_grad=False)
    want = mlp(rows(4))
    assert same(attached(config, mlp)(rows(4)), want)


def test_rows_of_three_dimensions_are_vllms(config, fused_rows):
    mlp = make("DeepseekV2MLP")
    x = rows(6).view(2, 3, HIDDEN)
    want = mlp(x)
    attached(config, mlp)
    fused_rows.clear()
    assert same(mlp(x), want)
    assert fused_rows == []


def test_no_rows(config):
    mlp = make("DeepseekV2MLP")
    if not mlp_layer.is_cpu():
        pytest.skip("not every kernel takes none")
    assert attached(config, mlp)(rows(0)).shape == (0, HIDDEN)


# ---- which -----------------------------------------------------------------------------------------------------------


def test_compiled_code_is_left_alone(config, monkeypatch):
    """But shared experts inside of vLLM's MoE op."""
    compiled, eager, shared = (make("DeepseekV2MLP") for _ in range(3))
    runner = torch.nn.Module()
    runner._shared_experts = type("SharedExperts", (), {"_layer": shared})()
    model = torch.nn.ModuleDict({"compiled": model_of(compiled), "draft": model_of(eager)})
    model.compiled.layers[0]["shared"], model.compiled.layers[0]["experts"] = shared, runner
    model.compiled.do_not_compile, model.draft.do_not_compile = False, True
    for on_gpu in (False, True):
        monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self, on_gpu=on_gpu: on_gpu)
        layer.attach(model, config)
        replaced = [isinstance(mlp.act_fn._forward_method, layer.Mlp) for mlp in (compiled, eager, shared)]
        assert replaced == [False, True, on_gpu]
    found, missed = layer.boundaries(model, config, record())
    assert not missed and [f.module for f in found] == ["layers.0.shared", "layers.0.mlp"]
    config.compilation_config.mode = importlib.import_module("vllm.config").CompilationMode.STOCK_TORCH_COMPILE
    assert layer.boundaries(model, config, record()) == ([], [])


def test_attaching_again_changes_nothing(config):
    mlp = attached(config, make("DeepseekV2MLP"))
    before = mlp.act_fn._forward_method
    assert isinstance(before, layer.Mlp)
    assert attached(config, mlp).act_fn._forward_method is before


def test_traced_code_is_vllms(config, fused_rows):
    mlp = attached(config, make("DeepseekV2MLP"))
    fused_rows.clear()
    torch.compile(mlp.act_fn, backend="eager")(torch.ones(2, 2 * WIDTH, dtype=torch.bfloat16, device=rows(1).device))
    assert fused_rows == []


def replace_down_proj(mlp: Any) -> None:
    """As vLLM's LoRA does."""

    class RowParallelLinearWithLoRA(torch.nn.Module):
        def __init__(self, base_layer: Any) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x: torch.Tensor) -> Any:
            assert x.dtype == torch.bfloat16
            return self.base_layer(x)

    mlp.down_proj = RowParallelLinearWithLoRA(mlp.down_proj)


def unquantised(mlp: Any) -> None:
    mlp.down_proj.quant_method = SimpleNamespace(apply=lambda layer, x, bias: x @ x.new_ones(WIDTH, HIDDEN))


def own_kernel(mlp: Any) -> None:
    kernel = mlp.down_proj.quant_method.fp8_linear
    kind = type(kernel)
    kernel.__class__ = type("OwnWay", (kind,), {"apply_weights": lambda self, *args: kind.apply_weights(self, *args)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_down_proj, "LoRA reads what SiLU·mul writes, unquantised"),
        (unquantised, "RowParallelLinear has no quantised kernel"),
        (own_kernel, "OwnWay quantises in a way of its own"),
        (lambda mlp: setattr(mlp.down_proj, "input_is_parallel", False), "down_proj takes its part of the rows"),
        (lambda mlp: mlp.down_proj.register_forward_pre_hook(lambda *args: None), "down_proj has hooks"),
        (lambda mlp: setattr(mlp.down_proj.quant_method.fp8_linear, "use_triton", True), "quantises with another op"),
        (lambda mlp: setattr(mlp.down_proj, "input_size_per_partition", WIDTH - 64), "groups of 128 in rows of 320"),
        (lambda mlp: setattr(mlp.down_proj, "params_dtype", torch.float32), "SiLU·mul reads torch.float32"),
    ],
)
def test_what_it_is_not_made_for(change, reason, config, fused_rows):
    mlp = make("DeepseekV2MLP")
    if "another op" in reason and not mlp.down_proj.quant_method.fp8_linear.apply_input_quant:
        pytest.skip("this machine's kernel quantises inside")
    change(mlp)
    want = mlp(rows(3)) if "part of" not in reason else None
    attached(config, mlp)
    assert want is None or same(mlp(rows(3)), want)
    assert fused_rows == []
    assert [reason in said for said in reasons(config, mlp)] == [True]


def test_a_linear_layer_that_is_replaced_later(config, fused_rows):
    mlp = make("DeepseekV2MLP")
    want = mlp(rows(3))
    assert same(attached(config, mlp)(rows(3)), want)
    fused_rows.clear()
    replace_down_proj(mlp)
    assert same(mlp(rows(3)), want)
    assert fused_rows == []


def test_an_mlp_that_comes_later(config):
    assert "came into the model after" in reasons(config, make("LlamaMLP"))[0]


def test_an_activation_of_two_mlps(config, fused_rows):
    mlps = [make("DeepseekV2MLP") for _ in range(2)]
    mlps[1].act_fn = mlps[0].act_fn
    want = [mlp(rows(3)) for mlp in mlps]
    layer.attach(torch.nn.ModuleList(mlps), config)
    assert all(same(mlp(rows(3)), expected) for mlp, expected in zip(mlps, want, strict=True))
    assert fused_rows == []
    assert "its activation is others' too" in reasons(config, mlps[0])[0]


# ---- failures --------------------------------------------------------------------------------------------------------


def test_an_op_that_fails_is_left_to_vllm(config, monkeypatch, caplog):
    mlp = make("DeepseekV2MLP")
    want = mlp(rows(3))
    attached(config, mlp)(rows(3))

    def broken(*args, **kwargs):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(layer, "silu_mul_group_fp8_quant", broken)
    for _ in range(2):
        assert same(mlp(rows(3)), want)
    assert [r for r in caplog.messages if "out of shared memory" in r] == caplog.messages[-1:]
    assert reasons(config, mlp) == ["RuntimeError: out of shared memory"]


def test_a_gemm_that_fails_when_it_is_tried_out(config, monkeypatch):
    """Once it has codes, nothing could bring the rows back."""
    mlp = make("DeepseekV2MLP")
    want = mlp(rows(3))

    def broken(kernel, layer, codes, *args):
        if len(codes) == 1:
            raise RuntimeError("no kernel for one row")
        return rows(3)

    monkeypatch.setattr(quantised_input, "product", broken)
    assert same(attached(config, mlp)(rows(3)), want)
    assert reasons(config, mlp) == ["RuntimeError: no kernel for one row"]


# ---- model code ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reader"),
    [
        ("x = self.act_fn(y)\n x, _ = self.down_proj(x)\n return x", "down_proj"),
        ("x = self.act_fn(x)\n return self.w2(x)", "w2"),
        ("return self.w2(self.act_fn(self.w13(x)[0]))[0]", "w2"),
        (
            "x = maybe_fused_act_quant(self.act_fn, x, self.down_proj)\n x, _ = self.down_proj(x)\n return x",
            "down_proj",
        ),
        ("y = self.act_fn(x)\n z, _ = self.down_proj(y)\n return z + y", ""),
        ("y = self.act_fn(x)\n y = y * 2\n z, _ = self.down_proj(y)\n return z", ""),
        ("y = self.act_fn(x)\n if self.fast:\n  return self.fast(y, self.down_proj)\n return self.down_proj(y)", ""),
        ("y = self.act_fn(x)\n z, _ = self.down_proj(y, scale=y.max())\n return z", ""),
        ("y = self.act_fn(x)\n z, _ = self.down_proj(y) + y\n return z", ""),
        ("y = self.act_fn(x)\n z = other(y)\n return z", ""),
        ("y = self.act_fn(x) + 1\n z = self.down_proj(y)\n return z", ""),
        ("y = self.act_fn(x)\n z = self.down_proj(y)\n return z + self.act_fn(x)", ""),
        ("return self.down_proj(x)", ""),
    ],
)
def test_which_layer_reads_the_activation(body, reader):
    assert layer.reader_in(f"def forward(self, x):\n {body}\n", "act_fn") == reader


@pytest.mark.parametrize(
    "name",
    ["llama.LlamaMLP", "qwen2.Qwen2MLP", "qwen2_moe.Qwen2MoeMLP", "deepseek_v2.DeepseekV2MLP", "glm4_moe.Glm4MoeMLP"],
)
def test_vllms_mlps_are_known(name):
    module, _, mlp = name.partition(".")
    found = layer._reader_of(getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), mlp), "act_fn")
    assert isinstance(found, layer.Reader) and found.name == "down_proj"


def test_other_model_code_is_left_to_vllm(config):
    class Scaled(torch.nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.gate_up_proj, self.act_fn, self.down_proj = mlp.gate_up_proj, mlp.act_fn, mlp.down_proj

        def forward(self, x):
            y = self.act_fn(self.gate_up_proj(x)[0])
            return self.down_proj(y * 2)[0]

    mlp = Scaled(make("DeepseekV2MLP"))
    want = mlp(rows(3))
    assert same(attached(config, mlp)(rows(3)), want)
    assert reasons(config, mlp) == ["in Scaled.forward, more than a linear layer may read what act_fn returns"]


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant", "layout"),
    [
        ({}, "row"),
        ({"column_major_scales": True}, "column"),
        ({"column_major_scales": True, "tma_aligned_scales": True, "use_ue8m0": True}, "tma"),
        ({"column_major_scales": True, "use_ue8m0": True, "packs": True}, "packed"),
    ],
)
def test_layout_of_the_kernels_scales(quant, layout, monkeypatch):
    def forward_cuda(): ...

    how = {"static": False, "is_group_quant": True, "group_size": 128, "column_major_scales": False}
    how |= {"tma_aligned_scales": False, "use_ue8m0": False, "_forward_method": forward_cuda} | quant
    monkeypatch.setattr(compat, "packs_scales", lambda layer: getattr(layer, "packs", False))
    kernel = SimpleNamespace(quant_fp8=type("QuantFP8", (), how)(), use_triton=False)
    found = quantised_input._of_layer(kernel)
    assert found.scales == GroupScales(128, layout, how["use_ue8m0"])
    kernel.quant_fp8.group_size = 96
    assert "groups of 64 or 128" in quantised_input._of_layer(kernel)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_dynamic_kernel(batch_invariant, config, monkeypatch):
    """vLLM's kernel that chooses by rows, around plain torch: it quantises as FlashInfer below 32 rows."""
    flashinfer = importlib.import_module("vllm.model_executor.kernels.linear.scaled_mm.flashinfer")
    if compat.why_dynamic_gemm_is_unknown(FLASHINFER_ROWS):
        pytest.skip("this vLLM has no such op")
    if torch.cuda.is_available():
        pytest.skip("on a GPU, test_silu_mul_quant_gpu.py runs the kernel itself")
    monkeypatch.setattr(compat, "batch_invariant", lambda: batch_invariant)
    mlp = make("DeepseekV2MLP")
    kernel = mlp.down_proj.quant_method.fp8_linear
    kernel.__class__ = getattr(flashinfer, quantised_input.DYNAMIC)
    kernel.fallback = SimpleNamespace(use_deep_gemm_e8m0=True)
    quantiser = quantised_input.quantiser_of(mlp.down_proj)
    assert quantiser.scales == GroupScales(128, "tma", True)
    assert quantiser.rounding.endswith("_or_flashinfer") != batch_invariant

    def whole(self, A, B, As, Bs):
        codes, scales = group_fp8_quant_reference(A, *quantiser)
        return block_gemm.block_fp8_gemm_reference(codes, scales, B, Bs, True, 0 if batch_invariant else 32)

    monkeypatch.setattr(kernel.__class__, "apply_block_scaled_mm", whole)
    counts = (1, FLASHINFER_ROWS - 1, FLASHINFER_ROWS, 33)
    want = [mlp(rows(count)) for count in counts]
    attached(config, mlp)
    monkeypatch.setattr(kernel.__class__, "apply_block_scaled_mm", None)
    for count, expected in zip(counts, want, strict=True):
        assert same(mlp(rows(count)), expected)


def test_a_weight_that_the_dynamic_gemm_does_not_take(config):
    flashinfer = importlib.import_module("vllm.model_executor.kernels.linear.scaled_mm.flashinfer")
    linear = make("DeepseekV2MLP").down_proj
    kernel = linear.quant_method.fp8_linear
    kernel.__class__ = getattr(flashinfer, quantised_input.DYNAMIC)
    kernel.fallback = SimpleNamespace(use_deep_gemm_e8m0=True)
    linear.weight = torch.nn.Parameter(linear.weight[:, :200], requires_grad=False)
    assert "the block GEMM: codes are 200 wide" in quantised_input.quantiser_of(linear)


# ---- engines ---------------------------------------------------------------------------------------------------------


def test_vllms_cpu_engine_is_left_alone_unless_asked_for(config, monkeypatch):
    for value in ("", "0", "1"):
        monkeypatch.setenv(settings.ENV_CPU, value)
        assert bool(plugin._why_cpu_is_left()) == (mlp_layer.is_cpu() and value != "1")


def test_the_setting_leaves_it_to_vllm(config):
    of = record()
    of.mlps_left = plugin._why_left(settings.Settings(mlp_silu_mul_quant=False), "mlp_silu_mul_quant")
    assert reasons(config, make("DeepseekV2MLP"), of) == ["off: mlp_silu_mul_quant=false"]
    assert reasons(config, make("DeepseekV2MLP"), report.EngineRecord())[0].startswith(
        "fusions of layers are put in place"
    )


class Worker:
    """What a WorkerWrapperBase holds."""

    def __init__(self, config: Any, mlp: Any) -> None:
        self.vllm_config, self.model_runner = config, SimpleNamespace(model=None, drafter=None)
        self.mlp, self.called = mlp, []

    def load_model(self, **kwargs: Any) -> str:
        self.called.append(kwargs)
        self.model_runner.model = model_of(self.mlp)
        return "loaded"

    def compile_or_warm_up_model(self) -> str:
        return "warm"


def test_a_worker_that_compiles_nothing(config, monkeypatch, fused_rows):
    """From vLLM's wrapper of workers to the report."""
    base = importlib.import_module("vllm.v1.worker.worker_base")
    vllm_plugins = importlib.import_module("vllm.plugins")
    monkeypatch.setattr(vllm_plugins, "load_general_plugins", vllm_plugins.load_general_plugins)

    class Wrapper:
        def init_device(self) -> None:
            self.worker = Worker(config, make("Qwen2MoeMLP"))

    monkeypatch.setattr(base, "WorkerWrapperBase", Wrapper)
    monkeypatch.setattr(plugin, "_off", "")
    monkeypatch.setenv(settings.ENV_CPU, "1")
    monkeypatch.setattr(config, "parallel_config", SimpleNamespace(rank=0))
    warmed: list[int] = []
    for _ in range(2):
        seams.hook_model_load(plugin.model_loaded, lambda: warmed.append(1))
    wrapper = Wrapper()
    wrapper.init_device()
    worker = wrapper.worker
    assert worker.load_model(load_dummy_weights=True) == "loaded" and worker.called == [{"load_dummy_weights": True}]
    assert worker.compile_or_warm_up_model() == "warm" and warmed == [1]
    fused_rows.clear()
    worker.mlp(rows(2))
    assert fused_rows == [2]
    engine = report.RECORDER.engine(compat.engine_owner(config))
    assert engine.experts_left == engine.mlps_left == ""
    (outside,) = plugin.outside_of_graphs(worker, engine)
    assert [(f.pass_name, f.module) for f in outside.found] == [(layer.NAME, "layers.0.mlp")]


def test_what_fails_after_loading_is_logged(monkeypatch, caplog):
    def broken() -> None:
        raise RuntimeError("no such model")

    worker = SimpleNamespace(load_model=lambda: "loaded")
    seams._then(worker, "load_model", broken)
    seams._then(worker, "compile_or_warm_up_model", broken)
    assert worker.load_model() == "loaded"
    assert "after load_model: RuntimeError: no such model" in caplog.text
