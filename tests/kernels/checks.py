# SPDX-License-Identifier: Apache-2.0
"""Comparison by bytes, output buffers that show what a kernel did not write, or wrote outside of them, and what tests of
several ops check in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

from vllm_fusion_plugin.kernels import pdl
from vllm_fusion_plugin.kernels.rounding import is_native
from vllm_fusion_plugin.ops.quant import EPS, FP8_DTYPE, FP8_MAX, GroupScales, padded_rows

POISON = 0xA5
GUARD = 4096  # bytes before and after a guarded tensor


def as_bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def one_nan(t: torch.Tensor) -> torch.Tensor:
    """t with every NaN replaced by the same one, since hardware conversions lose a NaN's sign and torch on a CPU does not.

    Only native quantisers leave NaN in their outputs.
    """
    if t.dtype == FP8_DTYPE:
        bits = as_bits(t)
        return torch.where((bits & 0x7F) == 0x7F, torch.full_like(bits, 0x7F), bits).view(FP8_DTYPE)
    return torch.where(t.isnan(), torch.full_like(t, float("nan")), t) if t.is_floating_point() else t


def count_differing(actual: torch.Tensor, expected: torch.Tensor) -> int:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    return int(torch.count_nonzero(as_bits(actual) != as_bits(expected)))


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if count_differing(actual, expected) == 0:
        return
    where = (as_bits(actual) != as_bits(expected)).nonzero()
    first = "\n".join(
        f"  {tuple(at)}: {actual[tuple(at)].item()} for {expected[tuple(at)].item()}" for at in where[:8].tolist()
    )
    raise AssertionError(f"{what}: {len(where)} of {actual.numel()} differ, the first being\n{first}")


# From torch 2.14 on, some of Inductor's kernels give another last bit to the sums of 0.3 to 0.5 % of the rows: see
# docs/notes/inductor-norms.md.
SUMS_ARE_SELDOM_OFF = torch.__version__ >= torch.torch_version.TorchVersion("2.14")


def assert_inductors_rows(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Normed rows are Inductor's, byte for byte; where sums are seldom off, but for 1 number in 4 million, by a step."""
    if not SUMS_ARE_SELDOM_OFF:
        return assert_same_bytes(actual, expected, what)
    steps = (as_bits(actual).int() - as_bits(expected).int()).abs()
    assert int(steps.max()) <= 1, what
    assert int(steps.count_nonzero()) <= max(2, steps.numel() // 4_000_000), what


def assert_inductors_scales(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Scales of such rows, likewise: but for 1 % of them, by 3 ulp (2.98e-7 at most was measured)."""
    if not SUMS_ARE_SELDOM_OFF:
        return assert_same_bytes(actual, expected, what)
    torch.testing.assert_close(
        actual, expected, rtol=3 * 2**-23, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
    assert count_differing(actual, expected) <= actual.numel() // 100, what


def assert_same_outputs(actual: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], what: str = "op") -> None:
    """The strides and the bytes of an op's outputs, one by one."""

    def steps(t: torch.Tensor) -> list[int]:  # of a single row, the stride is nobody's business
        return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]

    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert steps(one) == steps(other), f"{what}: output {number}"
        assert_same_bytes(one, other, f"{what}: output {number}")


def code_steps(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many FP8 codes apart two tensors of codes are, element by element; -0 and +0 are the same code."""

    def rank(t: torch.Tensor) -> torch.Tensor:
        bits = as_bits(t).to(torch.int16)
        magnitude = bits & 0x7F
        return torch.where(bits >= 0x80, -magnitude, magnitude)

    return (rank(actual) - rank(expected)).abs()


class Guarded:
    """A poisoned allocation with room on both sides, for a kernel to write into.

    `tensor` is the output; `check` fails if anything outside its storage was written.
    """

    def __init__(self, like: torch.Tensor):
        self.size = like.untyped_storage().nbytes()
        self.bytes = torch.full((GUARD + self.size + GUARD,), POISON, dtype=torch.uint8, device=like.device)
        # the guards are a multiple of the alignment that kernels may assume, so the tensor is aligned as torch's own are
        typed = self.bytes[: GUARD + self.size].view(like.dtype)
        offset = GUARD // like.element_size()
        self.tensor = typed.as_strided(like.shape, like.stride(), offset)

    def storage(self) -> torch.Tensor:
        return self.bytes[GUARD : GUARD + self.size]

    def check(self) -> None:
        assert bool((self.bytes[:GUARD] == POISON).all()), "written before the tensor"
        assert bool((self.bytes[GUARD + self.size :] == POISON).all()), "written past the end of the tensor"


def guarded_codes(x: torch.Tensor) -> Guarded:
    return Guarded(x.new_empty((x.shape[0], x.shape[1] // 2), dtype=FP8_DTYPE))


def guarded_scales(x: torch.Tensor, scales: GroupScales, width: int) -> Guarded:
    """Scales for as many rows as x has, of `width` numbers each."""
    guarded = Guarded(scales.empty(x, x.shape[0], width))
    if scales.layout == "packed" and width // scales.group_size % 4:
        guarded.storage().zero_()  # as `GroupScales.empty` does
    return guarded


# ---- what tests of several ops check ---------------------------------------------------------------------------------


def assert_codes(actual: torch.Tensor, expected: torch.Tensor, quant_rounding: str) -> None:
    """Codes are a reference's. A native quantiser divides by div.full.f32 on a GPU, within 2 ulp of the reference's IEEE
    division: a code may be a step away there, next to a tie. That it is Inductor's code is for the tests with `gpu`."""
    expected = one_nan(expected)
    if is_native(quant_rounding) and actual.is_cuda:
        steps = code_steps(actual, expected)
        assert int((steps > 1).sum()) == 0
        assert int(steps.count_nonzero()) <= max(8, steps.numel() // 500)
        return
    assert_same_bytes(actual, expected, "codes")


def check_guarded(
    codes: Guarded, scales: Guarded, expected_codes: torch.Tensor, expected_scales: torch.Tensor, quant_rounding: str
) -> None:
    """What a group kernel wrote is what a reference returns, whatever their NaN."""
    assert scales.tensor.stride() == expected_scales.stride()
    assert_codes(codes.tensor, expected_codes, quant_rounding)
    assert_same_bytes(one_nan(scales.tensor), one_nan(expected_scales), "scales")
    # Storage and not tensor: TMA-aligned scales have padding, which must be zero. The buffer was poisoned.
    storage = torch.empty(0, device=expected_scales.device).set_(expected_scales.untyped_storage())
    assert_same_bytes(one_nan(scales.storage().view(torch.float32)), one_nan(storage), "scales and padding")


def check_tma_outputs(outputs: Sequence[torch.Tensor], expected: Iterable[Guarded]) -> None:
    """An op, asked for TMA-aligned scales, allocates them so, and returns what its kernel wrote."""
    codes, scales = outputs
    assert codes.is_contiguous()
    assert scales.stride() == (1, (len(codes) + 3) // 4 * 4)
    assert_same_outputs(outputs, [guarded.tensor for guarded in expected])


def check_deterministic(op: Callable[..., Iterable[torch.Tensor]], *inputs: torch.Tensor) -> None:
    """The same bytes twice, and inputs as they were."""
    before = [as_bits(t).clone() for t in inputs]
    assert_same_outputs(op(*inputs), op(*inputs))
    assert all(torch.equal(as_bits(t), bits) for t, bits in zip(inputs, before, strict=True))


def check_columns(scales: torch.Tensor, expected: torch.Tensor, tma_aligned: bool) -> None:
    """Column-major scales, all of their storage, so that initcheck sees padding that was never written."""
    rows = len(scales)
    column = padded_rows(rows) if tma_aligned else rows
    storage = torch.empty(0, device=scales.device).set_(scales.untyped_storage()).view(-1, column).cpu()
    assert_same_bytes(storage[:, :rows].contiguous(), expected.t().cpu().contiguous(), "scales")
    assert not storage[:, rows:].any()


EDGE = 300
ENDS = (slice(None, EDGE), slice(-EDGE, None))


def check_ends(
    outputs: Sequence[torch.Tensor], expected: Iterable[Sequence[torch.Tensor]], either_zero: bool = False
) -> None:
    """More than 2**31 codes, so every 32-bit index overflows somewhere, of rows that are zero but for both ENDS.

    expected: the outputs for each end alone. either_zero: zeros times a negative weight have -0 as their code.
    """
    codes = outputs[0]
    assert codes.numel() > 2**31
    for end, alone in zip(ENDS, expected, strict=True):
        for number, (whole, part) in enumerate(zip(outputs, alone, strict=True)):
            assert_same_bytes(whole[end].contiguous(), part.contiguous(), f"output {number} of {end}")
    between = as_bits(codes[EDGE:-EDGE])
    assert int(torch.count_nonzero(between & 0x7F if either_zero else between)) == 0


Wait = Callable[[], None]


def check_cuda_graph(
    chain: Callable[[Wait], list[torch.Tensor]], fill: Callable[[int], object], first_seed: int
) -> None:
    """Kernels that read what the one before has just written. A PDL launch that did not wait would read old bytes.

    `fill` makes another input from a seed. `chain` launches the kernels, the first of them a copy of that input, and calls
    what it is given after each. Captured once without a wait, replayed on 20 inputs, compared with launches that wait.
    """
    fill(first_seed)
    chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(lambda: None)
    for seed in range(first_seed + 1, first_seed + 21):
        fill(seed)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_outputs(captured, chain(torch.cuda.synchronize), f"seed {seed}")


def check_cuda_graph_of_group_op(
    op: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    make: Callable[[int], torch.Tensor],
    links: int,
    first_seed: int,
) -> None:
    """A chain of one op, on bf16 inputs that `make` makes from a seed.

    FP8 codes, two by two, are the next kernel's bf16 input: bit patterns, not activations, which is as good here.
    """
    source = make(first_seed)
    x = torch.empty_like(source)

    def chain(wait: Wait) -> list[torch.Tensor]:
        outputs = []
        x.copy_(source)
        wait()
        current = x
        for _ in range(links):
            codes, scales = op(current)
            wait()
            outputs += [codes, scales]
            current = codes.view(torch.bfloat16)
        return outputs

    check_cuda_graph(chain, lambda seed: source.copy_(make(seed)), first_seed)


def check_pdl_switch(
    outputs: Callable[[], Iterable[torch.Tensor]], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes no byte."""
    monkeypatch.setenv(pdl.ENV, "1")
    with_pdl = outputs()
    monkeypatch.setenv(pdl.ENV, "0")
    assert not pdl.pdl_supported(device)
    assert_same_outputs(with_pdl, outputs(), "PDL")


# ---- vLLM's quantisers -----------------------------------------------------------------------------------------------


def vllms_group_quant(y: torch.Tensor, mode: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """By vLLM's op, which takes contiguous rows only; `mode` has the fields of `cases.GroupMode` that say what scales.

    Needs torch.ops._C, which an import of vllm._custom_ops loads.
    """
    codes = torch.empty_like(y, dtype=FP8_DTYPE)
    scales = mode.scales.empty(y, *y.shape)
    if mode.scale_layout == "packed":
        torch.ops._C.per_token_group_fp8_quant_packed(y, codes, scales, mode.group_size, EPS, -FP8_MAX, FP8_MAX)
        return codes, scales
    layout = (mode.scale_layout != "row", mode.scale_layout == "tma")
    torch.ops._C.per_token_group_fp8_quant(
        y, codes, scales, mode.group_size, EPS, -FP8_MAX, FP8_MAX, mode.use_ue8m0, *layout
    )
    return codes, scales


def native_quantiser(**arguments: object) -> Callable:
    """vLLM's QuantFP8 in torch's operations, for Inductor to compile."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8

    with set_current_vllm_config(VllmConfig()):
        return QuantFP8(**arguments).forward_native
