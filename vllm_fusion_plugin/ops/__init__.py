# SPDX-License-Identifier: Apache-2.0
"""Fused ops: what is computed. One file an op family: schema, fake, pure-torch reference, dispatch.

Nothing here knows vLLM. Importing a module registers its ops as `torch.ops.vllm_fusion_plugin.*`; they can be called from
model code as they are, or put into a graph by the passes.
"""
