# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/ in CUDA: the library that has them, whether it is used, and if not, why.

It is no Python module: it registers itself with torch, and works with every Python and every torch from 2.11 on that has its
CUDA runtime. csrc/binding.cpp says what it exports.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path

logger = logging.getLogger("vllm.fusion_plugin")

ENV = "FUSION_PLUGIN_KERNELS"  # set by the plugin from its setting `kernels`; kernels know no settings
ENV_PATH = "FUSION_PLUGIN_CUDA_LIBRARY"  # another file than the package's own

NAMESPACE = "vllm_fusion_plugin_cuda"
"""Where every op of the library is, whoever runs the op of its name."""
FALLBACK = "vllm_fusion_plugin_triton"
"""Where it looks for the op of the same name, for what it does not do itself."""

NOT_BUILT = "csrc is not built"


class Library:
    """A library that is loaded and known to torch."""

    def __init__(self, path: Path) -> None:
        """OSError if it does not go with this process's torch."""
        self._c = ctypes.CDLL(str(path))
        self._c.vfp_op.restype = ctypes.c_char_p
        self._c.vfp_bind.restype = ctypes.c_void_p
        self._c.vfp_unbind.argtypes = (ctypes.c_void_p,)
        if self._c.vfp_define():
            raise OSError(f"{path}: torch does not take its ops")
        self.ops: frozenset[str] = frozenset(self._names())

    def _names(self) -> list[str]:
        names: list[str] = []
        while name := self._c.vfp_op(len(names)):
            names.append(name.decode())
        return names

    def bind(self, namespace: str, op: str, key: str = "CUDA") -> int:
        """Let dispatch key `key` of namespace::op run the library's op of this name, until `unbind` of what is returned."""
        binding = self._c.vfp_bind(namespace.encode(), key.encode(), op.encode())
        if not binding:
            raise RuntimeError(f"torch does not take {op} of the CUDA library for {key} of {namespace}")
        return binding

    def unbind(self, binding: int) -> None:
        self._c.vfp_unbind(binding)

    def has_code(self, device: int) -> bool:
        """Whether it has code for a GPU. Loads all kernels onto it."""
        return self._c.vfp_has_code(device) == 0

    def set_error(self, error: Exception) -> None:
        """What an op of the library raises that has gone on to an op in FALLBACK, if that one fails."""
        value_error = isinstance(error, ValueError)
        text = str(error) if value_error else f"{type(error).__name__}: {error}"
        self._c.vfp_set_error(text.encode(), int(value_error))

    def force_tile(self, rows: int = 0, groups: int = 0, warps: int = 0) -> None:
        """Launch every kernel with this tile from now on; without arguments, with the one that it chooses. For tuning."""
        self._c.vfp_force_tile(rows, groups, warps)


def path() -> Path:
    return Path(os.environ.get(ENV_PATH) or Path(__file__).parent.parent / "_C.so")


@functools.cache
def _load(path: Path) -> Library | str:
    if not path.exists():
        return NOT_BUILT
    import torch  # whose libraries this one finds in the process

    if torch.version.cuda is None:
        return "torch has no CUDA"
    try:
        return Library(path)
    except OSError as e:
        logger.warning("vllm-fusion-plugin: kernels are Triton's, for the CUDA library cannot be loaded: %s", e)
        return f"the CUDA library cannot be loaded: {e}"


def load() -> Library | None:
    """The library, once a process; None if there is none, or none that can be loaded."""
    found = _load(path())
    return None if isinstance(found, str) else found


def chosen() -> Library | None:
    """The library, if it is to be used."""
    return None if os.environ.get(ENV, "auto") == "triton" else load()


def why_not() -> str:
    """Why Triton's kernels run where the library has one; "" if they do not."""
    if os.environ.get(ENV, "auto") == "triton":
        return "kernels=triton"
    found = _load(path())
    return found if isinstance(found, str) else ""


@functools.cache
def tell_of_missing_code(library: Library, device: int) -> None:
    """Warn, once, of a GPU that the library has no code for."""
    if not library.has_code(device):
        logger.warning("vllm-fusion-plugin: kernels are Triton's, for the CUDA library has no code for GPU %d", device)
