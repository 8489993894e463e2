# SPDX-License-Identifier: Apache-2.0
"""A whole model on fake tensors, as vLLM builds it, brings its weights into shape and compiles it: without weights, GPU or
other ranks.

    fake_gpu.install(gpu)
    with building(config):
        model = build(config)
        finish_weights(model, config)
        recording = compile_model(model, config)
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from . import subgraphs

TOKENS = 64  # any number above 1: it becomes a symbol


def prepare_environment(cache: str) -> None:
    """Has to happen before vLLM is imported, which reads some of these then. cache: a folder for what vLLM keeps."""
    os.environ |= {
        "VLLM_CACHE_ROOT": cache,
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # the same trace on a machine that has a GPU
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def alone(tensor_parallel_size: int) -> dict[str, Any]:
    """Fields of vLLM's EngineArgs for rank 0 of several, the others of which do not exist."""
    # Otherwise vLLM counts the GPUs to see whether it needs Ray.
    return {
        "skip_tokenizer_init": True,
        "tensor_parallel_size": tensor_parallel_size,
        "distributed_executor_backend": "mp" if tensor_parallel_size > 1 else None,
    }


@contextlib.contextmanager
def building(config: Any) -> Iterator[None]:
    """Be rank 0 of the engine of `config`, on fake tensors. Once a process."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    with (
        set_current_vllm_config(config),
        _norms_as_in_a_worker(config),
        torch.no_grad(),
        set_default_torch_dtype(config.model_config.dtype),
    ):
        join_fake_process_groups(config.parallel_config.tensor_parallel_size)
        # vLLM makes some real tensors on the way, on the CPU: they may be mixed with fake ones.
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def _norms_as_in_a_worker(config: Any) -> contextlib.AbstractContextManager[Any]:
    """A worker sets whose kernels vLLM's IR ops are lowered to before it builds a model: AITER's norms, with AITER."""
    priority: Any = getattr(getattr(config, "kernel_config", None), "ir_op_priority", None)
    return priority.set_priority() if hasattr(priority, "set_priority") else contextlib.nullcontext()


def build(config: Any) -> Any:
    """The model, its weights as vLLM makes them before it loads any."""
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model

    with torch.device("cuda"):
        return initialize_model(config).eval()


def finish_weights(model: Any, config: Any) -> None:
    """What follows loading: kernels bring weights and scales into their layout, which the graph then shows."""
    import torch
    from torch._subclasses import fake_impls
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    def scalar(fake_mode: Any, func: Any, tensor: Any) -> float | int:
        # Attention layers look whether the checkpoint had scales for the KV cache; -1 is what they hold if it had none.
        return -1.0 if tensor.dtype.is_floating_point else 0

    def unique(fake_mode: Any, func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        # NVFP4 layers look whether the shards of a weight have one global scale: they have.
        return tensor.new_empty(1), tensor.new_empty(0, dtype=torch.int64), tensor.new_empty(0, dtype=torch.int64)

    aten = torch.ops.aten
    answers = {aten._local_scalar_dense.default: scalar, aten._unique2.default: unique}
    with (
        torch.device("cuda"),
        mock.patch.dict(fake_impls.op_implementations_dict, answers),
        weights_without_deep_gemm(),
        torch.compiler.set_stance("force_eager"),
    ):
        process_weights_after_loading(model, config.model_config, torch.device("cuda"))


def compile_model(model: Any, config: Any, progress: Callable[[int], None] = lambda piece: None) -> subgraphs.Recording:
    """Call the model, which compiles it as far as the last pass.

    progress: called with the position of each piece that vLLM has compiled."""
    import torch
    from vllm.forward_context import set_forward_context

    tokens = torch.zeros(TOKENS, dtype=torch.int32, device="cuda")
    positions = torch.zeros(TOKENS, dtype=torch.int64, device="cuda")
    # Not inside of torch.device("cuda"): under it, no piece is equal to another, and vLLM compiles each.
    with set_forward_context(None, config, num_tokens=TOKENS), subgraphs.record_subgraphs(progress) as recording:
        model(tokens, positions)
    return recording


def join_fake_process_groups(world_size: int) -> None:
    """Be rank 0 of `world_size`. The other ranks do not exist; collectives return at once, which fake tensors allow."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state

    new_group, model_parallel_group = dist.new_group, parallel_state.init_model_parallel_group

    def new_fake_group(ranks: Any = None, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        # vLLM asks for gloo here and there.
        return new_group(ranks, *args, backend="fake", **kwargs)  # type: ignore[misc]

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


@contextlib.contextmanager
def weights_without_deep_gemm() -> Iterator[None]:
    """DeepGEMM rearranges weight scales with a kernel. On Hopper the layout it wants is the one they have already."""
    from vllm.utils import deep_gemm

    if deep_gemm.is_deep_gemm_supported():
        deep_gemm._lazy_init()  # or it would put its own function back
    with mock.patch.object(deep_gemm, "_transform_sf_into_required_layout_impl", lambda sf, **layout: sf):
        yield


def linear_kernels(model: Any) -> Counter[str]:
    """How many layers use which of vLLM's GEMMs. It decides what there is to fuse: some quantise inside."""
    return Counter(
        type(part).__name__
        for module in model.modules()
        for part in vars(getattr(module, "quant_method", None) or SimpleNamespace()).values()
        if type(part).__module__.startswith("vllm.model_executor.kernels.linear")
    )


def plugin_report(model: Any, config: Any) -> dict[str, Any]:
    """The fusion report, as a worker that holds the model would answer."""
    from .. import compat
    from ..plugin import model_loaded, outside_of_graphs
    from ..report import RECORDER, get_fusion_report

    worker = SimpleNamespace(model_runner=SimpleNamespace(model=model), vllm_config=config)
    model_loaded(worker)
    outside = [found.model_dump() for found in outside_of_graphs(worker, RECORDER.record)]
    return get_fusion_report() | {"linear_kernels": compat.linear_kernels(worker), "outside": outside}
