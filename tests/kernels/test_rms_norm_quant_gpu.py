# SPDX-License-Identifier: Apache-2.0
"""RMSNorm + FP8 on a GPU: the bytes of vLLM's own unfused ops, and of what Inductor makes of vLLM's torch code.

The ops can return what they quantise, which splits the question. The quantiser has to give the bytes of vLLM's for that, in
every case. The norm has to give the bytes of what it stands in for where both add squares in the same order or the sum is
exact; elsewhere the tests count how many numbers are a step off, as properties of the report (`--junit-xml`).

VFP_EXHAUSTIVE_ELEMENTS sets how many elements each mode of a quantiser gets at random (default 2**28). The tests with
`sanitizer` in their names are few small launches, for
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m pytest tests/kernels -k sanitizer
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
import torch

from vllm_fusion_plugin.kernels import rms_norm_quant as kernels
from vllm_fusion_plugin.kernels.row_order import Tile
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, GroupScales
from vllm_fusion_plugin.ops.rms_norm_quant import (
    NormInputs,
    rms_norm_group_fp8_quant,
    rms_norm_group_fp8_quant_reference,
    rms_norm_static_fp8_quant,
    rms_norm_token_fp8_quant,
    rms_norm_token_fp8_quant_reference,
)

from .cases import DTYPES, short, strided
from .checks import (
    EDGE,
    ENDS,
    Wait,
    as_bits,
    assert_inductors_rows,
    assert_same_bytes,
    check_columns,
    check_cuda_graph,
    check_ends,
    check_pdl_switch,
    vllms_group_quant,
)
from .norm_checks import BF16, DEEPSEEK, EPSILON, Layout, Norm, exact_input, inputs

pytestmark = pytest.mark.gpu

ELEMENTS = int(os.environ.get("VFP_EXHAUSTIVE_ELEMENTS", 2**28))
# Inductor chooses other kernels for under 1024 rows; vLLM compiles for many.
ROWS = 2048
# Widths of models, and what a kernel of its own is made for: a warp a row, a block a row, chunks.
WIDTHS = (512, 1024, 1536, 2048, 3072, 4096, 5120, 7168, 8192, 16384)
STATIC_SCALES = (1.0, 0.0123, 3e-5, 700.0)


# ---- what vLLM computes ----------------------------------------------------------------------------------------------


class Ops:
    """vLLM's CUDA ops."""

    def __init__(self) -> None:
        import vllm._custom_ops  # noqa: F401  (loads the extension that defines torch.ops._C)

        self.c = torch.ops._C

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = x.contiguous()
        if residual is None:
            y = torch.empty_like(x)
            self.c.rms_norm(y, x, weight, EPSILON)
            return y, None
        y, residual = x.clone(), residual.clone(memory_format=torch.contiguous_format)
        self.c.fused_add_rms_norm(y, residual, weight, EPSILON)
        return y, residual

    def group(self, y: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        return vllms_group_quant(y, layout)

    def token(self, y: torch.Tensor, scale_ub: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = torch.empty_like(y, dtype=FP8_DTYPE), y.new_empty((y.shape[0], 1), dtype=torch.float32)
        self.c.dynamic_per_token_scaled_fp8_quant(codes, y, scales, scale_ub)
        return codes, scales

    def static(self, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        codes = torch.empty_like(y, dtype=FP8_DTYPE)
        self.c.static_scaled_fp8_quant(codes, y, scale)
        return codes


@pytest.fixture(scope="module")
def ops() -> Ops:
    pytest.importorskip("vllm")
    return Ops()


def torch_norm(
    x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The expression of vLLM's native `rms_norm` and `fused_add_rms_norm`; a Gemma weight comes as fp32, 1 added."""
    s = x.to(torch.float32)
    if residual is not None:
        s = s + residual.to(torch.float32)
        residual = s.to(x.dtype)
    y = s * torch.rsqrt(s.pow(2).mean(dim=-1, keepdim=True) + EPSILON)
    if weight is not None:
        y = y.to(weight.dtype) * weight
    return y.to(x.dtype), residual


def compiled(fn: Callable, x: torch.Tensor, residual: torch.Tensor | None, *rest: object, **config: object) -> tuple:
    """fn's outputs, fn compiled as vLLM has Inductor do it: for any number of rows, and for this width alone."""
    torch._dynamo.reset()
    for t in (x, residual):
        if t is not None:
            torch._dynamo.mark_dynamic(t, 0)
    with torch._inductor.config.patch(force_disable_caches=True, **config):
        return torch.compile(fn, fullgraph=True)(x, residual, *rest)


def fused_weight(mode: Norm, weight: torch.Tensor | None) -> torch.Tensor | None:
    return weight.float() + 1.0 if mode.weight == "gemma" and weight is not None else weight


def run_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    mode: Norm,
    tile: Tile | None = None,
) -> list[torch.Tensor]:
    """normed, and residual_out if there is a residual, of the group kernel."""
    norm = mode.inputs(x, weight, residual, keep_norm=True)
    codes, scales, extras = norm.empty_codes(), GroupScales().empty(x, *x.shape), norm.empty_extras()
    kernels.rms_norm_group_fp8_quant(norm, codes, scales, *extras, 128, False, mode.quant_rounding, tile=tile)
    return [extra for extra in extras if extra is not None]


def assert_nearly_same(
    actual: torch.Tensor, expected: torch.Tensor, record_property: Callable[[str, object], None], what: str
) -> None:
    """A sum in another order: rsqrt(...) may be off by an ulp of fp32, and numbers next to a rounding boundary by one step.

    In 2048 rows of random numbers, simulated, that was 2 to 4 of a million.
    """
    steps = (as_bits(actual).int() - as_bits(expected).int()).abs()
    differing = int(steps.count_nonzero())
    record_property(what, f"{differing} of {steps.numel()}")
    assert int(steps.max()) <= 1
    assert differing <= steps.numel() * 1e-4


# ---- the norm --------------------------------------------------------------------------------------------------------

NATIVE_MODES = list(itertools.starmap(Norm, itertools.product(DTYPES, ("same", "gemma"), (False, True))))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", NATIVE_MODES, ids=str)
def test_native_norm_is_inductors(
    mode: Norm, width: int, device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    """Above 2048 columns under Inductor's `deterministic`, which takes timing out of its choice: 2048 columns at a time."""
    if not hasattr(torch._inductor.config, "deterministic"):
        pytest.skip("this torch has no torch._inductor.config.deterministic")
    x, residual = inputs(ROWS, width, mode, device, seed=width)
    weight = mode.make_weight(width, device)
    expected = compiled(torch_norm_of_rows, x, residual, fused_weight(mode, weight), deterministic=width > 2048)
    tile = Tile(1, 2048, 16) if width > 2048 else None
    actual = run_norm(x, weight, residual, mode, tile)
    assert_inductors_rows(actual[0], expected[0], "normed")
    if residual is not None:
        assert_same_bytes(actual[1], expected[1], "residual_out")
    # what users have: Inductor's own choice, ours by default
    expected = compiled(torch_norm_of_rows, x, residual, fused_weight(mode, weight))
    actual = run_norm(x, weight, residual, mode)
    assert_nearly_same(actual[0], expected[0], record_property, "normed as Inductor chooses")
    if residual is not None:
        assert_same_bytes(actual[1], expected[1], "residual_out")


def torch_norm_of_rows(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None) -> tuple:
    return torch_norm(x, weight, residual)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("residual_given", [False, True], ids=["", "add"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_custom_op_norm_is_vllms(
    dtype: torch.dtype,
    residual_given: bool,
    width: int,
    ops: Ops,
    device: torch.device,
    record_property: Callable[[str, object], None],
) -> None:
    mode = Norm(dtype, "same", residual_given, "custom_op")
    weight = mode.make_weight(width, device)
    for rows in (7, ROWS):  # vLLM's ops add in two orders
        x, residual = exact_input(rows, width, mode, device, seed=width)
        for name, one, other in zip(
            ("normed", "residual_out"),
            run_norm(x, weight, residual, mode),
            ops.norm(x, weight, residual),
            strict=False,
        ):
            assert_same_bytes(one, other, f"{name} of exact sums, {rows} rows")
        x, residual = inputs(rows, width, mode, device, seed=width)
        actual, expected = run_norm(x, weight, residual, mode), ops.norm(x, weight, residual)
        if rows == ROWS:
            assert_nearly_same(actual[0], expected[0], record_property, "normed")
        if residual is not None:
            assert_same_bytes(actual[1], expected[1], "residual_out")


@pytest.mark.parametrize("weight", ["same", "other", "fp32", "gemma", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_eager_norm_is_torchs(dtype: torch.dtype, weight: str, device: torch.device) -> None:
    """Widths that are powers of two: torch's mean multiplies by the reciprocal of others."""
    for width in (512, 2048, 4096):
        for residual_given in (False, True):
            mode = Norm(dtype, weight, residual_given, "eager")
            x, residual = exact_input(33, width, mode, device, seed=width)
            w = mode.make_weight(width, device)
            expected = torch_norm(x, fused_weight(mode, w), residual)
            for one, other in zip(run_norm(x, w, residual, mode), expected, strict=False):
                assert_same_bytes(one, other, str(mode))


@pytest.mark.parametrize("width", [1536, 2048, 4096, 7168, 16384])
def test_fewer_warps_add_in_the_same_order(width: int, device: torch.device) -> None:
    mode = Norm(torch.bfloat16, "same", True)
    x, residual = inputs(ROWS, width, mode, device, seed=width)
    weight = mode.make_weight(width, device)
    whole = 1 << (width - 1).bit_length()
    warps = 8 if whole == 2048 else 16 if whole <= 8192 else 32
    expected, _ = run_norm(x, weight, residual, mode, Tile(1, whole, warps))
    for rows, fold in ((1, 1), (1, 2), (2, 2), (1, 4)):
        tile = Tile(rows, whole, warps // fold, warps)
        assert_same_bytes(run_norm(x, weight, residual, mode, tile)[0], expected, f"{tile}")


@pytest.mark.parametrize("width", [384, *WIDTHS])
def test_rows_have_the_same_bytes_in_every_batch(width: int, device: torch.device) -> None:
    for mode in (BF16, BF16._replace(quant_rounding="native"), BF16._replace(norm_rounding="custom_op")):
        x, residual = inputs(1200, width, mode, device, seed=width)
        weight, scale = mode.make_weight(width, device), torch.tensor([0.0123], device=device)

        def outputs(rows: slice, x=x, residual=residual, weight=weight, scale=scale, mode=mode) -> list[torch.Tensor]:
            norm = mode.inputs(x[rows], weight, residual[rows], keep_norm=mode.keep_norm)
            return [
                *rms_norm_group_fp8_quant(norm, quant_rounding=mode.quant_rounding),
                *rms_norm_token_fp8_quant(norm, quant_rounding=mode.quant_rounding),
                *rms_norm_static_fp8_quant(norm, scale, quant_rounding=mode.quant_rounding),
            ]

        every = outputs(slice(None))
        for rows in (slice(0, 1), slice(3, 19), slice(100, 117), slice(700, 1200)):
            for part, whole in zip(outputs(rows), every, strict=True):
                assert_same_bytes(part, whole[rows], f"{mode}, rows {rows.start} to {rows.stop}")


# ---- sizes, streams and graphs ---------------------------------------------------------------------------------------


def kept(x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor) -> NormInputs:
    """All that a norm can return."""
    return NormInputs(x, weight, EPSILON, residual, keep_norm=True)


def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    """22 GB. Rows do not depend on the batch: both ends are compared with themselves alone."""
    width = 7168
    x = torch.zeros(2**31 // width + EDGE, width, dtype=torch.bfloat16, device=device)
    residual = torch.zeros_like(x)
    for end, seed in zip(ENDS, (25, 26), strict=True):
        x[end], residual[end] = inputs(EDGE, width, BF16, device, seed=seed)
    weight, scale = BF16.make_weight(width, device), torch.tensor([0.0123], device=device)
    for call in (
        lambda x, r: rms_norm_group_fp8_quant(kept(x, weight, r), DEEPSEEK.scales),
        lambda x, r: rms_norm_token_fp8_quant(kept(x, weight, r)),
        lambda x, r: rms_norm_static_fp8_quant(kept(x, weight, r), scale),
    ):
        check_ends(call(x, residual), [call(x[end], residual[end]) for end in ENDS], either_zero=True)


def test_chain_in_a_cuda_graph(device: torch.device) -> None:
    """Weights included, of which a prefetch might keep old ones."""
    rows, width = 512, 4096
    x, residual = (torch.empty(rows, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    source = torch.empty(2 * rows, width, dtype=torch.bfloat16, device=device)
    scale = torch.tensor([0.0123], device=device)

    def chain(wait: Wait) -> list[torch.Tensor]:
        outputs = []
        x.copy_(source[:rows])
        residual.copy_(source[rows:])
        wait()
        current, total = x, residual
        for _ in range(2):
            weight = current[0] * 2  # the kernel just before the norm
            wait()
            *group, current, total = rms_norm_group_fp8_quant(kept(current, weight, total))
            wait()
            *token, current, total = rms_norm_token_fp8_quant(kept(current, weight, total))
            wait()
            *static, current, total = rms_norm_static_fp8_quant(kept(current, weight, total), scale)
            wait()
            outputs += [*group, *token, *static, current, total]
        return outputs

    def fill(seed: int) -> None:
        source.copy_(torch.cat(inputs(rows, width, BF16, device, seed=seed)))

    check_cuda_graph(chain, fill, first_seed=27)


def test_pdl_switch_changes_no_byte(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    x, residual = inputs(33, 7168, BF16, device, seed=49)
    weight, scale = BF16.make_weight(7168, device), torch.tensor([0.0123], device=device)

    def outputs() -> list[torch.Tensor]:
        return [
            *rms_norm_group_fp8_quant(kept(x, weight, residual)),
            *rms_norm_token_fp8_quant(NormInputs(x, weight, residual=residual)),
            *rms_norm_static_fp8_quant(NormInputs(x, weight, residual=residual), scale),
        ]

    check_pdl_switch(outputs, device, monkeypatch)


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [384, 1152, 4224])
@pytest.mark.parametrize("rows", [1, 5])
def test_sanitizer_group(rows: int, width: int, device: torch.device) -> None:
    """The op's own allocations, unlike the guarded ones of the other tests: an access past their end is out of bounds."""
    x, residual = exact_input(rows, width, BF16, device, seed=50)
    weight = BF16.make_weight(width, device)
    for layout in (DEEPSEEK, Layout(64)):
        norm = kept(x, weight, residual)._replace(norm_rounding="custom_op")
        outputs = rms_norm_group_fp8_quant(norm._replace(x=strided(x), residual=strided(residual)), layout.scales)
        expected = rms_norm_group_fp8_quant_reference(norm, layout.scales)
        if layout.scale_layout != "row":
            check_columns(outputs[1], expected[1], layout.scale_layout in ("tma", "packed"))
        assert_same_bytes(outputs.pop(1).cpu().contiguous(), expected.pop(1).cpu().contiguous(), "scales")
        for one, other in zip(outputs, expected, strict=True):
            assert_same_bytes(one.cpu(), other.cpu(), "output")


@pytest.mark.parametrize("width", [200, 1100, 2500])
def test_sanitizer_token_and_static(width: int, device: torch.device) -> None:
    mode = BF16._replace(norm_rounding="custom_op")
    x, residual = exact_input(5, width, mode, device, seed=51)
    weight, scale = mode.make_weight(width, device), torch.tensor([0.0123], device=device)
    norm = NormInputs(x, weight, EPSILON, residual, norm_rounding="custom_op")
    outputs = rms_norm_token_fp8_quant(norm._replace(x=strided(x)))
    expected = rms_norm_token_fp8_quant_reference(norm)
    for one, other in zip(outputs, expected, strict=True):
        assert_same_bytes(one.cpu(), other.cpu(), "output")
    rms_norm_static_fp8_quant(NormInputs(strided(x), weight, residual=residual), scale)[0].cpu()


def test_sanitizer_tiles(device: torch.device) -> None:
    """Rows and columns that tiles do not fill, each tile shape forced rather than chosen."""
    x, residual = exact_input(5, 640, BF16, device, seed=52)
    weight = BF16.make_weight(640, device)
    expected = run_norm(x, weight, residual, BF16)
    for tile in (Tile(2, 128, 1), Tile(4, 512, 2), Tile(8, 1024, 16)):
        for one, other in zip(run_norm(x, weight, residual, BF16, tile), expected, strict=True):
            assert_same_bytes(one.cpu(), other.cpu(), f"{tile}")
