# SPDX-License-Identifier: Apache-2.0
"""Every fusion of the package: what it is called, where it enters vLLM, and what switches it. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


class Fusion(NamedTuple):
    name: str
    """Class name; vLLM's, where the class stands in for vLLM's pass of that name."""
    stem: str
    """Its file in passes/, or in layers/ if it enters there."""
    enters: str
    """"pass": in the place of vLLM's pass of that name. "first", "last": before or after all of vLLM's fusion passes.
    "layer": by a layer's method."""
    switch: str
    """The flag of vLLM's PassConfig ("pass"), or the setting of this package, that asks for it."""
    ops: tuple[str, ...] = ()
    """Files in ops/ with the ops that it puts into graphs or calls; none if it places vLLM's own op."""
    on_cpu: bool = False
    """Whether the CPU opt-in (demo/cpu.py) has it."""
    on_rocm_only: bool = False
    """Whether vLLM has such a pass on ROCm alone."""


FUSIONS = (
    Fusion("SplitBlockGemmPass", "block_gemm", "first", "split_block_gemm", ("block_gemm", "group_quant")),
    Fusion("SplitExpertsPass", "experts_input_quant", "first", "experts_input_quant", ("group_quant",)),
    Fusion("ActivationQuantFusionPass", "silu_mul_quant", "pass", "fuse_act_quant", ("silu_mul_quant",), on_cpu=True),
    Fusion(
        "RMSNormQuantFusionPass",
        "rms_norm_quant",
        "pass",
        "fuse_norm_quant",
        ("rms_norm_quant", "gated_rms_norm_quant", "mla_dual_rms_norm_quant"),
        on_cpu=True,
    ),
    Fusion(
        "RocmAiterRMSNormQuantFusionPass",
        "rocm_aiter_rms_norm_quant",
        "pass",
        "fuse_norm_quant",
        ("rms_norm_quant", "gated_rms_norm_quant", "mla_dual_rms_norm_quant"),
        on_rocm_only=True,
    ),
    Fusion(
        "RocmAiterSiluMulFp8GroupQuantFusionPass",
        "rocm_aiter_silu_mul_quant",
        "pass",
        "fuse_act_quant",
        ("silu_mul_quant",),
        on_rocm_only=True,
    ),
    Fusion(
        "MLADualRMSNormFusionPass",
        "mla_dual_rms_norm_quant",
        "pass",
        "fuse_mla_dual_rms_norm",
        ("mla_dual_rms_norm_quant",),
        on_rocm_only=True,
    ),
    Fusion("AttnQuantFusionPass", "attn_quant", "pass", "fuse_attn_quant"),
    Fusion("MLAAttnQuantFusionPass", "mla_attn_quant", "pass", "fuse_attn_quant"),
    Fusion("GroupQuantPass", "group_quant", "last", "lone_group_quant", ("group_quant",), on_cpu=True),
    Fusion("MLAVUpQuant", "mla_v_up_quant", "layer", "mla_v_up_quant", ("mla_v_up_quant",)),
    Fusion("ExpertsSiluMulQuant", "experts_silu_mul_quant", "layer", "experts_silu_mul_quant", ("silu_mul_quant",)),
)

BY_NAME = {fusion.name: fusion for fusion in FUSIONS}


def entering(where: str, rocm: bool = False) -> tuple[Fusion, ...]:
    """The fusions that enter so ("first", "pass", "last", "layer"), in the order of the table; rocm: also those that there
    are on ROCm alone."""
    return tuple(fusion for fusion in FUSIONS if fusion.enters == where and (rocm or not fusion.on_rocm_only))
