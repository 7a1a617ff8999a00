"""The benchmark's byte model, cases, turns and tables, and the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import byte_model
import pytest
import table
import torch
import turns

ROOT = Path(__file__).parent.parent
F32, BF16 = torch.float32, torch.bfloat16


def run(*arguments: str) -> str:
    """Runs Python in the root folder, as a user would; returns stdout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("rule", "param", "grad", "state", "expected"),
    [
        ("adamw", F32, F32, F32, 28),
        ("adamw", BF16, BF16, F32, 22),
        ("adamw", F32, F32, BF16, 20),
        ("adamw", BF16, BF16, BF16, 14),
        ("sgdw", F32, F32, F32, 20),
        ("sgdw", BF16, BF16, BF16, 10),
        ("adamw amsgrad", F32, F32, F32, 36),
        ("sgdw without momentum", F32, F32, F32, 12),
    ],
)
def test_bytes_per_parameter(rule, param, grad, state, expected):
    assert byte_model.step_bytes(rule, param, grad, state) == expected


def test_bytes_are_those_of_the_tensors_that_optimizers_really_keep():
    for dtype in (torch.float64, F32, BF16, torch.float16):
        for case in turns.build(turns.Case(1, 64, dtype))[:3]:
            case.prepare()
            case.step()
            optimizer = case.step.__self__
            (p,) = optimizer.param_groups[0]["params"]
            states = [s for name, s in optimizer.state[p].items() if name != "step"]
            moved = 2 * p.nbytes + p.grad.nbytes + 2 * sum(s.nbytes for s in states)
            assert case.bytes_per_parameter * p.numel() == moved, (case.name, dtype)


def test_every_case_prints_as_what_it_parses_from():
    assert len(set(turns.CASES)) == len(turns.CASES)
    for case in turns.CASES:
        assert turns.Case.parse(str(case)) == case
    assert turns.Case.parse("1x64Mi-bfloat16-kept").elements == 64 << 20
    for text in ("1x64Mi", "1x64Mi-float33-kept", "1x4-float32-old", "ax4-float32-kept", "2x2-load-kept"):
        with pytest.raises(ValueError, match="expected TENSORSxELEMENTS"):
            turns.Case.parse(text)


def test_the_suite_has_the_shapes_that_matter():
    kept = {(c.tensors, c.elements, c.dtype) for c in turns.CASES if c.gradients == "kept" and c.groups == 1}
    new = {(c.tensors, c.elements, c.dtype) for c in turns.CASES if c.gradients == "new"}
    small = {(n, k, F32) for n, k in ((300, 100_000), (2000, 4096), (2000, 256), (1000, 1000))} | {(1000, 1000, BF16)}
    assert new == small
    assert kept == small | {(1, 64 << 20, F32), (1, 64 << 20, BF16)}
    assert {c.lr for c in turns.CASES if c.groups == 465} == {"constant", "changing"}


@pytest.mark.parametrize("text", ["5x17-float32-kept", "5x17-bfloat16-new", "6x9-float32-kept-3groups-changing"])
def test_contenders_step_the_same_tensors_and_agree(text):
    case = turns.Case.parse(text)
    contenders = turns.build(case)
    assert [(c.name, c.groups) for c in contenders] == case.contenders
    after, addresses = [], []
    for contender in contenders:
        if contender.name == turns.BARE_LOOP:
            continue
        optimizer = contender.step.__self__
        params = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        contender.prepare()
        addresses.append([p.grad.data_ptr() for p in params])
        contender.step()
        contender.prepare()
        moved = all(p.grad.data_ptr() != a for p, a in zip(params, addresses[-1], strict=True))
        assert moved == (case.gradients == "new")
        contender.step()
        assert all((p != q).any() for p, q in zip(params, before, strict=True))
        groups = len(optimizer.param_groups)
        assert groups == contender.groups
        assert len({group["lr"] for group in optimizer.param_groups}) == (groups if case.lr == "changing" else 1)
        order = sorted(range(case.tensors), key=lambda i: (i % groups, i))
        after.append(torch.stack([p.detach() for _, p in sorted(zip(order, params, strict=True), key=lambda x: x[0])]))
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], rtol=2e-2 if case.dtype == BF16 else 1e-4, atol=2e-5)


def test_the_bare_loop_steps_every_element():
    case = turns.Case(3, 11)
    bare = turns.build(case)[-1]
    assert bare.name == turns.BARE_LOOP
    (table_,) = bare.step.__defaults__
    (p,) = table_.params
    before = p.detach().clone()
    bare.turn(1)
    assert p.numel() == 33
    assert (p != before).all()


def test_turns_are_measured_in_rounds():
    case = turns.Case(2, 8)
    ticks = []
    measured = turns.measure(case, 0.01, lambda: ticks.append(1))
    assert turns.LEAST_ROUNDS <= len(ticks) <= turns.ROUNDS
    assert [(m.contender, m.groups) for m in measured] == case.contenders
    for one in measured:
        assert len(one.seconds) == len(ticks)
        assert one.steps >= 3
        assert all(s > 0 for s in one.seconds)


# The tables -----------------------------------------------------------------------------------------------------------


def entry(case: str, contender: str, groups: int, seconds: list[float], **info: object) -> dict[str, object]:
    shared = {"tensors": 1000, "elements": 1000, "dtype": "float32", "gradients": "kept", "lr": "constant"}
    own = {"contender": contender, "groups": groups, "bytes_per_parameter": 28}
    return {"group": case, "extra_info": {**shared, **own, **info}, "stats": {"data": seconds}}


@pytest.fixture
def report() -> dict[str, object]:
    """Rounds in which the machine slows down threefold: ratios of the same round do not see it."""
    drift = [1.0, 2.0, 3.0]
    times = {"wd_kernels": 1e-3, "torch fused": 4e-3, "torch foreach": 10e-3, "bare loop": 0.5e-3}
    return {
        "datetime": "2026-03-04T05:06:07.8+00:00",
        "machine_info": {"cpu": {"brand_raw": "A (fast) CPU", "count": 2}, "wd_kernels": {"torch": "2.13.0"}},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [
            *(entry("some", name, 1, [t * d for d in drift]) for name, t in times.items()),
            entry("many", "wd_kernels", 1, [1e-3] * 3, tensors=465, elements=256),
            entry("many", "wd_kernels", 465, [1e-3 + 464e-6 * us for us in (1, 2, 4)], tensors=465, elements=256),
        ],
    }


def test_results_of_a_report(report):
    own = table.results(report)["some"]["wd_kernels", 1]
    assert own.median == pytest.approx(2e-3)
    assert own.iqr == pytest.approx(1e-3)
    assert own.rate == pytest.approx(1e6 * 28 / 2e-3 / 1e9)
    assert own.ratio(table.results(report)["some"]["torch fused", 1]) == pytest.approx(4)


def test_tables_of_a_report(report):
    text = table.render(report)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "date 2026-03-04 05:06 UTC" in lines
    assert "commit 0123456789ab" in lines
    assert "processor A (fast) CPU, 2 cores" in lines
    assert "torch 2.13.0" in lines
    assert "1000 x 1000 float32 kept wd_kernels 2.000 1.000 14.0 28 4.00 10.00" in lines
    assert "torch fused 8.000 4.000 3.5 28 1.00 2.50" in lines
    assert "bare loop 1.000 0.500 28.0 28 8.00 20.00" in lines
    assert "465 x 256 constant wd_kernels 1.000 1.928 465 2.00 1.50" in lines
    block = text.split("\n\n")[2].splitlines()
    assert len(block) == 5
    assert len({line.index(name) for line, name in zip(block[1:], dict.fromkeys(BLOCK), strict=True)}) == 1


BLOCK = ("wd_kernels", "torch fused", "torch foreach", "bare loop")


def test_a_table_without_torch_has_no_ratios(report):
    report["benchmarks"] = [e for e in report["benchmarks"] if "torch" not in e["extra_info"]["contender"]]
    assert table.steps(table.results(report))[1][-2:] == ("-", "-")


def test_a_report_is_saved_by_date_and_processor(report, tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    assert table.main([str(path), "--save", str(tmp_path / "results")]) == 0
    assert capsys.readouterr().out.startswith("date")
    saved = tmp_path / "results" / "2026-03-04-a-fast-cpu.txt"
    assert saved.read_text() == table.render(report)
    assert json.loads(saved.with_suffix(".json").read_text()) == report


# As users run them ----------------------------------------------------------------------------------------------------


def test_one_tiny_case_from_end_to_end(tmp_path):
    path = tmp_path / "bench.json"
    case = "6x40-float32-new"
    run("-m", "pytest", "bench", "-p", "no:cacheprovider", f"--benchmark-json={path}", "--case", case, "--seconds=0.1")
    report = json.loads(path.read_text())
    assert [e["extra_info"]["contender"] for e in report["benchmarks"]] == list(BLOCK)
    assert all(len(e["stats"]["data"]) >= turns.LEAST_ROUNDS and e["group"] == case for e in report["benchmarks"])
    assert report["machine_info"]["node"] == ""
    text = run("bench/table.py", str(path))
    for part in (f"torch            {torch.__version__}", "6 x 40   float32  new        wd_kernels", "vs fused"):
        assert part in text


def test_the_demo_trains_both_and_draws(tmp_path):
    path = tmp_path / "demo.png"
    text = run("bench/demo.py", "--epochs", "1", "--out", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in text.splitlines() if line.startswith(("torch fused ", "wd_kernels "))]
    assert len(rows) == 2
    assert all(float(word) > 0 for row in rows for word in row[-2:-1])
    assert "largest difference of two weights:" in text
