# SPDX-License-Identifier: Apache-2.0
"""compat.linear_kernels: the kernel of every quantised linear layer, wherever its method keeps it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
linear = pytest.importorskip("vllm.model_executor.layers.linear")

from vllm_fusion_plugin import compat  # noqa: E402


class SomeKernel:
    pass


class SomeMethod:
    def __init__(self, **held):
        vars(self).update(held)


class SomeMoEMethod(SomeMethod):
    pass


class SomeScheme(SomeMethod):
    pass


class Linear(linear.LinearBase):
    def __init__(self, method, scheme=None):
        torch.nn.Module.__init__(self)
        self.quant_method = method
        if scheme is not None:
            self.scheme = scheme


def kernels(*modules: torch.nn.Module) -> dict[str, int]:
    return compat.linear_kernels(SimpleNamespace(model_runner=SimpleNamespace(model=torch.nn.ModuleList(modules))))


def test_of_the_method_of_the_scheme_and_neither():
    assert kernels(
        Linear(SomeMethod(fp8_linear=SomeKernel())),
        Linear(SomeMethod(), SomeScheme(fp8_linear=SomeKernel())),
        Linear(SomeMethod(), SomeScheme()),
        Linear(SomeMethod()),
        Linear(linear.UnquantizedLinearMethod()),
        Linear(SomeMoEMethod(moe_kernel=SomeKernel())),
    ) == {"SomeKernel": 2, "SomeScheme": 1, "SomeMethod": 1}


class Wrapper:
    """As vLLM's CUDAGraphWrapper, which is no module."""

    def __init__(self, model):
        self.model = model

    def unwrap(self):
        return self.model


def test_a_model_that_runs_as_cuda_graphs():
    model = torch.nn.ModuleList([Linear(SomeMethod(fp8_linear=SomeKernel()))])
    wrapped = Wrapper(Wrapper(model))
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=wrapped, drafter=SimpleNamespace(model=Wrapper(model))))
    assert compat.linear_kernels(worker) == {"SomeKernel": 1}
    assert compat.models(worker) == [model, model]


def test_a_worker_without_a_model():
    assert compat.linear_kernels(SimpleNamespace()) == {}
