# SPDX-License-Identifier: Apache-2.0
"""What engine_process.py asks of vLLM's workers: weights, what was selected and fused, the GPU's time of a decode step."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from random_weights import RandomWeights

STOCK_NORM_PASS = "rmsnorm_quant_fusion_pass"


class EngineWorker(RandomWeights):
    """vLLM worker extension: `LLM(..., worker_extension_cls="engine_worker.EngineWorker")`."""

    def linear_kernels(self) -> dict[str, int]:
        """Class of the kernel of each quantised linear layer, counted; without the plugin too."""
        from vllm_fusion_plugin import compat

        return compat.linear_kernels(self)

    def attention_backends(self) -> dict[str, int]:
        """vLLM's name of the backend of each layer that has one, counted."""
        from vllm_fusion_plugin import compat

        layers = [module for module in self.model_runner.model.modules() if hasattr(module, "attn_backend")]
        return dict(Counter(map(compat.attention_backend, layers)))

    def watch_graphs(self) -> None:
        """From now on remember the last two CUDA graphs replayed in this process."""
        replay = torch.cuda.CUDAGraph.replay
        _replayed.clear()

        def remembered(graph: torch.cuda.CUDAGraph) -> None:
            _replayed[:] = [*_replayed[-1:], graph]
            replay(graph)

        torch.cuda.CUDAGraph.replay = remembered  # type: ignore[method-assign]

    @torch.inference_mode()
    def decode_graph_ms(self, tokens: list[int], replays: int) -> float | None:
        """Median time on the GPU of the step that was decoded last, replayed with `tokens` as its input.

        None if that step was not one CUDA graph (two in a row are then unlike). Replays follow each other without a gap, so
        neither Python nor the driver is in the number. They repeat the step where it was: the same requests, lengths and
        cache blocks, which nobody owns any more. All engines get the same tokens because experts are chosen by them.
        """
        graph = self._warm_decode_graph(tokens)
        if graph is None:
            return None
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        events[-1].synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in pairwise(events))

    @torch.inference_mode()
    def decode_graph_kernels(self, tokens: list[int], replays: int) -> list[dict[str, Any]] | None:
        """Kernels of that step, as CUPTI times them, those that take longest first: `name`, `launches` and `us` a step.

        CUPTI's times are longer than what `decode_graph_ms` measures: kernels that overlap (PDL) both count their wait.
        Compare kernels of two engines with them, not whole steps.
        """
        graph = self._warm_decode_graph(tokens)
        if graph is None:
            return None
        self.watch_kernels()
        for _ in range(replays):
            graph.replay()
        return self.watched_kernels(replays)

    def watch_kernels(self) -> None:
        """Start to note what kernels run on the GPU, until `watched_kernels` is asked."""
        torch.cuda.synchronize()
        _profiles.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]))
        _profiles[-1].start()

    def watched_kernels(self, steps: int = 1) -> list[dict[str, Any]]:
        """What has run since, those that took longest first: `name`, `launches` and `us` a step."""
        torch.cuda.synchronize()
        profile = _profiles.pop()
        profile.stop()
        found: dict[str, list[float]] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                found.setdefault(event.name, []).append(event.device_time)
        rows = [
            {"name": name, "launches": len(us) / steps, "us": round(sum(us) / steps, 2)} for name, us in found.items()
        ]
        return sorted(rows, key=lambda row: -row["us"])

    def _warm_decode_graph(self, tokens: list[int]) -> torch.cuda.CUDAGraph | None:
        """The CUDA graph of the step that was decoded last, replayed a few times with `tokens` as its input; None if that
        step was not one graph."""
        if len(_replayed) < 2 or _replayed[0] is not _replayed[1]:
            return None
        graph, runner = _replayed[1], self.model_runner
        ids = runner.input_buffers.input_ids if hasattr(runner, "input_buffers") else runner.input_ids.gpu
        ids[: len(tokens)] = torch.tensor(tokens, dtype=ids.dtype, device=ids.device)
        for _ in range(5):
            graph.replay()
        return graph


_replayed: list[Any] = []
_profiles: list[Any] = []


def _count_stock_norm_fusions() -> None:
    """vLLM's RMSNormQuantFusionPass counts its matches and leaves them out of the match table: enter them (0.20 to 0.33)."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return  # vLLM's CPU build has no such pass
    from vllm.compilation.passes.fusion.rms_quant_fusion import RMSNormQuantFusionPass
    from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass

    call = RMSNormQuantFusionPass.__call__

    def counted(self: Any, graph: torch.fx.Graph) -> None:
        call(self, graph)
        VllmPatternMatcherPass.match_table[STOCK_NORM_PASS] += self.matched_count

    RMSNormQuantFusionPass.__call__ = counted


_count_stock_norm_fusions()  # vLLM imports this file in its worker, before it compiles
