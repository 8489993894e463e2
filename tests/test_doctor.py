# SPDX-License-Identifier: Apache-2.0
"""`doctor`: what it says of installations, variables and flags. With vLLM's CUDA build: tests/compile/test_doctor.py."""

from __future__ import annotations

import importlib.metadata
import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_fusion_plugin import __version__, child, cli, vllm_flags
from vllm_fusion_plugin.doctor import command, installation
from vllm_fusion_plugin.doctor.diagnosis import Diagnosis, Engine, Finding, PassState

MODELS = Path(__file__).parent / "models"


def installed(site: Path, version: str = __version__, source: str | None = None) -> Path:
    """The metadata of an installation in `site`; with `source`, an editable one of that folder."""
    info = site / f"vllm_fusion_plugin-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-fusion-plugin\nVersion: {version}\n")
    if source:
        (info / "direct_url.json").write_text(json.dumps({"url": f"file://{source}", "dir_info": {"editable": True}}))
    return site / "vllm_fusion_plugin"


def package(*sites: Path, module: Path) -> Finding:
    found = importlib.metadata.distributions(name="vllm-fusion-plugin", path=[str(site) for site in sites])
    return installation.package(list(found), module)


def test_one_installation_is_in_order(tmp_path):
    module = installed(tmp_path / "site")
    assert package(tmp_path / "site", module=module).state == "ok"
    installed(tmp_path / "editable", source=str(tmp_path / "a clone").replace(" ", "%20"))
    assert package(tmp_path / "editable", module=tmp_path / "a clone" / "vllm_fusion_plugin").state == "ok"


def test_an_installation_that_vllm_would_not_find_is_named(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    module = installed(a)
    installed(b, version="0.0.1")
    for finding, words in (
        (package(module=module), "not installed"),
        (package(a, b, module=module), f"installed twice: {__version__} in {a}, 0.0.1 in {b}"),
        (package(b, module=b / "vllm_fusion_plugin"), "stale metadata: they say 0.0.1"),
        (package(a, module=b / "vllm_fusion_plugin"), f"Python imports {b / 'vllm_fusion_plugin'}"),
    ):
        assert finding.state == "problem" and words in finding.said and finding.do


@pytest.mark.parametrize(
    ("values", "state", "words"),
    [
        ([installation.VALUE], "ok", installation.VALUE),
        ([installation.VALUE] * 2, "ok", installation.VALUE),  # two installations, which `package` reports
        ([], "problem", "none named vllm_fusion_plugin"),
        (["vllm_fusion_plugin:register"], "problem", "stale metadata"),
    ],
)
def test_entry_points(values, state, words):
    found = installation.entry_point([EntryPoint(installation.NAME, value, installation.GROUP) for value in values])
    assert found.state == state and words in found.said


def test_the_packages_entry_point_is_the_one_that_is_looked_for():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'[project.entry-points."{installation.GROUP}"]\n{installation.NAME} = "{installation.VALUE}"\n' in text


@pytest.mark.parametrize(
    ("value", "do"),
    [
        ("vllm-fusion-plugin", "VLLM_PLUGINS=vllm_fusion_plugin"),
        ("lora, vllm_fusion_plugin", "VLLM_PLUGINS=lora,vllm_fusion_plugin"),  # vLLM strips nothing
        ("lora", "VLLM_PLUGINS=lora,vllm_fusion_plugin"),
        ("", "VLLM_PLUGINS=vllm_fusion_plugin"),
    ],
)
def test_vllm_plugins_that_leave_it_out(value, do):
    found = installation.chosen(value)
    assert found.state == "problem" and found.do == do


def test_vllm_plugins_that_let_it_in():
    assert installation.chosen(None) is None
    assert installation.chosen("lora,vllm_fusion_plugin").state == "ok"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("VLLM_FUSION_PLUGIN", "0", "off: VLLM_FUSION_PLUGIN=0"),
        ("VLLM_FUSION_PLUGIN", "on", "not understood"),
        ("VLLM_FUSION_PLUGIN_SETTINGS", '{"use_pld": true}', "use_pld"),
    ],
)
def test_settings_that_switch_it_off(name, value, words, monkeypatch):
    assert installation.switch() is None
    monkeypatch.setenv(name, value)
    assert installation.switch().state == "problem" and words in installation.switch().said


# ---- models and flags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "model", "rest"),
    [
        ([], "", []),
        (["a/b", "--x"], "a/b", ["--x"]),
        (["--x", "--model", "a/b", "-y"], "a/b", ["--x", "-y"]),
        (["--x", "--model=a/b"], "a/b", ["--x"]),
        (["--x", "y"], "", ["--x", "y"]),
    ],
)
def test_the_model_among_the_flags(flags, model, rest):
    assert vllm_flags.split_model(flags) == (model, rest)


def test_models_are_folders_or_in_the_hubs_cache(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    assert vllm_flags.model_folder(str(MODELS / "qwen3-8b-8layers")) == (MODELS / "qwen3-8b-8layers").resolve()
    for model, words in (
        (str(tmp_path), "no config.json"),
        (str(tmp_path / "none"), "no folder"),
        ("nobody/nothing", "hf download nobody/nothing config.json"),
        ("so far: no id", "neither a folder"),
    ):
        with pytest.raises(child.UserError, match=words):
            vllm_flags.model_folder(model)


# ---- the command -----------------------------------------------------------------------------------------------------


def diagnosis(*findings: Finding, engine: Engine | None = None) -> Diagnosis:
    return Diagnosis(version="1", findings=list(findings), engine=engine)


FINE, WRONG = Finding(about="a", state="ok", said="b"), Finding(about="c", state="problem", said="d", do="e f")
ENGINE = Engine(gpu="GPU", model="m", passes=[PassState(name="P", switch="fuse_p", state="ours")])
FLAG = vllm_flags.NoEffect(flag="fuse_x", why="because of y", do="z")


@pytest.mark.parametrize(
    ("found", "status", "verdict"),
    [
        (diagnosis(FINE, engine=ENGINE), 0, "The plugin is found, and 1 of 1 passes are this package's"),
        (diagnosis(FINE), 2, "could not be asked here"),
        (diagnosis(FINE, WRONG, engine=ENGINE), 1, "1 thing stands in the way"),
        (diagnosis(engine=ENGINE.model_copy(update={"state": "eager"})), 1, "1 thing stands in the way"),
        (diagnosis(WRONG, engine=ENGINE.model_copy(update={"no_effect": [FLAG]})), 1, "2 things stand in the way"),
    ],
)
def test_exit_status_and_verdict(found, status, verdict, monkeypatch):
    monkeypatch.setattr(command, "diagnose", lambda flags, gpu: found)
    shown = CliRunner().invoke(cli.app, ["doctor"])
    assert shown.exit_code == status and verdict in shown.output.splitlines()[-1]
    printed = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert (printed.exit_code, Diagnosis(**json.loads(printed.output))) == (status, found)


def test_what_a_user_can_set_right_is_one_line(monkeypatch):
    def ask(module, request):
        assert request["flags"] == ["--max-num-seqs", "x"]
        raise child.UserError("vLLM does not accept these flags: x")

    monkeypatch.setattr(installation, "libraries", lambda: [])
    monkeypatch.setattr(child, "ask", ask)
    shown = CliRunner().invoke(cli.app, ["doctor", "--", "--max-num-seqs", "x"])
    assert (shown.exit_code, shown.output) == (2, "error: vLLM does not accept these flags: x\n")


def test_without_vllm_it_says_so(monkeypatch):
    monkeypatch.setattr(installation, "_version", lambda name: None)
    shown = CliRunner().invoke(cli.app, ["doctor"])
    assert shown.exit_code == 1 and "not installed in this environment" in " ".join(shown.output.split())


def test_vllms_cpu_engine(monkeypatch):
    """Its own mode is another without the CPU opt-in, and then no flag does anything."""
    pytest.importorskip("vllm")
    if not importlib.metadata.version("torch").endswith("+cpu"):
        pytest.skip("needs vLLM's CPU build")
    monkeypatch.setenv("VLLM_PLUGINS", installation.NAME)
    told = child.ask(
        "vllm_fusion_plugin.doctor.probe",
        {"flags": ["-cc.pass_config.fuse_act_quant=true", "--port", "1"], "gpu": "h100"},
    )
    engine = Engine(**told["engine"])
    assert engine.gpu == "CPU" and engine.state.startswith("not compiled by vLLM: mode ")
    assert [n.flag for n in engine.no_effect] == ["fuse_act_quant"] and "-cc.mode=3" in engine.no_effect[0].do
    assert engine.ignored == ["--port", "1"]
