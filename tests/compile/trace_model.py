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
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import fake_gpu

TOKENS = 64  # any number above 1: it becomes a symbol


def main(arguments: list[str] | None = None) -> None:
    """arguments: those of the command line by default."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as cache:
        prepare_environment(options.env, cache)
        os.environ["VLLM_FUSION_PLUGIN"] = str(int(options.plugin))
        fake_gpu.install()
        result = trace(options)
    text = json.dumps(result, indent=1)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with the model's config.json")
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


def prepare_environment(assignments: list[str], cache: str) -> None:
    """assignments: NAME=VALUE each. Has to happen before vLLM is imported, which reads some of these then."""
    os.environ |= {
        "VLLM_CACHE_ROOT": cache,
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # the same trace on a machine that has a GPU
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            sys.exit(f"--env: expected NAME=VALUE, got {assignment!r}")
        os.environ[name] = value


def import_vllm() -> None:
    """What all traces need and what takes long, for a process that will fork."""
    for module in (
        "recorder",
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
    import torch
    from recorder import record_subgraphs
    from torch._subclasses.fake_tensor import FakeTensorMode
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    started, cpu = time.monotonic(), time.process_time()
    config = engine_config(options)
    # vLLM makes some real tensors on the way, on the CPU: they may be mixed with fake ones.
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with set_current_vllm_config(config), torch.no_grad(), set_default_torch_dtype(config.model_config.dtype):
        join_fake_process_groups(options.tp)
        with fake_mode, torch.device("cuda"):
            model = initialize_model(config).eval()
            finish_weights(model, config)
            tokens, positions = torch.zeros(TOKENS, dtype=torch.int32), torch.zeros(TOKENS, dtype=torch.int64)
        with fake_mode, set_forward_context(None, config, num_tokens=TOKENS), record_subgraphs() as recording:
            model(tokens, positions)
    if options.dump_graphs:
        dump_graphs(recording, options.dump_graphs)
    return describe(options, model, recording) | {
        "seconds": round(time.monotonic() - started, 1),
        "cpu": round(time.process_time() - cpu, 1),
    }


def engine_config(options: argparse.Namespace) -> Any:
    """The configuration that `vllm serve` would arrive at."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    # All-reduce fusion makes a workspace together with the other ranks, and there are none.
    alone = {"fuse_allreduce_rms": False} if options.tp > 1 else {}
    arguments = EngineArgs(
        model=str(options.model),
        skip_tokenizer_init=True,
        tensor_parallel_size=options.tp,
        # Otherwise vLLM counts the GPUs to see whether it needs Ray.
        distributed_executor_backend="mp" if options.tp > 1 else None,
        compilation_config=options.compilation_config | {"pass_config": alone | options.pass_config},
        **options.engine_args,
    )
    return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)


def join_fake_process_groups(world_size: int) -> None:
    """Be rank 0 of `world_size`. The other ranks do not exist; collectives return at once, which fake tensors allow."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state

    new_group, model_parallel_group = dist.new_group, parallel_state.init_model_parallel_group

    def new_fake_group(ranks: Any = None, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return new_group(ranks, *args, backend="fake", **kwargs)  # vLLM asks for gloo here and there

    def without_broadcaster(*args: Any, **kwargs: Any) -> Any:
        # The broadcaster waits for the others.
        return model_parallel_group(*args, **kwargs | {"use_message_queue_broadcaster": False})

    dist.new_group = new_fake_group
    parallel_state.init_model_parallel_group = without_broadcaster
    # vLLM finds out by exchanging messages.
    parallel_state.in_the_same_node_as = lambda *args, **kwargs: [True] * world_size
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    parallel_state.init_distributed_environment(world_size, rank=0, local_rank=0, backend="fake")
    parallel_state.initialize_model_parallel(world_size, backend="fake")


def finish_weights(model: Any, config: Any) -> None:
    """What follows loading: kernels bring weights and scales into their layout, which the graph then shows."""
    import torch
    from torch._subclasses import fake_impls
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    def scalar(fake_mode: Any, func: Any, tensor: Any) -> float | int:
        # Attention layers look whether the checkpoint had scales for the KV cache; -1 is what they hold if it had none.
        return -1.0 if tensor.dtype.is_floating_point else 0

    read_scalar = torch.ops.aten._local_scalar_dense.default
    with (
        mock.patch.dict(fake_impls.op_implementations_dict, {read_scalar: scalar}),
        weights_without_deep_gemm(),
        torch.compiler.set_stance("force_eager"),
    ):
        process_weights_after_loading(model, config.model_config, torch.device("cuda"))


@contextlib.contextmanager
def weights_without_deep_gemm() -> Iterator[None]:
    """DeepGEMM rearranges weight scales with a kernel. On Hopper the layout it wants is the one they have already."""
    from vllm.utils import deep_gemm

    if deep_gemm.is_deep_gemm_supported():
        deep_gemm._lazy_init()  # or it would put its own function back
    with mock.patch.object(deep_gemm, "_transform_sf_into_required_layout_impl", lambda sf, **layout: sf):
        yield


def describe(options: argparse.Namespace, model: Any, recording: Any) -> dict[str, Any]:
    import torch
    from recorder import count_ops
    from vllm.compilation.passes.vllm_inductor_pass import get_match_table

    manager = recording.pass_manager
    return {
        "model": options.model.name,
        "gpu": fake_gpu.H200.name,
        "tp": options.tp,
        "versions": {"vllm": metadata.version("vllm"), "torch": torch.__version__},
        "linear_kernels": linear_kernels(model),
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
            }
            for subgraph in recording.subgraphs
        ],
        "matches_by_graph": recording.matches_by_graph(),
        "matches_by_layer": recording.matches_by_layer(),
        "match_table": get_match_table(),
        "plugin": plugin_report(model) if options.plugin else None,
    }


def class_path(instance: Any) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def linear_kernels(model: Any) -> Counter[str]:
    """How many layers use which of vLLM's GEMMs. It decides what there is to fuse: some quantise inside."""
    return Counter(
        type(part).__name__
        for module in model.modules()
        for part in vars(getattr(module, "quant_method", None) or argparse.Namespace()).values()
        if type(part).__module__.startswith("vllm.model_executor.kernels.linear")
    )


def plugin_report(model: Any) -> dict[str, Any]:
    """As a worker that holds the model would answer."""
    from vllm_fusion_plugin import compat
    from vllm_fusion_plugin.report import get_fusion_report

    worker = argparse.Namespace(model_runner=argparse.Namespace(model=model))
    return get_fusion_report() | {"linear_kernels": compat.linear_kernels(worker)}


def dump_graphs(recording: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for subgraph in recording.subgraphs:
        for name in ("before", "after"):
            (folder / f"{subgraph.pieces[0]}.{name}.txt").write_text(str(getattr(subgraph, name)))


if __name__ == "__main__":
    main()
