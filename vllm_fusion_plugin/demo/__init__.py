# SPDX-License-Identifier: Apache-2.0
"""The CPU demo: the same tokens with fusions on and off?"""
