# SPDX-License-Identifier: Apache-2.0
"""`vllm-fusion-plugin doctor`: whether vLLM finds the plugin, what it lets it do, and what stands in the way."""
