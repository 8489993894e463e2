# SPDX-License-Identifier: Apache-2.0
"""Where the kernels of these tests run: on the GPU if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
IMPORTED_TOO_EARLY = not HAS_GPU and "triton" in sys.modules and not os.environ.get("TRITON_INTERPRET")

INTERPRETED = not HAS_GPU and not IMPORTED_TOO_EARLY

if INTERPRETED:
    from .interpreter import use_interpreter

    use_interpreter()  # sets TRITON_INTERPRET


def pytest_collection_finish() -> None:
    # All kernels are decorated. Engines and imports of the tests in other folders are not to be interpreted.
    if INTERPRETED:
        os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not INTERPRETED:
        yield
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the launch reads it too
    # numpy's warnings about infinities and NaN, which the tests feed it
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered")
        yield


@pytest.fixture(autouse=True)
def _memory_for_others() -> Iterator[None]:
    """A dozen processes share a GPU, and torch keeps what a test of 13 GB has freed."""
    yield
    if HAS_GPU and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where a test puts its tensors so that a kernel's launch function takes them."""
    if IMPORTED_TOO_EARLY:
        # Triton decides at its import which of its own functions the interpreter can call.
        pytest.skip("no GPU, and triton was imported before tests/kernels could choose its interpreter: run them alone")
    return torch.device("cuda" if HAS_GPU else "cpu")
