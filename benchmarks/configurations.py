# SPDX-License-Identifier: Apache-2.0
"""What end_to_end.py runs: configurations of engines, what models need, and what vLLM is called with for them."""

from __future__ import annotations

import argparse
import os
import pathlib
from typing import Any

OFF = {"fuse_norm_quant": False, "fuse_act_quant": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "untouched": {"plugin": False, "pass_config": {}},
    "stock": {"plugin": False, "pass_config": {}},
    "stock_unfused": {"plugin": False, "pass_config": OFF},
    "ours": {"plugin": True, "pass_config": {}},
    "ours_act": {
        "plugin": True,
        "pass_config": OFF | {"fuse_act_quant": True},
        "settings": {"lone_group_quant": False},
    },
    "ours_fastest": {"plugin": True, "pass_config": {}, "settings": {"block_gemm": "fastest"}},
    "ours_experts": {"plugin": True, "pass_config": {}, "settings": {"experts_input_quant": False}},
    "control": {"plugin": False, "pass_config": OFF},
}
ATTENTION = ("stock", "ours")  # what --attention lets fuse attention with the quantiser after it
# Of a result; the other configurations are in its `more_rows`.
CONFIGS_IN_ROWS = ("untouched", "stock", "stock_unfused", "ours")
# Pairs whose times and tokens are compared, the one that should be faster first.
PAIRS = (
    ("ours", "untouched"),
    ("ours", "stock_unfused"),
    ("ours", "stock"),
    ("ours_fastest", "untouched"),
    ("ours_fastest", "ours"),
    ("ours_experts", "untouched"),
    ("ours", "ours_experts"),
    ("control", "untouched"),
    ("ours_act", "stock_unfused"),
    ("stock", "stock_unfused"),
    ("control", "stock_unfused"),
)
# Block GEMMs by the environment that selects them.
LINEAR = {
    "cutlass": {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0", "VLLM_USE_DEEP_GEMM": "0"},
    "deepgemm": {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0", "VLLM_USE_DEEP_GEMM": "1"},
    "default": {},
}
# What vLLM's kernels for block-scaled linear layers run, by their class.
BLOCK_GEMMS = {
    "FlashInferFp8DeepGEMMDynamicBlockScaledKernel": "FlashInfer below 32 rows, DeepGEMM from there on",
    "FlashInferFp8BlockScaledMMKernel": "FlashInfer",
    "DeepGemmFp8BlockScaledMMKernel": "DeepGEMM",
    "CutlassFp8BlockScaledMMKernel": "CUTLASS",
}
# What runs with `--linear default`, of every model: `stock` would be `untouched` once more.
DEFAULT_CONFIGS = ["untouched", "ours"]
# What is taken where the command line says nothing, and what a model needs instead, by its config.json's model_type.
DEFAULTS: dict[str, Any] = {
    "configs": ["stock", "stock_unfused", "ours", "ours_act", "control"],
    "batches": [1, 8, 32, 128],
    "capture": [1, 2, 4, 8, 16, 32, 64, 128],
    "autotuned": False,  # has kernels that Triton's autotuner times
}
NEEDS: dict[str, dict[str, Any]] = {
    # The other GDN prefill kernels compile for minutes, and each capture size takes seconds.
    "qwen3_next": {
        "engine": {"gdn_prefill_backend": "triton"},
        "batches": [1, 32],
        "capture": [1, 32],
        "configs": ["stock", "stock_unfused", "ours", "control"],
        "autotuned": True,
    },
    # 48 GB of weights an engine: two fit on one GPU.
    "deepseek_v3": {"configs": ["stock_unfused", "ours"]},
}


def process_environment(name: str, cache: pathlib.Path) -> dict[str, str]:
    """The environment of a process with the configuration `name`: none of this process's variables that select a GEMM, and
    what shortens a start. cache: a folder for what vLLM compiles."""
    return {key: value for key, value in os.environ.items() if key not in LINEAR["cutlass"]} | {
        "VLLM_FUSION_PLUGIN": "1" if CONFIGS[name]["plugin"] else "0",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_DEEP_GEMM_WARMUP": "skip",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def environment(name: str, linear: str) -> dict[str, str]:
    """The variables that select the block GEMM of the configuration `name`; linear: what `--linear` says."""
    return LINEAR["default" if name == "untouched" else linear]


def engine_arguments(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `vllm.LLM` is called with for the configuration `name`; args: end_to_end.py's command line."""
    config = CONFIGS[name]
    pass_config, partition = config["pass_config"], {}
    if name != "untouched":
        pass_config = pass_config | args.pass_config
    if args.attention and name != "untouched":
        partition = {"use_inductor_graph_partition": True}  # attention has to be in the graph that passes see
        if name in ATTENTION:
            pass_config = pass_config | {"fuse_attn_quant": True}
    inductor = {"inductor_compile_config": {"deterministic": True}} if args.deterministic else {}
    options = {
        "model": str(args.model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": args.prefill + 16,
        "max_num_seqs": max(args.batches),
        "max_num_batched_tokens": args.prefill,
        # Given, not measured: engines that start together would take each other's memory for their own. What the first is
        # for is the check at the start, whether that much is still free.
        "gpu_memory_utilization": args.memory or 0.9 / len(args.configs),
        "kv_cache_memory_bytes": int(args.kv_gib * 2**30),
        "enable_prefix_caching": False,
        "tensor_parallel_size": args.tensor_parallel_size,
        "worker_extension_cls": "engine_worker.EngineWorker",
        "compilation_config": {"cudagraph_capture_sizes": args.capture, "pass_config": pass_config}
        | partition
        | inductor,
        "additional_config": {"fusion_plugin": config["settings"]} if "settings" in config else {},
    }
    return options | args.engine
