# SPDX-License-Identifier: Apache-2.0
"""Traces of whole models, one after the other, each in a forked process: importing vLLM takes as long as a trace.

    with Tracer() as tracer:
        trace = tracer.trace("qwen3-8b-8layers", plugin=True, env={"VLLM_USE_DEEP_GEMM": "0"})

`python tracer.py h200` is the process that has vLLM imported and forks. It reads the arguments of trace_model.py as JSON, a
line a trace, and answers with a line, the trace's exit status. It is no fork of the caller, which may have threads.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_fusion_plugin.tracing import fake_gpu
from vllm_fusion_plugin.tracing import model as tracing

HERE = Path(__file__).parent
MODELS = HERE.parent / "models"

# A trace takes 15 to 60 s of a core; this is for a hang, such as a collective that waits for other ranks.
TIMEOUT_S = 1800


class TraceError(RuntimeError):
    """A trace failed: its arguments, and the end of what it wrote."""


class Tracer:
    """Makes each trace once. The process starts with the first, as if on `gpu`, a key of fake_gpu.GPUS, and with the
    variables of `env`, which vLLM reads when it is imported."""

    def __init__(self, gpu: str = "h200", env: Mapping[str, str] | None = None) -> None:
        self._gpu, self._env = gpu, os.environ | dict(env or {})
        self._done: dict[str, dict[str, Any]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def trace(
        self,
        model: str,
        *,
        plugin: bool,
        tp: int = 1,
        env: Mapping[str, str] | None = None,
        pass_config: Mapping[str, Any] | None = None,
        compilation_config: Mapping[str, Any] | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What trace_model.py tells of a model of tests/models.

        Raises:
            TraceError: the trace failed or took longer than TIMEOUT_S.
        """
        arguments = [str(MODELS / model), f"--gpu={self._gpu}", f"--tp={tp}", "--plugin" if plugin else "--no-plugin"]
        arguments += [f"--env={name}={value}" for name, value in sorted((env or {}).items())]
        for option, value in (
            ("--pass-config", pass_config),
            ("--compilation-config", compilation_config),
            ("--engine-args", engine_args),
        ):
            if value is not None:
                arguments += [option, json.dumps(value, sort_keys=True)]
        key = " ".join(arguments)
        if key not in self._done:
            self._done[key] = self._make(arguments)
        return self._done[key]

    def _make(self, arguments: list[str]) -> dict[str, Any]:
        folder = Path(self._folder.name)
        output, log = folder / f"{len(self._done)}.json", folder / f"{len(self._done)}.log"
        status = self._ask({"arguments": [*arguments, f"--output={output}"], "log": str(log)})
        if status != "0":
            written = log.read_text(errors="replace") if log.exists() else ""
            raise TraceError(f"trace_model.py {' '.join(arguments)}: {status}\n{written[-8000:]}")
        return json.loads(output.read_text())

    def _ask(self, request: dict[str, Any]) -> str:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "tracer.py"), self._gpu],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._env,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT_S)
        if not ready:
            self._process.kill()
            return f"not done after {TIMEOUT_S} s"
        return self._process.stdout.readline().strip() or "the process that forks ended"


def serve(gpu: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints no answer
    import trace_model

    with tempfile.TemporaryDirectory() as cache:
        tracing.prepare_environment(cache)
        fake_gpu.install(fake_gpu.GPUS[gpu])
        trace_model.import_vllm()
        for line in sys.stdin:
            request = json.loads(line)
            process = os.fork()
            if process == 0:
                os._exit(_trace(request))
            _, status = os.waitpid(process, 0)
            print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _trace(request: dict[str, Any]) -> int:
    import trace_model

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        trace_model.main(request["arguments"])
    except SystemExit as e:
        print(e.code, file=sys.stderr, flush=True)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
