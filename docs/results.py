# SPDX-License-Identifier: Apache-2.0
"""Make docs/results.md: the text of docs/results.template.md, with tables made from benchmarks/results.

python docs/results.py            # write the page
python docs/results.py --check    # exit status 1 if the page is another

A line `{{ kernels h200/0.32.0/silu_mul_quant.json }}` of the template becomes a table; the functions below that are in
DIRECTIVES say which there are.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
TEMPLATE = HERE / "results.template.md"
PAGE = HERE / "results.md"

TOKENS = (1, 16, 128, 512, 2048, 8192)  # of the 15 numbers of tokens that were measured
IMPLEMENTATIONS = {
    "unfused": "vLLM's ops, unfused",
    "stock_fused": "vLLM's fused op",
    "inductor_norm": "compiled norm, vLLM's quantiser",
    "inductor": "torch.compile",
    "ours": "this package",
    "ours_cuda": "its kernel in CUDA",
}
COMPILED = ("inductor_norm", "inductor")
GEMM_TOKENS = (1, 8, 31, 32, 128, 2048)
CHANGE_TOKENS = (1, 4, 8, 16, 24, 31)
# Kinds of kernels of a decode step, by what their names have; the first that fits.
KINDS = {
    "GEMM": "deep_gemm::|cutlass_3x_gemm",
    "attention, KV cache": "flash::|flash_kernel",
    "vLLM's quantisers": "scale_1x128|per_token_group_quant",
    "Inductor's rotary embedding": "cat_index_select",
    "Inductor's norms and SiLU·mul": "triton_",
    "this package's": "^_(group_|token_|static_)?kernel",
    "others": "",
}
CONFIGURATIONS = {
    "untouched": "vLLM untouched",
    "stock": "vLLM, default flags",
    "stock_unfused": "vLLM, fusions off",
    "control": "fusions off, again",
    "ours": "this package",
    "ours_act": "this package, SiLU·mul only",
    "ours_fastest": 'this package, `block_gemm="fastest"`',
    "ours_experts": "this package, without experts' input",
}

Record = dict[str, Any]


def load(name: str) -> Record:
    return json.loads((RESULTS / name).read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[Any]], text_columns: int) -> str:
    """A Markdown table; all columns but the first `text_columns` hold numbers."""
    head = list(head)
    lines = [head, ["---"] * text_columns + ["---:"] * (len(head) - text_columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def source(name: str, record: Record, more: str = "") -> str:
    card = record["gpu"].removeprefix("NVIDIA ")
    return (
        f"[{name}](../benchmarks/results/{name}): {card}, vLLM {record['vllm']}, torch {record['torch']}, "
        f"commit `{record['commit']}`{more}."
    )


# ---- kernels ---------------------------------------------------------------------------------------------------------


def by_case(record: Record) -> dict[tuple[str, str], Record]:
    """(op, mode) -> the record with its rows alone, for results of several."""
    cases: dict[tuple[str, str], list[Record]] = {}
    for row in record["rows"]:
        cases.setdefault((row["op"], row["mode"]), []).append(row)
    return {case: record | {"rows": rows} for case, rows in cases.items()}


def by_shape(record: Record) -> dict[tuple[int, int], dict[str, float]]:
    """(tokens, width) -> implementation, and the floor, -> µs."""
    shapes: dict[tuple[int, int], dict[str, float]] = {}
    for row in record["rows"]:
        shapes.setdefault((row["M"], row["H"]), {"floor": row["floor_us"]})[row["impl"]] = row["us"]
    return shapes


def earlier_of(name: str, record: Record) -> dict[tuple[int, int], dict[str, float]]:
    """The same shapes of the same op in an earlier run; none: there is no such run."""
    path = Path(name)
    earlier = path.parent / "earlier" / (path.name.split(".")[0] + ".json")
    if not (RESULTS / earlier).exists():
        return {}
    ops = {row["op"] for row in record["rows"]}
    found = load(str(earlier))
    return by_shape(found | {"rows": [row for row in found["rows"] if row["op"] in ops]})


def microseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def kernels(name: str) -> str:
    """A table for each op and mode."""
    record = load(name)
    copy = max(speed for copied, speed in record["copy_tb_per_s"].items() if not copied.startswith("no copy"))
    cases = by_case(record)
    words = "" if len(cases) > 1 else f", mode `{next(iter(cases))[1]}`"
    tables = [source(name, record, f"{words}, best copy {copy:.2f} TB/s") + " µs a launch."]
    for (op, mode), rows in cases.items():
        tables += [*([f"`{op}`, mode `{mode}`:"] if len(cases) > 1 else []), times_of_kernels(name, rows)]
    return "\n\n".join(tables)


def times_of_kernels(name: str, record: Record) -> str:
    shapes, earlier = by_shape(record), earlier_of(name, record)
    every = {tokens for tokens, _ in shapes}
    shown = TOKENS if len(every) > 8 else every
    measured = {impl for times in shapes.values() for impl in times}
    columns = {impl: label for impl, label in IMPLEMENTATIONS.items() if impl in measured}
    head = ["tokens", "heads" if "v_up" in name else "width", *columns.values(), "floor"]
    if earlier:
        head.append("torch.compile, an earlier run")
    rows = []
    for (tokens, width), times in sorted(shapes.items(), key=lambda item: (item[0][1], item[0][0])):
        if tokens in shown:
            cells = [microseconds(times.get(impl)) for impl in (*columns, "floor")]
            if earlier:
                cells.append(microseconds(earlier.get((tokens, width), {}).get("inductor")))
            rows.append([tokens, width, *cells])
    return table(head, rows, 0)


def slower(*names: str) -> str:
    """How many shapes there are, and where another implementation is faster."""
    count, than_vllm, than_compiled = 0, [], []
    for path, cases in ((name, by_case(load(name))) for name in names):
        for (op, mode), record in cases.items():
            earlier = earlier_of(path, record)
            several = len(cases) > 1
            for shape, times in by_shape(record).items():
                count += 1
                ours, at = times["ours"], f"`{op}`{f' ({mode})' if several else ''} of {shape[0]} × {shape[1]}"
                if min(us for impl, us in times.items() if impl in ("unfused", "stock_fused")) < ours:
                    than_vllm.append(at)
                compiled = [run[impl] for run in (times, earlier.get(shape, {})) for impl in COMPILED if impl in run]
                if compiled and min(compiled) < ours:
                    by = ours - min(compiled)
                    than_compiled.append(f"{at} ({f'by {by:.1f} µs' if by >= 0.05 else 'by less than 0.05 µs'})")
    return (
        f"Over all {count} shapes, this package is slower than vLLM's ops, fused or not, at: "
        f"{', '.join(than_vllm) or 'none'}. It is slower than the faster of torch.compile's runs at: "
        f"{', '.join(than_compiled) or 'none'}."
    )


def gemms(name: str) -> str:
    """The block GEMM with the quantiser before it, and alone."""
    record = load(name)
    shapes: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in record["rows"]:
        impl = "alone" if row["mode"] == "gemm" else row["impl"]
        shapes.setdefault((row["N"], row["H"], row["M"]), {})[impl] = row
    rows = []
    for (columns, width, tokens), found in shapes.items():
        if tokens in GEMM_TOKENS:
            cells = [microseconds(found[impl]["us"]) for impl in ("unfused", "ours", "alone")]
            rows.append([f"{columns} × {width}", tokens, *cells, microseconds(found["ours"]["floor_us"])])
    head = ["N × K", "tokens", "vLLM's op", "this package: quantiser, GEMM", "GEMM alone", "floor"]
    differ = sum(row.get("elements_differ", 0) for row in record["rows"])
    elements = sum(row.get("elements", 0) for row in record["rows"])
    text = f"{source(name, record)} µs. Of {elements:.1e} results of the two, {differ} differ in any bit."
    return f"{text}\n\n{table(head, rows, 1)}"


def changes(name: str) -> str:
    """The two kernels of the block GEMM for few rows, and from how many on the second is the faster."""
    record = load(name)
    table_of_gpu = block_gemm_table()[record["gpu"].split()[1].lower()]
    times: dict[tuple[int, int], dict[tuple[str, int], float]] = {}
    for row in record["rows"]:
        us = times.setdefault((row["N"], row["H"]), {})
        us[row["impl"].removeprefix("peer:"), row["M"]] = row["us"]
    rows = []
    for shape, us in times.items():
        cells = [f"{us['flashinfer', m]:.1f} / {us['deepgemm', m]:.1f}" for m in CHANGE_TOKENS]
        rows.append([f"{shape[0]} × {shape[1]}", *cells, table_of_gpu[shape]])
    head = ["N × K", *(f"{m} tokens" for m in CHANGE_TOKENS), "DeepGEMM from"]
    return f"{source(name, record)} µs, FlashInfer / DeepGEMM.\n\n{table(head, rows, 1)}"


def block_gemm_table() -> dict[str, dict[tuple[int, int], int]]:
    """The package's table, read as what it is: a module that needs nothing."""
    return runpy.run_path(str(HERE.parent / "vllm_fusion_plugin" / "kernels" / "block_gemm_table.py"))["DEEPGEMM_FROM"]


def launches(name: str) -> str:
    """What a call costs on the host."""
    record = load(name)
    calls: dict[tuple[str, int], dict[str, float]] = {}
    for row in record["rows"]:
        calls.setdefault((row["op"], row["M"]), {})[row["impl"]] = row["host_us"]
    impls = {"unfused": "vLLM's ops", "ours_triton": "this package, Triton", "ours_cuda": "this package, CUDA"}
    rows = [[f"`{op}`", m, *(f"{found[impl]:.1f}" for impl in impls)] for (op, m), found in calls.items()]
    head = ["op", "tokens", *impls.values()]
    return f"{source(name, record)} µs of the host. Command: `{record['command']}`.\n\n{table(head, rows, 1)}"


# ---- exactness -------------------------------------------------------------------------------------------------------


def exactness(name: str) -> str:
    record = load(name)
    cases: dict[tuple[str, ...], list[Record]] = {}
    for row in record["rows"]:
        before = row.get("rounding", row.get("form"))
        quantiser = row.get("quant_rounding", row.get("quant_form"))
        key = (row["op"].removesuffix("_fp8_quant"), row["mode"] or "–", before or "–", quantiser)
        cases.setdefault(key, []).append(row)
    others = dict.fromkeys(
        key for row in record["rows"] for key in row if key.endswith("_differ") and not key.startswith(("code", "scal"))
    )
    head = ["op", "mode", "rounding before", "`quant_rounding`", "elements", "codes differ", "farthest, in codes"]
    head += ["scales differ", *(f"{other.removesuffix('_differ')} differs" for other in others)]
    rows = []
    for key, found in cases.items():
        cells = [f"{sum(row['elements'] for row in found):.2e}", summed(found, "codes_differ")]
        cells += [str(max(row["largest_code_steps"] for row in found)), summed(found, "scales_differ")]
        rows.append(
            [*(f"`{part}`" if part != "–" else part for part in key), *cells, *(summed(found, o) for o in others)]
        )
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in record["rows"]))
    return f"{source(name, record, f', {dtypes}')}\n\n{table(head, rows, 4)}"


def summed(rows: list[Record], field: str) -> str:
    """– : the op has no such output."""
    return f"{sum(row.get(field, 0) for row in rows):,}" if any(field in row for row in rows) else "–"


# ---- end to end ------------------------------------------------------------------------------------------------------


def times(name: str) -> str:
    """Milliseconds of every configuration; differences are of this package to vLLM untouched, with default flags, or with
    fusions off: to the first of these that was run."""
    record = load(name)
    rows = [*record["rows"], *record["more_rows"]]
    configs = [config for config in CONFIGURATIONS if any(row["config"] == config for row in rows)]
    reference = next(config for config in ("untouched", "stock", "stock_unfused") if config in configs)
    differences = {
        (d["phase"], d["batch"], d["clock"]): d for d in record["differences"] if d["pair"] == f"ours - {reference}"
    }
    head = ["phase", "requests", "clock", *(CONFIGURATIONS[c] for c in configs)]
    head += [f"to “{CONFIGURATIONS[reference]}”, %", "95 % interval, ms"]
    lines = []
    for phase, batch in dict.fromkeys((row["phase"], row["batch"]) for row in rows):
        at = {row["config"]: row for row in rows if (row["phase"], row["batch"]) == (phase, batch)}
        for clock, label in (("gpu_ms", "GPU"), ("ms", "caller")):
            if clock in at["ours"]:
                d = differences[phase, batch, clock]
                cells = [f"{at[c][clock]:.3f}" for c in configs]
                interval = f"{d['low_ms']:+.3f} to {d['high_ms']:+.3f}"
                lines.append([phase, batch, label, *cells, f"{d['percent']:+.1f}", interval])
    more = f"; {record['prefill_tokens']} tokens of prefill, {record['rounds']} rounds"
    return f"{source(name, record, more)} {engines(record)}\n\n{table(head, lines, 1)}"


def step(name: str) -> str:
    """What a decode step's time on the GPU is spent on."""
    record = load(name)
    lines = []
    for batch in next(iter(record["kernels"].values())):
        for config, batches in record["kernels"].items():
            kinds: dict[str, list[float]] = {kind: [0.0, 0] for kind in KINDS}
            for kernel in batches[batch]:
                kind = next(kind for kind, part in KINDS.items() if re.search(part, kernel["name"]))
                kinds[kind][0] += kernel["us"]
                kinds[kind][1] += round(kernel["launches"])
            cells = [f"{us:.1f} ({launches})" if launches else "–" for us, launches in kinds.values()]
            lines.append([batch, CONFIGURATIONS[config], *cells])
    head = ["requests", "engine", *KINDS]
    return f"{source(name, record)} µs a step (launches). Command: `{record['command']}`.\n\n{table(head, lines, 2)}"


def engines(record: Record) -> str:
    """Which GEMMs and attention ran, and what selected them."""
    kernels = {json.dumps(found): found for found in record["linear_kernels"].values()}
    text = "GEMMs: " + " or ".join(", ".join(f"{n} `{k}`" for k, n in found.items()) for found in kernels.values())
    environment = " ".join(f"{key}={value}" for key, value in record["linear_environment"].items())
    text += f", selected by `{environment}`." if environment else ", vLLM's own choice."
    backends = {k for found in record.get("attention_backends", {}).values() for k in found}
    if backends:
        text += f" Attention: {', '.join(f'`{backend}`' for backend in sorted(backends))}."
    return f"{text} Command: `{record['command']}`."


def tokens(*names: str) -> str:
    """Whether tokens and logprobs of two engines are equal; each engine asked twice, too."""
    rows = []
    for name in names:
        record = load(name)
        gemm = ", ".join(kernel for kernel in record["linear_kernels"]["ours"] if kernel != "FusedMoEKernel")
        for pair, found in record["agreement"].items():
            if pair.endswith(" twice"):
                continue
            a, b = (CONFIGURATIONS[config] for config in pair.split(" and "))
            equal = "all, to the last bit" if found["equal_logprobs"] else "not all"
            short = name.split("end_to_end/")[1].removesuffix(".json")
            on = [record["gpu"].split()[1], record["vllm"], f"`{record['commit']}`", gemm]
            count = f"{found['equal_tokens']} of {found['tokens']}"
            rows.append([f"[{short}](../benchmarks/results/{name})", *on, f"{a} / {b}", equal, count])
        twice = [f for pair, f in record["agreement"].items() if pair.endswith(" twice")]
        if not all(f["equal_tokens"] == f["tokens"] for f in twice):
            rows[-1][-1] += " (an engine asked twice differs)"
    return table(["result", "card", "vLLM", "commit", "GEMM", "engines", "equal logprobs", "equal tokens"], rows, 7)


# ---- the page --------------------------------------------------------------------------------------------------------

DIRECTIVES: dict[str, Callable[..., str]] = {
    "kernels": kernels,
    "slower": slower,
    "changes": changes,
    "launches": launches,
    "gemms": gemms,
    "exactness": exactness,
    "step": step,
    "times": times,
    "tokens": tokens,
}


def directives(template: str) -> Iterator[tuple[str, list[str]]]:
    """(directive, its result files), in the template's order."""
    for line in re.findall(r"^\{\{ (.+) \}\}$", template, re.MULTILINE):
        name, *arguments = line.split()
        yield name, [path for argument in arguments for path in expand(argument)]


def expand(pattern: str) -> list[str]:
    """Results that a pattern names, relative to benchmarks/results.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(path.relative_to(RESULTS).as_posix() for path in RESULTS.glob(pattern))
    found = [name for name in found if name == pattern or not name.endswith((".report.json", ".kernels.json"))]
    if not found:
        raise FileNotFoundError(f"docs/results.template.md names {pattern}, and benchmarks/results has no such file")
    return found


def page(template: str) -> str:
    made = iter([DIRECTIVES[name](*arguments) for name, arguments in directives(template)])
    return re.sub(r"^\{\{ .+ \}\}$", lambda _: next(made), template, flags=re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    check = parser.parse_args().check
    text = page(TEMPLATE.read_text())
    if not check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit(f"{PAGE} is not what its template and the results give: run python docs/results.py")


if __name__ == "__main__":
    main()
