# SPDX-License-Identifier: Apache-2.0
"""The two kernels that vLLM's dynamic block GEMM chooses from, called with FP8 input: FlashInfer's and DeepGEMM's.

Nothing here is this package's own kernel. vLLM's op hands both bf16 rows, which they quantise; here somebody else has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .block_gemm_table import DEEPGEMM_FROM


def gpu_name(device_name: str) -> str:
    """A GPU's name in the table: "h100" of "NVIDIA H100 80GB HBM3"."""
    return device_name.lower().removeprefix("nvidia ").split()[0]


def fastest_change(device_name: str, columns: int, width: int) -> int | None:
    """From how many rows on DeepGEMM is the faster of the two for a weight [columns, width], as measured; None for a GPU or
    a shape that was not."""
    return DEEPGEMM_FROM.get(gpu_name(device_name), {}).get((columns, width))


def block_gemm(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    out: torch.Tensor,
    use_ue8m0: bool,
    flashinfer_rows: int,
) -> None:
    """Write out [M, N]; arguments as the op checked them. FlashInfer's kernel for fewer rows than `flashinfer_rows`."""
    rows = codes.shape[0]
    if rows == 0:
        return
    if rows < flashinfer_rows:
        _flashinfer_gemm()(codes, weight, out, scales, weight_scales)
    else:
        _deep_gemm()((codes, scales), (weight, weight_scales), out, is_deep_gemm_e8m0_used=use_ue8m0)


@functools.cache
def _flashinfer_gemm() -> Callable[..., None]:
    """FlashInfer's block GEMM: (codes, weight, out, scales, weight_scales), nothing returned.

    Its runner's, because the public function allocates as many bytes as the weight has at every call, room to quantise in,
    which FP8 input does not need. The runner only wants to have been given some, once.
    """
    from flashinfer.gemm import fp8_blockscale_gemm_sm90, gemm_base

    try:
        runner = gemm_base.get_fp8_blockscale_gemm_runner_sm90()
        run, configure_workspace = runner.run_gemm, runner.configure_workspace
    except AttributeError:  # another FlashInfer, whose public function it has to be then
        return lambda codes, weight, out, scales, weight_scales: fp8_blockscale_gemm_sm90(
            codes, weight, scales, weight_scales, out=out
        )
    _KEPT.append(torch.empty(256, dtype=torch.uint8, device="cuda"))
    configure_workspace(_KEPT[-1])
    return run


_KEPT: list[torch.Tensor] = []
"""The runner has its address."""


@functools.cache
def _deep_gemm() -> Callable[..., None]:
    from vllm.utils.deep_gemm import fp8_gemm_nt

    return fp8_gemm_nt
