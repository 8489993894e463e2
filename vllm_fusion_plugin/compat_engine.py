# SPDX-License-Identifier: Apache-2.0
"""What of vLLM's internals concerns an engine: what it is known by, whether and how it compiles, its caches and its workers.

The other half of compat.py, by the same rules: each entry says what it does, why, since when, and when it can go. Read
against 0.20.2, 0.26.0, 0.32.0 and 0.33.0.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

logger = logging.getLogger("vllm.fusion_plugin")


def _never_raise(record: Callable[[], Any]) -> Any:
    """What `record` returns: a report must never stop a model from compiling."""
    try:
        return record()
    except Exception as e:
        logger.warning("fusion report: not recorded: %r", e)
        return None


# ---- engines ---------------------------------------------------------------------------------------------------------


def engine_owner(config: Any) -> Any:
    """What all configurations of one engine in a process share, and no two engines do. vLLM makes new VllmConfigs from an
    engine's own, for a draft model for example, each with an `instance_id` of its own; but attention layers of all of them
    are to be found in one `static_forward_context`, and so in one CompilationConfig (all versions read)."""
    return config.compilation_config


def is_layer_of(owner: Any, layer: Any) -> bool:
    """Whether an attention layer belongs to the engine of that `engine_owner`."""
    return owner.static_forward_context.get(getattr(layer, "layer_name", None)) is layer


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


# ---- compiler --------------------------------------------------------------------------------------------------------


def hook_compiler(begin: Callable[..., None], end: Callable[..., None]) -> bool:
    """Call `begin(pass_manager, graph_index, compile_range, nodes)` and `end(artefact)` around every subgraph that vLLM
    compiles; pass_manager is what vLLM hands to Inductor as such, None if it hands on none.

    The pass manager alone cannot know how often an artefact is reused: vLLM stops compiling before any pass runs when it
    has an identical graph already. Reporting only; False if this vLLM has no such method. Re-entrant.
    """
    from vllm.compilation.backends import CompilerManager
    from vllm.platforms import current_platform

    original = getattr(CompilerManager, "compile", None)
    if original is None:
        return False
    if hasattr(original, "_fusion_plugin"):
        return True

    signature = inspect.signature(original)

    def begin_with(arguments: dict[str, Any]) -> None:
        manager = (arguments.get("additional_inductor_config") or {}).get(current_platform.pass_key)
        nodes = list(arguments["graph"].graph.nodes)
        begin(manager, arguments.get("graph_index", 0), arguments.get("compile_range"), nodes)

    @functools.wraps(original)
    def compile(self: Any, graph: Any, *args: Any, **kwargs: Any) -> Any:
        _never_raise(lambda: begin_with(signature.bind(self, graph, *args, **kwargs).arguments))
        artefact = original(self, graph, *args, **kwargs)
        _never_raise(lambda: end(artefact))
        return artefact

    compile._fusion_plugin = True  # type: ignore[attr-defined]
    setattr(CompilerManager, "compile", compile)  # noqa: B010  (a type checker forbids assigning to a method)
    return True


def hook_aot_load(begin: Callable[[Any], Any], end: Callable[..., None]) -> bool:
    """Call `begin(config)`, and `end(begun, config, name, folder)` when vLLM has found a compiled part of a model on disk.

    A process that loads an AOT artefact makes no VllmBackend and no pass manager: without this, nothing tells which of an
    engine's parts came from where. `_try_load_aot_compiled_fn(model, path)` is there in all versions read; `_compile_tag`,
    the part's name, since 0.32 ("" without it). Called once vLLM has the module; False if it is not there, or is different.
    """
    module = sys.modules.get("vllm.compilation.decorators")
    original = getattr(module, "_try_load_aot_compiled_fn", None)
    if original is None or len(inspect.signature(original).parameters) != 2:
        return False
    if hasattr(original, "_fusion_plugin"):
        return True

    @functools.wraps(original)
    def load(model: Any, path: str) -> Any:
        begun = _never_raise(lambda: begin(model.vllm_config))
        loaded = original(model, path)
        if loaded is not None and begun is not None:
            name = getattr(model, "_compile_tag", "")
            folder = artefact_folder(model.vllm_config.compilation_config)
            _never_raise(lambda: end(begun, name, folder))
        return loaded

    load._fusion_plugin = True  # type: ignore[attr-defined]
    module._try_load_aot_compiled_fn = load  # type: ignore[union-attr]
    return True


# ---- compile cache ---------------------------------------------------------------------------------------------------


def hash_into_config(configure: Callable[[Any], None], key: Callable[[Any], str | None]) -> None:
    """Make `VllmConfig.compute_hash` cover `key(config)`, which has no effects; call `configure(config)` first, which has.

    Both of vLLM's caches (AOT artefacts, and the Inductor artefacts of VllmBackend) name their folders by this hash, and
    ask for it before they load anything, so that it is the last moment at which an engine can be prepared. vLLM compares
    it with no other process's: each rank has folders of its own, and each front end hashes for itself.
    If either fails, the engine has vLLM's own hash together with something that no other process has.
    All versions read. Goes when plugins can add hash factors.
    """
    from vllm.config import VllmConfig

    original = VllmConfig.compute_hash
    if hasattr(original, "_fusion_plugin"):
        return

    @functools.wraps(original)
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> str:
        stock = original(self, *args, **kwargs)
        try:
            configure(self)
            mine = key(self)
        except Exception as e:
            mine = os.urandom(16).hex()
            logger.warning("vllm-fusion-plugin: what is compiled now is not found again in vLLM's cache: %r", e)
        return stock if mine is None else hashlib.sha256(f"{stock} {mine}".encode()).hexdigest()[: len(stock)]

    compute_hash._fusion_plugin = True  # type: ignore[attr-defined]
    VllmConfig.compute_hash = compute_hash  # type: ignore[method-assign]


def use_own_cache_folder(config: Any, key: str) -> None:
    """A folder that the user names (`compilation_config.cache_dir`) is not hashed by vLLM at all: ours get one below it."""
    # Only a folder that is there before vLLM chose one is the user's; vLLM writes its own choice into the same field.
    compilation = config.compilation_config
    if compilation.__dict__.setdefault("_fusion_plugin_cache_dir", compilation.cache_dir or "") and (
        key not in compilation.cache_dir
    ):
        compilation.cache_dir = os.path.join(compilation.cache_dir, f"vllm_fusion_plugin-{key}")


def artefact_folder(compilation_config: Any) -> str | None:
    """Where vLLM keeps the code that this process compiles or has loaded.

    `local_cache_dir` is VllmBackend's folder while it compiles, but a process that loads an AOT artefact makes no
    VllmBackend: there it is the artefact's. Inductor's folder, which vLLM sets, is the artefact's in both.
    """
    artefact = os.path.dirname(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    if os.path.basename(os.path.dirname(artefact)) == "torch_aot_compile":
        return artefact
    return compilation_config.local_cache_dir


# ---- workers ---------------------------------------------------------------------------------------------------------


class _WorkerMethod:
    """A method that instances of WorkerBase have and the class does not: vLLM refuses to start with a worker extension class
    of which the worker class has a name already. One that an extension or a subclass defines itself comes first."""

    def __init__(self, base: type, name: str, function: Callable[[Any], Any]) -> None:
        self.base, self.name, self.function = base, name, function

    def __get__(self, worker: Any, owner: type | None = None) -> Any:
        if worker is None:
            raise AttributeError(f"type object {getattr(owner, '__name__', owner)!r} has no attribute {self.name!r}")
        theirs = getattr(super(self.base, worker), self.name, None)
        return theirs if theirs is not None else types.MethodType(self.function, worker)


def attach_worker_methods(methods: Mapping[str, Callable[[Any], Any]]) -> None:
    """Give every worker `methods`, which `collective_rpc` calls by name, when vLLM has its worker base class: at once, or
    whenever it next loads plugins, which it does in every process right before it makes a worker.

    Not imported here: that takes 1.5 s, and the entry point also runs where no worker ever is (0.20.2 to 0.33.0). GPU
    workers have `get_compilation_match_table` themselves and keep it. Re-entrant.
    """
    from vllm import plugins

    def attach() -> None:
        module = sys.modules.get("vllm.v1.worker.worker_base")
        base: Any = getattr(module, "WorkerBase", None)  # None while the module is being imported
        for name, method in methods.items() if base is not None else ():
            if name not in vars(base):
                setattr(base, name, _WorkerMethod(base, name, method))

    attach()
    original = plugins.load_general_plugins
    if hasattr(original, "_fusion_plugin"):
        return

    @functools.wraps(original)
    def load_general_plugins() -> None:
        original()
        _never_raise(attach)

    load_general_plugins._fusion_plugin = True  # type: ignore[attr-defined]
    plugins.load_general_plugins = load_general_plugins


def linear_kernels(worker: Any) -> dict[str, int]:
    """Classes of the kernels behind a worker's quantised linear layers, counted: they decide what there is to fuse.

    A kernel is held by the layer's quant method (`Fp8LinearMethod.fp8_linear`, since 0.20), or, where that leaves the work
    to a scheme, as compressed-tensors and Quark do, by the layer's `scheme`. Where neither holds one, the scheme's or
    method's own class is told."""
    found: dict[str, int] = {}
    model = getattr(getattr(worker, "model_runner", None), "model", None)
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        method, scheme = getattr(module, "quant_method", None), getattr(module, "scheme", None)
        if "MoE" in type(method).__name__:
            continue  # experts run a kernel of another kind
        held = [value for holder in (method, scheme) for value in getattr(holder, "__dict__", {}).values()]
        names = {type(value).__name__ for value in held if _is_kernel(value)}
        if not names and _is_quantised_linear(module, method):
            names = {type(method if scheme is None else scheme).__name__}
        for name in names:
            found[name] = found.get(name, 0) + 1
    return found


def _is_kernel(value: Any) -> bool:
    return any(c.__name__.endswith("Kernel") for c in type(value).__mro__)


def _is_quantised_linear(module: Any, method: Any) -> bool:
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    return isinstance(module, LinearBase) and method is not None and not isinstance(method, UnquantizedLinearMethod)


def stock_match_table() -> dict[str, int]:
    """vLLM's own match table, in which our passes count too; empty where this vLLM has none, or has compiled nothing."""
    module = sys.modules.get("vllm.compilation.passes.vllm_inductor_pass")
    getter = getattr(module, "get_match_table", None)
    return getter() if getter else {}
