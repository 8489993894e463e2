# SPDX-License-Identifier: Apache-2.0
"""Fusion passes and fused quantisation kernels for vLLM, loaded through the entry-point group `vllm.general_plugins`."""

__version__ = "0.1.0"
