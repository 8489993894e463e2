# SPDX-License-Identifier: Apache-2.0
"""What callers of `vllm serve` wait: vLLM untouched and with this package, asked in turn by `vllm bench serve`.

    python benchmarks/serving.py --model tests/models/qwen3-8b-8layers --layers 36

Both servers are alive on one GPU, and one at a time is asked, so that what drifts (clocks, heat) drifts for both. Each
round asks for new random prompts, the same of both, and begins with the other server. Nothing is set but what the engines
of end_to_end.py have too: weights are vLLM's dummy ones, FlashInfer does not sample, DeepGEMM is not warmed up.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import timing
from comparisons import Times, paired, summaries
from configurations import process_environment

NAMES = ("untouched", "ours")
# What a caller waits: for the first token, and for each token after it.
CLOCKS = {"ttft_ms": "median_ttft_ms", "tpot_ms": "median_tpot_ms"}
UNLIMITED = 0
# Requests a round, by their rate a second: some seconds each. UNLIMITED: all at once.
REQUESTS = {1: 8, 8: 48, UNLIMITED: 128}
START_S = 900


def model_folder(model: pathlib.Path, layers: int | None, folder: pathlib.Path) -> pathlib.Path:
    """A copy of the model's config in `folder`, with so many layers, and a tokenizer of as many words as its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = json.loads((model / "config.json").read_text())
    if layers is not None:
        config["num_hidden_layers"] = layers
        if "layer_types" in config:
            config["layer_types"] = [config["layer_types"][i % len(config["layer_types"])] for i in range(layers)]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    special = {"<unk>": 0, "<eos>": 1}  # no part of another word: they are looked for first
    words = special | {f"w{i}": i for i in range(len(special), config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "<eos>"})
    )
    return folder


class Server:
    """`vllm serve` in a process of its own."""

    def __init__(self, name: str, model: pathlib.Path, port: int, folder: pathlib.Path, arguments: list[str]) -> None:
        self.name, self.port, self.log = name, port, folder / f"{name}.log"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), f"--port={port}"]
        command += ["--load-format=dummy", *arguments]
        self.process = subprocess.Popen(
            command, stdout=self.log.open("w"), stderr=subprocess.STDOUT, env=process_environment(name, folder / name)
        )

    def wait_until_it_answers(self) -> None:
        """Exits with the end of its log if it has died, or does not answer in time."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        sys.exit(f"{self.name}: no answer, last of its log ({self.log}):\n{self.log.read_text()[-3000:]}")

    def ask(self, model: pathlib.Path, rate: int, seed: int, input_tokens: int, output_tokens: int) -> dict[str, float]:
        """Milliseconds on each clock of CLOCKS, the median over the requests of one round.

        Raises:
            RuntimeError: a request failed.
        """
        from vllm.benchmarks import serve

        parser = argparse.ArgumentParser()
        serve.add_cli_args(parser)
        asked = parser.parse_args([
            f"--port={self.port}", f"--model={model}", "--dataset-name=random", f"--random-input-len={input_tokens}",
            f"--random-output-len={output_tokens}", f"--num-prompts={REQUESTS[rate]}", f"--seed={seed}",
            f"--request-rate={rate or math.inf}", "--temperature=0", "--disable-tqdm",
        ])  # fmt: skip
        result = serve.main(asked)
        if result["completed"] != REQUESTS[rate]:
            raise RuntimeError(f"{self.name}: {result['completed']} of {REQUESTS[rate]} requests were answered")
        return {clock: result[field] for clock, field in CLOCKS.items()}


def measure(args: argparse.Namespace) -> None:
    """Start both servers, ask them in turn, and write the result; ends the servers in any case."""
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        folder = pathlib.Path(name)
        model = model_folder(args.model, args.layers, folder / args.model.name)
        servers: list[Server] = []
        times: Times = {}
        try:
            for i, config in enumerate(NAMES):
                servers.append(Server(config, model, args.port + i, folder, args.server))
            for server in servers:
                server.wait_until_it_answers()
                print(server.name, "answers", flush=True)
            for turn in range(args.rounds + 1):
                for rate in args.rates:
                    for server in servers[:: 1 if turn % 2 else -1]:
                        found = server.ask(model, rate, turn, args.input_tokens, args.output_tokens)
                        for clock, ms in found.items():
                            if turn:  # the first is warm-up
                                times.setdefault(("serve", rate, clock), {}).setdefault(server.name, []).append(ms)
                write(args, times)  # what is there by now survives a run cut short
        finally:
            for server in servers:
                server.process.terminate()


def write(args: argparse.Namespace, times: Times) -> None:
    """Write medians and differences; `batch` of end_to_end.py's results is `rate` here. With fewer than six rounds there is
    no interval, and nothing is written."""
    if not times or len(next(iter(times.values()))["ours"]) < 6:
        return
    layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    rows, differences = (
        [{"rate" if key == "batch" else key: value for key, value in row.items()} for row in found]
        for found in (summaries(args.model.name, times), paired(times))
    )
    for line in (*rows, *differences):
        print(line, flush=True)
    timing.write(
        args.out,
        rows,
        differences=differences,
        layers=args.layers or layers,
        rounds=args.rounds,
        requests={str(rate): REQUESTS[rate] for rate in args.rates},
        input_tokens=args.input_tokens,
        output_tokens=args.output_tokens,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with a config.json")
    parser.add_argument("--layers", type=int, help="layers of the model that is served; default: those of its config")
    parser.add_argument(
        "--rates", type=int, nargs="*", default=list(REQUESTS), choices=list(REQUESTS), help="requests a second; 0: all"
    )
    parser.add_argument("--rounds", type=int, default=6, help="6 or more, for a confidence interval")
    parser.add_argument("--input-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--port", type=int, default=8765, help="of the first server; the second has the next")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("server", nargs="*", help="after --: further arguments of `vllm serve`, of both")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no config.json there; allowed: a folder with one")
    if args.rounds < 6:
        parser.error(f"--rounds {args.rounds}: allowed: 6 or more, fewer hold no median with 95 % confidence")
    args.out = args.out or timing.results_folder() / "serving" / f"{args.model.name}.json"
    measure(args)


if __name__ == "__main__":
    main()
