# SPDX-License-Identifier: Apache-2.0
"""Fusions that enter through a method of a layer instead of a graph. One file a seam."""
