# SPDX-License-Identifier: Apache-2.0
"""The metric of several engines and ranks; a server that has it is in e2e/test_serve.py."""

from __future__ import annotations

import asyncio
import importlib.util
from types import SimpleNamespace

import pytest

from vllm_fusion_plugin import metrics
from vllm_fusion_plugin.rank_report import Found, Missed, RankReport, Subgraph

pytestmark = pytest.mark.skipif(importlib.util.find_spec("prometheus_client") is None, reason="vLLM is not installed")


def report(rank: int, fused: int) -> RankReport:
    found = [
        Found(pass_name="rmsnorm_quant_fusion_pass", pattern="rms_norm+token", module=f"{i}") for i in range(fused)
    ]
    left = [Missed(pass_name="none", reason="why", module="head")]
    return RankReport(rank=rank, subgraphs=[Subgraph(index=0, compile_range="(1, 8)", found=found, missed=left)])


class FrontEnd:
    """Two data-parallel engines of two ranks each."""

    log_stats = True
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="served"))

    def __init__(self):
        self.engine_core = SimpleNamespace(engine_ranks_managed=[2, 3], core_engines=[b"a", b"b"])
        self.engine_core._call_utility_async = self.call

    async def call(self, method, *arguments, engine):
        assert (method, arguments) == ("collective_rpc", ("get_fusion_report", None, (), None))
        return [report(rank, fused=rank + (10 if engine == b"b" else 0)).model_dump() for rank in (1, 2)]


def published(front_end) -> dict[tuple[str, ...], float]:
    async def serve() -> None:
        metrics.publish(front_end)
        await asyncio.gather(*metrics._tasks)

    asyncio.run(serve())
    from prometheus_client import REGISTRY

    (metric,) = (m for m in REGISTRY.collect() if m.name == metrics.NAME)
    return {tuple(s.labels[name] for name in metrics.LABELS): s.value for s in metric.samples}


def test_each_rank_of_each_engine_counts():
    for _ in range(2):  # a second front end in the same process
        samples = published(FrontEnd())
    fused = {key[1:3]: value for key, value in samples.items() if key[3:] == ("fuse_norm_quant", "fused")}
    assert fused == {("2", "1"): 1, ("2", "2"): 2, ("3", "1"): 11, ("3", "2"): 12}
    assert samples["served", "2", "1", "no pass", "left"] == 1


def test_workers_without_an_answer_are_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(metrics.logger, "propagate", True)
    monkeypatch.setattr(metrics.logger.parent, "propagate", True)
    front_end = FrontEnd()
    front_end.engine_core._call_utility_async = None
    published(front_end)
    assert "/metrics does not tell what has fused: TypeError" in caplog.text


def test_nothing_is_asked_without_a_server_or_without_vllms_metrics():
    metrics.publish(FrontEnd())
    assert not metrics._tasks

    async def serve_without_metrics() -> None:
        front_end = FrontEnd()
        front_end.log_stats = False
        metrics.publish(front_end)
        assert not metrics._tasks

    asyncio.run(serve_without_metrics())
