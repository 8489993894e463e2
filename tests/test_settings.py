# SPDX-License-Identifier: Apache-2.0
"""Settings and the entry point, without an engine."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
        ({"fused": True}, "fused=True.*settings: enabled"),
        ({"fuse": "never"}, "fuse='never'.*'auto' or 'vllm'"),
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


# ---- the entry point -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What register_child.py tells, by case."""
    if importlib.util.find_spec("vllm") is None:  # importing it takes long, and this process has no use for it
        pytest.skip("vLLM is not installed")
    result = tmp_path_factory.mktemp("register") / "result.json"
    process = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "register_child.py"), str(result)],
        env={k: v for k, v in os.environ.items() if not k.startswith(settings.ENV_SWITCH)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(result.read_text())


def outcome(registered: dict[str, dict[str, Any]], case: str) -> dict[str, Any]:
    """What is known after a case in which nothing was raised."""
    assert not registered[case]["error"], registered[case]["error"]
    return registered[case]


def test_register_is_quick_and_can_be_called_again(registered):
    """Quick: it imports neither torch's compiler nor our passes and kernels, which take seconds. Every process of vLLM's
    calls it."""
    after = outcome(registered, "twice")
    assert after["manager"] == "vllm_fusion_plugin.plugin.make_pass_manager"
    assert not after["untouched"]
    assert set(after["imported"]) <= {"vllm_fusion_plugin.compat", "vllm_fusion_plugin.seams"}


def test_switched_off_touches_nothing(registered):
    after = outcome(registered, "switched off")
    assert after["untouched"]
    assert after["state"] == "off: VLLM_FUSION_PLUGIN=0"


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        ("switch misspelt", "VLLM_FUSION_PLUGIN='maybe'"),
        ("unknown setting", "x=1"),
        ("behind another plugin", "the pass manager is a.b.C already"),
        ("broken seam", "ZeroDivisionError"),
    ],
)
def test_what_fails_is_one_warning_and_stock_vllm(registered, case, cause):
    after = outcome(registered, case)
    assert cause in after["state"]
    assert after["log"].count("vllm-fusion-plugin is not active") == 1


def test_vllm_knows_our_environment(registered):
    assert "VLLM_FUSION_PLUGIN" in registered["unknown environment"]["error"]  # without the plugin, vLLM would refuse
    outcome(registered, "known environment")
