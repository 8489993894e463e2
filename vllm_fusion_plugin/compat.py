# SPDX-License-Identifier: Apache-2.0
"""Questions to the installed vLLM: everything that depends on which vLLM it is.

Each entry: what it answers, why, since when, and when it can go. Nothing else in the package asks for a version. What is
changed in vLLM is in seams.py, by the same rules; nothing here changes anything.
Read against 0.20.2, 0.26.0, 0.32.0 and 0.33.0. Features are probed, not derived from version numbers.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from . import fusions

logger = logging.getLogger("vllm.fusion_plugin")

# Ops that quantise inside, by the name they have in the graph, and what to tell a user who looks for a fusion there.
# Until upstream shows the quantiser in the graph. passes/block_gemm.py splits the first one.
DYNAMIC_BLOCK_GEMM = "vllm.dynamic_flashinfer_deepgemm_blockscale_gemm"
OPAQUE_QUANTISERS = {
    DYNAMIC_BLOCK_GEMM: "vLLM's block-scaled GEMM quantises its input inside one opaque op",
    "vllm.flashinfer_fp8_blockscale_gemm": (
        "FlashInfer's block-scaled GEMM quantises its input inside one opaque op, so there is no quantiser in the graph to "
        "fuse with; VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER=0 selects a GEMM that takes quantised input"
    ),
}

# Ops with whole MLPs inside: their own quantisers, too, where the experts are quantised. What is between the experts' GEMMs
# layers/experts_silu_mul_quant.py fuses and reports.
_EXPERTS = "experts' input is quantised inside vLLM's opaque MoE op, where no graph pass reaches"
OPAQUE_MLPS = {
    "vllm.moe_forward": _EXPERTS,
    "vllm.moe_forward_shared": (
        "experts' input is quantised inside vLLM's opaque MoE op, where no graph pass reaches; so are shared experts"
    ),
    "vllm.fused_experts": _EXPERTS,
    # passes/experts_input_quant.py has put it there
    "vllm_fusion_plugin.moe_forward_shared": (
        "shared experts quantise their input inside vLLM's opaque MoE op, where no graph pass reaches"
    ),
}

# vLLM's own fused ops: what they fuse, and the pass of ours that stands where vLLM's pass with them stood. Model code calls
# them too (LlamaMLP, since 0.33).
_ACT, _NORM = "ActivationQuantFusionPass", "RMSNormQuantFusionPass"
_AITER_ACT, _AITER_NORM = "RocmAiterSiluMulFp8GroupQuantFusionPass", "RocmAiterRMSNormQuantFusionPass"
_DUAL = "MLADualRMSNormFusionPass"
FUSED_BY_VLLM = {
    "_C.silu_and_mul_quant": ("silu_mul+static", _ACT),
    "_C.silu_and_mul_per_block_quant": ("silu_mul+group", _ACT),
    "_C.silu_and_mul_nvfp4_quant": ("silu_mul+nvfp4", _ACT),
    "_C.situ_and_mul_quant": ("situ_mul+quantiser", _ACT),
    "_C.rms_norm_static_fp8_quant": ("rms_norm+static", _NORM),
    "_C.fused_add_rms_norm_static_fp8_quant": ("fused_add_rms_norm+static", _NORM),
    "_C.rms_norm_dynamic_per_token_quant": ("rms_norm+token", _NORM),
    "_C.rms_norm_per_block_quant": ("rms_norm+group", _NORM),
    "vllm.rocm_aiter_rmsnorm_fp8_group_quant": ("rms_norm+group", _AITER_NORM),
    "vllm.rocm_aiter_rmsnorm_with_add_fp8_group_quant": ("fused_add_rms_norm+group", _AITER_NORM),
    "vllm.rocm_aiter_rmsnorm_fused_dynamic_quant": ("rms_norm+token", _AITER_NORM),
    "vllm.rocm_aiter_rmsnorm_fused_add_dynamic_quant": ("fused_add_rms_norm+token", _AITER_NORM),
    "vllm.rocm_aiter_fused_rms_fp8_per_tensor_static_quant": ("rms_norm+static", _AITER_NORM),
    "vllm.rocm_aiter_fused_add_rms_fp8_per_tensor_static_quant": ("fused_add_rms_norm+static", _AITER_NORM),
    "vllm.rocm_aiter_fused_rms_gated_fp8_group_quant": ("gated_rms_norm+group", _AITER_NORM),
    "vllm.rocm_aiter_act_mul_and_fp8_group_quant": ("silu_mul+group", _AITER_ACT),
    "vllm.fused_mla_dual_rms_norm_group_quant": ("mla_dual_rms_norm+group", _DUAL),
    "vllm.fused_mla_dual_rms_norm_per_token_quant": ("mla_dual_rms_norm+token", _DUAL),
}

# What a Triton kernel that quantises fuses with its quantiser, by a part of its name (utils/fp8_utils.py, layers/fusion).
FUSED_IN_TRITON = {
    "silu_mul": ("silu_mul+quantiser", _ACT),
    "relu_squared": ("relu2+static", _ACT),
    "rms_norm": ("rms_norm+quantiser", _NORM),
}

# Passes that can be left out by one of vLLM's flags.
PASS_FLAGS = {fusion.name: fusion.switch for fusion in fusions.entering("pass", rocm=True)}

# Activations of vLLM by what their op is called, in words. Names of layers (`GeluAndMul`) are reported as they are.
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


def fp8_format() -> str:
    """The format, by its name in kernels/fp8.py, in which vLLM's own quantisers write codes on this platform: fnuz on AMD's
    gfx942, where they stop at 224 (`get_fp8_min_max`)."""
    from vllm.platforms import current_platform

    from .kernels.fp8 import FORMATS, OCP

    return next((name for name, fp8 in FORMATS.items() if fp8.dtype == current_platform.fp8_dtype()), OCP)


AITER_GROUP_QUANT, AITER_TOKEN_QUANT = "vllm.rocm_aiter_group_fp8_quant", "vllm.rocm_aiter_per_token_quant"


def aiter_is_on() -> bool:
    """Whether vLLM runs AITER's kernels: on ROCm, with AITER installed and VLLM_ROCM_USE_AITER=1. RDNA is not asked about:
    there vLLM's graphs have no quantiser of AITER's."""
    from vllm.platforms import current_platform

    if not current_platform.is_rocm():
        return False
    from vllm._aiter_ops import rocm_aiter_ops

    return bool(rocm_aiter_ops.is_enabled())


def aiter_op(name: str) -> torch._ops.OpOverload:
    """vLLM's op for a kernel of AITER's. Registered by vLLM where AITER is on."""
    return getattr(torch.ops.vllm, name).default


def has_aiter_op(name: str) -> bool:
    return aiter_is_on() and hasattr(torch.ops.vllm, name)


AITER_KERNELS = {
    "rocm_aiter_rmsnorm_fp8_group_quant": ("aiter.ops.triton.fused_fp8_quant", "fused_rms_fp8_group_quant"),
    "rocm_aiter_rmsnorm_with_add_fp8_group_quant": ("aiter.ops.triton.fused_fp8_quant", "fused_rms_fp8_group_quant"),
    "rocm_aiter_fused_rms_gated_fp8_group_quant": ("aiter.ops.triton.quant", "fused_rms_gated_fp8_group_quant"),
    "rocm_aiter_act_mul_and_fp8_group_quant": ("aiter.ops.triton.activation", "act_mul_and_fp8_group_quant"),
}
"""What vLLM's ops for AITER's fused kernels import when they first run (`vllm/_aiter_ops.py`)."""


def why_no_aiter() -> str:
    """Why vLLM does not run AITER's kernels; "" if it does."""
    from vllm.platforms import current_platform

    if not current_platform.is_rocm():
        return "this is not ROCm"
    if importlib.util.find_spec("aiter") is None:
        return "AITER is not installed"
    return "" if aiter_is_on() else "AITER is off here: VLLM_ROCM_USE_AITER=1 switches it on, on CDNA 3 and later"


def why_no_aiter_kernel(op: str) -> str:
    """Why a fused kernel of AITER's, one of AITER_KERNELS, cannot be had; "" if it can."""
    if not has_aiter_op(op):
        return f"this vLLM has no op {op}"
    module, function = AITER_KERNELS[op]
    try:
        found = hasattr(importlib.import_module(module), function)
    except Exception as e:
        return f"AITER's {module} cannot be imported: {type(e).__name__}: {e}"
    return "" if found else f"this AITER has no {module}.{function}"


def vllms_passes_follow() -> bool:
    """Whether vLLM's own passes run after ours of the same name: on ROCm, where some of what they fuse has no exact kernel
    here."""
    from vllm.platforms import current_platform

    return current_platform.is_rocm()


def fp8_format_of_aiter() -> str:
    """As fp8_format, of AITER's quantisers, which go to the end of the format."""
    return "e4m3fnuz_240" if fp8_format() == "e4m3fnuz" else fp8_format()


def ir_provider(op: str, arguments: Sequence[Any]) -> str:
    """Whose implementation vLLM will put in the place of `vllm_ir.<op>` on these arguments: "native", "vllm_c", ... It
    decides where the op rounds. Asked as vLLM's own lowering pass asks, which runs after ours (IrOp since 0.20)."""
    from vllm.ir.op import IrOp

    return IrOp.registry[op].dispatch(*arguments).provider


def has_ir_op(name: str) -> bool:
    """Whether this vLLM has an operation `vllm.ir.ops.<name>`: `rms_norm` since 0.20, `fused_add_rms_norm` since 0.26."""
    from vllm.ir.op import IrOp

    return name in IrOp.registry


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
        default = getattr(default, "__wrapped__", default)  # vLLM's own, without what seams.py has added
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
    wanted = {"fuse_norm_quant": "rms_norm", "fuse_act_quant": "silu_and_mul"}.get(flag)
    if wanted is None:
        return "vLLM decides by the model and the platform"
    enabled = [op for op in (wanted, "quant_fp8") if config.compilation_config.is_custom_op_enabled(op)]
    if enabled:  # asked for more than was known here
        return f"it is off in spite of the custom op {enabled[0]}"
    return f"neither custom op {wanted} nor quant_fp8 is enabled, and vLLM leaves such fusions to Inductor then"


def dynamic_block_gemm() -> torch._ops.OpOverload | None:
    """The op DYNAMIC_BLOCK_GEMM (since 0.20 at the latest), if this vLLM has it. Goes when vLLM shows the quantiser."""
    op = getattr(torch.ops.vllm, DYNAMIC_BLOCK_GEMM.rpartition(".")[2], None)
    return op.default if op is not None else None


def why_dynamic_gemm_is_unknown(flashinfer_rows: int) -> str | None:
    """Why `dynamic_block_gemm` is not the op that block_gemm.py knows: other arguments, or another number of rows from which
    it is DeepGEMM's; None if it is, or if there is none.

    Probed: the schema, and that number among the constants of vLLM's function. Goes with that."""
    try:
        from vllm.model_executor.kernels.linear.scaled_mm import flashinfer
    except ImportError:
        return None
    op = dynamic_block_gemm()
    if op is None:
        return None
    given = [argument.name for argument in op._schema.arguments]
    known = ["input", "weight", "weight_scale", "group_size", "use_deep_gemm_e8m0"]
    if given != known:
        return f"vLLM's dynamic block GEMM takes {', '.join(given)}; known: {', '.join(known)}"
    function = getattr(flashinfer, "_dynamic_flashinfer_deepgemm_blockscale_gemm_impl", None)
    if function is None or flashinfer_rows not in function.__code__.co_consts:
        return f"vLLM's dynamic block GEMM does not change its kernel at {flashinfer_rows} rows, as known"
    return None


def most_tokens(config: Any) -> int:
    """The most tokens that a forward pass of the model has (all versions read)."""
    return int(config.scheduler_config.max_num_batched_tokens)


# ---- flags -----------------------------------------------------------------------------------------------------------


def engine_parser() -> Any:
    """vLLM's parser of the flags of an engine, which `vllm serve` adds a server's to (all versions read)."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def engine_arguments(namespace: Any) -> Any:
    """EngineArgs from what `engine_parser` has parsed (all versions read)."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs.from_cli_args(namespace)


def fusion_flags(compilation_config: Any) -> dict[str, bool]:
    """The fusion flags of a CompilationConfig, or of a dict for one, that are set: before an engine's configuration is made,
    that is by a user. Up to then those that are not are None (all versions read)."""
    from vllm.config import PassConfig

    given = compilation_config.get("pass_config", {}) if isinstance(compilation_config, dict) else compilation_config
    given = getattr(given, "pass_config", given) or {}
    values = given if isinstance(given, dict) else vars(given)
    plain = vars(PassConfig())
    flags = {name: value for name, value in values.items() if name.startswith(("fuse_", "enable_"))}
    return {name: bool(value) for name, value in flags.items() if value is not None and value != plain.get(name)}


def splits_at_attention(config: Any) -> bool:
    """Whether attention is between the graphs that passes see, and in none (all versions read)."""
    compilation = config.compilation_config
    return not compilation.use_inductor_graph_partition and compilation.splitting_ops_contain_attention()


def fused_gemm_libraries() -> dict[str, str]:
    """What vLLM says of the libraries that decide which block GEMM it runs: "usable", or why not (all versions read)."""
    from vllm.utils import flashinfer, import_utils

    said = {}
    if importlib.util.find_spec("flashinfer") is None:
        said["FlashInfer"] = "not installed"
    else:
        usable = flashinfer.has_flashinfer()
        said["FlashInfer"] = (
            "usable" if usable else "without flashinfer-cubin, and without nvcc and ninja to compile with"
        )
    said["DeepGEMM"] = "usable" if import_utils.has_deep_gemm() else "not installed"
    return said


def pass_manager(config: Any) -> Any:
    """A pass manager as vLLM makes it for the engine of `config` when it compiles (all versions read)."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform

    module, _, name = current_platform.get_pass_manager_cls().rpartition(".")
    with set_current_vllm_config(config, check_compile=False):
        manager = getattr(importlib.import_module(module), name)()
        manager.configure(config)
    return manager


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
    of which the compiler keeps the object that it was traced with. None if nothing says."""
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("val")
        argument = getattr(argument, "real_obj", argument)  # torch's FakeScriptObject
    name = argument if isinstance(argument, str) else getattr(argument, "value", None)
    return name if isinstance(name, str) else None


def layers_by(argument: Any, calls: int, layers: Mapping[str, Any]) -> list[Any]:
    """The layers that the code compiled for a call may run. argument: its `layer_name`; calls: how many such calls the graph
    has; layers: all that the op knows, by name."""
    name = layer_name_of(argument)
    if isinstance(argument, fx.Node) and (name is None or calls < len(layers)):
        # The model is compiled in parts, and parts that differ in their inputs only share code: this may run in the place
        # of any layer.
        return list(layers.values())
    return [layer for known, layer in layers.items() if known == name]


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
    held = [getattr(m, "quant_method", None) for layer in layers for m in layer.modules()]
    methods = [method for method in held if "MoE" in type(method).__name__]
    quantised = [method for method in methods if "Unquantized" not in type(method).__name__]
    # Of a method that a layer holds twice, one has none.
    configs = [config for method in quantised if (config := getattr(method, "moe_quant_config", None)) is not None]
    weights_alone = bool(configs) and all(config.quant_dtype is None for config in configs)
    return not methods or bool(quantised and not weights_alone)


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


logger = logging.getLogger("vllm.fusion_plugin")


# ---- experts ---------------------------------------------------------------------------------------------------------


def triton_experts_module() -> Any:
    """The module with vLLM's `TritonExperts`, if this process has imported it: experts/triton_moe.py since 0.26,
    fused_moe.py in 0.20."""
    package = "vllm.model_executor.layers.fused_moe"
    modules = (sys.modules.get(f"{package}.{name}") for name in ("experts.triton_moe", "fused_moe"))
    return next((module for module in modules if hasattr(module, "TritonExperts")), None)


def group_quantiser_uses_ue8m0() -> bool:
    """Whether vLLM's function `per_token_group_quant_fp8`, told nothing, makes scales that are powers of two (all versions
    read). On Hopper it does by default."""
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    return bool(fp8_utils.is_deep_gemm_e8m0_used())


def has_vllm_op(name: str) -> bool:
    """Whether this process has imported the module of vLLM that registers `torch.ops.vllm.<name>`."""
    return hasattr(torch.ops.vllm, name)


def moe_forward_shared() -> Any:
    """The Python function behind vLLM's op of that name, whose signature has the type that a layer's name has (all versions
    read); None if this process has not imported it."""
    module = sys.modules.get("vllm.model_executor.layers.fused_moe.runner.moe_runner")
    return getattr(module, "_moe_forward_shared", None)


def moe_layers(config: Any) -> dict[str, Any]:
    """The engine's MoE layers by the name that MoE ops know them by (all versions read)."""
    owner = engine_owner(config)
    return {name: owner.static_forward_context[name] for name in getattr(owner, "static_all_moe_layers", ())}


def forget_layers_outside(model: torch.nn.Module, config: Any) -> None:
    """Take the layers that are no part of `model` out of those that the engine of `config` knows by name."""
    owner, parts = engine_owner(config), set(model.modules())
    known = owner.static_forward_context
    for name in [n for n, one in known.items() if isinstance(one, torch.nn.Module) and one not in parts]:
        del known[name]
    owner.static_all_moe_layers[:] = [name for name in owner.static_all_moe_layers if name in known]


def moe_kernels(layer: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Of a MoE layer: what prepares the experts' input, and the object or two that its experts run in. Held as
    `experts_by_layer` says."""
    kernels = [getattr(getattr(m, "quant_method", None), "moe_kernel", None) for m in layer.modules()]
    found = []
    for kernel in kernels:
        experts = getattr(kernel, "fused_experts", None)
        if experts is not None:
            found += [(kernel.prepare_finalize, one) for one in _chosen_between(experts)]  # type: ignore[union-attr]
    return found


def _chosen_between(experts: Any) -> list[Any]:
    """The two objects between which a `FallbackExperts` chooses; else the experts themselves."""
    either = [getattr(experts, part, None) for part in ("experts", "fallback_experts")]
    return either if None not in either else [experts]


def swiglu_parameters(experts: Any) -> dict[str, float]:
    """What experts change SwiGLU by: limit, alpha, beta. From their `activation_config` (since 0.32) or else their quant
    config; the second can go with support for 0.26."""
    config = getattr(experts, "activation_config", None)
    if config is not None:
        given = {"limit": config.clamp_limit, "alpha": config.alpha, "beta": config.beta}
    else:
        named = {"limit": "gemm1_clamp_limit", "alpha": "gemm1_alpha", "beta": "gemm1_beta"}
        given = {word: getattr(experts.quant_config, name, None) for word, name in named.items()}
    neutral = {"limit": None, "alpha": 1.0, "beta": 0.0}
    return {word: float(value) for word, value in given.items() if value is not None and value != neutral[word]}


def is_running(owner: Any) -> bool:
    """Whether the forward pass that this thread is in is of the engine of that `engine_owner` (all versions read)."""
    from vllm import forward_context

    if not forward_context.is_forward_context_available():
        return False
    return forward_context.get_forward_context().no_compile_layers is owner.static_forward_context


def forward_pass() -> Any:
    """An object that is another one in each forward pass; None outside of one (all versions read)."""
    from vllm import forward_context

    return forward_context.get_forward_context() if forward_context.is_forward_context_available() else None


def models(worker: Any) -> list[torch.nn.Module]:
    """A worker's model, and the one that drafts for it if there is one (`drafter`; `speculator` in the runner that is new
    in 0.26)."""
    runner = getattr(worker, "model_runner", None)
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    found = [_unwrapped(getattr(holder, "model", None)) for holder in (runner, drafter)]
    return [model for model in found if isinstance(model, torch.nn.Module)]


def _unwrapped(model: Any) -> Any:
    """A model without what runs it as CUDA graphs or in parts, which are no modules and have `unwrap` (all versions read):
    whole graphs, breakable ones (since 0.26), ubatches."""
    while model is not None and not isinstance(model, torch.nn.Module) and hasattr(model, "unwrap"):
        model = model.unwrap()
    return model


def experts_by_layer(model: torch.nn.Module) -> list[tuple[str, list[Any]]]:
    """Each MoE layer's name, from the root of what vLLM compiles, and the objects that its quantised experts run in: one,
    or the two between which a `FallbackExperts` chooses; their quant method, where that holds none.

    A layer with experts, or since 0.26 its `routed_experts`, holds their quant method, that holds `moe_kernel`, and that
    holds `fused_experts`."""
    found: list[tuple[str, list[Any]]] = []
    roots: list[str] = []
    for name, module in model.named_modules():
        if hasattr(module, "do_not_compile"):  # support_torch_compile has wrapped its class
            roots.append(f"{name}." if name else "")
        method = getattr(module, "quant_method", None)
        if "MoE" not in type(method).__name__ or "Unquantized" in type(method).__name__:
            continue
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        config = getattr(method, "moe_quant_config", None) if experts is None else experts.quant_config
        if config is not None and config.quant_dtype is None:
            continue  # quantised weights alone
        held = [method] if experts is None else _chosen_between(experts)
        root = max((r for r in roots if name.startswith(r)), key=len, default="")
        found.append((name.removeprefix(root).removesuffix(".routed_experts"), held))
    return found


# ---- engines ---------------------------------------------------------------------------------------------------------


def engine_owner(config: Any) -> Any:
    """What all configurations of one engine in a process share, and no two engines do. vLLM makes new VllmConfigs from an
    engine's own, for a draft model for example, each with an `instance_id` of its own; but attention layers of all of them
    are to be found in one `static_forward_context`, and so in one CompilationConfig (all versions read)."""
    return config.compilation_config


def is_layer_of(owner: Any, layer: Any) -> bool:
    """Whether an attention layer belongs to the engine of that `engine_owner`."""
    return owner.static_forward_context.get(getattr(layer, "layer_name", None)) is layer


async def ask_workers(async_llm: Any, method: str) -> dict[int, list[Any]]:
    """What all workers of all engines of a front end answer, by the engines' numbers.

    `AsyncLLM.collective_rpc` answers for the first of several data-parallel engines alone; the client asks each (all
    versions read)."""
    client = async_llm.engine_core
    engines = dict(zip(client.engine_ranks_managed, client.core_engines, strict=True))
    if len(engines) == 1:
        return dict.fromkeys(engines, await async_llm.collective_rpc(method))
    ask = functools.partial(client._call_utility_async, "collective_rpc", method, None, (), None)
    return dict(zip(engines, await asyncio.gather(*(ask(engine=e) for e in engines.values())), strict=True))


def part_name(config: Any) -> str:
    """vLLM's name for the part of a model that it is about to compile: its prefix or model tag, which is the last folder of
    where VllmBackend keeps its code (all versions read); "" before it has one."""
    return os.path.basename(config.compilation_config.local_cache_dir or "")


def why_nothing_compiles(config: Any) -> str | None:
    """Why vLLM runs no pass manager at all in this engine; None if it does when it compiles."""
    from vllm.config import CompilationMode

    compilation = config.compilation_config
    if compilation.mode == CompilationMode.NONE:
        if _breakable_cuda_graphs():
            return "breakable CUDA graphs: vLLM compiles nothing, so no pass runs"
        return "eager: vLLM compiles nothing, so no pass runs"
    if compilation.mode is not None and compilation.mode != CompilationMode.VLLM_COMPILE:
        return f"not compiled by vLLM: mode {CompilationMode(compilation.mode).name} runs no pass"
    if compilation.backend == "eager":
        return "not compiled: backend 'eager' runs no pass"
    return None


def _breakable_cuda_graphs() -> bool:
    """Whether vLLM captures CUDA graphs of the eager model, as it does unasked for some architectures (since 0.26)."""
    from importlib import import_module

    try:
        return bool(import_module("vllm.compilation.breakable_cudagraph").is_breakable_cudagraph_enabled())
    except (ImportError, AttributeError):
        return False


def artefact_folder(compilation_config: Any) -> str | None:
    """Where vLLM keeps the code that this process compiles or has loaded.

    `local_cache_dir` is VllmBackend's folder while it compiles, but a process that loads an AOT artefact makes no
    VllmBackend: there it is the artefact's. Inductor's folder, which vLLM sets, is the artefact's in both. Without AOT
    artefacts, that may be the folder of an engine that this process has run before.
    """
    from vllm import envs

    if not getattr(envs, "VLLM_USE_AOT_COMPILE", True):
        return compilation_config.local_cache_dir
    artefact = os.path.dirname(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    if os.path.basename(os.path.dirname(artefact)) == "torch_aot_compile":
        return artefact
    return compilation_config.local_cache_dir


def linear_kernels(worker: Any) -> dict[str, int]:
    """Classes of the kernels of a worker's quantised linear layers, counted: they decide what there is to fuse.

    A kernel is held by the layer's quant method (`Fp8LinearMethod.fp8_linear`, since 0.20), or, where that leaves the work
    to a scheme, as compressed-tensors and Quark do, by the layer's `scheme`. Where neither holds one, the scheme's or
    method's own class is counted."""
    found: dict[str, int] = {}
    model = _unwrapped(getattr(getattr(worker, "model_runner", None), "model", None))
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        method, scheme = getattr(module, "quant_method", None), getattr(module, "scheme", None)
        if "MoE" in type(method).__name__:
            continue  # experts run a kernel of another kind
        names = {type(kernel).__name__ for kernel in _kernels_of(module)}
        if not names and _is_quantised_linear(module, method):
            names = {type(method if scheme is None else scheme).__name__}
        for name in names:
            found[name] = found.get(name, 0) + 1
    return found


def _kernels_of(module: torch.nn.Module) -> list[Any]:
    holders = (getattr(module, "quant_method", None), getattr(module, "scheme", None))
    held = [value for holder in holders for value in getattr(holder, "__dict__", {}).values()]
    return [value for value in held if _is_kernel(value)]


def _is_kernel(value: Any) -> bool:
    return any(c.__name__.endswith("Kernel") for c in type(value).__mro__)


def _is_quantised_linear(module: Any, method: Any) -> bool:
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    return isinstance(module, LinearBase) and method is not None and not isinstance(method, UnquantizedLinearMethod)


def linear_kernel(linear: torch.nn.Module) -> Any:
    """The kernel object of a quantised linear layer, held as `linear_kernels` says; None if it holds none, or several."""
    kernels = _kernels_of(linear)
    return kernels[0] if len(kernels) == 1 else None


def is_quantised(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer with quantised weights."""
    return _is_quantised_linear(module, getattr(module, "quant_method", None))


def block_kernel_class() -> Any:
    """The base class of kernels for FP8 weights in blocks (since 0.20), if this process has imported it."""
    return getattr(sys.modules.get("vllm.model_executor.kernels.linear"), "Fp8BlockScaledMMLinearKernel", None)


def block_weight(kernel: Any, linear: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and scales of a linear layer of a kernel of that class: `block_scale` of its parameters since 0.32, before that
    one of two. The second branch can go with support for 0.26."""
    params = kernel._get_layer_params(linear)
    if hasattr(params, "block_scale"):
        return params.weight, params.block_scale
    return params.weight, params.weight_scale if params.weight_scale_inv is None else params.weight_scale_inv


def packs_scales(quant_fp8: Any) -> bool:
    """Whether a layer of vLLM's class QuantFP8 packs its scales for DeepGEMM, as its `forward_cuda` decides (all versions
    read)."""
    from vllm.utils.deep_gemm import DeepGemmQuantScaleFMT

    if not (quant_fp8.use_ue8m0 and quant_fp8.use_deep_gemm_supported and quant_fp8.group_size == 128):
        return False
    return bool(DeepGemmQuantScaleFMT.from_oracle() == DeepGemmQuantScaleFMT.UE8M0)


def runs_references() -> bool:
    """Whether our ops run in plain torch, on CPU, and so divide as vLLM's eager code. Our kernels divide as Inductor's."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


# ---- layers that run eagerly -----------------------------------------------------------------------------------------


def runs_as(method: Any) -> str:
    """What one of vLLM's CustomOp layers runs where nothing else compiles it: "custom_op", its native code as "compiled" by
    Inductor, or that code as torch runs it, "eager"; "" if that cannot be told.

    method: its `_forward_method`, an attribute of the instance that `dispatch_forward` has chosen (all versions read)."""
    if hasattr(method, "_torchdynamo_orig_callable"):
        return "compiled"
    name = getattr(method, "__name__", "")
    if name == "forward_cuda":
        return "custom_op"
    return "eager" if name in ("forward_native", "forward_cpu") else ""


def eager_modules(model: torch.nn.Module, config: Any) -> list[tuple[str, torch.nn.Module]]:
    """The modules of a model that run outside of code that vLLM compiles, by their names from the root of what it compiles
    or would: all, or shared experts inside of its MoE op.

    A part that `support_torch_compile` wraps is compiled where its `do_not_compile` is false (all versions read)."""
    from vllm.config import CompilationMode

    if config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        return []
    named = dict(model.named_modules())
    compiled = [name for name, module in named.items() if not getattr(module, "do_not_compile", True)]
    roots = [name for name, module in named.items() if hasattr(module, "do_not_compile")]
    inside = {id(part) for shared in shared_experts(model) for part in shared.modules()}
    return [
        (_below(name, roots), module)
        for name, module in named.items()
        if id(module) in inside or not any(_is_below(name, root) for root in compiled)
    ]


def shared_experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that vLLM runs as shared experts inside of its MoE op, which is opaque on GPUs: those that a
    `SharedExperts` holds as `_layer`, which the layer's runner holds (all versions read)."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return []
    holders = [holder for module in model.modules() for holder in (module, getattr(module, "runner", None))]
    shared = [getattr(holder, "_shared_experts", None) for holder in holders]
    layers = [getattr(one, "_layer", None) for one in shared if type(one).__name__ == "SharedExperts"]
    return [layer for layer in layers if isinstance(layer, torch.nn.Module)]


def _is_below(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def _below(name: str, roots: Sequence[str]) -> str:
    """A module's name from the innermost root above it."""
    root = max((r for r in roots if r and name.startswith(f"{r}.")), key=len, default="")
    return name.removeprefix(f"{root}.") if root else name


def stock_match_table() -> dict[str, int]:
    """vLLM's own match table, in which our passes count too; empty where this vLLM has none, or has compiled nothing."""
    module = sys.modules.get("vllm.compilation.passes.vllm_inductor_pass")
    getter = getattr(module, "get_match_table", None)
    return getter() if getter else {}
