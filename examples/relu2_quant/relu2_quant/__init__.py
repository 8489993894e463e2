# SPDX-License-Identifier: Apache-2.0
"""ReLU² + static FP8 quantiser in one kernel, added to vllm-fusion-plugin from outside: an example to copy."""

from vllm_fusion_plugin import fusions


def register() -> None:
    """The entry point: vLLM calls it in every process."""
    fusions.add("relu2_quant.fusion:ReLU2QuantPass", ops=["relu2_quant.op", "relu2_quant.kernel"])
