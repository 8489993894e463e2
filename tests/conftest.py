# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

# With `--dist=loadgroup`, one of pytest-xdist's processes runs all tests of a group. A file is one, unless its tests say
# otherwise; these files share what is made once a process: engine runs, or the import of vLLM.
GROUPS = {
    "test_compile_cache.py": "engine",
    "test_cpu_engine.py": "engine",
    "test_benchmarks.py": "imports vLLM",
    "test_linear_kernels.py": "imports vLLM",
}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(GROUPS.get(item.path.name, item.path.stem)))
    # What takes long comes first, so that no process has it left when the others are done.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)

    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch  # not for tests that need none

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
