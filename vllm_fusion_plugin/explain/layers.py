# SPDX-License-Identifier: Apache-2.0
"""The layers of a model that differ: equal ones are traced once.

What stands before a quantiser may be the layer before it, so a layer is known by its kind and by the kind of its
predecessor: of DeepSeek-V3's 61 layers, the first, another dense one, the first with experts, and one after it.
"""

from __future__ import annotations

from typing import Any

import torch

from .traced import Layer


def find(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList] | None:
    """The model's list of layers and its name: the longest that vLLM's pipeline parallelism takes parts of. None if it has
    none."""
    found = [
        (f"{name}.layers" if name else "layers", module.layers)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layers", None), torch.nn.ModuleList) and hasattr(module, "start_layer")
    ]
    return max(found, key=lambda named: len(named[1]), default=None)


def cut(model: torch.nn.Module) -> list[Layer]:
    """Leave one layer of each kind and predecessor in the model; those that are left, in order. [] if the model has no list
    of layers: then it is as it was."""
    named = find(model)
    if named is None:
        return []
    name, layers = named
    structures = [_structure(layer) for layer in layers]
    kept = keep(structures)
    parent: Any = model.get_submodule(name.rpartition(".")[0])
    parent.layers = torch.nn.ModuleList(layers[i] for i in kept)
    parent.start_layer, parent.end_layer = 0, len(kept)
    return [Layer(index=i, kind=_words(layers[i]), stands_for=number) for i, number in kept.items()]


def keep(structures: list[Any]) -> dict[int, int]:
    """Of layers with these structures: those to keep, and how many each stands for."""
    first: dict[Any, int] = {}
    stands_for: dict[int, int] = {}
    for i, structure in enumerate(structures):
        kept = first.setdefault((structures[i - 1] if i else None, structure), i)
        stands_for[kept] = stands_for.get(kept, 0) + 1
    return stands_for


def _structure(layer: torch.nn.Module) -> Any:
    """What is equal for layers that compile to equal graphs: classes, and parameters with shapes and dtypes."""
    return tuple(
        (
            name,
            type(module).__qualname__,
            tuple((n, p.shape, p.dtype) for n, p in module.named_parameters(recurse=False)),
        )
        for name, module in layer.named_modules()
    )


def _words(layer: torch.nn.Module) -> str:
    parts = [type(part).__name__ for part in layer.children()]
    return " + ".join(part for part in parts if "Norm" not in part) or type(layer).__name__
