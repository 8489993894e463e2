# SPDX-License-Identifier: Apache-2.0
"""`states_child.py MODEL RESULT`: one process, one engine after another, each in another state of the plugin.

Writes {"reports": {name: the engine's report}, "refused": {name: why it did not start}}. Weights are random, and nothing is
generated: the report is about compilation.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from vllm import LLM
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from vllm_fusion_plugin import fingerprint, plugin, settings
from vllm_fusion_plugin.demo import compare
from vllm_fusion_plugin.demo.engine import INDUCTOR_CONFIG
from vllm_fusion_plugin.ops import registry
from vllm_fusion_plugin.strict import StrictError

STRICT = '{"strict": true}'
OP = "rms_norm_group_fp8_quant"
UNQUANTISED = {"quantization_config": None}


def report(model: str, layers: int = 2, of_model: Mapping[str, Any] = MappingProxyType({}), **arguments) -> dict:
    compilation = {"pass_config": dict.fromkeys(compare.FLAGS, True), "inductor_compile_config": INDUCTOR_CONFIG}
    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=4,
        disable_log_stats=True,
        hf_overrides={"num_hidden_layers": layers, **of_model},
        **{"compilation_config": compilation} | arguments,
    )
    (found,) = llm.collective_rpc("get_fusion_report")
    (table,) = llm.collective_rpc("get_compilation_match_table")
    assert isinstance(table, dict)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def refusal(model: str, **arguments) -> str:
    """Why an engine does not start."""
    try:
        report(model, **arguments)
    except StrictError as e:
        return str(e)
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()
    return "it started"


def with_other_bits(op: Callable[..., list[torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
    """Every code differs in a bit, NaN too: in the profile run attention leaves its output as the memory was."""

    def broken(*args: Any) -> list[torch.Tensor]:
        codes, *more = op(*args)
        return [(codes.view(torch.uint8) ^ 1).view(codes.dtype), *more]

    return broken


def failing(config):
    raise RuntimeError("a bug of ours")


def main(model: str, result_file: str) -> None:
    reports = {"eager": report(model, enforce_eager=True)}
    reports["2 layers"] = report(model)
    reports["1 layer"] = report(model, layers=1)
    reports["settings error"] = report(model, additional_config={"fusion_plugin": {"no_such_setting": 1}})
    reports["disabled"] = report(model, additional_config={"fusion_plugin": {"enabled": False}})
    os.environ[settings.ENV_SETTINGS] = STRICT
    reports["AOT artefacts"] = report(model, layers=1)
    del os.environ[settings.ENV_SETTINGS]
    os.environ["VLLM_USE_AOT_COMPILE"] = "0"
    reports["2 layers, no AOT"] = report(model)
    reports["Inductor artefacts"] = report(model)
    os.environ[settings.ENV_SETTINGS] = '{"strict": true, "verify": 1}'
    registry.CPU_IMPLEMENTATIONS[OP] = with_other_bits(registry.CPU_IMPLEMENTATIONS[OP])
    refused = {"other bytes, from file": refusal(model)}
    os.environ[settings.ENV_SETTINGS] = STRICT
    refused["eager"] = refusal(model, enforce_eager=True)
    refused["unquantised"] = refusal(model, layers=1, of_model=UNQUANTISED)
    refused["unquantised, from file"] = refusal(model, layers=1, of_model=UNQUANTISED)
    del os.environ[settings.ENV_SETTINGS]
    plugin.settings_of, was = failing, plugin.settings_of
    try:
        reports["bug"] = report(model, layers=1)
    finally:
        plugin.settings_of = was
    fingerprint._state.cache_clear()
    fingerprint.MODULES = (*fingerprint.MODULES, "no such module")
    reports["unknown code"] = report(model, layers=1)
    Path(result_file).write_text(json.dumps({"reports": reports, "refused": refused}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
