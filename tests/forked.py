# SPDX-License-Identifier: Apache-2.0
"""Tests that leave something behind in their process, which must not be the next test's: each in a fork of it.

pytest-forked would do this, but its 1.7.5 cannot hand over a report of pytest 9.2.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest


def in_a_fork(test: Callable[..., None]) -> Callable[..., None]:
    """The test with its body in a forked process; its fixtures are set up and torn down in this one."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        told, tell = os.pipe()
        process = os.fork()
        if process == 0:
            if "torch" in sys.modules:
                # OpenMP's threads are not in a fork: a loop that is shared between them would wait for ever.
                sys.modules["torch"].set_num_threads(1)
            outcome = _outcome(lambda: test(*args, **kwargs))
            with os.fdopen(tell, "w") as stream:
                stream.write(outcome)
            os._exit(0)
        os.close(tell)
        with os.fdopen(told) as stream:
            outcome = stream.read()
        _, status = os.waitpid(process, 0)
        kind, _, text = outcome.partition(" ")
        if kind == "skipped":
            pytest.skip(text)
        if kind != "passed":
            pytest.fail(text or f"the process ended with status {os.waitstatus_to_exitcode(status)}", pytrace=False)

    return run


def _outcome(test: Callable[[], None]) -> str:
    try:
        test()
    except pytest.skip.Exception as e:
        return f"skipped {e}"
    except BaseException:
        return f"failed {traceback.format_exc()}"
    return "passed "
