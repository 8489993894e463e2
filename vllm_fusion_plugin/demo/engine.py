# SPDX-License-Identifier: Apache-2.0
"""One run of vLLM's engine on CPU, in a process of its own: `python -m vllm_fusion_plugin.demo.engine JOB RESULT`.

JOB and RESULT are JSON files holding an EngineJob and an EngineResult. One process a run, because compiled code, match
counts and environment belong to a process, and because a run must inherit nothing from the one it is compared with.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Unlike lengths, so that prefill meets batches of unlike sizes.
PROMPTS = (tuple(range(3, 12)), (100, 7, 9), tuple(range(200, 260, 3)))

# Inductor keeps values in fp32 where eager would round them, and which ones depends on what it puts into one loop: with
# and without fusions the last bits differ, and so, sooner or later, do tokens. With this it rounds where eager does.
INDUCTOR_CONFIG = {"emulate_precision_casts": True}

# The fused ops of the demo's model.
FUSED_OPS = ("silu_mul_group_fp8_quant", "rms_norm_group_fp8_quant")


@dataclasses.dataclass(frozen=True)
class EngineJob:
    model: str
    tensor_parallel_size: int = 1
    pass_config: dict[str, bool] = dataclasses.field(default_factory=dict)
    additional_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    broken_ops: list[list[str]] = dataclasses.field(default_factory=lambda: [[]])
    """Generate once for each of these, with the fused ops that it names wrong: a comparison that does not notice shows
    nothing."""
    max_tokens: int = 16
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of LLM."""
    prepare: str = ""
    """Worker method to call before the first generation."""


@dataclasses.dataclass(frozen=True)
class EngineResult:
    tokens: list[list[int]]
    """Of the first generation, one list a prompt."""
    logprobs: list[list[float]]
    """Of the tokens chosen, one list a prompt."""
    later_tokens: list[list[list[int]]]
    """Of the other generations that the job asked for."""
    match_tables: list[dict[str, int]]
    """vLLM's own, one a rank."""
    reports: list[dict[str, Any]]
    """The plugin's RankReport, one a rank; empty where vLLM has not loaded the plugin."""
    counters: list[dict[str, int]]
    """vLLM's compilation counters, one a rank: how often it compiled, saved, loaded."""
    compilation_mode: str
    seconds: float
    margins: list[list[float]] = dataclasses.field(default_factory=list)
    """By how much each of those tokens was better than the next best: its logprob less the other's."""
    later_logprobs: list[list[list[float]]] = dataclasses.field(default_factory=list)


class WorkerProbe:
    """What a run asks of each worker besides what vLLM and the plugin offer; vLLM mixes it into its worker class."""

    def compilation_counters(self) -> dict[str, int]:
        from vllm.compilation.counter import compilation_counter

        return dataclasses.asdict(compilation_counter)

    def fusion_report(self) -> dict[str, Any] | None:
        """The plugin's report of this rank; None where vLLM has not loaded the plugin."""
        get_fusion_report = getattr(self, "get_fusion_report", None)
        return get_fusion_report() if get_fusion_report else None

    def break_ops(self, names: list[str]) -> None:
        """From now on these fused ops write half of every code in this process, and the others what they should; compiled
        code finds them by name."""
        import torch

        from ..ops import registry

        # Kept on the worker: a kernel goes away with its library.
        self._broken = []
        for name in names:
            library = torch.library.Library("vllm_fusion_plugin", "IMPL")
            library.impl(name, _halved(registry.CPU_IMPLEMENTATIONS[name]), "CPU", allow_override=True)
            self._broken.append(library)


def _halved(op: Callable[..., Any]) -> Callable[..., Any]:
    def broken(*args: Any) -> Any:
        codes, *more = outputs = op(*args)
        return type(outputs)([(codes.float() / 2).to(codes.dtype), *more])

    return broken


def run(job: EngineJob) -> EngineResult:
    from vllm import LLM, SamplingParams

    start = time.monotonic()
    arguments: dict[str, Any] = {
        "tensor_parallel_size": job.tensor_parallel_size,
        "compilation_config": {"pass_config": job.pass_config, "inductor_compile_config": INDUCTOR_CONFIG},
        "additional_config": job.additional_config,
        "worker_extension_cls": f"{WorkerProbe.__module__}.{WorkerProbe.__qualname__}",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,  # a later generation has to compute what an earlier one did
        "max_model_len": 128,
        "max_num_seqs": 4,
        "disable_log_stats": True,
    }
    llm = LLM(job.model, **arguments | job.engine)
    if job.prepare:
        llm.collective_rpc(job.prepare)
    sampling = SamplingParams(temperature=0, max_tokens=job.max_tokens, ignore_eos=True, detokenize=False, logprobs=2)
    prompts: Any = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
    generations: list[list[Any]] = []
    for names in job.broken_ops:
        llm.collective_rpc("break_ops", args=(names,))
        generations.append([output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)])
    first, *later = generations
    return EngineResult(
        tokens=[list(c.token_ids) for c in first],
        logprobs=list(map(_logprobs, first)),
        later_tokens=[[list(c.token_ids) for c in completions] for completions in later],
        match_tables=llm.collective_rpc("get_compilation_match_table"),
        reports=[report for report in llm.collective_rpc("fusion_report") if report is not None],
        counters=llm.collective_rpc("compilation_counters"),
        compilation_mode=llm.llm_engine.vllm_config.compilation_config.mode.name,
        seconds=time.monotonic() - start,
        margins=list(map(_margins, first)),
        later_logprobs=[list(map(_logprobs, completions)) for completions in later],
    )


def _logprobs(completion: Any) -> list[float]:
    steps = zip(completion.token_ids, completion.logprobs, strict=True)
    return [step[token].logprob for token, step in steps]


def _margins(completion: Any) -> list[float]:
    steps = zip(completion.token_ids, completion.logprobs, strict=True)
    return [step[token].logprob - max(step[other].logprob for other in step if other != token) for token, step in steps]


def main(job_file: str, result_file: str) -> None:
    job = EngineJob(**json.loads(Path(job_file).read_text()))
    Path(result_file).write_text(json.dumps(dataclasses.asdict(run(job)), indent=1))


if __name__ == "__main__":
    # Called under the module's own name: workers import WorkerProbe by it.
    from . import engine

    engine.main(*sys.argv[1:])
