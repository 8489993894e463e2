# SPDX-License-Identifier: Apache-2.0
"""The entry point. vLLM calls `register()` in every process, sometimes more than once, before it builds anything."""

from __future__ import annotations

import logging
import os
from typing import Any

from . import settings
from .report import RECORDER, get_fusion_report

# Below "vllm", so that vLLM's own handlers and levels apply.
logger = logging.getLogger("vllm.fusion_plugin")

PASS_MANAGER = "vllm_fusion_plugin.plugin.make_pass_manager"

_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    RECORDER.report.manager = f"inactive: {reason}"
    if reason not in _warned:
        _warned.add(reason)
        logger.warning("vllm-fusion-plugin is not active, vLLM runs as if it were not installed: %s", reason)


def register() -> None:
    """Put the plugin in place, or leave vLLM as it is and say why. Never raises: an exception here would stop vLLM."""
    try:
        _register()
    except Exception as e:
        _warn_once(f"{type(e).__name__}: {e}")


def _register() -> None:
    from . import compat

    compat.announce_environment(settings.ENV_SWITCH)
    if not settings.parse_switch():
        RECORDER.report.manager = f"inactive: {settings.ENV_SWITCH}=0"
        return
    chosen = settings.load()
    if not chosen.enabled:
        RECORDER.report.manager = "inactive: enabled=false in the settings"
        return

    from vllm.platforms import current_platform

    if current_platform.is_cpu() and settings.parse_switch(settings.ENV_CPU, default=False):
        from . import cpu  # imports half of vLLM, 4 s

        cpu.enable()
    # The cache comes before the passes: with passes and a stale hash, an old artefact could be used silently.
    compat.hash_into_config(_fingerprint, _register_ops)
    if reason := compat.install_pass_manager(PASS_MANAGER):
        _warn_once(reason)
        return
    RECORDER.report.manager = "installed, nothing compiled yet"


def make_pass_manager() -> Any:
    """What vLLM calls for a pass manager: ours, or stock's with a warning if ours does not go with this vLLM."""
    try:
        from .pass_manager import FusionPassManager

        return FusionPassManager()
    except Exception as e:
        from . import compat

        _warn_once(f"its pass manager cannot be made: {type(e).__name__}: {e}")
        return compat.stock_pass_manager()


def _register_ops() -> None:
    """A compiled artefact from the cache calls our ops by name, in a process where no pass has run."""
    from .ops import (  # noqa: F401
        gated_rms_norm_quant,
        group_quant,
        mla_dual_rms_norm_quant,
        mla_v_up_quant,
        rms_norm_quant,
        silu_mul_quant,
    )


def _fingerprint(config: Any) -> str | None:
    """What vLLM's cache hash must cover beyond vLLM's own: None where the plugin changes nothing."""
    from . import compat, fingerprint, mla

    compat.attach_worker_methods(
        {"get_compilation_match_table": _get_compilation_match_table, "get_fusion_report": _get_fusion_report}
    )
    try:
        chosen = settings.load(config.additional_config)
    except settings.SettingsError as e:
        chosen = settings.Settings(enabled=False)
        _warn_once(str(e))
    if not chosen.enabled:
        compat.remove_pass_manager(PASS_MANAGER)
        mla.configure(False)
        return None
    compat.install_pass_manager(PASS_MANAGER)  # an engine before this one in the process may have switched it off
    _pass_on(chosen, config)
    RECORDER.report.fingerprint = fingerprint.fingerprint(chosen)
    return RECORDER.report.fingerprint


def _pass_on(chosen: settings.Settings, config: Any) -> None:
    from . import mla, warmup
    from .kernels import launch

    os.environ[launch.ENV] = "1" if chosen.use_pdl else "0"
    wanted = chosen.mla_v_up_quant and config.compilation_config.pass_config.fuse_attn_quant
    mla.configure(bool(wanted) and "MLAAttnQuantFusionPass" not in chosen.stock_passes)
    warmup.install(config)


def _get_compilation_match_table(worker: Any) -> dict[str, int]:
    """Matches by pass in this worker's compiled graphs, stock's passes and ours."""
    from . import compat

    return compat.stock_match_table()


def _get_fusion_report(worker: Any) -> dict[str, Any]:
    """This worker's `RankReport` as plain data."""
    from . import compat

    RECORDER.report.rank = worker.vllm_config.parallel_config.rank
    RECORDER.load(compat.artefact_folder(worker.vllm_config.compilation_config))
    RECORDER.report.linear_kernels = compat.linear_kernels(worker)
    return get_fusion_report()
