# SPDX-License-Identifier: Apache-2.0
"""`register_child.py RESULT`: what `plugin.register` does to vLLM in different environments, one case a forked process.

Forked, because what is changed stays changed, and importing vLLM takes 15 s or more. Writes {case: what is known after it}:
what it imported, vLLM's pass manager, whether vLLM is untouched, the state, the log, and a traceback if it raised.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vllm  # noqa: F401
from vllm.config import VllmConfig
from vllm.platforms import current_platform


def seams() -> tuple[Any, str]:
    return VllmConfig.compute_hash, type(current_platform).get_pass_manager_cls()


def once() -> None:
    from vllm_fusion_plugin import plugin

    plugin.register()


def twice() -> None:
    once()
    once()


def behind_another_plugin() -> None:
    type(current_platform).get_pass_manager_cls = classmethod(lambda cls: "a.b.C")
    once()


def broken_seam() -> None:
    import vllm_fusion_plugin.seams

    vllm_fusion_plugin.seams.hash_into_config = lambda *arguments: 1 / 0
    once()


def known_environment() -> None:
    """vLLM refuses variables with its prefix that it does not know, if it is asked to."""
    once()
    current_platform.validate_environ(hard_fail=True)


def unknown_environment() -> None:
    """What `known_environment` would be without the plugin: the check is there."""
    current_platform.validate_environ(hard_fail=True)


SWITCH, SETTINGS = "VLLM_FUSION_PLUGIN", "VLLM_FUSION_PLUGIN_SETTINGS"
CASES: dict[str, tuple[Callable[[], None], dict[str, str]]] = {
    "twice": (twice, {}),
    "switched off": (once, {SWITCH: "0"}),
    "switch misspelt": (twice, {SWITCH: "maybe"}),
    "unknown setting": (twice, {SETTINGS: '{"x": 1}'}),
    "behind another plugin": (behind_another_plugin, {}),
    "broken seam": (broken_seam, {}),
    "known environment": (known_environment, {SWITCH: "1", SETTINGS: "{}"}),
    "unknown environment": (unknown_environment, {SWITCH: "1", SETTINGS: "{}"}),
}


def outcome(case: Callable[[], None]) -> dict[str, Any]:
    before, error = seams(), ""
    from vllm_fusion_plugin import plugin, report  # noqa: F401

    known = set(sys.modules)
    try:
        case()
    except BaseException:
        error = traceback.format_exc()
    return {
        "imported": sorted(name for name in sys.modules if name not in known),
        "manager": seams()[1],
        "untouched": before == seams(),
        "state": report.RECORDER.report.manager,
        "error": error,
    }


def run_forked(case: Callable[[], None], environment: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result", Path(folder) / "log"
        process = os.fork()
        if process == 0:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            os.environ.update(environment)
            try:
                result.write_text(json.dumps(outcome(case)))
                sys.stdout.flush()
            finally:
                os._exit(0)
        os.waitpid(process, 0)
        told = json.loads(result.read_text()) if result.exists() else {"error": "the process ended without a result"}
        return told | {"log": log.read_text()}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({name: run_forked(*case) for name, case in CASES.items()}, indent=1))
