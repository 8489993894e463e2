# SPDX-License-Identifier: Apache-2.0
"""An engine that may compile nothing once it serves: prompts of many lengths, one by one. Writes what it did as JSON.

python tests/serving_child.py MODEL OUT
"""

from __future__ import annotations

import json
import pathlib
import sys


def main(model: str, out: str) -> None:
    from vllm import LLM, SamplingParams

    lengths = [*range(1, 2101), 2303, 3001, 4093]
    llm = LLM(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        hf_overrides={"num_hidden_layers": 2},
        max_model_len=4096,
        max_num_batched_tokens=4096,
        max_num_seqs=1,  # so that a step has one prompt's tokens
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=2**31,
        jit_monitor_mode="error",
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4]},
    )
    prompts = [{"prompt_token_ids": [(31 * i + length) % 1000 for i in range(length)]} for length in lengths]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    served = [len(output.prompt_token_ids) for output in outputs if output.outputs[0].token_ids]
    (report,) = llm.collective_rpc("get_fusion_report")
    found = [f["pattern"] for subgraph in report["subgraphs"] for f in subgraph["found"]]
    # Not to standard output, where vLLM still logs when it ends.
    pathlib.Path(out).write_text(
        json.dumps({"asked": lengths, "served": served, "notes": report["notes"], "found": found})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
