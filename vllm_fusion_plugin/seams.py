# SPDX-License-Identifier: Apache-2.0
"""What the package wraps or replaces in vLLM, and how each of these can go.

Each entry: what it does, why, since when, and when it can go. Nothing else in the package changes vLLM, but for the CPU
opt-in (demo/cpu.py) and the layers that fusions enter through (layers/). All are re-entrant: plugins load more than once.
Read against 0.20.2, 0.26.0, 0.32.0 and 0.33.0. Features are probed, not derived from version numbers.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .compat import artefact_folder

logger = logging.getLogger("vllm.fusion_plugin")

STOCK_PASS_MANAGER = "vllm.compilation.passes.pass_manager.PostGradPassManager"


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


# ---- flags -----------------------------------------------------------------------------------------------------------


def wrap_flag_defaults(flags: Sequence[str], turn_on: Callable[[Any, str], bool]) -> None:
    """Where vLLM asks a configuration for the default of one of these flags of PassConfig and gets False, make it
    `turn_on(config, flag)`. Re-entrant.

    What: the functions in `OPTIMIZATION_LEVEL_TO_CONFIG`, which `VllmConfig.__post_init__` calls for flags that nobody has
    set (all versions read). A level that has a value instead of a function, as -O0, keeps it.
    Goes when vLLM's defaults ask which passes there are.
    """
    from vllm.config.vllm import OPTIMIZATION_LEVEL_TO_CONFIG

    for level in OPTIMIZATION_LEVEL_TO_CONFIG.values():
        defaults: Any = level["compilation_config"]["pass_config"]  # type: ignore[index]
        for flag in flags:
            if callable(defaults.get(flag)) and not hasattr(defaults[flag], "_fusion_plugin"):
                defaults[flag] = _or_turned_on(defaults[flag], flag, turn_on)


def _or_turned_on(
    default: Callable[[Any], bool], flag: str, turn_on: Callable[[Any, str], bool]
) -> Callable[..., bool]:
    @functools.wraps(default)
    def with_ours(config: Any) -> bool:
        if default(config):
            return True
        try:
            return turn_on(config, flag)
        except Exception as e:  # must not stop vLLM, which then has its own default
            logger.warning("vllm-fusion-plugin: %s stays as vLLM has it by default: %r", flag, e)
            return False

    with_ours._fusion_plugin = True  # type: ignore[attr-defined]
    return with_ours


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


def _never_raise(record: Callable[[], Any]) -> Any:
    """What `record` returns: a report must never stop a model from compiling."""
    try:
        return record()
    except Exception as e:
        logger.warning("fusion report: not recorded: %r", e)
        return None


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
    """Give every worker `methods`, which `collective_rpc` calls by name, when vLLM has its worker base class.

    Not imported here: that takes 1.5 s, and the entry point also runs where no worker ever is (0.20.2 to 0.33.0). GPU
    workers have `get_compilation_match_table` themselves and keep it. Re-entrant.
    """

    def attach() -> None:
        module = sys.modules.get("vllm.v1.worker.worker_base")
        base: Any = getattr(module, "WorkerBase", None)  # None while the module is being imported
        for name, method in methods.items() if base is not None else ():
            if name not in vars(base):
                setattr(base, name, _WorkerMethod(base, name, method))

    _whenever_plugins_load("worker methods", attach)


def hook_model_load(loaded: Callable[[Any], None], warmed_up: Callable[[], None]) -> None:
    """Call `loaded(worker)` when a worker has loaded its models, LoRA's layers included, and before it runs them;
    `warmed_up()` when it has warmed up. What they raise is logged. Re-entrant.

    What: `load_model` and `compile_or_warm_up_model` of a worker, on the object, once `WorkerWrapperBase.init_device` has
    returned: it is the last that vLLM calls on the wrapper itself before (all versions read). An engine that compiles
    nothing asks for no hash, so that nothing else tells of it. Goes when vLLM tells plugins of a loaded model.
    """

    def attach() -> None:
        module = sys.modules.get("vllm.v1.worker.worker_base")
        wrapper: Any = getattr(module, "WorkerWrapperBase", None)
        original = getattr(wrapper, "init_device", None)
        if original is None or hasattr(original, "_fusion_plugin"):
            return

        @functools.wraps(original)
        def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            worker = self.worker
            _then(worker, "load_model", lambda: loaded(worker))
            _then(worker, "compile_or_warm_up_model", warmed_up)
            return result

        init_device._fusion_plugin = True  # type: ignore[attr-defined]
        wrapper.init_device = init_device

    _whenever_plugins_load("model load", attach)


def _then(worker: Any, name: str, after: Callable[[], None]) -> None:
    """Have a worker's method call `after` before it returns."""
    original = getattr(worker, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        try:
            after()
        except Exception as e:  # must never stop vLLM
            logger.warning("vllm-fusion-plugin: after %s: %s: %s", name, type(e).__name__, e)
        return result

    setattr(worker, name, method)


# ---- engines ---------------------------------------------------------------------------------------------------------


def hook_engine_start(started: Callable[[Any], None]) -> None:
    """Call `started(engine_core)` when all workers of an engine have compiled, warmed up and captured, and before it takes a
    request. What `started` raises ends the engine's start. Re-entrant.

    What: `EngineCore._initialize_kv_caches`, which ends with that (all versions read), whatever the platform and executor.
    Goes when vLLM asks plugins whether an engine may serve.
    """

    def attach() -> None:
        module = sys.modules.get("vllm.v1.engine.core")
        core: Any = getattr(module, "EngineCore", None)
        original = getattr(core, "_initialize_kv_caches", None)
        if original is None or hasattr(original, "_fusion_plugin"):
            return

        @functools.wraps(original)
        def initialize(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            started(self)
            return result

        initialize._fusion_plugin = True  # type: ignore[attr-defined]
        core._initialize_kv_caches = initialize

    _whenever_plugins_load("engine start", attach)


def hook_front_end(made: Callable[[Any], None]) -> None:
    """Call `made(async_llm)` in a process that serves, when it has made vLLM's AsyncLLM, whose engines are ready then. Never
    raises. Re-entrant.

    What: `AsyncLLM.__init__`, when vLLM asks `Executor.get_class` for the class that it hands to it: plugins are loaded
    before vLLM imports AsyncLLM, and after it has imported Executor (all versions read).
    Goes when vLLM hands its engines to plugins of the front end.
    """

    def attach() -> None:
        executor: Any = getattr(sys.modules.get("vllm.v1.executor.abstract"), "Executor", None)
        original = getattr(executor, "get_class", None)
        if original is None or hasattr(original, "_fusion_plugin"):
            return

        @functools.wraps(original)
        def get_class(*args: Any, **kwargs: Any) -> Any:
            _never_raise(hook)
            return original(*args, **kwargs)

        get_class._fusion_plugin = True  # type: ignore[attr-defined]
        executor.get_class = staticmethod(get_class)

    def hook() -> None:
        front_end: Any = getattr(sys.modules.get("vllm.v1.engine.async_llm"), "AsyncLLM", None)
        if front_end is None or hasattr(front_end.__init__, "_fusion_plugin"):
            return
        original = front_end.__init__

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            _never_raise(lambda: made(self))

        init._fusion_plugin = True  # type: ignore[attr-defined]
        front_end.__init__ = init

    _whenever_plugins_load("front end", attach)


def _whenever_plugins_load(name: str, attach: Callable[[], None]) -> None:
    """Call `attach` at once, and whenever vLLM next loads plugins, which it does in every process right before it makes an
    engine or a worker: by then it has imported their modules (all versions read). Re-entrant, by `name`."""
    from vllm import plugins

    attach()
    original = plugins.load_general_plugins
    if not hasattr(original, "_fusion_plugin"):
        attached: dict[str, Callable[[], None]] = {}

        @functools.wraps(original)
        def load_general_plugins() -> None:
            original()
            for each in list(attached.values()):
                _never_raise(each)

        load_general_plugins._fusion_plugin = attached  # type: ignore[attr-defined]
        plugins.load_general_plugins = load_general_plugins
    plugins.load_general_plugins._fusion_plugin.setdefault(name, attach)  # type: ignore[attr-defined]
