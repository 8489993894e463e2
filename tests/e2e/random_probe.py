# SPDX-License-Identifier: Apache-2.0
"""Random weights for models that have no checkpoint, and worker extension: what demo/engine.py asks of workers.

The weights are filled where a checkpoint would be loaded. Later is too late: on CPUs that oneDNN packs weights for, and in
latent attention on all, layers keep a copy of their own then.
"""

from typing import Any

from random_weights import fill  # of benchmarks/
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from vllm_fusion_plugin.demo.engine import WorkerProbe

LOAD_FORMAT = "random"


@register_model_loader(LOAD_FORMAT)
class RandomLoader(DummyModelLoader):
    def load_weights(self, model: Any, model_config: Any) -> None:
        super().load_weights(model, model_config)
        fill(model)


class RandomProbe(WorkerProbe):
    """Loads with this module, before the worker loads the model."""
