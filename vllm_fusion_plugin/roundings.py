# SPDX-License-Identifier: Apache-2.0
"""How the installed vLLM's quantisers and SiLU·mul round: asked of the ops themselves, once, on the GPU.

vLLM changes roundings between releases without a word (0.33 multiplies by a scale's reciprocal where 0.32 divided), and a
fused op has to give the bytes of the ops that it replaces. So each op gets a few thousand numbers on which the known
roundings differ (next to ties, subnormals, zeros, maxima, huge and tiny scales, NaN), and its bytes are compared with each
known rounding's pure-torch reference. The answer is kept beside vLLM's compile cache, and is part of that cache's key.

Without a GPU, or before the process has touched it (asking would make a later fork fail), it goes by version.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import compat
from .kernels.fp8 import FORMATS
from .kernels.rounding import AITER
from .ops import quant
from .ops.silu_mul_quant import silu_mul_reference

logger = logging.getLogger("vllm.fusion_plugin")

GROUP_QUANT, TOKEN_QUANT, STATIC_QUANT = "group quantiser", "token quantiser", "static quantiser"
SILU_MUL = "SiLU·mul"
AITER_GROUP_QUANT, AITER_TOKEN_QUANT = "AITER's group quantiser", "AITER's token quantiser"


class Rounding(NamedTuple):
    """What an op of vLLM does, as far as is known."""

    name: str
    """The `quant_rounding` or `act_rounding` whose bytes are the op's, or come nearest."""
    differing: int = 0
    """Numbers of a million, of those made to find differences, whose bytes are not the op's; 0: it is exact."""
    asked: bool = False
    """Found by asking the op, not by vLLM's version."""

    def __str__(self) -> str:
        how = "asked of the op" if self.asked else "by version"
        return f"{self.name} ({how})" if not self.differing else f"nearest is {self.name} ({self.reason})"

    @property
    def reason(self) -> str:
        return f"not exact on this vLLM, by up to {self.differing} codes in a million" if self.differing else ""


def of(op: str) -> Rounding:
    """How the installed vLLM's `op`, one of the names above, rounds."""
    return known()[op]


def key() -> str:
    """What of this a compile cache's key has to cover."""
    answers = [f"{op}: {rounding.name} {rounding.differing}" for op, rounding in sorted(known().items())]
    return "; ".join([*answers, f"codes: {compat.fp8_format()}"])


def known() -> dict[str, Rounding]:
    """All answers: those that this process has, those kept by an earlier one, the ops' own, or by version. Never raises."""
    if not _answers:
        try:
            found = _kept() or (_ask_and_keep() if _may_ask() else None)
        except Exception as e:
            logger.warning(
                "vllm-fusion-plugin: vLLM's ops could not be asked how they round, so its version decides: %r", e
            )
            found = _by_version()  # and not asked again
        if found is None:
            return _by_version()
        _answers.update(found)
    return _answers


_answers: dict[str, Rounding] = {}


def _by_version() -> dict[str, Rounding]:
    return {
        GROUP_QUANT: Rounding("reciprocal" if compat.group_quantiser_multiplies() else "custom_op"),
        TOKEN_QUANT: Rounding("custom_op"),
        STATIC_QUANT: Rounding("custom_op"),
        SILU_MUL: Rounding("custom_op" if compat.silu_and_mul_adds_zero() else "eager"),
        **(dict.fromkeys((AITER_GROUP_QUANT, AITER_TOKEN_QUANT), Rounding(AITER)) if compat.aiter_is_on() else {}),
    }


# ---- asking ----------------------------------------------------------------------------------------------------------


def _may_ask() -> bool:
    has_gpus = torch.version.cuda is not None or torch.version.hip is not None
    ready = has_gpus and torch.cuda.is_initialized()
    return ready and not torch.cuda.is_current_stream_capturing()


def _ask_and_keep() -> dict[str, Rounding]:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    start = time.perf_counter()
    with unset_fake_temporarily(), torch.inference_mode():
        found = ask(torch.device("cuda", torch.cuda.current_device()))
    logger.info(
        "vllm-fusion-plugin: asked vLLM's ops how they round, %.0f ms: %s",
        1e3 * (time.perf_counter() - start),
        ", ".join(f"{op} {rounding}" for op, rounding in found.items()),
    )
    _keep(found)
    return found


def ask(device: torch.device) -> dict[str, Rounding]:
    """Ask every op that this build of vLLM has, on `device`; the rest by version."""
    compat.load_custom_ops()
    questions: dict[str, tuple[str, tuple[str, ...], Callable[[str, torch.device], tuple[int, int]]]] = {
        GROUP_QUANT: ("per_token_group_fp8_quant", quant.OPAQUE, _group_quant_differs),
        TOKEN_QUANT: ("dynamic_per_token_scaled_fp8_quant", ("custom_op",), _token_quant_differs),
        STATIC_QUANT: ("static_scaled_fp8_quant", ("custom_op",), _static_quant_differs),
        SILU_MUL: ("silu_and_mul", ("custom_op", "eager"), _silu_mul_differs),
    }
    answers = _by_version()
    for name, (op, roundings, differs) in questions.items():
        if not hasattr(torch.ops._C, op):
            continue
        per_million = {}
        for rounding in sorted(roundings, key=lambda rounding: rounding != answers[name].name):
            differing, total = differs(rounding, device)
            per_million[rounding] = -(-differing * 1_000_000 // total)
            if not differing:
                break
        nearest = min(per_million, key=lambda rounding: per_million[rounding])
        answers[name] = Rounding(nearest, per_million[nearest], asked=True)
    for name, asks in (
        (AITER_GROUP_QUANT, _aiter_group_quant_differs),
        (AITER_TOKEN_QUANT, _aiter_token_quant_differs),
    ):
        if name in answers:
            differing, total = asks(device)
            answers[name] = Rounding(AITER, -(-differing * 1_000_000 // total), asked=True)
    return answers


def _differing(*pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int]:
    """Elements whose bytes differ, NaN being equal to NaN, and all elements."""
    differing = total = 0
    for found, expected in pairs:
        found, expected = (t.float() if t.dtype.itemsize == 1 else t for t in (found, expected))
        bits = torch.int32 if found.dtype == torch.float32 else torch.int16
        same = (found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())
        differing += int((~same).sum())
        total += found.numel()
    return differing, total


def _group_quant_differs(rounding: str, device: torch.device) -> tuple[int, int]:
    counts, fp8 = [0, 0], FORMATS[compat.fp8_format()]
    for dtype in quant.INPUT_DTYPES:
        for group_size in quant.GROUP_SIZES:
            x = _numbers(dtype, group_size).to(device)
            for use_ue8m0 in (False, True):
                codes = torch.empty_like(x, dtype=fp8.dtype)
                scales = x.new_empty((len(x), x.shape[1] // group_size), dtype=torch.float32)
                torch.ops._C.per_token_group_fp8_quant(
                    x, codes, scales, group_size, quant.EPS, -fp8.max, fp8.max, use_ue8m0, False, False
                )
                how = quant.GroupScales(group_size, ue8m0=use_ue8m0)
                expected = quant.group_fp8_quant_reference(x, how, rounding, compat.fp8_format())
                found = _differing((codes, expected[0]), (scales, expected[1]))
                counts = [a + b for a, b in zip(counts, found, strict=True)]
    return counts[0], counts[1]


def _aiter_group_quant_differs(device: torch.device) -> tuple[int, int]:
    x = _numbers(torch.bfloat16, 128).to(device)
    found = torch.ops.vllm.rocm_aiter_group_fp8_quant(x, 128)
    expected = quant.group_fp8_quant_reference(x, quant.GroupScales(128), AITER, compat.fp8_format_of_aiter())
    return _differing((found[0], expected[0]), (found[1], expected[1]))


def _aiter_token_quant_differs(device: torch.device) -> tuple[int, int]:
    """From this package's kernel: plain torch has no reciprocal to within an ulp."""
    from .ops.silu_mul_quant import silu_mul_token_fp8_quant

    gates = _numbers(torch.bfloat16, 128).view(-1, 128).to(device)
    x, fp8 = torch.cat([gates, torch.ones_like(gates)], dim=1), compat.fp8_format_of_aiter()
    *found, y = silu_mul_token_fp8_quant(x, act_rounding="eager", quant_rounding=AITER, keep_act=True, fp8=fp8)
    expected = torch.ops.vllm.rocm_aiter_per_token_quant(y, FORMATS[fp8].dtype)
    return _differing((found[0], expected[0]), (found[1], expected[1]))


def _token_quant_differs(rounding: str, device: torch.device) -> tuple[int, int]:
    x, fp8 = _numbers(torch.bfloat16, 128).view(-1, 128).to(device), compat.fp8_format()
    codes, scales = torch.empty_like(x, dtype=FORMATS[fp8].dtype), x.new_empty((len(x), 1), dtype=torch.float32)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes, x, scales, None)
    expected = quant.token_fp8_quant_reference(x, None, rounding, fp8)
    return _differing((codes, expected[0]), (scales, expected[1]))


def _static_quant_differs(rounding: str, device: torch.device) -> tuple[int, int]:
    x, fp8 = _numbers(torch.bfloat16, 128).to(device), compat.fp8_format()
    scale = torch.tensor([0.0123], device=device)
    codes = torch.empty_like(x, dtype=FORMATS[fp8].dtype)
    torch.ops._C.static_scaled_fp8_quant(codes, x, scale, **compat.static_quant_extra_arguments())
    return _differing((codes, quant.static_fp8_quant_reference(x, scale, rounding, fp8)))


def _silu_mul_differs(rounding: str, device: torch.device) -> tuple[int, int]:
    gates = _numbers(torch.bfloat16, 128).view(-1, 128).to(device)
    x = torch.cat([gates, gates.roll(1, 0)], dim=1)
    x[::5, 128:] = -0.0  # what tells the roundings apart
    out = torch.empty_like(gates)
    torch.ops._C.silu_and_mul(out, x)
    return _differing((out, silu_mul_reference(x, rounding)))


@functools.cache
def _numbers(dtype: torch.dtype, group_size: int) -> torch.Tensor:
    """[32, 4 * group_size] on the CPU, by a seed: groups of numbers next to ties, of any bits, and of special values."""
    generator = torch.Generator().manual_seed(33)
    groups = 64
    # Maxima of 48 to 65504 * 2**-k; numbers next to where x / scale lies halfway between two codes.
    top = (1 + torch.rand(groups, 1, generator=generator)) * torch.exp2(
        torch.randint(-10, 14, (groups, 1), generator=generator).float()
    )
    top = top.to(dtype).float()
    codes = torch.arange(0x7E, dtype=torch.uint8).view(quant.FP8_DTYPE).float()
    halfway = (codes[:-1] + codes[1:]) / 2
    chosen = halfway[torch.randint(len(halfway), (groups, group_size), generator=generator)]
    ties = (chosen * (top / quant.FP8_MAX)).to(dtype) * (
        1 - 2 * torch.randint(2, chosen.shape, generator=generator)
    ).to(dtype)
    ties[:, :1] = top.to(dtype)
    bits = torch.randint(-32768, 32768, (groups - 8, group_size), generator=generator, dtype=torch.int32)
    info = torch.finfo(dtype)
    special = torch.zeros(8, group_size, dtype=dtype)
    special[1, 3], special[2, 5], special[3, 7] = info.tiny * info.eps, info.tiny, info.max
    special[4, 1], special[5, 2], special[6, 4] = float("inf"), float("nan"), -info.max
    special[5, 9], special[7] = 1.5, -0.0
    return torch.cat([ties, bits.to(torch.int16).view(dtype), special]).view(-1, 4 * group_size)


# ---- keeping ---------------------------------------------------------------------------------------------------------


def _file() -> Path:
    """Where the answers of this vLLM on this GPU are kept; named by all that they depend on."""
    deciding: tuple[Callable[..., Any], ...] = (ask, quant.ue8m0, silu_mul_reference)
    sources = b"".join(Path(inspect.unwrap(f).__code__.co_filename).read_bytes() for f in deciding)
    parts = [
        *compat.identity_of_custom_ops(),
        compat.device_name(),
        torch.__version__,
        hashlib.sha256(sources).hexdigest(),
    ]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return compat.cache_root() / "vllm_fusion_plugin" / f"roundings.{name}.json"


def _kept() -> dict[str, Rounding] | None:
    try:
        data = json.loads(_file().read_text())
        return {op: Rounding(*data[op]) for op in _by_version()}
    except Exception:  # not there, not readable, or of another shape: ask again
        return None


def _keep(answers: dict[str, Rounding]) -> None:
    try:
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(answers))
        temporary.replace(path)
    except Exception as e:
        logger.debug("vllm-fusion-plugin: how vLLM's ops round is not kept: %r", e)
