# SPDX-License-Identifier: Apache-2.0
"""`explain` apart from the trace: which layers are traced, what is counted and saved, what is shown. With traces:
tests/compile/test_whole_models.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_fusion_plugin import child, cli
from vllm_fusion_plugin.explain import command, page, savings
from vllm_fusion_plugin.explain.explanation import ELSEWHERE, Explanation, explain
from vllm_fusion_plugin.explain.traced import Layer, Traced
from vllm_fusion_plugin.rank_report import MODEL_CODE, Found, Missed, RankReport, Subgraph
from vllm_fusion_plugin.vllm_flags import NoEffect

MODELS = Path(__file__).parent / "models"
GROUP = "group128[split,tma,ue8m0]"
ACT, NORM, DUAL = "activation_quant_fusion_pass", "rmsnorm_quant_fusion_pass", "mla_dual_rms_norm_fusion_pass"


@pytest.mark.parametrize(
    ("structures", "kept"),
    [
        ("", {}),
        ("D", {0: 1}),
        ("DDDDDD", {0: 1, 1: 5}),
        ("DDDMMMMM", {0: 1, 1: 2, 3: 1, 4: 4}),  # DeepSeek-V3
        ("LLLFLLLFLLLF", {0: 1, 1: 6, 3: 3, 4: 2}),  # Qwen3-Next: a layer after another kind is another case
    ],
)
def test_a_layer_of_each_kind_and_predecessor_is_traced(structures, kept):
    layers = pytest.importorskip("vllm_fusion_plugin.explain.layers")  # imports torch
    assert layers.keep(list(structures)) == kept


def test_a_model_is_cut_to_the_layers_that_differ():
    torch = pytest.importorskip("torch")
    from vllm_fusion_plugin.explain import layers

    class Dense(torch.nn.Module):
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.input_norm, self.mlp = torch.nn.RMSNorm(width), torch.nn.Linear(width, width)

    class Backbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Dense(4 if i != 3 else 8) for i in range(6))
            self.start_layer, self.end_layer = 0, 6

    model = torch.nn.Sequential(Backbone())
    assert [(x.index, x.stands_for, x.kind) for x in layers.cut(model)] == [
        (0, 1, "Linear"),
        (1, 3, "Linear"),
        (3, 1, "Linear"),
        (4, 1, "Linear"),
    ]
    assert len(model[0].layers) == model[0].end_layer == 4 and model[0].layers[2].mlp.in_features == 8
    assert layers.cut(torch.nn.Linear(1, 1)) == []


# ---- savings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pass_name", "pattern", "saved"),
    [
        (ACT, f"silu_mul[native]+{GROUP}", (2 * 4096 * 2, 1)),  # written and read
        (NORM, f"fused_add_rms_norm+{GROUP}+sum", (2 * 4096 * 2, 1)),
        (NORM, f"rms_norm[gemma]+{GROUP}+norm", (4096 * 2, 1)),  # something else reads it, so it is written
        (NORM, f"fused_add_rms_norm+{GROUP}+norm+sum", (4096 * 2, 1)),
        (NORM, "rms_norm[native]+token[native]", (0, 0)),  # Inductor would have made one kernel as well
        (DUAL, f"mla_dual_rms_norm+{GROUP}", (0, 1)),
        ("group_quant_pass", GROUP, (0, 0)),
        (MODEL_CODE, "silu_mul+static[_C.silu_and_mul_quant]", (0, 0)),
    ],
)
def test_what_a_fusion_saves(pass_name, pattern, saved):
    each = savings.of(Found(pass_name=pass_name, pattern=pattern, width=4096), itemsize=2)
    assert (each.bytes, each.launches) == saved


def test_time_is_bytes_at_the_gpus_bandwidth_and_launches():
    each = savings.PerToken(bytes=3_350_000, launches=1)
    assert savings.total([(10, each)], tokens=100, gpu="h100").model_dump() == {
        "tokens": 100,
        "bytes": 3_350_000_000,
        "launches": 10,
        "us": 1000 + 10 * savings.LAUNCH_US,
    }


# ---- explanations ----------------------------------------------------------------------------------------------------


def found(pass_name: str, pattern: str, module: str, reader: str, width: int = 4096) -> Found:
    return Found(pass_name=pass_name, pattern=pattern, module=module, reader=reader, width=width)


def traced(**changes) -> Traced:
    """Three layers of one kind, of which the last two are alike, as 1 + 5 of a model's."""

    def layer(i: int, norm: str) -> list[Found]:
        at = f"layers.{i}"
        return [
            found(NORM, f"{norm}+{GROUP}", at, f"{at}.attn.qkv.quant_method.fp8_linear"),
            found(ACT, f"silu_mul[native]+{GROUP}", f"{at}.mlp", f"{at}.mlp.down", 12288),
        ]

    left = [Missed(pass_name="none", reason=f"why <{GROUP}>", module=f"layers.{i}.attn.o", width=1) for i in (0, 1)]
    modules = [f"layers.{i}.{name}" for i in (0, 1) for name in ("attn.qkv.quant_method", "attn.o", "mlp.down")]
    head = Missed(pass_name=ACT, reason="GELU·mul is followed by another", module="head")
    subgraph = Subgraph(
        index=0,
        compile_range="(1, 64)",
        modules=modules,
        found=layer(0, "rms_norm") + layer(1, "fused_add_rms_norm"),
        missed=[*left, head],
    )
    kept = [Layer(index=0, kind="Attention + MLP"), Layer(index=1, kind="Attention + MLP", stands_for=5)]
    report = RankReport(subgraphs=[subgraph], linear_kernels={"SomeKernel": 8})
    return Traced(vllm="1.2.3", gpu="NVIDIA X", flashinfer=True, report=report, layers=kept).model_copy(update=changes)


def test_layers_are_counted_by_what_they_stand_for():
    e = explain(traced(), "some/model", "h200", tensor_parallel_size=2, tokens=[1, 100])
    layers, elsewhere = e.kinds
    assert (layers.name, layers.layers, elsewhere.name, elsewhere.layers) == ("Attention + MLP", 6, ELSEWHERE, 0)
    assert [(b.reader, b.places, b.fused, b.parts[:1], b.op) for b in layers.boundaries] == [
        ("attn.qkv", 1, True, ["RMS norm"], "rms_norm_group_fp8_quant"),
        ("attn.qkv", 5, True, ["residual add + RMS norm"], "rms_norm_group_fp8_quant"),
        ("attn.o", 6, False, [], ""),
        ("mlp.down", 6, True, ["SiLU·mul"], "silu_mul_group_fp8_quant"),
    ]
    assert layers.boundaries[2].why == "why <FP8 quantiser, groups of 128, UE8M0 scales>"
    assert (e.fused, e.left, e.summary) == (12, 7, "12 of 19 quantisers fuse")
    assert [(s.tokens, s.launches, s.bytes) for s in e.saves] == [
        (tokens, 12, tokens * 6 * 2 * 2 * (4096 + 12288)) for tokens in (1, 100)
    ]
    assert "of 2 that share the model" in e.gpu


def test_flags_that_match_nothing_are_named():
    e = explain(traced(asked={"fuse_attn_quant": True, "fuse_act_quant": True}), "m", "h100", 1, [1])
    assert [n.flag for n in e.no_effect] == ["fuse_attn_quant"] and e.exit_status == 1
    assert explain(traced(asked={"fuse_act_quant": True}), "m", "h100", 1, [1]).exit_status == 0


def test_what_holds_for_some_numbers_of_tokens_says_so():
    trace = traced()
    other = trace.report.subgraphs[0].model_copy(update={"compile_range": "(65, 128)", "missed": []})
    trace.report.subgraphs.append(other)
    [layers, _] = explain(trace, "m", "h100", 1, [1]).kinds
    assert [(b.reader, b.places, b.tokens) for b in layers.boundaries if not b.fused] == [("attn.o", 6, "1-64")]
    assert [b.tokens for b in layers.boundaries if b.fused] == ["", "", ""]


# ---- page ------------------------------------------------------------------------------------------------------------

FLAG = NoEffect(flag="fuse_x", why="because <of> y", do="-cc.z")


@pytest.fixture
def written() -> str:
    trace = traced(no_effect=[FLAG], ignored=["--port", "1"], notes=["a note"])
    return page.page(explain(trace, "some/model", "h100", 1, [1, 8192]))


class Elements(HTMLParser):
    """What a page consists of: open elements have to be closed in order."""

    VOID = ("meta", "wbr", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows, self.text = 0, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.rows += tag == "tr"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(written):
    elements = Elements(written)
    assert not elements.open
    assert not [name for name, _ in elements.attributes if name in ("src", "href", "onload", "onclick")]
    assert "<script" not in written and "@import" not in written and "url(" not in written and "://" not in written
    assert elements.rows == 2 + 4 + 1  # two headings
    for words in (
        "12 of 19 quantisers fuse",
        "rms_norm_group_fp8_quant",
        "why <FP8 quantiser, groups of 128, UE8M0 scales>",
        "fuse_x does nothing:",
        "because <of> y",
        "--port 1",
        "a note",
    ):
        assert words in elements.text


def test_a_browser_shows_the_page(written, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium or Chrome")
    (tmp_path / "page.html").write_text(
        written.replace(
            "</body>",
            "<script>document.title = document.documentElement.scrollWidth + ' ' + document.querySelector('.bar span')"
            ".getBoundingClientRect().width / document.querySelector('.bar').clientWidth</script></body>",
        )
    )
    headless = (browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,800", "--dump-dom")
    arguments = (f"--user-data-dir={tmp_path / 'profile'}", str(tmp_path / "page.html"))
    shown = subprocess.run([*headless, *arguments], capture_output=True, text=True, timeout=120)
    if not shown.stdout:
        pytest.skip(f"{browser} does not start here: {shown.stderr[-500:]}")
    width, share = shown.stdout.partition("<title>")[2].partition("</title>")[0].split()
    assert int(width) <= 500  # no scrolling sideways, on a telephone either
    assert abs(float(share) - 12 / 19) < 0.01


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What the command asks of the trace, which is a made one."""
    requests: list[dict] = []

    def ask(module, request, progress):
        requests.append(request)
        progress((0.5, "half"))
        return traced().model_dump()

    monkeypatch.setattr(child, "ask", ask)
    return requests


def run(*arguments: str):
    return CliRunner().invoke(cli.app, ["explain", *arguments])


def test_the_command_hands_on_what_is_asked(asked, tmp_path):
    model = str(MODELS / "qwen3-8b-8layers")
    result = run(model, "--gpu", "b200", "--tp", "4", "--no-flashinfer", "--tokens", "7", "--json", "--", "-cc.mode=3")
    assert result.exit_code == 0, result.output
    e = Explanation(**json.loads(result.stdout))
    assert e.model == "qwen3-8b-8layers" and [s.tokens for s in e.saves] == [7]
    assert asked == [
        {"model": model, "flags": ["-cc.mode=3"], "gpu": "b200", "tensor_parallel_size": 4, "flashinfer": False}
    ]
    html = tmp_path / "page.html"
    assert run(model, "--html", str(html)).exit_code == 0 and html.read_text().startswith("<!doctype html>")
    printed = run(model).stdout
    assert "12 of 19 quantisers fuse" in printed and "6 fused" in printed and "saves 1 launch, 49.2 KB" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/folder"], "there is no folder /no/such/folder"),
        (["nobody/nothing"], "hf download nobody/nothing config.json"),
        (["{empty}"], "has no key architectures"),
        (["{model}", "--", "--model", "a/b"], "the flags name another: a/b"),
        (["{model}", "--html", "/no/such/folder/page.html"], "page.html cannot be written: there is no folder"),
    ],
)
def test_bad_input_is_one_line(arguments, words, asked, tmp_path):
    pytest.importorskip("huggingface_hub")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    places = {"{empty}": str(tmp_path), "{model}": str(MODELS / "qwen3-8b-8layers")}
    result = run(*(places.get(a, a) for a in arguments))
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert result.output.startswith("error: ") and words in result.output


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two models, one of which says how it is served."""
    for name, served in (("one", ""), ("two", '{"name": "some/model", "tensor_parallel_size": 4}')):
        (tmp_path / name).mkdir()
        shutil.copy(MODELS / "qwen3-8b-8layers" / "config.json", tmp_path / name)
        if served:
            (tmp_path / name / "serve.json").write_text(served)
    return tmp_path


def test_many_models(asked, folder):
    (folder / "one" / "config.json").write_text("{}")
    result = run("--matrix", str(folder), "--gpu", "b200", "--json", "--", "-cc.mode=3")
    assert result.exit_code == 1  # nothing fuses in the first
    column = json.loads(result.stdout)
    assert asked[0].items() >= {"gpu": "b200", "tensor_parallel_size": 4, "flags": ["-cc.mode=3"]}.items()
    first, second = column["rows"]
    assert first["problem"].startswith("one/config.json has no key architectures")
    assert second == {
        "model": "some/model",
        "tensor_parallel_size": 4,
        "layers": 6,
        "fused": 12,
        "left": 7,
        "why": {"why <FP8 quantiser, groups of 128, UE8M0 scales>": 6, "GELU·mul is followed by another": 1},
        "problem": "",
    }
    printed = run("--matrix", str(folder)).stdout
    assert "12 of 19" in printed and "some/model on 4 GPUs" in printed and "6: why <FP8" in printed


@pytest.mark.parametrize(
    ("served", "arguments", "words"),
    [
        ("{", ["{folder}"], "serve.json cannot be read"),
        ('{"gpus": 1}', ["{folder}"], "gpus: Extra inputs are not permitted (allowed: name, tensor_parallel_size)"),
        ("", ["/no/such"], "there is no folder /no/such"),
        ("", ["{folder}/one"], "has no folder with a config.json"),
        ("", ["{folder}", "a/b"], "names models, and so does a/b"),
        ("", ["{folder}", "--html", "x"], "--html shows one model"),
    ],
)
def test_many_models_and_bad_input(served, arguments, words, asked, folder):
    if served:
        (folder / "one" / "serve.json").write_text(served)
    result = run("--matrix", *(a.replace("{folder}", str(folder)) for a in arguments))
    assert result.exit_code == 2 and result.output.count("\n") == 1 and words in result.output


def test_no_model_is_named(asked):
    assert "name a model" in run().output and run().exit_code == 2


def test_ctrl_c_ends_without_a_word_while_the_command_is_imported(monkeypatch):
    from vllm_fusion_plugin import __main__

    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "vllm_fusion_plugin.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "vllm_fusion_plugin.cli")
    monkeypatch.delattr("vllm_fusion_plugin.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 130


def test_a_page_that_cannot_be_written_is_known_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "ask", lambda *arguments: pytest.fail("it was explained first"))
    result = run("m", "--html", str(tmp_path / "none" / "page.html"))
    assert result.exit_code == 2 and "there is no folder" in result.output


def test_ctrl_c_ends_without_a_word(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "ask", interrupted)
    result = run("m")
    assert (result.exit_code, result.output) == (130, "")
