# SPDX-License-Identifier: Apache-2.0
"""`inductor_child.py RESULT`: compile one function again and again, with the pass manager of different states of the plugin.

Writes a list of {state, hits, misses, fused}: hits and misses of Inductor's FX graph cache by Inductor's own counters,
and whether the code that then runs calls the fused op, seen by running it, since cached code counts too.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch._dynamo.utils import counters
from vllm.compilation.passes import pass_manager as stock_pass_manager
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass
from vllm.config import CompilationConfig, PassConfig, VllmConfig, set_current_vllm_config
from vllm.config.utils import Range
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_fusion_plugin import fingerprint, settings
from vllm_fusion_plugin.ops import registry, silu_mul_quant  # noqa: F401  (registers the op)

# state: version, settings, qualified name of the pass manager (None: the one that the plugin has named to vLLM)
STATES = {
    "with plugin": (fingerprint.__version__, {}, None),
    "upgraded": (fingerprint.__version__ + ".post1", {}, None),
    "switched off": (fingerprint.__version__, {}, "vllm.compilation.passes.pass_manager.PostGradPassManager"),
    "reconfigured": (fingerprint.__version__, {"use_pdl": False}, None),
}
STEPS = ("with plugin", "with plugin", "upgraded", "switched off", "reconfigured", "with plugin", "switched off")


class DoesNothing(VllmInductorPass):
    """For stock's manager, which has no pass of its own for this flag on CPU."""

    def __call__(self, graph): ...


def pass_manager_of(state: str):
    version, chosen, qualname = STATES[state]
    config = VllmConfig(
        compilation_config=CompilationConfig(
            pass_config=PassConfig(fuse_act_quant=True), inductor_compile_config={"emulate_precision_casts": True}
        )
    )
    with (
        mock.patch.object(fingerprint, "__version__", version),
        mock.patch.dict("os.environ", {settings.ENV_SETTINGS: json.dumps(chosen)}),
    ):
        manager = resolve_obj_by_qualname(qualname or current_platform.get_pass_manager_cls())()
        manager.configure(config)
    return manager


def main(result_file: str) -> None:
    load_general_plugins()
    stock_pass_manager.ActivationQuantFusionPass = DoesNothing
    calls, implementation = 0, registry.CPU_IMPLEMENTATIONS["silu_mul_group_fp8_quant"]

    def counted(*args):
        nonlocal calls
        calls += 1
        return implementation(*args)

    library = torch.library.Library("vllm_fusion_plugin", "IMPL")
    library.impl("silu_mul_group_fp8_quant", counted, "CPU", allow_override=True)
    with set_current_vllm_config(VllmConfig(), check_compile=False):
        quant = QuantFP8(static=False, group_shape=GroupShape(1, 128), use_ue8m0=False, compile_native=False)

    def function(x):
        return quant.forward_native(SiluAndMul.forward_native(x))

    x = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    steps = []
    for state in STEPS:
        torch._dynamo.reset()
        counters.clear()
        calls = 0
        options = {"post_grad_custom_post_pass": pass_manager_of(state), "emulate_precision_casts": True}
        with torch.no_grad(), pass_context(Range(1, 64)):
            torch.compile(function, options=options, fullgraph=True, dynamic=False)(x)
        print(state, dict(counters["inductor"]), dict(counters["aot_autograd"]))
        steps.append(
            {
                "state": state,
                "hits": counters["inductor"]["fxgraph_cache_hit"],
                "misses": counters["inductor"]["fxgraph_cache_miss"],
                "fused": calls == 1,
            }
        )
    Path(result_file).write_text(json.dumps(steps, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
