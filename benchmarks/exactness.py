# SPDX-License-Identifier: Apache-2.0
"""How exact the fused ops are: their bytes against those of what they replace, over many random inputs, on the GPU at hand.

    python benchmarks/exactness.py                       # 2**30 elements a case, to results/<gpu>/<vllm>/exactness/all.json
    python benchmarks/exactness.py --ops silu_mul_group_fp8_quant --elements 1e8

What is replaced is vLLM's own code: its CUDA ops, or its native layers run by torch or compiled by Inductor, and then its
quantiser. Each op has it in a `Producer` beside its benchmark. For MLA's up-projection it is the benchmark's `unfused`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import grid
import timing
import torch
from bench_gated_rms_norm_quant import GatedRMSNorm
from bench_group_quant import Nothing
from bench_mla_dual_rms_norm_quant import MLADualRMSNorm
from bench_mla_v_up_quant import EXACTNESS_MODES, EXACTNESS_TOKENS, HEADS, MLAVUp, V
from bench_rms_norm_quant import RMSNorm
from bench_sigmoid_mul_quant import SigmoidGate
from bench_silu_mul_quant import SiluMul
from producer import Producer, Tensors, named
from quantisers import STATIC_SCALE, Group, Static, Token

ROWS = 8192
QUANTISERS = {"group": Group, "token": Token, "static": Static}
LAYOUTS = {"group": ("column", "tma,ue8m0", "packed,ue8m0", "group64"), "token": ("",), "static": ("",)}
PRODUCERS = (
    SiluMul(),
    SigmoidGate(),
    RMSNorm(add=True),
    RMSNorm(add=True, addend=True),
    RMSNorm(add=True, gemma=True),
    RMSNorm(add=False),
    RMSNorm(add=False, gemma=True),
    GatedRMSNorm(),
    MLADualRMSNorm(),
    Nothing(),
)

Outputs = dict[str, torch.Tensor]


class Case(NamedTuple):
    """One of our ops in one of its modes."""

    producer: Producer
    kind: str
    """Of quantiser: a key of QUANTISERS."""
    mode: str
    form: str
    """Of what comes before the quantiser: `native` (compiled by Inductor), `eager` or `custom_op`."""
    quant_rounding: str
    """The quantiser's form: `native` or `custom_op`."""

    @property
    def op(self) -> str:
        return self.producer.op(self.kind)

    @property
    def quant(self) -> Any:
        return QUANTISERS[self.kind].of(self.mode)

    @property
    def rounding(self) -> str:
        """What the installed vLLM's quantiser of that form does."""
        return self.quant.rounding(self.quant_rounding) if self.kind == "group" else self.quant_rounding

    def ours(self, inputs: Tensors) -> Outputs:
        """What our op returns."""
        quant, arguments = self.quant, {"quant_rounding": self.rounding}
        if isinstance(quant, Group):
            arguments["scales"] = quant.scales
        elif isinstance(quant, Static):
            arguments["scale"] = static_scale()
        return self.producer.ours(self.kind, inputs, self.form, **arguments)

    def replaced(self, inputs: Tensors) -> Outputs:
        """What vLLM's own code returns."""
        if self.quant_rounding == "native":  # one graph, in which nothing is rounded before the quantiser
            outputs, more = whole_graph(self.producer, self.quant)(*inputs)
            return named(outputs) | {name: t for name, t in more.items() if name != "normed"}
        y, more = before_quantiser(self.producer, self.form)(*inputs)
        codes, scales = self.quant.outputs(y, *y.shape)
        self.quant.custom_op(y, codes, scales)
        return named((codes,) if isinstance(self.quant, Static) else (codes, scales)) | more


def cases() -> Iterator[Case]:
    """All but MLA's up-projection, for which see `compare_mla_v_up`."""
    for producer in PRODUCERS:
        for form, quant_rounding in producer.forms:
            for kind in producer.kinds:
                for mode in LAYOUTS[kind]:
                    if quant_rounding == "native" and "packed" in mode:
                        continue  # an op's alone
                    # vLLM's native layer knows no TMA alignment
                    yield Case(
                        producer,
                        kind,
                        mode.replace("tma", "column") if quant_rounding == "native" else mode,
                        form,
                        quant_rounding,
                    )


@functools.cache
def before_quantiser(producer: Producer, form: str) -> Callable[..., Any]:
    """What computes the quantiser's input: a function of the producer's inputs."""
    if form == "custom_op":
        return producer.custom_op
    return grid.compiled(producer.native) if form == "native" else producer.native


@functools.cache
def whole_graph(producer: Producer, quant: Any) -> Callable[..., Any]:
    """vLLM's native layers before the quantiser and of it, compiled together."""
    layer = native_layer(quant)

    def run(*inputs: torch.Tensor) -> Any:
        y, more = producer.native(*inputs)
        return layer(y), {name: t for name, t in more.items() if name != "normed"}

    return grid.compiled(run)


def native_layer(quant: Any) -> Callable[[torch.Tensor], Any]:
    """vLLM's QuantFP8.forward_native."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    with set_current_vllm_config(VllmConfig(), check_compile=False):
        if isinstance(quant, Static):
            layer, scale = QuantFP8(True, GroupShape.PER_TENSOR, compile_native=False), static_scale()
            return lambda y: layer.forward_native(y, scale)[0]
        if isinstance(quant, Token):
            return QuantFP8(False, GroupShape.PER_TOKEN, compile_native=False).forward_native
        layout = {"column_major_scales": quant.column_major, "use_ue8m0": quant.ue8m0}
        return QuantFP8(False, GroupShape(1, quant.group_size), compile_native=False, **layout).forward_native


@functools.cache
def static_scale() -> torch.Tensor:
    return torch.tensor([STATIC_SCALE], device="cuda")


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def code_steps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance of two tensors of FP8 codes, counted in codes; -0 and +0 are one."""

    def rank(t: torch.Tensor) -> torch.Tensor:
        code = bits(t).to(torch.int16)
        return torch.where(code >= 0x80, 0x80 - code, code)

    return int((rank(a) - rank(b)).abs().max())


def differing(ours: Outputs, replaced: Outputs) -> Counter[str]:
    """How many numbers of each output differ in any bit.

    Raises:
        ValueError: the two have not the same outputs, of the same dtypes and shapes.
    """
    described = [{name: (t.dtype, tuple(t.shape)) for name, t in outputs.items()} for outputs in (ours, replaced)]
    if described[0] != described[1]:
        raise ValueError(f"ours has the outputs {described[0]}, what it replaces {described[1]}")
    return Counter({name: int(torch.count_nonzero(bits(ours[name]) != bits(replaced[name]))) for name in ours})


def tally(pairs: Iterable[tuple[Outputs, Outputs]]) -> dict[str, Any]:
    """How often each output differs over pairs of ours and what it replaces, and by how many codes at most."""
    total: Counter[str] = Counter()
    steps = 0
    for ours, replaced in pairs:
        total.update(differing(ours, replaced))
        steps = max(steps, code_steps(ours["codes"], replaced["codes"]))
    return {f"{name}_differ": count for name, count in total.items()} | {"largest_code_steps": steps}


def compare(case: Case, width: int, dtype: torch.dtype, elements: int) -> dict[str, Any]:
    """A row of the result, over at least `elements` codes of one width."""
    generator = torch.Generator(device="cuda").manual_seed(width)
    chunks = math.ceil(elements / (ROWS * width))
    inputs = (case.producer.inputs(ROWS, width, dtype, generator) for _ in range(chunks))
    return {
        "op": case.op, "mode": ",".join(filter(None, [case.mode, *case.producer.words])), "form": case.form,
        "quant_rounding": case.rounding, "dtype": str(dtype).removeprefix("torch."), "H": width,
        "elements": chunks * ROWS * width, **tally((case.ours(tensors), case.replaced(tensors)) for tensors in inputs),
    }  # fmt: skip


def compare_mla_v_up(mode: str, tokens: int, heads: int, dtype: torch.dtype, elements: int) -> dict[str, Any]:
    """As `compare`; what precedes this quantiser is a GEMM with weights of its own: fewer codes for few tokens."""
    workload = MLAVUp(mode)
    unfused = workload.others()["unfused"]
    launches = min(math.ceil(elements / (tokens * heads * V)), 64)
    torch.manual_seed(tokens)

    def pairs() -> Iterator[tuple[Outputs, Outputs]]:
        for _ in range(launches):
            inputs = workload.inputs(tokens, heads, dtype)
            unfused(*inputs)
            replaced = named(t.clone() for t in inputs[-2:])
            for t in inputs[-2:]:
                bits(t).fill_(0x55)
            workload.ours(None, *inputs)
            yield named(inputs[-2:]), replaced

    return {
        "op": MLAVUp.op, "mode": mode, "form": "bmm", "quant_rounding": workload.quant.rounding(),
        "dtype": str(dtype).removeprefix("torch."), "M": tokens, "H": heads,
        "elements": launches * tokens * heads * V, **tally(pairs()),
    }  # fmt: skip


def main() -> None:
    known = [*dict.fromkeys(case.op for case in cases()), MLAVUp.op]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", default=known, choices=known)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=2**30, help="a case, over all widths")
    parser.add_argument("--fp16", action="store_true", help="fp16 instead of bf16")
    parser.add_argument("--out", type=pathlib.Path, default=timing.results_folder() / "exactness" / "all.json")
    args = parser.parse_args()
    import vllm._custom_ops  # noqa: F401  registers torch.ops._C

    # Every case and width compiles the same few functions anew.
    for limit in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, 4096)
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    rows: list[dict[str, Any]] = []
    for case in cases():
        if case.op not in args.ops:
            continue
        widths = case.producer.widths
        new = [compare(case, width, dtype, args.elements // len(widths)) for width in widths]
        rows += new
        summed = {key: sum(row[key] for row in new) for key in new[0] if key == "elements" or key.endswith("_differ")}
        steps = max(row["largest_code_steps"] for row in new)
        print(
            *(new[0][key] for key in ("op", "mode", "form", "quant_rounding")),
            summed,
            f"{steps} code steps",
            flush=True,
        )
        timing.write(args.out, rows)  # what is there by now survives a run cut short
    if MLAVUp.op in args.ops:
        for mode, heads, tokens in itertools.product(EXACTNESS_MODES, HEADS, EXACTNESS_TOKENS):
            rows.append(compare_mla_v_up(mode, tokens, heads, dtype, args.elements // 16))
            print(*rows[-1].values(), flush=True)
            timing.write(args.out, rows)


if __name__ == "__main__":
    main()
