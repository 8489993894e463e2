# SPDX-License-Identifier: Apache-2.0
"""Everything that depends on which vLLM is installed, and every vLLM internal that we reach into.

Each entry: what it does, why, since when, and when it can go. Nothing else in the package asks for a version. What is about
engines, their compile caches and their workers is in compat_engine.py, by the same rules; the rest is here.
Read against 0.20.2, 0.26.0, 0.32.0 and 0.33.0. Features are probed, not derived from version numbers.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

logger = logging.getLogger("vllm.fusion_plugin")

STOCK_PASS_MANAGER = "vllm.compilation.passes.pass_manager.PostGradPassManager"

# Ops that quantise inside, by the name they have in the graph, and what to tell a user who looks for a fusion there.
# Until upstream shows the quantiser in the graph (or our passes replace the whole op).
_FLASHINFER_GEMM = (
    "FlashInfer's block-scaled GEMM quantises its input inside one opaque op, so there is no quantiser in the graph to fuse "
    "with; VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER=0 selects a GEMM that takes quantised input"
)
OPAQUE_QUANTISERS = {
    "vllm.dynamic_flashinfer_deepgemm_blockscale_gemm": _FLASHINFER_GEMM,
    "vllm.flashinfer_fp8_blockscale_gemm": _FLASHINFER_GEMM,
}

# Ops with whole MLPs inside: their own quantisers, too, where the experts are quantised.
_EXPERTS = "experts run inside vLLM's opaque MoE op, where no graph pass reaches"
OPAQUE_MLPS = {
    "vllm.moe_forward": _EXPERTS,
    "vllm.moe_forward_shared": (
        "experts and shared experts run inside vLLM's opaque MoE op, where no graph pass reaches"
    ),
    "vllm.fused_experts": _EXPERTS,
}

# vLLM's own fused ops: what they fuse, and the pass of ours that stands where vLLM's pass with them stood. Model code calls
# them too (LlamaMLP, since 0.33).
_ACT, _NORM = "ActivationQuantFusionPass", "RMSNormQuantFusionPass"
FUSED_BY_VLLM = {
    "_C.silu_and_mul_quant": ("silu_mul+static", _ACT),
    "_C.silu_and_mul_per_block_quant": ("silu_mul+group", _ACT),
    "_C.silu_and_mul_nvfp4_quant": ("silu_mul+nvfp4", _ACT),
    "_C.situ_and_mul_quant": ("situ_mul+quantiser", _ACT),
    "_C.rms_norm_static_fp8_quant": ("rms_norm+static", _NORM),
    "_C.fused_add_rms_norm_static_fp8_quant": ("fused_add_rms_norm+static", _NORM),
    "_C.rms_norm_dynamic_per_token_quant": ("rms_norm+token", _NORM),
    "_C.rms_norm_per_block_quant": ("rms_norm+group", _NORM),
}

# What a Triton kernel that quantises fuses with its quantiser, by a part of its name (utils/fp8_utils.py, layers/fusion).
FUSED_IN_TRITON = {
    "silu_mul": ("silu_mul+quantiser", _ACT),
    "relu_squared": ("relu2+static", _ACT),
    "rms_norm": ("rms_norm+quantiser", _NORM),
}

# Passes that can be left out by one of vLLM's flags.
PASS_FLAGS = {
    _ACT: "fuse_act_quant",
    _NORM: "fuse_norm_quant",
    "AttnQuantFusionPass": "fuse_attn_quant",
    "MLAAttnQuantFusionPass": "fuse_attn_quant",
}

# Activations of vLLM by what their op is called, in words. Names of layers (`GeluAndMul`) are told as they are.
ACTIVATION_OPS = {
    "_C.silu_and_mul": "SiLU·mul",
    "_C.silu_and_mul_with_clamp": "clamped SwiGLU (swiglu_limit)",
    "_C.mul_and_silu": "mul·SiLU, up first (MulAndSilu)",
    "_C.gelu_and_mul": "GELU·mul",
    "_C.gelu_tanh_and_mul": "GELU·mul (gelu_tanh)",
    "_C.relu_squared": "relu2",
    "_C.situ_and_mul": "SiTU·mul",
    "_C.swigluoai_and_mul": "clamped SwiGLU (SwigluOAIAndMul)",
    "_C.fatrelu_and_mul": "FATReLU·mul",
}

# Norms in one op with the all-reduce before them: what fuse_allreduce_rms makes with FlashInfer, before any quantiser is
# looked for. Where among its results the normed rows are: in the place of what was reduced, or of `norm_out`. Since before
# 0.20; can go when vLLM's op quantises groups, too.
ALLREDUCE_NORMS = {"vllm.flashinfer_trtllm_fused_allreduce_norm": (1, 3)}


# ---- graph -----------------------------------------------------------------------------------------------------------


def called_op(node: fx.Node) -> str:
    """ "namespace.name" of the op that a node calls, looking through auto_functionalized; the target's name otherwise."""
    target: Any = node.target
    if "auto_functionalized" in str(target) and node.args:
        target = node.args[0]
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.replace("::", ".")
    return str(getattr(target, "__name__", target))


def triton_kernel_name(node: fx.Node) -> str:
    """The function behind a `triton_kernel_wrapper` node, which has its number in torch's table of kernels."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    index: Any = node.kwargs["kernel_idx"]
    kernel: Any = kernel_side_table.get_kernel(index)
    while not hasattr(kernel, "__name__") and hasattr(kernel, "fn"):  # autotuners and heuristics hold the function
        kernel = kernel.fn
    return str(getattr(kernel, "__name__", "unknown"))


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shapes agree for every value of the symbols in them."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return a.dim() == b.dim() and all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether strides agree for every value of the symbols in them; strides of dimensions of size 1 do not count."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(
        statically_known_true(x == y) or statically_known_true(size == 1)
        for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


# ---- ops and layers --------------------------------------------------------------------------------------------------


@functools.cache
def load_custom_ops() -> None:
    """Make torch.ops._C.* known. `vllm._custom_ops` does so in every version; which extension it loads has changed
    (`_C` up to 0.20, `_C_stable_libtorch` since 0.26)."""
    import vllm._custom_ops  # noqa: F401


def uncompiled_layer(layer: type) -> dict[str, Any]:
    """`compile_native=False` where a CustomOp layer has it (since 0.20): without it, building the layer inside a pass
    would wrap forward_native in torch.compile, which cannot be traced as a pattern."""
    return {"compile_native": False} if "compile_native" in inspect.signature(layer).parameters else {}


def static_quant_extra_arguments() -> dict[str, Any]:
    """`group_shape` of static_scaled_fp8_quant, which the layer passes since 0.32; Inductor's matcher wants every keyword
    of the pattern in the graph, so the pattern has to pass what the graph does. Can go with support for 0.26."""
    schema = torch.ops._C.static_scaled_fp8_quant.default._schema
    if any(a.name == "group_shape" for a in schema.arguments):
        return {"group_shape": [-1, -1]}
    return {}


def silu_and_mul_adds_zero() -> bool:
    """Whether `silu_and_mul` computes silu(gate) * (up + 0.0), which differs in the sign of zeros. Since 0.26 at the latest;
    0.20.2 does not. Nothing that can be probed without running it tells. Can go with support for 0.20."""
    from packaging.version import Version
    from vllm import __version__

    return Version(__version__).release >= (0, 21)


def group_quantiser_multiplies() -> bool:
    """Whether `per_token_group_fp8_quant` multiplies by a scale's reciprocal instead of dividing: since 0.33. With a GPU at
    hand the op itself is asked (roundings.py). Can go with support for 0.32."""
    from packaging.version import Version
    from vllm import __version__

    return Version(__version__).release >= (0, 33)


def identity_of_custom_ops() -> list[str]:
    """Version, and name, size and time of the extensions that `torch.ops._C` comes from, whatever they are called."""
    import vllm

    folder = pathlib.Path(vllm.__file__).parent
    files = [(path.name, path.stat()) for path in sorted(folder.glob("_C*.so"))]
    return [vllm.__version__, *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)]


def device_name() -> str:
    """The GPU's name, found without touching it."""
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name())


def cache_root() -> pathlib.Path:
    """The folder that vLLM's compile cache is in (all versions read)."""
    from vllm import envs

    return pathlib.Path(envs.VLLM_CACHE_ROOT)


def ir_provider(op: str, arguments: Sequence[Any]) -> str:
    """Whose implementation vLLM will put in the place of `vllm_ir.<op>` on these arguments: "native", "vllm_c", ... It
    decides where the op rounds. Asked as vLLM's own lowering pass asks, which runs behind ours (IrOp since 0.20)."""
    from vllm.ir.op import IrOp

    return IrOp.registry[op].dispatch(*arguments).provider


def inductor_is_deterministic(inductor_compile_config: dict[str, Any]) -> bool:
    """Whether Inductor compiles without timing kernels against each other (`deterministic`, torch 2.10 or so and later), by
    vLLM's configuration or torch's."""
    import torch._inductor.config as inductor

    known = getattr(inductor, "deterministic", False) or torch.are_deterministic_algorithms_enabled()
    return bool(inductor_compile_config.get("deterministic", known))


def flashinfer_norm_nvfp4_op() -> torch._ops.OpOverload | None:
    """FlashInfer's fused add + RMS norm + NVFP4 quantiser, where vLLM's own pass would put it into a graph: since 0.32 at
    the latest, on compute capability 10.0 and later."""
    from vllm.compilation.passes.fusion import rms_quant_fusion
    from vllm.platforms import current_platform

    op = getattr(rms_quant_fusion, "_FLASHINFER_NVFP4_RMS_QUANT_OP", None)
    return op if op is not None and current_platform.has_device_capability(100) else None


# ---- environment -----------------------------------------------------------------------------------------------------


def announce_environment(prefix: str) -> None:
    """Tell vLLM that the variables that begin with `prefix` are known. It warns of every other one that begins with VLLM_,
    and with `--fail-on-environ-validation` does not start (all versions read)."""
    from vllm import envs

    known = getattr(envs, "environment_variables", None)
    if isinstance(known, dict):
        for name in os.environ:
            if name.startswith(prefix):  # only what is set: vLLM hashes what it knows into its compile cache
                known.setdefault(name, functools.partial(os.environ.get, name))


# ---- pass manager ----------------------------------------------------------------------------------------------------


@contextmanager
def stand_ins(classes: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """While stock's pass manager configures itself, give it our classes under stock's names.

    `PostGradPassManager.configure` names pass classes as globals of its module (all versions read). Replacing the names
    there keeps order, flags and platform conditions in stock's hands, and no stock pattern is traced for nothing. On
    platforms where stock does not import a class the name is simply there for the time being.
    Goes when the pass manager takes passes from a registry.
    """
    module = sys.modules[STOCK_PASS_MANAGER.rpartition(".")[0]]
    missing = object()
    before: dict[str, object] = {name: getattr(module, name, missing) for name in classes}
    for name, cls in classes.items():
        setattr(module, name, cls)
    try:
        yield
    finally:
        for name, was in before.items():
            if was is missing:
                delattr(module, name)
            else:
                setattr(module, name, was)


def why_off(config: Any, name: str) -> str:
    """Why vLLM builds no pass `name`: what its flag is, what vLLM's default for it would have been, and why.

    Defaults go by the optimization level (since 0.20) and are values or questions to the configuration."""
    flag = PASS_FLAGS[name]
    if getattr(config.compilation_config.pass_config, flag, False):
        return f"off: {flag} is set, but vLLM builds no such pass here"
    try:
        from vllm.config.vllm import OPTIMIZATION_LEVEL_TO_CONFIG

        level = config.optimization_level
        defaults: Any = OPTIMIZATION_LEVEL_TO_CONFIG[level]
        default = defaults["compilation_config"]["pass_config"][flag]
        would_be = bool(default(config) if callable(default) else default)
    except Exception:
        return f"off: {flag} is not set"
    if would_be:
        return f"off: {flag}=false was asked for; vLLM's default (-O{int(level)}) would be true"
    why = _why_default(config, flag) if callable(default) else f"set {flag}=true for it"
    return f"off, as by vLLM's default (-O{int(level)}): {why}"


def _why_default(config: Any, flag: str) -> str:
    """What the defaults of these two flags ask for (`enable_norm_fusion`, `enable_act_fusion` in config/vllm.py), where none
    of it is there."""
    wanted = {"fuse_norm_quant": "rms_norm", "fuse_act_quant": "silu_and_mul"}[flag]
    enabled = [op for op in (wanted, "quant_fp8") if config.compilation_config.is_custom_op_enabled(op)]
    if enabled:  # asked for more than was known here
        return f"it is off in spite of the custom op {enabled[0]}"
    return f"neither custom op {wanted} nor quant_fp8 is enabled, and vLLM leaves such fusions to Inductor then"


def stock_pass(name: str) -> Any:
    """Stock's pass class of that name, or None where this vLLM or platform has none."""
    module = sys.modules.get(STOCK_PASS_MANAGER.rpartition(".")[0])
    return getattr(module, name, None)


def stock_pass_manager() -> Any:
    """A new one of what the pass manager would be without us."""
    from importlib import import_module

    module, _, name = STOCK_PASS_MANAGER.rpartition(".")
    return getattr(import_module(module), name)()


def install_pass_manager(qualname: str) -> str | None:
    """Name our pass manager to vLLM; the reason if that cannot be done."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    getter = getattr(platform, "get_pass_manager_cls", None)
    if getter is None:
        return f"{platform.__name__} has no get_pass_manager_cls: this vLLM has no seam for pass managers"
    now = getter()
    if now == qualname:
        return None
    if now != STOCK_PASS_MANAGER:
        return f"the pass manager is {now} already, not stock's; two that replace it cannot be combined"
    platform.get_pass_manager_cls = classmethod(lambda cls: qualname)  # type: ignore[assignment]
    return None


# ---- warm-up ---------------------------------------------------------------------------------------------------------


def hook_warm_up(before_serving: Callable[[], None]) -> str | None:
    """Call `before_serving()` when a worker has warmed up and captured everything of its own, and before it watches for
    compilations; the reason if that cannot be. Re-entrant.

    What: `vllm.utils.jit_monitor.activate`, since 0.26, which `Worker.compile_or_warm_up_model` imports and calls at its
    end, with `enable_jit_warmup` off (enforce_eager) not at all since 0.32; up to 0.20.2 `compile_or_warm_up_model` itself.
    Why: all our kernels have to be compiled by then, and each graph has been run by then, with each call of our ops in it.
    `JITWarmupRegistry` (0.32) belongs to layers, which our ops are not. Goes when vLLM asks plugins what to warm up.
    """
    owner: Any
    try:
        from vllm.utils import jit_monitor as owner

        name, first = "activate", True
    except ImportError:
        module = sys.modules.get("vllm.v1.worker.gpu_worker")
        if module is None:  # a process without a worker on a GPU
            return None
        owner, name, first = module.Worker, "compile_or_warm_up_model", False
    original = getattr(owner, name, None)
    if original is None:
        return f"this vLLM's {owner.__name__} has no {name}"
    if hasattr(original, "_fusion_plugin"):
        return None

    @functools.wraps(original)
    def with_ours(*args: Any, **kwargs: Any) -> Any:
        if first:
            before_serving()
        result = original(*args, **kwargs)
        if not first:
            before_serving()
        return result

    with_ours._fusion_plugin = True  # type: ignore[attr-defined]
    setattr(owner, name, with_ours)
    return None


def most_tokens(config: Any) -> int:
    """The most tokens that a forward pass of the model has (all versions read)."""
    return int(config.scheduler_config.max_num_batched_tokens)


# ---- attention -------------------------------------------------------------------------------------------------------


def layer_names_are_inputs() -> bool:
    """Whether an attention op's `layer_name` is an object that Dynamo lifts to a graph input, so that equal layers have
    equal graphs; else it is a string in the graph. Since 0.20 with torch 2.11, unless VLLM_USE_LAYERNAME=0."""
    from vllm.utils import torch_utils

    return bool(getattr(torch_utils, "_USE_LAYERNAME", False))


def encode_layer_name(name: str) -> Any:
    """A layer's name as vLLM's model code hands it to the attention ops."""
    from vllm.utils import torch_utils

    return torch_utils.LayerName(name) if layer_names_are_inputs() else name


def layer_name_of(argument: Any) -> str | None:
    """The name in an attention node's `layer_name`: a string, vLLM's LayerName, or the graph input that it was lifted to,
    of which the compiler keeps the object that it was traced with. None if it cannot be told."""
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("val")
        argument = getattr(argument, "real_obj", argument)  # torch's FakeScriptObject
    name = argument if isinstance(argument, str) else getattr(argument, "value", None)
    return name if isinstance(name, str) else None


def attention_layers(config: Any, kind: type) -> dict[str, Any]:
    """The model's attention layers of that class by the name that the ops know them by (all versions read)."""
    layers = config.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if isinstance(layer, kind)}


def attention_backend(layer: Any) -> str:
    backend = getattr(layer, "attn_backend", None)
    return backend.get_name() if backend is not None else type(layer.impl).__name__


def writes_quantised_output(layer: Any, quant_key: str) -> bool:
    """Whether a layer's implementation takes a quantised output buffer, by the name that vLLM's quant_utils has for the
    quantiser. A key that this vLLM has no name for is one that it has no support for."""
    from vllm.model_executor.layers.quantization.utils import quant_utils

    key = getattr(quant_utils, quant_key, None)
    supported = getattr(layer.impl, "fused_output_quant_supported", None)
    return bool(key is not None and supported is not None and supported(key))


def experts_quantise(config: Any) -> bool:
    """Whether some experts of the model quantise what they read: false only where all are known not to. Layers with experts
    hold their quant method, or modules of theirs do (`routed_experts`, since 0.26 or so)."""
    layers = [x for x in config.compilation_config.static_forward_context.values() if isinstance(x, torch.nn.Module)]
    names = [type(getattr(m, "quant_method", None)).__name__ for layer in layers for m in layer.modules()]
    methods = [name for name in names if "MoE" in name]
    return not methods or any("Unquantized" not in name for name in methods)


def op_takes(op: torch._ops.OpOverload, *arguments: str) -> bool:
    """Whether an op of vLLM has all these arguments."""
    return set(arguments) <= {a.name for a in op._schema.arguments}


def decode_context_parallel_size(impl: Any) -> int:
    """Ranks that an MLA implementation's KV cache is spread over. -1 before the first step up to 0.26, where `forward_impl`
    asks the group itself; the second branch can go with support for 0.26."""
    size = getattr(impl, "dcp_world_size", 1)
    if size >= 0:
        return size
    from vllm.distributed.parallel_state import get_dcp_group

    return get_dcp_group().world_size


def prefill_writes_groups(layer: Any, group_size: int | None) -> bool:
    """Whether an MLA layer's prefill backend writes FP8 in groups itself. None does in any version read; the question can be
    asked since 0.26 (`supports_quant_output`)."""
    from vllm.model_executor.layers.quantization.utils import quant_utils

    supports = getattr(getattr(layer, "prefill_backend", None), "supports_quant_output", None)
    key = getattr(quant_utils, f"kFp8Dynamic{group_size}Sym", None)
    return bool(supports is not None and key is not None and supports(key))


def batch_invariant() -> bool:
    """Whether a row's bytes must not depend on its batch, for which vLLM replaces matrix products (all versions read)."""
    from vllm import envs

    return bool(getattr(envs, "VLLM_BATCH_INVARIANT", False))
