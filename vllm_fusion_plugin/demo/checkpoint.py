# SPDX-License-Identifier: Apache-2.0
"""A small Qwen3 checkpoint with FP8 weights in 128x128 blocks, random but scaled so that every layer matters.

vLLM's own dummy weights are so small that the residual stream drowns every layer: with them even a broken fused op
gives the right tokens. Here each projection has about unit gain, so an error in one layer reaches the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BLOCK = 128
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max

# Every dimension that tensor parallelism cuts (heads, KV heads, intermediate) gives whole 128-blocks on 1 and 2 ranks.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 1024,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
}


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write config.json and model.safetensors into folder (made if missing); the same seed gives the same bytes."""
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate, head_dim = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    q_size, kv_size = CONFIG["num_attention_heads"] * head_dim, CONFIG["num_key_value_heads"] * head_dim
    tensors: dict[str, torch.Tensor] = {}

    def randn(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    def linear(name: str, n: int, k: int) -> None:
        # Gain 1.5: silu(gate) * up and attention's averaging both shrink their input.
        blocks = randn(n, k, std=1.5 / k**0.5).view(n // BLOCK, BLOCK, k // BLOCK, BLOCK)
        scales = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
        tensors[f"{name}.weight"] = (blocks / scales[:, None, :, None]).view(n, k).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale_inv"] = scales

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = (1.0 + randn(size, std=0.1)).bfloat16()

    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm", hidden)
        linear(f"{layer}.self_attn.q_proj", q_size, hidden)
        linear(f"{layer}.self_attn.k_proj", kv_size, hidden)
        linear(f"{layer}.self_attn.v_proj", kv_size, hidden)
        linear(f"{layer}.self_attn.o_proj", hidden, q_size)
        norm(f"{layer}.self_attn.q_norm", head_dim)
        norm(f"{layer}.self_attn.k_norm", head_dim)
        norm(f"{layer}.post_attention_layernorm", hidden)
        linear(f"{layer}.mlp.gate_proj", intermediate, hidden)
        linear(f"{layer}.mlp.up_proj", intermediate, hidden)
        linear(f"{layer}.mlp.down_proj", hidden, intermediate)
    norm("model.norm", hidden)
    # Embeddings smaller than a layer's output, so that the residual stream is not just the input token.
    tensors["model.embed_tokens.weight"] = randn(CONFIG["vocab_size"], hidden, std=0.5).bfloat16()
    tensors["lm_head.weight"] = randn(CONFIG["vocab_size"], hidden, std=3.0 / hidden**0.5).bfloat16()

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    return folder
