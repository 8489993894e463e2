# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA build builds and compiles whole models on a machine without a GPU, as far as the last pass. For `explain`,
`doctor` and the tests; nothing that serves imports it."""
