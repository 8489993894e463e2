# SPDX-License-Identifier: Apache-2.0
"""SiLU·mul + FP8 on a GPU: the bytes of vLLM's own unfused ops, over all inputs and over many random ones.

VFP_EXHAUSTIVE_ELEMENTS sets how many output elements each mode gets at random (default 2**30). The tests with `sanitizer` in
their names are few small launches, for
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m pytest tests/kernels -k sanitizer
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from vllm_fusion_plugin.kernels import silu_mul_quant as kernels
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, empty_token_scales
from vllm_fusion_plugin.ops.silu_mul_quant import (
    silu_mul_group_fp8_quant,
    silu_mul_group_fp8_quant_reference,
    silu_mul_static_fp8_quant,
    silu_mul_static_fp8_quant_reference,
    silu_mul_token_fp8_quant,
    silu_mul_token_fp8_quant_reference,
)

from .cases import (
    DTYPES,
    TMA,
    GroupMode,
    StaticMode,
    TokenMode,
    all_values,
    group_modes,
    random_input,
    short,
    special_values,
    static_modes,
    strided,
)
from .checks import (
    EDGE,
    ENDS,
    assert_same_bytes,
    assert_same_outputs,
    check_columns,
    check_cuda_graph_of_group_op,
    check_ends,
    check_pdl_switch,
    code_steps,
    count_differing,
    native_quantiser,
    one_nan,
    vllms_group_quant,
)
from .installed import NATIVE, OPAQUE

pytestmark = pytest.mark.gpu

ELEMENTS = int(os.environ.get("VFP_EXHAUSTIVE_ELEMENTS", 2**30))
CHUNK = (8192, 12288)  # rows and output width, so that one chunk is 1e8 elements
UPS = 200
STATIC_SCALES = (1.0, 0.0123, 3e-5, 700.0)

DEEPSEEK = GroupMode(torch.bfloat16, 128, "tma", False, "custom_op", OPAQUE)
GROUP_MODES = group_modes(quant_roundings=(OPAQUE,))
STATIC_MODES = static_modes(quant_roundings=("custom_op",))
TOKEN_MODES = STATIC_MODES
BOUNDS = (None, 0.8, 1e-9)


# ---- what vLLM computes ----------------------------------------------------------------------------------------------


class Unfused:
    """vLLM's pair of ops. With act_rounding="native" the first of them is Inductor's kernel, which stores in x's dtype."""

    def __init__(self) -> None:
        import vllm._custom_ops  # noqa: F401  (loads the extension that defines torch.ops._C)

        self.ops = torch.ops._C
        self.native = torch.compile(forward_native, dynamic=True)

    def activation(self, x: torch.Tensor, act_rounding: str) -> torch.Tensor:
        if act_rounding == "native":
            return self.native(x)
        y = x.new_empty((x.shape[0], x.shape[1] // 2))
        self.ops.silu_and_mul(y, x)
        return y

    def group(self, x: torch.Tensor, mode: GroupMode) -> tuple[torch.Tensor, torch.Tensor]:
        return vllms_group_quant(self.activation(x, mode.act_rounding), mode)

    def token(
        self, x: torch.Tensor, scale_ub: torch.Tensor | None, mode: TokenMode
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.activation(x, mode.act_rounding)
        codes, scales = torch.empty_like(y, dtype=FP8_DTYPE), empty_token_scales(y)
        self.ops.dynamic_per_token_scaled_fp8_quant(codes, y, scales, scale_ub)
        return codes, scales

    def static(self, x: torch.Tensor, scale: torch.Tensor, mode: StaticMode) -> torch.Tensor:
        y = self.activation(x, mode.act_rounding)
        codes = torch.empty_like(y, dtype=FP8_DTYPE)
        self.ops.static_scaled_fp8_quant(codes, y, scale)
        return codes


def forward_native(x: torch.Tensor) -> torch.Tensor:
    """The expression of vLLM's SiluAndMul.forward_native."""
    width = x.shape[-1] // 2
    return F.silu(x[..., :width]) * x[..., width:]


@pytest.fixture(scope="module")
def unfused() -> Unfused:
    pytest.importorskip("vllm")
    return Unfused()


def check_group(x: torch.Tensor, mode: GroupMode, unfused: Unfused, what: str) -> None:
    assert_same_outputs(silu_mul_group_fp8_quant(x, **mode.arguments()), unfused.group(x, mode), what)


def check_act(act: torch.Tensor, x: torch.Tensor, act_rounding: str, unfused: Unfused) -> None:
    """Rows that are kept are those of vLLM's SiLU·mul."""
    assert_same_bytes(one_nan(act), one_nan(unfused.activation(x, act_rounding)), f"act, {act_rounding}")


def check_token(x: torch.Tensor, bound: float | None, mode: TokenMode, unfused: Unfused, what: str) -> None:
    scale_ub = None if bound is None else torch.tensor([bound], device=x.device)
    outputs = silu_mul_token_fp8_quant(x, scale_ub, act_rounding=mode.act_rounding, quant_rounding=mode.quant_rounding)
    expected = unfused.token(x.contiguous(), scale_ub, mode)
    assert_same_outputs(outputs, expected, f"{what}, {mode}, scale_ub {bound}")


# ---- all inputs ------------------------------------------------------------------------------------------------------


def ups(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaN, ±Inf, ±0, subnormals, maxima, and bit patterns at random up to 200."""
    special = special_values(dtype).to(device)
    generator = torch.Generator(device=device).manual_seed(12)
    bits = torch.randint(-32768, 32768, (UPS - len(special),), dtype=torch.int16, generator=generator, device=device)
    return torch.cat([special, bits.view(dtype)])


def all_gates_by_ups(dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """All 65536 gates times all ups, in three arrangements, since a group's codes tell little next to one huge element.

    In the order of the bit patterns a group of 128 bf16 gates has one exponent and all its mantissas; every 512th pattern,
    all exponents; shuffled, anything, and there the ups change along a row too.
    """
    gates, table = all_values(dtype, device), ups(dtype, device)
    generator = torch.Generator(device=device).manual_seed(13)
    shuffled = gates[torch.randperm(65536, generator=generator, device=device)]
    row = torch.arange(UPS, device=device)[:, None]
    column = torch.arange(65536, device=device)[None, :]
    constant, changing = table[row].expand(UPS, 65536), table[(row + column // 7) % UPS]

    def halves(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.cat([gate.expand(UPS, 65536), up], dim=1)

    return {
        "one exponent a group": halves(gates, constant),
        "all exponents in a group": halves(gates.view(128, 512).t().reshape(-1), constant),
        "shuffled": halves(shuffled, changing),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_group_all_gates(dtype: torch.dtype, unfused: Unfused, device: torch.device) -> None:
    for what, x in all_gates_by_ups(dtype, device).items():
        for mode in GROUP_MODES:
            if mode.dtype == dtype:
                check_group(x, mode, unfused, f"{what}, {mode}")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_kept_act_of_all_gates(dtype: torch.dtype, unfused: Unfused, device: torch.device) -> None:
    for x in all_gates_by_ups(dtype, device).values():
        for act_rounding in ("native", "custom_op"):
            mode = DEEPSEEK._replace(dtype=dtype, act_rounding=act_rounding)
            *outputs, act = silu_mul_group_fp8_quant(x, **mode.arguments(), keep_act=True)
            assert_same_outputs(outputs, unfused.group(x, mode), str(mode))
            check_act(act, x, act_rounding, unfused)
            rows = torch.cat([half.reshape(-1, 128) for half in x.chunk(2, dim=1)], dim=1)
            *outputs, act = silu_mul_token_fp8_quant(rows, act_rounding=act_rounding, keep_act=True)
            assert_same_outputs(outputs, unfused.token(rows, None, TokenMode(dtype, act_rounding, "custom_op")))
            check_act(act, rows, act_rounding, unfused)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_token_all_gates(dtype: torch.dtype, unfused: Unfused, device: torch.device) -> None:
    """In rows as long as a group is above, for the same reason."""
    for what, x in all_gates_by_ups(dtype, device).items():
        rows = torch.cat([half.reshape(-1, 128) for half in x.chunk(2, dim=1)], dim=1)
        for mode in TOKEN_MODES:
            for bound in BOUNDS if mode.dtype == dtype else ():
                check_token(rows, bound, mode, unfused, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_static_all_gates(dtype: torch.dtype, unfused: Unfused, device: torch.device) -> None:
    for what, x in all_gates_by_ups(dtype, device).items():
        for mode in STATIC_MODES:
            for scale in STATIC_SCALES if mode.dtype == dtype else ():
                scales = torch.tensor([scale], device=device)
                codes = silu_mul_static_fp8_quant(
                    x, scales, act_rounding=mode.act_rounding, quant_rounding=mode.quant_rounding
                )
                assert_same_bytes(codes, unfused.static(x, scales, mode), f"{what}, {mode}, scale {scale}")


# ---- many random inputs ----------------------------------------------------------------------------------------------


def chunks(dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[tuple[int, torch.Tensor]]:
    """At least ELEMENTS output elements; every fourth chunk is of random bit patterns, the others of activations' sizes."""
    done = 0
    while done < ELEMENTS:
        number = done // (CHUNK[0] * CHUNK[1])
        kind = "bits" if number % 4 == 3 else "normal"
        yield number, random_input(*CHUNK, dtype, device, seed=1000 * seed + number, kind=kind)
        done += CHUNK[0] * CHUNK[1]


@pytest.mark.parametrize("mode", GROUP_MODES, ids=str)
def test_group_random(mode: GroupMode, unfused: Unfused, device: torch.device) -> None:
    for number, x in chunks(mode.dtype, device, seed=1 + GROUP_MODES.index(mode)):
        check_group(x, mode, unfused, f"chunk {number}")


@pytest.mark.parametrize("mode", TOKEN_MODES, ids=str)
def test_token_random(mode: TokenMode, unfused: Unfused, device: torch.device) -> None:
    for number, x in chunks(mode.dtype, device, seed=50 + TOKEN_MODES.index(mode)):
        check_token(x, BOUNDS[number % len(BOUNDS)], mode, unfused, f"chunk {number}")


@pytest.mark.parametrize("mode", STATIC_MODES, ids=str)
def test_static_random(mode: StaticMode, unfused: Unfused, device: torch.device) -> None:
    for number, x in chunks(mode.dtype, device, seed=100 + STATIC_MODES.index(mode)):
        scale = torch.tensor([STATIC_SCALES[number % len(STATIC_SCALES)]], device=device)
        codes = silu_mul_static_fp8_quant(x, scale, act_rounding=mode.act_rounding, quant_rounding=mode.quant_rounding)
        assert_same_bytes(codes, unfused.static(x, scale, mode), f"chunk {number}")


# Decode and prefill sizes, and widths of models: Qwen3-8B, DeepSeek-V3 (dense and expert), and both sharded by 8.
@pytest.mark.parametrize("width", [256, 1536, 2048, 2304, 12288, 18432])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 64, 127, 1000])
def test_group_model_shapes(rows: int, width: int, unfused: Unfused, device: torch.device) -> None:
    x = random_input(rows, width, torch.bfloat16, device, seed=rows)
    # two modes, since every pair of a mode and a tile is one more kernel to compile
    for mode in (DEEPSEEK, DEEPSEEK._replace(group_size=64, scale_layout="column", act_rounding="native")):
        check_group(x, mode, unfused, str(mode))
    # vLLM's silu_and_mul wants contiguous rows: the strided ones must give what the contiguous ones do
    outputs = silu_mul_group_fp8_quant(strided(x), **DEEPSEEK.arguments())
    assert_same_outputs(outputs, unfused.group(x, DEEPSEEK), "strided")


# Odd ones, and those of models: Llama-3.1-8B and -70B whole and sharded, Qwen3-0.6B, GLM-4.5-Air
@pytest.mark.parametrize("width", [1, 7, 200, 1792, 3072, 10944, 14336, 28672, 32768])
@pytest.mark.parametrize("rows", [1, 2, 17, 127, 1000])
def test_token_model_shapes(rows: int, width: int, unfused: Unfused, device: torch.device) -> None:
    x = random_input(rows, width, torch.bfloat16, device, seed=rows)
    for mode in (TokenMode(x.dtype, "custom_op", "custom_op"), TokenMode(x.dtype, "native", "custom_op")):
        check_token(x, None, mode, unfused, "contiguous")
        check_token(strided(x), None, mode, unfused, "strided")


# ---- native quantisers -----------------------------------------------------------------------------------------------


def inductors(quantise: Callable, mode: GroupMode | StaticMode, unfused: Unfused) -> Callable:
    """vLLM's native quantiser as Inductor compiles it, after the SiLU·mul of the mode (in the same kernel if native)."""
    torch._dynamo.reset()  # each mode compiles the same functions anew; after eight times torch would not compile them
    if mode.act_rounding == "native":
        return torch.compile(lambda x, *scale: quantise(forward_native(x), *scale))
    compiled = torch.compile(quantise)
    return lambda x, *scale: compiled(unfused.activation(x, "custom_op"), *scale)


def assert_one_step_at_most(codes: torch.Tensor, expected: torch.Tensor) -> None:
    """Inductor divides approximately (`div.full.f32`, 2 ulp), the fused op exactly: see ops/silu_mul_quant.py."""
    steps = code_steps(codes, expected)
    assert int(steps.max()) <= 1
    differing = count_differing(codes, expected)
    assert differing <= codes.numel() * 1e-3, f"{differing} of {codes.numel()} codes differ"


@pytest.mark.parametrize(
    "mode",
    # a compilation by Inductor each; its quantiser's layouts are views, and its arithmetic has no group size
    [mode for mode in group_modes(quant_roundings=(NATIVE,)) if mode.scale_layout == "row" and mode.group_size == 128],
    ids=str,
)
def test_group_native_quant(mode: GroupMode, unfused: Unfused, device: torch.device) -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    quantise = native_quantiser(static=False, group_shape=GroupShape(1, mode.group_size), use_ue8m0=mode.use_ue8m0)
    x = random_input(1024, 4096, mode.dtype, device, seed=14)
    codes, scales = silu_mul_group_fp8_quant(x, **mode.arguments())
    expected_codes, expected_scales = inductors(quantise, mode, unfused)(x)
    assert_same_bytes(scales, expected_scales.contiguous(), "scales")
    assert_one_step_at_most(codes, expected_codes)


@pytest.mark.parametrize("width", [512, 3072, 14336, 28672])
@pytest.mark.parametrize("mode", static_modes(quant_roundings=("native",)), ids=str)
def test_token_native_quant(mode: TokenMode, width: int, unfused: Unfused, device: torch.device) -> None:
    """Byte for byte: a maximum is the same in any order, and the rest are the instructions of Inductor's kernel."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    layer = native_quantiser(static=False, group_shape=GroupShape.PER_TOKEN)
    expected = inductors(lambda y, *scale_ub: layer(y, None, *scale_ub), mode, unfused)
    x = random_input(1024, width, mode.dtype, device, seed=15)
    rounding = {"act_rounding": mode.act_rounding, "quant_rounding": mode.quant_rounding}
    for bound in BOUNDS[:2]:
        scale_ub = [] if bound is None else [torch.tensor([bound], device=device)]
        outputs = silu_mul_token_fp8_quant(x, *scale_ub, **rounding)
        assert_same_outputs(outputs, expected(x, *scale_ub), f"scale_ub {bound}")


@pytest.mark.parametrize("mode", static_modes(quant_roundings=("native",)), ids=str)
def test_static_native_quant(mode: StaticMode, unfused: Unfused, device: torch.device) -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    quantise = native_quantiser(static=True, group_shape=GroupShape.PER_TENSOR)
    x = random_input(1024, 4096, mode.dtype, device, seed=15)
    expected = inductors(quantise, mode, unfused)
    for scale in STATIC_SCALES:
        scales = torch.tensor([scale], device=device)
        codes = silu_mul_static_fp8_quant(x, scales, act_rounding=mode.act_rounding, quant_rounding=mode.quant_rounding)
        assert_one_step_at_most(codes, expected(x, scales)[0])


# ---- sizes, streams and graphs ---------------------------------------------------------------------------------------


def zeros_but_for_ends(device: torch.device, seeds: tuple[int, int]) -> torch.Tensor:
    """11 GB."""
    width = 12288
    x = torch.zeros(2**31 // width + EDGE, 2 * width, dtype=torch.bfloat16, device=device)
    for end, seed in zip(ENDS, seeds, strict=True):
        x[end] = random_input(EDGE, width, x.dtype, device, seed)
    return x


def test_group_more_than_two_to_the_31_elements(unfused: Unfused, device: torch.device) -> None:
    x = zeros_but_for_ends(device, seeds=(16, 17))
    for mode in (DEEPSEEK, DEEPSEEK._replace(scale_layout="row")):
        check_ends(silu_mul_group_fp8_quant(x, **mode.arguments()), [unfused.group(x[end], mode) for end in ENDS])


def test_token_more_than_two_to_the_31_elements(unfused: Unfused, device: torch.device) -> None:
    x = zeros_but_for_ends(device, seeds=(18, 19))
    mode = TokenMode(x.dtype, "custom_op", "custom_op")
    check_ends(silu_mul_token_fp8_quant(x), [unfused.token(x[end], None, mode) for end in ENDS])


def test_static_more_than_two_to_the_31_elements(unfused: Unfused, device: torch.device) -> None:
    x = zeros_but_for_ends(device, seeds=(18, 19))
    scale, mode = torch.tensor([0.0123], device=device), StaticMode(x.dtype, "custom_op", "custom_op")
    codes = silu_mul_static_fp8_quant(x, scale)
    check_ends([codes], [[unfused.static(x[end], scale, mode)] for end in ENDS])


def test_chain_in_a_cuda_graph(device: torch.device) -> None:
    check_cuda_graph_of_group_op(
        lambda x: silu_mul_group_fp8_quant(x, **DEEPSEEK.arguments()),
        lambda seed: random_input(512, 8192, torch.bfloat16, device, seed),
        links=3,
        first_seed=20,
    )


def test_pdl_switch_changes_no_byte(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    x = random_input(33, 1536, torch.bfloat16, device, seed=42)
    check_pdl_switch(lambda: silu_mul_group_fp8_quant(x, **DEEPSEEK.arguments()), x.device, monkeypatch)
    check_pdl_switch(lambda: silu_mul_token_fp8_quant(x), x.device, monkeypatch)


def test_token_chain_in_a_cuda_graph(device: torch.device) -> None:
    check_cuda_graph_of_group_op(
        silu_mul_token_fp8_quant,
        lambda seed: random_input(512, 8192, torch.bfloat16, device, seed),
        links=3,
        first_seed=60,
    )


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [DEEPSEEK, DEEPSEEK._replace(scale_layout="column", group_size=64)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_sanitizer_group(rows: int, mode: GroupMode, device: torch.device) -> None:
    """The op's own allocations, unlike the guarded ones of the other tests: an access past their end is out of bounds."""
    x = strided(random_input(rows, 3 * 128, mode.dtype, device, seed=44))
    codes, scales = silu_mul_group_fp8_quant(x, **mode.arguments())
    expected_codes, expected_scales = silu_mul_group_fp8_quant_reference(x, **mode.arguments())
    assert_same_bytes(codes.cpu(), expected_codes.cpu(), "codes")
    check_columns(scales, expected_scales, mode.scale_layout in ("tma", "packed"))


@pytest.mark.parametrize("rows, width", [(1, 512), (3, 700), (17, 2048), (2, 14336)])
def test_sanitizer_token(rows: int, width: int, device: torch.device) -> None:
    x = strided(random_input(rows, width, torch.float16, device, seed=47))
    expected = silu_mul_token_fp8_quant_reference(x)
    assert_same_outputs([t.cpu() for t in silu_mul_token_fp8_quant(x)], [t.cpu() for t in expected])


@pytest.mark.parametrize("rows, width", [(1, 512), (3, 700), (17, 2048)])
def test_sanitizer_static(rows: int, width: int, device: torch.device) -> None:
    x = random_input(rows, width, torch.float16, device, seed=45)
    scale = torch.tensor([0.0123], device=device)
    expected = silu_mul_static_fp8_quant_reference(x, scale)
    assert_same_bytes(silu_mul_static_fp8_quant(x, scale).cpu(), expected.cpu(), "codes")


def test_sanitizer_tiles(device: torch.device) -> None:
    """Tiles that rows and groups do not fill, each tile shape forced rather than chosen."""
    x = random_input(5, 3 * 128, torch.bfloat16, device, seed=46)
    expected = silu_mul_group_fp8_quant_reference(x, **DEEPSEEK.arguments())
    for tile in (kernels.Tile(1, 4, 1), kernels.Tile(2, 2, 2), kernels.Tile(8, 1, 4)):
        codes = torch.empty_like(expected[0])
        scales = TMA.empty(x, 5, 3 * 128)
        kernels.silu_mul_group_fp8_quant(
            x, codes, scales, 128, False, DEEPSEEK.act_rounding, DEEPSEEK.quant_rounding, tile=tile
        )
        assert_same_outputs((codes, scales), expected, str(tile))
