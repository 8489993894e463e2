# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/ on a GPU: the bytes of Triton's, which other tests compare with vLLM's, in every form that they have.

FUSION_PLUGIN_KERNELS=cuda or triton says which of them those other tests run: test_silu_mul_quant_gpu.py and
test_group_quant_gpu.py are for both. Here, what a kernel in CUDA would leave to Triton's is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from vllm_fusion_plugin.kernels import cuda_library
from vllm_fusion_plugin.ops import group_quant, registry, silu_mul_quant

from .cases import DTYPES, all_values, from_bits, random_input, short, special_values, strided
from .checks import assert_same_bytes, assert_same_outputs, check_cuda_graph_of_group_op, check_pdl_switch

pytestmark = pytest.mark.gpu

SILU_MUL, GROUP = silu_mul_quant._GROUP, group_quant._OP
ACTS = silu_mul_quant.ACT_ROUNDINGS
WIDTHS = (64, 128, 192, 384, 1536, 2304, 12288, 14336)
ROWS = (0, 1, 2, 3, 5, 16, 17, 31, 32, 33, 127, 1000)
FLASHINFER = ("flashinfer", "reciprocal_or_flashinfer", "custom_op_or_flashinfer")

Op = Callable[..., Any]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[cuda_library.Library]:
    """The library, running both ops, which may not fall back."""
    found = cuda_library.load()
    if found is None:
        pytest.skip(cuda_library.why_not())
    if not found.has_code(torch.cuda.current_device()):
        pytest.skip("the CUDA library has no code for this GPU")
    monkeypatch.setenv(cuda_library.ENV, "cuda")
    assert registry.bind_all() == found.ops
    forbidding = torch.library.Library(cuda_library.FALLBACK, "IMPL")
    for name in found.ops:
        forbidding.impl(name, _fallen_back, "CUDA", allow_override=True)
    yield found
    forbidding._destroy()
    monkeypatch.undo()
    registry.bind_all()


def _fallen_back(*arguments: Any) -> None:
    raise AssertionError(f"left to Triton: {[tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments]}")


def forms(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """group_size, scale_layout, use_ue8m0, quant_rounding."""
    roundings = ["custom_op", "reciprocal", *(FLASHINFER if dtype == torch.bfloat16 else ())]
    plain = itertools.product((64, 128), ("row", "column", "tma"), (False, True), roundings)
    return [*plain, (128, "packed", True, "custom_op"), (128, "packed", True, "reciprocal")]


def tensors(result: Any) -> Sequence[torch.Tensor]:
    return result if isinstance(result, (list, tuple)) else [result]


def storages(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All bytes: of TMA-aligned scales also those between the columns."""
    return [torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()) for t in outputs]


def check(op: Any, x: torch.Tensor, *arguments: Any) -> None:
    what = f"{op} {tuple(x.shape)} {x.stride()} {short(x.dtype)} {arguments}"
    actual = tensors(op(x, *arguments))
    expected = tensors(registry.CUDA_IMPLEMENTATIONS[op._schema.name.partition("::")[2]](x, *arguments))
    assert len(actual) == len(expected), what
    assert [t.dtype for t in actual] == [t.dtype for t in expected], what
    assert_same_outputs(actual, expected, what)
    for one, other in zip(storages(actual), storages(expected), strict=True):
        assert_same_bytes(one, other, f"{what}: storage")


def fits(width: int, form: tuple[Any, ...]) -> bool:
    return width % form[0] == 0 and (form[1] != "packed" or width % 512 == 0)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_silu_mul_forms(library: cuda_library.Library, dtype: torch.dtype, act: str, device: torch.device) -> None:
    """Of few shapes, since each form and tile is one more kernel for Triton to compile."""
    for form, kind in itertools.product(forms(dtype), ("normal", "special", "bits")):
        x = random_input(3, 512, dtype, device, seed=3, kind=kind)
        for keep in (False, True):
            check(SILU_MUL, x, *form[:3], act, form[3], keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_group_forms(library: cuda_library.Library, dtype: torch.dtype, device: torch.device) -> None:
    for form, kind in itertools.product(forms(dtype), ("normal", "special", "bits")):
        for rows in (3, 31, 33):
            check(GROUP, random_input(rows, 512, dtype, device, seed=rows, kind=kind)[:, :512], *form)


@pytest.mark.parametrize("width", WIDTHS)
def test_shapes(library: cuda_library.Library, width: int, device: torch.device) -> None:
    """Every tile there is, filled and not; contiguous rows and strided ones."""
    for rows in (*ROWS, *(r for r in (5000, 9000) if width <= 14336)):
        x = random_input(rows, width, torch.bfloat16, device, seed=rows)
        for form in (
            (128, "tma", False, "reciprocal"),
            (64, "column", True, "custom_op"),
            (128, "row", False, "custom_op"),
        ):
            if not fits(width, form):
                continue
            for source in (x, strided(x)) if rows else (x,):
                check(SILU_MUL, source, *form[:3], "native", form[3])
                check(GROUP, source, *form)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_all_gates(library: cuda_library.Library, dtype: torch.dtype, device: torch.device) -> None:
    """All gates in their order, and every 512th, by ups of all sorts."""
    gates, ups = all_values(dtype, device), special_values(dtype).to(device)[:, None].expand(-1, 65536)
    for row in (gates, gates.view(128, 512).t().reshape(-1)):
        x = torch.cat([row.expand(len(ups), -1), ups], dim=1)
        for act, form in itertools.product(ACTS, (f for f in forms(dtype) if f[:2] == (128, "row"))):
            check(SILU_MUL, x, *form[:3], act, form[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_all_maxima(library: cuda_library.Library, dtype: torch.dtype, device: torch.device) -> None:
    """Each number as the first of its group, the others no larger."""
    first = torch.arange(65536, device=device)[:, None]
    generator = torch.Generator(device=device).manual_seed(1)
    size, sign = torch.randint(2**31, (2, 65536, 127), generator=generator, device=device)
    others = size % ((first & 0x7FFF) + 1) | (sign & 1) << 15
    x = from_bits(torch.cat([first, others], dim=1), dtype).view(1024, 64 * 128)
    for form in forms(dtype):
        check(GROUP, x, *form)


@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 2, 2), (8, 1, 4), (2, 8, 2), (1, 8, 1), (4, 4, 8)])
def test_tiles(library: cuda_library.Library, tile: tuple[int, int, int], device: torch.device) -> None:
    """Forced, whatever the shape: those that rows and groups do not fill, too."""
    try:
        library.force_tile(*tile)
        for rows, width in ((1, 128), (5, 384), (33, 1536), (70, 128)):
            x = random_input(rows, width, torch.bfloat16, device, seed=rows)
            check(SILU_MUL, x, 128, "tma", False, "native", "reciprocal")
            check(GROUP, x, 128, "column", False, "custom_op")
    finally:
        library.force_tile()


def test_more_rows_than_a_grid_has_in_its_second_axis(library: cuda_library.Library, device: torch.device) -> None:
    x = random_input(70_000 * 8, 128, torch.bfloat16, device, seed=2)
    check(SILU_MUL, x, 128, "tma", False, "native", "reciprocal")


def test_chain_in_a_cuda_graph(library: cuda_library.Library, device: torch.device) -> None:
    for op, arguments in (
        (SILU_MUL, (128, "tma", False, "native", "reciprocal")),
        (GROUP, (128, "tma", False, "reciprocal")),
    ):
        check_cuda_graph_of_group_op(
            lambda x: op(x, *arguments),  # noqa: B023
            lambda seed: random_input(512, 8192, torch.bfloat16, device, seed),
            links=3,
            first_seed=3,
        )


def test_pdl_switch_changes_no_byte(
    library: cuda_library.Library, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    x = random_input(33, 1536, torch.bfloat16, device, seed=4)
    check_pdl_switch(lambda: SILU_MUL(x, 128, "tma", False, "native", "reciprocal"), device, monkeypatch)


def test_another_stream(library: cuda_library.Library, device: torch.device) -> None:
    """Launched on the stream that is current, after what is there."""
    x = random_input(8192, 4096, torch.bfloat16, device, seed=5)
    expected = SILU_MUL(x, 128, "tma", False, "native", "reciprocal")
    torch.cuda.synchronize()
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        outputs = SILU_MUL(late, 128, "tma", False, "native", "reciprocal")
    stream.synchronize()
    assert_same_outputs(outputs, expected)


# ---- what is left to Triton's ----------------------------------------------------------------------------------------


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """The library, which may fall back."""
    if cuda_library.load() is None:
        pytest.skip(cuda_library.why_not())
    monkeypatch.setenv(cuda_library.ENV, "cuda")
    registry.bind_all()
    yield
    monkeypatch.undo()
    registry.bind_all()


def test_other_forms_go_to_triton(bound: None, device: torch.device) -> None:
    x = random_input(33, 1536, torch.bfloat16, device, seed=6)
    check(SILU_MUL, x, 128, "row", False, "native", "native_floored")
    check(GROUP, x, 128, "row", True, "native")
    check(SILU_MUL, random_input(5, 384, torch.bfloat16, device, seed=7), 128, "packed", True, "native", "reciprocal")
    wide = torch.cat([x[:, :1], x, x[:, :1]], dim=1)
    check(SILU_MUL, wide[:, 1:-1], 128, "row", False, "native", "reciprocal")  # not aligned to 16 bytes


def test_errors_are_those_of_python(bound: None, device: torch.device) -> None:
    x = random_input(33, 1536, torch.bfloat16, device, seed=8)
    with pytest.raises(ValueError, match="group_size=7 is not supported; allowed: 64, 128"):
        SILU_MUL(x, 7, "row", False, "native", "reciprocal")
    with pytest.raises(ValueError, match="quant_rounding='no' is not known; allowed"):
        GROUP(x, 128, "row", False, "no")
    with pytest.raises(ValueError, match=r"x has dtype torch\.float32; allowed"):
        GROUP(x.float(), 128, "row", False, "reciprocal")
