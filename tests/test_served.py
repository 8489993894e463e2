# SPDX-License-Identifier: Apache-2.0
"""`vllm-fusion-plugin report`: of a server, and of what vLLM has kept; and the line that a rank logs."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_fusion_plugin import child, cli, served
from vllm_fusion_plugin.rank_report import Found, Missed, RankReport, Subgraph

PASS = "activation_quant_fusion_pass"


def report(rank: int = 0, modules: int = 2, manager: str = "active") -> RankReport:
    """`modules` places fused, the last one in code that the first one's subgraph has compiled, and one left."""
    found = [Found(pass_name=PASS, pattern="silu_mul+static", module=f"layers.{i}.mlp") for i in range(modules)]
    left = Missed(pass_name="none", reason="why", module="head")
    subgraphs = [
        Subgraph(index=0, compile_range="(1, 8)", found=found[:-1], missed=[left]),
        Subgraph(index=1, compile_range="(1, 8)", found=found[-1:], reused_from=0),
    ]
    return RankReport(rank=rank, manager=manager, subgraphs=subgraphs)


@contextmanager
def server(status: int, answer: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.path == "/collective_rpc" and asked == {"method": "get_fusion_report"}
            self.send_response(status if known else 400)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments): ...

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}/"
        finally:
            listening.shutdown()
            thread.join()


def run(*arguments: str):
    return CliRunner().invoke(cli.app, ["report", *arguments])


def test_a_server_that_answers():
    with server(200, json.dumps({"results": [report(r).model_dump() for r in (0, 1)]}).encode()) as url:
        assert [rank.rank for rank in served.ask(url).ranks] == [0, 1]
        result = run("--url", url)
    assert result.exit_code == 0 and "2 of 3 quantisers fused on each of 2 ranks" in result.output


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (404, b"", "start it with VLLM_SERVER_DEV_MODE=1"),
        (500, b"", "answers with status 500; it may have no plugin"),
        (200, b"hello", "does not answer with fusion reports"),
        (200, b'{"results": ["x"]}', "does not answer with fusion reports"),
        (200, b"[]", "does not answer with fusion reports"),
    ],
)
def test_a_server_without_a_report(status, answer, words):
    with server(status, answer) as url, pytest.raises(child.UserError, match=words):
        served.ask(url)


def test_no_server():
    with server(200, b"") as url:
        pass
    for address, words in ((url, "does not answer: "), ("localhost:8000", "is no address of a server")):
        result = run("--url", address)
        assert result.exit_code == 2 and result.output.count("\n") == 1 and words in result.output


def keep(path: Path, kept: RankReport, time: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(kept.model_dump_json())
    os.utime(path, (time, time))


def test_what_was_compiled_last_is_read(tmp_path):
    cache = tmp_path / "torch_compile_cache"
    keep(cache / "old" / "rank_0_0" / "backbone" / "rank_0.fusion_report.json", report(modules=7), 1)
    new = cache / "new"
    for rank in (0, 1):
        keep(new / f"rank_{rank}_0" / "backbone" / f"rank_{rank}.fusion_report.json", report(rank), 3)
        keep(new / f"rank_{rank}_0" / "draft_model" / f"rank_{rank}.fusion_report.json", report(rank, modules=3), 2)
    found, where = served.read(tmp_path)
    assert where == new and [rank.rank for rank in found.ranks] == [0, 1]
    assert [rank.layer_table()[PASS] for rank in found.ranks] == [5, 5]
    assert [rank.match_table()[PASS] for rank in found.ranks] == [3, 3]
    assert [s.reused_from for s in found.ranks[0].subgraphs] == [None, 0, None, 2]
    # vLLM's AOT artefacts
    keep(cache / "torch_aot_compile" / "newest" / "rank_0.fusion_report.json", report(modules=4), 4)
    found, where = served.read(tmp_path)
    assert where == cache / "torch_aot_compile" / "newest" and found.layer_table() == {PASS: 4}


def test_nothing_kept_or_unreadable(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    result = run()
    assert result.exit_code == 2 and f"no report is kept below {tmp_path}" in result.output
    (tmp_path / "rank_0.fusion_report.json").write_text("{")
    result = run("--cache", str(tmp_path))
    assert result.exit_code == 2 and "cannot be read" in result.output
    assert run("--url", "http://x", "--cache", str(tmp_path)).exit_code == 2


def test_other_forms_and_exit_status(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    keep(tmp_path / "torch_compile_cache" / "x" / "rank_0.fusion_report.json", report(manager="inactive: why"), 1)
    page = tmp_path / "page.html"
    result = run("--json", "--html", str(page))
    assert result.exit_code == 1 and json.loads(result.output)["ranks"][0]["manager"] == "inactive: why"
    assert "2 of 3 quantisers fused" in page.read_text() and "://" not in page.read_text()


def test_a_rank_says_what_has_fused_when_it_is_about_to_serve(monkeypatch, caplog):
    pytest.importorskip("torch")
    from vllm_fusion_plugin import warmup
    from vllm_fusion_plugin.report import RECORDER

    monkeypatch.setattr(RECORDER, "report", report(rank=3))
    monkeypatch.setattr(warmup.calls, "CALLS", {})
    with caplog.at_level(logging.INFO, "vllm.fusion_plugin"):
        monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
        warmup.before_serving()
    assert "rank 3: 2 of 3 quantisers fused; 1 left, see vllm-fusion-plugin report" in caplog.text
