# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Which tests share one of pytest-xdist's processes, and with it what is made once a process. A file's do, if nothing else is
# said here: these files share engine runs or the import of vLLM,
GROUPS = {
    "test_compile_cache.py": "engine",
    "test_cpu_engine.py": "engine",
    "test_benchmarks.py": "imports vLLM",
    "test_end_to_end.py": "imports vLLM",
    "test_linear_kernels.py": "imports vLLM",
}
# and in these files, tests share nothing but with those of the same parameter.
BY_PARAMETER = ("test_whole_models.py", "test_silent_models.py", "test_cpu_models.py")


def group_of(nodeid: str) -> str:
    path, _, test = nodeid.partition("::")
    name = path.rpartition("/")[2]
    return f"{name}[{test.partition('[')[2]}" if name in BY_PARAMETER else GROUPS.get(name, path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist=loadscope`. Not by xdist_group: pytest-xdist 3.8 puts it into a place that pytest 9.2 does not read."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What takes long comes first, so that no process has it left when the others are done.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)

    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch  # not for tests that need none

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are scripts, which import each other by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))


@pytest.fixture
def tritons_kernels() -> Iterator[None]:
    """Triton's kernels run, also where the library of CUDA kernels is built: it needs no warm-up, and nothing repeats it."""
    from vllm_fusion_plugin.kernels import cuda_library
    from vllm_fusion_plugin.ops import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cuda_library.ENV, "triton")
        registry.bind_all()
        yield
    registry.bind_all()
