# SPDX-License-Identifier: Apache-2.0
"""Fusion passes: where in vLLM's graphs the ops go. One file a fusion, on top of base.py and pattern.py."""
