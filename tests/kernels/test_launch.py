# SPDX-License-Identifier: Apache-2.0
"""What Triton gets at a launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

from vllm_fusion_plugin.kernels import launch
from vllm_fusion_plugin.kernels.tiles import GroupTile, GroupTileConstants


class Kernel:
    """Keeps what it was launched with."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.__dict__.update(args=args, kwargs=kwargs)


def test_constants_have_constexpr_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 3.7, Triton takes the fields of a named tuple for plain numbers, and compiles no kernel that uses one."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    kernel, constants = Kernel(), GroupTile(2, 4, 8).grid(5, 6)[1]
    x = torch.zeros(1)
    launch.launch(kernel, (1,), x.device, x, 7, TILE=constants, PDL=True, num_warps=8)
    assert kernel.args == (x, 7) and kernel.kwargs.keys() == {"TILE", "PDL", "num_warps"}
    tile = kernel.kwargs["TILE"]
    for name, value in zip(GroupTileConstants._fields, constants, strict=True):
        field = getattr(tile, name)
        assert isinstance(field, tl.constexpr) and field.value == value
    # Triton's keys have its hash or its text, by version
    launch.launch(kernel, (1,), x.device, x, 7, TILE=GroupTile(2, 4, 8).grid(5, 6)[1], PDL=True, num_warps=8)
    again = kernel.kwargs["TILE"]
    assert (again, hash(again), repr(again)) == (tile, hash(tile), repr(tile))
    launch.launch(kernel, (1,), x.device, x, 7, TILE=constants._replace(rows=4), PDL=True, num_warps=8)
    assert kernel.kwargs["TILE"] != tile and repr(kernel.kwargs["TILE"]) != repr(tile)
