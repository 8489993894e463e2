# SPDX-License-Identifier: Apache-2.0
"""`engine_child.py CHANGE JOB RESULT`: vllm_fusion_plugin.demo.engine, with a change made before vLLM loads the plugin.

upgraded: the plugin says that it is another version.
stock: vLLM without the plugin, but with what the CPU needs to compile this model as the plugin's runs do. A pass
    that does nothing stands for each of stock's fusion passes, which CPU lacks: so vLLM's configuration, and vLLM's own
    hash of it, are those of the runs with the plugin.
"""

import os
import sys


def upgraded() -> None:
    import vllm_fusion_plugin

    vllm_fusion_plugin.__version__ += ".post1"


def stock() -> None:
    assert os.environ["VLLM_FUSION_PLUGIN"] == "0"
    from vllm.compilation.passes import pass_manager
    from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass

    from vllm_fusion_plugin.demo import cpu

    class DoesNothing(VllmInductorPass):
        def __call__(self, graph): ...

    for name in cpu.PASS_FLAGS:
        setattr(pass_manager, name, DoesNothing)
    cpu.enable()


CHANGES = {"upgraded": upgraded, "stock": stock}

if __name__ == "__main__":
    change, job, result = sys.argv[1:]
    CHANGES[change]()
    from vllm_fusion_plugin.demo import engine

    engine.main(job, result)
