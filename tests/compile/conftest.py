# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fake_gpu
import pytest

HERE = Path(__file__).parent
MODELS = HERE.parent / "models"

# A trace takes 30 to 60 s on two cores; this is for a hang, such as a collective that waits for other ranks.
TRACE_TIMEOUT_S = 400


@pytest.fixture(scope="session")
def trace_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`trace_model(model, plugin=..., ...)`: what trace_model.py tells, in a process of its own; each trace is made once."""
    if reason := fake_gpu.unavailable():
        pytest.skip(reason)
    done: dict[str, dict[str, Any]] = {}

    def trace(
        model: str,
        *,
        plugin: bool,
        tp: int = 1,
        env: Mapping[str, str] | None = None,
        pass_config: Mapping[str, Any] | None = None,
        compilation_config: Mapping[str, Any] | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "trace_model.py"), str(MODELS / model), f"--tp={tp}"]
        command += ["--plugin" if plugin else "--no-plugin"]
        command += [f"--env={name}={value}" for name, value in sorted((env or {}).items())]
        for option, value in (
            ("--pass-config", pass_config),
            ("--compilation-config", compilation_config),
            ("--engine-args", engine_args),
        ):
            if value is not None:
                command += [option, json.dumps(value, sort_keys=True)]
        key = " ".join(command[2:])
        if key not in done:
            output = tmp_path_factory.mktemp("trace") / "trace.json"
            run = subprocess.run(
                [*command, f"--output={output}"], capture_output=True, text=True, timeout=TRACE_TIMEOUT_S
            )
            if run.returncode != 0:
                pytest.fail(f"trace_model.py {key}\n{run.stderr[-8000:]}", pytrace=False)
            done[key] = json.loads(output.read_text())
        return done[key]

    return trace
