# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks conclude from their measurements; the measuring itself needs a GPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


# ---- timing.py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("", "no-gpu")]
)
def test_results_go_to_a_folder_of_their_gpu_and_vllm(name, folder, monkeypatch):
    import timing

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(name))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(timing, "_version", lambda package: "0.33.0")
    assert timing.results_folder() == timing.RESULTS / folder / "0.33.0"


# ---- grid.py ---------------------------------------------------------------------------------------------------------


def test_shapes_where_ours_is_slower_are_printed(capsys):
    from grid import verdict

    at = {"op": "some_op", "mode": "column", "dtype": "bfloat16", "floor_us": 1.0}
    verdict([
        at | {"M": 4, "H": 512, "impl": "ours", "us": 2.0},
        at | {"M": 4, "H": 512, "impl": "unfused", "us": 1.5},
        at | {"M": 4, "H": 512, "impl": "inductor", "us": 2.5},
        at | {"M": 8, "H": 512, "impl": "ours", "us": 2.0},
        at | {"M": 8, "H": 512, "impl": "unfused", "us": 2.1},
    ])  # fmt: skip
    assert capsys.readouterr().out == "SLOWER some_op column bfloat16 M=4 H=512: ours 2.00, {'unfused': 1.5}\n"


@pytest.fixture
def on_cpu(monkeypatch):
    """Inputs of benchmarks are made on the CPU."""
    for factory in ("randn", "randn_like", "empty_like"):
        original = getattr(torch, factory)
        monkeypatch.setattr(torch, factory, lambda *a, _f=original, **k: _f(*a, **{**k, "device": "cpu"}))


@pytest.mark.parametrize(
    # script, width, numbers a row of the buffer for what is quantised, which only vLLM's unfused ops write to
    ("script", "width", "buffer"),
    [
        ("silu_mul_quant", 512, 512),
        ("rms_norm_quant", 512, 512),
        ("gated_rms_norm_quant", 512, 0),
        ("group_quant", 512, 0),
        ("mla_dual_rms_norm_quant", 512, 512),
        ("mla_v_up_quant", 4, 512),
    ],
)
def test_least_traffic_is_the_bytes_of_inputs_and_outputs(script, width, buffer, on_cpu):
    import grid

    module = importlib.import_module(f"bench_{script}")
    kinds = [
        k for k in vars(module).values() if isinstance(k, type) and issubclass(k, grid.Workload) and hasattr(k, "op")
    ]
    assert kinds
    rows = 4  # TMA-aligned scales need no padding
    for workload in (kind(mode) for kind in kinds for mode in kind.modes):
        total = sum(t.nbytes for t in workload.inputs(rows, width, torch.bfloat16) if t is not None)
        unused = 0 if "keep_norm" in workload.words else 2 * rows * buffer
        assert workload.moved_bytes(rows, width) == total - unused, (workload.op, workload.mode)


def test_a_block_gemm_is_compared_with_vllms_and_moves_what_it_reads_and_writes(on_cpu, monkeypatch):
    from bench_block_gemm import SHAPES, BlockGemm

    gemm, alone = (BlockGemm(mode, 256) for mode in BlockGemm.modes)
    for workload in (gemm, alone):
        inputs = workload.inputs(4, 512, torch.bfloat16)
        product = workload.product(*inputs)
        assert workload.moved_bytes(4, 512) == sum(t.nbytes for t in (*inputs, product))
        assert product.shape == (4, 256)
        assert product.isfinite().all()

    def one_off(*inputs):
        product = gemm.product(*inputs)
        product[1, 2] += 100
        return product

    monkeypatch.setattr(gemm, "replaced", one_off)
    sets = [gemm.inputs(4, 512, torch.bfloat16) for _ in range(2)]
    assert gemm.compared(sets) == {"elements": 2048, "elements_differ": 2}
    assert alone.compared(sets) == {}
    workloads = BlockGemm.of("gemm")
    assert {(w.columns, width) for w in workloads for width in w.widths([k for _, k in SHAPES])} == set(SHAPES)


def test_a_width_that_is_not_whole_groups_is_refused():
    from quantisers import Group

    with pytest.raises(ValueError, match="output width 320 is not a multiple of group_size=128"):
        Group.of("column").outputs(torch.empty(2, 320), 2, 320)


# ---- exactness.py ----------------------------------------------------------------------------------------------------


def test_differences_are_counted_bit_by_bit_and_in_codes():
    from exactness import code_steps, differing

    codes = torch.tensor([1.0, -1.0, 0.0, -0.0, 448.0]).to(torch.float8_e4m3fn)
    other = torch.tensor([1.125, -1.25, -0.0, -0.0, 448.0]).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0]])
    assert code_steps(codes, other) == 2
    assert code_steps(torch.tensor([2**-9]).to(codes.dtype), torch.tensor([-(2**-9)]).to(codes.dtype)) == 2
    assert differing({"codes": codes, "scales": scales}, {"codes": other, "scales": scales}) == {
        "codes": 3,
        "scales": 0,
    }
    with pytest.raises(ValueError, match="ours has the outputs"):
        differing({"codes": codes}, {"codes": other, "scales": scales})


def test_every_case_of_every_op_is_another():
    from exactness import cases

    listed = [(c.op, c.mode, c.form, c.quant_rounding, c.producer.words) for c in cases()]
    assert len(set(listed)) == len(listed)
    # graphs that are compiled already are found by their quantiser
    assert len({c.quant for c in cases()}) == len({(c.kind, c.mode) for c in cases()})


def test_what_is_replaced_leaves_the_inputs_of_ours_alone(monkeypatch):
    from exactness import PRODUCERS

    class Ops:  # vLLM's, which write outputs, or in place
        def silu_and_mul(self, y, x):
            y.fill_(1.0)

        def rms_norm(self, y, x, weight, epsilon):
            y.fill_(2.0)

        def fused_add_rms_norm(self, x, residual, weight, epsilon):
            x.fill_(3.0)
            residual.fill_(4.0)

    monkeypatch.setattr(torch.ops, "_C", Ops(), raising=False)
    found = {}
    for producer in PRODUCERS:
        if "custom_op" not in (form for form, _ in producer.forms):
            continue
        inputs = producer.inputs(2, producer.widths[0], torch.bfloat16, torch.Generator().manual_seed(0))
        before = [t.clone() for t in inputs]
        y, more = producer.custom_op(*inputs)
        assert y.shape == (2, producer.widths[0])
        assert all(map(torch.equal, inputs, before)), producer.stem
        values = {"": y} | more
        assert all((t == t.flatten()[0]).all() for t in values.values())
        found[producer.stem] = {name: float(t.flatten()[0]) for name, t in values.items()}
    assert found == {
        "silu_mul": {"": 1.0},
        "rms_norm": {"": 2.0, "normed": 2.0},
        "add_rms_norm": {"": 3.0, "normed": 3.0, "residual": 4.0},
        "mla_dual_rms_norm": {"": 2.0, "kv_normed": 2.0},
    }


# ---- rocm.py ---------------------------------------------------------------------------------------------------------


def test_rocms_table_without_a_gpu(capsys):
    """Each row is computed, against plain torch; differences would be the table's own."""
    from rocm import differing, main

    main(["--plain"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "× 256" in line]
    assert len(lines) == 18 and all(set(line.split("│")[6].strip()) <= set("0, ") for line in lines)
    one, other = torch.tensor([1.0, float("nan"), 3.0, 4.0]), torch.tensor([1.0, float("nan"), 3.5, 4.0])
    assert differing((one, other), (other, other)) == [250_000, 0]
