# SPDX-License-Identifier: Apache-2.0
"""`in_a_fork` tells what became of a test, and keeps what it leaves behind to itself."""

from __future__ import annotations

import os

import pytest

from .forked import in_a_fork

LEFT: list[int] = []


@in_a_fork
def test_leaves_something_behind():
    LEFT.append(1)


def test_nothing_is_left_behind():
    in_a_fork(lambda: LEFT.append(1))()
    assert not LEFT


@in_a_fork
def test_fixtures_and_parameters_reach_the_fork(tmp_path, monkeypatch):
    monkeypatch.setenv("FORKED", str(tmp_path))
    assert os.environ["FORKED"] == str(tmp_path)


def test_failures_are_failures():
    def wrong():
        raise AssertionError("two is not three")

    with pytest.raises(pytest.fail.Exception, match="two is not three"):
        in_a_fork(wrong)()


def test_a_process_that_ends_is_a_failure():
    with pytest.raises(pytest.fail.Exception, match="ended with status 7"):
        in_a_fork(lambda: os._exit(7))()


def test_skips_are_skips():
    with pytest.raises(pytest.skip.Exception, match="not here"):
        in_a_fork(lambda: pytest.skip("not here"))()


def test_torch_works_in_a_fork_of_a_process_with_threads():
    torch = pytest.importorskip("torch")
    if torch.get_num_threads() == 1:
        torch.set_num_threads(2)
    torch.ones(10_000_000).add_(1)

    def again():
        assert torch.ones(10_000_000).add_(1).eq(2).all()

    in_a_fork(again)()
