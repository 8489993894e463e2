# SPDX-License-Identifier: Apache-2.0
"""Triton kernels: how an op is computed. Nothing here checks arguments (ops do) or knows vLLM."""
