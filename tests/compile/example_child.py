# SPDX-License-Identifier: Apache-2.0
"""`example_child.py RESULT`: vLLM's CUDA build loads its plugins, finds examples/relu2_quant among them, and compiles a
module that it fuses something in. Writes what the report says of it, with the fusion and with `added_fusions=false`."""

import json
import sys
from pathlib import Path

from vllm_fusion_plugin.tracing import fake_gpu

fake_gpu.install()

import torch  # noqa: E402
import vllm.plugins  # noqa: E402
from trace_module import check_graphs, make_config, trace_branches  # noqa: E402
from vllm.model_executor.layers.activation import ReLUSquaredActivation  # noqa: E402
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape  # noqa: E402

from vllm_fusion_plugin import compat, report  # noqa: E402
from vllm_fusion_plugin.tracing.subgraphs import count_ops  # noqa: E402


class MLP(torch.nn.Module):
    """ReLU² and a static quantiser, as Nemotron-H's MLPs have between their linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.act = ReLUSquaredActivation(**compat.uncompiled_layer(ReLUSquaredActivation))
        self.quant = QuantFP8(True, group_shape=GroupShape.PER_TENSOR, **compat.uncompiled_layer(QuantFP8))
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant(self.act(x @ x.mT @ x), self.scale)[0]


def trace(**chosen: bool) -> dict:
    report.RECORDER.report = report.RankReport()
    config = make_config(["none", "+relu2", "+quant_fp8"], fuse_norm_quant=False, fuse_act_quant=True)
    config.additional_config = {"fusion_plugin": chosen}
    recording = trace_branches([MLP], [(64, 512)], config, keep_passes=False)
    check_graphs(recording)
    (subgraph,) = recording.subgraphs
    return {
        "ops": dict(count_ops(subgraph.after)),
        "passes": report.RECORDER.report.passes,
        "found": [f.model_dump() for s in report.RECORDER.report.subgraphs for f in s.found],
        "missed": [m.reason for s in report.RECORDER.report.subgraphs for m in s.missed],
    }


if __name__ == "__main__":
    vllm.plugins.load_general_plugins()
    Path(sys.argv[1]).write_text(json.dumps({"on": trace(), "off": trace(added_fusions=False)}))
