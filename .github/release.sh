#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the wheel and the sdist of a version into dist/, and check them: .github/release.sh v0.1.0
#
# Fails if the tag is not "v" and __version__, if CHANGELOG.md has no section for it, if the wheel of the tree and the wheel
# that is built from the sdist differ, or if the wheel does not install with that version and the entry point for vLLM.
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${1:?usage: .github/release.sh v0.1.0}

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' vllm_fusion_plugin/__init__.py)
if [ "$tag" != "v$version" ]; then
  echo "tag $tag is not v$version, as vllm_fusion_plugin/__init__.py has it" >&2
  exit 1
fi
if ! grep -qF "## [$version]" CHANGELOG.md; then
  echo "CHANGELOG.md has no section ## [$version]" >&2
  exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/build"
"$work/build/bin/pip" install --quiet --disable-pip-version-check build twine
rm -rf dist
export VLLM_FUSION_PLUGIN_BUILD_CUDA=0  # the same wheel wherever it is built; `nox -s wheel` makes the one with CUDA kernels
"$work/build/bin/python" -m build --outdir dist .  # the sdist, and the wheel from it
"$work/build/bin/twine" check --strict dist/*
"$work/build/bin/python" -m build --wheel --outdir "$work/tree" .

wheel="vllm_fusion_plugin-$version-py3-none-any.whl"
contents() { "$work/build/bin/python" -m zipfile -l "$1" | awk '{print $1, $NF}' | sort; }
diff <(contents "dist/$wheel") <(contents "$work/tree/$wheel")

"${PYTHON:-python3}" -m venv "$work/install"
"$work/install/bin/pip" install --quiet --disable-pip-version-check "dist/$wheel"
cd "$work"  # or the tree itself would be imported
"$work/install/bin/python" - "$version" <<'CHECK'
import sys
from importlib.metadata import entry_points, version

import vllm_fusion_plugin

assert vllm_fusion_plugin.__version__ == version("vllm-fusion-plugin") == sys.argv[1], vllm_fusion_plugin.__version__
[plugin] = entry_points(group="vllm.general_plugins", name="vllm_fusion_plugin")
assert plugin.value == "vllm_fusion_plugin.plugin:register", plugin.value
CHECK
echo "dist/ has vllm-fusion-plugin $version"
