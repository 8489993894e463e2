# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's fusion flags this package turns on where vLLM leaves them off (setting `fuse`).

Where quantisers are plain torch code (static FP8, one scale a token), vLLM's default for the flags of NORM_AND_ACT is
false: Inductor fuses what its own kernels can. A flag that a user has set, either way, is never changed.

The flags that were turned on are marked at the engine's PassConfig, which is handed to every worker, so that each process
can put them back where this package turns out not to run there: vLLM's own passes would do what vLLM had not chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import fusions, settings

NORM_AND_ACT = ("fuse_norm_quant", "fuse_act_quant")

_MARK = "_turned_on_by_fusion_plugin"


def is_wanted(config: Any, flag: str) -> bool:
    """Whether `flag` is to be on in an engine for which vLLM would leave it off: with CUDA, for a quantised model, where
    settings leave none of the flag's passes to vLLM."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda() or getattr(config.model_config, "quantization", None) is None:
        return False
    chosen = settings.read(config.additional_config)[0]
    ours = any(fusion.switch == flag and fusion.name not in chosen.stock_passes for fusion in fusions.entering("pass"))
    return chosen.enabled and chosen.fuse == "auto" and ours


def mark(config: Any, flag: str) -> None:
    """Note at `config` that `flag` is on because `is_wanted` says so."""
    pass_config = config.compilation_config.pass_config
    object.__setattr__(pass_config, _MARK, (*turned_on(config), flag))  # vLLM's class checks what is assigned


def turned_on(config: Any) -> tuple[str, ...]:
    """The flags of an engine that this package has turned on."""
    return getattr(config.compilation_config.pass_config, _MARK, ())


@contextmanager
def left_to_vllm(config: Any) -> Iterator[None]:
    """Meanwhile, the flags that this package has turned on are off."""
    pass_config = config.compilation_config.pass_config
    for flag in turned_on(config):
        setattr(pass_config, flag, False)
    try:
        yield
    finally:
        for flag in turned_on(config):
            setattr(pass_config, flag, True)
