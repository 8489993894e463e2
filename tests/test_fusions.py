# SPDX-License-Identifier: Apache-2.0
"""Fusions that other packages add; with vLLM: compile/test_example.py."""

from __future__ import annotations

import pytest

from vllm_fusion_plugin import fingerprint, fusions
from vllm_fusion_plugin.settings import Settings


@pytest.fixture(autouse=True)
def nothing_added(monkeypatch):
    monkeypatch.setattr(fusions, "ADDED", {})
    fingerprint._hash_of_added.cache_clear()
    yield
    fingerprint._hash_of_added.cache_clear()


def test_adding_again_changes_nothing():
    for _ in range(2):
        fusions.add("a.b:C", ops=["a.op"])
    (added,) = fusions.ADDED.values()
    assert added == fusions.Added("a.b", "C", ("a.op",))


@pytest.mark.parametrize(
    ("pass_class", "ops", "words"),
    [
        ("a.b.C", [], "pass_class='a.b.C'; allowed: 'package.module:Class'"),
        ("a b:C", [], "allowed: 'package.module:Class'"),
        ("a:C", ["b/c"], r"ops=\['b/c'\]; allowed: a list of 'package.module'"),
        ("a:C", "b", "ops='b'; allowed: a list"),
        ("a:GroupQuantPass", [], "there is a pass GroupQuantPass already"),
        ("a:Known", [], "there is a pass Known already"),
    ],
)
def test_bad_input(pass_class, ops, words):
    fusions.add("other:Known")
    with pytest.raises(ValueError, match=words):
        fusions.add(pass_class, ops)


def test_the_code_of_what_is_added_is_hashed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source, keys = tmp_path / "added_op.py", [fingerprint.fingerprint(Settings())]
    for text in ("x = 1", "x = 22", "x = 1"):
        source.write_text(text)
        fingerprint._hash_of_added.cache_clear()
        fusions.add("added_op:Pass")
        keys.append(fingerprint.fingerprint(Settings()))
    assert keys[1] == keys[3] and len(set(keys)) == 3


def test_code_that_cannot_be_read_is_never_found_again():
    fusions.add("no_such_module:Pass")
    first = fingerprint.fingerprint(Settings())
    assert fingerprint.fingerprint(Settings()) == first
    fingerprint._hash_of_added.cache_clear()  # as another process
    assert fingerprint.fingerprint(Settings()) != first
