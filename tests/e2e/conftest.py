# SPDX-License-Identifier: Apache-2.0
"""Engine runs, shared by the tests of this folder: each takes half a minute or more, so each is made once.

All runs on one rank share one cache folder, in the order in which the fixtures below depend on each other: that order is
what test_compile_cache.py is about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from vllm_fusion_plugin import demo
from vllm_fusion_plugin.demo_engine import EngineJob, EngineResult

CHILD = str(Path(__file__).parent / "engine_child.py")


@dataclasses.dataclass(frozen=True)
class EngineRun:
    result: EngineResult
    log: str
    new_artefacts: frozenset[str]
    """Names of the AOT folders that appeared in the cache during the run."""


class Engine:
    """Runs engines on one model; keeps what vLLM learns about the model's class, and nothing that is compiled."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.one_rank_cache = folder / "one-rank-cache"

    def artefacts(self, cache: Path) -> frozenset[str]:
        return frozenset(p.name for p in (cache / "torch_compile_cache" / "torch_aot_compile").glob("*"))

    def run(
        self,
        name: str,
        *,
        ranks: int = 1,
        fuse: bool = True,
        break_op: bool = False,
        cache: Path | None = None,
        environment: Mapping[str, str] | None = None,
        change: str | None = None,
    ) -> EngineRun:
        """change: made to the process before vLLM loads the plugin, see engine_child.py."""
        cache = cache or self.folder / f"{name}-cache"
        before = self.artefacts(cache)
        demo.share_model_info(self.folder, cache)
        job = EngineJob(
            model=str(self.model),
            tensor_parallel_size=ranks,
            pass_config={demo.FLAG: fuse},
            break_op=break_op,
        )
        command: Sequence[str] = (CHILD, change) if change else ("-m", "vllm_fusion_plugin.demo_engine")
        run_folder = self.folder / name
        result = demo.run_engine(job, run_folder, cache, environment=environment, command=command)
        demo.keep_model_info(cache, self.folder)
        return EngineRun(result, (run_folder / "engine.log").read_text(), self.artefacts(cache) - before)

    def run_in_one_rank_cache(self, name: str, **kwargs) -> EngineRun:
        return self.run(name, cache=self.one_rank_cache, **kwargs)


@pytest.fixture(scope="session", autouse=True)
def cpu_build_of_vllm() -> str:
    try:
        return demo.cpu_vllm_version()
    except demo.DemoError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    from vllm_fusion_plugin.demo_checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("engine")
    return Engine(folder, write_checkpoint(folder / "model"))


@pytest.fixture(scope="session")
def with_plugin(engine: Engine) -> EngineRun:
    return engine.run_in_one_rank_cache("with-plugin")


@pytest.fixture(scope="session")
def upgraded(engine: Engine, with_plugin: EngineRun) -> EngineRun:
    return engine.run_in_one_rank_cache("upgraded", change="upgraded")


@pytest.fixture(scope="session")
def switched_off(engine: Engine, with_plugin: EngineRun) -> EngineRun:
    return engine.run_in_one_rank_cache("switched-off", change="stock", environment={"VLLM_FUSION_PLUGIN": "0"})


@pytest.fixture(scope="session")
def reconfigured(engine: Engine, with_plugin: EngineRun) -> EngineRun:
    # By environment: unlike additional_config, vLLM's own hash knows nothing of it.
    return engine.run_in_one_rank_cache(
        "reconfigured", environment={"VLLM_FUSION_PLUGIN_SETTINGS": '{"use_pdl": false}'}
    )


@pytest.fixture(scope="session")
def back_again(
    engine: Engine, with_plugin: EngineRun, upgraded: EngineRun, switched_off: EngineRun, reconfigured: EngineRun
) -> EngineRun:
    return engine.run_in_one_rank_cache("back-again")


@pytest.fixture(scope="session")
def broken(engine: Engine, with_plugin: EngineRun) -> EngineRun:
    return engine.run_in_one_rank_cache("broken", break_op=True)


@pytest.fixture(scope="session")
def two_ranks(engine: Engine) -> EngineRun:
    return engine.run("two-ranks", ranks=2)


@pytest.fixture(scope="session")
def two_ranks_unfused(engine: Engine) -> EngineRun:
    return engine.run("two-ranks-unfused", ranks=2, fuse=False)
