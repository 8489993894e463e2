# SPDX-License-Identifier: Apache-2.0
"""A layer of vLLM's MLAAttention class with nothing in it but what forward_impl needs, and calls of that as vLLM's op makes
them. Only the attention kernels are stood in for: they give what they hold. All the rest is vLLM's code."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.platforms import current_platform

from vllm_fusion_plugin import report
from vllm_fusion_plugin.layers import mla_v_up_quant
from vllm_fusion_plugin.ops.quant import FP8_DTYPE, padded_rows

HEADS, LATENT, NOPE, ROPE, V = 3, 64, 32, 16, 128
WIDTH = HEADS * V
LAYOUTS = {"row": (False, False), "column": (True, False), "tma": (True, True)}
# rows in all, of these not padding, of these decoded
BATCHES = {
    "decode": (5, 5, 5),
    "one-token": (1, 1, 1),
    "prefill": (6, 6, 0),
    "mixed": (7, 7, 3),
    "decode-padded": (8, 5, 5),
    "prefill-padded": (9, 6, 0),
    "mixed-padded": (10, 7, 2),
    "nothing-but-padding": (3, 0, 0),
}


class Impl:
    """Gives what it holds for attention, latent rows where vLLM decodes and finished ones where it prefills."""

    dcp_world_size, is_sparse, supports_quant_query_input = 1, False, False

    def __init__(self, latent: torch.Tensor, prefilled: torch.Tensor) -> None:
        self.latent, self.prefilled = latent, prefilled

    def reserve_workspace(self):
        """Asked for while profiling, since 0.33."""

    def forward_mqa(self, q, kv_cache, attn_metadata, layer):
        return self.latent[: len(q[0])], None

    def forward_mha(self, q, k_c, k_pe, kv_cache, attn_metadata, k_scale, output, output_scale=None):
        output.copy_(self.prefilled[: len(q)])


def make_layer(dtype=torch.bfloat16, of=MLAAttention, device="cpu"):
    """Whole numbers, so that sums are exact in any order and no product of matrices differs from another."""
    torch.manual_seed(0)
    layer = of.__new__(of)
    torch.nn.Module.__init__(layer)
    layer.num_heads, layer.v_head_dim, layer.kv_lora_rank = HEADS, V, LATENT
    layer.qk_nope_head_dim, layer.qk_rope_head_dim = NOPE, ROPE
    layer.W_UK_T = torch.zeros(HEADS, NOPE, LATENT, dtype=dtype, device=device)
    layer.W_UV = torch.randint(-3, 4, (HEADS, LATENT, V)).to(device, dtype)
    latent = torch.randint(-8, 9, (16, HEADS, LATENT)).to(device, dtype)
    prefilled = (torch.randn(16, WIDTH) * torch.randn(16, 1).exp()).to(device, dtype)
    layer.impl = Impl(latent, prefilled)
    layer.kv_cache_dtype, layer._k_scale = "auto", torch.ones(())
    layer._chunked_prefill_workspace_size = 1
    layer.q_pad_num_heads = layer.prefill_backend = layer.dcp_manager = None
    layer.use_pcp = layer.is_amx_bmm_enabled = False
    layer.is_aiter_triton_fp4_bmm_enabled = layer.is_aiter_triton_fp8_bmm_enabled = False
    return layer


def metadata(actual: int, decoded: int):
    return SimpleNamespace(
        num_actual_tokens=actual,
        num_decode_tokens=decoded,
        num_decodes=decoded,
        num_prefills=int(decoded < actual),
        decode=SimpleNamespace(seq_lens=None),
        prefill=None,
    )


def buffers(rows: int, group_size: int, layout: str, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """As vLLM's graph has them, filled with what no result may keep: codes are NaN, scales -1."""
    codes = torch.full((rows, WIDTH), 0x7F, dtype=torch.uint8, device=device).view(FP8_DTYPE)
    column_major, tma_aligned = LAYOUTS[layout]
    groups = WIDTH // group_size
    stride = padded_rows(rows) if tma_aligned else rows
    strides = (1, stride) if column_major else (groups, 1)
    scales = torch.empty_strided((rows, groups), strides, dtype=torch.float32, device=device)
    everything(scales).fill_(-1)
    return codes, scales


def everything(scales: torch.Tensor) -> torch.Tensor:
    """A tensor's storage, padding included."""
    return scales.as_strided((scales.untyped_storage().nbytes() // 4,), (1,), 0)


def attend(layer, batch: str, codes, scales, group_size=128, layout="row", ue8m0=False, output_scale=None) -> None:
    """forward_impl into these buffers."""
    rows, actual, decoded = BATCHES[batch]
    q = layer.W_UV.new_zeros(rows, layer.num_heads, NOPE + ROPE)
    result = layer.forward_impl(
        q,
        q.new_zeros(rows, LATENT),
        q.new_zeros(rows, 1, ROPE),
        q.new_zeros(0),
        metadata(actual, decoded),
        output=codes,
        output_scale=output_scale,
        output_block_scale=scales,
        quant_group_size=group_size,
        quant_scale_ue8m0=ue8m0,
        quant_col_major=LAYOUTS[layout][0],
        quant_tma_aligned=LAYOUTS[layout][1],
    )
    assert result.data_ptr() == codes.data_ptr()


def run(layer, batch: str, group_size=128, layout="row", ue8m0=False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, as bytes, and scales in buffers of their own."""
    codes, scales = buffers(BATCHES[batch][0], group_size, layout, layer.W_UV.device)
    attend(layer, batch, codes, scales, group_size, layout, ue8m0)
    return codes.view(torch.uint8), scales


def by_vllm(*args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """The same without the fused V up-projection."""
    mla_v_up_quant._enabled, was = False, mla_v_up_quant._enabled
    try:
        return run(*args, **kwargs)
    finally:
        mla_v_up_quant._enabled = was


def hook(monkeypatch) -> None:
    """Put the fused V up-projection in place, as the plugin does, and take it out after the test."""
    for name in ("forward_impl", "_v_up_proj"):
        monkeypatch.setattr(MLAAttention, name, getattr(MLAAttention, name))
    monkeypatch.setattr(report.RECORDER, "report", report.RankReport())
    monkeypatch.setattr(mla_v_up_quant, "_noted", set())
    monkeypatch.setattr(mla_v_up_quant, "_enabled", False)
    monkeypatch.setattr(type(current_platform), "opaque_attention_op", classmethod(lambda cls: True))
    mla_v_up_quant.install()
    assert mla_v_up_quant._enabled, report.RECORDER.report.notes
