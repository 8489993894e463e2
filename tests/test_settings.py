# SPDX-License-Identifier: Apache-2.0
"""Settings and the entry point, without an engine."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from vllm_fusion_plugin import settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(settings.ENV_SWITCH):
            monkeypatch.delenv(name)


def test_defaults():
    assert settings.load() == settings.Settings()
    assert settings.Settings().enabled


def test_additional_config_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv(settings.ENV_SETTINGS, '{"use_pdl": false, "nvfp4_kernel": "ours"}')
    chosen = settings.load({"fusion_plugin": {"use_pdl": True}, "another plugin's": 1})
    assert (chosen.use_pdl, chosen.nvfp4_kernel) == (True, "ours")


def test_the_switch_wins_over_everything(monkeypatch):
    monkeypatch.setenv(settings.ENV_SWITCH, "0")
    assert not settings.load({"fusion_plugin": {"enabled": True}}).enabled


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fuse": True}, "fuse=True.*settings: enabled"),
        ({"use_pdl": "perhaps"}, "use_pdl='perhaps'"),
        ({"stock_passes": ["NoSuchPass"]}, "'NoSuchPass'; allowed: ActivationQuantFusionPass"),
        ({"nvfp4_kernel": "theirs"}, "nvfp4_kernel='theirs'.*'vllm' or 'ours'"),
        ([1], r"additional_config\['fusion_plugin'\]=\[1\]; allowed: an object"),
    ],
)
def test_bad_settings_name_setting_value_and_what_is_allowed(values, message):
    with pytest.raises(settings.SettingsError, match=message):
        settings.load({"fusion_plugin": values})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (settings.ENV_SETTINGS, "{", "is not JSON"),
        (settings.ENV_SETTINGS, "[1]", "allowed: a JSON object"),
        (settings.ENV_SWITCH, "off", "VLLM_FUSION_PLUGIN='off' is not understood; allowed: 1 \\(on, the default"),
    ],
)
def test_bad_environment(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(settings.SettingsError, match=message):
        settings.load()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=1800)


REGISTER = """
import vllm, logging, sys
from vllm.config import VllmConfig
from vllm.platforms import current_platform
before = (VllmConfig.compute_hash, type(current_platform).get_pass_manager_cls())
from vllm_fusion_plugin import plugin, report
known = set(sys.modules)
{body}
print("imported", sorted(name for name in sys.modules if name not in known))
print("manager", type(current_platform).get_pass_manager_cls())
print("untouched", before == (VllmConfig.compute_hash, type(current_platform).get_pass_manager_cls()))
print("state", report.RECORDER.report.manager)
"""


def answers(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(line.split(" ", 1) for line in result.stdout.splitlines() if " " in line)


def test_register_is_quick_and_can_be_called_again():
    """Quick: it imports neither torch's compiler nor our passes and kernels, which take seconds. Every process of vLLM's
    calls it."""
    pytest.importorskip("vllm")
    result = answers(run(REGISTER.format(body="plugin.register(); plugin.register()")))
    assert result["manager"] == "vllm_fusion_plugin.plugin.make_pass_manager"
    ours = {"vllm_fusion_plugin.compat", "vllm_fusion_plugin.seams"}
    assert set(ast.literal_eval(result["imported"])) <= ours


def test_switched_off_touches_nothing():
    pytest.importorskip("vllm")
    result = answers(run(REGISTER.format(body="plugin.register()"), VLLM_FUSION_PLUGIN="0"))
    assert result["untouched"] == "True"
    assert result["state"] == "off: VLLM_FUSION_PLUGIN=0"


@pytest.mark.parametrize(
    ("body", "environment", "cause"),
    [
        ("plugin.register(); plugin.register()", {"VLLM_FUSION_PLUGIN": "maybe"}, "VLLM_FUSION_PLUGIN='maybe'"),
        ("plugin.register(); plugin.register()", {"VLLM_FUSION_PLUGIN_SETTINGS": '{"x": 1}'}, "x=1"),
        (
            "type(current_platform).get_pass_manager_cls = classmethod(lambda c: 'a.b.C'); plugin.register()",
            {},
            "the pass manager is a.b.C already",
        ),
        (
            "import vllm_fusion_plugin.seams as c; c.hash_into_config = lambda *a: 1 / 0; plugin.register()",
            {},
            "ZeroDivisionError",
        ),
    ],
)
def test_what_fails_is_one_warning_and_stock_vllm(body, environment, cause):
    pytest.importorskip("vllm")
    result = run(REGISTER.format(body=body), **environment)
    assert cause in answers(result)["state"]
    assert (result.stdout + result.stderr).count("vllm-fusion-plugin is not active") == 1


def test_vllm_knows_our_environment():
    pytest.importorskip("vllm")
    code = """
from vllm_fusion_plugin import plugin
plugin.register()
from vllm.platforms import current_platform
current_platform.validate_environ(hard_fail=True)
"""
    result = run(code, VLLM_FUSION_PLUGIN="1", VLLM_FUSION_PLUGIN_SETTINGS="{}")
    assert result.returncode == 0, result.stderr[-2000:]
