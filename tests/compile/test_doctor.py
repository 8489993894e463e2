# SPDX-License-Identifier: Apache-2.0
"""`doctor` asks vLLM's CUDA build for a GPU that is not there: 12 s a question."""

from __future__ import annotations

import pytest

from vllm_fusion_plugin import child
from vllm_fusion_plugin.doctor.diagnosis import Engine
from vllm_fusion_plugin.tracing import fake_gpu

if reason := fake_gpu.unavailable():
    pytest.skip(reason, allow_module_level=True)


def test_passes_and_flags():
    flags = [
        "--tensor-parallel-size=1",
        "-cc.pass_config.fuse_allreduce_rms=true",
        "-cc.pass_config.fuse_norm_quant=false",
    ]
    stock = ["--additional-config", '{"fusion_plugin": {"stock_passes": ["ActivationQuantFusionPass"]}}']
    told = child.ask("vllm_fusion_plugin.doctor.probe", {"flags": [*flags, *stock], "gpu": "b200"})
    engine = Engine(**told["engine"])
    assert engine.gpu == "as if on one NVIDIA B200" and not engine.state
    assert [n.flag for n in engine.no_effect] == ["fuse_allreduce_rms"]
    passes = {p.name: p for p in engine.passes}
    assert passes["SplitBlockGemmPass"].state == passes["GroupQuantPass"].state == "ours"
    assert passes["ActivationQuantFusionPass"].do == "take ActivationQuantFusionPass out of the setting stock_passes"
    assert passes["RMSNormQuantFusionPass"].do == "leave out fuse_norm_quant=false"
    assert passes["AttnQuantFusionPass"].do.startswith("-cc.pass_config.fuse_attn_quant=true ")
    assert passes["ExpertsSiluMulQuant"].state == "off: it needs a model with experts"
    assert {"FlashInfer", "DeepGEMM"} <= {f["about"] for f in told["findings"]}
