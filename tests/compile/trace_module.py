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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_fusion_plugin.tracing.subgraphs import Recording, record_subgraphs

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


# Passes whose patterns do not depend on the layers of the model. To trace patterns is most of a small trace's time.
_KEEPABLE = ("ActivationQuantFusionPass", "RMSNormQuantFusionPass", "GroupQuantPass")
_kept: dict[Any, Any] = {}


@contextlib.contextmanager
def passes_kept() -> Iterator[None]:
    """A pass built for a config like an earlier one's is the earlier one, with the patterns that it has traced: as if
    both graphs were of one model. Not for tests that change what a pass registers or traces."""
    from vllm_fusion_plugin import report, settings
    from vllm_fusion_plugin.passes import pass_manager
    from vllm_fusion_plugin.passes.base import FusionPass

    build = pass_manager._build

    def build_once(name: str, stock: Any, config: Any) -> Any:
        if name not in _KEEPABLE or config.compilation_config.debug_dump_path is not None:
            return build(name, stock, config)
        inductor = config.compilation_config.inductor_compile_config
        plain = {option: value for option, value in inductor.items() if isinstance(value, bool | int | float | str)}
        chosen = settings.load(config.additional_config)
        key = (name, config.model_config.dtype, repr(chosen), repr(sorted(plain.items())))
        if key not in _kept:
            made = build(name, stock, config)
            if not isinstance(made, FusionPass):
                return made
            _kept[key] = made
        report.RECORDER.report.passes[name] = "ours"
        return _kept[key]

    with mock.patch.object(pass_manager, "_build", build_once):
        yield


def trace_module(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], config: Any, keep_passes: bool = True
) -> Recording:
    """Compile `module` on `inputs`, whose first dimension is the number of tokens, and record what the passes did.

    keep_passes: see passes_kept."""
    from vllm.compilation.backends import VllmBackend
    from vllm.config import set_current_vllm_config
    from vllm.utils import deep_gemm

    if deep_gemm.is_deep_gemm_supported():
        deep_gemm._lazy_init()  # a server's weights have been there before; Dynamo cannot trace the search for the module
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    torch._dynamo.reset()
    kept = passes_kept() if keep_passes else contextlib.nullcontext()
    with kept, set_current_vllm_config(config), torch.no_grad(), record_subgraphs() as recording:
        torch.compile(module, backend=VllmBackend(config), fullgraph=True)(*inputs)
    return recording


def group_rounding(quant_rounding: str) -> str:
    """What an op that fuses this vLLM's group quantiser of that form, custom_op or native, is told of its rounding."""
    import vllm
    from packaging.version import Version

    if Version(vllm.__version__).release < (0, 33):
        return quant_rounding
    return {"custom_op": "reciprocal", "native": "native_floored"}[quant_rounding]


class Branches(torch.nn.Module):
    """Modules side by side, each on inputs of its own: one trace, which takes seconds, answers for all of them."""

    def __init__(self, branches: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.branches = torch.nn.ModuleList(branches)

    def forward(self, *inputs: torch.Tensor) -> list[Any]:
        each = len(inputs) // len(self.branches)
        return [branch(*inputs[i * each : (i + 1) * each]) for i, branch in enumerate(self.branches)]


def trace_branches(
    makers: Sequence[Callable[[], torch.nn.Module]],
    shapes: Sequence[tuple[int, ...]],
    config: Any,
    keep_passes: bool = True,
) -> Recording:
    """Trace what `makers` make, each on tensors of `shapes` in the model's dtype. They are called late because layers choose
    their form under the config that compiles them."""
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(config), on_device("cuda"), set_default_torch_dtype(config.model_config.dtype):
        branches = Branches([make() for make in makers])
        inputs = tuple(torch.empty(shape) for _ in makers for shape in shapes)
        return trace_module(branches, inputs, config, keep_passes)


def outputs(graph: torch.fx.Graph) -> list[tuple[Any, ...]]:
    """Shape, dtype and strides of what a graph returns."""
    (result,) = next(n for n in graph.nodes if n.op == "output").args
    return [(n.meta["val"].shape, n.meta["val"].dtype, n.meta["val"].stride()) for n in result if n is not None]


def our_ops(recording: Recording) -> list[tuple[str, dict[str, Any]]]:
    """This package's ops in the only graph, each with its arguments by name; in the order of the graph's inputs that they
    read, which is that of the branches."""
    (subgraph,) = recording.subgraphs
    position = {node: i for i, node in enumerate(subgraph.after.nodes)}

    def source(node: torch.fx.Node) -> int:
        return source(node.args[0]) if node.all_input_nodes else position[node]

    ours = [node for node in subgraph.after.nodes if str(node.target).startswith("vllm_fusion_plugin.")]
    ours.sort(key=source)
    return [(node.target._opname, arguments_of(node)) for node in ours]


def arguments_of(node: torch.fx.Node) -> dict[str, Any]:
    """By name, defaults included, but for the format of FP8 codes: only graphs of some of AMD's GPUs name one."""
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}
    given = dict(zip(defaults, node.args, strict=False))
    return {name: value for name, value in (defaults | given).items() if name != "fp8" or name in given}


def check_graphs(recording: Recording) -> None:
    """The graph after the passes is in order, and returns what the one before them did: shapes, dtypes and strides."""
    for subgraph in recording.subgraphs:
        assert outputs(subgraph.after) == outputs(subgraph.before)


def reasons() -> list[str]:
    """Why what was not fused was not, from the plugin's report."""
    from vllm_fusion_plugin import report

    return [m.reason for s in report.RECORDER.report.subgraphs for m in s.missed]
