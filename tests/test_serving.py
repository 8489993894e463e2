# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/serving.py starts, asks in turn, and writes; the servers themselves need a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")
MODEL = Path(__file__).parent / "models" / "qwen3-8b-8layers"


def test_the_tokenizer_gives_random_tokens_back(tmp_path):
    from serving import model_folder
    from transformers import AutoTokenizer

    folder = model_folder(MODEL, 36, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [7, 151000, 2, 31, 31]
    assert tokenizer.encode(tokenizer.decode(tokens), add_special_tokens=False) == tokens
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 36


def test_servers_are_asked_in_turn(tmp_path, monkeypatch):
    import serving

    asked: list[tuple] = []

    class Server:
        def __init__(self, name, *arguments):
            self.name, self.process = name, self

        def wait_until_it_answers(self): ...

        def terminate(self):
            asked.append((self.name, "end"))

        def ask(self, model, rate, seed, *tokens):
            asked.append((self.name, rate, seed))
            return {"ttft_ms": 10.0 + (self.name == "untouched"), "tpot_ms": 1.0}

    monkeypatch.setattr(serving, "Server", Server)
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["serving.py", f"--model={MODEL}", "--rates", "8", f"--out={out}"])
    serving.main()
    turns = [asked[i : i + 2] for i in range(0, 14, 2)]
    assert all({name for name, *_ in turn} == {"untouched", "ours"} for turn in turns)
    assert len({turn[0][0] for turn in turns}) == 2, "each round begins with the other"
    assert len({seed for *_, seed in asked[:14]}) == 7, "new prompts each round: old ones are in the prefix cache"
    assert asked[14:] == [("untouched", "end"), ("ours", "end")]
    result = json.loads(out.read_text())
    assert (
        result["differences"][0].items() >= {"rate": 8, "clock": "ttft_ms", "median_ms": -1.0, "high_ms": -1.0}.items()
    )
    assert [row["config"] for row in result["rows"]] == ["untouched", "ours"]


def test_a_server_that_dies_is_shown(tmp_path, monkeypatch):
    import serving

    monkeypatch.setattr(serving.sys, "executable", "/bin/echo")
    server = serving.Server("ours", tmp_path, 1, tmp_path, ["--no-such-argument"])
    server.process.wait()
    with pytest.raises(SystemExit, match=r"(?s)ours: no answer.*--no-such-argument"):
        server.wait_until_it_answers()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=/no/such"], "--model /no/such: no config.json there"),
        ([f"--model={MODEL}", "--rounds=5"], "--rounds 5: allowed: 6 or more"),
        ([f"--model={MODEL}", "--rates", "3"], "invalid choice: 3"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    import serving

    monkeypatch.setattr(sys, "argv", ["serving.py", *arguments])
    with pytest.raises(SystemExit):
        serving.main()
    assert message in capsys.readouterr().err
