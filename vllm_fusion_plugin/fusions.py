# SPDX-License-Identifier: Apache-2.0
"""Every fusion of the package, and those that other packages add: what it is called, where it enters vLLM, and what switches
it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
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
    Fusion(
        "ActivationQuantFusionPass",
        "silu_mul_quant",
        "pass",
        "fuse_act_quant",
        ("silu_mul_quant", "sigmoid_mul_quant"),
        on_cpu=True,
    ),
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
    Fusion("EagerRMSNormQuant", "rms_norm_quant", "layer", "eager_rms_norm_quant", ("rms_norm_quant", "block_gemm")),
    Fusion("MLPSiluMulQuant", "silu_mul_quant", "layer", "mlp_silu_mul_quant", ("silu_mul_quant", "block_gemm")),
)

BY_NAME = {fusion.name: fusion for fusion in FUSIONS}


def entering(where: str, rocm: bool = False) -> tuple[Fusion, ...]:
    """The fusions that enter so ("first", "pass", "last", "layer"), in the order of the table; rocm: also those that there
    are on ROCm alone."""
    return tuple(fusion for fusion in FUSIONS if fusion.enters == where and (rocm or not fusion.on_rocm_only))


# ---- of other packages -----------------------------------------------------------------------------------------------


class Added(NamedTuple):
    """A fusion of another package."""

    module: str
    name: str
    """Of the class in that module, a passes.base.FusionPass."""
    ops: tuple[str, ...] = ()
    before_vllms: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module, *self.ops)


ADDED: dict[str, Added] = {}
"""By the name of the class."""


def add(pass_class: str, ops: Sequence[str] = (), before_vllms: bool = False) -> None:
    """Have a pass of another package run in every engine where this package is at work. To be called by an entry point of
    vLLM's group `vllm.general_plugins`, which runs in every process; may be called again.

    Args:
        pass_class: "package.module:Class", a subclass of `passes.base.FusionPass`, made with a VllmConfig. The module is
            imported when vLLM compiles, for it pulls in torch's compiler.
        ops: "package.module" of all modules that register the ops that the pass puts into graphs. They are imported before
            compiled code is loaded, where no pass runs. vLLM's compile cache is keyed by the code of these modules and the
            pass's; name any other here that decides what is computed.
        before_vllms: run before vLLM's fusion passes and those in their places, instead of after them.

    Raises:
        ValueError: pass_class or ops are not of that form, or another module has added a class of that name.
    """
    module, _, name = pass_class.partition(":")
    if not _is_dotted(module) or not name.isidentifier():
        raise ValueError(f"pass_class={pass_class!r}; allowed: 'package.module:Class'")
    for each in ops:
        if isinstance(ops, str) or not _is_dotted(each):
            raise ValueError(f"ops={ops!r}; allowed: a list of 'package.module'")
    added = Added(module, name, tuple(ops), before_vllms)
    if name in BY_NAME or ADDED.get(name, added).module != module:
        raise ValueError(f"pass_class={pass_class!r}: there is a pass {name} already; allowed: another name")
    ADDED[name] = added


def _is_dotted(module: str) -> bool:
    return all(part.isidentifier() for part in module.split("."))
