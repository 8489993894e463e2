# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tracer import TraceError, Tracer

from vllm_fusion_plugin.tracing import fake_gpu


@pytest.fixture(scope="session")
def trace_model() -> Iterator[Callable[..., dict[str, Any]]]:
    """`trace_model(model, plugin=..., ...)`: see Tracer.trace."""
    if reason := fake_gpu.unavailable():
        pytest.skip(reason)
    with Tracer() as tracer:

        def trace(model: str, **options: Any) -> dict[str, Any]:
            try:
                return tracer.trace(model, **options)
            except TraceError as e:
                pytest.fail(str(e), pytrace=False)

        yield trace


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin, with a report that is a test's own."""
    from vllm_fusion_plugin import plugin, report

    plugin.register()
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())
