# SPDX-License-Identifier: Apache-2.0
"""One string for everything of ours that changes compiled code; vLLM's compile cache hashes it (see compat.py)."""

from __future__ import annotations

import functools
import hashlib
import pathlib

from . import __version__
from .settings import Settings

# cli, demo, settings and report change no graph and no kernel, so an edit there keeps a user's compile cache warm.
SOURCES = (
    "compat.py",
    "cpu*.py",
    "mla.py",
    "pass_manager.py",
    "roundings.py",
    "passes/*.py",
    "ops/*.py",
    "kernels/*.py",
)


@functools.cache
def source_hash() -> str:
    """Hash of the sources that decide what is computed; files in path order, names included."""
    root = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for pattern in SOURCES for p in root.glob(pattern)):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def fingerprint(settings: Settings) -> str:
    """Version, sources and settings in 16 hex digits."""
    state = "\n".join((__version__, source_hash(), settings.model_dump_json()))
    return hashlib.sha256(state.encode()).hexdigest()[:16]
