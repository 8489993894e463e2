# SPDX-License-Identifier: Apache-2.0
"""Worker extension of models that have no checkpoint: what demo_engine asks of workers, and random weights."""

from random_weights import RandomWeights  # of benchmarks/

from vllm_fusion_plugin.demo_engine import WorkerProbe


class RandomProbe(RandomWeights, WorkerProbe):
    pass
