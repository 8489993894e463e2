# SPDX-License-Identifier: Apache-2.0
"""The fusions of gated and latent norms in vLLM's CPU engine: small Qwen3-Next and DeepSeek-V3, both without experts."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vllm_fusion_plugin.demo import compare
from vllm_fusion_plugin.demo.engine import EngineJob, EngineResult

from .agreement import check_agreement, other_vectors
from .conftest import CHILD, ENGINES_AT_A_TIME

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ON_PATH = os.pathsep.join([str(Path(__file__).parent), str(ROOT / "benchmarks")])


class Model(NamedTuple):
    real: str
    """Of tests/models, whose configuration this is but for its sizes."""
    sizes: dict[str, Any]
    matches: dict[str, int]
    ops: tuple[str, ...]
    """Fused ops that no other test runs in an engine."""


LAYERS = 4
QWEN3_NEXT = Model(
    "qwen3-next-8layers",
    {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 512,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        # vLLM wants a layer with experts, and its CPU build has them in bf16 only
        "mlp_only_layers": list(range(LAYERS - 1)),
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "vocab_size": 1024,
    },
    # Three layers of linear attention, whose norm is gated, and one of full attention. Of the other norms, those that a
    # second projection or the router reads too are left, since CPU's quantiser is in plain torch code.
    {"activation_quant_fusion_pass": LAYERS, "rmsnorm_quant_fusion_pass": 3 + LAYERS},
    ("gated_rms_norm_group_fp8_quant",),
)
DEEPSEEK_V3 = Model(
    "deepseek-v3-5layers",
    {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 256,
        "max_position_embeddings": 512,
        "rope_scaling": None,
        "vocab_size": 1024,
    },
    {"activation_quant_fusion_pass": 2, "rmsnorm_quant_fusion_pass": 3 * 2, "mla_dual_rms_norm_fusion_pass": 2},
    ("mla_dual_rms_norm_group_fp8_quant",),
)


def generate(
    folder: Path, model: Model, name: str, fuse: bool, environment: dict[str, str] | None = None
) -> EngineResult:
    job = EngineJob(
        model=str(folder / "model"),
        pass_config=dict.fromkeys(compare.FLAGS, fuse),
        broken_ops=[[], *([op] for op in model.ops if fuse)],
        engine={"load_format": "random", "worker_extension_cls": "random_probe.RandomProbe"},
    )
    environment = {"PYTHONPATH": ON_PATH} | ({} if fuse else {"VLLM_FUSION_PLUGIN": "0"}) | (environment or {})
    command = ("-m", "vllm_fusion_plugin.demo.engine") if fuse else (CHILD, "stock")
    return compare.run_engine(job, folder / name, folder / f"{name}-cache", environment=environment, command=command)


@pytest.mark.parametrize("model", [QWEN3_NEXT, DEEPSEEK_V3], ids=lambda model: model.real)
def test_same_text_as_vllm_without_the_plugin(model: Model, tmp_path: Path) -> None:
    config = json.loads((ROOT / "tests" / "models" / model.real / "config.json").read_text()) | model.sizes
    config["quantization_config"].setdefault("modules_to_not_convert", []).append(
        f"model.layers.{LAYERS - 1}.mlp.experts"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    engines = {"fused": (True, {}), "unfused": (False, {}), "control": (False, other_vectors())}
    with ThreadPoolExecutor(ENGINES_AT_A_TIME) as pool:
        runs = [pool.submit(generate, tmp_path, model, name, *engine) for name, engine in engines.items()]
    fused, unfused, control = (run.result() for run in runs)
    (table,) = fused.match_tables
    assert {name: count for name, count in table.items() if count} == model.matches
    check_agreement(fused, unfused, control, len(model.ops))
