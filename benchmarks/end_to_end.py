# SPDX-License-Identifier: Apache-2.0
"""A served model with the plugin and without: times, tokens, and what fused.

    python benchmarks/end_to_end.py --model tests/models/qwen3-8b-8layers

One engine a configuration, all alive at once on one GPU, asked in turn: what drifts (clocks, heat)
drifts for all. Configurations:

    stock           vLLM's defaults
    stock_unfused   vLLM with fuse_norm_quant and fuse_act_quant off
    ours            the plugin, vLLM's default flags
    ours_act        the plugin, fuse_norm_quant off: what must produce stock_unfused's tokens and logprobs
    control         stock_unfused once more: what of a difference is the engine's own
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

HERE = pathlib.Path(__file__).parent
OFF = {"fuse_norm_quant": False, "fuse_act_quant": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "stock": {"plugin": False, "pass_config": {}},
    "stock_unfused": {"plugin": False, "pass_config": OFF},
    "ours": {"plugin": True, "pass_config": {}},
    "ours_act": {"plugin": True, "pass_config": {"fuse_norm_quant": False}},
    "control": {"plugin": False, "pass_config": OFF},
}
CONFIGS_IN_ROWS = ("stock", "stock_unfused", "ours")
# Block GEMMs by the environment that selects them.
LINEAR = {
    "cutlass": {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0", "VLLM_USE_DEEP_GEMM": "0"},
    "deepgemm": {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0", "VLLM_USE_DEEP_GEMM": "1"},
    "default": {},
}


def serve(args: argparse.Namespace) -> None:
    """Child process: one engine; a JSON command a line on stdin, a JSON answer a line on what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints goes to the log
    from vllm import LLM, SamplingParams

    config = CONFIGS[args.serve]
    llm = LLM(
        model=str(args.model),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=args.prefill + 16,
        max_num_seqs=128,
        max_num_batched_tokens=args.prefill,
        # Given, not measured: engines that start together would take each other's memory for their own.
        kv_cache_memory_bytes=int(args.kv_gib * 2**30),
        enable_prefix_caching=False,
        worker_extension_cls="random_weights.RandomWeights",
        compilation_config={"cudagraph_capture_sizes": args.capture, "pass_config": config["pass_config"]},
        **json.loads(args.engine),
    )
    filled = llm.collective_rpc("fill_random_weights")

    def generate(batch: int, prompt: int, tokens: int, logprobs: int | None = None) -> tuple[float, Any]:
        prompts = [
            {"prompt_token_ids": [(7919 * (i + 1) + 31 * j) % 100000 for j in range(prompt)]} for i in range(batch)
        ]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs)
        start = time.perf_counter()
        out = llm.generate(prompts, params, use_tqdm=False)
        return (time.perf_counter() - start) * 1e3, out

    def answer(data: Any) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    answer({"ready": True, "filled": filled[0]})
    for line in sys.stdin:
        ask = json.loads(line)
        if ask["do"] == "prefill":
            # The GPU has just run another process: the first request pays for the change of context.
            generate(1, args.prefill, 1)
            answer([generate(1, args.prefill, 1)[0] for _ in range(3)])
        elif ask["do"] == "decode":
            steps = ask["steps"]
            short = generate(ask["batch"], 16, 2)[0]
            answer([(generate(ask["batch"], 16, 2 + steps)[0] - short) / steps])
        elif ask["do"] == "tokens":
            # One request at a time: of several, which are batched in which step is up to chance, and a GEMM's or attention's
            # last bits depend on it.
            out = [generate(1, length, 32, 5)[1][0] for length in (5, 100, 500, 2000)] + generate(
                1, args.prefill, 4, 5
            )[1]
            answer([
                [o.outputs[0].token_ids, [{str(t): p.logprob for t, p in d.items()} for d in o.outputs[0].logprobs]]
                for o in out
            ])  # fmt: skip
        elif ask["do"] == "report":
            report = llm.collective_rpc("get_fusion_report") if config["plugin"] else None
            table = llm.collective_rpc("get_compilation_match_table")
            answer({"table": table, "report": report, "linear": llm.collective_rpc("linear_kernels")[0]})
        else:
            break


class Engine:
    def __init__(self, name: str, args: argparse.Namespace, folder: str) -> None:
        self.name = name
        self.log = pathlib.Path(folder) / f"{name}.log"
        env = os.environ | LINEAR[args.linear] | {
            "VLLM_FUSION_PLUGIN": "1" if CONFIGS[name]["plugin"] else "0",
            "VLLM_CACHE_ROOT": str(pathlib.Path(folder) / name),
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

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: engine died, last of its log:\n" + "".join(self.log.read_text()[-3000:]))
        return json.loads(line)

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()


def measure(args: argparse.Namespace) -> None:
    import timing

    folder = tempfile.mkdtemp(prefix="end_to_end-")
    start = time.time()
    engines = {name: Engine(name, args, folder) for name in args.configs}
    for name, engine in engines.items():
        print(name, engine.answer(), f"{time.time() - start:.0f} s", flush=True)
    reports = {name: engine.ask(do="report") for name, engine in engines.items()}
    for name, report in reports.items():
        print(name, report["table"], report["linear"])
    tokens = {name: engine.ask(do="tokens") for name, engine in engines.items()}
    agreement = compare(tokens)
    print(json.dumps(agreement, indent=1))

    cases = [("prefill", 1)] + [("decode", b) for b in args.batches]
    times: dict[tuple[str, int, str], list[float]] = {}
    for turn in range(args.rounds + 1):
        for phase, batch in cases:
            for name, engine in engines.items():
                ms = engine.ask(do=phase, batch=batch, steps=args.steps)
                if turn:  # the first is warm-up
                    times.setdefault((phase, batch, name), []).extend(ms)
    rows = []
    for (phase, batch, name), ms in times.items():
        rows.append(
            {
                "model": args.model.name,
                "phase": phase,
                "batch": batch,
                "config": name,
                "ms": round(statistics.median(ms), 4),
            }
        )
        print(rows[-1], f"min {min(ms):.3f} max {max(ms):.3f}")
    out = args.out or timing.RESULTS / f"end_to_end.{args.model.name}.{args.linear}.json"
    timing.write(
        out,
        [row for row in rows if row["config"] in CONFIGS_IN_ROWS],
        more_rows=[row for row in rows if row["config"] not in CONFIGS_IN_ROWS],
        linear_kernels=reports[args.configs[0]]["linear"],
        linear_environment=LINEAR[args.linear],
        prefill_tokens=args.prefill,
        rounds=args.rounds,
        match_tables={name: report["table"][0] for name, report in reports.items()},
        agreement=agreement,
    )
    for name in ("ours", "ours_act"):
        if name in reports:
            (out.parent / f"{out.stem}.{name}.report.json").write_text(
                json.dumps(reports[name]["report"], indent=1) + "\n"
            )
            from vllm_fusion_plugin.report import FusionReport

            for row in FusionReport.from_ranks(reports[name]["report"]).rows():
                print(name, *row)
            for row in FusionReport.from_ranks(reports[name]["report"]).missed_rows():
                print(name, "missed", *row)
    for engine in engines.values():
        engine.process.kill()


def compare(tokens: dict[str, Any]) -> dict[str, Any]:
    """For each pair with the first of it fused otherwise: do tokens agree, do logprobs to the last bit?"""
    result = {}
    for a, b in (
        ("ours_act", "stock_unfused"),
        ("control", "stock_unfused"),
        ("ours", "stock"),
        ("stock", "stock_unfused"),
    ):
        if a in tokens and b in tokens:
            total = sum(len(t) for t, _ in tokens[a])
            pairs = [
                (x, y) for (t, _), (u, _) in zip(tokens[a], tokens[b], strict=True) for x, y in zip(t, u, strict=True)
            ]
            same = sum(x == y for x, y in pairs)
            logprobs = [p for _, p in tokens[a]] == [p for _, p in tokens[b]]
            result[f"{a} and {b}"] = {"tokens": total, "equal_tokens": same, "equal_logprobs": logprobs}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with a config.json")
    parser.add_argument("--configs", nargs="*", default=list(CONFIGS)[:4], choices=list(CONFIGS))
    parser.add_argument("--linear", default="cutlass", choices=list(LINEAR), help="block GEMM to select")
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the prefill")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32, 128], help="requests decoded together")
    parser.add_argument("--capture", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kv-gib", type=float, default=6, help="KV cache of each engine")
    parser.add_argument("--engine", default="{}", help="further engine arguments, JSON")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    serve(args) if args.serve else measure(args)


if __name__ == "__main__":
    main()
