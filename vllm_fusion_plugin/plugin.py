# SPDX-License-Identifier: Apache-2.0
"""The entry point. vLLM calls `register()` in every process, sometimes more than once, before it builds anything."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from . import flags, fusions, metrics, settings, strict
from .rank_report import Verified
from .report import RECORDER, EngineRecord, RankReport, Subgraph, places_of

# Below "vllm", so that vLLM's own handlers and levels apply.
logger = logging.getLogger("vllm.fusion_plugin")

PASS_MANAGER = "vllm_fusion_plugin.plugin.make_pass_manager"
NOTHING_YET = "installed, nothing compiled yet"

_warned: set[str] = set()
# Why no pass of ours runs in this process, whatever the engine; "" if one may. None: vLLM has not called `register`.
_off: str | None = None


# ---- the process -----------------------------------------------------------------------------------------------------


def register() -> None:
    """Put the plugin in place, or leave vLLM as it is and say why. Never raises: an exception here would stop vLLM."""
    global _off
    try:
        from . import seams

        seams.announce_environment(settings.ENV_SWITCH)
        seams.attach_worker_methods(
            {
                "get_compilation_match_table": _get_compilation_match_table,
                "get_fusion_report": _get_fusion_report,
                "verify_fusions_again": _verify_fusions_again,
            }
        )
        seams.hook_engine_start(_engine_started)
        seams.hook_front_end(metrics.publish)
        _off = _register()
    except Exception as e:
        _off = _inactive(f"{type(e).__name__}: {e}")
    RECORDER.report.manager = _off or NOTHING_YET


def _register() -> str:
    """Why the plugin is off in this process; "" if it is in place."""
    from . import seams

    if not settings.parse_switch():
        return f"off: {settings.ENV_SWITCH}=0"
    if not settings.load().enabled:
        return settings.OFF

    from vllm.platforms import current_platform

    if current_platform.is_cpu() and settings.parse_switch(settings.ENV_CPU, default=False):
        from .demo import cpu  # imports half of vLLM, 4 s

        cpu.enable()
    # The cache comes before the passes: with passes and a stale hash, an old artefact could be used silently.
    seams.hash_into_config(configure_engine, engine_key)
    if reason := seams.install_pass_manager(PASS_MANAGER):
        return _inactive(reason)
    seams.hook_model_load(model_loaded, _warmed_up)
    try:
        seams.wrap_flag_defaults(flags.NORM_AND_ACT, turn_on_flag)
    except Exception as e:  # the passes go without it, where flags are on
        logger.warning("vllm-fusion-plugin: fusion flags stay as vLLM has them by default: %r", e)
    return ""


def _engine_started(engine_core: Any) -> None:
    """All workers of an engine have warmed up. Raises StrictError, and nothing else."""
    strict.check(engine_core)
    with contextlib.suppress(Exception):  # without it, fewer calls are verified
        if settings.read(engine_core.vllm_config.additional_config)[0].verify:
            engine_core.collective_rpc("verify_fusions_again")


def model_loaded(worker: Any) -> None:
    """A worker has loaded its models: put in place what fuses outside of graphs, also where vLLM compiles nothing."""
    from . import compat
    from .layers import rms_norm_quant, silu_mul_quant

    config = worker.vllm_config
    configure_engine(config)
    record = RECORDER.engine(compat.engine_owner(config))
    for model in compat.models(worker):
        if not record.mlps_left:
            silu_mul_quant.attach(model, config)
        if not record.norms_left:
            rms_norm_quant.attach(model, config)


def _warmed_up() -> None:
    from . import warmup

    warmup.unless_done()


def turn_on_flag(config: Any, flag: str) -> bool:
    """Whether `flag` is on in an engine for which vLLM's default is off; marks the engine if it is."""
    if _off != "" or _why_kernels_cannot_run() or not flags.is_wanted(config, flag):
        return False
    flags.mark(config, flag)
    return True


def _inactive(reason: str) -> str:
    """The state to report; warns, once a reason."""
    if reason not in _warned:
        _warned.add(reason)
        logger.warning("vllm-fusion-plugin is not active, vLLM runs as if it were not installed: %s", reason)
    return f"inactive: {reason}"


def make_pass_manager() -> Any:
    """What vLLM calls for a pass manager: ours, or stock's with a warning if ours does not go with this vLLM."""
    global _off
    try:
        from .passes.pass_manager import FusionPassManager

        return FusionPassManager()
    except Exception as e:
        from . import seams

        _off = RECORDER.report.manager = _inactive(f"its pass manager cannot be made: {type(e).__name__}: {e}")
        manager = seams.stock_pass_manager()
        manager.configure = functools.partial(_configure_stock, manager.configure)
        return manager


def _configure_stock(configure: Callable[[Any], None], config: Any) -> None:
    with flags.left_to_vllm(config):
        configure(config)


# ---- an engine -------------------------------------------------------------------------------------------------------


def configure_engine(config: Any) -> None:
    """Prepare this process for the engine of `config`, before vLLM compiles it or loads its compiled code: settle what its
    compile cache is keyed by, give it a cache folder of its own, register our ops, take part in loading, and pass settings
    on to kernels and layers. PDL, which changes no byte, is the process's: the engine configured last decides. The pass
    manager stays in place; for an engine that the plugin keeps out of, it is vLLM's own in all but name. vLLM hashes a
    config several times; each time this is done again. Never raises.
    """
    from . import compat, fingerprint, seams

    record = RECORDER.engine(compat.engine_owner(config))
    try:
        _configure_engine(config, record)
    except Exception as e:
        # A bug of ours: nobody knows what is in place, so what is compiled now must not be found again.
        record.failed, record.key = True, fingerprint.unique_key()
        record.inactive = _inactive(f"{type(e).__name__}: {e}")
        record.leave_layers(record.inactive)
        with contextlib.suppress(Exception):
            seams.use_own_cache_folder(config, record.key)


def _configure_engine(config: Any, record: EngineRecord) -> None:
    from . import compat, fingerprint, roundings, seams

    if record.failed:
        return
    record.report.rank = config.parallel_config.rank
    chosen, record.inactive = settings_of(config)
    if not record.inactive and (reason := _why_kernels_cannot_run()):
        record.inactive = _inactive(reason)
    if record.inactive:
        record.key = None
        record.leave_layers(record.inactive)
        return
    record.key = record.report.fingerprint = fingerprint.fingerprint(chosen, {"roundings": roundings.key()})
    if on := flags.turned_on(config):
        record.note(
            f'{" and ".join(on)} turned on by this package (fuse="auto"): vLLM leaves these fusions to Inductor'
        )
    if unknown := fingerprint.unknown_code():
        _note_unknown_code(record, unknown)
    _register_ops()
    seams.use_own_cache_folder(config, record.key)
    seams.hook_aot_load(lambda c: RECORDER.begin_load(compat.engine_owner(c)), RECORDER.end_load)
    _pass_on(chosen, config, record)


def settings_of(config: Any) -> tuple[settings.Settings, str]:
    """An engine's settings, and the state to report if they keep the plugin out of it; "" if they do not. Warns of bad ones,
    once."""
    chosen, problem, out = settings.read(config.additional_config)
    return chosen, _inactive(problem) if problem else out


def _why_kernels_cannot_run() -> str:
    """Why a fused op could not run its kernel here; "" if it could, or needs none."""
    from vllm.platforms import current_platform

    from . import fingerprint

    return "" if current_platform.is_cpu() else fingerprint.kernels_without_source()


def _note_unknown_code(record: EngineRecord, reason: str) -> None:
    text = f"compiled code is not kept for other processes, for the state of this package is not known: {reason}"
    record.note(text)
    _warn(text)


def _register_ops() -> None:
    """A compiled artefact from the cache calls our ops by name, in a process where no pass has run."""
    for fusion in fusions.FUSIONS:
        for module in fusion.ops:
            import_module(f"{__package__}.ops.{module}")
    for added in fusions.ADDED.values():
        for name in added.ops:
            try:
                import_module(name)
            except Exception as e:  # its pass cannot be made either
                logger.warning(
                    "vllm-fusion-plugin: ops of the added fusion %s: %s: %s", added.name, type(e).__name__, e
                )


def _pass_on(chosen: settings.Settings, config: Any, record: EngineRecord) -> None:
    from . import compat, roundings, warmup
    from .kernels import cuda_library, pdl
    from .layers import experts_input_quant, experts_silu_mul_quant, mla_v_up_quant

    os.environ[pdl.ENV] = "1" if chosen.use_pdl else "0"
    os.environ[cuda_library.ENV] = chosen.kernels
    _choose_kernels(chosen, record)
    wanted = chosen.mla_v_up_quant and config.compilation_config.pass_config.fuse_attn_quant
    wanted = wanted and "MLAAttnQuantFusionPass" not in chosen.stock_passes
    # The op has the rounding of the quantiser that vLLM would run after attention, or the nearest that is known.
    record.mla_v_up_quant = bool(wanted) and not _why_inexact(chosen, roundings.GROUP_QUANT)
    if record.mla_v_up_quant:
        mla_v_up_quant.install()
    record.experts_left = _why_left(chosen, "experts_silu_mul_quant")
    record.mlps_left = _why_cpu_is_left() or _why_left(chosen, "mlp_silu_mul_quant")
    record.norms_left = _why_cpu_is_left() or _why_norms_left(chosen)
    if not record.experts_left:
        experts_silu_mul_quant.install()
    if chosen.experts_input_quant:
        experts_input_quant.install()  # compiled code from file calls its op by name
    if chosen.verify:
        from .ops import verify

        verify.start(chosen.verify, compat.forward_pass)
    warmup.install(config)


def _choose_kernels(chosen: settings.Settings, record: EngineRecord) -> None:
    """Let them run, and say in the report which those are."""
    from vllm.platforms import current_platform

    from .kernels import cuda_library
    from .ops import registry

    ops = registry.bind_all()
    if not current_platform.is_cuda():
        return
    if ops:
        record.report.kernels = f"CUDA's of {', '.join(sorted(ops))}; Triton's of all other ops"
        return
    record.report.kernels = f"Triton's: {cuda_library.why_not()}"
    if chosen.kernels == "cuda":
        _warn(f"kernels=cuda, but {cuda_library.why_not()}: Triton's run")


def _warn(text: str) -> None:
    """Once."""
    if text not in _warned:
        _warned.add(text)
        logger.warning("vllm-fusion-plugin: %s", text)


def _why_cpu_is_left() -> str:
    """Why layers of vLLM's CPU engine are left to vLLM; "" if they are not, or if this is another."""
    from vllm.platforms import current_platform

    on = not current_platform.is_cpu() or settings.parse_switch(settings.ENV_CPU, default=False)
    return "" if on else f"on CPU, {settings.ENV_CPU}=1 asks for it"


def _why_left(chosen: settings.Settings, setting: str) -> str:
    """Why a fusion of SiLU·mul and quantiser in layers is left to vLLM; "" if it is not."""
    from . import roundings

    if not getattr(chosen, setting):
        return f"off: {setting}=false"
    return _why_inexact(chosen, roundings.SILU_MUL, roundings.GROUP_QUANT)


def _why_norms_left(chosen: settings.Settings) -> str:
    """Why norms outside of graphs are left to vLLM; "" if they are not."""
    if not chosen.eager_rms_norm_quant:
        return "off: eager_rms_norm_quant=false"
    return "vLLM's norm adds up in another order, and inexact=leave" if chosen.inexact == "leave" else ""


def _why_inexact(chosen: settings.Settings, *ops: str) -> str:
    """Why what stands in for these of vLLM's ops is left to vLLM, for its bytes; "" if it is not."""
    from . import roundings

    differing = [op for op in ops if roundings.of(op).differing]
    if differing and chosen.inexact == "leave":
        return f"{differing[0]} is {roundings.of(differing[0]).reason}, and inexact=leave"
    return ""


def engine_key(config: Any) -> str | None:
    """What vLLM's cache hash must cover beyond vLLM's own: None where the plugin changes nothing. `configure_engine` comes
    first."""
    from . import compat

    return RECORDER.engine(compat.engine_owner(config)).key


# ---- worker methods --------------------------------------------------------------------------------------------------


def _get_compilation_match_table(worker: Any) -> dict[str, int]:
    """Matches by pass in this process's compiled graphs, stock's passes and ours."""
    from . import compat

    return compat.stock_match_table()


def _get_fusion_report(worker: Any) -> dict[str, Any]:
    """This worker's `RankReport` as plain data, whatever has become of the plugin."""
    from . import compat

    record = RECORDER.engine(compat.engine_owner(worker.vllm_config))
    report = record.report
    report.rank = worker.vllm_config.parallel_config.rank
    try:
        report.outside = outside_of_graphs(worker, record)
    except Exception as e:
        record.note(f"what layers fuse could not be found out: {type(e).__name__}: {e}")
    report.manager = _state(worker.vllm_config, record)
    report.from_file = bool(report.subgraphs) and all(s.from_cache for s in report.subgraphs)
    try:
        report.linear_kernels = compat.linear_kernels(worker)
    except Exception as e:
        record.note(f"linear kernels could not be counted: {type(e).__name__}: {e}")
    _note_flags_without_effect(worker.vllm_config, record)
    try:
        report.verified = _verified(report)
    except Exception as e:
        record.note(f"what was verified could not be counted: {type(e).__name__}: {e}")
    return report.model_dump()


def _verify_fusions_again(worker: Any) -> None:
    """This engine is about to serve: what is verified now has real activations."""
    from .ops import verify

    if (verifier := verify.verifier()) is not None:
        verifier.begin_again()


def _verified(report: RankReport) -> list[Verified]:
    """What this process has verified. Its places are layers where the report has as many of that op."""
    if _off:
        return []
    from .ops import verify

    verifier = verify.verifier()
    counted = verifier.counted() if verifier is not None else []
    verified = []
    for op in {c.op: None for c in counted}:
        of_op, layers = [c for c in counted if c.op == op], places_of(op, report)
        if len(layers) != len(of_op):
            layers = [f"call {c.place + 1} of a forward pass" for c in of_op]
        verified += [Verified(**c._asdict() | {"place": layer}) for c, layer in zip(of_op, layers, strict=True)]
    return verified


def _note_flags_without_effect(config: Any, record: EngineRecord) -> None:
    """Fusion flags that are on in an engine, and do nothing there, whoever has switched them on."""
    from . import vllm_flags

    with contextlib.suppress(Exception):
        passes = config.compilation_config.pass_config
        on = {f.switch: bool(getattr(passes, f.switch, False)) for f in fusions.entering("pass")}
        for flag in vllm_flags.without_effect(config, on):
            record.note(f"{flag.flag} is on, and does nothing: {flag.why}")


def outside_of_graphs(worker: Any, record: EngineRecord) -> list[Subgraph]:
    """What layers fuse, and leave, outside of graphs, of each model with such layers."""
    from . import compat
    from .layers import experts_silu_mul_quant, quantised_input, rms_norm_quant, silu_mul_quant

    if _off or record.inactive:
        return []
    names = [*dict.fromkeys(subgraph.model for subgraph in record.report.subgraphs)]
    outside = []
    for number, model in enumerate(compat.models(worker)):
        found, missed = experts_silu_mul_quant.boundaries(model, record)
        told: set[int] = set()
        for of_layers in (silu_mul_quant, rms_norm_quant):
            more = of_layers.boundaries(model, worker.vllm_config, record)
            found, missed = [*found, *more[0]], [*missed, *more[1]]
            told |= of_layers.readers(model, worker.vllm_config)
        missed = [*missed, *quantised_input.left(model, worker.vllm_config, told)]
        name = names[number] if number < len(names) else ""
        if found or missed:
            outside.append(
                Subgraph(index=-1, compile_range="", model=name, part=-1 - number, found=found, missed=missed)
            )
    return outside


def _state(config: Any, record: EngineRecord) -> str:
    """What became of the plugin in an engine, in words."""
    from . import compat

    if _off or record.inactive:
        return _off or record.inactive
    if out := settings_of(config)[1]:
        return out
    if reason := compat.why_nothing_compiles(config):
        layers_fuse = any(found.by_a_pass for model in record.report.outside for found in model.found)
        return f"active in layers alone; {reason}" if layers_fuse else reason
    subgraphs = record.report.subgraphs
    if record.unreported:
        part = "some of its" if subgraphs else "its"
        return f"active, {part} compiled code from file, and no report was kept beside it"
    if not subgraphs:
        return NOTHING_YET
    from_file = sum(s.from_cache for s in subgraphs)
    if from_file == len(subgraphs):
        return "active, from file: compiled code and report were kept by an earlier start"
    return f"active, {from_file} of {len(subgraphs)} subgraphs from file" if from_file else "active"
