# SPDX-License-Identifier: Apache-2.0
"""MLA layers whose output is FP8 in groups write it straight from the V up-projection.

What: two methods of vLLM's MLAAttention are wrapped. While `forward_impl` computes such an output, `_v_up_proj`, its last
step for decode rows, writes codes and scales itself (ops/mla_v_up_quant.py) instead of rows in the model's dtype.

Why: MLAAttention has all rows in a temporary buffer in the model's dtype, and quantises that with a kernel of its own. For
decode rows the buffer is written and read for nothing. No graph pass reaches it: all this is inside one op, and the op
keeps its name, its schema and its place in the graph.

Since: in every version read (0.20.2, 0.26.0, 0.32.0, 0.33.0) `forward_impl` takes output_block_scale and quant_*, and calls
`_v_up_proj(x, out=...)` once. Until: vLLM's V up-projection can quantise.

Rows are treated by where they come from. Decode rows are up-projected and quantised in one kernel. Prefill rows come from
the prefill kernel as before and are quantised by vLLM's op. The rows after them, which pad a batch to a CUDA graph's size,
and the padding of TMA-aligned scales become zeros, where vLLM leaves what was there. Anything that this is not made for
takes vLLM's way, and the report notes why.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .. import compat, report, roundings
from ..ops import calls, registry
from ..ops.mla_v_up_quant import mla_v_up_group_fp8_quant
from ..ops.quant import (
    EPS,
    FP8_DTYPE,
    FP8_MAX,
    GROUP_SIZES,
    INPUT_DTYPES,
    GroupScales,
    group_fp8_quant_reference,
    padded_rows,
)

logger = logging.getLogger("vllm.fusion_plugin")

MODULE = "vllm.model_executor.layers.attention.mla_attention"
NOTE = "MLA's V up-projection"

_enabled = False
_noted: set[str] = set()
# What `_v_up_proj` is to write, while `forward_impl` runs on this thread.
_running = threading.local()


def install() -> None:
    """Wrap vLLM's methods. Each engine's record says whether its layers write FP8 themselves (`mla_v_up_quant`). Re-entrant.

    Does nothing before the process has imported vLLM's MLA layers, so that those that have none need not wait for it. It
    has to be called again when the model is there: vLLM hashes its config then, which is where the plugin calls it.
    """
    global _enabled
    _enabled = MODULE in sys.modules
    if not _enabled:
        return
    try:
        reason = _install(sys.modules[MODULE].MLAAttention)
    except Exception as e:  # must never stop vLLM
        reason = f"{type(e).__name__}: {e}"
    if reason:
        _switch_off(reason)


def _switch_off(reason: str, layer: Any = None) -> None:
    global _enabled
    _enabled = False
    _note(reason, layer)


def _note(reason: str, layer: Any = None) -> None:
    """Tell once that, and why, the V up-projection and the quantiser stay two kernels; the layer's engine reports it."""
    if reason not in _noted:
        _noted.add(reason)
        logger.warning("vllm-fusion-plugin: %s does not quantise: %s", NOTE, reason)
    _record_of(layer).note(f"{NOTE} does not quantise: {reason}")


def _record_of(layer: Any) -> report.EngineRecord | report.Recorder:
    """Where to note what concerns a layer: its engine's record, looked for once; without a layer, or one of no engine, the
    engine that was last spoken of."""
    kept = vars(layer).get("_fusion_plugin_record") if layer is not None else None
    if kept is None and layer is not None:
        kept = report.RECORDER.engine_where(lambda owner: compat.is_layer_of(owner, layer))
        vars(layer)["_fusion_plugin_record"] = kept  # not setattr, which would look for parameters
    return kept or report.RECORDER


def _wanted(layer: Any) -> bool:
    """Whether the layer's engine wants it; a layer of no engine does."""
    return getattr(_record_of(layer), "mla_v_up_quant", True)


# ---- wrapping --------------------------------------------------------------------------------------------------------


def _install(layer: type) -> str | None:
    """Wrap the methods of MLAAttention, once; the reason if they are not what they are known to be."""
    from vllm.platforms import current_platform

    forward_impl, v_up_proj = layer.forward_impl, layer._v_up_proj  # type: ignore[attr-defined]
    if hasattr(forward_impl, "_fusion_plugin"):
        return None
    if not current_platform.opaque_attention_op():
        return f"on {type(current_platform).__name__}, attention is no op of its own but traced by the compiler"
    needed = {"attn_metadata", "output", "output_scale", "output_block_scale", "quant_group_size", "quant_scale_ue8m0"}
    if missing := needed - set(inspect.signature(forward_impl).parameters):
        return f"this vLLM's MLAAttention.forward_impl takes no {', '.join(sorted(missing))}"
    if list(inspect.signature(v_up_proj).parameters) != ["self", "x", "out"]:
        return f"this vLLM's MLAAttention._v_up_proj is _v_up_proj{inspect.signature(v_up_proj)}, not (self, x, out)"
    if (calls := inspect.getsource(forward_impl).count("._v_up_proj(")) != 1:
        return f"this vLLM's MLAAttention.forward_impl calls _v_up_proj {calls} times, not once"

    @functools.wraps(forward_impl)
    def forward_quantised(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not _enabled or kwargs.get("output_block_scale") is None or not _wanted(self):
            return forward_impl(self, *args, **kwargs)
        return _forward(forward_impl, self, *args, **kwargs)

    @functools.wraps(v_up_proj)
    def v_up_proj_quantised(self: Any, x: torch.Tensor, out: torch.Tensor) -> Any:
        output = getattr(_running, "output", None)
        if output is None or not output.write_decode_rows(self, x, out):
            return v_up_proj(self, x, out)

    forward_quantised._fusion_plugin = True  # type: ignore[attr-defined]
    layer.forward_impl, layer._v_up_proj = forward_quantised, v_up_proj_quantised  # type: ignore[attr-defined]
    return None


# ---- one call of forward_impl ----------------------------------------------------------------------------------------


class _Output:
    """Codes and scales that a layer is to write, and the buffer that its unquantised rows go to."""

    def __init__(
        self, layer: Any, dtype: torch.dtype, codes: torch.Tensor, scales: torch.Tensor, quant_arguments: dict[str, Any]
    ):
        self.layer = layer
        self.codes = codes
        self.scales = scales
        self.group_size: int = quant_arguments["quant_group_size"]
        self.use_ue8m0 = bool(quant_arguments.get("quant_scale_ue8m0"))
        self.layout = (bool(quant_arguments.get("quant_col_major")), bool(quant_arguments.get("quant_tma_aligned")))
        self.rows = codes.new_empty(codes.shape, dtype=dtype)
        self.decoded = 0
        """How many rows, from the first on, have their codes and scales."""

    def write_decode_rows(self, layer: Any, x: torch.Tensor, out: torch.Tensor) -> bool:
        """Up-project x into the first rows and quantise them; False if this is not the call that it is known to be, and then
        nothing is written that counts."""
        count = len(out)
        shape = (count, layer.num_heads, layer.kv_lora_rank)
        if layer is not self.layer or out.data_ptr() != self.rows.data_ptr() or x.numel() != torch.Size(shape).numel():
            _note("it is not called as it is known to be", layer)
            return False
        try:
            mla_v_up_group_fp8_quant(
                x.view(shape),
                layer.W_UV,
                self.codes[:count],
                self.scales[:count],
                self.group_size,
                use_ue8m0=self.use_ue8m0,
                quant_rounding=roundings.of(roundings.GROUP_QUANT).name,
            )
        except Exception as e:  # a Triton that cannot compile it, for example: vLLM's own way is still there
            _switch_off(f"{type(e).__name__}: {e}", layer)
            return False
        _record_of(layer).note(f"{NOTE} quantises decode rows")
        self.decoded = count
        return True

    def finish(self, count: int) -> None:
        """Quantise the rows up to `count` that have no codes yet, and zero those after them."""
        if self.decoded == len(self.codes):
            return  # the op has zeroed the scales' padding; decoding must not wait for one more kernel
        if self.decoded < count:
            some = slice(self.decoded, count)
            _quantise(
                self.rows[some], self.codes[some], self.scales[some], self.group_size, self.use_ue8m0, self.layout
            )
        if count < len(self.codes):
            self.codes[count:].zero_()
        zero_scales(self.scales, count)


def _forward(original: Callable[..., torch.Tensor], layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`forward_impl` with output_block_scale."""
    codes, scales = kwargs.get("output"), kwargs["output_block_scale"]
    if codes is None or codes.dtype != FP8_DTYPE or kwargs.get("output_scale") is not None or len(args) != 5:
        return original(layer, *args, **kwargs)  # NVFP4, or not called as vLLM's op calls it
    q, attn_metadata = args[0], args[4]
    if reason := why_not(layer, q, codes, scales, kwargs.get("quant_group_size")):
        _note(reason, layer)
        return original(layer, *args, **kwargs)
    if attn_metadata is None:  # profiling: vLLM zeroes the codes
        _remember(layer, q, codes, scales, kwargs)
        result = original(layer, *args, **kwargs)
        zero_scales(scales, 0)
        return result

    output = _Output(layer, q.dtype, codes, scales, kwargs)
    outer, _running.output = getattr(_running, "output", None), output
    try:
        original(layer, *args, **kwargs | {"output": output.rows, "output_block_scale": None})
    finally:
        _running.output = outer
    output.finish(attn_metadata.num_actual_tokens)
    return codes


def _remember(
    layer: Any, q: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, quant_arguments: dict[str, Any]
) -> None:
    """Tell the warm-up what will be called: vLLM may run no decode step before it serves."""
    if not calls.recording() or not len(codes):
        return
    attn_out = q.new_empty((1, layer.num_heads, layer.kv_lora_rank))
    rounding = roundings.of(roundings.GROUP_QUANT).name
    arguments = (
        layer.W_UV,
        codes[:1],
        scales[:1],
        quant_arguments["quant_group_size"],
        bool(quant_arguments.get("quant_scale_ue8m0")),
        rounding,
    )
    calls.remember(registry.SIGNATURES["mla_v_up_group_fp8_quant"], (attn_out, *arguments))


def why_not(
    layer: Any, q: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int | None
) -> str | None:
    """Why a layer's output is left to vLLM; None if it is written here. Asked at every call: what does not change between
    calls is kept with the layer, for as long as it has the same weights. They are held weakly: 1 GB in all of DeepSeek-V3,
    which a replaced weight must give back at once."""
    weight = getattr(layer, "W_UV", None)
    known = (q.dtype, q.device, group_size)
    held, *others, reason = vars(layer).get("_fusion_plugin_v_up", (None, None))
    if weight is None or held is None or held() is not weight or (*others,) != known:
        reason = _why_not(layer, weight, *known)
        held = None if weight is None else weakref.ref(weight)
        vars(layer)["_fusion_plugin_v_up"] = (held, *known, reason)  # not setattr, which would look for parameters
    if reason:
        return reason
    width = layer.num_heads * layer.v_head_dim
    if codes.shape[1:] != (width,) or not codes.is_contiguous():
        return (
            f"the output has shape {tuple(codes.shape)} and strides {codes.stride()}, not [tokens, {width}] contiguous"
        )
    if scales.shape != (len(codes), width // group_size) or scales.dtype != torch.float32:
        return f"the scales are {scales.dtype} of shape {tuple(scales.shape)}, not float32 of one a group"
    return None


def _why_not(
    layer: Any, weight: torch.Tensor | None, dtype: torch.dtype, device: torch.device, group_size: int | None
) -> str | None:
    heads, latent, width = layer.num_heads, layer.kv_lora_rank, layer.v_head_dim
    for name in ("is_aiter_triton_fp4_bmm_enabled", "is_aiter_triton_fp8_bmm_enabled", "is_amx_bmm_enabled"):
        if getattr(layer, name, False):
            return f"it runs in another kernel ({name})"
    if getattr(layer, "use_pcp", False) or compat.decode_context_parallel_size(layer.impl) > 1:
        return "context parallelism puts the output together after it"
    if compat.batch_invariant():
        return "VLLM_BATCH_INVARIANT asks for vLLM's own matrix product"
    if getattr(layer.impl, "masked_mha_available", False):
        return f"{compat.attention_backend(layer)} may take its prefill rows through masked attention"
    if compat.prefill_writes_groups(layer, group_size):
        return "the prefill backend quantises its own rows"
    if group_size not in GROUP_SIZES or width % group_size:
        return f"groups of {group_size} in heads of {width}; written for groups of {GROUP_SIZES} that divide a head"
    if weight is None or weight.dtype != dtype or dtype not in INPUT_DTYPES or weight.device != device:
        return f"W_UV is {None if weight is None else f'{weight.dtype} on {weight.device}'}, q {dtype} on {device}"
    if weight.shape != (heads, latent, width):
        return f"W_UV has shape {tuple(weight.shape)}, not [heads, latent, V] = {(heads, latent, width)}"
    return None


def _quantise(
    rows: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    use_ue8m0: bool,
    layout: tuple[bool, bool],
) -> None:
    """vLLM's group quantiser over some rows of a buffer: it goes by the scales' strides, which are the whole buffer's."""
    if rows.is_cuda:
        torch.ops._C.per_token_group_fp8_quant(
            rows, codes, scales, group_size, EPS, -FP8_MAX, FP8_MAX, use_ue8m0, *layout
        )
        return
    how = GroupScales(group_size, ue8m0=use_ue8m0)
    new_codes, new_scales = group_fp8_quant_reference(rows, how, "custom_op")
    codes.copy_(new_codes)
    scales.copy_(new_scales)


def zero_scales(scales: torch.Tensor, start: int) -> None:
    """Zero scales [M, groups] from row `start` on, and the padding between the columns of TMA-aligned ones.

    Not what would pad the last column: vLLM's buffers end with its last row.
    """
    rows, groups = scales.shape
    if start < rows:
        scales[start:].zero_()
    stride = scales.stride(1)
    if scales.stride(0) == 1 and groups > 1 and rows < stride == padded_rows(rows):
        scales.as_strided((stride - rows, groups - 1), (1, stride), scales.storage_offset() + rows).zero_()
