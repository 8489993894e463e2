# SPDX-License-Identifier: Apache-2.0
"""What is written down while vLLM compiles, with a compiler that only goes through the motions."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_fusion_plugin.recorder import Recorder
from vllm_fusion_plugin.report import FusionReport, modules_of

PASS, RANGES = "norm", ("(1, 8)", "(9, 64)")


class Thing:
    """An engine's owner, a pass manager or an artefact."""


def node(module: str) -> SimpleNamespace:
    return SimpleNamespace(meta={"nn_module_stack": {module: (f"L['self'].{module}", None)}})


def compile_part(
    recorder: Recorder,
    owner: Thing,
    layers: int,
    name: str = "backbone",
    folder: Path | None = None,
    ranges=RANGES,
    from_disk: bool = False,
) -> Thing:
    """As vLLM compiles a part: layer by layer, each for every range, equal layers once."""
    manager = Thing()
    recorder.begin_part(manager, owner, name, folder and str(folder))
    artefacts: dict[str, Thing] = {}
    if not from_disk:
        recorder.note(f"compiled {name}")
    for i in range(layers):
        for compile_range in ranges:
            recorder.begin_subgraph(manager, i, compile_range, [node(f"layers.{i}.norm")])
            if compile_range not in artefacts and not from_disk:
                recorder.begin_passes(manager, compile_range)
                recorder.found(PASS, "rms_norm+group", f"layers.{i}")
                recorder.missed(PASS, "strides", f"layers.{i}.norm")
            recorder.end_subgraph(artefacts.setdefault(compile_range, Thing()))
    return manager


def modules(recorder: Recorder, owner: Thing) -> list[str]:
    return [f.module for s in recorder.engine(owner).report.subgraphs for f in s.found]


def test_engines_of_one_process_do_not_add_up(tmp_path):
    recorder, first, second = Recorder(), Thing(), Thing()
    compile_part(recorder, first, 4)
    compile_part(recorder, second, 2, folder=tmp_path)
    report = recorder.engine(second).report
    assert report.match_table() == {PASS: 2}
    assert report.layer_table() == {PASS: 2}
    assert set(modules(recorder, second)) == {"layers.0", "layers.1"}
    assert recorder.engine(first).report.layer_table() == {PASS: 4}

    again = Recorder()  # what was kept beside the second's code is the second's alone
    compile_part(again, second, 2, folder=tmp_path, from_disk=True)
    assert again.engine(second).report.layer_table() == {PASS: 2}


def test_engines_that_take_turns():
    recorder, owners = Recorder(), (Thing(), Thing())
    managers = [Thing(), Thing()]
    for manager, owner in zip(managers, owners, strict=True):
        recorder.begin_part(manager, owner, "backbone", None)
    for i, j in ((0, 0), (0, 1), (1, 0)):
        recorder.begin_subgraph(managers[j], i, "(1, 8)", [node(f"layers.{i}")])
        recorder.begin_passes(managers[j], "(1, 8)")
        recorder.found(PASS, "p", f"layers.{i}")
        recorder.end_subgraph(Thing())
    assert [modules(recorder, owner) for owner in owners] == [["layers.0", "layers.1"], ["layers.0"]]


def test_target_and_draft_are_two_models_of_one_report():
    recorder, owner = Recorder(), Thing()
    compile_part(recorder, owner, 4)
    compile_part(recorder, owner, 1, name="draft_model")
    report = FusionReport(ranks=[recorder.engine(owner).report])
    assert report.layer_table() == {PASS: 5}
    assert [(row[2], row[4], row[-1]) for row in report.rows()] == [
        ("(1, 8)", 4, "backbone: layers.0-3"),
        ("(9, 64)", 4, "backbone: layers.0-3"),
        ("(1, 8)", 1, "draft_model: layers.0"),
        ("(9, 64)", 1, "draft_model: layers.0"),
    ]


def test_an_engine_that_is_gone_is_forgotten():
    recorder, owner = Recorder(), Thing()
    record = weakref.ref(recorder.engine(owner))
    recorder.engine(Thing())
    assert record() is recorder.engine(owner)
    del owner
    recorder.engine(Thing())
    gc.collect()
    assert record() is None
    assert not [r for r in recorder._engines.values() if r[0]() is not None]


def test_a_manager_of_no_part_records_nothing():
    recorder, owner = Recorder(), Thing()
    compile_part(recorder, owner, 1)
    recorder.leave_part()  # an engine without the plugin compiles next
    other = Thing()
    recorder.begin_subgraph(other, 0, "(1, 8)", [node("layers.7")])
    recorder.begin_passes(other, "(1, 8)")
    recorder.end_subgraph(Thing())
    assert len(recorder.engine(owner).report.subgraphs) == 2


def test_inductor_artefacts_from_disk_bring_the_report_back(tmp_path):
    """A VllmBackend is made, and vLLM loads graph by graph; equal ones it takes from the first."""
    cold, warm, owner = Recorder(), Recorder(), Thing()
    compile_part(cold, owner, 3, folder=tmp_path)
    compile_part(warm, owner, 3, folder=tmp_path, from_disk=True)
    before, after = cold.engine(owner).report, warm.engine(owner).report
    assert all(s.from_cache for s in after.subgraphs)
    assert not any(s.from_cache for s in before.subgraphs)
    assert [s.model_copy(update={"from_cache": False}) for s in after.subgraphs] == before.subgraphs
    assert warm.engine(owner).unreported == 0
    assert after.notes == before.notes == ["compiled backbone"]

    third = Recorder()  # and the second start has not spoilt it
    compile_part(third, owner, 3, folder=tmp_path, from_disk=True)
    assert third.engine(owner).report.subgraphs == after.subgraphs


def test_aot_artefacts_from_disk_bring_the_report_back(tmp_path):
    """No VllmBackend is made. Two parts, each beside its own code."""
    cold, warm, owner = Recorder(), Recorder(), Thing()
    for name, layers in (("backbone", 3), ("draft_model", 1)):
        (tmp_path / name).mkdir()
        compile_part(cold, owner, layers, name, tmp_path / name)
        warm.end_load(warm.begin_load(owner), name, str(tmp_path / name))
    before, after = cold.engine(owner).report, warm.engine(owner).report
    assert all(s.from_cache for s in after.subgraphs)
    assert [s.model_copy(update={"from_cache": False}) for s in after.subgraphs] == before.subgraphs


def test_an_aot_artefact_whose_graphs_went_through_the_compiler_counts_once(tmp_path):
    compile_part(Recorder(), Thing(), 3, folder=tmp_path)
    recorder, owner = Recorder(), Thing()
    begun = recorder.begin_load(owner)
    compile_part(recorder, owner, 3, folder=tmp_path, from_disk=True)
    recorder.end_load(begun, "backbone", str(tmp_path))
    assert recorder.engine(owner).report.layer_table() == {PASS: 3}


@pytest.mark.parametrize("text", [None, "{", '{"subgraphs": [{}]}'])
def test_code_without_a_report_beside_it_is_told(tmp_path, text):
    if text is not None:
        (tmp_path / "rank_0.fusion_report.json").write_text(text)
    recorder, owner = Recorder(), Thing()
    recorder.end_load(recorder.begin_load(owner), "backbone", str(tmp_path))
    assert recorder.engine(owner).unreported == 1
    assert recorder.engine(owner).report.subgraphs == []


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog):
    recorder, owner = Recorder(), Thing()
    compile_part(recorder, owner, 1, folder=tmp_path / "no such folder")
    assert recorder.engine(owner).report.layer_table() == {PASS: 1}
    assert "not kept for warm starts" in caplog.text


def test_modules_have_the_names_that_models_give_them():
    names = ["layers.0.mlp.act_fn", "layers.1.linear_attn._forward_method.__self__.in_proj_qkvz"]
    assert modules_of(map(node, names)) == ["layers.0.mlp.act_fn", "layers.1.linear_attn.in_proj_qkvz"]
