# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of every kind of installation: what is imported decides; what cannot be told is never the same twice."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

import vllm_fusion_plugin
from vllm_fusion_plugin import fingerprint
from vllm_fusion_plugin.settings import Settings

PACKAGE = Path(vllm_fusion_plugin.__file__).parent
ASK = """
from vllm_fusion_plugin import fingerprint, settings
print(fingerprint.fingerprint(settings.Settings()))
print(fingerprint.unknown_code())
print(fingerprint.kernels_without_source())
"""


def build(folder: Path, kind: str, change: Callable[[Path], None] = lambda package: None) -> Path:
    """Install this package, its sources changed, in a folder; what to put on Python's path."""
    package = folder / "sources" / "vllm_fusion_plugin"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    change(package)
    if "compiled" in kind:
        assert compileall.compile_dir(package, quiet=1, legacy=True, ddir="/other")
        for path in package.rglob("*.py"):
            path.unlink()
    if "zipped" not in kind:
        return package.parent
    with zipfile.ZipFile(folder / "package.zip", "w") as archive:
        for path in sorted(package.rglob("*.py*")):
            archive.write(path, path.relative_to(package.parent))
    return folder / "package.zip"


def ask(place: Path, **environment: str) -> tuple[str, str, str]:
    """(fingerprint, why the code is unknown, why kernels cannot be compiled) in a process that imports from `place`."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(place)} | environment
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    process = subprocess.run(
        [sys.executable, "-c", ASK], env=env, cwd=place.parent, capture_output=True, text=True, timeout=1800
    )
    assert process.returncode == 0, process.stderr
    key, unknown, sources = process.stdout.split("\n")[:3]
    return key, unknown, sources


KINDS = ("sources", "compiled", "zipped", "zipped and compiled")


def another_kernel(package: Path) -> None:
    path = package / "kernels" / "numerics.py"
    path.write_text(path.read_text() + "\nANOTHER = 1\n")


def another_report(package: Path) -> None:
    path = package / "report.py"
    path.write_text(path.read_text() + "\nANOTHER = 1\n")


@pytest.mark.parametrize("kind", KINDS)
def test_two_builds_have_two_fingerprints_and_one_has_one(kind, tmp_path):
    one = ask(build(tmp_path / "a", kind), PYTHONHASHSEED="1")
    again = ask(build(tmp_path / "b", kind), PYTHONHASHSEED="2")
    other = ask(build(tmp_path / "c", kind, another_kernel))
    shown = ask(build(tmp_path / "d", kind, another_report))
    assert one[1] == ""
    assert one == again == shown
    assert one[0] != other[0]
    assert bool(one[2]) == ("compiled" in kind)


def test_the_kind_of_installation_does_not_matter(tmp_path):
    assert len({ask(build(tmp_path / kind, kind))[0] for kind in KINDS}) == 1


def dangling(package: Path) -> None:
    (package / "kernels" / "dangling.py").symlink_to(package / "no such file")


def not_python(package: Path) -> None:
    (package / "kernels" / "numerics.py").write_text("def cut short(")


def without_kernels(package: Path) -> None:
    shutil.rmtree(package / "kernels")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dangling, "no loader for vllm_fusion_plugin.kernels.dangling"),
        (not_python, "SyntaxError"),
        (without_kernels, "no module kernels*"),
    ],
)
def test_code_that_cannot_be_told_is_never_the_same(change, why, tmp_path):
    place = build(tmp_path / "a", "sources", change)
    (one, reason, _), (two, _, _) = ask(place), ask(place)
    assert why in reason
    assert one != two


def test_an_unreadable_file_is_no_error(monkeypatch):
    """By permissions, or on a disk that is gone: nothing that a test may make, least of all as root."""

    def get_data(self, path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(SourceFileLoader, "get_data", get_data)
    with pytest.raises(fingerprint.UnknownCodeError, match=r"PermissionError.*Permission denied"):
        fingerprint.code_hash(vllm_fusion_plugin.__path__)


def test_what_nobody_imports_does_not_matter(tmp_path):
    def editors_lock(package: Path) -> None:
        (package / "kernels" / ".#numerics.py").symlink_to("user@host.1234")

    want = ask(build(tmp_path / "a", "sources"))
    assert ask(build(tmp_path / "b", "sources", editors_lock)) == want


def test_a_process_has_one_name_for_unknown_code_and_a_fork_another(monkeypatch):
    def unreadable(paths):
        raise fingerprint.UnknownCodeError("nothing can be read")

    monkeypatch.setattr(fingerprint, "code_hash", unreadable)
    fingerprint._state.cache_clear()
    try:
        mine = fingerprint.fingerprint(Settings())
        assert mine == fingerprint.fingerprint(Settings())
        assert fingerprint.unknown_code() == "nothing can be read"
        monkeypatch.setattr(os, "getpid", lambda: -1)
        assert fingerprint.fingerprint(Settings()) != mine
    finally:
        fingerprint._state.cache_clear()


def test_extra_is_part_of_it():
    plain = fingerprint.fingerprint(Settings())
    one = fingerprint.fingerprint(Settings(), {"rounding": "divide", "b": "1"})
    assert fingerprint.fingerprint(Settings(), {}) == plain != one
    assert one == fingerprint.fingerprint(Settings(), {"b": "1", "rounding": "divide"})
    assert one != fingerprint.fingerprint(Settings(), {"rounding": "multiply", "b": "1"})
    assert fingerprint.fingerprint(Settings(), {"a": "1\nb=2"}) != fingerprint.fingerprint(
        Settings(), {"a": "1", "b": "2"}
    )


def test_unique_keys():
    assert fingerprint.unique_key() != fingerprint.unique_key()
