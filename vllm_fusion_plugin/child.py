# SPDX-License-Identifier: Apache-2.0
"""Questions that need a process of their own: one that imports vLLM for half a minute, or pretends to have a GPU.

One process calls `ask("vllm_fusion_plugin.doctor.probe", {...})`; that module, run as a program, calls `answer(function)`.
The request goes through standard input, and lines of JSON come back through standard output: {"progress": ...}, and at the
end {"result": ...} or {"error": ...}. Whatever else the process writes goes to a log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class UserError(RuntimeError):
    """Something that a user can set right. The message is one line: what is wrong, and what to do."""


class ChildError(RuntimeError):
    """The process failed for a reason that nobody has foreseen. The message is one line, and names the log."""


def ask(
    module: str,
    request: Mapping[str, Any],
    progress: Callable[[Any], None] = lambda told: None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """What `module`, run in a process of its own, answers.

    progress: called with what it tells meanwhile. environment: on top of this process's.

    Raises:
        UserError: as the module raised it.
        ChildError: it failed otherwise.
    """
    descriptor, name = tempfile.mkstemp(prefix="vllm-fusion-plugin-", suffix=".log")
    log = Path(name)
    with os.fdopen(descriptor, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env={**os.environ, **(environment or {})},
            # A group of its own: Ctrl-C is this process's, which then ends that one with all that it has started.
            start_new_session=True,
        )
    assert process.stdin is not None and process.stdout is not None
    told: dict[str, Any] = {}
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps(request))
        for line in process.stdout:
            told = json.loads(line)
            if "progress" in told:
                progress(told["progress"])
        process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if "result" in told or "error" in told or sys.exc_info()[0] is not None:
            log.unlink()
    if "result" in told:
        return told["result"]
    if "error" in told:
        raise UserError(told["error"])
    reason = told.get("failed") or f"the process that asks vLLM ended with status {process.returncode}"
    raise ChildError(f"{reason}; what it wrote is in {log}")


def answer(function: Callable[[dict[str, Any], Callable[[Any], None]], Any]) -> None:
    """Call `function(request, tell)` with what the asking process wants to know, and hand back what it returns, as JSON;
    what it tells meanwhile is handed on."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints into the log

    def write(told: Any) -> None:
        print(json.dumps(told), file=stream, flush=True)

    try:
        write({"result": function(json.load(sys.stdin), lambda told: write({"progress": told}))})
    except UserError as e:
        write({"error": str(e)})
    except BaseException as e:
        traceback.print_exc()
        write({"failed": one_line(e)})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads that vLLM or torch have started could wait for others


def one_line(error: BaseException) -> str:
    """An exception as one line: its type, and the first line of what it says; of torch's compiler, what a backend raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(" raised:"):  # the first has the address of an object, and no reason
        return lines[1]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
