# SPDX-License-Identifier: Apache-2.0
"""`vllm-fusion-plugin explain`: what fuses in a model on a GPU that need not be there, what does not and why, and what it
saves."""
