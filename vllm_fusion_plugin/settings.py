# SPDX-License-Identifier: Apache-2.0
"""What a user may set.

Two places, the second wins field by field:

- environment: `VLLM_FUSION_PLUGIN=0` switches the whole plugin off; `VLLM_FUSION_PLUGIN_SETTINGS='{"use_pdl": false}'`
  holds any of the fields below as JSON (environment variables reach every worker process);
- `vllm serve ... --additional-config '{"fusion_plugin": {"use_pdl": false}}'`.

vLLM's own flags (`-cc.pass_config.fuse_act_quant=true`, ...) still decide which fusions run; nothing here repeats them.
`fuse` says what two of them are where nobody has set them.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from . import fusions

ENV_SWITCH = "VLLM_FUSION_PLUGIN"
ENV_SETTINGS = "VLLM_FUSION_PLUGIN_SETTINGS"
ENV_CPU = "VLLM_FUSION_PLUGIN_CPU"  # see demo/cpu.py
ADDITIONAL_CONFIG_KEY = "fusion_plugin"

# vLLM's pass classes that we can stand in for, by the names that vLLM's users know.
PASSES = tuple(fusion.name for fusion in fusions.entering("pass", rocm=True))


class SettingsError(ValueError):
    """A setting that is unknown, of the wrong type or not allowed; the message names it, its value and what is allowed."""


class Settings(BaseModel):
    """All settings with their defaults. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    """False: vLLM runs as if the plugin were not installed."""

    stock_passes: tuple[str, ...] = ()
    """Passes left to vLLM, for example `["ActivationQuantFusionPass"]`; the rest stay ours."""

    fuse: Literal["auto", "vllm"] = "auto"
    """Whether norm + quantiser and SiLU·mul + quantiser fusions are on also where vLLM leaves them to Inductor, as it does
    for models with static or per-token FP8. A flag that the user has set is obeyed in any case."""

    nvfp4_kernel: Literal["vllm", "ours"] = "vllm"
    """Which kernel a fused SiLU·mul + NVFP4 quantiser runs: vLLM's own, or this package's, not measured yet on
    the GPUs with FP4 GEMMs (compute capability 10.0 and later)."""

    split_block_gemm: bool = True
    """The block GEMM that quantises inside, vLLM's default on Hopper where FlashInfer is usable, becomes a quantiser, which
    fuses with what is before it, and the same GEMM; same bytes."""

    block_gemm: Literal["vllm", "fastest"] = "vllm"
    """Which kernel that GEMM then runs: vLLM's choice by the number of rows, with the bytes of vLLM's op, or the faster of
    the two by rows, shape and GPU, as timed (kernels/block_gemm_table.py): sums in another order, so last bits differ."""

    lone_group_quant: bool = True
    """Group FP8 quantisers that are fused with nothing run this package's kernel instead of vLLM's; same bytes."""

    mla_v_up_quant: bool = True
    """With fuse_attn_quant, MLA layers with FP8 output in groups write it from the V up-projection, instead of quantising
    after it."""

    experts_silu_mul_quant: bool = True
    """Triton's experts with FP8 weights in blocks run SiLU·mul and the quantiser between their two GEMMs as one kernel,
    where vLLM runs two; same bytes."""

    mlp_silu_mul_quant: bool = True
    """MLPs with FP8 weights in blocks that run outside of compiled code, shared experts and those of models that vLLM does
    not compile, run SiLU·mul and the quantiser of the down projection as one kernel; same bytes."""

    eager_rms_norm_quant: bool = False
    """RMS norms of models that vLLM does not compile write the FP8 codes of the linear layers that read them, for weights in
    blocks. Left out by inexact="leave", too."""

    experts_input_quant: bool = True
    """In models with shared experts, the quantiser of experts' input comes out of vLLM's MoE op and fuses with the norm
    before it; same bytes."""

    inexact: Literal["fuse", "leave"] = "fuse"
    """What to do where none of the roundings that this package knows is that of the installed vLLM's quantiser or SiLU·mul:
    fuse with the nearest, and say so in the report, or leave it to vLLM."""

    rocm_kernels: Literal["exact", "aiter"] = "exact"
    """On ROCm with AITER, what stands for a norm or SiLU·mul and AITER's group quantiser: this package's kernel, with the
    bytes of the two ops, or AITER's own for both, as vLLM places it: known on AMD's GPUs, with other bytes."""

    added_fusions: bool = True
    """Passes that other packages have added (`fusions.add`) run."""

    use_pdl: bool = True
    """Launch kernels with programmatic dependent launch where the GPU has it (NVIDIA's from compute capability 9.0 on)."""

    kernels: Literal["auto", "triton", "cuda"] = "auto"
    """Whose kernels ops run on NVIDIA's GPUs that have one in CUDA, too (csrc/): auto, CUDA's where their library is built;
    same bytes. Without it, `cuda` warns, and Triton's run."""

    strict: bool = False
    """An engine in which the plugin is not at work, in which a fusion flag that is on has fused nothing, or in which
    something is left that nothing known stands in the way of, does not start: see strict.py."""

    expect_fused: int = Field(default=0, ge=0)
    """With `strict`: how many quantisers have to be fused on each GPU, as `explain` counts them for the same flags."""

    verify: int = Field(default=0, ge=0)
    """How many calls of every fused op, in each layer, are compared with the ops that it replaces, before vLLM serves and
    once more when it does: see ops/verify.py."""

    def of_compiled_code(self) -> str:
        """Those that decide what vLLM compiles or runs, as JSON."""
        return self.model_dump_json(exclude={"kernels", "strict", "expect_fused", "verify"})

    @field_validator("stock_passes")
    @classmethod
    def _known_passes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in PASSES]
        if unknown:
            raise ValueError(f"unknown pass {', '.join(map(repr, unknown))}; allowed: {', '.join(PASSES)}")
        return value


def parse_switch(name: str = ENV_SWITCH, default: bool = True) -> bool:
    """An environment variable that is 1 (on), 0 (off), or unset or empty; anything else is an error rather than a guess.

    Raises:
        SettingsError: naming the variable, its value and what is allowed.
    """
    value = os.environ.get(name, "").strip()
    if value in ("", "0", "1"):
        return default if value == "" else value == "1"
    on, off = (", the default" if default is state else "" for state in (True, False))
    raise SettingsError(f"{name}={value!r} is not understood; allowed: 1 (on{on}), 0 (off{off})")


def _from_json(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise SettingsError(f"{ENV_SETTINGS}={text!r} is not JSON ({e}); allowed: an object such as {{}}") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{ENV_SETTINGS}={text!r} is a {type(data).__name__}; allowed: a JSON object")
    return data


def _given(additional_config: Any) -> dict[str, Any]:
    """What is set, unchecked."""
    values: dict[str, Any] = _from_json(os.environ[ENV_SETTINGS]) if os.environ.get(ENV_SETTINGS) else {}
    mine = additional_config.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional_config, dict) else None
    if mine is not None:
        if not isinstance(mine, dict):
            raise SettingsError(
                f"additional_config[{ADDITIONAL_CONFIG_KEY!r}]={mine!r}; allowed: an object of settings"
            )
        values |= mine
    return values


def load(additional_config: Any = None) -> Settings:
    """Settings from the environment and from vLLM's `additional_config`.

    Raises:
        SettingsError: naming the setting, its value and what is allowed.
    """
    values = _given(additional_config)
    if not parse_switch():
        values["enabled"] = False
    try:
        return Settings(**values)
    except ValidationError as e:
        allowed = ", ".join(Settings.model_fields)
        problems = "; ".join(
            f"{'.'.join(map(str, x['loc']))}={x['input']!r}: {x['msg'].removeprefix('Value error, ')}"
            for x in e.errors()
        )
        raise SettingsError(f"fusion plugin settings: {problems} (settings: {allowed})") from None


OFF = "off: enabled=false in the settings"


def read(additional_config: Any = None) -> tuple[Settings, str, str]:
    """As `load`, for whoever cannot stop at a bad setting: settings, what is wrong with them, and why they keep the plugin
    out although nothing is; "" for none. Bad settings are read as `enabled=False`, with `strict` as it is set. Never
    raises."""
    try:
        chosen = load(additional_config)
        if chosen.enabled:
            return chosen, "", ""
        return chosen, "", OFF if parse_switch() else f"off: {ENV_SWITCH}=0"
    except SettingsError as e:
        strict = False
        with contextlib.suppress(SettingsError):
            strict = _given(additional_config).get("strict") is True
        return Settings(enabled=False, strict=strict), str(e), ""
