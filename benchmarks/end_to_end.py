# SPDX-License-Identifier: Apache-2.0
"""A served model with the plugin and without: times, tokens, and what fused.

    python benchmarks/end_to_end.py --model tests/models/qwen3-8b-8layers

One engine a configuration, all alive at once on one GPU, asked in turn: what drifts (clocks, heat)
drifts for all. Configurations:

    stock           vLLM's defaults
    stock_unfused   vLLM with fuse_norm_quant and fuse_act_quant off
    ours            the plugin, all its fusions: norm, SiLU·mul, quantisers by themselves
    ours_act        the plugin, SiLU·mul + quantiser only
    control         stock_unfused once more: what of a difference is the engine's own
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from typing import Any

HERE = pathlib.Path(__file__).parent
OFF = {"fuse_norm_quant": False, "fuse_act_quant": False}
ON = {"fuse_norm_quant": True, "fuse_act_quant": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "stock": {"plugin": False, "pass_config": {}},
    "stock_unfused": {"plugin": False, "pass_config": OFF},
    "ours": {"plugin": True, "pass_config": ON},
    "ours_act": {
        "plugin": True,
        "pass_config": OFF | {"fuse_act_quant": True},
        "settings": {"lone_group_quant": False},
    },
    "control": {"plugin": False, "pass_config": OFF},
}
ATTENTION = ("stock", "ours")  # what --attention lets fuse attention with the quantiser behind it
CONFIGS_IN_ROWS = ("stock", "stock_unfused", "ours")
# Pairs whose times and tokens are compared, the one that should be faster first.
PAIRS = (
    ("ours", "stock_unfused"),
    ("ours", "stock"),
    ("ours_act", "stock_unfused"),
    ("stock", "stock_unfused"),
    ("control", "stock_unfused"),
)
# Block GEMMs by the environment that selects them.
LINEAR = {
    "cutlass": {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0", "VLLM_USE_DEEP_GEMM": "0"},
    "deepgemm": {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0", "VLLM_USE_DEEP_GEMM": "1"},
    "default": {},
}
# What is taken where the command line says nothing, and what a model needs instead, by its config.json's model_type.
DEFAULTS: dict[str, Any] = {
    "configs": list(CONFIGS),
    "batches": [1, 8, 32, 128],
    "capture": [1, 2, 4, 8, 16, 32, 64, 128],
    "autotuned": False,  # has kernels that Triton's autotuner times
}
NEEDS: dict[str, dict[str, Any]] = {
    # The other GDN prefill kernels compile for minutes, and each capture size takes seconds.
    "qwen3_next": {
        "engine": {"gdn_prefill_backend": "triton"},
        "batches": [1, 32],
        "capture": [1, 32],
        "configs": ["stock", "stock_unfused", "ours", "control"],
        "autotuned": True,
    },
    # 48 GB of weights an engine: two fit on one GPU.
    "deepseek_v3": {"configs": ["stock_unfused", "ours"]},
}
REPLAYS = 50
TOKEN_PROMPTS = (5, 100, 500, 2000)


def prompts(count: int, length: int, vocabulary: int) -> list[Any]:
    return [{"prompt_token_ids": [(7919 * (i + 1) + 31 * j) % vocabulary for j in range(length)]} for i in range(count)]


def over_ranks(counts: list[dict[str, int]]) -> dict[str, int]:
    """Counts of all ranks; a count of 0 says something and stays."""
    total: Counter[str] = Counter()
    for of_rank in counts:
        total.update(of_rank)
    return dict(total)


def serve(args: argparse.Namespace) -> None:
    """Child process: one engine; a JSON command a line on stdin, a JSON answer a line on what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints goes to the log
    from vllm import LLM, SamplingParams

    config = CONFIGS[args.serve]
    pass_config, partition = config["pass_config"] | args.pass_config, {}
    if args.attention:
        partition = {"use_inductor_graph_partition": True}  # attention has to be in the graph that passes see
        if args.serve in ATTENTION:
            pass_config = pass_config | {"fuse_attn_quant": True}
    inductor = {"inductor_compile_config": {"deterministic": True}} if args.deterministic else {}
    options = {
        "model": str(args.model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": args.prefill + 16,
        "max_num_seqs": max(args.batches),
        "max_num_batched_tokens": args.prefill,
        # Given, not measured: engines that start together would take each other's memory for their own. What the first is
        # for is the check at the start, whether that much is still free.
        "gpu_memory_utilization": args.memory or 0.9 / len(args.configs),
        "kv_cache_memory_bytes": int(args.kv_gib * 2**30),
        "enable_prefix_caching": False,
        "tensor_parallel_size": args.tensor_parallel_size,
        "worker_extension_cls": "engine_worker.EngineWorker",
        "compilation_config": {"cudagraph_capture_sizes": args.capture, "pass_config": pass_config}
        | partition
        | inductor,
        "additional_config": {"fusion_plugin": config["settings"]} if "settings" in config else {},
    }
    llm = LLM(**options | args.engine)
    filled = llm.collective_rpc("fill_random_weights")
    llm.collective_rpc("watch_graphs")
    step = llm.llm_engine.step
    stamps: list[float] = []

    def stamped() -> Any:
        out = step()
        stamps.append(time.perf_counter())
        return out

    llm.llm_engine.step = stamped  # type: ignore[method-assign]

    def generate(
        batch: int, prompt: int, tokens: int, logprobs: int | None = None, only: list[int] | None = None
    ) -> tuple[float, Any]:
        """only: the one token that each request may generate."""
        common = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False, "logprobs": logprobs}
        params = [SamplingParams(**common, allowed_token_ids=only and only[i : i + 1]) for i in range(batch)]
        stamps.clear()
        start = time.perf_counter()
        out = llm.generate(prompts(batch, prompt, args.vocabulary), params, use_tqdm=False)
        return (time.perf_counter() - start) * 1e3, out

    def prefill() -> dict[str, float]:
        # The GPU has just run another process: the first request pays for the change of context.
        generate(1, args.prefill, 1)
        return {"ms": statistics.median(generate(1, args.prefill, 1)[0] for _ in range(3))}

    def decode(batch: int) -> dict[str, float | None]:
        generate(batch, 16, 8)
        generate(batch, 16, args.steps + 8)
        # Without prefill and the steps after it, and without the last, when requests leave: all steps alike.
        steps = [(b - a) * 1e3 for a, b in pairwise(stamps)][4:-4]
        # Experts are chosen by what has been generated: the step on the GPU is one of the same tokens for all engines.
        inputs = [104729 * (i + 1) % args.vocabulary for i in range(batch)]
        generate(batch, 16, 8, only=inputs)
        return {
            "ms": statistics.median(steps),
            "gpu_ms": llm.collective_rpc("decode_graph_ms", args=(inputs, REPLAYS))[0],
        }

    def tokens() -> list[Any]:
        # One request at a time: of several, which are batched in which step is up to chance, and a GEMM's or attention's
        # last bits depend on it.
        out = [generate(1, length, 32, 5)[1][0] for length in TOKEN_PROMPTS if length < args.prefill]
        out += generate(1, args.prefill, 4, 5)[1]
        return [
            [o.outputs[0].token_ids, [{str(t): p.logprob for t, p in d.items()} for d in o.outputs[0].logprobs]]
            for o in out
        ]

    def report() -> dict[str, Any]:
        return {
            "match_table": over_ranks(llm.collective_rpc("get_compilation_match_table")),
            "linear_kernels": over_ranks(llm.collective_rpc("linear_kernels")),
            "attention_backends": over_ranks(llm.collective_rpc("attention_backends")),
            "report": llm.collective_rpc("get_fusion_report") if config["plugin"] else None,
        }

    commands = {"prefill": prefill, "decode": decode, "tokens": tokens, "report": report}

    def answer(data: Any) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    answer({"ready": True, "filled": filled[0]})
    for line in sys.stdin:
        ask = json.loads(line)
        answer(commands[ask.pop("do")](**ask))


# (phase, batch, clock) -> configuration -> milliseconds of each round
Times = dict[tuple[str, int, str], dict[str, list[float]]]


class Engine:
    def __init__(self, name: str, args: argparse.Namespace, folder: str) -> None:
        self.name = name
        # Triton's own autotuner, of the GDN kernels for example, keeps its choices there.
        shared = {"TRITON_CACHE_DIR": str(pathlib.Path(folder) / "triton")} if args.deterministic else {}
        self.log = pathlib.Path(folder) / f"{name}.log"
        env = os.environ | LINEAR[args.linear] | shared | {
            "VLLM_FUSION_PLUGIN": "1" if CONFIGS[name]["plugin"] else "0",
            "VLLM_CACHE_ROOT": str(pathlib.Path(folder) / name),
            # The engine in the process that is asked: nothing between a step and the clock.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_DEEP_GEMM_WARMUP": "skip",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True, env=env
        )

    def ready(self, start: float) -> None:
        print(self.name, self.answer(), f"{time.time() - start:.0f} s", flush=True)

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: engine died, last of its log ({self.log}):\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.answer()


def default_out(args: argparse.Namespace) -> pathlib.Path:
    """Runs that take timing out of what is compiled have a folder of their own: their times are not comparable."""
    import timing

    marks = ["attention"] if args.attention else []
    if args.tensor_parallel_size > 1:
        marks.append(f"tp{args.tensor_parallel_size}")
    folder = timing.results_folder() / "end_to_end"
    if args.deterministic:
        folder /= "deterministic"
    return folder / ".".join([args.model.name, args.linear, *marks, "json"])


def measure(args: argparse.Namespace) -> None:
    out = args.out or default_out(args)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="end_to_end-")
    start = time.time()
    engines: dict[str, Engine] = {}
    one_by_one = args.deterministic and args.autotuned  # each finds the choices of the one before
    try:
        for name in args.configs:
            engines[name] = Engine(name, args, folder)
            if one_by_one:
                engines[name].ready(start)
        if not one_by_one:
            for engine in engines.values():
                engine.ready(start)
        reports = {name: engine.ask("report") for name, engine in engines.items()}
        for name, report in reports.items():
            print(name, report["match_table"], report["linear_kernels"], report["attention_backends"])
            if report["report"]:
                mark = "" if name == "ours" else f".{name}"
                write_report(out.with_name(f"{out.stem}{mark}.report.json"), name, report["report"])
        asked = {name: engine.ask("tokens") for name, engine in engines.items()}
        again = {name: engine.ask("tokens") for name, engine in engines.items()}
        found = compare(asked, again)
        print(json.dumps(found, indent=1), flush=True)
        write(out, args, reports, found, {})  # what is known by now survives a run cut short
        if args.tokens_only:
            return
        times = take_turns(engines, args)
    finally:
        for engine in engines.values():
            engine.process.kill()
    write(out, args, reports, found, times)


def write(
    out: pathlib.Path, args: argparse.Namespace, reports: dict[str, Any], found: dict[str, Any], times: Times
) -> None:
    import timing

    rows, differences = summaries(args.model.name, times), paired(times)
    for line in (*rows, *differences):
        print(line)
    timing.write(
        out,
        [row for row in rows if row["config"] in CONFIGS_IN_ROWS],
        more_rows=[row for row in rows if row["config"] not in CONFIGS_IN_ROWS],
        differences=differences,
        agreement=found,
        linear_kernels={name: report["linear_kernels"] for name, report in reports.items()},
        attention_backends={name: report["attention_backends"] for name, report in reports.items()},
        linear_environment=LINEAR[args.linear],
        match_tables={name: report["match_table"] for name, report in reports.items()},
        prefill_tokens=args.prefill,
        rounds=args.rounds,
    )


def take_turns(engines: dict[str, Engine], args: argparse.Namespace) -> Times:
    """Ask every engine for every case, round after round; each round begins with another engine."""
    times: Times = {}
    names = list(engines)
    for turn in range(args.rounds + 1):
        first = turn % len(names)
        for batch in (0, *args.batches):
            for name in names[first:] + names[:first]:
                ms = engines[name].ask("decode", batch=batch) if batch else engines[name].ask("prefill")
                for clock, value in ms.items():
                    if turn and value is not None:  # the first is warm-up
                        case = ("decode" if batch else "prefill", batch or 1, clock)
                        times.setdefault(case, {}).setdefault(name, []).append(value)
    return times


def summaries(model: str, times: Times) -> list[dict[str, Any]]:
    """A row a phase, batch and configuration: the median of each clock over the rounds."""
    rows: dict[tuple[str, int, str], dict[str, Any]] = {}
    for (phase, batch, clock), by_config in times.items():
        for config, ms in sorted(by_config.items(), key=lambda item: list(CONFIGS).index(item[0])):
            row = rows.setdefault(
                (phase, batch, config), {"model": model, "phase": phase, "batch": batch, "config": config}
            )
            row[clock] = round(statistics.median(ms), 4)
    return list(rows.values())


def paired(times: Times) -> list[dict[str, Any]]:
    """For each pair of configurations the difference of the first to the second, round by round: its median and the
    interval that the median lies in with 95 % confidence. 0 outside of it: one is faster."""
    import timing

    found = []
    for (phase, batch, clock), by_config in times.items():
        for a, b in PAIRS:
            if a not in by_config or b not in by_config:
                continue
            differences = [x - y for x, y in zip(by_config[a], by_config[b], strict=True)]
            low, high = timing.median_interval(differences)
            middle = statistics.median(differences)
            found.append({
                "phase": phase, "batch": batch, "clock": clock, "pair": f"{a} - {b}", "median_ms": round(middle, 4),
                "low_ms": round(low, 4), "high_ms": round(high, 4),
                "percent": round(100 * middle / statistics.median(by_config[b]), 2),
            })  # fmt: skip
    return found


def compare(asked: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """For each pair of configurations, and each asked again: do tokens agree, do logprobs to the last bit?"""
    pairs = [(f"{a} and {b}", asked[a], asked[b]) for a, b in PAIRS if a in asked and b in asked]
    pairs += [(f"{name} twice", asked[name], again[name]) for name in asked]
    return {name: agreement(one, other) for name, one, other in pairs}


def agreement(one: list[Any], other: list[Any]) -> dict[str, Any]:
    """How many tokens and logprobs agree; `equal_logprobs_first`: for how many tokens of each prompt, from the first on."""
    tokens = [(x, y) for (t, _), (u, _) in zip(one, other, strict=True) for x, y in zip(t, u, strict=True)]
    logprobs = [list(map(operator.eq, p, q)) for (_, p), (_, q) in zip(one, other, strict=True)]
    return {
        "tokens": len(tokens),
        "equal_tokens": sum(x == y for x, y in tokens),
        "equal_logprobs": all(map(all, logprobs)),
        "equal_logprobs_first": [[*equal, False].index(False) for equal in logprobs],
    }


def write_report(path: pathlib.Path, name: str, ranks: list[dict[str, Any]]) -> None:
    from vllm_fusion_plugin.report import FusionReport

    path.write_text(json.dumps(ranks, indent=1) + "\n")
    report = FusionReport.from_ranks(ranks)
    for row in report.rows():
        print(name, *row)
    for row in report.missed_rows():
        print(name, "missed", *row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with a config.json")
    parser.add_argument("--configs", nargs="*", choices=list(CONFIGS), help="default: all that fit on the GPU")
    parser.add_argument("--linear", default="cutlass", choices=list(LINEAR), help="block GEMM to select")
    parser.add_argument(
        "--attention",
        action="store_true",
        help="partition graphs in Inductor; stock and ours fuse attention + quantiser too",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="take timing out of what is compiled: Inductor's `deterministic`, and one choice of Triton's autotuner "
        "for all engines, which then start one after the other",
    )
    parser.add_argument(
        "--memory", type=float, help="part of the GPU's memory for an engine; default: as much for each"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="GPUs of an engine; counts are summed over them"
    )
    parser.add_argument("--tokens-only", action="store_true", help="compare tokens, measure no times")
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the prefill")
    parser.add_argument("--batches", nargs="*", type=int, help="requests decoded together")
    parser.add_argument("--capture", nargs="*", type=int, help="batch sizes that get a CUDA graph")
    parser.add_argument("--steps", type=int, default=64, help="decode steps a turn")
    parser.add_argument("--rounds", type=int, default=12, help="6 or more, for a confidence interval")
    parser.add_argument("--kv-gib", type=float, default=6, help="KV cache of each engine")
    parser.add_argument("--engine", type=json.loads, help="further engine arguments, or others instead, JSON")
    parser.add_argument("--pass-config", type=json.loads, default={}, help="further flags of all engines' passes, JSON")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        config = json.loads((args.model / "config.json").read_text())
    except OSError as e:
        parser.error(f"--model {args.model}: {e}; allowed: a folder with a config.json")
    if args.rounds < 6:
        parser.error(
            f"--rounds {args.rounds}: no interval of fewer than 6 rounds holds the median with 95 % confidence"
        )
    args.vocabulary = config["vocab_size"]
    needs = NEEDS.get(config["model_type"], {})
    args.engine = needs.get("engine", {}) | (args.engine or {})
    for name, value in (DEFAULTS | needs).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = parse()
    serve(args) if args.serve else measure(args)


if __name__ == "__main__":
    main()
