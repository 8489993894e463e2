# SPDX-License-Identifier: Apache-2.0
"""Questions to a process of its own: answers, progress, errors, and that nothing of it is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vllm_fusion_plugin import child

CHILD = """
import os, subprocess, sys, time
from vllm_fusion_plugin import child

def main(request, tell):
    print("printed")
    print("written", file=sys.stderr)
    if request["do"] == "refuse":
        raise child.UserError("not so")
    if request["do"] == "fail":
        raise ValueError("first line\\nsecond line")
    if request["do"] == "die":
        os._exit(3)
    if request["do"] == "hang":
        tell([os.getpid(), subprocess.Popen(["sleep", "60"]).pid])
        time.sleep(60)
    tell("half")
    return request["do"]

child.answer(main)
"""


@pytest.fixture
def ask(tmp_path, monkeypatch):
    (tmp_path / "asked_child.py").write_text(CHILD)
    root = str(Path(__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), root]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return lambda do, progress=lambda told: None: child.ask("asked_child", {"do": do}, progress)


def test_answers_and_errors(ask, tmp_path):
    told: list[str] = []
    assert ask("this", told.append) == "this" and told == ["half"]
    with pytest.raises(child.UserError, match="not so"):
        ask("refuse")
    assert not list(tmp_path.glob("*.log"))  # kept only where there is something to look up
    for do, words in (("fail", "^ValueError: first line; what it wrote is in "), ("die", "ended with status 3")):
        with pytest.raises(child.ChildError, match=words) as failed:
            ask(do)
        assert "written" in Path(str(failed.value).rpartition(" ")[2]).read_text()


def test_ctrl_c_leaves_no_process(ask):
    processes: list[int] = []

    def interrupt(told):
        processes.extend(told)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask("hang", interrupt)
    deadline = time.monotonic() + 10
    while any(map(running, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n first \n second"), "ValueError: first"),
        (KeyError(), "KeyError"),
        (
            RuntimeError("backend='<X object at 0x7f12>' raised:\nRuntimeError: no driver\n\nmore"),
            "RuntimeError: no driver",
        ),
    ],
)
def test_an_exception_in_one_line(error, line):
    assert child.one_line(error) == line
