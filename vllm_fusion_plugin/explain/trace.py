# SPDX-License-Identifier: Apache-2.0
"""Traces a model on a GPU that is not there, in a process of its own: `python -m` is child.ask's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import child, vllm_flags
from ..rank_report import RankReport
from ..tracing import fake_gpu
from ..tracing import model as tracing
from .traced import Request, Traced

LAYERS = (
    "layers fuse without passes, MLPs and experts with FP8 weights in blocks; the report of a running engine says which"
)


def trace(request: dict[str, Any], tell: Callable[[Any], None]) -> dict[str, Any]:
    """What passes do to the model of a `Request`, as a `Traced`. Tells (share of the work done, what is being done)."""
    asked = Request(**request)
    tell((0.0, "importing vLLM"))
    with tempfile.TemporaryDirectory() as cache:
        return _trace(asked, cache, tell).model_dump()


def _trace(request: Request, cache: str, tell: Callable[[Any], None]) -> Traced:
    if reason := fake_gpu.unavailable():
        raise child.UserError(f"explain needs vLLM's CUDA build, no GPU: {reason}")
    tracing.prepare_environment(cache)
    gpu = fake_gpu.GPUS[request.gpu]
    with_flashinfer = request.flashinfer and not gpu.arch  # which is NVIDIA's
    _take_flashinfer_to_be(with_flashinfer)
    fake_gpu.install(gpu)
    traced = Traced(
        vllm=importlib.metadata.version("vllm"),
        gpu=gpu.name,
        flashinfer=not gpu.arch and importlib.util.find_spec("flashinfer") is not None,
    )
    if gpu.arch:
        on = os.environ.get("VLLM_ROCM_USE_AITER") == "1"
        traced.notes.append(
            f"AITER is {'on' if on else 'off'}: VLLM_ROCM_USE_AITER=1 switches it on, here as when serving"
        )
    if with_flashinfer and not traced.flashinfer:
        traced.notes.append("FlashInfer is not installed here: this is what vLLM does without it")

    flags = vllm_flags.parse([request.model, *request.flags], **tracing.alone(request.tensor_parallel_size))
    traced.asked, traced.ignored = flags.asked, flags.ignored
    tell((0.25, "reading the configuration"))
    config = vllm_flags.engine_config(_alone(flags.arguments, traced))
    traced.no_effect = vllm_flags.without_effect(config, flags.asked)
    traced.notes += _sizes_by_default(config.model_config, Path(request.model) / "config.json")
    if config.model_config.quantization is None:
        raise child.UserError(
            f"{request.model} is not quantised: its config.json has no quantization_config, and no --quantization is given; "
            "there is nothing to fuse with"
        )
    if not _may_trace(config, traced):
        return traced
    with tracing.building(config):
        tell((0.35, "building the model on fake tensors"))
        _build_and_compile(config, traced, tell)
    return traced


def _sizes_by_default(model_config: Any, path: Path) -> list[str]:
    """A note for each size that a config.json does not give, and that transformers' default stands in for."""
    given: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            given.update(value)
            list(map(collect, value.values()))

    collect(json.loads(path.read_text(encoding="utf-8")))
    config = model_config.hf_text_config
    names = getattr(config, "attribute_map", {})
    return [
        f"config.json has no key {size}: this is with {getattr(config, size)}, the default of {type(config).__name__}"
        for size in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if not {size, names.get(size, size)} & given and hasattr(config, size)
    ]


def _take_flashinfer_to_be(usable: bool) -> None:
    if usable:
        # Else vLLM looks for a compiler, which this machine need not have.
        os.environ["VLLM_HAS_FLASHINFER_CUBIN"] = "1"
    else:
        sys.modules["flashinfer"] = None  # type: ignore[assignment]


def _alone(arguments: Any, traced: Traced) -> Any:
    """EngineArgs without the one pass that makes a workspace together with the other ranks: there are none."""
    if arguments.tensor_parallel_size > 1:
        given = arguments.compilation_config
        passes = given.setdefault("pass_config", {}) if isinstance(given, dict) else given.pass_config
        if isinstance(passes, dict):
            passes["fuse_allreduce_rms"] = False
        else:
            passes.fuse_allreduce_rms = False
        traced.notes.append(
            "fuse_allreduce_rms, which vLLM may switch on with several GPUs, is left out here: up to some number of tokens "
            "it takes the norms after an all-reduce, and their quantisers stay by themselves"
        )
    return arguments


def _may_trace(config: Any, traced: Traced) -> bool:
    """Whether vLLM would compile, with the plugin in place; `traced` says why not."""
    import vllm.plugins

    from .. import compat, plugin
    from ..report import RECORDER

    vllm.plugins.load_general_plugins()
    if plugin._off is None:
        raise child.UserError("vLLM does not find the plugin here; vllm-fusion-plugin doctor says why")
    plugin.configure_engine(config)
    traced.state = plugin._off or RECORDER.engine(compat.engine_owner(config)).inactive
    if not traced.state and (nothing := compat.why_nothing_compiles(config)):
        traced.state, traced.do = nothing, vllm_flags.what_compiles(nothing)
        traced.notes.append(LAYERS)
    return not traced.state


def _build_and_compile(config: Any, traced: Traced, tell: Callable[[Any], None]) -> None:
    from .. import compat
    from . import layers

    try:
        model = tracing.build(config)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, AssertionError) as e:
        raise child.UserError(f"vLLM cannot build this model from its config.json: {child.one_line(e)}") from e
    traced.layers = layers.cut(model)
    compat.forget_layers_outside(model, config)  # passes ask all layers that the engine knows
    pieces = len(traced.layers) + 1
    tell((0.5, "bringing weights into shape"))
    tracing.finish_weights(model, config)
    tell((0.55, "compiling"))

    def compiled(piece: int) -> None:
        done = min(1.0, (piece + 1) / pieces)
        tell((0.55 + 0.45 * done, f"compiled {min(piece + 1, pieces)} of {pieces} pieces"))

    tracing.compile_model(model, config, compiled)
    traced.itemsize = config.model_config.dtype.itemsize
    traced.report = RankReport.model_validate(tracing.plugin_report(model, config))


if __name__ == "__main__":
    child.answer(trace)
