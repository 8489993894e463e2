# SPDX-License-Identifier: Apache-2.0
"""Trace a whole model as vLLM would compile it on a GPU that is not there, and tell as JSON what its passes matched.

    python tests/compile/trace_model.py tests/models/qwen3-8b-8layers --env VLLM_USE_DEEP_GEMM=0 --output trace.json

Needs vLLM's CUDA build; takes a process of its own because pretending to have a GPU cannot be undone. The folder holds a
config.json and no weights.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_fusion_plugin.tracing import fake_gpu
from vllm_fusion_plugin.tracing import model as tracing


def main(arguments: list[str] | None = None) -> None:
    """arguments: those of the command line by default."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as cache:
        tracing.prepare_environment(cache)
        set_environment(options.env)
        os.environ["VLLM_FUSION_PLUGIN"] = str(int(options.plugin))
        fake_gpu.install(fake_gpu.GPUS[options.gpu])
        result = trace(options)
    text = json.dumps(result, indent=1)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with the model's config.json")
    parser.add_argument("--gpu", choices=fake_gpu.GPUS, default="h200", help="the GPU to pretend to have")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size; rank 0 is traced")
    parser.add_argument(
        "--plugin", action=argparse.BooleanOptionalAction, default=False, help="with or without vllm_fusion_plugin"
    )
    parser.add_argument(
        "--pass-config", type=json.loads, default={}, help="JSON, for example '{\"fuse_attn_quant\": true}'"
    )
    parser.add_argument("--compilation-config", type=json.loads, default={}, help="JSON")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON, more fields of vLLM's EngineArgs")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable; repeatable"
    )
    parser.add_argument("--output", type=Path, help="file for the JSON, default standard output")
    parser.add_argument("--dump-graphs", type=Path, help="folder for the graphs before and after the passes, as text")
    options = parser.parse_args(arguments)
    if options.plugin and "vllm_fusion_plugin" not in {
        e.name for e in metadata.entry_points(group="vllm.general_plugins")
    }:
        parser.error("--plugin: vllm_fusion_plugin is not installed here (pip install -e .), so vLLM does not load it")
    return options


def set_environment(assignments: list[str]) -> None:
    """assignments: NAME=VALUE each."""
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            sys.exit(f"--env: expected NAME=VALUE, got {assignment!r}")
        os.environ[name] = value


def import_vllm() -> None:
    """What all traces need and what takes long, for a process that will fork."""
    for module in (
        "vllm_fusion_plugin.tracing.subgraphs",
        "torch._inductor.compile_fx",
        "vllm.compilation.backends",
        "vllm.engine.arg_utils",
        "vllm.model_executor.model_loader.utils",
        "vllm.model_executor.models.deepseek_v2",
        "vllm.model_executor.models.gemma3",
        "vllm.model_executor.models.glm4_moe",
        "vllm.model_executor.models.llama",
        "vllm.model_executor.models.qwen3",
        "vllm.model_executor.models.qwen3_next",
    ):
        importlib.import_module(module)
    # vLLM asks every method whether a checkpoint is its own: it imports them all, for each trace 4 s otherwise.
    from vllm.model_executor.layers import quantization

    for method in quantization.QUANTIZATION_METHODS:
        with contextlib.suppress(Exception):  # what a trace needs it will ask for itself
            quantization.get_quantization_config(method)


def trace(options: argparse.Namespace) -> dict[str, Any]:
    started, cpu = time.monotonic(), time.process_time()
    config = engine_config(options)
    with tracing.building(config):
        model = tracing.build(config)
        tracing.finish_weights(model, config)
        recording = tracing.compile_model(model, config)
        report = tracing.plugin_report(model, config) if options.plugin else None
    if options.dump_graphs:
        dump_graphs(recording, options.dump_graphs)
    return describe(options, model, recording) | {
        "plugin": report,
        "seconds": round(time.monotonic() - started, 1),
        "cpu": round(time.process_time() - cpu, 1),
    }


def engine_config(options: argparse.Namespace) -> Any:
    """The configuration that `vllm serve` would arrive at."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    # All-reduce fusion makes a workspace together with the other ranks, and there are none.
    unfused = {"fuse_allreduce_rms": False} if options.tp > 1 else {}
    arguments = EngineArgs(
        model=str(options.model),
        compilation_config=options.compilation_config | {"pass_config": unfused | options.pass_config},
        **tracing.alone(options.tp),
        **options.engine_args,
    )
    return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)


def describe(options: argparse.Namespace, model: Any, recording: Any) -> dict[str, Any]:
    import torch
    from vllm.compilation.passes.vllm_inductor_pass import get_match_table

    from vllm_fusion_plugin.tracing.subgraphs import count_ops

    manager = recording.pass_manager
    return {
        "model": options.model.name,
        "gpu": fake_gpu.GPUS[options.gpu].name,
        "tp": options.tp,
        "versions": {"vllm": metadata.version("vllm"), "torch": torch.__version__},
        "linear_kernels": tracing.linear_kernels(model),
        "pass_manager": class_path(manager),
        "passes": [class_path(p) for p in manager.passes],
        "graphs": [
            {
                "index": subgraph.pieces[0],
                "range": subgraph.compile_range,
                "reuses": len(subgraph.pieces),
                "matches": subgraph.matches,
                "ops_before": count_ops(subgraph.before),
                "ops_after": count_ops(subgraph.after),
                "not_lowered": why_not_lowered(subgraph.after) if options.plugin else "",
            }
            for subgraph in recording.subgraphs
        ],
        "matches_by_graph": recording.matches_by_graph(),
        "matches_by_layer": recording.matches_by_layer(),
        "match_table": get_match_table(),
    }


def why_not_lowered(graph: Any) -> str:
    """What Inductor says of a graph that it cannot go on with, up to the code of its kernels; "" if it can. In a server,
    that would end the engine's start."""
    import torch
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    inputs = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in inputs if isinstance(value, torch.Tensor))
    module = torch.fx.GraphModule({}, graph)
    try:
        with V.set_fake_mode(mode):
            for decompose in (  # what follows vLLM's passes
                post_grad.decompose_auto_functionalized,
                post_grad.decompose_triton_kernel_wrapper_functional,
            ):
                decompose(module.graph)
            module.recompile()
            lowering = GraphLowering(module, inputs, mode.shape_env)
            with V.set_graph_handler(lowering):
                lowering.run(*inputs)
    except Exception as e:
        return f"{type(e).__name__}: {e}"[:1000]
    return ""


def class_path(instance: Any) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def dump_graphs(recording: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for subgraph in recording.subgraphs:
        for name in ("before", "after"):
            (folder / f"{subgraph.pieces[0]}.{name}.txt").write_text(str(getattr(subgraph, name)))


if __name__ == "__main__":
    main()
