# SPDX-License-Identifier: Apache-2.0
"""Engine runs, shared by the tests of this folder: each takes half a minute or more, so each is made once.

All runs on one rank share one cache folder, in the order in which the fixtures below depend on each other: that is what
test_compile_cache.py is about.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_fusion_plugin.demo import compare
from vllm_fusion_plugin.demo.engine import FUSED_OPS, EngineJob, EngineResult

from .agreement import other_vectors

# Each compiles on one core. pytest-xdist's processes, of which there are as many as cores, have one each.
ENGINES_AT_A_TIME = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
CHILD = str(Path(__file__).parent / "engine_child.py")
SAVED = re.compile(r"saved AOT compiled function to \S*/torch_aot_compile/(\w+)/")


@dataclasses.dataclass(frozen=True)
class EngineRun:
    result: EngineResult
    log: str
    new_artefacts: frozenset[str]
    """Names of the AOT folders that the run wrote to the cache."""


class Engine:
    """Runs engines on one model; keeps what vLLM learns about the model's class, and nothing that is compiled."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.one_rank_cache = folder / "one-rank-cache"

    def run(
        self,
        name: str,
        *,
        ranks: int = 1,
        fuse: bool = True,
        broken_ops: Sequence[Sequence[str]] = ((),),
        cache: Path | None = None,
        environment: Mapping[str, str] | None = None,
        change: str | None = None,
    ) -> EngineRun:
        """change: made to the process before vLLM loads the plugin, see engine_child.py."""
        cache = cache or self.folder / f"{name}-cache"
        compare.share_model_info(self.folder, cache)
        job = EngineJob(
            model=str(self.model),
            tensor_parallel_size=ranks,
            pass_config=dict.fromkeys(compare.FLAGS, fuse),
            broken_ops=[list(ops) for ops in broken_ops],
        )
        command: Sequence[str] = (CHILD, change) if change else ("-m", "vllm_fusion_plugin.demo.engine")
        run_folder = self.folder / name
        result = compare.run_engine(job, run_folder, cache, environment=environment, command=command)
        compare.keep_model_info(cache, self.folder)
        log = (run_folder / "engine.log").read_text()
        return EngineRun(result, log, frozenset(SAVED.findall(log)))

    def run_in_one_rank_cache(self, name: str, **kwargs) -> EngineRun:
        return self.run(name, cache=self.one_rank_cache, **kwargs)


@pytest.fixture(scope="session")
def cpu_build_of_vllm() -> str:
    try:
        return compare.cpu_vllm_version()
    except compare.DemoError as e:
        pytest.skip(str(e))


@pytest.fixture(autouse=True)
def _cpu_build_unless_on_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        request.getfixturevalue("cpu_build_of_vllm")


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory, cpu_build_of_vllm: str) -> Engine:
    from vllm_fusion_plugin.demo.checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("engine")
    return Engine(folder, write_checkpoint(folder / "model"))


@pytest.fixture(scope="session")
def with_plugin(engine: Engine) -> EngineRun:
    """Generates with all ops right, then with each of them wrong in turn, then with all right again."""
    broken_ops = [(), *((op,) for op in FUSED_OPS), ()]
    return engine.run_in_one_rank_cache("with-plugin", broken_ops=broken_ops)


@pytest.fixture(scope="session")
def other_states(engine: Engine, with_plugin: EngineRun) -> dict[str, EngineRun]:
    """Runs that find the cache as with_plugin has left it."""
    states = {
        "upgraded": {"change": "upgraded"},
        "switched_off": {"change": "stock", "environment": {"VLLM_FUSION_PLUGIN": "0"}},
        # By environment: unlike additional_config, vLLM's own hash knows nothing of it.
        "reconfigured": {"environment": {"VLLM_FUSION_PLUGIN_SETTINGS": '{"use_pdl": false}'}},
    }
    with ThreadPoolExecutor(ENGINES_AT_A_TIME) as pool:
        runs = {name: pool.submit(engine.run_in_one_rank_cache, name, **state) for name, state in states.items()}
        unlike = {"VLLM_FUSION_PLUGIN": "0"} | other_vectors()
        runs["control"] = pool.submit(engine.run, "control", change="stock", environment=unlike)
    return {name: run.result() for name, run in runs.items()}


@pytest.fixture(scope="session")
def upgraded(other_states: dict[str, EngineRun]) -> EngineRun:
    return other_states["upgraded"]


@pytest.fixture(scope="session")
def switched_off(other_states: dict[str, EngineRun]) -> EngineRun:
    return other_states["switched_off"]


@pytest.fixture(scope="session")
def control(other_states: dict[str, EngineRun]) -> EngineRun:
    """Switched off, too, and with other vectors: see agreement.py."""
    return other_states["control"]


@pytest.fixture(scope="session")
def reconfigured(other_states: dict[str, EngineRun]) -> EngineRun:
    return other_states["reconfigured"]


@pytest.fixture(scope="session")
def back_again(engine: Engine, other_states: dict[str, EngineRun]) -> EngineRun:
    return engine.run_in_one_rank_cache("back-again")


@pytest.fixture(scope="session")
def two_ranks(engine: Engine) -> EngineRun:
    return engine.run("two-ranks", ranks=2)


@pytest.fixture(scope="session")
def two_ranks_unfused(engine: Engine) -> EngineRun:
    return engine.run("two-ranks-unfused", ranks=2, fuse=False)
