# SPDX-License-Identifier: Apache-2.0
"""One string for everything of ours that changes compiled code; vLLM's compile cache hashes it (see seams.py).

What counts is the code that Python imports, wherever it comes from: source files, an installation of .pyc files alone, a
zip, extension modules. So modules are listed and read by the loaders that import them. Where that fails, nothing can tell
two builds apart, and the fingerprint is one that no other process has: code compiled under it is never found again.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import importlib.util
import logging
import os
import pkgutil
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from . import __version__, fusions
from .settings import Settings

logger = logging.getLogger("vllm.fusion_plugin")

# Modules that decide what is computed. The others (cli, demo, settings, plugin, report and its kin) change no graph and no
# kernel, so an edit there keeps a user's compile cache warm.
MODULES = ("fusions", "compat", "seams", "graph", "roundings", "demo.cpu*", "layers*", "passes*", "ops*", "kernels*")


class UnknownCodeError(Exception):
    """The state of the code cannot be established; the message says why."""


def _modules(paths: Iterable[str], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, spec) of every module below a package's paths, found as importing would find it, nothing imported."""
    for info in pkgutil.iter_modules(list(paths), f"{prefix}."):
        spec = info.module_finder.find_spec(info.name)  # type: ignore[call-arg]
        if spec is None or spec.loader is None:
            raise UnknownCodeError(f"no loader for {info.name}")
        yield info.name, spec
        if info.ispkg:
            yield from _modules(spec.submodule_search_locations or (), info.name)


def _deciding_modules(paths: Iterable[str]) -> dict[str, Any]:
    specs = dict(_modules(paths, __package__))
    chosen: dict[str, Any] = {}
    for pattern in MODULES:
        names = fnmatch.filter(specs, f"{__package__}.{pattern}")
        if not names:
            raise UnknownCodeError(f"no module {pattern} is found where {__package__} was imported from")
        chosen |= {name: specs[name] for name in names}
    return chosen


def _content(value: Any) -> Any:
    """A code object, or a constant in one, as nested tuples that are equal in every process where the code is: no file names
    and no line numbers, and sets in order. (marshal's bytes differ from process to process.)"""
    if isinstance(value, types.CodeType):
        return (
            "code",
            value.co_qualname,
            value.co_code,
            value.co_exceptiontable,
            value.co_flags,
            (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_stacksize),
            (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars),
            tuple(map(_content, value.co_consts)),
        )
    if isinstance(value, tuple):
        return tuple(map(_content, value))
    if isinstance(value, frozenset):
        return ("set", *sorted(repr(_content(v)) for v in value))
    return (type(value).__name__, value)


def _read(name: str, spec: Any) -> bytes:
    """What importing the module would run."""
    code = spec.loader.get_code(name)
    if code is not None:
        return repr(_content(code)).encode()
    return spec.loader.get_data(spec.origin)  # an extension module


def code_hash(paths: Iterable[str]) -> str:
    """Hash of the modules of this package that decide what is computed, read from `paths` (a package's `__path__`).

    Raises:
        UnknownCodeError: a module cannot be listed or read.
    """
    digest = hashlib.sha256()
    try:
        for name, spec in sorted(_deciding_modules(paths).items()):
            content = _read(name, spec)
            digest.update(f"{name} {len(content)}\n".encode())
            digest.update(content)
    except UnknownCodeError:
        raise
    except Exception as e:  # whatever a file system, a loader or a file cut short comes up with
        raise UnknownCodeError(f"the package's code cannot be read: {type(e).__name__}: {e}") from e
    return digest.hexdigest()


@functools.cache
def _state(pid: int) -> tuple[str, str]:
    """(hash, "") of the code, or (a name that no other process has, why)."""
    try:
        from . import __path__

        return code_hash(__path__), ""
    except Exception as e:
        return f"unknown-{uuid.uuid4().hex}", str(e)


def source_hash() -> str:
    """Hash of the code that decides what is computed; where it is unknown, a string of this process alone (a fork has its
    own)."""
    return _state(os.getpid())[0]


def unknown_code() -> str:
    """Why the state of the code cannot be established; "" if it can."""
    return _state(os.getpid())[1]


def unique_key() -> str:
    """Like a fingerprint, and never the same: what is compiled under it is not found again."""
    return f"once-{uuid.uuid4().hex}"


def kernels_without_source() -> str:
    """Why Triton could not compile this installation's kernels, which it does from their source; "" if it could."""
    for name in ("launch", "numerics"):
        full = f"{__package__}.kernels.{name}"
        try:
            spec = importlib.util.find_spec(full)
            source = spec.loader.get_source(full)  # type: ignore[union-attr]
        except Exception as e:
            return f"the source of {full}, which Triton compiles, cannot be read: {type(e).__name__}: {e}"
        if source is None:
            return f"this installation has no source of {full}, and Triton compiles kernels from source"
    return ""


def _added_modules() -> list[str]:
    """Modules of other packages that decide what is computed."""
    return sorted({module for added in fusions.ADDED.values() for module in added.modules})


@functools.cache
def _hash_of_added(name: str) -> str:
    """Hash of a module's code; where that cannot be read, a string of this process alone. Imports the packages that it is
    in."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            raise UnknownCodeError(f"no loader for {name}")
        return hashlib.sha256(_read(name, spec)).hexdigest()
    except Exception as e:
        logger.warning("vllm-fusion-plugin: compiled code is not kept: the code of %s cannot be read: %r", name, e)
        return unique_key()


def fingerprint(settings: Settings, extra: Mapping[str, str] = types.MappingProxyType({})) -> str:
    """Version, code (of added fusions, too), settings and `extra` in 16 hex digits.

    extra: what else decides about compiled code in this process and is found out when it runs, by name; for example what a
    probe has found about the roundings of the installed vLLM's ops. Order does not matter; an empty one is as none.
    """
    state = "\n".join((__version__, source_hash(), settings.of_compiled_code()))
    state += "".join(f"\n{name} {_hash_of_added(name)}" for name in _added_modules())
    if extra:
        state += "".join(f"\n{name}={extra[name]!r}" for name in sorted(extra))
    return hashlib.sha256(state.encode()).hexdigest()[:16]
