# SPDX-License-Identifier: Apache-2.0
"""MLA's value up-projection + FP8 on a GPU, against vLLM's `bmm` and quantiser.

Two GEMMs add up in two orders. So there are the bytes of vLLM's ops where no sum is rounded, and on other numbers: how far
codes are apart, how often, and which is nearer to the exact product. The tests with `sanitizer` in their names are few small
launches, for
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m pytest tests/kernels -k sanitizer
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from vllm_fusion_plugin.kernels import mla_v_up_quant as kernels
from vllm_fusion_plugin.ops.mla_v_up_quant import (
    mla_v_up_group_fp8_quant,
    mla_v_up_group_fp8_quant_reference,
    scale_padding,
)
from vllm_fusion_plugin.ops.quant import FP8_DTYPE

from .cases import DTYPES, GROUP_SIZES, short
from .checks import (
    EDGE,
    ENDS,
    Wait,
    assert_same_bytes,
    assert_same_outputs,
    check_columns,
    check_cuda_graph,
    check_ends,
    code_steps,
    count_differing,
    vllms_group_quant,
)
from .installed import installed
from .test_mla_v_up_quant import (
    MODES,
    Mode,
    exact_inputs,
    laid_out_attn,
    laid_out_weights,
    name,
    outputs,
)

pytestmark = pytest.mark.gpu

L, V = 512, 128  # of DeepSeek-V2, V3 and R1
WEIGHTS = ("output first", "input first")  # vLLM's two layouts


class Unfused:
    """What vLLM's MLAAttention does: `_v_up_proj` into a buffer of attn_out's dtype, then the quantiser."""

    def __init__(self) -> None:
        import vllm._custom_ops  # noqa: F401  (loads the extension that defines torch.ops._C)

    def __call__(self, x: torch.Tensor, w: torch.Tensor, mode: Mode) -> tuple[torch.Tensor, torch.Tensor]:
        y = x.new_empty(x.shape[0], w.shape[0] * w.shape[2])
        torch.bmm(x.transpose(0, 1), w, out=y.view(x.shape[0], x.shape[1], -1).transpose(0, 1))
        return vllms_group_quant(y, mode)


@pytest.fixture(scope="module")
def unfused() -> Unfused:
    pytest.importorskip("vllm")
    return Unfused()


@pytest.fixture
def fp32_sums() -> Iterator[None]:
    """cuBLAS may add up parts of a sum in the output's dtype, unless told not to."""
    switches = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    matmul = torch.backends.cuda.matmul
    before = {switch: getattr(matmul, switch) for switch in switches}
    # not by monkeypatch: these attributes are in no __dict__, and pytest 9.2 would undo them by deletion
    for switch in switches:
        setattr(matmul, switch, False)
    yield
    for switch, value in before.items():
        setattr(matmul, switch, value)


def fused(
    x: torch.Tensor, w: torch.Tensor, mode: Mode, tile: kernels.Tile | None = None, pdl: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = outputs(x, w, mode)
    arguments = (scale_padding(scales), mode.group_size, mode.use_ue8m0, mode.quant_rounding)
    kernels.mla_v_up_group_fp8_quant(x, w, codes, scales, *arguments, tile=tile, pdl=pdl)
    return codes, scales


def check(x: torch.Tensor, w: torch.Tensor, mode: Mode, unfused: Unfused, tile: kernels.Tile | None = None) -> None:
    assert_same_outputs(fused(x, w, installed(mode), tile), unfused(x, w, mode))


# ---- where sums are exact --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fp32_sums")
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_exact_modes(mode: Mode, unfused: Unfused, device: torch.device) -> None:
    for tokens in (1, 5, 130):
        x, w = exact_inputs(tokens, 16, L, V, mode.dtype, device, seed=tokens)
        for weights in WEIGHTS:
            check(x, laid_out_weights(w, weights), mode, unfused)


@pytest.mark.usefixtures("fp32_sums")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("heads", [128, 64, 16, 8])
def test_exact_shapes(heads: int, weights: str, unfused: Unfused, device: torch.device) -> None:
    """Models' shapes, whole and sharded: every tile that is chosen for them, in several ways of not filling it."""
    for tokens in (1, 2, 16, 17, 33, 64, 100, 128, 129, 256, 300, 512, 1000, 2048, 2051):
        x, w = exact_inputs(tokens, heads, L, V, torch.bfloat16, device, seed=tokens)
        for mode in (Mode(), Mode(group_size=64, scale_layout="column")):
            check(x, laid_out_weights(w, weights), mode, unfused)


@pytest.mark.usefixtures("fp32_sums")
@pytest.mark.parametrize("layout", ["head-major", "padded heads", "unaligned", "every other number"])
def test_exact_layouts(layout: str, unfused: Unfused, device: torch.device) -> None:
    for tokens in (1, 64, 700):
        x, w = exact_inputs(tokens, 16, L, V, torch.bfloat16, device, seed=tokens)
        assert_same_outputs(
            fused(laid_out_attn(x, layout), w, installed(Mode())), unfused(x, w, Mode()), f"{tokens} tokens"
        )


SHAPES = (  # tokens, depth, stages, warps, swap
    (16, 64, 8, 4, False),
    (16, 128, 5, 8, True),
    (32, 64, 6, 4, True),
    (64, 64, 3, 4, False),
    (128, 64, 3, 8, False),
    (128, 128, 2, 8, True),
    (256, 64, 4, 8, False),
)
TILES = [
    kernels.Tile(tokens, 128, depth, stages, num_warps, swap, tma, persistent=persistent)
    for (tokens, depth, stages, num_warps, swap), tma, persistent in itertools.product(
        SHAPES, (False, True), (False, True)
    )
]


@pytest.mark.usefixtures("fp32_sums")
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{name(tile)}-{tile.depth}")
def test_exact_tiles(tile: kernels.Tile, unfused: Unfused, device: torch.device) -> None:
    """What the benchmark's --tune may come to choose. 128 heads: more tiles than multiprocessors."""
    x, w = exact_inputs(300, 128, L, V, torch.bfloat16, device, seed=31)
    # one layout a tile, since every pair of them is one more kernel to compile
    check(x, laid_out_weights(w, WEIGHTS[TILES.index(tile) // 2 % 2]), Mode(), unfused, tile)


@pytest.mark.usefixtures("fp32_sums")
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_exact_special_values(dtype: torch.dtype, unfused: Unfused, device: torch.device) -> None:
    for tokens in (6, 70, 300):
        x, w = exact_inputs(tokens, 8, L, V, dtype, device, seed=32)
        x[0, 0, 5], x[1, 1, 7], x[-1, 0, 0] = float("nan"), float("inf"), -float("inf")
        w[1, 3, 9], w[1, 3, 70] = float("nan"), float("inf")
        x[3, 1], x[4, 0] = -0.0, 0.0
        x[5, 0] *= 2.0**12  # beyond fp16 after summation
        for group_size in GROUP_SIZES:
            check(x, w, Mode(dtype, group_size), unfused)


# ---- where they are not ----------------------------------------------------------------------------------------------


def normal_inputs(
    tokens: int, heads: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[torch.Tensor, ...]:
    """Sizes as in a trained model: y as large as x; some tokens larger than others."""
    generator = torch.Generator(device=device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    size = torch.exp2(torch.randint(-4, 3, (tokens, 1, 1), **options).float())
    x = torch.randn(tokens, heads, L, **options) * size
    w = torch.randn(heads, L, V, **options) / L**0.5
    return x.to(dtype), w.to(dtype)


def decoded(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    groups = codes.double().view(len(codes), -1, group_size)
    return (groups * scales.double()[:, :, None]).view(codes.shape)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "tokens, heads",
    [
        (1, 128),
        (1, 16),
        (2, 64),
        (7, 128),
        (17, 32),
        (32, 128),
        (100, 16),
        (128, 128),
        (512, 128),
        (2048, 128),
        (2048, 16),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_vllms_bytes_on_hopper_and_elsewhere_one_step_at_most(
    dtype: torch.dtype,
    tokens: int,
    heads: int,
    weights: str,
    unfused: Unfused,
    device: torch.device,
    record_property: Callable[[str, object], None],
) -> None:
    """On Hopper, cuBLAS adds up in our kernel's order. Otherwise codes are one step apart where the two sums round y to
    neighbours, and scales where that is a group's maximum; and no farther from the product in fp64 than vLLM's are. Rates
    are printed (pytest -rP) and recorded (--junitxml)."""
    mode = Mode(dtype)
    for seed in range(8 if tokens <= 128 else 2):
        x, w = normal_inputs(tokens, heads, dtype, device, seed=40 + seed)
        w = laid_out_weights(w, weights)
        codes, scales = fused(x, w, installed(mode))
        expected_codes, expected_scales = unfused(x, w, mode)

        steps = code_steps(codes, expected_codes)
        differing = {
            "codes": int(steps.count_nonzero()) / codes.numel(),
            "scales": count_differing(scales.contiguous(), expected_scales.contiguous()) / scales.numel(),
        }
        exact = torch.bmm(x.transpose(0, 1).double(), w.double()).transpose(0, 1).reshape(codes.shape)
        errors = {}
        for who, found in (("ours", (codes, scales)), ("vLLM", (expected_codes, expected_scales))):
            error = decoded(*found, mode.group_size) - exact
            errors[who] = (float(error.square().mean().sqrt()), float(error.abs().max()))
        print(f"seed {seed}: differing {differing}, errors (rms, largest) {errors}")
        record_property(f"seed {seed}", {"differing": differing, "errors": errors})

        if torch.cuda.get_device_capability(device) == (9, 0):
            assert differing == {"codes": 0, "scales": 0}
        assert int(steps.max()) <= 1
        assert differing["codes"] <= 2e-3
        torch.testing.assert_close(scales, expected_scales, rtol=torch.finfo(dtype).eps, atol=0)
        # The quantiser's own error is all but the whole of it, and the same for both: what is allowed is chance.
        assert errors["ours"][0] <= errors["vLLM"][0] * 1.001
        assert errors["ours"][1] <= errors["vLLM"][1] * 1.05


@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_same_bytes_every_time(tokens: int, device: torch.device) -> None:
    x, w = normal_inputs(tokens, 128, torch.bfloat16, device, seed=50)
    expected = fused(x, w, Mode())
    for _ in range(20):
        assert_same_outputs(fused(x, w, Mode()), expected)


# ---- sizes, streams and graphs ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fp32_sums")
@pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])
def test_more_than_two_to_the_31_elements(tma: bool, unfused: Unfused, device: torch.device) -> None:
    """And four times as many inputs; 20 GB."""
    heads = 128
    tokens = 2**31 // (heads * V) + EDGE
    x = torch.zeros(tokens, heads, L, dtype=torch.bfloat16, device=device)
    for end, seed in zip(ENDS, (51, 52), strict=True):
        x[end], w = exact_inputs(EDGE, heads, L, V, x.dtype, device, seed=seed)
    tile = kernels.group_tile(tokens, heads, V, 128)._replace(tma=tma)
    for mode in (Mode(), Mode(scale_layout="row")):
        check_ends(fused(x, w, installed(mode), tile), [unfused(x[end], w, mode) for end in ENDS])


@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_chain_in_a_cuda_graph(tokens: int, device: torch.device) -> None:
    """Attention's output is written just before, and then weights, which a kernel might read early.

    FP8 codes, two by two, are the next kernel's bf16 input: bit patterns, not activations, which is as good here.
    """
    heads, depth = 16, V // 2
    x = torch.empty(tokens, heads, depth, dtype=torch.bfloat16, device=device)
    w = torch.empty(heads, depth, V, dtype=torch.bfloat16, device=device)
    source_x, source_w = torch.empty_like(x), torch.empty_like(w)

    def chain(wait: Wait) -> list[torch.Tensor]:
        results = []
        x.copy_(source_x)
        wait()
        current = x
        for _ in range(3):
            torch.mul(source_w, 1.0, out=w)  # a kernel, which copy_ need not be
            wait()
            for _ in range(2):
                codes, scales = fused(current, w, Mode())
                wait()
                results += [codes, scales]
                current = codes.view(torch.bfloat16).view(x.shape)
            w.zero_()  # whoever reads the weights early next time finds these
            wait()
        return results

    def fill(seed: int) -> None:
        new_x, new_w = exact_inputs(tokens, heads, depth, V, x.dtype, device, seed)
        source_x.copy_(new_x)
        source_w.copy_(new_w)

    check_cuda_graph(chain, fill, first_seed=60)


@pytest.mark.parametrize("tokens", [1, 33, 128, 700])
def test_pdl_changes_no_byte(tokens: int, device: torch.device) -> None:
    """And with it, whether weights are asked for early."""
    from vllm_fusion_plugin.kernels import pdl

    if not pdl.pdl_supported(device):
        pytest.skip("no programmatic dependent launch here")
    x, w = normal_inputs(tokens, 128, torch.bfloat16, device, seed=53)
    for weights in WEIGHTS:
        w = laid_out_weights(w, weights)
        assert_same_outputs(fused(x, w, Mode(), pdl=True), fused(x, w, Mode(), pdl=False), weights)


def test_compiles_once_for_all_numbers_of_tokens(device: torch.device) -> None:
    """Of one tile, that is: a server must not compile in the middle of a request."""

    def compiled() -> int:
        return sum(len(caches[0]) for caches in kernels._group_kernel.device_caches.values())

    w = exact_inputs(1, 128, L, V, torch.bfloat16, device, seed=54)[1]
    before = None
    for tokens in (17, 18, 24, 31, 32):
        x = torch.zeros(tokens, 128, L, dtype=torch.bfloat16, device=device)
        fused(x, w, Mode(scale_layout="column"))
        before = before or compiled()
        assert compiled() == before, f"{tokens} tokens"


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [Mode(), Mode(group_size=64, scale_layout="column")], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_sanitizer_op(tokens: int, mode: Mode, device: torch.device) -> None:
    """Plain allocations, unlike the guarded ones of the other tests: an access past their end is out of bounds."""
    x, w = exact_inputs(tokens, 3, 64, 128, mode.dtype, device, seed=55)
    x, w = laid_out_attn(x, "padded heads"), laid_out_weights(w, "output first")
    codes, scales = outputs(x, w, mode)
    mla_v_up_group_fp8_quant(x, w, codes, scales, mode.group_size)
    expected_codes, expected_scales = outputs(x, w, mode)
    mla_v_up_group_fp8_quant_reference(x, w, expected_codes, expected_scales, mode.group_size)
    assert_same_bytes(codes.cpu(), expected_codes.cpu(), "codes")
    check_columns(scales, expected_scales, mode.scale_layout == "tma")


def test_sanitizer_scales_as_vllm_allocates_them(device: torch.device) -> None:
    """Their storage ends with the last column's last row, where its padding would begin."""
    x, w = exact_inputs(5, 3, 64, 128, torch.bfloat16, device, seed=56)
    codes = torch.empty(5, 384, dtype=FP8_DTYPE, device=device)
    scales = torch.empty_strided((5, 3), (1, 8), device=device)
    expected_codes, expected_scales = outputs(x, w, Mode())
    mla_v_up_group_fp8_quant(x, w, codes, scales)
    mla_v_up_group_fp8_quant_reference(x, w, expected_codes, expected_scales)
    assert_same_bytes(codes, expected_codes, "codes")
    assert_same_bytes(scales.contiguous(), expected_scales.contiguous(), "scales")


def test_sanitizer_tiles(device: torch.device) -> None:
    """Tiles that tokens do not fill, every way through the kernel, both layouts of weights."""
    x, w = exact_inputs(19, 3, 64, 128, torch.bfloat16, device, seed=57)
    expected = outputs(x, w, Mode())
    mla_v_up_group_fp8_quant_reference(x, w, *expected)
    for tile, weights in itertools.product(
        (
            kernels.Tile(16, 128, 32, 3, 4, swap=True, tma=True),
            kernels.Tile(16, 128, 32, 3, 4, swap=False, tma=False),
            kernels.Tile(64, 128, 32, 2, 4, swap=False, tma=True, persistent=True),
        ),
        WEIGHTS,
    ):
        assert_same_outputs(fused(x, laid_out_weights(w, weights), Mode(), tile), expected, str(tile))
