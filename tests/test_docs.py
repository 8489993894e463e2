# SPDX-License-Identifier: Apache-2.0
"""The documents: links lead somewhere, what is generated is up to date, the README stays short. What a release checks."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vllm_fusion_plugin import __version__

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("csrc/*.md")})
FENCES = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def script(name: str):
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "docs"))  # as where python runs it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return module


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCES.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(FENCES.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue  # another site
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_readme_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 500


def test_the_readmes_report_is_printed_as_it_prints():
    """And is a committed one."""
    from rich.console import Console

    from vllm_fusion_plugin.report import FusionReport

    report = ROOT / "benchmarks/results/h100/0.33.0/end_to_end/qwen3-8b-8layers.default.report.json"
    console = Console(width=80, file=io.StringIO())
    console.print(*FusionReport.from_ranks(json.loads(report.read_text())).tables())
    printed = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
    assert f"```\n{printed}\n```" in (ROOT / "README.md").read_text()


def test_the_readmes_times_of_kernels_are_in_the_results():
    rows = re.findall(r"^\| (.+) × (\d+) \| (.+) \| \*\*(.+)\*\* \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows
    lines = (ROOT / "docs" / "results.md").read_text().splitlines()
    for name, width, others, ours in rows:
        tokens = name.split()[-1]
        at = [line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {tokens} | {width} |")]
        assert any({*others.split(" | "), ours} <= set(cells) for cells in at), (name, width)


def test_the_readmes_times_of_a_model_are_the_results():
    readme = (ROOT / "README.md").read_text()
    result = json.loads((ROOT / "benchmarks/results/h100/0.33.0/end_to_end/qwen3-8b-8layers.default.json").read_text())
    for config, name in (("untouched", "vLLM untouched"), ("ours", "with this package")):
        rows = {(row["phase"], row["batch"]): row for row in result["rows"] if row["config"] == config}
        cells = [f"{rows['decode', batch]['gpu_ms']:.3f}" for batch in (1, 8, 32, 128)]
        cells.append(f"{rows['prefill', 1]['ms']:.1f}")
        [line] = re.findall(rf"^\| {name} \|.*$", readme, re.MULTILINE)
        assert re.findall(r"[\d.]+", line) == cells


def test_the_page_of_results_is_up_to_date():
    results = script("results")
    assert results.PAGE.read_text() == results.page(results.TEMPLATE.read_text()), "run python docs/results.py"


def test_the_page_of_results_has_every_result():
    results = script("results")
    shown = {name for _, names in results.directives(results.TEMPLATE.read_text()) for name in names}
    reports = set(results.RESULTS.glob("**/*.report.json"))
    earlier = set(results.RESULTS.glob("*/*/earlier/**/*.json"))
    committed = set(results.RESULTS.glob("**/*.json")) - reports - earlier
    assert {results.RESULTS / name for name in shown} == committed


def test_a_result_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"no_such_file\.json"):
        script("results").expand("h200/0.32.0/no_such_file.json")


def test_the_tables_of_rocm_are_up_to_date():
    rocm = script("rocm_traces")
    assert rocm.PAGE.read_text() == rocm.page(rocm.load()), "run python docs/rocm_traces.py"


def test_rocms_traces_have_as_many_fusions_as_vllm_alone():
    rocm = script("rocm_traces")
    for column in rocm.load():
        for row in column["traces"]:
            stock = sum(row["stock"]["fusions"].values())
            for how in ("exact", "aiter_kernels"):
                assert how not in row or sum(row[how]["fusions"].values()) >= stock, row


def test_the_table_of_versions_is_up_to_date():
    versions = script("versions")
    assert versions.TABLE.read_text() == versions.table(versions.load()), "run python docs/versions.py"


def test_the_page_of_models_is_up_to_date():
    models = script("models")
    assert models.PAGE.read_text() == models.page(models.load()), "run python docs/models.py"


def test_every_served_model_is_on_the_page_of_models():
    """And with the same number of GPUs: else run nox -s models."""
    from vllm_fusion_plugin.explain import matrix

    served = {s.name or path.name: s.tensor_parallel_size for path, s in matrix.models(ROOT / "tests/models/served")}
    for column in script("models").load():
        assert {row["model"]: row["tensor_parallel_size"] for row in column["rows"]} == served


# ---- release ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workflow", ["ci", "release"])
def test_workflows_run_scripts_that_are_there(workflow):
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / f"{workflow}.yml").read_text())["jobs"].popitem()[1][
        "steps"
    ]
    scripts = [word for step in steps for word in step.get("run", "").split() if word.startswith(".")]
    assert scripts
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)


@pytest.mark.parametrize(
    ("tag", "words"), [("v0.0.0", "tag v0.0.0 is not v"), (f"v{__version__}", f"no section ## [{__version__}]")]
)
def test_a_release_needs_its_version_and_its_changes(tag, words, tmp_path):
    for name in (".github/release.sh", "vllm_fusion_plugin/__init__.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n")
    run = subprocess.run([tmp_path / ".github/release.sh", tag], capture_output=True, text=True)
    assert run.returncode == 1
    assert words in run.stderr
