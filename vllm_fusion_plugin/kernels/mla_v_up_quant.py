# SPDX-License-Identifier: Apache-2.0
"""MLA's value up-projection + FP8 quantiser: a batched GEMM whose tiles end in codes.

A tile is one head, some tokens, and columns that make whole groups: the group's scale needs all of its columns. Three
problems in one kernel, told apart by `Tile`:

- For few tokens the weights are nearly all the traffic and each is read once. What counts is how soon all of them are
  on their way: a program's pipeline holds all of a head's. `swap` puts the columns, not the tokens, where the tensor core
  has 64 rows. To ask L2 for them before the producer is waited for did not pay on an H200 (3.86 µs instead of 3.61 for one
  token of 16 heads). One token without the tensor core is a little faster (5.99 µs instead of 6.23 with 128 heads), but its
  sums are not cuBLAS's: 20 codes of a million.
- For more, tiles are as tall as it takes for all of them to run at once, since each reads its head's weights again, from L2.
- For yet more, programs are `persistent`: one that goes on to the next tile loads while it quantises.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import quant
from .backend import BACKEND
from .fp8 import FORMATS, OCP
from .launch import choose, launch
from .numerics import rounded
from .pdl import pdl_options, wait_for_producer
from .tiles import cdiv


@triton.jit
def _tile(
    first_token,
    unit,
    x_ptr,
    w_ptr,
    x_desc,
    w_desc,
    codes_ptr,
    scales_ptr,
    tokens,
    padded_tokens,
    padded_groups,
    x_token_stride,
    x_head_stride,
    x_stride,
    w_head_stride,
    w_row_stride,
    w_column_stride,
    codes_stride,
    scale_token_stride,
    scale_group_stride,
    eps,
    L: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
    QUANT: tl.constexpr,
):
    """The codes and scales of TILE.tokens tokens from `first_token` on, in the `unit`th TILE.columns columns."""
    head = unit // (V // TILE.columns)
    first_column = unit % (V // TILE.columns) * TILE.columns
    token = tl.arange(0, TILE.tokens)
    column = tl.arange(0, TILE.columns)
    live = first_token + token < tokens
    if not TILE.tma:
        x_ptr += tl.cast(head, tl.int64) * x_head_stride + tl.cast(first_token, tl.int64) * x_token_stride
        w_ptr += tl.cast(head, tl.int64) * w_head_stride + tl.cast(first_column, tl.int64) * w_column_stride
    if not TILE.tma:
        depth = tl.arange(0, TILE.depth).to(tl.int64)
        x_ptrs = x_ptr + token.to(tl.int64)[:, None] * x_token_stride + depth[None, :] * x_stride
        w_ptrs = w_ptr + depth[:, None] * w_row_stride + column.to(tl.int64)[None, :] * w_column_stride
    if TILE.swap:
        acc = tl.zeros((TILE.columns, TILE.tokens), tl.float32)
    else:
        acc = tl.zeros((TILE.tokens, TILE.columns), tl.float32)
    for k in tl.range(0, L, TILE.depth, num_stages=TILE.stages):
        if TILE.tma:
            # rows after the last token are zero
            x = tl.reshape(x_desc.load([head, first_token, k]), (TILE.tokens, TILE.depth))
            if TILE.w_rows:
                w = tl.reshape(w_desc.load([head, k, first_column]), (TILE.depth, TILE.columns))
            else:
                w = tl.trans(tl.reshape(w_desc.load([head, first_column, k]), (TILE.columns, TILE.depth)))
        else:
            x = tl.load(x_ptrs + tl.cast(k, tl.int64) * x_stride, mask=live[:, None], other=0.0)
            w = tl.load(w_ptrs + tl.cast(k, tl.int64) * w_row_stride)
        if TILE.swap:
            acc = tl.dot(tl.trans(w), tl.trans(x), acc)
        else:
            acc = tl.dot(x, w, acc)
    if TILE.swap:
        acc = tl.trans(acc)

    y = rounded(acc, x_ptr.dtype.element_ty)
    y = tl.reshape(y, (TILE.tokens, TILE.columns // QUANT.group_size, QUANT.group_size))
    scale, codes = quant.group(y, eps, QUANT)
    first_out = head * V + first_column
    row = first_token + token
    codes_ptrs = codes_ptr + row.to(tl.int64)[:, None] * codes_stride + first_out + column[None, :]
    tl.store(codes_ptrs, tl.reshape(codes, (TILE.tokens, TILE.columns)), mask=live[:, None])
    group = first_out // QUANT.group_size + tl.arange(0, TILE.columns // QUANT.group_size)
    scale_columns = quant.scale_columns(scales_ptr, group, scale_group_stride, QUANT)
    all_groups = group >= 0
    quant.store_scales(scale_columns, scale, row, tokens, all_groups, scale_token_stride, True, QUANT)
    # By every tile of tokens, though one would do: Triton 3.7 cannot flatten a loop with a branch in it.
    quant.zero_scale_padding(scale_columns, tokens, padded_tokens, group < padded_groups, scale_token_stride, QUANT)


# What changes with the number of tokens is not specialised on: a server would meet a new specialisation, and a second of
# compilation, in the middle of a request. Head-major inputs have a head stride of that kind; it stays a multiple of 16.
@triton.jit(do_not_specialize=["heads", "tokens", "padded_tokens", "padded_groups", "scale_group_stride"])
def _group_kernel(
    x_ptr,
    w_ptr,
    x_desc,
    w_desc,
    codes_ptr,
    scales_ptr,
    heads,
    tokens,
    padded_tokens,
    padded_groups,
    x_token_stride,
    x_head_stride,
    x_stride,
    w_head_stride,
    w_row_stride,
    w_column_stride,
    codes_stride,
    scale_token_stride,
    scale_group_stride,
    eps,
    L: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
    QUANT: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_producer(PDL)
    if TILE.persistent:
        token_tiles = tl.cdiv(tokens, TILE.tokens)
        tiles = token_tiles * heads * (V // TILE.columns)
        # a head's tiles of tokens at the same time, so that its weights are in L2
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=TILE.stages, flatten=True):
            _tile(
                tile % token_tiles * TILE.tokens, tile // token_tiles,
                x_ptr, w_ptr, x_desc, w_desc, codes_ptr, scales_ptr, tokens, padded_tokens, padded_groups,
                x_token_stride, x_head_stride, x_stride, w_head_stride, w_row_stride, w_column_stride,
                codes_stride, scale_token_stride, scale_group_stride, eps,
                L, V, TILE, QUANT,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0) * TILE.tokens, tl.program_id(1),
            x_ptr, w_ptr, x_desc, w_desc, codes_ptr, scales_ptr, tokens, padded_tokens, padded_groups,
            x_token_stride, x_head_stride, x_stride, w_head_stride, w_row_stride, w_column_stride,
            codes_stride, scale_token_stride, scale_group_stride, eps,
            L, V, TILE, QUANT,
        )  # fmt: skip


class Tile(NamedTuple):
    """How the work is cut. Sizes are powers of two; of columns and depth, the largest that divides the weights' is used."""

    tokens: int
    columns: int
    depth: int  # of the contraction, a pipeline stage
    stages: int
    num_warps: int
    swap: bool = False  # columns, not tokens, are the rows of the tensor core's tile
    tma: bool = True  # tensor descriptors instead of pointers, if the tensors lie so that there can be any
    persistent: bool = False


def group_tile(tokens: int, heads: int, width: int, group_size: int) -> Tile:
    """Tile for `tokens` tokens of `heads` heads of `width` columns.

    Measured on an H200 with 1 to 2048 tokens of 128 and of 16 heads; between them by how many programs there are for its 132
    multiprocessors.
    """
    columns = math.gcd(width, 128)
    if group_size == 64 and tokens <= 16 and heads * (width // columns) < 64:
        columns = 64  # more programs to load with
    units = heads * (width // columns)

    def programs(rows: int) -> int:
        return units * -(-tokens // rows)

    # no taller than it takes for one program, or two tiles one after the other, a multiprocessor
    rows = 16
    while rows < min(64, tokens) and programs(rows) > 132:
        rows *= 2
    if rows < 64:
        # 5 stages: all 4 of a model's 512 numbers at once. Of 64 numbers it would take 9, and longer to set them up.
        return Tile(rows, columns, 128, 5, 4, swap=True)
    if programs(64) <= 264 or tokens <= 64:
        return Tile(64, columns, 128, 4, 4, persistent=programs(64) > 132)
    if programs(128) <= 264:
        return Tile(128, columns, 64, 3, 8)  # two to a multiprocessor
    depth, stages = (128, 3) if tokens <= 1024 else (64, 6)  # 26.5 µs at 512 tokens of 128 heads, 86.8 at 2048
    return Tile(128, columns, depth, stages, 8, persistent=True)


class TileConstants(NamedTuple):
    """What the kernel is compiled for, of a tile and the tensors; TILE in it."""

    tokens: int
    columns: int
    depth: int
    stages: int
    swap: bool
    tma: bool
    persistent: bool
    w_rows: bool  # weights are contiguous along their columns, not along the contraction


class _Device(NamedTuple):
    multiprocessors: int
    shared_memory: int  # bytes, of a program
    has_tma: bool  # before Hopper, Triton turns descriptors into loads that it does not pipeline


@functools.cache
def _gpu(device: torch.device) -> _Device:
    if device.type != "cuda":
        return _Device(2, 2**20, True)  # Triton's interpreter: a persistent program still has more than one tile
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks what follows
    if BACKEND == "hip":  # where a block may have all of a compute unit's LDS
        return _Device(properties.multi_processor_count, properties.shared_memory_per_block, False)
    return _Device(properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.major >= 9)


def _describable(t: torch.Tensor) -> bool:
    """Whether TMA can read t [a, b, c]: contiguous along c, and everything else in steps of 16 bytes."""
    steps = (t.data_ptr(), *(stride * t.element_size() for stride in t.stride()[:2]))
    return t.stride(2) == 1 and all(step > 0 and step % 16 == 0 for step in steps)


def mla_v_up_group_fp8_quant(
    attn_out: torch.Tensor,
    w_uv: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    padding: tuple[int, int],
    group_size: int,
    use_ue8m0: bool,
    quant_rounding: str,
    tile: Tile | None = None,
    pdl: bool | None = None,
    fp8: str = OCP,
) -> None:
    """Write codes [M, N * V] and scales [M, N * V / group_size] of attn_out [M, N, L] times w_uv [N, L, V]; arguments as the
    op checked them. padding: up to which row, and in how many columns, scales end in zeros.
    """
    tokens, heads, depth = attn_out.shape
    width = w_uv.shape[2]
    if tokens == 0:
        return
    tile = tile or choose(group_tile, tokens, heads, width, group_size)
    columns = math.gcd(width, max(tile.columns, group_size))
    tile_depth = math.gcd(depth, tile.depth)
    gpu = _gpu(attn_out.device)
    # besides the stages: barriers, and codes on their way to another layout, unless a stage is free for them by then
    room = gpu.shared_memory - 1024 - (tile.tokens * columns if tile.persistent else 0)
    stages = max(2, min(tile.stages, room // (2 * tile_depth * (tile.tokens + columns))))
    units = heads * (width // columns)
    token_tiles = cdiv(tokens, tile.tokens)

    # vLLM's weights are contiguous along the columns or along the contraction, by how they were dequantised.
    w_rows = w_uv.stride(2) == 1
    x, w = attn_out.transpose(0, 1), w_uv if w_rows else w_uv.transpose(1, 2)
    if tokens == 1:  # its stride from token to token means nothing and may be anything
        x = x.as_strided(x.shape, (x.stride(0), depth, x.stride(2)), x.storage_offset())
    tma = tile.tma and gpu.has_tma and _describable(w) and _describable(x)
    descriptors: tuple[Any, Any] = (None, None)
    strides = (x.stride(1), x.stride(0), x.stride(2), *w_uv.stride())
    if tma:
        strides = (0,) * 6  # descriptors have them; Triton would compile for each of these
        w_block = [1, tile_depth, columns] if w_rows else [1, columns, tile_depth]
        descriptors = (
            TensorDescriptor.from_tensor(x, [1, tile.tokens, tile_depth]),
            TensorDescriptor.from_tensor(w, w_block),
        )
    launch(
        _group_kernel,
        (min(gpu.multiprocessors, units * token_tiles),) if tile.persistent else (token_tiles, units),
        attn_out.device,
        attn_out,
        w_uv,
        *descriptors,
        codes,
        scales,
        heads,
        tokens,
        *padding,
        *strides,
        codes.stride(0),
        *scales.stride(),
        quant.EPS,
        L=depth,
        V=width,
        TILE=TileConstants(tile.tokens, columns, tile_depth, stages, tile.swap, tma, tile.persistent, w_rows),
        QUANT=quant.QuantConstants("group", quant_rounding, group_size, use_ue8m0, fp8_max=FORMATS[fp8].max),
        num_warps=tile.num_warps,
        **pdl_options(attn_out.device, pdl),
    )
