# SPDX-License-Identifier: Apache-2.0
"""A small module through vLLM's compiler: what its graph was, what it became, and which pass matched how often.

    fake_gpu.install()
    config = make_config(["none", "+silu_and_mul", "+quant_fp8"], fuse_act_quant=True)
    with set_current_vllm_config(config), on_device("cuda"):
        recording = trace_module(MyModule(), (torch.empty(64, 512),), config)

The compiler is vLLM's own VllmBackend, so a pass meets the graph that it would meet in a model, and the pass manager is
the one that a server would use: the plugin's after `vllm_fusion_plugin.plugin.register()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from recorder import Recording, record_subgraphs
from torch._subclasses.fake_tensor import FakeTensorMode

MODELS = Path(__file__).parent.parent / "models"


@contextlib.contextmanager
def on_device(device: str) -> Iterator[None]:
    """Modules and tensors made inside are fake ones on `device`."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        yield


def make_config(custom_ops: list[str], dtype: torch.dtype = torch.bfloat16, **pass_config: bool) -> Any:
    """A VllmConfig that compiles with these custom ops and passes. The model named in it only lends its dtype."""
    from vllm.config import CompilationConfig, CompilationMode, ModelConfig, PassConfig, VllmConfig

    return VllmConfig(
        model_config=ModelConfig(model=str(MODELS / "qwen3-8b-8layers"), dtype=dtype, skip_tokenizer_init=True),
        compilation_config=CompilationConfig(
            mode=CompilationMode.VLLM_COMPILE, custom_ops=custom_ops, pass_config=PassConfig(**pass_config)
        ),
    )


def trace_module(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], config: Any) -> Recording:
    """Compile `module` on `inputs`, whose first dimension is the number of tokens, and record what the passes did."""
    from vllm.compilation.backends import VllmBackend
    from vllm.config import set_current_vllm_config
    from vllm.utils import deep_gemm

    if deep_gemm.is_deep_gemm_supported():
        deep_gemm._lazy_init()  # a server's weights have been there before; Dynamo cannot trace the search for the module
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    torch._dynamo.reset()
    with set_current_vllm_config(config), torch.no_grad(), record_subgraphs() as recording:
        torch.compile(module, backend=VllmBackend(config), fullgraph=True)(*inputs)
    return recording
