# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own, which end_to_end.py starts.

It gets one `Settings` as JSON on its command line, then a JSON command a line on stdin, and gives a JSON answer a line on
stdout. What runs in vLLM's workers is in engine_worker.py. That is a file of its own because it changes vLLM when it is
imported, and vLLM imports it by name: in this file, which runs as `__main__`, it would do so twice.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import Counter
from itertools import pairwise
from typing import Any, TypedDict

REPLAYS = 50
TOKEN_PROMPTS = (5, 100, 500, 2000)


class Settings(TypedDict):
    llm: dict[str, Any]
    """What `vllm.LLM` is called with."""
    plugin: bool
    """Whether there is a fusion report."""
    vocabulary: int
    prefill: int
    """Tokens of the prefill."""
    steps: int
    """Decode steps a turn."""


def prompts(count: int, length: int, vocabulary: int) -> list[Any]:
    """Prompts of token ids that differ from each other and are the same in every engine."""
    return [{"prompt_token_ids": [(7919 * (i + 1) + 31 * j) % vocabulary for j in range(length)]} for i in range(count)]


def over_ranks(counts: list[dict[str, int]]) -> dict[str, int]:
    """Counts of all ranks; a count of 0 says something and stays."""
    total: Counter[str] = Counter()
    for of_rank in counts:
        total.update(of_rank)
    return dict(total)


class MeasuredEngine:
    """vLLM's engine with random weights, and the commands that it answers."""

    def __init__(self, settings: Settings) -> None:
        from vllm import LLM

        self.plugin, self.vocabulary = settings["plugin"], settings["vocabulary"]
        self.prefill_tokens, self.steps = settings["prefill"], settings["steps"]
        self.llm = LLM(**settings["llm"])
        self.filled: int = self.llm.collective_rpc("fill_random_weights")[0]
        self.llm.collective_rpc("watch_graphs")
        self.stamps: list[float] = []  # when each step of the last requests ended
        step = self.llm.llm_engine.step

        def stamped() -> Any:
            out = step()
            self.stamps.append(time.perf_counter())
            return out

        self.llm.llm_engine.step = stamped  # type: ignore[method-assign]

    def generate(
        self, batch: int, prompt: int, tokens: int, logprobs: int | None = None, only: list[int] | None = None
    ) -> tuple[float, Any]:
        """Milliseconds and vLLM's outputs; only: the one token that each request may generate."""
        from vllm import SamplingParams

        common = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False, "logprobs": logprobs}
        params = [SamplingParams(**common, allowed_token_ids=only and only[i : i + 1]) for i in range(batch)]
        self.stamps.clear()
        start = time.perf_counter()
        out = self.llm.generate(prompts(batch, prompt, self.vocabulary), params, use_tqdm=False)
        return (time.perf_counter() - start) * 1e3, out

    def prefill(self) -> dict[str, float]:
        """Milliseconds of one request of `prefill_tokens` tokens, which generates one."""
        # The GPU has just run another process: the first request pays for the change of context.
        self.generate(1, self.prefill_tokens, 1)
        return {"ms": statistics.median(self.generate(1, self.prefill_tokens, 1)[0] for _ in range(3))}

    def decode(self, batch: int) -> dict[str, float | None]:
        """Milliseconds of one step of `batch` requests, on the clock and on the GPU (None if it is not one CUDA graph)."""
        self.generate(batch, 16, 8)
        self.generate(batch, 16, self.steps + 8)
        # Without prefill and the steps after it, and without the last, when requests leave: all steps alike.
        steps = [(b - a) * 1e3 for a, b in pairwise(self.stamps)][4:-4]
        inputs = self.decode_same(batch)
        return {
            "ms": statistics.median(steps),
            "gpu_ms": self.llm.collective_rpc("decode_graph_ms", args=(inputs, REPLAYS))[0],
        }

    def kernels(self, batch: int) -> list[dict[str, Any]] | None:
        """Kernels of a decode step of `batch` requests on the GPU (None if it is not one CUDA graph)."""
        return self.llm.collective_rpc("decode_graph_kernels", args=(self.decode_same(batch), REPLAYS))[0]

    def prefill_kernels(self) -> list[dict[str, Any]]:
        """Kernels of one request of `prefill_tokens` tokens on the GPU."""
        self.generate(1, self.prefill_tokens, 1)
        self.llm.collective_rpc("watch_kernels")
        self.generate(1, self.prefill_tokens, 1)
        return self.llm.collective_rpc("watched_kernels")[0]

    def decode_same(self, batch: int) -> list[int]:
        """Decode the same tokens in every engine, because experts are chosen by them; returns the tokens."""
        inputs = [104729 * (i + 1) % self.vocabulary for i in range(batch)]
        self.generate(batch, 16, 8, only=inputs)
        return inputs

    def tokens(self) -> list[Any]:
        """Tokens of several prompts, each with the logprobs of its five likeliest."""
        # One request at a time: of several, which are batched in which step is up to chance, and a GEMM's or attention's
        # last bits depend on it.
        out = [self.generate(1, length, 32, 5)[1][0] for length in TOKEN_PROMPTS if length < self.prefill_tokens]
        out += self.generate(1, self.prefill_tokens, 4, 5)[1]
        return [
            [o.outputs[0].token_ids, [{str(t): p.logprob for t, p in d.items()} for d in o.outputs[0].logprobs]]
            for o in out
        ]

    def report(self) -> dict[str, Any]:
        """What was selected and what fused, over all ranks."""
        rpc = self.llm.collective_rpc
        return {
            "match_table": over_ranks(rpc("get_compilation_match_table")),
            "linear_kernels": over_ranks(rpc("linear_kernels")),
            "attention_backends": over_ranks(rpc("attention_backends")),
            "report": rpc("get_fusion_report") if self.plugin else None,
        }


def main() -> None:
    """Answer commands until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints goes to the log

    def answer(data: Any) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    engine = MeasuredEngine(json.loads(sys.argv[1]))
    commands = {
        "prefill": engine.prefill,
        "decode": engine.decode,
        "kernels": engine.kernels,
        "prefill_kernels": engine.prefill_kernels,
        "tokens": engine.tokens,
        "report": engine.report,
    }
    answer({"ready": True, "filled": engine.filled})
    for line in sys.stdin:
        ask = json.loads(line)
        answer(commands[ask.pop("do")](**ask))


if __name__ == "__main__":
    main()
