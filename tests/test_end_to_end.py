# SPDX-License-Identifier: Apache-2.0
"""What end_to_end.py is told, asks its engines, and concludes from their answers; the measuring itself needs a GPU."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


# ---- comparisons.py --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "left_out"), [(6, 0), (8, 0), (9, 1), (12, 2), (20, 5)])
def test_interval_of_the_median_leaves_out_what_tables_of_the_sign_test_say(n, left_out):
    from comparisons import median_interval

    values = random.Random(n).sample(range(100), n)
    assert median_interval(values) == (sorted(values)[left_out], sorted(values)[-1 - left_out])


def test_interval_holds_the_median_as_often_as_it_says():
    from comparisons import median_interval

    draw = random.Random(0)
    inside = 0
    for _ in range(2000):
        low, high = median_interval([draw.expovariate(1.0) for _ in range(12)])
        inside += low <= 0.6931 <= high
    assert inside >= 0.95 * 2000


def test_too_few_values_for_an_interval_are_refused():
    from comparisons import median_interval

    with pytest.raises(ValueError, match="5 values hold no median with 95% confidence"):
        median_interval([1.0, 2.0, 3.0, 4.0, 5.0])


def test_differences_of_configurations_are_taken_round_by_round():
    import comparisons

    drift = [1.0, 1.2, 1.5, 1.1, 1.4, 1.3, 1.0]
    times = {
        ("decode", 8, "gpu_ms"): {
            "stock_unfused": drift,
            "ours": [t - d for t, d in zip(drift, (0.1, 0.2, 0.1, 0.1, 0.1, 0.0, 0.1), strict=True)],
        }
    }
    (row,) = comparisons.paired(times)
    assert (row["pair"], row["clock"], row["batch"]) == ("ours - stock_unfused", "gpu_ms", 8)
    assert (row["median_ms"], row["low_ms"], row["high_ms"]) == (-0.1, -0.2, 0.0)
    assert row["percent"] == pytest.approx(-100 * 0.1 / 1.2, abs=0.01)
    assert comparisons.summaries("m", times) == [
        {"model": "m", "phase": "decode", "batch": 8, "config": "stock_unfused", "gpu_ms": 1.2},
        {"model": "m", "phase": "decode", "batch": 8, "config": "ours", "gpu_ms": 1.0},
    ]


def test_agreement_of_tokens_and_logprobs():
    import comparisons

    a = [[[5, 6], [{"5": -0.1}, {"6": -0.2}]]]
    b = [[[5, 7], [{"5": -0.1}, {"7": -0.2}]]]
    same, other = (
        {"tokens": 2, "equal_tokens": n, "equal_logprobs": n == 2, "equal_logprobs_first": [n]} for n in (2, 1)
    )
    asked = {"ours": a, "stock_unfused": b, "control": b}
    assert comparisons.compare(asked, asked | {"control": a}) == {
        "ours and stock_unfused": other,
        "control and stock_unfused": same,
        "ours twice": same,
        "stock_unfused twice": same,
        "control twice": other,
    }


# ---- end_to_end.py ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "out"),
    [
        ([], "end_to_end/qwen3-8b-8layers.default.json"),
        (
            ["--linear", "cutlass", "--attention", "--deterministic", "--tensor-parallel-size", "2"],
            "end_to_end/deterministic/qwen3-8b-8layers.cutlass.attention.tp2.json",
        ),
    ],
)
def test_a_result_is_named_by_what_was_run(arguments, out, monkeypatch):
    import end_to_end
    import timing

    args = parsed(monkeypatch, ROOT / "tests" / "models" / "qwen3-8b-8layers", *arguments)
    assert end_to_end.default_out(args) == timing.results_folder() / out


class FakeEngine:
    def __init__(self, name: str, asked: list) -> None:
        self.name, self.asked = name, asked

    def ask(self, do: str, **arguments):
        self.asked.append((self.name, do, arguments.get("batch", 1)))
        return {"ms": 1.0} if do == "prefill" else {"ms": 2.0, "gpu_ms": None}


def test_every_round_asks_each_engine_for_each_case_and_begins_with_another():
    import end_to_end

    asked: list = []
    engines = {name: FakeEngine(name, asked) for name in ("stock_unfused", "ours")}
    args = SimpleNamespace(rounds=6, batches=[1, 8])
    times = end_to_end.take_turns(engines, args)
    assert times == {
        ("prefill", 1, "ms"): dict.fromkeys(engines, [1.0] * 6),
        ("decode", 1, "ms"): dict.fromkeys(engines, [2.0] * 6),
        ("decode", 8, "ms"): dict.fromkeys(engines, [2.0] * 6),
    }
    one, two = "stock_unfused", "ours"
    assert asked[:6] == [(n, d, b) for d, b in (("prefill", 1), ("decode", 1), ("decode", 8)) for n in (one, two)]
    assert asked[6:8] == [(two, "prefill", 1), (one, "prefill", 1)]


def parsed(monkeypatch, model: Path, *arguments: str):
    import end_to_end

    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "--model", str(model), *arguments])
    return end_to_end.parse()


MODELS = sorted(path.parent for path in (ROOT / "tests" / "models").glob("*/config.json"))


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_models_bring_what_they_need(model, monkeypatch):
    args = parsed(monkeypatch, model)
    assert args.configs == ["untouched", "ours"]
    assert set(args.batches) <= set(args.capture)
    others = parsed(monkeypatch, model, "--linear", "cutlass").configs
    assert {"stock_unfused", "ours"} <= set(others)
    assert "untouched" not in others
    assert ("gdn_prefill_backend" in args.engine) == model.name.startswith("qwen3-next")


def test_the_command_line_wins_over_what_a_model_needs(monkeypatch):
    model = ROOT / "tests" / "models" / "qwen3-next-8layers"
    args = parsed(monkeypatch, model, "--batches", "4", "--engine", '{"seed": 1}')
    assert args.batches == [4]
    assert args.engine == {"gdn_prefill_backend": "triton", "seed": 1}


def test_the_command_line_says_what_vllm_is_called_with(monkeypatch):
    from configurations import CONFIGS, engine_arguments

    model = ROOT / "tests" / "models" / "qwen3-8b-8layers"
    options = [
        "--linear",
        "cutlass",
        "--attention",
        "--deterministic",
        "--engine",
        '{"max_num_seqs": 3}',
        "--pass-config",
        '{"a": 1}',
    ]
    args = parsed(monkeypatch, model, *options)
    found = {name: engine_arguments(name, args) for name in CONFIGS}
    assert json.loads(json.dumps(found)) == found  # an engine's process gets it as JSON
    assert {name for name, of in found.items() if of["additional_config"]} == {
        "ours_act",
        "ours_fastest",
        "ours_experts",
    }
    untouched = found.pop("untouched")["compilation_config"]
    assert untouched["pass_config"] == {}
    assert "use_inductor_graph_partition" not in untouched
    for name, arguments in found.items():
        compilation = arguments["compilation_config"]
        attention = {"fuse_attn_quant": True} if name in ("stock", "ours") else {}
        assert compilation["pass_config"] == CONFIGS[name]["pass_config"] | {"a": 1} | attention
        assert compilation["use_inductor_graph_partition"]
        assert compilation["inductor_compile_config"] == {"deterministic": True}
        assert (arguments["max_num_seqs"], arguments["gpu_memory_utilization"]) == (3, 0.9 / 5)


def test_untouched_and_ours_set_no_flag(monkeypatch):
    from configurations import engine_arguments

    args = parsed(monkeypatch, ROOT / "tests" / "models" / "llama31-8b-fp8-dynamic")
    for name in ("untouched", "ours"):
        assert engine_arguments(name, args)["compilation_config"]["pass_config"] == {}


def test_untouched_runs_the_gemm_that_vllm_selects(tmp_path, monkeypatch):
    import end_to_end

    started: dict = {}
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "0")
    monkeypatch.setattr(
        end_to_end.subprocess, "Popen", lambda command, env, **pipes: started.update({env["VLLM_FUSION_PLUGIN"]: env})
    )
    args = parsed(monkeypatch, ROOT / "tests" / "models" / "qwen3-8b-8layers", "--linear", "deepgemm")
    for name in ("untouched", "ours"):
        end_to_end.Engine(name, args, str(tmp_path))
    assert started["1"].items() >= end_to_end.LINEAR["deepgemm"].items()
    assert not started["0"].keys() & end_to_end.LINEAR["deepgemm"].keys()


def test_a_result_says_in_words_which_block_gemm_ran():
    import end_to_end

    dynamic = "FlashInferFp8DeepGEMMDynamicBlockScaledKernel"
    reports = {name: {"linear_kernels": {dynamic: 32, "FusedMoEKernel": 1}} for name in ("untouched", "ours")}
    assert end_to_end.block_gemms(reports) == {dynamic: "FlashInfer below 32 rows, DeepGEMM from there on"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--rounds", "5"], "--rounds 5: no interval of fewer than 6"), (["--engine", "{"], "argument --engine")],
)
def test_bad_arguments_are_refused(arguments, words, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, ROOT / "tests" / "models" / "qwen3-8b-8layers", *arguments)
    assert words in capsys.readouterr().err


def test_a_model_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, tmp_path)
    assert "allowed: a folder with a config.json" in capsys.readouterr().err


# ---- engine_process.py -----------------------------------------------------------------------------------------------


def test_counts_of_ranks_are_summed_and_a_count_of_none_stays():
    import engine_process

    assert engine_process.over_ranks([{"a": 5, "b": 0}, {"a": 5, "b": 0}]) == {"a": 10, "b": 0}


class FakeLLM:
    """vLLM's engine whose steps take the milliseconds given, on a clock of its own."""

    durations: ClassVar[list[float]] = []

    def __init__(self, **arguments) -> None:
        self.arguments, self.now, self.llm_engine = arguments, 0.0, SimpleNamespace(step=self.step)

    def step(self) -> None:
        self.now += self.durations[self.done] * 1e-3
        self.done += 1

    def collective_rpc(self, method, args=()):
        return {"fill_random_weights": [3], "watch_graphs": [None], "decode_graph_ms": [len(args and args[0]) / 4]}[
            method
        ]

    def generate(self, prompts, params, use_tqdm):
        self.done = 0
        for _ in range(params[0]["max_tokens"]):
            self.llm_engine.step()


def test_a_decode_step_is_one_of_those_that_are_alike(monkeypatch):
    import engine_process

    # the prefill, a step and its difference to the one before each; the last four are of requests that leave
    monkeypatch.setattr(FakeLLM, "durations", [90.0] * 5 + [2.0, 3.0, 7.0] + [90.0] * 4)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=dict))
    settings = {"llm": {"model": "m"}, "plugin": False, "vocabulary": 100, "prefill": 32, "steps": 4}
    engine = engine_process.MeasuredEngine(settings)
    monkeypatch.setattr(engine_process.time, "perf_counter", lambda: engine.llm.now)
    assert (engine.filled, engine.llm.arguments) == (3, {"model": "m"})
    assert engine.decode(2) == {"ms": pytest.approx(3.0), "gpu_ms": 0.5}


# ---- engine_worker.py ------------------------------------------------------------------------------------------------


@pytest.fixture
def engine_worker(monkeypatch):
    # All that it asks of vLLM when it is imported, which takes 15 s.
    platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cuda_alike=lambda: False))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(platforms=platforms))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    return importlib.import_module("engine_worker")


class Graph:
    replays = 0

    def replay(self) -> None:
        self.replays += 1


def test_a_step_of_several_graphs_has_no_graph_time(engine_worker, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(Graph, "replay", Graph.replay)  # put back afterwards
    worker = engine_worker.EngineWorker()
    worker.watch_graphs()
    first, second = Graph(), Graph()
    assert worker.decode_graph_ms([1], 3) is None
    for graph in (first, second, first, second):
        graph.replay()
    assert worker.decode_graph_ms([1], 3) is None
    assert (first.replays, second.replays) == (2, 2)


def test_the_last_graph_is_timed_on_the_tokens_given(engine_worker, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(Graph, "replay", Graph.replay)
    graph = Graph()

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            self.at = float(graph.replays) ** 2

        def synchronize(self) -> None: ...

        def elapsed_time(self, other) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    worker = engine_worker.EngineWorker()
    ids = torch.zeros(8, dtype=torch.int32)
    worker.model_runner = SimpleNamespace(input_ids=SimpleNamespace(gpu=ids))
    worker.watch_graphs()
    graph.replay()
    graph.replay()
    # 2 replays before, 5 to warm up, then 3 that take 8² - 7², 9² - 8² and 10² - 9²
    assert worker.decode_graph_ms([4, 5, 6], 3) == 17.0
    assert ids.tolist() == [4, 5, 6, 0, 0, 0, 0, 0]
