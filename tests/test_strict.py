# SPDX-License-Identifier: Apache-2.0
"""What strict mode makes of the reports of all ranks; engines are in e2e/test_report_states.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_fusion_plugin import settings, strict, vllm_flags
from vllm_fusion_plugin.rank_report import MODEL_CODE, UNFORESEEN, Found, Missed, RankReport, Subgraph, Verified

ACT, NORM, LONE = "activation_quant_fusion_pass", "rmsnorm_quant_fusion_pass", "group_quant_pass"
FOUND_ACT = Found(pass_name=ACT, pattern="silu_mul[native]+group128[native]", module="layers.0.mlp")
FOUND_NORM = Found(pass_name=NORM, pattern="rms_norm+group128[native]", module="layers.0")


@pytest.fixture(autouse=True)
def nothing_stands_in_the_way(monkeypatch):
    monkeypatch.delenv(settings.ENV_SETTINGS, raising=False)
    monkeypatch.delenv(settings.ENV_SWITCH, raising=False)
    monkeypatch.setattr(vllm_flags, "without_effect", lambda config, asked: [])


def config(
    strict: bool = True, flags=("fuse_act_quant", "fuse_norm_quant"), tp: int = 1, **chosen: Any
) -> SimpleNamespace:
    pass_config = SimpleNamespace(**dict.fromkeys(flags, True))
    return SimpleNamespace(
        additional_config={"fusion_plugin": {"strict": strict, **chosen}},
        compilation_config=SimpleNamespace(pass_config=pass_config),
        parallel_config=SimpleNamespace(tensor_parallel_size=tp),
    )


def rank(*found: Found, number: int = 0, missed: tuple[Missed, ...] = (), **fields: Any) -> RankReport:
    subgraph = Subgraph(index=0, compile_range="(1, 8)", found=list(found), missed=list(missed))
    return RankReport(**{"rank": number, "manager": "active", "subgraphs": [subgraph], **fields})


def start(config: Any, *ranks: RankReport) -> str:
    """What keeps an engine of these ranks from starting; "" if it starts."""

    def collective_rpc(method: str) -> list[dict[str, Any]]:
        assert method == "get_fusion_report"
        return [r.model_dump() for r in ranks]

    try:
        strict.check(SimpleNamespace(vllm_config=config, collective_rpc=collective_rpc))
    except strict.StrictError as e:
        return str(e)
    return ""


def test_all_at_work():
    assert not start(config(), rank(FOUND_ACT, FOUND_NORM))
    assert not start(config(), rank(FOUND_ACT, FOUND_NORM, manager="active, from file: ..."))
    assert not start(config(), rank(FOUND_ACT), rank(FOUND_NORM, number=1)), "what one rank lacks another has"


def test_off_by_default_and_with_the_plugin_switched_off(monkeypatch):
    assert not settings.Settings().strict
    assert not start(config(strict=False), rank(manager="inactive: why"))
    monkeypatch.setenv(settings.ENV_SWITCH, "0")
    assert not start(config(), rank(manager="off"))


def test_a_flag_without_a_match_and_why():
    missed = Missed(pass_name=NORM, reason="its layout is strange", module="layers.0")
    said = start(config(), rank(FOUND_ACT, missed=(missed,)))
    assert said.count("is on, and has fused nothing") == 1
    assert "fuse_norm_quant is on, and has fused nothing: its layout is strange → -cc.pass_config.fuse_norm" in said
    assert "there is nothing for it to fuse in this model" in start(config(), rank(FOUND_NORM))
    assert not start(config(flags=("fuse_act_quant",)), rank(FOUND_ACT)), "a flag that is off"
    assert not start(config(stock_passes=["RMSNormQuantFusionPass"]), rank(FOUND_ACT)), "a pass left to vLLM"
    passes = {"RMSNormQuantFusionPass": "off: fuse_norm_quant is set, but vLLM builds no such pass here"}
    assert "builds no such pass here" in start(config(), rank(FOUND_ACT, passes=passes))


@pytest.mark.parametrize(
    ("found", "flag"),
    [
        (FOUND_ACT, "fuse_act_quant"),
        (Found(pass_name="experts_silu_mul_quant", pattern="silu_mul+group128"), "fuse_act_quant"),
        (Found(pass_name=MODEL_CODE, pattern="silu_mul+static[_C.silu_and_mul_quant]"), "fuse_act_quant"),
        (Found(pass_name=MODEL_CODE, pattern="rms_norm+static[_C.x]"), "fuse_norm_quant"),
        (Found(pass_name="mla_attn_quant_fusion", pattern="mla_attention+group128"), "fuse_attn_quant"),
        (Found(pass_name=LONE, pattern="group128[custom_op,row]"), ""),
    ],
)
def test_what_is_fused_by_others_leaves_nothing_to_ask_for(found, flag):
    assert strict.fulfils(found) == flag


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (rank(number=3, manager="inactive: why"), "rank 3: inactive: why"),
        (rank(manager="eager: nothing is compiled"), "→ leave out --enforce-eager"),
        (rank(manager="active, its compiled code from file, and no report was kept beside it"), "compiles anew"),
        (rank(FOUND_ACT, FOUND_NORM, passes={"X": "stock's: ours failed: E"}), "X: stock's: ours failed: E"),
    ],
)
def test_a_rank_on_which_it_is_not_at_work(report, words):
    assert words in start(config(), report)


def test_bad_settings_and_workers_that_do_not_answer():
    assert "no_such_setting=1" in start(config(no_such_setting=1), rank(FOUND_ACT, FOUND_NORM))
    with pytest.raises(strict.StrictError, match="cannot be asked what has fused: AttributeError"):
        strict.check(SimpleNamespace(vllm_config=config()))


def test_what_nothing_known_stands_in_the_way_of():
    """`explain` has a reason for whatever it leaves."""
    known = Missed(pass_name="none", reason="it quantises a tensor that is made outside", module="layers.0.o_proj")
    assert not start(config(), rank(FOUND_ACT, FOUND_NORM, missed=(known,)))
    left = [Missed(pass_name=NORM, reason=f"a norm, and {UNFORESEEN}", module=f"layers.{i}.norm") for i in range(3)]
    said = start(config(), rank(FOUND_ACT, FOUND_NORM, missed=(known, *left)))
    assert f"a norm, and {UNFORESEEN}: layers.0-2.norm" in said and "made outside" not in said


def test_fewer_than_explain_has_counted():
    left = Missed(pass_name="none", reason="an FP8 quantiser, of something unknown", module="layers.0.o_proj")
    here = rank(FOUND_ACT, FOUND_NORM, missed=(left,))
    assert not start(config(expect_fused=2), here)
    said = start(config(expect_fused=3), here)
    assert "2 quantisers are fused on each GPU, and expect_fused is 3; left: an FP8 quantiser, of something" in said
    # two GPUs share each layer, and two more have the other layers
    four = [rank(FOUND_ACT, FOUND_NORM, number=n) for n in range(4)]
    assert not start(config(expect_fused=4, tp=2), *four) and start(config(expect_fused=5, tp=2), *four)
    # a graph for other numbers of tokens is no other place, and a quantiser by itself is not fused
    again = Subgraph(index=0, compile_range="(9, 64)", found=[FOUND_ACT, FOUND_NORM])
    alone = Subgraph(index=1, compile_range="(1, 8)", found=[Found(pass_name=LONE, pattern="group128", module="x")])
    more = here.model_copy(update={"subgraphs": [*here.subgraphs, again, alone]})
    assert not start(config(expect_fused=2), more) and start(config(expect_fused=3), more)


def test_other_bytes_than_those_replaced():
    def verified(differing: int, op: str = "an_op") -> Verified:
        return Verified(op=op, place=f"layers.{differing}.mlp", calls=1, numbers=1_000_000, differing=differing)

    fused = (FOUND_ACT, FOUND_NORM)
    assert not start(config(), rank(*fused, verified=[verified(10), verified(3, "a_norm")]))
    said = start(config(), rank(*fused, verified=[verified(0), verified(21)], number=2), rank(*fused))
    assert "rank 2: an_op writes other bytes than what it replaces: 21 of 2000000, in layers.21.mlp" in said


def test_it_changes_no_compiled_code():
    assert (
        settings.Settings(strict=True, expect_fused=3, verify=3).of_compiled_code()
        == settings.Settings().of_compiled_code()
    )
