# SPDX-License-Identifier: Apache-2.0
"""Asks the installed vLLM what it would do with the flags given, in a process of its own: `python -m` is child.ask's.

Where there is no GPU, vLLM's CUDA build is asked as if there were one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import child, compat, fusions, vllm_flags
from ..recorder import EngineRecord
from ..tracing import fake_gpu
from .diagnosis import Engine, Finding, PassState

# What a model is taken to be if none is named: the smallest with FP8 weights in blocks.
STAND_IN = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "vocab_size": 1024,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
}
NO_MODEL = "a model with FP8 weights in blocks, since none is named"


def probe(request: dict[str, Any], tell: Callable[[Any], None]) -> dict[str, Any]:
    """request: "flags", words as for `vllm serve`; "gpu", the key of fake_gpu.GPUS to be where there is none.

    Returns {"findings": ..., "engine": ...}, the latter None if vLLM can build no engine here."""
    where, reason = _device(request["gpu"])
    if not where:
        return {"findings": [Finding(about="vLLM", state="unknown", said=reason).model_dump()], "engine": None}
    tell("asking vLLM")
    import vllm.plugins

    from .. import plugin

    vllm.plugins.load_general_plugins()
    findings = [
        Finding(about=name, state="ok" if said == "usable" else "note", said=said)
        for name, said in compat.fused_gemm_libraries().items()
        if where != CPU
    ]
    loaded = plugin._off
    if loaded is None:
        findings.append(Finding(about="vLLM's plugins", state="problem", said="vLLM has not loaded this one"))
    engine = _engine(request["flags"], where, loaded or "")
    return {"findings": [f.model_dump() for f in findings], "engine": engine.model_dump()}


CPU = "CPU"


def _device(gpu: str) -> tuple[str, str]:
    """What vLLM runs on in this process, and why on nothing."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), ""
    if torch.version.cuda is None:
        return CPU, ""
    if reason := fake_gpu.unavailable():
        return "", f"without a GPU it cannot say what it would do: {reason}"
    fake_gpu.install(fake_gpu.GPUS[gpu])
    return f"as if on one {fake_gpu.GPUS[gpu].name}", ""


def _engine(flags: list[str], where: str, out: str) -> Engine:
    from .. import plugin
    from ..report import RECORDER

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(STAND_IN))
        named, rest = vllm_flags.split_model(flags)
        model = str(vllm_flags.model_folder(named)) if named else folder
        parsed = vllm_flags.parse([model, *rest], skip_tokenizer_init=True)
        if parsed.arguments.tensor_parallel_size > 1:
            parsed.arguments.distributed_executor_backend = "mp"  # or vLLM counts the GPUs here
        engine = Engine(gpu=where, model=named or NO_MODEL, ignored=parsed.ignored)
        config = vllm_flags.engine_config(parsed.arguments)
        engine.no_effect = vllm_flags.without_effect(config, parsed.asked)
        plugin.configure_engine(config)
        record = RECORDER.engine(compat.engine_owner(config))
        engine.state = out or record.inactive
        if not engine.state and (nothing := compat.why_nothing_compiles(config)):
            engine.state, engine.do = nothing, vllm_flags.what_compiles(nothing)
            engine.passes = [
                PassState(name=fusion.name, switch=fusion.switch, state=_layer_state(fusion, config, record))
                for fusion in fusions.entering("layer")
            ]
        if engine.state:
            return engine
        _without_other_ranks(config)
        compat.pass_manager(config)
    for fusion in fusions.FUSIONS:
        if fusion.on_rocm_only and fusion.name not in record.report.passes:
            continue
        of_layer = fusion.enters == "layer"
        state = _layer_state(fusion, config, record) if of_layer else record.report.passes.get(fusion.name, "off")
        do = _what_to_do(fusion, state)
        state = state.removesuffix(f": set {fusion.switch}=true for it")  # `do` has it as a flag of vLLM's
        engine.passes.append(PassState(name=fusion.name, switch=fusion.switch, state=state, do=do))
    return engine


def _layer_state(fusion: fusions.Fusion, config: Any, record: EngineRecord) -> str:
    """As a pass's state in the report."""
    if fusion.name == "MLAVUpQuant":
        return "ours" if record.mla_v_up_quant else "off: it needs fuse_attn_quant, and a model with latent attention"
    if fusion.name == "EagerRMSNormQuant":
        eager = bool(compat.why_nothing_compiles(config))
        return record.norms_left or ("ours" if eager else "off: it needs norms outside of compiled code")
    with_experts = bool(config.model_config.get_num_experts())
    if fusion.name == "MLPSiluMulQuant":
        eager = bool(compat.why_nothing_compiles(config))
        return record.mlps_left or ("ours" if eager or with_experts else "off: it needs MLPs outside of compiled code")
    if not with_experts:
        return "off: it needs a model with experts"
    return record.experts_left or "ours"


def _without_other_ranks(config: Any) -> None:
    """Leave out vLLM's other passes: some want the process groups of all ranks, and there are none here."""
    passes, ours = config.compilation_config.pass_config, {fusion.switch for fusion in fusions.FUSIONS}
    for name in vars(passes):
        if name.startswith(("fuse_", "enable_")) and name not in ours:
            setattr(passes, name, False)


def _what_to_do(fusion: fusions.Fusion, state: str) -> str:
    """What to change so that a pass is this package's; "" if it is, or if that is nothing to wish for in itself."""
    if state == "ours" or fusion.enters == "layer":
        return ""
    if "settings leave it" in state:
        return f"take {fusion.name} out of the setting stock_passes"
    if "=false was asked for" in state:
        return f"leave out {fusion.switch}=false"
    if state.startswith("off: ") and state.endswith("=false"):
        return f"leave out the setting {fusion.switch}=false"
    if fusion.enters != "pass":
        return ""
    flag = f"-cc.pass_config.{fusion.switch}=true"
    return f"{flag} {vllm_flags.INDUCTOR_PARTITION}" if fusion.switch == "fuse_attn_quant" else flag


if __name__ == "__main__":
    child.answer(probe)
