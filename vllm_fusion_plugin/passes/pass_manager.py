# SPDX-License-Identifier: Apache-2.0
"""Stock's pass manager, with our passes in stock's places.

vLLM imports this module by name when it is about to compile (see plugin.py); nothing else may import it earlier, because it
pulls in torch's compiler.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass, get_pass_context
from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform

from .. import compat, flags, fusions, seams, settings
from ..report import RECORDER
from .base import FusionPass

logger = logging.getLogger("vllm.fusion_plugin")

STAND_INS = tuple(fusion.name for fusion in fusions.entering("pass", rocm=current_platform.is_rocm()))
# No fusion, but what undoes a split that nothing came of.
JOIN = fusions.Fusion("JoinPass", "join", "last", "enabled")


def our_pass(name: str) -> type:
    """Our pass class of that name; importing it registers the ops that it puts into graphs."""
    stem = JOIN.stem if name == JOIN.name else fusions.BY_NAME[name].stem
    return getattr(import_module(f"{__package__}.{stem}"), name)


def _build(name: str, stock: Callable[..., Any] | None, config: VllmConfig) -> Any:
    """Our pass, or stock's with a warning if ours cannot be made here."""
    try:
        made = our_pass(name)(config)
    except Exception as e:
        if stock is None:
            raise
        RECORDER.report.passes[name] = f"stock's: ours failed: {type(e).__name__}: {e}"
        logger.warning("vllm-fusion-plugin: %s is vLLM's own; ours failed: %s: %s", name, type(e).__name__, e)
        # vLLM's own is none where the flag is on for ours alone.
        return (_LeavesGraphs if fusions.BY_NAME[name].switch in flags.turned_on(config) else stock)(config)
    RECORDER.report.passes[name] = "ours"
    return made


class _LeavesGraphs(InductorPass):
    """For a flag that is set although vLLM has no such pass here: demo/cpu.py leaves flags set for passes of ours, and
    then ours may be out."""

    def __init__(self, config: VllmConfig) -> None: ...

    def __call__(self, graph: fx.Graph) -> None: ...


class FusionPassManager(PostGradPassManager):
    """PostGradPassManager that builds our passes where it would have built the stock ones of the same name."""

    leftovers: Any = None

    def configure(self, config: VllmConfig) -> None:
        try:
            chosen = self._begin(config)
        except Exception as e:  # must not stop vLLM, which compiles without us
            logger.warning("vllm-fusion-plugin is not active: %s: %s", type(e).__name__, e)
            chosen = None
        if chosen is None:
            RECORDER.leave_part()
            leaves_graphs = {name: _LeavesGraphs for name in STAND_INS if seams.stock_pass(name) is None}
            with flags.left_to_vllm(config), seams.stand_ins(leaves_graphs):
                super().configure(config)
            return
        stand_ins = {
            name: functools.partial(_build, name, seams.stock_pass(name))
            for name in STAND_INS
            if name not in chosen.stock_passes
        }
        if chosen.rocm_kernels == "aiter" and (reason := compat.why_no_aiter()):
            RECORDER.note(f"rocm_kernels='aiter' does nothing: {reason}")
        RECORDER.report.passes |= {name: "stock's: settings leave it to vLLM" for name in chosen.stock_passes}
        RECORDER.report.passes |= {name: compat.why_off(config, name) for name in stand_ins}
        with seams.stand_ins(stand_ins):
            super().configure(config)
        if compat.vllms_passes_follow():
            self._let_vllms_follow(config)
        for fusion in fusions.entering("first"):
            self._add_first(self._build_ours(fusion, chosen, config))
        for added in fusions.ADDED.values():
            (self._add_first if added.before_vllms else self._add_last)(self._build_added(added, chosen, config))
        for fusion in fusions.entering("last"):
            self._add_last(self._build_ours(fusion, chosen, config))
        if not chosen.lone_group_quant and any(getattr(chosen, f.switch) for f in fusions.entering("first")):
            self._add_last(self._build_ours(JOIN, chosen, config))
        self._add_leftovers(config)

    def _let_vllms_follow(self, config: VllmConfig) -> None:
        """Behind each pass of ours, vLLM's own of that name."""
        followed = []
        for p in self.passes:
            followed.append(p)
            name = type(p).__name__
            if name not in STAND_INS or RECORDER.report.passes.get(name) != "ours":
                continue
            try:
                # as vLLM makes it: its patterns are traced with layers that ask for a configuration
                with set_current_vllm_config(config, check_compile=False):
                    stock = seams.stock_pass(name)(config)
                followed.append(import_module(f"{__package__}.followers").Follower(stock))
            except Exception as e:
                RECORDER.note(f"vLLM's own {name} does not run after this package's: {type(e).__name__}: {e}")
                logger.warning(
                    "vllm-fusion-plugin: vLLM's own %s cannot follow ours: %s: %s", name, type(e).__name__, e
                )
        self.passes = followed

    def _add_leftovers(self, config: VllmConfig) -> None:
        """After all others: reports what is left, changes nothing."""
        try:
            self.leftovers = import_module(f"{__package__}.leftovers").Leftovers(self.passes, config)
            self.add(self.leftovers)
        except Exception as e:  # a report must never stop a model from compiling
            logger.warning("vllm-fusion-plugin: what passes leave is not reported: %s: %s", type(e).__name__, e)
            RECORDER.note(f"what passes leave is not reported: {type(e).__name__}: {e}")

    def _begin(self, config: VllmConfig) -> settings.Settings | None:
        """Say to the recorder that this manager is at work for the engine of `config`; None if the plugin is not to be."""
        owner = compat.engine_owner(config)
        record = RECORDER.engine(owner)
        record.report.rank = config.parallel_config.rank
        if record.inactive:
            return None
        # vLLM makes its pass manager before it hashes the config, which is where bad settings are reported and the plugin is
        # switched off: then this one is there already, and has to be stock's.
        chosen, problem, out = settings.read(config.additional_config)
        if problem or out:
            return None
        record.report.manager = "active"
        folder = compat.artefact_folder(config.compilation_config)
        RECORDER.begin_part(self, owner, compat.part_name(config), folder)
        return chosen

    def _build_ours(self, fusion: fusions.Fusion, chosen: settings.Settings, config: VllmConfig) -> Any:
        """A pass that vLLM has none in the place of; None if it is off, or if it cannot be made here."""
        if not getattr(chosen, fusion.switch):
            RECORDER.report.passes[fusion.name] = f"off: {fusion.switch}=false"
            return None
        try:
            return _build(fusion.name, None, config)
        except Exception as e:
            RECORDER.report.passes[fusion.name] = f"off: it failed: {type(e).__name__}: {e}"
            logger.warning("vllm-fusion-plugin: %s is left out, it failed: %s: %s", fusion.name, type(e).__name__, e)
            return None

    def _build_added(self, added: fusions.Added, chosen: settings.Settings, config: VllmConfig) -> Any:
        """A pass of another package; None if it is off, or if it cannot be made here."""
        if not chosen.added_fusions:
            RECORDER.report.passes[added.name] = "off: added_fusions=false"
            return None
        try:
            made = getattr(import_module(added.module), added.name)(config)
            if not isinstance(made, FusionPass):
                raise TypeError(f"{added.module}:{added.name} is no vllm_fusion_plugin.passes.base.FusionPass")
        except Exception as e:
            RECORDER.report.passes[added.name] = f"off: it failed: {type(e).__name__}: {e}"
            logger.warning("vllm-fusion-plugin: %s is left out, it failed: %s: %s", added.name, type(e).__name__, e)
            return None
        RECORDER.report.passes[added.name] = f"added by {added.module.partition('.')[0]}"
        return made

    def _add_first(self, made: Any) -> None:
        """Before all fusion passes, and after vLLM's elimination of views that change nothing."""
        if made is not None:
            after = sum(type(p).__name__ == "NoOpEliminationPass" for p in self.passes[:1])
            self.passes.insert(after, made)

    def _add_last(self, made: Any) -> None:
        if made is not None:
            self.add(made)

    def __call__(self, graph: fx.Graph) -> None:
        with contextlib.suppress(Exception):  # a report must never stop a model from compiling
            RECORDER.begin_passes(self, get_pass_context().compile_range)
            if self.leftovers is not None:
                self.leftovers.begin(graph)
        super().__call__(graph)


seams.hook_compiler(RECORDER.begin_subgraph, RECORDER.end_subgraph)
