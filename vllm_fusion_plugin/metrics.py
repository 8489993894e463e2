# SPDX-License-Identifier: Apache-2.0
"""How many quantisers are fused and left, on vLLM's Prometheus endpoint.

What fuses is known to workers, and /metrics is the front end's, another process: that one asks the workers once, when their
engines are ready, and nothing changes afterwards. With several front ends each asks, and vLLM's endpoint adds none twice.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from .rank_report import RankReport
from .report import quantisers_by_fusion

logger = logging.getLogger("vllm.fusion_plugin")

# With vLLM's prefix: vLLM unregisters such metrics when it makes another engine in the same process.
NAME = "vllm:fusion_plugin_quantisers"
WHAT = (
    "Quantisers of activations in the model's layers, fused with what makes their input, or left, by what fuses them."
)
LABELS = ("model_name", "engine", "rank", "fusion", "state")

_tasks: set[asyncio.Task[None]] = set()  # the event loop holds tasks weakly


def publish(async_llm: Any) -> None:
    """Have the metrics of a front end's engines published as soon as its event loop gets to it, unless vLLM publishes none
    itself. Returns at once."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # no server
        return
    if async_llm.log_stats:
        task = loop.create_task(_publish(async_llm))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)


async def _publish(async_llm: Any) -> None:
    from . import compat

    try:
        answers = await compat.ask_workers(async_llm, "get_fusion_report")
        model = str(async_llm.vllm_config.model_config.served_model_name)
        count({number: [RankReport.model_validate(r) for r in ranks] for number, ranks in answers.items()}, model)
    except Exception as e:  # must never stop vLLM
        logger.warning("vllm-fusion-plugin: /metrics does not tell what has fused: %s: %s", type(e).__name__, e)


def count(engines: dict[int, list[RankReport]], model: str) -> None:
    """Set the metric, for engines by their numbers and the name that the model is served by."""
    from prometheus_client import REGISTRY, Gauge

    for known in [c for c in REGISTRY._collector_to_names if getattr(c, "_name", "") == NAME]:
        REGISTRY.unregister(known)
    gauge = Gauge(NAME, WHAT, LABELS, multiprocess_mode="mostrecent")
    for number, ranks in engines.items():
        for rank in ranks:
            for fusion, (fused, left) in quantisers_by_fusion(rank).items():
                gauge.labels(model, str(number), str(rank.rank), fusion, "fused").set(fused)
                gauge.labels(model, str(number), str(rank.rank), fusion, "left").set(left)
