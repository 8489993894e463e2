# SPDX-License-Identifier: Apache-2.0
"""Make docs/models.md from docs/models/*.json, each of which `nox -s models` writes for one GPU.

python docs/models.py            # write the page
python docs/models.py --check    # exit status 1 if the page is another
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import generated

FOLDER = Path(__file__).parent / "models"
PAGE = Path(__file__).parent / "models.md"
GPUS = {"h100": "H100", "b200": "B200", "mi300x": "MI300X"}  # in this order, as far as there are files

HEAD = """\
# What fuses in which model

`docs/models.py` makes this page from [one file a GPU](models), which `vllm-fusion-plugin explain --matrix` writes:
vLLM {vllm} builds and compiles each model of [tests/models/served](../tests/models/served) for that GPU, which need not be
there, with nothing set: on NVIDIA's with FlashInfer usable, on AMD's with AITER off. A cell says how many of the quantisers
that activations go through in a forward pass fuse with what is before them. For those that do not, a letter says
[why](#why-the-others-do-not). Numbers are of all layers, on each of the GPUs that share the model.

"""

BELOW = """
Where a model's quantisers are plain torch code (one scale a token, or static scales), Inductor would make one kernel of
most of these pairs, too; on an MI300X [it does](rocm.md#flags-that-nobody-set). What experts do between their GEMMs is in
none of these numbers: there vLLM's Triton experts run this package's
[kernel](fusions.md#silumul--quantiser-of-experts).

## Why the others do not

"""


def load() -> list[dict[str, Any]]:
    """A column for each GPU that there is a file of."""
    return [json.loads((FOLDER / f"{gpu}.json").read_text()) for gpu in GPUS if (FOLDER / f"{gpu}.json").exists()]


def page(columns: list[dict[str, Any]]) -> str:
    rows = [["model", "GPUs", *(GPUS[column["gpu"]] for column in columns)], ["---", "---:", *["---:"] * len(columns)]]
    reasons: dict[str, str] = {}
    by_model = [{row["model"]: row for row in column["rows"]} for column in columns]
    for model, row in {name: row for rows in by_model for name, row in rows.items()}.items():
        rows.append([model, str(row["tensor_parallel_size"]), *(cell(named.get(model), reasons) for named in by_model)])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    why = "".join(f"- **{letter}** {reason}\n" for reason, letter in reasons.items())
    return HEAD.format(vllm=" and ".join({column["vllm"]: None for column in columns})) + table + BELOW + why


def cell(row: dict[str, Any] | None, reasons: dict[str, str]) -> str:
    """ "108 of 144; 36 a". Reasons that are new get the next letter."""
    if row is None:
        return ""

    def letter(reason: str) -> str:
        more, letter = divmod(len(reasons), 26)
        return reasons.setdefault(reason.replace("|", "\\|"), string.ascii_lowercase[letter] * (more + 1))

    if row["problem"]:
        return f"– {letter(row['problem'])}"
    total = row["fused"] + row["left"]
    left = "".join(f"; {number} {letter(reason)}" for reason, number in row["why"].items())
    return f"{row['fused']} of {total}{left}" if total else "no quantiser"


if __name__ == "__main__":
    generated.run(PAGE, lambda: page(load()), __file__)
