# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve`: what /metrics and `vllm-fusion-plugin report --url` tell, with strict mode on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_fusion_plugin import served
from vllm_fusion_plugin.demo import compare

pytestmark = pytest.mark.slow

START_S = 900
SAMPLE = re.compile(r"^vllm:fusion_plugin_quantisers\{(.*)\} (\S+)$", re.MULTILINE)


def serve(model: Path, folder: Path, port: int, *flags: str) -> tuple[subprocess.Popen, Path]:
    child = str(Path(__file__).parent / "serve_child.py")
    command = [sys.executable, child, "serve", str(model), f"--port={port}", *flags]
    command += ["--load-format=dummy", "--skip-tokenizer-init", "--max-model-len=128", "--max-num-seqs=4"]
    command += ["--served-model-name=demo", *(f"-cc.pass_config.{flag}=true" for flag in compare.FLAGS)]
    environment = compare.engine_environment(1, folder / "cache") | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_FUSION_PLUGIN_SETTINGS": '{"strict": true, "verify": 1}',
    }
    log = folder / "serve.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return process, log


@pytest.fixture(scope="module")
def url(engine, tmp_path_factory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process, log = serve(engine.model, tmp_path_factory.mktemp("serve"), port)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while not answers(f"{address}/health"):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(0.5)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(address: str) -> str:
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            return response.read().decode() or "yes"
    except (urllib.error.URLError, OSError):
        return ""


def test_metrics_tell_what_is_fused_and_what_is_left(url):
    end = time.monotonic() + 60
    while not (samples := SAMPLE.findall(answers(f"{url}/metrics"))) and time.monotonic() < end:
        time.sleep(0.2)
    told = {}
    for labels, value in samples:
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert (label["model_name"], label["engine"], label["rank"]) == ("demo", "0", "0")
        told[label["fusion"], label["state"]] = float(value)
    assert told == {
        ("fuse_act_quant", "fused"): 2.0,
        ("fuse_act_quant", "left"): 0.0,
        ("fuse_norm_quant", "fused"): 4.0,
        ("fuse_norm_quant", "left"): 0.0,
        ("no pass", "fused"): 0.0,
        ("no pass", "left"): 2.0,
    }


def test_the_report_of_a_running_server(url):
    report = served.ask(url)
    assert report.summary() == "6 of 8 quantisers fused; 2 left, see below"
    assert report.ranks[0].manager == "active"
    verified = [(v.op, v.place, v.differing, v.problem) for v in report.ranks[0].verified]
    assert verified == [
        *(("rms_norm_group_fp8_quant", f"layers.{i}", 0, "") for i in (0, 0, 1, 1)),
        *(("silu_mul_group_fp8_quant", f"layers.{i}.mlp", 0, "") for i in (0, 1)),
    ]
    assert all(v.calls and v.numbers for v in report.ranks[0].verified)
