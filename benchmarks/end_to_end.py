# SPDX-License-Identifier: Apache-2.0
"""A served model with the plugin and without: times, tokens, and what fused.

    python benchmarks/end_to_end.py --model tests/models/qwen3-8b-8layers

One engine a configuration, all alive at once on one GPU, asked in turn: what drifts (clocks, heat)
drifts for all. Configurations:

    untouched       vLLM: no plugin, no GEMM selected, no flag of a pass, whatever other options say
    stock           vLLM's default flags with the GEMM that --linear selects
    stock_unfused   that with fuse_norm_quant and fuse_act_quant off
    ours            the plugin, all its fusions: norm, SiLU·mul, quantisers by themselves
    ours_act        the plugin, SiLU·mul + quantiser only
    ours_fastest    the plugin with the setting block_gemm="fastest"
    ours_experts    the plugin, experts' input not quantised by the norm before it
    control         stock_unfused once more: what of a difference is the engine's own

`untouched` and `ours` run by default. Every engine, also `untouched`, runs in one process, samples
without FlashInfer, and skips DeepGEMM's warm-up. The last two shorten a start, and change no step
that is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import timing
from comparisons import Times, compare, paired, summaries
from configurations import (
    BLOCK_GEMMS,
    CONFIGS,
    CONFIGS_IN_ROWS,
    DEFAULT_CONFIGS,
    DEFAULTS,
    LINEAR,
    NEEDS,
    engine_arguments,
    environment,
    process_environment,
)
from engine_process import Settings

HERE = pathlib.Path(__file__).parent


class Engine:
    """An engine, which runs engine_process.py in a process of its own."""

    def __init__(self, name: str, args: argparse.Namespace, folder: str) -> None:
        self.name = name
        # Triton's own autotuner, of the GDN kernels for example, keeps its choices there.
        shared = {"TRITON_CACHE_DIR": str(pathlib.Path(folder) / "triton")} if args.deterministic else {}
        self.log = pathlib.Path(folder) / f"{name}.log"
        env = process_environment(name, pathlib.Path(folder) / name) | environment(name, args.linear) | shared | {
            # The engine in the process that is asked: nothing between a step and the clock.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        settings: Settings = {
            "llm": engine_arguments(name, args),
            "plugin": CONFIGS[name]["plugin"],
            "vocabulary": args.vocabulary,
            "prefill": args.prefill,
            "steps": args.steps,
        }
        command = [sys.executable, str(HERE / "engine_process.py"), json.dumps(settings)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True, env=env
        )

    def ready(self, start: float) -> None:
        """Wait until it can be asked, and print how long that took from `start`."""
        print(self.name, self.answer(), f"{time.time() - start:.0f} s", flush=True)

    def answer(self) -> Any:
        """Wait for its next answer; exits with the end of its log if it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: engine died, last of its log ({self.log}):\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def send(self, do: str, **arguments: Any) -> None:
        """Send it a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send it a command and wait for the answer."""
        self.send(do, **arguments)
        return self.answer()


def default_out(args: argparse.Namespace) -> pathlib.Path:
    """Where the result goes if nobody names a file. Runs that take timing out of what is compiled have a folder of their
    own: their times are not comparable."""
    marks = ["attention"] if args.attention else []
    if args.tensor_parallel_size > 1:
        marks.append(f"tp{args.tensor_parallel_size}")
    folder = timing.results_folder() / "end_to_end"
    if args.deterministic:
        folder /= "deterministic"
    return folder / ".".join([args.model.name, args.linear, *marks, "json"])


def measure(args: argparse.Namespace) -> None:
    """Start all engines, ask them, and write the result and the fusion reports; ends the engines in any case."""
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
        found = {} if args.times_only else compare(ask_together(engines, "tokens"), ask_together(engines, "tokens"))
        print(json.dumps(found, indent=1), flush=True)
        write(out, args, reports, found, {})  # what is known by now survives a run cut short
        if args.tokens_only:
            return
        times = take_turns(engines, args)
        kernels = {name: list_kernels(engine, args.batches) for name, engine in engines.items()} if args.kernels else {}
    finally:
        for engine in engines.values():
            engine.process.kill()
    write(out, args, reports, found, times)
    if kernels:
        timing.write(out.with_name(f"{out.stem}.kernels.json"), [], kernels=kernels)


def list_kernels(engine: Engine, batches: list[int]) -> dict[str, Any]:
    """Kernels of a decode step of each batch and of the prefill, by CUPTI's clock."""
    found = {str(batch): engine.ask("kernels", batch=batch) for batch in batches}
    return found | {"prefill": engine.ask("prefill_kernels")}


def ask_together(engines: dict[str, Engine], do: str) -> dict[str, Any]:
    """Ask all engines at once for what is not timed: each compiles the GEMMs that it meets first."""
    for engine in engines.values():
        engine.send(do)
    return {name: engine.answer() for name, engine in engines.items()}


def write(
    out: pathlib.Path, args: argparse.Namespace, reports: dict[str, Any], found: dict[str, Any], times: Times
) -> None:
    """Print and write what the times say, with the reports and what tokens agree (`found`)."""
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
        linear=block_gemms(reports),
        linear_environment=LINEAR[args.linear],
        match_tables={name: report["match_table"] for name, report in reports.items()},
        prefill_tokens=args.prefill,
        rounds=args.rounds,
    )


def block_gemms(reports: dict[str, Any]) -> dict[str, str]:
    """What ran for each class of kernels that the engines selected, in words."""
    selected = dict.fromkeys(kernel for report in reports.values() for kernel in report["linear_kernels"])
    return {kernel: BLOCK_GEMMS[kernel] for kernel in selected if kernel in BLOCK_GEMMS}


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


def write_report(path: pathlib.Path, name: str, ranks: list[dict[str, Any]]) -> None:
    """Write and print the fusion report of one engine; ranks: what its workers report."""
    from vllm_fusion_plugin.report import FusionReport

    path.write_text(json.dumps(ranks, indent=1) + "\n")
    report = FusionReport.from_ranks(ranks)
    for row in report.rows():
        print(name, *row)
    for row in report.missed_rows():
        print(name, "missed", *row)


def parse() -> argparse.Namespace:
    """The command line, with what the model needs where it says nothing, and the model's `vocabulary`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with a config.json")
    parser.add_argument(
        "--configs",
        nargs="*",
        choices=list(CONFIGS),
        help="default: untouched and ours; of another --linear, all others that fit",
    )
    parser.add_argument("--linear", default="default", choices=list(LINEAR), help="block GEMM to select")
    parser.add_argument(
        "--attention",
        action="store_true",
        help="partition graphs in Inductor, but of untouched; stock and ours fuse attention + quantiser too",
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
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tokens-only", action="store_true", help="compare tokens, measure no times")
    what.add_argument("--times-only", action="store_true", help="measure times, compare no tokens")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="list the kernels of decode steps and of the prefill too, with CUPTI's times",
    )
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the prefill")
    parser.add_argument("--batches", nargs="*", type=int, help="requests decoded together")
    parser.add_argument("--capture", nargs="*", type=int, help="batch sizes that get a CUDA graph")
    parser.add_argument("--steps", type=int, default=64, help="decode steps a turn")
    parser.add_argument("--rounds", type=int, default=12, help="6 or more, for a confidence interval")
    parser.add_argument("--kv-gib", type=float, default=6, help="KV cache of each engine")
    parser.add_argument("--engine", type=json.loads, help="further engine arguments, or others instead, JSON")
    parser.add_argument(
        "--pass-config", type=json.loads, default={}, help="further flags of passes, of all but untouched, JSON"
    )
    parser.add_argument("--out", type=pathlib.Path)
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
    if args.linear == "default":
        needs = needs | {"configs": DEFAULT_CONFIGS}
    args.engine = needs.get("engine", {}) | (args.engine or {})
    for name, value in (DEFAULTS | needs).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    measure(parse())
